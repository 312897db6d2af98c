//! The shared-memory ring between applications and the mount daemon: user-space I/O as programs for 3FS do it.
//!
//! An *iov* is memory in `/dev/shm` that data is read into or written from; a *ring* is memory of the same kind in which
//! an application prepares I/O ([`app::Ring`]) and the daemon completes it ([`daemon::Served`]). Both are announced by a
//! symlink in `3fs-virt/iovs` of the mount, whose name says all about them ([`names`]). After that neither side makes a
//! system call per I/O: they only wake each other.
//!
//! Ordinary programs link this crate (`libhf3fs_api_shared.so`), so it depends on libc alone.

pub mod app;
pub mod daemon;
pub mod fds;
mod fork;
mod futex;
pub mod guard;
pub mod layout;
mod memory;
pub mod mounts;
pub mod names;
#[cfg(test)]
mod ring_tests;
#[cfg(test)]
mod testing;

pub use memory::Memory;

/// The result of what the C interface answers with an errno.
pub type Result<T> = std::result::Result<T, Errno>;

/// A positive errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// That of the system call that failed last in this thread.
    pub fn last() -> Self {
        Self(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
    }
}

impl From<std::io::Error> for Errno {
    fn from(error: std::io::Error) -> Self {
        Self(error.raw_os_error().unwrap_or(libc::EINVAL))
    }
}
