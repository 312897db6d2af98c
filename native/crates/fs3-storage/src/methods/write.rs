use std::sync::Arc;

use fs3_chain::{Kind, Origin, Outcome};
use fs3_core::{CRC_BLOCK_BYTES, CheckedBytes, ChunkId, ClientId, Code, Error, Result, UpdateVersion, unpack_crcs};
use fs3_io::WriterRecord;
use fs3_net::{Request, Response};
use fs3_proto::v1::{PunchChunkRequest, TruncateChunkRequest, WriteRequest, WriteResponse, WriterId};

use crate::content::{Body, Job};
use crate::core::{Core, Counters};
use crate::service::{check_replica, decode};
use crate::target::Target;

/// Payloads from here on are checked on a task of their own, not on the receiving one.
const INLINE_BYTES_MAX: usize = 64 << 10;
const CHUNK_BYTES: std::ops::RangeInclusive<u32> = (64 << 10)..=(64 << 20);

/// Write through the chain: from a client at the head, or forwarded by the predecessor.
pub(crate) async fn write(core: &Arc<Core>, request: Request) -> Result<Response> {
    let message: WriteRequest = decode(&request)?;
    let forwarded = message.update_version != 0;
    if forwarded || message.replace {
        check_replica(&request)?;
    }
    let target = core.target(message.target_id, message.chain_id)?;
    let chunk = chunk_id(&message.chunk_id)?;
    check_shape(&target, chunk, &message, request.payload.len())?;
    if request.payload.len() > INLINE_BYTES_MAX && request.payload_crcs.is_none() {
        fs3_rt::yield_now().await;
    }
    // Before anything is forwarded: damage is the sender's to repair, not to be spread.
    let bytes = checked(message.offset, &request, &message.crcs)?;
    Counters::add(&core.counters.writes, 1);
    Counters::add(&core.counters.write_bytes, bytes.data().len() as u64);
    let body = if message.replace {
        let records = message.writers.iter().map(WriterRecord::from_proto).collect::<Option<Vec<_>>>();
        let writers = records.ok_or_else(|| invalid("a writer record is malformed"))?;
        Body::Replace { bytes, writers }
    } else {
        Body::Write(bytes)
    };
    let (chunk_bytes, writer, durable) = (message.chunk_bytes, writer(message.writer.as_ref())?, message.durable);
    let job = || Job { chunk, chunk_bytes, body: body.clone(), writer, durable };
    let _busy = core.foreground.enter();
    let (chain_version, deadline) = (message.chain_version, request.deadline);
    let outcome = if forwarded {
        let (version, base) = (message.update_version, message.base_version);
        let origin = Origin::Forward { version, base, replace: message.replace };
        target.update(job(), Kind::Write, chain_version, origin, deadline).await?
    } else {
        target.update_with_room(job, Kind::Write, chain_version, deadline).await?
    };
    Ok(answer(core, outcome))
}

/// The payload, which begins at `offset` of its chunk, if it matches the checksums in the body, or those behind it.
fn checked(offset: u32, request: &Request, crcs: &[u8]) -> Result<CheckedBytes> {
    let unpack = |packed: &[u8]| unpack_crcs(packed).ok_or_else(|| invalid("the checksums are not packed u32"));
    // Of the payload and of the chunk, blocks are the same.
    let whole_blocks = (offset as usize).is_multiple_of(CRC_BLOCK_BYTES);
    let behind = request.sent_crcs.as_deref().filter(|_| whole_blocks && crcs.is_empty());
    let sent = unpack(behind.unwrap_or(crcs))?;
    match request.payload_crcs.as_deref().filter(|_| whole_blocks) {
        Some(made) => CheckedBytes::compare(offset, request.payload.clone(), &unpack(made)?, sent),
        None => CheckedBytes::check(offset, request.payload.clone(), sent),
    }
}

/// Cut one chunk through the chain.
pub(crate) async fn truncate(core: &Arc<Core>, request: Request) -> Result<Response> {
    let message: TruncateChunkRequest = decode(&request)?;
    let target = core.target(message.target_id, message.chain_id)?;
    let (chunk, chunk_bytes) = (chunk_id(&message.chunk_id)?, message.chunk_bytes);
    let (body, writer) = (Body::Truncate { length: message.length }, writer(message.writer.as_ref())?);
    let job = Job { chunk, chunk_bytes, body, writer, durable: false };
    let kind = Kind::Truncate(message.length);
    let versions = (message.chain_version, message.update_version, message.base_version);
    cut(core, &request, &target, job, kind, versions).await
}

