//! The simulator: tasks of simulated processes, in virtual time, in an order that follows from a seed.
//!
//! One thread runs a simulator. Time stands still while tasks run and jumps to the next timer when none can. A process
//! can be paused (its tasks are not run, timers go on) and killed (its tasks are dropped where they wait).

use std::any::{Any, TypeId};
use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use parking_lot::Mutex;

use crate::task::{JoinError, JoinHandle};

/// Times that tasks may run without time going on before that is taken for an endless loop.
const RUNS_PER_MOMENT_MAX: u64 = 5_000_000;

type BoxTask = Pin<Box<dyn Future<Output = ()> + Send>>;

thread_local! {
    static CURRENT: RefCell<Option<Simulator>> = const { RefCell::new(None) };
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    static PROCESS: Cell<u32> = const { Cell::new(0) };
}

/// Whether the calling thread is inside a simulator.
pub(crate) fn is_current() -> bool {
    INSIDE.get()
}

pub(crate) fn now_ns() -> Option<u64> {
    if !INSIDE.get() {
        return None;
    }
    CURRENT.with_borrow(|current| current.as_ref().map(Simulator::now_ns))
}

/// A world's clock, tasks and randomness. Clones are the same simulator. Not to be used by two threads at a time.
#[derive(Clone)]
pub struct Simulator(Arc<Shared>);

struct Shared {
    now_ns: AtomicU64,
    random: AtomicU64,
    trace: AtomicU64,
    state: Mutex<State>,
    woken: Mutex<Vec<TaskId>>,
    extensions: Mutex<BTreeMap<TypeId, Arc<dyn Any + Send + Sync>>>,
}

/// Slot and number of its use.
type TaskId = (usize, u64);

#[derive(Default)]
struct State {
    tasks: Vec<Slot>,
    free: Vec<usize>,
    ready: Vec<TaskId>,
    timers: BinaryHeap<Reverse<Pending>>,
    timers_made: u64,
    processes: Vec<ProcessState>,
    failures: Vec<String>,
}

#[derive(Default)]
struct Slot {
    use_number: u64,
    process: u32,
    /// `None` while it runs, and when the slot is free.
    task: Option<BoxTask>,
    waker: Option<Waker>,
    notice: Option<Arc<Notice>>,
    live: bool,
}

struct ProcessState {
    name: String,
    alive: bool,
    paused: bool,
    /// Tasks that were woken while it was paused.
    held: Vec<TaskId>,
    blocking_ns: Range<u64>,
}

struct Pending {
    at_ns: u64,
    number: u64,
    alarm: Arc<Alarm>,
}

impl PartialEq for Pending {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}
impl Eq for Pending {}
impl PartialOrd for Pending {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Pending {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at_ns, self.number).cmp(&(other.at_ns, other.number))
    }
}

/// Whom a timer wakes; nobody once the timer was dropped.
#[derive(Default)]
struct Alarm(Mutex<Option<Waker>>);

/// Wakes one task.
struct Notice {
    shared: std::sync::Weak<Shared>,
    task: TaskId,
    queued: AtomicBool,
}

impl Wake for Notice {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed)
            && let Some(shared) = self.shared.upgrade()
        {
            shared.woken.lock().push(self.task);
        }
    }
}

