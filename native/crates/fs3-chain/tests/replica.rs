//! Scripts for one replica: what it does at each step.

use std::collections::BTreeMap;

use fs3_chain::*;
use fs3_core::{ChunkId, ClientId, Code, TargetId};

const CHUNK: ChunkId = ChunkId { space: 0, inode: 1, index: 0 };
const NEXT: TargetId = TargetId(2);
const LEASE: u64 = 1_000_000_000;

#[derive(Default)]
struct Store(BTreeMap<ChunkId, ChunkState>);

impl ChunkView for Store {
    fn chunk(&self, id: ChunkId) -> ChunkState {
        self.0.get(&id).cloned().unwrap_or_default()
    }
    fn pending(&self) -> Vec<ChunkId> {
        self.0.iter().filter(|(_, c)| c.pending != 0).map(|(id, _)| *id).collect()
    }
}

struct Rig {
    replica: Replica,
    store: Store,
    now: u64,
    next: RequestId,
}

fn place(chain_version: u64, head: bool, successors: &[(u64, bool)]) -> RoutingView {
    let successors =
        successors.iter().map(|(t, syncing)| Successor { target: TargetId(*t), syncing: *syncing }).collect();
    RoutingView { chain_version, role: Role::Serving, head, successors }
}

fn writer(sequence: u64) -> Writer {
    Writer { client: ClientId([1; 16]), channel: 1, sequence }
}

fn outcome(update_version: u64) -> Outcome {
    Outcome { update_version, length: 10, crc: 7 }
}

impl Rig {
    fn new(view: RoutingView) -> Self {
        let mut rig = Self { replica: Replica::new(Config::default()), store: Store::default(), now: 1, next: 1 };
        rig.step(Event::Lease { serve_until_ns: LEASE });
        rig.step(Event::Routing(view));
        rig
    }

    /// With a committed version of the chunk.
    fn with_chunk(view: RoutingView, committed: u64) -> Self {
        let mut rig = Self::new(view);
        rig.commit(committed, 1);
        rig
    }

    fn commit(&mut self, version: u64, chain_version: u64) {
        let writers = self.store.chunk(CHUNK).writers;
        let state = ChunkState { committed: version, chain_version, length: 10, crc: 7, writers, ..Default::default() };
        self.store.0.insert(CHUNK, state);
    }

    fn step(&mut self, event: Event) -> Vec<Effect> {
        self.replica.step(self.now, event, &self.store)
    }

    fn request(&mut self, kind: Kind, origin: Origin, sequence: Option<u64>) -> Vec<Effect> {
        let id = self.next;
        self.next += 1;
        let chain_version = self.replica.routing().chain_version;
        let writer = sequence.map(writer);
        self.step(Event::Request(Request { id, chunk: CHUNK, chain_version, kind, writer, origin }))
    }

    fn write(&mut self, sequence: u64) -> Vec<Effect> {
        self.request(Kind::Write, Origin::Client, Some(sequence))
    }

    fn forward(&mut self, version: u64, base: u64) -> Vec<Effect> {
        self.request(Kind::Write, Origin::Forward { version, base, replace: false }, None)
    }

    fn prepared(&mut self, op: OpId, version: u64) -> Vec<Effect> {
        let state = self.store.0.entry(CHUNK).or_default();
        state.pending = version;
        self.step(Event::Prepared { op, chunk: CHUNK, result: Ok(outcome(version)) })
    }

    fn acked(&mut self, op: OpId, attempt: u32, result: Result<Outcome, Code>) -> Vec<Effect> {
        self.step(Event::Forwarded { op, chunk: CHUNK, to: NEXT, attempt, result })
    }

    fn committed(&mut self, op: OpId, version: u64, chain_version: u64) -> Vec<Effect> {
        self.commit(version, chain_version);
        self.step(Event::Committed { op, chunk: CHUNK, result: Ok(()) })
    }
}

fn replies(effects: &[Effect]) -> Vec<Result<Outcome, Code>> {
    let reply = |e: &Effect| match e {
        Effect::Reply { result, .. } => Some(result.map_err(|r| r.code)),
        _ => None,
    };
    effects.iter().filter_map(reply).collect()
}

fn is_prepare(effect: &Effect, want: u64) -> bool {
    matches!(effect, Effect::Prepare { version, .. } if *version == want)
}

fn is_forward(effect: &Effect, want: u64, which: Content) -> bool {
    matches!(effect, Effect::Forward { version, content, .. } if *version == want && *content == which)
}

