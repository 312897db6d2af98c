//! The virtual directory `3fs-virt` of a mount: its files and directories are made here and are no part of the file system.
//!
//! The root directory answers for its name without listing it. Numbers of its inodes lie far above those of real ones,
//! and no service ever hears of them. What can be done: list, read generated files, make and remove symlinks where a
//! directory says so; everything else is refused.

mod iovs;
mod links;
mod process;
mod ring;
mod rmrf;
mod succession;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use fs3_client::FileType;
use fuser::{Errno, FileAttr, INodeNo};
use parking_lot::Mutex;

use crate::attrs::kind;
use crate::caller::Who;
use crate::core::Core;
use crate::names::Listed;

pub(crate) use iovs::Rings;
pub(crate) use links::Link;
use links::{LinkDir, LinkTable};
use process::Process;
pub(crate) use rmrf::forget_in_kernel;
pub(crate) use succession::VirtState;

/// Name of the virtual directory in the root of a mount.
pub(crate) const NAME: &[u8] = b"3fs-virt";
/// The kernel asks each time: entries come and go without it.
pub(crate) const LIFE: Duration = Duration::ZERO;

/// Number of the root directory.
const ROOT: u64 = 1;
/// First number of a virtual inode. Services count up from 1 and get nowhere near it.
const FIRST: u64 = 1 << 63;
/// First number of a symlink; those below are nodes of the tree.
const FIRST_LINK: u64 = FIRST + (1 << 32);
/// Largest generated file in bytes.
const CONTENT_BYTES_MAX: usize = 16 << 20;

/// Whether an inode is one of the virtual directory.
pub(crate) fn is_virtual(inode: u64) -> bool {
    inode >= FIRST
}

/// Whether a name is that of the virtual directory itself.
pub(crate) fn is_reserved(parent: u64, name: &[u8]) -> bool {
    parent == ROOT && name == NAME
}

