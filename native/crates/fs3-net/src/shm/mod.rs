//! Payloads by reference between processes of one host.
//!
//! The connection stays TCP. Of a payload that is in memory which the peer has mapped, only its place travels, and the
//! receiver copies it from there straight to where it belongs: one copy in place of two, and none at the sender. What is in
//! private memory, such as that of a program, the sender copies into mapped memory that it reuses: two copies, as with TCP,
//! but nothing of the network's work.
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

use crate::link::{Landing, Outgoing};
use fs3_core::{Arena, BufferPool, Code, Error, Region, Result};
use fs3_proto::frame::{HEADER_BYTES, Header, REFERENCES_MAX, Reference};
use memory::{Control, Lane, Mapped};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::Notify;

/// Smaller payloads are copied: that costs less than what is around it.
const PAYLOAD_BYTES_MIN: usize = 16 << 10;
/// Memory that one connection keeps for its peer at most.
const HELD_BYTES_MAX: usize = 64 << 20;
/// Memory of a process that payloads are copied into.
const STAGING_BYTES_MAX: usize = 64 << 20;
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

    /// Copy the payload to memory that the peer has mapped, if it is worth it, not there yet, and there is room.
    pub fn stage(&self, message: &mut Outgoing) {
        let bytes = payload_bytes(message);
        if !self.shares || bytes < PAYLOAD_BYTES_MIN || self.held.lock().bytes + bytes > HELD_BYTES_MAX {
            return;
        }
        let Some(arena) = Arena::get().filter(|arena| locate(arena, &message.payload).is_none()) else { return };
        let Some(mut room) = staging(arena).get(bytes) else { return };
        let mut at = 0;
        for piece in &message.payload {
            room[at..at + piece.len()].copy_from_slice(piece);
            at += piece.len();
        }
        message.payload = vec![room.freeze()];
        add(&self.counters.staged_bytes, bytes);
    }

    /// Put references in place of the payload, if it is worth it and its memory allows it. Must be called in the order in
    /// which the messages leave.
    pub fn refer(&self, message: &mut Outgoing) {
        let bytes = payload_bytes(message);
        if !self.shares || bytes < PAYLOAD_BYTES_MIN {
            return;
        }
        let located = Arena::get().and_then(|arena| locate(arena, &message.payload));
        let mut held = self.held.lock();
        let Some(references) = located.filter(|_| held.bytes + bytes <= HELD_BYTES_MAX && !held.ended) else {
            return add(&self.counters.tcp_bytes, bytes);
        };
        let head = message.head.first_chunk_mut::<HEADER_BYTES>().expect("a message begins with its header");
        *head = Header::parse(head).expect("what was just made").encode_by_reference(references.len() as u32);
        let wire = references.iter().flat_map(Reference::encode).collect();
        let payload = std::mem::replace(&mut message.payload, vec![Region::from_vec(wire)]);
        held.payloads.push_back((payload, bytes));
        held.bytes += bytes;
        if !std::mem::replace(&mut held.looking, true) {
            self.look.notify_one();
        }
        add(&self.counters.sent_bytes, bytes);
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

    /// Copy a payload to where it belongs, and tell the peer.
    ///
    /// # Errors
    /// `Protocol` when a reference is not within the peer's memory, `Unavailable` when the peer has ended the connection:
    /// the windows then hold anything. Both end the connection.
    pub fn receive<L: Landing>(&self, references: &[Reference], landing: &mut L) -> Result<()> {
        let theirs = self.theirs.as_ref().ok_or_else(|| protocol("a reference without shared memory"))?;
        for reference in references {
            let source = theirs.at(reference.offset, reference.bytes as usize);
            let source = source.ok_or_else(|| protocol("a reference beyond the shared memory"))?;
            copy(source, reference.bytes as usize, landing)?;
            add(&self.counters.received_bytes, reference.bytes as usize);
        }
        let lane = self.control.lane(self.incoming);
        fence(Ordering::Acquire);
        if lane.ended.load(Ordering::Relaxed) != 0 {
            return Err(Error::new(Code::Unavailable, "the peer has ended the connection"));
        }
        lane.consumed.fetch_add(1, Ordering::Release);
        Ok(())
    }
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
        let moved = match landing.fill(&mut [], &mut |windows| Ok(scatter(from, step, windows))) {
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
        unsafe { std::ptr::copy_nonoverlapping(source.add(at), window.as_mut_ptr(), n) };
        at += n;
    }
    at
}

fn protocol(message: &'static str) -> Error {
    Error::new(Code::Protocol, message)
}

#[cfg(test)]
mod tests;
