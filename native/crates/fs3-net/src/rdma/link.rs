//! One RDMA connection: what is queued, what is under way, what the peer may touch.

use super::memory::Registered;
use super::nic::{Grant, Nic, Ready};
use super::wire::{
    INLINE_PAYLOAD_BYTES_MAX, Kind, MESSAGE_BYTES, PAYLOAD_INLINE, PAYLOAD_PUSHED, PAYLOAD_WITHHELD, PREFIX_BYTES,
    Piece, Prefix, TAIL_AT, TAIL_REMOTE,
};
use crate::link::{Flush, Link, Outgoing};
use crate::tcp::Socket;
use fs3_core::{Error, Region, RegionMut, Result};
use fs3_proto::frame::{HEADER_BYTES, Header, Kind as FrameKind};
use fs3_verbs::{Completion, CompletionQueue, QueuePair, Remote, Sge, Work, WorkRequest};
use parking_lot::{Mutex, MutexGuard};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// How long a peer may take to say that it does not write to revoked memory any more.
const REVOKE_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes of RDMA READs under way, as long as there is one: more than any link has on its way, and few enough that what
/// came first goes to the disk while the rest comes.
const READING_BYTES_MAX: u64 = 4 << 20;
/// Marks work requests of the send queue among completions; receives have their index.
const SEND_QUEUE: u64 = 1 << 63;

/// A connection by RDMA after its hello.
pub(crate) struct RdmaLink {
    pub(super) socket: Socket,
    pub(super) nic: Arc<Nic>,
    pub(super) completions: Arc<CompletionQueue>,
    state: Mutex<State>,
    closed: AtomicBool,
    /// The receiving task has something to look at.
    pub(super) wake: Notify,
    /// The receiving task waits for messages only: it has to be told of sends.
    pub(super) untimed: AtomicBool,
    /// Receives that the peer was promised.
    grant: Grant,
}

struct State {
    /// `None` after the end: nothing can touch memory any more.
    pair: Option<QueuePair>,
    /// Work requests that the queue pair takes now.
    free: u32,
    /// Messages that the peer takes now.
    credits: u32,
    /// Receives that were posted again and not yet told.
    owed: u16,
    next_id: u64,
    messages: VecDeque<Batch>,
    reads: VecDeque<Batch>,
    /// Bytes of RDMA READs under way.
    reading_bytes: u64,
    /// In the order in which they complete.
    posted: VecDeque<Posted>,
    /// Requests of this side that are not answered, and what the peer may touch for them.
    exposed: HashMap<u64, Exposed>,
    /// Since when the peer has been asked to let go of memory of these requests.
    revoking: VecDeque<(Instant, u64)>,
    /// Requests of the peer that are not answered: where the response's payload goes.
    asked: HashMap<u64, Vec<Piece>>,
    /// Requests of the peer that were revoked before their windows were known.
    revoked_early: HashSet<u64>,
    /// Responses whose tail the peer still reads.
    answered: HashMap<u64, Hold>,
}

/// Work that belongs together; the last request of a message is its SEND.
struct Batch {
    requests: VecDeque<Request>,
    hold: Hold,
    kind: BatchKind,
    started: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum BatchKind {
    Frame { request_id: u64 },
    Control,
    Read { key: u64, bytes: u64 },
}

struct Request {
    work: Work,
    sges: Vec<Sge>,
}

/// Part of a batch that was posted; the last part frees what the batch holds.
struct Posted {
    id: u64,
    requests: u32,
    done: Option<(BatchKind, Hold)>,
}

/// Memory that must stay as it is until the device or the peer is done with it.
#[derive(Default)]
struct Hold {
    /// The message itself.
    message: Option<RegionMut>,
    staged: Vec<Region>,
    registered: Vec<Registered>,
    outgoing: Option<Outgoing>,
}

/// What besides messages may happen on a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Awaited {
    /// Nothing.
    Messages,
    /// Sends that hold memory will be done soon; nobody waits for that.
    Release,
    /// Work goes on when something completes.
    Completions,
}

/// What the peer may touch for one request.
#[derive(Default)]
pub(super) struct Exposed {
    hold: Hold,
    /// Windows whose own memory is not registered: window, and what stands for it.
    pub(super) staged: Vec<(usize, RegionMut)>,
    /// Whether the peer may write somewhere.
    writable: bool,
    /// The call was given up; its windows.
    pub(super) abandoned: Option<Vec<RegionMut>>,
}

