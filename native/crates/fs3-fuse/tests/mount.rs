//! Real mounts through the kernel, of a cluster that is faked in this process. Skipped where FUSE is not to be had.
mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::FakeCluster;
use fs3_core::Code;
use fs3_fuse::{MountHandle, MountOptions, mount};
use fs3_proto::v1::Method;
use tokio::runtime::Runtime;

/// A mounted fake cluster; unmounted when dropped.
struct Bed {
    cluster: FakeCluster,
    mounts: Vec<(MountHandle, tempfile::TempDir)>,
    runtime: Runtime,
    /// Dropped last.
    _alone: MutexGuard<'static, ()>,
}

/// One test at a time: a child process that one of them starts closes its copies of the others' descriptors, and the
/// mounts of the others see that.
static ALONE: Mutex<()> = Mutex::new(());

impl Bed {
    fn new() -> Option<Self> {
        if OpenOptions::new().read(true).write(true).open("/dev/fuse").is_err() {
            eprintln!("skipped: /dev/fuse cannot be opened");
            return None;
        }
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let cluster = runtime.block_on(FakeCluster::start());
        let mut bed = Self { cluster, mounts: Vec::new(), runtime, _alone: alone };
        bed.mount(MountOptions::default());
        Some(bed)
    }

    /// Mount it once more; returns where.
    fn mount(&mut self, options: MountOptions) -> PathBuf {
        let client = self.runtime.block_on(self.cluster.client());
        let dir = tempfile::tempdir().unwrap();
        let handle = mount(client, self.runtime.handle().clone(), dir.path(), options).unwrap();
        let path = dir.path().to_owned();
        self.mounts.push((handle, dir));
        path
    }

    fn path(&self, name: &str) -> PathBuf {
        self.mounts[0].1.path().join(name)
    }

    fn eventually(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !condition(self) {
            assert!(Instant::now() < deadline, "never happened: {what}");
            std::thread::yield_now();
        }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        for (handle, _) in &self.mounts {
            let ended = handle.unmount();
            if !std::thread::panicking() {
                ended.unwrap();
            }
        }
    }
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    (0..len).map(|_| next()).collect()
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn open_rw(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

#[test]
fn files_of_many_sizes_read_back_as_written() {
    let Some(bed) = Bed::new() else { return };
    for (i, len) in [0, 1, 4095, 4096, 65_537, 262_144, 1_048_577, 5_000_003].into_iter().enumerate() {
        let (path, data) = (bed.path(&format!("f{i}")), pattern(len, i as u64 + 1));
        fs::write(&path, &data).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), len as u64);
        assert!(fs::read(&path).unwrap() == data, "{len} bytes");
    }
    assert_eq!(names(&bed.path("")).len(), 8);
}

#[test]
fn a_small_file_costs_one_write_and_no_more_metadata_calls_than_it_needs() {
    let Some(bed) = Bed::new() else { return };
    bed.cluster.take_log();
    let mut file = File::create(bed.path("small")).unwrap();
    for _ in 0..8 {
        file.write_all(&[7; 512]).unwrap();
    }
    drop(file);
    bed.eventually("the release", |bed| bed.cluster.session_count() == 0);
    let log = bed.cluster.take_log();
    assert_eq!(log.writes, vec![(0, 4096)]);
    assert_eq!((log.count(Method::MetaCreate), log.count(Method::MetaClose)), (1, 1));
    assert_eq!((log.count(Method::MetaSync), log.count(Method::MetaOpen)), (0, 0));
}

#[test]
fn files_made_in_one_directory_do_not_ask_for_its_attributes_each_time() {
    let Some(bed) = Bed::new() else { return };
    fs::create_dir(bed.path("d")).unwrap();
    bed.cluster.take_log();
    let began = Instant::now();
    let files = 50;
    for i in 0..files {
        let path = bed.path(&format!("d/{i}"));
        File::create(&path).unwrap();
        let (dir, file) = (fs::metadata(bed.path("d")).unwrap(), fs::metadata(&path).unwrap());
        let time = |m: &fs::Metadata| (m.ctime(), m.ctime_nsec());
        assert!(time(&dir) >= time(&file), "the change shows at once");
        fs::remove_file(&path).unwrap();
    }
    // What is known counts for a second, if nothing happened while it was asked for: far from a question for each file.
    let most = files / 5 + 3 * began.elapsed().as_secs() as usize;
    let asked = bed.cluster.take_log().count(Method::MetaStat);
    assert!(asked <= most, "asked {asked} times");
    fs::set_permissions(bed.path("d"), fs::Permissions::from_mode(0o711)).unwrap();
    File::create(bed.path("d/last")).unwrap();
    assert_eq!(fs::metadata(bed.path("d")).unwrap().mode() & 0o777, 0o711);
}

