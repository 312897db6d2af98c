//! Three storage engines, one chain, over loopback.

mod common;

use bytes::Bytes;
use common::*;
use fs3_core::{CRC_BLOCK_BYTES, ChunkId, Code, monotonic_ns, unpack_crcs, verify_crcs};
use fs3_proto::v1::*;

#[test]
fn an_acknowledged_write_is_read_from_every_replica_with_its_checksums() {
    let mut c = Cluster::start();
    let data = bytes_of(1, 100_000);
    let written = c.write(0, chunk(0), 0, &data).unwrap();
    assert_eq!(written.chunk_length, 100_000);
    let patch = bytes_of(2, 5_000);
    c.write(0, chunk(0), 6_000, &patch).unwrap();
    let mut expected = data;
    expected[6_000..11_000].copy_from_slice(&patch);
    for node in 0..NODES {
        let read = c.read(node, chunk(0), 0, CHUNK_BYTES).unwrap();
        assert_eq!(read.result.code, 0, "{}", read.result.message);
        assert!(read.data == expected, "node {node} has other bytes");
        verify_crcs(0, &read.data, &unpack_crcs(&read.result.crcs).unwrap()).unwrap();
        let part = c.read(node, chunk(0), CRC_BLOCK_BYTES as u32, CRC_BLOCK_BYTES as u32).unwrap();
        assert!(part.data == expected[4096..8192]);
    }
    c.assert_replicas_equal(&[0, 1, 2]);
}

#[test]
fn chunks_of_one_inode_are_told_by_replicas_that_serve_only() {
    let mut c = Cluster::start();
    let others = [ChunkId { inode: 76, ..chunk(9) }, ChunkId { inode: 78, ..chunk(0) }];
    for id in [chunk(2), chunk(5), chunk(6), others[0], others[1]] {
        c.write(0, id, 0, &bytes_of(1, 5_000)).unwrap();
    }
    let ask = |c: &Cluster, node, chain_version, after: ChunkId, limit| {
        let (target_id, after) = (target(node), after.to_bytes().to_vec().into());
        let request =
            ListChunksRequest { chain_id: CHAIN, chain_version, target_id, after, limit, resync: false, inode: 77 };
        c.request::<ListChunksResponse>(node, Method::StorageListChunks, request)
    };
    let ids = |listed: &ListChunksResponse| -> Vec<u32> {
        listed.chunks.iter().map(|info| ChunkId::from_bytes(&info.chunk_id).unwrap().index).collect()
    };
    let before = ChunkId { inode: 76, index: u32::MAX, ..chunk(0) };
    for node in 0..NODES {
        let all = ask(&c, node, c.chain_version(), before, 0).unwrap();
        assert_eq!((ids(&all), all.end, all.chunks[0].length), (vec![2, 5, 6], true, 5_000));
        let some = ask(&c, node, c.chain_version(), chunk(2), 1).unwrap();
        assert_eq!((ids(&some), some.end), (vec![5], false));
    }
    assert_eq!(code_of(ask(&c, 1, c.chain_version() + 1, before, 0)), Code::StaleChain);
    c.reroute(&[(0, PublicState::Serving), (2, PublicState::Serving), (1, PublicState::Offline)]);
    code_of(ask(&c, 1, c.chain_version(), before, 0));
}

#[test]
fn a_missing_chunk_reads_as_a_hole() {
    let c = Cluster::start();
    let read = c.read(1, chunk(9), 0, 4096).unwrap();
    assert_eq!((read.result.code, read.result.length), (Code::ChunkNotFound as u32, 0));
    assert!(read.data.is_empty());
}

#[test]
fn a_retried_write_is_applied_once() {
    let mut c = Cluster::start();
    let data = bytes_of(1, 8192);
    let first = c.write(0, chunk(0), 0, &data).unwrap();
    let again = c.send_write(0, c.write_request(0, chunk(0), 0, &data), &data).unwrap();
    assert_eq!(first.update_version, again.update_version);
    c.write(0, chunk(0), 0, &data).unwrap();
    c.sequence -= 1;
    let late = c.send_write(0, c.write_request(0, chunk(0), 0, &data), &data);
    assert_eq!(code_of(late), Code::Superseded);
    assert_eq!(c.list(2)[0].1, first.update_version + 1);
}

#[test]
fn a_retry_at_the_new_head_finds_the_first_result() {
    let mut c = Cluster::start();
    let data = bytes_of(1, 70_000);
    let first = c.write(0, chunk(0), 0, &data).unwrap();
    c.stop_node(0);
    c.reroute(&[(1, PublicState::Serving), (2, PublicState::Serving), (0, PublicState::Offline)]);
    let again = c.send_write(1, c.write_request(1, chunk(0), 0, &data), &data).unwrap();
    assert_eq!(first.update_version, again.update_version);
}

