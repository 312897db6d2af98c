use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use fs3_client::{Attr, Code, ContentVersion, Error, Region, RegionMut, Result};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::inode::{Accepted, Inode, Place};
use crate::io::{FileIo, Io};
use crate::told::Teller;

/// A file in memory whose writes wait for permits, fail on demand and are counted.
struct Fake {
    bytes: Mutex<Vec<u8>>,
    permits: Semaphore,
    /// Reservations wait for these, and begin where nobody has reserved yet.
    places: Semaphore,
    reserved_end: AtomicU64,
    reservations: AtomicUsize,
    failing: AtomicBool,
    panicking: AtomicBool,
    writes: AtomicUsize,
    published: AtomicUsize,
    closed: AtomicBool,
    /// What the service answers of the versions of the content.
    steps: Mutex<Vec<(ContentVersion, ContentVersion)>>,
    /// What it may become without asking, and what it gets when it asks.
    limit: AtomicU64,
    room: AtomicU64,
}

impl Fake {
    fn new(permits: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::default(),
            permits: Semaphore::new(permits),
            places: Semaphore::new(100),
            reserved_end: AtomicU64::new(0),
            reservations: AtomicUsize::new(0),
            failing: AtomicBool::new(false),
            panicking: AtomicBool::new(false),
            writes: AtomicUsize::new(0),
            published: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            steps: Mutex::default(),
            limit: AtomicU64::new(u64::MAX),
            room: AtomicU64::new(u64::MAX),
        })
    }
}

impl FileIo for Fake {
    async fn read(&self, offset: u64, mut buf: RegionMut) -> (Result<usize>, RegionMut) {
        let bytes = self.bytes.lock();
        let rest = bytes.get(offset as usize..).unwrap_or_default();
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        (Ok(n), buf)
    }

    async fn write(&self, offset: u64, data: Region) -> Result<usize> {
        self.permits.acquire().await.expect("never closed").forget();
        self.writes.fetch_add(1, Ordering::Relaxed);
        assert!(!self.panicking.load(Ordering::Relaxed), "a fault of the program");
        if self.failing.load(Ordering::Relaxed) {
            return Err(Error::new(Code::NoSpace, "full"));
        }
        let mut bytes = self.bytes.lock();
        let end = offset as usize + data.len();
        let len = bytes.len().max(end);
        bytes.resize(len, 0);
        bytes[offset as usize..end].copy_from_slice(&data);
        Ok(data.len())
    }

    async fn reserve(&self, bytes: u64) -> Result<u64> {
        self.places.acquire().await.expect("never closed").forget();
        self.reservations.fetch_add(1, Ordering::Relaxed);
        assert!(!self.panicking.load(Ordering::Relaxed), "a fault of the program");
        if self.reserved_end.load(Ordering::Relaxed) == u64::MAX {
            return Err(Error::new(Code::QuotaExceeded, "full"));
        }
        let offset = self.length().max(self.reserved_end.load(Ordering::Relaxed));
        self.reserved_end.store(offset + bytes, Ordering::Relaxed);
        Ok(offset)
    }

    async fn publish(&self) -> Result<Attr> {
        self.published.fetch_add(1, Ordering::Relaxed);
        Ok(Attr { length: self.length(), ..Attr::default() })
    }

    async fn close(&self) -> Result<Attr> {
        self.closed.store(true, Ordering::Relaxed);
        self.publish().await
    }

    fn take_steps(&self) -> Vec<(ContentVersion, ContentVersion)> {
        std::mem::take(&mut self.steps.lock())
    }

    fn length(&self) -> u64 {
        self.bytes.lock().len() as u64
    }

    fn length_limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    async fn require_room(&self, end: u64) -> Result<()> {
        if end > self.room.load(Ordering::Relaxed) {
            return Err(Error::new(Code::QuotaExceeded, "full"));
        }
        self.limit.store(end, Ordering::Relaxed);
        Ok(())
    }
}

fn setup(permits: usize) -> (Arc<Io<Fake>>, Arc<Inode<Fake>>, Arc<Fake>) {
    let io = Arc::new(Io::new(tokio::runtime::Handle::current(), 64 << 20));
    let (inode, file) = (Arc::new(Inode::new(7)), Fake::new(permits));
    inode.add_writer(file.clone());
    (io, inode, file)
}

