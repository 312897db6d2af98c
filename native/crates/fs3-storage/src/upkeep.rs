//! What outlives the lives of a target within a process: its disk, what is known of its rot, its scrub.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use fs3_core::ChunkId;
use fs3_proto::v1::engine_status::TargetStatus;
use fs3_rt::Instant;
use parking_lot::Mutex;

use crate::pace::Pace;

/// Damaged chunks named in the status.
const NAMED_MAX: usize = 3;

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
