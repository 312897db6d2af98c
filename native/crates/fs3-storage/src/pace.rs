//! Limits on work that must not get in the way of clients.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fs3_rt::Instant;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Bytes per second, shared by all that take from it. After a quiet time nothing is saved up: a burst is at most what
/// one caller takes at once.
pub(crate) struct Pace {
    bytes_per_s: u64,
    free_at: Mutex<Option<Instant>>,
}

impl Pace {
    /// `bytes_per_s` 0: no limit.
    pub fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s, free_at: Mutex::default() }
    }

    /// Wait for one's turn to move `bytes`.
    pub async fn take(&self, bytes: u64) {
        if self.bytes_per_s == 0 {
            return;
        }
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64);
        let wait = {
            let (now, mut free_at) = (Instant::now(), self.free_at.lock());
            let start = free_at.map_or(now, |at| at.max(now));
            *free_at = Some(start + cost);
            start.saturating_duration_since(now)
        };
        if !wait.is_zero() {
            fs3_rt::sleep(wait).await;
        }
    }
}

/// Requests of clients that are being worked on.
#[derive(Default)]
pub(crate) struct Foreground {
    active: AtomicUsize,
    idle: Notify,
}

/// Counts one request until it is dropped.
pub(crate) struct Busy<'a>(&'a Foreground);

impl Foreground {
    pub fn enter(&self) -> Busy<'_> {
        self.active.fetch_add(1, Ordering::AcqRel);
        Busy(self)
    }

    /// Wait until no client's request is being worked on, but no longer than `patience`: work behind clients gets slow
    /// under load, not stuck.
    pub async fn give_way(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        loop {
            let idle = self.idle.notified();
            tokio::pin!(idle);
            idle.as_mut().enable();
            if self.active.load(Ordering::Acquire) == 0 || fs3_rt::timeout_at(deadline, idle).await.is_err() {
                return;
            }
        }
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        if self.0.active.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// Run in virtual time.
    fn simulated(body: impl Future<Output = ()> + Send + 'static) {
        let sim = fs3_rt::sim::Simulator::new(1);
        let done = Arc::new(AtomicUsize::new(0));
        let ended = done.clone();
        sim.process("test").enter(|| {
            fs3_rt::spawn(async move {
                body.await;
                ended.store(1, Ordering::Release);
            });
        });
        sim.run_until(100_000_000_000);
        assert_eq!((done.load(Ordering::Acquire), sim.take_failures()), (1, vec![]));
    }

    fn ms_since(began: Instant) -> u128 {
        (began.elapsed() + Duration::from_micros(500)).as_millis()
    }

    #[test]
    fn bytes_flow_at_the_rate_and_a_quiet_time_is_not_saved_up() {
        simulated(async {
            let pace = Pace::new(1000);
            let began = Instant::now();
            for _ in 0..5 {
                pace.take(500).await;
            }
            assert_eq!(ms_since(began), 2000);
            fs3_rt::sleep(Duration::from_secs(10)).await;
            let began = Instant::now();
            pace.take(500).await;
            pace.take(500).await;
            assert_eq!(ms_since(began), 500);
        });
    }

    #[test]
    fn background_work_waits_for_clients_but_not_for_ever() {
        simulated(async {
            let foreground = Arc::new(Foreground::default());
            let began = Instant::now();
            foreground.give_way(Duration::from_secs(1)).await;
            assert_eq!(ms_since(began), 0);
            let busy = foreground.enter();
            foreground.give_way(Duration::from_secs(1)).await;
            assert_eq!(ms_since(began), 1000);
            let waiting = foreground.clone();
            let task = fs3_rt::spawn(async move {
                waiting.give_way(Duration::from_secs(60)).await;
                ms_since(began)
            });
            fs3_rt::sleep(Duration::from_secs(2)).await;
            drop(busy);
            assert_eq!(task.await.unwrap(), 3000);
        });
    }
}
