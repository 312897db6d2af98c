//! What the store does when the disk, the log or the data are bad, and when the process is killed.

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::{Bed, CHUNK, bytes_of, code, id, options, pattern, replace, runtime, update, write};
use fs3_core::{Code, UpdateVersion};
use fs3_io::fault::Fault;
use fs3_io::{Change, Disk, IoThreads, TargetStore};

#[test]
fn rotten_bytes_are_never_returned_nor_merged_into_a_new_version() {
    let bed = Bed::new();
    let data = pattern(1, 0, 100_000);
    bed.put(0, 1, write(0, data.clone()));
    bed.sync().unwrap();
    bed.disk.flip("data.17.blk", 50_000);
    assert_eq!(bed.read(0), Err(Code::ChecksumMismatch));
    let good = bed.runtime.block_on(bed.store.read(id(0), 0, 4096)).unwrap();
    assert_eq!(bytes_of(&good), data[..4096]);
    assert_eq!(code(bed.prepare(0, 2, write(50_001, vec![1]))), Some(Code::ChecksumMismatch));
    assert!(bed.store.failed().is_none());
    bed.put(0, 2, write(0, pattern(2, 0, 100_000)));
    assert_eq!(bed.read(0), Ok(pattern(2, 0, 100_000)));
}

#[test]
fn rot_under_the_cache_is_found_and_put_right_in_place() {
    let bed = Bed::new();
    let data = pattern(1, 0, 101_000);
    bed.put(0, 1, write(0, data.clone()));
    bed.put(0, 2, write(8192, vec![9; 100]));
    let mut expected = data.clone();
    expected[8192..8292].fill(9);
    assert_eq!(bed.read(0), Ok(expected.clone()));
    bed.disk.flip("data.17.blk", 50_000);
    bed.disk.flip("data.17.blk", 100_500);
    // This block is patched: what is on the disk does not count.
    bed.disk.flip("data.17.blk", 8200);
    let verify = |offset, length| bed.runtime.block_on(bed.store.verify(id(0), offset, length)).unwrap();
    let verified = verify(0, u32::MAX);
    let bad: Vec<_> = verified.bad.iter().map(|b| (b.index, b.length)).collect();
    assert_eq!(bad, [(12, 4096), (24, 101_000 - 24 * 4096)]);
    assert_eq!(verified.read_bytes, 25 * 4096);
    assert!(bed.store.chunk(id(0)).unwrap().rotten);
    assert!(verify(0, 12 * 4096).bad.is_empty() && verify(12 * 4096, 1).bad.len() == 1);

    let right = |index: usize| (index as u32, expected[index * 4096..expected.len().min((index + 1) * 4096)].to_vec());
    let repair = |version, blocks| code(bed.runtime.block_on(bed.store.repair(id(0), UpdateVersion(version), blocks)));
    assert_eq!(repair(1, vec![right(12), right(24)]), Some(Code::VersionGap));
    assert_eq!(repair(2, vec![(12, vec![1; 4096])]), Some(Code::PayloadChecksum));
    assert_eq!(repair(2, vec![right(12)]), Some(Code::ChecksumMismatch));
    bed.prepare(0, 3, write(101_000, vec![1; 30_000])).unwrap();
    assert_eq!(repair(2, vec![right(24)]), Some(Code::VersionGap), "the pending append shares the last block");
    bed.runtime.block_on(bed.store.abort(id(0), UpdateVersion(3))).unwrap();
    assert_eq!(repair(2, vec![right(24)]), None);
    assert!(!bed.store.chunk(id(0)).unwrap().rotten);
    assert!(verify(0, u32::MAX).bad.is_empty());
    bed.options.read_cache.clear();
    assert_eq!(bed.read(0), Ok(expected));
}

