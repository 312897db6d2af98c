//! The simulated world, for `fs3.testing.simulator`.

use std::collections::BTreeMap;

use fs3_sim::{Options, World};
use parking_lot::Mutex;
use prost::Message;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::to_python;

/// See `fs3.native.SimWorld`.
#[pyclass(frozen)]
pub struct SimWorld(Mutex<World>);

#[pymethods]
impl SimWorld {
    #[new]
    #[pyo3(signature = (seed, options_json = ""))]
    fn new(py: Python<'_>, seed: u64, options_json: &str) -> PyResult<Self> {
        let options = Options::draw(seed, options_json).map_err(PyValueError::new_err)?;
        Ok(Self(Mutex::new(py.detach(|| World::new(seed, options)))))
    }

    fn options_json(&self) -> String {
        serde_json::to_string(self.0.lock().options()).expect("options are plain data")
    }

    fn now_ns(&self) -> u64 {
        self.0.lock().now_ns()
    }

    fn run_until(&self, py: Python<'_>, time_ns: u64) {
        py.detach(|| self.0.lock().run_until(time_ns));
    }

    #[pyo3(signature = (node, config_json = ""))]
    fn engine(slf: Bound<'_, Self>, node: u32, config_json: &str) -> PyResult<SimEngine> {
        let config = match config_json {
            "" => None,
            json => Some(crate::storage::engine_config(json)?),
        };
        Ok(SimEngine { world: slf.unbind(), node, config: Mutex::new(config) })
    }

    fn events(&self) -> Vec<(u64, &'static str, u32)> {
        self.0.lock().happenings().into_iter().map(|h| (h.at_ns, h.kind.name(), h.node)).collect()
    }

    fn delays(&self, sender: &str, receiver: &str) -> Vec<u64> {
        self.0.lock().delays(sender, receiver)
    }

    fn publish_routing(&self, py: Python<'_>, routing: &[u8]) -> PyResult<()> {
        self.0.lock().publish_routing(routing).map_err(|e| to_python(py, &e))
    }

    fn set_load(&self, on: bool) {
        self.0.lock().set_load(on);
    }

    fn heal(&self, py: Python<'_>) {
        py.detach(|| self.0.lock().heal());
    }

    fn quiescent(&self) -> bool {
        self.0.lock().is_quiescent()
    }

    fn violation(&self) -> String {
        self.0.lock().violation()
    }

    fn check(&self, py: Python<'_>) -> String {
        py.detach(|| self.0.lock().check())
    }

    fn trace_hash(&self) -> u64 {
        self.0.lock().trace_hash()
    }

    fn trace(&self) -> Vec<String> {
        self.0.lock().trace()
    }

    fn statistics(&self) -> BTreeMap<String, u64> {
        self.0.lock().statistics()
    }
}

/// The engine of a simulated node; see `fs3.storage.engine.StorageEngine`.
#[pyclass(frozen)]
pub struct SimEngine {
    world: Py<SimWorld>,
    node: u32,
    config: Mutex<Option<fs3_storage::EngineConfig>>,
}

#[pymethods]
impl SimEngine {
    fn start(&self, py: Python<'_>) -> PyResult<u16> {
        let config = self.config.lock().take();
        let config = config.ok_or_else(|| PyValueError::new_err("the engine has no configuration, or was started"))?;
        self.world.get().0.lock().start_engine(self.node, config).map_err(|e| to_python(py, &e))
    }

    fn apply_routing(&self, py: Python<'_>, routing: &[u8]) -> PyResult<()> {
        let applied = self.world.get().0.lock().with_engine(self.node, |engine| engine.apply_routing(routing));
        applied.and_then(|result| result).map_err(|e| to_python(py, &e))
    }

    fn renew_lease(&self, py: Python<'_>, serve_until_monotonic_ns: u64) -> PyResult<()> {
        let world = self.world.get().0.lock();
        let renewed = world.with_engine(self.node, |engine| engine.renew_lease(serve_until_monotonic_ns));
        renewed.map_err(|e| to_python(py, &e))
    }

    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let status = self.world.get().0.lock().with_engine(self.node, |engine| engine.status().encode_to_vec());
        Ok(PyBytes::new(py, &status.map_err(|e| to_python(py, &e))?))
    }

    fn stop(&self) {
        self.world.get().0.lock().stop_engine(self.node);
    }
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<SimWorld>()?;
    module.add_class::<SimEngine>()
}
