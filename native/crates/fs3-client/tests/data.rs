//! Reads and writes against fakes: what comes back is what was written, whatever fails.
mod common;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use common::{CHUNK, FakeCluster, NODES, pattern};
use fs3_client::{
    Caller, Client, CreateOptions, OpenFile, OpenOptions, ReadOp, Region, RegionMut, Result, WriteOp, at_path,
};
use fs3_core::Code;
use fs3_proto::v1::Method;

const K: usize = CHUNK as usize;

async fn create(client: &Client, name: &str) -> Arc<OpenFile> {
    let options = CreateOptions { mode: 0o644, write: true, read: true, exclusive: true, ..Default::default() };
    client.create(&Caller::default(), at_path(name.as_bytes(), false), options).await.unwrap()
}

async fn write(file: &OpenFile, offset: u64, data: &[u8]) -> Result<usize> {
    file.write(offset, Region::from_vec(data.to_vec())).await
}

/// Read into a dirty buffer.
async fn read(file: &OpenFile, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut buf = RegionMut::zeroed(len);
    buf.fill(0xee);
    let (count, buf) = file.read(offset, buf).await;
    Ok(buf[..count?].to_vec())
}

#[tokio::test]
async fn what_was_written_is_read_back_at_any_alignment() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    let data = pattern(1, 5 * K + 1234);
    assert_eq!(write(&file, 0, &data).await.unwrap(), data.len());
    for (offset, len) in [
        (0, data.len()),
        (0, 4096),
        (1, 1),
        (4095, 2),
        (K - 1, 2),
        (100, 3 * K),
        (K, K),
        (5 * K, 1234),
        (5 * K + 5, 99),
    ] {
        assert_eq!(read(&file, offset as u64, len).await.unwrap(), &data[offset..offset + len], "{offset}+{len}");
    }
    // Every serving replica has every byte.
    let stores: Vec<_> = NODES.iter().map(|node| cluster.stored(*node)).collect();
    assert!(stores[0].len() == 6 && stores.iter().all(|store| *store == stores[0]));
}

#[tokio::test]
async fn reads_are_short_only_at_the_end_of_the_file() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    write(&file, 0, &pattern(2, K + 10)).await.unwrap();
    assert_eq!(read(&file, 0, 3 * K).await.unwrap(), pattern(2, K + 10));
    assert_eq!(read(&file, (K + 4) as u64, 100).await.unwrap().len(), 6);
    assert!(read(&file, (K + 10) as u64, 100).await.unwrap().is_empty());
    assert!(read(&file, u64::MAX, 100).await.unwrap().is_empty());
}

#[tokio::test]
async fn holes_are_zeros() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    write(&file, (3 * K + 5000) as u64, b"end").await.unwrap();
    write(&file, 10, b"begin").await.unwrap();
    let mut expected = vec![0; 3 * K + 5003];
    expected[10..15].copy_from_slice(b"begin");
    expected[3 * K + 5000..].copy_from_slice(b"end");
    assert_eq!(read(&file, 0, 4 * K).await.unwrap(), expected);
    assert_eq!(read(&file, 3, 70_001).await.unwrap(), &expected[3..70_004]);
}

#[tokio::test]
async fn seeking_finds_data_and_holes() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    assert_eq!((file.seek_data(0).await.unwrap(), file.seek_hole(0).await.unwrap()), (None, None));
    let k = K as u64;
    // More chunks on every chain than the fake lists at a time; the last of them is short.
    write(&file, 3 * k + 5, &pattern(1, 30 * K)).await.unwrap();
    write(&file, 100 * k, b"far").await.unwrap();
    file.extend(200 * k).await.unwrap();
    let end = 33 * k + 5;
    for (offset, data, hole) in [
        (0, Some(3 * k), Some(0)),
        (3 * k + 7, Some(3 * k + 7), Some(end)),
        (end - 1, Some(end - 1), Some(end)),
        (end, Some(100 * k), Some(end)),
        (100 * k + 1, Some(100 * k + 1), Some(100 * k + 3)),
        (100 * k + 3, None, Some(100 * k + 3)),
        (200 * k - 1, None, Some(200 * k - 1)),
        (200 * k, None, None),
    ] {
        assert_eq!(file.seek_data(offset).await.unwrap(), data, "data from {offset}");
        assert_eq!(file.seek_hole(offset).await.unwrap(), hole, "hole from {offset}");
    }
}

