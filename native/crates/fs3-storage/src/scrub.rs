//! Reading everything in the background, so that rot is found while another replica can still repair it.

use std::sync::Arc;
use std::time::Duration;

use fs3_core::ChunkId;
use fs3_rt::{Instant, wall_ns};

use crate::core::Counters;
use crate::target::Target;
use crate::{SCRUB_FIRST_MS_MAX, SCRUB_PIECE_BYTES, SCRUB_YIELD_MS};

/// Chunks taken from the table at a time.
const PAGE: usize = 256;

impl Target {
    /// Read all committed chunks again and again, each pass when it is due or asked for; ends with this life.
    pub(crate) async fn scrub(self: Arc<Self>) {
        let interval = self.core.healing.scrub_interval;
        let mut asked = self.core.scrub_now.subscribe();
        let mut due = Instant::now() + interval.min(Duration::from_millis(SCRUB_FIRST_MS_MAX));
        loop {
            let called = fs3_rt::timeout_at(due, asked.changed()).await;
            if self.has_failed() || matches!(called, Ok(Err(_))) {
                return;
            }
            asked.mark_unchanged();
            due = Instant::now() + interval;
            if !self.scrub_pass(&asked).await {
                self.upkeep.scrub.lock().total_chunks = 0;
                if self.has_failed() {
                    return;
                }
            }
        }
    }

    /// `false`: the pass was not completed.
    async fn scrub_pass(self: &Arc<Self>, asked: &tokio::sync::watch::Receiver<u64>) -> bool {
        {
            let mut scrub = self.upkeep.scrub.lock();
            (scrub.done_chunks, scrub.total_chunks) = (0, self.store.chunks().max(1));
        }
        let mut after = None;
        loop {
            let page = self.store.list(after, PAGE);
            let Some((last, _)) = page.last() else { break };
            after = Some(*last);
            for (chunk, meta) in &page {
                let Some(version) = meta.committed.as_ref().filter(|v| !v.removed) else { continue };
                if asked.has_changed().is_ok_and(|again| again) || !self.scrub_chunk(*chunk, version.length).await {
                    return false;
                }
                self.upkeep.scrub.lock().done_chunks += 1;
                Counters::add(&self.core.counters.scrubbed_chunks, 1);
            }
        }
        let mut scrub = self.upkeep.scrub.lock();
        (scrub.total_chunks, scrub.ended_ms) = (0, wall_ns() / 1_000_000);
        tracing::info!(target_id = self.id, chunks = scrub.done_chunks, "scrubbed");
        true
    }

    /// `false`: the target cannot go on.
    async fn scrub_chunk(self: &Arc<Self>, chunk: ChunkId, length: u32) -> bool {
        let mut rotten = false;
        for offset in (0..length).step_by(SCRUB_PIECE_BYTES as usize) {
            let piece = SCRUB_PIECE_BYTES.min(length - offset);
            self.upkeep.disk.scrub_pace.take(u64::from(piece)).await;
            self.core.foreground.give_way(Duration::from_millis(SCRUB_YIELD_MS)).await;
            if self.has_failed() {
                return false;
            }
            match self.store.verify(chunk, offset, piece).await {
                Ok(verified) => {
                    Counters::add(&self.core.counters.scrubbed_bytes, verified.read_bytes);
                    rotten |= !verified.bad.is_empty();
                }
                // The store has failed with it, which takes the target offline.
                Err(_) => return false,
            }
        }
        if rotten {
            self.found_rot(chunk);
        }
        true
    }
}
