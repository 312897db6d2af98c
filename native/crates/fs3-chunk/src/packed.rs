//! Chunks at rest: their encoded form, a quarter of the memory of the live one.

use std::sync::Arc;

use fs3_core::ChunkId;

use crate::codec::Reader;
use crate::record::CHUNK_RECORD;
use crate::table::{Chunk, chunk_of};
use crate::{Blocks, ChunkImage, ChunkMeta, Location, Parked, Record, VersionInfo, chunk_crc};

/// A chunk with neither a pending version nor patches, of which nobody holds anything.
///
/// The bytes are: generation of the block (u64, the highest bit says that it is rotten), then the record of a snapshot
/// without its first bytes and its chunk id, which is the key in the table.
#[derive(Default)]
pub(crate) struct Packed(Box<[u8]>);

const STATE_BYTES: usize = 8;
const ROTTEN: u64 = 1 << 63;

/// What the table's sums need of a chunk at rest.
pub(crate) struct Summary {
    pub position: u64,
    pub removed: bool,
    pub time_ms: i64,
    pub at: Option<Location>,
}

impl Packed {
    /// Pack `chunk` if it is at rest, else give it back.
    pub fn pack(id: ChunkId, mut chunk: Box<Chunk>) -> Result<Self, Box<Chunk>> {
        if !chunk.is_at_rest() {
            return Err(chunk);
        }
        let image = ChunkImage::from((&id, &*chunk));
        // At rest: the version and its block are nobody else's, so that both can be taken apart.
        let block = chunk.committed.take().and_then(Arc::into_inner).and_then(|v| v.block).and_then(Arc::into_inner);
        let parked = block.map(|b| b.park());
        Ok(Self::new(parked, |out| Record::Chunk(image).encode(out)))
    }

    /// From a record of a snapshot, if it is one of a chunk at rest.
    pub fn from_record(payload: &[u8], image: &ChunkImage) -> Option<Self> {
        let rests = image.pending.is_none() && image.committed.as_ref().is_some_and(|v| v.patches.is_empty());
        (rests && payload.starts_with(&CHUNK_RECORD)).then(|| Self::new(None, |out| out.extend_from_slice(payload)))
    }

    fn new(parked: Option<Parked>, encode: impl FnOnce(&mut Vec<u8>)) -> Self {
        let mut record = Vec::with_capacity(256);
        encode(&mut record);
        let rest = &record[CHUNK_RECORD.len() + ChunkId::BYTES..];
        let state = parked.map_or(0, |p| p.generation | if p.rotten { ROTTEN } else { 0 });
        Self([&state.to_le_bytes(), rest].concat().into())
    }

    /// The record of a snapshot.
    pub fn encode(&self, id: ChunkId, out: &mut Vec<u8>) {
        out.extend_from_slice(&CHUNK_RECORD);
        out.extend_from_slice(&id.to_bytes());
        out.extend_from_slice(&self.0[STATE_BYTES..]);
    }

    fn state(&self) -> u64 {
        u64::from_le_bytes(self.0[..STATE_BYTES].try_into().expect("8 bytes"))
    }

    fn is_rotten(&self) -> bool {
        self.state() & ROTTEN != 0
    }

    fn image(&self, id: ChunkId) -> ChunkImage {
        let mut record = Vec::with_capacity(self.0.len() + CHUNK_RECORD.len() + ChunkId::BYTES);
        self.encode(id, &mut record);
        match Record::decode(&record) {
            Some(Record::Chunk(image)) => image,
            _ => unreachable!("packed from a record that was encoded or decoded"),
        }
    }

    /// The live form again; the block keeps the generation it had.
    pub fn unpack(self, id: ChunkId, blocks: &Arc<Blocks>) -> Box<Chunk> {
        let generation = self.state() & !ROTTEN;
        let (image, rotten) = (self.image(id), self.is_rotten());
        Box::new(chunk_of(image, |location| blocks.resume(Parked { location, generation, rotten })))
    }

    /// As [`Chunk::meta`].
    pub fn meta(&self, id: ChunkId) -> ChunkMeta {
        let image = self.image(id);
        let committed = image.committed.map(|v| VersionInfo {
            update_version: v.update_version,
            chain_version: v.chain_version,
            length: v.length,
            chunk_bytes: v.chunk_bytes,
            chunk_crc32c: chunk_crc(&v.crcs),
            removed: v.removed,
        });
        ChunkMeta { committed, pending: None, writers: image.writers, rotten: self.is_rotten() }
    }

    pub fn summary(&self) -> Summary {
        let read = || {
            let mut r = Reader(&self.0[STATE_BYTES..]);
            let position = r.u64()?;
            let _has_committed = r.u8()?;
            let (_update_version, _chain_version, _length, _chunk_bytes) = (r.u64()?, r.u64()?, r.u32()?, r.u32()?);
            let (removed, time_ms, at) = (r.u8()? != 0, r.u64()? as i64, r.location()?);
            Some(Summary { position, removed, time_ms, at })
        };
        read().expect("a chunk at rest has a committed version")
    }
}
