use fs3_core::{ChainVersion, ChunkId, Region, UpdateVersion};

use crate::codec::{Reader, Writer};
use crate::{BLOCK_BYTES, CHUNK_BYTES_MAX, Location, WriterRecord, block_count};

/// Version of the encoding, the first byte of every record.
const FORMAT: u8 = 1;
/// Kind of a [`Record::Synced`].
const SYNCED: u8 = 5;
/// What a [`Record::Chunk`] begins with.
pub(crate) const CHUNK_RECORD: [u8; 2] = [FORMAT, 6];

/// What the metadata log and its snapshot consist of.
#[derive(Clone)]
pub enum Record {
    /// A new pending version.
    Prepare(Prepare),
    /// The pending version becomes the committed one.
    Commit {
        /// The chunk.
        id: ChunkId,
        /// The pending version.
        version: UpdateVersion,
        /// Wall-clock milliseconds; ages tombstones.
        time_ms: i64,
    },
    /// The pending version is dropped.
    Abort {
        /// The chunk.
        id: ChunkId,
        /// The pending version.
        version: UpdateVersion,
    },
    /// A tombstone is dropped.
    Forget {
        /// The chunk.
        id: ChunkId,
    },
    /// Data files are durable for every record up to `position`. What follows the last of these in the log
    /// has to be verified after a power loss.
    Synced {
        /// Position in the log.
        position: u64,
    },
    /// A chunk's whole state, in a snapshot.
    Chunk(ChunkImage),
    /// The end of a snapshot.
    End {
        /// Chunks in it.
        chunks: u64,
    },
}

/// A new pending version.
#[derive(Clone)]
pub struct Prepare {
    /// The chunk.
    pub id: ChunkId,
    /// The file's chunk size in bytes.
    pub chunk_bytes: u32,
    /// Version it creates.
    pub update_version: UpdateVersion,
    /// Chain version under which it is made.
    pub chain_version: ChainVersion,
    /// Length of the chunk after it.
    pub length: u32,
    /// How it differs from the committed version.
    pub body: Body,
    /// Remembered with the commit.
    pub writer: Option<WriterRecord>,
    /// Replaces the chunk's records with the commit.
    pub writers: Option<Vec<WriterRecord>>,
}

/// How a pending version differs from the committed one.
#[derive(Clone)]
pub enum Body {
    /// All bytes are in a new block (none when the chunk is empty).
    Whole {
        /// The block.
        at: Option<Location>,
        /// Checksums of all its crc blocks.
        crcs: Vec<u32>,
    },
    /// Written in place from crc block `first` to the end.
    Append {
        /// First crc block written.
        first: u32,
        /// Their checksums.
        crcs: Vec<u32>,
    },
    /// The crc blocks from `first` on are replaced by `blocks`, which have yet to be written in place.
    Patch {
        /// First crc block replaced.
        first: u32,
        /// Their checksums.
        crcs: Vec<u32>,
        /// Their bytes, 4 KiB each, the last one padded.
        blocks: Vec<Region>,
    },
    /// The crc blocks `first..end` are zeros, which have yet to be written in place, and so have the `edges`.
    Punch {
        /// First crc block of zeros.
        first: u32,
        /// One past the last.
        end: u32,
        /// Crc blocks that became zeros in part, at most two: index, checksum and bytes as in a patch.
        edges: Vec<(u32, u32, Region)>,
    },
    /// Shortened to `length`, or unchanged.
    Cut {
        /// Checksum of the last crc block if it was shortened.
        tail_crc: Option<u32>,
    },
    /// Removed.
    Tombstone,
}

/// One version's whole state, in a snapshot.
#[derive(Clone)]
pub struct VersionImage {
    /// Version of the content.
    pub update_version: UpdateVersion,
    /// Chain version under which it was made.
    pub chain_version: ChainVersion,
    /// Bytes in it.
    pub length: u32,
    /// The file's chunk size in bytes.
    pub chunk_bytes: u32,
    /// A tombstone.
    pub removed: bool,
    /// Wall-clock milliseconds of the commit.
    pub time_ms: i64,
    /// Its block.
    pub at: Option<Location>,
    /// The block's high-water mark.
    pub high_water: u32,
    /// Checksums of all its crc blocks.
    pub crcs: Vec<u32>,
    /// Crc blocks not yet written in place: index and bytes.
    pub patches: Vec<(u32, Region)>,
}