#[test]
fn close_returns_after_other_mounts_can_see_the_data() {
    let Some(mut bed) = Bed::new() else { return };
    let other = bed.mount(MountOptions::default());
    let mut known = Vec::new();
    for round in 0..20u8 {
        let data = vec![round; 10_000 + usize::from(round) * 777];
        fs::write(bed.path("shared"), &data).unwrap();
        assert!(fs::read(other.join("shared")).unwrap() == data, "round {round}");
        // The other way round, growing the file by appending.
        known.clone_from(&data);
        known.extend_from_slice(b"more");
        let mut file = OpenOptions::new().append(true).open(other.join("shared")).unwrap();
        file.write_all(b"more").unwrap();
        drop(file);
        assert!(fs::read(bed.path("shared")).unwrap() == known, "round {round}, back");
    }
}

#[test]
fn an_unchanged_file_is_read_from_the_page_cache_and_a_changed_one_is_not() {
    let Some(mut bed) = Bed::new() else { return };
    let other = bed.mount(MountOptions::default());
    fs::write(bed.path("f"), pattern(300_000, 3)).unwrap();
    fs::read(other.join("f")).unwrap();
    bed.cluster.take_log();
    fs::read(other.join("f")).unwrap();
    assert_eq!(bed.cluster.take_log().count(Method::StorageRead), 0);
    // The same length, so only the times tell.
    fs::write(bed.path("f"), pattern(300_000, 4)).unwrap();
    assert!(fs::read(other.join("f")).unwrap() == pattern(300_000, 4));
}

#[test]
fn stat_and_reads_see_writes_that_are_not_flushed() {
    let Some(bed) = Bed::new() else { return };
    let writer = open_rw(&bed.path("f"));
    let reader = File::open(bed.path("f")).unwrap();
    writer.write_all_at(b"hello", 0).unwrap();
    assert_eq!(fs::metadata(bed.path("f")).unwrap().len(), 5);
    let mut buf = [0; 5];
    reader.read_exact_at(&mut buf, 0).unwrap();
    assert_eq!(&buf, b"hello");
    writer.write_all_at(b"far", 3_000_000).unwrap();
    assert_eq!(reader.metadata().unwrap().len(), 3_000_003);
    let mut hole = vec![1; 100_000];
    reader.read_exact_at(&mut hole, 1_500_000).unwrap();
    assert!(hole.iter().all(|b| *b == 0));
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(bed.path("f")).unwrap();
    direct.read_exact_at(&mut buf, 0).unwrap();
    assert_eq!(&buf, b"hello");
}

#[test]
fn random_reads_writes_and_truncates_match_a_plain_file() {
    let Some(bed) = Bed::new() else { return };
    let mut model: Vec<u8> = Vec::new();
    let mut files = vec![open_rw(&bed.path("f")), open_rw(&bed.path("f"))];
    files.push(OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(bed.path("f")).unwrap());
    let mut seed = 99u64;
    let mut next = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for round in 0..1500u64 {
        let offset = next(3 << 20);
        let len = if next(8) == 0 { next(400_000) } else { next(9_000) } as usize + 1;
        let file = &files[next(3) as usize];
        match next(10) {
            0..=4 => {
                let data = pattern(len, round);
                file.write_all_at(&data, offset).unwrap();
                model.resize(model.len().max(offset as usize + len), 0);
                model[offset as usize..offset as usize + len].copy_from_slice(&data);
            }
            5..=7 => {
                let mut buf = vec![0xee; len];
                let mut got = 0;
                while got < len {
                    match file.read_at(&mut buf[got..], offset + got as u64).unwrap() {
                        0 => break,
                        n => got += n,
                    }
                }
                let expected = model.get(offset as usize..).unwrap_or_default();
                let expected = &expected[..expected.len().min(len)];
                assert!(&buf[..got] == expected, "round {round}: {len} bytes at {offset}");
            }
            8 => {
                let length = next(3 << 20);
                file.set_len(length).unwrap();
                model.resize(length as usize, 0);
            }
            _ => assert_eq!(file.metadata().unwrap().len(), model.len() as u64, "round {round}"),
        }
    }
    drop(files);
    assert!(fs::read(bed.path("f")).unwrap() == model);
}

/// Says to a test that runs as a program of its own which file to work on.
const CHILD_FILE: &str = "FS3_TEST_FILE";

