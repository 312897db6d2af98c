//! Work that was asked for and is not done: waited for by a thread or awaited by asyncio.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use fs3_core::Result;
use fs3_net::Waiter;
use parking_lot::Mutex;
use pyo3::BoundObject;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::errors::to_python;
use crate::runtime::{Owned, process, runtime};

/// Turns the result into a Python object; runs attached to the interpreter.
type Finish = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;
type Work = Pin<Box<dyn Future<Output = Finish> + Send>>;

/// How long a blocked thread goes without looking for signals (Ctrl-C).
const SIGNALS_EVERY: Duration = Duration::from_millis(100);
/// Completions handed to an event loop at a time.
const DELIVERIES_MAX: usize = 256;

/// Work to be done: `wait()` blocks for the result, `await` does so in asyncio. It starts with that, and can be
/// waited for once. A wait that is interrupted or cancelled gives up on the result; the effect of a mutating
/// operation may or may not take place then. Buffers stay pinned until nothing uses them.
#[pyclass(frozen, module = "fs3._native")]
pub struct Operation {
    work: Owned<Mutex<Option<Work>>>,
}

impl Operation {
    /// An operation that runs `work` and makes a Python object of its result.
    pub fn new<T, F, O>(work: F, finish: impl FnOnce(Python<'_>, T) -> PyResult<O> + Send + 'static) -> Self
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
        O: for<'py> IntoPyObject<'py>,
    {
        Self::with(work, |py, result| match result {
            Ok(value) => finish(py, value),
            Err(error) => Err(to_python(py, &error)),
        })
    }

    /// Like [`Operation::new`] for work whose result is not a `Result`.
    pub fn with<T, F, O>(work: F, finish: impl FnOnce(Python<'_>, T) -> PyResult<O> + Send + 'static) -> Self
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
        O: for<'py> IntoPyObject<'py>,
    {
        let work = async move {
            let result = work.await;
            let finish: Finish = Box::new(move |py| {
                let value = finish(py, result)?.into_pyobject(py).map_err(Into::into)?;
                Ok(value.into_any().unbind())
            });
            finish
        };
        Self { work: Owned::new(Mutex::new(Some(Box::pin(work)))) }
    }

    fn take(&self) -> PyResult<Work> {
        let taken = self.work.get()?.lock().take();
        taken.ok_or_else(|| PyRuntimeError::new_err("this operation has been waited for already"))
    }
}

#[pymethods]
impl Operation {
    /// Do it and return the result; other threads run meanwhile, and signal handlers within 100 ms.
    fn wait(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let mut work = self.take()?;
        let runtime = runtime()?.handle();
        let mut waiter = take_waiter()?;
        let check = || Python::attach(|py| py.check_signals());
        let done = py.detach(|| waiter.block_on(runtime, work.as_mut(), SIGNALS_EVERY, check));
        WAITER.set(Some((process()?.number(), waiter)));
        done?(py)
    }

    /// Do it in the background and complete a future of the running event loop. Cancelling the future gives up.
    fn __await__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let event_loop = py.import("asyncio")?.call_method0("get_running_loop")?;
        let work = self.take()?;
        let future = event_loop.call_method0("create_future")?;
        let deliveries = deliveries()?;
        let (owner, target) = (event_loop.unbind(), future.clone().unbind());
        let task = runtime()?.spawn(async move {
            let finish = work.await;
            deliveries.lock().send(Delivery { event_loop: owner, future: target, finish }).ok();
        });
        future.call_method1("add_done_callback", (Cancel { task: task.abort_handle() },))?;
        future.call_method0("__await__")
    }
}

thread_local! {
    /// What this thread waits with, and the process it was made in. Taken out while the thread waits.
    static WAITER: RefCell<Option<(u32, Waiter)>> = const { RefCell::new(None) };
}

fn take_waiter() -> PyResult<Waiter> {
    match WAITER.take() {
        Some((number, waiter)) if number == process()?.number() => Ok(waiter),
        _ => Waiter::new().map_err(|e| PyRuntimeError::new_err(format!("a thread cannot wait: {e}"))),
    }
}

/// Ends the work of a future that was cancelled; after completion it does nothing.
#[pyclass(frozen)]
struct Cancel {
    task: tokio::task::AbortHandle,
}

#[pymethods]
impl Cancel {
    fn __call__(&self, _future: &Bound<'_, PyAny>) {
        self.task.abort();
    }
}

/// A result and who waits for it.
pub struct Delivery {
    event_loop: Py<PyAny>,
    future: Py<PyAny>,
    finish: Finish,
}

/// Runs in the event loop's thread.
#[pyclass(frozen)]
struct Batch {
    list: Mutex<Vec<(Py<PyAny>, Finish)>>,
}

#[pymethods]
impl Batch {
    fn __call__(&self, py: Python<'_>) -> PyResult<()> {
        let list = std::mem::take(&mut *self.list.lock());
        for (future, finish) in list {
            let future = future.bind(py);
            if future.call_method0("done")?.is_truthy()? {
                continue;
            }
            match finish(py) {
                Ok(value) => future.call_method1("set_result", (value,))?,
                Err(error) => future.call_method1("set_exception", (error.into_value(py),))?,
            };
        }
        Ok(())
    }
}

static STOPPED: AtomicBool = AtomicBool::new(false);
static EXIT_HOOK: OnceLock<()> = OnceLock::new();

/// Where results for event loops go: one thread takes the interpreter for them, so that network threads never wait
/// for it.
fn deliveries() -> PyResult<&'static Mutex<Sender<Delivery>>> {
    let process = process()?;
    if let Some(sender) = process.deliveries.get() {
        return Ok(sender);
    }
    let (sender, receiver) = channel();
    std::thread::Builder::new()
        .name("fs3-native-asyncio".into())
        .spawn(move || deliver(&receiver))
        .map_err(|e| PyRuntimeError::new_err(format!("cannot start a thread: {e}")))?;
    // If another thread was faster, this sender is dropped, which ends the thread it belongs to.
    Ok(process.deliveries.get_or_init(|| Mutex::new(sender)))
}

