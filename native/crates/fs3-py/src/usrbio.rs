//! The ring of a mount for Python, as programs for 3FS use it: `hf3fs_py_usrbio`.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::raw::c_int;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fs3_ring::app::{Done, Io, Ring};
use fs3_ring::layout::{Config, Places};
use fs3_ring::{Errno, fds, mounts, names};
use parking_lot::Mutex;
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyIndexError, PyOSError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyMemoryView, PySlice};

/// A thread that waits looks this often for signals (Ctrl-C).
const SIGNALS_EVERY: Duration = Duration::from_millis(100);

fn os_error(error: Errno) -> PyErr {
    let text = std::io::Error::from_raw_os_error(error.0).to_string();
    let text = text.split(" (os error").next().unwrap_or_default().to_owned();
    PyOSError::new_err((error.0, text))
}

/// Memory that is announced to the mount.
struct Base {
    /// What the application mapped it with. No export of it is held, so that it can be closed at any time.
    object: Py<PyAny>,
    address: usize,
    bytes: usize,
    id: [u8; 16],
    block_bytes: u64,
}

/// Shared memory for the ring, or a part of it: what an I/O reads into or writes from. `base` is a buffer over the
/// memory that was announced as `id` (the text of a UUID). Indexing with a slice (step 1) gives a part. Thread-safe.
#[pyclass(frozen, name = "iovec", module = "hf3fs_py_usrbio")]
pub struct IoVec {
    base: Arc<Base>,
    start: usize,
    bytes: usize,
    outcome: Mutex<Outcome>,
}

#[derive(Default)]
struct Outcome {
    result: i64,
    userdata: Option<Py<PyAny>>,
}

impl IoVec {
    fn part(&self, start: usize, bytes: usize) -> Self {
        Self { base: self.base.clone(), start, bytes, outcome: Mutex::default() }
    }
}

#[pymethods]
impl IoVec {
    #[new]
    #[pyo3(signature = (base, id, hf3fs_mount_point, block_size=0, numa=-1))]
    fn new(
        base: &Bound<'_, PyAny>,
        id: &str,
        hf3fs_mount_point: OsString,
        block_size: u64,
        numa: i32,
    ) -> PyResult<Self> {
        // Where memory lies is for who maps it; the mount is found by the ring.
        let _ = (hf3fs_mount_point, numa);
        let id = names::decode_id(id).ok_or_else(|| PyValueError::new_err(format!("id {id:?} is not a UUID")))?;
        let (address, bytes) = {
            let buffer = PyUntypedBuffer::get(base)?;
            if buffer.readonly() || !buffer.is_c_contiguous() || buffer.len_bytes() == 0 {
                return Err(PyValueError::new_err("base must be writable, contiguous and not empty"));
            }
            (buffer.buf_ptr() as usize, buffer.len_bytes())
        };
        let object = base.clone().unbind();
        let base = Arc::new(Base { object, address, bytes, id, block_bytes: block_size });
        Ok(Self { base, start: 0, bytes, outcome: Mutex::default() })
    }

    fn __len__(&self) -> usize {
        self.bytes
    }

    /// A part of it. Raises ValueError for a step other than 1.
    fn __getitem__(&self, slice: &Bound<'_, PySlice>) -> PyResult<Self> {
        let range = slice.indices(self.bytes as isize)?;
        if range.step != 1 {
            return Err(PyValueError::new_err("the step of a slice must be 1"));
        }
        Ok(self.part(self.start + range.start as usize, range.slicelength))
    }

    /// The part that another buffer over the same memory covers. Raises IndexError when that lies elsewhere.
    fn slice_by(&self, buf: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(buf)?;
        let start = (buffer.buf_ptr() as usize).checked_sub(self.base.address);
        let end = start.and_then(|start| start.checked_add(buffer.len_bytes()));
        match (start, end) {
            (Some(start), Some(end)) if start >= self.start && end <= self.start + self.bytes => {
                Ok(self.part(start, end - start))
            }
            _ => Err(PyIndexError::new_err("the buffer is not in this memory")),
        }
    }

    /// Of its last I/O: bytes, or a negative errno.
    #[getter]
    fn result(&self) -> i64 {
        self.outcome.lock().result
    }

    /// Of its last I/O.
    #[getter]
    fn userdata(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.outcome.lock().userdata.as_ref().map(|object| object.clone_ref(py))
    }

    /// First byte in the memory.
    #[getter]
    fn base_off(&self) -> usize {
        self.start
    }

