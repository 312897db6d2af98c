//! Which transport a process uses, and how.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use fs3_net::{RdmaSettings, Transport};
use parking_lot::Mutex;
use pyo3::prelude::*;
use serde::Deserialize;

use crate::errors::to_python;

/// `fs3.RdmaOptions`, which has checked the ranges.
#[derive(Deserialize, FromPyObject)]
#[serde(deny_unknown_fields)]
pub struct RdmaOptions {
    devices: Vec<String>,
    gid_index: Option<u8>,
    service_level: u8,
    traffic_class: u8,
    pkey_index: u16,
    mtu: u32,
    ack_timeout: u8,
    retry_count: u8,
    registered_bytes_max: usize,
}

impl From<RdmaOptions> for RdmaSettings {
    fn from(options: RdmaOptions) -> Self {
        Self {
            devices: options.devices,
            gid_index: options.gid_index,
            service_level: options.service_level,
            traffic_class: options.traffic_class,
            pkey_index: options.pkey_index,
            // Verbs number 256 bytes as 1.
            mtu_max: (options.mtu.max(256).ilog2() - 7) as u8,
            timeout: options.ack_timeout,
            retries: options.retry_count,
            registered_bytes_max: options.registered_bytes_max,
        }
    }
}

/// `auto`, `tcp` (also when empty) or `rdma`; with `shared_memory`, payloads within the host may go through it. All that ask for the same share devices and registered memory. Raises
/// ValueError for other names, and what `Transport::new` says on a machine without RDMA.
pub fn transport(py: Python<'_>, name: &str, rdma: Option<RdmaOptions>, shared_memory: bool) -> PyResult<Transport> {
    type Key = (String, RdmaSettings, bool);
    static MADE: LazyLock<Mutex<BTreeMap<Key, Transport>>> = LazyLock::new(Mutex::default);
    let name = if name.is_empty() { "tcp" } else { name };
    let mode = name.parse().map_err(|e: fs3_core::Error| to_python(py, &e))?;
    let key = (name.to_owned(), rdma.map_or_else(RdmaSettings::default, RdmaSettings::from), shared_memory);
    if let Some(transport) = MADE.lock().get(&key) {
        return Ok(transport.clone());
    }
    let transport = Transport::new(mode, key.1.clone()).map_err(|e| to_python(py, &e))?;
    let transport = if shared_memory { transport.sharing_memory() } else { transport };
    MADE.lock().insert(key, transport.clone());
    Ok(transport)
}
