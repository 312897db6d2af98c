//! Reads: cut by chunk, batched by node, verified, and tried on every replica that serves.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use fs3_core::{CRC_BLOCK_BYTES, Code, Error, RegionMut, Result};
use fs3_proto::v1::{Layout, ReadOp as WireOp, ReadResult};
use fs3_rt::{Instant, JoinSet};

use crate::attempt::{attempt, verify};
use crate::backoff::Backoff;
use crate::inner::Inner;
use crate::latency::Size;
use crate::loan::{KnownCrcs, Loan};
use crate::plan::{Blocks, Piece, pieces};
use crate::routing::{ChainView, Replica, RoutingView, spread};
use crate::{OpenFile, ReadOp, trace};

/// Chunks of one request.
const BATCH_OPS_MAX: usize = 256;
/// Bytes of one request, unless it is a single chunk: as many as leave some requests per disk, so that the disk and the
/// network work at the same time. Large requests spare their fixed costs; larger ones would not be hedged.
const BATCH_BYTES: std::ops::RangeInclusive<usize> = (1 << 20)..=(4 << 20);
const BATCHES_PER_DISK: usize = 4;

/// One piece of one operation until it is read.
pub(crate) struct Unit {
    op: usize,
    loan: Loan,
    layout: Layout,
    pub piece: Piece,
    pub blocks: Blocks,
    /// Targets that failed in this round, with the version of the chain at that time.
    pub tried: Vec<(u64, u64)>,
    /// Some failure of this round may pass.
    hope: bool,
}

/// Where a unit is read from.
#[derive(Clone, Copy)]
pub(crate) struct Source {
    pub node_id: u32,
    pub disk: u64,
    pub chain_id: u32,
    chain_version: u64,
    pub target_id: u64,
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
    let done = read_loans(inner, ops, Loan::new).await;
    done.into_iter().map(|(result, buf, _)| (result, buf)).collect()
}

/// Read many ranges into buffers lent by `lend`; results in the order of `ops`, with the checksums that were kept.
pub(crate) async fn read_loans(
    inner: &Arc<Inner>,
    ops: Vec<ReadOp>,
    lend: fn(RegionMut) -> Loan,
) -> Vec<(Result<usize>, RegionMut, Vec<KnownCrcs>)> {
    let mut units = Vec::with_capacity(ops.len());
    let mut planned = Vec::with_capacity(ops.len());
    for (op, ReadOp { file, offset, buf }) in ops.into_iter().enumerate() {
        let loan = lend(buf);
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
        finished.push((result, loan.finish().await, loan.known()));
    }
    finished
}

/// A missing chunk is a hole only if the file is still there. A file that is open without a session may have been
/// removed or cut by another client, and zeros would be wrong then.
async fn confirm(file: &OpenFile, offset: u64, loan: &Loan, count: usize) -> Result<usize> {
    file.note_read();
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
        tasks.spawn(trace::inherit(read_batch(inner.clone(), batch, deadline)));
    }
    if !homeless.is_empty() {
        tasks.spawn(trace::inherit(settle_all(inner.clone(), homeless, deadline)));
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

/// Units that are read from the same disk go together: a slow one delays no others. Those that nobody serves now come
/// back on their own.
fn batch(inner: &Inner, units: Vec<Unit>) -> (Vec<Batch>, Vec<Failed>) {
    let view = inner.view();
    let mut homeless = Vec::new();
    // Few disks: a list is faster than a map.
    let mut disks: Vec<Batch> = Vec::new();
    for unit in units {
        let Some(source) = choose(inner, &view, &unit) else {
            homeless.push((None, unit, Error::new(Code::NotServing, "no replica of the chunk serves now")));
            continue;
        };
        let at = disks.iter().position(|batch| batch.sources[0].disk == source.disk);
        let at = at.unwrap_or_else(|| {
            disks.push(Batch::default());
            disks.len() - 1
        });
        disks[at].push(source, unit);
    }
    (disks.into_iter().flat_map(Batch::split).collect(), homeless)
}

impl Batch {
    fn push(&mut self, source: Source, unit: Unit) {
        self.bytes += unit.blocks.len as usize;
        self.sources.push(source);
        self.units.push(unit);
    }

    /// What goes to one disk, as requests of a good size.
    fn split(self) -> Vec<Self> {
        let bytes_max = (self.bytes / BATCHES_PER_DISK).clamp(*BATCH_BYTES.start(), *BATCH_BYTES.end());
        if self.bytes <= bytes_max && self.units.len() <= BATCH_OPS_MAX {
            return vec![self];
        }
        let mut batches: Vec<Self> = Vec::new();
        for (source, unit) in self.sources.into_iter().zip(self.units) {
            let bytes = unit.blocks.len as usize;
            match batches.last_mut() {
                Some(last) if last.units.len() < BATCH_OPS_MAX && last.bytes + bytes <= bytes_max => {
                    last.push(source, unit);
                }
                _ => {
                    batches.push(Self::default());
                    batches.last_mut().expect("just pushed").push(source, unit);
                }
            }
        }
        batches
    }
}

/// The replica to read from: the preferred one by the chunk's hash, else the next that has not failed and is not slow.
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
    let healthy = || untried().filter(|replica| !inner.health.suspect(replica.target_id, chain.version, now));
    let size = Size::of(unit.blocks.len as usize);
    let fast = healthy().find(|replica| !inner.latencies.avoid(replica.disk, size, now));
    let replica = fast.or_else(|| healthy().next()).or_else(|| untried().next())?;
    Some(Source::new(replica, chain))
}

