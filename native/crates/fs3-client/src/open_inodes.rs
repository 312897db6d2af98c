//! The inodes that a client has open, and what keeps those alive that lose their last name.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use fs3_proto::v1::Attr;
use fs3_rt::Instant;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::inode::InodeState;

/// An inode that is open for reading only is held once it has been for so long: most are closed before, and cost nothing.
pub(crate) const HOLD_AFTER: Duration = Duration::from_secs(3);
/// Inodes in one request: the service takes more, but others would wait for it.
pub(crate) const HOLDS_MAX: usize = 250;

/// The inodes that have open files, with what keeps unlinked ones alive.
///
/// What this client unlinks itself lives on under a session. What others may unlink has a write session, or is held: the
/// service is told of it in batches, and told again when it was closed.
#[derive(Default)]
pub(crate) struct OpenInodes {
    table: Mutex<Table>,
    /// There is something to tell the service, now or later.
    pub to_tell: Notify,
}

#[derive(Default)]
struct Table {
    map: HashMap<u64, Entry>,
    /// Inodes to hold, by when that is due. One that its entry does not name with the same time is passed over.
    due: VecDeque<(Instant, u64)>,
    /// Inodes that were closed and whose hold is to be ended.
    ended: VecDeque<u64>,
    /// Holds that the service has, or may have.
    holds: usize,
}

struct Entry {
    state: Arc<InodeState>,
    open_files: usize,
    /// Those of them with a write session.
    writers: usize,
    /// The session under which the inode lives on after this client removed its last name.
    unlinked: Option<[u8; 16]>,
    /// When it is to be held.
    due: Option<Instant>,
    /// The service has a hold, or may have.
    held: bool,
    /// The service refused to hold it: the inode is gone.
    refused: bool,
}

/// One request to the service. Ends come first: an inode in both was closed and opened again.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Batch {
    pub begin: Vec<u64>,
    pub end: Vec<u64>,
}

impl Batch {
    pub fn len(&self) -> usize {
        self.begin.len() + self.end.len()
    }
}

impl OpenInodes {
    /// One more open file; `writes`: it has a write session.
    pub fn open(&self, attr: &Attr, writes: bool, now: Instant) -> Arc<InodeState> {
        let mut table = self.table.lock();
        let entry = table.map.entry(attr.inode).or_insert_with(|| Entry::new(attr));
        entry.open_files += 1;
        entry.writers += usize::from(writes);
        entry.state.observe(attr);
        let state = entry.state.clone();
        self.hold_later(&mut table, attr.inode, now);
        state
    }

    /// One more user of an inode that is open.
    pub fn retain(&self, inode: u64, now: Instant) {
        let mut table = self.table.lock();
        if let Some(entry) = table.map.get_mut(&inode) {
            entry.open_files += 1;
        }
        self.hold_later(&mut table, inode, now);
    }

    /// One less; returns the session to end after the last.
    pub fn close(&self, inode: u64, writes: bool, now: Instant) -> Option<[u8; 16]> {
        let mut table = self.table.lock();
        let entry = table.map.get_mut(&inode)?;
        entry.open_files -= 1;
        entry.writers -= usize::from(writes);
        if entry.open_files > 0 {
            self.hold_later(&mut table, inode, now);
            return None;
        }
        let entry = table.map.remove(&inode)?;
        if entry.held {
            table.ended.push_back(inode);
            self.to_tell.notify_one();
        }
        entry.unlinked
    }

    /// Nothing else keeps an inode that is open: it is to be held.
    fn hold_later(&self, table: &mut Table, inode: u64, now: Instant) {
        let Some(entry) = table.map.get_mut(&inode) else { return };
        if entry.writers > 0 || entry.unlinked.is_some() || entry.due.is_some() || entry.held || entry.refused {
            return;
        }
        let due = now + HOLD_AFTER;
        entry.due = Some(due);
        table.due.push_back((due, inode));
        if table.due.len() == 1 {
            self.to_tell.notify_one();
        }
    }

    pub fn get(&self, inode: u64) -> Option<Arc<InodeState>> {
        self.table.lock().map.get(&inode).map(|entry| entry.state.clone())
    }

    pub fn is_empty(&self) -> bool {
        self.table.lock().map.is_empty()
    }

    /// Take in attributes and return them as this client's users must see them.
    pub fn merge(&self, attr: Attr) -> Attr {
        match self.get(attr.inode) {
            None => attr,
            Some(state) => state.merge(&attr),
        }
    }