/// What the test below runs as another process: one that serves a mount must not map files of it, since the kernel
/// holds the process's address space while it writes mapped pages back.
#[test]
#[ignore = "the program of another test"]
fn map_a_file() {
    let path = PathBuf::from(std::env::var_os(CHILD_FILE).expect("run by another test"));
    let file = open_rw(&path);
    file.set_len(1 << 20).unwrap();
    // SAFETY: a fresh shared mapping of an open file.
    let map = unsafe {
        let flags = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), 1 << 20, flags, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    assert_ne!(map, libc::MAP_FAILED);
    // SAFETY: the mapping is that long and lives until the munmap below.
    let bytes = unsafe { std::slice::from_raw_parts_mut(map.cast::<u8>(), 1 << 20) };
    bytes[5000..5005].copy_from_slice(b"mmap!");
    let mut buf = [0; 5];
    file.read_exact_at(&mut buf, 5000).unwrap();
    assert_eq!(&buf, b"mmap!");
    file.write_all_at(b"write", 9000).unwrap();
    assert_eq!(&bytes[9000..9005], b"write");
    // Closed before the map goes: its pages are written when they are unmapped.
    drop(file);
    bytes[700_000] = 42;
    // SAFETY: as mapped; `bytes` is not used afterwards.
    unsafe { libc::munmap(map, 1 << 20) };
}

#[test]
fn shared_memory_maps_are_coherent_with_reads_and_writes() {
    let Some(bed) = Bed::new() else { return };
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "map_a_file", "--ignored", "--nocapture"]).env(CHILD_FILE, bed.path("m"));
    let done = child.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    bed.eventually("the release", |bed| bed.cluster.session_count() == 0);
    let back = fs::read(bed.path("m")).unwrap();
    assert_eq!((&back[5000..5005], &back[9000..9005], back[700_000]), (&b"mmap!"[..], &b"write"[..], 42));
}

#[test]
fn appends_of_several_handles_follow_each_other() {
    let Some(bed) = Bed::new() else { return };
    let open = || OpenOptions::new().append(true).create(true).open(bed.path("log")).unwrap();
    let (mut one, mut two) = (open(), open());
    for _ in 0..200 {
        one.write_all(b"one\n").unwrap();
        two.write_all(b"two\n").unwrap();
    }
    drop((one, two));
    assert_eq!(fs::read_to_string(bed.path("log")).unwrap(), "one\ntwo\n".repeat(200));
}

fn append_to(path: &Path) -> File {
    OpenOptions::new().append(true).create(true).open(path).unwrap()
}

#[test]
fn appends_of_two_mounts_all_land_whole_and_in_order() {
    let Some(mut bed) = Bed::new() else { return };
    let other = bed.mount(MountOptions::default());
    let line = |writer: usize, number: usize| format!("{writer}:{number}:{}\n", "x".repeat(number * 37 % 4999));
    let write = |path: &Path, writer: usize| {
        let mut file = append_to(path);
        for number in 0..200 {
            file.write_all(line(writer, number).as_bytes()).unwrap();
            if number % 50 == writer {
                file.sync_data().unwrap();
            }
        }
    };
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let path = if writer % 2 == 0 { bed.path("log") } else { other.join("log") };
            scope.spawn(move || write(&path, writer));
        }
    });
    let found = fs::read_to_string(bed.path("log")).unwrap();
    let mut next = [0; 4];
    for found in found.split_inclusive('\n') {
        let writer: usize = found[..1].parse().unwrap();
        assert_eq!(found, line(writer, next[writer]));
        next[writer] += 1;
    }
    assert_eq!(next, [200; 4]);
}

#[test]
fn small_appends_ask_for_one_place() {
    let Some(bed) = Bed::new() else { return };
    fs::write(bed.path("log"), b"begin\n").unwrap();
    let mut file = append_to(&bed.path("log"));
    bed.cluster.take_log();
    for _ in 0..500 {
        file.write_all(b"line\n").unwrap();
    }
    assert_eq!(bed.cluster.take_log().count(Method::MetaAppend), 0);
    assert_eq!(fs::metadata(bed.path("log")).unwrap().len(), 2506);
    assert_eq!(fs::read_to_string(bed.path("log")).unwrap(), format!("begin\n{}", "line\n".repeat(500)));
    assert_eq!(bed.cluster.take_log().count(Method::MetaAppend), 1);
}