/// One chunk's whole state, in a snapshot.
#[derive(Clone)]
pub struct ChunkImage {
    /// The chunk.
    pub id: ChunkId,
    /// Position of the last log record in this state; earlier ones are skipped in the replay.
    pub position: u64,
    /// Committed version.
    pub committed: Option<VersionImage>,
    /// Pending version with what its commit remembers.
    pub pending: Option<(VersionImage, Option<WriterRecord>, Option<Vec<WriterRecord>>)>,
    /// Exactly-once records.
    pub writers: Vec<WriterRecord>,
}

impl Record {
    /// The chunk it is about, if it is about one.
    pub fn id(&self) -> Option<ChunkId> {
        match self {
            Record::Prepare(p) => Some(p.id),
            Record::Commit { id, .. } | Record::Abort { id, .. } | Record::Forget { id } => Some(*id),
            Record::Chunk(c) => Some(c.id),
            Record::Synced { .. } | Record::End { .. } => None,
        }
    }

    /// The position of an encoded [`Record::Synced`]; `None` for any other record.
    pub fn mark(bytes: &[u8]) -> Option<u64> {
        match Self::decode(bytes.get(..2).filter(|head| head[1] == SYNCED).map(|_| bytes)?)? {
            Record::Synced { position } => Some(position),
            _ => None,
        }
    }

    /// Append the encoded form to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut w = Writer(out);
        w.u8(FORMAT);
        match self {
            Record::Prepare(p) => {
                w.u8(1);
                p.encode(&mut w);
            }
            Record::Commit { id, version, time_ms } => {
                w.u8(2);
                w.id(*id);
                w.u64(version.0);
                w.u64(*time_ms as u64);
            }
            Record::Abort { id, version } => {
                w.u8(3);
                w.id(*id);
                w.u64(version.0);
            }
            Record::Forget { id } => {
                w.u8(4);
                w.id(*id);
            }
            Record::Synced { position } => {
                w.u8(SYNCED);
                w.u64(*position);
            }
            Record::Chunk(c) => {
                w.u8(CHUNK_RECORD[1]);
                c.encode(&mut w);
            }
            Record::End { chunks } => {
                w.u8(7);
                w.u64(*chunks);
            }
        }
    }

    /// Parse; `None` for anything that [`Record::encode`] did not make.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader(bytes);
        if r.u8()? != FORMAT {
            return None;
        }
        let record = match r.u8()? {
            1 => Record::Prepare(Prepare::decode(&mut r)?),
            2 => Record::Commit { id: r.id()?, version: UpdateVersion(r.u64()?), time_ms: r.u64()? as i64 },
            3 => Record::Abort { id: r.id()?, version: UpdateVersion(r.u64()?) },
            4 => Record::Forget { id: r.id()? },
            SYNCED => Record::Synced { position: r.u64()? },
            kind if kind == CHUNK_RECORD[1] => Record::Chunk(ChunkImage::decode(&mut r)?),
            7 => Record::End { chunks: r.u64()? },
            _ => return None,
        };
        r.0.is_empty().then_some(record)
    }
}

impl Prepare {
    fn encode(&self, w: &mut Writer) {
        w.id(self.id);
        w.u32(self.chunk_bytes);
        w.u64(self.update_version.0);
        w.u64(self.chain_version.0);
        w.u32(self.length);
        match &self.body {
            Body::Whole { at, crcs } => {
                w.u8(1);
                w.location(*at);
                w.crcs(crcs);
            }
            Body::Append { first, crcs } => {
                w.u8(2);
                w.u32(*first);
                w.crcs(crcs);
            }
            Body::Patch { first, crcs, blocks } => {
                w.u8(3);
                w.u32(*first);
                w.crcs(crcs);
                w.u32(blocks.len() as u32);
                blocks.iter().for_each(|b| w.block(b));
            }
            Body::Cut { tail_crc } => {
                w.u8(4);
                w.u8(u8::from(tail_crc.is_some()));
                w.u32(tail_crc.unwrap_or(0));
            }
            Body::Tombstone => w.u8(5),
            Body::Punch { first, end, edges } => {
                w.u8(6);
                w.u32(*first);
                w.u32(*end);
                w.u8(edges.len() as u8);
                for (block, crc, bytes) in edges {
                    w.u32(*block);
                    w.u32(*crc);
                    w.block(bytes);
                }
            }
        }
        w.writers(self.writer.as_slice());
        w.u8(u8::from(self.writers.is_some()));
        w.writers(self.writers.as_deref().unwrap_or(&[]));
    }

