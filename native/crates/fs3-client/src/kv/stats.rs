//! What one handle did.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets of a histogram: eight for each power of two of microseconds.
const BUCKETS: usize = 8 * 32;

/// Calls of one handle and how long they took. Thread-safe.
#[derive(Default)]
pub struct KvCalls {
    hits: AtomicU64,
    misses: AtomicU64,
    stored: AtomicU64,
    refused: AtomicU64,
    failures: AtomicU64,
    damaged: AtomicU64,
    get: Histogram,
    put: Histogram,
}

/// How long calls took.
#[derive(Clone, Copy, Debug, Default)]
pub struct KvLatency {
    /// Calls, of one key or many.
    pub calls: u64,
    /// Half of them were faster.
    pub p50: Duration,
    /// 99 of 100 were faster.
    pub p99: Duration,
}

impl KvCalls {
    pub(super) fn get(&self, hits: usize, misses: usize, took: Duration) {
        self.hits.fetch_add(hits as u64, Ordering::Relaxed);
        self.misses.fetch_add(misses as u64, Ordering::Relaxed);
        self.get.add(took);
    }

    pub(super) fn put(&self, count: usize, stored: usize, took: Duration) {
        self.stored.fetch_add(stored as u64, Ordering::Relaxed);
        self.refused.fetch_add((count - stored) as u64, Ordering::Relaxed);
        self.put.add(took);
    }

    /// An entry could not be asked for or told: a node did not answer, or does not serve.
    pub(super) fn failed(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// An entry came that does not match its checksums.
    pub(super) fn damaged(&self) {
        self.damaged.fetch_add(1, Ordering::Relaxed);
    }

    /// Counters by name: values found and not found, put and not stored, entries that failed or came damaged.
    pub fn counters(&self) -> [(&'static str, u64); 6] {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("hits", load(&self.hits)),
            ("misses", load(&self.misses)),
            ("stored", load(&self.stored)),
            ("not_stored", load(&self.refused)),
            ("failures", load(&self.failures)),
            ("damaged", load(&self.damaged)),
        ]
    }

    /// How long gets took.
    pub fn get_latency(&self) -> KvLatency {
        self.get.latency()
    }

    /// How long puts took.
    pub fn put_latency(&self) -> KvLatency {
        self.put.latency()
    }
}

struct Histogram([AtomicU64; BUCKETS]);

impl Default for Histogram {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; BUCKETS])
    }
}

impl Histogram {
    fn add(&self, took: Duration) {
        self.0[bucket(took)].fetch_add(1, Ordering::Relaxed);
    }

    fn latency(&self) -> KvLatency {
        let counts: Vec<u64> = self.0.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        let calls: u64 = counts.iter().sum();
        let at = |rank: u64| {
            let mut below = 0;
            counts.iter().position(|count| {
                below += count;
                below >= rank && below > 0
            })
        };
        let quantile = |part: f64| at((calls as f64 * part).ceil() as u64).map_or(Duration::ZERO, top);
        KvLatency { calls, p50: quantile(0.5), p99: quantile(0.99) }
    }
}

fn bucket(took: Duration) -> usize {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(8);
    let power = 63 - micros.leading_zeros();
    let part = (micros >> (power - 3)) & 7;
    (((power - 3) as usize) * 8 + part as usize).min(BUCKETS - 1)
}

/// Where a bucket ends.
fn top(bucket: usize) -> Duration {
    let (power, part) = (bucket / 8, bucket as u64 % 8);
    Duration::from_micros((8 + part + 1) << power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_an_eighth() {
        let histogram = Histogram::default();
        assert_eq!(histogram.latency().calls, 0);
        for micros in 1..=1000 {
            histogram.add(Duration::from_micros(micros));
        }
        let latency = histogram.latency();
        let within = |found: Duration, micros: u128| (micros..=micros * 9 / 8 + 1).contains(&found.as_micros());
        assert!(latency.calls == 1000 && within(latency.p50, 500) && within(latency.p99, 990), "{latency:?}");
        histogram.add(Duration::from_secs(1 << 40));
    }
}
