//! Small reads that are not cached, through io_uring: many wait at the disk at once, without a thread each.
//!
//! Large transfers and writes gain nothing from it (`docs/adr/0002-chunk-metadata-store.md`); they stay on the threads.

use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use fs3_core::RegionMut;
use io_uring::{IoUring, opcode, types};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::disk::DiskFile;

/// Reads under way at most; whoever comes then uses the threads.
const READS_MAX: usize = 512;
const QUEUE_ENTRIES: u32 = 256;
const WAIT_FOR_EVENTS: u32 = 1;

/// One ring, shared by all targets of a process. Thread-safe.
pub(crate) struct Uring {
    ring: IoUring,
    // Held by whoever puts something into the submission queue.
    submitting: Mutex<()>,
    under_way: AtomicUsize,
    // The kernel refused to take a submission: nothing is submitted from then on.
    broken: AtomicBool,
}

/// A read the kernel works on. It owns all memory that the kernel writes to, whoever still waits for it.
struct Read {
    pages: Vec<RegionMut>,
    vectors: Vec<libc::iovec>,
    done: oneshot::Sender<Finished>,
    _file: Arc<dyn DiskFile>,
}

// SAFETY: the vectors point into the pages, which the read owns.
unsafe impl Send for Read {}

/// How many bytes were read into the pages.
type Finished = (io::Result<usize>, Vec<RegionMut>);

impl Uring {
    /// The ring of this process; `None` when the kernel does not let it have one.
    pub fn shared() -> Option<&'static Arc<Self>> {
        static RING: OnceLock<Option<Arc<Uring>>> = OnceLock::new();
        RING.get_or_init(|| {
            Self::start().inspect_err(|e| tracing::info!("reads use threads, io_uring is not available: {e}")).ok()
        })
        .as_ref()
    }

    fn start() -> io::Result<Arc<Self>> {
        let ring = IoUring::builder().setup_cqsize(READS_MAX as u32 * 2).build(QUEUE_ENTRIES)?;
        let (submitting, under_way, broken) = (Mutex::new(()), AtomicUsize::new(0), AtomicBool::new(false));
        let this = Arc::new(Self { ring, submitting, under_way, broken });
        let reaper = this.clone();
        std::thread::Builder::new().name("fs3-io-uring".into()).spawn(move || reaper.reap())?;
        Ok(this)
    }

    /// Start to read into windows (page, start, length) of `pages`, one after the other, from `offset` on of a file with
    /// descriptor `fd`. `None`: use the threads. The read goes on when nobody waits for it any more.
    pub fn read(
        &self,
        file: Arc<dyn DiskFile>,
        fd: RawFd,
        offset: u64,
        mut pages: Vec<RegionMut>,
        windows: &[(usize, usize, usize)],
    ) -> Option<impl Future<Output = Option<Finished>> + use<>> {
        if self.under_way.fetch_add(1, Ordering::Relaxed) >= READS_MAX || self.broken.load(Ordering::Acquire) {
            self.under_way.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        let vector = |&(page, start, len): &(usize, usize, usize)| {
            let window: &mut [u8] = &mut pages[page][start..start + len];
            libc::iovec { iov_base: window.as_mut_ptr().cast(), iov_len: len }
        };
        let vectors = windows.iter().map(vector).collect();
        let (done, result) = oneshot::channel();
        let read = Box::new(Read { pages, vectors, done, _file: file });
        let entry = opcode::Readv::new(types::Fd(fd), read.vectors.as_ptr(), read.vectors.len() as u32);
        let read = Box::into_raw(read);
        if !self.submit(&entry.offset(offset).build().user_data(read as u64)) {
            // SAFETY: the kernel has not seen it and never will: a broken ring is not entered for submissions.
            drop(unsafe { Box::from_raw(read) });
            self.under_way.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(async move { result.await.ok() })
    }

    fn submit(&self, entry: &io_uring::squeue::Entry) -> bool {
        let _one = self.submitting.lock();
        if self.broken.load(Ordering::Acquire) {
            return false;
        }
        // SAFETY: the lock makes this the only submission queue; what the entry points to lives until its completion.
        let pushed = unsafe { self.ring.submission_shared().push(entry) };
        while pushed.is_ok() {
            // SAFETY: no argument is passed to the kernel.
            match unsafe { self.ring.submitter().enter::<libc::sigset_t>(1, 0, 0, None) } {
                Ok(1) => return true,
                Ok(_) => {}
                // The kernel has too much to do at the moment; the reaper makes room.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
                    std::thread::yield_now();
                }
                Err(e) => {
                    tracing::error!("reads use threads from now on, io_uring failed: {e}");
                    break;
                }
            }
        }
        self.broken.store(true, Ordering::Release);
        false
    }

    /// Hand finished reads to those who wait for them, for as long as the process lives.
    fn reap(&self) {
        loop {
            // SAFETY: no argument is passed to the kernel.
            let waited = unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 1, WAIT_FOR_EVENTS, None) };
            if let Err(e) = waited
                && e.kind() != io::ErrorKind::Interrupted
            {
                tracing::error!("waiting for io_uring failed: {e}");
                std::thread::yield_now();
            }
            // SAFETY: this thread alone looks at the completion queue.
            for entry in unsafe { self.ring.completion_shared() } {
                // SAFETY: made by `read`, and each read completes once.
                let read = unsafe { Box::from_raw(entry.user_data() as *mut Read) };
                self.under_way.fetch_sub(1, Ordering::Relaxed);
                let result = match entry.result() {
                    bytes @ 0.. => Ok(bytes as usize),
                    error => Err(io::Error::from_raw_os_error(-error)),
                };
                let _ = read.done.send((result, read.pages));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::disk::{Access, Disk, RealDisk};

    #[test]
    fn reads_fill_their_windows_report_the_end_and_outlive_who_waits() {
        let Some(uring) = Uring::shared() else { return eprintln!("not tried: no io_uring here") };
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..8192u32).map(|i| (i / 13) as u8).collect();
        std::fs::File::create(dir.path().join("file")).unwrap().write_all(&bytes).unwrap();
        let file = RealDisk::new(dir.path()).unwrap().open("file", Access::Direct).unwrap();
        let fd = file.raw().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let start = |offset, windows: &[(usize, usize, usize)]| {
            let pages = vec![RegionMut::zeroed(8192), RegionMut::zeroed(4096)];
            uring.read(file.clone(), fd, offset, pages, windows).unwrap()
        };
        drop(start(0, &[(0, 0, 4096)]));
        let (read, pages) = runtime.block_on(start(0, &[(0, 4096, 4096), (1, 0, 4096)])).unwrap();
        assert_eq!(read.unwrap(), 8192);
        assert_eq!((&pages[0][4096..], &pages[1][..]), (&bytes[..4096], &bytes[4096..]));
        let (read, _) = runtime.block_on(start(4096, &[(0, 0, 8192)])).unwrap();
        assert_eq!(read.unwrap(), 4096);
    }
}
