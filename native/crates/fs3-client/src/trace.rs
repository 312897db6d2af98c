//! What the clients of this process did and when, kept for a viewer: operations, and the requests that each of them
//! made. Nothing is kept, and next to nothing done, while no trace is taken.
//!
//! A request knows its operation by a context that its task carries (as OpenTelemetry's does). What nobody's
//! operation asked for (keepalives, routing) is not shown.

use std::cell::Cell;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use fs3_core::{Code, Result};
use fs3_net::Reply;
use fs3_proto::v1::Method;
use fs3_rt::Instant;
use parking_lot::Mutex;

/// The trace that is being taken; null: none. Never freed: somebody may still be about to add to it.
static CURRENT: AtomicPtr<Ring> = AtomicPtr::new(std::ptr::null_mut());

struct Ring {
    began: Instant,
    began_wall_ns: i64,
    events_max: usize,
    operations: AtomicU64,
    /// `None` once it was stopped.
    kept: Mutex<Option<Kept>>,
}

#[derive(Default)]
struct Kept {
    events: VecDeque<Event>,
    dropped: u64,
}

/// What was traced.
pub struct Trace {
    /// When it began, nanoseconds since 1970; all times of events count from there.
    pub began_wall_ns: i64,
    /// In the order in which they ended; the newest ones.
    pub events: Vec<Event>,
    /// How many older ones there was no room for.
    pub dropped: u64,
}

/// One thing that took some time.
pub struct Event {
    /// Since the trace began.
    pub start: Duration,
    /// How long it took.
    pub duration: Duration,
    /// The operation's number in the trace, from 1 on; of a request, that of its operation.
    pub operation: u64,
    /// How it ended; `None`: nobody waited for it to the end.
    pub outcome: Option<Outcome>,
    /// What it was.
    pub what: What,
}

/// What an event was.
pub enum What {
    /// A call of the program.
    Operation {
        /// What was called and for what.
        subject: Box<Subject>,
        /// Whether the thread did other work meanwhile (asyncio).
        background: bool,
    },
    /// A message to a service and its answer.
    Request {
        /// The service's address.
        address: Box<str>,
        /// What it was asked.
        method: Method,
        /// Bytes of payload sent.
        sent: u64,
        /// More about it.
        detail: Detail,
    },
}

/// What an operation is about.
#[derive(Clone, Default)]
pub struct Subject {
    /// What was called.
    pub name: &'static str,
    /// Of what; empty: unknown.
    pub path: Arc<[u8]>,
    /// Of which inode, or the one that `path` begins at.
    pub inode: u64,
    /// From where, bytes.
    pub offset: Option<u64>,
    /// How many things at once, if it can be several.
    pub count: Option<u64>,
    /// Linux' number of the thread that called.
    pub thread: i32,
}

/// What else is known of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Detail {
    /// The storage node.
    pub node_id: u32,
    /// Its target; 0: unknown.
    pub target_id: u64,
    /// Chunks it is about.
    pub chunks: u32,
    /// How many tries there were before.
    pub attempt: u32,
    /// Whether it was made because another replica took long.
    pub hedge: bool,
}

/// How something ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Bytes that were read or written.
    pub bytes: Option<u64>,
    /// Of several things at once, how many were there, or were kept.
    pub hits: Option<u64>,
    /// Why it failed.
    pub error: Option<Code>,
}

impl Outcome {
    /// Of something that moves no bytes.
    pub fn plain<T>(result: &Result<T>) -> Self {
        Self { error: result.as_ref().err().map(|error| error.code), ..Self::default() }
    }

    /// Of one that returns how many bytes it moved.
    pub fn counted(result: &Result<usize>) -> Self {
        Self { bytes: result.as_ref().ok().map(|count| *count as u64), ..Self::plain(result) }
    }

    /// Of several that return how many bytes they moved: all of these, and the first error.
    pub fn summed<'a>(results: impl IntoIterator<Item = &'a Result<usize>>) -> Self {
        let sum = |sum: Self, result| {
            let one = Self::counted(result);
            let bytes = Some(sum.bytes.unwrap_or(0) + one.bytes.unwrap_or(0));
            Self { bytes, error: sum.error.or(one.error), hits: None }
        };
        results.into_iter().fold(Self::default(), sum)
    }
}

/// Begin a trace that keeps the newest `events_max` events; false when one is being taken already.
pub fn start(events_max: usize) -> bool {
    let ring = Ring {
        began: Instant::now(),
        began_wall_ns: fs3_rt::wall_ns(),
        events_max: events_max.max(1),
        operations: AtomicU64::new(0),
        kept: Mutex::new(Some(Kept::default())),
    };
    let ring = Box::into_raw(Box::new(ring));
    let none = std::ptr::null_mut();
    let began = CURRENT.compare_exchange(none, ring, Ordering::AcqRel, Ordering::Relaxed).is_ok();
    if !began {
        // SAFETY: it was not published.
        drop(unsafe { Box::from_raw(ring) });
    }
    began
}