    /// The inode lost its last name and lives under `session`. False when it is not open (any more): the
    /// session must be ended then. A second session of one inode cannot happen: it has no name left.
    pub fn unlinked(&self, inode: u64, session: [u8; 16]) -> bool {
        match self.table.lock().map.get_mut(&inode) {
            Some(entry) => {
                entry.unlinked = Some(session);
                true
            }
            None => false,
        }
    }

    /// When the service is to be told something; `None` while there is nothing.
    pub fn next_due(&self, now: Instant) -> Option<Instant> {
        let table = self.table.lock();
        if table.ended.is_empty() { table.due.front().map(|(due, _)| *due) } else { Some(now) }
    }

    /// Whether the service has holds, or may have.
    pub fn has_holds(&self) -> bool {
        self.table.lock().holds > 0
    }

    /// What to tell the service now, at most HOLDS_MAX inodes.
    pub fn take_batch(&self, now: Instant) -> Batch {
        let mut table = self.table.lock();
        let table = &mut *table;
        let ends = table.ended.len().min(HOLDS_MAX);
        let mut batch = Batch { begin: Vec::new(), end: table.ended.drain(..ends).collect() };
        while batch.len() < HOLDS_MAX
            && let Some(&(due, inode)) = table.due.front()
            && due <= now
        {
            table.due.pop_front();
            let Some(entry) = table.map.get_mut(&inode).filter(|entry| entry.due == Some(due)) else { continue };
            entry.due = None;
            if entry.held || entry.writers == 0 && entry.unlinked.is_none() {
                table.holds += usize::from(!entry.held);
                entry.held = true;
                batch.begin.push(inode);
            }
        }
        batch
    }

    /// The service has answered a batch.
    pub fn told(&self, batch: &Batch, gone: &[u64]) {
        let mut table = self.table.lock();
        let table = &mut *table;
        table.holds -= batch.end.len();
        for inode in gone {
            if let Some(entry) = table.map.get_mut(inode).filter(|entry| entry.held) {
                (entry.held, entry.refused) = (false, true);
                table.holds -= 1;
            }
        }
    }

    /// The service may have heard a batch, or not: all of it is to be told again.
    pub fn not_told(&self, batch: Batch, now: Instant) {
        let mut table = self.table.lock();
        let table = &mut *table;
        for inode in batch.end.into_iter().rev() {
            table.ended.push_front(inode);
        }
        for inode in batch.begin {
            if let Some(entry) = table.map.get_mut(&inode).filter(|entry| entry.held && entry.due.is_none()) {
                entry.due = Some(now);
                table.due.push_front((now, inode));
            }
        }
    }

    /// The service has not heard of this client for too long: what was held is to be held again.
    pub fn forgotten(&self, now: Instant) {
        let mut table = self.table.lock();
        let table = &mut *table;
        for (inode, entry) in table.map.iter_mut().filter(|(_, entry)| entry.held && entry.due.is_none()) {
            entry.due = Some(now);
            table.due.push_front((now, *inode));
        }
        self.to_tell.notify_one();
    }

    /// The client ends: every hold that there may be, in batches.
    pub fn take_holds(&self) -> Vec<Batch> {
        let mut table = self.table.lock();
        let mut held: Vec<u64> = table.ended.drain(..).collect();
        table.due.clear();
        held.extend(table.map.iter().filter(|(_, entry)| entry.held).map(|(inode, _)| *inode));
        held.chunks(HOLDS_MAX).map(|end| Batch { begin: Vec::new(), end: end.to_vec() }).collect()
    }
}

