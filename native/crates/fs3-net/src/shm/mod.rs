//! Payloads by reference between processes of one host.
//!
//! The connection stays TCP. Of a payload that is in memory which the peer has mapped, only its place travels, and the
//! receiver copies it from there straight to where it belongs: one copy in place of two, and none at the sender. What is in
//! private memory, such as that of a program, the sender copies into mapped memory that it reuses: two copies, as with TCP,
//! but nothing of the network's work, and of large payloads of clients both at a time: the message leaves first, and the
//! receiver follows the sender as this says in the shared page how far it is.
//!
//! **Release.** The two share a page of counters. The receiver counts there the messages whose payload it has copied, in
//! order; the sender looks when it sends or receives the next message, and now and then while it holds any.
//!
//! **Safety.** The receiver checks every place against its mapping, whose size is sealed. What a sender keeps is
//! bounded; beyond that, bytes travel by TCP. A sender that ends the connection says so in the page before it lets go of
//! the memory, and a receiver looks there after it has copied: what it copied late is never taken for the payload.
//! Nobody writes to the memory of a peer, so that a peer can do no more harm than with wrong bytes by TCP.

mod descriptors;
mod handshake;
mod memory;

pub(crate) use handshake::{Offer, fetch};

use crate::STALL_TIMEOUT_MS;
use crate::link::{Landing, Outgoing};
use fs3_core::{Arena, BufferPool, CRC_BLOCK_BYTES, Code, Error, Region, RegionMut, Result, copy_raw, crc32c};
use fs3_proto::frame::{HEADER_BYTES, Header, REFERENCES_MAX, Reference, References};
use memory::{COPYING_MAX, Control, Lane, Mapped};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Smaller payloads are copied: that costs less than what is around it.
const PAYLOAD_BYTES_MIN: usize = 16 << 10;
/// Memory that one connection keeps for its peer at most.
const HELD_BYTES_MAX: usize = 64 << 20;
/// Memory of a process that payloads are copied into.
const STAGING_BYTES_MAX: usize = 64 << 20;
/// From this size on a payload is copied while the receiver copies it on. Copying a smaller one takes no longer than waking
/// the receiver.
const OVERLAP_BYTES_MIN: usize = 128 << 10;
/// How long a receiver tries to follow a sender that has stopped, which then is not running; after that it looks every
/// [`FOLLOW_EVERY`].
const FOLLOW_SPAN: Duration = Duration::from_millis(1);
const FOLLOW_EVERY: Duration = Duration::from_millis(1);
/// How often a sender looks whether it may let go, when nothing else makes it look.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Bytes copied at a time while a call's windows are locked; few enough that their checksums are made from the core's cache.
const COPY_BYTES_MAX: usize = 32 << 10;

/// What moved by reference in this process. Thread-safe.
#[derive(Default)]
pub(crate) struct Counters {
    connections: AtomicU64,
    sent_bytes: AtomicU64,
    staged_bytes: AtomicU64,
    received_bytes: AtomicU64,
    tcp_bytes: AtomicU64,
}

impl Counters {
    /// All of them by name, as docs/operations.md explains them.
    pub fn all(&self) -> [(&'static str, u64); 5] {
        [
            ("shared_memory_connections", &self.connections),
            ("shared_memory_sent_bytes", &self.sent_bytes),
            ("shared_memory_staged_bytes", &self.staged_bytes),
            ("shared_memory_received_bytes", &self.received_bytes),
            ("shared_memory_tcp_bytes", &self.tcp_bytes),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
    }
}

fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}

/// What the two ends of a connection share.
pub(crate) struct SharedMemory {
    control: Control,
    /// Counts what this end sends.
    outgoing: Lane,
    /// Counts what this end receives.
    incoming: Lane,
    /// Whether the peer has mapped memory of this process.
    shares: bool,
    /// Memory of the peer, when it shares any.
    theirs: Option<Arc<Mapped>>,
    held: Mutex<Held>,
    /// Something is held, and nobody looks now and then yet.
    look: Notify,
    counters: Arc<Counters>,
}

/// Payloads that the peer has not copied yet, in the order in which they were sent.
#[derive(Default)]
struct Held {
    payloads: VecDeque<(Vec<Region>, usize)>,
    bytes: usize,
    /// How many were let go of since the connection began.
    released: u64,
    looking: bool,
    ended: bool,
}

impl SharedMemory {
    fn new(control: Control, serves: bool, shares: bool, theirs: Option<Arc<Mapped>>, counters: Arc<Counters>) -> Self {
        let (outgoing, incoming) = if serves { (Lane::Server, Lane::Client) } else { (Lane::Client, Lane::Server) };
        add(&counters.connections, 1);
        let (held, look) = (Mutex::default(), Notify::new());
        Self { control, outgoing, incoming, shares, theirs, held, look, counters }
    }

