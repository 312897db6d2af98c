use std::sync::LazyLock;

use fs3_core::{AlignedBuf, CRC_BLOCK_BYTES, ChainVersion, ClientId, Region, UpdateVersion, crc32c, pack_crcs};
use fs3_proto::v1;

/// Bytes of a crc block, the unit of checksums, patches and direct I/O.
pub const BLOCK_BYTES: u32 = CRC_BLOCK_BYTES as u32;
/// Smallest chunk size a file may have, and the smallest disk block.
pub const CHUNK_BYTES_MIN: u32 = 64 << 10;
/// Largest chunk size a file may have, and the largest disk block.
pub const CHUNK_BYTES_MAX: u32 = 64 << 20;

/// Exactly-once state of one client channel: the last update it made to a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriterRecord {
    /// The writing client.
    pub client: ClientId,
    /// Its channel; at most one write is outstanding per channel.
    pub channel: u32,
    /// Raised by every new write of the channel, repeated by a retry.
    pub sequence: u64,
    /// The version that write created.
    pub update_version: UpdateVersion,
    /// Wall-clock milliseconds at the head when it was accepted; judges only the age of the record.
    pub time_ms: i64,
}

impl WriterRecord {
    /// The wire form.
    pub fn to_proto(&self) -> v1::WriterRecord {
        v1::WriterRecord {
            writer: Some(v1::WriterId {
                client_id: self.client.0.to_vec().into(),
                channel: self.channel,
                sequence: self.sequence,
            }),
            update_version: self.update_version.0,
            time_ms: self.time_ms,
        }
    }

    /// From the wire form; `None` when the writer is missing or its client id is not 16 bytes.
    pub fn from_proto(record: &v1::WriterRecord) -> Option<Self> {
        let writer = record.writer.as_ref()?;
        Some(Self {
            client: ClientId(<[u8; 16]>::try_from(&writer.client_id[..]).ok()?),
            channel: writer.channel,
            sequence: writer.sequence,
            update_version: UpdateVersion(record.update_version),
            time_ms: record.time_ms,
        })
    }
}

/// What is known about one version of a chunk without touching its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VersionInfo {
    /// Version of the content.
    pub update_version: UpdateVersion,
    /// Chain version under which it was made.
    pub chain_version: ChainVersion,
    /// Bytes in the chunk.
    pub length: u32,
    /// The file's chunk size in bytes.
    pub chunk_bytes: u32,
    /// CRC32C over the packed crcs of the blocks; equal on equal replicas.
    pub chunk_crc32c: u32,
    /// A tombstone: the chunk was removed by this version.
    pub removed: bool,
}

/// A chunk as the chain layer sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkMeta {
    /// What readers get; `None` before the first commit.
    pub committed: Option<VersionInfo>,
    /// Prepared, not yet committed or aborted.
    pub pending: Option<VersionInfo>,
    /// Exactly-once records of committed updates.
    pub writers: Vec<WriterRecord>,
    /// Stored bytes of the committed version were found damaged since the target was opened; the chunk needs to be
    /// replaced.
    pub rotten: bool,
}

/// Number of crc blocks in `length` bytes.
pub fn block_count(length: u32) -> u32 {
    length.div_ceil(BLOCK_BYTES)
}

/// A crc block of zeros, aligned for direct I/O.
pub fn zero_block() -> Region {
    static ZEROS: LazyLock<Region> =
        LazyLock::new(|| Region::from_aligned(AlignedBuf::shareable(CRC_BLOCK_BYTES), CRC_BLOCK_BYTES));
    ZEROS.clone()
}

/// Its checksum.
pub fn zero_block_crc() -> u32 {
    static CRC: LazyLock<u32> = LazyLock::new(|| crc32c(&zero_block()));
    *CRC
}

/// CRC32C over the packed block crcs.
pub fn chunk_crc(crcs: &[u32]) -> u32 {
    crc32c(&pack_crcs(crcs))
}
