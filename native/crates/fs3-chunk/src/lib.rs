//! Pure decisions of the chunk store: what a chunk's state is, how an update changes it, which blocks are free,
//! and how all of it is written down. No I/O, no clock, no threads; the executor is `fs3-io`.

mod alloc;
mod codec;
mod packed;
mod plan;
mod record;
mod table;
mod types;
mod writers;

pub(crate) use alloc::Parked;
pub use alloc::{Allocator, Block, Blocks, Location, Run, block_bytes, class_of};
pub use codec::{FRAME_HEADER_BYTES, frame, unframe};
pub use plan::{Plan, plan_write};
pub use record::{Body, ChunkImage, Prepare, Record, VersionImage};
pub use table::{Chunk, Patch, Pending, SnapshotLoad, Table, Version};
pub use types::{
    BLOCK_BYTES, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, ChunkMeta, VersionInfo, WriterRecord, block_count, chunk_crc,
    zero_block, zero_block_crc,
};
pub use writers::{WRITER_AGE_MS_MIN, WRITERS_KEPT, WRITERS_MAX, remember};
