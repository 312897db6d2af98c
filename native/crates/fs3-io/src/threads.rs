use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use fs3_core::{Code, Error, Result};
use parking_lot::{Condvar, Mutex, MutexGuard};

type Job = Box<dyn FnOnce() + Send>;

thread_local! {
    /// Address of the running thread's set while it is about to end a job, else 0.
    static ENDING: Cell<usize> = const { Cell::new(0) };
}

/// A fixed set of threads that may block on disks, shared by all targets of a process. Idle threads sleep.
///
/// The queue is bounded by its callers: every job is one outstanding request, and those are limited by
/// the network layer's credits.
pub struct IoThreads {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    /// An idle thread is on its way to the jobs. It wakes the next one if it finds more than one job: many short jobs
    /// are done by few threads, and a thread that blocks does not hold up the others.
    waking: bool,
    closed: bool,
}

impl IoThreads {
    /// Start `threads` threads.
    pub fn new(threads: usize) -> Arc<Self> {
        let shared = Arc::new(Shared { queue: Mutex::default(), wake: Condvar::new() });
        let threads = (0..threads.max(1))
            .map(|i| {
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("fs3-io-{i}"))
                    .spawn(move || shared.work())
                    .expect("the system lets a process start a few threads")
            })
            .collect();
        Arc::new(Self { shared, threads: Mutex::new(threads) })
    }

    /// The threads that targets of this process use unless told otherwise.
    pub fn shared() -> Arc<Self> {
        static THREADS: OnceLock<Arc<IoThreads>> = OnceLock::new();
        THREADS.get_or_init(|| Self::new(8)).clone()
    }

    /// Run `job` some time soon.
    pub fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        if fs3_rt::is_simulated() {
            return drop(fs3_rt::spawn_blocking(job));
        }
        let mut queue = self.shared.queue.lock();
        queue.jobs.push_back(Box::new(job));
        // A thread that ends its job looks at the queue next.
        if ENDING.get() != Arc::as_ptr(&self.shared).addr() {
            self.shared.wake_one(queue);
        }
    }

    /// Run `job` some time soon and then, on the same thread, `done` with its result, and what `done` wakes: no other
    /// thread has to wake for it. `done` must not block.
    pub fn run_then<T: 'static>(
        &self,
        job: impl FnOnce() -> Result<T> + Send + 'static,
        done: impl FnOnce(Result<T>) + Send + 'static,
    ) {
        let set = Arc::as_ptr(&self.shared).addr();
        self.spawn(move || {
            let result = caught(job);
            ENDING.set(set);
            fs3_rt::run_woken(|| done(result));
            ENDING.set(0);
        });
    }

    /// Run `job` and wait for its result without blocking the caller's thread. The job runs to its end
    /// even when the caller stops waiting.
    pub async fn run<T: Send + 'static>(&self, job: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        result_of(|done| self.run_then(job, done)).await
    }
}

/// The result of `begin`, which hands it to the function that it is given.
pub(crate) async fn result_of<T: Send + 'static>(begin: impl FnOnce(Box<dyn FnOnce(Result<T>) + Send>)) -> Result<T> {
    let (send, result) = tokio::sync::oneshot::channel();
    begin(Box::new(|done| drop(send.send(done))));
    result.await.unwrap_or_else(|_| Err(job_failed()))
}

/// The job's result; an error when it panics.
pub(crate) fn caught<T>(job: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).unwrap_or_else(|_| Err(job_failed()))
}

fn job_failed() -> Error {
    Error::new(Code::Internal, "a disk job failed; see the log").maybe_applied()
}

impl Shared {
    /// Have an idle thread look at the jobs, unless one is about to or there are none.
    fn wake_one(&self, mut queue: MutexGuard<'_, Queue>) {
        if queue.idle > 0 && !queue.waking && !queue.jobs.is_empty() {
            queue.waking = true;
            drop(queue);
            self.wake.notify_one();
        }
    }

    fn work(&self) {
        loop {
            let job = {
                let mut queue = self.queue.lock();
                let job = loop {
                    if let Some(job) = queue.jobs.pop_front() {
                        break job;
                    }
                    if queue.closed {
                        return;
                    }
                    queue.idle += 1;
                    self.wake.wait(&mut queue);
                    queue.idle -= 1;
                    queue.waking = false;
                };
                self.wake_one(queue);
                job
            };
            // A panic is a bug in one job; its caller sees the dropped channel, the thread goes on.
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err() {
                ENDING.set(0);
                tracing::error!("a disk job panicked");
            }
        }
    }
}

impl Drop for IoThreads {
    fn drop(&mut self) {
        self.shared.queue.lock().closed = true;
        self.shared.wake.notify_all();
        for thread in self.threads.lock().drain(..) {
            // The last handle may be dropped by one of the threads itself.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn count_down(threads: &Arc<IoThreads>, left: u32, end: mpsc::Sender<std::thread::ThreadId>) {
        let again = threads.clone();
        threads.run_then(
            move || Ok(left),
            move |left| match left {
                Ok(0) => end.send(std::thread::current().id()).unwrap(),
                Ok(left) => count_down(&again, left - 1, end),
                Err(error) => panic!("{error}"),
            },
        );
    }

    #[test]
    fn what_a_job_begins_at_its_end_is_done_though_nobody_else_is_woken() {
        let threads = IoThreads::new(4);
        let (end, ended) = mpsc::channel();
        for _ in 0..8 {
            count_down(&threads, 1000, end.clone());
        }
        for _ in 0..8 {
            ended.recv_timeout(PATIENCE).expect("all chains of jobs come to their end");
        }
    }

    #[test]
    fn a_job_that_another_one_waits_for_finds_a_thread() {
        let threads = IoThreads::new(2);
        let (inner_end, inner_ended) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let inner = threads.clone();
        threads.spawn(move || {
            inner.spawn(move || inner_end.send(()).unwrap());
            end.send(inner_ended.recv_timeout(PATIENCE).is_ok()).unwrap();
        });
        assert!(ended.recv_timeout(2 * PATIENCE).unwrap());
    }
}