    /// Whether frames of the peer may hold references.
    pub fn takes_references(&self) -> bool {
        self.theirs.is_some()
    }

    /// Copy the payload to memory that the peer has mapped, if it is worth it, not there yet, and there is room. What is
    /// returned is to be copied by [`SharedMemory::copy_staged`] when the message has left.
    pub fn stage(&self, message: &mut Outgoing) -> Option<Staging> {
        let bytes = payload_bytes(message);
        if !self.shares || bytes < PAYLOAD_BYTES_MIN {
            return None;
        }
        let (held_bytes, held) = {
            let held = self.held.lock();
            (held.bytes, held.payloads.len())
        };
        if held_bytes + bytes > HELD_BYTES_MAX {
            return None;
        }
        let arena = Arena::get().filter(|arena| locate(arena, &message.payload).is_none())?;
        let mut room = staging(arena).get(bytes)?;
        add(&self.counters.staged_bytes, bytes);
        if self.overlaps(bytes) && held < COPYING_MAX / 2 {
            let crcs = message.with_crcs && are_whole_blocks(&message.payload);
            let crcs = if crcs { staging(arena).get(4 * bytes.div_ceil(CRC_BLOCK_BYTES)) } else { None };
            return Some(Staging {
                pieces: message.payload.clone(),
                room: room.into(),
                crcs: crcs.map(Room::from),
                number: None,
            });
        }
        let mut at = 0;
        for piece in &message.payload {
            fs3_core::copy(&mut room[at..at + piece.len()], piece);
            at += piece.len();
        }
        message.payload = vec![room.freeze()];
        None
    }

    /// Put references in place of the payload, if it is worth it and its memory allows it. Must be called in the order in
    /// which the messages leave. `staging`: what [`SharedMemory::stage`] returned.
    pub fn refer(&self, message: &mut Outgoing, staging: Option<&mut Staging>) {
        let bytes = payload_bytes(message);
        if !self.shares || bytes < PAYLOAD_BYTES_MIN {
            return;
        }
        let located = Arena::get().and_then(|arena| match &staging {
            Some(staging) => staging.locate(arena),
            None => locate(arena, &message.payload),
        });
        let mut held = self.held.lock();
        let fits = held.bytes + bytes <= HELD_BYTES_MAX
            && !held.ended
            && (staging.is_none() || held.payloads.len() < COPYING_MAX);
        let Some(references) = located.filter(|_| fits) else {
            return add(&self.counters.tcp_bytes, bytes);
        };
        let count = references.len() as u32;
        let head = message.head.first_chunk_mut::<HEADER_BYTES>().expect("a message begins with its header");
        let (copying, crcs) = (staging.is_some(), staging.as_ref().is_some_and(|staging| staging.crcs.is_some()));
        let kind = References { count, copying, crcs };
        *head = Header::parse(head).expect("what was just made").encode_by_reference(kind);
        let wire = references.iter().flat_map(Reference::encode).collect();
        let mut payload = std::mem::replace(&mut message.payload, vec![Region::from_vec(wire)]);
        if let Some(staging) = staging {
            let number = held.released + held.payloads.len() as u64;
            self.control.lane(self.outgoing).set_copied(number, 0);
            staging.number = Some(number);
            payload = staging.rooms().map(|room| room.region.clone()).collect();
        }
        held.payloads.push_back((payload, bytes));
        held.bytes += bytes;
        if !std::mem::replace(&mut held.looking, true) {
            self.look.notify_one();
        }
        add(&self.counters.sent_bytes, bytes);
    }

    /// Copy what a message refers to, and tell the peer how far it has come. Nothing is done when it went by TCP.
    pub fn copy_staged(&self, staging: &Staging) {
        let Some(number) = staging.number else { return };
        let lane = self.control.lane(self.outgoing);
        let (mut at, mut crcs_at) = (0, 0);
        for step in staging.pieces.iter().flat_map(|piece| piece.chunks(COPY_BYTES_MAX)) {
            match &staging.crcs {
                // While the block is in the core's cache.
                Some(crcs) => {
                    for block in step.chunks(CRC_BLOCK_BYTES) {
                        staging.room.write(at, block);
                        crcs.write(crcs_at, &crc32c(block).to_le_bytes());
                        (at, crcs_at) = (at + block.len(), crcs_at + 4);
                    }
                }
                None => {
                    staging.room.write(at, step);
                    at += step.len();
                }
            }
            lane.set_copied(number, at);
        }
    }

