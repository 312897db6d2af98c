//! The node's part of the key-value cache: the index of `fs3-kv` and the memory that it lives in.

use std::time::Duration;

use fs3_core::{BufferPool, Region, RegionMut};
use fs3_kv::{Cache, Limits, Value};
use fs3_rt::monotonic_ns;
use parking_lot::Mutex;

/// Bytes that payloads on their way may hold beside the cache's own.
const PAYLOAD_BYTES_MAX: usize = 64 << 20;
/// How often entries are looked at whose time may be over.
pub(crate) const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// Entries looked at in one go.
const SWEEP_STEPS: u32 = 4096;
/// Goes of one sweep; the rest comes with the next one.
const SWEEP_ROUNDS: u32 = 16;
/// Memory of the pool comes in powers of two from here on.
const PAGE_BYTES: usize = 4096;
/// A value gets such memory if this part of it (1/8) is left over at most, else exactly what it needs.
const SPARE_PARTS: usize = 8;
/// From this size on a value keeps the memory it came in, whatever is left over.
const COPY_BYTES_MAX: usize = 128 << 10;

/// What the pool takes for a value.
fn held_bytes(bytes: usize) -> usize {
    bytes.next_power_of_two().max(PAGE_BYTES)
}

/// Whether little of that is left over.
fn fits(bytes: usize) -> bool {
    held_bytes(bytes) - bytes <= held_bytes(bytes) / SPARE_PARTS
}

/// Entries of all targets of a node. Thread-safe. `None` of `cache`: the node keeps none.
pub(crate) struct KvStore {
    cache: Mutex<Cache>,
    pool: BufferPool,
    on: bool,
}

impl KvStore {
    /// `memory_bytes`: how much it may keep; 0: nothing.
    pub fn new(memory_bytes: u64) -> Self {
        let pool_bytes = usize::try_from(memory_bytes).unwrap_or(usize::MAX).saturating_add(PAYLOAD_BYTES_MAX);
        let cache = Mutex::new(Cache::new(Limits { memory_bytes }));
        Self { cache, pool: BufferPool::new(pool_bytes), on: memory_bytes > 0 }
    }

    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Work with the index. What it lets go is given back after the lock.
    pub fn with<T>(&self, work: impl FnOnce(&mut Cache, u64) -> T) -> T {
        let now_ms = monotonic_ns() / 1_000_000;
        let (result, gone) = {
            let mut cache = self.cache.lock();
            let result = work(&mut cache, now_ms);
            (result, cache.take_gone())
        };
        drop(gone);
        result
    }

    /// Memory for the payload of a put: recycled, so that of entries that went. When other sizes hold all of it, some of
    /// the oldest entries go.
    pub fn payload_buffer(&self, bytes: usize) -> Option<RegionMut> {
        self.pool.get(bytes).or_else(|| {
            self.with(|cache, now_ms| cache.evict_memory((bytes as u64).max(PAYLOAD_BYTES_MAX as u64 / 8), now_ms));
            self.pool.get(bytes)
        })
    }

    /// Memory for several values to be kept in it; `None` when some would better be kept elsewhere, or there is not enough.
    pub fn parts(&self, lengths: impl Iterator<Item = usize>) -> Option<Vec<RegionMut>> {
        lengths.map(|bytes| if fits(bytes) { self.payload_buffer(bytes) } else { None }).collect()
    }

    /// A value to keep: in the memory it came in, if nobody else uses that (`alone`) and little of it is left over; else
    /// in other memory.
    pub fn value(&self, data: Region, crcs: bytes::Bytes, alone: bool) -> Value {
        let (held, fits) = (held_bytes(data.len()), fits(data.len()));
        if alone && (fits || data.len() >= COPY_BYTES_MAX) {
            return Value { data, crcs, held_bytes: held as u64 };
        }
        if let Some(mut room) = fits.then(|| self.pool.get(data.len())).flatten() {
            fs3_core::copy(&mut room, &data);
            return Value { data: room.freeze(), crcs, held_bytes: held as u64 };
        }
        let data = Region::from_vec(data.to_vec());
        Value { held_bytes: data.len() as u64, data, crcs }
    }

    /// Forget entries whose time is over.
    pub fn sweep(&self) {
        for _ in 0..SWEEP_ROUNDS {
            self.with(|cache, now_ms| cache.sweep(SWEEP_STEPS, now_ms));
        }
    }

    /// Counters for the status.
    pub fn counters(&self) -> Vec<(String, u64)> {
        let stats = self.cache.lock().stats();
        let sums = stats.sums.all().into_iter().map(|(name, n)| (format!("kv_{name}"), n));
        sums.chain([("kv_memory_bytes".into(), stats.memory_bytes), ("kv_namespaces".into(), stats.namespaces)])
            .collect()
    }
}