#[test]
fn a_stale_chain_version_is_refused_with_the_routing_version() {
    let mut c = Cluster::start();
    c.write(0, chunk(0), 0, b"x").unwrap();
    let stale = WriteRequest { chain_version: c.chain_version() + 1, ..c.write_request(0, chunk(0), 0, b"y") };
    let error = c.send_write(0, stale, b"y").unwrap_err();
    assert_eq!(error.code, Code::StaleChain);
    assert_eq!(error.routing_version, c.routing.version);
    let read = c.read_at(1, c.chain_version() + 1, chunk(0), 0, 4096).unwrap();
    assert_eq!(read.result.code, Code::StaleChain as u32);
}

#[test]
fn nothing_is_served_without_a_lease_or_after_it() {
    let mut c = Cluster::start_with_lease(0);
    let renew = |c: &Cluster, ns: u64| c.engines.iter().flatten().for_each(|e| e.renew_lease(monotonic_ns() + ns));
    assert_eq!(code_of(c.write(0, chunk(0), 0, b"x")), Code::NotServing);
    assert_eq!(c.read(1, chunk(0), 0, 4096).unwrap().result.code, Code::NotServing as u32);
    renew(&c, 500_000_000);
    wait_until("the lease to end", || c.read(0, chunk(0), 0, 4096).unwrap().result.code == Code::NotServing as u32);
    assert_eq!(code_of(c.write(0, chunk(0), 0, b"y")), Code::NotServing);
    renew(&c, 60_000_000_000);
    assert!(c.write(0, chunk(0), 0, b"z").is_ok());
    assert!(c.read(2, chunk(0), 0, 4096).unwrap().data == b"z");
}

#[test]
fn only_the_head_takes_writes_and_only_storage_nodes_forward() {
    let mut c = Cluster::start();
    assert_eq!(code_of(c.write(1, chunk(0), 0, b"x")), Code::NotServing);
    let forged = WriteRequest { update_version: 7, ..c.write_request(1, chunk(0), 0, b"x") };
    assert_eq!(code_of(c.send_write(1, forged, b"x")), Code::NotPermitted);
    let forged = WriteRequest { replace: true, ..c.write_request(0, chunk(0), 0, b"x") };
    assert_eq!(code_of(c.send_write(0, forged, b"x")), Code::NotPermitted);
    assert!(c.list(0).is_empty() && c.list(1).is_empty());
}

#[test]
fn damaged_payload_is_refused_before_it_spreads() {
    let mut c = Cluster::start();
    c.sequence += 1;
    let request = c.write_request(0, chunk(0), 0, b"right");
    assert_eq!(code_of(c.send_write(0, request, b"wrong")), Code::PayloadChecksum);
    for offset in [0, 5, 4096] {
        c.sequence += 1;
        let without = WriteRequest { crcs: Bytes::new(), ..c.write_request(0, chunk(0), offset, b"bytes") };
        assert_eq!(code_of(c.send_write(0, without, b"bytes")), Code::PayloadChecksum);
    }
    assert!((0..NODES).all(|n| c.list(n).is_empty()));
}

#[test]
fn malformed_requests_are_refused() {
    let mut c = Cluster::start();
    c.write(0, chunk(0), 0, b"x").unwrap();
    let good = c.write_request(0, chunk(0), 0, b"x");
    let bad = [
        WriteRequest { chunk_id: vec![1; 15].into(), ..good.clone() },
        WriteRequest { chunk_bytes: 100_000, ..good.clone() },
        WriteRequest { chunk_bytes: CHUNK_BYTES * 2, ..good.clone() },
        WriteRequest { offset: CHUNK_BYTES, ..good.clone() },
        WriteRequest { length: 2, ..good.clone() },
        WriteRequest { crcs: vec![1, 2, 3].into(), ..good.clone() },
        WriteRequest { writer: Some(WriterId { client_id: vec![1].into(), channel: 0, sequence: 1 }), ..good },
    ];
    for request in bad {
        assert_eq!(code_of(c.send_write(0, request, b"x")), Code::InvalidArgument);
    }
    assert_eq!(c.status(0).unwrap().local_state, LocalState::Uptodate as u32);
}

