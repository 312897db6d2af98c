//! The one tokio runtime of the process, started when first needed, and again in a forked child.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;

use parking_lot::Mutex;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use tokio::runtime::{Builder, Runtime};

use crate::operation::Delivery;

/// Worker threads unless set otherwise, where there are as many cores: network and checksum work of one client keeps
/// about one core busy. Threads that share a core only take turns.
const THREADS_MAX: usize = 2;

/// What a process has one of. It is never dropped.
pub struct Process {
    number: u32,
    pub runtime: Runtime,
    /// See `operation::deliveries`.
    pub deliveries: OnceLock<Mutex<Sender<Delivery>>>,
    /// Names of threads, of those that did something while a trace was taken.
    pub thread_names: Mutex<BTreeMap<i32, String>>,
}

impl Process {
    /// Which one it is, counted by forks.
    pub fn number(&self) -> u32 {
        self.number
    }
}

/// Counts forks on the way from the first process to this one.
static FORKS: AtomicU32 = AtomicU32::new(0);
static CURRENT: AtomicPtr<Process> = AtomicPtr::new(std::ptr::null_mut());
/// 0: not set.
static WANTED: AtomicUsize = AtomicUsize::new(0);

/// The runtime of this process. Its threads end with the process.
pub fn runtime() -> PyResult<&'static Runtime> {
    Ok(&process()?.runtime)
}

/// What belongs to this process. After a fork the child gets its own: the parent's threads do not exist there, so
/// the parent's is left untouched, locks included.
pub fn process() -> PyResult<&'static Process> {
    let current = CURRENT.load(Ordering::Acquire);
    // SAFETY: the pointer is null or came from Box::into_raw, and is never freed.
    if let Some(process) = unsafe { current.as_ref() }
        && process.number == process_number()
    {
        return Ok(process);
    }
    let runtime = Builder::new_multi_thread()
        .worker_threads(match WANTED.load(Ordering::Relaxed) {
            0 => std::thread::available_parallelism().map_or(THREADS_MAX, usize::from).min(THREADS_MAX),
            wanted => wanted,
        })
        .thread_name("fs3-native")
        .enable_all()
        .build()
        .map_err(|e| PyRuntimeError::new_err(format!("cannot start threads: {e}")))?;
    let new = Box::into_raw(Box::new(Process {
        number: process_number(),
        runtime,
        deliveries: OnceLock::new(),
        thread_names: Mutex::default(),
    }));
    match CURRENT.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: as above.
        Ok(_) => Ok(unsafe { &*new }),
        Err(other) => {
            // Another thread was faster.
            // SAFETY: `new` was not published; `other` was, and is never freed.
            unsafe {
                drop(Box::from_raw(new));
                Ok(&*other)
            }
        }
    }
}

/// Threads of the process-wide runtime (default 2, or 1 on a machine with one core). Raises RuntimeError once it runs.
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

extern "C" fn count_fork() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    fs3_client::trace::forget();
}

/// Notice forks from now on. Asking for the process id each time would be a system call.
pub fn watch_forks() -> PyResult<()> {
    static WATCHING: OnceLock<i32> = OnceLock::new();
    // SAFETY: the handler only touches atomics.
    match *WATCHING.get_or_init(|| unsafe { libc::pthread_atfork(None, None, Some(count_fork)) }) {
        0 => Ok(()),
        error => Err(PyRuntimeError::new_err(format!("cannot watch for forks (error {error})"))),
    }
}

/// Which process this is.
fn process_number() -> u32 {
    FORKS.load(Ordering::Relaxed)
}

/// Guards an object whose threads live in one process: in a forked child it is leaked instead of dropped, since
/// dropping would end connections and touch locks that belong to the parent.
pub struct Owned<T> {
    number: u32,
    value: std::mem::ManuallyDrop<T>,
}

impl<T> Owned<T> {
    pub fn new(value: T) -> Self {
        Self { number: process_number(), value: std::mem::ManuallyDrop::new(value) }
    }

    /// The object. Errors: RuntimeError in a forked child.
    pub fn get(&self) -> PyResult<&T> {
        if self.number == process_number() {
            return Ok(&self.value);
        }
        Err(PyRuntimeError::new_err("this fs3 object was made before a fork; connect again in the child process"))
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        if self.number == process_number() {
            // SAFETY: dropped once, here.
            unsafe { std::mem::ManuallyDrop::drop(&mut self.value) }
        }
    }
}
