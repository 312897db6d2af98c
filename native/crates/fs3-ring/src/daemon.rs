//! The daemon's side of a ring. The application may be hostile: whatever is read from its memory is copied once and then
//! checked, counters are only believed within bounds, and what the daemon counts by is its own.
//!
//! A ring can be paused, and resumed by this daemon or by another one, which goes on from the same counter. A daemon that
//! has paused a ring does not touch its memory until it resumes it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::futex::{self, Until};
use crate::guard::Guarded;
use crate::layout::{Completion, Config, Header, MAGIC, Places, SERVED, Submission, VERSION};
use crate::{Errno, Result};

/// A sleeping daemon looks whether it shall end at least this often, should a wake-up have been lost.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How often a thread that shall pause is woken, should the application have hidden that from it.
const WAKE_EVERY: Duration = Duration::from_millis(10);

/// A ring that is being served. One thread takes, any may complete.
pub struct Served {
    memory: Guarded,
    places: Places,
    results: Mutex<Results>,
    /// `results` tell something new to who waits for a pause, or for its end.
    changed: Condvar,
}

/// What shall become of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Take,
    Pause,
    End,
}

/// Results wait here until those before them are there, too.
struct Results {
    wanted: Wanted,
    /// The thread that takes may be using the memory.
    taking: bool,
    /// I/Os taken from the ring since the beginning.
    taken: u64,
    /// I/Os told the application since the beginning.
    told: u64,
    waiting: Vec<Option<i64>>,
}

/// One I/O that was taken. The application waits for [`Served::complete`] of its number.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// Counted from 0.
    pub number: u64,
    /// What it shall be; nothing in it has been checked.
    pub submission: Submission,
}

impl Served {
    /// Serve the ring in `memory`, which was announced with `places`. Errors: EINVAL when it is no such ring.
    pub fn new(memory: Guarded, places: Places) -> Result<Self> {
        let ring = Self::at(memory, places, 0, Wanted::Take)?;
        let header = ring.header();
        let said = (
            header.magic.load(Ordering::Acquire),
            header.version.load(Ordering::Relaxed),
            header.entries.load(Ordering::Relaxed),
        );
        if said != (MAGIC, VERSION, places.entries) {
            return Err(Errno(libc::EINVAL));
        }
        Ok(ring)
    }

    /// Go on with a ring that another daemon has paused at `told` I/Os; paused until [`Served::resume`], or closed. Errors:
    /// EINVAL when the memory is too small.
    pub fn succeeding(memory: Guarded, places: Places, told: u64, closed: bool) -> Result<Self> {
        Self::at(memory, places, told, if closed { Wanted::End } else { Wanted::Pause })
    }

    fn at(memory: Guarded, places: Places, told: u64, wanted: Wanted) -> Result<Self> {
        if memory.bytes() < places.bytes() || !(memory.start() as usize).is_multiple_of(align_of::<Header>()) {
            return Err(Errno(libc::EINVAL));
        }
        let waiting = vec![None; places.entries as usize];
        let results = Results { wanted, taking: false, taken: told, told, waiting };
        Ok(Self { memory, places, results: Mutex::new(results), changed: Condvar::new() })
    }

    fn header(&self) -> &Header {
        // SAFETY: in the mapping and aligned, both checked in `at`; all that is used of it is atomic.
        unsafe { &*self.memory.start().cast::<Header>() }
    }

    /// How many I/Os were prepared and not taken. Errors: EINVAL when the application's counter cannot be.
    fn ready(&self, results: &Results) -> Result<u64> {
        let prepared = self.header().prepared.load(Ordering::Acquire);
        let outstanding = prepared.wrapping_sub(results.told);
        if outstanding > u64::from(self.places.entries) || prepared < results.taken {
            return Err(Errno(libc::EINVAL));
        }
        Ok(prepared - results.taken)
    }

    /// Wait for the next batch, as `config` makes them, and while it is paused. `None`: the ring ends. Errors: EINVAL when
    /// what is in it cannot be; it shall be closed then.
    pub fn take(&self, config: &Config) -> Result<Option<Vec<Taken>>> {
        let depth = u64::from(config.io_depth.unsigned_abs());
        let mut gathering: Option<Instant> = None;
        loop {
            if !self.may_take() {
                return Ok(None);
            }
            let seen = self.header().submits.load(Ordering::SeqCst);
            let mut results = self.lock();
            // Asked again behind `seen`: what comes from here on ends the sleep.
            if results.wanted != Wanted::Take {
                continue;
            }
            let ready = self.ready(&results)?;
            let limit = match config.io_depth {
                0 => ready,
                1.. if ready >= depth => depth,
                ..0 if ready >= depth || config.timeout_ms == 0 => ready.min(depth),
                _ => 0,
            };
            if limit > 0 {
                return Ok(Some(self.copy(&mut results, limit)));
            }
            let mut sleep = LOOK_EVERY;
            if config.io_depth < 0 && ready > 0 {
                let since = *gathering.get_or_insert_with(Instant::now);
                let left = Duration::from_millis(config.timeout_ms.into()).saturating_sub(since.elapsed());
                if left.is_zero() {
                    return Ok(Some(self.copy(&mut results, ready)));
                }
                sleep = sleep.min(left);
            }
            drop(results);
            self.sleep(seen, sleep);
        }
    }

