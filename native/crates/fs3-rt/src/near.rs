//! Tasks that run on the threads that have something to do with them.
//!
//! A task of a runtime costs the wake-up of one of its threads when somebody else begins it, and again when somebody else
//! does what it waits for. For work of some microseconds that is most of the cost. So a task can run where it is begun up
//! to its first wait, and a thread outside of the runtime can go on itself with the tasks that it wakes.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use parking_lot::Mutex;
use tokio::runtime::Handle;

/// Tasks that one [`run_woken`] goes on with at most; the runtime gets the others.
const RUNS_MAX: usize = 64;
/// Tasks that are begun one within the other on a thread at most: each takes some of its stack.
const NESTED_MAX: usize = 8;

type BoxTask = Pin<Box<dyn Future<Output = ()> + Send>>;

thread_local! {
    /// Tasks that this thread is to go on with; `None` when it leaves them to the runtime.
    static WOKEN: RefCell<Option<VecDeque<Arc<Task>>>> = const { RefCell::new(None) };
    static NESTED: Cell<usize> = const { Cell::new(0) };
}

/// A task is being begun on this thread.
pub(crate) struct Nesting;

impl Nesting {
    /// `None`: so many are, one within the other, that the next one has to run elsewhere.
    pub fn enter() -> Option<Self> {
        let nested = NESTED.get();
        (nested < NESTED_MAX).then(|| {
            NESTED.set(nested + 1);
            Self
        })
    }
}

impl Drop for Nesting {
    fn drop(&mut self) {
        NESTED.set(NESTED.get() - 1);
    }
}

/// A task that no thread of the runtime knows of, yet.
struct Task {
    runtime: Handle,
    stage: Mutex<Stage>,
}

enum Stage {
    /// Somebody will wake it.
    Waiting(BoxTask),
    /// It is in the list of the thread that woke it.
    Listed(BoxTask),
    Running {
        woken: bool,
    },
    /// It has ended, or has become a task of the runtime.
    Gone,
}

/// Begin a task on the calling thread, as far as it goes without waiting. It goes on where it is woken: on that thread
/// inside [`run_woken`], otherwise on the runtime. A panic ends the task alone.
pub(crate) fn begin(runtime: &Handle, task: BoxTask) {
    Task::listed(runtime, task).run();
}

/// Begin a task behind what the calling thread does now: on that thread inside [`run_woken`], otherwise on the runtime.
/// Unlike [`begin`] it may be called with locks held that the task takes.
pub fn begin_behind(runtime: &Handle, task: impl Future<Output = ()> + Send + 'static) {
    if collects() {
        collect(Task::listed(runtime, Box::pin(task)));
    } else {
        runtime.spawn(task);
    }
}

/// Do some work on a thread that runs no tasks of a runtime, and then go on with the tasks that it woke and that were
/// begun by [`crate::Handle::begin`], or in it by [`begin_behind`]. They must not block, as ever.
pub fn run_woken<T>(work: impl FnOnce() -> T) -> T {
    if collects() {
        return work();
    }
    WOKEN.set(Some(VecDeque::new()));
    let collecting = Collecting;
    let result = work();
    for _ in 0..RUNS_MAX {
        let Some(task) = WOKEN.with_borrow_mut(|woken| woken.as_mut().and_then(VecDeque::pop_front)) else { break };
        task.run();
    }
    drop(collecting);
    result
}

/// Whether the calling thread is inside [`run_woken`].
fn collects() -> bool {
    // A thread that ends may have no list any more.
    WOKEN.try_with(|woken| woken.borrow().is_some()).unwrap_or(false)
}

fn collect(task: Arc<Task>) {
    WOKEN.with_borrow_mut(|woken| woken.as_mut().expect("the thread collects").push_back(task));
}

/// The runtime gets what is left, also after a panic.
struct Collecting;

impl Drop for Collecting {
    fn drop(&mut self) {
        for task in WOKEN.take().into_iter().flatten() {
            task.hand_over();
        }
    }
}

impl Task {
    fn listed(runtime: &Handle, task: BoxTask) -> Arc<Self> {
        Arc::new(Self { runtime: runtime.clone(), stage: Mutex::new(Stage::Listed(task)) })
    }

    fn take_listed(&self, next: Stage) -> BoxTask {
        match std::mem::replace(&mut *self.stage.lock(), next) {
            Stage::Listed(task) => task,
            _ => unreachable!("a task is in one list, once"),
        }
    }

    fn hand_over(&self) {
        let task = self.take_listed(Stage::Gone);
        self.runtime.spawn(task);
    }

