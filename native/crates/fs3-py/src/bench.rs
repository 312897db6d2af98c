//! Measurements of this machine's limits (`fs3-bench`), with the GIL released.

use std::io;
use std::path::PathBuf;

use fs3_bench::Measured;
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;

/// (bytes, operations, seconds, cpu_seconds, p50_us)
type Row = (u64, u64, f64, f64, f64);

fn row(measured: Measured) -> Row {
    (measured.bytes, measured.operations, measured.seconds, measured.cpu_seconds, measured.p50_us)
}

fn run(py: Python<'_>, work: impl FnOnce() -> io::Result<Measured> + Send) -> PyResult<Row> {
    py.detach(work).map(row).map_err(|e| PyOSError::new_err((e.raw_os_error().unwrap_or(libc::EIO), e.to_string())))
}

#[pyfunction]
fn bench_memory_copy(py: Python<'_>, total_bytes: u64) -> PyResult<Row> {
    run(py, || Ok(fs3_bench::memory_copy(total_bytes)))
}

#[pyfunction]
fn bench_checksum(py: Python<'_>, total_bytes: u64) -> PyResult<Row> {
    run(py, || Ok(fs3_bench::checksum(total_bytes)))
}

#[pyfunction]
fn bench_tcp_stream(py: Python<'_>, streams: usize, total_bytes: u64) -> PyResult<Row> {
    run(py, || fs3_bench::tcp_stream(streams, total_bytes))
}

#[pyfunction]
fn bench_tcp_ping_pong(py: Python<'_>, in_flight: usize, operations: u64) -> PyResult<Row> {
    run(py, || fs3_bench::tcp_ping_pong(in_flight, operations))
}

#[pyfunction]
fn bench_disk(py: Python<'_>, directory: PathBuf, depth: usize, total_bytes: u64, write: bool) -> PyResult<Row> {
    run(py, move || {
        if write {
            fs3_bench::disk_write(&directory, depth, total_bytes)
        } else {
            fs3_bench::disk_read(&directory, depth, total_bytes)
        }
    })
}

#[pyfunction]
fn bench_bare_chain(
    py: Python<'_>,
    directory: PathBuf,
    connections: usize,
    nodes: usize,
    total_bytes: u64,
) -> PyResult<Row> {
    run(py, move || fs3_bench::bare_chain(&directory, connections, nodes, total_bytes))
}

/// Add the functions to the extension module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(bench_memory_copy, module)?)?;
    module.add_function(wrap_pyfunction!(bench_checksum, module)?)?;
    module.add_function(wrap_pyfunction!(bench_tcp_stream, module)?)?;
    module.add_function(wrap_pyfunction!(bench_tcp_ping_pong, module)?)?;
    module.add_function(wrap_pyfunction!(bench_disk, module)?)?;
    module.add_function(wrap_pyfunction!(bench_bare_chain, module)?)?;
    Ok(())
}
