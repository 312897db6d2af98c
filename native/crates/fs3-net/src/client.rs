use crate::REQUESTS_IN_FLIGHT_MAX;
use crate::blocking;
use crate::crcs::Crcs;
use crate::hello::Hello;
use crate::incoming::Incoming;
use crate::link::{Endpoint, Fill, Flush, Landing, Link, Outgoing, Way, Windows};
use crate::rdma::{Mode, RdmaLink, Ready};
use crate::shm::{self, SharedMemory};
use crate::sim;
use crate::tcp::{Socket, TcpLink};
use bytes::Bytes;
use fs3_core::{CRC_BLOCK_BYTES, Code, Error, Region, RegionMut, Result};
use fs3_proto::frame::{BODY_BYTES_MAX, HEADER_BYTES, Header, Kind, Limits, PAYLOAD_BYTES_MAX, error_from_response};
use fs3_proto::v1::{HelloRequest, HelloResponse, Method, RdmaEnd, Role, ShareMemoryRequest, SharedMemoryOffer};
use parking_lot::Mutex;
use prost::Message;
use std::collections::HashMap;
use std::future::poll_fn;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Waker};
use std::time::Duration;
use tokio::sync::Semaphore;

/// How long the first message by RDMA may take before TCP is used instead.
const RDMA_TRIAL: Duration = Duration::from_secs(1);

/// Where the payload of a response goes: window i receives segment i from its start.
pub struct Sink {
    /// Memory for the segments, at least one window per segment.
    pub windows: Vec<RegionMut>,
    /// Reads the segments' lengths off the response body. Their sum is the payload's length and each fits its
    /// window; a response that breaks this fails the call with `Protocol`.
    pub lengths: fn(&[u8]) -> Result<Vec<usize>>,
}

impl Sink {
    /// For calls whose response has no payload.
    pub fn none() -> Self {
        Self { windows: Vec::new(), lengths: |_| Ok(Vec::new()) }
    }
}

/// What is sent with a request. Must not be modified until the call returns.
#[derive(Default)]
pub struct Payload {
    /// It is their concatenation.
    pub pieces: Vec<Region>,
    /// Whether its checksums are to go with it where the transport makes them without reading it once more
    /// ([`crate::Request::sent_crcs`]). See [`Connection::sends_crcs`].
    pub with_crcs: bool,
}

impl From<Vec<Region>> for Payload {
    fn from(pieces: Vec<Region>) -> Self {
        Self { pieces, with_crcs: false }
    }
}

/// A successful response.
pub struct Reply {
    /// The encoded response message.
    pub body: Bytes,
    /// The sink's windows; bytes beyond a segment's length are untouched.
    pub windows: Vec<RegionMut>,
    /// Length of the segment in each window, 0 where there was none.
    pub lengths: Vec<usize>,
    /// CRC32C of each [`CRC_BLOCK_BYTES`] of the segments, little-endian one after another, made of the windows while
    /// they were filled; a segment begins with a block of its own.
    pub crcs: Vec<u8>,
}

impl Reply {
    /// The checksums of each segment.
    pub fn segment_crcs(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = &self.crcs[..];
        self.lengths.iter().map(move |length| {
            let (crcs, others) = rest.split_at(4 * length.div_ceil(CRC_BLOCK_BYTES));
            rest = others;
            crcs
        })
    }
}

/// A client connection to one server. Cheap to clone; the connection ends when the last clone is dropped.
/// Calls may be made from any thread and are answered out of order.
#[derive(Clone)]
pub struct Connection(Arc<Handle>);

struct Handle {
    endpoint: Arc<Caller>,
    permits: Semaphore,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.endpoint.link.close();
    }
}

