//! The storage service of one node: targets on disks, the chunk methods of the frame protocol, replication along
//! chains, and resync.
//!
//! Decisions are made by `fs3-chain`; this crate carries them out with `fs3-io` and `fs3-net`. The control plane (the
//! Python shell) feeds routing and lease in and takes the status out; it never sees a byte of a file.

mod content;
mod core;
mod disks;
mod engine;
mod forward;
mod kv;
mod kv_chunks;
mod methods;
mod pace;
mod repair;
mod resync;
mod routing;
mod scrub;
mod service;
mod status;
mod target;
mod upkeep;
mod view;

pub use disks::TargetDisks;
pub use engine::{DiskConfig, EngineConfig, Healing, StorageEngine};

/// Bytes of payload buffers a process holds at most; beyond it requests are refused with `Busy`.
pub const PAYLOAD_BYTES_HELD_MAX: usize = 512 << 20;
/// Chunks of one remove request that are removed at the same time.
pub const REMOVES_IN_FLIGHT_MAX: usize = 32;
/// Chunks that are checked because a client asked for it at the same time.
pub const CHECKS_IN_FLIGHT_MAX: usize = 4;
/// Chunks of one resync that are sent at the same time.
pub const RESYNC_CHUNKS_IN_FLIGHT_MAX: usize = 8;
/// Pause before a resync looks again after a failure, and between passes, milliseconds.
pub const RESYNC_RETRY_MS: u64 = 200;
/// The same when all that is left are chunks whose bytes are rotten here, milliseconds.
pub const RESYNC_STUCK_RETRY_MS: u64 = 2_000;
/// How long a resync waits before each chunk while clients are being served, milliseconds.
pub const RESYNC_YIELD_MS: u64 = 10;
/// How long one forward may take before it is sent again, milliseconds.
pub const FORWARD_TIMEOUT_MS: u64 = 5_000;
/// Rotten chunks of one target that wait for their repair; more are found again by the next scrub.
pub const REPAIRS_WAITING_MAX: usize = 4096;
/// Blocks of 4 KiB asked of another replica at once.
pub const REPAIR_BLOCKS_PER_REQUEST: usize = 256;
/// Pause before repairs that could not be made yet are tried again, milliseconds.
pub const REPAIR_RETRY_MS: u64 = 500;
/// A chunk of which no replica had good bytes is tried again at the earliest after this, milliseconds; sooner when its
/// chain changes.
pub const DAMAGED_RETRY_MS: u64 = 30_000;
/// Bytes a scrub reads at once.
pub const SCRUB_PIECE_BYTES: u32 = 1 << 20;
/// How long a scrub waits before each piece while clients are being served, milliseconds.
pub const SCRUB_YIELD_MS: u64 = 250;
/// The first scrub of a target begins at the latest this long after the start, milliseconds.
pub const SCRUB_FIRST_MS_MAX: u64 = 600_000;
/// A disk whose operations take longer than this on the average is reported as slow, milliseconds.
pub const SLOW_DISK_MS: u64 = 100;
/// Operations of one read request.
pub const READ_OPS_MAX: usize = 4096;
/// Chunks listed by one request.
pub const LIST_CHUNKS_MAX: u32 = 8192;
/// Operations of one request to the key-value cache.
pub const KV_OPS_MAX: usize = 4096;
/// Longest key of the key-value cache, with what clients put before it, in bytes.
pub const KV_KEY_BYTES_MAX: usize = 8 << 10;
/// Keys listed by one request.
pub const KV_LIST_MAX: u32 = 4096;
/// Connections to each peer.
pub const CONNECTIONS_PER_PEER: usize = 4;
