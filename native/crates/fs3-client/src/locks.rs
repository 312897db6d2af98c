//! Locks of files between clients, and for how long they are certain to be kept.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fs3_core::{ClientId, Code, Error, Result};
use fs3_proto::v1::{
    Attr, AwaitLockRequest, AwaitLockResponse, FileLock, GetLockRequest, GetLockResponse, LockRequest, LockResponse,
    LockType, Method,
};
use fs3_rt::Instant;
use parking_lot::Mutex;

use crate::Client;
use crate::inner::Inner;

/// How long one question for a lock waits at the service at most.
const AWAIT_MAX: Duration = Duration::from_secs(8);

/// Until when the services keep what this client has. They count from when they saw its last keepalive, so counting from
/// when that was sent is on the safe side.
#[derive(Default)]
pub(crate) struct Lease {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    until: Option<Instant>,
    lapses: u64,
}

impl Lease {
    /// A service has noted a request that left at `sent`, and keeps what the client has for `session`.
    pub fn renew(&self, sent: Instant, session: Duration, now: Instant) {
        let mut state = self.state.lock();
        state.lapse(now);
        state.until = state.until.max(Some(sent + session));
    }

    /// How often it has run out.
    pub fn lapses(&self, now: Instant) -> u64 {
        let mut state = self.state.lock();
        state.lapse(now);
        state.lapses
    }
}

impl State {
    fn lapse(&mut self, now: Instant) {
        if self.until.is_some_and(|until| now >= until) {
            self.until = None;
            self.lapses += 1;
        }
    }
}

/// Keeps the client's sessions and locks alive at the services, by keepalives, while it exists.
pub struct KeptAlive {
    inner: Arc<Inner>,
}

impl Drop for KeptAlive {
    fn drop(&mut self) {
        self.inner.session_closed();
    }
}

/// A lock that was granted.
#[derive(Clone, Debug)]
pub struct Granted {
    /// Attributes of the file at that moment.
    pub attr: Attr,
    /// What [`Client::lock_era`] says as long as the lock is certain to be there.
    pub era: u64,
}

impl Client {
    /// Have keepalives sent from now on.
    pub fn keep_alive(&self) -> KeptAlive {
        self.inner().session_opened();
        KeptAlive { inner: self.inner().clone() }
    }

    /// Changes when the locks of this client may have been given to others, because no service has heard of it for too
    /// long. Locks of an earlier era are lost. Needs [`Client::keep_alive`] to stay the same. No round trip.
    pub fn lock_era(&self) -> u64 {
        1 + self.inner().lease.lapses(Instant::now())
    }

    /// Set or change a lock; `None` when another one is in the way. With `wait` it then has a place in the queue for half
    /// a minute: call this again after [`Client::await_lock`]. Errors: NoSpace (too many locks), StaleHandle.
    pub async fn lock(&self, inode: u64, lock: FileLock, wait: bool) -> Result<Option<Granted>> {
        let sent = Instant::now();
        let response = self.set_lock(LockRequest { inode, lock: Some(lock), wait, ..Default::default() }).await?;
        if !response.granted {
            return Ok(None);
        }
        self.granted(sent, response).map(Some)
    }

    /// End the locks that the owner of `lock` has in its range.
    pub async fn unlock(&self, inode: u64, lock: FileLock) -> Result<()> {
        let lock = FileLock { r#type: LockType::Unlock as i32, ..lock };
        self.set_lock(LockRequest { inode, lock: Some(lock), ..Default::default() }).await.map(drop)
    }

    /// Give up the place in the queue for a lock.
    pub async fn leave_lock_queue(&self, inode: u64, lock: FileLock) -> Result<()> {
        self.set_lock(LockRequest { inode, lock: Some(lock), leave: true, ..Default::default() }).await.map(drop)
    }

    /// Take over what another client has of an inode, locks and places in the queue for them: for one who goes on with
    /// the work of its owners. Errors: StaleHandle, InvalidArgument when this client has locks of the inode.
    pub async fn inherit_locks(&self, inode: u64, predecessor: ClientId) -> Result<Granted> {
        let sent = Instant::now();
        let predecessor = Bytes::copy_from_slice(&predecessor.0);
        let response = self.set_lock(LockRequest { inode, predecessor, ..Default::default() }).await?;
        self.granted(sent, response)
    }

    fn granted(&self, sent: Instant, response: LockResponse) -> Result<Granted> {
        let attr = response.attr.ok_or_else(|| Error::new(Code::Protocol, "a lock was granted without attributes"))?;
        let session = Duration::from_millis(u64::from(response.session_ms));
        self.inner().lease.renew(sent, session, Instant::now());
        Ok(Granted { attr: self.inner().inodes.merge(attr), era: self.lock_era() })
    }

    async fn set_lock(&self, request: LockRequest) -> Result<LockResponse> {
        let request = LockRequest { op: self.inner().op_id(), ..request };
        self.inner().meta_of(Some(request.inode), Method::MetaLock, &request).await
    }

    /// Wait until a lock that is queued for may be granted, for some seconds; says whether it may. Nothing is taken, so
    /// the call may be dropped.
    pub async fn await_lock(&self, inode: u64, lock: FileLock) -> Result<bool> {
        let wait = AWAIT_MAX.min(self.inner().config.meta_attempt_timeout / 2);
        let (client_id, wait_ms) = (self.id_bytes(), wait.as_millis() as u32);
        let request = AwaitLockRequest { client_id, inode, lock: Some(lock), wait_ms };
        let response: AwaitLockResponse = self.inner().meta_of(Some(inode), Method::MetaAwaitLock, &request).await?;
        Ok(response.free)
    }

    /// The first lock that is in the way of `lock`, and whether it is this client's.
    pub async fn get_lock(&self, inode: u64, lock: FileLock) -> Result<Option<(FileLock, bool)>> {
        let request = GetLockRequest { client_id: self.id_bytes(), inode, lock: Some(lock) };
        let response: GetLockResponse = self.inner().meta(Method::MetaGetLock, &request).await?;
        Ok(response.conflict.map(|conflict| (conflict, response.own)))
    }

    fn id_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(&self.inner().id.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_lapses_once_however_late_it_is_looked_at() {
        let (lease, start, second) = (Lease::default(), Instant::now(), Duration::from_secs(1));
        assert_eq!(lease.lapses(start + 100 * second), 0, "there was none");
        lease.renew(start, 10 * second, start + second);
        assert_eq!(lease.lapses(start + 9 * second), 0);
        lease.renew(start + 5 * second, 10 * second, start + 9 * second);
        assert_eq!(lease.lapses(start + 14 * second), 0);
        assert_eq!((lease.lapses(start + 15 * second), lease.lapses(start + 60 * second)), (1, 1));
    }

    #[test]
    fn a_renewal_that_comes_too_late_does_not_hide_the_lapse() {
        let (lease, start, second) = (Lease::default(), Instant::now(), Duration::from_secs(1));
        lease.renew(start, 10 * second, start);
        lease.renew(start + 12 * second, 10 * second, start + 13 * second);
        assert_eq!(lease.lapses(start + 14 * second), 1);
        lease.renew(start + 13 * second, 10 * second, start + 30 * second);
        assert_eq!(lease.lapses(start + 30 * second), 3, "an answer that took too long renews nothing");
    }
}
