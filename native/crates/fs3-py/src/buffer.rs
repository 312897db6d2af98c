//! Memory of Python objects as regions: pinned by the buffer protocol until the last part of an operation that
//! uses it has ended, whatever became of the caller.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use fs3_core::{DmaBuf, ForeignMapping, Region, RegionMut};
use parking_lot::Mutex;
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::prelude::*;

use crate::errors::to_python;

struct Pinned(#[allow(dead_code)] PyUntypedBuffer);

fn pin(object: &Bound<'_, PyAny>) -> PyResult<(*mut u8, usize, bool, Arc<Pinned>)> {
    let buffer = PyUntypedBuffer::get(object)?;
    if !buffer.is_c_contiguous() {
        return Err(PyBufferError::new_err("the buffer must be contiguous (C order)"));
    }
    let (ptr, len, readonly) = (buffer.buf_ptr().cast::<u8>(), buffer.len_bytes(), buffer.readonly());
    // An empty export may have no memory at all.
    let ptr = if len == 0 { std::ptr::NonNull::dangling().as_ptr() } else { ptr };
    Ok((ptr, len, readonly, Arc::new(Pinned(buffer))))
}

/// The bytes of any contiguous bytes-like object. They must not change while the operation runs.
pub fn readable(object: &Bound<'_, PyAny>) -> PyResult<Region> {
    let (ptr, len, _, owner) = pin(object)?;
    // SAFETY: the export keeps the memory in place while `owner` lives; that it is not written to meanwhile is the
    // caller's promise (a change on the way is caught by the checksums).
    Ok(unsafe { Region::from_raw(ptr, len, owner) })
}

/// Memory that RDMA may use in place: reads into it and writes from it are not copied. It is registered with a device when
/// it is first used there, and stays so until this is released or collected; until then the object cannot be
/// resized. Without RDMA it does nothing. Thread-safe.
#[pyclass(frozen, module = "fs3._native")]
pub struct RegisteredMemory(Mutex<Option<(ForeignMapping, Arc<Pinned>)>>);

#[pymethods]
impl RegisteredMemory {
    /// `buffer` is any contiguous, writable bytes-like object: a NumPy array, a tensor's memory, a shared mapping. Where
    /// it maps memory of a GPU, `dmabuf` is the descriptor of that memory's dma-buf, which is duplicated, and
    /// `dmabuf_offset` where the mapping begins in it, in bytes: RDMA then moves data to and from the GPU itself. Raises
    /// NOT_SUPPORTED where no RDMA device can do that.
    #[new]
    #[pyo3(signature = (buffer, *, dmabuf=None, dmabuf_offset=0))]
    fn new(py: Python<'_>, buffer: &Bound<'_, PyAny>, dmabuf: Option<i32>, dmabuf_offset: u64) -> PyResult<Self> {
        let (ptr, len, readonly, owner) = pin(buffer)?;
        if readonly || len == 0 {
            return Err(PyValueError::new_err("the buffer is read-only or empty; register writable memory"));
        }
        let dmabuf = dmabuf.map(|fd| shared_dmabuf(py, fd, dmabuf_offset)).transpose()?;
        // SAFETY: the export keeps the memory in place while `owner` lives, which is dropped after the mapping; that the
        // dma-buf is its memory is the caller's promise.
        let mapping = unsafe { ForeignMapping::new(ptr, len, dmabuf) };
        Ok(Self(Mutex::new(Some((mapping, owner)))))
    }

    /// End the registration; operations under way finish first. Harmless twice.
    fn release(&self) {
        let _ = self.0.lock().take();
    }
}

fn shared_dmabuf(py: Python<'_>, fd: i32, offset: u64) -> PyResult<DmaBuf> {
    if fd < 0 {
        return Err(PyValueError::new_err("dmabuf is no descriptor"));
    }
    fs3_net::takes_dmabufs().map_err(|error| to_python(py, &error))?;
    // SAFETY: the caller has it open for the duration of the call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
    Ok(DmaBuf { fd: Arc::new(fd), offset })
}

/// The memory of any contiguous, writable bytes-like object, to be filled.
pub fn writable(object: &Bound<'_, PyAny>) -> PyResult<RegionMut> {
    let (ptr, len, readonly, owner) = pin(object)?;
    if readonly {
        return Err(PyValueError::new_err("the buffer is read-only; reads need writable memory such as a bytearray"));
    }
    // SAFETY: as above; that nobody else uses the memory during the read is the caller's promise.
    Ok(unsafe { RegionMut::from_raw(ptr, len, owner) })
}
