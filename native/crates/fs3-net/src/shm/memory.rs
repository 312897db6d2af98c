//! Mappings that two processes share.

use fs3_core::map_aligned;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Size of the page of counters.
const CONTROL_BYTES: usize = 4096;
/// Memory of a peer larger than this is no arena.
const MAPPED_BYTES_MAX: u64 = 1 << 44;
/// How long the table of mappings is waited for: in a forked child its lock may be held for ever.
const TABLE_WAIT: Duration = Duration::from_secs(1);

/// Whose messages a part of the page counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    Server,
    Client,
}

/// Counters of what one end sends.
#[repr(C, align(128))]
pub(super) struct Counts {
    /// Messages whose payload the receiver has copied. Written by the receiver.
    pub consumed: AtomicU64,
    /// Not 0: the memory is not kept any more. Written by the sender.
    pub ended: AtomicU64,
    copied: Copied,
}

/// Messages in flight of which the sender tells how far it is.
pub(super) const COPYING_MAX: usize = 16;

/// How many bytes of a payload the sender has copied (low half), and of which message (high half), by the message's number.
/// Written by the sender.
#[repr(C, align(128))]
struct Copied([AtomicU64; COPYING_MAX]);

impl Counts {
    /// How much of the payload of message `number` is there.
    pub fn copied(&self, number: u64) -> usize {
        let seen = self.copied.0[number as usize % COPYING_MAX].load(Ordering::Acquire);
        if seen >> 32 == number & u64::from(u32::MAX) { seen as u32 as usize } else { 0 }
    }

    /// So much of it is there.
    pub fn set_copied(&self, number: u64, bytes: usize) {
        let value = number << 32 | bytes as u64;
        self.copied.0[number as usize % COPYING_MAX].store(value, Ordering::Release);
    }
}

/// The page of counters, mapped.
pub(super) struct Control {
    counts: *const [Counts; 2],
}

// SAFETY: there are atomics behind the pointer, mapped as long as this lives.
unsafe impl Send for Control {}
// SAFETY: as above.
unsafe impl Sync for Control {}

impl Control {
    /// A new page, and the descriptor that the peer maps it with.
    pub fn create() -> io::Result<(Self, File)> {
        // SAFETY: the name is a C string; a descriptor that comes back is ours.
        let fd = unsafe { libc::memfd_create(c"fs3-counts".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just opened, and nobody else has it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(CONTROL_BYTES as u64)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: a call on a descriptor of ours.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((Self::map(&file)?, file))
    }

    /// Map the page that a peer has made.
    pub fn map(file: &File) -> io::Result<Self> {
        if sealed_bytes(file)? < CONTROL_BYTES as u64 {
            return Err(io::Error::other("the page of counters is too small"));
        }
        let start = map_aligned(file, CONTROL_BYTES, libc::PROT_READ | libc::PROT_WRITE)?;
        Ok(Self { counts: start as *const [Counts; 2] })
    }

    pub fn lane(&self, lane: Lane) -> &Counts {
        // SAFETY: mapped as long as self lives, and it cannot shrink. Zeros are counts.
        let counts = unsafe { &*self.counts };
        &counts[lane as usize]
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, and nobody refers to it any more.
        unsafe { libc::munmap(self.counts.cast_mut().cast(), CONTROL_BYTES) };
    }
}

/// Memory of another process, to read.
pub(super) struct Mapped {
    start: usize,
    bytes: usize,
}

type Table = HashMap<(u64, u64), Weak<Mapped>>;

/// What is mapped, by device and inode: connections to one process share it.
static TABLE: Mutex<Option<Table>> = Mutex::new(None);

impl Mapped {
    /// Map all of it.
    pub fn map(file: &File) -> io::Result<Arc<Self>> {
        let bytes = sealed_bytes(file)?;
        if bytes == 0 || bytes > MAPPED_BYTES_MAX {
            return Err(io::Error::other(format!("{bytes} bytes of shared memory make no sense")));
        }
        let metadata = file.metadata()?;
        let key = (metadata.dev(), metadata.ino());
        let mut table = TABLE.try_lock_for(TABLE_WAIT).ok_or(io::ErrorKind::TimedOut)?;
        let table = table.get_or_insert_default();
        if let Some(mapped) = table.get(&key).and_then(Weak::upgrade) {
            return Ok(mapped);
        }
        table.retain(|_, mapped| mapped.strong_count() > 0);
        let start = map_aligned(file, bytes as usize, libc::PROT_READ)?;
        let mapped = Arc::new(Self { start, bytes: bytes as usize });
        table.insert(key, Arc::downgrade(&mapped));
        Ok(mapped)
    }

    /// Where the peer's `bytes` from `offset` on are here; `None` when they are not.
    pub fn at(&self, offset: u64, bytes: usize) -> Option<*const u8> {
        let offset = usize::try_from(offset).ok()?;
        (offset.checked_add(bytes)? <= self.bytes).then_some((self.start + offset) as *const u8)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, and nobody refers to it any more.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.bytes) };
    }
}

/// Size of a memory file that cannot shrink.
fn sealed_bytes(file: &File) -> io::Result<u64> {
    // SAFETY: a call on an open descriptor.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 {
        return Err(io::Error::last_os_error());
    }
    if seals & libc::F_SEAL_SHRINK == 0 {
        return Err(io::Error::other("shared memory that could shrink is not mapped"));
    }
    Ok(file.metadata()?.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_see_the_same_counts() {
        let (ours, file) = Control::create().unwrap();
        let theirs = Control::map(&file).unwrap();
        ours.lane(Lane::Client).consumed.store(5, Ordering::Relaxed);
        theirs.lane(Lane::Server).ended.store(1, Ordering::Relaxed);
        assert_eq!(theirs.lane(Lane::Client).consumed.load(Ordering::Relaxed), 5);
        assert_eq!(ours.lane(Lane::Server).ended.load(Ordering::Relaxed), 1);
        assert_eq!(ours.lane(Lane::Server).consumed.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn memory_is_mapped_once_and_only_within_its_bounds() {
        let (_control, file) = Control::create().unwrap();
        let mapped = Mapped::map(&file).unwrap();
        assert!(Arc::ptr_eq(&mapped, &Mapped::map(&file).unwrap()));
        assert!(mapped.at(0, CONTROL_BYTES).is_some());
        assert!(mapped.at(1, CONTROL_BYTES).is_none());
        assert!(mapped.at(u64::MAX, 2).is_none());
    }

    #[test]
    fn memory_that_could_shrink_is_refused() {
        let path = std::env::temp_dir().join(format!("fs3-shm-{}", std::process::id()));
        let file = File::create_new(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        assert!(Mapped::map(&file).is_err());
        // SAFETY: the name is a C string; the descriptor is owned below.
        let fd = unsafe { libc::memfd_create(c"soft".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        // SAFETY: just opened.
        let soft = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        soft.set_len(1 << 20).unwrap();
        assert!(Mapped::map(&soft).is_err());
    }
}
