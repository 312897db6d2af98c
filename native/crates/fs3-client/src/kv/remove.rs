//! Removals: told to every replica, and done when all have answered.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fs3_core::{Code, Error, Result};
use fs3_proto::v1::{KvRemoveOp, KvRemoveRequest, KvRemoveResponse, KvRemoveResult, Method};
use fs3_rt::{Instant, JoinSet};
use prost::Message;

use super::Shared;
use super::space::Address;
use crate::trace;

/// Keys that are being removed at a time.
const REMOVING_MAX: usize = 64;
/// How long to wait for a routing that fits the server's.
const ROUTING_PAUSE: Duration = Duration::from_millis(20);

/// Forget values; whether each was there.
pub(super) async fn remove(shared: &Arc<Shared>, keys: Vec<Bytes>) -> Vec<Result<bool>> {
    let deadline = shared.deadline();
    let broke = || Err(Error::new(Code::Internal, "a removal failed; see the log").maybe_applied());
    let mut results: Vec<Result<bool>> = keys.iter().map(|_| broke()).collect();
    let mut waiting = keys.into_iter().enumerate();
    let mut tasks = JoinSet::new();
    loop {
        while tasks.len() < REMOVING_MAX
            && let Some((number, key)) = waiting.next()
        {
            let shared = shared.clone();
            tasks.spawn(trace::inherit(async move { (number, remove_value(&shared, &key, deadline).await) }));
        }
        match tasks.join_next().await {
            Some(Ok((number, result))) => results[number] = result,
            Some(Err(_)) => {}
            None => return results,
        }
    }
}

async fn remove_value(shared: &Shared, key: &[u8], deadline: Instant) -> Result<bool> {
    let address = shared.address(key);
    // Later than all puts that have begun.
    let sequence = shared.inner().kv_sequence();
    let Some(total) = remove_entry(shared, &address, sequence, deadline).await? else { return Ok(false) };
    // Without the first piece the others are never found; that they go now only spares memory.
    for piece in 1..total.div_ceil(shared.space.piece_bytes() as u64) {
        let other = address.of_piece(&shared.space, piece as u32);
        if remove_entry(shared, &other, sequence, deadline).await.is_err() {
            break;
        }
    }
    Ok(true)
}

/// Forget one entry on all its replicas: the value's length, if one had it.
async fn remove_entry(shared: &Shared, address: &Address, sequence: u64, deadline: Instant) -> Result<Option<u64>> {
    let mut removed = None;
    loop {
        let view = shared.inner().view();
        let chain = shared.space.chain(&view, address.hash).filter(|chain| !chain.serving.is_empty());
        let Some(chain) = chain else {
            return Err(Error::new(Code::NotServing, "no replica of the key serves now; try again later"));
        };
        let mut failed = None;
        for replica in shared.space.told(chain) {
            let op = KvRemoveOp {
                chain_id: chain.id,
                chain_version: chain.version,
                target_id: replica.target_id,
                address: address.wire(),
                key: address.key.clone(),
                piece: address.piece,
                sequence,
            };
            match tell(shared, replica.node_id, op, deadline).await {
                Ok(result) if result.removed => removed = Some(result.total),
                Ok(_) => {}
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            None => return Ok(removed),
            Some(error) if error.code == Code::StaleChain && Instant::now() + ROUTING_PAUSE < deadline => {
                shared.inner().wait_routing(view.version(), error.routing_version, ROUTING_PAUSE).await;
            }
            Some(error) => return Err(error),
        }
    }
}

async fn tell(shared: &Shared, node_id: u32, op: KvRemoveOp, deadline: Instant) -> Result<KvRemoveResult> {
    let view = shared.inner().view();
    let address = view.address(node_id).ok_or_else(|| Error::new(Code::Unavailable, "the node is gone"))?;
    let request = KvRemoveRequest { namespace: shared.space.id, ops: vec![op], durable: shared.durable() };
    let body = shared.inner().wire.call(address, Method::StorageKvRemove, request, deadline).await?;
    let response = KvRemoveResponse::decode(body)
        .map_err(|e| Error::new(Code::Protocol, format!("an answer of the cache cannot be read: {e}")))?;
    let Some(result) = response.results.into_iter().next() else {
        return Err(Error::new(Code::Protocol, "storage did not answer a removal"));
    };
    match result.code {
        0 => Ok(result),
        code => Err(Error::new(Code::from_wire(code as u16), result.message).with_routing(response.routing_version)),
    }
}
