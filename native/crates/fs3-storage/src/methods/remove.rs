use std::sync::Arc;

use fs3_chain::{Kind, Origin};
use fs3_core::{ChunkId, Code, Error, KV_SPACE, Result};
use fs3_io::WriterRecord;
use fs3_net::{Request, Response};
use fs3_proto::v1::{RemoveRequest, RemoveResponse};
use fs3_rt::JoinSet;

use crate::REMOVES_IN_FLIGHT_MAX;
use crate::content::{Body, Job};
use crate::core::Core;
use crate::service::{check_replica, decode};

/// Remove a range of an inode's chunks through the chain, or one forwarded chunk.
pub(crate) async fn remove(core: &Arc<Core>, request: Request) -> Result<Response> {
    let message: RemoveRequest = decode(&request)?;
    let target = core.target(message.target_id, message.chain_id)?;
    let routing_version = core.routing().version;
    if message.forwarded {
        check_replica(&request)?;
        let chunk = ChunkId { space: message.space, inode: message.inode, index: message.first_index };
        let origin = Origin::Forward { version: message.update_version, base: message.base_version, replace: false };
        let job = job(chunk, super::write::writer(message.writer.as_ref())?);
        let outcome = target.update(job, Kind::Remove, message.chain_version, origin, request.deadline).await?;
        let update_version = outcome.update_version;
        return Ok(Response::new(&RemoveResponse { removed_chunks: 1, routing_version, update_version }));
    }
    target.check_serving(message.chain_version)?;
    if !target.view().head {
        return Err(target.error(Code::NotServing, "only the head of a chain removes chunks".into()));
    }
    let writer = super::write::writer(message.writer.as_ref())?;
    if let Some(writer) = writer
        && target.is_range_removed(writer)?
    {
        return Ok(Response::new(&RemoveResponse { removed_chunks: 0, routing_version, update_version: 0 }));
    }
    if message.space == KV_SPACE && (message.first_index, message.last_index) == (0, u32::MAX) {
        target.end_kv(message.inode, request.deadline).await?;
    }
    let chunks = target.store.inode_chunks(message.space, message.inode, message.first_index, message.last_index);
    let live = |m: &fs3_io::ChunkMeta| m.pending.is_some() || m.committed.as_ref().is_some_and(|c| !c.removed);
    let mut left = chunks.into_iter().filter(|(_, meta)| live(meta)).map(|(id, _)| id);
    let mut running: JoinSet<Result<()>> = JoinSet::new();
    let mut removed_chunks = 0;
    loop {
        while running.len() < REMOVES_IN_FLIGHT_MAX {
            let Some(chunk) = left.next() else { break };
            let (target, deadline, chain_version) = (target.clone(), request.deadline, message.chain_version);
            running.spawn(async move {
                target.update(job(chunk, writer), Kind::Remove, chain_version, Origin::Client, deadline).await.map(drop)
            });
        }
        match running.join_next().await {
            None => break,
            Some(Ok(result)) => result?,
            Some(Err(_)) => return Err(Error::new(Code::Internal, "a removal failed; see the log").maybe_applied()),
        }
        removed_chunks += 1;
    }
    target.check_reply()?;
    if let Some(writer) = writer {
        target.range_removed(writer, message.chain_version);
    }
    Ok(Response::new(&RemoveResponse { removed_chunks, routing_version, update_version: 0 }))
}

/// One writer for all chunks of a request: each chunk keeps its own records.
fn job(chunk: ChunkId, writer: Option<WriterRecord>) -> Job {
    Job { chunk, chunk_bytes: 0, body: Body::Remove, writer, durable: false }
}