/// To the end of the file; the kernel knows nothing better than that it is empty.
const END: Place = Place::End { believed: 0 };

fn put(inode: &Arc<Inode<Fake>>, io: &Arc<Io<Fake>>, place: Place, data: &[u8]) {
    match inode.write(io, place, data) {
        Accepted::Taken(bytes) if bytes == data.len() => {}
        _ => panic!("the write was not taken"),
    }
}

fn shown_length(inode: &Arc<Inode<Fake>>, file: &Fake) -> u64 {
    let mut attr = Attr { length: file.length(), ..Attr::default() };
    inode.merge(&mut attr);
    attr.length
}

#[tokio::test]
async fn small_writes_stay_here_until_a_flush_and_then_go_as_one() {
    let (io, inode, file) = setup(100);
    for i in 0..100u64 {
        put(&inode, &io, Place::At(i * 10), &[i as u8; 10]);
    }
    assert_eq!((file.writes.load(Ordering::Relaxed), inode.length(&file)), (0, 1000));
    let mut attr = Attr { length: 5, mtime_ns: 1, ..Attr::default() };
    inode.merge(&mut attr);
    assert!(attr.length == 1000 && attr.mtime_ns > 1, "stat sees what was written");
    inode.flush(&io).await;
    inode.publish(None, false).await.unwrap();
    assert_eq!((file.writes.load(Ordering::Relaxed), file.published.load(Ordering::Relaxed)), (1, 1));
    assert_eq!(file.bytes.lock()[990..], [99; 10]);
    assert!(!inode.is_dirty() && io.aged(Duration::ZERO).is_empty());
    assert_eq!(inode.publish(None, false).await.unwrap().map(|a| a.length), None, "nothing is published twice");
}

#[tokio::test]
async fn overlapping_writes_land_in_the_order_they_were_accepted() {
    let (io, inode, file) = setup(0);
    for round in 1..=20u8 {
        put(&inode, &io, Place::At(u64::from(round)), &[round; 50]);
        inode.send_all(&io);
    }
    file.permits.add_permits(100);
    inode.flush(&io).await;
    let mut expected = vec![0u8; 70];
    for round in 1..=20usize {
        expected[round..round + 50].fill(round as u8);
    }
    assert_eq!(*file.bytes.lock(), expected);
}

#[tokio::test]
async fn a_read_waits_for_the_writes_it_overlaps_and_no_others() {
    let (io, inode, file) = setup(1);
    file.bytes.lock().resize(4 << 20, 0);
    put(&inode, &io, Place::At(0), &[1; 10]);
    inode.settle(&io, 2 << 20, 3 << 20).await;
    assert_eq!(file.writes.load(Ordering::Relaxed), 0, "a read elsewhere leaves the data where it is");
    inode.settle(&io, 5, 6).await;
    assert_eq!((file.writes.load(Ordering::Relaxed), file.bytes.lock()[5]), (1, 1));
    put(&inode, &io, Place::At(0), &[2; 10]);
    let stuck = tokio::time::timeout(Duration::from_millis(10), inode.settle(&io, 5, 6)).await;
    assert!(stuck.is_err(), "without a permit the write has not landed");
    file.permits.add_permits(1);
    inode.settle(&io, 5, 6).await;
    assert_eq!(file.bytes.lock()[5], 2);
}

#[tokio::test]
async fn a_read_before_data_beyond_the_stored_end_sees_the_hole() {
    let (io, inode, file) = setup(10);
    put(&inode, &io, Place::At(1000), &[1; 10]);
    inode.settle(&io, 100, 200).await;
    assert_eq!(file.length(), 1010);
}