    /// Wait while it is paused; says whether to take.
    fn may_take(&self) -> bool {
        let mut results = self.lock();
        loop {
            results.taking = results.wanted == Wanted::Take;
            match results.wanted {
                Wanted::Take => return true,
                Wanted::End => return false,
                Wanted::Pause => {
                    self.changed.notify_all();
                    results = self.changed.wait(results).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn sleep(&self, seen: u32, at_most: Duration) {
        let header = self.header();
        header.idle.store(1, Ordering::SeqCst);
        // Whoever submits after this sees that there is somebody to wake.
        futex::wait(&header.submits, seen, Until::For(at_most));
        header.idle.store(0, Ordering::SeqCst);
    }

    fn copy(&self, results: &mut Results, count: u64) -> Vec<Taken> {
        let first = results.taken;
        results.taken += count;
        results.taking = false;
        (first..first + count)
            .map(|number| {
                let at = self.memory.start().wrapping_add(self.places.submission(number)).cast::<Submission>();
                // SAFETY: in the mapping and aligned; any bytes are a valid value. Read once.
                Taken { number, submission: unsafe { at.read_volatile() } }
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Results> {
        // Nothing that holds it can panic halfway.
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tell the results of I/Os that were taken (bytes, or a negative errno), each once. The application hears of them in
    /// the order of preparation.
    pub fn complete(&self, done: impl IntoIterator<Item = (u64, i64)>) {
        let mut results = self.lock();
        for (number, result) in done {
            assert!((results.told..results.taken).contains(&number), "an I/O is completed once, after it was taken");
            let place = (number % u64::from(self.places.entries)) as usize;
            results.waiting[place] = Some(result);
        }
        let before = results.told;
        while results.told < results.taken {
            let place = (results.told % u64::from(self.places.entries)) as usize;
            let Some(result) = results.waiting[place].take() else { break };
            let at = self.memory.start().wrapping_add(self.places.completion(results.told)).cast::<Completion>();
            // SAFETY: in the mapping and aligned; only used as an atomic.
            unsafe { &*at }.result.store(result as u64, Ordering::Relaxed);
            results.told += 1;
        }
        if results.told > before {
            let header = self.header();
            header.completed.store(results.told, Ordering::SeqCst);
            header.completions.fetch_add(1, Ordering::SeqCst);
            if header.waiters.load(Ordering::SeqCst) != 0 {
                futex::wake(&header.completions);
            }
            if results.wanted != Wanted::Take {
                self.changed.notify_all();
            }
        }
    }

    /// End it: the thread that takes returns, and who waits for results gets `errno`.
    pub fn close(&self, errno: i32) {
        self.leave();
        let header = self.header();
        let _ = header.state.compare_exchange(SERVED, errno as u32, Ordering::SeqCst, Ordering::SeqCst);
        self.wake_taker();
        header.completions.fetch_add(1, Ordering::SeqCst);
        futex::wake(&header.completions);
    }

    fn wake_taker(&self) {
        let header = self.header();
        header.submits.fetch_add(1, Ordering::SeqCst);
        futex::wake(&header.submits);
    }

    /// Take nothing more, as long as it is not resumed. Does not wait for anything, see [`Served::wait_for_rest`].
    pub fn pause(&self) {
        let mut results = self.lock();
        if results.wanted == Wanted::Take {
            results.wanted = Wanted::Pause;
            drop(results);
            self.wake_taker();
        }
    }

    /// Wait until everything that was taken before a pause is told, and nobody here uses the memory. `None` when that is
    /// not so at `deadline`; otherwise the number of I/Os told, and whether the ring was closed.
    pub fn wait_for_rest(&self, deadline: Instant) -> Option<(u64, bool)> {
        let mut results = self.lock();
        loop {
            let closed = results.wanted == Wanted::End;
            if results.told == results.taken && (closed || !results.taking) {
                return Some((results.told, closed));
            }
            if Instant::now() >= deadline {
                return None;
            }
            if results.taking {
                drop(results);
                self.wake_taker();
                results = self.lock();
            }
            results = self.changed.wait_timeout(results, WAKE_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The end of a pause, in which no other daemon has served the ring.
    pub fn resume(&self) {
        let mut results = self.lock();
        if results.wanted == Wanted::Pause {
            results.wanted = Wanted::Take;
            self.changed.notify_all();
        }
    }

    /// Another daemon serves it from here on: the thread that takes returns. Its memory is not touched.
    pub fn leave(&self) {
        self.lock().wanted = Wanted::End;
        self.changed.notify_all();
    }

    /// The memory.
    pub fn memory(&self) -> &Guarded {
        &self.memory
    }
}

/// Memory for data that an application announced.
#[derive(Debug)]
pub struct Iov {
    /// The mapping.
    pub memory: Arc<Guarded>,
    /// Bytes that one I/O may not cross; 0: it may lie anywhere.
    pub block_bytes: u64,
}

impl Iov {
    /// Where `length` bytes from `offset` on lie. Errors: EINVAL outside of the memory, across blocks, or for none; EFAULT
    /// when the file was cut.
    pub fn window(&self, offset: u64, length: u64) -> Result<(*mut u8, usize)> {
        let end = offset.checked_add(length).filter(|end| *end <= self.memory.bytes() as u64);
        let (Some(end), true) = (end, length > 0) else { return Err(Errno(libc::EINVAL)) };
        if self.block_bytes > 0 && offset / self.block_bytes != (end - 1) / self.block_bytes {
            return Err(Errno(libc::EINVAL));
        }
        // Both fit: they are not above the size of a mapping.
        Ok((self.memory.start().wrapping_add(offset as usize), length as usize))
    }
}
