//! What outlives the lives of a target within a process: its disk, what is known of its rot, its scrub.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fs3_core::{ChunkId, Error};
use fs3_proto::v1::engine_status::TargetStatus;
use fs3_rt::Instant;
use parking_lot::Mutex;

use crate::SLOW_DISK_MS;
use crate::pace::Pace;

/// Damaged chunks named in the status.
const NAMED_MAX: usize = 3;
/// Operations that the average duration is about.
const AVERAGE_OVER: u64 = 64;

/// State of one target beside its chain machine.
pub(crate) struct Upkeep {
    pub disk: Arc<DiskState>,
    pub rot: Mutex<Rot>,
    pub scrub: Mutex<ScrubState>,
}

/// What the targets of one disk share.
pub(crate) struct DiskState {
    /// Limits the scrubs of all of them together.
    pub scrub_pace: Pace,
    /// The first error of the disk. Nothing on it is used any more in this process: after a failed write or sync
    /// nobody knows what the disk holds.
    error: Mutex<Option<Error>>,
    /// Average duration of an operation, microseconds.
    operation_us: AtomicU64,
}

impl DiskState {
    pub fn new(scrub_pace: Pace) -> Self {
        Self { scrub_pace, error: Mutex::default(), operation_us: AtomicU64::new(0) }
    }

    pub fn error(&self) -> Option<Error> {
        self.error.lock().clone()
    }

    /// Take the disk out of use.
    pub fn fail(&self, error: &Error) {
        let mut known = self.error.lock();
        if known.is_none() {
            tracing::error!("a disk is out of use with all its targets: {error}");
            *known = Some(error.clone());
        }
    }

    /// Take note of how long an operation took that had to wait for the disk.
    pub fn observe(&self, took: Duration) {
        let (took, old) = (took.as_micros() as u64, self.operation_us.load(Ordering::Relaxed));
        // Lost updates of a race do not matter to an average.
        self.operation_us.store(old - old / AVERAGE_OVER + took / AVERAGE_OVER, Ordering::Relaxed);
    }

    /// Why a person should look at the disk although it works.
    pub fn warning(&self) -> Option<String> {
        let ms = self.operation_us.load(Ordering::Relaxed) / 1000;
        (ms > SLOW_DISK_MS).then(|| format!("the disk is slow: an operation takes {ms} ms on the average"))
    }
}

/// Chunks with rotten bytes.
#[derive(Default)]
pub(crate) struct Rot {
    /// To be repaired.
    pub waiting: BTreeSet<ChunkId>,
    /// No replica that answered had good bytes; with the time from which it is worth another attempt.
    pub damaged: BTreeMap<ChunkId, Instant>,
    /// A task works on `waiting`.
    pub repairing: bool,
}

/// Where the scrub is.
#[derive(Default)]
pub(crate) struct ScrubState {
    pub done_chunks: u64,
    /// 0: no pass is running.
    pub total_chunks: u64,
    /// Wall clock at the end of the last complete pass, 0 for none.
    pub ended_ms: i64,
}

impl Upkeep {
    pub fn new(disk: Arc<DiskState>) -> Arc<Self> {
        Arc::new(Self { disk, rot: Mutex::default(), scrub: Mutex::default() })
    }

    /// Fill in what the status says of it. `is_rotten`: whether a chunk still is.
    pub fn describe(&self, status: &mut TargetStatus, is_rotten: impl Fn(ChunkId) -> bool) {
        let scrub = self.scrub.lock();
        (status.scrub_done_chunks, status.scrub_total_chunks) = (scrub.done_chunks, scrub.total_chunks);
        status.scrub_ended_ms = scrub.ended_ms;
        drop(scrub);
        let mut rot = self.rot.lock();
        // Overwritten and removed ones are nobody's worry any more.
        rot.damaged.retain(|id, _| is_rotten(*id));
        (status.repairs_waiting, status.damaged_chunks) = (rot.waiting.len() as u64, rot.damaged.len() as u64);
        if !rot.damaged.is_empty() {
            let named: Vec<String> = rot.damaged.keys().take(NAMED_MAX).map(name).collect();
            let more = if rot.damaged.len() > NAMED_MAX { ", ..." } else { "" };
            status.damaged = format!(
                "{} chunks are damaged and no replica that answers has good bytes ({}{more}); restore or \
                 remove these files",
                rot.damaged.len(),
                named.join(", ")
            );
        }
    }
}

fn name(id: &ChunkId) -> String {
    let space = if id.space == 0 { String::new() } else { format!("space {} ", id.space) };
    format!("{space}inode {} chunk {}", id.inode, id.index)
}
