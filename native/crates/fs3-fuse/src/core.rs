//! The state of one mount and the steps that several operations share.

use std::collections::HashMap;
use std::future::Future;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use fs3_client::{Attr, Client, Code, ContentVersion, Error, OpenFile, OpenOptions, Result, Retained, at_inode};
use fuser::{Errno, FileAttr, INodeNo};
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

use crate::attrs::file_attr;
use crate::caller::{Who, superuser};
use crate::dirattrs::DirAttrs;
use crate::dirs::DirStream;
use crate::ids::IdMaps;
use crate::inode::Inode;
use crate::io::{DIRTY_AGE_MAX, Io};
use crate::kills::{Asker, Kills};
use crate::locks::{HandleLocks, Locks};
use crate::mount::MountOptions;
use crate::readahead::Stream;
use crate::stats::{Op, Stats};
use crate::tables::Recent;
use crate::told::{Teller, Told};
use crate::virt::{Rings, Virt};

/// How often one operation may find its file closed early. A handle is closed early at most once, so it is a bug beyond.
const EARLY_CLOSES_MAX: usize = 8;

/// Number of the root directory, in a cluster and to the kernel.
pub(crate) const ROOT: u64 = 1;
/// Places in the tables of what the kernel was told lately.
const RECENT_PLACES: usize = 1 << 14;

pub(crate) type File = Inode<OpenFile>;

/// One `open` of the kernel.
pub(crate) struct Handle {
    pub inode: Arc<File>,
    /// `None` while parked: closed early, opened again by the next use.
    file: Mutex<Option<Arc<OpenFile>>>,
    /// While parked: what lets it be opened again.
    retained: Mutex<Option<Retained>>,
    pub read: bool,
    pub write: bool,
    /// O_DIRECT: nothing is buffered when an operation returns.
    pub direct: bool,
    /// O_SYNC or O_DSYNC, of a handle without page cache: the kernel does not sync after its writes.
    pub sync: bool,
    /// O_SYNC or O_DSYNC, however it is cached.
    pub durable: bool,
    /// The kernel does not tell when a descriptor of it is closed.
    pub unflushed: bool,
    pub locks: HandleLocks,
    pub stream: Mutex<Stream>,
    /// Failures of background writes that were told through this handle.
    pub told: Told,
    /// Closed early once already and used again: its descriptor is shared, so parking does not pay.
    reopened: std::sync::atomic::AtomicBool,
}

impl Handle {
    /// The open file, unless the handle is parked.
    pub fn open_file(&self) -> Option<Arc<OpenFile>> {
        self.file.lock().clone()
    }
}

/// One `opendir` of the kernel.
pub(crate) struct DirHandle {
    pub inode: u64,
    pub stream: tokio::sync::Mutex<DirStream>,
}

/// How a handle is opened.
pub(crate) struct HandleFlags {
    pub read: bool,
    pub write: bool,
    pub direct: bool,
    pub sync: bool,
    pub durable: bool,
    pub unflushed: bool,
}

/// Everything that a mount knows. Shared by all operations.
pub(crate) struct Core {
    pub client: Client,
    pub io: Arc<Io<OpenFile>>,
    pub options: MountOptions,
    inodes: Mutex<HashMap<u64, Entry>>,
    /// What the kernel's page cache holds of files that are not open; forgotten with the kernel's inode.
    versions: Mutex<HashMap<u64, ContentVersion>>,
    handles: RwLock<HashMap<u64, Arc<Handle>>>,
    dirs: RwLock<HashMap<u64, Arc<DirHandle>>>,
    pub(crate) next_handle: AtomicU64,
    /// What the kernel was told, by inode.
    told: Recent<Shown>,
    /// Inodes of files that the kernel was told, by (parent, name).
    names: Recent<u64>,
    pub dir_attrs: DirAttrs,
    pub locks: Locks,
    pub virt: Virt,
    pub rings: Rings,
    pub stats: Arc<Stats>,
    pub kills: Arc<Kills>,
    /// The directory of the cluster that is the root of the mount.
    pub root: u64,
    /// `None`: ids are the same in the cluster.
    pub ids: Option<&'static IdMaps>,
    /// Where it is mounted.
    pub mountpoint: Vec<u8>,
    tasks: Arc<Tasks>,
}

/// What is remembered of attributes that the kernel was told.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shown {
    length: u64,
    mtime_ns: i64,
    /// Bits of `XattrBit`.
    xattrs: u32,
}

