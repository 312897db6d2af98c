//! How fast disks answer this client: which replica to avoid for now, and when to ask a second one.
//!
//! Each disk has a smoothed latency with its mean deviation, learnt as TCP learns its retransmission timer (RFC 6298).
//! A disk that is clearly slower than the usual one is avoided and probed now and then. A read that takes longer than
//! nearly all others is sent to a second replica as well (hedged requests: Dean and Barroso, The Tail at Scale, CACM
//! 2013), for a bounded part of all reads.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fs3_rt::Instant;
use parking_lot::Mutex;

/// Operations of up to this many bytes are small.
const SMALL_BYTES_MAX: usize = 64 << 10;
/// Latencies of requests for more bytes in large operations are scaled down to it.
const LARGE_BYTES: usize = 1 << 20;
/// A disk is slow when its latency is over this many times the median of all disks, and over the margin.
const SLOW_FACTOR: f64 = 3.0;
/// See `SLOW_FACTOR`; microseconds.
const SLOW_MARGIN_US: f64 = 2_000.0;
/// A latency over this many times that bound counts as this: one stall alone makes no disk slow.
const OUTLIER_FACTOR: f64 = 4.0;
/// Samples of a disk before it can count as slow.
const SAMPLES_MIN: u32 = 2;
/// A slow disk is tried again after this many reads that avoided it and this time, or the longer time.
const PROBE_READS: u32 = 32;
/// See `PROBE_READS`.
const PROBE_AFTER: Duration = Duration::from_secs(1);
/// See `PROBE_READS`.
const PROBE_AT_LAST: Duration = Duration::from_secs(30);
/// Bounds of the time after which a read is hedged.
const HEDGE_AFTER_US: std::ops::RangeInclusive<f64> = 2_000.0..=1_000_000.0;
/// The same while too little is known.
const HEDGE_AFTER_UNKNOWN: Duration = Duration::from_millis(20);
/// Samples before the hedge delay follows them.
const HEDGE_SAMPLES_MIN: u32 = 16;
/// Hedges per read in the long run.
const HEDGE_SHARE: f64 = 0.05;
/// Hedges that may be made at once after a quiet time.
const HEDGE_BURST: f64 = 10.0;
/// Disks remembered at most; beyond it all is learnt anew.
const DISKS_MAX: usize = 4096;

/// Small and large reads have latencies of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    Small,
    Large,
}

impl Size {
    /// Of an operation of `bytes` bytes.
    pub fn of(bytes: usize) -> Self {
        if bytes <= SMALL_BYTES_MAX { Self::Small } else { Self::Large }
    }
}

/// What one request asks of a disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    size: Size,
    /// Its time in times of a request of the usual size.
    scale: f64,
}

impl Load {
    /// Of a request for `bytes` bytes in `operations` operations.
    pub fn of(bytes: usize, operations: usize) -> Self {
        let size = Size::of(bytes / operations.max(1));
        let scale = if size == Size::Large { (bytes as f64 / LARGE_BYTES as f64).max(1.0) } else { 1.0 };
        Self { size, scale }
    }
}

/// What this client knows of the latencies of disks. Thread-safe.
#[derive(Default)]
pub(crate) struct Latencies {
    state: Mutex<State>,
    /// Whether any disk is slow; spares the lock in good times.
    any_slow: AtomicBool,
}

/// Latencies of small reads are compared with those of small reads, of large ones with those of large ones.
#[derive(Default)]
struct State {
    sizes: [Disks; 2],
    /// Hedges made beyond those that reads have paid for.
    owed: f64,
}

struct Disks {
    disks: BTreeMap<u64, Disk>,
    /// Those that are not slow, together.
    usual: Estimate,
    /// Of the disks' means; looked for anew once per sample of each disk.
    median: f64,
    median_age: usize,
    slow: usize,
}

impl Default for Disks {
    fn default() -> Self {
        Self { disks: BTreeMap::new(), usual: Estimate::default(), median: f64::INFINITY, median_age: 0, slow: 0 }
    }
}

#[derive(Default)]
struct Disk {
    estimate: Estimate,
    /// Set while it is slow.
    avoided: Option<Avoided>,
}

/// Since when, and how often, a slow disk has not been asked.
struct Avoided {
    since: Instant,
    reads: u32,
}

/// Mean and mean deviation in microseconds.
#[derive(Clone, Copy, Default)]
struct Estimate {
    mean: f64,
    deviation: f64,
    samples: u32,
}

impl Estimate {
    fn learn(&mut self, sample: f64, weight: f64) {
        if self.samples == 0 {
            (self.mean, self.deviation) = (sample, sample / 2.0);
        } else {
            self.deviation += ((sample - self.mean).abs() - self.deviation) / 4.0;
            self.mean += (sample - self.mean) * weight;
        }
        self.samples = self.samples.saturating_add(1);
    }
}