impl Connection {
    /// Connect to `host:port` and say hello, all within `timeout`. Must run on the runtime that will drive the
    /// connection.
    ///
    /// # Errors
    /// `Unavailable` when nobody listens there or the connection broke, `Timeout`, or why the server refused the
    /// hello (`Unauthenticated`, `WrongCluster`, `Protocol`).
    pub async fn connect(addr: &str, hello: &Hello, timeout: Duration) -> Result<(Self, HelloResponse)> {
        match fs3_rt::timeout(timeout, Self::connect_and_greet(addr, hello, timeout)).await {
            Ok(result) => result,
            Err(_) => Err(Error::new(Code::Timeout, format!("connecting to {addr} took longer than {timeout:?}"))),
        }
    }

    async fn connect_and_greet(addr: &str, hello: &Hello, timeout: Duration) -> Result<(Self, HelloResponse)> {
        if fs3_rt::is_simulated() {
            let (end, welcome) = sim::connect(addr, hello).await?;
            let endpoint = end.start(|link| Arc::new(Caller::new(link)));
            return Ok((Self::new(endpoint), welcome));
        }
        let hello_request = hello.to_request(addr);
        let (connection, welcome) = Self::connect_socket(addr, hello, &hello_request, timeout).await?;
        if connection.rdma_device().is_none() {
            return Ok((connection, welcome));
        }
        // The ends are connected; whether packets get through shows only now.
        let trial = timeout.min(RDMA_TRIAL);
        match connection.call(Method::Ping, (), Vec::new(), Sink::none(), trial).await {
            Ok(_) => Ok((connection, welcome)),
            Err(error) => {
                drop(connection);
                hello.transport.avoid(addr, welcome.rdma_port, &error);
                let plain = HelloRequest { rdma_ports: Vec::new(), ..hello_request };
                Self::connect_socket(addr, hello, &plain, timeout).await
            }
        }
    }

    /// Connect a socket, say hello on it and make a connection of it, by RDMA when both ends want that.
    async fn connect_socket(
        addr: &str,
        hello: &Hello,
        hello_request: &HelloRequest,
        timeout: Duration,
    ) -> Result<(Self, HelloResponse)> {
        let unreachable = |e: std::io::Error| Error::new(Code::Unavailable, format!("cannot connect to {addr}: {e}"));
        let stream = tokio::net::TcpStream::connect(addr).await.map_err(unreachable)?;
        let socket = Socket::new(stream.into_std().map_err(unreachable)?).map_err(unreachable)?;
        let body = ask(&socket, Method::Hello, hello_request, timeout).await?;
        let welcome = HelloResponse::decode(body)
            .map_err(|_| Error::new(Code::Protocol, format!("the hello of {addr} cannot be read")))?;
        let caller = |link| Arc::new(Caller::new(link));
        let memory = match &welcome.shared_memory {
            Some(offer) => share_memory(&socket, hello, offer, timeout).await?,
            None => None,
        };
        let connected = match &welcome.rdma_end {
            Some(end) => connect_rdma(&socket, hello, welcome.rdma_port, end, timeout).await,
            None => Err(Error::new(Code::Unavailable, "the server has no RDMA that this machine can reach")),
        };
        match connected {
            Ok((ready, receives)) => {
                let endpoint = RdmaLink::start(socket, ready, receives, |link| caller(link));
                return Ok((Self::new(endpoint), welcome));
            }
            Err(error) if hello.transport.mode() == Mode::Rdma && welcome.role == Role::Storage as i32 => {
                let message = format!("no RDMA with {addr}, and transport = \"rdma\": {}", error.message);
                return Err(Error::new(Code::Unavailable, message));
            }
            Err(error) if welcome.rdma_end.is_some() => hello.transport.avoid(addr, welcome.rdma_port, &error),
            Err(_) => {}
        }
        let endpoint = TcpLink::start_shared(socket, memory, |link| caller(link)).map_err(unreachable)?;
        Ok((Self::new(endpoint), welcome))
    }

    /// The device, when messages travel by RDMA.
    pub fn rdma_device(&self) -> Option<&str> {
        self.0.endpoint.link.rdma_device()
    }