#[test]
fn the_head_prepares_and_forwards_at_once_and_commits_only_after_both() {
    let mut rig = Rig::with_chunk(place(1, true, &[(2, false)]), 4);
    let effects = rig.write(1);
    assert!(is_prepare(&effects[0], 5) && is_forward(&effects[1], 5, Content::Update));
    assert!(rig.acked(1, 1, Ok(outcome(5))).is_empty(), "the prepare is still running");
    assert_eq!(rig.prepared(1, 5), [Effect::Commit { op: 1, chunk: CHUNK, version: 5 }]);
    assert_eq!(replies(&rig.committed(1, 5, 1)), [Ok(outcome(5))]);
    assert_eq!(rig.replica.busy_chunks(), 0);
}

#[test]
fn the_tail_commits_after_its_prepare() {
    let mut rig = Rig::with_chunk(place(1, false, &[]), 4);
    assert!(is_prepare(&rig.forward(5, 4)[0], 5));
    assert_eq!(rig.prepared(1, 5), [Effect::Commit { op: 1, chunk: CHUNK, version: 5 }]);
}

#[test]
fn a_created_chunk_gets_a_version_above_every_earlier_life() {
    let mut rig = Rig::new(place(3, true, &[]));
    assert!(is_prepare(&rig.write(1)[0], (3 << 32) + 1));
    let mut rig = Rig::new(place(3, true, &[]));
    rig.store.0.insert(CHUNK, ChunkState { tombstone: (3 << 32) + 50, ..Default::default() });
    assert!(is_prepare(&rig.write(1)[0], (3 << 32) + 51));
}

#[test]
fn a_known_write_is_answered_from_its_record_and_an_older_one_is_superseded() {
    let mut rig = Rig::with_chunk(place(1, true, &[(2, false)]), 4);
    rig.store.0.get_mut(&CHUNK).unwrap().writers = vec![WriterRecord { writer: writer(8), update_version: 3 }];
    assert_eq!(replies(&rig.write(8)), [Ok(outcome(3))]);
    assert_eq!(replies(&rig.write(7)), [Err(Code::Superseded)]);
    assert!(is_prepare(&rig.write(9)[0], 5));
}

#[test]
fn a_retry_waits_for_the_first_attempt_and_shares_its_result() {
    let mut rig = Rig::with_chunk(place(1, true, &[]), 4);
    rig.write(1);
    assert!(rig.write(1).is_empty());
    rig.prepared(1, 5);
    rig.store.0.get_mut(&CHUNK).unwrap().writers = vec![WriterRecord { writer: writer(1), update_version: 5 }];
    assert_eq!(replies(&rig.committed(1, 5, 1)), [Ok(outcome(5)), Ok(outcome(5))]);
}

#[test]
fn the_queue_of_a_chunk_is_bounded() {
    let mut rig = Rig::with_chunk(place(1, true, &[(2, false)]), 4);
    for sequence in 1..=1 + Config::default().queue_per_chunk_max as u64 {
        assert!(replies(&rig.write(sequence)).is_empty());
    }
    assert_eq!(replies(&rig.write(1000)), [Err(Code::Busy)]);
}

#[test]
fn another_chain_version_is_refused_everywhere() {
    let mut rig = Rig::with_chunk(place(4, true, &[]), 4);
    let request = |chain_version| Request {
        id: 1,
        chunk: CHUNK,
        chain_version,
        kind: Kind::Write,
        writer: None,
        origin: Origin::Client,
    };
    for chain_version in [3, 5] {
        assert_eq!(replies(&rig.step(Event::Request(request(chain_version)))), [Err(Code::StaleChain)]);
        let read = rig.replica.read_admission(rig.now, CHUNK, chain_version);
        assert_eq!(read, ReadAdmission::Refuse(Code::StaleChain));
    }
}

#[test]
fn the_lease_is_checked_at_admission_and_before_the_reply() {
    let mut rig = Rig::with_chunk(place(1, true, &[]), 4);
    rig.write(1);
    rig.prepared(1, 5);
    rig.now = LEASE;
    let effects = rig.committed(1, 5, 1);
    assert!(matches!(
        effects[0],
        Effect::Reply { result: Err(Refusal { code: Code::NotServing, maybe_applied: true }), .. }
    ));
    assert_eq!(replies(&rig.write(2)), [Err(Code::NotServing)]);
    assert_eq!(rig.replica.read_admission(rig.now, CHUNK, 1), ReadAdmission::Refuse(Code::NotServing));
    assert!(!rig.replica.may_reply(rig.now));
}

