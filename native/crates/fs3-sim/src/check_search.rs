//! Search for one order of all operations on a chunk that explains every read.
//!
//! Wing and Gong's depth-first search: an operation may come next when no other, not yet placed, ended before it began.
//! Lowe's memory: a set of placed operations that left the same content behind is not tried twice. Update versions, where
//! known, order the updates and keep the search nearly straight. A read that fits is placed at once: it changes nothing,
//! so no other choice is lost by it. Updates of unknown outcome may be placed late or never.

use std::collections::HashSet;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash};
use std::rc::Rc;

use crate::check::{Property, describe, end};
use crate::history::{Kind, Loss, Operation, Outcome, Run};

/// Steps of the search before it gives up without an answer: a history that needs more is ambiguous beyond use.
const STEPS_MAX: usize = 2_000_000;

/// Content of a chunk: runs of values other than zero, in order.
type Content = Vec<Run>;

/// One placed update and what came before it.
struct Node {
    before: Option<Rc<Node>>,
    /// Index of the update; `None` at the root.
    operation: Option<usize>,
    content: Content,
    /// Highest version placed up to here.
    version: u64,
    /// Updates up to here survive a power loss.
    synced: bool,
    hash: u64,
}

#[derive(Clone)]
struct State {
    node: Rc<Node>,
    /// Highest version among the placed operations.
    version: u64,
    /// First required event that is not placed.
    next: usize,
    /// Placed ones after `next`, and placed ones of unknown outcome.
    placed: Vec<usize>,
}

/// What has to be placed: operations and losses by the time of their beginning.
struct Event<'a> {
    from: u64,
    until: u64,
    what: What<'a>,
}

enum What<'a> {
    Operation(&'a Operation),
    Loss(Loss),
}

/// `None` when there is an order, or when the search was given up.
pub(crate) fn check(operations: &[&Operation], losses: &[(u64, Loss)]) -> Option<(Property, String)> {
    let mut events: Vec<Event> = Vec::new();
    for o in operations.iter().filter(|o| o.outcome != Outcome::Failed) {
        let answered = end(o);
        if answered == u64::MAX && matches!(o.kind, Kind::Read { .. } | Kind::Sync) {
            continue;
        }
        events.push(Event { from: o.invoked_ns, until: answered, what: What::Operation(o) });
    }
    events.extend(losses.iter().map(|(at, loss)| Event { from: *at, until: *at, what: What::Loss(*loss) }));
    events.sort_by_key(|e| (e.from, e.until));
    let open = (0..events.len()).filter(|i| events[*i].until == u64::MAX).collect();
    let losses_after = losses.last().map_or(0, |l| l.0);
    Search { events, tried: HashSet::default(), open, furthest: 0, steps: 0, losses_after }.run()
}

/// A point of the search: `next`, what is placed, the past where a loss may need it, version, content.
type Tried = (usize, Vec<usize>, u64, u64, Content);

struct Search<'a> {
    events: Vec<Event<'a>>,
    tried: HashSet<Tried, BuildHasherDefault<DefaultHasher>>,
    /// Updates of unknown outcome.
    open: Vec<usize>,
    furthest: usize,
    steps: usize,
    losses_after: u64,
}

