//! Which transport a process uses, from its name.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use fs3_net::{RdmaSettings, Transport};
use parking_lot::Mutex;
use pyo3::prelude::*;

use crate::errors::to_python;

/// `auto`, `tcp` (also when empty) or `rdma`. All that ask for the same share devices and registered memory. Raises
/// ValueError for other names, and what `Transport::new` says on a machine without RDMA.
pub fn transport(py: Python<'_>, name: &str) -> PyResult<Transport> {
    static MADE: LazyLock<Mutex<BTreeMap<String, Transport>>> = LazyLock::new(Mutex::default);
    let name = if name.is_empty() { "tcp" } else { name };
    if let Some(transport) = MADE.lock().get(name) {
        return Ok(transport.clone());
    }
    let mode = name.parse().map_err(|e: fs3_core::Error| to_python(py, &e))?;
    let transport = Transport::new(mode, RdmaSettings::default()).map_err(|e| to_python(py, &e))?;
    MADE.lock().insert(name.to_owned(), transport.clone());
    Ok(transport)
}
