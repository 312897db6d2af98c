//! Reads: cut by chunk, batched by node, verified, and tried on every replica that serves.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use fs3_core::{CRC_BLOCK_BYTES, Code, Error, RegionMut, Result, crc32c};
use fs3_net::Sink;
use fs3_proto::v1::{Layout, Method, ReadOp as WireOp, ReadRequest, ReadResponse, ReadResult};
use prost::Message;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::inner::Inner;
use crate::loan::Loan;
use crate::plan::{Blocks, Piece, pieces};
use crate::routing::{RoutingView, spread};
use crate::{OpenFile, ReadOp};

/// Limits of one request: chunks, and bytes unless it is a single chunk.
const BATCH_OPS_MAX: usize = 256;
const BATCH_BYTES_MAX: usize = 1 << 20;

/// What the units of one operation share.
struct Target {
    buffer: Loan,
    /// Some chunk had nothing: a hole, or the file is gone.
    hole: AtomicBool,
}

/// One piece of one operation until it is read.
struct Unit {
    op: usize,
    target: Arc<Target>,
    layout: Layout,
    piece: Piece,
    blocks: Blocks,
    /// Targets that failed in this round, with the version of the chain at that time.
    tried: Vec<(u64, u64)>,
    /// Some failure of this round may pass.
    hope: bool,
}

/// Where a unit is read from.
#[derive(Clone)]
struct Source {
    address: Arc<str>,
    chain_id: u32,
    chain_version: u64,
    target_id: u64,
}

impl Target {
    fn new(buf: RegionMut) -> Arc<Self> {
        Arc::new(Self { buffer: Loan::new(buf), hole: AtomicBool::new(false) })
    }
}

/// Read one range of one file.
pub(crate) async fn read_one(file: &OpenFile, offset: u64, buf: RegionMut) -> (Result<usize>, RegionMut) {
    let target = Target::new(buf);
    let mut units = Vec::new();
    let result = match plan(0, file, offset, &target, &mut units) {
        Err(error) => Err(error),
        Ok(count) => match read_units(file.client().inner(), units).await.pop() {
            None => confirm(file, offset, &target, count).await,
            Some((_, error)) => Err(error),
        },
    };
    (result, target.buffer.finish().await)
}

/// Read many ranges; results in the order of `ops`.
pub(crate) async fn read_many(inner: &Arc<Inner>, ops: Vec<ReadOp>) -> Vec<(Result<usize>, RegionMut)> {
    let mut units = Vec::with_capacity(ops.len());
    let mut planned = Vec::with_capacity(ops.len());
    for (op, ReadOp { file, offset, buf }) in ops.into_iter().enumerate() {
        let target = Target::new(buf);
        let count = plan(op, &file, offset, &target, &mut units);
        planned.push((file, offset, count, target));
    }
    for (op, error) in read_units(inner, units).await {
        planned[op].2 = Err(error);
    }
    let mut finished = Vec::with_capacity(planned.len());
    for (file, offset, count, target) in planned {
        let result = match count {
            Ok(count) => confirm(&file, offset, &target, count).await,
            error => error,
        };
        finished.push((result, target.buffer.finish().await));
    }
    finished
}

/// A missing chunk is a hole only if the file is still there. A file that is open without a session may have been
/// removed or cut by another client, and zeros would be wrong then.
async fn confirm(file: &OpenFile, offset: u64, target: &Target, count: usize) -> Result<usize> {
    if !target.hole.load(Ordering::Relaxed) || file.writable() {
        return Ok(count);
    }
    file.confirm_exists().await?;
    Ok(count.min(usize::try_from(file.length().saturating_sub(offset)).unwrap_or(usize::MAX)))
}

