//! One try to read units from one disk, and a second one from other replicas when that takes long.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use fs3_core::{CRC_BLOCK_BYTES, ChunkId, Code, Error, RegionMut, Result, crc32c};
use fs3_net::Sink;
use fs3_proto::v1::{Method, ReadOp, ReadRequest, ReadResponse, ReadResult};
use fs3_rt::{Instant, JoinSet};
use prost::Message;
use tokio::sync::SemaphorePermit;

use crate::inner::Inner;
use crate::latency::Load;
use crate::read::{Source, Unit, choose_other};
use crate::trace;

/// Reads of more bytes are not hedged: their time is that of moving the bytes.
const HEDGE_BYTES_MAX: usize = 4 << 20;

/// Read the units, all from the disk of `sources`. One result per unit.
pub(crate) async fn attempt(
    inner: &Arc<Inner>,
    sources: &[Source],
    units: &[Unit],
    deadline: Instant,
) -> Vec<Result<()>> {
    match exchange(inner, sources, units, deadline).await {
        Ok(results) => results,
        Err(error) => units.iter().map(|_| Err(error.clone())).collect(),
    }
}

async fn exchange(
    inner: &Arc<Inner>,
    sources: &[Source],
    units: &[Unit],
    deadline: Instant,
) -> Result<Vec<Result<()>>> {
    let bytes: usize = units.iter().map(|unit| unit.blocks.len as usize).sum();
    let limit = inner.config.read_bytes_in_flight;
    let _budget = inner.reserve(&inner.read_budget, bytes, limit, deadline).await?;
    let mut windows = Vec::with_capacity(units.len());
    for unit in units {
        windows.push(unit.window(inner).await);
    }
    let started = Instant::now();
    let mut first = Box::pin(ask(inner.clone(), Question::new(sources, units.iter(), windows), deadline));
    tokio::select! {
        biased;
        answer = &mut first => return Ok(accept(inner, sources, units, answer?).await),
        () = fs3_rt::sleep(inner.latencies.hedge_after(Load::of(bytes, units.len()))) => {}
    }
    let Some((questions, _budget)) = other_questions(inner, sources, units, bytes) else {
        return Ok(accept(inner, sources, units, first.await?).await);
    };
    inner.counters.read_hedges.fetch_add(1, Ordering::Relaxed);
    let mut second = Box::pin(ask_all(inner, units, questions, deadline));
    let parts = tokio::select! {
        biased;
        answer = &mut first => match answer {
            Ok(answer) => return Ok(accept(inner, sources, units, answer).await),
            Err(error) => second.await.map_err(|_| error)?,
        },
        parts = &mut second => match parts {
            Ok(parts) => parts,
            Err(_) => return Ok(accept(inner, sources, units, first.await?).await),
        },
    };
    // The memory of the first try comes back before anything is put there.
    drop(first);
    inner.latencies.unanswered(sources[0].disk, Load::of(bytes, units.len()), started.elapsed(), Instant::now());
    inner.counters.read_hedges_won.fetch_add(1, Ordering::Relaxed);
    for Part { at, window, got } in parts {
        units[at].place(window, got, false).await;
    }
    Ok(units.iter().map(|_| Ok(())).collect())
}

/// What is asked of one disk, and where the answer goes.
struct Question {
    source: Source,
    ops: Vec<ReadOp>,
    windows: Vec<RegionMut>,
    attempt: u32,
    hedge: bool,
}

struct Answer {
    results: Vec<ReadResult>,
    windows: Vec<RegionMut>,
    lengths: Vec<usize>,
    routing_version: u64,
}

impl Question {
    fn new<'a>(sources: &[Source], units: impl Iterator<Item = &'a Unit> + Clone, windows: Vec<RegionMut>) -> Self {
        // One allocation for all ids.
        let ids: Bytes = units.clone().flat_map(|unit| unit.piece.chunk.to_bytes()).collect();
        let id = |i: usize| ids.slice(i * ChunkId::BYTES..(i + 1) * ChunkId::BYTES);
        let ops = sources.iter().zip(units.clone()).enumerate().map(|(i, (source, unit))| unit.to_wire(source, id(i)));
        let (ops, attempt) = (ops.collect(), units.map(|unit| unit.tried.len() as u32).max().unwrap_or(0));
        Self { source: sources[0], ops, windows, attempt, hedge: false }
    }
}

