//! The seam between calls and transports.
//!
//! Above it: calls, timeouts, handlers, limits. Below it: how messages travel. A transport is handed whole
//! messages ([`Link::send`]) and asks its [`Endpoint`] where the payload of an incoming message shall go before it
//! moves any of it. A one-sided transport (RDMA) advertises `Outgoing::landing` of a request, so that the peer can
//! push response payload into it, and pulls request payload into what [`Endpoint::place`] gave; nothing above the
//! seam changes.

use crate::client::Slot;
use crate::incoming::Incoming;
use bytes::Bytes;
use fs3_core::{Error, Region, RegionMut, Result};
use fs3_proto::frame::Header;
use smallvec::SmallVec;
use std::io::IoSliceMut;
use std::sync::Arc;

/// When a queued message should leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flush {
    /// At once, on the caller's thread when possible.
    Now,
    /// With others that are queued about now.
    Soon,
    /// Before the receiving task next reads; only for messages sent from within [`Endpoint::deliver`].
    Batch,
}

impl Flush {
    /// When a message leaves that others may follow: those of other tasks that run now. A thread that runs no tasks of a
    /// runtime would have to wake one for that.
    pub fn of_this_thread() -> Self {
        if tokio::task::try_id().is_some() { Self::Soon } else { Self::Now }
    }
}

/// A message to send. Its memory stays untouched and alive until it is dropped, which happens when the transport
/// is done with it.
pub(crate) struct Outgoing {
    /// Header, and possibly the body behind it.
    pub head: Vec<u8>,
    /// The body unless it is in `head`.
    pub body: Bytes,
    /// The payload's pieces in order.
    pub payload: Vec<Region>,
    /// Whether the payload's checksums are to go with it where the transport reads it anyway.
    pub with_crcs: bool,
    /// Responses: lengths of the payload's segments; empty: it is one.
    pub segments: Vec<u32>,
    /// Requests: where the response goes. Told when the message begins to leave.
    pub landing: Option<Arc<Slot>>,
    /// Responses: held until the message has left.
    pub permit: Option<Box<dyn Send + Sync>>,
}

impl Outgoing {
    /// All pieces in the order in which they travel.
    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        [&self.head[..], &self.body[..]].into_iter().chain(self.payload.iter().map(|r| &r[..]))
    }

    /// Length on the wire.
    pub fn bytes(&self) -> usize {
        self.pieces().map(<[u8]>::len).sum()
    }
}

/// Sends messages of one connection.
pub(crate) trait Link: Send + Sync + 'static {
    /// Queue a message; never waits. Dropped silently when the link is closed.
    fn send(&self, message: Outgoing, flush: Flush);
    /// Send what is queued as far as it goes without waiting.
    fn flush(&self);
    /// End the connection. The endpoint is told by the receiving task.
    fn close(&self);
    /// Whether the connection has ended.
    fn is_closed(&self) -> bool;
    /// The receiving half, where threads that wait for answers may read.
    fn incoming(&self) -> Option<Arc<Incoming>> {
        None
    }
    /// The device, when messages travel by RDMA.
    fn rdma_device(&self) -> Option<&str> {
        None
    }
    /// Whether payloads may go by reference.
    fn shares_memory(&self) -> bool {
        false
    }
    /// Whether this payload would go with its checksums, as far as can be known.
    fn sends_crcs(&self, payload: &[Region]) -> bool {
        let _ = payload;
        false
    }
    /// The call of this request was given up, and these were its windows. They are dropped when the peer cannot
    /// write to them any more.
    fn abandon(&self, request_id: u64, windows: Vec<RegionMut>) {
        let _ = (request_id, windows);
    }
}

/// How the messages of a connection travel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// By TCP.
    Tcp,
    /// By TCP, large payloads through shared memory.
    SharedMemory,
    /// By RDMA, with this device.
    Rdma(String),
}

impl dyn Link {
    /// How messages travel.
    pub fn way(&self) -> Way {
        match self.rdma_device() {
            Some(device) => Way::Rdma(device.to_owned()),
            None if self.shares_memory() => Way::SharedMemory,
            None => Way::Tcp,
        }
    }
}

/// Writes into windows in order and returns how many bytes it wrote.
pub(crate) type Fill<'a> = &'a mut dyn FnMut(&mut [IoSliceMut<'_>]) -> std::io::Result<usize>;

/// Memory that one payload goes into.
pub(crate) trait Landing: Send + Sync {
    /// Call `io` with windows not yet filled, for at least `bytes` of those that are left, and `tail` behind them when it is
    /// passed all of them. `None`: nobody wants the bytes any more.
    fn fill(&mut self, bytes: usize, tail: &mut [u8], io: Fill<'_>) -> Option<std::io::Result<usize>>;
    /// `bytes` more were written (or thrown away).
    fn advance(&mut self, bytes: usize);
    /// Requests: memory for the whole payload, to read it into. `None` when nobody wants it.
    fn memory(&mut self) -> Option<&mut [u8]> {
        None
    }
    /// Requests: the checksums that the sender made of the payload, after all of it.
    fn sent_crcs(&mut self, crcs: Vec<u8>) {
        let _ = crcs;
    }
    /// Responses: put what a window got elsewhere into it.
    fn put(&mut self, window: usize, bytes: &[u8]) {
        let _ = (window, bytes);
    }
    /// The payload does not come.
    fn refuse(&mut self, error: Error);
}

/// What receives messages of one connection.
pub(crate) trait Endpoint: Send + Sync + 'static {
    /// Memory for the payload of one message.
    type Landing: Landing;
    /// Wait until one more message may come in.
    fn admit(&self) -> impl Future<Output = ()> + Send;
    /// Decide where the payload of this message goes. An error ends the connection.
    fn place(&self, header: &Header, body: &[u8]) -> Result<Self::Landing>;
    /// The message is complete.
    fn deliver(self: &Arc<Self>, header: Header, body: Bytes, landing: Self::Landing);
    /// A frame was refused with this error; the connection ends after what is sent here. `header` is there when
    /// it was readable.
    fn refused(&self, header: Option<&Header>, error: &Error);
    /// The connection ended. Called once, last.
    fn closed(&self, error: &Error);
}

/// Most pieces handed to one system call.
pub(crate) const PIECES_MAX: usize = 128;
/// Windows that take no memory from the allocator.
const WINDOWS_USUAL: usize = 8;

/// A bounded list of memory windows for one vectored read, with a place kept for the tail.
pub(crate) struct Windows<'a>(SmallVec<[IoSliceMut<'a>; WINDOWS_USUAL]>);

impl<'a> Windows<'a> {
    pub fn new() -> Self {
        Self(SmallVec::new())
    }

    /// Add a window; false when the list is full.
    pub fn push(&mut self, window: &'a mut [u8]) -> bool {
        let fits = self.0.len() < PIECES_MAX - 1;
        if fits {
            self.0.push(IoSliceMut::new(window));
        }
        fits
    }

    /// Run `io` over the windows, and over `tail` behind them when `complete`.
    pub fn run(mut self, complete: bool, tail: &'a mut [u8], io: Fill<'_>) -> std::io::Result<usize> {
        if complete && !tail.is_empty() {
            self.0.push(IoSliceMut::new(tail));
        }
        io(&mut self.0)
    }
}