/// Add the units of one operation; returns how many bytes it will have read.
fn plan(op: usize, file: &OpenFile, offset: u64, target: &Arc<Target>, units: &mut Vec<Unit>) -> Result<usize> {
    file.check_open()?;
    let state = file.state();
    let (layout, left, room) = (state.layout(), state.length().saturating_sub(offset), target.buffer.len());
    let count = usize::try_from(left).unwrap_or(usize::MAX).min(room);
    if count == 0 {
        return Ok(0);
    }
    for piece in pieces(state.inode, layout.chunk_bytes, offset, count)? {
        let blocks = Blocks::of(&piece, room);
        units.push(Unit { op, target: target.clone(), layout, piece, blocks, tried: Vec::new(), hope: false });
    }
    Ok(count)
}

/// Read all units; the errors that remain, by operation.
async fn read_units(inner: &Arc<Inner>, units: Vec<Unit>) -> Vec<(usize, Error)> {
    let deadline = inner.deadline();
    let mut batches = batch(inner, units);
    if batches.len() == 1 {
        let (source, units) = batches.pop().expect("one batch");
        return read_batch(inner.clone(), source, units, deadline).await;
    }
    let mut tasks = JoinSet::new();
    for (source, units) in batches {
        tasks.spawn(read_batch(inner.clone(), source, units, deadline));
    }
    tasks.join_all().await.into_iter().flatten().collect()
}

/// What goes into one request: units that are read from the same node, and the source of each. Those without a
/// source are together too.
type Batch = (Option<Arc<str>>, Vec<Sourced>);
type Sourced = (Option<Source>, Unit);

fn batch(inner: &Inner, units: Vec<Unit>) -> Vec<Batch> {
    let view = inner.view();
    let mut done: Vec<Batch> = Vec::new();
    let mut open: HashMap<Option<Arc<str>>, (usize, Vec<Sourced>)> = HashMap::new();
    for unit in units {
        let source = choose(inner, &view, &unit);
        let address = source.as_ref().map(|source| source.address.clone());
        let (bytes, list) = open.entry(address.clone()).or_default();
        let full = list.len() >= BATCH_OPS_MAX || *bytes + unit.blocks.len as usize > BATCH_BYTES_MAX;
        if full && !list.is_empty() {
            done.push((address, std::mem::take(list)));
            *bytes = 0;
        }
        *bytes += unit.blocks.len as usize;
        list.push((source, unit));
    }
    done.extend(open.into_iter().map(|(address, (_, list))| (address, list)));
    done
}

/// The replica to read from: the preferred one by the chunk's hash, else the next that has not failed.
fn choose(inner: &Inner, view: &RoutingView, unit: &Unit) -> Option<Source> {
    let chain = view.chain(view.chain_of(&unit.layout, u64::from(unit.piece.chunk.index))?)?;
    let count = chain.serving.len();
    let first = (spread(&unit.piece.chunk) % count.max(1) as u64) as usize;
    let now = Instant::now();
    let untried = || {
        (0..count)
            .map(|i| chain.serving[(first + i) % count])
            .filter(|replica| !unit.tried.contains(&(replica.target_id, chain.version)))
    };
    let healthy = untried().find(|replica| !inner.health.suspect(replica.target_id, chain.version, now));
    let replica = healthy.or_else(|| untried().next())?;
    Some(Source {
        address: view.address(replica.node_id)?.clone(),
        chain_id: chain.id,
        chain_version: chain.version,
        target_id: replica.target_id,
    })
}

/// One request for all; those that fail go on by themselves.
async fn read_batch(
    inner: Arc<Inner>,
    address: Option<Arc<str>>,
    list: Vec<Sourced>,
    deadline: Instant,
) -> Vec<(usize, Error)> {
    let mut failed = Vec::new();
    if address.is_none() {
        let none = || Error::new(Code::NotServing, "no replica of the chunk serves now");
        failed.extend(list.into_iter().map(|(_, unit)| (None, unit, none())));
    } else {
        let (sources, units): (Vec<_>, Vec<_>) = list.into_iter().map(|(s, u)| (s.expect("an address"), u)).unzip();
        let results = attempt(&inner, &sources, &units, deadline).await;
        for ((source, unit), result) in sources.into_iter().zip(units).zip(results) {
            if let Err(error) = result {
                failed.push((Some(source), unit, error));
            }
        }
    }
    if failed.len() <= 1 {
        return match failed.pop() {
            Some((source, unit, error)) => settle(inner, source, unit, error, deadline).await.into_iter().collect(),
            None => Vec::new(),
        };
    }
    let mut tasks = JoinSet::new();
    for (source, unit, error) in failed {
        tasks.spawn(settle(inner.clone(), source, unit, error, deadline));
    }
    tasks.join_all().await.into_iter().flatten().collect()
}

