//! Entries of the key-value cache that are chunks: the head of a chain looks after those of its chain. It knows from puts
//! and gets which were used, and removes through the chain what has to go.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use fs3_chain::{Kind, Origin, Outcome, Role};
use fs3_core::{ChunkId, Code, Error, KV_HEADER_BYTES_MAX, KV_SPACE, Result};
use fs3_io::ChunkMeta;
use fs3_kv::{ChunkIndex, ChunkKey, Stored, Turn};
use fs3_rt::{Instant, JoinSet};
use parking_lot::Mutex;

use crate::content::{Body, Job};
use crate::core::{Core, Slot};
use crate::target::Target;

/// How often ages and free space are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Of each disk so much is kept free as long as there are entries that can go: this part of it, and at most so many bytes.
const FREE_PARTS: u64 = 50;
const FREE_BYTES_MAX: u64 = 4 << 30;
/// Entries that one target removes at a time, and takes out of the index in one go.
const REMOVALS_IN_FLIGHT_MAX: usize = 32;
const GOING_MAX: usize = 256;
/// Disk space that is freed at once for somebody who finds none, and how often for one update.
const ROOM_BYTES: u64 = 64 << 20;
const ROOM_ROUNDS_MAX: u32 = 4;
/// How long one removal may take.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a put looks whether the removal of its entry is over.
const TURN_POLL: Duration = Duration::from_millis(2);
/// Entries taken into the index in one go.
const LOAD_CHUNKS: usize = 1024;
/// The smallest piece of disk space.
const BLOCK_BYTES_MIN: u32 = 64 << 10;

/// What a target knows of its chain's entries, as long as it is the head.
#[derive(Default)]
pub(crate) struct KvChunks {
    index: Mutex<ChunkIndex>,
    evicting: AtomicBool,
    /// The index has been filled since this target became the head, or is being filled.
    loaded: AtomicBool,
}

impl KvChunks {
    pub fn with<T>(&self, work: impl FnOnce(&mut ChunkIndex, u64) -> T) -> T {
        work(&mut self.index.lock(), wall_ms())
    }
}

pub(crate) fn wall_ms() -> u64 {
    u64::try_from(fs3_rt::wall_ns() / 1_000_000).unwrap_or_default()
}

/// When an entry was put, by the clock of the head at the time.
pub(crate) fn put_ms(meta: &ChunkMeta) -> u64 {
    meta.writers.iter().map(|writer| writer.time_ms).max().and_then(|ms| u64::try_from(ms).ok()).unwrap_or_default()
}

/// Disk space of a chunk of so many bytes.
pub(crate) fn held_bytes(chunk_length: u32) -> u64 {
    u64::from(chunk_length.max(BLOCK_BYTES_MIN).next_power_of_two())
}

fn chunk_of(key: ChunkKey) -> ChunkId {
    ChunkId { space: KV_SPACE, inode: key.namespace, index: key.index }
}

/// A put that has begun: its entry is not evicted until it is over, also when nobody waits for it any more.
pub(crate) struct PutTurn {
    target: Arc<Target>,
    key: ChunkKey,
    over: bool,
}

impl PutTurn {
    /// It is over. `stored`: what it left; `None`: nothing. Whether the namespace is beyond its share now.
    pub fn end(mut self, stored: Option<Stored>) -> bool {
        self.over = true;
        self.target.kv.with(|index, _| index.end_put(self.key, stored))
    }
}

impl Drop for PutTurn {
    fn drop(&mut self) {
        if !self.over {
            self.target.kv.with(|index, _| index.end_put(self.key, None));
        }
    }
}

impl Target {
    /// Whether this is the head of its chain now.
    pub fn is_head(&self) -> bool {
        let view = self.view();
        view.head && view.role == Role::Serving
    }

    /// The chain has changed.
    pub fn reroute_kv(self: &Arc<Self>) {
        if !self.is_head() {
            self.kv.loaded.store(false, Ordering::Release);
            self.kv.with(|index, _| index.clear());
        } else if !self.kv.loaded.swap(true, Ordering::AcqRel) {
            self.core.spawn(self.clone().load_kv());
        }
    }

