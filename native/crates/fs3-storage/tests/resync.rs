//! How a returning replica is brought up to date: progress, limits, interruptions, chunks that cannot be sent.

mod common;

use std::time::Instant;

use common::*;
use fs3_core::Code;
use fs3_proto::v1::engine_status::ResyncStatus;
use fs3_proto::v1::*;
use fs3_storage::Healing;

const CHUNKS: u32 = 40;
const BYTES: usize = 50_000;

fn places(second: PublicState, third: PublicState) -> [(usize, PublicState); 3] {
    [(0, PublicState::Serving), (1, second), (2, third)]
}

fn sent_chunks(c: &Cluster) -> u64 {
    c.engine(0).status().counters["resync_chunks"]
}

fn progress(c: &Cluster, to: usize) -> Option<ResyncStatus> {
    c.status(0).unwrap().resyncs.into_iter().find(|r| r.to_target_id == target(to))
}

/// Node 0 serves alone and has written everything anew; the others run and are out of the chain.
fn alone(healing: Healing) -> Cluster {
    let mut c = Cluster::start_healing(healing);
    for index in 0..CHUNKS + 5 {
        c.write(0, chunk(index), 0, &noise(index as u8, BYTES)).unwrap();
    }
    for node in [1, 2] {
        c.stop_node(node);
        c.start_node(node);
    }
    c.reroute(&places(PublicState::Offline, PublicState::Offline));
    for index in 0..CHUNKS {
        c.write(0, chunk(index), 0, &noise(index as u8 + 100, BYTES)).unwrap();
    }
    for node in [1, 2] {
        c.wait_state(node, LocalState::Online);
    }
    c
}

#[test]
fn several_replicas_are_brought_up_to_date_at_once_and_the_progress_is_seen() {
    let rate = 4_000_000;
    let mut c = alone(Healing { resync_bytes_per_s: rate, ..Healing::default() });
    let began = Instant::now();
    c.reroute(&places(PublicState::Syncing, PublicState::Syncing));
    for to in [1, 2] {
        wait_until("progress", || progress(&c, to).is_some_and(|p| p.done_chunks > 5 && p.sent_bytes > 0));
        let p = progress(&c, to).unwrap();
        assert_eq!((p.total_chunks, p.total_bytes), (u64::from(CHUNKS) + 5, (u64::from(CHUNKS) + 5) * BYTES as u64));
        assert!(p.bytes_per_s > 0, "{p:?}");
        assert_eq!(p.stuck_chunks, 0);
    }
    assert!(progress(&c, 1).is_some() && progress(&c, 2).is_some(), "one after the other");
    for node in [1, 2] {
        c.wait_state(node, LocalState::Uptodate);
    }
    // What was equal was not sent, and the limit was kept.
    assert_eq!(sent_chunks(&c), 2 * u64::from(CHUNKS));
    let least = 2.0 * f64::from(CHUNKS - 2) * BYTES as f64 / rate as f64;
    assert!(began.elapsed().as_secs_f64() >= least, "{:?} for {least} s of data", began.elapsed());
    c.reroute(&places(PublicState::Serving, PublicState::Serving));
    c.assert_replicas_equal(&[0, 1, 2]);
    assert!(progress(&c, 1).is_none());
}

#[test]
fn a_resync_that_breaks_goes_on_where_it_was() {
    let mut c = alone(Healing { resync_bytes_per_s: 2_000_000, ..Healing::default() });
    c.reroute(&places(PublicState::Syncing, PublicState::Offline));
    wait_until("half of the resync", || sent_chunks(&c) >= u64::from(CHUNKS) / 2);
    c.stop_node(1);
    c.reroute(&places(PublicState::Offline, PublicState::Offline));
    let before = sent_chunks(&c);
    assert!(before < u64::from(CHUNKS), "the resync was to be interrupted");
    c.bring_back(1, &[0]);
    let after = sent_chunks(&c) - before;
    // A chunk may have arrived without its acknowledgement being counted, never the other way round.
    assert!(after <= u64::from(CHUNKS) - before, "{before} chunks were sent before, {after} after");
    c.assert_replicas_equal(&[0, 1]);
}

