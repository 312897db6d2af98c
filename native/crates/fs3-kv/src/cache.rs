//! The cache itself.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::slots::{Ends, NONE, Order, Slots};
use crate::types::{
    CacheStats, Done, Entry, Found, Key, Limits, Listed, Listing, Namespace, NamespaceStats, Put, PutId, Refused, Value,
};
use crate::writers::Writers;

/// When a limit is passed, this part of it is freed at once (in 1/64), so that not every put has to evict.
const SLACK_PARTS: u64 = 64;
/// Entries that one put evicts at most, which takes some milliseconds; what is left over goes with the next ones.
const EVICTED_AT_ONCE_MAX: usize = 16_384;

/// Namespaces that are known; beyond it the counters of those without entries are forgotten.
const NAMESPACES_MAX: usize = 16_384;

/// Addresses are hashes already.
#[derive(Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("only addresses are hashed")
    }
    fn write_u128(&mut self, address: u128) {
        self.0 = address as u64;
    }
}

type Index = HashMap<u128, u32, BuildHasherDefault<AddressHasher>>;

/// One target's entries.
#[derive(Default)]
struct Target {
    epoch: u64,
    index: Index,
}

/// One namespace's entries.
#[derive(Default)]
struct Space {
    settings: Namespace,
    order: Ends,
    stats: NamespaceStats,
    /// Entries on each target; as many times counts the share.
    targets: HashMap<u64, u64>,
}

impl Space {
    fn limit_bytes(&self) -> u64 {
        match self.settings.share_bytes {
            0 => u64::MAX,
            share => share.saturating_mul(self.targets.len().max(1) as u64),
        }
    }
}

/// Why an entry goes.
#[derive(Clone, Copy)]
enum Why {
    Replaced,
    Removed,
    Capacity,
    Memory,
    Asked,
    Expired,
    Collision,
    Lost,
}

/// All entries of a node. What goes is put on a list that the caller drops when it holds no lock any more.
pub struct Cache {
    limits: Limits,
    slots: Slots,
    order: Ends,
    targets: HashMap<u64, Target>,
    spaces: HashMap<u64, Space>,
    writers: Writers,
    memory_bytes: u64,
    /// Where the search for expired entries goes on.
    sweep_at: u32,
    gone: Vec<Value>,
}