#[tokio::test]
async fn holes_are_found_when_a_replica_leaves() {
    let mut cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    write(&file, 2 * K as u64, &pattern(1, K)).await.unwrap();
    cluster.kill(NODES[0]);
    assert_eq!(file.seek_data(0).await.unwrap(), Some(2 * K as u64));
    cluster.drop_from_chains(NODES[0]);
    assert_eq!(file.seek_hole(2 * K as u64).await.unwrap(), Some(3 * K as u64));
}

#[tokio::test]
async fn random_writes_and_reads_match_a_flat_buffer() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    let mut model: Vec<u8> = Vec::new();
    for round in 0..150u64 {
        let seed = pattern(round + 100, 16);
        let offset = u64::from_le_bytes(seed[..8].try_into().unwrap()) as usize % (4 * K);
        let len = u64::from_le_bytes(seed[8..].try_into().unwrap()) as usize % (2 * K) + 1;
        if round % 2 == 0 {
            let data = pattern(round, len);
            write(&file, offset as u64, &data).await.unwrap();
            model.resize(model.len().max(offset + len), 0);
            model[offset..offset + len].copy_from_slice(&data);
        } else {
            let expected = &model[offset.min(model.len())..(offset + len).min(model.len())];
            assert!(read(&file, offset as u64, len).await.unwrap() == expected, "round {round}: {offset}+{len}");
        }
    }
    assert_eq!(file.length(), model.len() as u64);
}

#[tokio::test]
async fn many_reads_come_back_in_order_with_few_requests() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    let data = pattern(3, 8 * K);
    write(&file, 0, &data).await.unwrap();
    let places: Vec<usize> = (0..200).map(|i| (i * 7919) % (8 * K - 4096)).collect();
    let ops = places
        .iter()
        .map(|at| ReadOp { file: file.clone(), offset: *at as u64, buf: RegionMut::zeroed(300) })
        .collect();
    let results = client.read_many(ops).await;
    for (at, (count, buf)) in places.iter().zip(results) {
        assert_eq!(count.unwrap(), 300);
        assert!(buf[..] == data[*at..*at + 300], "at {at}");
    }
    let reads = cluster.state.log.lock().reads.clone();
    // On a busy machine some are asked of a second replica, which may be that of several disks.
    let hedged = 3 * client.stats().read_hedges as usize;
    assert!(reads.len() <= 6 + hedged, "200 small reads took {} requests", reads.len());
    // All nodes take part, and not only with the heads of their chains; a chunk always has the same replica.
    let targets = cluster.state.log.lock().read_targets.clone();
    assert!(targets.len() > common::CHAINS as usize && targets.len() <= 8, "{targets:?}");
    assert_eq!(reads.iter().map(|(node, _)| node).collect::<HashSet<_>>().len(), 3);
}

#[tokio::test]
async fn many_writes_are_answered_in_order_each_with_its_own_result() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    let data = pattern(5, 100 * 4096);
    let op = |i: usize, offset: u64| WriteOp {
        file: file.clone(),
        offset,
        data: Region::from_vec(data[i * 4096..(i + 1) * 4096].to_vec()),
    };
    let mut ops: Vec<_> = (0..100).map(|i| op(i, (i * 4096) as u64)).collect();
    ops.push(op(0, u64::MAX - 1));
    let results = client.write_many(ops).await;
    assert!(results[..100].iter().all(|result| matches!(result, Ok(4096))));
    assert_eq!(results[100].as_ref().unwrap_err().code, Code::FileTooLarge);
    assert!(read(&file, 0, data.len()).await.unwrap() == data);
}

