//! Bringing syncing targets up to date, and replicas together after the loss of a whole chain.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fs3_chain::{Kind, Origin, Outcome, Role};
use fs3_core::{ChunkId, Code, Error, Result, TargetId};
use fs3_proto::v1::{ChunkInfo, ListChunksRequest, ListChunksResponse, Method, PublicState, ResyncDoneRequest};
use fs3_rt::{Instant, JoinSet};
use prost::Message;

use crate::content::{Body, Job};
use crate::core::Counters;
use crate::methods::query::info;
use crate::target::Target;
use crate::{LIST_CHUNKS_MAX, RESYNC_CHUNKS_IN_FLIGHT_MAX, RESYNC_RETRY_MS, RESYNC_STUCK_RETRY_MS, RESYNC_YIELD_MS};

/// How long the repair of one chunk may take before the pass counts as failed.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(30);

/// How far a syncing successor is.
#[derive(Clone, Debug)]
pub(crate) struct Progress {
    /// Known to be equal.
    pub done_chunks: u64,
    pub total_chunks: u64,
    pub done_bytes: u64,
    pub total_bytes: u64,
    /// Sent since `began`.
    pub sent_bytes: u64,
    /// Rotten here, so that they cannot be sent.
    pub stuck_chunks: u64,
    pub began: Instant,
}

/// A chunk to be sent, and its bytes.
struct Differing {
    chunk: ChunkId,
    bytes: u64,
    kind: Kind,
    origin: Origin,
}

/// What two replicas must agree on.
fn key(info: &ChunkInfo) -> (u64, u32, u32) {
    (info.committed_version, info.length, info.chunk_crc32c)
}

impl Target {
    /// As the last serving target: bring every syncing successor up to date, until the chain changes.
    pub(crate) async fn resync(self: Arc<Self>, chain_version: u64) {
        let mut tasks = JoinSet::new();
        for successor in self.view().successors.into_iter().filter(|s| s.syncing) {
            let this = self.clone();
            tasks.spawn(async move { this.resync_one(successor.target, chain_version).await });
        }
        while tasks.join_next().await.is_some() {}
    }

