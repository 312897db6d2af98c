//! Questions about a target, and the small steps of resync.

use std::sync::Arc;

use fs3_chain::{Role, RoutingView};
use fs3_core::{ChunkId, Code, Error, Result};
use fs3_io::ChunkMeta;
use fs3_net::{Request, Response};
use fs3_proto::v1::{
    ChunkInfo, ListChunksRequest, ListChunksResponse, Method, QueryLastRequest, QueryLastResponse, ResyncDoneRequest,
    ResyncDoneResponse, ScrubResponse, SpaceResponse, SyncChainRequest, SyncChainResponse,
};
use fs3_rt::JoinSet;

use crate::LIST_CHUNKS_MAX;
use crate::core::{Core, Slot};
use crate::service::{check_replica, decode};
use crate::target::Target;

/// The highest chunk of an inode, from any serving replica.
pub(crate) fn query_last(core: &Core, request: &Request) -> Result<Response> {
    let message: QueryLastRequest = decode(request)?;
    let target = core.target(message.target_id, message.chain_id)?;
    target.check_serving(message.chain_version)?;
    let mut answer = QueryLastResponse::default();
    for (id, meta) in target.store.inode_chunks(message.space, message.inode, 0, u32::MAX) {
        let Some(version) = meta.committed.filter(|v| !v.removed) else { continue };
        answer.found = true;
        (answer.index, answer.length) = (id.index, version.length);
        answer.chunks += 1;
        answer.bytes += u64::from(version.length);
    }
    target.check_reply()?;
    Ok(Response::new(&answer))
}

/// Make everything acknowledged survive power loss, here and on every successor at the same time. Syncing ones count: such
/// a target may serve, and be the only one that does, as soon as the manager has heard that it holds everything.
pub(crate) async fn sync(core: &Arc<Core>, request: Request) -> Result<Response> {
    let message: SyncChainRequest = decode(&request)?;
    let target = core.target(message.target_id, message.chain_id)?;
    check_syncable(&target, &message)?;
    if message.forwarded {
        check_replica(&request)?;
    } else if !target.view().head {
        return Err(target.error(Code::NotServing, "a sync begins at the head of a chain".into()));
    }
    let forward = forward_sync(&target, message.chain_version);
    let (local, forwarded) = tokio::join!(target.store.sync(), forward);
    local?;
    forwarded?;
    check_syncable(&target, &message)?;
    Ok(Response::new(&SyncChainResponse { routing_version: core.routing().version }))
}

fn check_syncable(target: &Target, message: &SyncChainRequest) -> Result<()> {
    let view = target.view();
    if message.forwarded && view.role == Role::Syncing && view.chain_version == message.chain_version {
        return Ok(());
    }
    target.check_serving(message.chain_version)
}

async fn forward_sync(target: &Arc<Target>, chain_version: u64) -> Result<()> {
    let mut running = JoinSet::new();
    for successor in target.view().successors {
        let (this, to) = (target.clone(), successor.target);
        let request = SyncChainRequest { chain_id: this.chain_id, chain_version, target_id: to.0, forwarded: true };
        running.spawn(async move { this.call(to, Method::StorageSync, request, Vec::new()).await.map(drop) });
    }
    while let Some(ended) = running.join_next().await {
        ended.map_err(|_| Error::new(Code::Internal, "a forwarded sync failed; see the log"))??;
    }
    Ok(())
}

/// Capacity of the node's disks.
pub(crate) fn space(core: &Core) -> Response {
    Response::new(&SpaceResponse { disks: core.disks.space() })
}

/// Begin a scrub of every target now.
pub(crate) fn scrub(core: &Core) -> Result<Response> {
    if core.healing.scrub_bytes_per_s == 0 {
        return Err(Error::new(Code::NotSupported, "scrubs are switched off on this node (scrub_bytes_per_s = 0)"));
    }
    core.scrub_now.send_modify(|times| *times += 1);
    let targets = core.slots().into_values().filter(|slot| matches!(slot, Slot::Open(_))).count() as u32;
    Ok(Response::new(&ScrubResponse { targets }))
}

