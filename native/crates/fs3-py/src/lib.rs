//! `fs3._native`: the Rust client and storage engine for Python. Bindings only, no logic.
//!
//! Every call that may wait returns an [`operation::Operation`], which is waited for with the interpreter released
//! and interruptibly, or awaited in asyncio. Errors become those of `fs3.core.errors`.

mod bench;
mod buffer;
mod client;
mod errors;
mod file;
mod kv;
mod locks;
mod logging;
mod mount;
mod operation;
mod records;
mod runtime;
mod sim;
mod storage;
mod trace;
mod transport;
mod usrbio;

use pyo3::prelude::*;

/// Messages and their parts are many small allocations, freed by other threads than made them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
use pyo3::types::PyBytes;

/// CRC32C (Castagnoli) of a bytes-like object.
#[pyfunction]
fn crc32c(py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<u32> {
    let region = buffer::readable(data)?;
    Ok(py.detach(|| fs3_core::crc32c(&region)))
}

/// Packed little-endian CRC32C of the 4 KiB blocks of a bytes-like object.
#[pyfunction]
fn crc_blocks<'py>(py: Python<'py>, data: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
    let region = buffer::readable(data)?;
    let packed = py.detach(|| fs3_core::pack_crcs(&fs3_core::crc_blocks(0, &region)));
    Ok(PyBytes::new(py, &packed))
}

/// The native part of fs3. Import it through `fs3.native`.
#[pymodule(gil_used = true)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<operation::Operation>()?;
    module.add_class::<buffer::RegisteredMemory>()?;
    module.add_class::<client::Client>()?;
    module.add_class::<file::File>()?;
    module.add_class::<kv::KvCache>()?;
    module.add_class::<locks::Locks>()?;
    module.add_class::<records::Attr>()?;
    module.add_class::<records::Layout>()?;
    module.add_class::<records::DirEntry>()?;
    module.add_class::<records::Statfs>()?;
    module.add_class::<records::Chunk>()?;
    module.add_class::<records::Replica>()?;
    module.add_class::<storage::StorageEngine>()?;
    module.add_class::<trace::TracedOperation>()?;
    module.add_class::<trace::TracedRequest>()?;
    module.add_function(wrap_pyfunction!(crc32c, module)?)?;
    module.add_function(wrap_pyfunction!(crc_blocks, module)?)?;
    module.add_function(wrap_pyfunction!(logging::init_logging, module)?)?;
    module.add_function(wrap_pyfunction!(logging::set_log_level, module)?)?;
    module.add_function(wrap_pyfunction!(runtime::set_runtime_threads, module)?)?;
    module.add_function(wrap_pyfunction!(trace::trace_start, module)?)?;
    module.add_function(wrap_pyfunction!(trace::trace_stop, module)?)?;
    mount::register(module)?;
    bench::register(module)?;
    sim::register(module)?;
    usrbio::register(module)?;
    runtime::watch_forks()?;
    operation::register_exit(module)
}
