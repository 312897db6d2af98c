//! Rot, and how replicas put it right.

mod common;

use common::*;
use fs3_core::Code;
use fs3_proto::v1::*;

fn rot(c: &Cluster, node: usize, bytes: &[u8]) {
    assert!(flip(c.dir(node), bytes) > 0, "the data file was not found");
}

fn counter(c: &Cluster, node: usize, name: &str) -> u64 {
    c.engine(node).status().counters[name]
}

fn reads_as(c: &Cluster, node: usize, index: u32, expected: &[u8]) -> bool {
    let read = c.read(node, chunk(index), 0, CHUNK_BYTES).unwrap();
    read.result.code == 0 && read.data == expected
}

fn scrub(c: &Cluster, node: usize) {
    let before = c.status(node).unwrap().scrub_ended_ms;
    let response: ScrubResponse = c.request(node, Method::StorageScrub, ScrubRequest {}).unwrap();
    assert_eq!(response.targets, 1);
    wait_until("the scrub to end", || c.status(node).unwrap().scrub_ended_ms > before);
}

#[test]
fn rot_that_a_reader_meets_is_repaired_from_another_replica_without_leaving_the_chain() {
    let mut c = Cluster::start();
    let data = noise(7, 50_000);
    c.write(0, chunk(0), 0, &data).unwrap();
    for node in [1, 2] {
        rot(&c, node, &data[20_000..20_064]);
        let read = c.read(node, chunk(0), 0, CHUNK_BYTES).unwrap();
        assert_eq!(read.result.code, Code::ChecksumMismatch as u32);
        assert!(read.data.is_empty());
        wait_until("the repair", || reads_as(&c, node, 0, &data));
        // A repaired block is readable before it is counted.
        let count = |name| counter(&c, node, name);
        let repairs = || (count("repaired_chunks"), count("repaired_blocks"));
        wait_until("the repair to be counted", || repairs() == (1, 1));
        // A reader that began before the repair's write may find it rotten once more.
        assert!(count("rotten_chunks") >= 1);
        assert_eq!(count("unrepairable_blocks"), 0);
        assert!(count("checksum_errors") > 0);
        assert_eq!(c.status(node).unwrap().local_state, LocalState::Uptodate as u32);
    }
    c.assert_replicas_equal(&[0, 1, 2]);
    // It is on the disk, not only in memory.
    let found = counter(&c, 1, "rotten_chunks");
    scrub(&c, 1);
    assert_eq!(counter(&c, 1, "rotten_chunks"), found);
}

#[test]
fn rot_that_a_client_reports_is_repaired_though_memory_had_good_bytes() {
    let mut c = Cluster::start();
    let data = noise(8, 50_000);
    c.write(0, chunk(0), 0, &data).unwrap();
    let check = || {
        let chunk_id = chunk(0).to_bytes().to_vec().into();
        let request = CheckRequest { chain_id: CHAIN, target_id: target(1), chunk_id };
        c.request::<CheckResponse>(1, Method::StorageCheck, request).unwrap()
    };
    assert!(reads_as(&c, 1, 0, &data) && !check().rotten);
    assert!(reads_as(&c, 1, 0, &data));
    rot(&c, 1, &data[20_000..20_064]);
    assert!(reads_as(&c, 1, 0, &data), "memory has the good bytes");
    assert!(check().rotten);
    wait_until("the repair", || counter(&c, 1, "repaired_chunks") == 1);
    assert!(reads_as(&c, 1, 0, &data));
    assert_eq!((counter(&c, 1, "checks_asked"), counter(&c, 1, "unrepairable_blocks")), (2, 0));
}

#[test]
fn a_scrub_finds_rot_that_nobody_reads_on_every_replica_at_once() {
    let mut c = Cluster::start();
    let data = noise(3, 200_000);
    for index in 0..5 {
        c.write(0, chunk(index), 0, &data).unwrap();
    }
    let other = noise(9, 123_456);
    c.write(0, chunk(5), 0, &other).unwrap();
    for node in 0..NODES {
        // Another block of the same chunk on each.
        let at = 40_000 * (node + 1);
        rot(&c, node, &other[at..at + 64]);
    }
    for node in 0..NODES {
        scrub(&c, node);
        wait_until("the repair", || counter(&c, node, "repaired_chunks") == 1);
        assert!(counter(&c, node, "scrubbed_bytes") >= 1_100_000);
        assert_eq!(counter(&c, node, "scrubbed_chunks"), 6);
        wait_until("the repair to be done", || c.status(node).unwrap().repairs_waiting == 0);
        assert!(reads_as(&c, node, 5, &other));
    }
}

