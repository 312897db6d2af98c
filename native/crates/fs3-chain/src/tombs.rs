//! Chunks removed lately.

use std::collections::{BTreeMap, VecDeque};

use fs3_core::ChunkId;

use crate::types::{Writer, WriterRecord};

/// Remembers the last version and the writers of removed chunks, up to a number of chunks. Forgetting one only loses
/// the defence against duplicates that are delayed for that long.
pub(crate) struct Tombs {
    chunks: BTreeMap<ChunkId, (u64, Vec<WriterRecord>)>,
    order: VecDeque<ChunkId>,
    max: usize,
}

impl Tombs {
    pub fn new(max: usize) -> Self {
        Self { chunks: BTreeMap::new(), order: VecDeque::new(), max }
    }

    pub fn insert(&mut self, chunk: ChunkId, version: u64, writers: Vec<WriterRecord>) {
        if self.chunks.insert(chunk, (version, writers)).is_none() {
            self.order.push_back(chunk);
        }
        while self.order.len() > self.max {
            if let Some(old) = self.order.pop_front() {
                self.chunks.remove(&old);
            }
        }
    }

    /// Last version of a removed chunk, 0 when not known.
    pub fn version(&self, chunk: ChunkId) -> u64 {
        self.chunks.get(&chunk).map_or(0, |t| t.0)
    }

    /// Whether the removed chunk had this write, or a later one of its channel.
    pub fn has_writer(&self, chunk: ChunkId, writer: Writer) -> bool {
        self.chunks.get(&chunk).is_some_and(|t| {
            t.1.iter().any(|r| {
                r.writer.client == writer.client
                    && r.writer.channel == writer.channel
                    && r.writer.sequence >= writer.sequence
            })
        })
    }

    pub fn clear(&mut self) {
        self.chunks.clear();
        self.order.clear();
    }
}
