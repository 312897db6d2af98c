//! The crash-safe, checksummed chunk store of one target: disk I/O, metadata log, read cache.
//!
//! Decisions are made by `fs3-chunk`; this crate executes them. See `docs/adr/0002-chunk-metadata-store.md`.

mod cache;
mod checkpoint;
mod disk;
pub mod fault;
mod frames;
mod log;
mod maintain;
mod read;
mod recover;
mod scrub;
mod space;
mod store;
mod threads;
mod update;
mod uring;

pub use cache::ReadCache;
pub use disk::{Access, Disk, DiskFile, RealDisk};
pub use fs3_chunk::{ChunkMeta, VersionInfo, WriterRecord};
pub use scrub::{BadBlock, Verified};
pub use store::{Change, ReadOut, StoreOptions, TargetStore, Update};
pub use threads::IoThreads;