#[test]
fn what_is_appended_elsewhere_than_the_kernel_believes_is_read_there() {
    let Some(mut bed) = Bed::new() else { return };
    let life = Duration::from_secs(3600);
    let stale = bed.mount(MountOptions { attr_timeout: life, entry_timeout: life, ..MountOptions::default() });
    fs::write(bed.path("f"), vec![b'x'; 5000]).unwrap();
    let reader = File::open(stale.join("f")).unwrap();
    let mut appender = append_to(&stale.join("f"));
    let read = || {
        let mut bytes = [0; 100];
        let n = reader.read_at(&mut bytes, 0).unwrap();
        bytes[..n].to_vec()
    };
    assert_eq!(read(), [b'x'; 100]);
    fs::write(bed.path("f"), b"short").unwrap();
    appender.write_all(b" and more").unwrap();
    appender.sync_data().unwrap();
    bed.eventually("the pages are forgotten", |_| read() == b"short and more");
}

#[test]
fn a_reader_of_the_same_mount_sees_an_append_wherever_it_went() {
    let Some(mut bed) = Bed::new() else { return };
    let other = bed.mount(MountOptions::default()).join("log");
    fs::write(bed.path("log"), b"begin").unwrap();
    // It has a place, but the service does not know yet that it was written.
    let mut theirs = append_to(&other);
    theirs.write_all(&[b't'; 5000]).unwrap();
    assert_eq!(fs::metadata(&other).unwrap().len(), 5005);
    let mut ours = append_to(&bed.path("log"));
    ours.write_all(b"ours").unwrap();
    let found = fs::read(bed.path("log")).unwrap();
    assert_eq!((found.len(), &found[5005..]), (5009, &b"ours"[..]));
}

#[test]
fn a_synchronous_append_is_synced_before_it_returns() {
    let Some(bed) = Bed::new() else { return };
    let mut options = OpenOptions::new();
    let mut file = options.append(true).create(true).custom_flags(libc::O_DSYNC).open(bed.path("log")).unwrap();
    for count in 1..=3 {
        file.write_all(b"line\n").unwrap();
        let log = bed.cluster.state.log.lock();
        assert_eq!((log.count(Method::StorageWrite), log.count(Method::StorageSync)), (count, count));
    }
}

#[test]
fn appends_to_many_files_get_on_with_little_memory() {
    let Some(mut bed) = Bed::new() else { return };
    let small = bed.mount(MountOptions { max_memory_bytes: 1, ..MountOptions::default() });
    let append = |writer: u8| {
        let mut file = append_to(&small.join(format!("f{writer}")));
        for round in 0..100 {
            file.write_all(&vec![writer; 1 + round * 7919 % 300_000]).unwrap();
        }
    };
    std::thread::scope(|scope| (1..=8).for_each(|writer| drop(scope.spawn(move || append(writer)))));
    let expected: usize = (0..100).map(|round| 1 + round * 7919 % 300_000).sum();
    for writer in 1..=8 {
        let found = fs::read(bed.path(&format!("f{writer}"))).unwrap();
        assert!(found.len() == expected && found.iter().all(|byte| *byte == writer), "writer {writer}");
    }
}

const NOT_MAPPED: &str = "the kernel does not map it";

#[test]
fn a_handle_that_appends_can_be_mapped() {
    let Some(bed) = Bed::new() else { return };
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "map_an_appending_file", "--ignored", "--nocapture"]).env(CHILD_FILE, bed.path("m"));
    let done = child.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    if String::from_utf8_lossy(&done.stdout).contains(NOT_MAPPED) {
        return;
    }
    bed.eventually("the release", |bed| bed.cluster.session_count() == 0);
    let back = fs::read(bed.path("m")).unwrap();
    assert_eq!((&back[5000..5005], &back[10_000..], back.len()), (&b"mmap!"[..], &b"more"[..], 10_004));
}

/// What the test above runs as another process.
#[test]
#[ignore = "the program of another test"]
fn map_an_appending_file() {
    let path = PathBuf::from(std::env::var_os(CHILD_FILE).expect("run by another test"));
    fs::write(&path, vec![1; 10_000]).unwrap();
    let mut file = OpenOptions::new().read(true).append(true).open(path).unwrap();
    // SAFETY: a fresh shared mapping of an open file.
    let map = unsafe {
        let flags = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), 10_000, flags, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    if map == libc::MAP_FAILED {
        // Kernels before 6.6 do not map what they do not cache.
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENODEV));
        return println!("{NOT_MAPPED}");
    }
    // SAFETY: the mapping is that long and lives until the munmap below.
    let bytes = unsafe { std::slice::from_raw_parts_mut(map.cast::<u8>(), 10_000) };
    bytes[5000..5005].copy_from_slice(b"mmap!");
    file.write_all(b"more").unwrap();
    // SAFETY: as mapped; `bytes` is not used afterwards.
    assert_eq!(unsafe { libc::msync(map, 10_000, libc::MS_SYNC) }, 0);
    let mut buf = [0; 5];
    file.read_exact_at(&mut buf, 5000).unwrap();
    assert_eq!(&buf, b"mmap!");
    // SAFETY: as above.
    unsafe { libc::munmap(map, 10_000) };
}

