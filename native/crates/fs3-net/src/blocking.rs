//! Threads that block for calls.

use crate::incoming::{Incoming, Reading};
use crate::spin::Spin;
use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

thread_local! {
    /// Connections that the future which this thread blocks for has calls on; `None` when it blocks for none.
    static WANTED: RefCell<Option<Vec<Arc<Incoming>>>> = const { RefCell::new(None) };
}

/// Whether the calling thread is polling a future that it blocks for by a [`Waiter`].
pub(crate) fn is_blocking() -> bool {
    WANTED.with_borrow(Option::is_some)
}

/// Note that an answer is to come on this connection, which the thread may read while it blocks.
pub(crate) fn wants(incoming: &Arc<Incoming>) {
    WANTED.with_borrow_mut(|wanted| {
        let Some(wanted) = wanted else { return };
        if !wanted.iter().any(|known| Arc::ptr_eq(known, incoming)) {
            wanted.push(incoming.clone());
        }
    });
}

/// Blocks a thread for futures. While it waits for answers of calls, the thread receives on their connections itself:
/// no other thread has to run for that. One per thread, reused; it has a descriptor, which a forked child must not use.
pub struct Waiter {
    parker: Arc<Parker>,
    led: Vec<(Arc<Incoming>, Reading)>,
    fds: Vec<libc::pollfd>,
    spin: Spin,
}

impl Waiter {
    /// One for the calling thread.
    ///
    /// # Errors
    /// Those of making a descriptor.
    pub fn new() -> io::Result<Self> {
        Ok(Self { parker: Arc::new(Parker::new()?), led: Vec::new(), fds: Vec::new(), spin: Spin::default() })
    }

    /// Run `future` to its end on this thread, which must not run tasks of `runtime`. Every now and then (`check_every`, or
    /// when a signal came) `check` is called, and its error ends the wait.
    ///
    /// # Errors
    /// Those of `check`.
    pub fn block_on<F: Future + ?Sized, E>(
        &mut self,
        runtime: &tokio::runtime::Handle,
        mut future: Pin<&mut F>,
        check_every: Duration,
        mut check: impl FnMut() -> Result<(), E>,
    ) -> Result<F::Output, E> {
        let _runtime = runtime.enter();
        let _wanting = Wanting::begin();
        let waker = Waker::from(self.parker.clone());
        let mut until = Instant::now() + check_every;
        loop {
            self.parker.clear();
            if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                self.follow();
                return Ok(output);
            }
            self.lead();
            if !self.receive_until_woken(until) {
                // What `check` does may take long, or make calls of its own.
                self.follow();
                check()?;
                until = Instant::now() + check_every;
            }
        }
    }

    /// Begin operations by `begin`, and receive their answers on this thread for a moment, as long as `has_ended` says no.
    /// What has not ended then goes on without this thread. Does not sleep.
    pub fn attend(&mut self, runtime: &tokio::runtime::Handle, begin: impl FnOnce(), has_ended: impl Fn() -> bool) {
        let _runtime = runtime.enter();
        let _wanting = Wanting::begin();
        fs3_rt::run_woken(begin);
        if has_ended() {
            return;
        }
        self.lead();
        self.spin(|waiter| {
            fs3_rt::run_woken(|| waiter.receive());
            has_ended()
        });
        self.follow();
    }

    /// Become the reader of the wanted connections that nobody reads.
    fn lead(&mut self) {
        WANTED.with_borrow(|wanted| {
            for incoming in wanted.iter().flatten() {
                if let Some(reading) = incoming.take() {
                    self.led.push((incoming.clone(), reading));
                }
            }
        });
    }

    /// Leave reading to others.
    fn follow(&mut self) {
        for (incoming, reading) in self.led.drain(..) {
            incoming.give(reading);
        }
    }

    /// False when the time is over, or a signal came.
    fn receive_until_woken(&mut self, until: Instant) -> bool {
        loop {
            self.receive();
            let woken = |waiter: &mut Self| {
                waiter.receive();
                waiter.parker.is_woken()
            };
            if self.parker.is_woken() || self.spin(woken) {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.sleep(left) {
                return self.parker.is_woken();
            }
        }
    }

    /// Go on receiving for a moment by `succeeds`, until it does; whether it did.
    fn spin(&mut self, mut succeeds: impl FnMut(&mut Self) -> bool) -> bool {
        if self.led.is_empty() {
            return false;
        }
        let mut spin = std::mem::take(&mut self.spin);
        let succeeded = spin.until(|| succeeds(self));
        self.spin = spin;
        succeeded
    }

    fn receive(&mut self) {
        // Who reads tries again whenever something may have come; nobody has to be woken.
        let mut cx = Context::from_waker(Waker::noop());
        self.led.retain_mut(|(incoming, reading)| match incoming.receive(reading, &mut cx) {
            Poll::Pending => true,
            Poll::Ready(error) => {
                incoming.broke(error);
                false
            }
        });
    }

    /// Wait for input or a wake-up; false when a signal came.
    fn sleep(&mut self, span: Duration) -> bool {
        let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        self.fds.clear();
        self.fds.push(entry(self.parker.fd.as_raw_fd()));
        self.fds.extend(self.led.iter().map(|(incoming, _)| entry(incoming.fd())));
        self.parker.sleep(&mut self.fds, span)
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.follow();
    }
}

/// Collects the connections of one future.
struct Wanting {
    outer: Option<Vec<Arc<Incoming>>>,
}

impl Wanting {
    fn begin() -> Self {
        Self { outer: WANTED.replace(Some(Vec::new())) }
    }
}

impl Drop for Wanting {
    fn drop(&mut self) {
        WANTED.set(self.outer.take());
    }
}

const AWAKE: u8 = 0;
const ASLEEP: u8 = 1;
const WOKEN: u8 = 2;

/// Wakes a thread that may be in poll(2).
struct Parker {
    state: AtomicU8,
    /// Readable when the thread was woken while it was asleep.
    fd: OwnedFd,
}

impl Parker {
    fn new() -> io::Result<Self> {
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was opened just now and belongs to nobody else.
        Ok(Self { state: AtomicU8::new(AWAKE), fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    fn clear(&self) {
        self.state.store(AWAKE, Ordering::SeqCst);
    }

    fn is_woken(&self) -> bool {
        self.state.load(Ordering::SeqCst) == WOKEN
    }

    /// poll(2) unless the thread was woken already; `fds[0]` is the parker's own. False when a signal came.
    fn sleep(&self, fds: &mut [libc::pollfd], span: Duration) -> bool {
        if self.state.compare_exchange(AWAKE, ASLEEP, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return true;
        }
        let timeout_ms = span.as_millis().saturating_add(1).min(i32::MAX as u128) as i32;
        // SAFETY: the entries are valid for the call.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout_ms) };
        let interrupted = ready < 0;
        // A wake-up that comes now finds the thread awake.
        let _ = self.state.compare_exchange(ASLEEP, AWAKE, Ordering::SeqCst, Ordering::SeqCst);
        if !interrupted && fds[0].revents != 0 {
            let mut count = [0u8; 8];
            // SAFETY: the buffer has the eight bytes that are read.
            unsafe { libc::read(self.fd.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
        }
        !interrupted
    }
}

impl Wake for Parker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.swap(WOKEN, Ordering::SeqCst) == ASLEEP {
            let one = 1u64.to_ne_bytes();
            // SAFETY: the buffer has eight bytes. It can only fail when the count is at its end: then it is readable.
            unsafe { libc::write(self.fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        }
    }
}
