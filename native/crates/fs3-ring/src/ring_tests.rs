//! Both sides of a ring in one process, the application's honest or hostile.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::app::{Done, Ring};
use crate::daemon::{Iov, Served};
use crate::guard::Guarded;
use crate::layout::{Config, Header, MAGIC, Places, Submission, VERSION};
use crate::testing::shm;
use crate::{Errno, Memory};

const CONFIG: Config = Config { for_read: true, io_depth: 0, priority: 0, timeout_ms: 0, flags: 0 };

/// A ring's memory as an application has it, and the daemon's side of it.
struct Both {
    app: Memory,
    served: Arc<Served>,
    places: Places,
}

impl Both {
    /// What another daemon makes of it that goes on with the ring.
    fn successor(&self, told: u64, closed: bool) -> Arc<Served> {
        let shared = self.served.memory().share().unwrap();
        let memory = Guarded::new(Memory::inherited(shared, self.served.memory().bytes()).unwrap()).unwrap();
        Arc::new(Served::succeeding(memory, self.places, told, closed).unwrap())
    }

    fn new(entries: u32) -> Self {
        let places = Places::new(entries).unwrap();
        let (path, app) = shm(places.bytes());
        let other = Guarded::new(Memory::open(&path, places.bytes()).unwrap()).unwrap();
        std::fs::remove_file(path).unwrap();
        let both = |served| Self { app, served: Arc::new(served), places };
        // SAFETY: mapped and aligned.
        let header = unsafe { &*other.start().cast::<Header>() };
        header.version.store(VERSION, Ordering::Relaxed);
        header.entries.store(entries, Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Relaxed);
        both(Served::new(other, places).unwrap())
    }

    fn header(&self) -> &Header {
        // SAFETY: mapped and aligned.
        unsafe { &*self.app.start().cast::<Header>() }
    }

    /// Write submission `number` with `token`, without telling.
    fn write(&self, number: u64, token: u64) {
        let at = self.app.start().wrapping_add(self.places.submission(number)).cast::<Submission>();
        // SAFETY: in the mapping and aligned.
        unsafe { at.write(Submission { token, ..Submission::default() }) };
    }

    fn tell(&self, prepared: u64) {
        self.header().prepared.store(prepared, Ordering::Release);
    }

    fn take(&self, config: &Config) -> Vec<(u64, u64)> {
        let taken = self.served.take(config).unwrap().unwrap();
        taken.iter().map(|t| (t.number, t.submission.token)).collect()
    }
}

#[test]
fn what_is_prepared_is_taken_once_and_in_order() {
    let ring = Both::new(4);
    for number in 0..3 {
        ring.write(number, number + 10);
    }
    ring.tell(3);
    assert_eq!(ring.take(&CONFIG), [(0, 10), (1, 11), (2, 12)]);
    ring.served.complete([(2, 5), (0, 3), (1, 4)]);
    ring.write(3, 13);
    ring.write(4, 14);
    ring.tell(5);
    assert_eq!(ring.take(&CONFIG), [(3, 13), (4, 14)]);
}

#[test]
fn results_are_told_in_the_order_of_preparation() {
    let ring = Both::new(4);
    ring.tell(3);
    ring.take(&CONFIG);
    let completed = || ring.header().completed.load(Ordering::Acquire);
    ring.served.complete([(1, -5)]);
    assert_eq!(completed(), 0);
    ring.served.complete([(0, 7)]);
    assert_eq!(completed(), 2);
    ring.served.complete([(2, 9)]);
    assert_eq!(completed(), 3);
}

#[test]
fn batches_are_of_the_size_that_was_asked_for() {
    let ring = Both::new(8);
    ring.tell(7);
    let exactly = Config { io_depth: 3, ..CONFIG };
    assert_eq!((ring.take(&exactly).len(), ring.take(&exactly).len()), (3, 3));
    let at_most = Config { io_depth: -3, ..CONFIG };
    assert_eq!(ring.take(&at_most).len(), 1);
    ring.served.complete((0..7).map(|n| (n, 0)));
    ring.tell(14);
    assert_eq!(ring.take(&at_most).len(), 3);
    // One that is not full waits for more, but not for ever.
    let patient = Config { io_depth: -8, timeout_ms: 5, ..CONFIG };
    assert_eq!(ring.take(&patient).len(), 4);
}

