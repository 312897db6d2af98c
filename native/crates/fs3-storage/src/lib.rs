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
mod methods;
mod resync;
mod routing;
mod service;
mod target;
mod view;

pub use disks::TargetDisks;
pub use engine::{DiskConfig, EngineConfig, StorageEngine};

/// Bytes of payload buffers a process holds at most; beyond it requests are refused with `Busy`.
pub const PAYLOAD_BYTES_HELD_MAX: usize = 512 << 20;
/// Chunks of one remove request that are removed at the same time.
pub const REMOVES_IN_FLIGHT_MAX: usize = 32;
/// Chunks of one resync that are sent at the same time.
pub const RESYNC_CHUNKS_IN_FLIGHT_MAX: usize = 8;
/// Pause before a resync looks again after a failure, and between passes, milliseconds.
pub const RESYNC_RETRY_MS: u64 = 200;
/// How long one forward may take before it is sent again, milliseconds.
pub const FORWARD_TIMEOUT_MS: u64 = 5_000;
/// Operations of one read request.
pub const READ_OPS_MAX: usize = 4096;
/// Chunks listed by one request.
pub const LIST_CHUNKS_MAX: u32 = 8192;
/// Connections to each peer.
pub const CONNECTIONS_PER_PEER: usize = 4;
