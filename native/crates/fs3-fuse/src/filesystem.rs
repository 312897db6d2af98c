//! The kernel's requests, each begun on the thread that brings it and answered from where it ends.

use std::cell::Cell;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use fs3_client::{Result, Setattr, Waiter, at_inode};
use fs3_ring::layout::{FS_MAGIC, FS_VERSION, IOC_MAGIC, IOC_REGISTER, IOC_VERSION};
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLock, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, RequestId,
    TimeOrNow, WriteFlags,
};

use crate::attrs::{file_attr, kind, set_times};
use crate::caller::superuser;
use crate::copy::Range;
use crate::core::{Core, Job, errno};
use crate::inode::Place;
use crate::locks::Asked;
use crate::mount::Cache;
use crate::names::{Change, Listed, NewMode, Opened};
use crate::readahead::Plan;
use crate::stats::Op;
use crate::virt::{self, is_reserved, is_virtual};

/// Largest write that the kernel sends, in bytes.
const WRITE_BYTES_MAX: u32 = 1 << 20;
/// Reads up to this size are usually answered sooner than a thread that sleeps could be woken.
const SMALL_READ_BYTES: usize = 64 << 10;
/// Read-ahead requests of the kernel that may be under way at a time.
const BACKGROUND_MAX: u16 = 64;
/// Unit of `statfs` counts in bytes.
const BLOCK_BYTES: u64 = 4096;
/// Inodes that may still be made, as shown by `statfs`: without a quota there is no limit short of the ids.
const FREE_INODES: u64 = 1 << 40;
/// Inode ids are never used twice.
const GENERATION: Generation = Generation(0);

/// The mount as fuser sees it.
pub(crate) struct Fs {
    pub core: Arc<Core>,
}

fn answer_entry(core: &Core, reply: ReplyEntry, result: Result<FileAttr>) {
    match result {
        Ok(attr) => {
            reply.entry_with_ttls(&core.options.attr_timeout, &core.options.entry_timeout, &attr, GENERATION);
        }
        Err(error) => reply.error(errno(&error)),
    }
}

fn answer_attr(core: &Core, reply: ReplyAttr, result: Result<FileAttr>) {
    match result {
        Ok(attr) => reply.attr(&core.options.attr_timeout, &attr),
        Err(error) => reply.error(errno(&error)),
    }
}

fn answer_created(core: &Core, reply: ReplyCreate, result: Result<(FileAttr, Opened)>) {
    match result {
        Ok((attr, opened)) => {
            let life = core.options.attr_timeout.min(core.options.entry_timeout);
            reply.created(&life, &attr, GENERATION, FileHandle(opened.handle), opened.flags);
        }
        Err(error) => reply.error(errno(&error)),
    }
}

