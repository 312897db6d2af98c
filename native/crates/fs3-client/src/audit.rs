//! Listings of what replicas hold, for comparing them.

use std::sync::Arc;

use fs3_core::{Code, Error, Result};
use fs3_proto::v1::{ListChunksRequest, ListChunksResponse, Method};
use prost::Message;

use crate::ReplicaListing;
use crate::inner::Inner;

/// Chunks asked for at a time.
const PAGE_CHUNKS: u32 = 4096;

/// All chunks of all targets of all chains.
pub(crate) async fn list_replicas(inner: &Arc<Inner>) -> Result<Vec<ReplicaListing>> {
    let view = inner.view();
    let node_of = |target_id| view.raw.targets.iter().find(|t| t.target_id == target_id).map(|t| t.node_id);
    let mut listings = Vec::new();
    for chain in &view.raw.chains {
        for target in &chain.targets {
            let address = node_of(target.target_id).and_then(|node| view.address(node)).ok_or_else(|| {
                Error::new(Code::Unavailable, format!("the routing has no address of target {}", target.target_id))
            })?;
            let chunks = list_target(inner, address, chain.chain_id, target.target_id).await?;
            listings.push(ReplicaListing {
                chain_id: chain.chain_id,
                target_id: target.target_id,
                state: target.state,
                chunks,
            });
        }
    }
    Ok(listings)
}

async fn list_target(
    inner: &Inner,
    address: &str,
    chain_id: u32,
    target_id: u64,
) -> Result<Vec<fs3_proto::v1::ChunkInfo>> {
    let mut chunks: Vec<fs3_proto::v1::ChunkInfo> = Vec::new();
    loop {
        let after = chunks.last().map(|chunk| chunk.chunk_id.clone()).unwrap_or_default();
        let request = ListChunksRequest { chain_id, target_id, after, limit: PAGE_CHUNKS, ..Default::default() };
        let body = inner.wire.call(address, Method::StorageListChunks, request, inner.deadline()).await?;
        let mut page = ListChunksResponse::decode(body)
            .map_err(|e| Error::new(Code::Protocol, format!("{address} sent a listing that is none: {e}")))?;
        let end = page.end || page.chunks.is_empty();
        chunks.append(&mut page.chunks);
        if end {
            return Ok(chunks);
        }
    }
}
