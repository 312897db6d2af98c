//! The key-value cache on the chunk store: an entry is a chunk that its header begins. Puts and removals go through the
//! chain like writes of files, gets are admitted like reads, so all that holds for those holds here.

use std::sync::Arc;

use fs3_chain::{Kind, Origin};
use fs3_core::{
    CRC_BLOCK_BYTES, CheckedBytes, ChunkId, ClientId, Code, Error, KV_SPACE, KV_STORED_KEY_BYTES_MAX, KvHeader, Region,
    Result, UpdateVersion, crc32c, kv_header_bytes, pack_crcs, unpack_crcs,
};
use fs3_io::{ReadOut, WriterRecord};
use fs3_kv::{ChunkKey, Namespace, Stored};
use fs3_net::{Request, Response};
use fs3_proto::v1::{
    KvEvictRequest, KvEvictResponse, KvGetOp, KvGetRequest, KvGetResponse, KvGetResult, KvListEntry, KvListRequest,
    KvListResponse, KvNamespace, KvPutOp, KvPutRequest, KvPutResponse, KvPutResult, KvRemoveOp, KvRemoveRequest,
    KvRemoveResponse, KvStatRequest, KvStatResponse,
};
use fs3_rt::Instant;

use super::kv::{removed, settings};
use super::read::read_range;
use super::write::check_chunk_bytes;
use crate::content::{Body, Job};
use crate::core::Core;
use crate::kv_chunks::{held_bytes, put_ms, wall_ms};
use crate::target::Target;
use crate::{KV_LIST_MAX, KV_OPS_MAX};

/// The channel of a client's puts and removals, beside those of its writes.
const CHANNEL: u32 = u32::MAX;
/// A frame's payload limit, shared by the ops of one request.
const PAYLOAD_BYTES_MAX: u64 = 64 << 20;
/// Entries whose headers one request for a listing reads at most.
const LISTED_MAX: usize = 256;
/// Entries that an eviction takes out of the index in one go.
const EVICTED_AT_ONCE: usize = 1024;

/// An entry that was found.
struct Found {
    length: u32,
    total: u64,
    id: (u64, u64),
    /// `None`: it does not fit.
    value: Option<(Vec<Region>, Vec<u32>)>,
}

fn chunk_of(namespace: u64, address: &[u8]) -> Result<(ChunkId, ChunkKey)> {
    let address: [u8; 16] = address.try_into().map_err(|_| invalid("an address has 16 bytes"))?;
    let index = u128::from_be_bytes(address) as u32;
    Ok((ChunkId { space: KV_SPACE, inode: namespace, index }, ChunkKey { namespace, index }))
}

/// Look values up.
pub(crate) async fn get(core: &Arc<Core>, request: &Request, message: KvGetRequest) -> Result<Response> {
    check_count(message.ops.len())?;
    let namespace = settings(message.durable.as_ref())?;
    let room: u64 = message.ops.iter().map(|op| u64::from(op.room)).sum();
    if room > PAYLOAD_BYTES_MAX {
        return Err(invalid("the room for the values is more than one answer may have"));
    }
    let (probe, deadline) = (message.probe, request.deadline);
    let _busy = core.foreground.enter();
    let found = each(message.ops, |op| {
        let core = core.clone();
        async move { get_one(&core, namespace, &op, !probe && op.piece == 0, deadline).await }
    });
    let mut response = KvGetResponse::default();
    let mut payload = Vec::new();
    for found in found.await {
        response.results.push(match found {
            Ok(Some(found)) => answer(found, &mut payload),
            Ok(None) => KvGetResult { code: Code::NotFound as u32, ..KvGetResult::default() },
            Err(error) => KvGetResult { code: error.code as u32, message: error.to_string(), ..KvGetResult::default() },
        });
    }
    response.routing_version = core.routing().version;
    let segments = response.results.iter().map(|result| result.length).collect();
    Ok(Response::with_payload(&response, payload, segments))
}