impl RdmaLink {
    pub(super) fn new(socket: Socket, ready: Ready, peer_receives: u32) -> Arc<Self> {
        ready.nic.counters.connected();
        let settings = ready.pair.settings();
        let state = State {
            pair: Some(ready.pair),
            free: settings.work_requests,
            credits: peer_receives,
            owed: 0,
            next_id: 0,
            messages: VecDeque::new(),
            reads: VecDeque::new(),
            reading_bytes: 0,
            posted: VecDeque::new(),
            exposed: HashMap::new(),
            revoking: VecDeque::new(),
            asked: HashMap::new(),
            revoked_early: HashSet::new(),
            answered: HashMap::new(),
        };
        Arc::new(Self {
            socket,
            nic: ready.nic,
            completions: ready.completions,
            state: Mutex::new(state),
            closed: AtomicBool::new(false),
            wake: Notify::new(),
            untimed: AtomicBool::new(false),
            grant: ready.grant,
        })
    }

    /// A frame as a batch, with the memory that the peer needs for it described.
    fn frame(&self, outgoing: Outgoing) -> Result<Batch> {
        let header = Header::parse(outgoing.head.first_chunk().expect("a message begins with its header"))?;
        let request_id = header.request_id;
        let mut prefix = Prefix::control(Kind::Frame, 0);
        let (mut requests, mut hold, mut tail) = (VecDeque::new(), Hold::default(), Vec::new());
        let small = header.payload_bytes as usize <= INLINE_PAYLOAD_BYTES_MAX;
        if header.payload_bytes > 0 && small {
            prefix.flags |= PAYLOAD_INLINE;
        }
        let mut exposed = None;
        if header.kind == FrameKind::Request {
            let mut exposure = Exposed::default();
            if !small {
                for piece in &outgoing.payload {
                    let registered = self.readable(piece, &mut exposure.hold)?;
                    describe(&registered, &mut tail);
                    prefix.sources += 1;
                    exposure.hold.registered.push(registered);
                }
                self.nic.counters.exposed(u64::from(header.payload_bytes));
            }
            prefix.windows = self.expose_windows(&outgoing, &mut exposure, &mut tail)?;
            exposed = (prefix.sources + prefix.windows > 0).then_some(exposure);
        } else {
            let asked = self.state.lock().asked.remove(&request_id);
            if header.payload_bytes > 0 && !small {
                let pushed = match asked {
                    Some(windows) => self.push(&outgoing, header.payload_bytes, &windows, &mut hold)?,
                    None => None,
                };
                if pushed.is_some() {
                    self.nic.counters.wrote(u64::from(header.payload_bytes));
                }
                prefix.flags |= if pushed.is_some() { PAYLOAD_PUSHED } else { PAYLOAD_WITHHELD };
                requests = pushed.unwrap_or_default();
            }
        }
        tail.extend(&outgoing.head[HEADER_BYTES..]);
        tail.extend(&outgoing.body[..]);
        if prefix.has(PAYLOAD_INLINE) {
            outgoing.payload.iter().for_each(|piece| tail.extend(&piece[..]));
        }
        let mut message = Vec::with_capacity(TAIL_AT + tail.len().min(MESSAGE_BYTES));
        let mut remote = None;
        if TAIL_AT + tail.len() > MESSAGE_BYTES {
            prefix.flags |= TAIL_REMOTE;
            let (mut region, registered) = self.nic.stage(tail.len())?;
            region.copy_from_slice(&tail);
            tail.clear();
            describe(&registered, &mut tail);
            remote = Some((region.freeze(), registered));
        }
        message.extend(prefix.encode());
        message.extend(&outgoing.head[..HEADER_BYTES]);
        message.extend(tail);
        requests.push_back(self.send_request(&message, &mut hold)?);
        self.keep(header, outgoing, exposed, remote, &mut hold);
        Ok(Batch { requests, hold, kind: BatchKind::Frame { request_id }, started: false })
    }