#[test]
fn an_unlinked_file_lives_until_its_last_close() {
    let Some(bed) = Bed::new() else { return };
    fs::write(bed.path("gone"), b"still here").unwrap();
    fs::write(bed.path("over"), b"replaced").unwrap();
    bed.eventually("the release", |bed| bed.cluster.session_count() == 0);
    let mut reader = File::open(bed.path("gone")).unwrap();
    let mut replaced = File::open(bed.path("over")).unwrap();
    let writer = OpenOptions::new().write(true).open(bed.path("gone")).unwrap();
    fs::remove_file(bed.path("gone")).unwrap();
    fs::write(bed.path("new"), b"new").unwrap();
    fs::rename(bed.path("new"), bed.path("over")).unwrap();
    writer.write_all_at(b"STILL", 0).unwrap();
    drop(writer);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "STILL here");
    assert_eq!(reader.metadata().unwrap().nlink(), 0);
    text.clear();
    replaced.read_to_string(&mut text).unwrap();
    assert_eq!(text, "replaced");
    assert_eq!(names(&bed.path("")), ["over"]);
    drop((reader, replaced));
    bed.eventually("the inodes are gone", |bed| bed.cluster.inode_count() == 2 && bed.cluster.session_count() == 0);
}

#[test]
fn a_descriptor_shared_by_a_child_works_on_after_the_child_has_closed_it() {
    let Some(bed) = Bed::new() else { return };
    let mut file = File::create(bed.path("out")).unwrap();
    for i in 0..3 {
        writeln!(file, "parent {i}").unwrap();
        let out = file.try_clone().unwrap();
        let status = std::process::Command::new("echo").arg(format!("child {i}")).stdout(out).status().unwrap();
        assert!(status.success());
        if i == 1 {
            // Closed early at the service at this moment; it must live on without its name all the same.
            fs::hard_link(bed.path("out"), bed.path("kept")).unwrap();
            fs::remove_file(bed.path("out")).unwrap();
        }
    }
    file.sync_all().unwrap();
    drop(file);
    let expected = "parent 0\nchild 0\nparent 1\nchild 1\nparent 2\nchild 2\n";
    assert_eq!(fs::read_to_string(bed.path("kept")).unwrap(), expected);
}

#[test]
fn directories_list_every_entry_once_however_large() {
    let Some(bed) = Bed::new() else { return };
    let dir = bed.path("d");
    fs::create_dir(&dir).unwrap();
    let expected: Vec<_> = (0..5000).map(|i| format!("entry-{i:05}")).collect();
    for name in &expected {
        File::create(dir.join(name)).unwrap();
    }
    assert_eq!(names(&dir), expected);
    let mut listed = fs::read_dir(&dir).unwrap();
    for _ in 0..3000 {
        fs::remove_file(listed.next().unwrap().unwrap().path()).unwrap();
    }
    assert_eq!(listed.count(), 2000, "removing what was listed loses none of the rest");
    assert_eq!(fs::remove_dir(&dir).unwrap_err().kind(), ErrorKind::DirectoryNotEmpty);
    fs::remove_dir_all(&dir).unwrap();
    assert!(names(&bed.path("")).is_empty());
}

