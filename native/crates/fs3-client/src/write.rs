//! Writes and syncs: through the head of each chain, again with the same identity until the chain has it.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use fs3_core::{CRC_BLOCK_BYTES, Code, Error, Region, Result, crc_blocks, pack_crcs};
use fs3_net::{Payload, Sink};
use fs3_proto::v1::{Layout, Method, PunchChunkRequest, SyncChainRequest, WriteRequest};
use fs3_rt::{Instant, JoinSet};
use prost::Message;

use crate::backoff::Backoff;
use crate::inner::Inner;
use crate::inode::InodeState;
use crate::plan::{Piece, pieces};
use crate::routing::{ChainView, Replica, stripe_width};
use crate::trace;

/// Times one write is sent again because it was damaged on the way, before that is an error.
const RESENDS_MAX: usize = 4;
/// Times a failure of the replicas' disks or stored bytes is waited out: their targets should leave the chain.
const DISK_RETRIES_MAX: usize = 6;
/// Chunks of one hole that are under way at a time.
const PUNCHES_IN_FLIGHT_MAX: usize = 32;
/// How long an answer may still come after its chain has changed.
const MOVED_GRACE: Duration = Duration::from_millis(300);

/// Write all of `data`; every piece is on its chain afterwards. The pieces travel at the same time.
pub(crate) async fn write(inner: &Arc<Inner>, state: &Arc<InodeState>, offset: u64, data: Region) -> Result<()> {
    let layout = state.layout();
    let deadline = inner.deadline();
    let mut list = pieces(state.inode, layout.chunk_bytes, offset, data.len())?.peekable();
    state.begin_write(offset + data.len() as u64);
    let Some(first) = list.next() else { return Ok(()) };
    if list.peek().is_none() {
        return write_piece(inner.clone(), state.clone(), layout, first, data, deadline).await;
    }
    let mut tasks = JoinSet::new();
    for piece in std::iter::once(first).chain(list) {
        let part = data.slice(piece.at, piece.len as usize);
        tasks.spawn(trace::inherit(write_piece(inner.clone(), state.clone(), layout, piece, part, deadline)));
    }
    tasks.join_all().await.into_iter().collect()
}

async fn write_piece(
    inner: Arc<Inner>,
    state: Arc<InodeState>,
    layout: Layout,
    piece: Piece,
    data: Region,
    deadline: Instant,
) -> Result<()> {
    let limit = inner.config.write_bytes_in_flight;
    let _budget = inner.reserve(&inner.write_budget, data.len(), limit, deadline).await?;
    let claim = inner.channels.claim(deadline).await?;
    let chain_id = locate(&inner, &layout, u64::from(piece.chunk.index), deadline).await?;
    state.touch_chain(chain_id);
    let request = WriteRequest {
        chunk_id: Bytes::copy_from_slice(&piece.chunk.to_bytes()),
        chunk_bytes: layout.chunk_bytes,
        offset: piece.offset,
        length: piece.len,
        writer: Some(claim.id()),
        ..Default::default()
    };
    let crcs = OnceLock::new();
    let crcs = || crcs.get_or_init(|| Bytes::from(pack_crcs(&crc_blocks(piece.offset as usize, &data)))).clone();
    let build = |chain: &ChainView, head: Replica, crcs_follow: bool| WriteRequest {
        chain_id,
        chain_version: chain.version,
        target_id: head.target_id,
        crcs: if crcs_follow { Bytes::new() } else { crcs() },
        ..request.clone()
    };
    let carried = Carried { data: data.clone(), whole_blocks: (piece.offset as usize).is_multiple_of(CRC_BLOCK_BYTES) };
    head_call(&inner, chain_id, Method::StorageWrite, build, Some(carried), deadline).await.map(drop)
}

/// Make a range of the file a hole. The pieces travel at the same time.
pub(crate) async fn punch(inner: &Arc<Inner>, state: &Arc<InodeState>, offset: u64, length: u64) -> Result<()> {
    let layout = state.layout();
    let deadline = inner.deadline();
    let mut tasks = JoinSet::new();
    for piece in pieces(state.inode, layout.chunk_bytes, offset, length as usize)? {
        while tasks.len() >= PUNCHES_IN_FLIGHT_MAX {
            tasks.join_next().await.unwrap_or(Ok(Ok(()))).map_err(broke_off)??;
        }
        tasks.spawn(trace::inherit(punch_piece(inner.clone(), state.clone(), layout, piece, deadline)));
    }
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(broke_off)??;
    }
    Ok(())
}