    /// Put away what has to live longer than the message itself.
    fn keep(
        &self,
        header: Header,
        outgoing: Outgoing,
        exposed: Option<Exposed>,
        remote: Option<(Region, Registered)>,
        hold: &mut Hold,
    ) {
        let mut state = self.state.lock();
        if header.kind == FrameKind::Request {
            let mut exposed = exposed;
            if let Some((region, registered)) = remote {
                let exposure = exposed.get_or_insert_default();
                exposure.hold.staged.push(region);
                exposure.hold.registered.push(registered);
            }
            // The slot is told when the message leaves; the payload stays until the answer.
            let payload = outgoing.payload.clone();
            hold.outgoing = Some(outgoing);
            if let Some(mut exposure) = exposed {
                exposure.hold.staged.extend(payload);
                state.exposed.insert(header.request_id, exposure);
            }
        } else if let Some((region, registered)) = remote {
            let staged = vec![region];
            let kept = Hold { staged, registered: vec![registered], outgoing: Some(outgoing), message: None };
            state.answered.insert(header.request_id, kept);
        } else {
            hold.outgoing = Some(outgoing);
        }
    }

    /// Keys for a piece of payload; a copy where its memory cannot have any.
    fn readable(&self, piece: &Region, hold: &mut Hold) -> Result<Registered> {
        if let Some(registered) = self.nic.registered(piece.as_ptr(), piece.len()) {
            return Ok(registered);
        }
        let (mut region, registered) = self.nic.stage(piece.len())?;
        region.copy_from_slice(piece);
        self.nic.counters.copied(piece.len());
        hold.staged.push(region.freeze());
        Ok(registered)
    }

    /// Describe the windows of a request's response, unless the response is small in any case.
    fn expose_windows(&self, outgoing: &Outgoing, exposure: &mut Exposed, tail: &mut Vec<u8>) -> Result<u16> {
        let Some(slot) = &outgoing.landing else { return Ok(0) };
        let windows = slot.windows();
        let total: usize = windows.iter().map(|w| w.1).sum();
        if total <= INLINE_PAYLOAD_BYTES_MAX {
            return Ok(0);
        }
        let too_many = |_| Error::new(fs3_core::Code::InvalidArgument, "a response may have 65,535 segments");
        let count = u16::try_from(windows.len()).map_err(too_many)?;
        exposure.writable = true;
        for (at, (start, bytes)) in windows.iter().enumerate() {
            let registered = if *bytes == 0 {
                Piece { at: Remote { address: 0, key: 0 }, bytes: 0 }.encode(tail);
                continue;
            } else if let Some(registered) = self.nic.registered(*start as *const u8, *bytes) {
                registered
            } else {
                let (region, registered) = self.nic.stage(*bytes)?;
                self.nic.counters.copied(*bytes);
                exposure.staged.push((at, region));
                registered
            };
            describe(&registered, tail);
            exposure.hold.registered.push(registered);
        }
        Ok(count)
    }

    /// RDMA WRITEs of the payload's segments to the windows; `None` when they do not fit.
    fn push(
        &self,
        outgoing: &Outgoing,
        payload_bytes: u32,
        windows: &[Piece],
        hold: &mut Hold,
    ) -> Result<Option<VecDeque<Request>>> {
        let whole = [payload_bytes];
        let segments = if outgoing.segments.is_empty() { &whole[..] } else { &outgoing.segments[..] };
        let fits = segments.len() <= windows.len()
            && segments.iter().zip(windows).all(|(segment, window)| *segment <= window.bytes)
            && segments.iter().map(|s| u64::from(*s)).sum::<u64>() == u64::from(payload_bytes);
        if !fits {
            return Ok(None);
        }
        let mut pieces = VecDeque::new();
        for piece in outgoing.payload.iter().filter(|piece| !piece.is_empty()) {
            let registered = self.readable(piece, hold)?;
            pieces.push_back(registered.local());
            hold.registered.push(registered);
        }
        let sges_max = self.sges_max();
        let mut requests = VecDeque::new();
        for (segment, window) in segments.iter().zip(windows) {
            let mut done = 0;
            while done < *segment {
                let mut sges = Vec::new();
                let most = (*segment - done).min(self.nic.operation_bytes_max as u32);
                let taken = take(&mut pieces, most, sges_max, &mut sges);
                let at = Remote { address: window.at.address.wrapping_add(u64::from(done)), key: window.at.key };
                requests.push_back(Request { work: Work::Write(at), sges });
                done += taken;
            }
        }
        Ok(Some(requests))
    }

    fn sges_max(&self) -> usize {
        self.state.lock().pair.as_ref().map_or(1, |pair| pair.settings().sges as usize)
    }

    fn send_request(&self, bytes: &[u8], hold: &mut Hold) -> Result<Request> {
        let (mut message, registered) = self.nic.stage(bytes.len())?;
        message.copy_from_slice(bytes);
        let sges = vec![registered.local()];
        hold.message = Some(message);
        hold.registered.push(registered);
        Ok(Request { work: Work::Send, sges })
    }

