//! Measurements of this machine's limits (`fs3-bench`), with the GIL released.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use fs3_bench::Measured;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::operation::Operation;
use crate::runtime::runtime;
use crate::transport::RdmaOptions;

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

/// A listener of `bench_rdma`; it ends when it is dropped.
#[pyclass(frozen, module = "fs3._native")]
pub struct RdmaBenchServer(fs3_net::bench::BenchServer);

#[pymethods]
impl RdmaBenchServer {
    /// Listen on `host:port`; port 0 picks one. Raises UNAVAILABLE without RDMA.
    #[new]
    #[pyo3(signature = (host, port, rdma=None))]
    fn new(py: Python<'_>, host: &str, port: u16, rdma: Option<RdmaOptions>) -> PyResult<Self> {
        let transport = crate::transport::transport(py, "rdma", rdma, false)?;
        let (runtime, addr) = (runtime()?, format!("{host}:{port}"));
        let server = py.detach(|| runtime.block_on(fs3_net::bench::BenchServer::listen(&addr, transport)));
        server.map(Self).map_err(|e| to_python(py, &e))
    }

    /// The port it listens on.
    #[getter]
    fn port(&self) -> u16 {
        self.0.port()
    }
}

/// Measure RDMA with the `RdmaBenchServer` at `addr`, each measurement `seconds` long: the device here, and
/// (name, bytes/s, operations/s, median in us, p99 in us) each.
#[pyfunction]
#[pyo3(signature = (addr, seconds, size_bytes, rdma=None))]
fn bench_rdma(
    py: Python<'_>,
    addr: String,
    seconds: f64,
    size_bytes: usize,
    rdma: Option<RdmaOptions>,
) -> PyResult<Operation> {
    let transport = crate::transport::transport(py, "rdma", rdma, false)?;
    let limit = Duration::try_from_secs_f64(seconds).map_err(|e| PyValueError::new_err(e.to_string()))?;
    if size_bytes == 0 || size_bytes > fs3_net::bench::OPERATION_BYTES_MAX {
        return Err(PyValueError::new_err("size_bytes must be in 1..8 MiB"));
    }
    let work = async move { fs3_net::bench::run(transport, &addr, size_bytes, limit).await };
    Ok(Operation::new(work, |_, (device, all)| {
        let rows: Vec<(&str, f64, f64, f64, f64)> =
            all.iter().map(|m| (m.name, m.bytes_per_s, m.operations_per_s, m.median_us, m.p99_us)).collect();
        Ok((device, rows))
    }))
}

/// Add the functions to the extension module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(bench_memory_copy, module)?)?;
    module.add_function(wrap_pyfunction!(bench_checksum, module)?)?;
    module.add_function(wrap_pyfunction!(bench_tcp_stream, module)?)?;
    module.add_function(wrap_pyfunction!(bench_tcp_ping_pong, module)?)?;
    module.add_function(wrap_pyfunction!(bench_disk, module)?)?;
    module.add_function(wrap_pyfunction!(bench_bare_chain, module)?)?;
    module.add_function(wrap_pyfunction!(bench_rdma, module)?)?;
    module.add_class::<RdmaBenchServer>()?;
    Ok(())
}