/// Make a range of one chunk a hole through the chain.
pub(crate) async fn punch(core: &Arc<Core>, request: Request) -> Result<Response> {
    let message: PunchChunkRequest = decode(&request)?;
    let target = core.target(message.target_id, message.chain_id)?;
    let (chunk, chunk_bytes) = (chunk_id(&message.chunk_id)?, message.chunk_bytes);
    let (offset, length) = (message.offset, message.length);
    if length == 0 || u64::from(offset) + u64::from(length) > u64::from(chunk_bytes) {
        return Err(invalid("the hole is empty or does not fit the chunk size"));
    }
    let (body, writer) = (Body::Punch { offset, length }, writer(message.writer.as_ref())?);
    let job = Job { chunk, chunk_bytes, body, writer, durable: false };
    let versions = (message.chain_version, message.update_version, message.base_version);
    cut(core, &request, &target, job, Kind::Punch(offset), versions).await
}

/// An update that takes bytes away; `versions`: of the chain, and if forwarded of the update and its base.
async fn cut(
    core: &Core,
    request: &Request,
    target: &Arc<Target>,
    job: Job,
    kind: Kind,
    versions: (u64, u64, u64),
) -> Result<Response> {
    let (chain_version, version, base) = versions;
    let origin = if version == 0 { Origin::Client } else { Origin::Forward { version, base, replace: false } };
    if version != 0 {
        check_replica(request)?;
    }
    check_chunk_bytes(target, job.chunk, job.chunk_bytes)?;
    Ok(answer(core, target.update(job, kind, chain_version, origin, request.deadline).await?))
}

fn answer(core: &Core, outcome: Outcome) -> Response {
    Response::new(&WriteResponse {
        update_version: outcome.update_version,
        chunk_length: outcome.length,
        chunk_crc32c: outcome.crc,
        routing_version: core.routing().version,
    })
}

fn check_shape(target: &Target, chunk: ChunkId, message: &WriteRequest, payload: usize) -> Result<()> {
    let end = u64::from(message.offset) + u64::from(message.length);
    if payload != message.length as usize || end > u64::from(message.chunk_bytes) {
        return Err(invalid("the payload does not fit the range and chunk size of the write"));
    }
    if message.replace && message.offset != 0 {
        return Err(invalid("a replaced chunk begins at 0"));
    }
    if message.replace {
        return if CHUNK_BYTES.contains(&message.chunk_bytes) && message.chunk_bytes.is_power_of_two() {
            Ok(())
        } else {
            Err(invalid("the chunk size is not a power of two from 64 KiB to 64 MiB"))
        };
    }
    check_chunk_bytes(target, chunk, message.chunk_bytes)
}

pub(crate) fn check_chunk_bytes(target: &Target, chunk: ChunkId, chunk_bytes: u32) -> Result<()> {
    if !CHUNK_BYTES.contains(&chunk_bytes) || !chunk_bytes.is_power_of_two() {
        return Err(invalid("the chunk size is not a power of two from 64 KiB to 64 MiB"));
    }
    let committed = target.store.chunk(chunk).and_then(|m| m.committed).filter(|c| !c.removed);
    if committed.is_some_and(|c| c.chunk_bytes != chunk_bytes) {
        return Err(invalid("the chunk was created with another chunk size"));
    }
    Ok(())
}

fn invalid(message: &'static str) -> Error {
    Error::new(Code::InvalidArgument, message)
}

pub(crate) fn chunk_id(bytes: &[u8]) -> Result<ChunkId> {
    ChunkId::from_bytes(bytes).ok_or_else(|| invalid("a chunk id has 16 bytes"))
}

pub(crate) fn writer(id: Option<&WriterId>) -> Result<Option<WriterRecord>> {
    let Some(id) = id else { return Ok(None) };
    let client = <[u8; 16]>::try_from(&id.client_id[..]).map_err(|_| invalid("a client id has 16 bytes"))?;
    let time_ms = fs3_rt::wall_ns() / 1_000_000;
    Ok(Some(WriterRecord {
        client: ClientId(client),
        channel: id.channel,
        sequence: id.sequence,
        update_version: UpdateVersion(0),
        time_ms,
    }))
}
