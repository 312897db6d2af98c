//! Which entries the head of a chain has that are chunks, and whose turn it is to go. Pure.
//!
//! It knows sizes and times, no keys: those are in the chunks. What it does not know of is only never evicted, so it may be
//! filled bit by bit after a start.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::types::{Namespace, NamespaceStats};

/// A namespace beyond its share is brought down to this part of it, in percent.
const LOW_PERCENT: u64 = 95;
/// Entries are looked at for their age so many times in a time to live, but not more often than each second.
const SWEEPS_PER_TTL: u64 = 16;
const SWEEP_MS_MIN: u64 = 1000;
/// Namespaces remembered because they have been removed.
const ENDED_MAX: usize = 4096;
/// Namespaces that are known; beyond it those without entries are forgotten.
const NAMESPACES_MAX: usize = 16_384;

/// An entry: its namespace, and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkKey {
    /// The inode of the namespace's directory.
    pub namespace: u64,
    /// Index of the chunk: a part of the key's hash.
    pub index: u32,
}

/// What an entry takes. Times are wall-clock milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Bytes of the value.
    pub bytes: u64,
    /// Bytes of disk space.
    pub held_bytes: u64,
    /// When it was put.
    pub put_ms: u64,
}

/// Whether a put may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Yes; [`ChunkIndex::end_put`] has to follow.
    Go,
    /// The entry is being removed: ask again when that is done.
    Wait,
    /// The namespace was removed.
    Ended,
}

/// Why an entry goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eviction {
    /// The namespace has more than its share.
    Capacity,
    /// The disk is short of space.
    Space,
    /// Somebody asked for it.
    Asked,
    /// Its time is over.
    Expired,
}

/// Used the longest ago comes first; the number tells apart what was used in the same millisecond.
type Use = (u64, u64);

struct Item {
    stored: Stored,
    used: Use,
}

#[derive(Default)]
struct Space {
    settings: Namespace,
    items: HashMap<u32, Item>,
    order: BTreeMap<Use, u32>,
    stats: NamespaceStats,
    /// It was beyond its share and is being brought down.
    shrinking: bool,
    swept_ms: u64,
}

/// Entries of one target. Those that have to go are handed out once, and are away for [`Turn::Wait`] until
/// [`ChunkIndex::gone`].
#[derive(Default)]
pub struct ChunkIndex {
    spaces: HashMap<u64, Space>,
    order: BTreeMap<Use, ChunkKey>,
    uses: u64,
    held_bytes: u64,
    putting: HashMap<ChunkKey, u32>,
    leaving: HashSet<ChunkKey>,
    ended: HashSet<u64>,
    /// What was counted in namespaces that are not known any more.
    past: NamespaceStats,
}

impl ChunkIndex {
    /// Forget everything: somebody else is the head now.
    pub fn clear(&mut self) {
        let past = NamespaceStats { entries: 0, bytes: 0, ..self.sums() };
        let (putting, leaving) = (std::mem::take(&mut self.putting), std::mem::take(&mut self.leaving));
        *self = Self { putting, leaving, ended: std::mem::take(&mut self.ended), past, ..Self::default() };
    }

    /// Whether there is nothing to look after.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Bytes of disk space that entries take.
    pub fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    /// Namespaces with entries or settings.
    pub fn namespaces(&self) -> u64 {
        self.spaces.len() as u64
    }

    /// Take over settings, unless newer ones are known.
    pub fn configure(&mut self, settings: Namespace) {
        if self.spaces.len() >= NAMESPACES_MAX && !self.spaces.contains_key(&settings.id) {
            let past = &mut self.past;
            self.spaces.retain(|_, space| {
                let stays = space.stats.entries > 0;
                if !stays {
                    past.add(&space.stats);
                }
                stays
            });
        }
        let space = self.spaces.entry(settings.id).or_default();
        if settings.generation >= space.settings.generation {
            space.settings = settings;
        }
    }

    /// Whether the time of an entry that was put then is over.
    pub fn is_expired(&self, namespace: u64, put_ms: u64, now_ms: u64) -> bool {
        let ttl_ms = self.spaces.get(&namespace).map_or(0, |space| space.settings.ttl_ms);
        expired(ttl_ms, put_ms, now_ms)
    }

    /// Whether a put may begin.
    pub fn begin_put(&mut self, key: ChunkKey) -> Turn {
        if self.ended.contains(&key.namespace) {
            return Turn::Ended;
        }
        if self.leaving.contains(&key) {
            return Turn::Wait;
        }
        *self.putting.entry(key).or_default() += 1;
        Turn::Go
    }

