//! The tree as FUSE sees it.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, Session, SessionACL, TimeOrNow,
    WriteFlags,
};

use crate::tree::Tree;

/// Nobody but the mount changes the tree.
const TTL: Duration = Duration::from_secs(3600);
/// Operations at a time; slow ones occupy a thread.
const THREADS: usize = 8;
const WRITE_BYTES_MAX: u32 = 1 << 20;
const BLOCK_BYTES: u64 = 4096;
/// What `statfs` shows of a disk without a limit.
const FREE_BYTES: u64 = 1 << 40;
const GENERATION: Generation = Generation(0);

/// A [`Tree`] served through FUSE.
pub struct Fs(pub Arc<Tree>);

/// Mount `tree` on `mountpoint`; it is served by threads of its own until it is unmounted or the process ends.
pub fn mount(tree: Arc<Tree>, mountpoint: &Path) -> io::Result<()> {
    let mut config = Config::default();
    config.mount_options =
        vec![MountOption::FSName("fs3-faultdisk".to_owned()), MountOption::CUSTOM("subtype=faultdisk".to_owned())];
    config.acl = SessionACL::Owner;
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    let mut session = Session::new(Fs(tree), mountpoint, &config)?;
    std::thread::Builder::new().name("faultdisk".to_owned()).spawn(move || session.serve())?;
    Ok(())
}

fn code(error: &io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
}

fn attr(inode: u64, metadata: &Metadata) -> FileAttr {
    let time = |s: i64, ns: i64| SystemTime::UNIX_EPOCH + Duration::new(s.max(0) as u64, ns as u32);
    FileAttr {
        ino: INodeNo(inode),
        size: metadata.len(),
        blocks: metadata.blocks(),
        atime: time(metadata.atime(), metadata.atime_nsec()),
        mtime: time(metadata.mtime(), metadata.mtime_nsec()),
        ctime: time(metadata.ctime(), metadata.ctime_nsec()),
        crtime: SystemTime::UNIX_EPOCH,
        kind: if metadata.is_dir() { FileType::Directory } else { FileType::RegularFile },
        perm: (metadata.mode() & 0o7777) as u16,
        nlink: metadata.nlink() as u32,
        uid: metadata.uid(),
        gid: metadata.gid(),
        rdev: 0,
        blksize: BLOCK_BYTES as u32,
        flags: 0,
    }
}

fn entry(reply: ReplyEntry, result: io::Result<(u64, Metadata)>) {
    match result {
        Ok((inode, metadata)) => reply.entry(&TTL, &attr(inode, &metadata), GENERATION),
        Err(e) => reply.error(code(&e)),
    }
}

fn empty(reply: ReplyEmpty, result: io::Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(code(&e)),
    }
}

impl Fs {
    fn attributes(&self, inode: u64, reply: ReplyAttr) {
        match self.0.node(inode).and_then(|node| node.metadata()) {
            Ok(metadata) => reply.attr(&TTL, &attr(inode, &metadata)),
            Err(e) => reply.error(code(&e)),
        }
    }
}

#[allow(clippy::too_many_arguments)]
impl Filesystem for Fs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // No write-back cache: every write is here before it returns, as the journal needs it.
        let wanted = InitFlags::FUSE_ASYNC_DIO | InitFlags::FUSE_PARALLEL_DIROPS;
        let _ = config.add_capabilities(wanted & config.capabilities());
        let _ = config.set_max_write(WRITE_BYTES_MAX);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        entry(reply, self.0.lookup(parent.0, name));
    }

    fn forget(&self, _: &Request, inode: INodeNo, lookups: u64) {
        self.0.forget(inode.0, lookups);
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.attributes(inode.0, reply);
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let resized = size.map_or(Ok(()), |len| self.0.set_len(inode.0, len));
        match resized.and_then(|()| mode.map_or(Ok(()), |mode| self.0.set_mode(inode.0, mode))) {
            Ok(()) => self.attributes(inode.0, reply),
            Err(e) => reply.error(code(&e)),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        entry(reply, self.0.make_directory(parent.0, name, mode & !umask));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.0.remove(parent.0, name));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.0.remove_directory(parent.0, name));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if !flags.is_empty() {
            return reply.error(Errno::EINVAL);
        }
        empty(reply, self.0.rename(parent.0, name, newparent.0, newname));
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        match self.0.create(parent.0, name, mode & !umask) {
            Ok((inode, metadata)) => {
                let made = attr(inode, &metadata);
                reply.created(&TTL, &made, GENERATION, FileHandle(0), FopenFlags::empty());
            }
            Err(e) => reply.error(code(&e)),
        }
    }

    fn open(&self, _: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.0.node(inode.0) {
            Ok(_) => reply.opened(FileHandle(0), FopenFlags::empty()),
            Err(e) => reply.error(code(&e)),
        }
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.0.read(inode.0, offset, size as usize) {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(code(&e)),
        }
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.0.write(inode.0, offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(e) => reply.error(code(&e)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, inode: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        empty(reply, self.0.sync(inode.0));
    }

    fn readdir(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let names = match self.0.list(inode.0) {
            Ok(names) => names,
            Err(e) => return reply.error(code(&e)),
        };
        for (i, (inode, directory, name)) in names.into_iter().enumerate().skip(offset as usize) {
            let kind = if directory { FileType::Directory } else { FileType::RegularFile };
            if reply.add(INodeNo(inode), i as u64 + 1, kind, &name) {
                break;
            }
        }
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        empty(reply, self.0.sync_names());
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let free = self.0.space_bytes().unwrap_or(FREE_BYTES) / BLOCK_BYTES;
        let all = FREE_BYTES / BLOCK_BYTES;
        reply.statfs(all, free, free, 1 << 20, 1 << 20, BLOCK_BYTES as u32, 255, BLOCK_BYTES as u32);
    }

    fn fallocate(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if mode != 0 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        empty(reply, self.0.allocate(inode.0, offset + length));
    }

    // ENOSYS makes the kernel stop asking and answer the application itself.

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }
}