#[test]
fn a_full_disk_refuses_the_write_and_keeps_the_store_usable() {
    let bed = Bed::new();
    bed.put(0, 1, write(0, vec![1; 4096]));
    bed.disk.inject(Fault::Space, 0);
    assert_eq!(code(bed.prepare(1, 1, write(0, vec![2; 200_000]))), Some(Code::NoSpace));
    assert!(bed.store.chunk(id(1)).is_none());
    assert!(bed.store.failed().is_none());
    assert_eq!(bed.read(0), Ok(vec![1; 4096]));
    bed.put(2, 1, write(0, vec![3; 4096]));
    bed.disk.restart();
    bed.put(1, 1, write(0, vec![2; 200_000]));
    assert_eq!(bed.read(1), Ok(vec![2; 200_000]));
}

#[test]
fn a_full_log_refuses_prepares_but_still_commits_what_was_prepared() {
    let bed = Bed::new();
    bed.put(0, 1, write(0, vec![1; 200_000]));
    bed.disk.inject(Fault::Space, 0);
    // Each prepare replaces the one before and leaves 64 KiB in the log.
    let mut tried = (0..200).map(|_| bed.prepare(0, 3, write(4096, vec![3; 65_536])));
    let refused = tried.find_map(code);
    assert_eq!(refused, Some(Code::NoSpace));
    assert!(bed.store.failed().is_none());
    bed.commit(0, 3).unwrap();
    assert_eq!(bed.read(0).unwrap()[4096..4096 + 65_536], vec![3; 65_536]);
}

#[test]
fn capacity_counts_blocks_and_freed_ones_can_be_used_again() {
    let mut bed = Bed::new();
    bed.options.capacity_bytes = 192 << 10;
    bed.reopen();
    for chunk in 0..3 {
        bed.put(chunk, 1, write(0, vec![1; 4096]));
    }
    assert_eq!(code(bed.prepare(3, 1, write(0, vec![1; 4096]))), Some(Code::NoSpace));
    assert_eq!((bed.store.chunks(), bed.store.used_bytes()), (3, 192 << 10));
    bed.put(0, 2, Change::Remove);
    bed.put(3, 1, write(0, vec![1; 4096]));
    assert_eq!(bed.read(0), Err(Code::ChunkNotFound));
}

#[test]
fn a_failed_data_write_fails_the_store_and_keeps_what_was_committed() {
    let mut bed = Bed::new();
    bed.put(0, 1, write(0, vec![1; 9000]));
    bed.disk.inject(Fault::Write, 0);
    assert_eq!(code(bed.prepare(0, 2, write(0, vec![2; 9000]))), Some(Code::DiskError));
    assert_eq!(bed.store.failed().map(|e| e.code), Some(Code::DiskError));
    assert_eq!(code(bed.prepare(0, 2, write(0, vec![2; 9000]))), Some(Code::DiskError));
    assert_eq!(bed.read(0), Ok(vec![1; 9000]));
    bed.reopen();
    assert_eq!(bed.read(0), Ok(vec![1; 9000]));
}

#[test]
fn a_disk_that_fills_up_in_the_middle_of_a_log_record_fails_the_store_and_keeps_what_was_acknowledged() {
    for skip in 0..4 {
        let mut bed = Bed::new();
        bed.put(0, 1, write(0, vec![1; 9000]));
        bed.disk.inject(Fault::Full, skip);
        let mut version = 1;
        let failed = loop {
            // Small overwrites travel through the log alone.
            match bed.prepare(0, version + 1, write(4096, vec![version as u8 + 1; 4096])) {
                Ok(_) => match bed.commit(0, version + 1) {
                    Ok(_) => version += 1,
                    Err(e) => break e,
                },
                Err(e) => break e,
            }
        };
        assert_eq!(failed.code, Code::DiskError);
        assert_eq!(code(bed.prepare(9, 1, write(0, vec![1]))), Some(Code::DiskError));
        bed.disk.restart();
        bed.reopen();
        let meta = bed.store.chunk(id(0)).unwrap();
        assert_eq!(meta.committed.unwrap().update_version, UpdateVersion(version));
        assert_eq!(bed.read(0).unwrap()[4096], if version == 1 { 1 } else { version as u8 });
        bed.put(1, 1, write(0, vec![7; 9000]));
    }
}

