//! What inodes share: memory, the runtime, the list of inodes with unwritten data.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use fs3_client::{Attr, ContentVersion, OpenFile, Region, RegionMut, Result};
use fuser::{INodeNo, Notifier};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::buffers::Pool;
use crate::inode::Inode;

/// Data that nobody flushed is written and published after this long, so that a log file grows for readers
/// elsewhere while it stays open.
pub(crate) const DIRTY_AGE_MAX: Duration = Duration::from_secs(3);

/// What an inode needs of an open file; [`OpenFile`] is the one, tests bring another.
pub(crate) trait FileIo: Send + Sync + 'static {
    /// See [`OpenFile::read`].
    fn read(&self, offset: u64, buf: RegionMut) -> impl Future<Output = (Result<usize>, RegionMut)> + Send;
    /// See [`OpenFile::write`].
    fn write(&self, offset: u64, data: Region) -> impl Future<Output = Result<usize>> + Send;
    /// See [`OpenFile::reserve`].
    fn reserve(&self, bytes: u64) -> impl Future<Output = Result<u64>> + Send;
    /// See [`OpenFile::publish`].
    fn publish(&self) -> impl Future<Output = Result<Attr>> + Send;
    /// See [`OpenFile::close`].
    fn close(&self) -> impl Future<Output = Result<Attr>> + Send;
    /// See [`OpenFile::take_steps`].
    fn take_steps(&self) -> Vec<(ContentVersion, ContentVersion)>;
    /// See [`OpenFile::length`].
    fn length(&self) -> u64;
    /// See [`OpenFile::length_limit`].
    fn length_limit(&self) -> u64;
    /// See [`OpenFile::require_room`].
    fn require_room(&self, end: u64) -> impl Future<Output = Result<()>> + Send;
}

impl FileIo for OpenFile {
    fn read(&self, offset: u64, buf: RegionMut) -> impl Future<Output = (Result<usize>, RegionMut)> + Send {
        OpenFile::read(self, offset, buf)
    }

    fn write(&self, offset: u64, data: Region) -> impl Future<Output = Result<usize>> + Send {
        OpenFile::write(self, offset, data)
    }

    fn reserve(&self, bytes: u64) -> impl Future<Output = Result<u64>> + Send {
        OpenFile::reserve(self, bytes)
    }

    fn publish(&self) -> impl Future<Output = Result<Attr>> + Send {
        OpenFile::publish(self)
    }

    fn close(&self) -> impl Future<Output = Result<Attr>> + Send {
        OpenFile::close(self)
    }

    fn take_steps(&self) -> Vec<(ContentVersion, ContentVersion)> {
        OpenFile::take_steps(self)
    }

    fn length(&self) -> u64 {
        OpenFile::length(self)
    }

    fn length_limit(&self) -> u64 {
        OpenFile::length_limit(self)
    }

    fn require_room(&self, end: u64) -> impl Future<Output = Result<()>> + Send {
        OpenFile::require_room(self, end)
    }
}

/// Shared by all inodes of a mount.
pub(crate) struct Io<F> {
    pub runtime: Handle,
    /// Memory of data on its way to storage.
    pub write_pool: Pool,
    /// Memory of data on its way from storage.
    pub read_pool: Pool,
    /// While this process has the kernel's device: whoever has it keeps the mount alive.
    pub notifier: Mutex<Option<Notifier>>,
    dirty: Mutex<HashMap<u64, Arc<Inode<F>>>>,
}

impl<F: FileIo> Io<F> {
    pub fn new(runtime: Handle, memory_bytes: usize) -> Self {
        Self {
            runtime,
            write_pool: Pool::new(memory_bytes / 2),
            read_pool: Pool::new(memory_bytes / 2),
            notifier: Mutex::default(),
            dirty: Mutex::default(),
        }
    }

    pub fn notifier(&self) -> Option<Notifier> {
        self.notifier.lock().clone()
    }

    /// Make the kernel forget the pages and the attributes of a file. It waits for reads and writes of the pages, so
    /// nothing that they need may wait for it.
    pub fn forget_pages(&self, inode: u64) -> Option<JoinHandle<()>> {
        let notifier = self.notifier()?;
        let forget = move || drop(notifier.inval_inode(INodeNo(inode), 0, 0));
        Some(self.runtime.spawn_blocking(forget))
    }

    /// Remember an inode that has data to write or a length to publish.
    pub fn list_dirty(&self, inode: &Arc<Inode<F>>) {
        self.dirty.lock().insert(inode.id, inode.clone());
    }

    fn dirty_inodes(&self) -> Vec<Arc<Inode<F>>> {
        self.dirty.lock().values().cloned().collect()
    }

    /// Make memory come free: send what the inode that was dirty first keeps.
    pub fn reclaim(self: &Arc<Self>) {
        let oldest = self.dirty_inodes().into_iter().filter(|i| i.keeps_data()).min_by_key(|i| i.dirty_since());
        if let Some(inode) = oldest {
            inode.send_all(self);
        }
    }

    /// Forget clean inodes and return those that have been dirty for at least `age`.
    pub fn aged(&self, age: Duration) -> Vec<Arc<Inode<F>>> {
        let mut dirty = self.dirty.lock();
        dirty.retain(|_, inode| inode.dirty_since().is_some());
        dirty.values().filter(|i| i.dirty_since().is_some_and(|since| since.elapsed() >= age)).cloned().collect()
    }
}