    async fn resync_one(self: &Arc<Self>, to: TargetId, chain_version: u64) {
        while self.view().chain_version == chain_version && !self.has_failed() {
            let mut pause_ms = RESYNC_RETRY_MS;
            match self.resync_pass(to, chain_version).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(e) => {
                    if e.code == Code::ChecksumMismatch {
                        pause_ms = RESYNC_STUCK_RETRY_MS;
                    }
                    tracing::debug!(target_id = self.id, to = to.0, "resync: {e}");
                }
            }
            fs3_rt::sleep(Duration::from_millis(pause_ms)).await;
        }
    }

    /// Compare metadata, repair what differs. `true`: nothing differed, and the successor was told so.
    async fn resync_pass(self: &Arc<Self>, to: TargetId, chain_version: u64) -> Result<bool> {
        // Their listing first: whatever is written after it goes to the successor through the chain.
        let theirs = self.list_of(to, chain_version).await?;
        let ours = self.own_list();
        let differing = self.compare(to, &ours, &theirs);
        let bytes_of = |id: &ChunkId| ours.get(id).map_or(0, |mine| u64::from(mine.length));
        self.begin_pass(to, &ours, &differing);
        if differing.is_empty() && self.is_settled() {
            let request = ResyncDoneRequest { chain_id: self.chain_id, chain_version, target_id: to.0 };
            self.call(to, Method::StorageResyncDone, request, Vec::new()).await?;
            return Ok(true);
        }
        let origin = Origin::Resync { to };
        let job = |chunk| Differing { chunk, bytes: bytes_of(&chunk), kind: Kind::Mirror, origin };
        self.repair(differing.into_iter().map(job).collect(), chain_version).await?;
        Ok(false)
    }

    fn begin_pass(&self, to: TargetId, ours: &BTreeMap<ChunkId, ChunkInfo>, differing: &[ChunkId]) {
        let left: Vec<&ChunkInfo> = differing.iter().filter_map(|id| ours.get(id)).collect();
        let bytes = |of: &mut dyn Iterator<Item = &ChunkInfo>| of.map(|c| u64::from(c.length)).sum::<u64>();
        let (total_bytes, left_bytes) = (bytes(&mut ours.values()), bytes(&mut left.iter().copied()));
        let mut life = self.life.lock();
        let before = life.resyncs.get(&to.0).map(|p| (p.sent_bytes, p.began));
        let (sent_bytes, began) = before.unwrap_or_else(|| (0, Instant::now()));
        let progress = Progress {
            done_chunks: (ours.len() - left.len()) as u64,
            total_chunks: ours.len() as u64,
            done_bytes: total_bytes - left_bytes,
            total_bytes,
            sent_bytes,
            stuck_chunks: 0,
            began,
        };
        life.resyncs.insert(to.0, progress);
    }

    fn note_sent(&self, job: &Differing, sent: bool) {
        let Origin::Resync { to } = job.origin else { return };
        if let Some(progress) = self.life.lock().resyncs.get_mut(&to.0) {
            if sent {
                // What is only there, and is removed, was not counted.
                progress.done_chunks = progress.total_chunks.min(progress.done_chunks + 1);
                progress.done_bytes += job.bytes;
                progress.sent_bytes += job.bytes;
            } else {
                progress.stuck_chunks += 1;
            }
        }
    }

    fn compare(
        &self,
        to: TargetId,
        ours: &BTreeMap<ChunkId, ChunkInfo>,
        theirs: &BTreeMap<ChunkId, ChunkInfo>,
    ) -> Vec<ChunkId> {
        let mut differing: Vec<ChunkId> = theirs.keys().filter(|id| !ours.contains_key(id)).copied().collect();
        for (id, mine) in ours {
            match theirs.get(id) {
                Some(other) if key(other) == key(mine) && other.pending_version == 0 => {
                    let outcome =
                        Outcome { update_version: mine.committed_version, length: mine.length, crc: mine.chunk_crc32c };
                    self.mark_synced(to, *id, outcome);
                }
                // Not committed anywhere: it is in flight here.
                None if mine.committed_version == 0 => {}
                _ => differing.push(*id),
            }
        }
        // What was sent whole, or compared equal, stays equal through the chain: chunks that are being written all the
        // time must not keep a resync from ending.
        self.retain_unsynced(to, &mut differing);
        differing
    }

    /// Send chunks, a few at the same time. One that is rotten here is left out, and is the error in the end; any other
    /// error ends it.
    async fn repair(self: &Arc<Self>, jobs: Vec<Differing>, chain_version: u64) -> Result<()> {
        let mut left = jobs.into_iter();
        let mut running: JoinSet<(Differing, Result<()>)> = JoinSet::new();
        let (mut result, mut rotten) = (Ok(()), Ok(()));
        loop {
            while running.len() < RESYNC_CHUNKS_IN_FLIGHT_MAX && result.is_ok() {
                let Some(job) = left.next() else { break };
                let this = self.clone();
                running.spawn(async move {
                    let sent = this.send_chunk(&job, chain_version).await;
                    (job, sent)
                });
            }
            match running.join_next().await {
                None => return result.and(rotten),
                Some(Ok((job, Ok(())))) => {
                    Counters::add(&self.core.counters.resync_chunks, 1);
                    Counters::add(&self.core.counters.resync_bytes, job.bytes);
                    self.note_sent(&job, true);
                }
                Some(Ok((job, Err(e)))) if e.code == Code::ChecksumMismatch => {
                    self.note_sent(&job, false);
                    rotten = Err(e);
                }
                Some(Ok((_, Err(e)))) => result = Err(e),
                Some(Err(_)) => result = Err(Error::new(Code::Internal, "a repair failed; see the log")),
            }
        }
    }

    async fn send_chunk(self: &Arc<Self>, differing: &Differing, chain_version: u64) -> Result<()> {
        self.core.resync_pace.take(differing.bytes).await;
        self.core.foreground.give_way(Duration::from_millis(RESYNC_YIELD_MS)).await;
        let mut job = Job::mirror(differing.chunk);
        if differing.kind == Kind::Remove {
            job.body = Body::Remove;
        }
        let deadline = Instant::now() + REPAIR_TIMEOUT;
        self.update(job, differing.kind, chain_version, differing.origin, deadline).await.map(drop)
    }

    fn own_list(&self) -> BTreeMap<ChunkId, ChunkInfo> {
        let (mut all, mut after) = (BTreeMap::new(), None);
        loop {
            let page = self.store.list(after, LIST_CHUNKS_MAX as usize);
            let Some((last, _)) = page.last() else { return all };
            after = Some(*last);
            all.extend(page.into_iter().filter_map(|(id, meta)| Some((id, info(id, &meta)?))));
        }
    }

    async fn list_of(&self, other: TargetId, chain_version: u64) -> Result<BTreeMap<ChunkId, ChunkInfo>> {
        let mut all = BTreeMap::new();
        let mut after = bytes::Bytes::new();
        loop {
            let request = ListChunksRequest {
                chain_id: self.chain_id,
                chain_version,
                target_id: other.0,
                after,
                limit: LIST_CHUNKS_MAX,
                resync: true,
                inode: 0,
            };
            let reply = self.call(other, Method::StorageListChunks, request, Vec::new()).await?;
            let page = ListChunksResponse::decode(reply.body)
                .map_err(|e| Error::new(Code::Protocol, format!("a chunk list cannot be read: {e}")))?;
            after = page.chunks.last().map(|c| c.chunk_id.clone()).unwrap_or_default();
            let ended = page.end || page.chunks.is_empty();
            all.extend(page.chunks.into_iter().filter_map(|c| Some((ChunkId::from_bytes(&c.chunk_id)?, c))));
            if ended {
                return Ok(all);
            }
        }
    }

    /// As the head that came back with others from the loss of the whole chain: write again what differs. Only
    /// unacknowledged updates can differ, so this head's committed content is as good as any.
    pub(crate) async fn heal(self: Arc<Self>, chain_version: u64) {
        loop {
            let view = self.view();
            if view.chain_version != chain_version || view.role != Role::Serving || !view.head || self.has_failed() {
                return;
            }
            match self.heal_pass(chain_version).await {
                Ok(()) => return,
                Err(e) => tracing::debug!(target_id = self.id, "comparing replicas: {e}"),
            }
            fs3_rt::sleep(Duration::from_millis(RESYNC_RETRY_MS)).await;
        }
    }

    async fn heal_pass(self: &Arc<Self>, chain_version: u64) -> Result<()> {
        let serving = self.core.routing().in_state(self.chain_id, PublicState::Serving);
        let mut above: BTreeMap<ChunkId, u64> = BTreeMap::new();
        for other in serving.into_iter().filter(|t| t.0 != self.id) {
            let theirs = self.list_of(other, chain_version).await?;
            let ours = self.own_list();
            for id in ours.keys().chain(theirs.keys()) {
                let (mine, other) = (ours.get(id), theirs.get(id));
                let differ = mine.map(key) != other.map(key) || other.is_some_and(|o| o.pending_version != 0);
                if differ {
                    let version = |i: Option<&ChunkInfo>| i.map_or(0, |i| i.committed_version.max(i.pending_version));
                    let highest = above.entry(*id).or_default();
                    *highest = (*highest).max(version(mine)).max(version(other));
                }
            }
        }
        let committed =
            |id: &ChunkId| self.store.chunk(*id).is_some_and(|m| m.committed.as_ref().is_some_and(|c| !c.removed));
        let jobs: Vec<_> = above
            .into_iter()
            .map(|(id, above)| {
                let kind = if committed(&id) { Kind::Mirror } else { Kind::Remove };
                let bytes = self.store.chunk(id).and_then(|m| m.committed).map_or(0, |c| u64::from(c.length));
                Differing { chunk: id, bytes, kind, origin: Origin::Heal { above } }
            })
            .collect();
        if !jobs.is_empty() {
            tracing::warn!(
                target_id = self.id,
                chunks = jobs.len(),
                "replicas differ after a total failure; repairing"
            );
        }
        self.repair(jobs, chain_version).await
    }
}