/// Try the other replicas, and then all again whenever the routing may have changed, until the deadline.
async fn settle(
    inner: Arc<Inner>,
    source: Option<Source>,
    mut unit: Unit,
    mut error: Error,
    deadline: Instant,
) -> Option<(usize, Error)> {
    let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(1));
    if let Some(source) = source {
        unit.failed(&inner, &source, &error);
    }
    loop {
        let view = inner.view();
        let outdated = error.code == Code::StaleChain && error.routing_version > view.version();
        if let Some(next) = choose(&inner, &view, &unit).filter(|_| !outdated && Instant::now() < deadline) {
            inner.counters.read_failovers.fetch_add(1, Ordering::Relaxed);
            let mut results = attempt(&inner, std::slice::from_ref(&next), std::slice::from_ref(&unit), deadline).await;
            match results.pop().expect("one result per unit") {
                Ok(()) => return None,
                Err(again) => error = again,
            }
            unit.failed(&inner, &next, &error);
            continue;
        }
        // Every replica has been tried. A round of final errors is final; no replica at all is not.
        if !unit.hope && !unit.tried.is_empty() {
            return Some((unit.op, error));
        }
        let pause = backoff.next();
        if Instant::now() + pause >= deadline {
            let message = format!("no replica of chunk {} answered in time; the last error: {error}", unit.piece.chunk);
            return Some((unit.op, Error::new(Code::Timeout, message)));
        }
        inner.wait_routing(view.version(), error.routing_version, pause).await;
        unit.tried.clear();
        unit.hope = false;
        error.routing_version = 0;
    }
}

impl Unit {
    /// Remember a failure for this round, and for others when the target is to blame.
    fn failed(&mut self, inner: &Inner, source: &Source, error: &Error) {
        tracing::debug!(target = source.target_id, chunk = %self.piece.chunk, %error, "read failed");
        self.tried.push((source.target_id, source.chain_version));
        self.hope |= error.retryable();
        match error.code {
            Code::ChecksumMismatch => {
                inner.counters.checksum_failures.fetch_add(1, Ordering::Relaxed);
            }
            Code::Unavailable | Code::Timeout | Code::NotServing | Code::DiskError => {
                inner.health.failed(source.target_id, source.chain_version, Instant::now());
            }
            _ => {}
        }
    }

    fn to_wire(&self, source: &Source) -> WireOp {
        WireOp {
            chain_id: source.chain_id,
            chain_version: source.chain_version,
            target_id: source.target_id,
            chunk_id: Bytes::copy_from_slice(&self.piece.chunk.to_bytes()),
            offset: self.blocks.offset,
            length: self.blocks.len,
        }
    }

    /// Memory for the blocks: the caller's, or scratch.
    async fn window(&self, inner: &Inner) -> RegionMut {
        let len = self.blocks.len as usize;
        if self.blocks.direct { self.target.buffer.lend(self.piece.at, len).await } else { inner.scratch.take(len) }
    }

