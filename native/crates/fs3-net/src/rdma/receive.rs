//! The receiving task of an RDMA connection.

use super::link::{Awaited, RdmaLink};
use super::memory::Registered;
use super::nic::{Ready, Received};
use super::wire::{
    Kind, PAYLOAD_INLINE, PAYLOAD_PUSHED, PAYLOAD_WITHHELD, Piece, Prefix, TAIL_AT, TAIL_REMOTE, Tail, header_of,
    remote_tail, tail_bytes,
};
use crate::link::{Endpoint, Landing, Link};
use crate::tcp::{Socket, scatter};
use bytes::Bytes;
use fs3_core::{Code, Error, RegionMut, Result};
use fs3_proto::frame::{Header, Kind as FrameKind};
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::task::Poll;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How soon memory of sends that are done is looked for when nothing else happens.
const RELEASE_INTERVAL: Duration = Duration::from_millis(10);
/// Looks at the completion queue before waiting for its event; on machines with few cores the other side would
/// have to wait for this one to stop looking.
static SPINS: LazyLock<u32> =
    LazyLock::new(|| if std::thread::available_parallelism().map_or(1, usize::from) >= 4 { 20 } else { 0 });

impl RdmaLink {
    /// Take over a connected queue pair, and the socket of its hello, and start its task on the current runtime.
    pub fn start<E: Endpoint>(
        socket: Socket,
        ready: Ready,
        peer_receives: u32,
        make_endpoint: impl FnOnce(Arc<Self>) -> Arc<E>,
    ) -> Arc<E> {
        let link = Self::new(socket, ready, peer_receives);
        let endpoint = make_endpoint(link.clone());
        let guard = ClosedGuard { link, endpoint: endpoint.clone(), reason: None };
        tokio::spawn(async move {
            let mut guard = guard;
            let receiver = Receiver {
                link: &guard.link,
                endpoint: &guard.endpoint,
                inbox: VecDeque::new(),
                reading: HashMap::new(),
                next_key: 0,
            };
            let error = receiver.run().await;
            guard.reason = Some(error);
        });
        endpoint
    }
}

/// Ends the connection when the receiving task ends for whatever reason, a panic included.
struct ClosedGuard<E: Endpoint> {
    link: Arc<RdmaLink>,
    endpoint: Arc<E>,
    reason: Option<Error>,
}

impl<E: Endpoint> Drop for ClosedGuard<E> {
    fn drop(&mut self) {
        // First of all nothing may touch memory any more.
        self.link.close();
        let reason = self.reason.take().unwrap_or_else(|| Error::new(Code::Unavailable, "the connection was ended"));
        self.endpoint.closed(&reason);
    }
}

struct Descriptor(RawFd);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// A frame that waits to be admitted. Its receive is posted again when it is done with.
struct Incoming {
    prefix: Prefix,
    header: Header,
    message: Received,
}

/// What an RDMA READ is under way for. Its memory is dropped only when the read is done or the queue pair is gone.
enum Reading<E: Endpoint> {
    Tail { prefix: Prefix, header: Header, memory: RegionMut },
    Payload { header: Header, body: Bytes, landing: E::Landing, staged: Option<RegionMut> },
}

struct Receiver<'a, E: Endpoint> {
    link: &'a Arc<RdmaLink>,
    endpoint: &'a Arc<E>,
    inbox: VecDeque<Incoming>,
    reading: HashMap<u64, Reading<E>>,
    next_key: u64,
}

