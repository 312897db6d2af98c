//! The key-value cache. An operation is admitted like a read: its target serves, under the chain version that the client
//! knows, and the lease still runs when it is answered.

use std::sync::Arc;

use bytes::Bytes;
use fs3_core::{CRC_BLOCK_BYTES, Code, Error, Region, RegionMut, Result, crc32c};
use fs3_kv::{Found, Key, Namespace, Put, PutId, Refused};
use fs3_net::{Request, Response};
use fs3_proto::v1::{
    KvEvictRequest, KvEvictResponse, KvGetOp, KvGetRequest, KvGetResponse, KvGetResult, KvListEntry, KvListRequest,
    KvListResponse, KvNamespace, KvPutOp, KvPutRequest, KvPutResponse, KvPutResult, KvRemoveOp, KvRemoveRequest,
    KvRemoveResponse, KvRemoveResult, KvStatRequest, KvStatResponse,
};
use prost::Message;

use super::kv_chunks::is_chunks;
use crate::core::Core;
use crate::service::decode;
use crate::target::Target;
use crate::{KV_KEY_BYTES_MAX, KV_LIST_MAX, KV_OPS_MAX};

/// A frame's payload limit, shared by the ops of one request.
const PAYLOAD_BYTES_MAX: u64 = 64 << 20;
/// Payloads from here on are checked on a task of their own, not on the receiving one.
const INLINE_BYTES_MAX: usize = 1 << 20;
/// From this size on values of one request get memory of their own while they come.
const PARTED_BYTES_MIN: usize = 32 << 10;

/// Whom an operation is addressed to, and which entry it is about.
struct Address<'a> {
    chain_id: u32,
    chain_version: u64,
    target_id: u64,
    address: &'a [u8],
    key: &'a [u8],
    piece: u32,
}

impl Address<'_> {
    /// The target, if it serves, and the entry's name.
    fn admit(&self, core: &Core, namespace: u64) -> Result<(Arc<Target>, Key<'_>)> {
        let target = core.target(self.target_id, self.chain_id)?;
        let address: [u8; 16] = self.address.try_into().map_err(|_| invalid("an address has 16 bytes"))?;
        if self.key.len() > KV_KEY_BYTES_MAX {
            return Err(invalid("the key is too long"));
        }
        target.check_serving(self.chain_version)?;
        let address = u128::from_be_bytes(address);
        Ok((target, Key { target: self.target_id, namespace, address, key: self.key, piece: self.piece }))
    }
}

/// The fields that operations share.
macro_rules! address {
    ($op:expr) => {
        Address {
            chain_id: $op.chain_id,
            chain_version: $op.chain_version,
            target_id: $op.target_id,
            address: &$op.address,
            key: &$op.key,
            piece: $op.piece,
        }
    };
}

/// Look values up. All is in memory, so it is answered on the receiving task.
pub(crate) async fn get(core: &Arc<Core>, request: &Request) -> Result<Response> {
    let message: KvGetRequest = decode(request)?;
    if is_chunks(message.durable.as_ref()) {
        return super::kv_chunks::get(core, request, message).await;
    }
    check_count(core, message.ops.len())?;
    let mut left = PAYLOAD_BYTES_MAX;
    let mut response = KvGetResponse { results: Vec::with_capacity(message.ops.len()), ..KvGetResponse::default() };
    let mut payload = Vec::new();
    for op in &message.ops {
        let found = get_one(core, message.namespace, op, !message.probe && op.piece == 0);
        response.results.push(match found {
            Ok(Some(found)) => answer(op, found, &mut left, &mut payload),
            Ok(None) => KvGetResult { code: Code::NotFound as u32, ..KvGetResult::default() },
            Err(error) => KvGetResult { code: error.code as u32, message: error.to_string(), ..KvGetResult::default() },
        });
    }
    response.routing_version = core.routing().version;
    let segments = response.results.iter().map(|result| result.length).collect();
    Ok(Response::with_payload(&response, payload, segments))
}

fn get_one(core: &Core, namespace: u64, op: &KvGetOp, count: bool) -> Result<Option<Found>> {
    let address = address!(op);
    let (target, key) = address.admit(core, namespace)?;
    let found = core.kv.with(|cache, now_ms| cache.get(&key, count, now_ms));
    // The lease may have ended before the look.
    target.check_reply()?;
    Ok(found)
}

fn answer(op: &KvGetOp, found: Found, left: &mut u64, payload: &mut Vec<Region>) -> KvGetResult {
    let stored = found.value.data.len() as u32;
    let fits = stored <= op.room && u64::from(stored) <= *left;
    let mut result = KvGetResult {
        stored,
        total: found.total,
        writer: found.id.writer,
        sequence: found.id.sequence,
        ..KvGetResult::default()
    };
    if fits {
        *left -= u64::from(stored);
        (result.length, result.crcs) = (stored, found.value.crcs);
        payload.push(found.value.data);
    }
    result
}