#[test]
fn a_failed_sync_is_reported_and_never_retried_into_success() {
    let bed = Bed::new();
    bed.put(0, 1, write(0, vec![1; 9000]));
    bed.disk.inject(Fault::Sync, 0);
    assert_eq!(code(bed.sync()), Some(Code::DiskError));
    assert_eq!(code(bed.sync()), Some(Code::DiskError));
    assert_eq!(bed.read(0), Ok(vec![1; 9000]));
}

#[test]
fn a_torn_log_tail_loses_only_the_torn_record() {
    let mut bed = Bed::new();
    bed.put(0, 1, write(0, vec![1; 9000]));
    bed.put(0, 2, write(0, vec![2; 9000]));
    let names = bed.disk.list().unwrap();
    let log = names.iter().rfind(|n| n.ends_with(".log")).unwrap();
    let end = bed.disk.contents(log).iter().rposition(|&b| b != 0).unwrap();
    bed.disk.flip(log, end);
    bed.reopen();
    let meta = bed.store.chunk(id(0)).unwrap();
    assert_eq!(meta.committed.unwrap().update_version, UpdateVersion(1));
    assert_eq!(meta.pending.unwrap().update_version, UpdateVersion(2));
    assert_eq!(bed.read(0), Ok(vec![1; 9000]));
    bed.commit(0, 2).unwrap();
    bed.reopen();
    assert_eq!(bed.read(0), Ok(vec![2; 9000]));
}

#[test]
fn a_damaged_log_before_later_segments_is_refused_rather_than_half_read() {
    let mut bed = Bed::new();
    bed.put(0, 1, write(0, vec![1; 9000]));
    bed.reopen();
    bed.put(0, 2, write(0, vec![2; 9000]));
    let names = bed.disk.list().unwrap();
    let log = names.iter().find(|n| n.ends_with(".log")).unwrap();
    bed.disk.flip(log, 150);
    let opened = TargetStore::open_on(Arc::new(bed.disk.clone()), bed.options.clone());
    assert_eq!(code(opened), Some(Code::DiskError));
}

#[test]
fn writer_records_are_committed_with_the_version_and_survive() {
    let mut bed = Bed::new();
    bed.prepare(0, 1, write(0, vec![1; 10])).unwrap();
    assert!(bed.store.chunk(id(0)).unwrap().writers.is_empty());
    bed.commit(0, 1).unwrap();
    bed.put(0, 2, Change::Remove);
    bed.reopen();
    let meta = bed.store.chunk(id(0)).unwrap();
    assert_eq!(meta.writers, vec![common::writer(2)]);
    assert!(meta.committed.unwrap().removed);
    let records = vec![common::writer(77)];
    bed.put(0, 3, replace(vec![5; 5000], records));
    assert_eq!(bed.store.chunk(id(0)).unwrap().writers.last().unwrap().sequence, 3);
    assert_eq!(bed.store.list(None, 10).len(), 1);
    assert_eq!(bed.store.inode_chunks(0, 7, 0, u32::MAX).len(), 1);
    assert_eq!(bed.store.inode_chunks(0, 8, 0, u32::MAX).len(), 0);
}

#[test]
fn commit_is_idempotent_and_refuses_what_was_never_prepared() {
    let bed = Bed::new();
    bed.put(0, 1, write(0, vec![1; 10]));
    assert_eq!(bed.commit(0, 1).unwrap().update_version, UpdateVersion(1));
    assert_eq!(code(bed.commit(0, 2)), Some(Code::VersionGap));
    assert_eq!(code(bed.commit(9, 1)), Some(Code::VersionGap));
    bed.prepare(0, 2, write(0, vec![2; 10])).unwrap();
    bed.runtime.block_on(bed.store.abort(id(0), UpdateVersion(2))).unwrap();
    assert_eq!(code(bed.commit(0, 2)), Some(Code::VersionGap));
    assert_eq!(bed.read(0), Ok(vec![1; 10]));
}