#[tokio::test]
async fn kept_bytes_are_read_without_storage() {
    let (io, inode, file) = setup(0);
    put(&inode, &io, Place::At(100), b"hello");
    let mut seen = Vec::new();
    assert!(inode.read_kept(101, 3, |b| seen = b.to_vec()));
    assert_eq!(seen, b"ell");
    assert!(!inode.read_kept(99, 3, |_| ()) && !inode.read_kept(103, 3, |_| ()));
    assert_eq!(file.writes.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn appends_stay_here_until_a_flush_and_then_get_one_place() {
    let (io, inode, file) = setup(10);
    file.bytes.lock().resize(100, 0);
    put(&inode, &io, END, b"abc");
    put(&inode, &io, END, b"def");
    assert_eq!((file.reservations.load(Ordering::Relaxed), shown_length(&inode, &file)), (0, 106));
    assert!(inode.is_dirty() && inode.keeps_data() && !inode.park(&file));
    inode.flush(&io).await;
    assert_eq!((file.reservations.load(Ordering::Relaxed), file.writes.load(Ordering::Relaxed)), (1, 1));
    assert_eq!(file.bytes.lock()[100..], *b"abcdef");
    inode.publish(None, false).await.unwrap();
    assert!(!inode.is_dirty() && shown_length(&inode, &file) == 106);
}

#[tokio::test]
async fn appends_go_where_others_left_room_and_keep_their_order() {
    let (io, inode, file) = setup(100);
    file.places.forget_permits(100);
    put(&inode, &io, END, b"first");
    inode.send_all(&io);
    put(&inode, &io, END, b"second");
    inode.send_all(&io);
    put(&inode, &io, END, b"third");
    assert_eq!(shown_length(&inode, &file), 16);
    file.reserved_end.store(10, Ordering::Relaxed);
    file.places.add_permits(1);
    inode.settle(&io, 0, 0).await;
    file.places.add_permits(10);
    inode.flush(&io).await;
    assert_eq!((&file.bytes.lock()[10..], file.reservations.load(Ordering::Relaxed)), (&b"firstsecondthird"[..], 2));
}

#[tokio::test]
async fn a_flush_waits_for_the_appends_before_it_and_may_be_given_up() {
    let (io, inode, file) = setup(100);
    file.places.forget_permits(100);
    put(&inode, &io, END, b"one");
    let stuck = tokio::time::timeout(Duration::from_millis(10), inode.flush(&io)).await;
    assert!(stuck.is_err(), "without an answer of the service there is no place");
    put(&inode, &io, END, b"two");
    file.places.add_permits(100);
    inode.flush(&io).await;
    assert_eq!(file.bytes.lock()[..], *b"onetwo");
}

#[tokio::test]
async fn what_was_written_to_a_position_before_counts_and_after_waits() {
    let (io, inode, file) = setup(0);
    put(&inode, &io, Place::At(0), b"12345");
    put(&inode, &io, END, b"678");
    assert!(matches!(inode.write(&io, Place::At(5), b"x"), Accepted::Unplaced));
    let stuck = tokio::time::timeout(Duration::from_millis(10), inode.place(&io)).await;
    assert!(stuck.is_err() && file.reservations.load(Ordering::Relaxed) == 0, "the write has not landed");
    file.permits.add_permits(10);
    inode.place(&io).await;
    put(&inode, &io, Place::At(6), b"x");
    inode.flush(&io).await;
    assert_eq!(file.bytes.lock()[..], *b"123456x8");
}

#[tokio::test]
async fn a_read_finds_out_where_appends_are_only_if_it_may_meet_them() {
    let (io, inode, file) = setup(10);
    file.bytes.lock().resize(100, 7);
    put(&inode, &io, END, b"abc");
    inode.settle(&io, 20, 100).await;
    assert_eq!(file.reservations.load(Ordering::Relaxed), 0);
    inode.settle(&io, 20, 101).await;
    assert_eq!(file.bytes.lock()[99..], *b"\x07abc");
}

#[tokio::test]
async fn an_append_that_finds_no_place_is_told_and_the_next_ones_go_on() {
    let (io, inode, file) = setup(10);
    let told = inode.told();
    file.reserved_end.store(u64::MAX, Ordering::Relaxed);
    put(&inode, &io, END, b"lost");
    inode.flush(&io).await;
    assert_eq!(inode.new_error(&told, Teller::Sync).map(|e| e.code), Some(Code::QuotaExceeded));
    assert_eq!((shown_length(&inode, &file), io.write_pool.used()), (0, 0));
    file.reserved_end.store(0, Ordering::Relaxed);
    put(&inode, &io, END, b"kept");
    inode.flush(&io).await;
    assert_eq!(file.bytes.lock()[..], *b"kept");
}

#[tokio::test]
async fn a_stream_of_appends_is_written_in_large_pieces_without_being_asked() {
    let (io, inode, file) = setup(1000);
    let data = vec![5; 100_000];
    for _ in 0..100 {
        put(&inode, &io, END, &data);
        tokio::task::yield_now().await;
    }
    inode.flush(&io).await;
    assert_eq!(file.length(), 10_000_000);
    assert!(file.bytes.lock().iter().all(|byte| *byte == 5));
    let writes = file.writes.load(Ordering::Relaxed);
    assert!(writes <= 20 && file.reservations.load(Ordering::Relaxed) <= writes, "{writes} writes");
}

#[tokio::test]
async fn a_failed_write_is_told_once_to_every_handle_that_was_open() {
    let (io, inode, file) = setup(10);
    let (first, second) = (inode.told(), inode.told());
    file.failing.store(true, Ordering::Relaxed);
    put(&inode, &io, Place::At(0), b"lost");
    inode.flush(&io).await;
    assert_eq!(inode.new_error(&first, Teller::Sync).map(|e| e.code), Some(Code::NoSpace));
    for teller in [Teller::Write, Teller::Close, Teller::Sync] {
        assert!(inode.new_error(&first, teller).is_none(), "{teller:?}");
    }
    assert_eq!(inode.new_error(&second, Teller::Sync).map(|e| e.code), Some(Code::NoSpace));
    assert!(inode.new_error(&inode.told(), Teller::Sync).is_none(), "a later handle has nothing to do with it");
}

#[tokio::test]
async fn who_waits_for_a_write_whose_task_broke_off_is_told_so() {
    let (io, inode, file) = setup(10);
    let told = inode.told();
    file.panicking.store(true, Ordering::Relaxed);
    for place in [Place::At(0), END] {
        put(&inode, &io, place, b"lost");
        tokio::time::timeout(Duration::from_secs(20), inode.flush(&io)).await.expect("a flush that ends");
        assert_eq!(inode.new_error(&told, Teller::Sync).map(|e| e.code), Some(Code::Internal), "{place:?}");
    }
    file.panicking.store(false, Ordering::Relaxed);
    put(&inode, &io, END, b"kept");
    inode.flush(&io).await;
    assert_eq!(file.bytes.lock()[..], *b"kept");
}

#[tokio::test]
async fn a_failure_that_a_write_or_a_close_told_is_told_by_the_sync_after_it() {
    let (io, inode, file) = setup(10);
    let told = inode.told();
    file.failing.store(true, Ordering::Relaxed);
    put(&inode, &io, Place::At(0), b"lost");
    inode.flush(&io).await;
    for teller in [Teller::Write, Teller::Close, Teller::Sync] {
        assert_eq!(inode.new_error(&told, teller).map(|e| e.code), Some(Code::NoSpace), "{teller:?}");
        assert!(inode.new_error(&told, teller).is_none(), "{teller:?} once");
    }
}

#[tokio::test]
async fn a_write_beyond_the_limit_is_taken_once_there_is_room() {
    let (io, inode, file) = setup(10);
    file.limit.store(4, Ordering::Relaxed);
    file.room.store(8, Ordering::Relaxed);
    put(&inode, &io, Place::At(0), b"1234");
    assert!(matches!(inode.write(&io, END, b"5"), Accepted::Full));
    assert_eq!(file.length(), 0, "it is kept here");
    inode.require_room(&io, END, 4).await.unwrap();
    assert_eq!(file.length(), 4, "what was accepted is written, and counted, before more is granted");
    put(&inode, &io, END, b"5678");
    assert!(matches!(inode.write(&io, Place::At(2), b"overlong"), Accepted::Full));
    assert_eq!(inode.require_room(&io, Place::At(2), 8).await.unwrap_err().code, Code::QuotaExceeded);
    inode.place(&io).await;
    put(&inode, &io, Place::At(0), b"abcd");
    inode.flush(&io).await;
    assert_eq!(file.bytes.lock()[..], *b"abcd5678");
}

#[tokio::test]
async fn only_a_lone_writer_with_everything_written_is_parked() {
    let (io, inode, file) = setup(10);
    put(&inode, &io, Place::At(0), b"x");
    assert!(!inode.park(&file), "data is pending");
    inode.flush(&io).await;
    let other = Fake::new(1);
    inode.add_writer(other.clone());
    assert!(!inode.park(&file), "another one writes");
    inode.remove_writer(&other);
    assert!(inode.park(&file));
    assert!(matches!(inode.write(&io, Place::At(0), b"y"), Accepted::NoWriter));
    inode.publish(Some(&file), true).await.unwrap();
    assert!(file.closed.load(Ordering::Relaxed) && !inode.is_dirty());
    inode.add_writer(file.clone());
    inode.set_unlinked();
    assert!(!inode.park(&file), "closing it would end a file without a name");
}

#[tokio::test]
async fn caches_are_kept_only_for_a_version_that_nobody_changed() {
    let (io, inode, file) = setup(10);
    let version = |length| ContentVersion { length, ..Default::default() };
    assert!(!inode.keep_cache(version(1)), "nothing is known yet");
    assert!(inode.keep_cache(version(1)));
    assert!(!inode.keep_cache(version(2)), "somebody else wrote");
    put(&inode, &io, Place::At(0), b"x");
    assert!(!inode.keep_cache(version(2)), "what we hold cannot be told apart");
    inode.flush(&io).await;
    inode.publish(None, false).await.unwrap();
    assert!(!inode.keep_cache(version(3)) && inode.keep_cache(version(3)));
    inode.truncated();
    assert!(!inode.keep_cache(version(3)));

    let written = async |steps: &[(u64, u64)]| {
        put(&inode, &io, Place::At(0), b"y");
        inode.flush(&io).await;
        file.steps.lock().extend(steps.iter().map(|&(before, after)| (version(before), version(after))));
        inode.publish(None, false).await.unwrap();
    };
    written(&[(3, 4), (4, 5)]).await;
    assert!(inode.keep_cache(version(5)), "this mount alone wrote");
    written(&[(6, 7)]).await;
    assert!(!inode.keep_cache(version(7)), "somebody else wrote before the report");
    file.failing.store(true, Ordering::Relaxed);
    written(&[(7, 8)]).await;
    assert!(!inode.keep_cache(version(8)), "the kernel has bytes that storage has not");
}

#[tokio::test]
async fn memory_held_by_an_idle_file_is_reclaimed_for_another() {
    let io = Arc::new(Io::new(tokio::runtime::Handle::current(), 8 << 20));
    let idle: Vec<_> = (0..4u64)
        .map(|id| {
            let (inode, file) = (Arc::new(Inode::new(id)), Fake::new(10));
            inode.add_writer(file);
            put(&inode, &io, if id % 2 == 0 { END } else { Place::At(500_000) }, &[b'w'; 100_000]);
            inode
        })
        .collect();
    assert!(io.write_pool.try_take(1 << 20, 0).is_none());
    let buffer = io.write_pool.take(1 << 20, || io.reclaim()).await.unwrap();
    drop(buffer);
    assert!(!idle[0].keeps_data() && idle[3].keeps_data(), "the one that was dirty first gives way");
}

#[tokio::test]
async fn blocks_read_ahead_are_dropped_by_a_write_and_by_being_read() {
    let (io, inode, file) = setup(10);
    file.bytes.lock().resize(3 << 20, 9);
    let fetch = |number| {
        let buffer = io.read_pool.try_take(1 << 20, 0).unwrap();
        inode.blocks.fetch(&io.runtime, &file, number, buffer)
    };
    let block = fetch(1);
    assert_eq!(block.read((1 << 20) + 5, 10).await.unwrap()[..], [9; 10]);
    assert!(inode.blocks.get(1).is_some());
    inode.blocks.consumed(&block, 1 << 20);
    assert!(inode.blocks.get(1).is_none());
    fetch(2);
    put(&inode, &io, Place::At(0), &[1]);
    assert!(inode.blocks.get(2).is_some());
    put(&inode, &io, Place::At((3 << 20) - 1), &[1]);
    assert!(inode.blocks.get(2).is_none());
    assert_eq!(inode.settled(0, 1), None);
    assert_eq!(inode.settled(10, 20), Some(2));
    assert!(fetch(7).read(7 << 20, 1).await.is_none(), "there is nothing behind the end");
}