    /// How messages travel.
    pub fn way(&self) -> Way {
        self.0.endpoint.link.way()
    }

    fn new(endpoint: Arc<Caller>) -> Self {
        Self(Arc::new(Handle { endpoint, permits: Semaphore::new(REQUESTS_IN_FLIGHT_MAX) }))
    }

    /// Make one call and wait for its response.
    ///
    /// The response's payload goes straight into the sink's windows. A call that is given up (its future dropped, or timed
    /// out) drops the windows: at once with TCP, with RDMA as soon as the peer cannot write to them any more. So
    /// memory behind a window is free when its owner is dropped.
    ///
    /// # Errors
    /// What the peer answered; `Unavailable` when the connection broke and `Timeout` when no response came, both with
    /// `maybe_applied` when the request may have left; `MessageTooBig`; `Protocol` when the response does not
    /// fit the sink.
    pub async fn call(
        &self,
        method: Method,
        body: impl Message,
        payload: impl Into<Payload>,
        sink: Sink,
        timeout: Duration,
    ) -> Result<Reply> {
        let caller = &self.0.endpoint;
        let (header, mut message) = request(method, timeout, &body, payload.into())?;
        drop(body);
        let slot = Arc::new(Slot::new(sink));
        let waited = async {
            let _permit = self.0.permits.acquire().await.expect("the semaphore is never closed");
            let (id, others) = caller.register(&slot)?;
            let _cancel = CancelOnDrop { caller, slot: &slot, id };
            let header = Header { request_id: id, ..header };
            message.head[..HEADER_BYTES].copy_from_slice(&header.encode());
            message.landing = Some(slot.clone());
            caller.link.send(message, if others { Flush::of_this_thread() } else { Flush::Now });
            caller.incoming.iter().for_each(blocking::wants);
            poll_fn(|cx| slot.poll(cx.waker())).await
        };
        match fs3_rt::timeout(timeout, waited).await {
            Ok(result) => result,
            Err(_) => {
                let message = format!("no answer to {} within {timeout:?}", method.as_str_name());
                let error = Error::new(Code::Timeout, message);
                Err(if slot.was_sent() { error.maybe_applied() } else { error })
            }
        }
    }

    /// Whether the connection has ended; calls fail with `Unavailable` then.
    pub fn is_closed(&self) -> bool {
        self.0.endpoint.link.is_closed()
    }

    /// Whether this payload would go with its checksums if asked to. It may still go without, when much is sent at a time.
    pub fn sends_crcs(&self, pieces: &[Region]) -> bool {
        self.0.endpoint.link.sends_crcs(pieces)
    }

    /// Calls that wait for an answer now.
    pub fn in_flight(&self) -> usize {
        self.0.endpoint.pending.lock().slots.len()
    }
}

/// One request before there is a link.
async fn ask(socket: &Socket, method: Method, body: &impl Message, timeout: Duration) -> Result<Bytes> {
    let (header, mut request) = request(method, timeout, body, Payload::default())?;
    request.head[..HEADER_BYTES].copy_from_slice(&header.encode());
    socket.write_all(&request.head).await?;
    let (header, body) = socket.read_frame(Limits::UNAUTHENTICATED).await;
    let body = body?;
    let header = header.expect("a frame that was read has a header");
    if header.status != 0 {
        return Err(error_from_response(header.status, &body));
    }
    Ok(body)
}

/// Make the end that the server wants to talk to, and tell it. Returns also how many messages the server takes.
async fn connect_rdma(
    socket: &Socket,
    hello: &Hello,
    port: u32,
    end: &RdmaEnd,
    timeout: Duration,
) -> Result<(Ready, u32)> {
    let ready = hello.transport.prepare(port as usize, end).await;
    // A server that has offered an end waits for an answer in any case.
    let own = ready.as_ref().map_or_else(|_| RdmaEnd::default(), Ready::end);
    let answer = ask(socket, Method::RdmaConnect, &own, timeout).await;
    let ready = ready?;
    answer?;
    Ok((ready, end.receives))
}