async fn get_one(
    core: &Core,
    namespace: Namespace,
    op: &KvGetOp,
    count: bool,
    deadline: Instant,
) -> Result<Option<Found>> {
    let target = core.target(op.target_id, op.chain_id)?;
    let (chunk, key) = chunk_of(namespace.id, &op.address)?;
    check_key(&op.key)?;
    target.admit_read(chunk, op.chain_version, deadline).await?;
    let wanted = kv_header_bytes(op.key.len()) + (op.room as usize).next_multiple_of(CRC_BLOCK_BYTES);
    let read = match read(&target, chunk, wanted as u32).await {
        Err(error) if error.code == Code::ChunkNotFound => None,
        read => Some(read?),
    };
    let put_ms = target.store.chunk(chunk).map_or(0, |meta| put_ms(&meta));
    let found = read.and_then(|out| parse(out, &op.key, op.piece, op.room));
    let expired = target.kv.with(|index, now_ms| {
        index.configure(namespace);
        index.is_expired(namespace.id, put_ms, now_ms)
    });
    let found = found.filter(|_| !expired);
    if target.is_head() {
        target.kv.with(|index, now_ms| index.used(key, found.is_some(), count, now_ms));
    }
    // The lease may have ended during the read.
    target.check_reply()?;
    Ok(found)
}

/// The first bytes of a chunk.
async fn read(target: &Arc<Target>, chunk: ChunkId, length: u32) -> Result<ReadOut> {
    match target.store.try_read_cached(chunk, 0, length) {
        Some(read) => read,
        None => read_range(target, chunk, 0, length).await,
    }
}

/// The entry of a key in what was read of its chunk; `None`: it is another key's, or no entry.
fn parse(out: ReadOut, key: &[u8], piece: u32, room: u32) -> Option<Found> {
    let header_bytes = kv_header_bytes(key.len());
    let header = leading(&out.data, header_bytes)?;
    let header = KvHeader::decode(&header).filter(|header| header.key == key && header.piece == piece)?;
    let length = header.length as usize;
    let (total, id) = (header.total, (header.writer, header.sequence));
    if header.length > room {
        return Some(Found { length: header.length, total, id, value: None });
    }
    let data = cut(out.data, header_bytes, length);
    let blocks = length.div_ceil(CRC_BLOCK_BYTES);
    let first = header_bytes / CRC_BLOCK_BYTES;
    let mut crcs = out.crcs.get(first..first + blocks)?.to_vec();
    if data.iter().map(|part| part.len()).sum::<usize>() != length {
        return None;
    }
    // The chunk may go on with bytes of a former entry; the read has verified the whole block.
    let tail = length % CRC_BLOCK_BYTES;
    if tail > 0 && out.length as usize > header_bytes + length {
        *crcs.last_mut()? = crc32c(&last_bytes(&data, tail));
    }
    Some(Found { length: header.length, total, id, value: Some((data, crcs)) })
}

/// The first bytes of what was read, in one piece.
fn leading(data: &[Region], bytes: usize) -> Option<Vec<u8>> {
    let head: Vec<u8> = data.iter().flat_map(|part| &part[..part.len().min(bytes)]).copied().take(bytes).collect();
    (head.len() == bytes).then_some(head)
}

fn last_bytes(data: &[Region], bytes: usize) -> Vec<u8> {
    let mut tail: Vec<u8> = data.iter().rev().flat_map(|part| part.iter().rev()).copied().take(bytes).collect();
    tail.reverse();
    tail
}

/// `length` bytes from `start` on, without copying.
fn cut(data: Vec<Region>, start: usize, length: usize) -> Vec<Region> {
    let (mut skip, mut left, mut kept) = (start, length, Vec::with_capacity(data.len()));
    for part in data {
        let from = skip.min(part.len());
        let bytes = left.min(part.len() - from);
        skip -= from;
        left -= bytes;
        if bytes > 0 {
            kept.push(part.slice(from, bytes));
        }
    }
    kept
}

fn answer(found: Found, payload: &mut Vec<Region>) -> KvGetResult {
    let (writer, sequence) = found.id;
    let mut result =
        KvGetResult { stored: found.length, total: found.total, writer, sequence, ..KvGetResult::default() };
    if let Some((data, crcs)) = found.value {
        (result.length, result.crcs) = (found.length, pack_crcs(&crcs).into());
        payload.extend(data);
    }
    result
}

