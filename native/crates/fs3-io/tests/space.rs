//! Space: what a target may take, what a full disk refuses, and how space comes back and moves between size classes.

mod common;

use common::{Bed, CHUNK, bytes_of, code, id, options, pattern, runtime, update, write};
use fs3_core::{Code, UpdateVersion};
use fs3_io::{Change, Disk, IoThreads, TargetStore};

const SMALL: u32 = 64 << 10;

/// Write chunks of `bytes` bytes from number `first` on until there is no space; returns how many fitted.
fn fill(bed: &Bed, first: u32, bytes: u32) -> u32 {
    for n in 0.. {
        let chunk = first + n;
        match bed.prepare(chunk, 1, write(0, pattern(u64::from(chunk), 0, bytes))) {
            Ok(_) => drop(bed.commit(chunk, 1).unwrap()),
            Err(e) => {
                assert_eq!(e.code, Code::NoSpace, "{e}");
                assert!(bed.store.chunk(id(chunk)).is_none(), "a refused write left a trace");
                assert!(bed.store.failed().is_none());
                return n;
            }
        }
    }
    unreachable!()
}

fn check(bed: &Bed, first: u32, count: u32, bytes: u32) {
    bed.options.read_cache.clear();
    for chunk in first..first + count {
        assert!(bed.read(chunk) == Ok(pattern(u64::from(chunk), 0, bytes)), "chunk {chunk}");
    }
}

fn remove(bed: &Bed, first: u32, count: u32) {
    (first..first + count).for_each(|chunk| bed.put(chunk, 2, Change::Remove));
}

#[test]
fn capacity_is_exact_and_space_of_one_size_class_serves_another() {
    let mut bed = Bed::new();
    bed.options.capacity_bytes = 4 << 20;
    bed.reopen();
    assert_eq!(fill(&bed, 0, SMALL), 64);
    assert_eq!((bed.store.used_bytes(), bed.store.disk_bytes().unwrap()), (4 << 20, 4 << 20));
    remove(&bed, 0, 32);
    assert_eq!(fill(&bed, 100, CHUNK), 8);
    assert_eq!((bed.store.used_bytes(), bed.store.disk_bytes().unwrap()), (4 << 20, 4 << 20));
    for round in 0..2 {
        check(&bed, 32, 32, SMALL);
        check(&bed, 100, 8, CHUNK);
        bed.store.audit_for_tests().unwrap();
        if round == 0 {
            bed.reopen();
        }
    }
    remove(&bed, 100, 8);
    // After a restart the store does not know which free blocks have space.
    bed.reopen();
    assert_eq!(fill(&bed, 200, SMALL), 32);
    assert!(bed.store.disk_bytes().unwrap() <= 4 << 20);
    check(&bed, 200, 32, SMALL);
    check(&bed, 32, 32, SMALL);
    bed.store.audit_for_tests().unwrap();
}

#[test]
fn a_smaller_capacity_than_before_refuses_new_chunks_until_enough_are_removed() {
    let mut bed = Bed::new();
    bed.options.capacity_bytes = 2 << 20;
    bed.reopen();
    assert_eq!(fill(&bed, 0, CHUNK), 8);
    bed.options.capacity_bytes = 1 << 20;
    bed.reopen();
    assert_eq!(fill(&bed, 100, SMALL), 0);
    remove(&bed, 0, 5);
    assert_eq!(fill(&bed, 100, SMALL), 4);
    check(&bed, 5, 3, CHUNK);
}

#[test]
fn a_full_disk_corrupts_nothing_opens_again_and_recovers_after_removals() {
    for (seed, small) in [(1, SMALL), (2, CHUNK), (3, 100_000)] {
        let mut bed = Bed::on(fs3_io::fault::FaultDisk::new(seed));
        bed.disk.set_space(24 << 20);
        let fitted = fill(&bed, 0, small);
        assert!(u64::from(fitted * small) > 10 << 20, "{fitted} chunks of {small} bytes");
        // Somebody else takes what is left.
        let filler = bed.disk.open("filler", fs3_io::Access::Buffered).unwrap();
        for i in 0.. {
            if filler.allocate(i * 4096, 4096).is_err() {
                break;
            }
        }
        // Overwrites in place of the full disk are refused or done whole.
        let overwrite = bed.prepare(0, 2, write(4096, vec![9; 4096]));
        assert!(overwrite.is_ok() || code(overwrite) == Some(Code::NoSpace));
        bed.runtime.block_on(bed.store.abort(id(0), UpdateVersion(2))).unwrap();
        for round in 0..2 {
            check(&bed, 0, fitted, small);
            bed.store.audit_for_tests().unwrap();
            if round == 0 {
                bed.disk.kill();
                bed.reopen();
            } else {
                bed.sync().unwrap();
                bed.disk.crash();
                bed.reopen();
            }
        }
        check(&bed, 0, fitted, small);
        remove(&bed, 0, fitted / 2);
        let other = if small == SMALL { CHUNK } else { SMALL };
        let fitted_now = fill(&bed, 1000, other);
        assert!(u64::from(fitted_now * other) > 4 << 20, "{fitted_now} chunks of {other} bytes");
        bed.disk.kill();
        bed.reopen();
        check(&bed, fitted / 2, fitted - fitted / 2, small);
        check(&bed, 1000, fitted_now, other);
        bed.store.audit_for_tests().unwrap();
        assert!(bed.store.failed().is_none());
    }
}

#[test]
fn space_of_blocks_that_stay_free_goes_back_to_the_file_system() {
    let threads = IoThreads::new(1);
    let mut options = options(&threads);
    options.free_bytes_kept = 0;
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let store = TargetStore::open(dir.path(), options.clone()).unwrap();
    let put = |store: &std::sync::Arc<TargetStore>, chunk, version, change| {
        runtime.block_on(store.prepare(update(chunk, version, change))).unwrap();
        runtime.block_on(store.commit(id(chunk), UpdateVersion(version))).unwrap();
    };
    for chunk in 0..64 {
        put(&store, chunk, 1, write(0, pattern(u64::from(chunk), 0, CHUNK)));
    }
    assert!(store.disk_bytes().unwrap() >= 16 << 20);
    (0..60).for_each(|chunk| put(&store, chunk, 2, Change::Remove));
    runtime.block_on(store.sync()).unwrap();
    store.maintain_for_tests().unwrap();
    // An eighth of what is used may be kept.
    let held = store.disk_bytes().unwrap();
    assert!((1 << 20..=(1 << 20) + (128 << 10) + (64 << 10)).contains(&held), "{held}");
    for chunk in 0..8 {
        put(&store, chunk, 3, write(0, pattern(u64::from(chunk) + 5, 0, CHUNK)));
    }
    for (chunk, version) in (0..8).map(|c| (c, c + 5)).chain((60..64).map(|c| (c, c))) {
        options.read_cache.clear();
        let out = runtime.block_on(store.read(id(chunk), 0, CHUNK)).unwrap();
        assert!(bytes_of(&out) == pattern(u64::from(version), 0, CHUNK), "chunk {chunk}");
    }
    store.audit_for_tests().unwrap();
}
