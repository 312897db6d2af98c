//! What a mount did: counts and latencies by kind of operation.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::{Map, Value, json};

use crate::core::Core;

macro_rules! operations {
    ($($kind:ident = $name:literal,)*) => {
        /// A kind of request of the kernel.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Op { $($kind,)* }

        const NAMES: &[&str] = &[$($name,)*];
    };
}

operations! {
    Lookup = "lookup",
    Getattr = "getattr",
    Setattr = "setattr",
    Readlink = "readlink",
    Mknod = "mknod",
    Mkdir = "mkdir",
    Unlink = "unlink",
    Rmdir = "rmdir",
    Symlink = "symlink",
    Rename = "rename",
    Link = "link",
    Open = "open",
    Create = "create",
    Read = "read",
    Write = "write",
    Flush = "flush",
    Release = "release",
    Fsync = "fsync",
    Readdir = "readdir",
    Statfs = "statfs",
    Lseek = "lseek",
    Lock = "lock",
    Setxattr = "setxattr",
    Getxattr = "getxattr",
    Listxattr = "listxattr",
    Removexattr = "removexattr",
    CopyFileRange = "copy_file_range",
    Fallocate = "fallocate",
    // Several I/Os of a ring that were served together count as one.
    RingRead = "ring_read",
    RingWrite = "ring_write",
}

#[derive(Default)]
struct Counter {
    count: AtomicU64,
    total_ns: AtomicU64,
    max_ns: AtomicU64,
}

impl Counter {
    fn add(&self, ns: u64) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.total_ns.fetch_add(ns, Ordering::Relaxed);
        if self.max_ns.load(Ordering::Relaxed) < ns {
            self.max_ns.fetch_max(ns, Ordering::Relaxed);
        }
    }
}

/// Counters of one mount. Relaxed: a snapshot may be a few operations apart from itself.
pub(crate) struct Stats {
    since: Instant,
    operations: Vec<Counter>,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    cache_hits: AtomicU64,
    cache_misses: AtomicU64,
}

/// An operation under way; it counts when this is dropped.
pub(crate) struct Timing {
    stats: Arc<Stats>,
    op: Op,
    since: Instant,
}

impl Drop for Timing {
    fn drop(&mut self) {
        let ns = u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.stats.operations[self.op as usize].add(ns);
    }
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            operations: NAMES.iter().map(|_| Counter::default()).collect(),
            bytes_read: AtomicU64::default(),
            bytes_written: AtomicU64::default(),
            cache_hits: AtomicU64::default(),
            cache_misses: AtomicU64::default(),
        }
    }
}

impl Stats {
    pub fn begin(self: &Arc<Self>, op: Op) -> Timing {
        Timing { stats: self.clone(), op, since: Instant::now() }
    }

    /// Bytes that a program has read from the daemon.
    pub fn read(&self, bytes: usize) {
        self.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes that the daemon has taken from a program.
    pub fn written(&self, bytes: usize) {
        self.bytes_written.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// A read found its data, or a block of it, in the daemon's memory, or on its way there.
    pub fn cached(&self, hit: bool) {
        let counter = if hit { &self.cache_hits } else { &self.cache_misses };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn operations(&self) -> Value {
        let seconds = |ns: &AtomicU64| ns.load(Ordering::Relaxed) as f64 / 1e9;
        let used = NAMES.iter().zip(&self.operations).filter(|(_, c)| c.count.load(Ordering::Relaxed) > 0);
        let entry = |c: &Counter| {
            let count = c.count.load(Ordering::Relaxed);
            json!({"count": count, "total_s": seconds(&c.total_ns), "max_s": seconds(&c.max_ns)})
        };
        Value::Object(used.map(|(name, c)| ((*name).to_owned(), entry(c))).collect::<Map<_, _>>())
    }
}

impl Core {
    /// Everything that is counted, as a JSON object.
    pub fn snapshot(&self) -> Value {
        let (stats, client) = (&self.stats, self.client.stats());
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (files, directories) = self.open_counts();
        let mut all = json!({
            "mountpoint": String::from_utf8_lossy(&self.mountpoint),
            "uptime_s": stats.since.elapsed().as_secs_f64(),
            "operations": stats.operations(),
            "bytes_read": load(&stats.bytes_read),
            "bytes_written": load(&stats.bytes_written),
            "cache_hits": load(&stats.cache_hits),
            "cache_misses": load(&stats.cache_misses),
            "read_buffer_bytes": self.io.read_pool.used(),
            "write_buffer_bytes": self.io.write_pool.used(),
            "max_memory_bytes": self.io.read_pool.budget() + self.io.write_pool.budget(),
            "open_files": files,
            "open_directories": directories,
            "checksum_failures": client.checksum_failures,
            "read_failovers": client.read_failovers,
            "read_hedges": client.read_hedges,
            "read_hedges_won": client.read_hedges_won,
            "write_retries": client.write_retries,
            "payload_resends": client.payload_resends,
        });
        for (name, count) in self.client.shared_memory_counters() {
            all[name] = count.into();
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_counts_once_when_it_ends() {
        let stats = Arc::new(Stats::default());
        let timing = stats.begin(Op::Fallocate);
        assert_eq!(stats.operations(), json!({}));
        drop(timing);
        drop(stats.begin(Op::Fallocate));
        let counted = stats.operations();
        assert_eq!(counted["fallocate"]["count"], 2);
        let (total, most) = (&counted["fallocate"]["total_s"], &counted["fallocate"]["max_s"]);
        assert!(total.as_f64() >= most.as_f64() && most.as_f64() > Some(0.0));
        assert_eq!(counted.as_object().unwrap().len(), 1);
        assert_eq!((NAMES[Op::Lookup as usize], NAMES.last()), ("lookup", Some(&"ring_write")));
    }
}
