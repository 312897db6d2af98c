//! Gets: pieces of values, batched by node, verified, and asked of the next replica where one has nothing.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fs3_core::{Code, Error, Region, RegionMut, Result};
use fs3_net::Sink;
use fs3_proto::v1::{KvGetOp, KvGetRequest, KvGetResponse, KvGetResult, Method};
use fs3_rt::Instant;
use prost::Message;

use super::space::{Address, healthy};
use super::{Shared, together};
use crate::attempt::{lengths, verify};
use crate::loan::Loan;
use crate::trace;

/// Entries of one request.
const BATCH_OPS_MAX: usize = 256;
/// Bytes of one request, unless it is a single entry: as many as leave some requests for a node.
const BATCH_BYTES: std::ops::RangeInclusive<usize> = (1 << 20)..=(4 << 20);
const BATCHES_PER_NODE: usize = 4;
/// How long to wait for a routing that fits the server's.
const ROUTING_PAUSE: Duration = Duration::from_millis(20);

/// What became of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvGot {
    /// It is not there, or nobody who has it answers.
    Miss,
    /// So many bytes were read.
    Hit(usize),
    /// It is there; the value of this length does not fit the memory.
    TooLong(u64),
}

/// One entry that is wanted.
struct Want {
    number: usize,
    address: Address,
    /// Memory for it: a loan, and which part. `None`: only whether it is there.
    window: Option<(Loan, usize, usize)>,
    /// Replicas of the chain version that have nothing or do not answer.
    version: u64,
    asked: usize,
}

/// An entry that was found; without its bytes when they did not fit.
struct Found {
    stored: usize,
    total: u64,
    id: (u64, u64),
}

/// Where a want is asked for.
struct Place {
    node_id: u32,
    chain_id: u32,
    chain_version: u64,
    target_id: u64,
}

#[derive(Default)]
struct Batch {
    bytes: usize,
    wants: Vec<(Want, Place)>,
}

/// Read values into memory given for each.
pub(super) async fn get_into(shared: &Arc<Shared>, items: Vec<(Bytes, RegionMut)>) -> Vec<(KvGot, RegionMut)> {
    let deadline = shared.deadline();
    let chunk = shared.space.piece_bytes();
    let (mut loans, mut wants) = (Vec::with_capacity(items.len()), Vec::with_capacity(items.len()));
    for (number, (key, buf)) in items.into_iter().enumerate() {
        let (address, loan) = (shared.address(&key), Loan::new(buf));
        let room = loan.len().min(chunk);
        wants.push(Want::new(number, address.clone(), (room > 0).then(|| (loan.clone(), 0, room))));
        loans.push((address, loan));
    }
    let firsts = fetch(shared, wants, false, deadline).await;
    let mut got: Vec<KvGot> =
        firsts.iter().zip(&loans).map(|(found, (_, loan))| judge(found, loan.len(), chunk)).collect();
    let whole = complete(shared, &firsts, &loans, &got, deadline).await;
    for (got, whole) in got.iter_mut().zip(whole) {
        if !whole {
            *got = KvGot::Miss;
        }
    }
    let mut finished = Vec::with_capacity(loans.len());
    for (got, (_, loan)) in got.into_iter().zip(loans) {
        finished.push((got, loan.finish().await));
    }
    finished
}

/// What the first piece says of a value.
fn judge(found: &Option<Found>, room: usize, chunk: usize) -> KvGot {
    match found {
        None => KvGot::Miss,
        Some(found) if found.total > room as u64 => KvGot::TooLong(found.total),
        Some(found) if found.stored as u64 == found.total.min(chunk as u64) => KvGot::Hit(found.total as usize),
        Some(_) => KvGot::Miss,
    }
}

/// Read the other pieces of values that have some: whether each value is whole. Only pieces of the put that made the first
/// one count.
async fn complete(
    shared: &Arc<Shared>,
    firsts: &[Option<Found>],
    loans: &[(Address, Loan)],
    got: &[KvGot],
    deadline: Instant,
) -> Vec<bool> {
    let chunk = shared.space.piece_bytes();
    let (mut wants, mut expected) = (Vec::new(), Vec::new());
    for (value, (got, (address, loan))) in got.iter().zip(loans).enumerate() {
        let KvGot::Hit(total) = *got else { continue };
        for piece in 1..total.div_ceil(chunk) {
            let (at, len) = (piece * chunk, chunk.min(total - piece * chunk));
            let address = address.of_piece(&shared.space, piece as u32);
            wants.push(Want::new(wants.len(), address, Some((loan.clone(), at, len))));
            expected.push((value, len));
        }
    }
    let mut whole = vec![true; got.len()];
    if wants.is_empty() {
        return whole;
    }
    for (found, (value, len)) in fetch(shared, wants, false, deadline).await.into_iter().zip(expected) {
        let first = firsts[value].as_ref().map(|first| (first.id, first.total));
        whole[value] &= found.is_some_and(|found| Some((found.id, found.total)) == first && found.stored == len);
    }
    whole
}

