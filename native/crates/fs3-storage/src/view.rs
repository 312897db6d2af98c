//! The store as the chain machine reads it.

use fs3_chain::{ChunkState, ChunkView, Writer, WriterRecord};
use fs3_core::ChunkId;
use fs3_io::{ChunkMeta, TargetStore};

/// Chunks looked at per lock of the store's table.
const PAGE: usize = 4096;

pub(crate) struct StoreView<'a>(pub &'a TargetStore);

impl ChunkView for StoreView<'_> {
    fn chunk(&self, id: ChunkId) -> ChunkState {
        self.0.chunk(id).map_or_else(ChunkState::default, |meta| state_of(&meta))
    }

    fn pending(&self) -> Vec<ChunkId> {
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let page = self.0.list(after, PAGE);
            let Some((last, _)) = page.last() else { return found };
            after = Some(*last);
            found.extend(page.iter().filter(|(_, meta)| meta.pending.is_some()).map(|(id, _)| *id));
        }
    }
}

pub(crate) fn state_of(meta: &ChunkMeta) -> ChunkState {
    let mut state = ChunkState {
        pending: meta.pending.as_ref().map_or(0, |p| p.update_version.0),
        writers: meta.writers.iter().map(record_of).collect(),
        ..ChunkState::default()
    };
    if let Some(version) = &meta.committed {
        state.chain_version = version.chain_version.0;
        if version.removed {
            state.tombstone = version.update_version.0;
        } else {
            state.committed = version.update_version.0;
            state.length = version.length;
            state.crc = version.chunk_crc32c;
        }
    }
    state
}

fn record_of(record: &fs3_io::WriterRecord) -> WriterRecord {
    WriterRecord {
        writer: Writer { client: record.client, channel: record.channel, sequence: record.sequence },
        update_version: record.update_version.0,
    }
}
