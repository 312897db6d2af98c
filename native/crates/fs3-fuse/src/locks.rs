//! Locks of `flock(2)` and `fcntl(2)` that hold between mounts.
//!
//! The service knows who holds what; here is remembered which owners may hold something, so that closing ends it, and who
//! waits. A wait is a task that asks again and again, and ends when the kernel says that its process got a signal.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use fs3_client::{Attr, Code, Error, FileLock, Granted, KeptAlive, LockKind, LockType, Result, content_version};
use fuser::Errno;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::core::{Core, Handle, Job, errno};
use crate::handover::WaitState;

/// Interrupts that came before the wait that they concern; they belong to requests of all kinds, and most concern none.
const EARLY_MAX: usize = 256;
/// The last byte of a lock without end.
const OFFSET_MAX: u64 = i64::MAX as u64;

/// An owner of locks of one inode: the kernel's number of a process' table of files, or of one open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    inode: u64,
    kind: i32,
    owner: u64,
}

/// Why a lock was not set.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum LockEnd {
    Failed(Errno),
    /// Its wait goes on in a successor.
    Left,
}

impl From<Errno> for LockEnd {
    fn from(errno: Errno) -> Self {
        Self::Failed(errno)
    }
}

/// What the kernel asks for.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Asked {
    pub flock: bool,
    pub owner: u64,
    pub start: u64,
    pub end: u64,
    /// F_RDLCK, F_WRLCK or F_UNLCK.
    pub kind: i32,
    pub pid: u32,
}

impl Asked {
    fn lock(&self) -> FileLock {
        let kind = if self.flock { LockKind::Flock } else { LockKind::Posix };
        let lock_type = match self.kind {
            libc::F_RDLCK => LockType::Read,
            libc::F_WRLCK => LockType::Write,
            _ => LockType::Unlock,
        };
        FileLock {
            kind: kind as i32,
            r#type: lock_type as i32,
            owner: self.owner,
            start: self.start,
            end: self.end.min(OFFSET_MAX),
            pid: self.pid,
        }
    }
}

/// The locks that one handle was used for.
#[derive(Default)]
pub(crate) struct HandleLocks {
    /// The era of the client's locks in which it got the first; 0: it has none.
    era: AtomicU64,
    /// They are lost, and the kernel was told to forget its pages.
    forgotten: AtomicBool,
    keys: Mutex<HashSet<Key>>,
}

impl HandleLocks {
    /// The locks it had are lost.
    pub fn lose(&self) {
        self.era.store(u64::MAX, Ordering::Release);
    }
}

/// What is known of an owner until a close ends what it has.
struct Owner {
    kept: KeptAlive,
    /// Locks it asked for so far, and requests of it that run.
    asked: u64,
    running: usize,
    /// Whatever came of this many of them is ended.
    ended: u64,
    /// In which the last one was granted; 0: none was.
    era: u64,
}

impl Owner {
    fn new(kept: KeptAlive) -> Self {
        Self { kept, asked: 0, running: 0, ended: 0, era: 0 }
    }
}

/// Owners that may hold locks, and waits.
#[derive(Default)]
pub(crate) struct Locks {
    owners: Mutex<HashMap<Key, Owner>>,
    count: AtomicUsize,
    used: AtomicBool,
    waits: Mutex<Waits>,
}

#[derive(Default)]
struct Waits {
    waiting: HashMap<u64, Arc<Notify>>,
    early: VecDeque<u64>,
    /// While the mount is handed over: waits end, and are kept here.
    left: Option<Vec<WaitState>>,
}

/// A request that may wait. The kernel interrupts it by its number.
pub(crate) struct Wait<'a> {
    locks: &'a Locks,
    request: u64,
    interrupted: Arc<Notify>,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.locks.waits.lock().waiting.remove(&self.request);
    }
}

impl Locks {
    /// Whether this mount ever had a lock: from then on the kernel has to tell of every close.
    pub fn used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    /// A process got a signal while its request ran.
    pub fn interrupt(&self, request: u64) {
        let mut waits = self.waits.lock();
        match waits.waiting.get(&request) {
            Some(interrupted) => interrupted.notify_one(),
            None => {
                if waits.early.len() == EARLY_MAX {
                    waits.early.pop_front();
                }
                waits.early.push_back(request);
            }
        }
    }