#[test]
fn old_tombstones_are_forgotten_and_young_ones_are_kept() {
    let mut bed = Bed::new();
    bed.put(0, 1, write(0, vec![1; 10]));
    bed.put(0, 2, Change::Remove);
    bed.store.maintain_for_tests().unwrap();
    assert!(bed.store.chunk(id(0)).is_some());
    bed.options.tombstone_ms = -60_000;
    bed.reopen();
    bed.store.maintain_for_tests().unwrap();
    assert!(bed.store.chunk(id(0)).is_none());
    bed.reopen();
    assert!(bed.store.chunk(id(0)).is_none());
}

#[test]
fn readers_never_see_a_torn_version_while_a_writer_runs() {
    let threads = IoThreads::new(4);
    let mut options = options(&threads);
    options.patch_bytes_max = 16 << 10;
    let dir = tempfile::tempdir().unwrap();
    let store = TargetStore::open(dir.path(), options.clone()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async {
        let put = |version: u64, offset: u32, len: u32| {
            let store = store.clone();
            async move {
                let change = write(offset, vec![version as u8; len as usize]);
                store.prepare(update(0, version, change)).await.unwrap();
                store.commit(id(0), UpdateVersion(version)).await.unwrap();
            }
        };
        put(1, 0, 65_536).await;
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let reader = tokio::spawn({
            let (store, stop, cache) = (store.clone(), stop.clone(), options.read_cache.clone());
            async move {
                let mut reads = 0u64;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    cache.clear();
                    let out = store.read(id(0), 0, CHUNK).await.unwrap();
                    let bytes = bytes_of(&out);
                    let expected = out.version.update_version.0 as u8;
                    // The last update of every version covers these blocks whole.
                    assert!(bytes[4096..12_288].iter().all(|&b| b == expected), "torn at version {expected}");
                    reads += 1;
                }
                reads
            }
        });
        for version in 2..250 {
            let (offset, len) = if version % 5 == 0 { (0, 65_536) } else { (4096, 8192) };
            put(version, offset, len).await;
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(reader.await.unwrap() > 0);
    });
}

/// The child of the kill test: writes and reports every acknowledgement on its standard output.
#[test]
#[ignore = "run by acknowledged_updates_survive_kill_9 as a child process"]
fn kill_child() {
    let Ok(dir) = std::env::var("FS3_KILL_TEST_DIR") else { return };
    let threads = IoThreads::new(4);
    let mut options = options(&threads);
    options.log_bytes_max = 64 << 10;
    options.patch_bytes_max = 32 << 10;
    let store = TargetStore::open(dir.as_ref(), options).unwrap();
    runtime().block_on(async {
        for round in 0u64.. {
            let chunk = (round % 5) as u32;
            let meta = store.chunk(id(chunk));
            let old = meta.and_then(|m| m.committed).map_or(0, |c| c.update_version.0);
            let version = old + 1;
            let (offset, len) = kill_range(version);
            let change = write(offset, pattern(version, offset, len));
            store.prepare(update(chunk, version, change)).await.unwrap();
            println!("p {chunk} {version}");
            store.commit(id(chunk), UpdateVersion(version)).await.unwrap();
            println!("c {chunk} {version}");
        }
    });
}

fn kill_range(version: u64) -> (u32, u32) {
    match version % 4 {
        0 => (0, 150_000),
        1 => (5000, 6000),
        2 => (100_000, 60_000),
        _ => (4096, 4096),
    }
}

fn kill_content(version: u64) -> Vec<u8> {
    let mut content = vec![];
    for v in 1..=version {
        let (offset, len) = kill_range(v);
        content.resize(content.len().max((offset + len) as usize), 0);
        content[offset as usize..(offset + len) as usize].copy_from_slice(&pattern(v, offset, len));
    }
    content
}

