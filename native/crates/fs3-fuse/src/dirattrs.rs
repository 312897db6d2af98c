//! Attributes of directories, for a kernel that asks for them again after every change that it makes inside.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::{Duration, Instant};

use fs3_client::Attr;
use parking_lot::Mutex;

/// Directories that are remembered.
const DIRECTORIES_MAX: usize = 4096;

/// What this mount knows of directories. A child that it makes or removes changes the times by an amount that the
/// answer tells; anything else makes it forget. Changes by others are seen when `life` is over.
pub(crate) struct DirAttrs {
    life: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Counts what happens, to tell which of two things began first.
    now: u64,
    forgotten: u64,
    known: HashMap<u64, Known>,
}

struct Known {
    attr: Option<(Instant, Attr)>,
    changed: u64,
    changed_ns: i64,
}

/// A question to the service that is under way.
#[derive(Clone, Copy)]
pub(crate) struct Asked {
    number: u64,
    at: Instant,
}

fn advance(attr: &mut Attr, changed_ns: i64) {
    attr.mtime_ns = attr.mtime_ns.max(changed_ns);
    attr.ctime_ns = attr.ctime_ns.max(changed_ns);
}

impl DirAttrs {
    /// What is learned counts for `life`.
    pub fn new(life: Duration) -> Self {
        Self { life, state: Mutex::default() }
    }

    /// The attributes of a directory and how much longer they count.
    pub fn get(&self, inode: u64) -> Option<(Attr, Duration)> {
        let state = self.state.lock();
        let (at, attr) = state.known.get(&inode)?.attr.as_ref()?;
        let left = self.life.checked_sub(at.elapsed())?;
        Some((attr.clone(), left))
    }

    /// The service is about to be asked.
    pub fn ask(&self) -> Asked {
        Asked { number: self.state.lock().now, at: Instant::now() }
    }

    /// The service has answered. What this mount changed meanwhile is put on top, as the answer may be older.
    pub fn answered(&self, asked: Asked, attr: &mut Attr) {
        let mut state = self.state.lock();
        if state.forgotten > asked.number {
            return;
        }
        let known = state.of(attr.inode);
        if known.changed > asked.number {
            advance(attr, known.changed_ns);
        }
        known.attr = Some((asked.at, attr.clone()));
    }

    /// This mount made or removed an entry that is no directory, at `changed_ns` on the service's clock.
    pub fn changed(&self, inode: u64, changed_ns: i64) {
        let mut state = self.state.lock();
        state.now += 1;
        let now = state.now;
        let known = state.of(inode);
        known.changed = now;
        known.changed_ns = known.changed_ns.max(changed_ns);
        if let Some((_, attr)) = &mut known.attr {
            advance(attr, changed_ns);
        }
    }

    /// Something else happened to the directory, or may have.
    pub fn forget(&self, inode: u64) {
        let mut state = self.state.lock();
        state.known.remove(&inode);
        state.bump();
    }

    /// As [`DirAttrs::forget`] when it is not known which directory is meant.
    pub fn forget_all(&self) {
        let mut state = self.state.lock();
        state.known.clear();
        state.bump();
    }
}

impl State {
    /// Answers to what was asked before do not count any more.
    fn bump(&mut self) {
        self.now += 1;
        self.forgotten = self.now;
    }

    fn of(&mut self, inode: u64) -> &mut Known {
        if self.known.len() >= DIRECTORIES_MAX && !self.known.contains_key(&inode) {
            self.known.clear();
            self.bump();
        }
        match self.known.entry(inode) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(Known { attr: None, changed: 0, changed_ns: 0 }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attr(inode: u64, mtime_ns: i64) -> Attr {
        Attr { inode, mtime_ns, ctime_ns: mtime_ns, ..Attr::default() }
    }

    fn mtime(dirs: &DirAttrs, inode: u64) -> Option<i64> {
        dirs.get(inode).map(|(attr, _)| attr.mtime_ns)
    }

    #[test]
    fn a_change_by_this_mount_shows_whatever_answer_arrives_after_it() {
        let dirs = DirAttrs::new(Duration::from_secs(60));
        let asked = dirs.ask();
        dirs.changed(5, 20);
        dirs.answered(asked, &mut attr(5, 10));
        assert_eq!(mtime(&dirs, 5), Some(20));
        dirs.changed(5, 30);
        assert_eq!(mtime(&dirs, 5), Some(30));
        // Asked after the change: a time set by hand may lie before it.
        dirs.answered(dirs.ask(), &mut attr(5, 7));
        assert_eq!(mtime(&dirs, 5), Some(7));
    }

    #[test]
    fn an_answer_from_before_a_forget_is_not_kept() {
        let dirs = DirAttrs::new(Duration::from_secs(60));
        dirs.answered(dirs.ask(), &mut attr(5, 1));
        let asked = dirs.ask();
        dirs.forget(5);
        assert_eq!(mtime(&dirs, 5), None);
        dirs.answered(asked, &mut attr(5, 2));
        assert_eq!(mtime(&dirs, 5), None);
        dirs.answered(dirs.ask(), &mut attr(5, 3));
        assert_eq!(mtime(&dirs, 5), Some(3));
    }

    #[test]
    fn what_is_known_counts_for_its_life_from_when_it_was_asked() {
        let dirs = DirAttrs::new(Duration::ZERO);
        dirs.answered(dirs.ask(), &mut attr(5, 1));
        while dirs.get(5).is_some() {
            std::hint::spin_loop();
        }
        let dirs = DirAttrs::new(Duration::from_secs(60));
        dirs.answered(dirs.ask(), &mut attr(5, 1));
        assert!(dirs.get(5).unwrap().1 <= Duration::from_secs(60));
    }

    #[test]
    fn the_table_is_bounded() {
        let dirs = DirAttrs::new(Duration::from_secs(60));
        for inode in 0..3 * DIRECTORIES_MAX as u64 {
            dirs.answered(dirs.ask(), &mut attr(inode, 1));
        }
        assert!(dirs.state.lock().known.len() <= DIRECTORIES_MAX);
    }
}