impl Cache {
    /// An empty cache.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            slots: Slots::default(),
            order: Ends::default(),
            targets: HashMap::new(),
            spaces: HashMap::new(),
            writers: Writers::default(),
            memory_bytes: 0,
            sweep_at: 0,
            gone: Vec::new(),
        }
    }

    /// How much it may keep.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Values that are not part of the cache any more, to be dropped without its lock.
    pub fn take_gone(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.gone)
    }

    /// Changes whenever the target forgets everything. To be read before a put is admitted.
    pub fn epoch(&self, target: u64) -> u64 {
        self.targets.get(&target).map_or(0, |target| target.epoch)
    }

    /// Keep a value. It replaces what was there, also another key of the same address.
    ///
    /// # Errors
    /// Why it is not kept.
    pub fn put(&mut self, put: Put<'_>, now_ms: u64) -> Result<Done, Refused> {
        let Put { key, namespace, epoch, id, total, value } = put;
        if self.epoch(key.target) != epoch {
            return Err(Refused::Moved);
        }
        if self.writers.is_late(id, key.address) {
            return Err(Refused::Late);
        }
        let bytes = value.data.len() as u64;
        if let Some(at) = self.find(key.target, key.address) {
            let there = self.slots.entry(at);
            let same = there.is(&key);
            if same && there.id.writer == id.writer && there.id.sequence >= id.sequence {
                return Ok(Done::Superseded);
            }
            self.drop_entry(at, if same { Why::Replaced } else { Why::Collision }, now_ms);
        }
        let entry = Entry {
            target: key.target,
            namespace: namespace.id,
            address: key.address,
            key: key.key.into(),
            piece: key.piece,
            value,
            total,
            id,
            put_ms: now_ms,
            used_ms: now_ms,
        };
        let space = self.settings(namespace);
        let share = space.settings.share_bytes;
        if entry.held_bytes() > self.limits.memory_bytes || (share != 0 && bytes > share) {
            // What it was to replace has gone.
            self.writers.gone(id, key.address, now_ms);
            self.gone.push(entry.value);
            return Err(Refused::TooLarge);
        }
        self.insert(entry);
        self.trim(namespace.id, EVICTED_AT_ONCE_MAX, now_ms);
        Ok(Done::Applied)
    }

    /// Look a value up; it counts as used. `count`: as a hit or a miss.
    pub fn get(&mut self, key: &Key<'_>, count: bool, now_ms: u64) -> Option<Found> {
        let found = self.live(key, now_ms).map(|at| {
            self.touch(at, now_ms);
            let entry = self.slots.entry(at);
            Found { value: entry.value.clone(), total: entry.total, id: entry.id }
        });
        if count {
            let stats = &mut self.space(key.namespace).stats;
            *(if found.is_some() { &mut stats.hits } else { &mut stats.misses }) += 1;
        }
        found
    }

    /// Forget a value; its length if it was there. Earlier puts of this client have no effect afterwards.
    pub fn remove(&mut self, key: &Key<'_>, id: PutId, now_ms: u64) -> Option<u64> {
        self.writers.gone(id, key.address, now_ms);
        let at = self.live(key, now_ms)?;
        let entry = self.slots.entry(at);
        if entry.id.writer == id.writer && entry.id.sequence > id.sequence {
            return None;
        }
        let total = entry.total;
        self.drop_entry(at, Why::Removed, now_ms);
        Some(total)
    }

    /// The target does not serve any more: forget all that it has, and refuse puts that were admitted before.
    pub fn clear_target(&mut self, target: u64, now_ms: u64) {
        let known = self.targets.entry(target).or_default();
        known.epoch += 1;
        let all: Vec<u32> = known.index.values().copied().collect();
        for at in all {
            self.drop_entry(at, Why::Lost, now_ms);
        }
        self.targets.entry(target).or_default().index = Index::default();
    }

    /// Forget entries whose time is over, among the next `steps`.
    pub fn sweep(&mut self, steps: u32, now_ms: u64) {
        for _ in 0..steps.min(self.slots.end()) {
            let at = if self.sweep_at < self.slots.end() { self.sweep_at } else { 0 };
            self.sweep_at = at + 1;
            let Some(entry) = self.slots.get(at) else { continue };
            let ttl_ms = self.spaces.get(&entry.namespace).map_or(0, |space| space.settings.ttl_ms);
            if entry.expired(ttl_ms, now_ms) {
                self.drop_entry(at, Why::Expired, now_ms);
            }
        }
    }

    /// Forget what was used the longest ago, of all namespaces, until `bytes` of memory have become free.
    pub fn evict_memory(&mut self, bytes: u64, now_ms: u64) {
        let target = self.memory_bytes.saturating_sub(bytes);
        while self.memory_bytes > target && self.order.oldest != NONE {
            self.drop_entry(self.order.oldest, Why::Memory, now_ms);
        }
    }

    /// Take over settings of a namespace, and make it fit them.
    pub fn configure(&mut self, namespace: Namespace, now_ms: u64) {
        self.settings(namespace);
        self.trim(namespace.id, usize::MAX, now_ms);
    }

    /// Forget what was used the longest ago of a namespace until it holds `keep_bytes`: entries and bytes that went.
    pub fn evict(&mut self, namespace: u64, keep_bytes: u64, now_ms: u64) -> (u64, u64) {
        let (mut entries, mut bytes) = (0, 0);
        while let Some(space) = self.spaces.get(&namespace) {
            // Entries without bytes go last, and only when nothing is to be kept.
            let enough = space.stats.bytes <= keep_bytes && (keep_bytes > 0 || space.stats.entries == 0);
            if enough || space.order.oldest == NONE {
                break;
            }
            let oldest = space.order.oldest;
            entries += 1;
            bytes += self.slots.entry(oldest).value.data.len() as u64;
            self.drop_entry(oldest, Why::Asked, now_ms);
        }
        (entries, bytes)
    }

    /// Values of a namespace whose keys begin with `prefix`, `limit` at most, from place `after` on.
    pub fn list(&self, namespace: u64, prefix: &[u8], after: u64, limit: usize, now_ms: u64) -> Listing {
        let mut listing = Listing::default();
        let ttl_ms = self.spaces.get(&namespace).map_or(0, |space| space.settings.ttl_ms);
        for at in u32::try_from(after).unwrap_or(NONE)..self.slots.end() {
            if listing.entries.len() == limit {
                listing.next = Some(u64::from(at));
                break;
            }
            let Some(entry) = self.slots.get(at) else { continue };
            let wanted = entry.namespace == namespace && entry.piece == 0 && entry.key.starts_with(prefix);
            if wanted && !entry.expired(ttl_ms, now_ms) {
                listing.entries.push(Listed {
                    key: entry.key.clone(),
                    total: entry.total,
                    age_ms: now_ms.saturating_sub(entry.put_ms),
                    idle_ms: now_ms.saturating_sub(entry.used_ms),
                });
            }
        }
        listing
    }

    /// Counters of a namespace.
    pub fn namespace_stats(&self, namespace: u64) -> NamespaceStats {
        self.spaces.get(&namespace).map(|space| space.stats).unwrap_or_default()
    }

    /// Counters of the node.
    pub fn stats(&self) -> CacheStats {
        let mut sums = NamespaceStats::default();
        for space in self.spaces.values() {
            sums.add(&space.stats);
        }
        CacheStats { sums, memory_bytes: self.memory_bytes, namespaces: self.spaces.len() as u64 }
    }

    fn find(&self, target: u64, address: u128) -> Option<u32> {
        self.targets.get(&target)?.index.get(&address).copied()
    }

    /// The entry of this very key, unless its time is over.
    fn live(&mut self, key: &Key<'_>, now_ms: u64) -> Option<u32> {
        let at = self.find(key.target, key.address)?;
        let entry = self.slots.entry(at);
        if !entry.is(key) {
            return None;
        }
        let ttl_ms = self.spaces.get(&key.namespace).map_or(0, |space| space.settings.ttl_ms);
        if entry.expired(ttl_ms, now_ms) {
            self.drop_entry(at, Why::Expired, now_ms);
            return None;
        }
        Some(at)
    }

    fn space(&mut self, namespace: u64) -> &mut Space {
        if self.spaces.len() >= NAMESPACES_MAX && !self.spaces.contains_key(&namespace) {
            self.spaces.retain(|_, space| space.stats.entries > 0);
        }
        self.spaces.entry(namespace).or_default()
    }

    /// The namespace, with the newest settings.
    fn settings(&mut self, namespace: Namespace) -> &mut Space {
        let space = self.space(namespace.id);
        if namespace.generation >= space.settings.generation {
            space.settings = namespace;
        }
        space
    }

    fn insert(&mut self, entry: Entry) {
        let (target, address, held) = (entry.target, entry.address, entry.held_bytes());
        let (namespace, bytes) = (entry.namespace, entry.value.data.len() as u64);
        // More entries than numbers would take 1 TiB for the index alone.
        let Some(at) = self.slots.insert(entry) else { return };
        self.memory_bytes += held;
        self.targets.entry(target).or_default().index.insert(address, at);
        self.slots.append(Order::Node, &mut self.order, at);
        let space = self.spaces.entry(namespace).or_default();
        self.slots.append(Order::Namespace, &mut space.order, at);
        *space.targets.entry(target).or_default() += 1;
        space.stats.puts += 1;
        space.stats.entries += 1;
        space.stats.bytes += bytes;
    }

    fn touch(&mut self, at: u32, now_ms: u64) {
        let entry = self.slots.entry_mut(at);
        entry.used_ms = now_ms;
        let namespace = entry.namespace;
        self.slots.unlink(Order::Node, &mut self.order, at);
        self.slots.append(Order::Node, &mut self.order, at);
        if let Some(space) = self.spaces.get_mut(&namespace) {
            self.slots.unlink(Order::Namespace, &mut space.order, at);
            self.slots.append(Order::Namespace, &mut space.order, at);
        }
    }

    fn drop_entry(&mut self, at: u32, why: Why, now_ms: u64) {
        self.slots.unlink(Order::Node, &mut self.order, at);
        let namespace = self.slots.entry(at).namespace;
        let space = self.spaces.get_mut(&namespace).expect("an entry has its namespace");
        self.slots.unlink(Order::Namespace, &mut space.order, at);
        let entry = self.slots.take(at);
        space.stats.count(why);
        space.stats.entries -= 1;
        space.stats.bytes -= entry.value.data.len() as u64;
        let left = space.targets.entry(entry.target).or_default();
        *left -= 1;
        // A target that only has nothing to hold now still counts.
        if *left == 0 && matches!(why, Why::Lost) {
            space.targets.remove(&entry.target);
        }
        self.memory_bytes -= entry.held_bytes();
        if let Some(target) = self.targets.get_mut(&entry.target) {
            target.index.remove(&entry.address);
        }
        self.writers.gone(entry.id, entry.address, now_ms);
        self.gone.push(entry.value);
    }

    /// Bring the namespace and the node below their limits; the newest entry stays in any case.
    fn trim(&mut self, namespace: u64, entries_max: usize, now_ms: u64) {
        let mut left = entries_max;
        let limit = self.spaces[&namespace].limit_bytes();
        if self.spaces[&namespace].stats.bytes > limit {
            let low = limit - limit / SLACK_PARTS;
            while left > 0 {
                let space = &self.spaces[&namespace];
                if space.stats.bytes <= low || space.order.oldest == space.order.newest {
                    break;
                }
                self.drop_entry(space.order.oldest, Why::Capacity, now_ms);
                left -= 1;
            }
        }
        let limit = self.limits.memory_bytes;
        if self.memory_bytes > limit {
            let low = limit - limit / SLACK_PARTS;
            while left > 0 && self.memory_bytes > low && self.order.oldest != self.order.newest {
                self.drop_entry(self.order.oldest, Why::Memory, now_ms);
                left -= 1;
            }
        }
    }
}

impl NamespaceStats {
    fn count(&mut self, why: Why) {
        let counter = match why {
            Why::Replaced => return,
            Why::Removed => &mut self.removed,
            Why::Capacity => &mut self.evicted_capacity,
            Why::Memory => &mut self.evicted_memory,
            Why::Asked => &mut self.evicted_asked,
            Why::Expired => &mut self.expired,
            Why::Collision => &mut self.collisions,
            Why::Lost => &mut self.lost,
        };
        *counter += 1;
    }
}