/// End the trace; `None` when none is being taken. What is still under way is not in it.
pub fn stop() -> Option<Trace> {
    let ring = CURRENT.swap(std::ptr::null_mut(), Ordering::AcqRel);
    // SAFETY: as in `current`.
    let ring = unsafe { ring.as_ref() }?;
    let kept = ring.kept.lock().take()?;
    Some(Trace { began_wall_ns: ring.began_wall_ns, events: kept.events.into(), dropped: kept.dropped })
}

/// In a forked child: the trace is its parent's. Only touches an atomic.
pub fn forget() {
    CURRENT.store(std::ptr::null_mut(), Ordering::Release);
}

/// Whether a trace is being taken.
pub fn is_on() -> bool {
    !CURRENT.load(Ordering::Relaxed).is_null()
}

fn current() -> Option<&'static Ring> {
    // SAFETY: the pointer is null or came from Box::into_raw, and what was published is never freed.
    unsafe { CURRENT.load(Ordering::Acquire).as_ref() }
}

impl Ring {
    fn add(&self, event: Event) {
        let mut kept = self.kept.lock();
        let Some(kept) = kept.as_mut() else { return };
        if kept.events.len() >= self.events_max {
            kept.events.pop_front();
            kept.dropped += 1;
        }
        kept.events.push_back(event);
    }

    fn since(&self, then: Instant) -> Duration {
        then.saturating_duration_since(self.began)
    }
}

/// What is to be shown of an operation: nothing while no trace is taken.
pub struct Shown(Option<Box<Subject>>);

/// An operation that a thread asks for now; `subject` is asked only if a trace is taken.
pub fn shown(subject: impl FnOnce() -> Subject) -> Shown {
    // SAFETY: it always succeeds.
    Shown(is_on().then(|| Box::new(Subject { thread: unsafe { libc::gettid() }, ..subject() })))
}

impl Shown {
    /// Do `work`, and note when and with which outcome.
    pub async fn run<T>(self, work: impl Future<Output = T>, outcome: impl FnOnce(&T) -> Outcome) -> T {
        let (Some(subject), Some(ring)) = (self.0, current()) else { return work.await };
        // SAFETY: it always succeeds.
        let background = subject.thread != unsafe { libc::gettid() };
        let operation = ring.operations.fetch_add(1, Ordering::Relaxed) + 1;
        let mut span = Span::new(ring, operation, What::Operation { subject, background });
        let result = Carrying { context: Context { operation, detail: Detail::default() }, work }.await;
        span.outcome = Some(outcome(&result));
        result
    }
}

/// Something under way; dropped when it is over.
struct Span {
    ring: &'static Ring,
    started: Instant,
    operation: u64,
    outcome: Option<Outcome>,
    what: Option<What>,
}

impl Span {
    fn new(ring: &'static Ring, operation: u64, what: What) -> Self {
        Self { ring, started: Instant::now(), operation, outcome: None, what: Some(what) }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some(what) = self.what.take() else { return };
        self.ring.add(Event {
            start: self.ring.since(self.started),
            duration: self.started.elapsed(),
            operation: self.operation,
            outcome: self.outcome,
            what,
        });
    }
}

/// A request, if it belongs to an operation that is shown.
pub(crate) async fn request(
    address: &str,
    method: Method,
    sent: usize,
    call: impl Future<Output = Result<Reply>>,
) -> Result<Reply> {
    let context = CONTEXT.get();
    let Some(ring) = (context.operation != 0).then(current).flatten() else { return call.await };
    let what = What::Request { address: address.into(), method, sent: sent as u64, detail: context.detail };
    let mut span = Span::new(ring, context.operation, what);
    let reply = call.await;
    let received = |reply: &Reply| reply.lengths.iter().map(|length| *length as u64).sum();
    span.outcome = Some(Outcome { bytes: reply.as_ref().ok().map(received), ..Outcome::plain(&reply) });
    reply
}

/// What the work of a task is for.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Context {
    /// 0: nothing that is shown.
    operation: u64,
    detail: Detail,
}

thread_local! {
    static CONTEXT: Cell<Context> = const { Cell::new(Context { operation: 0, detail: Detail {
        node_id: 0, target_id: 0, chunks: 0, attempt: 0, hedge: false,
    } }) };
}