impl<E: Endpoint> Receiver<'_, E> {
    async fn run(mut self) -> Error {
        let error = match self.receive().await {
            Err(error) => error,
            Ok(never) => match never {},
        };
        // A side that wants the end closes the connection, or its socket.
        if !self.link.is_closed() && !self.link.socket.has_ended().await {
            self.link.nic.counters.lost();
        }
        // Before the memory of reads under way is dropped.
        self.link.close();
        error
    }

    async fn receive(&mut self) -> Result<std::convert::Infallible> {
        let broken =
            |e: std::io::Error| Error::new(Code::Unavailable, format!("completions cannot be waited for: {e}"));
        let descriptor = Descriptor(self.link.completions.as_raw_fd());
        // SAFETY: the completion queue, whose descriptor it is, lives as long as the link, which outlives this call.
        let events = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
        let events = events.map_err(|e| broken(e.into()))?;
        let (mut scratch, mut received, mut read) = (Vec::new(), Vec::new(), Vec::new());
        let (mut idle, mut unseen_events) = (0, false);
        loop {
            if self.link.is_closed() {
                return Err(Error::new(Code::Unavailable, "the connection was ended"));
            }
            let mut armed = false;
            let mut count = self.link.collect(&mut scratch, &mut received, &mut read)?;
            if count == 0 && idle >= *SPINS {
                // An event that came while nobody waited must not be taken for the one that is waited for.
                while unseen_events && self.link.completions.take_event() {}
                let received_only = self.link.nic.tells_solicited() && self.link.awaited() != Awaited::Completions;
                // What completes between the last look and arming makes no event.
                self.link.completions.arm(received_only).map_err(super::unavailable)?;
                (armed, unseen_events) = (true, true);
                count = self.link.collect(&mut scratch, &mut received, &mut read)?;
            }
            for (index, bytes) in received.drain(..) {
                self.accept(self.link.nic.received(index, bytes))?;
            }
            for key in read.drain(..) {
                self.continue_with(key)?;
            }
            let admitted = self.admit().await?;
            if count > 0 || admitted {
                idle = 0;
                tokio::task::yield_now().await;
            } else if armed {
                unseen_events = !self.wait(&events).await?;
                idle = 0;
            } else {
                idle += 1;
                tokio::task::yield_now().await;
            }
        }
    }

    /// Wait for anything to happen. True: the event was taken.
    async fn wait(&self, events: &AsyncFd<Descriptor>) -> Result<bool> {
        let deadline = self.link.revoke_deadline();
        let revoke = async {
            match deadline {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        // Said before looking, so that a send from now on is either seen or tells.
        self.link.untimed.store(true, Ordering::SeqCst);
        let nothing_sent = self.link.awaited() == Awaited::Messages;
        self.link.untimed.store(nothing_sent, Ordering::SeqCst);
        let release = async {
            match nothing_sent {
                true => std::future::pending().await,
                // Failures are found here too: they need not be events.
                false => tokio::time::sleep(RELEASE_INTERVAL).await,
            }
        };
        tokio::select! {
            ready = events.readable() => {
                ready.map_err(|e| Error::new(Code::Unavailable, e.to_string()))?.clear_ready();
                Ok(self.link.completions.take_event())
            }
            () = self.link.wake.notified() => Ok(false),
            () = release => Ok(false),
            () = self.endpoint.admit(), if !self.inbox.is_empty() => Ok(false),
            error = self.link.socket.ended() => Err(error),
            () = revoke => Err(Error::new(Code::Unavailable, "the peer does not let go of memory")),
        }
    }

    /// Look at a message that came.
    fn accept(&mut self, message: Received) -> Result<()> {
        let prefix = Prefix::decode(&message)?;
        self.link.nic.counters.received();
        self.link.credit(prefix.credits)?;
        match prefix.kind {
            Kind::Frame => {
                let header = header_of(&message).inspect_err(|e| self.endpoint.refused(None, e))?;
                if header.kind == FrameKind::Request && !prefix.has(TAIL_REMOTE) && prefix.windows > 0 {
                    let tail = message.get(TAIL_AT..).unwrap_or_default();
                    self.link.asked(header.request_id, Tail::decode(tail, &prefix, &header)?.windows);
                }
                self.inbox.push_back(Incoming { prefix, header, message });
                return Ok(());
            }
            Kind::Credits => {}
            Kind::Revoke => {
                let waiting = self.inbox.iter().any(|i| i.header.request_id == prefix.id && i.prefix.has(TAIL_REMOTE));
                let reading =
                    |r: &Reading<E>| matches!(r, Reading::Tail { header, .. } if header.request_id == prefix.id);
                if self.link.revoke(prefix.id, waiting || self.reading.values().any(reading)) {
                    self.link.send_control(Kind::Revoked, prefix.id)?;
                }
            }
            Kind::Revoked => self.link.revoked(prefix.id),
            Kind::Release => self.link.release(prefix.id),
        }
        drop(message);
        self.link.owe()
    }

    /// Begin with frames as far as the endpoint takes them.
    async fn admit(&mut self) -> Result<bool> {
        let mut any = false;
        while !self.inbox.is_empty() {
            let mut admit = pin!(self.endpoint.admit());
            if !poll_fn(|cx| Poll::Ready(admit.as_mut().poll(cx).is_ready())).await {
                break;
            }
            let Incoming { prefix, header, message } = self.inbox.pop_front().expect("there is one");
            any = true;
            if prefix.has(TAIL_REMOTE) {
                let piece = remote_tail(&message, &prefix, &header)?;
                let (memory, registered) = self.link.nic.stage(tail_bytes(&prefix, &header))?;
                self.read(Reading::Tail { prefix, header, memory }, &registered, &[piece])?;
            } else {
                let tail = message.get(TAIL_AT..).unwrap_or_default();
                self.frame(&prefix, header, &Tail::decode(tail, &prefix, &header)?)?;
            }
            drop(message);
            self.link.owe()?;
        }
        Ok(any)
    }

    fn read(&mut self, reading: Reading<E>, memory: &Registered, pieces: &[Piece]) -> Result<()> {
        let key = self.next_key;
        self.next_key += 1;
        self.reading.insert(key, reading);
        // SAFETY: the memory is in `reading`, which is dropped after the read or the end of the queue pair.
        unsafe { self.link.read(key, memory, pieces) }
    }

    /// A read is done.
    fn continue_with(&mut self, key: u64) -> Result<()> {
        match self.reading.remove(&key).expect("reads are told once") {
            Reading::Tail { prefix, header, memory } => {
                let tail = Tail::decode(&memory, &prefix, &header)?;
                match header.kind {
                    FrameKind::Request => self.link.asked(header.request_id, tail.windows.clone()),
                    FrameKind::Response => self.link.send_control(Kind::Release, header.request_id)?,
                }
                self.frame(&prefix, header, &tail)
            }
            Reading::Payload { header, body, mut landing, staged } => {
                if let Some(bytes) = staged {
                    fill(&mut landing, &bytes);
                } else {
                    landing.advance(header.payload_bytes as usize);
                }
                self.endpoint.deliver(header, body, landing);
                Ok(())
            }
        }
    }

    /// A frame with its tail: bring its payload where it belongs and deliver it.
    fn frame(&mut self, prefix: &Prefix, header: Header, tail: &Tail<'_>) -> Result<()> {
        let body = Bytes::copy_from_slice(tail.body);
        let exposed = match header.kind {
            FrameKind::Response => self.link.settle(header.request_id),
            FrameKind::Request => None,
        };
        let mut landing = self.endpoint.place(&header, &body)?;
        let bytes = header.payload_bytes as usize;
        if !tail.sources.is_empty() {
            return self.pull(header, body, landing, &tail.sources);
        }
        if prefix.has(PAYLOAD_INLINE) {
            fill(&mut landing, tail.inline);
        } else if prefix.has(PAYLOAD_PUSHED) {
            for (window, memory) in exposed.iter().flat_map(|e| &e.staged) {
                landing.put(*window, memory);
            }
            landing.advance(bytes);
            self.link.nic.counters.pushed(bytes as u64);
        } else if bytes > 0 {
            if !prefix.has(PAYLOAD_WITHHELD) {
                return Err(Error::new(Code::Protocol, "the payload of a message by RDMA is missing"));
            }
            landing.refuse(Error::new(Code::Protocol, "the payload of a response does not fit what was asked for"));
        }
        self.endpoint.deliver(header, body, landing);
        // Only now, with the call over or known to be: its memory is nobody else's.
        drop(exposed);
        Ok(())
    }

    /// Read the payload from the peer's memory.
    fn pull(&mut self, header: Header, body: Bytes, mut landing: E::Landing, sources: &[Piece]) -> Result<()> {
        let bytes = header.payload_bytes as usize;
        let Some(memory) = landing.memory() else {
            // Nobody wants it.
            self.endpoint.deliver(header, body, landing);
            return Ok(());
        };
        let (registered, staged) = match self.link.nic.registered(memory.as_ptr(), bytes) {
            Some(registered) => (registered, None),
            None => {
                let (region, registered) = self.link.nic.stage(bytes)?;
                self.link.nic.counters.copied(bytes);
                (registered, Some(region))
            }
        };
        self.read(Reading::Payload { header, body, landing, staged }, &registered, sources)
    }
}

/// Copy a payload to where it belongs.
fn fill(landing: &mut impl Landing, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let copied = landing.fill(bytes.len(), &mut [], &mut |windows| Ok(scatter(bytes, windows)));
        // A landing that nobody wants any more swallows the bytes.
        let moved = copied.map_or(bytes.len(), |n| n.expect("copying within memory cannot fail"));
        landing.advance(moved);
        bytes = &bytes[moved..];
    }
}