/// Take a server's offer of shared memory, and tell it; `None` when either end cannot.
async fn share_memory(
    socket: &Socket,
    hello: &Hello,
    offer: &SharedMemoryOffer,
    timeout: Duration,
) -> Result<Option<SharedMemory>> {
    let Some(counters) = hello.transport.shared_memory().cloned() else {
        return Err(Error::new(Code::Protocol, "the server offers shared memory that was not asked for"));
    };
    let offer = offer.clone();
    let fetched = tokio::task::spawn_blocking(move || shm::fetch(&offer, counters)).await;
    let fetched = fetched.map_err(|e| Error::new(Code::Internal, e.to_string()))?;
    let answer = ask(socket, Method::ShareMemory, &ShareMemoryRequest { ready: fetched.is_ok() }, timeout).await;
    match (fetched, answer) {
        (Ok(shared), Ok(_)) => Ok(Some(shared)),
        (_, Err(error)) if error.code == Code::Unavailable => Err(error),
        (fetched, _) => {
            let why = fetched.err().map_or_else(|| "the server could not".to_owned(), |error| error.to_string());
            tracing::debug!("no shared memory with a server, using TCP: {why}");
            Ok(None)
        }
    }
}

/// A request without its id: the header is encoded into the first bytes of `head` when the id is known.
fn request(
    method: Method,
    timeout: Duration,
    body: &impl Message,
    Payload { pieces: payload, with_crcs }: Payload,
) -> Result<(Header, Outgoing)> {
    let body_bytes = body.encoded_len();
    let payload_bytes: usize = payload.iter().map(|piece| piece.len()).sum();
    if body_bytes > BODY_BYTES_MAX || payload_bytes > PAYLOAD_BYTES_MAX {
        let message = format!("a request of {body_bytes} + {payload_bytes} bytes is over the limit of a frame");
        return Err(Error::new(Code::MessageTooBig, message));
    }
    let header = Header {
        kind: Kind::Request,
        request_id: 0,
        method: method as u16,
        status: 0,
        deadline_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX).max(1),
        body_bytes: body_bytes as u32,
        payload_bytes: payload_bytes as u32,
    };
    let mut head = Vec::with_capacity(HEADER_BYTES + body_bytes);
    head.resize(HEADER_BYTES, 0);
    body.encode(&mut head).expect("a vector grows as needed");
    let (body, segments) = (Bytes::new(), Vec::new());
    Ok((header, Outgoing { head, body, payload, with_crcs, segments, landing: None, permit: None }))
}

/// Where one call waits for its response.
///
/// It owns the windows until the call is over: whoever writes into them holds the lock, and a cancelled call takes them
/// away under that lock, so that the receiving task cannot write to them afterwards.
pub(crate) struct Slot {
    state: Mutex<SlotState>,
    sent: AtomicBool,
}

struct SlotState {
    /// `None` when the call is over.
    sink: Option<Sink>,
    result: Option<Result<Reply>>,
    waker: Option<Waker>,
}

impl Slot {
    fn new(sink: Sink) -> Self {
        let state = SlotState { sink: Some(sink), result: None, waker: None };
        Self { state: Mutex::new(state), sent: AtomicBool::new(false) }
    }

    /// The request begins to leave: from now on the peer may act on it.
    pub fn mark_sent(&self) {
        self.sent.store(true, Ordering::Relaxed);
    }

    fn was_sent(&self) -> bool {
        self.sent.load(Ordering::Relaxed)
    }