    /// Whether this payload would go with its checksums, as far as can be known.
    pub fn sends_crcs(&self, payload: &[Region]) -> bool {
        let bytes = payload.iter().map(|piece| piece.len()).sum();
        let room = || {
            let held = self.held.lock();
            held.payloads.len() < COPYING_MAX / 2 && held.bytes + bytes <= HELD_BYTES_MAX
        };
        let is_private = || Arena::get().is_some_and(|arena| locate(arena, payload).is_none());
        self.shares && self.overlaps(bytes) && are_whole_blocks(payload) && room() && is_private()
    }

    /// Whether a payload that is to be staged leaves before it is copied.
    fn overlaps(&self, bytes: usize) -> bool {
        self.outgoing == Lane::Client && bytes >= OVERLAP_BYTES_MIN
    }

    /// Let go of what the peer has copied.
    pub fn release(&self) {
        let mut held = self.held.lock();
        if held.payloads.is_empty() {
            return;
        }
        let consumed = self.control.lane(self.outgoing).consumed.load(Ordering::Acquire);
        let mut done = Vec::new();
        // A peer that counts too much harms itself alone.
        while held.released < consumed
            && let Some((payload, bytes)) = held.payloads.pop_front()
        {
            held.released += 1;
            held.bytes -= bytes;
            done.push(payload);
        }
        drop(held);
    }

    /// Look now and then, until [`SharedMemory::end`].
    pub async fn keep_releasing(&self) {
        loop {
            self.look.notified().await;
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                self.release();
                let mut held = self.held.lock();
                if held.ended {
                    return;
                }
                if held.payloads.is_empty() {
                    held.looking = false;
                    break;
                }
            }
        }
    }

    /// The connection has ended: nothing is kept for the peer any more.
    pub fn end(&self) {
        self.control.lane(self.outgoing).ended.store(1, Ordering::Relaxed);
        // Before any byte of what is let go of changes.
        fence(Ordering::Release);
        let mut held = self.held.lock();
        held.ended = true;
        let payloads = std::mem::take(&mut held.payloads);
        drop(held);
        drop(payloads);
        self.look.notify_one();
    }

    /// Copy a payload to where it belongs, and tell the peer. `crcs`: where its checksums are, if they came. `copying`: the
    /// peer still copies all that to where the references point.
    ///
    /// # Errors
    /// `Protocol` when a reference is not within the peer's memory, `Unavailable` when the peer has ended the connection
    /// or stopped copying: the windows then hold anything. Both end the connection.
    pub async fn receive<L: Landing>(
        &self,
        references: &[Reference],
        crcs: Option<Reference>,
        copying: bool,
        landing: &mut L,
    ) -> Result<()> {
        let theirs = self.theirs.as_ref().ok_or_else(|| protocol("a reference without shared memory"))?;
        let lane = self.control.lane(self.incoming);
        let number = lane.consumed.load(Ordering::Relaxed);
        let (mut there, mut before) = (if copying { 0 } else { usize::MAX }, 0);
        for reference in references {
            let bytes = reference.bytes as usize;
            let source = theirs.at(reference.offset, bytes);
            // As a number: a pointer must not be held across a wait.
            let source = source.ok_or_else(|| protocol("a reference beyond the shared memory"))? as usize;
            let mut at = 0;
            while at < bytes {
                if there <= before + at {
                    there = self.follow(number, before + at).await?;
                }
                let step = bytes.min(there - before) - at;
                copy((source + at) as *const u8, step, landing)?;
                at += step;
            }
            before += bytes;
        }
        if let Some(crcs) = crcs {
            let bytes = crcs.bytes as usize;
            let source = theirs.at(crcs.offset, bytes).filter(|_| bytes == 4 * before.div_ceil(CRC_BLOCK_BYTES));
            let source =
                source.ok_or_else(|| protocol("checksums beyond the shared memory, or not those of the payload"))?;
            let mut sent = vec![0; bytes];
            scatter(source, bytes, &mut [IoSliceMut::new(&mut sent)]);
            landing.sent_crcs(sent);
        }
        add(&self.counters.received_bytes, before);
        fence(Ordering::Acquire);
        if lane.ended.load(Ordering::Relaxed) != 0 {
            return Err(Error::new(Code::Unavailable, "the peer has ended the connection"));
        }
        lane.consumed.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Wait until the peer has copied more than `bytes` of the payload of message `number`: how much.
    async fn follow(&self, number: u64, bytes: usize) -> Result<usize> {
        let lane = self.control.lane(self.incoming);
        let began = Instant::now();
        loop {
            let there = lane.copied(number);
            if there > bytes {
                return Ok(there);
            }
            if lane.ended.load(Ordering::Relaxed) != 0 || began.elapsed() > Duration::from_millis(STALL_TIMEOUT_MS) {
                return Err(Error::new(Code::Unavailable, "the peer stopped in the middle of a payload"));
            }
            if began.elapsed() < FOLLOW_SPAN {
                // Who is waited for may want this core.
                std::thread::yield_now();
            } else {
                tokio::time::sleep(FOLLOW_EVERY).await;
            }
        }
    }
}

/// A payload that is copied when its message has left.
pub(crate) struct Staging {
    pieces: Vec<Region>,
    room: Room,
    /// For the checksums of the pieces, which are whole blocks but for the last.
    crcs: Option<Room>,
    /// Of the message among those that went by reference, if it did.
    number: Option<u64>,
}

impl Staging {
    fn rooms(&self) -> impl Iterator<Item = &Room> {
        std::iter::once(&self.room).chain(&self.crcs)
    }

