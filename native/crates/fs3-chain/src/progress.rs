//! How an update in flight comes to its end.

use fs3_core::{ChunkId, Code, TargetId};

use crate::chunk::{LegState, Local, Op, Phase, is_definite};
use crate::replica::{Replica, outcome_of, refuse};
use crate::types::*;

/// Full rewrites of one update before the replica gives up on its successor.
const REWRITES_MAX: u32 = 8;

impl Replica {
    fn op_mut(&mut self, id: OpId, chunk: ChunkId) -> Option<&mut Op> {
        self.chunks.get_mut(&chunk)?.active.as_mut().filter(|op| op.id == id)
    }

    pub(crate) fn prepared(
        &mut self,
        now_ns: u64,
        id: OpId,
        chunk: ChunkId,
        result: Result<Outcome, Code>,
        view: &dyn ChunkView,
        out: &mut Vec<Effect>,
    ) {
        let (head, serving) = (self.is_serving_head(), self.routing.role == Role::Serving);
        let Some(op) = self.op_mut(id, chunk) else { return };
        if op.phase == Phase::Zombie {
            if result.is_ok() && head {
                // Became head meanwhile: what is pending here is re-driven (invariant 1).
                op.kind = Kind::Mirror;
                op.phase = Phase::Recovering;
                out.push(Effect::Commit { op: id, chunk, version: op.version });
                return;
            }
            if let Err(code) = result
                && serving
                && may_be_held_below(op)
            {
                return self.fail(chunk, code, out);
            }
            let orphan = result.is_ok() && serving;
            if let Some(chunk) = self.chunks.get_mut(&chunk) {
                chunk.orphan |= orphan;
            }
            return self.finish(now_ns, chunk, Err(Refusal::maybe(Code::StaleChain)), view, out);
        }
        match result {
            Ok(outcome) => op.local = Local::Ready(outcome),
            // The base here is rotten: a successor that commits this has the whole chunk, and so has upstream.
            Err(Code::ChecksumMismatch) if !op.fetched => op.local = Local::Failed(Code::ChecksumMismatch),
            Err(code) if is_definite(code) => op.local = Local::Failed(code),
            Err(code) => return self.fail(chunk, code, out),
        }
        let refused = matches!(op.local, Local::Failed(code) if is_definite(code));
        if op.held_back && !refused {
            self.open_legs(chunk, false, out);
        }
        self.advance(now_ns, chunk, view, out);
    }

    pub(crate) fn forwarded(
        &mut self,
        now_ns: u64,
        (id, chunk): (OpId, ChunkId),
        (to, attempt): (TargetId, u32),
        result: Result<Outcome, Code>,
        view: &dyn ChunkView,
        out: &mut Vec<Effect>,
    ) {
        let (config, alone) = (self.config, self.is_alone());
        let Some(op) = self.op_mut(id, chunk).filter(|op| op.phase == Phase::Working) else { return };
        let current = |l: &crate::chunk::Leg| l.to == to && l.attempt == attempt && l.state == LegState::Running;
        let Some(at) = op.legs.iter().position(current) else { return };
        let leg = &mut op.legs[at];
        leg.state = match result {
            Ok(outcome) => LegState::Acked(outcome),
            Err(Code::VersionGap) => LegState::Refused(Code::VersionGap),
            Err(Code::PayloadChecksum) if leg.damaged >= config.damaged_max && !leg.uncertain => {
                LegState::Refused(Code::PayloadChecksum)
            }
            Err(code) if is_definite(code) && !leg.uncertain => LegState::Refused(code),
            // The chunk that was to be sent is rotten here. A resync comes back to it when it has been repaired.
            Err(Code::ChecksumMismatch) if op.resync_to.is_some() || (alone && !op.carried_over) => {
                LegState::Refused(Code::ChecksumMismatch)
            }
            Err(Code::ChecksumMismatch) => return self.fail(chunk, Code::ChecksumMismatch, out),
            Err(code) => {
                // Unknown outcome, or a passing one: the same update again until the chain changes (invariant 1).
                if code == Code::PayloadChecksum {
                    leg.damaged += 1;
                } else {
                    leg.uncertain = true;
                }
                let delay_ns = config
                    .retry_ns_min
                    .saturating_mul(1 << leg.attempt.saturating_sub(1).min(20))
                    .min(config.retry_ns_max);
                leg.attempt += 1;
                let effect = self.forward_effect(chunk, at, delay_ns);
                out.extend(effect);
                return;
            }
        };
        if leg.syncing && result.is_ok() {
            self.synced.insert((to, chunk));
        }
        self.advance(now_ns, chunk, view, out);
    }

