//! Chain changes.

use fs3_core::{ChunkId, Code};

use crate::chunk::{Chunk, Local, Op, Phase};
use crate::progress::may_be_held_below;
use crate::replica::{Replica, refuse};
use crate::types::*;

impl Replica {
    pub(crate) fn rerouted(&mut self, now_ns: u64, to: RoutingView, view: &dyn ChunkView, out: &mut Vec<Effect>) {
        if self.failed || to.chain_version < self.routing.chain_version || to == self.routing {
            return;
        }
        let (was_serving, was_head) = (self.routing.role == Role::Serving, self.is_serving_head());
        self.routing = to;
        self.synced.clear();
        self.answered.clear();
        self.removed.clear();
        let (serving, head) = (self.routing.role == Role::Serving, self.is_serving_head());
        for id in self.chunks.keys().copied().collect::<Vec<_>>() {
            self.reroute_chunk(now_ns, id, view, out);
            self.tidy(id);
        }
        if serving && !self.failed && (!was_serving || head != was_head) {
            self.adopt_pending(head, view, out);
        }
    }

    fn reroute_chunk(&mut self, now_ns: u64, id: ChunkId, view: &dyn ChunkView, out: &mut Vec<Effect>) {
        let (serving, head) = (self.routing.role == Role::Serving, self.is_serving_head());
        let has_syncing = self.routing.successors.iter().any(|s| s.syncing);
        let Some(chunk) = self.chunks.get_mut(&id) else { return };
        for request in chunk.queue.drain(..) {
            refuse(request.id, Refusal::new(Code::StaleChain), out);
        }
        let stale = Refusal::new(Code::StaleChain);
        out.extend(chunk.readers.drain(..).map(|id| Effect::Reply { id, result: Err(stale) }));
        chunk.orphan &= serving && !head;
        let Some(op) = chunk.active.as_mut().filter(|op| op.phase != Phase::Repairing) else { return };
        // A client of this head may go on waiting: its update goes on.
        let waiter = if op.client && head { None } else { op.waiter.take() };
        out.extend(waiter.map(|id| Effect::Reply { id, result: Err(Refusal::maybe(Code::StaleChain)) }));
        op.carried_over |= op.resync_to.is_none();
        match op.phase {
            Phase::Working if head && op.resync_to.is_none() => {
                self.open_legs(id, true, out);
                self.advance(now_ns, id, view, out);
            }
            Phase::Working => self.give_up(now_ns, id, view, out),
            // The old successors have it, a new syncing one may not: its resync can have compared this chunk before
            // the commit shows. It is sent after the commit.
            Phase::Committing if serving && has_syncing => op.phase = Phase::Recovering,
            Phase::Recovering | Phase::Committing | Phase::Repairing | Phase::Aborting(_) | Phase::Zombie => {}
        }
    }

    /// Drop an update that the upstream will send again; what is pending stays pending.
    fn give_up(&mut self, now_ns: u64, id: ChunkId, view: &dyn ChunkView, out: &mut Vec<Effect>) {
        let serving = self.routing.role == Role::Serving;
        let Some(chunk) = self.chunks.get_mut(&id) else { return };
        let Some(op) = chunk.active.as_mut() else { return };
        if op.local == Local::Preparing {
            op.phase = Phase::Zombie;
            return;
        }
        if let Local::Failed(code) = op.local
            && serving
            && may_be_held_below(op)
        {
            return self.fail(id, code, out);
        }
        chunk.orphan |= serving && op.resync_to.is_none() && matches!(op.local, Local::Ready(_));
        self.finish(now_ns, id, Err(Refusal::maybe(Code::StaleChain)), view, out);
    }

    /// Take care of the pending versions that an earlier life or chain left in the store.
    fn adopt_pending(&mut self, head: bool, view: &dyn ChunkView, out: &mut Vec<Effect>) {
        for id in view.pending() {
            let chunk: &mut Chunk = self.chunks.entry(id).or_default();
            if chunk.active.is_some() {
                continue;
            }
            if !head {
                chunk.orphan = true;
                continue;
            }
            let version = view.chunk(id).pending;
            let op = Op {
                id: self.next_op,
                kind: Kind::Mirror,
                waiter: None,
                client: false,
                resync_to: None,
                version,
                base: 0,
                replace: true,
                local: Local::None,
                legs: Vec::new(),
                phase: Phase::Recovering,
                rewrites: 0,
                fetched: false,
                carried_over: true,
                held_back: false,
            };
            self.next_op += 1;
            out.push(Effect::Commit { op: op.id, chunk: id, version });
            chunk.active = Some(op);
        }
    }
}