/// Another replica than `source` that is neither suspect nor slow.
pub(crate) fn choose_other(inner: &Inner, view: &RoutingView, unit: &Unit, source: &Source) -> Option<Source> {
    let chain = view.chain(source.chain_id).filter(|chain| chain.version == source.chain_version)?;
    let (now, size) = (Instant::now(), Size::of(unit.blocks.len as usize));
    let fit = |replica: &&Replica| {
        replica.target_id != source.target_id
            && !unit.tried.contains(&(replica.target_id, chain.version))
            && !inner.health.suspect(replica.target_id, chain.version, now)
            && !inner.latencies.is_slow(replica.disk, size)
    };
    chain.serving.iter().find(fit).map(|replica| Source::new(*replica, chain))
}

impl Source {
    fn new(replica: Replica, chain: &ChainView) -> Self {
        Self {
            node_id: replica.node_id,
            disk: replica.disk,
            chain_id: chain.id,
            chain_version: chain.version,
            target_id: replica.target_id,
        }
    }
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
        tasks.spawn(trace::inherit(settle(inner.clone(), source, unit, error, deadline)));
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

    pub fn to_wire(&self, source: &Source, chunk_id: Bytes) -> WireOp {
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
    pub async fn window(&self, inner: &Inner) -> RegionMut {
        let len = self.blocks.len as usize;
        if self.blocks.direct { self.loan.lend(self.piece.at, len).await } else { inner.scratch.take(len) }
    }

    /// Check what came, by the checksums of its blocks.
    pub fn check(&self, result: &ReadResult, crcs: &[u8]) -> Result<()> {
        match Code::from_wire(result.code as u16) {
            _ if result.code == 0 => verify(crcs, &result.crcs),
            Code::ChunkNotFound if crcs.is_empty() => {
                self.loan.set_hole();
                Ok(())
            }
            code => Err(Error::new(code, result.message.clone())),
        }
    }

    /// Remember the checksums of the `got` bytes that came, if the operation wants them and their first block is that of
    /// the piece.
    pub fn note(&self, got: usize, crcs: Bytes) {
        if self.blocks.offset == self.piece.offset {
            let whole = got.min(self.piece.len as usize) / CRC_BLOCK_BYTES;
            self.loan.note(self.piece.at, crcs.slice(..4 * whole));
        }
    }

    /// Put the first `got` bytes of `window` in their place, unless they came there; what the chunk does not have is
    /// zeros.
    pub async fn place(&self, mut window: RegionMut, got: usize, in_place: bool) {
        let (skip, len) = ((self.piece.offset - self.blocks.offset) as usize, self.piece.len as usize);
        if in_place {
            return window[got.min(len)..len].fill(0);
        }
        let mut out = self.loan.lend(self.piece.at, len).await;
        let have = got.saturating_sub(skip).min(len);
        fs3_core::copy(&mut out[..have], &window[skip..skip + have]);
        out[have..].fill(0);
    }
}