impl Search<'_> {
    fn run(mut self) -> Option<(Property, String)> {
        let root = Node { before: None, operation: None, content: Vec::new(), version: 0, synced: true, hash: 0 };
        let start = State { node: Rc::new(root), version: 0, next: 0, placed: Vec::new() };
        let mut stack = vec![start];
        while let Some(mut state) = stack.pop() {
            self.steps += 1;
            if self.steps > STEPS_MAX {
                return None;
            }
            self.place_reads(&mut state);
            self.furthest = self.furthest.max(state.next);
            if state.next == self.events.len() {
                return None;
            }
            // Content alone decides what is possible, unless a loss may still take updates back.
            let past = if self.losses_pending(&state) { state.node.hash } else { 0 };
            let mut placed = state.placed.clone();
            placed.sort_unstable();
            if !self.tried.insert((state.next, placed, past, state.version, state.node.content.clone())) {
                continue;
            }
            let mut choices = self.choices(&state);
            // The last one pushed is tried first.
            choices.reverse();
            stack.extend(choices);
        }
        Some((Property::Linearizable, self.explain()))
    }

    /// The latest time at which the next operation may begin.
    fn bound(&self, state: &State) -> u64 {
        let mut bound = u64::MAX;
        for (i, event) in self.events.iter().enumerate().skip(state.next) {
            if event.from > bound {
                break;
            }
            if !state.placed.contains(&i) {
                bound = bound.min(event.until);
            }
        }
        bound
    }

    /// Events that may come next.
    fn minimal(&self, state: &State) -> Vec<usize> {
        let bound = self.bound(state);
        let late = self.events[state.next..].iter().take_while(|e| e.from <= bound).count();
        let open = self.open.iter().copied().take_while(|i| *i < state.next);
        open.chain(state.next..state.next + late).filter(|i| !state.placed.contains(i)).collect()
    }

    /// The smallest version among updates that have to be placed; later updates have to wait for it.
    fn least_version(&self, state: &State, minimal: &[usize]) -> u64 {
        let version = |i: &usize| match self.events[*i].what {
            What::Operation(o) if !matches!(o.kind, Kind::Read { .. }) && !state.placed.contains(i) => o.version,
            _ => None,
        };
        minimal.iter().filter_map(version).min().unwrap_or(u64::MAX)
    }

    fn place_reads(&self, state: &mut State) {
        loop {
            self.advance(state);
            if state.next == self.events.len() {
                return;
            }
            let minimal = self.minimal(state);
            let least = self.least_version(state, &minimal);
            let fits = |i: &&usize| {
                let What::Operation(o) = self.events[**i].what else { return false };
                let Kind::Read { offset, length, seen } = &o.kind else { return false };
                o.version.is_none_or(|v| v >= state.version && v < least)
                    && shows(&state.node.content, *offset, *length, seen)
            };
            let fitting: Vec<usize> = minimal.iter().filter(fits).copied().collect();
            // One at a time where versions are known: the oldest first.
            let version = |i: &usize| if let What::Operation(o) = self.events[*i].what { o.version } else { None };
            let Some(read) = fitting.into_iter().min_by_key(version) else { return };
            state.version = state.version.max(version(&read).unwrap_or(0));
            state.placed.push(read);
        }
    }

    /// Drop what is placed from the front.
    fn advance(&self, state: &mut State) {
        while state.next < self.events.len() {
            if let Some(at) = state.placed.iter().position(|i| *i == state.next) {
                // Those of unknown outcome are remembered: they can be placed at any later time, but once.
                if self.events[state.next].until < u64::MAX {
                    state.placed.swap_remove(at);
                }
            } else if self.events[state.next].until < u64::MAX {
                return;
            }
            state.next += 1;
        }
    }

    fn choices(&self, state: &State) -> Vec<State> {
        let minimal = self.minimal(state);
        let least = self.least_version(state, &minimal);
        let mut choices = Vec::new();
        for unknown in [false, true] {
            for &i in minimal.iter().filter(|i| (self.events[**i].until == u64::MAX) == unknown) {
                match self.events[i].what {
                    What::Loss(loss) => choices.extend(self.lose(state, i, loss)),
                    What::Operation(o) if matches!(o.kind, Kind::Sync) => choices.push(self.sync(state, i)),
                    What::Operation(o) if matches!(o.kind, Kind::Read { .. }) => {}
                    What::Operation(o) => {
                        if o.version.is_none_or(|v| v > state.version && v <= least) {
                            choices.push(self.update(state, i, o));
                        }
                    }
                }
            }
        }
        choices
    }

    fn update(&self, state: &State, i: usize, o: &Operation) -> State {
        let version = state.version.max(o.version.unwrap_or(0));
        let hash = hash_of(&(state.node.hash, i));
        let content = after(&state.node.content, &o.kind);
        let before = self.losses_pending(state).then(|| state.node.clone());
        let node = Rc::new(Node { before, operation: Some(i), content, version, synced: false, hash });
        let mut next = State { node, version, ..state.clone() };
        next.placed.push(i);
        next
    }

    fn losses_pending(&self, state: &State) -> bool {
        self.losses_after > 0 && self.events[state.next].from <= self.losses_after
    }

    fn sync(&self, state: &State, i: usize) -> State {
        let node = &state.node;
        let node = Rc::new(Node {
            before: node.before.clone(),
            operation: node.operation,
            content: node.content.clone(),
            synced: true,
            hash: hash_of(&(node.hash, "synced")),
            ..**node
        });
        let mut next = State { node, ..state.clone() };
        next.placed.push(i);
        next
    }

    /// What may be left after a loss: everything, or less.
    fn lose(&self, state: &State, i: usize, loss: Loss) -> Vec<State> {
        let at = self.events[i].from;
        let mut kept = state.clone();
        kept.placed.push(i);
        let mut choices = vec![kept.clone()];
        let (mut node, mut left) = (kept.node.clone(), vec![kept]);
        while let (Some(operation), Some(before)) = (node.operation, node.before.clone()) {
            let acknowledged = self.events[operation].until < at;
            if node.synced || (loss == Loss::Processes && acknowledged) {
                break;
            }
            node = before;
            let mut without = Vec::new();
            for mut state in left {
                state.version = node.version;
                state.node = node.clone();
                // Its acknowledgement may have been on its way when the power was lost.
                let late = loss == Loss::Power && self.events[operation].until < u64::MAX;
                if acknowledged || late {
                    without.push(state.clone());
                }
                // What is not acknowledged yet may still take effect.
                if !acknowledged {
                    state.placed.retain(|p| *p != operation);
                    if operation < state.next && self.events[operation].until < u64::MAX {
                        state.placed.extend((operation + 1..state.next).filter(|p| self.events[*p].until < u64::MAX));
                        state.next = operation;
                    }
                    without.push(state);
                }
            }
            choices.extend(without.iter().cloned());
            left = without;
            if loss == Loss::Processes {
                break;
            }
        }
        choices
    }

    fn explain(&self) -> String {
        let near: Vec<String> = (self.furthest.saturating_sub(6)..self.events.len().min(self.furthest + 6))
            .map(|i| {
                let mark = if i == self.furthest { "=> " } else { "" };
                match self.events[i].what {
                    What::Operation(o) => format!("{mark}{}", describe(o)),
                    What::Loss(loss) => format!("{mark}loss of all {loss:?} at {}", self.events[i].from),
                }
            })
            .collect();
        format!("no order of the operations explains what was read; stuck near:\n  {}", near.join("\n  "))
    }
}

