//! Memory that other processes of this host may be given to read.
//!
//! A process has one arena at most: a sparse memfd that is mapped once. The pools of a process that serves take their
//! memory from there, so that a payload can be named to a reader by its place instead of being copied; others copy what
//! they send into it. The descriptor that readers get cannot be written through, and the size is sealed, so that no access
//! of theirs faults.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// What is taken is a multiple of this.
const PAGE_BYTES: usize = 4096;
/// Memory is aligned to its size, and at most to this: a huge page.
const ALIGN_BYTES_MAX: usize = 2 << 20;
/// Least size of the arena. Only what was touched takes memory.
const BYTES_MIN: usize = 64 << 30;

/// The memory of this process that can be shared.
pub struct Arena {
    start: usize,
    bytes: usize,
    read_only: OwnedFd,
    /// A forked child has no part in it.
    pid: u32,
    free: Mutex<Extents>,
}

static ARENA: OnceLock<io::Result<Arena>> = OnceLock::new();
/// Whether pools take their memory from the arena.
static SERVES: AtomicBool = AtomicBool::new(false);

impl Arena {
    /// From now on pools of this process take memory that can be shared. Memory they have already stays as it is. For
    /// processes that serve, and do not fork: a child would find holes in place of the pools' memory. Thread-safe.
    ///
    /// # Errors
    /// Those of the system; pools then go on with private memory.
    pub fn enable() -> Result<&'static Self, &'static io::Error> {
        let arena = ARENA.get_or_init(Self::new).as_ref()?;
        SERVES.store(true, Ordering::Relaxed);
        Ok(arena)
    }

    /// The arena of this process, made when first needed; pools stay as they are. `None` where the system does not allow it,
    /// and in a forked child, which has no part in its parent's. Thread-safe.
    pub fn open() -> Option<&'static Self> {
        ARENA.get_or_init(Self::new).as_ref().ok().filter(|arena| arena.is_own())
    }

    /// The arena of this process, if it has one.
    pub fn get() -> Option<&'static Self> {
        Self::made().filter(|arena| arena.is_own())
    }

    /// That of pools, if this process serves.
    pub(crate) fn of_pools() -> Option<&'static Self> {
        if SERVES.load(Ordering::Relaxed) { Self::get() } else { None }
    }

    /// Also in a forked child.
    pub(crate) fn made() -> Option<&'static Self> {
        ARENA.get().and_then(|made| made.as_ref().ok())
    }

    fn is_own(&self) -> bool {
        std::process::id() == self.pid
    }

    fn new() -> io::Result<Self> {
        // SAFETY: the name is a C string; a descriptor that comes back is ours.
        let fd = unsafe { libc::memfd_create(c"fs3".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        checked(fd)?;
        // SAFETY: just opened, and nobody else has it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        // SAFETY: asks for a number.
        let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
        let bytes = (2 * PAGE_BYTES * usize::try_from(pages).unwrap_or(0)).next_multiple_of(1 << 30).max(BYTES_MIN);
        file.set_len(bytes as u64)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: a call on a descriptor of ours.
        checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
        let read_only = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?.into();
        let start = map_aligned(&file, bytes, libc::PROT_READ | libc::PROT_WRITE)?;
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTFORK] {
            // SAFETY: the range was just mapped. What the kernel does not take works without.
            unsafe { libc::madvise(start as *mut c_void, bytes, advice) };
        }
        Ok(Self { start, bytes, read_only, pid: std::process::id(), free: Mutex::new(Extents::new(bytes)) })
    }

    /// For readers; it cannot be written through.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.read_only.as_fd()
    }

    /// Where memory of this process is in the arena, all `bytes` of it.
    pub fn locate(&self, ptr: *const u8, bytes: usize) -> Option<u64> {
        let at = (ptr as usize).checked_sub(self.start)?;
        (at.checked_add(bytes)? <= self.bytes).then_some(at as u64)
    }

    /// Zeroed memory, a multiple of [`PAGE_BYTES`]; `None` when there is no room.
    pub(crate) fn take(&self, bytes: usize) -> Option<*mut u8> {
        let align = bytes.next_power_of_two().min(ALIGN_BYTES_MAX);
        let at = self.free.lock().take(bytes, align)?;
        Some((self.start + at) as *mut u8)
    }

    /// Give memory back that was taken with this length. Readers that look at it still see zeros. Does nothing in a forked
    /// child.
    pub(crate) fn give_back(&self, ptr: *mut u8, bytes: usize) {
        if !self.is_own() {
            return;
        }
        // SAFETY: nobody in this process refers to the range any more.
        unsafe { libc::madvise(ptr.cast(), bytes, libc::MADV_REMOVE) };
        self.free.lock().give_back(ptr as usize - self.start, bytes);
    }
}