/// Memory for the values of a request that is coming, each in its own: then they need not be copied to be kept.
pub(crate) fn put_parts(core: &Core, body: &[u8], bytes: usize) -> Option<Vec<RegionMut>> {
    if bytes < PARTED_BYTES_MIN {
        return None;
    }
    let message = KvPutRequest::decode(body).ok()?;
    let lengths = || message.ops.iter().map(|op| op.length as usize);
    let parted = (2..=KV_OPS_MAX).contains(&message.ops.len())
        && !is_chunks(message.namespace.as_ref())
        && lengths().all(|length| length > 0)
        && lengths().sum::<usize>() == bytes;
    if parted { core.kv.parts(lengths()) } else { None }
}

/// Keep values; each by itself.
pub(crate) async fn put(core: &Arc<Core>, request: Request) -> Result<Response> {
    let message: KvPutRequest = decode(&request)?;
    if is_chunks(message.namespace.as_ref()) {
        return super::kv_chunks::put(core, request, message).await;
    }
    check_count(core, message.ops.len())?;
    let namespace = settings(message.namespace.as_ref())?;
    let bytes: u64 = message.ops.iter().map(|op| u64::from(op.length)).sum();
    let payload_bytes = request.payload.len() + request.parts.iter().map(|part| part.len()).sum::<usize>();
    if bytes != payload_bytes as u64 {
        return Err(invalid("the payload is not as long as the values"));
    }
    if payload_bytes > INLINE_BYTES_MAX {
        fs3_rt::yield_now().await;
    }
    let writer = writer_of(&request);
    let parted = !request.parts.is_empty();
    let alone = parted || message.ops.len() == 1;
    let (mut parts, mut made_crcs) = (request.parts.into_iter(), request.payload_crcs);
    let mut response = KvPutResponse { results: Vec::with_capacity(message.ops.len()), ..KvPutResponse::default() };
    let mut at = 0;
    for op in &message.ops {
        let data = parts.next().unwrap_or_else(|| request.payload.slice(at, op.length as usize));
        let part = |crcs: &Option<Bytes>| part_of(crcs.as_ref()?, payload_bytes, at, data.len());
        let sent = if op.crcs.is_empty() { part(&request.sent_crcs).unwrap_or_default() } else { op.crcs.clone() };
        let made = if parted { first_of(&mut made_crcs, data.len()) } else { part(&made_crcs) };
        let value = Arrived { made, sent, data };
        at += op.length as usize;
        response.results.push(match put_one(core, namespace, op, writer, value, alone) {
            Ok(()) => KvPutResult::default(),
            Err(error) => KvPutResult { code: error.code as u32, message: error.to_string() },
        });
    }
    response.routing_version = core.routing().version;
    Ok(Response::new(&response))
}

/// Bytes to be kept.
struct Arrived {
    data: Region,
    /// Their checksums as the client made them.
    sent: Bytes,
    /// Those that were made while they came.
    made: Option<Bytes>,
}

/// Take those of the next part from the checksums of parts.
fn first_of(crcs: &mut Option<Bytes>, bytes: usize) -> Option<Bytes> {
    crcs.as_mut().map(|crcs| crcs.split_to(4 * bytes.div_ceil(CRC_BLOCK_BYTES)))
}

/// Of the checksums of a payload, those of a part: its blocks must be blocks of the payload.
fn part_of(crcs: &Bytes, payload_bytes: usize, at: usize, bytes: usize) -> Option<Bytes> {
    let (first, end) = (at / CRC_BLOCK_BYTES, at + bytes);
    let whole = at.is_multiple_of(CRC_BLOCK_BYTES) && (end.is_multiple_of(CRC_BLOCK_BYTES) || end == payload_bytes);
    let part = 4 * first..4 * end.div_ceil(CRC_BLOCK_BYTES);
    (whole && part.end <= crcs.len()).then(|| crcs.slice(part))
}

fn put_one(
    core: &Core,
    namespace: Namespace,
    op: &KvPutOp,
    writer: u64,
    Arrived { data, sent, made }: Arrived,
    alone: bool,
) -> Result<()> {
    // Read before the put is admitted: what is forgotten after that must not be followed by it.
    let epoch = core.kv.with(|cache, _| cache.epoch(op.target_id));
    let address = address!(op);
    let (target, key) = address.admit(core, namespace.id)?;
    if made.is_none_or(|made| made != sent) {
        // Whatever is wrong is found once more.
        check_bytes(&data, &sent)?;
    }
    let value = core.kv.value(data, sent, alone);
    let id = PutId { writer, sequence: op.sequence };
    let put = Put { key, namespace, epoch, id, total: op.total, value };
    let done = core.kv.with(|cache, now_ms| cache.put(put, now_ms));
    match done {
        // Nobody else has served the chain before it was put, as the lease still runs now.
        Ok(_) => target.check_reply(),
        Err(Refused::Moved) => Err(target.error(Code::StaleChain, "the target has left its chain meanwhile".into())),
        Err(Refused::Late) => Err(Error::new(Code::Superseded, "a later put of this client was there already")),
        Err(Refused::TooLarge) => Err(Error::new(Code::NoSpace, "the value is larger than the cache may be")),
    }
}

