//! Trying for a moment before sleeping.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// How long to try: within this comes what a service answers from memory, also when a sleeping thread of it has to be
/// woken, which takes a virtual machine some tens of microseconds. On a slow one a `stat` took a quarter less than with 100 µs.
const SPAN: Duration = Duration::from_micros(200);
/// Failures in a row after which trying is given up for a while. One more puts it off again.
const FAILURES_MAX: u32 = 3;
/// Waits that go without trying then.
const PAUSE_WAITS: u32 = 64;

/// One core would only be kept from who is waited for.
static HAS_CORES: LazyLock<bool> = LazyLock::new(|| std::thread::available_parallelism().is_ok_and(|n| n.get() > 1));

/// Learns whether what one waits for usually comes within [`SPAN`].
#[derive(Default)]
pub(crate) struct Spin {
    failures: u32,
    pause: u32,
}

impl Spin {
    /// Try until it succeeds or the time is over; whether it succeeded. Does not try where that was in vain lately.
    pub fn until(&mut self, mut succeeds: impl FnMut() -> bool) -> bool {
        if self.pause > 0 || !*HAS_CORES {
            self.pause = self.pause.saturating_sub(1);
            return false;
        }
        let began = Instant::now();
        loop {
            if succeeds() {
                self.failures = 0;
                return true;
            }
            if began.elapsed() >= SPAN {
                break;
            }
            // Who is waited for may want this core.
            std::thread::yield_now();
        }
        self.failures += 1;
        if self.failures >= FAILURES_MAX {
            (self.failures, self.pause) = (FAILURES_MAX - 1, PAUSE_WAITS);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a wait in which nothing comes tries at all.
    fn tries(spin: &mut Spin) -> bool {
        let mut tried = false;
        assert!(!spin.until(|| {
            tried = true;
            false
        }));
        tried
    }

    #[test]
    fn what_never_comes_in_time_is_seldom_tried() {
        let mut spin = Spin::default();
        let tried = (0..1000).filter(|_| tries(&mut spin)).count();
        assert!(tried <= 3 + 1000 / 64 + 1, "{tried}");
    }

    #[test]
    fn one_success_brings_the_trying_back() {
        let mut spin = Spin::default();
        (0..3).for_each(|_| assert_eq!(tries(&mut spin), *HAS_CORES));
        let waits = (0..200).find(|_| spin.until(|| true));
        assert_eq!(waits.is_some(), *HAS_CORES);
        assert_eq!(tries(&mut spin), *HAS_CORES);
    }
}