/// Keep values; each by itself. Its bytes are the chunk: the header, then the value.
pub(crate) async fn put(core: &Arc<Core>, request: Request, message: KvPutRequest) -> Result<Response> {
    check_count(message.ops.len())?;
    let namespace = settings(message.namespace.as_ref())?;
    let chunk_bytes = message.namespace.as_ref().map_or(0, |known| known.chunk_bytes);
    let bytes: u64 = message.ops.iter().map(|op| u64::from(op.length)).sum();
    if bytes != request.payload.len() as u64 {
        return Err(invalid("the payload is not as long as the values"));
    }
    let (client, deadline) = (ClientId(request.peer.peer_id), request.deadline);
    let mut at = 0;
    let ops = message.ops.into_iter().map(|op| {
        let data = request.payload.slice(at, op.length as usize);
        at += op.length as usize;
        (op, data)
    });
    let ops: Vec<(KvPutOp, Region)> = ops.collect();
    let _busy = core.foreground.enter();
    let done = each(ops, |(op, data)| {
        let core = core.clone();
        async move { put_one(&core, namespace, chunk_bytes, &op, data, client, deadline).await }
    });
    let mut response = KvPutResponse::default();
    for done in done.await {
        response.results.push(match done {
            Ok(()) => KvPutResult::default(),
            Err(error) => KvPutResult { code: error.code as u32, message: error.to_string() },
        });
    }
    response.routing_version = core.routing().version;
    Ok(Response::new(&response))
}

async fn put_one(
    core: &Core,
    namespace: Namespace,
    chunk_bytes: u32,
    op: &KvPutOp,
    data: Region,
    client: ClientId,
    deadline: Instant,
) -> Result<()> {
    let target = core.target(op.target_id, op.chain_id)?;
    let (chunk, key) = chunk_of(namespace.id, &op.address)?;
    check_key(&op.key)?;
    check_chunk_bytes(&target, chunk, chunk_bytes)?;
    let crcs = unpack_crcs(&op.crcs).ok_or_else(|| invalid("the checksums are not packed u32"))?;
    let bytes = CheckedBytes::check(0, data, crcs)?;
    let header_bytes = kv_header_bytes(op.key.len());
    let header = KvHeader::decode(bytes.data()).ok_or_else(|| invalid("the entry does not begin with its header"))?;
    let names = header.key == op.key && header.piece == op.piece;
    if !names || header_bytes + header.length as usize != bytes.data().len() || bytes.end() > chunk_bytes {
        return Err(invalid("the header is not that of the entry, or the entry does not fit the chunk size"));
    }
    let length = u64::from(header.length);
    if namespace.share_bytes != 0 && length > namespace.share_bytes {
        return Err(Error::new(Code::NoSpace, "the value is larger than the namespace may be"));
    }
    let turn = target.begin_kv_put(key, deadline).await?;
    let writer = Some(writer(client, op.sequence));
    let job = || Job { chunk, chunk_bytes, body: Body::Write(bytes.clone()), writer, durable: false };
    let result = target.update_with_room(job, Kind::Write, op.chain_version, deadline).await;
    let stored = |chunk_length| Stored { bytes: length, held_bytes: held_bytes(chunk_length), put_ms: wall_ms() };
    let left = match &result {
        Ok(outcome) => Some(stored(outcome.length)),
        // It may be there: one that is not is removed in vain some day.
        Err(error) if error.maybe_applied => Some(stored((header_bytes as u64 + length) as u32)),
        Err(_) => None,
    };
    target.kv.with(|index, _| index.configure(namespace));
    if turn.end(left) {
        target.evict_kv_surplus();
    }
    result.map(drop)
}

fn writer(client: ClientId, sequence: u64) -> WriterRecord {
    let time_ms = i64::try_from(wall_ms()).unwrap_or(i64::MAX);
    WriterRecord { client, channel: CHANNEL, sequence, update_version: UpdateVersion(0), time_ms }
}