#[test]
fn truncate_remove_and_query_last_go_through_the_chain() {
    let mut c = Cluster::start();
    for index in 0..5 {
        c.write(0, chunk(index), 0, &bytes_of(index as u8, 10_000)).unwrap();
    }
    let cut = TruncateChunkRequest {
        chain_id: CHAIN,
        chain_version: c.chain_version(),
        target_id: target(0),
        chunk_id: chunk(4).to_bytes().to_vec().into(),
        chunk_bytes: CHUNK_BYTES,
        length: 5_000,
        ..TruncateChunkRequest::default()
    };
    let response: WriteResponse = c.request(0, Method::StorageTruncate, cut).unwrap();
    assert_eq!(response.chunk_length, 5_000);
    let query = |node| QueryLastRequest {
        chain_id: CHAIN,
        chain_version: c.chain_version(),
        target_id: target(node),
        space: 0,
        inode: 77,
    };
    for node in 0..NODES {
        let last: QueryLastResponse = c.request(node, Method::StorageQueryLast, query(node)).unwrap();
        assert_eq!((last.found, last.index, last.length, last.chunks, last.bytes), (true, 4, 5_000, 5, 45_000));
    }
    let remove = RemoveRequest {
        chain_id: CHAIN,
        chain_version: c.chain_version(),
        target_id: target(0),
        inode: 77,
        first_index: 1,
        last_index: u32::MAX,
        ..RemoveRequest::default()
    };
    let removed: RemoveResponse = c.request(0, Method::StorageRemove, remove.clone()).unwrap();
    assert_eq!(removed.removed_chunks, 4);
    let removed: RemoveResponse = c.request(0, Method::StorageRemove, remove).unwrap();
    assert_eq!(removed.removed_chunks, 0);
    assert_eq!(c.list(2).len(), 1);
    let again = c.write(0, chunk(3), 0, b"new").unwrap();
    assert_eq!(again.chunk_length, 3);
    c.assert_replicas_equal(&[0, 1, 2]);
    let sync =
        SyncChainRequest { chain_id: CHAIN, chain_version: c.chain_version(), target_id: target(0), forwarded: false };
    c.request::<SyncChainResponse>(0, Method::StorageSync, sync).unwrap();
    let space: SpaceResponse = c.request(0, Method::StorageSpace, SpaceRequest {}).unwrap();
    assert!(space.disks.len() == 1 && space.disks[0].capacity_bytes > 0);
}

#[test]
fn writes_go_on_after_the_tail_is_lost_and_the_returning_replica_becomes_equal() {
    let mut c = Cluster::start();
    for index in 0..6 {
        c.write(0, chunk(index), 0, &bytes_of(index as u8, 20_000)).unwrap();
    }
    c.stop_node(2);
    c.reroute(&[(0, PublicState::Serving), (1, PublicState::Serving), (2, PublicState::Offline)]);
    c.write(0, chunk(0), 4096, &bytes_of(50, 9_000)).unwrap();
    c.write(0, chunk(7), 0, &bytes_of(51, 200_000)).unwrap();
    let remove = RemoveRequest {
        chain_id: CHAIN,
        chain_version: c.chain_version(),
        target_id: target(0),
        inode: 77,
        first_index: 3,
        last_index: 3,
        ..RemoveRequest::default()
    };
    c.request::<RemoveResponse>(0, Method::StorageRemove, remove).unwrap();
    c.bring_back(2, &[0, 1]);
    c.assert_replicas_equal(&[0, 1, 2]);
    assert!(c.read(2, chunk(7), 0, CHUNK_BYTES).unwrap().data == bytes_of(51, 200_000));
    let hole = c.read(2, chunk(3), 0, 4096).unwrap();
    assert_eq!(hole.result.code, Code::ChunkNotFound as u32);
    c.write(0, chunk(0), 0, b"after").unwrap();
    c.assert_replicas_equal(&[0, 1, 2]);
}

#[test]
fn writes_go_on_after_the_head_is_lost_and_it_returns_as_the_tail() {
    let mut c = Cluster::start();
    let data = bytes_of(3, 30_000);
    c.write(0, chunk(0), 0, &data).unwrap();
    c.stop_node(0);
    c.reroute(&[(1, PublicState::Serving), (2, PublicState::Serving), (0, PublicState::Offline)]);
    c.write(1, chunk(0), 0, b"head").unwrap();
    c.write(1, chunk(1), 100, b"new chunk").unwrap();
    c.bring_back(0, &[1, 2]);
    c.assert_replicas_equal(&[0, 1, 2]);
    let read = c.read(0, chunk(0), 0, CHUNK_BYTES).unwrap();
    assert!(read.data[..4] == *b"head" && read.data[4..] == data[4..]);
    // Exactly-once records travelled with the resync: a retry at any later head is known.
    c.reroute(&[(0, PublicState::Serving), (1, PublicState::Offline), (2, PublicState::Offline)]);
    let before = c.list(0);
    c.send_write(0, c.write_request(0, chunk(1), 100, b"new chunk"), b"new chunk").unwrap();
    assert_eq!(c.list(0), before);
}