#[test]
fn a_batch_that_is_not_full_waits_for_the_rest() {
    let ring = Arc::new(Both::new(4));
    ring.tell(1);
    let taking = ring.clone();
    let taker = std::thread::spawn(move || taking.take(&Config { io_depth: 2, ..CONFIG }).len());
    while ring.header().idle.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    assert!(!taker.is_finished());
    ring.tell(2);
    ring.header().submits.fetch_add(1, Ordering::SeqCst);
    crate::futex::wake(&ring.header().submits);
    assert_eq!(taker.join().unwrap(), 2);
}

#[test]
fn closing_wakes_whoever_sleeps() {
    let ring = Arc::new(Both::new(4));
    let taking = ring.clone();
    let taker = std::thread::spawn(move || taking.served.take(&CONFIG).unwrap().is_none());
    while ring.header().idle.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    ring.served.close(libc::ENOTCONN);
    assert!(taker.join().unwrap());
    assert_eq!(ring.header().state.load(Ordering::SeqCst), libc::ENOTCONN as u32);
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

#[test]
fn a_paused_ring_rests_once_what_was_taken_is_told_and_goes_on_when_it_is_resumed() {
    let ring = Arc::new(Both::new(4));
    ring.tell(2);
    assert_eq!(ring.take(&CONFIG).len(), 2);
    let taking = ring.clone();
    let taker = std::thread::spawn(move || taking.take(&CONFIG));
    while ring.header().idle.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    ring.served.pause();
    ring.tell(3);
    assert_eq!(ring.served.wait_for_rest(Instant::now()), None, "two are not told");
    let completing = ring.clone();
    let completer = std::thread::spawn(move || completing.served.complete([(0, 1), (1, 1)]));
    assert_eq!(ring.served.wait_for_rest(soon()), Some((2, false)));
    completer.join().unwrap();
    assert_eq!(ring.header().idle.load(Ordering::SeqCst), 0, "nobody sleeps there any more");
    assert!(!taker.is_finished(), "nothing is taken");
    ring.served.resume();
    assert_eq!(taker.join().unwrap(), [(2, 0)]);
}

#[test]
fn another_daemon_goes_on_where_a_ring_was_paused() {
    let ring = Both::new(4);
    ring.tell(3);
    ring.take(&CONFIG);
    ring.served.complete((0..3).map(|n| (n, 1)));
    ring.served.pause();
    assert_eq!(ring.served.wait_for_rest(soon()), Some((3, false)));
    ring.write(3, 7);
    ring.tell(4);
    let successor = ring.successor(3, false);
    successor.resume();
    ring.served.leave();
    assert!(ring.served.take(&CONFIG).unwrap().is_none());
    assert_eq!(ring.header().state.load(Ordering::SeqCst), 0, "the application is not told of it");
    let taken = successor.take(&CONFIG).unwrap().unwrap();
    assert_eq!((taken.len(), taken[0].number, taken[0].submission.token), (1, 3, 7));
    successor.complete([(3, 5)]);
    assert_eq!(ring.header().completed.load(Ordering::Acquire), 4);
}

#[test]
fn a_closed_ring_rests_and_stays_closed_elsewhere() {
    let ring = Both::new(4);
    ring.tell(9);
    assert!(ring.served.take(&CONFIG).is_err());
    ring.served.close(libc::EINVAL);
    ring.served.pause();
    assert_eq!(ring.served.wait_for_rest(soon()), Some((0, true)));
    ring.served.resume();
    let successor = ring.successor(0, true);
    successor.resume();
    assert!(successor.take(&CONFIG).unwrap().is_none());
}

#[test]
fn impossible_counters_are_an_error_and_nothing_is_taken() {
    for prepared in [5, u64::MAX, u64::MAX - 3, 1 << 40] {
        let ring = Both::new(4);
        ring.tell(prepared);
        assert_eq!(ring.served.take(&CONFIG).err(), Some(Errno(libc::EINVAL)), "{prepared}");
    }
    let ring = Both::new(4);
    ring.tell(3);
    ring.take(&CONFIG);
    ring.tell(2);
    assert_eq!(ring.served.take(&CONFIG).err(), Some(Errno(libc::EINVAL)), "a counter went back");
    // More than fit are never taken before their results are told.
    ring.tell(7);
    assert_eq!(ring.served.take(&CONFIG).err(), Some(Errno(libc::EINVAL)));
}

#[test]
fn a_peer_that_writes_everywhere_all_the_time_breaks_nothing() {
    let ring = Arc::new(Both::new(16));
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (hostile, ends) = (ring.clone(), stop.clone());
    let writer = std::thread::spawn(move || {
        let mut word: u64 = 0x9e37_79b9_7f4a_7c15;
        while !ends.load(Ordering::Relaxed) {
            word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let at = (word >> 33) as usize % (hostile.places.bytes() / 8) * 8;
            // Mostly small numbers, so that some counters are possible.
            let value = if word & 7 == 0 { word } else { word >> 58 };
            // SAFETY: in the mapping and aligned.
            unsafe { hostile.app.start().wrapping_add(at).cast::<u64>().write_volatile(value) };
            if word & 0xff == 0 {
                crate::futex::wake(&hostile.header().submits);
            }
        }
    });
    let end = Instant::now() + Duration::from_millis(300);
    let patient = Config { io_depth: -16, timeout_ms: 1, ..CONFIG };
    while Instant::now() < end {
        ring.header().submits.fetch_add(1, Ordering::SeqCst);
        if let Ok(Some(taken)) = ring.served.take(&patient) {
            assert!(taken.len() <= 16);
            ring.served.complete(taken.iter().map(|t| (t.number, 1)));
        }
        crate::futex::wake(&ring.header().submits);
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
}

#[test]
fn what_is_no_ring_is_not_served() {
    let places = Places::new(4).unwrap();
    let (path, app) = shm(places.bytes());
    let open = || Guarded::new(Memory::open(&path, places.bytes()).unwrap()).unwrap();
    assert!(Served::new(open(), places).is_err(), "there is no magic number");
    // SAFETY: mapped and aligned.
    let header = unsafe { &*app.start().cast::<Header>() };
    header.magic.store(MAGIC, Ordering::Relaxed);
    header.version.store(VERSION, Ordering::Relaxed);
    header.entries.store(3, Ordering::Relaxed);
    assert!(Served::new(open(), places).is_err(), "the name says another number of entries");
    header.entries.store(4, Ordering::Relaxed);
    assert!(Served::new(open(), places).is_ok());
    assert!(Served::new(open(), Places::new(4000).unwrap()).is_err(), "the memory is too small");
    std::fs::remove_file(path).unwrap();
}

#[test]
fn windows_lie_in_one_block_of_the_memory() {
    let (path, memory) = shm(1 << 16);
    std::fs::remove_file(path).unwrap();
    let memory = Arc::new(Guarded::new(memory).unwrap());
    let iov = |block_bytes| Iov { memory: memory.clone(), block_bytes };
    assert_eq!(iov(0).window(100, 1 << 15).unwrap(), (memory.start().wrapping_add(100), 1 << 15));
    assert!(iov(0).window(0, 1 << 16).is_ok() && iov(4096).window(4096, 4096).is_ok());
    for (offset, length) in
        [(0, 0), (0, (1 << 16) + 1), (1 << 16, 1), (u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)]
    {
        assert_eq!(iov(0).window(offset, length), Err(Errno(libc::EINVAL)), "{offset} {length}");
    }
    assert_eq!(iov(4096).window(4000, 200), Err(Errno(libc::EINVAL)));
}

#[test]
fn memory_is_taken_from_its_owner_only_and_from_shared_memory_only() {
    let (path, _memory) = shm(4096);
    let me = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&path).unwrap());
    assert_eq!(Memory::open_announced(&path, me).unwrap().bytes(), 4096);
    assert_eq!(Memory::open_announced(&path, me + 1).unwrap_err(), Errno(libc::EACCES));
    let link = path.with_extension("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert_eq!(Memory::open_announced(&link, me).unwrap_err(), Errno(libc::EINVAL), "a link");
    std::fs::remove_file(&link).unwrap();
    std::fs::write(&link, b"").unwrap();
    assert_eq!(Memory::open_announced(&link, me).unwrap_err(), Errno(libc::EINVAL), "an empty file");
    std::fs::remove_file(&link).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(Memory::open_announced(Path::new("/dev/shm"), me).unwrap_err(), Errno(libc::EISDIR));
    let elsewhere = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    elsewhere.as_file().set_len(4096).unwrap();
    assert_eq!(Memory::open_announced(elsewhere.path(), me).unwrap_err(), Errno(libc::EINVAL), "no shared memory");
}

#[test]
fn rings_need_entries_and_a_mount() {
    let nowhere = Path::new("/does/not/exist");
    for (entries, config) in [(0, CONFIG), (-1, CONFIG), (1 << 20, CONFIG), (4, Config { io_depth: 5, ..CONFIG })] {
        assert_eq!(Ring::create(nowhere, entries, config, -1).err(), Some(Errno(libc::EINVAL)));
    }
    assert_eq!(Ring::create(nowhere, 4, CONFIG, -1).err(), Some(Errno(libc::ENOENT)));
    assert_eq!(Done::default().result, 0);
}