    /// Go on when the prepare and every forward have ended.
    pub(crate) fn advance(&mut self, now_ns: u64, chunk: ChunkId, view: &dyn ChunkView, out: &mut Vec<Effect>) {
        let head = self.is_serving_head();
        let Some(op) = self.chunks.get_mut(&chunk).and_then(|c| c.active.as_mut()) else { return };
        let waiting = op.legs.iter().any(|l| l.state == LegState::Running) || op.local == Local::Preparing;
        if op.phase != Phase::Working || waiting {
            return;
        }
        let expected = match op.local {
            Local::Ready(outcome) => Some(outcome),
            Local::None if op.kind == Kind::Mirror => Some(outcome_of(&view.chunk(chunk))),
            _ => None,
        };
        let refused = op.legs.iter().find_map(|l| if let LegState::Refused(c) = l.state { Some(c) } else { None });
        let diverged = diverged(op, expected);
        if diverged || refused.is_some() {
            // A syncing successor that acknowledged something else, or what is aborted now, is not equal after all.
            let legs: Vec<TargetId> = op.legs.iter().map(|l| l.to).collect();
            for to in legs {
                self.synced.remove(&(to, chunk));
            }
        }
        let Some(op) = self.chunks.get_mut(&chunk).and_then(|c| c.active.as_mut()) else { return };
        if op.local == Local::Failed(Code::ChecksumMismatch)
            && let Some((from, outcome)) = holder(op)
        {
            if op.fetched || outcome.update_version != op.version {
                return self.fail(chunk, Code::ChecksumMismatch, out);
            }
            op.fetched = true;
            op.local = Local::Preparing;
            // The chunk could not be sent whole to these: their resync sends it when it is sound again.
            op.legs.retain(|leg| !leg.syncing || leg.state != LegState::Refused(Code::ChecksumMismatch));
            let content = Content::Fetched { from, outcome };
            out.push(Effect::Prepare { op: op.id, chunk, version: op.version, content });
            return;
        }
        if head && op.local == Local::Failed(Code::ChecksumMismatch) {
            // A syncing successor may hold it already, and may not serve before it equals what is here.
            let refusal = Refusal { code: Code::ChecksumMismatch, maybe_applied: !op.legs.is_empty() };
            if op.carried_over || op.legs.iter().any(|l| !l.syncing) {
                return self.fail(chunk, Code::ChecksumMismatch, out);
            }
            return self.finish(now_ns, chunk, Err(refusal), view, out);
        }
        if diverged {
            return self.repair(now_ns, chunk, head, view, out);
        }
        match (op.local, refused) {
            (Local::Ready(_), None) => {
                op.phase = Phase::Committing;
                out.push(Effect::Commit { op: op.id, chunk, version: op.version });
            }
            (Local::Ready(_), Some(code)) => {
                op.phase = Phase::Aborting(code);
                out.push(Effect::Abort { op: op.id, chunk, version: op.version });
            }
            (Local::None, None) => {
                let result = Ok(expected.unwrap_or(Outcome { update_version: op.version, length: 0, crc: 0 }));
                self.finish(now_ns, chunk, result, view, out);
            }
            (Local::None, Some(code)) => self.finish(now_ns, chunk, Err(Refusal::new(code)), view, out),
            // Nobody downstream has it either.
            (Local::Failed(code), refused) if op.legs.is_empty() || refused.is_some() => {
                self.finish(now_ns, chunk, Err(Refusal::new(code)), view, out);
            }
            (Local::Failed(code), _) => self.fail(chunk, code, out),
            (Local::Preparing, _) => unreachable!("waited for above"),
        }
    }

    /// The replicas would differ after this update: the head writes the whole chunk again under a version above all
    /// (invariant 6); the others tell their upstream.
    fn repair(&mut self, now_ns: u64, chunk: ChunkId, head: bool, view: &dyn ChunkView, out: &mut Vec<Effect>) {
        let Some(active) = self.chunks.get_mut(&chunk) else { return };
        let Some(op) = active.active.as_mut() else { return };
        if !head || op.resync_to.is_some() {
            active.orphan |= op.resync_to.is_none() && self.routing.role == Role::Serving;
            return self.finish(now_ns, chunk, Err(Refusal::new(Code::VersionGap)), view, out);
        }
        if op.rewrites >= REWRITES_MAX {
            return self.fail(chunk, Code::VersionGap, out);
        }
        let acked = |l: &crate::chunk::Leg| if let LegState::Acked(o) = l.state { o.update_version } else { 0 };
        op.version = op.legs.iter().map(acked).max().unwrap_or(0).max(op.version) + 1;
        op.rewrites += 1;
        op.replace = true;
        op.local = Local::Preparing;
        out.push(Effect::Prepare { op: op.id, chunk, version: op.version, content: op.content() });
        self.open_legs(chunk, true, out);
    }

