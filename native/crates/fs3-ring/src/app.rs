//! The application's side: memory for data, and the ring.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::futex::{self, Until};
use crate::layout::{Completion, Config, Header, MAGIC, Places, SERVED, Submission, VERSION};
use crate::names::{Name, encode_id};
use crate::{Errno, Memory, Result, fds, fork};

/// How often a waiter looks whether the daemon is still there.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A new random id, a UUID of version 4.
pub fn new_id() -> Result<[u8; 16]> {
    let mut id = [0u8; 16];
    // SAFETY: `id` is valid for 16 bytes.
    if unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) } != id.len() as isize {
        return Err(Errno::last());
    }
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(id)
}

/// Shared memory that is announced to a mount while this lives. Thread-safe.
pub struct Announced {
    memory: Memory,
    id: [u8; 16],
    link: PathBuf,
    /// The file in `/dev/shm`; `None` when it was removed, or is another's.
    file: Mutex<Option<PathBuf>>,
    /// The symlink is another's.
    borrowed: bool,
    /// Of the process that announced it: a forked child withdraws nothing.
    generation: u32,
}

impl Announced {
    /// Make shared memory and announce it to the mount at `mount`. Errors: EINVAL, ENOENT when that is no mount with
    /// rings, ENOMEM, ENOSPC.
    pub fn create(mount: &Path, bytes: usize, numa: i32, name: impl FnOnce([u8; 16]) -> Name) -> Result<Self> {
        let made = Self::prepare(mount, bytes, numa, name)?;
        made.announce()?;
        Ok(made)
    }

    /// As [`Announced::create`] without announcing it yet.
    fn prepare(mount: &Path, bytes: usize, numa: i32, name: impl FnOnce([u8; 16]) -> Name) -> Result<Self> {
        let id = new_id()?;
        let path = PathBuf::from(format!("/dev/shm/hf3fs-iov-{}", encode_id(&id)));
        let memory = Memory::create(&path, bytes, numa)?;
        Ok(Self {
            memory,
            id,
            link: link(mount, &name(id)),
            file: Mutex::new(Some(path)),
            borrowed: false,
            generation: fork::generation(),
        })
    }

    fn announce(&self) -> Result<()> {
        let file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let target = file.as_ref().ok_or(Errno(libc::EINVAL))?;
        std::os::unix::fs::symlink(target, &self.link).map_err(Errno::from)
    }

    /// Map memory that another process announced as `id`. Errors: ENOENT, EINVAL when it is smaller, EACCES.
    pub fn open(mount: &Path, id: [u8; 16], bytes: usize, block_bytes: u64) -> Result<Self> {
        let link = link(mount, &Name::iov(id, block_bytes));
        let target = std::fs::read_link(&link)?;
        if target.parent() != Some(Path::new("/dev/shm")) {
            return Err(Errno(libc::EINVAL));
        }
        let memory = Memory::open(&target, bytes)?;
        Ok(Self { memory, id, link, file: Mutex::new(None), borrowed: true, generation: fork::generation() })
    }

    /// Remove the file in `/dev/shm`; the memory stays as long as anybody has it mapped.
    pub fn unlink(&self) {
        let file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(path) = file {
            let _ = std::fs::remove_file(path);
        }
    }

    /// The id by which I/Os name it.
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    /// The mapping.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            return;
        }
        if !self.borrowed {
            let _ = std::fs::remove_file(&self.link);
        }
        self.unlink();
    }
}

fn link(mount: &Path, name: &Name) -> PathBuf {
    mount.join("3fs-virt/iovs").join(name.encode())
}

/// One I/O to prepare.
#[derive(Clone, Copy, Debug)]
pub struct Io {
    /// A registered descriptor, or its negative.
    pub fd: i32,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The iov.
    pub iov: [u8; 16],
    /// First byte in the iov.
    pub iov_offset: u64,
    /// Given back with the result.
    pub userdata: usize,
}

/// One I/O that is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// What [`Ring::prepare`] answered.
    pub index: u32,
    /// Bytes, or a negative errno.
    pub result: i64,
    /// As it was given.
    pub userdata: usize,
}

/// A ring of one process. Thread-safe; what several threads prepare is batched together. A forked child cannot use it.
pub struct Ring {
    announced: Announced,
    places: Places,
    config: Config,
    state: Mutex<State>,
}

struct State {
    /// I/Os prepared and I/Os given back since the beginning.
    prepared: u64,
    given_back: u64,
    /// When something was given back, or prepared where nothing was outstanding, or the daemon was looked for.
    alive: Instant,
    userdata: Vec<usize>,
}

impl Ring {
    /// Make a ring for `entries` I/Os on the mount at `mount`. Errors: EINVAL for entries that cannot be, otherwise those
    /// of [`Announced::create`].
    pub fn create(mount: &Path, entries: i32, config: Config, numa: i32) -> Result<Self> {
        let places = u32::try_from(entries).ok().and_then(Places::new).ok_or(Errno(libc::EINVAL))?;
        if config.io_depth.unsigned_abs() > places.entries {
            return Err(Errno(libc::EINVAL));
        }
        let announced = Announced::prepare(mount, places.bytes(), numa, |id| Name::ring(id, config, places))?;
        let state =
            State { prepared: 0, given_back: 0, alive: Instant::now(), userdata: vec![0; places.entries as usize] };
        let ring = Self { announced, places, config, state: Mutex::new(state) };
        let header = ring.header();
        header.version.store(VERSION, Ordering::Relaxed);
        header.entries.store(places.entries, Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Release);
        ring.announced.announce()?;
        // The daemon has it mapped.
        ring.announced.unlink();
        Ok(ring)
    }

