//! The seam between the store and the operating system, where tests inject faults.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How a file is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Past the page cache: memory, offsets and lengths are multiples of 4096.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// A directory tree of files. Paths are relative to the target's directory.
pub trait Disk: Send + Sync {
    /// Open a file for reading and writing, creating it if it is not there.
    fn open(&self, path: &str, access: Access) -> io::Result<Arc<dyn DiskFile>>;
    /// Names of the files.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Atomically give a file another name, replacing what had it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Remove a file.
    fn remove(&self, path: &str) -> io::Result<()>;
    /// Make creations, renames and removals durable.
    fn sync_dir(&self) -> io::Result<()>;
    /// Changes when the machine restarts, that is when unsynced writes may have been lost.
    fn boot_id(&self) -> String;
}

/// An open file. Thread-safe.
pub trait DiskFile: Send + Sync {
    /// Fill `bufs` from `offset` on; fewer bytes only at the end of the file.
    fn read_at(&self, bufs: &mut [IoSliceMut], offset: u64) -> io::Result<usize>;
    /// Write all of `bufs` at `offset`.
    fn write_at(&self, bufs: &mut [IoSlice], offset: u64) -> io::Result<()>;
    /// Make all writes that have returned survive a power loss.
    fn sync(&self) -> io::Result<()>;
    /// Reserve disk space for `bytes` bytes at `offset`, extending the file with zeros if need be: writes there will not
    /// find the disk full.
    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()>;
    /// Give the disk space of `bytes` bytes at `offset` back; they read as zeros or as they were. A file system that
    /// cannot do that keeps the space.
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()>;
    /// Bytes of disk space it takes.
    fn space(&self) -> io::Result<u64>;
    /// Size in bytes.
    fn len(&self) -> io::Result<u64>;
    /// The descriptor, for reads through io_uring; `None` when all access has to go through this trait.
    fn raw(&self) -> Option<RawFd> {
        None
    }
    /// Whether it has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// How long [`RealDisk::new`] waits for a former user of the directory to finish.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// Files of a local file system. The directory is locked against other users while this lives.
pub struct RealDisk {
    dir: PathBuf,
    _lock: File,
}

impl RealDisk {
    /// Files below `dir`, which is created if it is not there. Waits up to 5 s for a former user to finish.
    pub fn new(dir: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let lock = File::open(dir)?;
        let deadline = Instant::now() + LOCK_WAIT;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Self { dir: dir.to_owned(), _lock: lock }),
                Err(TryLockError::Error(e)) => return Err(e),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(io::Error::other("another process uses this target; stop it first"));
                }
            }
        }
    }
}

impl Disk for RealDisk {
    fn open(&self, path: &str, access: Access) -> io::Result<Arc<dyn DiskFile>> {
        let path = self.dir.join(path);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        if access == Access::Direct {
            match options.clone().custom_flags(libc::O_DIRECT).open(&path) {
                // Some file systems (tmpfs) have no direct I/O.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                done => return Ok(Arc::new(RealFile(done?))),
            }
        }
        Ok(Arc::new(RealFile(options.open(&path)?)))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = vec![];
        for entry in std::fs::read_dir(&self.dir)? {
            names.extend(entry?.file_name().into_string().ok());
        }
        names.sort();
        Ok(names)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.dir.join(from), self.dir.join(to))
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        std::fs::remove_file(self.dir.join(path))
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    fn boot_id(&self) -> String {
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
    }
}

struct RealFile(File);

impl DiskFile for RealFile {
    fn read_at(&self, bufs: &mut [IoSliceMut], offset: u64) -> io::Result<usize> {
        let mut bufs = bufs;
        let mut done = 0;
        while !bufs.is_empty() {
            let count = bufs.len().min(libc::UIO_MAXIOV as usize) as i32;
            // SAFETY: IoSliceMut has the layout of iovec; the slices are valid for the call.
            let n = unsafe {
                libc::preadv(self.0.as_raw_fd(), bufs.as_mut_ptr().cast(), count, (offset + done as u64) as i64)
            };
            match n {
                -1 => {
                    let e = io::Error::last_os_error();
                    if e.kind() != io::ErrorKind::Interrupted {
                        return Err(e);
                    }
                }
                0 => break,
                n => {
                    done += n as usize;
                    IoSliceMut::advance_slices(&mut bufs, n as usize);
                }
            }
        }
        Ok(done)
    }

    fn write_at(&self, bufs: &mut [IoSlice], offset: u64) -> io::Result<()> {
        let mut bufs = bufs;
        let mut offset = offset;
        if let [one] = bufs {
            return self.0.write_all_at(one, offset);
        }
        while !bufs.is_empty() {
            let count = bufs.len().min(libc::UIO_MAXIOV as usize) as i32;
            // SAFETY: IoSlice has the layout of iovec; the slices are valid for the call.
            let n = unsafe { libc::pwritev(self.0.as_raw_fd(), bufs.as_ptr().cast(), count, offset as i64) };
            match n {
                -1 => {
                    let e = io::Error::last_os_error();
                    if e.kind() != io::ErrorKind::Interrupted {
                        return Err(e);
                    }
                }
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => {
                    offset += n as u64;
                    IoSlice::advance_slices(&mut bufs, n as usize);
                }
            }
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        match fallocate(&self.0, 0, offset, bytes) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => self.0.set_len(self.len()?.max(offset + bytes)),
            done => done,
        }
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        match fallocate(&self.0, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, bytes) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            done => done,
        }
    }

    fn space(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.blocks() * 512)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn raw(&self) -> Option<RawFd> {
        Some(self.0.as_raw_fd())
    }
}

fn fallocate(file: &File, mode: libc::c_int, offset: u64, bytes: u64) -> io::Result<()> {
    loop {
        // SAFETY: plain system call on an open descriptor.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, bytes as i64) } == 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}