fn broke_off(error: impl std::fmt::Display) -> Error {
    Error::new(Code::Internal, format!("a task of a hole failed: {error}")).maybe_applied()
}

async fn punch_piece(
    inner: Arc<Inner>,
    state: Arc<InodeState>,
    layout: Layout,
    piece: Piece,
    deadline: Instant,
) -> Result<()> {
    let claim = inner.channels.claim(deadline).await?;
    let chain_id = locate(&inner, &layout, u64::from(piece.chunk.index), deadline).await?;
    state.touch_chain(chain_id);
    let build = |chain: &ChainView, head: Replica, _| PunchChunkRequest {
        chain_id,
        chain_version: chain.version,
        target_id: head.target_id,
        chunk_id: Bytes::copy_from_slice(&piece.chunk.to_bytes()),
        chunk_bytes: layout.chunk_bytes,
        offset: piece.offset,
        length: piece.len,
        writer: Some(claim.id()),
        ..Default::default()
    };
    head_call(&inner, chain_id, Method::StoragePunch, build, None, deadline).await.map(drop)
}

/// The chain of a chunk, waiting for a routing that has the file's table.
pub(crate) async fn locate(inner: &Inner, layout: &Layout, index: u64, deadline: Instant) -> Result<u32> {
    loop {
        let view = inner.view();
        if let Some(chain_id) = view.chain_of(layout, index) {
            return Ok(chain_id);
        }
        if Instant::now() >= deadline {
            let message = format!("the routing has no table {}.{}", layout.table_id, layout.table_version);
            return Err(Error::new(Code::Timeout, message));
        }
        inner.wait_routing(view.version(), view.version() + 1, Duration::from_millis(200)).await;
    }
}

/// Make everything acknowledged on the chains that were written since the last sync survive power loss; the
/// first time also what was written before the inode was opened.
pub(crate) async fn sync_chains(inner: &Arc<Inner>, state: &Arc<InodeState>) -> Result<()> {
    let deadline = inner.deadline();
    // One at a time: a sync that finds nothing left to do must not return before the one that does it.
    let turn = fs3_rt::timeout_at(deadline, state.sync_turn.lock()).await;
    let _turn = turn.map_err(|_| Error::new(Code::Timeout, "another sync of the file did not end in time"))?;
    count_before(inner, state, deadline).await?;
    let mut unsynced = Unsynced { state, chains: state.take_unsynced() };
    let mut tasks = JoinSet::new();
    for &chain_id in &unsynced.chains {
        let inner = inner.clone();
        tasks.spawn(trace::inherit(async move { (chain_id, sync_chain(&inner, chain_id, deadline).await) }));
    }
    let mut result = Ok(());
    while let Some(joined) = tasks.join_next().await {
        match joined.map_err(|e| Error::new(Code::Internal, format!("a sync task failed: {e}"))) {
            Ok((chain_id, Ok(()))) => {
                unsynced.chains.remove(&chain_id);
            }
            Ok((_, Err(error))) | Err(error) => result = Err(error),
        }
    }
    result
}

/// Count the chains of what was written before the inode was opened as unsynced.
async fn count_before(inner: &Inner, state: &InodeState, deadline: Instant) -> Result<()> {
    let layout = state.layout();
    let chunks = state.unsynced_before().div_ceil(u64::from(layout.chunk_bytes.max(1)));
    // The last of them are on every chain that any of them is on, also where the stripe has grown.
    let width = stripe_width(&layout, chunks.saturating_sub(1));
    for index in chunks.saturating_sub(2 * width)..chunks {
        state.touch_chain(locate(inner, &layout, index, deadline).await?);
    }
    state.counted_before();
    Ok(())
}

/// Chains taken for a sync; those that remain at the end (an error, a dropped future) count as unsynced again.
struct Unsynced<'a> {
    state: &'a InodeState,
    chains: BTreeSet<u32>,
}

impl Drop for Unsynced<'_> {
    fn drop(&mut self) {
        self.state.not_synced(std::mem::take(&mut self.chains));
    }
}