    fn decode(r: &mut Reader) -> Option<Self> {
        let (id, chunk_bytes) = (r.id()?, r.u32()?);
        let (update_version, chain_version, length) = (UpdateVersion(r.u64()?), ChainVersion(r.u64()?), r.u32()?);
        let body = match r.u8()? {
            1 => Body::Whole { at: r.location()?, crcs: r.crcs()? },
            2 => Body::Append { first: r.u32()?, crcs: r.crcs()? },
            3 => {
                let (first, crcs) = (r.u32()?, r.crcs()?);
                let count = r.u32()? as usize;
                if count != crcs.len() {
                    return None;
                }
                Body::Patch { first, crcs, blocks: (0..count).map(|_| r.block()).collect::<Option<_>>()? }
            }
            4 => {
                let (some, crc) = (r.u8()? != 0, r.u32()?);
                Body::Cut { tail_crc: some.then_some(crc) }
            }
            5 => Body::Tombstone,
            6 => {
                let (first, end, count) = (r.u32()?, r.u32()?, r.u8()?);
                let edges = (0..count).map(|_| Some((r.u32()?, r.u32()?, r.block()?))).collect::<Option<_>>()?;
                if first > end || end > block_count(CHUNK_BYTES_MAX) {
                    return None;
                }
                Body::Punch { first, end, edges }
            }
            _ => return None,
        };
        let writer = r.writers()?.pop();
        let some = r.u8()? != 0;
        let writers = r.writers()?;
        Some(Self {
            id,
            chunk_bytes,
            update_version,
            chain_version,
            length,
            body,
            writer,
            writers: some.then_some(writers),
        })
    }
}

impl VersionImage {
    fn encode(&self, w: &mut Writer) {
        w.u64(self.update_version.0);
        w.u64(self.chain_version.0);
        w.u32(self.length);
        w.u32(self.chunk_bytes);
        w.u8(u8::from(self.removed));
        w.u64(self.time_ms as u64);
        w.location(self.at);
        w.u32(self.high_water);
        w.crcs(&self.crcs);
        w.u32(self.patches.len() as u32);
        for (block, bytes) in &self.patches {
            w.u32(*block);
            w.block(bytes);
        }
    }

    fn decode(r: &mut Reader) -> Option<Self> {
        let (update_version, chain_version) = (UpdateVersion(r.u64()?), ChainVersion(r.u64()?));
        let (length, chunk_bytes, removed, time_ms) = (r.u32()?, r.u32()?, r.u8()? != 0, r.u64()? as i64);
        let (at, high_water, crcs, count) = (r.location()?, r.u32()?, r.crcs()?, r.u32()? as usize);
        if count > r.0.len() / BLOCK_BYTES as usize {
            return None;
        }
        let patches = (0..count).map(|_| Some((r.u32()?, r.block()?))).collect::<Option<_>>()?;
        Some(Self {
            update_version,
            chain_version,
            length,
            chunk_bytes,
            removed,
            time_ms,
            at,
            high_water,
            crcs,
            patches,
        })
    }
}

impl ChunkImage {
    fn encode(&self, w: &mut Writer) {
        w.id(self.id);
        w.u64(self.position);
        w.u8(u8::from(self.committed.is_some()));
        if let Some(version) = &self.committed {
            version.encode(w);
        }
        w.u8(u8::from(self.pending.is_some()));
        if let Some((version, writer, writers)) = &self.pending {
            version.encode(w);
            w.writers(writer.as_slice());
            w.u8(u8::from(writers.is_some()));
            w.writers(writers.as_deref().unwrap_or(&[]));
        }
        w.writers(&self.writers);
    }

    fn decode(r: &mut Reader) -> Option<Self> {
        let (id, position) = (r.id()?, r.u64()?);
        let committed = if r.u8()? != 0 { Some(VersionImage::decode(r)?) } else { None };
        let pending = if r.u8()? != 0 {
            let (version, writer) = (VersionImage::decode(r)?, r.writers()?.pop());
            let some = r.u8()? != 0;
            let writers = r.writers()?;
            Some((version, writer, some.then_some(writers)))
        } else {
            None
        };
        Some(Self { id, position, committed, pending, writers: r.writers()? })
    }
}