    /// Find the entries that there are on the disk.
    async fn load_kv(self: Arc<Self>) {
        let mut after = ChunkId { space: KV_SPACE - 1, inode: u64::MAX, index: u32::MAX };
        loop {
            let page = self.store.list(Some(after), LOAD_CHUNKS);
            let full = page.len() == LOAD_CHUNKS;
            for (id, meta) in page {
                if id.space != KV_SPACE || !self.is_head() {
                    return;
                }
                after = id;
                let version = meta.committed.as_ref().filter(|v| !v.removed).or(meta.pending.as_ref());
                let Some(length) = version.filter(|v| !v.removed).map(|v| v.length) else { continue };
                let bytes = u64::from(length).saturating_sub(KV_HEADER_BYTES_MAX as u64 / 2);
                let stored = Stored { bytes, held_bytes: held_bytes(length), put_ms: put_ms(&meta) };
                self.kv.with(|index, _| index.load(ChunkKey { namespace: id.inode, index: id.index }, stored));
            }
            if !full {
                return;
            }
            fs3_rt::yield_now().await;
        }
    }

    /// Wait for the turn of a put.
    ///
    /// # Errors
    /// `NotFound` when the namespace was removed.
    pub async fn begin_kv_put(self: &Arc<Self>, key: ChunkKey, deadline: Instant) -> Result<PutTurn> {
        loop {
            match self.kv.with(|index, _| index.begin_put(key)) {
                Turn::Go => return Ok(PutTurn { target: self.clone(), key, over: false }),
                Turn::Ended => return Err(Error::new(Code::NotFound, "the namespace was removed")),
                Turn::Wait if Instant::now() >= deadline => {
                    return Err(self.error(Code::Timeout, "an old entry is still being removed".into()));
                }
                Turn::Wait => fs3_rt::sleep(TURN_POLL).await,
            }
        }
    }

    /// The directory of a namespace was removed: no put of it is under way afterwards, nor begins.
    pub async fn end_kv(&self, namespace: u64, deadline: Instant) -> Result<()> {
        while !self.kv.with(|index, _| index.end(namespace)) {
            if Instant::now() >= deadline {
                return Err(self.error(Code::Timeout, "puts into the namespace are still under way".into()));
            }
            fs3_rt::sleep(TURN_POLL).await;
        }
        Ok(())
    }

    /// Remove what is beyond the limits, unless that is being done.
    pub fn evict_kv_surplus(self: &Arc<Self>) {
        if self.kv.evicting.swap(true, Ordering::AcqRel) {
            return;
        }
        let this = self.clone();
        self.core.spawn(async move {
            loop {
                let going = this.kv.with(|index, now_ms| index.surplus(GOING_MAX, now_ms));
                if going.is_empty() {
                    break;
                }
                this.remove_kv(going).await;
            }
            this.kv.evicting.store(false, Ordering::Release);
        });
    }

    /// Remove entries that the index has handed out; those that stay are found again later.
    pub async fn remove_kv(self: &Arc<Self>, going: Vec<ChunkKey>) {
        let (mut left, mut running) = (going.into_iter(), JoinSet::new());
        loop {
            while running.len() < REMOVALS_IN_FLIGHT_MAX
                && let Some(key) = left.next()
            {
                let this = self.clone();
                running.spawn(async move {
                    if let Err(error) = this.remove_kv_chunk(key).await {
                        tracing::debug!(target_id = this.id, "an entry of the cache was not removed: {error}");
                        this.restore_kv(key);
                    }
                });
            }
            if running.join_next().await.is_none() {
                return;
            }
        }
    }

    /// An update of a client. While a disk of the chain has no room for it, the longest unused entries of the chain go.
    pub async fn update_with_room(
        self: &Arc<Self>,
        job: impl Fn() -> Job,
        kind: Kind,
        chain_version: u64,
        deadline: Instant,
    ) -> Result<Outcome> {
        let mut rounds = 0;
        loop {
            match self.update(job(), kind, chain_version, Origin::Client, deadline).await {
                Err(error) if error.code == Code::NoSpace && rounds < ROOM_ROUNDS_MAX => {
                    let going = self.kv.with(|index, _| index.make_room(ROOM_BYTES, GOING_MAX));
                    if going.is_empty() {
                        return Err(error);
                    }
                    self.remove_kv(going).await;
                    rounds += 1;
                }
                done => return done,
            }
        }
    }

