//! Who receives on a client's connection: its task, or a thread that waits for an answer.
//!
//! A thread that blocks for an answer would be woken by the task that reads it, which costs more than the answer. So it
//! reads the connection itself (leader and followers): whoever holds the [`Reading`] takes in what comes for everybody.
//! The task gives it up when only threads make calls, takes it back when none has for a while, and at once when a leader
//! leaves while others wait.

use crate::tcp::Socket;
use fs3_core::Error;
use parking_lot::Mutex;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

/// Takes messages in while the socket has some; ends with the connection, and says why.
pub(crate) type Reading = Pin<Box<dyn Future<Output = Error> + Send>>;

/// How long nobody reads a connection that no thread has used.
const UNATTENDED: Duration = Duration::from_millis(20);

/// The receiving half of a client's connection.
pub(crate) struct Incoming {
    holder: Mutex<Holder>,
    /// Something may have come: set by whoever holds the reading, cleared by the reading itself.
    readable: AtomicBool,
    /// A thread has called since this was last looked at.
    by_thread: AtomicBool,
    /// Calls that are not answered.
    waiting: AtomicUsize,
    /// The task should look.
    task: Notify,
    fd: RawFd,
}

enum Holder {
    /// Nobody reads.
    Nobody(Reading),
    Somebody,
    /// The connection has ended; the task has to be told why.
    Ended(Option<Error>),
}

impl Incoming {
    /// Of this socket, for which somebody has the reading now.
    pub fn new(socket: &Socket) -> Self {
        Self {
            holder: Mutex::new(Holder::Somebody),
            readable: AtomicBool::new(true),
            by_thread: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            task: Notify::new(),
            fd: socket.as_raw_fd(),
        }
    }

    /// A call begins, before its request is sent. The task reads for it unless a thread will.
    pub fn begin(&self, by_thread: bool) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        if by_thread {
            self.by_thread.store(true, Ordering::Relaxed);
        } else if matches!(*self.holder.lock(), Holder::Nobody(_)) {
            self.task.notify_one();
        }
    }

    /// A call is over.
    pub fn end(&self) {
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    /// Become the reader, if there is none.
    pub fn take(&self) -> Option<Reading> {
        let mut holder = self.holder.lock();
        match std::mem::replace(&mut *holder, Holder::Somebody) {
            Holder::Nobody(reading) => Some(reading),
            other => {
                *holder = other;
                None
            }
        }
    }

    /// Read no more. If calls are waiting, the task takes over.
    pub fn give(&self, reading: Reading) {
        let ended = {
            let mut holder = self.holder.lock();
            match *holder {
                Holder::Somebody => {
                    *holder = Holder::Nobody(reading);
                    None
                }
                _ => Some(reading),
            }
        };
        drop(ended);
        // Whoever calls after this look has found nobody reading.
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.task.notify_one();
        }
    }

    /// The connection has ended under a thread.
    pub fn broke(&self, error: Error) {
        *self.holder.lock() = Holder::Ended(Some(error));
        self.task.notify_one();
    }

    /// The connection is over: nobody reads any more.
    pub fn stop(&self) {
        let last = std::mem::replace(&mut *self.holder.lock(), Holder::Ended(None));
        drop(last);
    }

    /// Have the task see that the socket was closed.
    pub fn wake_task(&self) {
        self.task.notify_one();
    }

    /// To be polled for input; open while the reading exists.
    pub fn fd(&self) -> RawFd {
        self.fd
    }

    /// Take in what there is.
    pub fn receive(&self, reading: &mut Reading, cx: &mut Context<'_>) -> Poll<Error> {
        self.readable.store(true, Ordering::Relaxed);
        reading.as_mut().poll(cx)
    }

    /// Whether trying to read makes sense.
    pub fn is_readable(&self) -> bool {
        self.readable.load(Ordering::Relaxed)
    }

    /// The socket is empty.
    pub fn emptied(&self) {
        self.readable.store(false, Ordering::Relaxed);
    }

    /// The task of a connection that threads may read: why it ended.
    pub async fn attend(&self, first: Reading, descriptor: impl Fn() -> std::io::Result<OwnedFd>) -> Error {
        let mut reading = Some(first);
        loop {
            if let Some(mut held) = reading.take().or_else(|| self.take()) {
                let readiness = match descriptor().and_then(readiness) {
                    Ok(readiness) => readiness,
                    Err(error) => return crate::tcp::broken(&error),
                };
                if let Some(error) = self.read_until_idle(&mut held, &readiness).await {
                    return error;
                }
                drop(readiness);
                self.give(held);
            }
            if let Holder::Ended(error) = &mut *self.holder.lock() {
                return error.take().unwrap_or_else(|| crate::tcp::broken(&std::io::ErrorKind::NotConnected.into()));
            }
            self.needed().await;
        }
    }

    /// Read until nobody but threads make calls (`None`), or the connection ends.
    async fn read_until_idle(&self, reading: &mut Reading, readiness: &AsyncFd<OwnedFd>) -> Option<Error> {
        std::future::poll_fn(|cx| {
            loop {
                if let Poll::Ready(error) = self.receive(reading, cx) {
                    return Poll::Ready(Some(error));
                }
                if self.waiting.load(Ordering::SeqCst) == 0 && self.by_thread.swap(false, Ordering::Relaxed) {
                    return Poll::Ready(None);
                }
                match readiness.poll_read_ready(cx) {
                    Poll::Ready(Ok(mut guard)) => guard.clear_ready(),
                    Poll::Ready(Err(error)) => return Poll::Ready(Some(crate::tcp::broken(&error))),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await
    }

    /// Wait until the task should read: somebody waits for it, or threads have stopped making calls.
    async fn needed(&self) {
        while tokio::time::timeout(UNATTENDED, self.task.notified()).await.is_err() {
            if !self.by_thread.swap(false, Ordering::Relaxed) {
                return;
            }
        }
    }
}

/// Tells when something came. While none exists the runtime's threads sleep through it.
fn readiness(fd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned, and kept until it is dropped with the AsyncFd.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE)? })
}