    fn header(&self) -> &Header {
        // SAFETY: the memory holds a ring; all that is used of the header is atomic.
        unsafe { &*self.announced.memory.start().cast::<Header>() }
    }

    /// I/Os that may be outstanding.
    pub fn entries(&self) -> u32 {
        self.places.entries
    }

    /// How it was made.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its memory.
    pub fn announced(&self) -> &Announced {
        &self.announced
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Prepare an I/O; it may begin at once. Returns its index, which no other outstanding I/O has. Errors: EAGAIN when
    /// the ring is full, EBADF, EACCES, EINVAL for none or too many bytes, or when it is the ring of a parent process.
    pub fn prepare(&self, io: &Io) -> Result<u32> {
        if io.length == 0 || io.length > i64::MAX as u64 || io.offset > i64::MAX as u64 {
            return Err(Errno(libc::EINVAL));
        }
        if self.announced.generation != fork::generation() {
            return Err(Errno(libc::EINVAL));
        }
        let token = fds::token(io.fd, self.config.for_read)?;
        let mut state = self.lock();
        let number = state.prepared;
        if number - state.given_back >= u64::from(self.places.entries) {
            return Err(Errno(libc::EAGAIN));
        }
        let submission = Submission {
            token,
            offset: io.offset,
            length: io.length,
            iov: io.iov,
            iov_offset: io.iov_offset,
            reserved: [0; 2],
        };
        let at = self.announced.memory.start().wrapping_add(self.places.submission(number)).cast::<Submission>();
        // SAFETY: in the mapping and aligned; the daemon reads it only after the counter was raised.
        unsafe { at.write_volatile(submission) };
        let index = (number % u64::from(self.places.entries)) as u32;
        state.userdata[index as usize] = io.userdata;
        if state.prepared == state.given_back {
            state.alive = Instant::now();
        }
        state.prepared += 1;
        self.header().prepared.store(state.prepared, Ordering::Release);
        Ok(index)
    }

    /// Tell the daemon of what was prepared.
    pub fn submit(&self) {
        let header = self.header();
        header.submits.fetch_add(1, Ordering::SeqCst);
        if header.idle.load(Ordering::SeqCst) != 0 {
            futex::wake(&header.submits);
        }
    }

    /// Wait until `min` results are there (at most as many as `out` holds) or `deadline` (of CLOCK_REALTIME; `None`:
    /// never) has passed; gives what is there, in the order of preparation, and counts it. Errors: ENOTCONN when the mount
    /// or its daemon is gone and nothing is there, ENODEV when the ring was withdrawn.
    pub fn wait(&self, out: &mut [Done], min: usize, deadline: Option<&libc::timespec>) -> Result<usize> {
        let min = min.min(out.len());
        let mut filled = 0;
        loop {
            let seen = self.header().completions.load(Ordering::SeqCst);
            filled += self.give_back(&mut out[filled..]);
            let over = deadline.is_some_and(|at| futex::nanos(at) <= futex::nanos(&futex::realtime()));
            if filled >= min || over {
                return Ok(filled);
            }
            match self.header().state.load(Ordering::SeqCst) {
                SERVED => {}
                // The last results came before the end.
                errno => {
                    filled += self.give_back(&mut out[filled..]);
                    return if filled > 0 { Ok(filled) } else { Err(Errno(errno as i32)) };
                }
            }
            self.sleep(seen, deadline);
            if self.header().completions.load(Ordering::SeqCst) == seen {
                self.check_daemon()?;
            }
        }
    }

    /// As [`Ring::wait`], with a time from now.
    pub fn wait_for(&self, out: &mut [Done], min: usize, time: Duration) -> Result<usize> {
        let deadline = futex::from_nanos(futex::nanos(&futex::realtime()) + time.as_nanos() as i128);
        self.wait(out, min, Some(&deadline))
    }

    /// Sleep until something completes, [`LOOK_EVERY`] at most.
    fn sleep(&self, seen: u32, deadline: Option<&libc::timespec>) {
        let now = futex::nanos(&futex::realtime());
        let look = now + LOOK_EVERY.as_nanos() as i128;
        let until = deadline.map_or(look, |at| look.min(futex::nanos(at)));
        let header = self.header();
        header.waiters.fetch_add(1, Ordering::SeqCst);
        futex::wait(&header.completions, seen, Until::Realtime(futex::from_nanos(until)));
        header.waiters.fetch_sub(1, Ordering::SeqCst);
    }

    /// A daemon that was killed does not end its rings. Short waits, too, look now and then when nothing comes.
    fn check_daemon(&self) -> Result<()> {
        let mut state = self.lock();
        if state.alive.elapsed() < LOOK_EVERY {
            return Ok(());
        }
        state.alive = Instant::now();
        drop(state);
        match std::fs::symlink_metadata(&self.announced.link) {
            Ok(_) => Ok(()),
            Err(_) => Err(Errno(libc::ENOTCONN)),
        }
    }

    fn give_back(&self, out: &mut [Done]) -> usize {
        let mut state = self.lock();
        let completed = self.header().completed.load(Ordering::Acquire);
        // More than was prepared cannot be complete.
        let ready = completed.saturating_sub(state.given_back).min(state.prepared - state.given_back);
        let count = out.len().min(ready as usize);
        if count > 0 {
            state.alive = Instant::now();
        }
        for place in &mut out[..count] {
            let number = state.given_back;
            let at = self.announced.memory.start().wrapping_add(self.places.completion(number)).cast::<Completion>();
            // SAFETY: in the mapping and aligned; only used as an atomic.
            let result = unsafe { &*at }.result.load(Ordering::Relaxed) as i64;
            let index = (number % u64::from(self.places.entries)) as u32;
            *place = Done { index, result, userdata: state.userdata[index as usize] };
            state.given_back += 1;
        }
        count
    }
}
