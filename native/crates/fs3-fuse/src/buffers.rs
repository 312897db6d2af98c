//! A bounded pool of recycled, page-aligned buffers: memory touched the first time is dear.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use fs3_core::{AlignedBuf, Code, Error, Region, RegionMut, Result};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Size of a small buffer in bytes.
pub(crate) const SMALL: usize = 64 << 10;
/// Size of a large buffer in bytes; also the unit in which written data is gathered and files are read ahead.
pub(crate) const LARGE: usize = 1 << 20;

/// Free buffers kept for reuse at most, in bytes; beyond it memory goes back to the allocator.
const FREE_BYTES_MAX: usize = 64 << 20;
/// How long a taker sleeps at most before it looks again (a wake-up may have gone to another taker).
const RECHECK: Duration = Duration::from_millis(20);
/// How long a taker waits for memory in all.
const WAIT_MAX: Duration = Duration::from_secs(120);

/// Hands out buffers of two sizes; what is out never exceeds the budget. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    budget: usize,
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Default)]
struct State {
    used: usize,
    free: [Vec<AlignedBuf>; 2],
}

/// Memory from the pool; dropping it gives it back.
pub(crate) struct Buffer {
    buf: Option<AlignedBuf>,
    shared: Arc<Shared>,
}

fn class(bytes: usize) -> (usize, usize) {
    assert!(bytes <= LARGE, "a buffer holds at most {LARGE} bytes");
    if bytes <= SMALL { (0, SMALL) } else { (1, LARGE) }
}

impl Pool {
    /// A pool that lends at most `budget` bytes at a time (at least four large buffers).
    pub fn new(budget: usize) -> Self {
        let budget = budget.max(4 * LARGE);
        Self { shared: Arc::new(Shared { budget, state: Mutex::default(), freed: Notify::new() }) }
    }

    /// A buffer of at least `bytes`, unless that would leave less than `reserve` bytes of the budget.
    pub fn try_take(&self, bytes: usize, reserve: usize) -> Option<Buffer> {
        let (class, size) = class(bytes);
        let recycled = {
            let mut state = self.shared.state.lock();
            if state.used + size + reserve > self.shared.budget {
                return None;
            }
            state.used += size;
            state.free[class].pop()
        };
        let buf = recycled.unwrap_or_else(|| AlignedBuf::shareable(size));
        Some(Buffer { buf: Some(buf), shared: self.shared.clone() })
    }

    /// As [`Pool::try_take`], waiting for memory. `reclaim` is called before each sleep and should make memory
    /// come free. Errors: Busy when none came in time.
    pub async fn take(&self, bytes: usize, reclaim: impl FnMut()) -> Result<Buffer> {
        self.take_leaving(bytes, 0, reclaim).await
    }

    /// As [`Pool::take`], when `reserve` bytes of the budget stay free.
    pub async fn take_leaving(&self, bytes: usize, reserve: usize, mut reclaim: impl FnMut()) -> Result<Buffer> {
        let deadline = tokio::time::Instant::now() + WAIT_MAX;
        loop {
            let freed = self.shared.freed.notified();
            if let Some(buffer) = self.try_take(bytes, reserve) {
                return Ok(buffer);
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(Error::new(Code::Busy, "the mount's memory limit is reached and no buffer came free"));
            }
            reclaim();
            let _ = tokio::time::timeout(RECHECK, freed).await;
        }
    }

    /// Part of the budget, for reserves.
    pub fn budget(&self) -> usize {
        self.shared.budget
    }

    /// What is lent at the moment, in bytes.
    pub fn used(&self) -> usize {
        self.shared.state.lock().used
    }
}

impl Buffer {
    fn owned(self) -> (*mut u8, usize, Arc<Buffer>) {
        let (ptr, len) = (self.buf.as_ref().expect("held until drop").as_mut_ptr(), self.len());
        (ptr, len, Arc::new(self))
    }

    /// Read-only window of the buffer; the memory returns to the pool when the last clone of it is dropped.
    pub fn into_region(self, start: usize, len: usize) -> Region {
        let (ptr, capacity, owner) = self.owned();
        assert!(start + len <= capacity);
        // SAFETY: the owner keeps the memory, in range, and nobody writes to it any more.
        unsafe { Region::from_raw(ptr.add(start), len, owner) }
    }

    /// Writable window of the first `len` bytes; the memory returns to the pool when it is dropped.
    pub fn into_region_mut(self, len: usize) -> RegionMut {
        let (ptr, capacity, owner) = self.owned();
        assert!(len <= capacity);
        // SAFETY: the owner keeps the memory and no one else has a way to it.
        unsafe { RegionMut::from_raw(ptr, len, owner) }
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.buf.as_ref().expect("held until drop")
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.buf.as_mut().expect("held until drop")
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(buf) = self.buf.take() else { return };
        let (class, size) = class(buf.len());
        {
            let mut state = self.shared.state.lock();
            state.used -= size;
            let kept = state.free[0].len() * SMALL + state.free[1].len() * LARGE;
            if kept + size <= FREE_BYTES_MAX {
                state.free[class].push(buf);
            }
        }
        self.shared.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_recycled_and_bounded() {
        let pool = Pool::new(4 * LARGE);
        let first = pool.try_take(LARGE, 0).unwrap();
        let at = first.as_ptr();
        drop(first);
        let held: Vec<_> = (0..4).map(|_| pool.try_take(SMALL + 1, 0).unwrap()).collect();
        assert_eq!(held[0].as_ptr(), at);
        assert!(pool.try_take(1, 0).is_none());
        drop(held);
        assert_eq!(pool.used(), 0);
        assert!(pool.try_take(1, 4 * LARGE).is_none(), "the reserve is left alone");
    }

    #[test]
    fn a_region_keeps_its_buffer_out_of_the_pool() {
        let pool = Pool::new(0);
        let mut buffer = pool.try_take(10, 0).unwrap();
        buffer[3..5].copy_from_slice(b"ab");
        let region = buffer.into_region(3, 2);
        assert_eq!((&region[..], pool.used()), (&b"ab"[..], SMALL));
        drop(region.clone());
        assert_eq!(pool.used(), SMALL);
        drop(region);
        assert_eq!(pool.used(), 0);
    }

    #[tokio::test]
    async fn a_taker_waits_until_memory_is_reclaimed() {
        let pool = Pool::new(0);
        let mut held: Vec<_> = (0..4).map(|_| pool.try_take(LARGE, 0).unwrap()).collect();
        let buffer = pool.take(LARGE, || drop(held.pop())).await.unwrap();
        assert_eq!(buffer.len(), LARGE);
    }
}
