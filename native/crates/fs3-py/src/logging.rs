//! Logs of the native code, to standard error.

use std::sync::OnceLock;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use tracing_subscriber::EnvFilter;

type Change = Box<dyn Fn(EnvFilter) -> bool + Send + Sync>;

/// Puts another filter in the place of the present one; there once logging has been set up.
static CHANGE: OnceLock<Change> = OnceLock::new();

fn filter(level: &str) -> PyResult<EnvFilter> {
    EnvFilter::try_new(level).map_err(|e| PyValueError::new_err(format!("{level:?} is no log level or filter: {e}")))
}

/// Write logs at `level` ("error", "warn", "info", "debug", "trace", or a filter such as "fs3_client=debug") to
/// standard error. Raises RuntimeError when called twice.
#[pyfunction]
pub fn init_logging(level: &str) -> PyResult<()> {
    let builder = tracing_subscriber::fmt().with_env_filter(filter(level)?).with_writer(std::io::stderr);
    // A line that cannot be written, for a full disk say, is dropped: told on standard error, it would be a panic there.
    let builder = builder.log_internal_errors(false).with_filter_reloading();
    let handle = builder.reload_handle();
    builder.try_init().map_err(|_| PyRuntimeError::new_err("logging has been set up already"))?;
    // Only one call gets here.
    let _ = CHANGE.set(Box::new(move |filter| handle.reload(filter).is_ok()));
    Ok(())
}

/// Write logs at another level, or by another filter, from now on. Raises RuntimeError before `init_logging`.
#[pyfunction]
pub fn set_log_level(level: &str) -> PyResult<()> {
    let filter = filter(level)?;
    match CHANGE.get() {
        Some(change) if change(filter) => Ok(()),
        _ => Err(PyRuntimeError::new_err("logging has not been set up")),
    }
}