#[test]
fn a_partial_write_over_rot_is_right_on_every_replica() {
    let mut c = Cluster::start();
    for (index, rotten) in [[0].as_slice(), &[1], &[2], &[0, 1], &[1, 2]].into_iter().enumerate() {
        let (index, mut data) = (index as u32, noise(7 + index as u8, 50_000));
        c.write(0, chunk(index), 0, &data).unwrap();
        for node in rotten {
            rot(&c, *node, &data[20_000..20_064]);
        }
        c.write_retrying(0, chunk(index), 20_100, b"small");
        data[20_100..20_105].copy_from_slice(b"small");
        for node in 0..NODES {
            wait_until("the chunk to be sound", || reads_as(&c, node, index, &data));
            assert_eq!(c.status(node).unwrap().local_state, LocalState::Uptodate as u32, "node {node} left the chain");
        }
    }
    c.assert_replicas_equal(&[0, 1, 2]);
}

#[test]
fn a_truncate_over_rot_is_right_on_every_replica() {
    let mut c = Cluster::start();
    let data = noise(7, 50_000);
    c.write(0, chunk(0), 0, &data).unwrap();
    rot(&c, 0, &data[20_000..20_064]);
    let cut = TruncateChunkRequest {
        chain_id: CHAIN,
        chain_version: c.chain_version(),
        target_id: target(0),
        chunk_id: chunk(0).to_bytes().to_vec().into(),
        chunk_bytes: CHUNK_BYTES,
        length: 20_200,
        ..TruncateChunkRequest::default()
    };
    let response: WriteResponse = c.request(0, Method::StorageTruncate, cut).unwrap();
    assert_eq!(response.chunk_length, 20_200);
    for node in 0..NODES {
        wait_until("the chunk to be sound", || reads_as(&c, node, 0, &data[..20_200]));
    }
    c.assert_replicas_equal(&[0, 1, 2]);
}

#[test]
fn the_only_replica_refuses_writes_over_rot_serves_everything_else_and_says_so() {
    let mut c = Cluster::start();
    let data = noise(7, 50_000);
    c.reroute(&[(0, PublicState::Serving), (1, PublicState::Offline), (2, PublicState::Offline)]);
    c.write(0, chunk(0), 0, &data).unwrap();
    c.write(0, chunk(1), 0, &data[..100]).unwrap();
    rot(&c, 0, &data[20_000..20_064]);
    assert_eq!(code_of(c.write(0, chunk(0), 20_100, b"small")), Code::ChecksumMismatch);
    wait_until("the damage to be known", || c.status(0).unwrap().damaged_chunks == 1);
    let status = c.status(0).unwrap();
    assert!(
        status.damaged.contains("1 chunks are damaged") && status.damaged.contains("inode 77 chunk 0"),
        "{}",
        status.damaged
    );
    assert_eq!((status.local_state, status.error.as_str()), (LocalState::Uptodate as u32, ""));
    wait_until("the damage to be counted", || counter(&c, 0, "unrepairable_blocks") == 1);
    assert_eq!(c.read(0, chunk(0), 20_480, 4096).unwrap().result.code, 0);
    assert_eq!(c.read(0, chunk(1), 0, 4096).unwrap().data, data[..100]);
    c.write(0, chunk(0), 0, &data).unwrap();
    assert!(reads_as(&c, 0, 0, &data));
    assert_eq!(c.status(0).unwrap().damaged_chunks, 0);
}

#[test]
fn the_only_serving_replica_takes_good_bytes_from_one_that_is_out_of_the_chain() {
    let mut c = Cluster::start();
    let mut data = noise(7, 50_000);
    c.write(0, chunk(0), 0, &data).unwrap();
    c.reroute(&[(0, PublicState::Serving), (1, PublicState::Offline), (2, PublicState::Offline)]);
    rot(&c, 0, &data[20_000..20_064]);
    rot(&c, 2, &data[30_000..30_064]);
    assert_eq!(c.read(0, chunk(0), 0, CHUNK_BYTES).unwrap().result.code, Code::ChecksumMismatch as u32);
    wait_until("the repair", || reads_as(&c, 0, 0, &data));
    c.write(0, chunk(0), 20_100, b"small").unwrap();
    data[20_100..20_105].copy_from_slice(b"small");
    assert!(reads_as(&c, 0, 0, &data));
}

#[test]
fn good_bytes_are_not_given_to_anybody_who_is_not_a_replica() {
    let mut c = Cluster::start();
    c.write(0, chunk(0), 0, b"data").unwrap();
    let op = ReadOp { chain_id: CHAIN, target_id: target(0), length: 4096, ..ReadOp::default() };
    let request = ReadRequest { ops: vec![op], repair: true };
    assert_eq!(code_of(c.request::<ReadResponse>(0, Method::StorageRead, request)), Code::NotPermitted);
}
