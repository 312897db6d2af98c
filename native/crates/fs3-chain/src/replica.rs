//! Admission: who may do what, and the version an update gets.

use std::collections::{BTreeMap, BTreeSet};

use fs3_core::{ChunkId, Code, TargetId};

use crate::answered::Answered;
use crate::chunk::{Chunk, Leg, LegState, Local, Op, Phase};
use crate::types::*;

/// Versions of chunks created under chain version c begin at `c << CREATE_SHIFT`.
const CREATE_SHIFT: u32 = 32;

/// Whether a read may be served now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadAdmission {
    /// From the committed version; check [`Replica::may_reply`] before answering.
    Serve,
    /// An update of the chunk is unresolved: send [`Event::Read`].
    Wait,
    /// Not here, not now.
    Refuse(Code),
}

/// The machine of one target. Not thread-safe; the executor serialises calls.
pub struct Replica {
    pub(crate) config: Config,
    pub(crate) routing: RoutingView,
    pub(crate) serve_until_ns: u64,
    /// A store or divergence failure: nothing is served any more in this life.
    pub(crate) failed: bool,
    pub(crate) chunks: BTreeMap<ChunkId, Chunk>,
    /// Chunks that a syncing successor holds equal, within this chain version.
    pub(crate) synced: BTreeSet<(TargetId, ChunkId)>,
    pub(crate) next_create: u64,
    pub(crate) next_op: OpId,
    /// Requests that changed nothing, within this chain version.
    pub(crate) answered: Answered<ChunkId>,
    /// Removals of ranges, within this chain version.
    pub(crate) removed: Answered<()>,
}

/// What admission found out about a request.
enum Plan {
    /// Nothing to do.
    Answer(Outcome),
    /// Begin an update.
    Begin { version: u64, base: u64, replace: bool, local: bool },
}