    fn control(&self, kind: Kind, id: u64) -> Result<Batch> {
        let mut hold = Hold::default();
        let request = self.send_request(&Prefix::control(kind, id).encode(), &mut hold)?;
        Ok(Batch { requests: VecDeque::from([request]), hold, kind: BatchKind::Control, started: false })
    }

    /// Queue a message about a request.
    pub(super) fn send_control(&self, kind: Kind, id: u64) -> Result<()> {
        let batch = self.control(kind, id)?;
        let mut state = self.state.lock();
        state.messages.push_back(batch);
        self.pump(&mut state)
    }

    /// Fill `memory` from the peer's pieces; [`RdmaLink::collect`] tells `key` when it is done.
    ///
    /// # Safety
    /// `memory` must not be touched until then, or until the link is closed.
    pub(super) unsafe fn read(&self, key: u64, memory: &Registered, pieces: &[Piece]) -> Result<()> {
        let (mut requests, mut at) = (VecDeque::new(), 0u32);
        for piece in pieces {
            let mut done = 0;
            while done < piece.bytes {
                let length = (piece.bytes - done).min(self.nic.operation_bytes_max as u32);
                let local = memory.local();
                let sges = vec![Sge { addr: local.addr + u64::from(at), length, lkey: local.lkey }];
                let from = Remote { address: piece.at.address.wrapping_add(u64::from(done)), key: piece.at.key };
                requests.push_back(Request { work: Work::Read(from), sges });
                (done, at) = (done + length, at + length);
            }
        }
        let hold = Hold { registered: vec![memory.clone()], ..Hold::default() };
        let kind = BatchKind::Read { key, bytes: u64::from(at) };
        let mut state = self.state.lock();
        state.reads.push_back(Batch { requests, hold, kind, started: false });
        self.pump(&mut state)
    }

    /// Post what can be posted.
    fn pump(&self, state: &mut MutexGuard<'_, State>) -> Result<()> {
        while state.pair.is_some() && state.free > 0 {
            let (credits, reading_bytes) = (state.credits, state.reading_bytes);
            // The last credit is for giving credits, so that two sides that wait for some cannot both wait for good.
            let may_start = |batch: &Batch| match batch.kind {
                BatchKind::Read { bytes, .. } => {
                    batch.started || reading_bytes == 0 || reading_bytes + bytes <= READING_BYTES_MAX
                }
                BatchKind::Control => batch.started || credits >= 1,
                BatchKind::Frame { .. } => batch.started || credits >= 2,
            };
            let from_reads = state.reads.front().is_some_and(may_start);
            let queue = if from_reads { &mut state.reads } else { &mut state.messages };
            if !queue.front().is_some_and(may_start) {
                return Ok(());
            }
            let mut batch = queue.pop_front().expect("the queue has a front");
            self.post(state, &mut batch)?;
            if !batch.requests.is_empty() {
                let queue = if from_reads { &mut state.reads } else { &mut state.messages };
                queue.push_front(batch);
            }
        }
        Ok(())
    }

    /// Post as much of a batch as the queue pair takes.
    fn post(&self, state: &mut MutexGuard<'_, State>, batch: &mut Batch) -> Result<()> {
        let state = &mut **state;
        let count = batch.requests.len().min(state.free as usize);
        let last = count == batch.requests.len();
        let is_message = !matches!(batch.kind, BatchKind::Read { .. });
        if let (BatchKind::Read { bytes, .. }, false) = (batch.kind, batch.started) {
            state.reading_bytes += bytes;
        }
        if is_message && !batch.started {
            state.credits -= 1;
            if let Some(slot) = batch.hold.outgoing.as_ref().and_then(|o| o.landing.as_ref()) {
                slot.mark_sent();
            }
        }
        batch.started = true;
        if let (true, true, Some(message)) = (last, is_message, &mut batch.hold.message) {
            message[2..4].copy_from_slice(&std::mem::take(&mut state.owed).to_le_bytes());
        }
        let id = state.next_id | SEND_QUEUE;
        state.next_id += 1;
        let pair = state.pair.as_ref().expect("posted to while it is there");
        let inline_max = pair.settings().inline_bytes;
        let posted: Vec<Request> = batch.requests.drain(..count).collect();
        let requests: Vec<WorkRequest<'_>> = posted
            .iter()
            .enumerate()
            .map(|(i, request)| WorkRequest {
                id,
                work: request.work,
                sges: &request.sges,
                signalled: i + 1 == count,
                inline: matches!(request.work, Work::Send)
                    && request.sges.iter().map(|s| s.length).sum::<u32>() <= inline_max,
            })
            .collect();
        // SAFETY: all memory is held by the batch, the exposure or the reader until the completion or the end.
        if let Err(error) = unsafe { pair.post(&requests) } {
            // Some may have been posted: they must end before the batch and its memory do.
            state.pair = None;
            return Err(super::unavailable(error));
        }
        state.free -= count as u32;
        if is_message && last {
            self.nic.counters.sent();
        }
        let done = last.then(|| (batch.kind, std::mem::take(&mut batch.hold)));
        state.posted.push_back(Posted { id, requests: count as u32, done });
        Ok(())
    }

