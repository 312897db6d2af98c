//! The files, their unsynced changes and their faults, without FUSE.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::draw::Draw;
use crate::faults::{Counts, Faults, Injector, Kind};
use crate::journal::{Journal, Losses};
use crate::names::Names;

/// Rot strikes blocks of this size: one bit of each.
const ROT_BLOCK: u64 = 4096;
/// The inode of the root, as FUSE has it.
const ROOT: u64 = 1;

/// A file or directory that is known by inode.
pub(crate) struct Node {
    path: RwLock<PathBuf>,
    // None for directories.
    file: Option<File>,
    state: Mutex<State>,
    // How often the kernel was told of it and has not forgotten it.
    lookups: AtomicU64,
}

#[derive(Default)]
struct State {
    journal: Journal,
    rotten: BTreeSet<u64>,
}

/// A directory tree on a disk that fails on demand. Thread-safe.
pub struct Tree {
    nodes: Mutex<HashMap<u64, Arc<Node>>>,
    // Lock order: names, then nodes or a node; the injector last and alone.
    names: Mutex<Names>,
    injector: Mutex<Injector>,
    dead: AtomicBool,
}

pub(crate) fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

impl Node {
    fn new(path: PathBuf, file: Option<File>) -> Arc<Self> {
        Arc::new(Self { path: RwLock::new(path), file, state: Mutex::default(), lookups: AtomicU64::new(0) })
    }

    fn path(&self) -> PathBuf {
        self.path.read().clone()
    }

    fn name(&self) -> String {
        self.path.read().file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    }

    fn file(&self) -> io::Result<&File> {
        self.file.as_ref().ok_or_else(|| errno(libc::EISDIR))
    }

    pub fn metadata(&self) -> io::Result<Metadata> {
        match &self.file {
            Some(file) => file.metadata(),
            None => fs::symlink_metadata(self.path()),
        }
    }
}

impl Tree {
    /// The tree below `backing`/tree, made if it is not there. All that is there counts as durable.
    pub fn new(backing: &Path, seed: u64) -> io::Result<Self> {
        let root = backing.join("tree");
        fs::create_dir_all(&root)?;
        Ok(Self {
            nodes: Mutex::new(HashMap::from([(ROOT, Node::new(root, None))])),
            names: Mutex::new(Names::new(backing.join("graveyard"))?),
            injector: Mutex::new(Injector::new(seed)),
            dead: AtomicBool::new(false),
        })
    }

    pub(crate) fn node(&self, inode: u64) -> io::Result<Arc<Node>> {
        if self.dead.load(Ordering::Acquire) {
            return Err(errno(libc::EIO));
        }
        self.nodes.lock().get(&inode).cloned().ok_or_else(|| errno(libc::ESTALE))
    }

    fn child(&self, parent: u64, name: &OsStr) -> io::Result<PathBuf> {
        Ok(self.node(parent)?.path().join(name))
    }

