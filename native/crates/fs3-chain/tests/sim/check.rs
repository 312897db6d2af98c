//! What is checked: see the module's methods.

use std::collections::{BTreeMap, BTreeSet};

use fs3_chain::ChunkView;
use fs3_core::ChunkId;

use super::{Content, NODES, World};

#[derive(Default)]
pub struct ChunkHistory {
    /// Highest version that an ended read or acknowledged write has shown.
    floor: u64,
    /// Content that each version was seen with.
    versions: BTreeMap<u64, Content>,
    /// Acknowledged writes: id to version.
    acked: BTreeMap<u64, u64>,
    issued: BTreeSet<u64>,
    /// Removals begun so far; acknowledged writes before one of them may be gone.
    removes: u64,
    /// Acknowledged writes with the number of removals begun when the write began.
    begun: BTreeMap<u64, u64>,
}

#[derive(Default)]
pub struct History {
    /// All replicas may crash at once: a read may have shown an unacknowledged write that is lost then.
    pub total_crash: bool,
    pub chunks: BTreeMap<ChunkId, ChunkHistory>,
}

impl History {
    pub fn acked(&self) -> usize {
        self.chunks.values().map(|c| c.acked.len()).sum()
    }

    pub fn write_begins(&mut self, chunk: ChunkId, id: u64, remove: bool) {
        let c = self.chunks.entry(chunk).or_default();
        if remove {
            c.removes += 1;
        } else {
            c.issued.insert(id);
            c.begun.insert(id, c.removes);
        }
    }

    pub fn write_acked(&mut self, chunk: ChunkId, id: u64, version: u64, remove: bool) {
        let c = self.chunks.entry(chunk).or_default();
        if !remove {
            assert!(version > 0, "a write creates a version");
            let twice = c.acked.iter().find(|(other, v)| **v == version && **other != id);
            assert!(twice.is_none(), "version {version} was given to {id} and {twice:?}");
            c.acked.insert(id, version);
            c.floor = c.floor.max(version);
        }
    }

    pub fn read_begins(&mut self, chunk: ChunkId) -> (u64, u64) {
        let c = self.chunks.entry(chunk).or_default();
        (c.floor, c.removes)
    }

    /// Every read shows a prefix of one order of versions: not older than what was shown before it began, one content
    /// per version, nothing twice, nothing that was not written, nothing acknowledged missing.
    pub fn read_ends(&mut self, chunk: ChunkId, floor: u64, removes: u64, version: u64, content: &Content) {
        let c = self.chunks.entry(chunk).or_default();
        if c.removes == 0 {
            assert!(version >= floor, "{chunk}: a read showed version {version} after {floor} was shown");
        }
        let _ = removes;
        c.check_content(chunk, version, content, self.total_crash);
        if !self.total_crash {
            c.floor = c.floor.max(version);
        }
    }
}

impl ChunkHistory {
    fn check_content(&mut self, chunk: ChunkId, version: u64, content: &Content, total_crash: bool) {
        if version > 0 && !content.is_empty() {
            let seen = self.versions.entry(version).or_insert_with(|| content.clone());
            assert_eq!(seen, content, "{chunk}: version {version} has two contents");
            if self.removes == 0 && !total_crash {
                // Writes append: of two versions the older one is the beginning of the newer one.
                let older = self.versions.range(..version).next_back();
                let newer = self.versions.range(version + 1..).next();
                for (a, b) in older.map(|o| (o.1, content)).into_iter().chain(newer.map(|n| (content, n.1))) {
                    assert!(b.starts_with(a), "{chunk}: of two versions around {version}, {a:?} became {b:?}");
                }
            }
        }
        let distinct: BTreeSet<u64> = content.iter().copied().collect();
        assert_eq!(distinct.len(), content.len(), "{chunk}: a write was applied twice in {content:?}");
        assert!(distinct.is_subset(&self.issued), "{chunk}: something that nobody wrote is in {content:?}");
        for (id, acked_version) in &self.acked {
            let may_be_removed = self.removes > self.begun[id] || self.removes > 0;
            if *acked_version <= version && !may_be_removed {
                assert!(distinct.contains(id), "{chunk}: acknowledged write {id} is not in version {version}");
            }
        }
    }
}

impl World {
    /// All replicas are equal, and nothing acknowledged is missing or there twice.
    pub fn check_end(&mut self) {
        let total_crash = self.history.total_crash;
        for index in 0..super::CHUNKS {
            let chunk = super::chunk_id(index);
            let states: Vec<_> = self.nodes.iter().map(|n| n.store.chunk(chunk)).collect();
            let contents: Vec<_> = self.nodes.iter().map(|n| n.store.content(chunk).cloned()).collect();
            for n in 1..NODES {
                assert_eq!(contents[0], contents[n], "{chunk}: replicas 0 and {n} differ");
                assert_eq!(states[0].committed, states[n].committed, "{chunk}: versions of replicas 0 and {n} differ");
            }
            assert!(states.iter().all(|s| s.pending == 0), "{chunk}: a pending version is left");
            let Some(history) = self.history.chunks.get_mut(&chunk) else { continue };
            let content = contents[0].clone().unwrap_or_default();
            history.check_content(chunk, states[0].committed, &content, total_crash);
            if history.removes == 0 {
                assert!(history.floor <= states[0].committed, "{chunk}: the last shown version was lost");
                for id in history.acked.keys() {
                    assert!(content.contains(id), "{chunk}: acknowledged write {id} was lost");
                }
            }
        }
    }
}