    /// Take completions: received messages as (index, bytes), keys of finished reads. Returns how many there were.
    pub(super) fn collect(
        &self,
        scratch: &mut Vec<Completion>,
        received: &mut Vec<(u64, u32)>,
        read: &mut Vec<u64>,
    ) -> Result<usize> {
        scratch.clear();
        let count = self.completions.poll(scratch).map_err(super::unavailable)?;
        if count == 0 {
            return Ok(0);
        }
        let mut freed = Vec::new();
        let mut state = self.state.lock();
        for completion in scratch.iter() {
            if completion.status != 0 {
                let reason = format!("RDMA connection lost: {}", completion.reason());
                return Err(Error::new(fs3_core::Code::Unavailable, reason));
            }
            if completion.received {
                received.push((completion.id, completion.bytes));
                continue;
            }
            // The send queue completes in order; those not signalled are done with the next one that is.
            while state.posted.front().is_some_and(|posted| posted.id <= completion.id) {
                let posted = state.posted.pop_front().expect("there is a front");
                state.free += posted.requests;
                if let Some((kind, hold)) = posted.done {
                    if let BatchKind::Read { key, bytes } = kind {
                        state.reading_bytes -= bytes;
                        self.nic.counters.read(bytes);
                        read.push(key);
                    }
                    freed.push(hold);
                }
            }
        }
        self.pump(&mut state)?;
        drop(state);
        Ok(count)
    }

    /// What the receiving task waits for, besides messages.
    pub(super) fn awaited(&self) -> Awaited {
        let state = self.state.lock();
        let reads = !state.reads.is_empty()
            || state.posted.iter().any(|p| matches!(p.done, Some((BatchKind::Read { .. }, _)) | None));
        if reads || (state.free == 0 && !state.messages.is_empty()) {
            Awaited::Completions
        } else if state.posted.is_empty() {
            Awaited::Messages
        } else {
            Awaited::Release
        }
    }

    /// The peer has posted receives again.
    pub(super) fn credit(&self, credits: u16) -> Result<()> {
        if credits == 0 {
            return Ok(());
        }
        let mut state = self.state.lock();
        state.credits = state.credits.saturating_add(u32::from(credits));
        self.pump(&mut state)
    }

    /// A receive of this side was posted again: tell the peer, with the next message or one of its own.
    pub(super) fn owe(&self) -> Result<()> {
        let mut state = self.state.lock();
        state.owed += 1;
        let due = u32::from(state.owed) >= self.grant.count / 2;
        // A queued message would take them along, if it could leave.
        if !due || (!state.messages.is_empty() && state.credits >= 2) {
            return Ok(());
        }
        drop(state);
        let batch = self.control(Kind::Credits, 0)?;
        let mut state = self.state.lock();
        // In front: messages that wait for credits must not hold up those of the peer.
        let at = usize::from(state.messages.front().is_some_and(|batch| batch.started));
        state.messages.insert(at, batch);
        self.pump(&mut state)
    }

    /// Remember where the response to a request of the peer goes, unless it was revoked in the meantime.
    pub(super) fn asked(&self, request_id: u64, windows: Vec<Piece>) {
        let mut state = self.state.lock();
        if !state.revoked_early.remove(&request_id) && !windows.is_empty() {
            state.asked.insert(request_id, windows);
        }
    }

    /// The peer wants memory back. True: nothing will be written there any more; false: the response is on its way.
    pub(super) fn revoke(&self, request_id: u64, still_coming: bool) -> bool {
        let mut state = self.state.lock();
        if still_coming {
            state.revoked_early.insert(request_id);
            return true;
        }
        state.asked.remove(&request_id).is_some()
    }