async fn sync_chain(inner: &Inner, chain_id: u32, deadline: Instant) -> Result<()> {
    let build = |chain: &ChainView, head: Replica, _| SyncChainRequest {
        chain_id,
        chain_version: chain.version,
        target_id: head.target_id,
        forwarded: false,
    };
    head_call(inner, chain_id, Method::StorageSync, build, None, deadline).await.map(drop)
}

/// Bytes of a request.
struct Carried {
    data: Region,
    /// They begin where a block of the chunk does, so that checksums of their blocks are those of the chunk's.
    whole_blocks: bool,
}

/// Ask the head of a chain, whoever that is at the time, until it succeeds, cannot succeed, or the deadline. The last
/// argument of `build`: whether checksums come behind the request.
async fn head_call<Req: Message>(
    inner: &Inner,
    chain_id: u32,
    method: Method,
    build: impl Fn(&ChainView, Replica, bool) -> Req,
    carried: Option<Carried>,
    deadline: Instant,
) -> Result<Bytes> {
    let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(1));
    let (mut resends, mut disk_failures, mut sent) = (0, 0, false);
    let mut attempt = 0;
    loop {
        let view = inner.view();
        let head = view.chain(chain_id).and_then(|chain| {
            let head = *chain.serving.first()?;
            Some((chain, head, view.address(head.node_id)?))
        });
        let result = match head {
            None => Err(Error::new(Code::NotServing, format!("chain {chain_id} has no serving replica"))),
            Some((chain, head, address)) => {
                let pieces: Vec<_> = carried.iter().map(|carried| carried.data.clone()).collect();
                // What was damaged, or came without its checksums, is sent with them.
                let may_follow = resends == 0 && carried.as_ref().is_some_and(|carried| carried.whole_blocks);
                let with_crcs = may_follow && inner.wire.sends_crcs(address, &pieces);
                let (request, payload) = (build(chain, head, with_crcs), Payload { pieces, with_crcs });
                let call = inner.wire.transfer(address, method, request, payload, Sink::none(), deadline);
                let (node_id, target_id) = (head.node_id, head.target_id);
                let chunks = u32::from(method != Method::StorageSync);
                let detail = trace::Detail { node_id, target_id, chunks, attempt, hedge: false };
                trace::detailed(detail, unless_moved(inner, chain, call)).await
            }
        };
        let error = match result {
            Ok(reply) => return Ok(reply.body),
            Err(error) => error,
        };
        sent |= error.maybe_applied;
        let wait = match error.code {
            Code::PayloadChecksum if resends < RESENDS_MAX => {
                inner.counters.payload_resends.fetch_add(1, Ordering::Relaxed);
                resends += 1;
                false
            }
            // The manager takes such a target out of the chain, or the replica repairs itself.
            Code::DiskError | Code::VersionGap | Code::ChecksumMismatch if disk_failures < DISK_RETRIES_MAX => {
                disk_failures += 1;
                true
            }
            code if code.retryable() && code != Code::PayloadChecksum => true,
            _ => return Err(if sent { error.maybe_applied() } else { error }),
        };
        let pause = if wait { backoff.next() } else { Duration::ZERO };
        if Instant::now() + pause >= deadline {
            let message = format!("chain {chain_id} did not answer in time; the last error: {error}");
            let late = Error::new(Code::Timeout, message);
            return Err(if sent { late.maybe_applied() } else { late });
        }
        inner.counters.write_retries.fetch_add(1, Ordering::Relaxed);
        attempt += 1;
        tracing::debug!(chain_id, ?method, %error, "trying again");
        if wait {
            inner.wait_routing(view.version(), error.routing_version, pause).await;
        }
    }
}

/// The call's result, or StaleChain soon after its chain has changed: a node that hangs does not answer, and the
/// new head knows whether the request was applied.
async fn unless_moved<T>(inner: &Inner, chain: &ChainView, call: impl Future<Output = Result<T>>) -> Result<T> {
    let mut changes = inner.routing.subscribe();
    let moved = async {
        let changed = changes.wait_for(|view| view.chain(chain.id).is_none_or(|now| now.version != chain.version));
        if changed.await.is_err() {
            std::future::pending::<()>().await;
        }
        fs3_rt::sleep(MOVED_GRACE).await;
    };
    tokio::select! {
        biased;
        result = call => result,
        () = moved => Err(Error::new(Code::StaleChain, "the chain changed while its head was asked").maybe_applied()),
    }
}
