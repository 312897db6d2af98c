//! Files of `/dev/shm` that are mapped.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::{Errno, Result};

/// `f_type` of tmpfs.
const TMPFS: libc::c_long = 0x0102_1994;

/// A shared mapping of a file. Unmapped when dropped; others may change the bytes at any time.
#[derive(Debug)]
pub struct Memory {
    start: *mut u8,
    bytes: usize,
    file: File,
}

// SAFETY: the mapping stays until the drop; what is in it is only touched through atomics or raw pointers.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Make a file in `/dev/shm` for this user alone, with all of its memory, on `numa` unless that is negative.
    /// Errors: ENOSPC and ENOMEM when there is too little memory, EEXIST.
    pub fn create(path: &Path, bytes: usize, numa: i32) -> Result<Self> {
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR | libc::O_CLOEXEC | libc::O_NOFOLLOW;
        let file = open(path, flags)?;
        let made = Self::fill(file, bytes, numa);
        if made.is_err() {
            let _ = std::fs::remove_file(path);
        }
        made
    }

    fn fill(file: File, bytes: usize, numa: i32) -> Result<Self> {
        let length = libc::off_t::try_from(bytes).map_err(|_| Errno(libc::EINVAL))?;
        file.set_len(length as u64)?;
        let memory = Self::map(file, bytes)?;
        memory.bind(numa)?;
        // Now, so that too little memory is an error here and not a signal when it is touched.
        // SAFETY: an ordinary system call on an open file.
        match unsafe { libc::posix_fallocate(memory.file.as_raw_fd(), 0, length) } {
            0 => Ok(memory),
            error => Err(Errno(error)),
        }
    }

    /// Map `bytes` of an existing file of the application's own.
    pub fn open(path: &Path, bytes: usize) -> Result<Self> {
        let file = open(path, libc::O_RDWR | libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK)?;
        if file.metadata()?.len() < bytes as u64 {
            return Err(Errno(libc::EINVAL));
        }
        Self::map(file, bytes)
    }

    /// Map all of a file that user `uid` announced: a regular file of tmpfs, theirs unless they are root. Errors: ENOENT,
    /// EINVAL for another kind or an empty one, EACCES for somebody else's.
    pub fn open_announced(path: &Path, uid: u32) -> Result<Self> {
        use std::os::unix::fs::MetadataExt;
        // Neither a link nor a fifo holds it up.
        let file = open(path, libc::O_RDWR | libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
            .map_err(|e| if e.0 == libc::ELOOP { Errno(libc::EINVAL) } else { e })?;
        let found = file.metadata()?;
        if !found.is_file() || found.len() == 0 || !is_tmpfs(&file)? {
            return Err(Errno(libc::EINVAL));
        }
        if uid != 0 && found.uid() != uid {
            return Err(Errno(libc::EACCES));
        }
        let bytes = usize::try_from(found.len()).map_err(|_| Errno(libc::EINVAL))?;
        Self::map(file, bytes)
    }

    /// Map `bytes` of a file that another process had mapped as far and gave away; it may have been cut since.
    pub fn inherited(file: OwnedFd, bytes: usize) -> Result<Self> {
        Self::map(file.into(), bytes)
    }

    /// One more descriptor of the file, for another process. Errors: EMFILE.
    pub fn share(&self) -> Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    fn map(file: File, bytes: usize) -> Result<Self> {
        if bytes == 0 {
            return Err(Errno(libc::EINVAL));
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self { start: start.cast(), bytes, file })
    }

    /// Have pages come from one NUMA node.
    fn bind(&self, numa: i32) -> Result<()> {
        const MPOL_BIND: libc::c_long = 2;
        let Ok(node) = u32::try_from(numa) else { return Ok(()) };
        if node >= 64 {
            return Err(Errno(libc::EINVAL));
        }
        let mask: u64 = 1 << node;
        // SAFETY: the mask is valid for 64 bits; the mapping is ours.
        let bound =
            unsafe { libc::syscall(libc::SYS_mbind, self.start, self.bytes, MPOL_BIND, &raw const mask, 65, 0) };
        // A kernel without NUMA has one node only.
        if bound == 0 || (Errno::last().0 == libc::ENOSYS && node == 0) { Ok(()) } else { Err(Errno::last()) }
    }

    /// First byte.
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// Bytes that are mapped.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether the file still has all bytes that are mapped.
    pub fn is_whole(&self) -> bool {
        self.file.metadata().is_ok_and(|found| found.len() >= self.bytes as u64)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this size; nobody uses it any more.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}

fn open(path: &Path, flags: i32) -> Result<File> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno(libc::EINVAL))?;
    // SAFETY: `path` is a valid C string.
    let fd = unsafe { libc::open(path.as_ptr(), flags, 0o600) };
    if fd < 0 {
        return Err(Errno::last());
    }
    // SAFETY: just opened, and owned by nobody else.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn is_tmpfs(file: &File) -> Result<bool> {
    // SAFETY: all zeros is a valid value of this plain structure.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `found` is valid for writing.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut found) } != 0 {
        return Err(Errno::last());
    }
    Ok(found.f_type as libc::c_long == TMPFS)
}
