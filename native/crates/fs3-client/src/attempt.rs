//! One try to read units from one disk, and a second one from other replicas when that takes long.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use fs3_core::{ChunkId, Code, Error, RegionMut, Result};
use fs3_net::{Reply, Sink};
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
    for Part { at, came } in parts {
        units[at].note(came.bytes, came.crcs);
        units[at].place(came.window, came.bytes, false).await;
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
    came: Vec<Came>,
    routing_version: u64,
}

/// What came for one unit.
struct Came {
    window: RegionMut,
    bytes: usize,
    /// Packed checksums of its blocks, made while it came.
    crcs: Bytes,
}

impl Came {
    fn of(reply: Reply) -> Vec<Self> {
        let crcs: Vec<Bytes> = reply.segment_crcs().map(Bytes::copy_from_slice).collect();
        let came = reply.windows.into_iter().zip(reply.lengths).zip(crcs);
        came.map(|((window, bytes), crcs)| Self { window, bytes, crcs }).collect()
    }
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
    let mut reply = trace::detailed(detail, call).await.inspect_err(|error| {
        if error.code == Code::Timeout {
            inner.latencies.unanswered(source.disk, load, started.elapsed(), Instant::now());
        }
    })?;
    let ReadResponse { results, routing_version } = decode(std::mem::take(&mut reply.body))?;
    if results.len() != count {
        return Err(Error::new(Code::Protocol, "storage answered another number of reads than asked"));
    }
    if results.iter().all(|result| result.code == 0) {
        let now = Instant::now();
        inner.latencies.answered(source.disk, load, now - started, now);
    }
    Ok(Answer { results, came: Came::of(reply), routing_version })
}

/// Check an answer to the first try and put it in its place.
async fn accept(inner: &Arc<Inner>, sources: &[Source], units: &[Unit], answer: Answer) -> Vec<Result<()>> {
    let mut results = Vec::with_capacity(units.len());
    let units = sources.iter().zip(units);
    for (((source, unit), result), came) in units.zip(&answer.results).zip(answer.came) {
        let checked = check(inner, source, unit, result, &came);
        if checked.is_ok() {
            unit.note(came.bytes, came.crcs);
            unit.place(came.window, came.bytes, unit.blocks.direct).await;
        }
        results.push(checked.map_err(|error| error.with_routing(answer.routing_version)));
    }
    results
}

/// Check what came, and tell the replica when it is not what it thinks it is.
fn check(inner: &Arc<Inner>, source: &Source, unit: &Unit, result: &ReadResult, came: &Came) -> Result<()> {
    unit.check(result, &came.crcs).inspect_err(|_| {
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

/// What came for unit `at` in memory of its own, verified.
struct Part {
    at: usize,
    came: Came,
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
        let Answer { results, came, .. } = answer?;
        for (((at, source), result), came) in list.into_iter().zip(&results).zip(came) {
            check(inner, &source, &units[at], result, &came)?;
            parts.push(Part { at, came });
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

/// Compare checksums of what came, as many as it has blocks, with those that are stored.
pub(crate) fn verify(came: &[u8], stored: &[u8]) -> Result<()> {
    if came == stored {
        return Ok(());
    }
    Err(Error::new(Code::ChecksumMismatch, "the bytes do not match their checksums"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lengths_are_those_of_the_whole_message() {
        let result =
            |length| ReadResult { code: 3, length, crcs: vec![1; 8].into(), message: "m".into(), ..Default::default() };
        let response = ReadResponse { results: vec![result(7), result(0), result(9000)], routing_version: 5 };
        assert_eq!(lengths(&response.encode_to_vec()).unwrap(), [7, 0, 9000]);
        assert!(lengths(b"\x0a\xff").is_err());
    }
}