    async fn remove_kv_chunk(self: &Arc<Self>, key: ChunkKey) -> Result<()> {
        let job = Job { chunk: chunk_of(key), chunk_bytes: 0, body: Body::Remove, writer: None, durable: false };
        let (chain_version, deadline) = (self.view().chain_version, Instant::now() + REMOVAL_TIMEOUT);
        let result = self.update(job, Kind::Remove, chain_version, Origin::Client, deadline).await;
        self.kv.with(|index, _| index.gone(key));
        result.map(drop)
    }

    /// A removal failed: the entry may still be there.
    fn restore_kv(&self, key: ChunkKey) {
        let Some(meta) = self.store.chunk(chunk_of(key)).filter(|_| self.is_head()) else { return };
        if let Some(version) = meta.committed.as_ref().filter(|v| !v.removed) {
            let (bytes, put_ms) = (u64::from(version.length), put_ms(&meta));
            let stored = Stored { bytes, held_bytes: held_bytes(version.length), put_ms };
            self.kv.with(|index, _| index.load(key, stored));
        }
    }
}

impl Core {
    /// The targets of this node that are heads.
    pub fn heads(&self) -> Vec<Arc<Target>> {
        let open = |slot| if let Slot::Open(target) = slot { Some(target) } else { None };
        self.slots().into_values().filter_map(open).filter(|target| target.is_head()).collect()
    }

    /// Counters for the status.
    pub fn kv_chunk_counters(&self) -> Vec<(String, u64)> {
        let (mut sums, mut held) = (fs3_kv::NamespaceStats::default(), 0);
        for slot in self.slots().into_values() {
            if let Slot::Open(target) = slot {
                target.kv.with(|index, _| {
                    sums.add(&index.sums());
                    held += index.held_bytes();
                });
            }
        }
        let named = sums.all().into_iter().filter(|(name, _)| !matches!(*name, "collisions" | "lost"));
        let named = named.map(|(name, n)| {
            // What makes room for others is memory with the other kind, disk space with this one.
            (if name == "evicted_memory" { "kv_durable_evicted_space".into() } else { format!("kv_durable_{name}") }, n)
        });
        named.chain([("kv_durable_held_bytes".into(), held)]).collect()
    }

    /// Remove entries whose time is over, and the longest unused where a disk gets short of space.
    async fn look_after_kv(&self) {
        let heads = self.heads();
        if heads.iter().all(|target| target.kv.with(|index, _| index.is_empty())) {
            return;
        }
        for target in &heads {
            target.evict_kv_surplus();
        }
        for (target, bytes) in self.short_of_space(heads) {
            let going = target.kv.with(|index, _| index.make_room(bytes, GOING_MAX));
            if !going.is_empty() {
                tracing::info!(
                    target_id = target.id,
                    entries = going.len(),
                    "a disk gets full: entries of the cache go"
                );
                target.remove_kv(going).await;
            }
        }
    }

    /// Heads on disks with too little free space, each with what it is to free.
    fn short_of_space(&self, heads: Vec<Arc<Target>>) -> Vec<(Arc<Target>, u64)> {
        let mut missing: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
        let routing = self.routing();
        let disk_of = |id: u64| routing.own.iter().find(|(target, ..)| *target == id).map(|(.., disk)| disk.to_vec());
        for disk in self.disks.space() {
            let wanted = (disk.capacity_bytes / FREE_PARTS).min(FREE_BYTES_MAX);
            missing.insert(disk.uuid.to_vec(), wanted.saturating_sub(disk.free_bytes));
        }
        // Blocks that are free within the targets' files are as good as free.
        for slot in self.slots().into_values() {
            if let Slot::Open(target) = slot
                && let Some(missing) = disk_of(target.id).and_then(|disk| missing.get_mut(&disk))
            {
                let spare = target.store.disk_bytes().unwrap_or_default().saturating_sub(target.store.used_bytes());
                *missing = missing.saturating_sub(spare);
            }
        }
        let bytes = |target: &Arc<Target>| disk_of(target.id).and_then(|disk| missing.get(&disk).copied()).unwrap_or(0);
        heads.into_iter().map(|target| (bytes(&target), target)).filter(|(n, _)| *n > 0).map(|(n, t)| (t, n)).collect()
    }
}

/// As long as there is an engine.
pub(crate) async fn look_after(core: Weak<Core>) {
    loop {
        fs3_rt::sleep(LOOK_EVERY).await;
        match core.upgrade() {
            Some(core) => core.look_after_kv().await,
            None => return,
        }
    }
}
