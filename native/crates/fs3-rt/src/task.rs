use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use crate::{near, sim};

/// Why a task has no result.
#[derive(Clone, Debug)]
pub struct JoinError {
    message: String,
}

impl JoinError {
    pub(crate) fn cancelled() -> Self {
        Self { message: "the task was cancelled".into() }
    }
}

impl fmt::Display for JoinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for JoinError {}

impl From<tokio::task::JoinError> for JoinError {
    fn from(error: tokio::task::JoinError) -> Self {
        Self { message: error.to_string() }
    }
}

/// A task that was spawned; dropping this does not end it.
pub struct JoinHandle<T>(Joining<T>);

enum Joining<T> {
    Tokio(tokio::task::JoinHandle<T>),
    Simulated(sim::Joining<T>),
}

impl<T> JoinHandle<T> {
    pub(crate) fn simulated(joining: sim::Joining<T>) -> Self {
        Self(Joining::Simulated(joining))
    }

    /// End the task at its next wait.
    pub fn abort(&self) {
        match &self.0 {
            Joining::Tokio(handle) => handle.abort(),
            Joining::Simulated(joining) => joining.abort_handle().abort(),
        }
    }

    /// A handle that can only end the task.
    pub fn abort_handle(&self) -> AbortHandle {
        match &self.0 {
            Joining::Tokio(handle) => AbortHandle(Aborting::Tokio(handle.abort_handle())),
            Joining::Simulated(joining) => AbortHandle(Aborting::Simulated(joining.abort_handle())),
        }
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, JoinError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.get_mut().0 {
            Joining::Tokio(handle) => Pin::new(handle).poll(cx).map_err(JoinError::from),
            Joining::Simulated(joining) => joining.poll(cx),
        }
    }
}

/// Ends a task.
pub struct AbortHandle(Aborting);

enum Aborting {
    Tokio(tokio::task::AbortHandle),
    Simulated(sim::AbortHandle),
}

impl AbortHandle {
    /// End the task at its next wait.
    pub fn abort(&self) {
        match &self.0 {
            Aborting::Tokio(handle) => handle.abort(),
            Aborting::Simulated(handle) => handle.abort(),
        }
    }
}

/// Where tasks run: a tokio runtime, or a process of a simulator. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Handle(Place);

#[derive(Clone)]
enum Place {
    Tokio(tokio::runtime::Handle),
    Simulated(sim::Process),
}

impl From<tokio::runtime::Handle> for Handle {
    fn from(handle: tokio::runtime::Handle) -> Self {
        Self(Place::Tokio(handle))
    }
}

impl Handle {
    /// Where the caller runs. Panics outside of both.
    pub fn current() -> Self {
        match sim::Process::current() {
            Some(process) => Self(Place::Simulated(process)),
            None => Self(Place::Tokio(tokio::runtime::Handle::current())),
        }
    }

    /// Begin a task.
    pub fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        match &self.0 {
            Place::Tokio(handle) => JoinHandle(Joining::Tokio(handle.spawn(task))),
            Place::Simulated(process) => process.spawn(task),
        }
    }

    /// Begin a task on the calling thread, as far as it goes without waiting. It goes on where it is woken: on that thread
    /// inside [`crate::run_woken`], otherwise as one that was spawned. A panic ends the task alone.
    ///
    /// The caller must hold no lock that the task takes.
    pub fn begin(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut task = Box::pin(task);
        let Some(_nesting) = near::Nesting::enter() else { return drop(self.spawn(task)) };
        match &self.0 {
            Place::Tokio(handle) => near::begin(handle, task),
            // The waker of this first poll is never woken: a future that is pending is polled again by its own task.
            Place::Simulated(process) => match task.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(()) => {}
                Poll::Pending => drop(process.spawn(task)),
            },
        }
    }

    /// Run what may block, where that is allowed.
    pub fn spawn_blocking<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        match &self.0 {
            Place::Tokio(handle) => JoinHandle(Joining::Tokio(handle.spawn_blocking(job))),
            Place::Simulated(process) => process.spawn_blocking(job),
        }
    }

    /// Run a future to its end on the calling thread, which must not be one that runs tasks. Panics in a simulator.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        match &self.0 {
            Place::Tokio(handle) => handle.block_on(future),
            Place::Simulated(_) => panic!("a simulated process cannot block"),
        }
    }
}

