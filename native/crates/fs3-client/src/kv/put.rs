//! Puts: each piece to all its replicas at once, and told as stored when all have it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use fs3_core::{CRC_BLOCK_BYTES, Code, Error, KvHeader, Region, Result, crc32c};
use fs3_net::{Payload, Sink};
use fs3_proto::v1::{KvPutOp, KvPutRequest, KvPutResponse, Method};
use fs3_rt::Instant;
use prost::Message;

use super::space::{Address, healthy};
use super::{Shared, together};
use crate::trace;

/// Values below this size share requests: storage copies them, which costs less than more requests. It keeps the memory
/// that a larger one arrived in.
const SHARE_BYTES_MAX: usize = 128 << 10;
/// Bytes and entries of a request that values share.
const BATCH_BYTES_MAX: usize = 512 << 10;
const BATCH_OPS_MAX: usize = 256;
/// Times an entry is sent again because it was damaged on the way.
const RESENDS_MAX: usize = 3;
/// How long to wait for a routing that fits the server's.
const ROUTING_PAUSE: Duration = Duration::from_millis(20);

/// One entry to be kept.
struct Piece {
    value: usize,
    address: Address,
    /// What stands before the bytes in a chunk.
    header: Option<Region>,
    data: Region,
    total: u64,
    sequence: u64,
    crcs: OnceLock<Bytes>,
}

impl Piece {
    fn crcs(&self) -> Bytes {
        self.crcs.get_or_init(|| packed_crcs(self.header.as_deref().unwrap_or_default(), &self.data)).clone()
    }

    /// Bytes that are sent.
    fn bytes(&self) -> usize {
        self.header.as_ref().map_or(0, |header| header.len()) + self.data.len()
    }
}

/// One entry for one of its replicas.
struct Send {
    piece: Arc<Piece>,
    node_id: u32,
    chain_id: u32,
    chain_version: u64,
    target_id: u64,
}

/// Keep values; whether each is kept by all its replicas.
pub(super) async fn put(shared: &Arc<Shared>, items: Vec<(Bytes, Region)>) -> Vec<bool> {
    let deadline = shared.deadline();
    let chunk = shared.space.piece_bytes();
    let mut stored = vec![true; items.len()];
    let (mut firsts, mut others) = (Vec::with_capacity(items.len()), Vec::new());
    for (value, (key, data)) in items.into_iter().enumerate() {
        let address = shared.address(&key);
        let (total, sequence) = (data.len() as u64, shared.inner().kv_sequence());
        let piece = |address: Address, data: Region| {
            let header = shared.space.durable.then(|| header(shared, &address, &data, total, sequence));
            Arc::new(Piece { value, address, header, data, total, sequence, crcs: OnceLock::new() })
        };
        for number in 1..data.len().div_ceil(chunk) {
            let part = data.slice(number * chunk, chunk.min(data.len() - number * chunk));
            others.push(piece(address.of_piece(&shared.space, number as u32), part));
        }
        let first = data.slice(0, data.len().min(chunk));
        firsts.push(piece(address, first));
    }
    // The first piece says that the value is there, so it comes last.
    store(shared, others, &mut stored, deadline).await;
    firsts.retain(|piece| stored[piece.value]);
    store(shared, firsts, &mut stored, deadline).await;
    stored
}

/// Have pieces kept by all their replicas; values of which one is not are marked.
async fn store(shared: &Arc<Shared>, pieces: Vec<Arc<Piece>>, stored: &mut [bool], deadline: Instant) {
    let mut left = pieces;
    let mut resends = 0;
    while !left.is_empty() {
        let version = shared.inner().view().version();
        let Planned { requests, homeless } = plan(shared, std::mem::take(&mut left));
        homeless.iter().for_each(|value| stored[*value] = false);
        let (mut newer, mut damaged) = (None, false);
        // What was damaged, or came without its checksums, is sent with them.
        for (send, result) in send_all(shared, requests, resends == 0, deadline).await {
            let Err(error) = result else { continue };
            let again = match error.code {
                Code::StaleChain => {
                    newer = newer.max(Some(error.routing_version));
                    true
                }
                Code::PayloadChecksum => {
                    damaged = true;
                    resends < RESENDS_MAX
                }
                _ => false,
            };
            note(shared, &send, &error);
            if again && Instant::now() < deadline {
                // All replicas again: those of the chain may be others now.
                if !left.iter().any(|piece| Arc::ptr_eq(piece, &send.piece)) {
                    left.push(send.piece);
                }
            } else {
                stored[send.piece.value] = false;
            }
        }
        resends += usize::from(damaged);
        left.retain(|piece| stored[piece.value]);
        if let Some(newer) = newer.filter(|_| !left.is_empty()) {
            shared.inner().wait_routing(version, newer, ROUTING_PAUSE).await;
        }
    }
}

#[derive(Default)]
struct Planned {
    requests: Vec<Vec<Send>>,
    /// Values that not all replicas can keep now.
    homeless: Vec<usize>,
}

