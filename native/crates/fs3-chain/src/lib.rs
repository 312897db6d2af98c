//! One replica of a replication chain (CRAQ) as a pure state machine.
//!
//! [`Replica::step`] takes the time and an event and returns effects. It has no clock, thread, I/O or random
//! order, so that the same machine runs in the storage service and in the simulator. It never sees file bytes:
//! the executor keeps the payload of a request under its id until [`Effect::Done`].
//!
//! # The protocol
//! A write enters at the head, which gives it the next update version of the chunk. Every replica prepares it (the
//! pending version) and forwards it at the same time; it commits when both its own prepare and its successor's
//! acknowledgement are there, then acknowledges. So the tail commits first and the head last, and an acknowledged
//! write is committed on every serving replica. One update of a chunk is in flight at a time on a replica.
//!
//! # Invariants
//! 1. *Upstream has what downstream has.* For replicas X before Y of the serving part of a chain: a version that Y
//!    has committed is, at X, committed, pending, or held by a running prepare; with the same content. It follows
//!    from forwarding only what one prepares oneself, and from these rules:
//!    - A version number that may have reached a successor is never given to other content. When the outcome of a
//!      forward is unknown, the update stays in flight and is forwarded again until it is acknowledged or the chain
//!      changes. A *definite* refusal counts only when every attempt so far was refused definitely.
//!    - When the chain changes, the head re-drives what it had in flight, and what its store holds as pending from
//!      an earlier life, before it admits other updates of that chunk. A replica that is not the head drops what it
//!      had in flight and keeps it as pending: its upstream holds it too and sends it again.
//!    - A replica that cannot prepare what its successor has committed takes itself out of the chain.
//! 2. *No dirty or older read.* While an update of a chunk is unresolved at a replica with a serving successor, the
//!    successor may already show it; reads of that chunk wait, so that no reader sees an older version after a newer.
//! 3. *Chain versions fence.* Every message carries the exact chain version. On a syncing replica a chunk whose
//!    committed version was made under the current chain version only moves forward; anything older is replaced
//!    whatever its version says. A delayed full-chunk replace cannot roll a chunk back.
//! 4. *Exactly once.* The records of the last writers are committed with the chunk and travel with a replace. A
//!    retry waits behind the first attempt, then finds its record. A request that changed nothing leaves no record; the
//!    head remembers it as long as the chain version lasts, which is as long as a late copy of it could be admitted.
//! 5. *No resurrection.* A chunk that is created again gets a version above all of its earlier life (creation
//!    versions begin at `chain version << 32`), and the store keeps a tombstone of a removed chunk for a while, so
//!    that a delayed duplicate of an old update does not bring it back.
//! 6. *Divergence heals.* An acknowledgement carries length and checksum. When they differ from the local ones (only
//!    possible after all replicas failed at once, since prepare and forward overlap), or a successor reports a gap,
//!    the head writes the chunk again as a full replace under a version above both.
//!
//! Invariant 1 does not survive the simultaneous crash of all replicas while an unacknowledged update was being
//! prepared: then a downstream replica may hold an unacknowledged version that its upstream never wrote. Such a
//! chain converges by invariant 6, with the loss of unacknowledged updates only; a reader may have seen one.
//!
//! # What is asked of the manager
//! One syncing replica at a time is made serving: two that synced side by side may differ for a moment in an update
//! that is in flight (writes stay right, two concurrent reads may see them in different orders). A restarted replica is
//! made serving or syncing only after it reported itself online, which it does once it has seen a routing in which it
//! is neither.

mod answered;
mod chunk;
mod progress;
mod replica;
mod routing;
mod types;

pub use replica::{ReadAdmission, Replica};
pub use types::{
    ChunkState, ChunkView, Config, Content, Effect, Event, Kind, OpId, Origin, Outcome, Refusal, Request, RequestId,
    Role, RoutingView, Successor, Writer, WriterRecord,
};
