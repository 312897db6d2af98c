//! What one client knows of an inode that it has open, shared by all its open files.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use fs3_proto::v1::{Attr, ContentVersion, Layout, WriteReport};
use parking_lot::Mutex;

use crate::accesses;

/// How many changes of the content's version are remembered for who asks for them.
const STEPS_MAX: usize = 64;

/// What caches know the content by.
pub fn content_version(attr: &Attr) -> ContentVersion {
    ContentVersion {
        length: attr.length,
        mtime_ns: attr.mtime_ns,
        ctime_ns: attr.ctime_ns,
        truncate_version: attr.truncate_version,
    }
}

/// Shared by the open files of one inode.
pub(crate) struct InodeState {
    pub inode: u64,
    /// Writes share it, truncates and closes have it alone: the acknowledged end of a write belongs to exactly
    /// one truncate version.
    pub gate: tokio::sync::RwLock<()>,
    /// Held by the append that runs.
    pub append_turn: tokio::sync::Mutex<()>,
    /// Held by the sync that runs.
    pub sync_turn: tokio::sync::Mutex<()>,
    /// Held by the write that asks for room.
    pub room_turn: tokio::sync::Mutex<()>,
    /// How long the file may become by writing before the service is asked; without a quota as long as it likes.
    length_limit: AtomicU64,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// The newest seen. Within one truncate version its length only grows.
    attr: Attr,
    /// Largest end of an acknowledged write under `attr.truncate_version`, and of one that may be stored.
    written_end: u64,
    attempted_end: u64,
    /// When the last unpublished write was acknowledged; 0 when a time set by hand is newer.
    mtime_ns: i64,
    /// Counts writes; the service knows all up to `published`.
    writes: u64,
    published: u64,
    /// Chains written since the last sync of the disks.
    unsynced: BTreeSet<u32>,
    /// Bytes that were there when the first file was opened. Whoever wrote them, perhaps this client through a
    /// file that it closed since, may not have synced them; 0 once they are.
    unsynced_before: u64,
    /// Versions of the content before and after this client's reports.
    steps: Vec<(ContentVersion, ContentVersion)>,
}

/// A report and what it covers.
pub(crate) struct Pending {
    pub report: WriteReport,
    writes: u64,
}

impl InodeState {
    pub fn new(attr: Attr) -> Self {
        let known = Known { unsynced_before: attr.length, attr, ..Default::default() };
        Self {
            inode: known.attr.inode,
            gate: Default::default(),
            append_turn: Default::default(),
            sync_turn: Default::default(),
            room_turn: Default::default(),
            length_limit: AtomicU64::new(u64::MAX),
            known: Mutex::new(known),
        }
    }

    /// Take in attributes from the service, in whatever order replies arrive.
    pub fn observe(&self, attr: &Attr) {
        self.known.lock().observe(attr);
    }

    /// The attributes as this client's users must see them.
    pub fn merged(&self) -> Attr {
        let known = self.known.lock();
        known.merge(&known.attr)
    }

    /// Take in attributes and return them as this client's users must see them.
    pub fn merge(&self, attr: &Attr) -> Attr {
        let mut known = self.known.lock();
        known.observe(attr);
        known.merge(attr)
    }

    pub fn layout(&self) -> Layout {
        self.known.lock().attr.layout.unwrap_or_default()
    }

    pub fn length(&self) -> u64 {
        let known = self.known.lock();
        known.attr.length.max(known.written_end)
    }

    /// How long the file may become before the service is asked.
    pub fn length_limit(&self) -> u64 {
        self.length_limit.load(Ordering::Relaxed)
    }