#[test]
fn names_links_and_attributes_do_what_posix_says() {
    let Some(bed) = Bed::new() else { return };
    fs::create_dir_all(bed.path("a/b")).unwrap();
    fs::write(bed.path("a/b/f"), b"x").unwrap();
    symlink("b/f", bed.path("a/link")).unwrap();
    assert_eq!(fs::read_link(bed.path("a/link")).unwrap(), Path::new("b/f"));
    assert_eq!(fs::read(bed.path("a/link")).unwrap(), b"x");
    assert_eq!(fs::symlink_metadata(bed.path("a/link")).unwrap().len(), 3);
    fs::hard_link(bed.path("a/b/f"), bed.path("g")).unwrap();
    assert_eq!(fs::metadata(bed.path("g")).unwrap().nlink(), 2);
    fs::set_permissions(bed.path("g"), fs::Permissions::from_mode(0o640)).unwrap();
    assert_eq!(fs::metadata(bed.path("a/b/f")).unwrap().mode() & 0o7777, 0o640);
    fs::rename(bed.path("a"), bed.path("z")).unwrap();
    assert_eq!(names(&bed.path("")), ["g", "z"]);
    assert_eq!(File::create_new(bed.path("g")).unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(fs::metadata(bed.path("none")).unwrap_err().kind(), ErrorKind::NotFound);
    let early = std::time::UNIX_EPOCH - Duration::from_millis(1_500);
    let file = open_rw(&bed.path("g"));
    file.write_all_at(b"yy", 0).unwrap();
    file.set_times(fs::FileTimes::new().set_modified(early)).unwrap();
    drop(file);
    assert_eq!(fs::metadata(bed.path("g")).unwrap().modified().unwrap(), early, "closing does not touch the time");
    assert!(fs::metadata(bed.path("")).unwrap().is_dir());
}

/// Where `lseek` finds data or a hole.
fn seek(file: &File, offset: i64, whence: i32) -> i64 {
    // SAFETY: a plain system call on an open descriptor.
    unsafe { libc::lseek(file.as_raw_fd(), offset, whence) }
}

#[test]
fn holes_of_a_sparse_file_are_found() {
    let Some(bed) = Bed::new() else { return };
    let file = open_rw(&bed.path("s"));
    let chunk = i64::from(common::CHUNK);
    file.write_all_at(b"middle", 5 * chunk as u64).unwrap();
    file.set_len(9 * chunk as u64).unwrap();
    // Of data that is still in the daemon, too.
    file.write_all_at(b"late", 7 * chunk as u64).unwrap();
    assert_eq!(seek(&file, 10, libc::SEEK_HOLE), 10);
    assert_eq!(seek(&file, 10, libc::SEEK_DATA), 5 * chunk);
    assert_eq!(seek(&file, 5 * chunk, libc::SEEK_HOLE), 5 * chunk + 6);
    assert_eq!(seek(&file, 5 * chunk + 6, libc::SEEK_DATA), 7 * chunk);
    assert_eq!(seek(&file, 8 * chunk, libc::SEEK_DATA), -1);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENXIO));
    assert_eq!(seek(&file, 8 * chunk, libc::SEEK_HOLE), 8 * chunk);
    assert_eq!(seek(&file, 9 * chunk, libc::SEEK_HOLE), -1);
}

#[test]
fn copies_are_made_in_the_daemon_and_keep_holes() {
    let Some(bed) = Bed::new() else { return };
    let source = open_rw(&bed.path("s"));
    let chunk = u64::from(common::CHUNK);
    let data: Vec<u8> = (0..3 * chunk as usize + 77).map(|i| (i % 251) as u8).collect();
    source.write_all_at(&data, 4 * chunk + 1).unwrap();
    source.set_len(20 * chunk).unwrap();
    let target = open_rw(&bed.path("t"));
    target.write_all_at(&vec![9; 6 * chunk as usize], 0).unwrap();
    let (mut from, mut to, mut left) = (0, 0, 20 * chunk as usize);
    while left > 0 {
        // SAFETY: both positions live through the call.
        let copied =
            unsafe { libc::copy_file_range(source.as_raw_fd(), &mut from, target.as_raw_fd(), &mut to, left, 0) };
        assert!(copied > 0, "{}", std::io::Error::last_os_error());
        left -= copied as usize;
    }
    let mut seen = vec![0; 20 * chunk as usize];
    target.read_exact_at(&mut seen, 0).unwrap();
    let end = 4 * chunk as usize + 1 + data.len();
    assert!(seen[..4 * chunk as usize + 1].iter().chain(&seen[end..]).all(|byte| *byte == 0));
    assert!(seen[4 * chunk as usize + 1..end] == data);
    assert_eq!(target.metadata().unwrap().len(), 20 * chunk);
    assert_eq!(seek(&target, end as i64 + 1, libc::SEEK_DATA), -1, "the end stayed a hole");
}