#[tokio::test]
async fn rotten_bytes_on_one_replica_are_read_from_another() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    let data = pattern(4, 6 * K);
    write(&file, 0, &data).await.unwrap();
    cluster.faults(|faults| {
        faults.rotten.insert(11);
        faults.flips.insert(12);
    });
    assert!(read(&file, 0, 6 * K).await.unwrap() == data);
    let stats = client.stats();
    assert!(stats.checksum_failures > 0 && stats.read_failovers >= stats.checksum_failures, "{stats:?}");
    cluster.faults(|faults| {
        faults.flips.insert(13);
    });
    assert_eq!(read(&file, 0, 100).await.unwrap_err().code, Code::ChecksumMismatch);
}

#[tokio::test]
async fn a_dead_node_is_read_and_written_around() {
    let mut cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    let data = pattern(5, 6 * K);
    write(&file, 0, &data).await.unwrap();
    cluster.kill(12);
    // Reads need no new routing.
    assert!(read(&file, 0, 6 * K).await.unwrap() == data);
    // Writes wait for it.
    let again = pattern(6, 6 * K);
    let write = tokio::spawn({
        let (file, again) = (file.clone(), again.clone());
        async move { write(&file, 0, &again).await }
    });
    common::eventually("the write is tried", || client.stats().write_retries > 0).await;
    assert!(!write.is_finished());
    cluster.drop_from_chains(12);
    assert_eq!(write.await.unwrap().unwrap(), again.len());
    assert!(read(&file, 0, 6 * K).await.unwrap() == again);
    assert_eq!(client.routing_version(), 2);
}

#[tokio::test]
async fn a_replica_is_told_once_when_its_bytes_do_not_match() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    let data = pattern(8, 6 * K);
    write(&file, 0, &data).await.unwrap();
    cluster.faults(|faults| {
        faults.rotten.insert(11);
        faults.flips.insert(12);
    });
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while cluster.state.log.lock().checks.is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "nothing was reported");
        assert!(read(&file, 0, 6 * K).await.unwrap() == data);
    }
    for _ in 0..10 {
        assert!(read(&file, 0, 6 * K).await.unwrap() == data);
    }
    let checks = cluster.state.log.lock().checks.clone();
    // What storage itself finds rotten needs no report.
    assert!(checks.iter().all(|check| check.target_id / 1000 == 12), "{checks:?}");
    let distinct: HashSet<_> = checks.iter().map(|check| (check.target_id, check.chunk_id.clone())).collect();
    assert_eq!(distinct.len(), checks.len(), "each only once: {checks:?}");
}

/// Read blocks of all chunks, one after another; how many requests each node saw.
async fn blocks_by_node(cluster: &FakeCluster, file: &OpenFile, data: &[u8], count: usize) -> HashMap<u32, usize> {
    cluster.state.log.lock().reads.clear();
    for i in 0..count {
        let at = (i * 5 * 4096 + i) % (data.len() - 4096);
        assert!(read(file, at as u64, 4096).await.unwrap() == data[at..at + 4096], "at {at}");
    }
    let mut seen = HashMap::new();
    cluster.state.log.lock().reads.iter().for_each(|(node, _)| *seen.entry(*node).or_default() += 1);
    seen
}

#[tokio::test]
async fn a_slow_disk_is_left_to_others_until_it_is_fast_again() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    let data = pattern(6, 12 * K);
    write(&file, 0, &data).await.unwrap();
    let before = blocks_by_node(&cluster, &file, &data, 120).await;
    assert!(before[&13] >= 10, "all nodes are read from: {before:?}");

    cluster.faults(|faults| faults.slow.extend([(13, Duration::from_millis(10))]));
    blocks_by_node(&cluster, &file, &data, 120).await;
    let during = blocks_by_node(&cluster, &file, &data, 300).await;
    assert!(during.get(&13).copied().unwrap_or(0) <= 300 / 32 + 1, "only probes go to a slow disk: {during:?}");

    cluster.faults(|faults| faults.slow.clear());
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while blocks_by_node(&cluster, &file, &data, 120).await.get(&13).copied().unwrap_or(0) < 20 {
        assert!(std::time::Instant::now() < deadline, "the disk was never used again");
    }
}