/// Forget values; each by itself.
pub(crate) async fn remove(core: &Arc<Core>, request: &Request, message: KvRemoveRequest) -> Result<Response> {
    check_count(message.ops.len())?;
    let namespace = settings(message.durable.as_ref())?;
    let (client, deadline) = (ClientId(request.peer.peer_id), request.deadline);
    let done = each(message.ops, |op| {
        let core = core.clone();
        async move { remove_one(&core, namespace, &op, client, deadline).await }
    });
    let results = done.await.into_iter().map(removed).collect();
    Ok(Response::new(&KvRemoveResponse { results, routing_version: core.routing().version }))
}

async fn remove_one(
    core: &Core,
    namespace: Namespace,
    op: &KvRemoveOp,
    client: ClientId,
    deadline: Instant,
) -> Result<Option<u64>> {
    let probe = KvGetOp {
        chain_id: op.chain_id,
        chain_version: op.chain_version,
        target_id: op.target_id,
        address: op.address.clone(),
        key: op.key.clone(),
        piece: op.piece,
        room: 0,
    };
    let target = core.target(op.target_id, op.chain_id)?;
    let (chunk, key) = chunk_of(namespace.id, &op.address)?;
    let found = get_one(core, namespace, &probe, false, deadline).await?;
    let committed = target.store.chunk(chunk).and_then(|meta| meta.committed).is_some_and(|v| !v.removed);
    if found.is_none() && committed {
        // Another key's, or one whose time is over.
        return Ok(None);
    }
    // Also where there is nothing: an earlier put of this client that comes late has no effect then.
    let (body, writer) = (Body::Remove, Some(writer(client, op.sequence)));
    let job = Job { chunk, chunk_bytes: 0, body, writer, durable: false };
    target.update(job, Kind::Remove, op.chain_version, Origin::Client, deadline).await?;
    target.kv.with(|index, _| index.removed(key));
    Ok(found.map(|found| found.total))
}

/// Keys of a namespace, for a person: those of the chains that this node is the head of.
pub(crate) async fn list(core: &Arc<Core>, message: KvListRequest) -> Result<Response> {
    let namespace = settings(message.durable.as_ref())?;
    let limit = if message.limit == 0 { KV_LIST_MAX } else { message.limit.min(KV_LIST_MAX) } as usize;
    // A place is the number of a head, and an index among its chunks.
    let (mut number, mut after) = ((message.after >> 33) as usize, message.after & ((1 << 33) - 1));
    let heads = core.heads();
    let (mut entries, mut looked_at) = (Vec::new(), 0);
    while let Some(target) = heads.get(number) {
        let page = target.store.list(Some(before(namespace.id, after)), LISTED_MAX);
        let own = page.into_iter().take_while(|(id, _)| (id.space, id.inode) == (KV_SPACE, namespace.id));
        let mut last = None;
        for (chunk, meta) in own {
            if entries.len() == limit || looked_at == LISTED_MAX {
                let next = ((number as u64) << 33) | u64::from(chunk.index);
                return Ok(Response::new(&KvListResponse { entries, next, end: false }));
            }
            (looked_at, last) = (looked_at + 1, Some(chunk.index));
            if meta.committed.as_ref().is_some_and(|v| !v.removed) {
                entries.extend(listed(target, namespace, chunk, put_ms(&meta), &message.prefix).await);
            }
        }
        (number, after) = match last {
            Some(index) => (number, u64::from(index) + 1),
            None => (number + 1, 0),
        };
    }
    Ok(Response::new(&KvListResponse { entries, next: 0, end: true }))
}

/// The id before that of the chunk `index` of a namespace, which may be one past the last.
fn before(namespace: u64, index: u64) -> ChunkId {
    match index.checked_sub(1) {
        Some(index) => ChunkId { space: KV_SPACE, inode: namespace, index: u32::try_from(index).unwrap_or(u32::MAX) },
        None => ChunkId { space: KV_SPACE, inode: namespace.saturating_sub(1), index: u32::MAX },
    }
}