#[test]
fn acknowledged_updates_survive_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let (mut committed, mut prepared) = ([0u64; 5], [0u64; 5]);
    for round in 0..6u32 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kill_child", "--ignored", "--nocapture", "--test-threads=1"])
            .env("FS3_KILL_TEST_DIR", dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut acknowledged = 0;
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for line in lines.map_while(Result::ok) {
            let fields: Vec<&str> = line.split(' ').collect();
            let [kind @ ("p" | "c"), chunk, version] = fields[..] else { continue };
            // The kill may cut a line off; a shorter number would only weaken the check.
            let (Ok(chunk), Ok(version)) = (chunk.parse::<usize>(), version.parse::<u64>()) else { continue };
            let seen = if kind == "c" { &mut committed } else { &mut prepared };
            seen[chunk] = seen[chunk].max(version);
            acknowledged += 1;
            if acknowledged == 100 + 37 * round {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        check_killed(dir.path(), &committed, &prepared);
    }
}

fn check_killed(dir: &std::path::Path, committed: &[u64; 5], prepared: &[u64; 5]) {
    let store = TargetStore::open(dir, options(&IoThreads::new(1))).unwrap();
    for chunk in 0..5 {
        let meta = store.chunk(id(chunk)).unwrap();
        let version = meta.committed.unwrap().update_version.0;
        assert!(version >= committed[chunk as usize]);
        let newest = meta.pending.map_or(version, |p| p.update_version.0);
        assert!(newest >= prepared[chunk as usize]);
        let out = runtime().block_on(store.read(id(chunk), 0, CHUNK)).unwrap();
        assert!(bytes_of(&out) == kill_content(version), "chunk {chunk} version {version}");
    }
}

#[test]
fn what_a_failed_sync_left_in_memory_is_durable_after_the_next_good_one() {
    // Data files and log are synced one after the other; every one of them fails once.
    let mut failed = 0;
    for failing in 0.. {
        let mut bed = Bed::new();
        bed.put(0, 1, write(0, vec![1; 9000]));
        bed.sync().unwrap();
        bed.put(0, 2, write(9000, vec![2; 3000]));
        bed.put(1, 1, write(0, vec![3; 200_000]));
        bed.prepare(2, 1, write(0, vec![4; 5000])).unwrap();
        bed.disk.inject(Fault::Sync, failing);
        if bed.sync().is_ok() {
            break;
        }
        failed += 1;
        // The process is started anew on the same running machine.
        bed.disk.kill();
        bed.reopen();
        bed.commit(2, 1).unwrap();
        bed.sync().unwrap();
        for _ in 0..2 {
            bed.disk.crash();
            bed.reopen();
            assert_eq!(bed.read(0), Ok([vec![1; 9000], vec![2; 3000]].concat()), "sync {failing}");
            assert_eq!(bed.read(1), Ok(vec![3; 200_000]), "sync {failing}");
            assert_eq!(bed.read(2), Ok(vec![4; 5000]), "sync {failing}");
        }
        assert!(!bed.disk.names().contains(&"disk.failed".to_string()));
    }
    assert!(failed > 2, "{failed}");
}

#[test]
fn an_open_that_failed_is_repeated_without_loss() {
    let mut failed = 0;
    for (fault, after) in [Fault::Sync, Fault::Write].iter().flat_map(|fault| (0..6).map(move |after| (*fault, after)))
    {
        let mut bed = Bed::new();
        bed.put(0, 1, write(0, vec![1; 9000]));
        bed.disk.kill();
        bed.disk.inject(fault, after);
        let again = TargetStore::open_on(Arc::new(bed.disk.clone()), bed.options.clone());
        failed += u32::from(again.is_err());
        drop(again);
        bed.disk.kill();
        bed.reopen();
        bed.put(0, 2, write(9000, vec![2; 3000]));
        bed.sync().unwrap();
        bed.disk.crash();
        bed.reopen();
        assert_eq!(bed.read(0), Ok([vec![1; 9000], vec![2; 3000]].concat()), "{fault:?} {after}");
    }
    assert!(failed > 2, "{failed}");
}