/// Who is to keep the pieces, in requests: small ones for the same node together.
fn plan(shared: &Shared, pieces: Vec<Arc<Piece>>) -> Planned {
    let (inner, view) = (shared.inner(), shared.inner().view());
    let mut planned = Planned::default();
    let mut open: Vec<(u32, usize, Vec<Send>)> = Vec::new();
    for piece in pieces {
        let chain = shared.space.chain(&view, piece.address.hash);
        let chain = chain.filter(|chain| {
            let group = shared.space.told(chain);
            !group.is_empty() && group.iter().all(|replica| healthy(inner, chain, replica))
        });
        let Some(chain) = chain else {
            planned.homeless.push(piece.value);
            continue;
        };
        for replica in shared.space.told(chain) {
            let send = Send {
                piece: piece.clone(),
                node_id: replica.node_id,
                chain_id: chain.id,
                chain_version: chain.version,
                target_id: replica.target_id,
            };
            let bytes = piece.bytes();
            if bytes >= SHARE_BYTES_MAX {
                planned.requests.push(vec![send]);
                continue;
            }
            match open.iter_mut().find(|(node_id, ..)| *node_id == replica.node_id) {
                Some((_, sum, sends)) if *sum + bytes <= BATCH_BYTES_MAX && sends.len() < BATCH_OPS_MAX => {
                    *sum += bytes;
                    sends.push(send);
                }
                Some((_, sum, sends)) => {
                    *sum = bytes;
                    planned.requests.push(std::mem::replace(sends, vec![send]));
                }
                None => open.push((replica.node_id, bytes, vec![send])),
            }
        }
    }
    planned.requests.extend(open.into_iter().map(|(_, _, sends)| sends));
    planned
}

type Sent = (Send, Result<()>);

/// `crcs_follow`: checksums may come behind a request.
async fn send_all(shared: &Arc<Shared>, requests: Vec<Vec<Send>>, crcs_follow: bool, deadline: Instant) -> Vec<Sent> {
    let bytes = |sends: &Vec<Send>| sends.iter().map(|send| send.piece.bytes()).sum();
    let request = |sends: Vec<Send>| (bytes(&sends), send(shared.clone(), sends, crcs_follow, deadline));
    together::run(requests.into_iter().map(request).collect()).await
}

/// One request to one node.
async fn send(shared: Arc<Shared>, sends: Vec<Send>, crcs_follow: bool, deadline: Instant) -> Vec<Sent> {
    match exchange(&shared, &sends, crcs_follow, deadline).await {
        Ok(results) => sends.into_iter().zip(results).collect(),
        Err(error) => sends.into_iter().map(|send| (send, Err(error.clone()))).collect(),
    }
}

async fn exchange(shared: &Shared, sends: &[Send], crcs_follow: bool, deadline: Instant) -> Result<Vec<Result<()>>> {
    let inner = shared.inner();
    let bytes = sends.iter().map(|send| send.piece.bytes()).sum();
    let _budget = inner.reserve(&inner.write_budget, bytes, inner.config.write_bytes_in_flight, deadline).await?;
    let parts = sends.iter().flat_map(|send| send.piece.header.iter().chain([&send.piece.data]));
    let pieces: Vec<Region> = parts.filter(|data| !data.is_empty()).cloned().collect();
    let view = inner.view();
    let address = view.address(sends[0].node_id).ok_or_else(|| Error::new(Code::Unavailable, "the node is gone"))?;
    let with_crcs = crcs_follow && !shared.space.durable && inner.wire.sends_crcs(address, &pieces);
    let ops = sends.iter().map(|send| send.to_wire(!with_crcs)).collect();
    let request = KvPutRequest { namespace: Some(shared.namespace()), ops };
    let payload = Payload { pieces, with_crcs };
    let detail = trace::Detail { node_id: sends[0].node_id, chunks: sends.len() as u32, ..Default::default() };
    let call = inner.wire.transfer(address, Method::StorageKvPut, request, payload, Sink::none(), deadline);
    let reply = trace::detailed(detail, call).await?;
    let response = KvPutResponse::decode(reply.body)
        .map_err(|e| Error::new(Code::Protocol, format!("an answer of the cache cannot be read: {e}")))?;
    if response.results.len() != sends.len() {
        return Err(Error::new(Code::Protocol, "storage answered another number of puts than asked"));
    }
    let routing_version = response.routing_version;
    let results = response.results.into_iter().map(|result| match result.code {
        0 => Ok(()),
        code => Err(Error::new(Code::from_wire(code as u16), result.message).with_routing(routing_version)),
    });
    Ok(results.collect())
}

impl Send {
    fn to_wire(&self, with_crcs: bool) -> KvPutOp {
        KvPutOp {
            chain_id: self.chain_id,
            chain_version: self.chain_version,
            target_id: self.target_id,
            address: self.piece.address.wire(),
            key: self.piece.address.key.clone(),
            piece: self.piece.address.piece,
            length: self.piece.bytes() as u32,
            total: self.piece.total,
            sequence: self.piece.sequence,
            crcs: if with_crcs { self.piece.crcs() } else { Bytes::new() },
        }
    }
}

/// Remember a failure, so that the target is left alone for a while.
fn note(shared: &Shared, send: &Send, error: &Error) {
    tracing::debug!(target = send.target_id, %error, "a put into the cache failed");
    if error.code != Code::StaleChain {
        shared.calls.failed();
    }
    if matches!(error.code, Code::Unavailable | Code::Timeout | Code::NotServing | Code::NotSupported) {
        shared.inner().health.failed(send.target_id, send.chain_version, Instant::now());
    }
}

fn header(shared: &Shared, address: &Address, data: &[u8], total: u64, sequence: u64) -> Region {
    let length = data.len() as u32;
    let writer = u64::from_be_bytes(shared.inner().id.0[..8].try_into().expect("eight bytes"));
    let header = KvHeader { key: &address.key, piece: address.piece, length, total, writer, sequence };
    Region::from_vec(header.encode())
}

/// Checksums of the blocks of a header, which are whole ones, and of those of the bytes behind it.
fn packed_crcs(header: &[u8], data: &[u8]) -> Bytes {
    let mut packed = Vec::with_capacity(4 * (header.len() + data.len()).div_ceil(CRC_BLOCK_BYTES));
    for block in header.chunks(CRC_BLOCK_BYTES).chain(data.chunks(CRC_BLOCK_BYTES)) {
        packed.extend_from_slice(&crc32c(block).to_le_bytes());
    }
    packed.into()
}