    pub(crate) fn committed(
        &mut self,
        now_ns: u64,
        id: OpId,
        chunk: ChunkId,
        result: Result<(), Code>,
        view: &dyn ChunkView,
        out: &mut Vec<Effect>,
    ) {
        let Some(op) = self.op_mut(id, chunk) else { return };
        if let Err(code) = result {
            return self.fail(chunk, code, out);
        }
        let (kind, version, phase) = (op.kind, op.version, op.phase);
        let outcome = if let Local::Ready(outcome) = op.local { outcome } else { Outcome::default() };
        if kind == Kind::Remove {
            self.next_create = self.next_create.max(version + 1);
        }
        if let Some(chunk) = self.chunks.get_mut(&chunk) {
            chunk.orphan = false;
        }
        if phase == Phase::Recovering {
            return self.mirror(now_ns, chunk, view, out);
        }
        self.finish(now_ns, chunk, Ok(outcome), view, out);
    }

    /// Bring the successors of now to the version just committed here.
    fn mirror(&mut self, now_ns: u64, chunk: ChunkId, view: &dyn ChunkView, out: &mut Vec<Effect>) {
        let Some(op) = self.chunks.get_mut(&chunk).and_then(|c| c.active.as_mut()) else { return };
        op.phase = Phase::Working;
        // A removal stays one: there is nothing left to mirror.
        if op.kind != Kind::Remove && view.chunk(chunk).committed > 0 {
            op.kind = Kind::Mirror;
        } else {
            op.kind = Kind::Remove;
        }
        op.local = Local::None;
        self.open_legs(chunk, true, out);
        self.advance(now_ns, chunk, view, out);
    }

    pub(crate) fn aborted(
        &mut self,
        now_ns: u64,
        id: OpId,
        chunk: ChunkId,
        view: &dyn ChunkView,
        out: &mut Vec<Effect>,
    ) {
        let Some(op) = self.op_mut(id, chunk) else { return };
        let code = if let Phase::Aborting(code) = op.phase { code } else { Code::Internal };
        self.finish(now_ns, chunk, Err(Refusal::new(code)), view, out);
    }

    pub(crate) fn repaired(
        &mut self,
        now_ns: u64,
        id: OpId,
        chunk: ChunkId,
        result: Result<(), Code>,
        view: &dyn ChunkView,
        out: &mut Vec<Effect>,
    ) {
        if self.op_mut(id, chunk).is_none() {
            return;
        }
        let result = result.map(|()| outcome_of(&view.chunk(chunk))).map_err(Refusal::new);
        self.finish(now_ns, chunk, result, view, out);
    }

    /// Nothing more is served in this life: everything waiting is refused.
    pub(crate) fn fail(&mut self, chunk: ChunkId, code: Code, out: &mut Vec<Effect>) {
        self.failed = true;
        out.push(Effect::Fatal { chunk, code });
        for (_, chunk) in std::mem::take(&mut self.chunks) {
            if let Some(op) = chunk.active {
                let refusal = Refusal::maybe(Code::NotServing);
                out.extend(op.waiter.map(|id| Effect::Reply { id, result: Err(refusal) }));
                out.push(Effect::Done { op: op.id });
            }
            for request in chunk.queue {
                refuse(request.id, Refusal::new(Code::NotServing), out);
            }
            let refusal = Refusal::new(Code::NotServing);
            out.extend(chunk.readers.into_iter().map(|id| Effect::Reply { id, result: Err(refusal) }));
        }
    }

    /// Whether this is the only serving replica.
    pub(crate) fn is_alone(&self) -> bool {
        self.is_serving_head() && self.routing.successors.iter().all(|s| s.syncing)
    }

    pub(crate) fn is_serving_head(&self) -> bool {
        self.routing.role == Role::Serving && self.routing.head
    }
}

/// A successor that has committed the update. A syncing one counts: it may be up to date and serve at any moment, so that
/// the update must not be given up either.
fn holder(op: &Op) -> Option<(TargetId, Outcome)> {
    let acked = |leg: &crate::chunk::Leg| match leg.state {
        LegState::Acked(outcome) => Some((leg.to, outcome)),
        _ => None,
    };
    let serving = op.legs.iter().filter(|leg| !leg.syncing).find_map(acked);
    serving.or_else(|| op.legs.iter().find_map(acked))
}

/// Whether a serving successor may have committed the update, so that this replica must not go on without it.
pub(crate) fn may_be_held_below(op: &Op) -> bool {
    op.legs.iter().any(|leg| !leg.syncing && !matches!(leg.state, LegState::Refused(_)))
}

/// Whether a successor's chunk is not what it should be after this update, or the local one needs the whole chunk.
fn diverged(op: &Op, expected: Option<Outcome>) -> bool {
    if op.local == Local::Failed(Code::ChecksumMismatch) {
        return true;
    }
    op.legs.iter().any(|leg| match leg.state {
        LegState::Refused(code) => code == Code::VersionGap,
        LegState::Acked(outcome) => op.kind != Kind::Remove && expected.is_some_and(|e| e != outcome),
        LegState::Running => false,
    })
}
