//! Which targets failed lately.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fs3_rt::Instant;
use parking_lot::Mutex;

/// A failed target is left alone for this long while its chain stays as it is.
const SKIP: Duration = Duration::from_secs(3);
/// Entries kept at most; beyond it the oldest knowledge is thrown away.
const ENTRIES_MAX: usize = 4096;

/// Targets to avoid, each for one chain version.
#[derive(Default)]
pub(crate) struct Health {
    failed: Mutex<HashMap<u64, (u64, Instant)>>,
    /// Whether there may be any; spares the lock in good times.
    any: AtomicBool,
}

impl Health {
    /// `target_id` did not answer, or not as a serving target does, at this version of its chain.
    pub fn failed(&self, target_id: u64, chain_version: u64, now: Instant) {
        let mut failed = self.failed.lock();
        if failed.len() >= ENTRIES_MAX {
            failed.clear();
        }
        self.any.store(true, Ordering::Release);
        failed.insert(target_id, (chain_version, now));
    }

    /// Whether to avoid it where there is a choice.
    pub fn suspect(&self, target_id: u64, chain_version: u64, now: Instant) -> bool {
        if !self.any.load(Ordering::Acquire) {
            return false;
        }
        let failed = self.failed.lock();
        failed.get(&target_id).is_some_and(|&(version, at)| version == chain_version && now < at + SKIP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_target_is_avoided_for_its_chain_version_and_a_while() {
        let (health, now) = (Health::default(), Instant::now());
        health.failed(7, 3, now);
        assert!(health.suspect(7, 3, now) && !health.suspect(7, 4, now) && !health.suspect(8, 3, now));
        assert!(!health.suspect(7, 3, now + SKIP));
    }
}
