//! Who has been told of failures of background writes.

use std::sync::atomic::{AtomicU64, Ordering};

/// Calls that tell of failures. What one told is told again by those after it, and only by them: the error of a write is
/// lost when the kernel had written a part of it before (the caller sees a short write), and that of a close when
/// the descriptor was a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Teller {
    Write,
    Close,
    Sync,
}

/// How many failures each call has told through one handle. Thread-safe.
#[derive(Debug)]
pub(crate) struct Told([AtomicU64; 3]);

impl Told {
    /// All `failures` so far are known.
    pub fn new(failures: u64) -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(failures)))
    }

    /// Whether even a sync, which tells what every other call has told, has something to tell.
    pub fn is_behind(&self, failures: u64) -> bool {
        self.0[Teller::Sync as usize].load(Ordering::Relaxed) < failures
    }

    /// Whether `teller` has something to tell when there were `failures` in all; it counts as told from here on.
    pub fn tell(&self, teller: Teller, failures: u64) -> bool {
        let (lesser, own) = self.0.split_at(teller as usize);
        for told in lesser {
            told.fetch_max(failures, Ordering::Relaxed);
        }
        own[0].fetch_max(failures, Ordering::Relaxed) < failures
    }
}