impl Latencies {
    /// A request was answered by `disk` after `latency`.
    pub fn answered(&self, disk: u64, load: Load, latency: Duration, now: Instant) {
        let mut state = self.state.lock();
        state.owed = (state.owed - HEDGE_SHARE).max(0.0);
        self.learn(&mut state, disk, load, latency, now);
    }

    /// `disk` had not answered after `latency`, when nobody waited any longer: it would have taken more.
    pub fn unanswered(&self, disk: u64, load: Load, latency: Duration, now: Instant) {
        self.learn(&mut self.state.lock(), disk, load, latency * 2, now);
    }

    fn learn(&self, state: &mut State, disk: u64, load: Load, latency: Duration, now: Instant) {
        state.sizes[load.size as usize].learn(disk, latency.as_micros() as f64 / load.scale, now);
        self.any_slow.store(state.sizes.iter().any(|disks| disks.slow > 0), Ordering::Release);
    }

    /// Whether to read from another disk where there is a choice. Now and then a slow disk is not avoided, so that
    /// its recovery is noticed.
    pub fn avoid(&self, disk: u64, size: Size, now: Instant) -> bool {
        if !self.any_slow.load(Ordering::Acquire) {
            return false;
        }
        let mut state = self.state.lock();
        let disk = state.sizes[size as usize].disks.get_mut(&disk);
        let Some(avoided) = disk.and_then(|disk| disk.avoided.as_mut()) else { return false };
        let waited = now.saturating_duration_since(avoided.since);
        if waited >= PROBE_AT_LAST || (waited >= PROBE_AFTER && avoided.reads >= PROBE_READS) {
            *avoided = Avoided { since: now, reads: 0 };
            return false;
        }
        avoided.reads += 1;
        true
    }

    /// Whether `disk` is slow.
    pub fn is_slow(&self, disk: u64, size: Size) -> bool {
        let slow = |state: &State| state.sizes[size as usize].disks.get(&disk).is_some_and(|d| d.avoided.is_some());
        self.any_slow.load(Ordering::Acquire) && slow(&self.state.lock())
    }

    /// How long to wait for an answer before a second replica is asked: longer than nearly all answers take.
    pub fn hedge_after(&self, load: Load) -> Duration {
        let usual = self.state.lock().sizes[load.size as usize].usual;
        if usual.samples < HEDGE_SAMPLES_MIN {
            return HEDGE_AFTER_UNKNOWN.mul_f64(load.scale);
        }
        let after = (usual.mean + 4.0 * usual.deviation) * load.scale;
        Duration::from_micros(after.clamp(*HEDGE_AFTER_US.start(), *HEDGE_AFTER_US.end()) as u64)
    }

    /// Take one hedge from the budget, if it has one left.
    pub fn may_hedge(&self) -> bool {
        let mut state = self.state.lock();
        let enough = state.owed + 1.0 <= HEDGE_BURST;
        state.owed += f64::from(u8::from(enough));
        enough
    }
}

impl Disks {
    fn learn(&mut self, id: u64, sample: f64, now: Instant) {
        if self.disks.len() >= DISKS_MAX && !self.disks.contains_key(&id) {
            *self = Self::default();
        }
        let bound = SLOW_FACTOR * self.median + SLOW_MARGIN_US;
        let sample = sample.min(OUTLIER_FACTOR * bound);
        let disk = self.disks.entry(id).or_default();
        // Probes are rare: each counts for more, so that a few of them tell that the disk has recovered.
        disk.estimate.learn(sample, if disk.avoided.is_some() { 0.5 } else { 0.125 });
        if disk.avoided.is_none() {
            self.usual.learn(sample, 0.125);
        }
        self.median_age += 1;
        if self.median_age >= self.disks.len() {
            (self.median, self.median_age) = (self.find_median(), 0);
        }
        let Some(disk) = self.disks.get_mut(&id) else { return };
        let slow = disk.estimate.samples >= SAMPLES_MIN && disk.estimate.mean > bound;
        match (slow, disk.avoided.is_some()) {
            (true, false) => (disk.avoided, self.slow) = (Some(Avoided { since: now, reads: 0 }), self.slow + 1),
            (false, true) => (disk.avoided, self.slow) = (None, self.slow - 1),
            _ => {}
        }
    }

