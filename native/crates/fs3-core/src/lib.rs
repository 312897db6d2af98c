//! Ids, errors, checksums and buffers that every other crate shares. No I/O, no threads.

mod arena;
mod buffer;
mod checksum;
mod copy;
mod error;
#[cfg(target_arch = "x86_64")]
mod folded;
mod ids;
mod kv_entry;
mod mapped;
mod pool;

pub use arena::{Arena, map_aligned};
pub use buffer::{AlignedBuf, Region, RegionMut};
pub use checksum::{
    CRC_BLOCK_BYTES, CheckedBytes, crc_blocks, crc32c, crc32c_join, crc32c_of_blocks, pack_crcs, unpack_crcs,
    verify_crcs,
};
pub use copy::{copy, copy_raw};
pub use error::{Code, Error, Result};
pub use ids::{ChainId, ChainVersion, ChunkId, ClientId, InodeId, NodeId, TargetId, UpdateVersion};
pub use kv_entry::{KV_HEADER_BYTES_MAX, KV_SPACE, KV_STORED_KEY_BYTES_MAX, KvHeader, kv_header_bytes};
pub use mapped::{DmaBuf, ForeignMapping, MappingWatcher, mapping_of, watch_mappings};
pub use pool::BufferPool;

/// Nanoseconds of CLOCK_MONOTONIC, the clock that leases are judged by. The same clock as Python's
/// `time.monotonic_ns()`, so values may cross the language boundary within one machine.
pub fn monotonic_ns() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a valid out pointer; CLOCK_MONOTONIC always exists on Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}