    /// # Safety
    /// `view` is the interpreter's.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let whole = PyMemoryView::from(this.base.object.bind(slf.py()))?;
        let bytes = whole.call_method1("cast", ("B",))?;
        let part = PySlice::new(slf.py(), this.start as isize, (this.start + this.bytes) as isize, 1);
        let part = bytes.get_item(part)?;
        // SAFETY: both are valid; the view belongs to the part, which releases it.
        if unsafe { ffi::PyObject_GetBuffer(part.as_ptr(), view, flags) } != 0 {
            return Err(PyErr::fetch(slf.py()));
        }
        Ok(())
    }
}

/// A queue of reads or of writes to the mount daemon, with at most `entries` outstanding. Thread-safe.
#[pyclass(frozen, name = "ioring", module = "hf3fs_py_usrbio")]
pub struct IoRing {
    ring: Mutex<Option<Arc<Ring>>>,
    prepared: Mutex<Outstanding>,
}

/// I/Os by a number that none had before: an index is free for another thread before its result is looked at here.
#[derive(Default)]
struct Outstanding {
    next: usize,
    by_number: HashMap<usize, Prepared>,
}

struct Prepared {
    iov: Py<IoVec>,
    userdata: Py<PyAny>,
}

impl IoRing {
    fn ring(&self) -> PyResult<Arc<Ring>> {
        self.ring.lock().clone().ok_or_else(|| os_error(Errno(libc::EINVAL)))
    }
}

#[pymethods]
impl IoRing {
    #[new]
    #[pyo3(signature = (hf3fs_mount_point, entries, for_read=true, io_depth=0, priority=None, timeout=None, numa=-1, flags=0))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        hf3fs_mount_point: PathBuf,
        entries: i32,
        for_read: bool,
        io_depth: i32,
        priority: Option<i32>,
        timeout: Option<i32>,
        numa: i32,
        flags: u64,
    ) -> PyResult<Self> {
        let timeout_ms = u32::try_from(timeout.unwrap_or(0)).map_err(|_| os_error(Errno(libc::EINVAL)))?;
        let config = Config { for_read, io_depth, priority: priority.unwrap_or(0), timeout_ms, flags };
        let ring = Ring::create(&hf3fs_mount_point, entries, config, numa).map_err(os_error)?;
        Ok(Self { ring: Mutex::new(Some(Arc::new(ring))), prepared: Mutex::default() })
    }

    /// Bytes of shared memory of a ring for `entries` I/Os.
    #[staticmethod]
    fn size_for_entries(entries: u32) -> usize {
        Places::new(entries).map_or(0, Places::bytes)
    }

    /// I/Os that may be outstanding.
    #[getter]
    fn entries(&self) -> PyResult<u32> {
        Ok(self.ring()?.entries())
    }

    /// Prepare to read into (or write from) `iov` at `off` of a registered descriptor; it may begin at once. Returns
    /// itself. Raises OSError: EAGAIN when `entries` are outstanding, EBADF, EACCES, EINVAL.
    #[pyo3(signature = (iov, read, fd, off, userdata=None))]
    fn prepare<'py>(
        slf: Bound<'py, Self>,
        iov: Bound<'_, IoVec>,
        read: bool,
        fd: i32,
        off: u64,
        userdata: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, Self>> {
        let (ring, memory) = (slf.get().ring()?, iov.get());
        let (base, end) = (&memory.base, (memory.start + memory.bytes) as u64);
        let crosses = |block: u64| memory.bytes > 0 && memory.start as u64 / block != (end - 1) / block;
        if read != ring.config().for_read
            || end > base.bytes as u64
            || (base.block_bytes > 0 && crosses(base.block_bytes))
        {
            return Err(os_error(Errno(libc::EINVAL)));
        }
        // Who waits looks up what was prepared under the same lock.
        let mut prepared = slf.get().prepared.lock();
        let io = Io {
            fd,
            offset: off,
            length: memory.bytes as u64,
            iov: base.id,
            iov_offset: memory.start as u64,
            userdata: prepared.next,
        };
        ring.prepare(&io).map_err(os_error)?;
        prepared.next = prepared.next.wrapping_add(1);
        let userdata = userdata.unwrap_or_else(|| slf.py().None());
        prepared.by_number.insert(io.userdata, Prepared { iov: iov.unbind(), userdata });
        drop(prepared);
        Ok(slf)
    }

    /// Have what is prepared begin. Returns itself.
    fn submit(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        slf.get().ring()?.submit();
        Ok(slf)
    }

    /// Wait for `min_results`, for `timeout` at most (a timedelta; None: without end), and return as many as there are up
    /// to `max_results`: the memory of each I/O with its `result` and `userdata` set, in the order of preparation.
    /// Raises OSError: ENOTCONN when the mount is gone.
    #[pyo3(signature = (*, max_results=0, min_results=0, timeout=None))]
    fn wait(
        &self,
        py: Python<'_>,
        max_results: usize,
        min_results: usize,
        timeout: Option<Duration>,
    ) -> PyResult<Vec<Py<IoVec>>> {
        let ring = self.ring()?;
        let room = max_results.max(min_results).clamp(1, ring.entries() as usize);
        let deadline = timeout.map(|timeout| std::time::Instant::now() + timeout);
        let mut done = vec![Done::default(); room];
        let mut count = 0;
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(std::time::Instant::now()));
            let slice = left.unwrap_or(SIGNALS_EVERY).min(SIGNALS_EVERY);
            let wanted = min_results.saturating_sub(count);
            let (waiting, out) = (ring.clone(), &mut done[count..]);
            let waited = py.detach(move || waiting.wait_for(out, wanted, slice));
            match waited {
                Ok(more) => count += more,
                Err(error) if count == 0 => return Err(os_error(error)),
                Err(_) => break,
            }
            if count >= min_results || count >= room || left.is_some_and(|left| left <= SIGNALS_EVERY) {
                break;
            }
            py.check_signals()?;
        }
        self.give_back(&done[..count])
    }

    /// End the ring.
    fn destroy(&self) {
        self.ring.lock().take();
    }
}