/// Work with its context.
pub(crate) struct Carrying<F> {
    context: Context,
    work: F,
}

/// `work`, in a task of its own, is for the same operation as this one.
pub(crate) fn inherit<F: Future>(work: F) -> Carrying<F> {
    Carrying { context: CONTEXT.get(), work }
}

/// The requests of `work` are to be shown with `detail`.
pub(crate) fn detailed<F: Future>(detail: Detail, work: F) -> Carrying<F> {
    let operation = CONTEXT.get().operation;
    Carrying { context: if operation == 0 { Context::default() } else { Context { operation, detail } }, work }
}

impl<F: Future> Future for Carrying<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<F::Output> {
        // SAFETY: `work` is pinned with the whole, which is never moved out of, and has no Drop of its own.
        let (context, work) = unsafe {
            let this = self.get_unchecked_mut();
            (this.context, Pin::new_unchecked(&mut this.work))
        };
        if context.operation == 0 {
            return work.poll(cx);
        }
        let _before = Restore(CONTEXT.replace(context));
        work.poll(cx)
    }
}

struct Restore(Context);

impl Drop for Restore {
    fn drop(&mut self) {
        CONTEXT.set(self.0);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use fs3_core::Error;

    use super::*;

    /// One trace is taken at a time in a process.
    static TURN: Mutex<()> = Mutex::new(());

    fn subject() -> Subject {
        Subject { name: "read", path: (*b"/a").into(), ..Subject::default() }
    }

    fn reply() -> Reply {
        Reply { body: Bytes::new(), windows: Vec::new(), lengths: vec![3, 4], crcs: Vec::new() }
    }

    fn run<F>(work: F) -> F::Output
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(work)
    }

    #[test]
    fn requests_of_all_tasks_of_an_operation_are_shown_with_it_and_others_not() {
        let _turn = TURN.lock();
        assert!(start(100) && !start(100), "one at a time");
        run(async {
            let detail = Detail { node_id: 7, chunks: 2, ..Detail::default() };
            let work = async move {
                let call = request("a:1", Method::StorageRead, 0, async { Ok(reply()) });
                let task = tokio::spawn(inherit(detailed(detail, call)));
                task.await.unwrap().map(|_| 7)
            };
            shown(subject).run(work, Outcome::counted).await.unwrap();
            request("b:1", Method::GetRouting, 0, async { Ok(reply()) }).await.map(drop)
        })
        .unwrap();
        let trace = stop().unwrap();
        assert!(!is_on() && stop().is_none());
        let [request, operation] = trace.events.as_slice() else { panic!("{} events", trace.events.len()) };
        let What::Request { detail, .. } = &request.what else { panic!("no request") };
        assert_eq!(
            (detail.node_id, detail.chunks, request.operation, request.outcome.unwrap().bytes),
            (7, 2, 1, Some(7))
        );
        assert!(matches!(&operation.what, What::Operation { subject, background: false } if subject.name == "read"));
        let outcome = operation.outcome.unwrap();
        assert_eq!((operation.operation, outcome.bytes, outcome.error), (1, Some(7), None));
        assert!(operation.start <= request.start);
        assert!(request.start + request.duration <= operation.start + operation.duration);
    }

    #[test]
    fn the_newest_events_are_kept_and_what_was_given_up_or_failed_says_so() {
        let _turn = TURN.lock();
        assert!(start(2));
        run(async {
            let failing = async { Err::<(), _>(Error::new(Code::NotFound, "none")) };
            shown(subject).run(async { Ok(1) }, Outcome::counted).await.unwrap();
            shown(subject).run(failing, Outcome::plain).await.unwrap_err();
            let never = shown(subject).run(std::future::pending::<Result<()>>(), Outcome::plain);
            tokio::time::timeout(Duration::from_millis(1), never).await.unwrap_err();
        });
        let trace = stop().unwrap();
        let errors: Vec<_> = trace.events.iter().map(|event| event.outcome.map(|outcome| outcome.error)).collect();
        assert_eq!((errors, trace.dropped), (vec![Some(Some(Code::NotFound)), None], 1));
    }

    #[test]
    fn what_is_asked_before_a_trace_or_ends_after_it_is_not_in_it() {
        let _turn = TURN.lock();
        let early = shown(|| panic!("asked without need"));
        assert!(start(2));
        run(async {
            early.run(async { Ok(()) }, Outcome::plain).await.unwrap();
            let over = async { stop().map(|trace| trace.events.len()).ok_or_else(|| Error::new(Code::Internal, "")) };
            assert_eq!(shown(subject).run(over, Outcome::plain).await.unwrap(), 0);
        });
        assert!(!is_on());
    }
}
