//! Files that a process registered for rings.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, LazyLock, Mutex, RwLock};

use crate::layout::{FS_MAGIC, IOC_MAGIC, IOC_REGISTER};
use crate::{Errno, Result, fork};

/// A file of a mount that rings may use. It stays open until it is withdrawn, whatever happens to its descriptor.
pub struct Registered {
    file: OwnedFd,
    given: i32,
    access: i32,
    /// For the process of this generation; a forked child gets its own with its copy of the descriptor.
    token: Mutex<(u32, u64)>,
}

impl Registered {
    fn token(&self) -> Result<u64> {
        let mut known = self.token.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let now = fork::generation();
        if known.0 != now {
            *known = (now, ask_token(self.file.as_raw_fd())?);
        }
        Ok(known.1)
    }
}

fn ask_token(fd: i32) -> Result<u64> {
    let mut token: u64 = 0;
    // SAFETY: `token` is valid for writing.
    match unsafe { libc::ioctl(fd, libc::c_ulong::from(IOC_REGISTER), &raw mut token) } {
        0 => Ok(token),
        _ => Err(Errno::last()),
    }
}

/// By the descriptor that was given, and by the copy of it.
static TABLE: LazyLock<RwLock<HashMap<i32, Arc<Registered>>>> = LazyLock::new(RwLock::default);

/// Whether a descriptor is one of a mount that has rings.
pub fn is_of_mount(fd: i32) -> bool {
    let mut magic: u32 = 0;
    // SAFETY: `magic` is valid for writing.
    let answered = unsafe { libc::ioctl(fd, libc::c_ulong::from(IOC_MAGIC), &raw mut magic) } == 0;
    answered && magic == FS_MAGIC
}

/// Register an open file; returns the copy of its descriptor. Errors: EBADF when it is none of a mount, EINVAL when its
/// number is registered already, EMFILE.
pub fn register(fd: i32) -> Result<i32> {
    if fd < 0 || !is_of_mount(fd) {
        return Err(Errno(libc::EBADF));
    }
    let mut table = TABLE.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    if table.contains_key(&fd) {
        return Err(Errno(libc::EINVAL));
    }
    // Not 0, whose negative is no number of its own.
    // SAFETY: an ordinary system call.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(Errno::last());
    }
    // SAFETY: just made, and owned by nobody else.
    let file = unsafe { OwnedFd::from_raw_fd(copy) };
    // SAFETY: an ordinary system call.
    let flags = unsafe { libc::fcntl(copy, libc::F_GETFL) };
    if flags < 0 {
        return Err(Errno::last());
    }
    let token = Mutex::new((fork::generation(), ask_token(copy)?));
    let registered = Arc::new(Registered { file, given: fd, access: flags & libc::O_ACCMODE, token });
    table.insert(fd, registered.clone());
    table.insert(copy, registered);
    Ok(copy)
}

/// Withdraw a file by either of its descriptors. I/Os that were prepared go on.
pub fn withdraw(fd: i32) {
    let mut table = TABLE.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(registered) = table.remove(&fd.saturating_abs()) {
        table.remove(&registered.given);
        table.remove(&registered.file.as_raw_fd());
    }
}

/// The token of a registered file, for reading or writing. Errors: EBADF, EACCES when it is not open for that.
pub(crate) fn token(fd: i32, read: bool) -> Result<u64> {
    let table = TABLE.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    let registered = table.get(&fd.saturating_abs()).ok_or(Errno(libc::EBADF))?;
    let refused = if read { libc::O_WRONLY } else { libc::O_RDONLY };
    if registered.access == refused { Err(Errno(libc::EACCES)) } else { registered.token() }
}

/// Make `start..end` of an open file a hole, as far as the file goes. Errors: EINVAL when nothing lies between, EBADF.
pub fn punch(fd: i32, start: u64, end: u64) -> Result<()> {
    let length = end.checked_sub(start).filter(|length| *length > 0).ok_or(Errno(libc::EINVAL))?;
    let (Ok(start), Ok(length)) = (start.try_into(), length.try_into()) else { return Err(Errno(libc::EINVAL)) };
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: an ordinary system call.
    if unsafe { libc::fallocate(fd, mode, start, length) } == 0 { Ok(()) } else { Err(Errno::last()) }
}