#[test]
fn a_forward_with_a_gap_is_refused_and_an_old_one_is_acknowledged_again() {
    let mut rig = Rig::with_chunk(place(1, false, &[(3, false)]), 4);
    assert_eq!(replies(&rig.forward(7, 6)), [Err(Code::VersionGap)]);
    assert_eq!(replies(&rig.forward(4, 3)), [Ok(outcome(4))]);
    assert_eq!(replies(&rig.write(1)), [Err(Code::NotServing)], "only the head takes clients");
}

#[test]
fn reads_wait_while_a_serving_successor_may_show_more() {
    let mut rig = Rig::with_chunk(place(1, true, &[(2, false)]), 4);
    assert_eq!(rig.replica.read_admission(rig.now, CHUNK, 1), ReadAdmission::Serve);
    rig.write(1);
    assert_eq!(rig.replica.read_admission(rig.now, CHUNK, 1), ReadAdmission::Wait);
    assert!(rig.step(Event::Read { id: 90, chunk: CHUNK, chain_version: 1 }).is_empty());
    rig.prepared(1, 5);
    rig.acked(1, 1, Ok(outcome(5)));
    let effects = rig.committed(1, 5, 1);
    assert!(effects.contains(&Effect::ServeRead { id: 90 }));
    let mut tail = Rig::with_chunk(place(1, false, &[]), 4);
    tail.forward(5, 4);
    assert_eq!(tail.replica.read_admission(tail.now, CHUNK, 1), ReadAdmission::Serve);
}

#[test]
fn an_unknown_outcome_is_forwarded_again_and_never_gives_its_version_away() {
    let mut rig = Rig::with_chunk(place(1, true, &[(2, false)]), 4);
    rig.write(1);
    rig.prepared(1, 5);
    let effects = rig.acked(1, 1, Err(Code::Unavailable));
    assert!(matches!(effects[..], [Effect::Forward { attempt: 2, version: 5, delay_ns: 1.., .. }]));
    assert_eq!(replies(&rig.step(Event::Expire { id: 1, chunk: CHUNK })), [Err(Code::Timeout)]);
    assert!(rig.write(2).is_empty(), "the next write waits behind the unresolved one");
    // A definite refusal of a later attempt proves nothing about the first one.
    let effects = rig.acked(1, 2, Err(Code::NoSpace));
    assert!(matches!(effects[..], [Effect::Forward { attempt: 3, .. }]));
    rig.acked(1, 3, Ok(outcome(5)));
    assert!(is_prepare(rig.committed(1, 5, 1).last_chunk::<2>().unwrap().first().unwrap(), 6));
}

#[test]
fn a_definite_refusal_aborts_and_is_told_to_the_client() {
    let mut rig = Rig::with_chunk(place(1, true, &[(2, false)]), 4);
    rig.write(1);
    rig.prepared(1, 5);
    assert_eq!(rig.acked(1, 1, Err(Code::NoSpace)), [Effect::Abort { op: 1, chunk: CHUNK, version: 5 }]);
    assert_eq!(replies(&rig.step(Event::Aborted { op: 1, chunk: CHUNK })), [Err(Code::NoSpace)]);
}

#[test]
fn the_only_serving_replica_can_refuse_because_syncing_ones_get_only_what_it_has_prepared() {
    let mut rig = Rig::with_chunk(place(1, true, &[(2, true)]), 4);
    assert!(matches!(rig.write(1)[..], [Effect::Prepare { .. }]));
    let effects = rig.step(Event::Prepared { op: 1, chunk: CHUNK, result: Err(Code::NoSpace) });
    assert_eq!(replies(&effects), [Err(Code::NoSpace)]);
    assert!(matches!(rig.write(2)[..], [Effect::Prepare { .. }]), "it goes on serving");
    assert!(matches!(rig.prepared(2, 5)[..], [Effect::Forward { to: TargetId(2), attempt: 1, version: 5, .. }]));
    rig.acked(2, 1, Ok(outcome(5)));
    assert_eq!(replies(&rig.committed(2, 5, 1)), [Ok(outcome(5))]);
}