    /// The median of the disks' mean latencies, the lower one of two; a disk alone is never slow.
    fn find_median(&self) -> f64 {
        let mut means: Vec<f64> = self.disks.values().map(|disk| disk.estimate.mean).collect();
        let middle = means.len().saturating_sub(1) / 2;
        if means.len() < 2 { f64::INFINITY } else { *means.select_nth_unstable_by(middle, f64::total_cmp).1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Disks 1, 2, 3 answered some small reads; 3 took `third`.
    fn known(third: Duration, now: Instant) -> Latencies {
        let latencies = Latencies::default();
        for _ in 0..10 {
            latencies.answered(1, Load::of(4096, 1), MS / 10, now);
            latencies.answered(2, Load::of(4096, 1), MS / 5, now);
            latencies.answered(3, Load::of(4096, 1), third, now);
        }
        latencies
    }

    #[test]
    fn a_disk_that_is_clearly_slower_is_avoided_for_reads_of_that_size() {
        let now = Instant::now();
        let latencies = known(10 * MS, now);
        assert!(latencies.avoid(3, Size::Small, now) && latencies.is_slow(3, Size::Small));
        assert!(!latencies.avoid(3, Size::Large, now));
        assert!(!latencies.avoid(1, Size::Small, now) && !latencies.avoid(2, Size::Small, now));
    }

    #[test]
    fn a_disk_that_is_a_little_slower_is_used() {
        let now = Instant::now();
        let latencies = known(2 * MS, now);
        assert!(!latencies.avoid(3, Size::Small, now));
    }

    #[test]
    fn one_stall_makes_no_disk_slow() {
        let now = Instant::now();
        let latencies = known(MS / 10, now);
        latencies.answered(3, Load::of(4096, 1), 500 * MS, now);
        assert!(!latencies.is_slow(3, Size::Small));
    }

    #[test]
    fn disks_that_are_all_slow_are_used() {
        let (now, latencies) = (Instant::now(), Latencies::default());
        for disk in [1, 2, 3, 1, 2, 3, 1, 2, 3] {
            latencies.answered(disk, Load::of(4096, 1), 20 * MS, now);
        }
        assert!((1..=3).all(|disk| !latencies.avoid(disk, Size::Small, now)));
    }

    #[test]
    fn reads_that_nobody_waited_for_make_a_disk_slow() {
        let now = Instant::now();
        let latencies = known(MS / 10, now);
        for _ in 0..20 {
            latencies.unanswered(3, Load::of(4096, 1), 3 * MS, now);
        }
        assert!(latencies.is_slow(3, Size::Small));
    }

    #[test]
    fn a_slow_disk_is_probed_and_used_again_once_it_has_recovered() {
        let mut now = Instant::now();
        let latencies = known(10 * MS, now);
        let mut probes = 0;
        while latencies.is_slow(3, Size::Small) {
            now += PROBE_AFTER / 50;
            if !latencies.avoid(3, Size::Small, now) {
                probes += 1;
                latencies.answered(3, Load::of(4096, 1), MS / 5, now);
            }
            assert!(probes < 10, "the disk was never found well");
        }
        assert!((2..=5).contains(&probes), "{probes} probes");
    }

    #[test]
    fn probes_are_rare_even_for_a_client_that_reads_seldom() {
        let mut now = Instant::now();
        let latencies = known(10 * MS, now);
        let mut probes = 0;
        for _ in 0..60 {
            now += PROBE_AFTER;
            probes += u32::from(!latencies.avoid(3, Size::Small, now));
        }
        assert_eq!(probes, 2);
    }

    #[test]
    fn a_read_is_hedged_after_nearly_all_answers_would_have_come() {
        let (now, latencies) = (Instant::now(), Latencies::default());
        assert_eq!(latencies.hedge_after(Load::of(4096, 1)), HEDGE_AFTER_UNKNOWN);
        for latency in [4, 6].repeat(50) {
            latencies.answered(1, Load::of(4096, 1), latency * MS, now);
        }
        let after = latencies.hedge_after(Load::of(4096, 1));
        assert!((7 * MS..12 * MS).contains(&after), "{after:?}");
        assert_eq!(latencies.hedge_after(Load::of(1 << 20, 256)), after, "small operations are done side by side");
        assert_eq!(latencies.hedge_after(Load::of(LARGE_BYTES, 1)), HEDGE_AFTER_UNKNOWN);
    }

    #[test]
    fn hedges_are_a_bounded_part_of_all_reads() {
        let (now, latencies) = (Instant::now(), Latencies::default());
        let mut hedges = 0;
        for _ in 0..1000 {
            latencies.answered(1, Load::of(4096, 1), MS, now);
            hedges += u32::from(latencies.may_hedge());
        }
        assert!((50..=60).contains(&hedges), "{hedges}");
    }

    #[test]
    fn large_latencies_count_per_mebibyte() {
        let (now, latencies) = (Instant::now(), Latencies::default());
        for _ in 0..10 {
            latencies.answered(1, Load::of(1 << 20, 1), 3 * MS, now);
            latencies.answered(2, Load::of(16 << 20, 4), 48 * MS, now);
        }
        assert!(!latencies.is_slow(2, Size::Large));
    }
}
