//! Memory that I/O reads from and writes into.
//!
//! A region is a window of memory together with a reference that keeps the memory alive, so that an operation
//! that outlives its caller never touches freed memory. Who may touch the bytes at a time is a protocol
//! between the holders, stated at each use.

use crate::{Arena, mapped};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::sync::Arc;

type Owner = Arc<dyn Any + Send + Sync>;

/// Page-aligned memory of a fixed size, fit for direct I/O.
///
/// Large buffers are mapped, so that their pages are zeroed when they are first touched and not twice; the
/// largest ask for huge pages, which make that first touch several times cheaper.
pub struct AlignedBuf {
    ptr: *mut u8,
    len: usize,
    in_arena: bool,
}

// SAFETY: AlignedBuf owns its memory exclusively; access goes through &self / &mut self.
unsafe impl Send for AlignedBuf {}
// SAFETY: as above; shared access is read-only.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// Alignment of the memory in bytes.
    pub const ALIGN: usize = 4096;
    /// From this size on a buffer is a mapping of its own.
    pub const MAP_BYTES_MIN: usize = 128 << 10;
    /// From this size on huge pages are asked for.
    const HUGE_BYTES_MIN: usize = 2 << 20;

    /// Zeroed memory of `len` bytes (at least one page is reserved).
    pub fn new(len: usize) -> Self {
        let layout = Self::layout(len);
        let ptr = if len < Self::MAP_BYTES_MIN {
            // SAFETY: the layout has a non-zero size.
            unsafe { alloc_zeroed(layout) }
        } else {
            map_zeroed(layout.size(), len >= Self::HUGE_BYTES_MIN)
        };
        if ptr.is_null() {
            handle_alloc_error(layout);
        }
        if len >= Self::MAP_BYTES_MIN {
            mapped::mapped(ptr as usize, layout.size());
        }
        Self { ptr, len, in_arena: false }
    }

    /// As [`AlignedBuf::new`], of memory that other processes can be given to read if this one serves ([`Arena::enable`]).
    pub fn shareable(len: usize) -> Self {
        Arena::of_pools().and_then(|arena| Self::of(arena, len)).unwrap_or_else(|| Self::new(len))
    }

    /// Memory of the arena; `None` when it has no room.
    pub(crate) fn of(arena: &Arena, len: usize) -> Option<Self> {
        let layout = Self::layout(len);
        let ptr = arena.take(layout.size())?;
        if len >= Self::MAP_BYTES_MIN {
            mapped::mapped(ptr as usize, layout.size());
        }
        Some(Self { ptr, len, in_arena: true })
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1).next_multiple_of(Self::ALIGN), Self::ALIGN).expect("a sane buffer size")
    }

    /// Start of the memory.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.ptr
    }
}

/// A private anonymous mapping, or null.
fn map_zeroed(bytes: usize, huge: bool) -> *mut u8 {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
    let ptr = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if ptr == libc::MAP_FAILED {
        return std::ptr::null_mut();
    }
    if huge {
        // SAFETY: the range was just mapped. Only advice: without huge pages it works the same.
        unsafe { libc::madvise(ptr, bytes, libc::MADV_HUGEPAGE) };
    }
    ptr.cast()
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        let layout = Self::layout(self.len);
        if self.len >= Self::MAP_BYTES_MIN {
            mapped::unmapping(self.ptr as usize, layout.size());
        }
        if self.in_arena {
            Arena::made().expect("it was taken from there").give_back(self.ptr, layout.size());
        } else if self.len < Self::MAP_BYTES_MIN {
            // SAFETY: allocated in `new` with the same layout.
            unsafe { dealloc(self.ptr, layout) }
        } else {
            // SAFETY: mapped in `new` with the same size, and nobody refers to it any more.
            unsafe { libc::munmap(self.ptr.cast(), layout.size()) };
        }
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: ptr is valid for len bytes for the life of self.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl std::ops::DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: ptr is valid for len bytes and self is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

/// A read-only window of shared memory.
#[derive(Clone)]
pub struct Region {
    ptr: *const u8,
    len: usize,
    owner: Owner,
}

// SAFETY: the owner keeps the memory alive; holders only read through it.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// # Safety
    /// `ptr` must be valid for reads of `len` bytes while `owner` lives, and nobody may write to those bytes
    /// while the region is being read.
    pub unsafe fn from_raw(ptr: *const u8, len: usize, owner: Owner) -> Self {
        Self { ptr, len, owner }
    }

    /// No bytes.
    pub fn empty() -> Self {
        Self { ptr: std::ptr::NonNull::dangling().as_ptr(), len: 0, owner: Arc::new(()) }
    }

    /// Own `bytes`.
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        let owner = Arc::new(bytes);
        Self { ptr: owner.as_ptr(), len: owner.len(), owner }
    }

    /// Own the first `len` bytes of a buffer.
    pub fn from_aligned(buf: AlignedBuf, len: usize) -> Self {
        assert!(len <= buf.len());
        let owner = Arc::new(buf);
        Self { ptr: owner.as_mut_ptr(), len, owner }
    }

    /// A part of this window. Panics when out of range.
    pub fn slice(&self, start: usize, len: usize) -> Self {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: start is within the window.
        Self { ptr: unsafe { self.ptr.add(start) }, len, owner: self.owner.clone() }
    }
}

impl std::ops::Deref for Region {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: valid while the owner lives, by the contract of from_raw.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

/// A window of memory that one operation writes into.
///
/// It can be split but not cloned: at any time one holder may write to the bytes.
pub struct RegionMut {
    ptr: *mut u8,
    len: usize,
    owner: Owner,
}

// SAFETY: the owner keeps the memory alive; the holder is the only one that touches it.
unsafe impl Send for RegionMut {}
// SAFETY: shared access is read-only.
unsafe impl Sync for RegionMut {}

impl RegionMut {
    /// # Safety
    /// `ptr` must be valid for writes of `len` bytes while `owner` lives, and nobody else may touch those
    /// bytes while the region lives.
    pub unsafe fn from_raw(ptr: *mut u8, len: usize, owner: Owner) -> Self {
        Self { ptr, len, owner }
    }

    /// The first `len` bytes of a buffer, which comes back through [`RegionMut::freeze`] or is dropped.
    pub fn from_aligned(buf: AlignedBuf, len: usize) -> Self {
        assert!(len <= buf.len());
        let ptr = buf.as_mut_ptr();
        Self { ptr, len, owner: Arc::new(buf) }
    }

    /// Zeroed memory of `len` bytes.
    pub fn zeroed(len: usize) -> Self {
        Self::from_aligned(AlignedBuf::new(len), len)
    }

    /// Cut in two at `at`. Panics when out of range.
    pub fn split_at(self, at: usize) -> (Self, Self) {
        assert!(at <= self.len);
        // SAFETY: `at` is within the window; the halves do not overlap.
        let right = Self { ptr: unsafe { self.ptr.add(at) }, len: self.len - at, owner: self.owner.clone() };
        (Self { len: at, ..self }, right)
    }

    /// Start of the window, for system calls.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.ptr
    }

    /// Give up writing.
    pub fn freeze(self) -> Region {
        Region { ptr: self.ptr, len: self.len, owner: self.owner }
    }
}

impl std::ops::Deref for RegionMut {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: valid while the owner lives.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl std::ops::DerefMut for RegionMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: valid while the owner lives; the holder is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}
