//! What goes wrong, set from outside while the file system is in use.

use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::draw::Draw;

/// The faults in force. All zero: a good disk.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Faults {
    /// Probability that a read fails with EIO.
    pub read_eio: f64,
    /// Probability that a write stores a part of its bytes and fails with EIO.
    pub write_eio: f64,
    /// Probability that a sync fails with EIO.
    pub sync_eio: f64,
    /// After a failed sync the unsynced bytes of the file are gone, as if the kernel had dropped the dirty pages.
    pub sync_drops: bool,
    /// Every read, write and sync takes at least this long.
    pub latency_ms: u64,
    /// Bytes by which files may still grow; beyond, ENOSPC.
    pub space_bytes: Option<u64>,
    /// Files whose names do not contain this are spared by EIO and latency.
    pub only: String,
}

/// Operations seen and faults that struck.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Counts {
    /// Reads, writes and syncs.
    pub operations: u64,
    /// Reads that failed.
    pub read_eio: u64,
    /// Writes that failed.
    pub write_eio: u64,
    /// Syncs that failed.
    pub sync_eio: u64,
    /// Growths that were refused.
    pub enospc: u64,
    /// Operations that were delayed.
    pub delayed: u64,
    /// Reads that returned a flipped bit.
    pub rotten_reads: u64,
}

/// What an operation is, as far as faults go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Sync,
}

/// Settings, counters and the random source that decides.
pub(crate) struct Injector {
    pub faults: Faults,
    pub counts: Counts,
    draw: Draw,
}

impl Injector {
    pub fn new(seed: u64) -> Self {
        Self { faults: Faults::default(), counts: Counts::default(), draw: Draw::new(seed) }
    }

    /// How long an operation on `name` has to wait, and whether it fails then.
    pub fn strike(&mut self, kind: Kind, name: &str) -> (Duration, bool) {
        self.counts.operations += 1;
        if !name.contains(&self.faults.only) {
            return (Duration::ZERO, false);
        }
        let delay = Duration::from_millis(self.faults.latency_ms);
        self.counts.delayed += u64::from(!delay.is_zero());
        let (probability, count) = match kind {
            Kind::Read => (self.faults.read_eio, &mut self.counts.read_eio),
            Kind::Write => (self.faults.write_eio, &mut self.counts.write_eio),
            Kind::Sync => (self.faults.sync_eio, &mut self.counts.sync_eio),
        };
        let fails = self.draw.chance(probability);
        *count += u64::from(fails);
        (delay, fails)
    }

    /// Take space for a growth by `bytes`. Errors: ENOSPC.
    pub fn take_space(&mut self, bytes: u64) -> io::Result<()> {
        let Some(free) = &mut self.faults.space_bytes else { return Ok(()) };
        if bytes > *free {
            self.counts.enospc += 1;
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        *free -= bytes;
        Ok(())
    }

    /// Give space back.
    pub fn return_space(&mut self, bytes: u64) {
        if let Some(free) = &mut self.faults.space_bytes {
            *free = free.saturating_add(bytes);
        }
    }

    /// 0 .. `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.draw.below(limit)
    }
}