#[tokio::test]
async fn a_read_that_takes_long_is_answered_by_a_second_replica() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    let data = pattern(7, 6 * K);
    write(&file, 0, &data).await.unwrap();
    cluster.faults(|faults| faults.hung.extend([12]));
    // Whole chunks land in the caller's memory, parts of blocks do not; several chunks go to several replicas.
    for (offset, len) in [(0, 6 * K), (100, 3 * K), (2 * K, 100)] {
        assert!(read(&file, offset as u64, len).await.unwrap() == data[offset..offset + len], "{offset}+{len}");
    }
    let stats = client.stats();
    assert!(stats.read_hedges_won > 0 && stats.read_hedges >= stats.read_hedges_won, "{stats:?}");
    assert_eq!(stats.read_failovers, 0, "no read waited for the time of one try to be over");
}

#[tokio::test]
async fn a_read_waits_for_replicas_that_serve_again() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    write(&file, 0, b"patience").await.unwrap();
    cluster.faults(|faults| faults.read_error = Some(Code::NotServing));
    let reading = tokio::spawn({
        let file = file.clone();
        async move { read(&file, 0, 8).await }
    });
    common::eventually("every replica is asked twice", || cluster.state.log.lock().reads.len() > 6).await;
    cluster.faults(|faults| faults.read_error = None);
    assert_eq!(reading.await.unwrap().unwrap(), b"patience");
}

#[tokio::test]
async fn what_no_replica_can_read_is_an_error_at_once() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    write(&file, 0, b"gone").await.unwrap();
    cluster.faults(|faults| faults.read_error = Some(Code::DiskError));
    assert_eq!(read(&file, 0, 4).await.unwrap_err().code, Code::DiskError);
    assert_eq!(cluster.state.log.lock().reads.len(), 3);
}

#[tokio::test]
async fn a_hung_node_is_left_when_its_chain_changes() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    let data = pattern(7, 4 * K);
    write(&file, 0, &data).await.unwrap();
    cluster.faults(|faults| {
        faults.hung.insert(13);
    });
    assert!(read(&file, 0, 4 * K).await.unwrap() == data);
    let again = pattern(8, 4 * K);
    let writing = tokio::spawn({
        let (file, again) = (file.clone(), again.clone());
        async move { write(&file, 0, &again).await }
    });
    common::eventually("the other chains are written", || cluster.state.log.lock().applied_writes > 4).await;
    cluster.drop_from_chains(13);
    writing.await.unwrap().unwrap();
    assert!(read(&file, 0, 4 * K).await.unwrap() == again);
    cluster.faults(|faults| faults.hung.clear());
}

#[tokio::test]
async fn a_stale_chain_version_is_refreshed_without_an_error() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    write(&file, 0, &pattern(9, K)).await.unwrap();
    for node in [11, 12] {
        cluster.drop_from_chains(node);
        write(&file, 5, b"new").await.unwrap();
        assert_eq!(read(&file, 5, 3).await.unwrap(), b"new");
    }
}

#[tokio::test]
async fn a_write_whose_answer_was_lost_is_applied_once() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    cluster.faults(|faults| {
        faults.lose_answers.insert(Method::StorageWrite as i32, 2);
    });
    write(&file, 0, b"once").await.unwrap();
    let log = cluster.state.log.lock();
    assert_eq!((log.writes.len(), log.applied_writes), (3, 1));
    assert!(log.writes.iter().all(|write| write.writer == log.writes[0].writer));
}