    /// A reference for each room.
    fn locate(&self, arena: &Arena) -> Option<Vec<Reference>> {
        let one = |room: &Room| {
            let offset = arena.locate(room.region.as_ptr(), room.region.len())?;
            Some(Reference { offset, bytes: room.region.len() as u32 })
        };
        self.rooms().map(one).collect()
    }
}

/// Memory that is written while the peer reads it.
struct Room {
    start: *mut u8,
    /// Keeps the memory, also when the connection ends meanwhile. Nobody in this process reads it.
    region: Region,
}

impl From<RegionMut> for Room {
    fn from(mut memory: RegionMut) -> Self {
        Self { start: memory.as_mut_ptr(), region: memory.freeze() }
    }
}

impl Room {
    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.region.len(), "it was made for them");
        // SAFETY: within the memory that the region keeps; it was the only window over it when it was frozen.
        unsafe { copy_raw(self.start.add(at), bytes.as_ptr(), bytes.len()) };
    }
}

/// Whether every piece but the last ends where a block does.
fn are_whole_blocks(pieces: &[Region]) -> bool {
    pieces
        .split_last()
        .is_some_and(|(_, others)| others.iter().all(|piece| piece.len().is_multiple_of(CRC_BLOCK_BYTES)))
}

fn payload_bytes(message: &Outgoing) -> usize {
    message.payload.iter().map(|piece| piece.len()).sum()
}

/// What all connections of the process share: so memory that was used last is used again. A forked child, which has no
/// arena, never comes here.
fn staging(arena: &'static Arena) -> &'static BufferPool {
    static STAGING: OnceLock<BufferPool> = OnceLock::new();
    STAGING.get_or_init(|| BufferPool::of_arena(STAGING_BYTES_MAX, arena))
}

/// Where the pieces are in the arena, neighbours joined; `None` unless all are there.
fn locate(arena: &Arena, pieces: &[Region]) -> Option<Vec<Reference>> {
    let mut references: Vec<Reference> = Vec::with_capacity(pieces.len());
    for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
        let offset = arena.locate(piece.as_ptr(), piece.len())?;
        match references.last_mut() {
            Some(last) if last.offset + u64::from(last.bytes) == offset => last.bytes += piece.len() as u32,
            _ => references.push(Reference { offset, bytes: piece.len() as u32 }),
        }
    }
    (references.len() <= REFERENCES_MAX).then_some(references)
}

/// Copy memory of the peer into the landing's windows.
fn copy<L: Landing>(source: *const u8, bytes: usize, landing: &mut L) -> Result<()> {
    let mut at = 0;
    while at < bytes {
        let step = (bytes - at).min(COPY_BYTES_MAX);
        // SAFETY: `at` is within the part that was checked to be mapped.
        let from = unsafe { source.add(at) };
        let moved = match landing.fill(step, &mut [], &mut |windows| Ok(scatter(from, step, windows))) {
            Some(copied) => copied.expect("copying within memory cannot fail"),
            None => step,
        };
        if moved == 0 {
            return Err(protocol("a payload is longer than its windows"));
        }
        landing.advance(moved);
        at += moved;
    }
    Ok(())
}

/// Copy into the windows in order; returns how much fitted. By pointer: another process may write to the source.
fn scatter(source: *const u8, bytes: usize, windows: &mut [IoSliceMut<'_>]) -> usize {
    let mut at = 0;
    for window in windows {
        let n = window.len().min(bytes - at);
        // SAFETY: the source is mapped for `bytes`, which `at + n` does not exceed; a window is not memory of the peer.
        unsafe { copy_raw(window.as_mut_ptr(), source.add(at), n) };
        at += n;
    }
    at
}

fn protocol(message: &'static str) -> Error {
    Error::new(Code::Protocol, message)
}

#[cfg(test)]
mod tests;
