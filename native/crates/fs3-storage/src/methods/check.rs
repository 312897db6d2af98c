use std::sync::Arc;

use fs3_core::{Code, Error, Result};
use fs3_net::{Request, Response};
use fs3_proto::v1::{CheckRequest, CheckResponse};

use crate::core::{Core, Counters};
use crate::service::decode;

/// A client got bytes that do not match: damaged in this node's memory, on its disk, or on the way. What memory holds
/// of the chunk is forgotten, the disk is looked at, and rot is repaired in the background.
pub(crate) async fn check(core: &Arc<Core>, request: Request) -> Result<Response> {
    let message: CheckRequest = decode(&request)?;
    let target = core.target(message.target_id, message.chain_id)?;
    let chunk = super::write::chunk_id(&message.chunk_id)?;
    // Each reads a whole chunk from the disk: clients must not be able to keep it busy with that.
    let busy = |_| Error::new(Code::Busy, "too many chunks are being checked already; retry later");
    let _turn = core.checks.try_acquire().map_err(busy)?;
    Counters::add(&core.counters.checks_asked, 1);
    target.store.forget_cached(chunk);
    let rotten = !target.store.verify(chunk, 0, u32::MAX).await?.bad.is_empty();
    if rotten {
        target.found_rot(chunk);
    }
    tracing::warn!(target_id = target.id, %chunk, rotten, "a client got bytes that do not match their checksums");
    Ok(Response::new(&CheckResponse { rotten }))
}
