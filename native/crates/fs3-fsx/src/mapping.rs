//! A shared mapping of a file.

use std::io;
use std::os::fd::RawFd;

pub(crate) const PAGE: u64 = 4096;

/// `PROT_READ | PROT_WRITE`, `MAP_SHARED`, of `start..end` of a file, both multiples of a page.
pub(crate) struct Mapping {
    address: *mut u8,
    pub start: u64,
    pub end: u64,
}

impl Mapping {
    /// Map the pages that `start..end` touches.
    pub fn new(fd: RawFd, start: u64, end: u64) -> io::Result<Self> {
        let (start, end) = (start / PAGE * PAGE, end.div_ceil(PAGE) * PAGE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                (end - start) as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                start as libc::off_t,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { address: address.cast(), start, end })
    }

    pub fn covers(&self, start: u64, end: u64) -> bool {
        self.start <= start && end <= self.end
    }

    fn pointer(&self, at: u64, len: usize) -> *mut u8 {
        assert!(self.covers(at, at + len as u64));
        // SAFETY: inside the mapping, as was just checked.
        unsafe { self.address.add((at - self.start) as usize) }
    }

    /// The bytes `at..at+len`, which must not lie behind the page that the file ends in: SIGBUS.
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        // SAFETY: `pointer` checks the range; nobody else has a reference to these bytes.
        unsafe { std::ptr::copy_nonoverlapping(self.pointer(at, len), bytes.as_mut_ptr(), len) };
        bytes
    }

    /// As [`Mapping::read`], the other way.
    pub fn write(&self, at: u64, data: &[u8]) {
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.pointer(at, data.len()), data.len()) };
    }

    /// `msync(MS_SYNC)` of the pages that `start..end` touches.
    pub fn sync(&self, start: u64, end: u64) -> io::Result<()> {
        let (start, end) = (start / PAGE * PAGE, end.div_ceil(PAGE) * PAGE);
        let len = (end - start) as usize;
        // SAFETY: `pointer` checks the range.
        let failed = unsafe { libc::msync(self.pointer(start, len).cast(), len, libc::MS_SYNC) };
        if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and nobody points into it.
        unsafe { libc::munmap(self.address.cast(), (self.end - self.start) as usize) };
    }
}