    /// The service has said how long the file may become.
    pub fn limit_length(&self, limit: Option<u64>) {
        self.length_limit.store(limit.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// A write up to `end` begins.
    pub fn begin_write(&self, end: u64) {
        let mut known = self.known.lock();
        known.attempted_end = known.attempted_end.max(end);
    }

    /// A write to this chain begins. Called before the first byte is sent, so that a sync that starts after the
    /// write was acknowledged knows the chain.
    pub fn touch_chain(&self, chain_id: u32) {
        self.known.lock().unsynced.insert(chain_id);
    }

    /// Everything up to `end` of one write was acknowledged at `now_ns`.
    pub fn acknowledge_write(&self, end: u64, now_ns: i64) {
        let mut known = self.known.lock();
        known.written_end = known.written_end.max(end);
        known.writes += 1;
        known.mtime_ns = now_ns;
    }

    /// A write failed: part of it may be stored, which the next report has to say.
    pub fn fail_write(&self) {
        self.known.lock().writes += 1;
    }

    /// Somebody set the modification time: it wins over that of earlier writes.
    pub fn set_mtime(&self) {
        self.known.lock().mtime_ns = 0;
    }

    /// What the service has to be told; `None` when it knows everything.
    pub fn pending(&self) -> Option<Pending> {
        let known = self.known.lock();
        if known.writes == known.published {
            return None;
        }
        let report = WriteReport {
            wrote: true,
            length: known.written_end,
            truncate_version: known.attr.truncate_version,
            mtime_ns: if known.mtime_ns == 0 { known.attr.mtime_ns } else { known.mtime_ns },
            atime_ns: 0,
            attempted_length: if known.attempted_end > known.written_end { known.attempted_end } else { 0 },
        };
        Some(Pending { report, writes: known.writes })
    }

    /// The service has accepted a report.
    pub fn published(&self, pending: &Pending) {
        let mut known = self.known.lock();
        known.published = known.published.max(pending.writes);
    }

    /// A report was answered: the content was `before` until then, and is that of `attr` with it.
    pub fn note_step(&self, before: Option<ContentVersion>, attr: Option<&Attr>) {
        let (Some(before), Some(attr)) = (before, attr) else { return };
        let mut known = self.known.lock();
        if known.steps.len() < STEPS_MAX {
            known.steps.push((before, content_version(attr)));
        }
    }

    /// What was noted, once.
    pub fn take_steps(&self) -> Vec<(ContentVersion, ContentVersion)> {
        std::mem::take(&mut self.known.lock().steps)
    }

    /// The file was read at `now_ns`; whether that changes its access time.
    pub fn note_read(&self, now_ns: i64) -> bool {
        let mut known = self.known.lock();
        let due = accesses::is_due(&known.attr, now_ns);
        if due {
            known.attr.atime_ns = now_ns;
        }
        due
    }

    /// Chains to sync; they count as clean until [`InodeState::not_synced`].
    pub fn take_unsynced(&self) -> BTreeSet<u32> {
        std::mem::take(&mut self.known.lock().unsynced)
    }

    /// Bytes from the start of the file that were written before the inode was opened and may not be synced.
    pub fn unsynced_before(&self) -> u64 {
        let known = self.known.lock();
        known.unsynced_before.min(known.attr.length)
    }

    /// Everything from before is synced, or is counted by its chains from here on.
    pub fn counted_before(&self) {
        self.known.lock().unsynced_before = 0;
    }

    /// The sync of these chains failed.
    pub fn not_synced(&self, chains: impl IntoIterator<Item = u32>) {
        self.known.lock().unsynced.extend(chains);
    }
}

impl Known {
    fn observe(&mut self, attr: &Attr) {
        let (new, old) = (attr.truncate_version, self.attr.truncate_version);
        if new > old {
            // Writes acknowledged before the truncate was seen are taken to be older than it.
            (self.written_end, self.attempted_end) = (0, 0);
            self.attr = attr.clone();
        } else if new == old {
            // Clocks of services differ, so times do not order replies: the last one to arrive counts.
            let length = self.attr.length.max(attr.length);
            self.attr = attr.clone();
            self.attr.length = length;
        }
    }

    /// `attr`, with the length and times that this client knows better.
    fn merge(&self, attr: &Attr) -> Attr {
        let mut attr = attr.clone();
        attr.length = self.attr.length.max(self.written_end);
        attr.truncate_version = self.attr.truncate_version;
        if self.writes != self.published && self.mtime_ns != 0 {
            attr.mtime_ns = attr.mtime_ns.max(self.mtime_ns);
            attr.ctime_ns = attr.ctime_ns.max(self.mtime_ns);
        }
        attr
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attr(length: u64, truncate_version: u64, ctime_ns: i64) -> Attr {
        Attr { inode: 5, length, truncate_version, ctime_ns, ..Default::default() }
    }

    #[test]
    fn a_late_reply_never_shortens_the_file() {
        let state = InodeState::new(attr(100, 1, 10));
        state.observe(&attr(300, 1, 30));
        state.observe(&attr(200, 1, 20));
        assert_eq!(state.length(), 300);
        state.observe(&attr(0, 2, 40));
        state.observe(&attr(400, 1, 35));
        assert_eq!(state.length(), 0);
    }

    #[test]
    fn acknowledged_ends_show_until_a_truncate() {
        let state = InodeState::new(attr(10, 1, 1));
        state.begin_write(50);
        assert_eq!(state.length(), 10);
        state.acknowledge_write(50, 99);
        assert_eq!((state.length(), state.merged().mtime_ns), (50, 99));
        state.observe(&attr(20, 2, 100));
        assert_eq!(state.length(), 20);
        assert_eq!(state.pending().unwrap().report.length, 0);
    }

    #[test]
    fn a_report_covers_only_the_writes_before_it() {
        let state = InodeState::new(attr(0, 0, 0));
        assert!(state.pending().is_none());
        state.acknowledge_write(10, 1);
        let first = state.pending().unwrap();
        state.acknowledge_write(20, 2);
        state.published(&first);
        let second = state.pending().unwrap();
        assert_eq!((first.report.length, second.report.length), (10, 20));
        state.published(&second);
        assert!(state.pending().is_none());
    }

    #[test]
    fn a_failed_write_is_reported_as_attempted() {
        let state = InodeState::new(attr(0, 0, 0));
        state.begin_write(70);
        state.fail_write();
        let report = state.pending().unwrap().report;
        assert_eq!((report.length, report.attempted_length), (0, 70));
    }

    #[test]
    fn a_time_set_after_the_last_write_is_what_gets_published() {
        let state = InodeState::new(attr(0, 0, 0));
        state.acknowledge_write(10, 500);
        state.observe(&Attr { mtime_ns: 7, ..attr(0, 0, 600) });
        state.set_mtime();
        assert_eq!((state.merged().mtime_ns, state.pending().unwrap().report.mtime_ns), (7, 7));
    }
}
