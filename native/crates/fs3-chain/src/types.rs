//! What goes into the machine and what comes out.

use fs3_core::{ChunkId, ClientId, Code, TargetId};

/// Names a request; chosen by the executor, unique within a replica's life, below 2^63.
pub type RequestId = u64;
/// Names an update in flight: the id of the request that began it, or one of the machine's own (bit 63 set).
pub type OpId = u64;

/// Limits and delays.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Requests that may wait for one chunk; beyond it `Busy`.
    pub queue_per_chunk_max: usize,
    /// Reads that may wait for one chunk; beyond it `Busy`.
    pub readers_per_chunk_max: usize,
    /// First delay before a forward is sent again, nanoseconds.
    pub retry_ns_min: u64,
    /// Largest delay before a forward is sent again, nanoseconds.
    pub retry_ns_max: u64,
    /// How often a payload that arrives damaged is sent again before the write is refused.
    pub damaged_max: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            queue_per_chunk_max: 128,
            readers_per_chunk_max: 4096,
            retry_ns_min: 20_000_000,
            retry_ns_max: 1_000_000_000,
            damaged_max: 5,
        }
    }
}

/// Identity of a client's write: a retry repeats it, the next write of the channel raises `sequence`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Writer {
    /// Client instance.
    pub client: ClientId,
    /// A client has at most one write outstanding per channel.
    pub channel: u32,
    /// Strictly increasing within a channel.
    pub sequence: u64,
}

/// The last write of one channel that a chunk's committed version includes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriterRecord {
    /// Who wrote.
    pub writer: Writer,
    /// The version that write created.
    pub update_version: u64,
}

/// What the store holds of a chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChunkState {
    /// Committed version; 0: there is no committed chunk.
    pub committed: u64,
    /// Version of the removal of the chunk, while that is remembered; 0: none, or it was created again.
    pub tombstone: u64,
    /// Chain version under which the committed version, or the tombstone, was made.
    pub chain_version: u64,
    /// Committed length in bytes.
    pub length: u32,
    /// CRC32C over the committed block checksums.
    pub crc: u32,
    /// Pending version; 0: none.
    pub pending: u64,
    /// Dedupe records committed with the chunk, or left by its removal.
    pub writers: Vec<WriterRecord>,
}

/// The replica's store, as the machine reads it. It must show every update whose completion the machine was told of.
pub trait ChunkView {
    /// State of one chunk; the default when it is not there.
    fn chunk(&self, id: ChunkId) -> ChunkState;
    /// All chunks with a pending version, in order.
    fn pending(&self) -> Vec<ChunkId>;
}

/// What an update does; the bytes stay with the executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Write a range, or the whole chunk when the request says replace.
    Write,
    /// Cut to this length in bytes.
    Truncate(u32),
    /// Make everything from this byte on a hole, up to wherever the executor knows; the length stays.
    Punch(u32),
    /// Remove the chunk.
    Remove,
    /// Make successors equal to the committed chunk here (nothing changes locally).
    Mirror,
}

/// Where an update comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A client; only the head takes it.
    Client,
    /// The predecessor.
    Forward {
        /// Version to create.
        version: u64,
        /// Committed version it builds on, 0 for none; not looked at with `replace`.
        base: u64,
        /// The payload is the whole chunk.
        replace: bool,
    },
    /// The resync of one syncing successor; with [`Kind::Mirror`].
    Resync {
        /// Who is to become equal.
        to: TargetId,
    },
    /// The head's own repair of a chunk whose replicas differ: with [`Kind::Mirror`], or [`Kind::Remove`] when the
    /// head has no such chunk.
    Heal {
        /// The highest version that any replica holds.
        above: u64,
    },
    /// This replica's own: rotten bytes of its committed chunk are put right from another replica. With
    /// [`Kind::Mirror`]; no version changes, and readers need not wait.
    Repair,
}

/// An update that asks to be admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Chosen by the executor.
    pub id: RequestId,
    /// The chunk it changes.
    pub chunk: ChunkId,
    /// The sender's chain version.
    pub chain_version: u64,
    /// What it does.
    pub kind: Kind,
    /// For exactly-once; `None`: not deduplicated.
    pub writer: Option<Writer>,
    /// Where it comes from.
    pub origin: Origin,
}

/// Version, length and checksum of a chunk after an update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Version after the update; 0 when there is no chunk.
    pub update_version: u64,
    /// Length in bytes.
    pub length: u32,
    /// CRC32C over the block checksums.
    pub crc: u32,
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the requester is told.
    pub code: Code,
    /// The update may still take effect.
    pub maybe_applied: bool,
}

impl Refusal {
    pub(crate) fn new(code: Code) -> Self {
        Self { code, maybe_applied: false }
    }

    pub(crate) fn maybe(code: Code) -> Self {
        Self { code, maybe_applied: true }
    }
}

/// What routing makes of this replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Takes no part.
    #[default]
    Idle,
    /// Receives writes and the resync; is not read.
    Syncing,
    /// Reads and writes.
    Serving,
}

/// Who is forwarded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Successor {
    /// The next serving target, or a syncing one.
    pub target: TargetId,
    /// It receives full chunks until they are known to be equal.
    pub syncing: bool,
}