/// A part of the tree that is always there.
enum Node {
    Dir(Vec<(&'static str, u64)>),
    /// A file that anybody may read; what is in it is made when it is opened.
    File(fn(&Core) -> Vec<u8>),
    Links(LinkDir),
}

/// The virtual directory of one mount.
pub(crate) struct Virt {
    /// By number, beginning at [`FIRST`].
    nodes: Vec<Node>,
    links: LinkTable,
    open: Mutex<HashMap<u64, Arc<Vec<u8>>>>,
    next_handle: AtomicU64,
    since: SystemTime,
}

impl Default for Virt {
    fn default() -> Self {
        let mut tree = Virt {
            nodes: vec![Node::Dir(Vec::new())],
            links: LinkTable::new(FIRST_LINK),
            open: Mutex::default(),
            next_handle: AtomicU64::new(1),
            since: SystemTime::now(),
        };
        tree.add("config", Node::File(|core| core.options.config.clone().into_bytes()));
        tree.add("stats", Node::File(|core| (core.snapshot().to_string() + "\n").into_bytes()));
        tree.add("version", Node::File(|_| format!("{}\n", env!("CARGO_PKG_VERSION")).into_bytes()));
        tree.add("iovs", Node::Links(LinkDir::Iovs));
        tree.add("rm-rf", Node::Links(LinkDir::RmRf));
        tree
    }
}

impl Virt {
    fn add(&mut self, name: &'static str, node: Node) {
        let inode = FIRST + self.nodes.len() as u64;
        self.nodes.push(node);
        let Node::Dir(entries) = &mut self.nodes[0] else { unreachable!("the first node is the directory") };
        entries.push((name, inode));
    }

    fn node(&self, inode: u64) -> Option<&Node> {
        self.nodes.get(usize::try_from(inode.checked_sub(FIRST)?).ok()?)
    }

    fn attr(&self, inode: u64) -> Result<FileAttr, Errno> {
        if let Some(link) = self.links.get(inode) {
            let mut attr = self.bare_attr(inode, FileType::Symlink, 0o777, link.target.len() as u64);
            (attr.uid, attr.gid) = (link.who.uid, link.who.gid);
            (attr.mtime, attr.ctime) = (link.since, link.since);
            return Ok(attr);
        }
        match self.node(inode).ok_or(Errno::ENOENT)? {
            Node::Dir(_) => Ok(self.bare_attr(inode, FileType::Directory, 0o555, 0)),
            Node::File(_) => Ok(self.bare_attr(inode, FileType::File, 0o444, 0)),
            // Everybody may make links; removing is for who made them.
            Node::Links(_) => Ok(self.bare_attr(inode, FileType::Directory, 0o1777, 0)),
        }
    }

    fn bare_attr(&self, inode: u64, file_type: FileType, perm: u16, size: u64) -> FileAttr {
        FileAttr {
            ino: INodeNo(inode),
            size,
            blocks: 0,
            atime: self.since,
            mtime: self.since,
            ctime: self.since,
            crtime: self.since,
            kind: kind(file_type),
            perm,
            nlink: if file_type == FileType::Directory { 2 } else { 1 },
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// The next number of an open file; those below may be the kernel's.
    pub fn next_handle(&self) -> u64 {
        self.next_handle.load(Ordering::Relaxed)
    }

    /// Numbers of open files of a predecessor are not given again: what was generated for it is gone.
    pub fn skip_handles(&self, next: u64) {
        self.next_handle.fetch_max(next, Ordering::Relaxed);
    }

    /// Attributes. Errors: ENOENT for a link that is gone.
    pub fn getattr(&self, inode: u64) -> Result<FileAttr, Errno> {
        self.attr(inode)
    }

    /// The entry `name` of a virtual directory, or the virtual directory itself.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Result<FileAttr, Errno> {
        let name = name.as_encoded_bytes();
        if is_reserved(parent, name) {
            return self.attr(FIRST);
        }
        match self.node(parent).ok_or(Errno::ENOENT)? {
            Node::Dir(entries) => {
                let found = entries.iter().find(|(entry, _)| entry.as_bytes() == name);
                self.attr(found.ok_or(Errno::ENOENT)?.1)
            }
            Node::Links(_) => self.attr(self.links.find(parent, name).ok_or(Errno::ENOENT)?),
            Node::File(_) => Err(Errno::ENOTDIR),
        }
    }

    /// Where a link points to.
    pub fn readlink(&self, inode: u64) -> Result<Vec<u8>, Errno> {
        match self.links.get(inode) {
            Some(link) => Ok(link.target.clone()),
            None if self.node(inode).is_some() => Err(Errno::EINVAL),
            None => Err(Errno::ENOENT),
        }
    }

    /// List a directory behind `offset` until `add` says that it has enough. An entry keeps its offset.
    pub fn list(&self, inode: u64, offset: u64, mut add: impl FnMut(Listed<'_>) -> bool) -> Result<(), Errno> {
        let mut entries: Vec<(u64, Vec<u8>)> = match self.node(inode).ok_or(Errno::ENOENT)? {
            Node::Dir(entries) => entries.iter().map(|(name, at)| (*at, name.as_bytes().to_vec())).collect(),
            Node::Links(_) => self.links.list(inode),
            Node::File(_) => return Err(Errno::ENOTDIR),
        };
        entries.sort_unstable();
        let parent = if inode == FIRST { ROOT } else { FIRST };
        let dots = [(1, inode, b".".to_vec()), (2, parent, b"..".to_vec())];
        let entries = entries.into_iter().map(|(at, name)| (at - FIRST + 2, at, name));
        for (next, at, name) in dots.into_iter().chain(entries).filter(|(next, ..)| *next > offset) {
            let attr = if at == ROOT { None } else { self.attr(at).ok() };
            let file_type = match &attr {
                None => FileType::Directory,
                Some(attr) if attr.kind == fuser::FileType::Symlink => FileType::Symlink,
                Some(attr) if attr.kind == fuser::FileType::RegularFile => FileType::File,
                Some(_) => FileType::Directory,
            };
            // What has a name in a listing is looked up: its attributes are told then.
            if add(Listed { next, name: &name, inode: at, kind: file_type, attr: None }) {
                break;
            }
        }
        Ok(())
    }

    /// Open a generated file for reading. Errors: EACCES for writing, by whomever.
    pub fn open(&self, core: &Core, inode: u64, flags: i32) -> Result<u64, Errno> {
        let Node::File(content) = self.node(inode).ok_or(Errno::ENOENT)? else { return Err(Errno::EPERM) };
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            return Err(Errno::EACCES);
        }
        let mut content = content(core);
        content.truncate(CONTENT_BYTES_MAX);
        let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.open.lock().insert(handle, Arc::new(content));
        Ok(handle)
    }

    /// Bytes of an open generated file, as it was when it was opened.
    pub fn read(&self, handle: u64, offset: u64, size: u32, use_bytes: impl FnOnce(&[u8])) -> Result<(), Errno> {
        let content = self.open.lock().get(&handle).cloned().ok_or(Errno::EBADF)?;
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
        let end = start.saturating_add(size as usize).min(content.len());
        use_bytes(&content[start..end]);
        Ok(())
    }

    pub fn release(&self, handle: u64) {
        self.open.lock().remove(&handle);
    }
}

impl Core {
    /// A symlink is made in a virtual directory. Errors: EPERM where none can be, EEXIST, whatever the directory answers.
    pub async fn virtual_symlink(
        self: &Arc<Self>,
        who: Who,
        parent: u64,
        name: &[u8],
        target: &[u8],
    ) -> Result<FileAttr, Errno> {
        let Some(Node::Links(dir)) = self.virt.node(parent) else { return Err(Errno::EPERM) };
        if self.virt.links.find(parent, name).is_some() {
            return Err(Errno::EEXIST);
        }
        let (name, target, process) = (name.to_vec(), target.to_vec(), Process::of(who));
        let link = Link { parent, name, target, who, process, since: SystemTime::now() };
        if dir.made(self, &link).await? {
            let inode = self.virt.links.insert(link.clone()).inspect_err(|_| dir.removed(self, &link))?;
            dir.stays(self, &link, inode);
            return self.virt.attr(inode);
        }
        // It did its work and is gone; the kernel is told of a link that it will not find again.
        let mut attr =
            self.virt.bare_attr(self.virt.links.take_inode(), FileType::Symlink, 0o777, link.target.len() as u64);
        (attr.uid, attr.gid) = (who.uid, who.gid);
        Ok(attr)
    }

    /// An entry of the file system is moved to a virtual directory. Errors: EPERM where nothing can be, whatever the
    /// directory answers.
    pub async fn virtual_rename(self: &Arc<Self>, who: Who, parent: u64, name: &[u8], to: u64) -> Result<(), Errno> {
        match self.virt.node(to) {
            Some(Node::Links(dir)) => dir.entered(self, who, parent, name).await,
            _ => Err(Errno::EPERM),
        }
    }

    /// A name is removed from a virtual directory. Errors: ENOENT, EPERM unless it is a link of the caller's.
    pub fn virtual_unlink(&self, who: Who, parent: u64, name: &[u8]) -> Result<(), Errno> {
        let Some(Node::Links(dir)) = self.virt.node(parent) else { return Err(Errno::EPERM) };
        let inode = self.virt.links.find(parent, name).ok_or(Errno::ENOENT)?;
        let link = self.virt.links.get(inode).ok_or(Errno::ENOENT)?;
        if who.uid != 0 && who.uid != link.who.uid {
            return Err(Errno::EPERM);
        }
        self.withdraw_link(dir, inode, &link);
        Ok(())
    }

    fn withdraw_link(&self, dir: &LinkDir, inode: u64, link: &Link) {
        if self.virt.links.remove(inode) {
            dir.removed(self, link);
        }
    }

    /// Who made a link is gone.
    fn reap_link(&self, inode: u64) {
        let Some(link) = self.virt.links.get(inode) else { return };
        if let Some(Node::Links(dir)) = self.virt.node(link.parent) {
            self.withdraw_link(dir, inode, &link);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(tree: &Virt, inode: u64, offset: u64) -> Vec<(u64, String)> {
        let mut found = Vec::new();
        let add = |e: Listed<'_>| {
            found.push((e.next, String::from_utf8(e.name.to_vec()).unwrap()));
            false
        };
        tree.list(inode, offset, add).unwrap();
        found
    }

    #[test]
    fn virtual_inodes_are_far_from_real_ones_and_only_the_root_has_the_name() {
        assert!(is_virtual(FIRST) && is_virtual(FIRST_LINK) && !is_virtual(ROOT) && !is_virtual(1 << 62));
        assert!(is_reserved(ROOT, NAME) && !is_reserved(2, NAME) && !is_reserved(ROOT, b"3fs-vir"));
    }

    #[test]
    fn the_tree_is_found_by_name_and_listed_from_any_offset() {
        let tree = Virt::default();
        let root = tree.lookup(ROOT, OsStr::new("3fs-virt")).unwrap();
        let all = names(&tree, root.ino.0, 0);
        assert_eq!(all[0].1, ".");
        assert!(["iovs", "rm-rf", "version"].iter().all(|wanted| all.iter().any(|(_, name)| name == wanted)));
        for (at, (next, _)) in all.iter().enumerate() {
            assert_eq!(names(&tree, root.ino.0, *next), all[at + 1..]);
        }
        assert_eq!(tree.lookup(root.ino.0, OsStr::new("none")).unwrap_err().code(), libc::ENOENT);
        let file = tree.lookup(root.ino.0, OsStr::new("version")).unwrap();
        assert_eq!(tree.lookup(file.ino.0, OsStr::new("x")).unwrap_err().code(), libc::ENOTDIR);
        assert_eq!(tree.readlink(file.ino.0).unwrap_err().code(), libc::EINVAL);
    }
}
