use std::sync::Arc;

use fs3_chain::ReadAdmission;
use fs3_core::{ChunkId, Code, Error, Result, pack_crcs};
use fs3_io::ReadOut;
use fs3_net::{Request, Response};
use fs3_proto::v1::{ReadOp, ReadRequest, ReadResponse, ReadResult};
use fs3_rt::Instant;

use crate::READ_OPS_MAX;
use crate::core::{Core, Counters};
use crate::service::{check_replica, decode};
use crate::target::Target;

/// A frame's payload limit, shared by the ops of one request.
const READ_BYTES_MAX: u64 = 64 << 20;

type Outcome = Result<(Arc<Target>, ReadOut)>;

/// Read committed bytes. What is in memory is answered at once, on the receiving task.
pub(crate) async fn read(core: &Arc<Core>, request: Request) -> Result<Response> {
    let message: ReadRequest = decode(&request)?;
    let bytes: u64 = message.ops.iter().map(|op| u64::from(op.length)).sum();
    if message.ops.len() > READ_OPS_MAX || bytes > READ_BYTES_MAX {
        let message = format!("a read of {} ops and {bytes} bytes is too much for one request", message.ops.len());
        return Err(Error::new(Code::InvalidArgument, message));
    }
    if message.repair {
        check_replica(&request)?;
        return Ok(read_as_stored(core, message.ops).await);
    }
    let _busy = core.foreground.enter();
    let mut ready: Vec<Option<Outcome>> = message.ops.iter().map(|op| read_now(core, op)).collect();
    let mut waiting = Vec::new();
    for (at, op) in message.ops.into_iter().enumerate() {
        if ready[at].is_none() {
            let (core, deadline) = (core.clone(), request.deadline);
            waiting.push((at, fs3_rt::spawn(async move { read_later(&core, &op, deadline).await })));
        }
    }
    for (at, task) in waiting {
        let failed = |_| Err(Error::new(Code::Internal, "a read failed; see the service's log"));
        ready[at] = Some(task.await.unwrap_or_else(failed));
    }
    // The lease may have ended during the read.
    let checked = |outcome: Outcome| outcome.and_then(|(target, out)| target.check_reply().map(|()| out));
    Ok(respond(core, ready.into_iter().flatten().map(checked).collect()))
}

/// The answer if nobody and no disk has to be waited for.
fn read_now(core: &Arc<Core>, op: &ReadOp) -> Option<Outcome> {
    let (target, chunk) = match locate(core, op) {
        Ok(located) => located,
        Err(error) => return Some(Err(error)),
    };
    if target.read_admission(chunk, op.chain_version) != ReadAdmission::Serve {
        return None;
    }
    let read = target.store.try_read_cached(chunk, op.offset, op.length)?;
    Some(read.map(|out| (target, out)))
}

async fn read_later(core: &Arc<Core>, op: &ReadOp, deadline: Instant) -> Outcome {
    let (target, chunk) = locate(core, op)?;
    target.admit_read(chunk, op.chain_version, deadline).await?;
    let out = read_stored(&target, chunk, op).await?;
    Ok((target, out))
}

async fn read_stored(target: &Arc<Target>, chunk: ChunkId, op: &ReadOp) -> Result<ReadOut> {
    read_range(target, chunk, op.offset, op.length).await
}

/// Read a range, from memory or the disk. Rot that is found is repaired later.
pub(crate) async fn read_range(target: &Arc<Target>, chunk: ChunkId, offset: u32, length: u32) -> Result<ReadOut> {
    let began = Instant::now();
    let read = target.store.read(chunk, offset, length).await;
    target.upkeep.disk.observe(began.elapsed());
    if read.as_ref().is_err_and(|e| e.code == Code::ChecksumMismatch) {
        Counters::add(&target.core.counters.checksum_errors, 1);
        target.found_rot(chunk);
    }
    read
}

/// For a replica that repairs its own copy and checks what it gets: no lease, no chain version, no waiting.
async fn read_as_stored(core: &Core, ops: Vec<ReadOp>) -> Response {
    let mut outcomes = Vec::with_capacity(ops.len());
    for op in ops {
        outcomes.push(match locate(core, &op) {
            Ok((target, chunk)) => read_stored(&target, chunk, &op).await,
            Err(error) => Err(error),
        });
    }
    respond(core, outcomes)
}

fn locate(core: &Core, op: &ReadOp) -> Result<(Arc<Target>, ChunkId)> {
    let target = core.target(op.target_id, op.chain_id)?;
    Ok((target, super::write::chunk_id(&op.chunk_id)?))
}

fn respond(core: &Core, outcomes: Vec<Result<ReadOut>>) -> Response {
    let mut response = ReadResponse { results: Vec::with_capacity(outcomes.len()), ..ReadResponse::default() };
    let mut payload = Vec::new();
    for outcome in outcomes {
        response.results.push(match outcome {
            Ok(out) => {
                Counters::add(&core.counters.reads, 1);
                Counters::add(&core.counters.read_bytes, u64::from(out.length));
                payload.extend(out.data);
                ReadResult {
                    code: 0,
                    length: out.length,
                    update_version: out.version.update_version.0,
                    crcs: pack_crcs(&out.crcs).into(),
                    message: String::new(),
                }
            }
            Err(error) => ReadResult { code: error.code as u32, message: error.to_string(), ..ReadResult::default() },
        });
    }
    response.routing_version = core.routing().version;
    let segments = response.results.iter().map(|result| result.length).collect();
    Response::with_payload(&response, payload, segments)
}