#[tokio::test]
async fn a_write_damaged_on_the_way_is_sent_again() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    cluster.faults(|faults| faults.damage = 2);
    write(&file, 0, b"whole").await.unwrap();
    assert_eq!(client.stats().payload_resends, 2);
    cluster.faults(|faults| faults.damage = 100);
    assert_eq!(write(&file, 0, b"never").await.unwrap_err().code, Code::PayloadChecksum);
}

#[tokio::test]
async fn a_full_disk_is_an_error_at_once_and_reported_as_attempted() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    write(&file, 0, b"fits").await.unwrap();
    cluster.faults(|faults| faults.write_error = Some(Code::NoSpace));
    assert_eq!(write(&file, 100, b"too much").await.unwrap_err().code, Code::NoSpace);
    assert_eq!(file.length(), 4);
    file.close().await.unwrap();
    let report = cluster.state.log.lock().reports[0];
    assert_eq!((report.length, report.attempted_length), (4, 108));
}

#[tokio::test]
async fn sync_reaches_every_chain_written_since_the_last_one() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    write(&file, 0, &pattern(1, 2 * K)).await.unwrap();
    file.sync().await.unwrap();
    let mut synced = std::mem::take(&mut cluster.state.log.lock().syncs);
    synced.sort_unstable();
    // `first` is 1: chunks 0 and 1 are on the second and third chain of the table.
    assert_eq!(synced, [101, 102]);
    file.sync().await.unwrap();
    assert!(cluster.state.log.lock().syncs.is_empty());
}

#[tokio::test]
async fn appends_through_different_open_files_never_overlap() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    create(&client, "f").await.close().await.unwrap();
    let options = OpenOptions { write: true, ..Default::default() };
    let mut appends = tokio::task::JoinSet::new();
    for byte in 1..=20u8 {
        let file = client.open(&Caller::default(), at_path(b"f", false), options).await.unwrap();
        appends.spawn(async move { file.append(Region::from_vec(vec![byte; 1000])).await.unwrap() });
    }
    let mut ends = appends.join_all().await;
    ends.sort_unstable();
    assert_eq!(ends, (1..=20).map(|i| i * 1000).collect::<Vec<_>>());
    let file = client.open(&Caller::default(), at_path(b"f", false), options).await.unwrap();
    let mut seen: Vec<_> = read(&file, 0, 30_000).await.unwrap().chunks(1000).map(|c| (c[0], c.to_vec())).collect();
    seen.sort_unstable();
    assert_eq!(seen, (1..=20).map(|byte| (byte, vec![byte; 1000])).collect::<Vec<_>>());
}

#[tokio::test]
async fn appends_of_two_clients_never_overlap_even_if_answers_are_lost() {
    let cluster = FakeCluster::start().await;
    let (one, two) = (cluster.client().await, cluster.client().await);
    let first = create(&one, "f").await;
    let options = OpenOptions { write: true, ..Default::default() };
    let second = two.open(&Caller::default(), at_path(b"f", false), options).await.unwrap();
    let data = |byte| Region::from_vec(vec![byte; 1000]);
    for round in 0..10 {
        cluster.faults(|faults| {
            faults.lose_answers.insert(Method::MetaAppend as i32, round % 2);
        });
        assert_eq!(first.append(data(1)).await.unwrap(), 2000 * round as u64 + 1000);
        assert_eq!(second.append(data(2)).await.unwrap(), 2000 * round as u64 + 2000);
    }
    second.truncate(500).await.unwrap();
    assert_eq!(first.append(data(3)).await.unwrap(), 1500);
    assert_eq!(first.append(Region::from_vec(Vec::new())).await.unwrap(), 1500);
    cluster.faults(|faults| faults.length_max = Some(2000));
    assert_eq!(second.append(data(4)).await.unwrap_err().code, Code::QuotaExceeded);
    assert_eq!(read(&first, 0, 2000).await.unwrap(), [vec![1; 500], vec![3; 1000]].concat());
}