fn check_bytes(data: &[u8], crcs: &[u8]) -> Result<()> {
    let blocks = data.chunks(CRC_BLOCK_BYTES);
    let matches = crcs.len() == 4 * blocks.len()
        && blocks.zip(crcs.chunks_exact(4)).all(|(block, crc)| crc32c(block).to_le_bytes() == crc);
    if matches { Ok(()) } else { Err(Error::new(Code::PayloadChecksum, "the bytes arrived damaged; send them again")) }
}

/// Forget values; each by itself.
pub(crate) async fn remove(core: &Arc<Core>, request: &Request) -> Result<Response> {
    let message: KvRemoveRequest = decode(request)?;
    if is_chunks(message.durable.as_ref()) {
        return super::kv_chunks::remove(core, request, message).await;
    }
    check_count(core, message.ops.len())?;
    let writer = writer_of(request);
    let mut response = KvRemoveResponse { results: Vec::with_capacity(message.ops.len()), ..Default::default() };
    for op in &message.ops {
        response.results.push(removed(remove_one(core, message.namespace, op, writer)));
    }
    response.routing_version = core.routing().version;
    Ok(Response::new(&response))
}

/// What a client is told of one removal, which found the value of so many bytes or nothing.
pub(super) fn removed(done: Result<Option<u64>>) -> KvRemoveResult {
    match done {
        Ok(total) => {
            KvRemoveResult { removed: total.is_some(), total: total.unwrap_or_default(), ..KvRemoveResult::default() }
        }
        Err(error) => {
            KvRemoveResult { code: error.code as u32, message: error.to_string(), ..KvRemoveResult::default() }
        }
    }
}

fn remove_one(core: &Core, namespace: u64, op: &KvRemoveOp, writer: u64) -> Result<Option<u64>> {
    let address = address!(op);
    let (target, key) = address.admit(core, namespace)?;
    let id = PutId { writer, sequence: op.sequence };
    let removed = core.kv.with(|cache, now_ms| cache.remove(&key, id, now_ms));
    target.check_reply()?;
    Ok(removed)
}

/// Keys of a namespace, for a person.
pub(crate) async fn list(core: &Arc<Core>, request: &Request) -> Result<Response> {
    let message: KvListRequest = decode(request)?;
    if is_chunks(message.durable.as_ref()) {
        return super::kv_chunks::list(core, message).await;
    }
    let limit = if message.limit == 0 { KV_LIST_MAX } else { message.limit.min(KV_LIST_MAX) } as usize;
    let listing =
        core.kv.with(|cache, now_ms| cache.list(message.namespace, &message.prefix, message.after, limit, now_ms));
    let entries = listing.entries.into_iter().map(|entry| KvListEntry {
        key: entry.key.into_vec().into(),
        total: entry.total,
        age_ms: entry.age_ms,
        idle_ms: entry.idle_ms,
    });
    let (next, end) = (listing.next.unwrap_or_default(), listing.next.is_none());
    Ok(Response::new(&KvListResponse { entries: entries.collect(), next, end }))
}

/// Counters of a namespace.
pub(crate) fn stat(core: &Core, request: &Request) -> Result<Response> {
    let message: KvStatRequest = decode(request)?;
    if is_chunks(message.durable.as_ref()) {
        return super::kv_chunks::stat(core, &message);
    }
    let stats = core.kv.with(|cache, _| cache.namespace_stats(message.namespace));
    let counters = stats.all().into_iter().map(|(name, n)| (name.to_owned(), n)).collect();
    Ok(Response::new(&KvStatResponse { counters }))
}

/// Make room, or bring new settings.
pub(crate) async fn evict(core: &Core, request: &Request) -> Result<Response> {
    let message: KvEvictRequest = decode(request)?;
    if is_chunks(message.namespace.as_ref()) {
        return super::kv_chunks::evict(core, message).await;
    }
    let namespace = settings(message.namespace.as_ref())?;
    let (entries, bytes) = core.kv.with(|cache, now_ms| {
        cache.configure(namespace, now_ms);
        cache.evict(namespace.id, message.keep_bytes, now_ms)
    });
    Ok(Response::new(&KvEvictResponse { entries, bytes }))
}

pub(crate) fn settings(namespace: Option<&KvNamespace>) -> Result<Namespace> {
    let namespace = namespace.ok_or_else(|| invalid("the namespace is missing"))?;
    Ok(Namespace {
        id: namespace.id,
        share_bytes: namespace.share_bytes,
        ttl_ms: namespace.ttl_ms,
        generation: namespace.generation,
    })
}

/// Identities are random, so a half tells clients apart.
fn writer_of(request: &Request) -> u64 {
    u64::from_be_bytes(request.peer.peer_id[..8].try_into().expect("eight bytes"))
}

fn check_count(core: &Core, ops: usize) -> Result<()> {
    if !core.kv.is_on() {
        return Err(Error::new(Code::NotSupported, "this node keeps no key-value cache (kv_memory_bytes = 0)"));
    }
    if ops > KV_OPS_MAX {
        return Err(invalid("too many operations for one request"));
    }
    Ok(())
}

fn invalid(message: &'static str) -> Error {
    Error::new(Code::InvalidArgument, message)
}