impl Replica {
    /// A replica that knows no routing and serves nothing.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            routing: RoutingView::default(),
            serve_until_ns: 0,
            failed: false,
            chunks: BTreeMap::new(),
            synced: BTreeSet::new(),
            next_create: 1,
            next_op: 1 << 63,
            answered: Answered::default(),
            removed: Answered::default(),
        }
    }

    /// Advance by one event at monotonic time `now_ns`. The effects are to be carried out in order; those of one
    /// chunk that complete (prepare, forward, commit, abort) may run at the same time.
    pub fn step(&mut self, now_ns: u64, event: Event, view: &dyn ChunkView) -> Vec<Effect> {
        let mut out = Vec::new();
        match event {
            Event::Request(request) => self.request(now_ns, request, view, &mut out),
            Event::Read { id, chunk, chain_version } => self.read(now_ns, id, chunk, chain_version, &mut out),
            Event::Expire { id, chunk } => self.expire(id, chunk, &mut out),
            Event::Prepared { op, chunk, result } => self.prepared(now_ns, op, chunk, result, view, &mut out),
            Event::Forwarded { op, chunk, to, attempt, result } => {
                self.forwarded(now_ns, (op, chunk), (to, attempt), result, view, &mut out);
            }
            Event::Committed { op, chunk, result } => self.committed(now_ns, op, chunk, result, view, &mut out),
            Event::Aborted { op, chunk } => self.aborted(now_ns, op, chunk, view, &mut out),
            Event::Repaired { op, chunk, result } => self.repaired(now_ns, op, chunk, result, view, &mut out),
            Event::Routing(routing) => self.rerouted(now_ns, routing, view, &mut out),
            Event::StoreFailed { code } if !self.failed => self.fail(ChunkId::default(), code, &mut out),
            Event::StoreFailed { .. } => {}
            Event::Lease { serve_until_ns } => self.serve_until_ns = self.serve_until_ns.max(serve_until_ns),
        }
        out
    }

    /// What routing made of this replica.
    pub fn routing(&self) -> &RoutingView {
        &self.routing
    }

    /// Whether the lease still covers a reply that is about to be sent.
    pub fn may_reply(&self, now_ns: u64) -> bool {
        !self.failed && now_ns < self.serve_until_ns
    }

    /// Whether the replica gave up; it serves nothing any more.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Whether a read that came with `chain_version` may be served at once.
    pub fn read_admission(&self, now_ns: u64, chunk: ChunkId, chain_version: u64) -> ReadAdmission {
        if let Err(code) = self.check_place(now_ns, chain_version) {
            return ReadAdmission::Refuse(code);
        }
        if self.routing.role != Role::Serving {
            return ReadAdmission::Refuse(Code::NotServing);
        }
        if self.is_dirty(chunk) { ReadAdmission::Wait } else { ReadAdmission::Serve }
    }

    /// Whether a delayed forward is still wanted.
    pub fn forward_is_current(&self, op: OpId, chunk: ChunkId, to: TargetId, attempt: u32) -> bool {
        self.chunks.get(&chunk).and_then(|c| c.active.as_ref()).is_some_and(|a| {
            a.id == op && a.legs.iter().any(|l| l.to == to && l.attempt == attempt && l.state == LegState::Running)
        })
    }

    /// Tell that a syncing successor holds this committed version already, by comparison of metadata.
    pub fn mark_synced(&mut self, to: TargetId, chunk: ChunkId, outcome: Outcome, view: &dyn ChunkView) {
        let idle = self.chunks.get(&chunk).is_none_or(|c| c.active.is_none());
        let is_syncing = self.routing.successors.iter().any(|s| s.target == to && s.syncing);
        if idle && is_syncing && outcome_of(&view.chunk(chunk)) == outcome {
            self.synced.insert((to, chunk));
        }
    }

    /// Whether a syncing successor holds this chunk equal, or will by the updates in flight.
    pub fn is_synced(&self, to: TargetId, chunk: ChunkId) -> bool {
        self.synced.contains(&(to, chunk))
    }

    /// Whether no update of an earlier chain version is left. A resync is done only then: such an update may have been
    /// shown by a replica that has left the chain since, and a syncing one must not serve without it.
    pub fn is_settled(&self) -> bool {
        let carried_over = |c: &Chunk| c.active.as_ref().is_some_and(|op| op.carried_over);
        !self.chunks.values().any(|c| c.orphan || carried_over(c))
    }

    /// Whether the removal of a range that carries `writer` need not be done: it was answered before, or given up by its
    /// client. What has been written since it was answered stays.
    ///
    /// # Errors
    /// `Superseded` when the channel has gone on to another request.
    pub fn is_range_removed(&self, writer: Writer) -> Result<bool, Code> {
        self.removed.has((), writer)
    }

    /// Tell that the removal of a range is about to be answered; it began under `chain_version`.
    pub fn range_removed(&mut self, writer: Writer, chain_version: u64) {
        if chain_version == self.routing.chain_version {
            self.removed.note((), writer);
        }
    }

    /// Number of chunks with something going on.
    pub fn busy_chunks(&self) -> usize {
        self.chunks.len()
    }

    /// While an update is unresolved, a serving successor may already show it, or have shown it before it left the
    /// chain (invariant 2).
    fn is_dirty(&self, chunk: ChunkId) -> bool {
        let Some(chunk) = self.chunks.get(&chunk) else { return false };
        let serving_successor = self.routing.successors.iter().any(|s| !s.syncing);
        let unresolved = |op: &Op| op.phase != Phase::Repairing && (serving_successor || op.carried_over);
        chunk.orphan || chunk.active.as_ref().is_some_and(unresolved)
    }

    fn check_place(&self, now_ns: u64, chain_version: u64) -> Result<(), Code> {
        if self.failed || self.routing.chain_version == 0 {
            return Err(Code::NotServing);
        }
        if chain_version != self.routing.chain_version {
            return Err(Code::StaleChain);
        }
        if self.routing.role == Role::Idle || now_ns >= self.serve_until_ns {
            return Err(Code::NotServing);
        }
        Ok(())
    }

    fn admit(&self, now_ns: u64, request: &Request) -> Result<(), Code> {
        self.check_place(now_ns, request.chain_version)?;
        let serving = self.routing.role == Role::Serving;
        let allowed = match request.origin {
            Origin::Client | Origin::Heal { .. } => serving && self.routing.head,
            Origin::Forward { .. } => !(serving && self.routing.head),
            Origin::Repair => serving,
            Origin::Resync { to } => serving && self.routing.successors.iter().any(|s| s.target == to && s.syncing),
        };
        if allowed { Ok(()) } else { Err(Code::NotServing) }
    }

    fn request(&mut self, now_ns: u64, request: Request, view: &dyn ChunkView, out: &mut Vec<Effect>) {
        if let Err(code) = self.admit(now_ns, &request) {
            return refuse(request.id, Refusal::new(code), out);
        }
        let chunk = self.chunks.entry(request.chunk).or_default();
        if chunk.active.is_some() {
            if chunk.queue.len() >= self.config.queue_per_chunk_max {
                return refuse(request.id, Refusal::new(Code::Busy), out);
            }
            chunk.queue.push_back(request);
            return;
        }
        self.start(now_ns, request, view, out);
        self.tidy(request.chunk);
    }

    fn read(&mut self, now_ns: u64, id: RequestId, chunk: ChunkId, chain_version: u64, out: &mut Vec<Effect>) {
        match self.read_admission(now_ns, chunk, chain_version) {
            ReadAdmission::Serve => out.push(Effect::ServeRead { id }),
            ReadAdmission::Refuse(code) => out.push(Effect::Reply { id, result: Err(Refusal::new(code)) }),
            ReadAdmission::Wait => {
                let limit = self.config.readers_per_chunk_max;
                let chunk = self.chunks.entry(chunk).or_default();
                if chunk.readers.len() >= limit {
                    out.push(Effect::Reply { id, result: Err(Refusal::new(Code::Busy)) });
                } else {
                    chunk.readers.push(id);
                }
            }
        }
    }

    fn expire(&mut self, id: RequestId, chunk_id: ChunkId, out: &mut Vec<Effect>) {
        let Some(chunk) = self.chunks.get_mut(&chunk_id) else { return };
        if let Some(op) = chunk.active.as_mut().filter(|op| op.waiter == Some(id)) {
            op.waiter = None;
            out.push(Effect::Reply { id, result: Err(Refusal::maybe(Code::Timeout)) });
        } else if let Some(at) = chunk.queue.iter().position(|r| r.id == id) {
            chunk.queue.remove(at);
            refuse(id, Refusal::new(Code::Timeout), out);
        } else if let Some(at) = chunk.readers.iter().position(|r| *r == id) {
            chunk.readers.remove(at);
            out.push(Effect::Reply { id, result: Err(Refusal::new(Code::Timeout)) });
        }
        self.tidy(chunk_id);
    }

    /// Begin an admitted request on a chunk without an active update, or answer it.
    pub(crate) fn start(&mut self, now_ns: u64, request: Request, view: &dyn ChunkView, out: &mut Vec<Effect>) {
        let state = view.chunk(request.chunk);
        if request.origin == Origin::Repair {
            return self.start_repair(request, &state, out);
        }
        let plan = match request.origin {
            Origin::Repair => unreachable!("begun above"),
            Origin::Client => self.plan_client(&request, &state),
            Origin::Forward { version, base, replace } => self.plan_forward(&request, &state, version, base, replace),
            Origin::Resync { .. } => {
                Ok(Plan::Begin { version: state.committed.max(state.tombstone), base: 0, replace: true, local: false })
            }
            Origin::Heal { above } => {
                let version = state.committed.max(state.tombstone).max(above) + 1;
                let local = request.kind == Kind::Mirror;
                if local == (state.committed == 0) {
                    Ok(Plan::Answer(outcome_of(&state)))
                } else {
                    Ok(Plan::Begin { version, base: 0, replace: true, local })
                }
            }
        };
        let (version, base, replace, local) = match plan {
            Err(refusal) => return refuse(request.id, refusal, out),
            Ok(Plan::Answer(outcome)) => {
                out.push(Effect::Reply { id: request.id, result: Ok(outcome) });
                out.push(Effect::Done { op: request.id });
                return;
            }
            Ok(Plan::Begin { version, base, replace, local }) => (version, base, replace, local),
        };
        let committed_already =
            !local && matches!(request.origin, Origin::Forward { .. }) && state.committed == version;
        let resync_to = match request.origin {
            Origin::Resync { to } => Some(to),
            _ => None,
        };
        let op = Op {
            id: request.id,
            kind: if committed_already { Kind::Mirror } else { request.kind },
            waiter: Some(request.id),
            client: request.origin == Origin::Client,
            resync_to,
            version,
            base,
            replace,
            local: if local { Local::Preparing } else { Local::None },
            legs: Vec::new(),
            phase: Phase::Working,
            rewrites: 0,
            fetched: false,
            carried_over: false,
            // Once a syncing successor may have it, the only serving replica could not refuse it any more.
            held_back: local && self.is_alone(),
        };
        let held_back = op.held_back;
        if local {
            out.push(Effect::Prepare { op: op.id, chunk: request.chunk, version, content: op.content() });
        }
        self.chunks.entry(request.chunk).or_default().active = Some(op);
        if !held_back {
            self.open_legs(request.chunk, false, out);
        }
        self.advance(now_ns, request.chunk, view, out);
    }

    /// Hold the chunk while its rotten bytes are put right. With a pending version, which may share a disk block with
    /// the committed one, the repair waits until that is resolved.
    fn start_repair(&mut self, request: Request, state: &ChunkState, out: &mut Vec<Effect>) {
        if state.pending != 0 {
            return refuse(request.id, Refusal::new(Code::Busy), out);
        }
        if state.committed == 0 {
            out.push(Effect::Reply { id: request.id, result: Ok(outcome_of(state)) });
            out.push(Effect::Done { op: request.id });
            return;
        }
        let op = Op {
            id: request.id,
            kind: request.kind,
            waiter: Some(request.id),
            client: false,
            resync_to: None,
            version: state.committed,
            base: state.committed,
            replace: false,
            local: Local::None,
            legs: Vec::new(),
            phase: Phase::Repairing,
            rewrites: 0,
            fetched: false,
            carried_over: false,
            held_back: false,
        };
        out.push(Effect::Repair { op: op.id, chunk: request.chunk });
        self.chunks.entry(request.chunk).or_default().active = Some(op);
    }

    fn plan_client(&mut self, request: &Request, state: &ChunkState) -> Result<Plan, Refusal> {
        if let Some(writer) = request.writer {
            let same = |r: &&WriterRecord| r.writer.client == writer.client && r.writer.channel == writer.channel;
            match state.writers.iter().find(same) {
                Some(r) if r.writer.sequence == writer.sequence => {
                    return Ok(Plan::Answer(Outcome { update_version: r.update_version, ..outcome_of(state) }));
                }
                Some(r) if r.writer.sequence > writer.sequence => return Err(Refusal::new(Code::Superseded)),
                _ => {}
            }
            if self.answered.has(request.chunk, writer).map_err(Refusal::new)? {
                return Ok(Plan::Answer(outcome_of(state)));
            }
        }
        let nothing = match request.kind {
            Kind::Truncate(length) => state.committed == 0 || state.length <= length,
            Kind::Punch(offset) => state.committed == 0 || state.length <= offset,
            Kind::Remove => state.committed == 0,
            Kind::Write | Kind::Mirror => false,
        };
        if nothing {
            if let Some(writer) = request.writer {
                self.answered.note(request.chunk, writer);
            }
            return Ok(Plan::Answer(outcome_of(state)));
        }
        let version = if state.committed > 0 { state.committed + 1 } else { self.creation_version(state.tombstone) };
        Ok(Plan::Begin { version, base: state.committed, replace: false, local: true })
    }

    fn plan_forward(
        &self,
        request: &Request,
        state: &ChunkState,
        version: u64,
        base: u64,
        replace: bool,
    ) -> Result<Plan, Refusal> {
        // Only forward from here on: a serving replica's chunks, and a syncing one's that this chain version wrote.
        let known = state.committed.max(state.tombstone);
        let guarded =
            self.routing.role == Role::Serving || (known > 0 && state.chain_version == self.routing.chain_version);
        if guarded && version <= known {
            let leaf = self.routing.successors.is_empty();
            if version < known || leaf || state.chain_version == self.routing.chain_version {
                return Ok(Plan::Answer(outcome_of(state)));
            }
            // Committed under an older chain version, when the successors of now may have been others.
            return Ok(Plan::Begin { version, base, replace: true, local: false });
        }
        if request.kind == Kind::Remove {
            // A removal of what is not here still travels on: a successor that has it is healed. One that finds only a
            // pending version left by an earlier life clears it away.
            let version = version.max(known + 1);
            let local = state.committed > 0 || state.pending > 0;
            return Ok(Plan::Begin { version, base, replace: false, local });
        }
        if !replace && state.committed != base {
            return Err(Refusal::new(Code::VersionGap));
        }
        Ok(Plan::Begin { version, base, replace, local: true })
    }

    /// Above every version of an earlier life of any chunk, as far as this head can know (invariant 5).
    fn creation_version(&mut self, tombstone: u64) -> u64 {
        let version = self.next_create.max((self.routing.chain_version << CREATE_SHIFT) + 1).max(tombstone + 1);
        self.next_create = version + 1;
        version
    }

    /// Begin forwarding to the successors of now. `uncertain`: they may have seen this update before.
    pub(crate) fn open_legs(&mut self, chunk_id: ChunkId, uncertain: bool, out: &mut Vec<Effect>) {
        let Some(op) = self.chunks.get_mut(&chunk_id).and_then(|c| c.active.as_mut()) else { return };
        op.held_back = false;
        // Attempts are numbered through an update's whole life, so that an answer to an older chain's is ignored.
        let attempt = op.legs.iter().map(|l| l.attempt).max().unwrap_or(0) + 1;
        let wanted = self.routing.successors.iter().filter(|s| op.resync_to.is_none_or(|to| to == s.target));
        op.legs = wanted
            .map(|s| Leg { to: s.target, syncing: s.syncing, state: LegState::Running, attempt, uncertain, damaged: 0 })
            .collect();
        for at in 0..op.legs.len() {
            let effect = self.forward_effect(chunk_id, at, 0);
            out.extend(effect);
        }
    }

    pub(crate) fn forward_effect(&self, chunk: ChunkId, leg: usize, delay_ns: u64) -> Option<Effect> {
        let op = self.chunks.get(&chunk)?.active.as_ref()?;
        let leg = &op.legs[leg];
        let content = match op.content() {
            Content::Update if leg.syncing && !self.synced.contains(&(leg.to, chunk)) => Content::Whole,
            content => content,
        };
        Some(Effect::Forward {
            op: op.id,
            chunk,
            to: leg.to,
            attempt: leg.attempt,
            chain_version: self.routing.chain_version,
            version: op.version,
            base: op.base,
            content,
            delay_ns,
        })
    }

    /// The active update ended. Answer it, let waiting readers in, begin the next request.
    pub(crate) fn finish(
        &mut self,
        now_ns: u64,
        chunk_id: ChunkId,
        result: Result<Outcome, Refusal>,
        view: &dyn ChunkView,
        out: &mut Vec<Effect>,
    ) {
        let lease = self.may_reply(now_ns);
        let Some(chunk) = self.chunks.get_mut(&chunk_id) else { return };
        let Some(op) = chunk.active.take() else { return };
        if let Some(id) = op.waiter {
            let late = op.client && result.is_ok() && !lease;
            let result = if late { Err(Refusal::maybe(Code::NotServing)) } else { result };
            out.push(Effect::Reply { id, result });
        }
        out.push(Effect::Done { op: op.id });
        // Between two updates the chunk is clean: a stream of writers does not starve the readers.
        if !chunk.orphan {
            out.extend(chunk.readers.drain(..).map(|id| Effect::ServeRead { id }));
        }
        while let Some(next) = self.next_queued(chunk_id) {
            match self.admit(now_ns, &next) {
                Ok(()) => self.start(now_ns, next, view, out),
                Err(code) => refuse(next.id, Refusal::new(code), out),
            }
        }
        self.tidy(chunk_id);
    }

    fn next_queued(&mut self, chunk: ChunkId) -> Option<Request> {
        let chunk = self.chunks.get_mut(&chunk)?;
        if chunk.active.is_some() { None } else { chunk.queue.pop_front() }
    }

    pub(crate) fn tidy(&mut self, chunk: ChunkId) {
        if self.chunks.get(&chunk).is_some_and(Chunk::is_idle) {
            self.chunks.remove(&chunk);
        }
    }
}

pub(crate) fn outcome_of(state: &ChunkState) -> Outcome {
    Outcome { update_version: state.committed, length: state.length, crc: state.crc }
}

pub(crate) fn refuse(id: RequestId, refusal: Refusal, out: &mut Vec<Effect>) {
    out.push(Effect::Reply { id, result: Err(refusal) });
    out.push(Effect::Done { op: id });
}
