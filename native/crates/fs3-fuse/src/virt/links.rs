//! Virtual directories whose entries are symlinks: making one does something, removing it undoes it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use fuser::Errno;
use parking_lot::Mutex;

use crate::caller::Who;
use crate::core::Core;
use crate::virt::process::Process;
use crate::virt::rmrf;

/// Links of a mount at most; each is memory of the daemon.
const LINKS_MAX: usize = 1 << 14;

/// A symlink in a virtual directory.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub parent: u64,
    pub name: Vec<u8>,
    pub target: Vec<u8>,
    pub who: Who,
    /// Who made it; `None` when that was gone at once.
    pub process: Option<Process>,
    pub since: SystemTime,
}

/// What the links of a directory are for.
pub(crate) enum LinkDir {
    /// Announces shared memory, see [`crate::virt::iovs`].
    Iovs,
    /// Removes the tree that it points to.
    RmRf,
}

impl LinkDir {
    /// Do what the link is made for; says whether it stays.
    pub async fn made(&self, core: &Arc<Core>, link: &Link) -> Result<bool, Errno> {
        match self {
            Self::Iovs => core.announced(link).map(|()| true),
            Self::RmRf => rmrf::remove(core, link.who, &link.target).await.map(|()| false),
        }
    }

    /// It has its number now.
    pub fn stays(&self, core: &Arc<Core>, link: &Link, inode: u64) {
        match self {
            Self::Iovs => core.reap_with_process(link, inode),
            Self::RmRf => {}
        }
    }

    /// Do what moving an entry of the file system here is for.
    pub async fn entered(&self, core: &Arc<Core>, who: Who, parent: u64, name: &[u8]) -> Result<(), Errno> {
        match self {
            Self::RmRf => rmrf::remove_moved(core, who, parent, name).await,
            Self::Iovs => Err(Errno::EPERM),
        }
    }

    /// Undo it. Called once for a link that stayed.
    pub fn removed(&self, core: &Core, link: &Link) {
        match self {
            Self::Iovs => core.rings.withdrawn(&link.name),
            Self::RmRf => {}
        }
    }
}

/// The links of all virtual directories of a mount. Thread-safe.
pub(crate) struct LinkTable {
    next: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    by_inode: BTreeMap<u64, Link>,
    by_name: HashMap<(u64, Vec<u8>), u64>,
}

impl LinkTable {
    /// A table whose links get numbers from `first` on.
    pub fn new(first: u64) -> Self {
        Self { next: AtomicU64::new(first), state: Mutex::default() }
    }

    /// A number that no other link has had.
    pub fn take_inode(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Errors: EEXIST, ENOSPC when there are too many.
    pub fn insert(&self, link: Link) -> Result<u64, Errno> {
        let mut state = self.state.lock();
        if state.by_inode.len() >= LINKS_MAX {
            return Err(Errno::ENOSPC);
        }
        let key = (link.parent, link.name.clone());
        if state.by_name.contains_key(&key) {
            return Err(Errno::EEXIST);
        }
        let inode = self.take_inode();
        state.by_name.insert(key, inode);
        state.by_inode.insert(inode, link);
        Ok(inode)
    }

    /// A link that had this number in a predecessor.
    pub fn put(&self, inode: u64, link: Link) {
        let mut state = self.state.lock();
        state.by_name.insert((link.parent, link.name.clone()), inode);
        state.by_inode.insert(inode, link);
    }

    /// The next number.
    pub fn next_inode(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Numbers below `next` were given by a predecessor.
    pub fn skip_inodes(&self, next: u64) {
        self.next.fetch_max(next, Ordering::Relaxed);
    }

    /// All links, by number.
    pub fn all(&self) -> Vec<(u64, Link)> {
        self.state.lock().by_inode.iter().map(|(inode, link)| (*inode, link.clone())).collect()
    }

    pub fn get(&self, inode: u64) -> Option<Link> {
        self.state.lock().by_inode.get(&inode).cloned()
    }

    pub fn find(&self, parent: u64, name: &[u8]) -> Option<u64> {
        self.state.lock().by_name.get(&(parent, name.to_vec())).copied()
    }

    /// Says whether it was there.
    pub fn remove(&self, inode: u64) -> bool {
        let mut state = self.state.lock();
        let Some(link) = state.by_inode.remove(&inode) else { return false };
        state.by_name.remove(&(link.parent, link.name));
        true
    }

    /// Numbers and names of the links of a directory.
    pub fn list(&self, parent: u64) -> Vec<(u64, Vec<u8>)> {
        let state = self.state.lock();
        let mine = state.by_inode.iter().filter(|(_, link)| link.parent == parent);
        mine.map(|(inode, link)| (*inode, link.name.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &[u8]) -> Link {
        let who = Who::new(7, 8, 9, None);
        Link { parent: 5, name: name.to_vec(), target: b"t".to_vec(), who, process: None, since: SystemTime::now() }
    }

    #[test]
    fn a_name_is_taken_once_and_free_again_after_its_removal() {
        let table = LinkTable::new(100);
        let first = table.insert(link(b"a")).unwrap();
        assert_eq!(table.insert(link(b"a")).unwrap_err().code(), libc::EEXIST);
        assert_eq!((table.find(5, b"a"), table.find(6, b"a")), (Some(first), None));
        assert!(table.remove(first) && !table.remove(first));
        let second = table.insert(link(b"a")).unwrap();
        assert!(second > first, "numbers are not used twice");
        assert_eq!(table.list(5), vec![(second, b"a".to_vec())]);
        assert!(table.list(6).is_empty());
    }

    #[test]
    fn links_of_a_predecessor_keep_their_numbers_and_new_ones_get_others() {
        let table = LinkTable::new(100);
        table.put(107, link(b"a"));
        table.skip_inodes(110);
        assert_eq!((table.find(5, b"a"), table.next_inode()), (Some(107), 110));
        assert_eq!(table.insert(link(b"a")).unwrap_err().code(), libc::EEXIST);
        assert_eq!(table.insert(link(b"b")).unwrap(), 110);
        assert_eq!(table.all().iter().map(|(inode, _)| *inode).collect::<Vec<_>>(), [107, 110]);
    }

    #[test]
    fn there_are_not_more_links_than_allowed() {
        let table = LinkTable::new(0);
        for n in 0..LINKS_MAX {
            table.insert(link(n.to_string().as_bytes())).unwrap();
        }
        assert_eq!(table.insert(link(b"more")).unwrap_err().code(), libc::ENOSPC);
    }
}