impl Simulator {
    /// A simulator at time 0, without processes, whose choices follow from `seed`.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Shared {
            now_ns: AtomicU64::new(0),
            random: AtomicU64::new(seed ^ 0x5851_f42d_4c95_7f2d),
            trace: AtomicU64::new(0xcbf2_9ce4_8422_2325),
            state: Mutex::default(),
            woken: Mutex::default(),
            extensions: Mutex::default(),
        }))
    }

    /// The simulator that the calling thread is inside of.
    pub fn current() -> Option<Self> {
        if !INSIDE.get() {
            return None;
        }
        CURRENT.with_borrow(Clone::clone)
    }

    /// Run `inside` with the thread inside of this simulator.
    pub fn enter<T>(&self, inside: impl FnOnce() -> T) -> T {
        struct Leave(Option<Simulator>, bool);
        impl Drop for Leave {
            fn drop(&mut self) {
                INSIDE.set(self.1);
                CURRENT.set(self.0.take());
            }
        }
        let _leave = Leave(CURRENT.replace(Some(self.clone())), INSIDE.replace(true));
        inside()
    }

    /// Virtual nanoseconds since the beginning.
    pub fn now_ns(&self) -> u64 {
        self.0.now_ns.load(Ordering::Relaxed)
    }

    /// A random number (splitmix64).
    pub fn draw(&self) -> u64 {
        let state = self.0.random.load(Ordering::Relaxed).wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.random.store(state, Ordering::Relaxed);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A random number below `bound`, which is at least 1.
    pub fn below(&self, bound: u64) -> u64 {
        ((u128::from(self.draw()) * u128::from(bound)) >> 64) as u64
    }

    /// True in `per_million` of a million cases.
    pub fn chance(&self, per_million: u64) -> bool {
        per_million > 0 && self.below(1_000_000) < per_million
    }

    /// A random number of `range`; its start when that is empty.
    pub fn within(&self, range: &Range<u64>) -> u64 {
        range.start + if range.end > range.start { self.below(range.end - range.start) } else { 0 }
    }

    /// Mix something that happened into the hash of the trace. Two runs of one seed have the same hash.
    pub fn trace(&self, kind: u64, a: u64, b: u64) {
        let mut hash = self.0.trace.load(Ordering::Relaxed);
        for word in [self.now_ns(), kind, a, b] {
            hash = (hash ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
        self.0.trace.store(hash, Ordering::Relaxed);
    }

    /// Hash of everything that happened.
    pub fn trace_hash(&self) -> u64 {
        self.0.trace.load(Ordering::Relaxed)
    }

    /// Panics of tasks since the last call. Each is a bug.
    pub fn take_failures(&self) -> Vec<String> {
        std::mem::take(&mut self.0.state.lock().failures)
    }

    /// Make `value` known to everything inside, one of each type.
    pub fn extend<T: Any + Send + Sync>(&self, value: Arc<T>) {
        self.0.extensions.lock().insert(TypeId::of::<T>(), value);
    }

    /// What was made known.
    pub fn extension<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        self.0.extensions.lock().get(&TypeId::of::<T>()).cloned()?.downcast().ok()
    }

    /// A new process.
    pub fn process(&self, name: &str) -> Process {
        let mut state = self.0.state.lock();
        state.processes.push(ProcessState {
            name: name.to_owned(),
            alive: true,
            paused: false,
            held: Vec::new(),
            blocking_ns: 10_000..200_000,
        });
        Process { sim: self.clone(), number: state.processes.len() as u32 - 1 }
    }

    /// End everything: all processes, and what was made known.
    pub fn end(&self) {
        let processes = self.0.state.lock().processes.len() as u32;
        (0..processes).for_each(|number| Process { sim: self.clone(), number }.kill());
        let extensions = std::mem::take(&mut *self.0.extensions.lock());
        self.enter(|| drop(extensions));
    }

    pub(crate) fn timer(&self, span: Duration) -> Timer {
        self.timer_at(self.now_ns().saturating_add(span.as_nanos().min(u128::from(u64::MAX)) as u64))
    }

    pub(crate) fn timer_at(&self, at_ns: u64) -> Timer {
        Timer { sim: self.clone(), at_ns, alarm: None }
    }

    /// Run tasks and timers until `until_ns`; the time is then `until_ns`.
    pub fn run_until(&self, until_ns: u64) {
        self.enter(|| {
            loop {
                self.run_ready();
                let next = self.next_timer_ns();
                let at_ns = next.unwrap_or(u64::MAX).min(until_ns);
                if at_ns > self.now_ns() {
                    self.0.now_ns.store(at_ns, Ordering::Relaxed);
                }
                if next.is_none_or(|next| next > until_ns) {
                    return;
                }
                self.fire_timers();
            }
        });
    }

    /// When the next timer is due that somebody waits for.
    fn next_timer_ns(&self) -> Option<u64> {
        let mut state = self.0.state.lock();
        while let Some(Reverse(pending)) = state.timers.peek() {
            if pending.alarm.0.lock().is_some() {
                return Some(pending.at_ns);
            }
            state.timers.pop();
        }
        None
    }

    fn fire_timers(&self) {
        let now_ns = self.now_ns();
        loop {
            let due = {
                let mut state = self.0.state.lock();
                match state.timers.peek() {
                    Some(Reverse(pending)) if pending.at_ns <= now_ns => state.timers.pop(),
                    _ => None,
                }
            };
            let Some(Reverse(pending)) = due else { return };
            let waker = pending.alarm.0.lock().take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    fn run_ready(&self) {
        for _ in 0..RUNS_PER_MOMENT_MAX {
            let Some((id, task, waker)) = self.next_ready() else { return };
            self.run_task(id, task, &waker);
        }
        panic!("tasks ran {RUNS_PER_MOMENT_MAX} times at {} ns: an endless loop", self.now_ns());
    }

    /// One of the tasks that can run, at random.
    fn next_ready(&self) -> Option<(TaskId, BoxTask, Waker)> {
        let mut state = self.0.state.lock();
        let state = &mut *state;
        loop {
            // Sorted: `tokio::sync::watch` wakes those that wait in an order of its own.
            let mut woken = std::mem::take(&mut *self.0.woken.lock());
            woken.sort_unstable();
            state.ready.append(&mut woken);
            let at = match state.ready.len() {
                0 => return None,
                1 => 0,
                n => self.below(n as u64) as usize,
            };
            let id = state.ready.swap_remove(at);
            let slot = &mut state.tasks[id.0];
            if slot.use_number != id.1 || !slot.live {
                continue;
            }
            let process = &mut state.processes[slot.process as usize];
            if process.paused {
                process.held.push(id);
                continue;
            }
            let Some(task) = slot.task.take() else { continue };
            slot.notice.as_ref().expect("a live task has one").queued.store(false, Ordering::Relaxed);
            PROCESS.set(slot.process);
            self.trace(1, id.0 as u64, u64::from(slot.process));
            return Some((id, task, slot.waker.clone().expect("a live task has one")));
        }
    }

    fn run_task(&self, id: TaskId, mut task: BoxTask, waker: &Waker) {
        let polled = catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(&mut Context::from_waker(waker))));
        let mut state = self.0.state.lock();
        if let Err(panic) = &polled {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
            let name = &state.processes[PROCESS.get() as usize].name;
            let failure = format!("{name} panicked: {text}");
            state.failures.push(failure);
        }
        let slot = &mut state.tasks[id.0];
        // Aborted or killed while it ran: it is dropped here.
        let goes_on = matches!(polled, Ok(Poll::Pending)) && slot.use_number == id.1 && slot.live;
        if goes_on {
            slot.task = Some(task);
            return;
        }
        if slot.use_number == id.1 && slot.live {
            state.vacate(id.0);
        }
        drop(state);
        // A task that panicked may panic again when it is dropped; it is a failure already.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(task)));
    }

    fn begin(&self, process: u32, task: BoxTask) -> Option<TaskId> {
        let mut state = self.0.state.lock();
        if !state.processes[process as usize].alive {
            drop(state);
            drop(task);
            return None;
        }
        let at = state.free.pop().unwrap_or_else(|| {
            state.tasks.push(Slot::default());
            state.tasks.len() - 1
        });
        let slot = &mut state.tasks[at];
        let id = (at, slot.use_number);
        let notice = Arc::new(Notice { shared: Arc::downgrade(&self.0), task: id, queued: AtomicBool::new(true) });
        slot.process = process;
        slot.task = Some(task);
        slot.waker = Some(notice.clone().into());
        slot.notice = Some(notice);
        slot.live = true;
        state.ready.push(id);
        Some(id)
    }

    fn abort(&self, id: TaskId) {
        let (task, process) = {
            let mut state = self.0.state.lock();
            let slot = &mut state.tasks[id.0];
            if slot.use_number != id.1 || !slot.live {
                return;
            }
            let process = slot.process;
            (state.vacate(id.0), process)
        };
        as_process(process, || drop(task));
    }
}

impl State {
    /// Free a slot; returns its task unless that runs just now.
    fn vacate(&mut self, at: usize) -> Option<BoxTask> {
        let slot = &mut self.tasks[at];
        slot.live = false;
        slot.use_number += 1;
        slot.waker = None;
        slot.notice = None;
        self.free.push(at);
        slot.task.take()
    }
}

fn as_process<T>(process: u32, run: impl FnOnce() -> T) -> T {
    struct Back(u32);
    impl Drop for Back {
        fn drop(&mut self) {
            PROCESS.set(self.0);
        }
    }
    let _back = Back(PROCESS.replace(process));
    run()
}

/// A simulated process: tasks that live and die together. Clones are the same process.
#[derive(Clone)]
pub struct Process {
    sim: Simulator,
    number: u32,
}

impl Process {
    /// The process that the caller belongs to. `None` outside of a simulator.
    pub fn current() -> Option<Self> {
        Simulator::current().map(|sim| Self { sim, number: PROCESS.get() })
    }

    /// Its number, in the order in which the processes of the simulator were made.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Run `inside` as a part of this process.
    pub fn enter<T>(&self, inside: impl FnOnce() -> T) -> T {
        self.sim.enter(|| as_process(self.number, inside))
    }

    /// Begin a task. In a process that was killed it is dropped at once.
    pub fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        let result = Arc::new(Mutex::new(Joined { result: None, waker: None, over: false }));
        let promise = Promise(Some(result.clone()));
        let task = Box::pin(async move {
            let mut promise = promise;
            let value = task.await;
            promise.keep(Ok(value));
        });
        let id = self.sim.begin(self.number, task);
        JoinHandle::simulated(Joining { sim: self.sim.clone(), id, result })
    }

    /// Run `job` after the time that blocking work takes in this process.
    pub fn spawn_blocking<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let range = self.sim.0.state.lock().processes[self.number as usize].blocking_ns.clone();
        let timer = self.sim.timer(Duration::from_nanos(self.sim.within(&range)));
        self.spawn(async move {
            timer.await;
            job()
        })
    }

    /// How long blocking work takes from now on, nanoseconds.
    pub fn set_blocking_ns(&self, range: Range<u64>) {
        self.sim.0.state.lock().processes[self.number as usize].blocking_ns = range;
    }

    /// Whether it was not killed.
    pub fn is_alive(&self) -> bool {
        self.sim.0.state.lock().processes[self.number as usize].alive
    }

    /// Stop running its tasks; they miss nothing that would wake them.
    pub fn pause(&self) {
        self.sim.0.state.lock().processes[self.number as usize].paused = true;
    }

    /// Run its tasks again.
    pub fn resume(&self) {
        let mut state = self.sim.0.state.lock();
        let process = &mut state.processes[self.number as usize];
        process.paused = false;
        let held = std::mem::take(&mut process.held);
        state.ready.extend(held);
    }

    /// Drop all its tasks where they wait. What they hold is dropped with them.
    pub fn kill(&self) {
        let tasks: Vec<BoxTask> = {
            let mut state = self.sim.0.state.lock();
            let process = &mut state.processes[self.number as usize];
            (process.alive, process.paused) = (false, false);
            process.held.clear();
            let own = |slot: &Slot| slot.live && slot.process == self.number;
            let own: Vec<usize> = (0..state.tasks.len()).filter(|&at| own(&state.tasks[at])).collect();
            own.into_iter().filter_map(|at| state.vacate(at)).collect()
        };
        self.enter(|| drop(tasks));
    }
}