/// Begin a task where the caller runs.
pub fn spawn<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    match sim::Process::current() {
        Some(process) => process.spawn(task),
        None => JoinHandle(Joining::Tokio(tokio::spawn(task))),
    }
}

/// Run what may block, where that is allowed.
pub fn spawn_blocking<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    match sim::Process::current() {
        Some(process) => process.spawn_blocking(job),
        None => JoinHandle(Joining::Tokio(tokio::task::spawn_blocking(job))),
    }
}

/// Let other tasks run.
pub async fn yield_now() {
    if !sim::is_current() {
        return tokio::task::yield_now().await;
    }
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Tasks that are waited for together, and aborted when this is dropped.
pub struct JoinSet<T>(Set<T>);

enum Set<T> {
    Tokio(tokio::task::JoinSet<T>),
    Simulated(Vec<sim::Joining<T>>),
}

impl<T: Send + 'static> JoinSet<T> {
    /// No tasks.
    #[expect(clippy::new_without_default, reason = "where it is made decides what it is")]
    pub fn new() -> Self {
        Self(if sim::is_current() { Set::Simulated(Vec::new()) } else { Set::Tokio(tokio::task::JoinSet::new()) })
    }

    /// Begin a task.
    pub fn spawn(&mut self, task: impl Future<Output = T> + Send + 'static) {
        match &mut self.0 {
            Set::Tokio(set) => drop(set.spawn(task)),
            Set::Simulated(set) => {
                let process = sim::Process::current().expect("the set was made in a simulator");
                if let Joining::Simulated(joining) = process.spawn(task).0 {
                    set.push(joining);
                }
            }
        }
    }

    /// Tasks whose result was not taken yet.
    pub fn len(&self) -> usize {
        match &self.0 {
            Set::Tokio(set) => set.len(),
            Set::Simulated(set) => set.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The result of one that has ended, as soon as there is one; `None` when there are no tasks.
    pub async fn join_next(&mut self) -> Option<Result<T, JoinError>> {
        let set = match &mut self.0 {
            Set::Tokio(set) => return set.join_next().await.map(|result| result.map_err(JoinError::from)),
            Set::Simulated(set) => set,
        };
        std::future::poll_fn(|cx| {
            if set.is_empty() {
                return Poll::Ready(None);
            }
            for at in 0..set.len() {
                if let Poll::Ready(result) = set[at].poll(cx) {
                    set.swap_remove(at);
                    return Poll::Ready(Some(result));
                }
            }
            Poll::Pending
        })
        .await
    }

    /// All results, in the order in which the tasks ended. Panics when one has none. The caller is woken once, at the
    /// end: a thread that blocks for this does not wake for every task.
    pub async fn join_all(mut self) -> Vec<T> {
        if sim::is_current() {
            return self.collect().await;
        }
        let mut collecting = JoinSet::new();
        collecting.spawn(async move { self.collect().await });
        match collecting.join_next().await {
            Some(Ok(results)) => results,
            _ => panic!("a task that was waited for failed"),
        }
    }

    async fn collect(&mut self) -> Vec<T> {
        let mut results = Vec::with_capacity(self.len());
        while let Some(result) = self.join_next().await {
            results.push(result.unwrap_or_else(|error| panic!("{error}")));
        }
        results
    }
}

impl<T> Drop for JoinSet<T> {
    fn drop(&mut self) {
        if let Set::Simulated(set) = &self.0 {
            set.iter().for_each(|joining| joining.abort_handle().abort());
        }
    }
}