    /// End all waits from here on, without an answer: they go on in a successor.
    pub fn leave_all(&self) {
        self.waits.lock().left = Some(Vec::new());
        self.interrupt_all();
    }

    pub fn leave(&self, wait: WaitState) {
        self.waits.lock().left.get_or_insert_default().push(wait);
    }

    /// Those that were left; from here on waits wait again.
    pub fn take_left(&self) -> Vec<WaitState> {
        self.waits.lock().left.take().unwrap_or_default()
    }

    /// Those that were left so far.
    pub fn left(&self) -> Vec<WaitState> {
        self.waits.lock().left.clone().unwrap_or_default()
    }

    fn leaves(&self) -> bool {
        self.waits.lock().left.is_some()
    }

    /// Owners that may hold locks, of those that a handle of the inode was used for: kind and number.
    pub fn owners_of(&self, handle: &HandleLocks, inode: u64) -> Vec<(i32, u64)> {
        let owners = self.owners.lock();
        let holds = |key: &&Key| owners.get(key).is_some_and(|owner| owner.ended < owner.asked);
        let keys = handle.keys.lock();
        keys.iter().filter(|key| key.inode == inode).filter(holds).map(|key| (key.kind, key.owner)).collect()
    }

    /// An owner of a predecessor, with the locks that it had, used a handle.
    pub fn inherited(
        &self,
        handle: &HandleLocks,
        inode: u64,
        (kind, owner): (i32, u64),
        era: u64,
        keep_alive: impl FnOnce() -> KeptAlive,
    ) {
        let key = Key { inode, kind, owner };
        handle.keys.lock().insert(key);
        handle.era.store(era, Ordering::Release);
        self.used.store(true, Ordering::Relaxed);
        let mut owners = self.owners.lock();
        owners.entry(key).or_insert_with(|| Owner { asked: 1, era, ..Owner::new(keep_alive()) });
        self.count.store(owners.len(), Ordering::Release);
    }

    /// Inodes of which somebody may hold locks.
    pub fn inodes(&self) -> HashSet<u64> {
        self.owners.lock().keys().map(|key| key.inode).collect()
    }

    /// Somebody else has all of them.
    pub fn forget_all(&self) {
        self.owners.lock().clear();
        self.count.store(0, Ordering::Release);
    }

    /// End all waits: the mount goes away.
    pub fn interrupt_all(&self) {
        self.waits.lock().waiting.values().for_each(|interrupted| interrupted.notify_one());
    }

    fn begin_wait(&self, request: u64) -> Wait<'_> {
        let interrupted = Arc::new(Notify::new());
        let mut waits = self.waits.lock();
        let early = waits.early.contains(&request);
        waits.early.retain(|early| *early != request);
        if early || waits.left.is_some() {
            interrupted.notify_one();
        }
        waits.waiting.insert(request, interrupted.clone());
        Wait { locks: self, request, interrupted }
    }

    /// An owner asks for a lock.
    fn begin(&self, key: Key, keep_alive: impl FnOnce() -> KeptAlive) {
        self.used.store(true, Ordering::Relaxed);
        let mut owners = self.owners.lock();
        let owner = owners.entry(key).or_insert_with(|| Owner::new(keep_alive()));
        owner.asked += 1;
        owner.running += 1;
        self.count.store(owners.len(), Ordering::Release);
    }

    /// It was answered. A close that came between did not end what it may have got: the kernel sees that and unlocks.
    fn finish(&self, key: Key, era: Option<u64>, keep_alive: impl FnOnce() -> KeptAlive) {
        let mut owners = self.owners.lock();
        let owner = owners.entry(key).or_insert_with(|| Owner { asked: 1, running: 1, ..Owner::new(keep_alive()) });
        owner.running = owner.running.saturating_sub(1);
        owner.era = owner.era.max(era.unwrap_or(0));
        self.count.store(owners.len(), Ordering::Release);
    }

    /// Whether an owner may have locks; if so, what is ended for it by ending them all now.
    fn may_end(&self, key: &Key) -> Option<u64> {
        if self.is_empty() {
            return None;
        }
        self.owners.lock().get(key).map(|owner| if owner.running == 0 { owner.asked } else { owner.ended })
    }

    fn ended(&self, key: &Key, count: u64) {
        if let Some(owner) = self.owners.lock().get_mut(key) {
            owner.ended = owner.ended.max(count);
        }
    }

    /// Owners whose locks are of another era than `now`.
    fn of_other_eras(&self, now: u64) -> Vec<Key> {
        let owners = self.owners.lock();
        let lost = owners.iter().filter(|(_, owner)| owner.running == 0 && owner.era != 0 && owner.era != now);
        lost.map(|(key, _)| *key).collect()
    }

    /// Forget an owner. Returns what keeps its locks if it may have any.
    fn remove(&self, key: &Key) -> Option<KeptAlive> {
        if self.is_empty() {
            return None;
        }
        let mut owners = self.owners.lock();
        let owner = owners.remove(key)?;
        self.count.store(owners.len(), Ordering::Release);
        (owner.ended < owner.asked).then_some(owner.kept)
    }

    fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }
}

