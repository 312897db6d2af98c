//! Reads: cut by chunk, batched by node, verified, and tried on every replica that serves.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use fs3_core::{CRC_BLOCK_BYTES, ChunkId, Code, Error, RegionMut, Result, crc32c};
use fs3_net::Sink;
use fs3_proto::v1::{Layout, Method, ReadOp as WireOp, ReadRequest, ReadResponse, ReadResult};
use fs3_rt::{Instant, JoinSet};
use prost::Message;

use crate::backoff::Backoff;
use crate::inner::Inner;
use crate::loan::Loan;
use crate::plan::{Blocks, Piece, pieces};
use crate::routing::{RoutingView, spread};
use crate::{OpenFile, ReadOp};

/// Limits of one request: chunks, and bytes unless it is a single chunk.
const BATCH_OPS_MAX: usize = 256;
const BATCH_BYTES_MAX: usize = 1 << 20;

/// One piece of one operation until it is read.
struct Unit {
    op: usize,
    loan: Loan,
    layout: Layout,
    piece: Piece,
    blocks: Blocks,
    /// Targets that failed in this round, with the version of the chain at that time.
    tried: Vec<(u64, u64)>,
    /// Some failure of this round may pass.
    hope: bool,
}

/// Where a unit is read from.
#[derive(Clone, Copy)]
struct Source {
    node_id: u32,
    chain_id: u32,
    chain_version: u64,
    target_id: u64,
}

/// Read one range of one file.
pub(crate) async fn read_one(file: &OpenFile, offset: u64, buf: RegionMut) -> (Result<usize>, RegionMut) {
    let loan = Loan::new(buf);
    let mut units = Vec::new();
    let result = match plan(0, file, offset, &loan, &mut units) {
        Err(error) => Err(error),
        Ok(count) => match read_units(file.client().inner(), units).await.pop() {
            None => confirm(file, offset, &loan, count).await,
            Some((_, error)) => Err(error),
        },
    };
    (result, loan.finish().await)
}

/// Read many ranges; results in the order of `ops`.
pub(crate) async fn read_many(inner: &Arc<Inner>, ops: Vec<ReadOp>) -> Vec<(Result<usize>, RegionMut)> {
    let mut units = Vec::with_capacity(ops.len());
    let mut planned = Vec::with_capacity(ops.len());
    for (op, ReadOp { file, offset, buf }) in ops.into_iter().enumerate() {
        let loan = Loan::new(buf);
        let count = plan(op, &file, offset, &loan, &mut units);
        planned.push((file, offset, count, loan));
    }
    for (op, error) in read_units(inner, units).await {
        planned[op].2 = Err(error);
    }
    let mut finished = Vec::with_capacity(planned.len());
    for (file, offset, count, loan) in planned {
        let result = match count {
            Ok(count) => confirm(&file, offset, &loan, count).await,
            error => error,
        };
        finished.push((result, loan.finish().await));
    }
    finished
}

/// A missing chunk is a hole only if the file is still there. A file that is open without a session may have been
/// removed or cut by another client, and zeros would be wrong then.
async fn confirm(file: &OpenFile, offset: u64, loan: &Loan, count: usize) -> Result<usize> {
    if !loan.has_hole() || file.writable() {
        return Ok(count);
    }
    file.confirm_exists().await?;
    Ok(count.min(usize::try_from(file.length().saturating_sub(offset)).unwrap_or(usize::MAX)))
}

/// Add the units of one operation; returns how many bytes it will have read.
fn plan(op: usize, file: &OpenFile, offset: u64, loan: &Loan, units: &mut Vec<Unit>) -> Result<usize> {
    file.check_open()?;
    let state = file.state();
    let (layout, left, room) = (state.layout(), state.length().saturating_sub(offset), loan.len());
    let count = usize::try_from(left).unwrap_or(usize::MAX).min(room);
    if count == 0 {
        return Ok(0);
    }
    for piece in pieces(state.inode, layout.chunk_bytes, offset, count)? {
        let blocks = Blocks::of(&piece, room);
        units.push(Unit { op, loan: loan.clone(), layout, piece, blocks, tried: Vec::new(), hope: false });
    }
    Ok(count)
}

/// Read all units; the errors that remain, by operation.
async fn read_units(inner: &Arc<Inner>, units: Vec<Unit>) -> Vec<(usize, Error)> {
    let deadline = inner.deadline();
    let (mut batches, homeless) = batch(inner, units);
    if batches.len() == 1 && homeless.is_empty() {
        return read_batch(inner.clone(), batches.pop().expect("one batch"), deadline).await;
    }
    let mut tasks = JoinSet::new();
    for batch in batches {
        tasks.spawn(read_batch(inner.clone(), batch, deadline));
    }
    if !homeless.is_empty() {
        tasks.spawn(settle_all(inner.clone(), homeless, deadline));
    }
    tasks.join_all().await.into_iter().flatten().collect()
}

/// What goes into one request.
#[derive(Default)]
struct Batch {
    bytes: usize,
    sources: Vec<Source>,
    units: Vec<Unit>,
}

/// A unit that failed, at a source or for want of one.
type Failed = (Option<Source>, Unit, Error);

