//! The TCP transport: one socket, a task that reads it, a task that writes what could not be written at once.

use crate::incoming::{Incoming, Reading};
use crate::link::{Endpoint, Flush, Landing, Link, Outgoing, PIECES_MAX};
use crate::shm::SharedMemory;
use crate::{PEER_SILENT_MS_MAX, STALL_TIMEOUT_MS};
use bytes::Bytes;
use fs3_core::{Code, Error, Region, Result};
use fs3_proto::frame::{HEADER_BYTES, Header, Limits, REFERENCES_MAX, Reference, References};
use parking_lot::Mutex;
use socket2::{SockRef, TcpKeepalive};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};

/// Size of the read buffer that headers, bodies and small payloads go through.
const READ_BUFFER_BYTES: usize = 64 << 10;
const _: () = assert!(REFERENCES_MAX * Reference::BYTES <= READ_BUFFER_BYTES);
/// How much is read ahead behind a large payload: what is read ahead is copied once more.
const READ_AHEAD_BYTES: usize = 4 << 10;
/// From this size on a payload is large.
const LARGE_PAYLOAD_BYTES: usize = 32 << 10;

/// How long a refused peer is given to read why.
const LINGER: Duration = Duration::from_millis(500);

/// A connected socket that can still be used for the hello.
pub(crate) struct Socket {
    fd: AsyncFd<TcpStream>,
}