impl Core {
    /// Set, change or end a lock. `wait`: the kernel's number of a request that waits for it.
    pub async fn set_lock(&self, handle: &Arc<Handle>, asked: Asked, wait: Option<u64>) -> Result<(), LockEnd> {
        self.check_locks(handle)?;
        let lock = asked.lock();
        let key = Key { inode: handle.inode.id, kind: lock.kind, owner: lock.owner };
        if asked.kind == libc::F_UNLCK {
            return self.unlock(handle, key, lock).await.map_err(|error| lock_errno(&error).into());
        }
        let wait = wait.map(|request| self.locks.begin_wait(request));
        handle.locks.keys.lock().insert(key);
        self.locks.begin(key, || self.client.keep_alive());
        let granted = self.ask_lock(handle.inode.id, lock, wait).await;
        self.locks.finish(key, granted.as_ref().ok().map(|granted| granted.era), || self.client.keep_alive());
        let granted = granted?;
        let _ = handle.locks.era.compare_exchange(0, granted.era, Ordering::AcqRel, Ordering::Acquire);
        self.catch_up(handle, &granted.attr).await;
        Ok(self.check_locks(handle)?)
    }

    async fn ask_lock(&self, inode: u64, lock: FileLock, wait: Option<Wait<'_>>) -> Result<Granted, LockEnd> {
        loop {
            let granted = self.client.lock(inode, lock, wait.is_some()).await.map_err(|error| lock_errno(&error))?;
            if let Some(granted) = granted {
                return Ok(granted);
            }
            let Some(wait) = &wait else { return Err(Errno::EAGAIN.into()) };
            tokio::select! {
                biased;
                () = wait.interrupted.notified() => {
                    if self.locks.leaves() {
                        return Err(LockEnd::Left);
                    }
                    if let Err(error) = self.client.leave_lock_queue(inode, lock).await {
                        tracing::debug!(inode, %error, "a place in the queue for a lock is left to expire");
                    }
                    return Err(Errno::EINTR.into());
                }
                // Whatever came of it: asking for the lock tells.
                _ = self.client.await_lock(inode, lock) => {}
            }
        }
    }

    /// What others see after the lock is theirs is what was written under it.
    async fn unlock(&self, handle: &Arc<Handle>, key: Key, lock: FileLock) -> Result<()> {
        let Some(count) = self.locks.may_end(&key) else { return Ok(()) };
        if handle.inode.is_dirty() {
            handle.inode.flush(&self.io).await;
            handle.inode.publish(None, false).await?;
        }
        self.client.unlock(key.inode, lock).await?;
        if lock.start == 0 && lock.end == OFFSET_MAX {
            self.locks.ended(&key, count);
        }
        Ok(())
    }

    /// Whoever had the lock before may have written: what caches hold is forgotten unless it is of the file as it is.
    async fn catch_up(&self, handle: &Arc<Handle>, attr: &Attr) {
        if !handle.inode.keep_cache(content_version(attr)) {
            handle.inode.blocks.clear();
            self.invalidate_pages(handle.inode.id).await;
        }
        self.refresh_kernel(attr);
    }

    /// Make the kernel forget the pages of a file.
    pub async fn invalidate_pages(&self, inode: u64) {
        if let Some(forgotten) = self.io.forget_pages(inode) {
            let _ = forgotten.await;
        }
    }

