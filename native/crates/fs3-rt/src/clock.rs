use std::ops::{Add, AddAssign, Sub};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::sim;

/// Virtual time 0 as the wall clock shows it, nanoseconds since 1970.
const WALL_NS_AT_START: i64 = 1_700_000_000_000_000_000;

/// A moment of the monotonic clock, real or virtual.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(std::time::Instant);

impl Instant {
    /// Now.
    pub fn now() -> Self {
        match sim::now_ns() {
            None => Self(std::time::Instant::now()),
            Some(now_ns) => Self(virtual_start() + Duration::from_nanos(now_ns)),
        }
    }

    /// Time that has passed since; zero for a moment to come.
    pub fn elapsed(&self) -> Duration {
        Self::now().0.saturating_duration_since(self.0)
    }

    /// Time since `earlier`; zero when that is later.
    pub fn saturating_duration_since(&self, earlier: Self) -> Duration {
        self.0.saturating_duration_since(earlier.0)
    }

    /// The moment in virtual time, nanoseconds.
    pub(crate) fn virtual_ns(self) -> u64 {
        self.0.saturating_duration_since(virtual_start()).as_nanos() as u64
    }
}

/// The same for all simulators of the process: only differences are ever looked at.
fn virtual_start() -> std::time::Instant {
    static START: OnceLock<std::time::Instant> = OnceLock::new();
    *START.get_or_init(std::time::Instant::now)
}

impl From<std::time::Instant> for Instant {
    fn from(moment: std::time::Instant) -> Self {
        Self(moment)
    }
}

impl From<Instant> for tokio::time::Instant {
    fn from(moment: Instant) -> Self {
        moment.0.into()
    }
}

impl Add<Duration> for Instant {
    type Output = Self;
    fn add(self, span: Duration) -> Self {
        Self(self.0 + span)
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, span: Duration) {
        self.0 += span;
    }
}

impl Sub<Instant> for Instant {
    type Output = Duration;
    fn sub(self, earlier: Instant) -> Duration {
        self.saturating_duration_since(earlier)
    }
}

/// Nanoseconds of the monotonic clock that leases are judged by; see [`fs3_core::monotonic_ns`].
pub fn monotonic_ns() -> u64 {
    sim::now_ns().unwrap_or_else(fs3_core::monotonic_ns)
}

/// The wall clock, nanoseconds since 1970.
pub fn wall_ns() -> i64 {
    match sim::now_ns() {
        Some(now_ns) => WALL_NS_AT_START + now_ns as i64,
        None => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos() as i64),
    }
}