/// Units that are read from the same node go together. Those that nobody serves now come back on their own.
fn batch(inner: &Inner, units: Vec<Unit>) -> (Vec<Batch>, Vec<Failed>) {
    let view = inner.view();
    let (mut done, mut homeless) = (Vec::new(), Vec::new());
    // Few nodes: a list is faster than a map.
    let mut open: Vec<Batch> = Vec::new();
    for unit in units {
        let Some(source) = choose(inner, &view, &unit) else {
            homeless.push((None, unit, Error::new(Code::NotServing, "no replica of the chunk serves now")));
            continue;
        };
        let at = open.iter().position(|batch| batch.sources[0].node_id == source.node_id);
        let at = at.unwrap_or_else(|| {
            open.push(Batch::default());
            open.len() - 1
        });
        let bytes = unit.blocks.len as usize;
        let batch = &mut open[at];
        if !batch.units.is_empty() && (batch.units.len() >= BATCH_OPS_MAX || batch.bytes + bytes > BATCH_BYTES_MAX) {
            done.push(std::mem::take(batch));
        }
        batch.bytes += bytes;
        batch.sources.push(source);
        batch.units.push(unit);
    }
    done.append(&mut open);
    (done, homeless)
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
        node_id: replica.node_id,
        chain_id: chain.id,
        chain_version: chain.version,
        target_id: replica.target_id,
    })
}

/// One request for all; those that fail go on by themselves.
async fn read_batch(inner: Arc<Inner>, batch: Batch, deadline: Instant) -> Vec<(usize, Error)> {
    let results = attempt(&inner, &batch.sources, &batch.units, deadline).await;
    let mut failed = Vec::new();
    for ((source, unit), result) in batch.sources.into_iter().zip(batch.units).zip(results) {
        if let Err(error) = result {
            failed.push((Some(source), unit, error));
        }
    }
    settle_all(inner, failed, deadline).await
}

async fn settle_all(inner: Arc<Inner>, mut failed: Vec<Failed>, deadline: Instant) -> Vec<(usize, Error)> {
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

    fn to_wire(&self, source: &Source, chunk_id: Bytes) -> WireOp {
        WireOp {
            chain_id: source.chain_id,
            chain_version: source.chain_version,
            target_id: source.target_id,
            chunk_id,
            offset: self.blocks.offset,
            length: self.blocks.len,
        }
    }

    /// Memory for the blocks: the caller's, or scratch.
    async fn window(&self, inner: &Inner) -> RegionMut {
        let len = self.blocks.len as usize;
        if self.blocks.direct { self.loan.lend(self.piece.at, len).await } else { inner.scratch.take(len) }
    }

    /// Check what came and put it in its place; what the chunk does not have is zeros.
    async fn accept(&self, result: &ReadResult, mut window: RegionMut, got: usize) -> Result<()> {
        match Code::from_wire(result.code as u16) {
            _ if result.code == 0 => verify(&window[..got], &result.crcs)?,
            Code::ChunkNotFound if got == 0 => self.loan.set_hole(),
            code => return Err(Error::new(code, result.message.clone())),
        }
        let (skip, len) = ((self.piece.offset - self.blocks.offset) as usize, self.piece.len as usize);
        if self.blocks.direct {
            window[got.min(len)..len].fill(0);
            return Ok(());
        }
        let mut out = self.loan.lend(self.piece.at, len).await;
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
    // One allocation for all ids.
    let ids: Bytes = units.iter().flat_map(|unit| unit.piece.chunk.to_bytes()).collect();
    let id = |i: usize| ids.slice(i * ChunkId::BYTES..(i + 1) * ChunkId::BYTES);
    let ops = sources.iter().zip(units).enumerate().map(|(i, (source, unit))| unit.to_wire(source, id(i))).collect();
    let until = deadline.min(Instant::now() + inner.config.read_attempt_timeout);
    let sink = Sink { windows, lengths };
    let view = inner.view();
    let address = view.address(sources[0].node_id).ok_or_else(|| Error::new(Code::Unavailable, "the node is gone"))?;
    let request = ReadRequest { ops };
    let reply = inner.wire.transfer(address, Method::StorageRead, request, Vec::new(), sink, until).await?;
    let response: ReadResponse = decode(reply.body)?;
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

fn decode<M: Message + Default>(body: impl bytes::Buf) -> Result<M> {
    M::decode(body).map_err(|e| Error::new(Code::Protocol, format!("a read reply cannot be read: {e}")))
}

/// [`ReadResponse`] without anything that has to be allocated for each result.
#[derive(Clone, PartialEq, prost::Message)]
struct Lengths {
    #[prost(message, repeated, tag = "1")]
    results: Vec<Length>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Length {
    #[prost(uint32, tag = "2")]
    length: u32,
}

/// Lengths of the pieces of the payload, for [`Sink`].
fn lengths(body: &[u8]) -> Result<Vec<usize>> {
    Ok(decode::<Lengths>(body)?.results.iter().map(|result| result.length as usize).collect())
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
    fn the_lengths_are_those_of_the_whole_message() {
        let result =
            |length| ReadResult { code: 3, length, crcs: vec![1; 8].into(), message: "m".into(), ..Default::default() };
        let response = ReadResponse { results: vec![result(7), result(0), result(9000)], routing_version: 5 };
        assert_eq!(lengths(&response.encode_to_vec()).unwrap(), [7, 0, 9000]);
        assert!(lengths(b"\x0a\xff").is_err());
    }

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