/// Metadata of a target's chunks. For resync and audits it serves without lease, and shows what is on the disk; to a client
/// that looks for the holes of a file it answers like a read.
pub(crate) fn list_chunks(core: &Core, request: &Request) -> Result<Response> {
    let message: ListChunksRequest = decode(request)?;
    let target = core.target(message.target_id, message.chain_id)?;
    if message.inode != 0 {
        target.check_serving(message.chain_version)?;
        let listed = list(&target, &message)?;
        target.check_reply()?;
        return Ok(Response::new(&listed));
    }
    if message.chain_version != 0 && message.chain_version != target.view().chain_version {
        return Err(target.error(Code::StaleChain, "the chain has changed; refresh the routing".into()));
    }
    list(&target, &message).map(|listed| Response::new(&listed))
}

fn list(target: &Target, message: &ListChunksRequest) -> Result<ListChunksResponse> {
    let mut after = match &message.after[..] {
        [] => None,
        bytes => Some(super::write::chunk_id(bytes)?),
    };
    let limit = if message.limit == 0 { LIST_CHUNKS_MAX } else { message.limit.min(LIST_CHUNKS_MAX) } as usize;
    let mut chunks = Vec::new();
    loop {
        let page = target.store.list(after, limit);
        let end = page.len() < limit;
        for (id, meta) in page {
            if message.inode != 0 && id.inode != message.inode {
                return Ok(ListChunksResponse { chunks, end: true });
            }
            if chunks.len() == limit {
                return Ok(ListChunksResponse { chunks, end: false });
            }
            after = Some(id);
            chunks.extend(info(id, &meta));
        }
        if end {
            return Ok(ListChunksResponse { chunks, end: true });
        }
    }
}

/// `None` for a tombstone with nothing pending.
pub(crate) fn info(id: ChunkId, meta: &ChunkMeta) -> Option<ChunkInfo> {
    let pending_version = meta.pending.as_ref().map_or(0, |p| p.update_version.0);
    let live = meta.committed.as_ref().filter(|c| !c.removed);
    if live.is_none() && pending_version == 0 {
        return None;
    }
    let chunk_id = id.to_bytes().to_vec().into();
    Some(match live {
        Some(c) => ChunkInfo {
            chunk_id,
            committed_version: c.update_version.0,
            pending_version,
            chain_version: c.chain_version.0,
            length: c.length,
            // A chunk whose bytes are damaged equals no other, so that a resync replaces it.
            chunk_crc32c: if meta.rotten { !c.chunk_crc32c } else { c.chunk_crc32c },
            chunk_bytes: c.chunk_bytes,
        },
        None => ChunkInfo { chunk_id, pending_version, ..ChunkInfo::default() },
    })
}

/// The predecessor says that this syncing target holds everything. Much of it was durable elsewhere before it came, so it
/// has to be durable here before this target may serve: after a power loss it may be the one that the others follow.
pub(crate) async fn resync_done(core: &Core, request: Request) -> Result<Response> {
    let message: ResyncDoneRequest = decode(&request)?;
    check_replica(&request)?;
    let target = core.target(message.target_id, message.chain_id)?;
    check_syncing(&target, message.chain_version)?;
    target.store.sync().await?;
    let view = check_syncing(&target, message.chain_version)?;
    target.life.lock().uptodate = true;
    tracing::info!(target_id = target.id, chain_version = view.chain_version, "resync done");
    Ok(Response::new(&ResyncDoneResponse {}))
}

fn check_syncing(target: &Target, chain_version: u64) -> Result<RoutingView> {
    let view = target.view();
    if chain_version != view.chain_version {
        return Err(target.error(Code::StaleChain, "the chain has changed; the resync starts again".into()));
    }
    if view.role != Role::Syncing {
        return Err(Error::new(Code::NotServing, "the target is not syncing"));
    }
    Ok(view)
}