/// This replica's place in its chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoutingView {
    /// Version of the chain; 0: none known yet.
    pub chain_version: u64,
    /// What this replica is.
    pub role: Role,
    /// It is the first serving one.
    pub head: bool,
    /// The next serving target; or, for the last serving one, every syncing target.
    pub successors: Vec<Successor>,
}

/// Something happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// An update asks to be admitted. Leads to exactly one `Reply` and one `Done` with its id.
    Request(Request),
    /// A read that [`crate::Replica::read_admission`] told to wait. Leads to `ServeRead` or `Reply`.
    Read {
        /// Chosen by the executor.
        id: RequestId,
        /// Chunk to read.
        chunk: ChunkId,
        /// The sender's chain version.
        chain_version: u64,
    },
    /// The deadline of a request or waiting read passed: answer it now. The update itself goes on.
    Expire {
        /// The request.
        id: RequestId,
        /// Its chunk.
        chunk: ChunkId,
    },
    /// `Prepare` ended.
    Prepared {
        /// The update.
        op: OpId,
        /// Its chunk.
        chunk: ChunkId,
        /// What the chunk will be, or why not.
        result: Result<Outcome, Code>,
    },
    /// `Forward` ended.
    Forwarded {
        /// The update.
        op: OpId,
        /// Its chunk.
        chunk: ChunkId,
        /// Who was forwarded to.
        to: TargetId,
        /// The attempt.
        attempt: u32,
        /// The acknowledgement, or why there is none.
        result: Result<Outcome, Code>,
    },
    /// `Commit` ended.
    Committed {
        /// The update.
        op: OpId,
        /// Its chunk.
        chunk: ChunkId,
        /// Whether it succeeded.
        result: Result<(), Code>,
    },
    /// `Abort` ended.
    Aborted {
        /// The update.
        op: OpId,
        /// Its chunk.
        chunk: ChunkId,
    },
    /// `Repair` ended.
    Repaired {
        /// The repair.
        op: OpId,
        /// Its chunk.
        chunk: ChunkId,
        /// Whether the chunk is sound now.
        result: Result<(), Code>,
    },
    /// The chain, or this replica's place in it, changed.
    Routing(RoutingView),
    /// The store reported a failure outside of an update.
    StoreFailed {
        /// Why.
        code: Code,
    },
    /// Serve until this monotonic time.
    Lease {
        /// Nanoseconds of the clock that `step` is told.
        serve_until_ns: u64,
    },
}

/// Which bytes a prepare or forward is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// The change as it was requested, on top of the base version.
    Update,
    /// The whole chunk after the change (the payload itself when that is whole).
    Whole,
    /// The whole chunk as it is committed here, with its records; a removal when there is none.
    Committed,
    /// The whole chunk as this successor has committed it: the bytes to build on are rotten here.
    Fetched {
        /// Who has it.
        from: TargetId,
        /// What it acknowledged; other content is not taken.
        outcome: Outcome,
    },
}

/// Something to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Make the pending version, over any other pending one; then `Prepared`.
    Prepare {
        /// The update.
        op: OpId,
        /// Its chunk.
        chunk: ChunkId,
        /// Version to create.
        version: u64,
        /// What to prepare; other than `Update`, whatever is committed.
        content: Content,
    },
    /// Send to a successor after a delay, unless [`crate::Replica::forward_is_current`] denies it by then; then
    /// `Forwarded`.
    Forward {
        /// The update.
        op: OpId,
        /// Its chunk.
        chunk: ChunkId,
        /// Receiver.
        to: TargetId,
        /// Number of this attempt.
        attempt: u32,
        /// To be sent along.
        chain_version: u64,
        /// Version it creates.
        version: u64,
        /// Version it builds on.
        base: u64,
        /// What to send.
        content: Content,
        /// Wait before sending, nanoseconds.
        delay_ns: u64,
    },
    /// Make the pending version the committed one; then `Committed`.
    Commit {
        /// The update.
        op: OpId,
        /// Its chunk.
        chunk: ChunkId,
        /// The pending version.
        version: u64,
    },
    /// Drop the pending version; then `Aborted`.
    Abort {
        /// The update.
        op: OpId,
        /// Its chunk.
        chunk: ChunkId,
        /// The pending version.
        version: u64,
    },
    /// Put rotten bytes of the committed version right; then `Repaired`. Until then nothing changes the chunk here.
    Repair {
        /// The repair.
        op: OpId,
        /// Its chunk.
        chunk: ChunkId,
    },
    /// Answer a request.
    Reply {
        /// The request.
        id: RequestId,
        /// The answer.
        result: Result<Outcome, Refusal>,
    },
    /// The waiting read may be served from the committed version now.
    ServeRead {
        /// The read.
        id: RequestId,
    },
    /// The update needs its payload no longer.
    Done {
        /// The update, or the request that never became one.
        op: OpId,
    },
    /// The replica can no longer be trusted to hold what its successors have: report it offline.
    Fatal {
        /// Where it happened.
        chunk: ChunkId,
        /// Why.
        code: Code,
    },
}
