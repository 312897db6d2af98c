//! Access times: what was read is told to the service a little later, many files at a time.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fs3_core::Result;
use fs3_proto::v1::{AccessedRequest, Attr, Caller, Empty, Method};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::inner::Inner;

/// How long reads are collected before they are told.
const COLLECT: Duration = Duration::from_secs(1);
/// Files of one request.
const BATCH_MAX: usize = 1024;
/// Files that wait to be told at most; reads of further ones leave no trace.
const WAITING_MAX: usize = 1 << 16;
/// An access time that is newer than all changes is kept for so long.
const DAY_NS: i64 = 24 * 3600 * 1_000_000_000;

/// Files that were read and are not told yet. Thread-safe.
#[derive(Default)]
pub(crate) struct Accesses {
    waiting: Mutex<HashMap<u64, Access>>,
    some: Notify,
}

struct Access {
    caller: Caller,
    at_ns: i64,
}

/// Whether a read at `now_ns` changes the access time, by the rule of Linux' `relatime`. The service asks the same.
pub(crate) fn is_due(attr: &Attr, now_ns: i64) -> bool {
    let changed_ns = attr.mtime_ns.max(attr.ctime_ns);
    now_ns > attr.ctime_ns && (attr.atime_ns <= changed_ns || now_ns - attr.atime_ns >= DAY_NS)
}

impl Accesses {
    /// `caller` has read the file.
    pub fn note(&self, inode: u64, caller: &Caller, now_ns: i64) {
        let mut waiting = self.waiting.lock();
        if waiting.len() >= WAITING_MAX {
            return;
        }
        if let Entry::Vacant(entry) = waiting.entry(inode) {
            entry.insert(Access { caller: caller.clone(), at_ns: now_ns });
            drop(waiting);
            self.some.notify_one();
        }
    }

    /// The access time was set by hand: what was read before does not count any more.
    pub fn forget(&self, inode: u64) {
        self.waiting.lock().remove(&inode);
    }

    /// Put what is not told yet into attributes of the service.
    pub fn merge(&self, attr: &mut Attr) {
        if let Some(access) = self.waiting.lock().get(&attr.inode)
            && is_due(attr, access.at_ns)
        {
            attr.atime_ns = access.at_ns;
        }
    }

    /// Everything that waits, as requests.
    fn take(&self) -> Vec<AccessedRequest> {
        let mut by_caller: Vec<AccessedRequest> = Vec::new();
        for (inode, Access { caller, at_ns }) in std::mem::take(&mut *self.waiting.lock()) {
            let fits = |r: &&mut AccessedRequest| r.caller.as_ref() == Some(&caller) && r.inodes.len() < BATCH_MAX;
            let request = match by_caller.iter_mut().find(fits) {
                Some(request) => request,
                None => {
                    by_caller.push(AccessedRequest { caller: Some(caller), ..Default::default() });
                    by_caller.last_mut().expect("just pushed")
                }
            };
            request.inodes.push(inode);
            request.atime_ns.push(at_ns);
        }
        by_caller
    }
}

/// Tell the service what was read so far. What it does not take is dropped.
pub(crate) async fn tell(inner: &Inner) {
    for request in inner.accesses.take() {
        let told: Result<Empty> = inner.meta(Method::MetaAccessed, &request).await;
        if let Err(error) = told {
            tracing::debug!(%error, files = request.inodes.len(), "access times were not taken");
        }
    }
}

/// Tell what is read, until the task is aborted or the client closed.
pub(crate) async fn keep_telling(inner: Arc<Inner>) {
    while !inner.closed.load(Ordering::Relaxed) {
        inner.accesses.some.notified().await;
        fs3_rt::sleep(COLLECT).await;
        tell(&inner).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attr(atime_ns: i64, mtime_ns: i64, ctime_ns: i64) -> Attr {
        Attr { inode: 5, atime_ns, mtime_ns, ctime_ns, ..Default::default() }
    }

    #[test]
    fn the_first_read_after_a_change_counts_and_one_a_day() {
        assert!(is_due(&attr(10, 10, 10), 11));
        assert!(!is_due(&attr(11, 10, 10), 12));
        assert!(is_due(&attr(11, 10, 10), 11 + DAY_NS));
        assert!(is_due(&attr(11, 12, 10), 13));
        assert!(!is_due(&attr(10, 10, 20), 20), "what was changed after the read keeps its time");
    }

    #[test]
    fn reads_show_until_they_are_told_and_a_time_set_by_hand_wins() {
        let (accesses, caller) = (Accesses::default(), Caller::default());
        accesses.note(5, &caller, 20);
        let mut seen = attr(10, 10, 10);
        accesses.merge(&mut seen);
        assert_eq!(seen.atime_ns, 20);
        accesses.forget(5);
        let mut seen = attr(10, 10, 10);
        accesses.merge(&mut seen);
        assert_eq!(seen.atime_ns, 10);
        assert!(accesses.take().is_empty());
    }

    #[test]
    fn requests_are_made_by_caller_and_bounded() {
        let accesses = Accesses::default();
        let (root, user) = (Caller::default(), Caller { uid: 7, ..Default::default() });
        for inode in 0..3000 {
            accesses.note(inode, if inode % 3 == 0 { &user } else { &root }, 1);
        }
        let requests = accesses.take();
        assert_eq!(requests.iter().map(|r| r.inodes.len()).sum::<usize>(), 3000);
        assert!(requests.iter().all(|r| r.inodes.len() <= BATCH_MAX && r.inodes.len() == r.atime_ns.len()));
        let users: usize = requests.iter().filter(|r| r.caller.as_ref() == Some(&user)).map(|r| r.inodes.len()).sum();
        assert_eq!(users, 1000);
    }

    #[test]
    fn the_number_that_waits_is_bounded() {
        let accesses = Accesses::default();
        for inode in 0..2 * WAITING_MAX as u64 {
            accesses.note(inode, &Caller::default(), 1);
        }
        assert_eq!(accesses.waiting.lock().len(), WAITING_MAX);
    }
}