    /// The peer does not touch memory of this request any more.
    pub(super) fn settle(&self, request_id: u64) -> Option<Exposed> {
        self.state.lock().exposed.remove(&request_id)
    }

    /// The peer has let go of the windows of a request that was given up.
    pub(super) fn revoked(&self, request_id: u64) {
        let mut freed = None;
        let mut state = self.state.lock();
        if let Some(exposed) = state.exposed.get_mut(&request_id) {
            exposed.writable = false;
            freed = exposed.abandoned.replace(Vec::new());
        }
        drop(state);
        drop(freed);
    }

    /// The peer has read the tail of a response.
    pub(super) fn release(&self, request_id: u64) {
        let freed = self.state.lock().answered.remove(&request_id);
        drop(freed);
    }

    /// End the connection because something cannot be sent.
    fn fail(&self, error: &Error) {
        tracing::warn!("an RDMA connection is ended: {error}");
        self.nic.counters.lost();
        self.close();
    }

    /// When the connection has to be ended because the peer does not let go of memory.
    pub(super) fn revoke_deadline(&self) -> Option<Instant> {
        let mut state = self.state.lock();
        while let Some((since, id)) = state.revoking.front().copied() {
            if state.exposed.get(&id).is_some_and(|exposed| exposed.writable) {
                return Some(since + REVOKE_TIMEOUT);
            }
            state.revoking.pop_front();
        }
        None
    }
}

impl Link for RdmaLink {
    fn send(&self, message: Outgoing, _flush: Flush) {
        if self.is_closed() {
            return;
        }
        let sent = self.frame(message).and_then(|batch| {
            let mut state = self.state.lock();
            state.messages.push_back(batch);
            self.pump(&mut state)?;
            if self.untimed.swap(false, Ordering::SeqCst) || (state.free == 0 && !state.messages.is_empty()) {
                self.wake.notify_one();
            }
            Ok(())
        });
        if let Err(error) = sent {
            self.fail(&error);
        }
    }

    fn flush(&self) {}

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        let mut state = self.state.lock();
        // After this nothing touches memory through the connection, in either direction.
        let pair = state.pair.take();
        drop(pair);
        let dropped = (
            std::mem::take(&mut state.messages),
            std::mem::take(&mut state.reads),
            std::mem::take(&mut state.posted),
            std::mem::take(&mut state.exposed),
            std::mem::take(&mut state.answered),
        );
        drop(state);
        drop(dropped);
        self.socket.shutdown();
        self.wake.notify_one();
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn rdma_device(&self) -> Option<&str> {
        Some(self.nic.device_name())
    }

    fn abandon(&self, request_id: u64, windows: Vec<RegionMut>) {
        let mut freed = Vec::new();
        let mut state = self.state.lock();
        let Some(exposed) = state.exposed.get_mut(&request_id) else { return };
        if !exposed.writable {
            return;
        }
        exposed.abandoned = Some(windows);
        let waiting = |b: &Batch| !b.started && b.kind == BatchKind::Frame { request_id };
        if let Some(at) = state.messages.iter().position(waiting) {
            // It never left.
            freed.push((state.messages.remove(at), state.exposed.remove(&request_id)));
            return drop(state);
        }
        state.revoking.push_back((Instant::now(), request_id));
        drop(state);
        if let Err(error) = self.send_control(Kind::Revoke, request_id) {
            self.fail(&error);
        }
        self.wake.notify_one();
    }
}

fn describe(registered: &Registered, tail: &mut Vec<u8>) {
    let at = Remote { address: registered.address, key: registered.remote_key() };
    Piece { at, bytes: registered.bytes }.encode(tail);
}

/// Take up to `bytes` bytes off the front of `pieces`, in at most `sges_max` parts; returns how many.
fn take(pieces: &mut VecDeque<Sge>, bytes: u32, sges_max: usize, into: &mut Vec<Sge>) -> u32 {
    let mut taken = 0;
    while taken < bytes && into.len() < sges_max {
        let Some(piece) = pieces.front_mut() else { break };
        let length = piece.length.min(bytes - taken);
        into.push(Sge { length, ..*piece });
        taken += length;
        piece.addr += u64::from(length);
        piece.length -= length;
        if piece.length == 0 {
            pieces.pop_front();
        }
    }
    taken
}

const _: () = assert!(PREFIX_BYTES + HEADER_BYTES == TAIL_AT);