    /// A put is over. `stored`: what it left; `None`: nothing. Whether its namespace is beyond its share now.
    pub fn end_put(&mut self, key: ChunkKey, stored: Option<Stored>) -> bool {
        if let Some(left) = self.putting.get_mut(&key) {
            *left -= 1;
            if *left == 0 {
                self.putting.remove(&key);
            }
        }
        let Some(stored) = stored.filter(|_| !self.ended.contains(&key.namespace)) else { return false };
        self.take_out(key);
        self.insert(key, stored, stored.put_ms);
        let space = self.spaces.entry(key.namespace).or_default();
        space.stats.puts += 1;
        space.settings.share_bytes != 0 && space.stats.bytes > space.settings.share_bytes
    }

    /// An entry was found on the disk; what is known of it already stays.
    pub fn load(&mut self, key: ChunkKey, stored: Stored) {
        let known = self.spaces.get(&key.namespace).is_some_and(|space| space.items.contains_key(&key.index));
        if !known && !self.ended.contains(&key.namespace) && !self.leaving.contains(&key) {
            self.insert(key, stored, stored.put_ms);
        }
    }

    /// A get was answered. `count`: as a hit or a miss. An entry that was found counts as used.
    pub fn used(&mut self, key: ChunkKey, found: bool, count: bool, now_ms: u64) {
        if self.ended.contains(&key.namespace) {
            return;
        }
        let space = self.spaces.entry(key.namespace).or_default();
        if count {
            *(if found { &mut space.stats.hits } else { &mut space.stats.misses }) += 1;
        }
        if !found {
            return;
        }
        if let Some(item) = space.items.get_mut(&key.index) {
            self.uses += 1;
            let used = (now_ms, self.uses);
            space.order.remove(&item.used);
            self.order.remove(&item.used);
            item.used = used;
            space.order.insert(used, key.index);
            self.order.insert(used, key);
        }
    }

    /// A client removed an entry.
    pub fn removed(&mut self, key: ChunkKey) {
        if self.take_out(key).is_some()
            && let Some(space) = self.spaces.get_mut(&key.namespace)
        {
            space.stats.removed += 1;
        }
    }

    /// The namespace has been removed: its entries are forgotten, and puts refused. Whether none is under way.
    pub fn end(&mut self, namespace: u64) -> bool {
        if self.ended.len() >= ENDED_MAX {
            self.ended.clear();
        }
        self.ended.insert(namespace);
        if let Some(space) = self.spaces.remove(&namespace) {
            self.past.add(&NamespaceStats { entries: 0, bytes: 0, ..space.stats });
            for item in space.items.values() {
                self.order.remove(&item.used);
                self.held_bytes -= item.stored.held_bytes;
            }
        }
        !self.putting.keys().any(|key| key.namespace == namespace)
    }

    /// Entries that have to go because of limits, `most` at a time.
    pub fn surplus(&mut self, most: usize, now_ms: u64) -> Vec<ChunkKey> {
        let ids: Vec<u64> = self.spaces.iter().filter(|(_, space)| space.has_limits()).map(|(id, _)| *id).collect();
        let mut going = Vec::new();
        for id in ids {
            self.collect_expired(id, most, now_ms, &mut going);
            let Some(space) = self.spaces.get_mut(&id) else { continue };
            let share = space.settings.share_bytes;
            space.shrinking |= share != 0 && space.stats.bytes > share;
            if space.shrinking {
                let low = if share == 0 { u64::MAX } else { share - share * (100 - LOW_PERCENT) / 100 };
                self.take_oldest(id, low, most, Eviction::Capacity, &mut going);
                if let Some(space) = self.spaces.get_mut(&id) {
                    space.shrinking = space.stats.bytes > low;
                }
            }
        }
        going
    }

    /// Entries of a namespace that were used the longest ago, until it has `keep_bytes`; `most` at a time.
    pub fn evict(&mut self, namespace: u64, keep_bytes: u64, most: usize) -> Vec<ChunkKey> {
        let mut going = Vec::new();
        self.take_oldest(namespace, keep_bytes, most, Eviction::Asked, &mut going);
        going
    }

    /// Entries of any namespace that were used the longest ago, until `bytes` of disk space become free.
    pub fn make_room(&mut self, bytes: u64, most: usize) -> Vec<ChunkKey> {
        let (mut going, low) = (Vec::new(), self.held_bytes.saturating_sub(bytes));
        let oldest: Vec<ChunkKey> =
            self.order.values().copied().filter(|key| !self.is_putting(key)).take(most).collect();
        for key in oldest {
            if self.held_bytes <= low {
                break;
            }
            self.send_away(key, Eviction::Space, &mut going);
        }
        going
    }

    /// The removal of an entry that was handed out is over.
    pub fn gone(&mut self, key: ChunkKey) {
        self.leaving.remove(&key);
    }