fn hash_of(value: &impl Hash) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(value)
}

/// Content after an update.
pub(crate) fn after(content: &Content, kind: &Kind) -> Content {
    let cut = |from: u32, to: u32| {
        content.iter().flat_map(move |run| {
            let (start, stop) = (run.offset, run.offset + run.length);
            let left = (start < from.min(stop)).then(|| Run { length: from.min(stop) - start, ..*run });
            let begin = start.max(to);
            let right = (begin < stop).then(|| Run { offset: begin, length: stop - begin, value: run.value });
            left.into_iter().chain(right)
        })
    };
    match kind {
        Kind::Write { offset, length, value } => {
            let mut runs: Content = cut(*offset, offset + length).collect();
            runs.push(Run { offset: *offset, length: *length, value: *value });
            runs.sort_by_key(|run| run.offset);
            runs
        }
        Kind::Truncate { length } => cut(*length, u32::MAX).collect(),
        Kind::Punch { offset, length } => cut(*offset, offset + length).collect(),
        Kind::Remove => Vec::new(),
        Kind::Read { .. } | Kind::Sync => content.clone(),
    }
}

/// Whether a read of this content shows `seen`.
pub(crate) fn shows(content: &Content, offset: u32, length: u32, seen: &[Run]) -> bool {
    let until = offset + length;
    let mut expected = content
        .iter()
        .map(|run| (run.offset.max(offset), (run.offset + run.length).min(until), run.value))
        .filter(|(from, to, _)| from < to)
        .peekable();
    for run in seen {
        let (mut at, stop) = (run.offset, run.offset + run.length);
        while at < stop {
            let Some(&(from, to, value)) = expected.peek() else {
                if run.value != 0 {
                    return false;
                }
                break;
            };
            if at < from {
                if run.value != 0 {
                    return false;
                }
                at = from.min(stop);
            } else if value != run.value {
                return false;
            } else if to <= stop {
                at = to;
                expected.next();
            } else {
                // The run ends inside: its neighbour has to go on with the same value, which runs never do.
                return false;
            }
        }
    }
    expected.peek().is_none()
}