#[test]
fn truncates_removes_and_writes_during_a_resync_arrive() {
    let mut c = alone(Healing { resync_bytes_per_s: 4_000_000, ..Healing::default() });
    c.reroute(&places(PublicState::Syncing, PublicState::Offline));
    let (chain_version, mut round) = (c.chain_version(), 0);
    while c.status(1).unwrap().local_state != LocalState::Uptodate as u32 {
        let index = round % CHUNKS;
        let chunk_id: bytes::Bytes = chunk(index).to_bytes().to_vec().into();
        match round % 3 {
            0 => {
                let cut = TruncateChunkRequest {
                    chain_id: CHAIN,
                    chain_version,
                    target_id: target(0),
                    chunk_id,
                    chunk_bytes: CHUNK_BYTES,
                    length: 1000 + round % 5000,
                    ..TruncateChunkRequest::default()
                };
                c.request::<WriteResponse>(0, Method::StorageTruncate, cut).unwrap();
            }
            1 => {
                let remove = RemoveRequest {
                    chain_id: CHAIN,
                    chain_version,
                    target_id: target(0),
                    inode: 77,
                    first_index: index,
                    last_index: index,
                    ..RemoveRequest::default()
                };
                c.request::<RemoveResponse>(0, Method::StorageRemove, remove).unwrap();
            }
            _ => {
                c.write_retrying(0, chunk(index), round % 9000, &[round as u8; 700]);
            }
        }
        round += 1;
        assert!(round < 20_000, "the resync does not end");
    }
    assert!(round > 10, "nothing happened during the resync");
    c.reroute(&places(PublicState::Serving, PublicState::Offline));
    c.assert_replicas_equal(&[0, 1]);
}

#[test]
fn a_chunk_that_is_rotten_everywhere_is_not_copied_and_does_not_hold_up_the_others() {
    let mut c = alone(Healing::default());
    let lost = noise(100, BYTES);
    assert!(flip(c.dir(0), &lost[20_000..20_064]) > 0, "the data file was not found");
    c.reroute(&places(PublicState::Syncing, PublicState::Offline));
    wait_until("all but one chunk", || {
        progress(&c, 1).is_some_and(|p| p.stuck_chunks == 1 && p.done_chunks == p.total_chunks - 1)
    });
    wait_until("the damage to be known", || c.status(0).unwrap().damaged_chunks == 1);
    assert!(sent_chunks(&c) >= u64::from(CHUNKS) - 1);
    assert_eq!(c.status(1).unwrap().local_state, LocalState::Online as u32);
    assert_eq!(c.read(0, chunk(0), 0, CHUNK_BYTES).unwrap().result.code, Code::ChecksumMismatch as u32);
    let theirs = c.list(1).into_iter().find(|(id, ..)| *id == chunk(0)).unwrap();
    assert_ne!(theirs.1, c.list(0)[0].1, "the rotten chunk was copied");
    // Once the file is written anew the resync ends.
    c.write(0, chunk(0), 0, &lost).unwrap();
    c.wait_state(1, LocalState::Uptodate);
    c.reroute(&places(PublicState::Serving, PublicState::Offline));
    c.assert_replicas_equal(&[0, 1]);
}

#[test]
fn a_repeated_write_is_known_to_a_replica_that_learned_of_it_by_resync() {
    let mut c = Cluster::start();
    c.stop_node(1);
    c.stop_node(2);
    c.reroute(&places(PublicState::Offline, PublicState::Offline));
    let first = c.write_request(0, chunk(0), 0, b"first");
    c.send_write(0, first.clone(), b"first").unwrap();
    let other = WriterId { client_id: vec![8; 16].into(), channel: 1, sequence: 1 };
    let second = WriteRequest { writer: Some(other), ..c.write_request(0, chunk(0), 0, b"other") };
    c.send_write(0, second, b"other").unwrap();
    c.bring_back(1, &[0]);
    c.stop_node(0);
    c.reroute(&[(1, PublicState::Serving), (0, PublicState::Offline), (2, PublicState::Offline)]);
    // The first client has not heard of the answer and asks the new head.
    let again = WriteRequest { chain_version: c.chain_version(), target_id: target(1), ..first };
    let ends = Instant::now() + TIMEOUT;
    while let Err(error) = c.send_write(1, again.clone(), b"first") {
        assert!(error.retryable() && Instant::now() < ends, "{error}");
    }
    assert_eq!(c.read(1, chunk(0), 0, 100).unwrap().data, b"other");
}
