//! The one place where errors cross into Python.

use fs3_core::Error;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

static MAKE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

/// The instance of `fs3.core.errors` that says the same.
pub fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    build(py, error).unwrap_or_else(|failure| failure)
}

fn build(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let make = MAKE.get_or_try_init(py, || PyResult::Ok(py.import("fs3.core.errors")?.getattr("error")?.unbind()))?;
    let hints = PyDict::new(py);
    hints.set_item("maybe_applied", error.maybe_applied)?;
    hints.set_item("routing_version", error.routing_version)?;
    let instance = make.bind(py).call((error.code as u16, error.message.as_ref()), Some(&hints))?;
    Ok(PyErr::from_value(instance))
}

/// The exception object of an error, for results that are returned in a list.
pub fn to_object(py: Python<'_>, error: &Error) -> Py<PyAny> {
    to_python(py, error).into_value(py).into_any()
}