    /// Check what came and put it in its place; what the chunk does not have is zeros.
    async fn accept(&self, result: &ReadResult, mut window: RegionMut, got: usize) -> Result<()> {
        match Code::from_wire(result.code as u16) {
            _ if result.code == 0 => verify(&window[..got], &result.crcs)?,
            Code::ChunkNotFound if got == 0 => self.target.hole.store(true, Ordering::Relaxed),
            code => return Err(Error::new(code, result.message.clone())),
        }
        let (skip, len) = ((self.piece.offset - self.blocks.offset) as usize, self.piece.len as usize);
        if self.blocks.direct {
            window[got.min(len)..len].fill(0);
            return Ok(());
        }
        let mut out = self.target.buffer.lend(self.piece.at, len).await;
        let have = got.saturating_sub(skip).min(len);
        out[..have].copy_from_slice(&window[skip..skip + have]);
        out[have..].fill(0);
        Ok(())
    }
}

/// One request to one node. One result per unit.
async fn attempt(inner: &Inner, sources: &[Source], units: &[Unit], deadline: Instant) -> Vec<Result<()>> {
    match exchange(inner, sources, units, deadline).await {
        Ok(results) => results,
        Err(error) => units.iter().map(|_| Err(error.clone())).collect(),
    }
}

async fn exchange(inner: &Inner, sources: &[Source], units: &[Unit], deadline: Instant) -> Result<Vec<Result<()>>> {
    let bytes: usize = units.iter().map(|unit| unit.blocks.len as usize).sum();
    let limit = inner.config.read_bytes_in_flight;
    let _budget = inner.reserve(&inner.read_budget, bytes, limit, deadline).await?;
    let mut windows = Vec::with_capacity(units.len());
    for unit in units {
        windows.push(unit.window(inner).await);
    }
    let ops = sources.iter().zip(units).map(|(source, unit)| unit.to_wire(source)).collect();
    let until = deadline.min(Instant::now() + inner.config.read_attempt_timeout);
    let sink = Sink { windows, lengths };
    let address = &sources[0].address;
    let request = ReadRequest { ops };
    let reply = inner.wire.transfer(address, Method::StorageRead, request, Vec::new(), sink, until).await?;
    let response = decode(&reply.body)?;
    if response.results.len() != units.len() {
        return Err(Error::new(Code::Protocol, "storage answered another number of reads than asked"));
    }
    let mut results = Vec::with_capacity(units.len());
    for (((unit, result), window), got) in units.iter().zip(&response.results).zip(reply.windows).zip(reply.lengths) {
        let accepted = unit.accept(result, window, got).await;
        results.push(accepted.map_err(|error| error.with_routing(response.routing_version)));
    }
    Ok(results)
}

fn decode(body: &[u8]) -> Result<ReadResponse> {
    ReadResponse::decode(body).map_err(|e| Error::new(Code::Protocol, format!("a read reply cannot be read: {e}")))
}

/// Lengths of the pieces of the payload, for [`Sink`].
fn lengths(body: &[u8]) -> Result<Vec<usize>> {
    Ok(decode(body)?.results.iter().map(|result| result.length as usize).collect())
}

/// Check blocks against their packed checksums; the first block begins at a block border.
fn verify(data: &[u8], crcs: &[u8]) -> Result<()> {
    let blocks = data.chunks(CRC_BLOCK_BYTES);
    let matches = crcs.len() == 4 * blocks.len()
        && blocks.zip(crcs.chunks_exact(4)).all(|(block, crc)| crc32c(block).to_le_bytes() == crc);
    if matches { Ok(()) } else { Err(Error::new(Code::ChecksumMismatch, "the bytes do not match their checksums")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs3_core::{crc_blocks, pack_crcs};

    #[test]
    fn every_block_is_verified_and_none_may_be_missing() {
        let mut data = vec![3u8; 9000];
        let crcs = pack_crcs(&crc_blocks(0, &data));
        assert!(verify(&data, &crcs).is_ok());
        assert!(verify(&data, &crcs[..8]).is_err());
        assert!(verify(&data[..8192], &crcs).is_err());
        data[8999] ^= 1;
        assert_eq!(verify(&data, &crcs).unwrap_err().code, Code::ChecksumMismatch);
        assert!(verify(&[], &[]).is_ok());
    }
}