#[test]
fn a_failed_background_write_is_told_by_close_or_sync_once() {
    let Some(bed) = Bed::new() else { return };
    let file = open_rw(&bed.path("f"));
    *bed.cluster.state.write_error.lock() = Some(Code::NoSpace);
    file.write_all_at(b"lost", 0).unwrap();
    assert_eq!(file.sync_all().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    *bed.cluster.state.write_error.lock() = None;
    file.sync_all().unwrap();
    file.write_all_at(b"kept", 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    assert_eq!(fs::read(bed.path("f")).unwrap(), b"kept");
}

#[test]
fn a_failure_that_a_short_write_or_a_closed_copy_swallowed_is_told_by_sync() {
    let Some(bed) = Bed::new() else { return };
    for copied in [false, true] {
        let file = open_rw(&bed.path("f"));
        *bed.cluster.state.write_error.lock() = Some(Code::NoSpace);
        file.write_all_at(b"lost", 0).unwrap();
        if copied {
            let copy = file.try_clone().unwrap().into_raw_fd();
            // SAFETY: the descriptor is nobody else's.
            assert_eq!(unsafe { libc::close(copy) }, -1);
            assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOSPC));
        } else {
            // Written by two requests; the failure may meet the second, and the caller then sees a short write.
            let two_pages = [7; 8000];
            let fails = || file.write_at(&two_pages, 2000).map_or(true, |n| n < two_pages.len());
            bed.eventually("a write tells of the failure", |_| fails());
        }
        *bed.cluster.state.write_error.lock() = None;
        assert_eq!(file.sync_all().unwrap_err().raw_os_error(), Some(libc::ENOSPC), "copied: {copied}");
        file.sync_all().unwrap();
    }
}

#[test]
fn a_file_goes_on_while_children_close_their_copies_of_its_descriptor() {
    let Some(bed) = Bed::new() else { return };
    for round in 0..100u64 {
        let mut file = open_rw(&bed.path(&format!("f{round}")));
        // Starting a program closes the child's copies, each with a FLUSH of its own.
        let child = std::thread::spawn(|| std::process::Command::new("true").status());
        for number in 0..20u64 {
            file.write_all_at(&number.to_le_bytes(), 8 * number).unwrap();
            file.sync_data().unwrap();
            assert_eq!(file.metadata().unwrap().len(), 8 * (number + 1));
        }
        file.set_len(80).unwrap();
        let mut all = Vec::new();
        file.read_to_end(&mut all).unwrap();
        assert_eq!(all, (0..10u64).flat_map(u64::to_le_bytes).collect::<Vec<_>>());
        assert!(child.join().unwrap().unwrap().success());
    }
}

#[test]
fn fcntl_locks_exclude_each_other_on_one_mount() {
    let Some(bed) = Bed::new() else { return };
    let (one, two) = (open_rw(&bed.path("l")), open_rw(&bed.path("l")));
    one.lock().unwrap();
    assert!(two.try_lock().is_err());
    one.unlock().unwrap();
    two.try_lock().unwrap();
}

#[test]
fn a_read_only_mount_refuses_changes() {
    let Some(mut bed) = Bed::new() else { return };
    fs::write(bed.path("f"), b"x").unwrap();
    let other = bed.mount(MountOptions { read_only: true, ..Default::default() });
    assert_eq!(fs::read(other.join("f")).unwrap(), b"x");
    assert_eq!(fs::write(other.join("g"), b"x").unwrap_err().raw_os_error(), Some(libc::EROFS));
}

#[test]
fn unmounting_writes_what_is_open_and_the_mount_is_gone() {
    let Some(bed) = Bed::new() else { return };
    let data = pattern(3_000_000, 5);
    let mut file = File::create(bed.path("f")).unwrap();
    file.write_all(&data).unwrap();
    let handle = &bed.mounts[0].0;
    std::thread::scope(|scope| {
        let ending = scope.spawn(|| handle.unmount());
        // Taken out of the name space at once; the open file keeps it alive until it is closed.
        bed.eventually("the mountpoint is empty", |bed| names(&bed.path("")).is_empty());
        drop(file);
        ending.join().unwrap().unwrap();
    });
    let mut bed = bed;
    let again = bed.mount(MountOptions::default());
    assert!(fs::read(again.join("f")).unwrap() == data);
}

#[test]
fn memory_stays_bounded_while_several_writers_stream() {
    let Some(mut bed) = Bed::new() else { return };
    let dir = bed.mount(MountOptions { max_memory_bytes: 16 << 20, ..Default::default() });
    std::thread::scope(|scope| {
        for i in 0..4u64 {
            let path = dir.join(format!("w{i}"));
            scope.spawn(move || {
                let data = pattern(1 << 20, i + 1);
                let mut file = File::create(&path).unwrap();
                for _ in 0..24 {
                    file.write_all(&data).unwrap();
                }
                drop(file);
                let back = fs::read(&path).unwrap();
                assert!(back.len() == 24 << 20 && back.chunks(1 << 20).all(|part| part == data));
            });
        }
    });
}

/// Extended attributes by system calls: the value or names, or the errno.
mod xattr {
    use std::ffi::CString;
    use std::io::Error;
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    fn c(text: &[u8]) -> CString {
        CString::new(text).unwrap()
    }

