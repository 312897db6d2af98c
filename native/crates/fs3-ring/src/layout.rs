//! What lies where in the memory of a ring, and the requests that a descriptor of the mount answers.
//!
//! Header, then `entries` submissions, then `entries` completions. I/O number n (counted from 0 for ever) uses place
//! n modulo `entries` in both. Each counter has one writer.

use std::mem::size_of;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// Begins the memory of every ring.
pub const MAGIC: u64 = 0x6673_332d_7269_6e67;
/// Version of this layout.
pub const VERSION: u32 = 1;
/// Most I/Os that a ring may have outstanding.
pub const ENTRIES_MAX: u32 = 1 << 16;
/// A ring that is being served; otherwise its state is the errno that waiters get.
pub const SERVED: u32 = 0;

/// `ioctl` of any descriptor of a mount: its magic number, an u32.
pub const IOC_MAGIC: u32 = 0x8004_6802;
/// `ioctl` of any descriptor of a mount: version of the interface, an u32.
pub const IOC_VERSION: u32 = 0x8004_6803;
/// `ioctl` of an open file: the token by which this process' rings name it, an u64.
pub const IOC_REGISTER: u32 = 0x8008_6840;
/// What [`IOC_MAGIC`] answers.
pub const FS_MAGIC: u32 = 0x8f3f_5fff;
/// What [`IOC_VERSION`] answers.
pub const FS_VERSION: u32 = 1;

/// Flag of a ring: reads may see what not every replica has. Allowed and without effect: replicas never show it.
pub const READ_UNCOMMITTED: u64 = 1;
/// Flag of a ring: reads that meet a hole fail with ENODATA instead of giving zeros.
pub const FORBID_HOLES: u64 = 2;

/// Start of a ring's memory. The groups lie in cache lines of their own.
#[repr(C, align(64))]
pub struct Header {
    /// [`MAGIC`]. Written before the ring is announced, as the next two.
    pub magic: AtomicU64,
    /// [`VERSION`].
    pub version: AtomicU32,
    /// Places for I/Os.
    pub entries: AtomicU32,
    pad0: [u8; 48],
    /// I/Os prepared since the beginning. The application's.
    pub prepared: AtomicU64,
    /// Changes with every submit; the daemon sleeps on it.
    pub submits: AtomicU32,
    pad1: [u8; 52],
    /// I/Os completed since the beginning, in the order of preparation. The daemon's.
    pub completed: AtomicU64,
    /// Changes whenever something completes; applications sleep on it.
    pub completions: AtomicU32,
    /// The daemon sleeps and wants to be woken.
    pub idle: AtomicU32,
    /// [`SERVED`] or an errno.
    pub state: AtomicU32,
    pad2: [u8; 44],
    /// Threads of the application that sleep and want to be woken.
    pub waiters: AtomicU32,
    pad3: [u8; 60],
}

/// One I/O, as the application wrote it: the daemon copies it once and believes nothing of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Submission {
    /// Of the open file, see [`IOC_REGISTER`].
    pub token: u64,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The iov.
    pub iov: [u8; 16],
    /// First byte in the iov.
    pub iov_offset: u64,
    /// Room for later versions; zero.
    pub reserved: [u64; 2],
}

/// The result of one I/O.
#[repr(C)]
pub struct Completion {
    /// Bytes, or a negative errno.
    pub result: AtomicU64,
}

const _: () = assert!(size_of::<Header>() == 256 && size_of::<Submission>() == 64 && size_of::<Completion>() == 8);

/// Where a ring's parts lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// I/Os.
    pub entries: u32,
}

impl Places {
    /// Of a ring for `entries` I/Os; `None` when there cannot be one.
    pub fn new(entries: u32) -> Option<Self> {
        (1..=ENTRIES_MAX).contains(&entries).then_some(Self { entries })
    }

    fn place(self, number: u64) -> usize {
        (number % u64::from(self.entries)) as usize
    }

    /// Offset of the submission of I/O `number`.
    pub fn submission(self, number: u64) -> usize {
        size_of::<Header>() + self.place(number) * size_of::<Submission>()
    }

    /// Offset of the completion of I/O `number`.
    pub fn completion(self, number: u64) -> usize {
        let submissions = self.entries as usize * size_of::<Submission>();
        size_of::<Header>() + submissions + self.place(number) * size_of::<Completion>()
    }

    /// Bytes of the whole ring, in pages.
    pub fn bytes(self) -> usize {
        let each = size_of::<Submission>() + size_of::<Completion>();
        (size_of::<Header>() + self.entries as usize * each).next_multiple_of(4096)
    }
}

/// How a ring batches I/Os.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// It reads (or writes).
    pub for_read: bool,
    /// Above 0: exactly that many I/Os are begun together; 0: all that are prepared; below 0: at most that many.
    pub io_depth: i32,
    /// Below 0 high, 0 normal, above 0 low. Kept, without effect.
    pub priority: i32,
    /// With `io_depth` below 0: how long to wait for a full batch, in milliseconds.
    pub timeout_ms: u32,
    /// [`READ_UNCOMMITTED`], [`FORBID_HOLES`].
    pub flags: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_ring_do_not_overlap() {
        let places = Places::new(3).unwrap();
        assert_eq!((places.submission(0), places.submission(5)), (256, 256 + 2 * 64));
        assert_eq!(places.completion(3), 256 + 3 * 64);
        assert!(places.completion(2) + 8 <= places.bytes());
        assert_eq!((Places::new(0), Places::new(ENTRIES_MAX + 1)), (None, None));
    }

    #[test]
    fn requests_of_descriptors_are_those_that_programs_use() {
        // _IOR('h', 2, u32), _IOR('h', 3, u32), _IOR('h', 0x40, u64)
        let read = |number: u32, bytes: u32| 2 << 30 | bytes << 16 | u32::from(b'h') << 8 | number;
        assert_eq!((IOC_MAGIC, IOC_VERSION, IOC_REGISTER), (read(2, 4), read(3, 4), read(0x40, 8)));
    }
}