    /// Know the file at `path` by its inode.
    fn adopt(&self, path: PathBuf) -> io::Result<(u64, Metadata)> {
        let metadata = fs::symlink_metadata(&path)?;
        let mut nodes = self.nodes.lock();
        let node = match nodes.entry(metadata.ino()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let file = match metadata.is_dir() {
                    true => None,
                    false => Some(OpenOptions::new().read(true).write(true).open(&path)?),
                };
                entry.insert(Node::new(path, file))
            }
        };
        node.lookups.fetch_add(1, Ordering::AcqRel);
        Ok((metadata.ino(), metadata))
    }

    /// The kernel gives back `count` lookups. A node with unsynced changes or rot stays.
    pub(crate) fn forget(&self, inode: u64, count: u64) {
        let mut nodes = self.nodes.lock();
        let Some(node) = nodes.get(&inode) else { return };
        let before = node.lookups.fetch_sub(count, Ordering::AcqRel);
        let state = node.state.lock();
        let needed = before > count || !state.journal.is_empty() || !state.rotten.is_empty();
        drop(state);
        if !needed && inode != ROOT {
            nodes.remove(&inode);
        }
    }

    pub(crate) fn lookup(&self, parent: u64, name: &OsStr) -> io::Result<(u64, Metadata)> {
        let names = self.names.lock();
        let found = self.adopt(self.child(parent, name)?);
        drop(names);
        found
    }

    pub(crate) fn list(&self, inode: u64) -> io::Result<Vec<(u64, bool, OsString)>> {
        let mut found = vec![];
        for entry in fs::read_dir(self.node(inode)?.path())? {
            let entry = entry?;
            found.push((entry.metadata()?.ino(), entry.file_type()?.is_dir(), entry.file_name()));
        }
        Ok(found)
    }

    // ---- names

    pub(crate) fn create(&self, parent: u64, name: &OsStr, mode: u32) -> io::Result<(u64, Metadata)> {
        let mut names = self.names.lock();
        let path = self.child(parent, name)?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        file.set_permissions(fs::Permissions::from_mode(mode & 0o7777))?;
        names.made(path.clone(), false);
        self.adopt(path)
    }

    pub(crate) fn make_directory(&self, parent: u64, name: &OsStr, mode: u32) -> io::Result<(u64, Metadata)> {
        let mut names = self.names.lock();
        let path = self.child(parent, name)?;
        fs::create_dir(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode & 0o7777))?;
        names.made(path.clone(), true);
        self.adopt(path)
    }

    pub(crate) fn remove(&self, parent: u64, name: &OsStr) -> io::Result<()> {
        let mut names = self.names.lock();
        let path = self.child(parent, name)?;
        let len = fs::symlink_metadata(&path)?.len();
        let grave = names.remove(path.clone())?;
        self.moved(&path, &grave);
        self.injector.lock().return_space(len);
        Ok(())
    }

    pub(crate) fn remove_directory(&self, parent: u64, name: &OsStr) -> io::Result<()> {
        let mut names = self.names.lock();
        let path = self.child(parent, name)?;
        let inode = fs::symlink_metadata(&path)?.ino();
        names.remove_directory(path)?;
        // The number may soon be another file's.
        self.nodes.lock().remove(&inode);
        Ok(())
    }

    pub(crate) fn rename(&self, parent: u64, name: &OsStr, to_parent: u64, to_name: &OsStr) -> io::Result<()> {
        let mut names = self.names.lock();
        let (from, to) = (self.child(parent, name)?, self.child(to_parent, to_name)?);
        if let Some(grave) = names.rename(from.clone(), to.clone())? {
            self.moved(&to, &grave);
        }
        self.moved(&from, &to);
        Ok(())
    }

    /// Nodes at or below `from` are now at or below `to`.
    fn moved(&self, from: &Path, to: &Path) {
        for node in self.nodes.lock().values() {
            let mut path = node.path.write();
            if let Ok(rest) = path.strip_prefix(from) {
                *path = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            }
        }
    }

    pub(crate) fn sync_names(&self) -> io::Result<()> {
        self.strike(Kind::Sync, "")?;
        self.names.lock().synced();
        Ok(())
    }

    // ---- bytes

    fn strike(&self, kind: Kind, name: &str) -> io::Result<()> {
        let (delay, fails) = self.injector.lock().strike(kind, name);
        std::thread::sleep(delay);
        if fails { Err(errno(libc::EIO)) } else { Ok(()) }
    }

    pub(crate) fn read(&self, inode: u64, at: u64, len: usize) -> io::Result<Vec<u8>> {
        let node = self.node(inode)?;
        self.strike(Kind::Read, &node.name())?;
        let file = node.file()?;
        let state = node.state.lock();
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            match file.read_at(&mut bytes[done..], at + done as u64)? {
                0 => break,
                n => done += n,
            }
        }
        bytes.truncate(done);
        let mut struck = 0;
        for &block in state.rotten.range(at / ROT_BLOCK..) {
            let Some(byte) = (block * ROT_BLOCK).checked_sub(at).and_then(|i| bytes.get_mut(i as usize)) else { break };
            *byte ^= 1;
            struck += 1;
        }
        drop(state);
        self.injector.lock().counts.rotten_reads += u64::from(struck > 0);
        Ok(bytes)
    }

    pub(crate) fn write(&self, inode: u64, at: u64, data: &[u8]) -> io::Result<()> {
        let node = self.node(inode)?;
        let struck = self.strike(Kind::Write, &node.name());
        let file = node.file()?;
        let mut state = node.state.lock();
        let len = file.metadata()?.len();
        let grown = (at + data.len() as u64).saturating_sub(len);
        self.injector.lock().take_space(grown)?;
        let stored = match &struck {
            Ok(()) => data.len(),
            // A part of it may have reached the disk.
            Err(_) => self.injector.lock().below(data.len() as u64 + 1) as usize,
        };
        if self.dead.load(Ordering::Acquire) {
            return Err(errno(libc::EIO));
        }
        state.journal.write(file, &data[..stored], at)?;
        let blocks = at / ROT_BLOCK..(at + stored as u64).div_ceil(ROT_BLOCK);
        state.rotten.retain(|block| !blocks.contains(block));
        struck
    }

    pub(crate) fn set_len(&self, inode: u64, len: u64) -> io::Result<()> {
        let node = self.node(inode)?;
        let file = node.file()?;
        let mut state = node.state.lock();
        let before = file.metadata()?.len();
        self.injector.lock().take_space(len.saturating_sub(before))?;
        state.journal.set_len(file, len)?;
        self.injector.lock().return_space(before.saturating_sub(len));
        Ok(())
    }

    /// Extend to at least `len` bytes.
    pub(crate) fn allocate(&self, inode: u64, len: u64) -> io::Result<()> {
        match len > self.node(inode)?.metadata()?.len() {
            true => self.set_len(inode, len),
            false => Ok(()),
        }
    }

    pub(crate) fn set_mode(&self, inode: u64, mode: u32) -> io::Result<()> {
        fs::set_permissions(self.node(inode)?.path(), fs::Permissions::from_mode(mode & 0o7777))
    }

    pub(crate) fn sync(&self, inode: u64) -> io::Result<()> {
        let node = self.node(inode)?;
        let struck = self.strike(Kind::Sync, &node.name());
        let mut state = node.state.lock();
        if self.dead.load(Ordering::Acquire) {
            return Err(errno(libc::EIO));
        }
        match &struck {
            Ok(()) => state.journal.synced(),
            Err(_) if self.injector.lock().faults.sync_drops => state.journal.drop_unsynced(node.file()?)?,
            Err(_) => {}
        }
        struck
    }

    /// Bytes by which files may still grow.
    pub(crate) fn space_bytes(&self) -> Option<u64> {
        self.injector.lock().faults.space_bytes
    }

    // ---- from outside

    /// Put `faults` in force instead of those before.
    pub fn set_faults(&self, faults: Faults) {
        self.injector.lock().faults = faults;
    }

    /// What happened so far.
    pub fn counts(&self) -> Counts {
        self.injector.lock().counts
    }

    /// Let `count` blocks of 4096 bytes that hold data, in files whose names contain `only`, read back with a flipped
    /// bit until they are written again. Returns how many there are now.
    pub fn rot(&self, count: u64, seed: u64, only: &str) -> io::Result<u64> {
        let mut draw = Draw::new(seed);
        let nodes: BTreeMap<PathBuf, Arc<Node>> =
            self.nodes.lock().values().filter(|n| n.file.is_some()).map(|n| (n.path(), n.clone())).collect();
        let nodes: Vec<_> = nodes.into_values().filter(|n| n.name().contains(only)).collect();
        let mut places = vec![];
        for (i, node) in nodes.iter().enumerate() {
            let file = node.file()?;
            for block in 0..file.metadata()?.len() / ROT_BLOCK {
                let mut bytes = [0; ROT_BLOCK as usize];
                file.read_exact_at(&mut bytes, block * ROT_BLOCK)?;
                if bytes.iter().any(|&b| b != 0) {
                    places.push((i, block));
                }
            }
        }
        let mut done = 0;
        while done < count && !places.is_empty() {
            let (i, block) = places.swap_remove(draw.below(places.len() as u64) as usize);
            nodes[i].state.lock().rotten.insert(block);
            done += 1;
        }
        Ok(done)
    }

    /// Let everything read back as it was written again.
    pub fn heal_rot(&self) {
        for node in self.nodes.lock().values() {
            node.state.lock().rotten.clear();
        }
    }

    /// The power is cut: unsynced changes are kept, lost or torn as `seed` decides, and from here on every operation
    /// fails. What is left is what the next start finds.
    pub fn cut(&self, seed: u64) -> io::Result<Losses> {
        self.dead.store(true, Ordering::Release);
        let mut draw = Draw::new(seed);
        let mut names = self.names.lock();
        let nodes: BTreeMap<PathBuf, Arc<Node>> = self.nodes.lock().values().map(|n| (n.path(), n.clone())).collect();
        let mut losses = Losses::default();
        for node in nodes.values() {
            if let Some(file) = &node.file {
                losses.add(node.state.lock().journal.cut(file, &mut draw)?);
            }
        }
        losses.names_lost = names.cut(&mut draw)?;
        Ok(losses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(dir: &tempfile::TempDir) -> Tree {
        Tree::new(dir.path(), 1).expect("a tree")
    }

    fn make(tree: &Tree, name: &str, bytes: &[u8]) -> u64 {
        let (inode, _) = tree.create(ROOT, OsStr::new(name), 0o600).expect("create");
        tree.write(inode, 0, bytes).expect("write");
        inode
    }

    #[test]
    fn a_file_without_a_synced_name_may_be_gone_and_one_with_it_is_not() {
        let mut gone = 0;
        for seed in 0..50 {
            let dir = tempfile::tempdir().expect("a directory");
            let before = tree(&dir);
            let named = make(&before, "named", b"1");
            before.sync(named).expect("sync");
            before.sync_names().expect("sync");
            let unnamed = make(&before, "unnamed", b"2");
            before.sync(unnamed).expect("sync");
            before.cut(seed).expect("cut");
            assert!(before.read(named, 0, 1).is_err(), "after the cut nothing works");
            let after = tree(&dir);
            let (inode, _) = after.lookup(ROOT, OsStr::new("named")).expect("the named file is there");
            assert_eq!(after.read(inode, 0, 10).expect("read"), b"1");
            gone += u32::from(after.lookup(ROOT, OsStr::new("unnamed")).is_err());
        }
        assert!(gone > 5 && gone < 45, "{gone}");
    }

    #[test]
    fn a_removed_file_that_is_open_works_and_a_cut_may_bring_it_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let before = tree(&dir);
        let inode = make(&before, "f", b"1");
        before.sync(inode).expect("sync");
        before.sync_names().expect("sync");
        before.remove(ROOT, OsStr::new("f")).expect("remove");
        before.write(inode, 1, b"2").expect("write");
        assert_eq!(before.read(inode, 0, 10).expect("read"), b"12");
        let back = (0..20).any(|seed| {
            let dir = tempfile::tempdir().expect("a directory");
            let before = tree(&dir);
            make(&before, "f", b"1");
            before.sync_names().expect("sync");
            before.remove(ROOT, OsStr::new("f")).expect("remove");
            before.cut(seed).expect("cut");
            tree(&dir).lookup(ROOT, OsStr::new("f")).is_ok()
        });
        assert!(back);
    }

    #[test]
    fn errors_and_space_are_as_set() {
        let dir = tempfile::tempdir().expect("a directory");
        let tree = tree(&dir);
        let inode = make(&tree, "data", b"1234");
        let set = |faults| tree.set_faults(faults);
        let number = |r: io::Result<()>| r.expect_err("an error").raw_os_error();
        set(Faults { write_eio: 1.0, only: "data".to_owned(), ..Faults::default() });
        assert_eq!(number(tree.write(inode, 0, b"1234")), Some(libc::EIO));
        set(Faults { write_eio: 1.0, only: "log".to_owned(), ..Faults::default() });
        tree.write(inode, 0, b"1234").expect("other files are spared");
        set(Faults { space_bytes: Some(2), ..Faults::default() });
        tree.write(inode, 2, b"1234").expect("two bytes more fit");
        assert_eq!(number(tree.write(inode, 4, b"1234")), Some(libc::ENOSPC));
        assert_eq!(number(tree.allocate(inode, 100)), Some(libc::ENOSPC));
        set(Faults { sync_eio: 1.0, sync_drops: true, ..Faults::default() });
        assert_eq!(number(tree.sync(inode)), Some(libc::EIO));
        assert_eq!(tree.read(inode, 0, 10).expect("read"), b"", "nothing was ever synced");
        assert_eq!(tree.counts().enospc, 2);
    }

    #[test]
    fn rot_stays_until_the_block_is_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let tree = tree(&dir);
        let inode = make(&tree, "data", &[1; 3 * 4096]);
        assert_eq!(tree.rot(5, 1, "data").expect("rot"), 3);
        assert_eq!(tree.read(inode, 4096, 4096).expect("read")[0], 0);
        assert_eq!(tree.read(inode, 100, 100).expect("read"), [1; 100]);
        tree.write(inode, 4096, &[1; 4096]).expect("write");
        assert_eq!(tree.read(inode, 4096, 4096).expect("read"), [1; 4096]);
        assert_eq!(tree.read(inode, 0, 1).expect("read"), [0]);
        tree.heal_rot();
        assert_eq!(tree.read(inode, 0, 1).expect("read"), [1]);
    }
}