#[test]
fn a_replica_that_cannot_prepare_what_its_successor_has_goes_offline() {
    let mut rig = Rig::with_chunk(place(1, true, &[(2, false)]), 4);
    rig.write(1);
    rig.acked(1, 1, Ok(outcome(5)));
    let effects = rig.step(Event::Prepared { op: 1, chunk: CHUNK, result: Err(Code::NoSpace) });
    assert!(effects.contains(&Effect::Fatal { chunk: CHUNK, code: Code::NoSpace }));
    assert_eq!(replies(&rig.write(2)), [Err(Code::NotServing)]);
}

#[test]
fn a_syncing_successor_gets_whole_chunks_until_it_is_known_to_be_equal() {
    let mut rig = Rig::with_chunk(place(1, true, &[(2, true)]), 4);
    rig.write(1);
    assert_eq!(rig.replica.read_admission(rig.now, CHUNK, 1), ReadAdmission::Serve, "it is not read");
    assert!(is_forward(&rig.prepared(1, 5)[0], 5, Content::Whole));
    rig.acked(1, 1, Ok(outcome(5)));
    rig.committed(1, 5, 1);
    rig.write(2);
    assert!(is_forward(&rig.prepared(2, 6)[0], 6, Content::Update));
}

#[test]
fn a_syncing_successor_that_acknowledges_something_else_is_not_taken_as_equal() {
    let mut rig = Rig::with_chunk(place(1, true, &[(2, true)]), 4);
    rig.request(Kind::Mirror, Origin::Resync { to: NEXT }, None);
    let other = Outcome { crc: 8, ..outcome(4) };
    assert_eq!(replies(&rig.acked(1, 1, Ok(other))), [Err(Code::VersionGap)]);
    assert!(!rig.replica.is_synced(NEXT, CHUNK));
}

#[test]
fn a_syncing_replica_takes_any_version_over_an_older_chains_but_only_newer_over_its_own() {
    let syncing = RoutingView { chain_version: 9, role: Role::Syncing, head: false, successors: vec![] };
    let replace = |version| Origin::Forward { version, base: 0, replace: true };
    let mut rig = Rig::with_chunk(syncing.clone(), 50);
    assert!(is_prepare(&rig.request(Kind::Write, replace(40), None)[0], 40));
    let mut rig = Rig::with_chunk(syncing, 50);
    rig.commit(50, 9);
    assert_eq!(replies(&rig.request(Kind::Write, replace(40), None)), [Ok(outcome(50))], "a late duplicate");
}

#[test]
fn the_head_goes_on_with_its_update_after_a_chain_change() {
    let mut rig = Rig::with_chunk(place(1, true, &[(2, false)]), 4);
    rig.write(1);
    rig.prepared(1, 5);
    let effects = rig.step(Event::Routing(place(2, true, &[(3, false)])));
    assert!(matches!(effects[..], [Effect::Forward { to: TargetId(3), chain_version: 2, version: 5, attempt: 2, .. }]));
    assert!(rig.acked(1, 1, Ok(outcome(5))).is_empty(), "the old successor's answer counts no more");
    let effects = rig.step(Event::Routing(place(3, true, &[])));
    assert_eq!(effects, [Effect::Commit { op: 1, chunk: CHUNK, version: 5 }]);
}

#[test]
fn a_replica_behind_the_head_drops_its_update_at_a_chain_change_and_reads_wait_for_it() {
    let mut rig = Rig::with_chunk(place(1, false, &[(2, false)]), 4);
    rig.forward(5, 4);
    rig.prepared(1, 5);
    let effects = rig.step(Event::Routing(place(2, false, &[])));
    assert_eq!(replies(&effects), [Err(Code::StaleChain)]);
    assert_eq!(
        rig.replica.read_admission(rig.now, CHUNK, 2),
        ReadAdmission::Wait,
        "the lost successor may have shown it"
    );
    assert!(!rig.replica.is_settled());
    rig.forward(5, 4);
    rig.prepared(2, 5);
    rig.committed(2, 5, 2);
    assert_eq!(rig.replica.read_admission(rig.now, CHUNK, 2), ReadAdmission::Serve);
}

#[test]
fn a_new_head_commits_and_mirrors_what_it_holds_as_pending_before_other_writes() {
    let mut rig = Rig::with_chunk(place(1, false, &[(2, false)]), 4);
    rig.forward(5, 4);
    rig.prepared(1, 5);
    rig.step(Event::Routing(place(2, false, &[(2, false)])));
    let effects = rig.step(Event::Routing(place(3, true, &[(2, false)])));
    let [Effect::Commit { op, version: 5, .. }] = effects[..] else { panic!("{effects:?}") };
    assert!(rig.write(1).is_empty(), "it waits");
    let effects = rig.committed(op, 5, 1);
    assert!(is_forward(&effects[0], 5, Content::Committed));
    assert!(rig.acked(op, 1, Ok(outcome(5))).iter().any(|e| is_prepare(e, 6)));
}

