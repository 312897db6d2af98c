//! Logs of the native code, to standard error.

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use tracing_subscriber::EnvFilter;

/// Write logs at `level` ("error", "warn", "info", "debug", "trace", or a filter such as "fs3_client=debug") to
/// standard error. Raises RuntimeError when called twice.
#[pyfunction]
pub fn init_logging(level: &str) -> PyResult<()> {
    let filter = EnvFilter::try_new(level)
        .map_err(|e| PyValueError::new_err(format!("{level:?} is no log level or filter: {e}")))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .try_init()
        .map_err(|_| PyRuntimeError::new_err("logging has been set up already"))
}