    /// Go on with a listed task up to its next wait. No lock is held while it runs, or is dropped.
    fn run(self: &Arc<Self>) {
        let mut task = self.take_listed(Stage::Running { woken: false });
        let waker = Waker::from(self.clone());
        let _entered = self.runtime.enter();
        let polled = catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(&mut Context::from_waker(&waker))));
        let mut stage = self.stage.lock();
        let woken = matches!(*stage, Stage::Running { woken: true });
        *stage = Stage::Gone;
        if matches!(polled, Ok(Poll::Pending)) {
            if !woken {
                *stage = Stage::Waiting(task);
                return;
            }
            drop(stage);
            // It wants to let others run first.
            self.runtime.spawn(task);
        } else {
            drop(stage);
            drop(task);
        }
    }
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut stage = self.stage.lock();
        match std::mem::replace(&mut *stage, Stage::Gone) {
            Stage::Waiting(task) if collects() => {
                *stage = Stage::Listed(task);
                drop(stage);
                collect(self.clone());
            }
            Stage::Waiting(task) => {
                drop(stage);
                self.runtime.spawn(task);
            }
            Stage::Running { .. } => *stage = Stage::Running { woken: true },
            other => *stage = other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread::ThreadId;
    use std::time::Duration;

    use tokio::sync::{Notify, oneshot};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
    }

    fn here() -> ThreadId {
        std::thread::current().id()
    }

    /// Begin a task that tells where it runs before and after it got something.
    fn begin_waiting(runtime: &Handle) -> (oneshot::Sender<()>, mpsc::Receiver<ThreadId>) {
        let (send, receive) = oneshot::channel();
        let (tell, told) = mpsc::channel();
        let task = async move {
            tell.send(here()).unwrap();
            receive.await.unwrap();
            tell.send(here()).unwrap();
        };
        begin(runtime, Box::pin(task));
        (send, told)
    }

    #[test]
    fn a_task_begins_on_the_calling_thread_and_goes_on_where_it_is_woken() {
        let runtime = runtime();
        let (send, told) = begin_waiting(runtime.handle());
        assert_eq!(told.try_recv(), Ok(here()));
        run_woken(|| {
            send.send(()).unwrap();
            assert!(told.try_recv().is_err(), "not in the middle of what wakes it");
        });
        assert_eq!(told.try_recv(), Ok(here()));
    }

    #[test]
    fn a_task_that_is_woken_by_another_thread_goes_on_in_the_runtime() {
        let runtime = runtime();
        let (send, told) = begin_waiting(runtime.handle());
        assert_eq!(told.recv_timeout(PATIENCE), Ok(here()));
        send.send(()).unwrap();
        assert_ne!(told.recv_timeout(PATIENCE).unwrap(), here());
    }

    #[test]
    fn a_task_can_use_timers_and_begin_others_on_any_thread() {
        let runtime = runtime();
        let (tell, told) = mpsc::channel();
        let task = async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            tokio::spawn(async move { tell.send(()).unwrap() }).await.unwrap();
        };
        begin(runtime.handle(), Box::pin(task));
        told.recv_timeout(PATIENCE).unwrap();
    }

    #[test]
    fn a_task_that_wakes_itself_lets_the_thread_go_on() {
        let runtime = runtime();
        let (tell, told) = mpsc::channel();
        let task = async move {
            tokio::task::yield_now().await;
            tell.send(here()).unwrap();
        };
        begin(runtime.handle(), Box::pin(task));
        assert_ne!(told.recv_timeout(PATIENCE).unwrap(), here());
    }

    #[test]
    fn a_task_begun_behind_runs_without_the_locks_of_who_began_it() {
        let runtime = runtime();
        let (shared, (tell, told)) = (Arc::new(Mutex::new(0)), mpsc::channel());
        let task = |shared: Arc<Mutex<i32>>, tell: mpsc::Sender<ThreadId>| async move {
            *shared.lock() += 1;
            tell.send(here()).unwrap();
        };
        run_woken(|| {
            let _held = shared.lock();
            begin_behind(runtime.handle(), task(shared.clone(), tell.clone()));
        });
        assert_eq!(told.try_recv(), Ok(here()));
        begin_behind(runtime.handle(), task(shared.clone(), tell));
        assert_ne!(told.recv_timeout(PATIENCE).unwrap(), here());
    }

    fn begin_within(left: u32, tell: mpsc::Sender<()>) {
        crate::Handle::current().begin(async move {
            match left {
                0 => tell.send(()).unwrap(),
                _ => begin_within(left - 1, tell),
            }
        });
    }

    #[test]
    fn tasks_that_begin_others_do_not_exhaust_the_stack() {
        let runtime = runtime();
        let (tell, told) = mpsc::channel();
        let _entered = runtime.enter();
        begin_within(100_000, tell);
        told.recv_timeout(PATIENCE).unwrap();
    }

    #[test]
    fn a_panic_ends_the_task_and_drops_what_it_has() {
        let runtime = runtime();
        let (kept, dropped) = oneshot::channel::<()>();
        let task = async move {
            let _kept = kept;
            panic!("a bug");
        };
        begin(runtime.handle(), Box::pin(task));
        assert!(runtime.block_on(dropped).is_err());
    }

    #[test]
    fn tasks_that_wake_each_other_do_not_hold_the_thread() {
        let runtime = runtime();
        let (ping, pong) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let task = |mine: Arc<Notify>, other: Arc<Notify>| async move {
            loop {
                mine.notified().await;
                other.notify_one();
            }
        };
        begin(runtime.handle(), Box::pin(task(ping.clone(), pong.clone())));
        begin(runtime.handle(), Box::pin(task(pong, ping.clone())));
        run_woken(|| ping.notify_one());
        runtime.shutdown_timeout(PATIENCE);
    }

    #[test]
    fn a_task_of_a_runtime_that_has_ended_is_dropped_when_it_is_woken() {
        let runtime = runtime();
        let (wake, woken) = oneshot::channel::<()>();
        let (kept, mut dropped) = oneshot::channel::<()>();
        let task = async move {
            let _kept = kept;
            let _ = woken.await;
            std::future::pending::<()>().await;
        };
        begin(runtime.handle(), Box::pin(task));
        drop(runtime);
        assert_eq!(dropped.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        drop(wake);
        assert_eq!(dropped.try_recv(), Err(oneshot::error::TryRecvError::Closed));
    }
}