impl Socket {
    /// Prepare a connected stream; must be called on the runtime that will drive it.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let socket = SockRef::from(&stream);
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_user_timeout(Some(Duration::from_millis(PEER_SILENT_MS_MAX)))?;
        let keepalive = TcpKeepalive::new()
            .with_time(Duration::from_millis(PEER_SILENT_MS_MAX))
            .with_interval(Duration::from_millis(PEER_SILENT_MS_MAX / 5))
            .with_retries(5);
        socket.set_tcp_keepalive(&keepalive)?;
        // SAFETY: the stream owns its descriptor and keeps it until it is dropped, with the AsyncFd.
        Ok(Self { fd: unsafe { AsyncFd::register(stream)? } })
    }

    /// The same socket, of which the runtime only tells when it can be written to.
    pub fn written_only(self) -> io::Result<Self> {
        let stream = self.fd.into_inner();
        // SAFETY: as above.
        Ok(Self { fd: unsafe { AsyncFd::register_with_interest(stream, Interest::WRITABLE)? } })
    }

    async fn read_exact(&self, buf: &mut [u8]) -> io::Result<()> {
        let mut at = 0;
        while at < buf.len() {
            let mut guard = self.fd.readable().await?;
            match guard.try_io(|fd| fd.get_ref().read(&mut buf[at..])) {
                Ok(Ok(0)) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(Ok(n)) => at += n,
                Ok(Err(e)) if e.kind() == ErrorKind::Interrupted => {}
                Ok(Err(e)) => return Err(e),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }

    /// Read one frame without payload, and not a byte more. The header is given back even when it is refused.
    pub async fn read_frame(&self, limits: Limits) -> (Option<Header>, Result<Bytes>) {
        let mut head = [0u8; HEADER_BYTES];
        if let Err(e) = self.read_exact(&mut head).await {
            return (None, Err(broken(&e)));
        }
        let header = match Header::parse(&head) {
            Ok(header) => header,
            Err(e) => return (None, Err(e)),
        };
        if let Err(e) = header.check_limits(limits) {
            return (Some(header), Err(e));
        }
        if header.payload_bytes != 0 {
            return (Some(header), Err(Error::new(Code::Protocol, "a hello has no payload")));
        }
        let mut body = vec![0u8; header.body_bytes as usize];
        let body = match self.read_exact(&mut body).await {
            Ok(()) => Ok(body.into()),
            Err(e) => Err(broken(&e)),
        };
        (Some(header), body)
    }

    /// Whether the other end seems to be on this host.
    pub fn is_local(&self) -> bool {
        let stream = self.fd.get_ref();
        match (stream.peer_addr(), stream.local_addr()) {
            (Ok(peer), Ok(own)) => peer.ip() == own.ip() || (peer.ip().is_loopback() && own.ip().is_loopback()),
            _ => false,
        }
    }

    /// Write all of `bytes`.
    pub async fn write_all(&self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let mut guard = self.fd.writable().await.map_err(|e| broken(&e))?;
            match guard.try_io(|fd| SockRef::from(fd.get_ref()).send_with_flags(bytes, libc::MSG_NOSIGNAL)) {
                Ok(Ok(n)) => bytes = &bytes[n..],
                Ok(Err(e)) if e.kind() == ErrorKind::Interrupted => {}
                Ok(Err(e)) => return Err(broken(&e)),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }

    /// End the connection in both directions.
    pub fn shutdown(&self) {
        let _ = self.fd.get_ref().shutdown(Shutdown::Both);
    }

    /// Wait until the peer closes the connection, or it breaks. Nothing is to be received on it any more.
    pub async fn ended(&self) -> Error {
        match self.read_exact(&mut [0u8; 1]).await {
            Ok(()) => Error::new(Code::Protocol, "the peer sent bytes where only RDMA is expected"),
            Err(e) => broken(&e),
        }
    }

    /// Whether [`Socket::ended`] would return now, as far as is known.
    pub async fn has_ended(&self) -> bool {
        let mut ended = std::pin::pin!(self.ended());
        std::future::poll_fn(|cx| Poll::Ready(ended.as_mut().poll(cx).is_ready())).await
    }

    /// Say goodbye so that the peer reads what was sent last: without this, closing with unread input resets
    /// the connection and the last message is lost. Bounded by [`LINGER`].
    pub async fn linger(&self) {
        let _ = self.fd.get_ref().shutdown(Shutdown::Write);
        let drain = async {
            let mut scratch = vec![0u8; READ_BUFFER_BYTES];
            while self.read_exact(&mut scratch).await.is_ok() {}
        };
        let _ = tokio::time::timeout(LINGER, drain).await;
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// A connection over TCP after its hello.
pub(crate) struct TcpLink {
    socket: Socket,
    incoming: Arc<Incoming>,
    /// Whether threads may read: otherwise the task always does.
    shared: bool,
    memory: Option<Arc<SharedMemory>>,
    queue: Mutex<VecDeque<Outgoing>>,
    writer: Mutex<Writer>,
    /// There is something for the writing task to do.
    wake_writer: Notify,
    closed: AtomicBool,
}

/// Messages taken from the queue; the first has been sent up to `offset`.
#[derive(Default)]
struct Writer {
    batch: VecDeque<Outgoing>,
    offset: usize,
}

#[derive(PartialEq, Eq)]
enum Progress {
    Drained,
    Blocked,
}

impl TcpLink {
    /// Take over a socket after its hello and start its tasks on the current runtime. They end when the
    /// connection does. With `memory` payloads may go by reference.
    pub fn start<E: Endpoint>(
        socket: Socket,
        memory: Option<SharedMemory>,
        make_endpoint: impl FnOnce(Arc<Self>) -> Arc<E>,
    ) -> Arc<E> {
        Self::run(socket, memory, false, make_endpoint)
    }

    /// As [`TcpLink::start`], for a connection that also threads read which wait for answers.
    pub fn start_shared<E: Endpoint>(
        socket: Socket,
        memory: Option<SharedMemory>,
        make_endpoint: impl FnOnce(Arc<Self>) -> Arc<E>,
    ) -> io::Result<Arc<E>> {
        Ok(Self::run(socket.written_only()?, memory, true, make_endpoint))
    }

    fn run<E: Endpoint>(
        socket: Socket,
        memory: Option<SharedMemory>,
        shared: bool,
        make_endpoint: impl FnOnce(Arc<Self>) -> Arc<E>,
    ) -> Arc<E> {
        let link = Arc::new(Self {
            incoming: Arc::new(Incoming::new(&socket)),
            shared,
            socket,
            memory: memory.map(Arc::new),
            queue: Mutex::default(),
            writer: Mutex::default(),
            wake_writer: Notify::new(),
            closed: AtomicBool::new(false),
        });
        let endpoint = make_endpoint(link.clone());
        tokio::spawn(link.clone().run_writer());
        let mut reader = Reader::new(link.clone());
        let receiver = endpoint.clone();
        let reading: Reading = Box::pin(async move { reader.run(&receiver).await });
        if let Some(memory) = link.memory.clone() {
            tokio::spawn(async move { memory.keep_releasing().await });
        }
        let guard = ClosedGuard { link, endpoint: endpoint.clone(), reason: None };
        tokio::spawn(async move {
            let mut guard = guard;
            let error = guard.link.receive(reading).await;
            // The peer of a shared connection is a server, to which no last word is said.
            if !shared && matches!(error.code, Code::MessageTooBig | Code::Protocol) {
                guard.link.flush();
                guard.link.socket.linger().await;
            }
            guard.reason = Some(error);
        });
        endpoint
    }

    /// Receive until the connection ends; why.
    async fn receive(&self, mut reading: Reading) -> Error {
        if self.shared {
            return self.incoming.attend(reading, || self.socket.fd.get_ref().as_fd().try_clone_to_owned()).await;
        }
        poll_fn(|cx| {
            loop {
                if let Poll::Ready(error) = self.incoming.receive(&mut reading, cx) {
                    return Poll::Ready(error);
                }
                match self.socket.fd.poll_read_ready(cx) {
                    Poll::Ready(Ok(mut guard)) => guard.clear_ready(),
                    Poll::Ready(Err(error)) => return Poll::Ready(broken(&error)),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await
    }

    /// A header, and the references that stand for the payload.
    fn parse(&self, head: &[u8; HEADER_BYTES]) -> Result<(Header, Option<References>)> {
        match &self.memory {
            Some(memory) if memory.takes_references() => Header::parse_by_reference(head),
            _ => Ok((Header::parse(head)?, None)),
        }
    }

    async fn run_writer(self: Arc<Self>) {
        while !self.is_closed() {
            self.wake_writer.notified().await;
            // A woken task runs at once; let those that run now add their messages first.
            tokio::task::yield_now().await;
            while !self.is_closed() && self.write_queued() == Progress::Blocked {
                let Ok(mut guard) = self.socket.fd.writable().await else { return };
                if self.write_queued() == Progress::Drained {
                    break;
                }
                guard.clear_ready();
            }
        }
    }

    /// Write until the queue is empty or the socket is full. One caller writes at a time; the others leave
    /// their messages to it.
    fn write_queued(&self) -> Progress {
        loop {
            let Some(mut writer) = self.writer.try_lock() else { return Progress::Drained };
            loop {
                writer.take(&mut self.queue.lock());
                if writer.batch.is_empty() {
                    break;
                }
                match writer.write(self.socket.fd.get_ref()) {
                    Ok(()) => {}
                    Err(e) if e.kind() == ErrorKind::WouldBlock => return Progress::Blocked,
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    Err(_) => {
                        drop(writer);
                        self.close();
                        return Progress::Drained;
                    }
                }
            }
            drop(writer);
            // A message queued between the last look and the unlock has found the writer taken.
            if self.queue.lock().is_empty() {
                return Progress::Drained;
            }
        }
    }
}

impl Link for TcpLink {
    fn send(&self, mut message: Outgoing, flush: Flush) {
        let mut staging = None;
        if let Some(memory) = &self.memory {
            memory.release();
            staging = memory.stage(&mut message);
        }
        {
            let mut queue = self.queue.lock();
            if self.is_closed() {
                return;
            }
            if let Some(memory) = &self.memory {
                memory.refer(&mut message, staging.as_mut());
            }
            queue.push_back(message);
        }
        match flush {
            Flush::Now => self.flush(),
            Flush::Soon => self.wake_writer.notify_one(),
            Flush::Batch => {}
        }
        if let (Some(memory), Some(staging)) = (&self.memory, &staging) {
            memory.copy_staged(staging);
        }
    }

    fn flush(&self) {
        if self.write_queued() == Progress::Blocked {
            self.wake_writer.notify_one();
        }
    }

    fn close(&self) {
        let dropped = {
            let mut queue = self.queue.lock();
            self.closed.store(true, Ordering::Release);
            std::mem::take(&mut *queue)
        };
        drop(dropped);
        self.socket.shutdown();
        if let Some(memory) = &self.memory {
            memory.end();
        }
        self.wake_writer.notify_one();
        self.incoming.wake_task();
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn incoming(&self) -> Option<Arc<Incoming>> {
        self.shared.then(|| self.incoming.clone())
    }

    fn shares_memory(&self) -> bool {
        self.memory.is_some()
    }

    fn sends_crcs(&self, payload: &[Region]) -> bool {
        self.memory.as_ref().is_some_and(|memory| memory.sends_crcs(payload))
    }
}

impl Writer {
    fn take(&mut self, queue: &mut VecDeque<Outgoing>) {
        if self.batch.is_empty() {
            std::mem::swap(&mut self.batch, queue);
        } else {
            self.batch.append(queue);
        }
    }

    /// One vectored send from the front of the batch.
    fn write(&mut self, stream: &TcpStream) -> io::Result<()> {
        let mut pieces = [IoSlice::new(&[]); PIECES_MAX];
        let mut count = 0;
        let mut skip = self.offset;
        'gather: for message in &self.batch {
            for piece in message.pieces() {
                if skip >= piece.len() {
                    skip -= piece.len();
                    continue;
                }
                pieces[count] = IoSlice::new(&piece[skip..]);
                skip = 0;
                count += 1;
                if count == PIECES_MAX {
                    break 'gather;
                }
            }
            if let Some(slot) = &message.landing {
                slot.mark_sent();
            }
        }
        let sent = SockRef::from(stream).send_vectored_with_flags(&pieces[..count], libc::MSG_NOSIGNAL)?;
        self.offset += sent;
        while let Some(first) = self.batch.front() {
            let bytes = first.bytes();
            if self.offset < bytes {
                break;
            }
            self.offset -= bytes;
            self.batch.pop_front();
        }
        Ok(())
    }
}

/// Ends the connection when the reading task ends for whatever reason, a panic included.
struct ClosedGuard<E: Endpoint> {
    link: Arc<TcpLink>,
    endpoint: Arc<E>,
    reason: Option<Error>,
}

impl<E: Endpoint> Drop for ClosedGuard<E> {
    fn drop(&mut self) {
        self.link.close();
        self.link.incoming.stop();
        let reason = self.reason.take().unwrap_or_else(|| Error::new(Code::Unavailable, "the connection was ended"));
        self.endpoint.closed(&reason);
    }
}

struct Reader {
    link: Arc<TcpLink>,
    buf: Box<[u8]>,
    start: usize,
    end: usize,
    /// How far the next read may fill the buffer.
    read_ahead: usize,
    stall: Pin<Box<Sleep>>,
    last_progress: Instant,
}

impl Reader {
    fn new(link: Arc<TcpLink>) -> Self {
        let stall = Box::pin(tokio::time::sleep(Duration::from_millis(STALL_TIMEOUT_MS)));
        let buf = vec![0u8; READ_BUFFER_BYTES].into_boxed_slice();
        let last_progress = Instant::now();
        Self { link, buf, start: 0, end: 0, read_ahead: READ_BUFFER_BYTES, stall, last_progress }
    }

    /// Read messages until the connection ends; returns why.
    async fn run<E: Endpoint>(&mut self, endpoint: &Arc<E>) -> Error {
        loop {
            if let Err(error) = self.message(endpoint).await {
                return error;
            }
        }
    }

    async fn message<E: Endpoint>(&mut self, endpoint: &Arc<E>) -> Result<()> {
        self.buffer(HEADER_BYTES).await?;
        let head = self.buf[self.start..].first_chunk().expect("a whole header is buffered");
        let (header, references) = self.link.parse(head).inspect_err(|e| endpoint.refused(None, e))?;
        header.check_limits(Limits::AUTHENTICATED).inspect_err(|e| endpoint.refused(Some(&header), e))?;
        self.start += HEADER_BYTES;
        // Whoever answers has copied what it was sent.
        self.link.memory.iter().for_each(|memory| memory.release());
        let mut admitted = std::pin::pin!(endpoint.admit());
        let mut flushed = false;
        poll_fn(|cx| {
            let polled = admitted.as_mut().poll(cx);
            if polled.is_pending() && !std::mem::replace(&mut flushed, true) {
                self.link.flush();
            }
            polled
        })
        .await;
        let body = self.body(header.body_bytes as usize).await?;
        let mut landing = endpoint.place(&header, &body)?;
        match references {
            Some(references) => self.references(references, header.payload_bytes as usize, &mut landing).await?,
            None => self.payload(header.payload_bytes as usize, &mut landing).await?,
        }
        endpoint.deliver(header, body, landing);
        Ok(())
    }

    async fn body(&mut self, bytes: usize) -> Result<Bytes> {
        if bytes <= READ_BUFFER_BYTES {
            self.buffer(bytes).await?;
            let body = Bytes::copy_from_slice(&self.buf[self.start..self.start + bytes]);
            self.start += bytes;
            return Ok(body);
        }
        let mut body = vec![0u8; bytes];
        let mut at = self.end - self.start;
        body[..at].copy_from_slice(&self.buf[self.start..self.end]);
        (self.start, self.end) = (0, 0);
        while at < bytes {
            at += self.read(true, |stream, _| read_once(stream, &mut body[at..])).await?;
        }
        Ok(body.into())
    }

    /// Read what stands for a payload, and copy the payload from the peer's memory to where it belongs.
    async fn references<L: Landing>(&mut self, kind: References, payload_bytes: usize, landing: &mut L) -> Result<()> {
        let bytes = kind.count as usize * Reference::BYTES;
        self.buffer(bytes).await?;
        let wire = &self.buf[self.start..self.start + bytes];
        let (wire, crcs) = wire.split_at(if kind.crcs { bytes - Reference::BYTES } else { bytes });
        let references = Reference::decode_all(wire, payload_bytes)?;
        let crcs = kind.crcs.then(|| Reference::decode(crcs));
        self.start += bytes;
        // Nothing that can leave waits for the copy.
        self.link.flush();
        let memory = self.link.memory.as_ref().expect("references are parsed with shared memory only");
        memory.receive(&references, crcs, kind.copying, landing).await
    }

    /// Move `remaining` payload bytes to where they belong: first what is buffered, then straight from the socket.
    async fn payload<L: Landing>(&mut self, mut remaining: usize, landing: &mut L) -> Result<()> {
        self.read_ahead = if remaining >= LARGE_PAYLOAD_BYTES { READ_AHEAD_BYTES } else { READ_BUFFER_BYTES };
        while remaining > 0 {
            let moved = if self.start < self.end {
                self.payload_from_buffer(remaining, landing)
            } else {
                self.payload_from_socket(remaining, landing).await?
            };
            landing.advance(moved);
            remaining -= moved;
        }
        Ok(())
    }

    fn payload_from_buffer<L: Landing>(&mut self, remaining: usize, landing: &mut L) -> usize {
        let bytes = remaining.min(self.end - self.start);
        let source = &self.buf[self.start..self.start + bytes];
        let copied = landing.fill(bytes, &mut [], &mut |windows| Ok(scatter(source, windows)));
        // A landing that nobody wants any more swallows the bytes.
        let moved = copied.map_or(bytes, |n| n.expect("copying within memory cannot fail"));
        self.start += moved;
        moved
    }

    async fn payload_from_socket<L: Landing>(&mut self, remaining: usize, landing: &mut L) -> Result<usize> {
        (self.start, self.end) = (0, 0);
        let ahead = self.read_ahead;
        let n = self
            .read(true, |mut stream, buf| {
                let mut room = 0;
                let io = &mut |windows: &mut [IoSliceMut<'_>]| {
                    room = windows.iter().map(|window| window.len()).sum();
                    stream.read_vectored(windows)
                };
                match landing.fill(remaining, &mut buf[..ahead], io) {
                    Some(result) => Ok(Taken { bytes: result?, room }),
                    None => read_once(stream, &mut buf[..remaining.min(READ_BUFFER_BYTES)]),
                }
            })
            .await?;
        self.end = n.saturating_sub(remaining);
        Ok(n.min(remaining))
    }

    /// Have at least `bytes` (at most the buffer's size) in the buffer.
    async fn buffer(&mut self, bytes: usize) -> Result<()> {
        if self.start + bytes > self.buf.len() || self.start == self.end {
            self.buf.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        while self.end - self.start < bytes {
            let (end, limit) = (self.end, (self.start + bytes.max(self.read_ahead)).min(self.buf.len()));
            let within_frame = self.end > self.start || bytes != HEADER_BYTES;
            self.end += self.read(within_frame, |stream, buf| read_once(stream, &mut buf[end..limit])).await?;
        }
        Ok(())
    }

    /// One read that returns at least a byte. Before it everything queued is sent, so that answers leave together
    /// but never wait behind more input. Within a frame the wait is bounded.
    async fn read(
        &mut self,
        within_frame: bool,
        mut io: impl FnMut(&TcpStream, &mut [u8]) -> io::Result<Taken>,
    ) -> Result<usize> {
        self.link.flush();
        loop {
            self.readable(within_frame).await?;
            match io(self.link.socket.fd.get_ref(), &mut self.buf) {
                Ok(Taken { bytes: 0, .. }) => {
                    return Err(Error::new(Code::Unavailable, "the peer closed the connection"));
                }
                Ok(taken) => {
                    // A short read has emptied the socket: waiting for the next event saves a fruitless read.
                    if taken.bytes < taken.room {
                        self.link.incoming.emptied();
                    }
                    self.last_progress = Instant::now();
                    return Ok(taken.bytes);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.link.incoming.emptied(),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(broken(&e)),
            }
        }
    }

    /// Wait until whoever polls this has seen that something may have come.
    async fn readable(&mut self, within_frame: bool) -> Result<()> {
        poll_fn(|cx| {
            if self.link.incoming.is_readable() {
                return Poll::Ready(Ok(()));
            }
            while within_frame && self.stall.as_mut().poll(cx).is_ready() {
                let due = self.last_progress + Duration::from_millis(STALL_TIMEOUT_MS);
                if due <= Instant::now() {
                    return Poll::Ready(Err(Error::new(
                        Code::Unavailable,
                        "the peer stopped in the middle of a frame",
                    )));
                }
                self.stall.as_mut().reset(due);
            }
            Poll::Pending
        })
        .await
    }
}

/// Result of one read: how much came, and how much could have come.
struct Taken {
    bytes: usize,
    room: usize,
}

fn read_once(mut stream: &TcpStream, buf: &mut [u8]) -> io::Result<Taken> {
    Ok(Taken { bytes: stream.read(buf)?, room: buf.len() })
}

/// Copy `source` into the windows in order; returns how much fitted.
pub(crate) fn scatter(source: &[u8], windows: &mut [IoSliceMut<'_>]) -> usize {
    let mut at = 0;
    for window in windows {
        let n = window.len().min(source.len() - at);
        fs3_core::copy(&mut window[..n], &source[at..at + n]);
        at += n;
    }
    at
}

/// The error of calls on a connection that broke.
pub(crate) fn broken(error: &io::Error) -> Error {
    Error::new(Code::Unavailable, format!("the connection broke: {error}"))
}