fn deliver(receiver: &Receiver<Delivery>) {
    while let Ok(first) = receiver.recv() {
        let mut list = vec![first];
        list.extend(receiver.try_iter().take(DELIVERIES_MAX - 1));
        let attached = !STOPPED.load(Ordering::Acquire)
            && Python::try_attach(|py| {
                while !list.is_empty() {
                    hand_over(py, &mut list);
                }
            })
            .is_some();
        if !attached {
            // The interpreter is ending: nobody waits any more, and its objects must not be touched.
            std::mem::forget(list);
            return;
        }
    }
}

/// Give the results for one event loop to it. A loop that is closed has no use for them.
fn hand_over(py: Python<'_>, list: &mut Vec<Delivery>) {
    let event_loop = list[0].event_loop.clone_ref(py);
    let (mine, others) = std::mem::take(list).into_iter().partition(|d: &Delivery| d.event_loop.is(&event_loop));
    *list = others;
    let mine: Vec<Delivery> = mine;
    let batch = Batch { list: Mutex::new(mine.into_iter().map(|d| (d.future, d.finish)).collect()) };
    let call = Py::new(py, batch).and_then(|batch| event_loop.bind(py).call_method1("call_soon_threadsafe", (batch,)));
    if let Err(error) = call {
        tracing::debug!("an event loop was closed before its results came: {error}");
    }
}

/// Before the interpreter ends no thread of ours may ask for it any more.
#[pyfunction]
fn _stop() {
    STOPPED.store(true, Ordering::Release);
}

/// Have `_stop` called at exit.
pub fn register_exit(module: &Bound<'_, PyModule>) -> PyResult<()> {
    if EXIT_HOOK.set(()).is_ok() {
        let stop = wrap_pyfunction!(_stop, module)?;
        module.py().import("atexit")?.call_method1("register", PyTuple::new(module.py(), [stop])?)?;
    }
    Ok(())
}