#[test]
fn a_write_in_flight_survives_the_loss_of_its_successor() {
    let mut c = Cluster::start();
    c.write(0, chunk(0), 0, &bytes_of(1, 10_000)).unwrap();
    // The tail is gone, the chain does not know it yet: the write waits for the new chain and is then acknowledged.
    c.stop_node(2);
    c.sequence += 1;
    let request = c.write_request(0, chunk(0), 0, b"in flight");
    let response = std::thread::scope(|scope| {
        let writer = scope.spawn(|| c.send_write(0, request, b"in flight"));
        let forwards = || c.engine(1).status().counters["forwards"];
        let before = forwards();
        wait_until("the middle to forward", || forwards() > before.max(1));
        let mut routing = c.routing.clone();
        routing.version += 1;
        routing.chains[0].version += 1;
        routing.chains[0].targets.pop();
        for node in [1, 0] {
            c.engine(node).apply_routing(&prost::Message::encode_to_vec(&routing)).unwrap();
        }
        writer.join().unwrap()
    });
    let response = response.unwrap();
    c.reroute(&[(0, PublicState::Serving), (1, PublicState::Serving), (2, PublicState::Offline)]);
    let list = c.list(1);
    assert_eq!((list[0].1, list[0].4), (response.update_version, 0));
    c.routing.version += 1;
    c.reroute(&[(0, PublicState::Serving), (1, PublicState::Serving), (2, PublicState::Offline)]);
    c.assert_replicas_equal(&[0, 1]);
    assert!(c.read(1, chunk(0), 0, 4096).unwrap().data.starts_with(b"in flight"));
}

#[test]
fn writes_during_a_resync_reach_the_syncing_replica() {
    let mut c = Cluster::start();
    for index in 0..60 {
        c.write(0, chunk(index), 0, &bytes_of(index as u8, 60_000)).unwrap();
    }
    c.stop_node(2);
    c.reroute(&[(0, PublicState::Serving), (1, PublicState::Serving), (2, PublicState::Offline)]);
    for index in 0..60 {
        c.write(0, chunk(index), 0, &[index as u8; 5_000]).unwrap();
    }
    c.start_node(2);
    let with = |state| [(0, PublicState::Serving), (1, PublicState::Serving), (2, state)];
    c.reroute(&with(PublicState::Offline));
    c.wait_state(2, LocalState::Online);
    c.reroute(&with(PublicState::Syncing));
    let mut round = 0u32;
    while c.status(2).unwrap().local_state != LocalState::Uptodate as u32 {
        round += 1;
        c.write_retrying(0, chunk(round % 70), (round * 7) % 10_000, &[round as u8; 300]);
        assert!(round < 20_000, "the resync does not end");
    }
    assert_eq!(c.read(2, chunk(0), 0, 4096).unwrap().result.code, Code::NotServing as u32);
    c.reroute(&with(PublicState::Serving));
    c.assert_replicas_equal(&[0, 1, 2]);
}

#[test]
fn a_sync_does_not_leave_out_a_replica_that_is_about_to_serve() {
    let mut c = Cluster::start();
    c.write(0, chunk(0), 0, b"x").unwrap();
    let sync = |c: &Cluster| {
        let chain_version = c.chain_version();
        let message = SyncChainRequest { chain_id: CHAIN, chain_version, target_id: target(0), forwarded: false };
        c.request::<SyncChainResponse>(0, Method::StorageSync, message)
    };
    let with = |state| [(0, PublicState::Serving), (1, PublicState::Serving), (2, state)];
    sync(&c).unwrap();
    c.stop_node(2);
    c.reroute(&with(PublicState::Syncing));
    assert!(sync(&c).is_err(), "the syncing replica is not durable");
    c.reroute(&with(PublicState::Offline));
    sync(&c).unwrap();
}

