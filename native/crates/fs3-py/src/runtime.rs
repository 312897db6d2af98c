//! The one tokio runtime of the process, started when first needed, and again in a forked child.

use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use tokio::runtime::{Builder, Runtime};

/// Worker threads unless set otherwise: network and checksum work of one client keeps about one core busy.
const THREADS: usize = 2;

struct Process {
    pid: u32,
    runtime: Runtime,
}

static CURRENT: AtomicPtr<Process> = AtomicPtr::new(std::ptr::null_mut());
static WANTED: AtomicUsize = AtomicUsize::new(THREADS);

/// The runtime of this process. Its threads end with the process. After a fork the child gets a new one: the
/// parent's threads do not exist there, and its runtime is left untouched.
pub fn runtime() -> PyResult<&'static Runtime> {
    let current = CURRENT.load(Ordering::Acquire);
    // SAFETY: the pointer is null or came from Box::leak, and is never freed.
    if let Some(process) = unsafe { current.as_ref() }
        && process.pid == std::process::id()
    {
        return Ok(&process.runtime);
    }
    let runtime = Builder::new_multi_thread()
        .worker_threads(WANTED.load(Ordering::Relaxed))
        .thread_name("fs3-native")
        .enable_all()
        .build()
        .map_err(|e| PyRuntimeError::new_err(format!("cannot start threads: {e}")))?;
    let new = Box::into_raw(Box::new(Process { pid: std::process::id(), runtime }));
    match CURRENT.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: as above.
        Ok(_) => Ok(unsafe { &(*new).runtime }),
        Err(_) => {
            // SAFETY: `new` was not published.
            drop(unsafe { Box::from_raw(new) });
            runtime_again()
        }
    }
}

fn runtime_again() -> PyResult<&'static Runtime> {
    // SAFETY: as in `runtime`; another thread has just published it.
    unsafe { Ok(&(*CURRENT.load(Ordering::Acquire)).runtime) }
}

/// Threads of the process-wide runtime (default 2). Raises RuntimeError once it runs.
#[pyfunction]
pub fn set_runtime_threads(count: usize) -> PyResult<()> {
    if !(1..=256).contains(&count) {
        return Err(PyValueError::new_err("the number of threads must be 1 to 256"));
    }
    if !CURRENT.load(Ordering::Acquire).is_null() {
        return Err(PyRuntimeError::new_err("the runtime runs already; set the number of threads before connecting"));
    }
    WANTED.store(count, Ordering::Relaxed);
    Ok(())
}

/// Guards an object whose threads live in one process: in a forked child it is leaked instead of dropped, since
/// dropping would end connections and touch locks that belong to the parent.
pub struct Owned<T> {
    pid: u32,
    value: std::mem::ManuallyDrop<T>,
}

impl<T> Owned<T> {
    pub fn new(value: T) -> Self {
        Self { pid: std::process::id(), value: std::mem::ManuallyDrop::new(value) }
    }

    /// The object. Errors: RuntimeError in a forked child.
    pub fn get(&self) -> PyResult<&T> {
        if self.pid == std::process::id() {
            return Ok(&self.value);
        }
        Err(PyRuntimeError::new_err("this fs3 object was made before a fork; connect again in the child process"))
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        if self.pid == std::process::id() {
            // SAFETY: dropped once, here.
            unsafe { std::mem::ManuallyDrop::drop(&mut self.value) }
        }
    }
}