impl Entry {
    fn new(attr: &Attr) -> Self {
        Self {
            state: Arc::new(InodeState::new(attr.clone())),
            open_files: 0,
            writers: 0,
            unlinked: None,
            due: None,
            held: false,
            refused: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attr(inode: u64) -> Attr {
        Attr { inode, ..Default::default() }
    }

    /// A table, and times in seconds since it was made.
    fn table() -> (OpenInodes, impl Fn(u64) -> Instant) {
        let start = Instant::now();
        (OpenInodes::default(), move |seconds| start + Duration::from_secs(seconds))
    }

    fn begin(inodes: &[u64]) -> Batch {
        Batch { begin: inodes.to_vec(), end: vec![] }
    }

    fn end(inodes: &[u64]) -> Batch {
        Batch { begin: vec![], end: inodes.to_vec() }
    }

    #[test]
    fn the_session_of_an_unlinked_inode_is_ended_by_the_last_close() {
        let (open, at) = table();
        open.open(&attr(5), false, at(0));
        open.open(&attr(5), true, at(0));
        assert!(open.unlinked(5, [1; 16]));
        assert_eq!(open.close(5, true, at(0)), None);
        assert_eq!(open.close(5, false, at(0)), Some([1; 16]));
        assert!(open.is_empty() && !open.unlinked(5, [2; 16]));
        assert_eq!(open.take_batch(at(9)), Batch::default());
    }

    #[test]
    fn only_what_is_open_for_a_while_is_held_until_the_last_close() {
        let (open, at) = table();
        for inode in [5, 6, 7] {
            open.open(&attr(inode), false, at(0));
        }
        open.open(&attr(5), false, at(0));
        open.close(6, false, at(1));
        open.close(7, false, at(1));
        open.open(&attr(7), false, at(2));
        assert_eq!((open.take_batch(at(2)), open.next_due(at(2))), (Batch::default(), Some(at(3))));
        let batch = open.take_batch(at(3));
        assert_eq!(batch, begin(&[5]));
        open.told(&batch, &[]);
        assert!(open.has_holds());
        open.close(7, false, at(4));
        assert_eq!(open.take_batch(at(9)), Batch::default());
        open.close(5, false, at(9));
        assert_eq!((open.take_batch(at(9)), open.next_due(at(9))), (Batch::default(), None));
        open.close(5, false, at(9));
        assert_eq!(open.next_due(at(9)), Some(at(9)));
        let batch = open.take_batch(at(9));
        assert_eq!(batch, end(&[5]));
        assert!(open.has_holds());
        open.told(&batch, &[]);
        assert!(!open.has_holds());
    }

    #[test]
    fn a_writer_needs_no_hold_until_it_closes_before_a_reader() {
        let (open, at) = table();
        open.open(&attr(5), false, at(0));
        open.open(&attr(5), true, at(1));
        assert_eq!(open.take_batch(at(3)), Batch::default());
        open.retain(5, at(4));
        open.close(5, false, at(4));
        open.close(5, true, at(5));
        assert_eq!(open.take_batch(at(7)), Batch::default());
        assert_eq!(open.take_batch(at(8)), begin(&[5]));
    }

    #[test]
    fn what_the_service_refused_is_not_asked_for_again() {
        let (open, at) = table();
        open.open(&attr(5), false, at(0));
        open.told(&open.take_batch(at(3)), &[5]);
        assert!(!open.has_holds());
        open.open(&attr(5), false, at(4));
        open.forgotten(at(5));
        assert_eq!(open.take_batch(at(99)), Batch::default());
        open.close(5, false, at(99));
        open.close(5, false, at(99));
        assert_eq!(open.next_due(at(99)), None);
    }

    #[test]
    fn what_the_service_may_not_have_heard_is_told_again() {
        let (open, at) = table();
        open.open(&attr(5), false, at(0));
        open.open(&attr(6), false, at(0));
        open.not_told(open.take_batch(at(3)), at(33));
        open.close(6, false, at(33));
        let batch = open.take_batch(at(33));
        assert_eq!(batch, Batch { begin: vec![5], end: vec![6] });
        open.open(&attr(6), false, at(33));
        open.not_told(batch, at(34));
        let batch = open.take_batch(at(36));
        assert_eq!(batch, Batch { begin: vec![5, 6], end: vec![6] }, "first it was closed, then opened again");
        open.told(&batch, &[]);
        let mut last = open.take_holds();
        last[0].end.sort();
        assert_eq!(last, [end(&[5, 6])]);
    }

    #[test]
    fn a_client_that_was_not_heard_of_holds_everything_again() {
        let (open, at) = table();
        for inode in [5, 6] {
            open.open(&attr(inode), false, at(0));
        }
        open.told(&open.take_batch(at(3)), &[]);
        open.close(6, false, at(4));
        open.forgotten(at(70));
        let batch = open.take_batch(at(70));
        assert_eq!(batch, Batch { begin: vec![5], end: vec![6] });
        open.told(&batch, &[]);
        open.close(5, false, at(71));
        open.told(&open.take_batch(at(71)), &[]);
        assert!(!open.has_holds());
    }

    #[test]
    fn a_batch_has_its_limit() {
        let (open, at) = table();
        let count = HOLDS_MAX as u64 + 5;
        for inode in 1..=count {
            open.open(&attr(inode), false, at(0));
        }
        assert_eq!(open.take_batch(at(3)).len(), HOLDS_MAX);
        assert_eq!(open.take_batch(at(3)).len(), 5);
        for inode in 1..=count {
            open.close(inode, false, at(4));
        }
        let (first, second) = (open.take_batch(at(4)), open.take_batch(at(4)));
        assert_eq!((first.end.len(), second.end.len()), (HOLDS_MAX, 5));
    }
}