async fn listed(
    target: &Arc<Target>,
    namespace: Namespace,
    chunk: ChunkId,
    put_ms: u64,
    prefix: &[u8],
) -> Option<KvListEntry> {
    let out = read(target, chunk, fs3_core::KV_HEADER_BYTES_MAX as u32).await.ok()?;
    let head = leading(&out.data, out.length as usize)?;
    let header = KvHeader::decode(&head).filter(|header| header.piece == 0 && header.key.starts_with(prefix))?;
    let key = ChunkKey { namespace: namespace.id, index: chunk.index };
    target.kv.with(|index, now_ms| {
        index.configure(namespace);
        if index.is_expired(namespace.id, put_ms, now_ms) {
            return None;
        }
        let used_ms = index.used_ms(key).unwrap_or(put_ms);
        Some(KvListEntry {
            key: header.key.to_vec().into(),
            total: header.total,
            age_ms: now_ms.saturating_sub(put_ms),
            idle_ms: now_ms.saturating_sub(used_ms),
        })
    })
}

/// Counters of a namespace on the chains that this node is the head of.
pub(crate) fn stat(core: &Core, message: &KvStatRequest) -> Result<Response> {
    let namespace = settings(message.durable.as_ref())?;
    let mut sums = fs3_kv::NamespaceStats::default();
    for target in core.heads() {
        target.kv.with(|index, _| {
            index.configure(namespace);
            sums.add(&index.stats(namespace.id));
        });
    }
    let counters = sums.all().into_iter().map(|(name, n)| (name.to_owned(), n)).collect();
    Ok(Response::new(&KvStatResponse { counters }))
}

/// Make room, or bring new settings.
pub(crate) async fn evict(core: &Core, message: KvEvictRequest) -> Result<Response> {
    let namespace = settings(message.namespace.as_ref())?;
    let heads = core.heads();
    for target in &heads {
        target.kv.with(|index, _| index.configure(namespace));
        target.evict_kv_surplus();
    }
    let held: Vec<u64> = heads.iter().map(|target| target.kv.with(|index, _| index.bytes(namespace.id))).collect();
    let all: u64 = held.iter().sum();
    let (mut entries, mut bytes) = (0, 0);
    for (target, held) in heads.iter().zip(held) {
        if message.keep_bytes >= all && message.keep_bytes > 0 {
            break;
        }
        let keep = (u128::from(message.keep_bytes) * u128::from(held) / u128::from(all.max(1))) as u64;
        loop {
            let (before, going, after) = target.kv.with(|index, _| {
                let before = index.bytes(namespace.id);
                (before, index.evict(namespace.id, keep, EVICTED_AT_ONCE), index.bytes(namespace.id))
            });
            if going.is_empty() {
                break;
            }
            (entries, bytes) = (entries + going.len() as u64, bytes + (before - after));
            target.remove_kv(going).await;
        }
    }
    Ok(Response::new(&KvEvictResponse { entries, bytes }))
}

/// Whether a namespace is of this kind.
pub(crate) fn is_chunks(namespace: Option<&KvNamespace>) -> bool {
    namespace.is_some_and(|namespace| namespace.chunk_bytes != 0)
}

/// Do all at the same time; one alone on this task.
async fn each<T, R, F>(mut ops: Vec<T>, work: impl Fn(T) -> F) -> Vec<Result<R>>
where
    R: Send + 'static,
    F: Future<Output = Result<R>> + Send + 'static,
{
    if ops.len() == 1 {
        return vec![work(ops.remove(0)).await];
    }
    let tasks: Vec<_> = ops.into_iter().map(|op| fs3_rt::spawn(work(op))).collect();
    let mut results = Vec::with_capacity(tasks.len());
    for task in tasks {
        let failed = |_| Err(Error::new(Code::Internal, "an operation failed; see the service's log").maybe_applied());
        results.push(task.await.unwrap_or_else(failed));
    }
    results
}

fn check_count(ops: usize) -> Result<()> {
    if ops > KV_OPS_MAX { Err(invalid("too many operations for one request")) } else { Ok(()) }
}

fn check_key(key: &[u8]) -> Result<()> {
    if key.len() > KV_STORED_KEY_BYTES_MAX { Err(invalid("the key is too long")) } else { Ok(()) }
}

fn invalid(message: &'static str) -> Error {
    Error::new(Code::InvalidArgument, message)
}
