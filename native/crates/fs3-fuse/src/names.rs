//! Operations on names and attributes, and opening.

use std::sync::Arc;
use std::time::Duration;

use fs3_client::{
    Attr, Code, CreateOptions, DirEntry, Error, FileType, OpenFile, OpenOptions, Result, Setattr, at_child, at_inode,
    content_version,
};
use fuser::{FileAttr, FopenFlags};

use crate::attrs::{SET_ID_BITS, type_of_mode, without_set_id};
use crate::caller::{Who, superuser};
use crate::core::{Core, DirHandle, File, HandleFlags};
use crate::dirs::{At, DirStream, FIRST, PAGE_ENTRIES};
use crate::mount::Cache;

/// Set by the kernel in the flags of an open for execution; read permission is not needed then.
const FMODE_EXEC: i32 = 0x20;

/// What an open answers.
pub(crate) struct Opened {
    pub handle: u64,
    pub flags: FopenFlags,
}

/// The mode of something new.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewMode {
    mode: u32,
    /// Taken from the mode by the service, unless the directory has a default access control list.
    umask: u32,
}

impl NewMode {
    /// Of a request; a kernel that takes the umask from the mode by itself does no harm.
    pub fn of(mode: u32, umask: u32) -> Self {
        Self { mode, umask: umask & 0o777 }
    }

    fn bits(self) -> u32 {
        self.mode & 0o7777
    }
}

/// One entry of a listing: offset behind it, name, attributes (or just inode and type).
pub(crate) struct Listed<'a> {
    pub next: u64,
    pub name: &'a [u8],
    pub inode: u64,
    pub kind: FileType,
    pub attr: Option<FileAttr>,
}

/// A change asked for by `setattr`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Change {
    pub length: Option<u64>,
    pub handle: Option<u64>,
    pub other: Setattr,
}

fn access(flags: i32) -> OpenOptions {
    let mode = flags & libc::O_ACCMODE;
    OpenOptions {
        read: mode != libc::O_WRONLY && flags & FMODE_EXEC == 0,
        write: mode != libc::O_RDONLY,
        truncate: flags & libc::O_TRUNC != 0 && mode != libc::O_RDONLY,
    }
}

impl Core {
    pub async fn lookup(&self, who: Who, parent: u64, name: &[u8]) -> Result<FileAttr> {
        let attr = match who.run(|c| async move { self.client.lookup(&c, parent, name).await }).await {
            Ok(attr) => attr,
            Err(error) => {
                self.forget_name(parent, name);
                return Err(error);
            }
        };
        self.place_appends(attr.inode).await;
        Ok(self.tell_entry(parent, name, attr))
    }

    pub async fn getattr(&self, inode: u64) -> Result<FileAttr> {
        Ok(self.getattr_for(inode).await?.0)
    }

