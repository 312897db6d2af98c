//! RDMA verbs: devices, protection domains, memory regions, completion queues, reliable connected queue pairs.
//!
//! A thin, owning layer over libibverbs, which is loaded when it is first needed: a machine without it gets a clear
//! error from [`devices`] and everything else goes on. What the layer adds to the C interface is ownership (a child
//! keeps its parents alive, and is destroyed before them) and errors with words; what it does not add is memory
//! safety of the operations themselves, so posting is `unsafe` and says what the caller has to keep.
//!
//! Only what soft-RoCE, soft-iWARP and hardware have in common is used: the `post_send` and `poll_cq` interface,
//! SEND, RDMA READ and RDMA WRITE, shared receive queues, completion channels.

pub mod cm;
mod device;
mod ffi;
mod queue;
mod sysfs;

#[cfg(test)]
mod layout_tests;

pub use device::{Device, Limits, MemoryRegion, Port};
pub use queue::{
    Address, Completion, CompletionQueue, PathSettings, QueuePair, QueuePairSettings, Remote, SharedReceiveQueue, Work,
    WorkRequest,
};
pub use sysfs::{DeviceInfo, Gid, GidKind, PortInfo, devices_in};

use std::fmt;
use std::path::Path;

/// Where the kernel lists its RDMA devices.
pub const SYSFS: &str = "/sys/class/infiniband";

/// A local piece of memory of a work request.
pub type Sge = ffi::ibv_sge;

/// Why a verb failed, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(pub String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// Result of a verb.
pub type Result<T> = std::result::Result<T, Error>;

/// The machine's RDMA devices, by name, as the kernel describes them.
///
/// # Errors
/// When libibverbs cannot be loaded. No device is no error.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    ffi::Library::get().map_err(Error)?;
    Ok(devices_in(Path::new(SYSFS)))
}

/// The error of a call that reports through errno.
fn failed(what: &str) -> Error {
    Error(format!("{what}: {}", std::io::Error::last_os_error()))
}

/// The error of a call that returns an errno value.
fn failed_with(what: &str, errno: i32) -> Error {
    Error(format!("{what}: {}", std::io::Error::from_raw_os_error(errno)))
}