    fn checked(length: isize) -> Result<usize, i32> {
        usize::try_from(length).map_err(|_| Error::last_os_error().raw_os_error().unwrap())
    }

    pub fn get(path: &Path, name: &str, room: usize) -> Result<Vec<u8>, i32> {
        let (path, name, mut value) = (c(path.as_os_str().as_bytes()), c(name.as_bytes()), vec![0u8; room]);
        // SAFETY: the strings end in zeros and `value` has `room` bytes.
        let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), room) };
        value.resize(checked(length)?, 0);
        Ok(value)
    }

    pub fn set(path: &Path, name: &str, value: &[u8], flags: i32) -> Result<(), i32> {
        let (path, name) = (c(path.as_os_str().as_bytes()), c(name.as_bytes()));
        // SAFETY: the strings end in zeros and `value` has its length.
        let result = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) };
        checked(result as isize).map(drop)
    }

    pub fn list(path: &Path, room: usize) -> Result<Vec<u8>, i32> {
        let (path, mut names) = (c(path.as_os_str().as_bytes()), vec![0u8; room]);
        // SAFETY: the path ends in a zero and `names` has `room` bytes.
        let length = unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), room) };
        names.resize(checked(length)?, 0);
        Ok(names)
    }

    pub fn remove(path: &Path, name: &str) -> Result<(), i32> {
        let (path, name) = (c(path.as_os_str().as_bytes()), c(name.as_bytes()));
        // SAFETY: both strings end in zeros.
        checked(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) } as isize).map(drop)
    }
}

#[test]
fn extended_attributes_are_kept_with_the_errnos_of_linux() {
    let Some(bed) = Bed::new() else { return };
    let path = bed.path("f");
    fs::write(&path, b"data").unwrap();
    assert_eq!(xattr::get(&path, "user.a", 10), Err(libc::ENODATA));
    assert_eq!(xattr::list(&path, 10), Ok(vec![]));
    assert_eq!(xattr::set(&path, "user.a", b"1", libc::XATTR_REPLACE), Err(libc::ENODATA));
    xattr::set(&path, "user.a", b"value", libc::XATTR_CREATE).unwrap();
    assert_eq!(xattr::set(&path, "user.a", b"1", libc::XATTR_CREATE), Err(libc::EEXIST));
    xattr::set(&path, "user.b", b"", 0).unwrap();
    assert_eq!(xattr::get(&path, "user.a", 10), Ok(b"value".to_vec()));
    assert_eq!(xattr::get(&path, "user.a", 0).map(|v| v.len()), Ok(5));
    assert_eq!(xattr::get(&path, "user.a", 4), Err(libc::ERANGE));
    assert_eq!(xattr::get(&path, "user.b", 10), Ok(vec![]));
    assert_eq!(xattr::list(&path, 100), Ok(b"user.a\0user.b\0".to_vec()));
    assert_eq!(xattr::list(&path, 0).map(|v| v.len()), Ok(14));
    assert_eq!(xattr::list(&path, 13), Err(libc::ERANGE));
    assert_eq!(xattr::set(&path, "unknown.a", b"1", 0), Err(libc::EOPNOTSUPP));
    xattr::remove(&path, "user.a").unwrap();
    assert_eq!(xattr::remove(&path, "user.a"), Err(libc::ENODATA));
    assert_eq!(xattr::list(&path, 100), Ok(b"user.b\0".to_vec()));
}

#[test]
fn nobody_is_asked_for_attributes_that_are_not_there() {
    let Some(bed) = Bed::new() else { return };
    let path = bed.path("f");
    fs::write(&path, b"data").unwrap();
    let asked = |bed: &Bed| {
        let log = bed.cluster.state.log.lock();
        log.count(Method::MetaGetxattr) + log.count(Method::MetaListxattr)
    };
    for name in ["security.capability", "security.selinux", "system.posix_acl_access", "user.a"] {
        assert_eq!(xattr::get(&path, name, 10), Err(libc::ENODATA));
    }
    xattr::list(&path, 10).unwrap();
    assert_eq!(asked(&bed), 0);
    // What is there does not make writes slower.
    xattr::set(&path, "user.a", b"1", 0).unwrap();
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    (0..100).for_each(|_| file.write_all(b"more").unwrap());
    assert_eq!(xattr::get(&path, "security.capability", 10), Err(libc::ENODATA));
    assert_eq!(asked(&bed), 0);
    assert_eq!(xattr::get(&path, "user.a", 10), Ok(b"1".to_vec()));
    assert_eq!(asked(&bed), 1);
}
