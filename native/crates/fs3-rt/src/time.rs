use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::{Instant, sim};

/// A moment that is waited for.
pub struct Sleep(Timer);

enum Timer {
    Tokio(tokio::time::Sleep),
    Simulated(sim::Timer),
}

/// Wait for `span`.
pub fn sleep(span: Duration) -> Sleep {
    match sim::Simulator::current() {
        Some(sim) => Sleep(Timer::Simulated(sim.timer(span))),
        None => Sleep(Timer::Tokio(tokio::time::sleep(span))),
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // SAFETY: nothing is moved out of the pinned timer.
        match unsafe { &mut self.get_unchecked_mut().0 } {
            // SAFETY: pinned as a part of `self`.
            Timer::Tokio(timer) => unsafe { Pin::new_unchecked(timer) }.poll(cx),
            Timer::Simulated(timer) => Pin::new(timer).poll(cx),
        }
    }
}

/// The time is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed;

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not finished in time")
    }
}

/// A future that is given a limited time; the future is asked first.
pub struct Timeout<F> {
    future: F,
    limit: Sleep,
}

/// Give `future` at most `span`.
pub fn timeout<F: IntoFuture>(span: Duration, future: F) -> Timeout<F::IntoFuture> {
    Timeout { future: future.into_future(), limit: sleep(span) }
}

/// Give `future` until `deadline`.
pub fn timeout_at<F: IntoFuture>(deadline: Instant, future: F) -> Timeout<F::IntoFuture> {
    let limit = match sim::Simulator::current() {
        Some(sim) => Sleep(Timer::Simulated(sim.timer_at(deadline.virtual_ns()))),
        None => Sleep(Timer::Tokio(tokio::time::sleep_until(deadline.into()))),
    };
    Timeout { future: future.into_future(), limit }
}

impl<F: Future> Future for Timeout<F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // SAFETY: both fields are pinned as parts of `self` and never moved.
        let (future, limit) = unsafe {
            let this = self.get_unchecked_mut();
            (Pin::new_unchecked(&mut this.future), Pin::new_unchecked(&mut this.limit))
        };
        if let Poll::Ready(output) = future.poll(cx) {
            return Poll::Ready(Ok(output));
        }
        limit.poll(cx).map(|()| Err(Elapsed))
    }
}