#[test]
fn all_nodes_restart_and_everything_acknowledged_is_there() {
    let mut c = Cluster::start();
    for index in 0..4 {
        c.write(0, chunk(index), 0, &bytes_of(index as u8, 90_000)).unwrap();
    }
    for node in 0..NODES {
        c.stop_node(node);
    }
    for node in 0..NODES {
        c.start_node(node);
    }
    // The manager still thinks they serve: they stay offline until it has seen the restart.
    c.routing.version += 1;
    c.publish();
    for node in 0..NODES {
        c.wait_state(node, LocalState::Offline);
        assert_eq!(c.read(node, chunk(0), 0, 4096).unwrap().result.code, Code::NotServing as u32);
    }
    let all = |state| [(0, state), (1, state), (2, state)];
    c.reroute(&all(PublicState::Lastsrv));
    for node in 0..NODES {
        c.wait_state(node, LocalState::Online);
    }
    c.reroute(&all(PublicState::Serving));
    for node in 0..NODES {
        c.wait_state(node, LocalState::Uptodate);
        for index in 0..4 {
            assert!(c.read(node, chunk(index), 0, CHUNK_BYTES).unwrap().data == bytes_of(index as u8, 90_000));
        }
    }
    c.write(0, chunk(0), 0, b"goes on").unwrap();
    c.assert_replicas_equal(&[0, 1, 2]);
}

#[test]
fn a_disk_of_another_cluster_is_refused() {
    let mut c = Cluster::start();
    c.stop_node(2);
    std::fs::write(c.dir(2).join("disk.json"), br#"{"format": 1, "cluster_id": "another"}"#).unwrap();
    c.start_node(2);
    c.reroute(&[(0, PublicState::Serving), (1, PublicState::Serving), (2, PublicState::Offline)]);
    let failed = || c.status(2).is_some_and(|s| s.error.contains("another"));
    wait_until("the disk to be refused", failed);
    assert_eq!(c.status(2).unwrap().local_state, LocalState::Offline as u32);
}

#[test]
fn replicas_that_differ_after_a_total_failure_converge() {
    let mut c = Cluster::start();
    for index in 0..3 {
        c.write(0, chunk(index), 0, &bytes_of(index as u8, 30_000)).unwrap();
    }
    // Node 2 alone gets ahead, as it can with updates that were never acknowledged.
    c.reroute(&[(2, PublicState::Serving), (0, PublicState::Offline), (1, PublicState::Offline)]);
    c.write(2, chunk(0), 0, b"only here").unwrap();
    c.write(2, chunk(8), 0, b"only here too").unwrap();
    for node in 0..NODES {
        c.stop_node(node);
    }
    for node in 0..NODES {
        c.start_node(node);
    }
    let all = |state| [(0, state), (1, state), (2, state)];
    c.reroute(&all(PublicState::Lastsrv));
    for node in 0..NODES {
        c.wait_state(node, LocalState::Online);
    }
    c.reroute(&all(PublicState::Serving));
    wait_until("the replicas to be equal", || c.list(0) == c.list(1) && c.list(1) == c.list(2));
    for node in 0..NODES {
        assert!(c.read(node, chunk(0), 0, CHUNK_BYTES).unwrap().data == bytes_of(0, 30_000));
        assert_eq!(c.read(node, chunk(8), 0, 4096).unwrap().result.code, Code::ChunkNotFound as u32);
    }
    c.write(0, chunk(8), 0, b"again").unwrap();
    c.assert_replicas_equal(&[0, 1, 2]);
}

#[test]
fn a_hole_goes_through_the_chain_and_reads_as_zeros_on_every_replica() {
    let mut c = Cluster::start();
    let data = bytes_of(3, 50_000);
    c.write(0, chunk(0), 0, &data).unwrap();
    let hole = |offset, length| PunchChunkRequest {
        chain_id: CHAIN,
        chain_version: c.chain_version(),
        target_id: target(0),
        chunk_id: chunk(0).to_bytes().to_vec().into(),
        chunk_bytes: CHUNK_BYTES,
        offset,
        length,
        ..PunchChunkRequest::default()
    };
    let holes = [hole(1_000, 20_000), hole(49_000, 9_000), hole(60_000, 5)];
    for (request, changes) in holes.into_iter().zip([true, true, false]) {
        let before = c.list(0)[0].1;
        let response: WriteResponse = c.request(0, Method::StoragePunch, request).unwrap();
        assert_eq!((response.chunk_length, response.update_version), (50_000, before + u64::from(changes)));
    }
    let mut expected = data;
    expected[1_000..21_000].fill(0);
    expected[49_000..].fill(0);
    for node in 0..NODES {
        assert!(c.read(node, chunk(0), 0, CHUNK_BYTES).unwrap().data == expected, "node {node}");
    }
    let empty = PunchChunkRequest { length: 0, ..hole(0, 1) };
    assert_eq!(c.request::<WriteResponse>(0, Method::StoragePunch, empty).unwrap_err().code, Code::InvalidArgument);
    let far = hole(CHUNK_BYTES - 1, 2);
    assert_eq!(c.request::<WriteResponse>(0, Method::StoragePunch, far).unwrap_err().code, Code::InvalidArgument);
}