#[test]
fn a_diverged_successor_is_overwritten_under_a_version_above_both() {
    let mut rig = Rig::with_chunk(place(1, true, &[(2, false)]), 4);
    rig.write(1);
    rig.prepared(1, 5);
    let effects = rig.acked(1, 1, Ok(Outcome { update_version: 8, length: 3, crc: 1 }));
    assert!(is_prepare(&effects[0], 9) && is_forward(&effects[1], 9, Content::Whole));
    rig.prepared(1, 9);
    assert_eq!(rig.acked(1, 2, Ok(outcome(9))), [Effect::Commit { op: 1, chunk: CHUNK, version: 9 }]);
}

#[test]
fn a_head_with_a_rotten_base_takes_the_chunk_from_its_successor_and_the_only_replica_refuses() {
    let rotten = |rig: &mut Rig| {
        rig.write(1);
        let mut effects = rig.acked(1, 1, Ok(outcome(5)));
        effects.extend(rig.step(Event::Prepared { op: 1, chunk: CHUNK, result: Err(Code::ChecksumMismatch) }));
        effects
    };
    let fetched = Content::Fetched { from: NEXT, outcome: outcome(5) };
    let mut rig = Rig::with_chunk(place(1, true, &[(2, false)]), 4);
    assert_eq!(rotten(&mut rig), [Effect::Prepare { op: 1, chunk: CHUNK, version: 5, content: fetched }]);
    assert_eq!(rig.prepared(1, 5), [Effect::Commit { op: 1, chunk: CHUNK, version: 5 }]);
    let mut rig = Rig::with_chunk(place(1, true, &[(2, false)]), 4);
    rotten(&mut rig);
    // The successor cannot give it either: the next head has what it acknowledged.
    let effects = rig.step(Event::Prepared { op: 1, chunk: CHUNK, result: Err(Code::ChecksumMismatch) });
    assert!(matches!(effects[0], Effect::Fatal { code: Code::ChecksumMismatch, .. }));
    // One that is syncing may be about to serve, so it is asked too.
    let mut rig = Rig::with_chunk(place(1, true, &[(2, true), (3, true)]), 4);
    rig.write(1);
    let refused =
        Event::Forwarded { op: 1, chunk: CHUNK, to: TargetId(3), attempt: 1, result: Err(Code::ChecksumMismatch) };
    rig.step(Event::Prepared { op: 1, chunk: CHUNK, result: Err(Code::ChecksumMismatch) });
    rig.step(refused);
    let effects = rig.acked(1, 1, Ok(outcome(5)));
    assert_eq!(effects, [Effect::Prepare { op: 1, chunk: CHUNK, version: 5, content: fetched }]);
    assert_eq!(rig.prepared(1, 5), [Effect::Commit { op: 1, chunk: CHUNK, version: 5 }]);
    assert!(!rig.replica.is_synced(TargetId(3), CHUNK));
    let mut rig = Rig::with_chunk(place(1, true, &[]), 4);
    assert_eq!(replies(&rotten(&mut rig)), [Err(Code::ChecksumMismatch)]);
    assert!(!rig.replica.has_failed());
    assert!(is_prepare(&rig.write(2)[0], 5));
}

#[test]
fn a_chunk_that_is_too_rotten_to_be_sent_is_left_out_of_the_resync_pass() {
    for head in [true, false] {
        let mut rig = Rig::with_chunk(place(1, head, &[(2, true)]), 4);
        rig.request(Kind::Mirror, Origin::Resync { to: NEXT }, None);
        assert_eq!(replies(&rig.acked(1, 1, Err(Code::ChecksumMismatch))), [Err(Code::ChecksumMismatch)]);
        assert!(!rig.replica.has_failed() && !rig.replica.is_synced(NEXT, CHUNK));
    }
}

