//! Lends parts of one buffer to operations in flight and gives the buffer back whole.
//!
//! A network operation may outlive the call that began it (a dropped future, a timed-out try). Its part keeps
//! the buffer alive, and the buffer goes back to its owner only when no part is out any more. So nobody
//! writes into memory that the caller believes to be his again.

use std::sync::Arc;

use fs3_core::RegionMut;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// A buffer of which parts are lent.
pub(crate) struct Loan {
    ptr: *mut u8,
    len: usize,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    returned: Notify,
}

struct State {
    region: Option<RegionMut>,
    /// Parts that are out, as (start, end); they never overlap.
    out: Vec<(usize, usize)>,
}

/// Owner of a lent part; its drop is the return.
struct Part {
    start: usize,
    shared: Arc<Shared>,
}

// SAFETY: `ptr` belongs to the region in `shared`, which is Send and Sync; access follows `out`.
unsafe impl Send for Loan {}
// SAFETY: as above.
unsafe impl Sync for Loan {}

impl Loan {
    pub fn new(mut region: RegionMut) -> Self {
        let (ptr, len) = (region.as_mut_ptr(), region.len());
        let state = Mutex::new(State { region: Some(region), out: Vec::new() });
        Self { ptr, len, shared: Arc::new(Shared { state, returned: Notify::new() }) }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Lend [start, start+len), once nothing of it is out (an abandoned try gives its part back soon).
    pub async fn lend(&self, start: usize, len: usize) -> RegionMut {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len));
        loop {
            let returned = self.shared.returned.notified();
            tokio::pin!(returned);
            returned.as_mut().enable();
            {
                let mut state = self.shared.state.lock();
                if !state.out.iter().any(|&(s, e)| s < start + len && start < e) {
                    if len > 0 {
                        state.out.push((start, start + len));
                    }
                    break;
                }
            }
            returned.await;
        }
        let start_key = if len > 0 { start } else { usize::MAX };
        let owner = Arc::new(Part { start: start_key, shared: self.shared.clone() });
        // SAFETY: in range; the part's owner keeps the region alive through `shared`; `out` makes the part
        // exclusive until its owner drops.
        unsafe { RegionMut::from_raw(self.ptr.add(start), len, owner) }
    }

    /// The buffer, once every part is back. Called once.
    pub async fn finish(&self) -> RegionMut {
        loop {
            let returned = self.shared.returned.notified();
            tokio::pin!(returned);
            returned.as_mut().enable();
            {
                let mut state = self.shared.state.lock();
                if state.out.is_empty() {
                    return state.region.take().expect("a loan is finished once");
                }
            }
            returned.await;
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if self.start != usize::MAX {
            self.shared.state.lock().out.retain(|&(start, _)| start != self.start);
            self.shared.returned.notify_waiters();
        }
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