#[tokio::test]
async fn a_file_grows_beyond_its_limit_only_when_the_service_allows_it() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let syncs = || cluster.state.log.lock().metas.iter().filter(|m| m.0 == Method::MetaSync).count();
    cluster.faults(|faults| faults.length_max = Some(10 * K as u64));
    let file = create(&client, "f").await;
    write(&file, 0, &pattern(1, K)).await.unwrap();
    assert_eq!(syncs(), 0, "there is room for a chunk that nobody has to be asked for");
    write(&file, 2 * K as u64, &pattern(2, 6 * K)).await.unwrap();
    assert_eq!((syncs(), cluster.state.log.lock().reports[0].length), (1, K as u64));
    let refused = write(&file, 8 * K as u64, &pattern(3, 3 * K)).await.unwrap_err();
    assert_eq!((refused.code, file.length()), (Code::QuotaExceeded, 8 * K as u64));
    assert_eq!(file.extend(11 * K as u64).await.unwrap_err().code, Code::QuotaExceeded);
    write(&file, 0, &pattern(4, 8 * K)).await.unwrap();
    write(&file, 8 * K as u64, &pattern(5, 2 * K)).await.unwrap();
    cluster.faults(|faults| faults.length_max = None);
    write(&file, 10 * K as u64, &pattern(6, K)).await.unwrap();
    let asked = syncs();
    write(&file, 11 * K as u64, &pattern(7, 9 * K)).await.unwrap();
    assert_eq!((syncs(), file.length()), (asked, 20 * K as u64));
}

#[tokio::test]
async fn a_failed_sync_is_an_error_and_done_again_by_the_next() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    write(&file, 0, &pattern(1, 2 * K)).await.unwrap();
    cluster.faults(|faults| faults.sync_error = Some(Code::Internal));
    assert_eq!(file.sync().await.unwrap_err().code, Code::Internal);
    cluster.faults(|faults| faults.sync_error = None);
    file.sync().await.unwrap();
    assert_eq!(cluster.state.log.lock().syncs.len(), 2);
}

#[tokio::test]
async fn no_sync_returns_before_the_one_that_does_its_work() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    write(&file, 0, &pattern(1, 4 * K)).await.unwrap();
    cluster.faults(|faults| faults.hung.extend(NODES));
    let syncs: Vec<_> = (0..3)
        .map(|_| {
            let file = file.clone();
            tokio::spawn(async move { file.sync().await })
        })
        .collect();
    common::eventually("the first sync is on its way", || cluster.state.log.lock().hanging == 4).await;
    // Longer than a sync without work takes.
    client.stat(&Caller::default(), at_path(b"f", false)).await.unwrap();
    assert!(syncs.iter().all(|sync| !sync.is_finished()));
    cluster.faults(|faults| faults.hung.clear());
    for sync in syncs {
        sync.await.unwrap().unwrap();
    }
    assert_eq!(cluster.state.log.lock().syncs.len(), 4);
}

#[tokio::test]
async fn a_truncate_waits_for_the_writes_on_their_way() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    cluster.faults(|faults| faults.hung.extend(NODES));
    let writing = tokio::spawn({
        let file = file.clone();
        async move { write(&file, 0, &pattern(1, K)).await }
    });
    common::eventually("the write is on its way", || cluster.state.log.lock().hanging == 1).await;
    let truncating = tokio::spawn({
        let file = file.clone();
        async move { file.truncate(10).await }
    });
    // Longer than a truncate that does not wait takes to be sent.
    client.stat(&Caller::default(), at_path(b"f", false)).await.unwrap();
    let truncates = || cluster.state.log.lock().metas.iter().filter(|m| m.0 == Method::MetaTruncate).count();
    assert_eq!(truncates(), 0);
    cluster.faults(|faults| faults.hung.clear());
    writing.await.unwrap().unwrap();
    assert_eq!(truncating.await.unwrap().unwrap().length, 10);
    assert_eq!((truncates(), file.length()), (1, 10));
    assert_eq!(read(&file, 0, 100).await.unwrap(), pattern(1, 10));
}