    /// Bytes of values of a namespace.
    pub fn bytes(&self, namespace: u64) -> u64 {
        self.spaces.get(&namespace).map_or(0, |space| space.stats.bytes)
    }

    /// When an entry was used last, if it is known.
    pub fn used_ms(&self, key: ChunkKey) -> Option<u64> {
        Some(self.spaces.get(&key.namespace)?.items.get(&key.index)?.used.0)
    }

    /// Counters of a namespace.
    pub fn stats(&self, namespace: u64) -> NamespaceStats {
        self.spaces.get(&namespace).map(|space| space.stats).unwrap_or_default()
    }

    /// Counters of all, also of namespaces that are gone.
    pub fn sums(&self) -> NamespaceStats {
        let mut sums = self.past;
        self.spaces.values().for_each(|space| sums.add(&space.stats));
        sums
    }

    fn is_putting(&self, key: &ChunkKey) -> bool {
        self.putting.contains_key(key)
    }

    fn insert(&mut self, key: ChunkKey, stored: Stored, used_ms: u64) {
        self.uses += 1;
        let used = (used_ms, self.uses);
        let space = self.spaces.entry(key.namespace).or_default();
        space.items.insert(key.index, Item { stored, used });
        space.order.insert(used, key.index);
        space.stats.entries += 1;
        space.stats.bytes += stored.bytes;
        self.order.insert(used, key);
        self.held_bytes += stored.held_bytes;
    }

    fn take_out(&mut self, key: ChunkKey) -> Option<Stored> {
        let space = self.spaces.get_mut(&key.namespace)?;
        let item = space.items.remove(&key.index)?;
        space.order.remove(&item.used);
        space.stats.entries -= 1;
        space.stats.bytes -= item.stored.bytes;
        self.order.remove(&item.used);
        self.held_bytes -= item.stored.held_bytes;
        Some(item.stored)
    }

    fn send_away(&mut self, key: ChunkKey, why: Eviction, going: &mut Vec<ChunkKey>) {
        if self.take_out(key).is_none() {
            return;
        }
        if let Some(space) = self.spaces.get_mut(&key.namespace) {
            let stats = &mut space.stats;
            *(match why {
                Eviction::Capacity => &mut stats.evicted_capacity,
                Eviction::Space => &mut stats.evicted_memory,
                Eviction::Asked => &mut stats.evicted_asked,
                Eviction::Expired => &mut stats.expired,
            }) += 1;
        }
        self.leaving.insert(key);
        going.push(key);
    }

    fn take_oldest(&mut self, id: u64, keep_bytes: u64, most: usize, why: Eviction, going: &mut Vec<ChunkKey>) {
        let Some(space) = self.spaces.get(&id) else { return };
        let keys = space.order.values().map(|index| ChunkKey { namespace: id, index: *index });
        let oldest: Vec<ChunkKey> =
            keys.filter(|key| !self.is_putting(key)).take(most - going.len().min(most)).collect();
        for key in oldest {
            // Entries without bytes go last, and only when nothing is to be kept.
            if self.bytes(id) <= keep_bytes && keep_bytes > 0 {
                break;
            }
            self.send_away(key, why, going);
        }
    }

    fn collect_expired(&mut self, id: u64, most: usize, now_ms: u64, going: &mut Vec<ChunkKey>) {
        let Some(space) = self.spaces.get_mut(&id) else { return };
        let ttl_ms = space.settings.ttl_ms;
        let pause_ms = (ttl_ms / SWEEPS_PER_TTL).max(SWEEP_MS_MIN);
        if ttl_ms == 0 || now_ms < space.swept_ms.saturating_add(pause_ms) {
            return;
        }
        let old = space.items.iter().filter(|(_, item)| expired(ttl_ms, item.stored.put_ms, now_ms));
        let keys: Vec<ChunkKey> = old.map(|(index, _)| ChunkKey { namespace: id, index: *index }).collect();
        let before = going.len();
        for key in &keys {
            if going.len() < most && !self.is_putting(key) {
                self.send_away(*key, Eviction::Expired, going);
            }
        }
        // With some left over, the next call looks again.
        if going.len() - before == keys.len()
            && let Some(space) = self.spaces.get_mut(&id)
        {
            space.swept_ms = now_ms;
        }
    }
}

impl Space {
    fn has_limits(&self) -> bool {
        self.settings.ttl_ms != 0 || self.settings.share_bytes != 0
    }
}

fn expired(ttl_ms: u64, put_ms: u64, now_ms: u64) -> bool {
    ttl_ms != 0 && now_ms.saturating_sub(put_ms) >= ttl_ms
}
