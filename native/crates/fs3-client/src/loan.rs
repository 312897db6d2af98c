//! Lends parts of one buffer to operations in flight and gives the buffer back whole.
//!
//! A network operation may outlive the call that began it (a dropped future, a timed-out try). Its part keeps
//! the buffer alive, and the buffer goes back to its owner only when no part is out any more. So nobody
//! writes into memory that the caller believes to be his again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use fs3_core::RegionMut;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Checksums of whole blocks of a buffer that were verified: where the first one begins, and their packed CRC32C.
pub(crate) type KnownCrcs = (usize, Bytes);

/// A buffer of which parts are lent. Clones are the same loan.
#[derive(Clone)]
pub(crate) struct Loan {
    shared: Arc<Shared>,
}

struct Shared {
    ptr: *mut u8,
    len: usize,
    state: Mutex<State>,
    returned: Notify,
    hole: AtomicBool,
    /// `None`: nobody wants them.
    known: Option<Mutex<Vec<KnownCrcs>>>,
}

struct State {
    region: Option<RegionMut>,
    /// Parts that are out, as (start, end); they never overlap. The first has a place of its own because most
    /// buffers are lent in one part.
    first: Option<(usize, usize)>,
    more: Vec<(usize, usize)>,
}

/// Owner of a lent part; its drop is the return.
struct Part {
    range: (usize, usize),
    shared: Arc<Shared>,
}

// SAFETY: `ptr` belongs to the region in `state`, which is Send and Sync; access follows the parts that are out.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl State {
    /// Note that `range` is out, unless some of it is already.
    fn take_out(&mut self, range: (usize, usize)) -> bool {
        if self.first.iter().chain(&self.more).any(|&(start, end)| start < range.1 && range.0 < end) {
            return false;
        }
        match self.first {
            None => self.first = Some(range),
            Some(_) => self.more.push(range),
        }
        true
    }

    fn put_back(&mut self, range: (usize, usize)) {
        if self.first == Some(range) {
            self.first = None;
        } else {
            self.more.retain(|&out| out != range);
        }
    }

    fn all_back(&self) -> bool {
        self.first.is_none() && self.more.is_empty()
    }
}

impl Loan {
    pub fn new(region: RegionMut) -> Self {
        Self::with_known(region, None)
    }

    /// A loan that keeps the checksums which become known.
    pub fn keeping_crcs(region: RegionMut) -> Self {
        Self::with_known(region, Some(Mutex::default()))
    }

    fn with_known(mut region: RegionMut, known: Option<Mutex<Vec<KnownCrcs>>>) -> Self {
        let (ptr, len) = (region.as_mut_ptr(), region.len());
        let state = Mutex::new(State { region: Some(region), first: None, more: Vec::new() });
        let (returned, hole) = (Notify::new(), AtomicBool::new(false));
        Self { shared: Arc::new(Shared { ptr, len, state, returned, hole, known }) }
    }

    /// Keep checksums of blocks from byte `at` on, if somebody wants them.
    pub fn note(&self, at: usize, crcs: Bytes) {
        if let Some(known) = &self.shared.known {
            known.lock().push((at, crcs));
        }
    }

    /// What was kept, by place.
    pub fn known(&self) -> Vec<KnownCrcs> {
        let mut known = self.shared.known.as_ref().map_or_else(Vec::new, |known| std::mem::take(&mut *known.lock()));
        known.sort_unstable_by_key(|(at, _)| *at);
        known
    }

    pub fn len(&self) -> usize {
        self.shared.len
    }

    /// Remember that some of the range had nothing stored.
    pub fn set_hole(&self) {
        self.shared.hole.store(true, Ordering::Relaxed);
    }

    /// Whether some of the range had nothing stored.
    pub fn has_hole(&self) -> bool {
        self.shared.hole.load(Ordering::Relaxed)
    }

    /// Lend [start, start+len), once nothing of it is out (an abandoned try gives its part back soon).
    pub async fn lend(&self, start: usize, len: usize) -> RegionMut {
        assert!(len > 0 && start.checked_add(len).is_some_and(|end| end <= self.shared.len));
        let range = (start, start + len);
        self.wait(|state| state.take_out(range).then_some(())).await;
        let owner = Arc::new(Part { range, shared: self.shared.clone() });
        // SAFETY: in range; the part's owner keeps the region alive through `shared`, and the range is exclusive
        // until its owner drops.
        unsafe { RegionMut::from_raw(self.shared.ptr.add(start), len, owner) }
    }

    /// The buffer, once every part is back. Called once.
    pub async fn finish(&self) -> RegionMut {
        self.wait(|state| state.all_back().then(|| state.region.take().expect("a loan is finished once"))).await
    }

    /// Try now and whenever a part has come back.
    async fn wait<T>(&self, mut attempt: impl FnMut(&mut State) -> Option<T>) -> T {
        if let Some(value) = attempt(&mut self.shared.state.lock()) {
            return value;
        }
        loop {
            let returned = self.shared.returned.notified();
            tokio::pin!(returned);
            // From here on no return is missed.
            returned.as_mut().enable();
            if let Some(value) = attempt(&mut self.shared.state.lock()) {
                return value;
            }
            returned.await;
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.shared.state.lock().put_back(self.range);
        self.shared.returned.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn the_buffer_comes_back_only_after_its_parts() {
        let loan = Loan::new(RegionMut::zeroed(100));
        let mut a = loan.lend(0, 40).await;
        let b = loan.lend(40, 60).await;
        a.fill(7);
        drop(a);
        let finish = tokio::spawn(async move { loan.finish().await });
        tokio::task::yield_now().await;
        assert!(!finish.is_finished());
        drop(b);
        let region = finish.await.unwrap();
        assert!(region[..40].iter().all(|b| *b == 7) && region[40..].iter().all(|b| *b == 0));
    }

    #[tokio::test]
    async fn a_part_that_is_out_is_not_lent_again() {
        let loan = Loan::new(RegionMut::zeroed(10));
        let first = loan.lend(0, 6).await;
        assert!(tokio::time::timeout(Duration::from_millis(5), loan.lend(5, 2)).await.is_err());
        let beside = loan.lend(6, 4).await;
        drop(first);
        assert_eq!(loan.lend(0, 6).await.len(), 6);
        drop(beside);
        assert_eq!(loan.finish().await.len(), 10);
    }

    #[tokio::test]
    async fn a_part_outlives_a_dropped_loan() {
        let loan = Loan::new(RegionMut::zeroed(8));
        let mut part = loan.lend(0, 8).await;
        drop(loan);
        part.fill(1);
        assert_eq!(&part[..], &[1; 8]);
    }
}