    fn poll(&self, waker: &Waker) -> Poll<Result<Reply>> {
        let mut state = self.state.lock();
        if let Some(result) = state.result.take() {
            return Poll::Ready(result);
        }
        match &mut state.waker {
            Some(known) => known.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
        Poll::Pending
    }

    /// End the call with what `finish` makes of the sink, unless it is over already.
    fn finish(&self, finish: impl FnOnce(Sink) -> Result<Reply>) {
        let waker = {
            let mut state = self.state.lock();
            let Some(sink) = state.sink.take() else { return };
            state.result = Some(finish(sink));
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// End the call; its windows.
    fn cancel(&self) -> Vec<RegionMut> {
        self.state.lock().sink.take().map_or_else(Vec::new, |sink| sink.windows)
    }

    /// Start and length of the windows.
    pub fn windows(&self) -> Vec<(usize, usize)> {
        let state = self.state.lock();
        let windows = state.sink.iter().flat_map(|sink| &sink.windows);
        windows.map(|window| (window.as_ptr() as usize, window.len())).collect()
    }

    /// Lengths of the segments that the response will bring, one per window.
    fn plan(&self, body: &[u8], payload_bytes: usize) -> Result<Vec<usize>> {
        let state = self.state.lock();
        let Some(sink) = &state.sink else { return Ok(Vec::new()) };
        let mut lengths = (sink.lengths)(body)?;
        let fits = lengths.len() <= sink.windows.len()
            && lengths.iter().zip(&sink.windows).all(|(&length, window)| length <= window.len())
            && lengths.iter().sum::<usize>() == payload_bytes;
        if !fits {
            return Err(Error::new(Code::Protocol, "the payload of a response does not fit what was asked for"));
        }
        lengths.resize(sink.windows.len(), 0);
        Ok(lengths)
    }
}

/// Removes a call that is dropped before its answer.
struct CancelOnDrop<'a> {
    caller: &'a Caller,
    slot: &'a Slot,
    id: u64,
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        self.caller.take(self.id);
        let windows = self.slot.cancel();
        if !windows.is_empty() {
            self.caller.link.abandon(self.id, windows);
        }
    }
}

/// The receiving side of a client connection.
struct Caller {
    link: Arc<dyn Link>,
    /// Where threads may receive.
    incoming: Option<Arc<Incoming>>,
    pending: Mutex<Pending>,
}

#[derive(Default)]
struct Pending {
    id_last: u64,
    closed: Option<Error>,
    slots: HashMap<u64, Arc<Slot>, BuildHasherDefault<IdHasher>>,
}

impl Caller {
    fn new(link: Arc<dyn Link>) -> Self {
        Self { incoming: link.incoming(), link, pending: Mutex::default() }
    }

    /// A fresh request id for the slot, and whether other calls are waiting.
    fn register(&self, slot: &Arc<Slot>) -> Result<(u64, bool)> {
        let mut pending = self.pending.lock();
        if let Some(error) = &pending.closed {
            return Err(error.clone());
        }
        pending.id_last += 1;
        let (id, others) = (pending.id_last, !pending.slots.is_empty());
        pending.slots.insert(id, slot.clone());
        if let Some(incoming) = &self.incoming {
            incoming.begin(blocking::is_blocking());
        }
        Ok((id, others))
    }

    /// The call is over, if it was not.
    fn take(&self, id: u64) {
        let taken = self.pending.lock().slots.remove(&id);
        if let (Some(_), Some(incoming)) = (taken, &self.incoming) {
            incoming.end();
        }
    }
}

/// Where the payload of one response goes.
struct ReplyLanding {
    /// `None`: nobody waits for this response any more.
    slot: Option<Arc<Slot>>,
    plan: Result<Vec<usize>>,
    /// Next byte to fill: window and offset in it.
    window: usize,
    offset: usize,
    crcs: Crcs,
}

impl Landing for ReplyLanding {
    fn fill(&mut self, bytes: usize, tail: &mut [u8], io: Fill<'_>) -> Option<std::io::Result<usize>> {
        let lengths = self.plan.as_ref().ok()?;
        let mut state = self.slot.as_ref()?.state.lock();
        let sink = state.sink.as_mut()?;
        let mut windows = Windows::new();
        let (mut offset, mut room) = (self.offset, 0);
        let mut complete = true;
        for (window, &length) in sink.windows.iter_mut().zip(lengths).skip(self.window) {
            if length > offset {
                if room >= bytes || !windows.push(&mut window[offset..length]) {
                    complete = false;
                    break;
                }
                room += length - offset;
            }
            offset = 0;
        }
        Some(windows.run(complete, tail, io))
    }