impl IoRing {
    fn give_back(&self, done: &[Done]) -> PyResult<Vec<Py<IoVec>>> {
        let found: Vec<_> = {
            let mut prepared = self.prepared.lock();
            done.iter().map(|done| (prepared.by_number.remove(&done.userdata), done.result)).collect()
        };
        let mut list = Vec::with_capacity(found.len());
        for (prepared, result) in found {
            let Some(Prepared { iov, userdata }) = prepared else { continue };
            *iov.get().outcome.lock() = Outcome { result, userdata: Some(userdata) };
            list.push(iov);
        }
        Ok(list)
    }
}

/// Let rings use an open file of a mount until it is withdrawn. Raises OSError: EBADF, EINVAL when it is registered.
#[pyfunction]
#[pyo3(signature = (fd, flags=0))]
fn register_fd(fd: i32, flags: u64) -> PyResult<()> {
    let _ = flags;
    fds::register(fd).map(drop).map_err(os_error)
}

/// Withdraw a registered file.
#[pyfunction]
fn deregister_fd(fd: i32) {
    fds::withdraw(fd);
}

/// The mountpoint that an existing path is on; None when it is on no mount with rings.
#[pyfunction]
fn extract_mount_point(path: PathBuf) -> Option<OsString> {
    mounts::mountpoint_of(&path).map(PathBuf::into_os_string)
}

/// Make ranges of a file (a path or an open descriptor) holes, from each `start` to its `end`. Raises OSError.
#[pyfunction]
#[pyo3(signature = (fd, start, end, flags=0))]
fn punch_hole(fd: &Bound<'_, PyAny>, start: Vec<u64>, end: Vec<u64>, flags: u64) -> PyResult<()> {
    let _ = flags;
    if start.len() != end.len() {
        return Err(PyValueError::new_err("there must be as many ends as starts"));
    }
    let opened;
    let fd = match fd.extract::<i32>() {
        Ok(fd) => fd,
        Err(_) => {
            opened = open_for_writing(&fd.extract::<PathBuf>()?)?;
            std::os::fd::AsRawFd::as_raw_fd(&opened)
        }
    };
    start.into_iter().zip(end).try_for_each(|(start, end)| fds::punch(fd, start, end)).map_err(os_error)
}

fn open_for_writing(path: &std::path::Path) -> PyResult<std::fs::File> {
    std::fs::File::options().write(true).open(path).map_err(|error| os_error(error.into()))
}

/// Add what there is to the extension module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<IoVec>()?;
    module.add_class::<IoRing>()?;
    module.add_function(wrap_pyfunction!(register_fd, module)?)?;
    module.add_function(wrap_pyfunction!(deregister_fd, module)?)?;
    module.add_function(wrap_pyfunction!(extract_mount_point, module)?)?;
    module.add_function(wrap_pyfunction!(punch_hole, module)?)
}