#[tokio::test]
async fn sync_through_a_new_open_covers_what_was_written_before_it() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    write(&file, 0, &pattern(1, 2 * K)).await.unwrap();
    file.close().await.unwrap();
    let options = OpenOptions { write: true, ..Default::default() };
    let file = client.open(&Caller::default(), at_path(b"f", true), options).await.unwrap();
    file.sync().await.unwrap();
    let mut synced = std::mem::take(&mut cluster.state.log.lock().syncs);
    synced.sort_unstable();
    assert_eq!(synced, [101, 102]);
    file.sync().await.unwrap();
    assert!(cluster.state.log.lock().syncs.is_empty());
}

#[tokio::test]
async fn a_dropped_read_leaves_the_client_usable() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    let data = pattern(4, 3 * K);
    write(&file, 0, &data).await.unwrap();
    cluster.faults(|faults| faults.hung.extend(NODES));
    for _ in 0..20 {
        let pending = file.read(0, RegionMut::zeroed(3 * K));
        assert!(tokio::time::timeout(std::time::Duration::from_millis(3), pending).await.is_err());
    }
    cluster.faults(|faults| faults.hung.clear());
    assert!(read(&file, 0, 3 * K).await.unwrap() == data);
}

#[tokio::test]
async fn replicas_are_listed_page_by_page() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    write(&file, 0, &pattern(4, 5 * K)).await.unwrap();
    let listings = client.list_replicas().await.unwrap();
    assert_eq!(listings.len(), 12);
    assert!(listings.iter().all(|listing| listing.chunks.len() == 5));
}

#[tokio::test]
async fn a_reader_of_a_removed_file_gets_an_error_instead_of_zeros() {
    let cluster = FakeCluster::start().await;
    let (client, other) = (cluster.client().await, cluster.client().await);
    let file = create(&other, "f").await;
    write(&file, 0, &pattern(1, 2 * K)).await.unwrap();
    file.close().await.unwrap();
    let options = fs3_client::OpenOptions { read: true, ..Default::default() };
    let reader = client.open(&Caller::default(), at_path(b"f", false), options).await.unwrap();
    assert_eq!(read(&reader, 0, 10).await.unwrap(), pattern(1, 10));
    cluster.state.files.lock().clear();
    cluster.state.stores.values().for_each(|store| store.lock().clear());
    assert_eq!(read(&reader, 0, 10).await.unwrap_err().code, Code::StaleHandle);
}

#[tokio::test]
async fn a_sparse_file_is_checked_at_most_once_a_second() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    write(&file, (8 * K) as u64, b"end").await.unwrap();
    file.close().await.unwrap();
    let options = fs3_client::OpenOptions { read: true, ..Default::default() };
    let reader = client.open(&Caller::default(), at_path(b"f", false), options).await.unwrap();
    for _ in 0..20 {
        assert_eq!(read(&reader, 5, 3 * K).await.unwrap(), vec![0; 3 * K]);
    }
    let stats = cluster.state.log.lock().metas.iter().filter(|(method, ..)| *method == Method::MetaStat).count();
    assert!((1..=5).contains(&stats), "{stats} stats for 20 reads of holes");
}

#[tokio::test]
async fn more_bytes_than_may_be_in_flight_take_turns() {
    let cluster = FakeCluster::start().await;
    let config = fs3_client::ClientConfig {
        read_bytes_in_flight: 1 << 16,
        write_bytes_in_flight: 1 << 16,
        write_channels: 2,
        ..cluster.config()
    };
    let client = Client::connect(config).await.unwrap();
    let file = create(&client, "f").await;
    let data = pattern(1, 20 * K + 17);
    write(&file, 3, &data).await.unwrap();
    assert!(read(&file, 3, data.len()).await.unwrap() == data);
}