/// Read values of which only an expected size is known.
pub(super) async fn get(shared: &Arc<Shared>, keys: Vec<Bytes>, expected: usize) -> Vec<Option<Region>> {
    let take = |len: usize| match len {
        0..=MEMORY_BYTES_MAX => shared.inner().scratch.take(len),
        _ => RegionMut::zeroed(len),
    };
    let mut values: Vec<Option<Region>> = keys.iter().map(|_| None).collect();
    let mut left: Vec<(usize, usize)> = (0..keys.len()).map(|number| (number, expected)).collect();
    // A value may be replaced by a longer one between two tries.
    for _ in 0..TRIES_MAX {
        let items = left.iter().map(|&(number, room)| (keys[number].clone(), take(room))).collect();
        let got = get_into(shared, items).await;
        let mut longer = Vec::new();
        for (&(number, _), (got, buf)) in left.iter().zip(got) {
            match got {
                KvGot::Miss => {}
                KvGot::Hit(len) => values[number] = Some(buf.freeze().slice(0, len)),
                KvGot::TooLong(total) => {
                    shared.seen(total as usize);
                    longer.push((number, total as usize));
                }
            }
        }
        left = longer;
        if left.is_empty() {
            break;
        }
    }
    values
}

const TRIES_MAX: usize = 3;
/// Larger values get memory of their own.
const MEMORY_BYTES_MAX: usize = 64 << 20;

/// Whether values are there, by their first pieces.
pub(super) async fn exists(shared: &Arc<Shared>, keys: Vec<Bytes>) -> Vec<bool> {
    let wants = keys.iter().enumerate().map(|(number, key)| Want::new(number, shared.address(key), None)).collect();
    let found = fetch(shared, wants, true, shared.deadline()).await;
    found.iter().map(Option::is_some).collect()
}

impl Want {
    fn new(number: usize, address: Address, window: Option<(Loan, usize, usize)>) -> Self {
        Self { number, address, window, version: 0, asked: 0 }
    }

    fn bytes(&self) -> usize {
        self.window.as_ref().map_or(0, |window| window.2)
    }
}

/// Find entries, in the order of `wants`, which are numbered so. Errors are misses.
async fn fetch(shared: &Arc<Shared>, wants: Vec<Want>, probe: bool, deadline: Instant) -> Vec<Option<Found>> {
    let mut all: Vec<Option<Found>> = wants.iter().map(|_| None).collect();
    let mut left = wants;
    while !left.is_empty() && Instant::now() < deadline {
        let version = shared.inner().view().version();
        let batches = plan(shared, std::mem::take(&mut left));
        let mut newer = None;
        for (mut want, result) in ask_all(shared, batches, probe, deadline).await {
            match result {
                Ok(Some(found)) => all[want.number] = Some(found),
                Err(error) if error.code == Code::StaleChain => {
                    newer = newer.max(Some(error.routing_version));
                    left.push(want);
                }
                // What a chain serves is the same everywhere.
                Ok(None) if shared.space.durable => {}
                Ok(None) | Err(_) => {
                    want.asked += 1;
                    left.push(want);
                }
            }
        }
        if let Some(newer) = newer {
            shared.inner().wait_routing(version, newer, ROUTING_PAUSE).await;
        }
    }
    all
}

/// Wants that go to the same node, as requests of a good size. Those that nobody is left to be asked for are dropped.
fn plan(shared: &Shared, wants: Vec<Want>) -> Vec<Batch> {
    let (inner, view) = (shared.inner(), shared.inner().view());
    let mut nodes: Vec<Batch> = Vec::new();
    for mut want in wants {
        let Some(chain) = shared.space.chain(&view, want.address.hash) else { continue };
        if want.version != chain.version {
            (want.version, want.asked) = (chain.version, 0);
        }
        let group = shared.space.group(chain);
        let next = (want.asked..group.len()).find(|&at| healthy(inner, chain, &group[at]));
        let Some(next) = next else { continue };
        want.asked = next;
        let place = Place {
            node_id: group[next].node_id,
            chain_id: chain.id,
            chain_version: chain.version,
            target_id: group[next].target_id,
        };
        let at = nodes.iter().position(|batch| batch.wants[0].1.node_id == place.node_id).unwrap_or_else(|| {
            nodes.push(Batch::default());
            nodes.len() - 1
        });
        nodes[at].bytes += want.bytes();
        nodes[at].wants.push((want, place));
    }
    nodes.into_iter().flat_map(Batch::split).collect()
}

