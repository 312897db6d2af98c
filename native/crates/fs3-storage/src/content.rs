//! What an update carries, and whole chunks made of it.

use fs3_chain::Content;
use fs3_core::{BufferPool, CRC_BLOCK_BYTES, CheckedBytes, ChunkId, Code, Error, Region, Result, crc_blocks};
use fs3_io::{Change, TargetStore, WriterRecord};

/// The payload of one update, kept from its arrival until the machine is done with it.
pub(crate) struct Job {
    pub chunk: ChunkId,
    pub chunk_bytes: u32,
    pub body: Body,
    pub writer: Option<WriterRecord>,
    pub durable: bool,
}

#[derive(Clone)]
pub(crate) enum Body {
    Write(CheckedBytes),
    Replace {
        bytes: CheckedBytes,
        writers: Vec<WriterRecord>,
    },
    Truncate {
        length: u32,
    },
    Punch {
        offset: u32,
        length: u32,
    },
    Remove,
    /// The committed chunk here.
    Mirror,
}

/// A whole chunk.
pub(crate) struct Whole {
    pub data: Vec<Region>,
    pub length: u32,
    pub crcs: Vec<u32>,
    pub chunk_bytes: u32,
    pub writers: Vec<WriterRecord>,
}

impl Job {
    pub fn mirror(chunk: ChunkId) -> Self {
        Self { chunk, chunk_bytes: 0, body: Body::Mirror, writer: None, durable: false }
    }

    /// The local change for `content` if nothing has to be read for it.
    pub fn given_change(&self, content: Content) -> Option<Change> {
        match (&self.body, content) {
            (Body::Write(bytes), Content::Update) => Some(Change::Write(bytes.clone())),
            (Body::Truncate { length }, Content::Update) => Some(Change::Truncate { length: *length }),
            (Body::Punch { offset, length }, Content::Update) => {
                Some(Change::Punch { offset: *offset, length: *length })
            }
            (Body::Replace { bytes, writers }, Content::Update | Content::Whole) => {
                Some(Change::Replace { bytes: bytes.clone(), writers: writers.clone() })
            }
            _ => None,
        }
    }

    /// The local change for `content`. `None`: there is no committed chunk to take it from.
    pub async fn change(
        &self,
        store: &std::sync::Arc<TargetStore>,
        pool: &BufferPool,
        content: Content,
    ) -> Result<Option<(Change, u32)>> {
        if matches!(self.body, Body::Remove) {
            let known = store.chunk(self.chunk).and_then(|m| m.committed).map_or(0, |c| c.chunk_bytes);
            return Ok(Some((Change::Remove, known.max(self.chunk_bytes).max(64 << 10))));
        }
        if let Some(change) = self.given_change(content) {
            return Ok(Some((change, self.chunk_bytes)));
        }
        let Some(whole) = self.whole(store, pool, content).await? else { return Ok(None) };
        let bytes = CheckedBytes::check(0, contiguous(whole.data, whole.length, pool), whole.crcs)?;
        Ok(Some((Change::Replace { bytes, writers: whole.writers }, whole.chunk_bytes)))
    }

    /// The whole chunk for `content` (not `Update`); `None` when there is no such chunk.
    pub async fn whole(
        &self,
        store: &std::sync::Arc<TargetStore>,
        pool: &BufferPool,
        content: Content,
    ) -> Result<Option<Whole>> {
        if let (Body::Replace { bytes, writers }, Content::Whole) = (&self.body, content) {
            return Ok(Some(Whole {
                data: vec![bytes.data().clone()],
                length: bytes.end(),
                crcs: bytes.crcs().to_vec(),
                chunk_bytes: self.chunk_bytes,
                writers: writers.clone(),
            }));
        }
        if content == Content::Committed || matches!(self.body, Body::Mirror) {
            return committed(store, self.chunk, u32::MAX).await;
        }
        if let Some(whole) = self.overwritten(store) {
            return Ok(Some(whole));
        }
        let needed = if let Body::Truncate { length } = self.body { length } else { u32::MAX };
        let committed = committed(store, self.chunk, needed).await?;
        let (mut old, old_length, chunk_bytes, writers) = match committed {
            Some(whole) => (whole.data, whole.length, whole.chunk_bytes, whole.writers),
            None => (Vec::new(), 0, self.chunk_bytes, Vec::new()),
        };
        let length = match &self.body {
            Body::Write(bytes) => old_length.max(bytes.end()),
            Body::Truncate { length } => old_length.min(*length),
            Body::Punch { .. } => old_length,
            _ => return Err(Error::new(Code::Internal, "an update without content")),
        };
        let mut buffer = pool.take(length as usize);
        let mut at = 0;
        for region in old.drain(..) {
            let n = region.len().min(length as usize - at);
            buffer[at..at + n].copy_from_slice(&region[..n]);
            at += n;
        }
        buffer[at..].fill(0);
        match &self.body {
            Body::Write(bytes) => {
                buffer[bytes.offset() as usize..bytes.end() as usize].copy_from_slice(bytes.data());
            }
            Body::Punch { offset, length: hole } => {
                let at = |byte: u32| byte.min(length) as usize;
                buffer[at(*offset)..at(offset.saturating_add(*hole))].fill(0);
            }
            _ => {}
        }
        // The old bytes were verified by the read just now, so that fresh checksums cannot hide rot.
        let crcs = crc_blocks(0, &buffer);
        Ok(Some(Whole { data: vec![buffer.freeze()], length, crcs, chunk_bytes, writers }))
    }

    /// The chunk after a write that leaves nothing of the old bytes: those may even be rotten.
    fn overwritten(&self, store: &TargetStore) -> Option<Whole> {
        let Body::Write(bytes) = &self.body else { return None };
        if bytes.offset() != 0 {
            return None;
        }
        let meta = store.chunk(self.chunk)?;
        let old = meta.committed.filter(|v| !v.removed && v.length <= bytes.end())?;
        Some(Whole {
            data: vec![bytes.data().clone()],
            length: bytes.end(),
            crcs: bytes.crcs().to_vec(),
            chunk_bytes: old.chunk_bytes,
            writers: meta.writers,
        })
    }
}

/// The first `needed` bytes or more of the committed chunk, with its records, verified.
async fn committed(store: &std::sync::Arc<TargetStore>, chunk: ChunkId, needed: u32) -> Result<Option<Whole>> {
    let Some(meta) = store.chunk(chunk) else { return Ok(None) };
    let Some(version) = meta.committed.filter(|v| !v.removed) else { return Ok(None) };
    let needed = needed.checked_next_multiple_of(CRC_BLOCK_BYTES as u32).unwrap_or(u32::MAX);
    let read = store.read(chunk, 0, needed.min(version.length)).await?;
    Ok(Some(Whole {
        data: read.data,
        length: read.length,
        crcs: read.crcs,
        chunk_bytes: version.chunk_bytes,
        writers: meta.writers,
    }))
}

fn contiguous(mut data: Vec<Region>, length: u32, pool: &BufferPool) -> Region {
    if data.len() == 1 {
        return data.remove(0);
    }
    let mut joined = pool.take(length as usize);
    let mut at = 0;
    for region in data {
        joined[at..at + region.len()].copy_from_slice(&region);
        at += region.len();
    }
    joined.freeze()
}