/// A simulated timer.
pub(crate) struct Timer {
    sim: Simulator,
    at_ns: u64,
    alarm: Option<Arc<Alarm>>,
}

impl Future for Timer {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.sim.now_ns() >= self.at_ns {
            return Poll::Ready(());
        }
        if let Some(alarm) = &self.alarm {
            *alarm.0.lock() = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let alarm = Arc::new(Alarm(Mutex::new(Some(cx.waker().clone()))));
        self.alarm = Some(alarm.clone());
        let mut state = self.sim.0.state.lock();
        state.timers_made += 1;
        let pending = Pending { at_ns: self.at_ns, number: state.timers_made, alarm };
        state.timers.push(Reverse(pending));
        Poll::Pending
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if let Some(alarm) = &self.alarm {
            alarm.0.lock().take();
        }
    }
}

struct Joined<T> {
    result: Option<Result<T, JoinError>>,
    waker: Option<Waker>,
    over: bool,
}

/// Gives a task's result to who waits for it; an error when the task is dropped before it has one.
struct Promise<T>(Option<Arc<Mutex<Joined<T>>>>);

impl<T> Promise<T> {
    fn keep(&mut self, result: Result<T, JoinError>) {
        let Some(joined) = self.0.take() else { return };
        let waker = {
            let mut joined = joined.lock();
            joined.result = Some(result);
            joined.over = true;
            joined.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Drop for Promise<T> {
    fn drop(&mut self) {
        self.keep(Err(JoinError::cancelled()));
    }
}

/// Waits for the result of a task.
pub(crate) struct Joining<T> {
    sim: Simulator,
    id: Option<TaskId>,
    result: Arc<Mutex<Joined<T>>>,
}

impl<T> Joining<T> {
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<T, JoinError>> {
        let mut joined = self.result.lock();
        if let Some(result) = joined.result.take() {
            return Poll::Ready(result);
        }
        assert!(!joined.over, "a task's result is taken once");
        joined.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    pub(crate) fn abort_handle(&self) -> AbortHandle {
        AbortHandle { sim: self.sim.clone(), id: self.id }
    }
}

/// Ends a simulated task.
pub(crate) struct AbortHandle {
    sim: Simulator,
    id: Option<TaskId>,
}

impl AbortHandle {
    pub(crate) fn abort(&self) {
        if let Some(id) = self.id {
            self.sim.enter(|| self.sim.abort(id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Instant, JoinSet, sleep, spawn, timeout};

    fn run(seed: u64) -> (Vec<u64>, u64) {
        let sim = Simulator::new(seed);
        let order = Arc::new(Mutex::new(Vec::new()));
        let process = sim.process("a");
        process.enter(|| {
            for n in 0..8u64 {
                let order = order.clone();
                drop(spawn(async move {
                    sleep(Duration::from_secs(n / 4)).await;
                    order.lock().push(n);
                }));
            }
        });
        sim.run_until(10_000_000_000);
        let order = order.lock().clone();
        (order, sim.trace_hash())
    }

    #[test]
    fn a_seed_decides_the_order_of_tasks() {
        let (order, hash) = run(3);
        assert_eq!(run(3), (order.clone(), hash));
        assert!((4..20).any(|seed| run(seed).0 != order));
        assert!(order[..4].iter().all(|n| *n < 4), "{order:?}");
    }

    #[test]
    fn time_jumps_and_timeouts_strike_in_it() {
        let sim = Simulator::new(1);
        let process = sim.process("a");
        let task = process.spawn(async {
            let began = Instant::now();
            let slow = timeout(Duration::from_secs(5), sleep(Duration::from_secs(3600))).await;
            let quick = timeout(Duration::from_secs(5), sleep(Duration::from_secs(1))).await;
            let mut set = JoinSet::new();
            set.spawn(async { 7 });
            (slow.is_err(), quick.is_ok(), began.elapsed(), set.join_all().await)
        });
        let done = process
            .spawn(async move { assert_eq!(task.await.unwrap(), (true, true, Duration::from_secs(6), vec![7])) });
        sim.run_until(60_000_000_000);
        assert!(sim.take_failures().is_empty());
        drop(done);
        assert_eq!(sim.now_ns(), 60_000_000_000);
    }

    #[test]
    fn a_paused_process_goes_on_later_and_a_killed_one_never() {
        let sim = Simulator::new(1);
        let count = |process: &Process| {
            let ticks = Arc::new(AtomicU64::new(0));
            let counted = ticks.clone();
            drop(process.spawn(async move {
                loop {
                    sleep(Duration::from_secs(1)).await;
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            }));
            ticks
        };
        let (a, b) = (sim.process("a"), sim.process("b"));
        let (ticks_a, ticks_b) = (count(&a), count(&b));
        sim.run_until(500_000_000);
        a.pause();
        b.kill();
        sim.run_until(5_500_000_000);
        assert_eq!((ticks_a.load(Ordering::Relaxed), Arc::strong_count(&ticks_b)), (0, 1));
        a.resume();
        sim.run_until(7_000_000_000);
        assert_eq!(ticks_a.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_panic_of_a_task_is_a_failure_and_ends_nothing_else() {
        let sim = Simulator::new(1);
        let process = sim.process("a");
        let task = process.spawn(async { panic!("a bug") });
        let seen = process.spawn(async move { task.await.is_err() });
        drop(process.spawn(async move { assert!(seen.await.unwrap()) }));
        sim.run_until(1);
        assert_eq!(sim.take_failures(), ["a panicked: a bug"]);
    }
}