#[test]
fn a_repair_holds_the_chunk_for_updates_but_not_for_readers_and_outlives_chain_changes() {
    let mut rig = Rig::with_chunk(place(1, true, &[(2, false)]), 4);
    assert_eq!(rig.request(Kind::Mirror, Origin::Repair, None), [Effect::Repair { op: 1, chunk: CHUNK }]);
    assert_eq!(rig.write(1), []);
    assert_eq!(rig.replica.read_admission(1, CHUNK, 1), ReadAdmission::Serve);
    assert_eq!(replies(&rig.step(Event::Routing(place(2, true, &[(3, false)])))), [Err(Code::StaleChain)]);
    assert!(rig.replica.is_settled());
    assert_eq!(rig.write(2), []);
    let effects = rig.step(Event::Repaired { op: 1, chunk: CHUNK, result: Ok(()) });
    assert_eq!(replies(&effects), [Ok(outcome(4))]);
    assert!(effects.iter().any(|e| is_prepare(e, 5)), "the waiting write begins");
}

#[test]
fn a_repair_waits_for_a_pending_version_and_is_not_begun_where_the_target_does_not_serve() {
    let mut rig = Rig::with_chunk(place(1, false, &[(2, false)]), 4);
    rig.store.0.entry(CHUNK).or_default().pending = 5;
    assert_eq!(replies(&rig.request(Kind::Mirror, Origin::Repair, None)), [Err(Code::Busy)]);
    let mut rig = Rig::with_chunk(RoutingView { role: Role::Syncing, ..place(1, false, &[]) }, 4);
    assert_eq!(replies(&rig.request(Kind::Mirror, Origin::Repair, None)), [Err(Code::NotServing)]);
}

#[test]
fn resync_mirrors_one_chunk_to_one_syncing_successor_only() {
    let mut rig = Rig::with_chunk(place(1, true, &[(2, true), (3, true)]), 4);
    let effects = rig.request(Kind::Mirror, Origin::Resync { to: NEXT }, None);
    assert_eq!(effects.len(), 1);
    assert!(is_forward(&effects[0], 4, Content::Committed));
    assert_eq!(replies(&rig.acked(1, 1, Ok(outcome(4)))), [Ok(outcome(4))]);
    let other = rig.request(Kind::Mirror, Origin::Resync { to: TargetId(9) }, None);
    assert_eq!(replies(&other), [Err(Code::NotServing)]);
}

#[test]
fn a_late_copy_of_a_request_that_changed_nothing_changes_nothing_either() {
    for kind in [Kind::Truncate(10), Kind::Punch(10), Kind::Remove] {
        let mut rig = match kind {
            Kind::Remove => Rig::new(place(1, true, &[])),
            _ => Rig::with_chunk(place(1, true, &[]), 4),
        };
        let before = outcome_of_store(&rig);
        assert_eq!(replies(&rig.request(kind, Origin::Client, Some(5))), [Ok(before)], "{kind:?}: nothing to do");
        // Somebody writes more than that, and then the copy arrives.
        rig.store
            .0
            .insert(CHUNK, ChunkState { committed: 9, chain_version: 1, length: 90, crc: 8, ..Default::default() });
        let after = outcome_of_store(&rig);
        assert_eq!(replies(&rig.request(kind, Origin::Client, Some(5))), [Ok(after)], "{kind:?}");
        assert_eq!(replies(&rig.request(kind, Origin::Client, Some(4))), [Err(Code::Superseded)], "{kind:?}");
        assert!(rig.request(kind, Origin::Client, Some(6)).iter().any(|e| matches!(e, Effect::Prepare { .. })));
    }
}

fn outcome_of_store(rig: &Rig) -> Outcome {
    let state = rig.store.chunk(CHUNK);
    Outcome { update_version: state.committed, length: state.length, crc: state.crc }
}

#[test]
fn a_range_that_was_removed_is_not_removed_again_by_a_late_copy() {
    let mut rig = Rig::new(place(1, true, &[]));
    assert_eq!(rig.replica.is_range_removed(writer(5)), Ok(false));
    rig.replica.range_removed(writer(5), 1);
    assert_eq!(rig.replica.is_range_removed(writer(5)), Ok(true));
    assert_eq!(rig.replica.is_range_removed(writer(4)), Err(Code::Superseded));
    assert_eq!(rig.replica.is_range_removed(writer(6)), Ok(false));
    rig.step(Event::Routing(place(2, true, &[])));
    assert_eq!(
        rig.replica.is_range_removed(writer(5)),
        Ok(false),
        "a copy from before is refused by its chain version"
    );
    rig.replica.range_removed(writer(6), 1);
    assert_eq!(rig.replica.is_range_removed(writer(6)), Ok(false), "it began under another chain version");
}
