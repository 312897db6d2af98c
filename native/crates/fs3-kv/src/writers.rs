//! What late requests of a client may still do.
//!
//! A request that its client has given up may arrive after a later one of the same client for the same key. While the
//! later one's entry is there, the numbers tell. When it has gone, the highest number that went is kept instead, for a
//! fraction of the addresses each: what is not newer than that is refused. A refused put is not stored, which a cache may
//! always say.

use std::collections::HashMap;

use crate::types::PutId;

/// Clients that are remembered; beyond it those that were silent the longest are forgotten.
const WRITERS_MAX: usize = 4096;
/// Numbers kept for each.
const PARTS: usize = 64;

struct Writer {
    gone: [u64; PARTS],
    heard_ms: u64,
}

/// The highest numbers that have gone, by client.
#[derive(Default)]
pub struct Writers {
    known: HashMap<u64, Writer>,
}

impl Writers {
    /// Whether a request is newer than all that went there.
    pub fn is_late(&self, id: PutId, address: u128) -> bool {
        self.known.get(&id.writer).is_some_and(|writer| id.sequence <= writer.gone[part(address)])
    }

    /// The entry made by `id` goes, or a removal with that number was done.
    pub fn gone(&mut self, id: PutId, address: u128, now_ms: u64) {
        if self.known.len() >= WRITERS_MAX && !self.known.contains_key(&id.writer) {
            self.forget_one();
        }
        let writer = self.known.entry(id.writer).or_insert(Writer { gone: [0; PARTS], heard_ms: now_ms });
        writer.heard_ms = now_ms;
        let gone = &mut writer.gone[part(address)];
        *gone = (*gone).max(id.sequence);
    }

    fn forget_one(&mut self) {
        let silent = self.known.iter().min_by_key(|(_, writer)| writer.heard_ms).map(|(id, _)| *id);
        silent.and_then(|id| self.known.remove(&id));
    }
}

/// From other bits than those that choose the chain and the place in the index.
fn part(address: u128) -> usize {
    (address >> 96) as usize % PARTS
}