/// One request to one node.
async fn ask(inner: Arc<Inner>, question: Question, deadline: Instant) -> Result<Answer> {
    let Question { source, ops, windows, attempt, hedge } = question;
    let (count, started) = (ops.len(), Instant::now());
    let (node_id, target_id) = (source.node_id, source.target_id);
    let detail = trace::Detail { node_id, target_id, chunks: count as u32, attempt, hedge };
    let load = Load::of(windows.iter().map(|window| window.len()).sum(), count);
    let until = deadline.min(started + inner.config.read_attempt_timeout);
    let view = inner.view();
    let address = view.address(source.node_id).ok_or_else(|| Error::new(Code::Unavailable, "the node is gone"))?;
    let sink = Sink { windows, lengths };
    let call =
        inner.wire.transfer(address, Method::StorageRead, ReadRequest { ops, repair: false }, Vec::new(), sink, until);
    let reply = trace::detailed(detail, call).await.inspect_err(|error| {
        if error.code == Code::Timeout {
            inner.latencies.unanswered(source.disk, load, started.elapsed(), Instant::now());
        }
    })?;
    let ReadResponse { results, routing_version } = decode(reply.body)?;
    if results.len() != count {
        return Err(Error::new(Code::Protocol, "storage answered another number of reads than asked"));
    }
    if results.iter().all(|result| result.code == 0) {
        let now = Instant::now();
        inner.latencies.answered(source.disk, load, now - started, now);
    }
    Ok(Answer { results, windows: reply.windows, lengths: reply.lengths, routing_version })
}

/// Check an answer to the first try and put it in its place.
async fn accept(inner: &Arc<Inner>, sources: &[Source], units: &[Unit], answer: Answer) -> Vec<Result<()>> {
    let mut results = Vec::with_capacity(units.len());
    let units = sources.iter().zip(units);
    for ((((source, unit), result), window), got) in units.zip(&answer.results).zip(answer.windows).zip(answer.lengths)
    {
        let checked = check(inner, source, unit, result, &window[..got]);
        if checked.is_ok() {
            unit.place(window, got, unit.blocks.direct).await;
        }
        results.push(checked.map_err(|error| error.with_routing(answer.routing_version)));
    }
    results
}

/// Check what came, and tell the replica when it is not what it thinks it is.
fn check(inner: &Arc<Inner>, source: &Source, unit: &Unit, result: &ReadResult, data: &[u8]) -> Result<()> {
    unit.check(result, data).inspect_err(|_| {
        if result.code == 0 {
            crate::report::mismatch(inner, source, unit.piece.chunk);
        }
    })
}

/// A question and the units that it is about, each with where it is read.
type Hedge = (Question, Vec<(usize, Source)>);

/// The same units asked of other disks, into memory of their own; `None` when a unit has no other replica that is worth
/// asking, or too much is on its way already.
fn other_questions<'a>(
    inner: &'a Inner,
    sources: &[Source],
    units: &[Unit],
    bytes: usize,
) -> Option<(Vec<Hedge>, SemaphorePermit<'a>)> {
    if bytes > HEDGE_BYTES_MAX {
        return None;
    }
    let view = inner.view();
    let mut groups: Vec<Vec<(usize, Source)>> = Vec::new();
    for (at, (source, unit)) in sources.iter().zip(units).enumerate() {
        let other = choose_other(inner, &view, unit, source)?;
        match groups.iter_mut().find(|list| list[0].1.disk == other.disk) {
            Some(list) => list.push((at, other)),
            None => groups.push(vec![(at, other)]),
        }
    }
    let budget = inner.read_budget.try_acquire_many(bytes as u32).ok()?;
    if !inner.latencies.may_hedge() {
        return None;
    }
    let question = |list: Vec<(usize, Source)>| {
        let sources: Vec<Source> = list.iter().map(|(_, source)| *source).collect();
        let windows = list.iter().map(|&(at, _)| inner.scratch.take(units[at].blocks.len as usize)).collect();
        let question = Question::new(&sources, list.iter().map(|&(at, _)| &units[at]), windows);
        (Question { hedge: true, ..question }, list)
    };
    Some((groups.into_iter().map(question).collect(), budget))
}

/// Bytes of unit `at` in memory of their own, verified.
struct Part {
    at: usize,
    window: RegionMut,
    got: usize,
}

/// All of them or an error.
async fn ask_all(inner: &Arc<Inner>, units: &[Unit], questions: Vec<Hedge>, deadline: Instant) -> Result<Vec<Part>> {
    let mut tasks = JoinSet::new();
    for (question, list) in questions {
        let inner = inner.clone();
        tasks.spawn(trace::inherit(async move { (ask(inner, question, deadline).await, list) }));
    }
    let mut parts = Vec::with_capacity(units.len());
    while let Some(joined) = tasks.join_next().await {
        let (answer, list) = joined.map_err(|e| Error::new(Code::Internal, format!("a hedged read failed: {e}")))?;
        let Answer { results, windows, lengths, .. } = answer?;
        for ((((at, source), result), window), got) in list.into_iter().zip(&results).zip(windows).zip(lengths) {
            check(inner, &source, &units[at], result, &window[..got])?;
            parts.push(Part { at, window, got });
        }
    }
    Ok(parts)
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
pub(crate) fn lengths(body: &[u8]) -> Result<Vec<usize>> {
    Ok(decode::<Lengths>(body)?.results.iter().map(|result| result.length as usize).collect())
}

/// Check blocks against their packed checksums; the first block begins at a block border.
pub(crate) fn verify(data: &[u8], crcs: &[u8]) -> Result<()> {
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