fn answer_empty(reply: ReplyEmpty, result: Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

/// `size`: room that the caller has in bytes; 0: it asks how much is needed.
fn answer_xattr(reply: ReplyXattr, size: u32, result: Result<Bytes>) {
    match result {
        Ok(bytes) if size == 0 => reply.size(bytes.len() as u32),
        Ok(bytes) if bytes.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(bytes) => reply.data(&bytes),
        Err(error) => reply.error(errno(&error)),
    }
}

fn answer_virtual_entry(reply: ReplyEntry, result: std::result::Result<FileAttr, Errno>) {
    match result {
        Ok(attr) => reply.entry_with_ttls(&virt::LIFE, &virt::LIFE, &attr, GENERATION),
        Err(error) => reply.error(error),
    }
}

/// Whether a name is of the virtual directory, or in it.
fn is_virtual_name(parent: INodeNo, name: &OsStr) -> bool {
    is_virtual(parent.0) || is_reserved(parent.0, name.as_bytes())
}

thread_local! {
    /// What a thread of the kernel's requests receives with.
    static WAITER: Cell<Option<Waiter>> = const { Cell::new(None) };
}

fn take_waiter() -> Option<Waiter> {
    WAITER.take().or_else(|| Waiter::new().ok())
}

impl Fs {
    /// Run an operation on this thread, which the kernel's request has woken, as far as it goes without waiting.
    fn run(&self, job: impl Into<Job>, operation: impl Future<Output = ()> + Send + 'static) {
        fs3_rt::run_woken(|| self.core.spawn(job, operation));
    }

    /// As [`Fs::run`], and this thread receives the answers itself if they come soon: no other one has to wake for them. Not
    /// while there are other operations, which the kernel's requests may have to wait for then.
    fn run_attended(&self, job: impl Into<Job>, operation: impl Future<Output = ()> + Send + 'static) {
        let waiter = if self.core.is_idle() { take_waiter() } else { None };
        let Some(mut waiter) = waiter else { return self.run(job, operation) };
        let ended = Arc::new(AtomicBool::new(false));
        let end = ended.clone();
        let operation = async move {
            operation.await;
            end.store(true, Ordering::Relaxed);
        };
        let begin = || self.core.spawn(job, operation);
        waiter.attend(&self.core.io.runtime, begin, || ended.load(Ordering::Relaxed));
        WAITER.set(Some(waiter));
    }

    /// Run `operation` with the mount's state and a copy of the name.
    fn named<Fut>(&self, job: impl Into<Job>, name: &OsStr, operation: impl FnOnce(Arc<Core>, Vec<u8>) -> Fut)
    where
        Fut: Future<Output = ()> + Send + 'static,
    {
        self.run(job, operation(self.core.clone(), name.as_bytes().to_vec()));
    }
}

#[allow(clippy::too_many_arguments)]
impl Filesystem for Fs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = InitFlags::FUSE_ATOMIC_O_TRUNC
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP
            // Set-id bits are dropped by writes here; else the kernel would ask for security.capability before each.
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2;
        // Together they let the service apply default access control lists. The kernel then checks permissions in any case.
        let lists = InitFlags::FUSE_POSIX_ACL | InitFlags::FUSE_DONT_MASK;
        let wanted = if self.core.kernel_decides() { wanted | lists } else { wanted };
        // Without them the kernel keeps locks by itself, for this mount alone.
        let locks = InitFlags::FUSE_POSIX_LOCKS | InitFlags::FUSE_FLOCK_LOCKS;
        let wanted = if self.core.options.local_locks { wanted } else { wanted | locks };
        // The kernel drops pages when attributes tell of another time, and asks for them before it reads from pages.
        let strict = self.core.options.cache == Cache::Strict;
        let wanted = if strict { wanted | InitFlags::FUSE_AUTO_INVAL_DATA } else { wanted };
        let offered = config.capabilities();
        let _ = config.add_capabilities(wanted & offered);
        let _ = config.set_max_write(WRITE_BYTES_MAX);
        if let Err(most) = config.set_max_readahead(WRITE_BYTES_MAX) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(BACKGROUND_MAX);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if is_virtual(parent.0) || is_reserved(parent.0, name.as_bytes()) {
            return answer_virtual_entry(reply, self.core.virt.lookup(parent.0, name));
        }
        let who = self.core.who(request);
        self.named(Job::droppable(Op::Lookup, request), name, |core, name| async move {
            let result = core.lookup(who, core.real(parent), &name).await;
            answer_entry(&core, reply, result);
        });
    }

    fn forget(&self, _request: &Request, inode: INodeNo, _lookups: u64) {
        self.core.forget(self.core.real(inode));
    }

    fn getattr(&self, request: &Request, inode: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        if is_virtual(inode.0) {
            return match self.core.virt.getattr(inode.0) {
                Ok(attr) => reply.attr(&virt::LIFE, &attr),
                Err(error) => reply.error(error),
            };
        }
        let core = self.core.clone();
        self.run(Job::droppable(Op::Getattr, request), async move {
            match core.getattr_for(core.real(inode)).await {
                Ok((attr, life)) => reply.attr(&life, &attr),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn setattr(
        &self,
        request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if is_virtual(inode.0) {
            return reply.error(Errno::EPERM);
        }
        let (uid, gid) = match self.core.written_owner(uid, gid) {
            Ok(owner) => owner,
            Err(error) => return reply.error(errno(&error)),
        };
        let mut other = Setattr { mode: mode.map(|m| m & 0o7777), uid, gid, ..Setattr::default() };
        set_times(&mut other, atime, mtime);
        let change = Change { length: size, handle: fh.map(|f| f.0), other };
        let (core, who) = (self.core.clone(), self.core.who(request));
        self.run(Op::Setattr, async move {
            let result = core.setattr(who, core.real(inode), change).await;
            answer_attr(&core, reply, result);
        });
    }

    fn readlink(&self, request: &Request, inode: INodeNo, reply: ReplyData) {
        if is_virtual(inode.0) {
            return match self.core.virt.readlink(inode.0) {
                Ok(target) => reply.data(&target),
                Err(error) => reply.error(error),
            };
        }
        let core = self.core.clone();
        self.run(Job::droppable(Op::Readlink, request), async move {
            match core.readlink(core.real(inode)).await {
                Ok(target) => reply.data(&target),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        if is_virtual_name(parent, name) {
            return reply.error(Errno::EPERM);
        }
        let who = self.core.who(request);
        self.named(Op::Mknod, name, |core, name| async move {
            let result = core.mknod(who, core.real(parent), &name, NewMode::of(mode, umask), rdev).await;
            answer_entry(&core, reply, result);
        });
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        if is_virtual_name(parent, name) {
            return reply.error(Errno::EPERM);
        }
        let who = self.core.who(request);
        self.named(Op::Mkdir, name, |core, name| async move {
            let result = core.mkdir(who, core.real(parent), &name, NewMode::of(mode, umask)).await;
            answer_entry(&core, reply, result);
        });
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if is_virtual_name(parent, name) {
            return match self.core.virtual_unlink(self.core.who(request), parent.0, name.as_bytes()) {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(error),
            };
        }
        let who = self.core.who(request);
        self.named(Op::Unlink, name, |core, name| async move {
            answer_empty(reply, core.unlink(who, core.real(parent), &name).await);
        });
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if is_virtual_name(parent, name) {
            return reply.error(Errno::EPERM);
        }
        let who = self.core.who(request);
        self.named(Op::Rmdir, name, |core, name| async move {
            answer_empty(reply, core.rmdir(who, core.real(parent), &name).await);
        });
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        if is_virtual_name(parent, name) {
            let (who, target) = (self.core.who(request), target.as_os_str().as_bytes().to_vec());
            return self.named(Op::Symlink, name, |core, name| async move {
                answer_virtual_entry(reply, core.virtual_symlink(who, parent.0, &name, &target).await);
            });
        }
        let (who, target) = (self.core.who(request), target.as_os_str().as_bytes().to_vec());
        self.named(Op::Symlink, name, |core, name| async move {
            let result = core.symlink(who, core.real(parent), &name, &target).await;
            answer_entry(&core, reply, result);
        });
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if is_virtual_name(parent, name) || is_reserved(newparent.0, newname.as_bytes()) {
            return reply.error(Errno::EPERM);
        }
        if is_virtual(newparent.0) {
            let (who, to) = (self.core.who(request), newname.as_bytes().to_vec());
            return self.named(Op::Rename, name, |core, from| async move {
                match core.virtual_rename(who, core.real(parent), &from, newparent.0).await {
                    Ok(()) => {
                        reply.ok();
                        // The kernel has moved the name.
                        virt::forget_in_kernel(&core, newparent.0, &to).await;
                    }
                    Err(error) => reply.error(error),
                }
            });
        }
        let (who, to) = (self.core.who(request), newname.as_bytes().to_vec());
        self.named(Op::Rename, name, |core, from| async move {
            let result = core.rename(who, (core.real(parent), &from), (core.real(newparent), &to), flags.bits()).await;
            answer_empty(reply, result);
        });
    }

    fn link(&self, request: &Request, inode: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        if is_virtual(inode.0) || is_virtual_name(newparent, newname) {
            return reply.error(Errno::EPERM);
        }
        let who = self.core.who(request);
        self.named(Op::Link, newname, |core, name| async move {
            let result = core.link(who, core.real(inode), core.real(newparent), &name).await;
            answer_entry(&core, reply, result);
        });
    }

    fn open(&self, request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if is_virtual(inode.0) {
            return match self.core.virt.open(&self.core, inode.0, flags.0) {
                // Its length is not known before it is read.
                Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO),
                Err(error) => reply.error(error),
            };
        }
        let (core, who) = (self.core.clone(), self.core.who(request));
        // A file that is open for writing has to be closed.
        let reads = flags.0 & (libc::O_ACCMODE | libc::O_TRUNC) == libc::O_RDONLY;
        let job = if reads { Job::droppable(Op::Open, request) } else { Op::Open.into() };
        self.run(job, async move {
            match core.open(who, core.real(inode), flags.0).await {
                Ok(opened) => reply.opened(FileHandle(opened.handle), opened.flags),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        if is_virtual_name(parent, name) {
            return reply.error(Errno::EPERM);
        }
        let who = self.core.who(request);
        self.named(Op::Create, name, |core, name| async move {
            let made = core.create(who, core.real(parent), &name, NewMode::of(mode, umask), flags).await;
            answer_created(&core, reply, made);
        });
    }

    fn tmpfile(&self, request: &Request, parent: INodeNo, mode: u32, umask: u32, flags: i32, reply: ReplyCreate) {
        if is_virtual(parent.0) {
            return reply.error(Errno::EPERM);
        }
        let (core, who) = (self.core.clone(), self.core.who(request));
        self.run(Op::Create, async move {
            let made = core.create_unnamed(who, core.real(parent), NewMode::of(mode, umask), flags).await;
            answer_created(&core, reply, made);
        });
    }

    fn read(
        &self,
        request: &Request,
        inode: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if is_virtual(inode.0) {
            let mut reply = Some(reply);
            let read = self.core.virt.read(fh.0, offset, size, |bytes| {
                reply.take().expect("not answered yet").data(bytes);
            });
            if let (Err(error), Some(reply)) = (read, reply) {
                reply.error(error);
            }
            return;
        }
        let handle = match self.core.usable(fh.0) {
            Ok(handle) => handle,
            Err(error) => return reply.error(error),
        };
        // A file that was closed early is opened again, maybe for writing.
        let open = handle.open_file().is_some();
        let job = if open { Job::droppable(Op::Read, request) } else { Op::Read.into() };
        let read = self.core.plan_read(handle, offset, size as usize);
        let (core, is_small) = (self.core.clone(), size as usize <= SMALL_READ_BYTES && read.plan == Plan::Exact);
        let reading = async move { core.read(read, reply).await };
        if is_small { self.run_attended(job, reading) } else { self.run(job, reading) }
    }

    fn write(
        &self,
        _request: &Request,
        inode: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if is_virtual(inode.0) {
            return reply.error(Errno::EPERM);
        }
        let handle = match self.core.usable(fh.0) {
            Ok(handle) => handle,
            Err(error) => return reply.error(error),
        };
        // Pages of a shared mapping are written back to where they are from.
        let appends = flags.0 & libc::O_APPEND != 0 && !write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let place = if appends { Place::End { believed: offset } } else { Place::At(offset) };
        if write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID) && handle.inode.has_set_id() {
            let (core, data) = (self.core.clone(), data.to_vec());
            self.run(Job::BACKGROUND, async move {
                match core.drop_set_id(handle.inode.id).await {
                    Ok(()) => core.write(handle, place, &data, reply),
                    Err(error) => reply.error(errno(&error)),
                }
            });
            return;
        }
        self.core.write(handle, place, data, reply);
    }

    fn flush(&self, _request: &Request, inode: INodeNo, fh: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        if is_virtual(inode.0) {
            return reply.ok();
        }
        let Some(handle) = self.core.handle(fh.0) else { return reply.error(Errno::EBADF) };
        let core = self.core.clone();
        self.run(Op::Flush, async move {
            let flushed = core.flush(&handle).await;
            core.closed_by(core.real(inode), owner.0).await;
            match core.check_locks(&handle) {
                Ok(()) => answer_empty(reply, flushed),
                Err(error) => reply.error(error),
            }
        });
    }

    fn getlk(
        &self,
        _request: &Request,
        inode: INodeNo,
        fh: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        if is_virtual(inode.0) {
            return reply.error(Errno::ENOTSUP);
        }
        let handle = match self.core.usable(fh.0) {
            Ok(handle) => handle,
            Err(error) => return reply.error(error),
        };
        let core = self.core.clone();
        self.run(Op::Lock, async move {
            match core.get_lock(&handle, Asked { flock: false, owner: owner.0, start, end, kind, pid }).await {
                Ok(Some(found)) => reply.locked(found.start, found.end, found.kind, found.pid),
                Ok(None) => reply.locked(0, 0, libc::F_UNLCK, 0),
                Err(error) => reply.error(error),
            }
        });
    }

    fn setlk(
        &self,
        request: &Request,
        inode: INodeNo,
        fh: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        sleep: bool,
        flock: bool,
        reply: ReplyEmpty,
    ) {
        if is_virtual(inode.0) {
            return reply.error(Errno::ENOTSUP);
        }
        let asked = Asked { flock, owner: owner.0, start, end, kind, pid };
        let (core, wait) = (self.core.clone(), sleep.then_some(request.unique().0));
        self.run(Op::Lock, async move { core.answer_lock(fh.0, asked, wait, reply).await });
    }

    fn interrupt(&self, request: RequestId) {
        self.core.locks.interrupt(request.0);
        self.core.kills.interrupted(&self.core.io.runtime, request.0);
    }

    fn release(
        &self,
        _request: &Request,
        inode: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if is_virtual(inode.0) {
            self.core.virt.release(fh.0);
            return reply.ok();
        }
        let core = self.core.clone();
        self.run(Op::Release, async move {
            core.release(fh.0).await;
            reply.ok();
        });
    }

    fn fsync(&self, _request: &Request, inode: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        if is_virtual(inode.0) {
            return reply.error(Errno::EINVAL);
        }
        let handle = match self.core.usable(fh.0) {
            Ok(handle) => handle,
            Err(error) => return reply.error(error),
        };
        let core = self.core.clone();
        self.run(Op::Fsync, async move { answer_empty(reply, core.fsync(&handle).await) });
    }

    fn opendir(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if is_virtual(inode.0) {
            return reply.opened(FileHandle(0), FopenFlags::empty());
        }
        reply.opened(FileHandle(self.core.add_dir(self.core.real(inode))), FopenFlags::empty());
    }

    fn readdir(&self, request: &Request, inode: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if is_virtual(inode.0) {
            let add = |e: Listed<'_>| reply.add(INodeNo(e.inode), e.next, kind(e.kind), OsStr::from_bytes(e.name));
            return match self.core.virt.list(inode.0, offset, add) {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(error),
            };
        }
        let Some(dir) = self.core.dir(fh.0) else { return reply.error(Errno::EBADF) };
        let (core, who) = (self.core.clone(), self.core.who(request));
        self.run(Job::droppable(Op::Readdir, request), async move {
            let add = |e: Listed<'_>| reply.add(INodeNo(e.inode), e.next, kind(e.kind), OsStr::from_bytes(e.name));
            match core.list(who, &dir, offset, false, add).await {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn readdirplus(
        &self,
        request: &Request,
        inode: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        if is_virtual(inode.0) {
            let add = |e: Listed<'_>| {
                let name = OsStr::from_bytes(e.name);
                reply.add(INodeNo(e.inode), e.next, name, &Duration::ZERO, &bare_attr(&e), GENERATION)
            };
            return match self.core.virt.list(inode.0, offset, add) {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(error),
            };
        }
        let Some(dir) = self.core.dir(fh.0) else { return reply.error(Errno::EBADF) };
        let (core, who) = (self.core.clone(), self.core.who(request));
        self.run(Job::droppable(Op::Readdir, request), async move {
            let life = core.options.attr_timeout.min(core.options.entry_timeout);
            let add = |e: Listed<'_>| {
                // Without attributes (".", "..") the kernel only takes the name; it asks for the rest.
                let (attr, life) = match e.attr {
                    Some(attr) => (attr, life),
                    None => (bare_attr(&e), Duration::ZERO),
                };
                reply.add(INodeNo(e.inode), e.next, OsStr::from_bytes(e.name), &life, &attr, GENERATION)
            };
            match core.list(who, &dir, offset, true, add).await {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn releasedir(&self, _request: &Request, inode: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        if is_virtual(inode.0) {
            return reply.ok();
        }
        self.core.remove_dir(fh.0);
        reply.ok();
    }

    fn fsyncdir(&self, _request: &Request, _inode: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        // An answered metadata operation is as durable as the service's store makes it; nothing is kept here.
        reply.ok();
    }

    fn statfs(&self, request: &Request, inode: INodeNo, reply: ReplyStatfs) {
        if is_virtual(inode.0) {
            return reply.statfs(0, 0, 0, 0, 0, BLOCK_BYTES as u32, 255, BLOCK_BYTES as u32);
        }
        let core = self.core.clone();
        self.run(Job::droppable(Op::Statfs, request), async move {
            match core.client.statfs(&superuser(), at_inode(core.real(inode))).await {
                Ok(s) => {
                    let (all, free) = (s.capacity_bytes / BLOCK_BYTES, s.free_bytes / BLOCK_BYTES);
                    let size = BLOCK_BYTES as u32;
                    let name_max = if s.name_bytes_max == 0 { 255 } else { s.name_bytes_max };
                    let free_inodes = s.free_inodes.unwrap_or(FREE_INODES);
                    reply.statfs(all, free, free, s.inodes + free_inodes, free_inodes, size, name_max, size);
                }
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn lseek(&self, _request: &Request, inode: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        if is_virtual(inode.0) {
            return reply.error(Errno::EINVAL);
        }
        let handle = match self.core.usable(fh.0) {
            Ok(handle) => handle,
            Err(error) => return reply.error(error),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        let hole = match whence {
            libc::SEEK_DATA => false,
            libc::SEEK_HOLE => true,
            _ => return reply.error(Errno::EINVAL),
        };
        let core = self.core.clone();
        self.run(Op::Lseek, async move {
            match core.seek(&handle, offset, hole).await {
                Ok(Some(position)) => reply.offset(position as i64),
                Ok(None) => reply.error(Errno::ENXIO),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn setxattr(
        &self,
        request: &Request,
        inode: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        if is_virtual(inode.0) {
            return reply.error(Errno::EPERM);
        }
        let (who, value) = (self.core.who(request), value.to_vec());
        self.named(Op::Setxattr, name, |core, name| async move {
            answer_empty(reply, core.setxattr(who, core.real(inode), &name, &value, flags).await);
        });
    }

    fn getxattr(&self, request: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if is_virtual(inode.0) {
            return reply.error(Errno::ENODATA);
        }
        let who = self.core.who(request);
        self.named(Job::droppable(Op::Getxattr, request), name, |core, name| async move {
            answer_xattr(reply, size, core.getxattr(who, core.real(inode), &name).await);
        });
    }

    fn listxattr(&self, request: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        if is_virtual(inode.0) {
            return answer_xattr(reply, size, Ok(Bytes::new()));
        }
        let (core, who) = (self.core.clone(), self.core.who(request));
        self.run(Job::droppable(Op::Listxattr, request), async move {
            answer_xattr(reply, size, core.listxattr(who, core.real(inode)).await)
        });
    }

    fn removexattr(&self, request: &Request, inode: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if is_virtual(inode.0) {
            return reply.error(Errno::EPERM);
        }
        let who = self.core.who(request);
        self.named(Op::Removexattr, name, |core, name| async move {
            answer_empty(reply, core.removexattr(who, core.real(inode), &name).await);
        });
    }

    // ENOSYS makes the kernel stop asking and answer the application itself.

    fn access(&self, _request: &Request, _inode: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        request: &Request,
        inode: INodeNo,
        fh: FileHandle,
        _flags: IoctlFlags,
        command: u32,
        _data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        match command {
            IOC_MAGIC => reply.ioctl(0, &FS_MAGIC.to_ne_bytes()),
            IOC_VERSION => reply.ioctl(0, &FS_VERSION.to_ne_bytes()),
            IOC_REGISTER if is_virtual(inode.0) => reply.error(Errno::EBADF),
            IOC_REGISTER => match self.core.register_file(self.core.who(request), fh.0) {
                Ok(token) => reply.ioctl(0, &token.to_ne_bytes()),
                Err(error) => reply.error(error),
            },
            _ => reply.error(Errno::ENOTTY),
        }
    }

    fn poll(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _fh: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        request: &Request,
        inode: INodeNo,
        fh: FileHandle,
        from: u64,
        inode_out: INodeNo,
        fh_out: FileHandle,
        to: u64,
        bytes: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        if is_virtual(inode.0) || is_virtual(inode_out.0) {
            return reply.error(Errno::ENOTSUP);
        }
        let (source, target) = match (self.core.usable(fh.0), self.core.usable(fh_out.0)) {
            (Ok(source), Ok(target)) => (source, target),
            (Err(error), _) | (_, Err(error)) => return reply.error(error),
        };
        let (core, who) = (self.core.clone(), self.core.who(request));
        self.run(Op::CopyFileRange, async move {
            match core.copy(&who, &source, &target, Range { from, to, bytes }).await {
                // The kernel asks for fewer than 4 GiB.
                Ok(copied) => reply.written(copied as u32),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn fallocate(
        &self,
        request: &Request,
        inode: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if is_virtual(inode.0) {
            return reply.error(Errno::EPERM);
        }
        let handle = match self.core.usable(fh.0) {
            Ok(handle) => handle,
            Err(error) => return reply.error(error),
        };
        let (core, who) = (self.core.clone(), self.core.who(request));
        self.run(Op::Fallocate, async move {
            answer_empty(reply, core.fallocate(&who, &handle, mode, offset, length).await);
        });
    }
}

fn bare_attr(entry: &Listed<'_>) -> FileAttr {
    let mut attr = fs3_client::Attr { inode: entry.inode, nlink: 1, ..Default::default() };
    attr.set_type(entry.kind);
    FileAttr { ctime: UNIX_EPOCH, ..file_attr(&attr) }
}
