//! The storage engine, for the Python shell of a storage service.

use std::time::Duration;

use fs3_storage::{DiskConfig, EngineConfig, Healing, StorageEngine as Engine};
use parking_lot::Mutex;
use prost::Message;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde::Deserialize;

use crate::errors::to_python;
use crate::transport::{RdmaOptions, transport};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    node_id: u32,
    node_uuid_hex: String,
    cluster_id: String,
    token: String,
    host: String,
    frame_port: u16,
    disks: Vec<Disk>,
    read_cache_bytes: usize,
    kv_memory_bytes: u64,
    durable_writes: bool,
    scrub_bytes_per_s: u64,
    scrub_interval_s: u64,
    resync_bytes_per_s: u64,
    #[serde(default)]
    transport: String,
    #[serde(default)]
    rdma: Option<RdmaOptions>,
    #[serde(default)]
    shared_memory: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Disk {
    path: String,
    uuid_hex: String,
}

fn uuid(hex: &str) -> PyResult<[u8; 16]> {
    let wrong = || PyValueError::new_err(format!("{hex:?} is not a uuid of 32 hexadecimal digits"));
    if hex.len() != 32 {
        return Err(wrong());
    }
    u128::from_str_radix(hex, 16).map(u128::to_be_bytes).map_err(|_| wrong())
}

impl Config {
    fn into_engine(self) -> PyResult<EngineConfig> {
        let transport = Python::attach(|py| transport(py, &self.transport, self.rdma, self.shared_memory))?;
        let disks = self.disks.into_iter().map(|d| Ok(DiskConfig { uuid: uuid(&d.uuid_hex)?, path: d.path.into() }));
        Ok(EngineConfig {
            node_id: self.node_id,
            node_uuid: uuid(&self.node_uuid_hex)?,
            cluster_id: self.cluster_id,
            token: self.token,
            host: self.host,
            frame_port: self.frame_port,
            disks: disks.collect::<PyResult<_>>()?,
            read_cache_bytes: self.read_cache_bytes,
            kv_memory_bytes: self.kv_memory_bytes,
            durable_writes: self.durable_writes,
            healing: Healing {
                scrub_bytes_per_s: self.scrub_bytes_per_s,
                scrub_interval: Duration::from_secs(self.scrub_interval_s),
                resync_bytes_per_s: self.resync_bytes_per_s,
            },
            transport,
        })
    }
}

/// The configuration of an engine from its JSON. Raises ValueError.
pub fn engine_config(json: &str) -> PyResult<EngineConfig> {
    let config: Config = serde_json::from_str(json)
        .map_err(|e| PyValueError::new_err(format!("the configuration of the engine is wrong: {e}")))?;
    config.into_engine()
}

enum State {
    Configured(Option<EngineConfig>),
    Running(std::sync::Arc<Engine>),
    Stopped,
}

/// The engine of one storage process; see `fs3.storage.engine.StorageEngine`.
#[pyclass(frozen)]
pub struct StorageEngine(Mutex<State>);

impl StorageEngine {
    fn running(&self) -> PyResult<std::sync::Arc<Engine>> {
        match &*self.0.lock() {
            State::Running(engine) => Ok(engine.clone()),
            _ => Err(PyRuntimeError::new_err("the storage engine does not run")),
        }
    }
}

#[pymethods]
impl StorageEngine {
    #[new]
    fn new(config_json: &str) -> PyResult<Self> {
        Ok(Self(Mutex::new(State::Configured(Some(engine_config(config_json)?)))))
    }

    fn start(&self, py: Python<'_>) -> PyResult<u16> {
        let config = match &mut *self.0.lock() {
            State::Configured(config) => config.take(),
            _ => None,
        };
        let config = config.ok_or_else(|| PyRuntimeError::new_err("the storage engine was started before"))?;
        let engine = py.detach(|| Engine::start(config)).map_err(|e| to_python(py, &e))?;
        let port = engine.frame_port();
        *self.0.lock() = State::Running(engine.into());
        Ok(port)
    }

    fn apply_routing(&self, py: Python<'_>, routing: &[u8]) -> PyResult<()> {
        let engine = self.running()?;
        py.detach(|| engine.apply_routing(routing)).map_err(|e| to_python(py, &e))
    }

    fn renew_lease(&self, serve_until_monotonic_ns: u64) -> PyResult<()> {
        self.running()?.renew_lease(serve_until_monotonic_ns);
        Ok(())
    }

    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let engine = self.running()?;
        let encoded = py.detach(|| engine.status().encode_to_vec());
        Ok(PyBytes::new(py, &encoded))
    }

    fn stop(&self, py: Python<'_>) {
        let state = std::mem::replace(&mut *self.0.lock(), State::Stopped);
        if let State::Running(engine) = state {
            py.detach(|| engine.stop());
        }
    }
}