    /// The first lock in the way of one.
    pub async fn get_lock(&self, handle: &Arc<Handle>, asked: Asked) -> Result<Option<Asked>, Errno> {
        let found = self.client.get_lock(handle.inode.id, asked.lock()).await.map_err(|error| lock_errno(&error))?;
        Ok(found.map(|(lock, own)| Asked {
            flock: asked.flock,
            owner: lock.owner,
            start: lock.start,
            end: lock.end,
            kind: if lock.r#type() == LockType::Read { libc::F_RDLCK } else { libc::F_WRLCK },
            // Numbers of processes mean something on one machine.
            pid: if own { lock.pid } else { 0 },
        }))
    }

    /// Errors when locks that the handle was used for are lost: others may have them, so nothing done through it counts.
    pub fn check_locks(&self, handle: &Handle) -> Result<(), Errno> {
        match handle.locks.era.load(Ordering::Acquire) {
            0 => Ok(()),
            era if era == self.client.lock_era() => Ok(()),
            _ => Err(Errno::EIO),
        }
    }

    /// Of locks that are lost: have the kernel forget the pages of the files, which others may be writing, and end what
    /// the service may still keep.
    pub fn forget_lost(self: &Arc<Self>) {
        if self.locks.is_empty() {
            return;
        }
        for key in self.locks.of_other_eras(self.client.lock_era()) {
            let core = self.clone();
            self.spawn(Job::BACKGROUND, async move { core.end_locks(key).await });
        }
        for handle in self.all_handles() {
            if self.check_locks(&handle).is_err() && !handle.locks.forgotten.swap(true, Ordering::Relaxed) {
                tracing::warn!(inode = handle.inode.id, "locks are lost: no service was reached for the session time");
                let core = self.clone();
                self.spawn(Job::BACKGROUND, async move { core.invalidate_pages(handle.inode.id).await });
            }
        }
    }

    /// A process closed a descriptor of an inode: its locks of `fcntl(2)` end.
    pub async fn closed_by(&self, inode: u64, owner: u64) {
        let key = Key { inode, kind: LockKind::Posix as i32, owner };
        self.end_locks(key).await;
    }

    /// A handle is gone: with it its lock of `flock(2)`, and the locks of processes that the kernel did not tell of.
    pub async fn end_handle_locks(&self, handle: &Handle) {
        let keys: Vec<_> = {
            let kept = handle.locks.keys.lock();
            let ends = |key: &&Key| handle.unflushed || key.kind == LockKind::Flock as i32;
            kept.iter().filter(ends).copied().collect()
        };
        for key in keys {
            self.end_locks(key).await;
        }
    }

    async fn end_locks(&self, key: Key) {
        let Some(kept) = self.locks.remove(&key) else { return };
        let lock = FileLock { kind: key.kind, owner: key.owner, start: 0, end: OFFSET_MAX, ..Default::default() };
        if let Err(error) = self.client.unlock(key.inode, lock).await {
            tracing::warn!(inode = key.inode, %error, "a lock could not be ended; it ends with this mount");
        }
        drop(kept);
    }
}

fn lock_errno(error: &Error) -> Errno {
    match error.code {
        Code::NoSpace => Errno::ENOLCK,
        _ => errno(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn is_interrupted(wait: &Wait<'_>) -> bool {
        tokio::select! {
            biased;
            () = wait.interrupted.notified() => true,
            () = std::future::ready(()) => false,
        }
    }

    #[tokio::test]
    async fn an_interrupt_ends_the_wait_that_it_names_even_if_it_comes_first() {
        let locks = Locks::default();
        let wait = locks.begin_wait(7);
        locks.interrupt(8);
        assert!(!is_interrupted(&wait).await);
        locks.interrupt(7);
        assert!(is_interrupted(&wait).await);
        assert!(is_interrupted(&locks.begin_wait(8)).await);
        assert!(!is_interrupted(&locks.begin_wait(8)).await, "an interrupt counts once");
    }

    #[test]
    fn interrupts_of_other_requests_do_not_pile_up() {
        let locks = Locks::default();
        (0..10 * EARLY_MAX as u64).for_each(|request| locks.interrupt(request));
        assert_eq!(locks.waits.lock().early.len(), EARLY_MAX);
        drop(locks.begin_wait(1));
        assert!(locks.waits.lock().waiting.is_empty());
    }

    #[test]
    fn locks_without_end_reach_the_last_byte() {
        let asked = Asked { flock: true, owner: 3, start: 0, end: u64::MAX, kind: libc::F_WRLCK, pid: 1 };
        assert_eq!((asked.lock().end, asked.lock().r#type()), (OFFSET_MAX, LockType::Write));
    }
}