    /// Attributes and how long the kernel may keep them. Those of a directory may come from memory: the kernel
    /// asks again after each of its own changes inside, which are known here.
    pub async fn getattr_for(&self, inode: u64) -> Result<(FileAttr, Duration)> {
        if let Some((attr, left)) = self.dir_attrs.get(inode) {
            return Ok((self.tell(attr), left));
        }
        let asked = self.dir_attrs.ask();
        let caller = superuser();
        let (attr, ()) = tokio::join!(self.client.stat(&caller, at_inode(inode)), self.place_appends(inode));
        let mut attr = attr?;
        if attr.r#type() == FileType::Directory {
            self.dir_attrs.answered(asked, &mut attr);
        }
        Ok((self.tell(attr), self.options.attr_timeout))
    }

    /// `child`, no directory, was made in or removed from `parent`; an error may hide that it was.
    fn entry_changed(&self, parent: u64, child: &Result<Attr>) {
        match child {
            // The attributes of an open file are merged with times of this machine's clock.
            Ok(child) if self.inode(child.inode).is_none() => self.dir_attrs.changed(parent, child.ctime_ns),
            _ => self.dir_attrs.forget(parent),
        }
    }

    pub async fn readlink(&self, inode: u64) -> Result<Vec<u8>> {
        let attr = self.client.stat(&superuser(), at_inode(inode)).await?;
        match attr.r#type() {
            FileType::Symlink => Ok(attr.symlink_target.to_vec()),
            _ => Err(Error::new(Code::InvalidArgument, "not a symlink")),
        }
    }

    pub async fn setattr(&self, who: Who, inode: u64, change: Change) -> Result<FileAttr> {
        let result = self.set_attributes(who, inode, change).await;
        self.dir_attrs.forget(inode);
        match result? {
            Some(attr) => Ok(self.tell(attr)),
            None => self.getattr(inode).await,
        }
    }

    async fn set_attributes(&self, who: Who, inode: u64, change: Change) -> Result<Option<Attr>> {
        // What was written before must not overtake the change: neither its bytes nor its time.
        let open = self.settle(inode).await?;
        let mut attr = None;
        if let Some(length) = change.length {
            open.iter().for_each(|o| o.truncated());
            let result = self.truncate(who, inode, length, change.handle).await;
            open.iter().for_each(|o| o.truncated());
            attr = Some(result?);
        }
        if change.other != Setattr::default() {
            attr = Some(self.change(who, inode, change.other).await?);
        }
        Ok(attr)
    }

    /// Write and publish what was accepted for an inode; returns it if it is open.
    pub async fn settle(&self, inode: u64) -> Result<Option<Arc<File>>> {
        let open = self.inode(inode);
        if let Some(open) = open.as_ref().filter(|o| o.is_dirty()) {
            open.flush(&self.io).await;
            open.publish(None, false).await?;
        }
        Ok(open)
    }

    async fn truncate(&self, who: Who, inode: u64, length: u64, handle: Option<u64>) -> Result<Attr> {
        match handle.and_then(|h| self.handle(h)).filter(|h| h.write) {
            Some(handle) => self.with_file(&handle, |file| async move { file.truncate(length).await }).await,
            None => who.run(|c| async move { self.client.truncate(&c, at_inode(inode), length).await }).await,
        }
    }

    async fn change(&self, who: Who, inode: u64, change: Setattr) -> Result<Attr> {
        // Without its groups the service would take a set-group-id bit away from a member of the group.
        let groups_matter = change.gid.is_some() || change.mode.is_some_and(|m| m & 0o2000 != 0);
        let result = if !who.is_root() && groups_matter {
            self.client.setattr(&who.caller_with_groups(), at_inode(inode), change).await
        } else {
            who.run(|c| async move { self.client.setattr(&c, at_inode(inode), change).await }).await
        };
        match result {
            Err(e) if e.code == Code::NotPermitted => {
                if self.only_drops_set_id(inode, change).await {
                    return self.client.setattr(&superuser(), at_inode(inode), change).await;
                }
                Err(e)
            }
            other => other,
        }
    }

    /// A write by somebody who is not the owner takes the set-id bits away; the kernel asks for that in the
    /// writer's name.
    async fn only_drops_set_id(&self, inode: u64, change: Setattr) -> bool {
        let Some(mode) = change.mode else { return false };
        if (Setattr { mode: None, ..change }) != Setattr::default() {
            return false;
        }
        let Ok(now) = self.client.stat(&superuser(), at_inode(inode)).await else { return false };
        mode & !SET_ID_BITS & 0o7777 == now.mode & !SET_ID_BITS & 0o7777 && mode & SET_ID_BITS & !now.mode == 0
    }

    /// Somebody who may not keep them is about to write: the set-id bits go. The kernel is made to ask for the mode.
    pub async fn drop_set_id(&self, inode: u64) -> Result<()> {
        let now = self.client.stat(&superuser(), at_inode(inode)).await?;
        let mode = without_set_id(now.mode);
        if mode != now.mode {
            let change = Setattr { mode: Some(mode), ..Setattr::default() };
            let attr = self.client.setattr(&superuser(), at_inode(inode), change).await?;
            self.tell(attr);
            self.invalidate_attr(inode);
        }
        Ok(())
    }

    pub async fn mknod(&self, who: Who, parent: u64, name: &[u8], new: NewMode, rdev: u32) -> Result<FileAttr> {
        let kind = type_of_mode(new.mode);
        let attr = who
            .run(|c| async move {
                self.client.mknod(&c, at_child(parent, name), new.bits(), new.umask, kind, u64::from(rdev)).await
            })
            .await;
        self.entry_changed(parent, &attr);
        Ok(self.tell_entry(parent, name, attr?))
    }

    pub async fn mkdir(&self, who: Who, parent: u64, name: &[u8], new: NewMode) -> Result<FileAttr> {
        let attr =
            who.run(|c| async move {
                self.client.mkdir(&c, at_child(parent, name), new.bits(), new.umask, false, None).await
            })
            .await;
        self.dir_attrs.forget(parent);
        Ok(self.tell_entry(parent, name, attr?))
    }

    pub async fn symlink(&self, who: Who, parent: u64, name: &[u8], target: &[u8]) -> Result<FileAttr> {
        let attr = who.run(|c| async move { self.client.symlink(&c, at_child(parent, name), target).await }).await;
        self.entry_changed(parent, &attr);
        Ok(self.tell_entry(parent, name, attr?))
    }

    pub async fn link(&self, who: Who, inode: u64, parent: u64, name: &[u8]) -> Result<FileAttr> {
        let attr =
            who.run(|c| async move { self.client.link(&c, at_inode(inode), at_child(parent, name)).await }).await;
        self.dir_attrs.forget(parent);
        self.place_appends(inode).await;
        Ok(self.tell_entry(parent, name, attr?))
    }

    pub async fn unlink(&self, who: Who, parent: u64, name: &[u8]) -> Result<()> {
        let known = self.known_inode(parent, name);
        self.unpark(known).await?;
        self.forget_name(parent, name);
        let attr = who.run(|c| async move { self.client.unlink(&c, at_child(parent, name), known).await }).await;
        self.entry_changed(parent, &attr);
        self.lost_name(&attr?);
        Ok(())
    }

    fn lost_name(&self, attr: &Attr) {
        if attr.nlink == 0
            && let Some(open) = self.inode(attr.inode)
        {
            open.set_unlinked();
        }
    }

    pub async fn rmdir(&self, who: Who, parent: u64, name: &[u8]) -> Result<()> {
        let known = self.known_inode(parent, name);
        self.forget_name(parent, name);
        let result = who.run(|c| async move { self.client.rmdir(&c, at_child(parent, name)).await }).await;
        self.dir_attrs.forget(parent);
        // The directory itself has no links any more.
        match known {
            Some(inode) => self.dir_attrs.forget(inode),
            None => self.dir_attrs.forget_all(),
        }
        result
    }

    pub async fn rename(&self, who: Who, from: (u64, &[u8]), to: (u64, &[u8]), flags: u32) -> Result<()> {
        if flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) != 0 {
            return Err(Error::new(Code::InvalidArgument, "rename flags other than NOREPLACE and EXCHANGE"));
        }
        let (no_replace, exchange) = (flags & libc::RENAME_NOREPLACE != 0, flags & libc::RENAME_EXCHANGE != 0);
        let known = self.known_inode(to.0, to.1);
        if !exchange {
            self.unpark(known).await?;
        }
        self.forget_name(from.0, from.1);
        self.forget_name(to.0, to.1);
        let (source, target) = (at_child(from.0, from.1), at_child(to.0, to.1));
        let (source, target) = (&source, &target);
        let done = who
            .run(|c| async move {
                self.client.rename(&c, source.clone(), target.clone(), no_replace, exchange, known).await
            })
            .await;
        self.dir_attrs.forget(from.0);
        self.dir_attrs.forget(to.0);
        let done = done.inspect_err(|_| self.dir_attrs.forget_all())?;
        done.attr.iter().chain(&done.replaced).for_each(|moved| self.dir_attrs.forget(moved.inode));
        if let Some(replaced) = done.replaced.as_ref().filter(|_| !exchange) {
            self.lost_name(replaced);
        }
        Ok(())
    }

    pub async fn open(&self, who: Who, inode: u64, flags: i32) -> Result<Opened> {
        let options = access(flags);
        if options.truncate
            && let Some(open) = self.inode(inode)
        {
            // What was written before the cut must not land after it.
            open.flush(&self.io).await;
            open.truncated();
        }
        let file = who.run(|c| async move { self.client.open(&c, at_inode(inode), options).await }).await?;
        Ok(self.opened(file, flags, options))
    }

    fn opened(&self, file: Arc<OpenFile>, flags: i32, options: OpenOptions) -> Opened {
        let attr = file.attr();
        let inode = self.enter(attr.inode);
        inode.note_mode(attr.mode);
        if options.truncate {
            inode.truncated();
        }
        let keep = inode.keep_cache(content_version(&attr));
        if !keep {
            inode.blocks.clear();
        }
        if flags & libc::O_NOATIME != 0 {
            file.keep_atime();
        } else if keep && options.read && attr.length > 0 {
            // What the kernel reads from its cache it does not tell.
            file.note_read();
        }
        self.refresh_kernel(&attr);
        // The kernel caches what it appends where it believes the end to be; so the page cache is left out.
        let appends = options.write && flags & libc::O_APPEND != 0;
        let direct = flags & libc::O_DIRECT != 0 || self.options.cache == Cache::None;
        let uncached = direct || appends;
        let mut answer = FopenFlags::empty();
        answer.set(FopenFlags::FOPEN_KEEP_CACHE, keep);
        answer.set(FopenFlags::FOPEN_DIRECT_IO, uncached);
        answer.set(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES, direct && !appends);
        // The close of a descriptor has to be told where it may end locks.
        let unflushed = !options.write && !self.locks.used();
        answer.set(FopenFlags::FOPEN_NOFLUSH, unflushed);
        let durable = flags & libc::O_DSYNC != 0;
        let sync = uncached && durable;
        let flags = HandleFlags { read: options.read, write: options.write, direct, sync, durable, unflushed };
        Opened { handle: self.add_handle(inode, file, flags), flags: answer }
    }

    pub async fn create(
        &self,
        who: Who,
        parent: u64,
        name: &[u8],
        new: NewMode,
        flags: i32,
    ) -> Result<(FileAttr, Opened)> {
        let OpenOptions { read, write, truncate } = access(flags);
        let (mode, umask, exclusive) = (new.bits(), new.umask, flags & libc::O_EXCL != 0);
        let options = CreateOptions { mode, umask, exclusive, truncate, read, write, layout: None };
        let options = &options;
        let file =
            who.run(|c| async move { self.client.create(&c, at_child(parent, name), options.clone()).await }).await;
        match &file {
            Ok(file) if !file.created() => {}
            Ok(file) => self.entry_changed(parent, &Ok(file.attr())),
            Err(_) => self.dir_attrs.forget(parent),
        }
        let file = file?;
        self.place_appends(file.inode()).await;
        let shown = self.tell_entry(parent, name, file.attr());
        let opened = self.opened(file, flags, OpenOptions { read, write, truncate });
        Ok((shown, opened))
    }

    /// O_TMPFILE: a file without a name, which lives as long as it is open or until it is given one.
    pub async fn create_unnamed(&self, who: Who, parent: u64, new: NewMode, flags: i32) -> Result<(FileAttr, Opened)> {
        let exclusive = flags & libc::O_EXCL != 0;
        let (mode, umask, read) = (new.bits(), new.umask, access(flags).read);
        let options = CreateOptions { mode, umask, exclusive, read, write: true, ..Default::default() };
        let options = &options;
        let made = |c| async move { self.client.create_unnamed(&c, at_inode(parent), options.clone()).await };
        let file = who.run(made).await?;
        let attr = file.attr();
        let opened = self.opened(file, flags, OpenOptions { read, write: true, truncate: false });
        // Closing its last file would end it.
        if let Some(inode) = self.inode(attr.inode) {
            inode.set_unlinked();
        }
        Ok((self.tell(attr), opened))
    }

    /// List a directory from `offset` until `add` says that it has enough.
    pub async fn list(
        &self,
        who: Who,
        dir: &DirHandle,
        mut offset: u64,
        with_attr: bool,
        mut add: impl FnMut(Listed<'_>) -> bool,
    ) -> Result<()> {
        let mut stream = dir.stream.lock().await;
        if offset == 0 {
            stream.rewind();
        }
        if offset < FIRST {
            // The first page also tells the parent.
            self.fetch(who, dir, &mut stream, FIRST, with_attr).await?;
            // Nothing is above the root of the mount.
            let parent = if dir.inode == self.root { self.root } else { stream.parent };
            for (at, name, inode) in [(0, &b"."[..], dir.inode), (1, b"..", parent)] {
                let inode = self.shown(inode);
                let entry = Listed { next: at + 1, name, inode, kind: FileType::Directory, attr: None };
                if at >= offset && add(entry) {
                    return Ok(());
                }
            }
            offset = FIRST;
        }
        let mut added = false;
        loop {
            // One page per call at most once something was found: a listing shows its first entries soon.
            if matches!(stream.at(offset, with_attr), At::Fetch(_)) {
                if added {
                    return Ok(());
                }
                self.fetch(who, dir, &mut stream, offset, with_attr).await?;
            }
            match stream.at(offset, with_attr) {
                At::End => return Ok(()),
                At::Fetch(_) => {}
                At::Entries(entries) => {
                    for entry in entries {
                        offset += 1;
                        added = true;
                        if add(self.listed(dir.inode, entry, offset, with_attr)) {
                            return Ok(());
                        }
                    }
                }
            }
        }
    }

    fn listed<'a>(&self, parent: u64, entry: &'a DirEntry, next: u64, with_attr: bool) -> Listed<'a> {
        let attr = entry.attr.as_ref().filter(|attr| with_attr && !self.keeps_appends(attr.inode));
        let attr = attr.map(|attr| self.tell_entry(parent, &entry.name, attr.clone()));
        Listed { next, name: &entry.name, inode: entry.inode, kind: entry.r#type(), attr }
    }

    async fn fetch(
        &self,
        who: Who,
        dir: &DirHandle,
        stream: &mut DirStream,
        offset: u64,
        with_attr: bool,
    ) -> Result<()> {
        let At::Fetch(wanted) = stream.at(offset, with_attr) else { return Ok(()) };
        let after = &wanted.after;
        let page = if self.kernel_decides() {
            // The kernel checked the permission when the directory was opened.
            self.client.list(&superuser(), at_inode(dir.inode), after, PAGE_ENTRIES, with_attr).await?
        } else {
            who.run(|c| async move { self.client.list(&c, at_inode(dir.inode), after, PAGE_ENTRIES, with_attr).await })
                .await?
        };
        stream.parent = page.parent;
        stream.filled(wanted, offset, page.entries, page.end, with_attr);
        Ok(())
    }
}