impl Batch {
    fn split(self) -> Vec<Self> {
        let bytes_max = (self.bytes / BATCHES_PER_NODE).clamp(*BATCH_BYTES.start(), *BATCH_BYTES.end());
        if self.bytes <= bytes_max && self.wants.len() <= BATCH_OPS_MAX {
            return vec![self];
        }
        let mut batches: Vec<Self> = Vec::new();
        for (want, place) in self.wants {
            let bytes = want.bytes();
            match batches.last_mut() {
                Some(last) if last.wants.len() < BATCH_OPS_MAX && last.bytes + bytes <= bytes_max => {
                    last.bytes += bytes;
                    last.wants.push((want, place));
                }
                _ => batches.push(Self { bytes, wants: vec![(want, place)] }),
            }
        }
        batches
    }
}

type Asked = (Want, Result<Option<Found>>);

async fn ask_all(shared: &Arc<Shared>, batches: Vec<Batch>, probe: bool, deadline: Instant) -> Vec<Asked> {
    let request = |batch: Batch| (batch.bytes, ask(shared.clone(), batch, probe, deadline));
    together::run(batches.into_iter().map(request).collect()).await
}

/// One request to one node.
async fn ask(shared: Arc<Shared>, batch: Batch, probe: bool, deadline: Instant) -> Vec<Asked> {
    match exchange(&shared, &batch, probe, deadline).await {
        Ok(results) => batch.wants.into_iter().map(|(want, _)| want).zip(results).collect(),
        Err(error) => {
            // What the whole node did not answer counts against each of its targets that was asked.
            for (_, place) in &batch.wants {
                note(&shared, place, &error);
            }
            batch.wants.into_iter().map(|(want, _)| (want, Err(error.clone()))).collect()
        }
    }
}

async fn exchange(
    shared: &Shared,
    batch: &Batch,
    probe: bool,
    deadline: Instant,
) -> Result<Vec<Result<Option<Found>>>> {
    let inner = shared.inner();
    let limit = inner.config.read_bytes_in_flight;
    let _budget = inner.reserve(&inner.read_budget, batch.bytes, limit, deadline).await?;
    let mut windows = Vec::with_capacity(batch.wants.len());
    for (want, _) in batch.wants.iter().filter(|_| batch.bytes > 0) {
        windows.push(match &want.window {
            Some((loan, at, len)) => loan.lend(*at, *len).await,
            None => RegionMut::zeroed(0),
        });
    }
    let sink = if windows.is_empty() { Sink::none() } else { Sink { windows, lengths } };
    let ops = batch.wants.iter().map(|(want, place)| want.to_wire(place)).collect();
    let request = KvGetRequest { namespace: shared.space.id, ops, probe, durable: shared.durable() };
    let view = inner.view();
    let node_id = batch.wants[0].1.node_id;
    let address = view.address(node_id).ok_or_else(|| Error::new(Code::Unavailable, "the node is gone"))?;
    let detail = trace::Detail { node_id, chunks: batch.wants.len() as u32, ..Default::default() };
    let call = inner.wire.transfer(address, Method::StorageKvGet, request, Vec::new(), sink, deadline);
    let reply = trace::detailed(detail, call).await?;
    let response = KvGetResponse::decode(&reply.body[..])
        .map_err(|e| Error::new(Code::Protocol, format!("an answer of the cache cannot be read: {e}")))?;
    if response.results.len() != batch.wants.len() {
        return Err(Error::new(Code::Protocol, "storage answered another number of gets than asked"));
    }
    let mut crcs = reply.segment_crcs();
    let results = batch.wants.iter().zip(&response.results).map(|((_, place), result)| {
        accept(shared, place, result, crcs.next().unwrap_or_default())
            .map_err(|error| error.with_routing(response.routing_version))
    });
    Ok(results.collect())
}

impl Want {
    fn to_wire(&self, place: &Place) -> KvGetOp {
        KvGetOp {
            chain_id: place.chain_id,
            chain_version: place.chain_version,
            target_id: place.target_id,
            address: self.address.wire(),
            key: self.address.key.clone(),
            piece: self.address.piece,
            room: self.bytes() as u32,
        }
    }
}

/// Check what came, by the checksums of its blocks.
fn accept(shared: &Shared, place: &Place, result: &KvGetResult, crcs: &[u8]) -> Result<Option<Found>> {
    match Code::from_wire(result.code as u16) {
        _ if result.code == 0 => {
            if !crcs.is_empty() {
                verify(crcs, &result.crcs).inspect_err(|_| shared.calls.damaged())?;
            }
            let id = (result.writer, result.sequence);
            Ok(Some(Found { stored: result.stored as usize, total: result.total, id }))
        }
        Code::NotFound => Ok(None),
        code => {
            let error = Error::new(code, result.message.clone());
            note(shared, place, &error);
            Err(error)
        }
    }
}

/// Remember a failure, so that the target is left alone for a while.
fn note(shared: &Shared, place: &Place, error: &Error) {
    tracing::debug!(target = place.target_id, %error, "a get of the cache failed");
    if error.code != Code::StaleChain {
        shared.calls.failed();
    }
    if matches!(error.code, Code::Unavailable | Code::Timeout | Code::NotServing | Code::NotSupported) {
        shared.inner().health.failed(place.target_id, place.chain_version, Instant::now());
    }
}