impl Shown {
    fn of(attr: &Attr) -> Self {
        Self { length: attr.length, mtime_ns: attr.mtime_ns, xattrs: attr.xattrs }
    }
}

struct Entry {
    inode: Arc<File>,
    handles: usize,
    parked: Vec<Arc<Handle>>,
}

/// What an operation is to the counters, and to who waits for it.
pub(crate) struct Job {
    /// `None`: nobody asked for it.
    op: Option<Op>,
    /// It may be dropped in the middle when its asker is being killed.
    asker: Option<Asker>,
}

impl Job {
    pub const BACKGROUND: Self = Self { op: None, asker: None };

    /// An operation that may be dropped at any point: it changes nothing, at the services either.
    pub fn droppable(op: Op, request: &fuser::Request) -> Self {
        Self { op: Some(op), asker: Some(Asker::of(request)) }
    }
}

impl From<Op> for Job {
    fn from(op: Op) -> Self {
        Self { op: Some(op), asker: None }
    }
}

#[derive(Default)]
struct Tasks {
    running: AtomicUsize,
    idle: Notify,
}

struct TaskGuard(Arc<Tasks>);

impl Drop for TaskGuard {
    fn drop(&mut self) {
        if self.0.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

pub(crate) fn errno(error: &Error) -> Errno {
    Errno::from_i32(error.errno())
}

impl Core {
    pub fn new(
        client: Client,
        runtime: tokio::runtime::Handle,
        mountpoint: &Path,
        root: u64,
        options: MountOptions,
    ) -> Self {
        let io = Arc::new(Io::new(runtime, options.max_memory_bytes));
        Self {
            client,
            io,
            inodes: Mutex::default(),
            versions: Mutex::default(),
            handles: RwLock::default(),
            dirs: RwLock::default(),
            next_handle: AtomicU64::new(1),
            told: Recent::new(RECENT_PLACES, options.attr_timeout),
            names: Recent::new(RECENT_PLACES, options.entry_timeout),
            dir_attrs: DirAttrs::new(options.attr_timeout),
            locks: Locks::default(),
            virt: Virt::default(),
            rings: Rings::default(),
            stats: Arc::default(),
            kills: Arc::default(),
            root,
            // A mount lives about as long as its process, and every request refers to them.
            ids: (!options.ids.same()).then(|| &*Box::leak(Box::new(options.ids.clone()))),
            mountpoint: mountpoint.as_os_str().as_bytes().to_vec(),
            tasks: Arc::default(),
            options,
        }
    }

    /// Whether no operation is running.
    pub fn is_idle(&self) -> bool {
        self.tasks.running.load(Ordering::Relaxed) == 0
    }

    /// Run an operation here as far as it goes without waiting, then where it is woken; [`Core::drain`] waits for it.
    pub fn spawn(&self, job: impl Into<Job>, operation: impl Future<Output = ()> + Send + 'static) {
        let Job { op, asker } = job.into();
        self.tasks.running.fetch_add(1, Ordering::AcqRel);
        let guard = TaskGuard(self.tasks.clone());
        let timing = op.map(|op| self.stats.begin(op));
        // Boxed before it is wrapped: a future that waits for another one has room for it twice.
        let operation = Box::pin(operation);
        let operation = async move {
            operation.await;
            drop(timing);
            drop(guard);
        };
        match asker {
            Some(asker) => self.kills.run(&self.io.runtime, asker, operation),
            None => fs3_rt::Handle::from(self.io.runtime.clone()).begin(operation),
        }
    }

    /// The number of an inode that the kernel knows as `inode`.
    pub fn real(&self, inode: INodeNo) -> u64 {
        if inode.0 == ROOT { self.root } else { inode.0 }
    }

    /// The kernel's number of an inode.
    pub fn shown(&self, inode: u64) -> u64 {
        if inode == self.root { ROOT } else { inode }
    }

    pub fn who(&self, request: &fuser::Request) -> Who {
        Who::of(request, self.ids)
    }

    /// The owner and group that a `chown` to these shall write. Errors: InvalidArgument for one that the cluster lacks.
    pub fn written_owner(&self, uid: Option<u32>, gid: Option<u32>) -> Result<(Option<u32>, Option<u32>)> {
        let Some(ids) = self.ids else { return Ok((uid, gid)) };
        let uid = uid.map_or(Ok(None), |uid| ids.users.written(uid))?;
        let gid = gid.map_or(Ok(None), |gid| ids.groups.written(gid))?;
        Ok((uid, gid))
    }

    /// Whether what the kernel permits by mode bits and access control lists need not be checked again.
    pub fn kernel_decides(&self) -> bool {
        self.options.default_permissions && self.ids.is_none()
    }

    /// Open files and directories.
    pub fn open_counts(&self) -> (usize, usize) {
        (self.handles.read().len(), self.dirs.read().len())
    }

    /// Wait until no operation runs, `limit` at most. Says whether none does.
    pub async fn drain(&self, limit: Duration) -> bool {
        let wait = async {
            loop {
                let idle = self.tasks.idle.notified();
                tokio::pin!(idle);
                idle.as_mut().enable();
                if self.tasks.running.load(Ordering::Acquire) == 0 {
                    return;
                }
                idle.await;
            }
        };
        tokio::time::timeout(limit, wait).await.is_ok()
    }

    /// Write and publish everything, and forget read-ahead: before the mount goes away.
    pub async fn flush_all(&self) {
        for inode in self.io.aged(Duration::ZERO) {
            self.write_back(&inode).await;
        }
    }

    /// What has to be done about once a second: old data is written, old read-ahead dropped.
    pub async fn tick(self: &Arc<Self>) {
        for inode in self.io.aged(DIRTY_AGE_MAX) {
            let core = self.clone();
            self.spawn(Job::BACKGROUND, async move { core.write_back(&inode).await });
        }
        let open: Vec<_> = self.inodes.lock().values().map(|e| e.inode.clone()).collect();
        for inode in open {
            inode.blocks.drop_aged();
        }
        self.forget_lost();
        self.rings.mend();
    }

    async fn write_back(&self, inode: &Arc<File>) {
        inode.flush(&self.io).await;
        if let Err(error) = inode.publish(None, false).await {
            tracing::warn!(inode = inode.id, %error, "publishing a length failed");
            inode.fail(error);
        }
    }

    // Attributes

    /// Attributes as the kernel shall see them, remembering what it is told.
    pub fn tell(&self, mut attr: Attr) -> FileAttr {
        if let Some(inode) = self.inode(attr.inode) {
            inode.merge(&mut attr);
            inode.note_mode(attr.mode);
        }
        self.told.put(attr.inode, Shown::of(&attr));
        let mut shown = file_attr(&attr);
        shown.ino = INodeNo(self.shown(attr.inode));
        if let Some(ids) = self.ids {
            (shown.uid, shown.gid) = (ids.users.shown(attr.uid), ids.groups.shown(attr.gid));
        }
        shown
    }

    /// Have appends to a file take their place, so that the length that the kernel is told is the right one: its reads
    /// end there.
    pub async fn place_appends(&self, inode: u64) {
        if let Some(inode) = self.inode(inode) {
            inode.place(&self.io).await;
        }
    }

    /// Whether appends to a file have no place yet.
    pub fn keeps_appends(&self, inode: u64) -> bool {
        self.inode(inode).is_some_and(|inode| inode.keeps_appends())
    }

    /// As [`Core::tell`] for the entry `name` of `parent`.
    pub fn tell_entry(&self, parent: u64, name: &[u8], attr: Attr) -> FileAttr {
        self.names.put((parent, name), attr.inode);
        self.tell(attr)
    }

    /// The inode behind a name that the kernel was told lately.
    pub fn known_inode(&self, parent: u64, name: &[u8]) -> Option<u64> {
        self.names.get((parent, name))
    }

    pub fn forget_name(&self, parent: u64, name: &[u8]) {
        self.names.remove((parent, name));
    }

    /// Whether the kernel's attributes of an inode are those of `attr`; if they may not be, it is made to ask.
    pub fn refresh_kernel(&self, attr: &Attr) -> bool {
        let same = self.told.get(attr.inode) == Some(Shown::of(attr));
        if !same {
            self.invalidate_attr(attr.inode);
        }
        same
    }

    /// Make the kernel ask for the attributes of an inode.
    pub fn invalidate_attr(&self, inode: u64) {
        if let Some(notifier) = self.io.notifier() {
            // A negative offset concerns the attributes alone, so no page lock is taken.
            let _ = notifier.inval_inode(INodeNo(self.shown(inode)), -1, 0);
        }
    }

    /// Which extended attributes (bits of `XattrBit`) an inode had when the kernel was told of it lately.
    pub fn known_xattrs(&self, inode: u64) -> Option<u32> {
        self.told.get(inode).map(|shown| shown.xattrs)
    }

    pub fn forget(&self, inode: u64) {
        self.versions.lock().remove(&inode);
    }

    // Open files

    /// The inode if it has open handles.
    pub fn inode(&self, id: u64) -> Option<Arc<File>> {
        self.inodes.lock().get(&id).map(|e| e.inode.clone())
    }

    /// One more handle of an inode.
    pub fn enter(&self, id: u64) -> Arc<File> {
        let mut inodes = self.inodes.lock();
        let entry = inodes.entry(id).or_insert_with(|| {
            let inode = Arc::new(File::new(id));
            inode.set_version(self.versions.lock().remove(&id));
            Entry { inode, handles: 0, parked: Vec::new() }
        });
        entry.handles += 1;
        entry.inode.clone()
    }

    fn leave(&self, inode: &Arc<File>) {
        let mut inodes = self.inodes.lock();
        let Some(entry) = inodes.get_mut(&inode.id) else { return };
        entry.handles -= 1;
        if entry.handles == 0 {
            inodes.remove(&inode.id);
            inode.abandon();
            if let Some(version) = inode.version() {
                self.versions.lock().insert(inode.id, version);
            }
        }
    }

    /// Register an open file; returns the kernel's handle of it.
    pub fn add_handle(&self, inode: Arc<File>, file: Arc<OpenFile>, flags: HandleFlags) -> u64 {
        let id = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.put_handle(id, inode, Some(file), flags);
        id
    }

    /// Register an open file under a number of the kernel's; without a file it is as if it had been closed early.
    pub fn put_handle(&self, id: u64, inode: Arc<File>, file: Option<Arc<OpenFile>>, flags: HandleFlags) {
        if let Some(file) = file.as_ref().filter(|_| flags.write) {
            inode.add_writer(file.clone());
        }
        let handle = Handle {
            told: inode.told(),
            inode,
            file: Mutex::new(file),
            retained: Mutex::default(),
            read: flags.read,
            write: flags.write,
            direct: flags.direct,
            sync: flags.sync,
            durable: flags.durable,
            unflushed: flags.unflushed,
            locks: HandleLocks::default(),
            stream: Mutex::default(),
            reopened: Default::default(),
        };
        self.handles.write().insert(id, Arc::new(handle));
    }

    pub fn handle(&self, id: u64) -> Option<Arc<Handle>> {
        self.handles.read().get(&id).cloned()
    }

    pub fn all_handles(&self) -> Vec<Arc<Handle>> {
        self.handles.read().values().cloned().collect()
    }

    pub fn handles_by_number(&self) -> Vec<(u64, Arc<Handle>)> {
        self.handles.read().iter().map(|(id, handle)| (*id, handle.clone())).collect()
    }

    pub fn dirs_by_number(&self) -> Vec<(u64, Arc<DirHandle>)> {
        self.dirs.read().iter().map(|(id, dir)| (*id, dir.clone())).collect()
    }

    /// A handle that may be used. Errors: EBADF, EIO when locks it had are lost.
    pub fn usable(&self, id: u64) -> std::result::Result<Arc<Handle>, Errno> {
        let handle = self.handle(id).ok_or(Errno::EBADF)?;
        self.check_locks(&handle)?;
        Ok(handle)
    }

    pub fn add_dir(&self, inode: u64) -> u64 {
        let id = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.put_dir(id, inode, DirStream::default());
        id
    }

    /// Register an open directory under a number of the kernel's.
    pub fn put_dir(&self, id: u64, inode: u64, stream: DirStream) {
        self.dirs.write().insert(id, Arc::new(DirHandle { inode, stream: stream.into() }));
    }

    pub fn dir(&self, id: u64) -> Option<Arc<DirHandle>> {
        self.dirs.read().get(&id).cloned()
    }

    pub fn remove_dir(&self, id: u64) {
        self.dirs.write().remove(&id);
    }

    /// The open file of a handle; one that was closed early is opened again.
    pub async fn file(&self, handle: &Arc<Handle>) -> Result<Arc<OpenFile>> {
        if let Some(file) = handle.file.lock().clone() {
            return Ok(file);
        }
        // The right to use the file was given when the handle was made and does not end with its mode bits.
        let options = OpenOptions { read: true, write: handle.write, truncate: false };
        let file = self.client.open(&superuser(), at_inode(handle.inode.id), options).await?;
        let kept = {
            let mut slot = handle.file.lock();
            match &*slot {
                Some(other) => other.clone(),
                None => {
                    *slot = Some(file.clone());
                    if handle.write {
                        handle.inode.add_writer(file.clone());
                    }
                    file.clone()
                }
            }
        };
        handle.reopened.store(true, Ordering::Relaxed);
        self.unlist_parked(handle);
        if !Arc::ptr_eq(&kept, &file) {
            file.close().await?;
        }
        Ok(kept)
    }

    /// Use the open file of a handle; again with a new one if it was closed early in the middle of that: by the
    /// `close(2)` of a copy of the descriptor, as a child process makes it when it starts a program.
    pub async fn with_file<T, F: Future<Output = Result<T>>>(
        &self,
        handle: &Arc<Handle>,
        mut use_file: impl FnMut(Arc<OpenFile>) -> F,
    ) -> Result<T> {
        for _ in 0..EARLY_CLOSES_MAX {
            let file = self.file(handle).await?;
            match use_file(file.clone()).await {
                Err(e) if e.code == Code::StaleHandle && file.is_closed() => tokio::task::yield_now().await,
                result => return result,
            }
        }
        Err(Error::new(Code::Busy, "the file was closed again and again while it was being used"))
    }

    fn unlist_parked(&self, handle: &Arc<Handle>) {
        handle.retained.lock().take();
        if let Some(entry) = self.inodes.lock().get_mut(&handle.inode.id) {
            entry.parked.retain(|p| !Arc::ptr_eq(p, handle));
        }
    }

    /// Before an inode may lose its last name: files closed early are opened again, so that it lives on.
    pub async fn unpark(&self, known: Option<u64>) -> Result<()> {
        let parked: Vec<_> = {
            let inodes = self.inodes.lock();
            match known {
                Some(id) => inodes.get(&id).map(|e| e.parked.clone()).unwrap_or_default(),
                None => inodes.values().flat_map(|e| e.parked.iter().cloned()).collect(),
            }
        };
        for handle in parked {
            match self.file(&handle).await {
                // Somebody else removed it already.
                Err(e) if matches!(e.code, Code::NotFound | Code::StaleHandle) => {}
                other => drop(other?),
            }
        }
        Ok(())
    }

    /// What `close(2)` waits for: data written, length published, failures told.
    ///
    /// The file is closed at the service by the same call when this was the only handle that writes: most
    /// descriptors are not used after it, and it saves a call.
    pub async fn flush(&self, handle: &Arc<Handle>) -> Result<()> {
        if !handle.write {
            return Ok(());
        }
        let inode = &handle.inode;
        inode.flush(&self.io).await;
        let file = handle.file.lock().clone();
        let published = match file {
            None => Ok(None),
            Some(file) if !handle.reopened.load(Ordering::Relaxed) && inode.park(&file) => {
                *handle.retained.lock() = Some(file.retain());
                *handle.file.lock() = None;
                if let Some(entry) = self.inodes.lock().get_mut(&inode.id) {
                    entry.parked.push(handle.clone());
                }
                inode.publish(Some(&file), true).await
            }
            Some(_) => inode.publish(None, false).await,
        };
        match inode.new_error(&handle.told, Teller::Close) {
            Some(error) => Err(error),
            None => published.map(drop),
        }
    }

    /// The kernel's last reference to a handle is gone.
    pub async fn release(&self, id: u64) {
        let Some(handle) = self.handles.write().remove(&id) else { return };
        self.rings.forget_file(id);
        let inode = &handle.inode;
        if handle.write {
            inode.flush(&self.io).await;
            let file = handle.file.lock().clone();
            if let Some(file) = &file {
                inode.remove_writer(file);
                // Pieces that were launched meanwhile may still go through this file.
                inode.flush(&self.io).await;
                if let Err(error) = inode.publish(Some(file), true).await {
                    tracing::warn!(inode = inode.id, %error, "closing a file failed");
                    inode.fail(error);
                }
            }
            self.unlist_parked(&handle);
        } else {
            let file = handle.file.lock().take();
            if let Some(file) = file
                && let Err(error) = file.close().await
            {
                tracing::warn!(inode = inode.id, %error, "closing a file failed");
            }
        }
        // After what was written under them is there for all to see.
        self.end_handle_locks(&handle).await;
        self.leave(inode);
    }

    /// Release every handle: at the end of a mount whose kernel side is gone.
    pub async fn release_all(&self) {
        let ids: Vec<_> = self.handles.read().keys().copied().collect();
        for id in ids {
            self.release(id).await;
        }
    }
}