    fn advance(&mut self, mut bytes: usize) {
        let Ok(lengths) = &self.plan else { return };
        let mut state = self.slot.as_ref().map(|slot| slot.state.lock());
        let mut sink = state.as_mut().and_then(|state| state.sink.as_mut());
        while let Some(&length) = lengths.get(self.window) {
            let step = bytes.min(length - self.offset);
            self.offset += step;
            bytes -= step;
            // Of a call that is over nobody asks for them.
            if let Some(sink) = &mut sink {
                self.crcs.follow(&sink.windows[self.window][..self.offset], self.offset == length);
            }
            if self.offset < length {
                return;
            }
            self.window += 1;
            self.offset = 0;
        }
    }

    fn put(&mut self, window: usize, bytes: &[u8]) {
        let (Ok(lengths), Some(slot)) = (&self.plan, &self.slot) else { return };
        let Some(&length) = lengths.get(window) else { return };
        if let Some(sink) = &mut slot.state.lock().sink {
            sink.windows[window][..length].copy_from_slice(&bytes[..length]);
        }
    }

    fn refuse(&mut self, error: Error) {
        if self.plan.is_ok() {
            self.plan = Err(error);
        }
    }
}

impl Endpoint for Caller {
    type Landing = ReplyLanding;

    async fn admit(&self) {}

    fn place(&self, header: &Header, body: &[u8]) -> Result<ReplyLanding> {
        let slot = {
            let pending = self.pending.lock();
            if header.kind != Kind::Response || header.request_id > pending.id_last {
                return Err(Error::new(Code::Protocol, "the peer answered a question that was never asked"));
            }
            pending.slots.get(&header.request_id).cloned()
        };
        let plan = match &slot {
            Some(slot) if header.status == 0 => slot.plan(body, header.payload_bytes as usize),
            _ => Ok(Vec::new()),
        };
        Ok(ReplyLanding { slot, plan, window: 0, offset: 0, crcs: Crcs::default() })
    }

    fn deliver(self: &Arc<Self>, header: Header, body: Bytes, landing: ReplyLanding) {
        self.take(header.request_id);
        let Some(slot) = landing.slot else { return };
        slot.finish(|sink| {
            let lengths = match landing.plan {
                _ if header.status != 0 => return Err(error_from_response(header.status, &body)),
                planned => planned?,
            };
            let crcs = landing.crcs.of(lengths.iter().sum());
            let crcs = crcs.ok_or_else(|| Error::new(Code::Protocol, "a response came without all of its payload"))?;
            Ok(Reply { body, windows: sink.windows, lengths, crcs })
        });
    }

    fn refused(&self, _header: Option<&Header>, _error: &Error) {}

    fn closed(&self, error: &Error) {
        let error = Error::new(Code::Unavailable, error.message.clone());
        let slots = {
            let mut pending = self.pending.lock();
            pending.closed = Some(error.clone());
            std::mem::take(&mut pending.slots)
        };
        for slot in slots.into_values() {
            let sent = slot.was_sent();
            slot.finish(|_| Err(if sent { error.clone().maybe_applied() } else { error.clone() }));
        }
    }
}

/// Request ids count upwards, so multiplying spreads them well enough.
#[derive(Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("only u64 keys are hashed")
    }
    fn write_u64(&mut self, id: u64) {
        self.0 = id.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }
}