/// Map all of a file of `bytes` at an address that is fit for huge pages. It is left out of core dumps.
///
/// # Errors
/// Those of the system.
pub fn map_aligned(file: &impl AsFd, bytes: usize, protection: i32) -> io::Result<usize> {
    let reserved = bytes + ALIGN_BYTES_MAX;
    let anywhere = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), reserved, libc::PROT_NONE, anywhere, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let (base, start) = (base as usize, (base as usize).next_multiple_of(ALIGN_BYTES_MAX));
    let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: it replaces a part of what was just reserved.
    let mapped = unsafe { libc::mmap(start as *mut c_void, bytes, protection, flags, file.as_fd().as_raw_fd(), 0) };
    let error = io::Error::last_os_error();
    let failed = mapped == libc::MAP_FAILED;
    // SAFETY: of what was reserved, these parts are used by nobody.
    unsafe {
        if failed {
            libc::munmap(base as *mut c_void, reserved);
            return Err(error);
        }
        if start > base {
            libc::munmap(base as *mut c_void, start - base);
        }
        if start + bytes < base + reserved {
            libc::munmap((start + bytes) as *mut c_void, base + reserved - start - bytes);
        }
        libc::madvise(mapped, bytes, libc::MADV_DONTDUMP);
    }
    Ok(start)
}

fn checked(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Free ranges by their start. Neighbours are always joined.
struct Extents(BTreeMap<usize, usize>);

impl Extents {
    fn new(bytes: usize) -> Self {
        Self(BTreeMap::from([(0, bytes)]))
    }

    /// The first place that fits.
    fn take(&mut self, bytes: usize, align: usize) -> Option<usize> {
        let fits = |(&start, &length): (&usize, &usize)| {
            let at = start.next_multiple_of(align);
            (at + bytes <= start + length).then_some((start, length, at))
        };
        let (start, length, at) = self.0.iter().find_map(fits)?;
        self.0.remove(&start);
        if at > start {
            self.0.insert(start, at - start);
        }
        if at + bytes < start + length {
            self.0.insert(at + bytes, start + length - at - bytes);
        }
        Some(at)
    }

    fn give_back(&mut self, mut start: usize, mut bytes: usize) {
        if let Some(next) = self.0.remove(&(start + bytes)) {
            bytes += next;
        }
        if let Some((&before, &length)) = self.0.range(..start).next_back()
            && before + length == start
        {
            (start, bytes) = (before, length + bytes);
        }
        self.0.insert(start, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AlignedBuf;
    use std::os::unix::fs::FileExt;

    #[test]
    fn what_is_given_back_joins_its_neighbours() {
        let mut free = Extents::new(1 << 20);
        let taken: Vec<usize> = (0..4).map(|_| free.take(64 << 10, 64 << 10).unwrap()).collect();
        assert_eq!(taken, [0, 64 << 10, 128 << 10, 192 << 10]);
        for at in [taken[1], taken[3], taken[2], taken[0]] {
            free.give_back(at, 64 << 10);
        }
        assert_eq!(free.0, BTreeMap::from([(0, 1 << 20)]));
    }

    #[test]
    fn places_are_aligned_and_the_gap_before_them_stays_free() {
        let mut free = Extents::new(1 << 20);
        assert_eq!(free.take(4096, 4096), Some(0));
        assert_eq!(free.take(256 << 10, 256 << 10), Some(256 << 10));
        assert_eq!(free.take(8192, 8192), Some(8192));
        assert_eq!(free.take(1 << 20, 4096), None);
    }

    #[test]
    fn a_reader_sees_what_was_written_and_cannot_write() {
        let arena = Arena::enable().unwrap();
        let mut buf = AlignedBuf::shareable(256 << 10);
        buf.fill(7);
        let at = arena.locate(buf.as_mut_ptr(), buf.len()).expect("its memory is in the arena");
        let reader = File::from(arena.descriptor().try_clone_to_owned().unwrap());
        let mut seen = [0; 16];
        reader.read_exact_at(&mut seen, at).unwrap();
        assert_eq!(seen, [7; 16]);
        assert!(reader.write_at(&seen, at).is_err());
        assert!(reader.set_len(0).is_err());
        assert!(map_aligned(&reader, arena.bytes, libc::PROT_READ | libc::PROT_WRITE).is_err());
        drop(buf);
        reader.read_exact_at(&mut seen, at).unwrap();
        assert_eq!(seen, [0; 16]);
        let outside = AlignedBuf::new(256 << 10);
        assert_eq!(arena.locate(outside.as_mut_ptr(), 1), None);
    }
}
