use crate::crcs::Crcs;
use crate::hello::{HelloPolicy, PeerInfo, SHARED_MEMORY};
use crate::link::{Endpoint, Fill, Flush, Landing, Link, Outgoing, Way, Windows};
use crate::rdma::{RdmaLink, Ready, Transport, decode_end};
use crate::shm::{Offer, SharedMemory};
use crate::sim;
use crate::tcp::{Socket, TcpLink};
use crate::{CONNECTIONS_MAX, HELLO_TIMEOUT_MS, REQUESTS_IN_FLIGHT_MAX, UNAUTHENTICATED_CONNECTIONS_MAX};
use bytes::Bytes;
use fs3_core::{Code, Error, Region, RegionMut, Result};
use fs3_proto::frame::{BODY_BYTES_MAX, Header, Kind, Limits, PAYLOAD_BYTES_MAX, error_to_detail};
use fs3_proto::v1::{Method, ShareMemoryRequest};
use fs3_rt::Instant;
use parking_lot::Mutex;
use prost::Message;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};

/// A request's deadline when it names none.
const DEADLINE_MS_DEFAULT: u32 = 30_000;
/// Pause after the system refused to accept (out of file descriptors).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// One request as a service sees it.
pub struct Request {
    /// Who asks.
    pub peer: PeerInfo,
    /// What is asked.
    pub method: Method,
    /// When the requester stops waiting.
    pub deadline: Instant,
    /// The encoded request message.
    pub body: Bytes,
    /// The payload, in the memory that [`Service::payload_buffer`] gave; empty when it is in `parts`.
    pub payload: Region,
    /// The payload in the memory that [`Service::payload_parts`] gave, if it did.
    pub parts: Vec<Region>,
    /// CRC32C of each [`CRC_BLOCK_BYTES`] of the payload, little-endian one after another, made while it came; each of the
    /// parts begins with a block of its own. Only for [`Service::wants_crcs`], and not by every transport.
    pub payload_crcs: Option<Bytes>,
    /// The same as the requester made them, when they came with the payload.
    pub sent_crcs: Option<Bytes>,
}

/// What a service answers.
#[derive(Default)]
pub struct Response {
    /// The encoded response message.
    pub body: Bytes,
    /// Pieces of the payload; must not be modified while any clone of them lives.
    pub payload: Vec<Region>,
    /// Lengths of the payload's segments, each for one window of the caller; empty: it is one.
    pub segments: Vec<u32>,
}

impl Response {
    /// A response without payload.
    pub fn new(message: &impl Message) -> Self {
        Self { body: message.encode_to_vec().into(), ..Self::default() }
    }

    /// A response whose payload's pieces make segments of these lengths.
    pub fn with_payload(message: &impl Message, payload: Vec<Region>, segments: Vec<u32>) -> Self {
        Self { payload, segments, ..Self::new(message) }
    }
}

/// What a server serves. `Ping` and `Hello` are answered by the server itself.
pub trait Service: Send + Sync + 'static {
    /// Memory of exactly `bytes` bytes for an incoming payload, from a pool. `None` refuses the request with
    /// `Busy`; its payload is then read and thrown away. Must not block.
    fn payload_buffer(&self, method: Method, bytes: usize) -> Option<RegionMut>;

    /// Memory for an incoming payload in parts, whose lengths make `bytes`: for what is to be kept part by part. `None`:
    /// in one, as [`Service::payload_buffer`] says; by RDMA it always is. `body`: the encoded request message. Must not block.
    fn payload_parts(&self, method: Method, body: &[u8], bytes: usize) -> Option<Vec<RegionMut>> {
        let _ = (method, body, bytes);
        None
    }

    /// Whether checksums of the payload are to be made while it comes.
    fn wants_crcs(&self, method: Method) -> bool {
        let _ = method;
        false
    }

    /// Answer one request. The future is polled at once on the receiving task, and may go on later on a thread of another
    /// kind ([`fs3_rt::run_woken`]): it should not compute for more than some tens of microseconds at a time, nor block.
    /// It is dropped only when the runtime ends, never because the peer went away.
    fn handle(&self, request: Request) -> impl Future<Output = Result<Response>> + Send;
}

/// A listening server. Dropping it ends everything at once; [`Server::shutdown`] does so gently.
pub struct Server {
    shared: Arc<Shared>,
    local_addr: SocketAddr,
    accepting: Accepting,
}

/// What brings connections; ends when it is dropped.
enum Accepting {
    Tcp(tokio::task::AbortHandle),
    Simulated { _listening: sim::Listening },
    Ended,
}

impl Accepting {
    fn end(&mut self) {
        if let Self::Tcp(task) = std::mem::replace(self, Self::Ended) {
            task.abort();
        }
    }
}

struct Shared {
    policy: HelloPolicy,
    stopping: AtomicBool,
    in_flight: AtomicUsize,
    idle: Notify,
    /// Live connections by a running number.
    links: Mutex<BTreeMap<u64, Accepted>>,
    unauthenticated: Semaphore,
}

/// A connection and who is on its other side.
type Accepted = (Arc<dyn Link>, PeerInfo);

impl Server {
    /// Listen on `addr` (`host:port`, port 0 picks one) and serve on the current runtime.
    ///
    /// # Errors
    /// `Unavailable` when the address cannot be listened on.
    pub async fn bind<S: Service>(addr: &str, policy: HelloPolicy, service: Arc<S>) -> Result<Self> {
        let shared = Arc::new(Shared {
            policy,
            stopping: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            idle: Notify::new(),
            links: Mutex::default(),
            unauthenticated: Semaphore::new(UNAUTHENTICATED_CONNECTIONS_MAX),
        });
        if fs3_rt::is_simulated() {
            let (listening, local_addr) = listen_simulated(addr, shared.clone(), service)?;
            return Ok(Self { shared, local_addr, accepting: Accepting::Simulated { _listening: listening } });
        }
        let cannot = |e: std::io::Error| Error::new(Code::Unavailable, format!("cannot listen on {addr}: {e}"));
        let listener = tokio::net::TcpListener::bind(addr).await.map_err(cannot)?;
        let local_addr = listener.local_addr().map_err(cannot)?;
        let accepting = Accepting::Tcp(tokio::spawn(accept(listener, shared.clone(), service)).abort_handle());
        Ok(Self { shared, local_addr, accepting })
    }

    /// The address it listens on.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// A view of the server's connections, which may outlive it.
    pub fn connections(&self) -> Connections {
        Connections(self.shared.clone())
    }

    /// Stop accepting connections and requests (they are refused with `Unavailable`), wait up to `patience` for running
    /// handlers and their responses, then end all connections.
    pub async fn shutdown(mut self, patience: Duration) {
        self.accepting.end();
        self.shared.stopping.store(true, Ordering::SeqCst);
        let quiet = async {
            loop {
                let idle = self.shared.idle.notified();
                if self.shared.in_flight.load(Ordering::SeqCst) == 0 {
                    return;
                }
                idle.await;
            }
        };
        let _ = fs3_rt::timeout(patience, quiet).await;
    }
}

/// Who is connected to a server. Cheap to clone, thread-safe.
#[derive(Clone)]
pub struct Connections(Arc<Shared>);

impl Connections {
    /// Peers, in the order in which they came, and how their messages travel.
    pub fn list(&self) -> Vec<(PeerInfo, Way)> {
        let links = self.0.links.lock();
        links.values().map(|(link, peer)| (*peer, link.way())).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.end();
        self.shared.stopping.store(true, Ordering::SeqCst);
        let links = std::mem::take(&mut *self.shared.links.lock());
        for (link, _) in links.into_values() {
            link.close();
        }
    }
}

async fn accept<S: Service>(listener: tokio::net::TcpListener, shared: Arc<Shared>, service: Arc<S>) {
    let mut number = 0;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                number += 1;
                let over =
                    shared.links.lock().len() >= CONNECTIONS_MAX || shared.unauthenticated.available_permits() == 0;
                if !over {
                    tokio::spawn(welcome(stream, number, shared.clone(), service.clone()));
                }
            }
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

async fn welcome<S: Service>(stream: tokio::net::TcpStream, number: u64, shared: Arc<Shared>, service: Arc<S>) {
    let Ok(_permit) = shared.unauthenticated.try_acquire() else { return };
    let Ok(socket) = stream.into_std().and_then(Socket::new) else { return };
    let greeting = greet(&socket, &shared.policy);
    match tokio::time::timeout(Duration::from_millis(HELLO_TIMEOUT_MS), greeting).await {
        Ok(Ok((peer, Agreed::Rdma(ready, receives)))) => {
            RdmaLink::start(socket, *ready, receives, |link| Callee::begin(number, link, peer, service, &shared));
        }
        Ok(Ok((peer, Agreed::Tcp(memory)))) => {
            TcpLink::start(socket, memory, |link| Callee::begin(number, link, peer, service, &shared));
        }
        Ok(Err(error)) => tracing::debug!("a hello was refused: {error}"),
        Err(_) => tracing::debug!("a peer said no hello in time"),
    }
}

fn listen_simulated<S: Service>(
    addr: &str,
    shared: Arc<Shared>,
    service: Arc<S>,
) -> Result<(sim::Listening, SocketAddr)> {
    let policy = shared.policy.clone();
    let numbers = std::sync::atomic::AtomicU64::new(0);
    let accept = move |end: sim::End, peer: PeerInfo| {
        let number = numbers.fetch_add(1, Ordering::Relaxed) + 1;
        end.start(|link| Callee::begin(number, link, peer, service.clone(), &shared));
    };
    sim::listen(addr, policy, Box::new(accept))
}

/// How messages are to travel.
enum Agreed {
    Tcp(Option<SharedMemory>),
    /// With this end of a connection, and how many messages the peer takes.
    Rdma(Box<Ready>, u32),
}

/// Read the hello and answer it.
async fn greet(socket: &Socket, policy: &HelloPolicy) -> Result<(PeerInfo, Agreed)> {
    let (header, body) = socket.read_frame(Limits::UNAUTHENTICATED).await;
    let admitted = body.and_then(|body| match header {
        Some(h) if h.kind == Kind::Request && h.method == Method::Hello as u16 => policy.admit(&body),
        _ => Err(Error::new(Code::Unauthenticated, "the first request of a connection must be hello")),
    });
    let Some(header) = header else { return Err(admitted.expect_err("no frame was read")) };
    match admitted {
        Ok((peer, mut response, offered)) => {
            if offered.shared_memory
                && let Some(offer) = offer_memory(socket, &policy.transport)
            {
                (response.transport, response.shared_memory) = (SHARED_MEMORY.into(), Some(offer.to_wire()));
                socket.write_all(&answer(&header, Ok(Response::new(&response))).flat()).await?;
                return Ok((peer, Agreed::Tcp(share_memory(socket, policy, offer).await?)));
            }
            let ready = policy.transport.answer(&offered.rdma_ports);
            if let Some((ready, theirs)) = &ready {
                response.transport = "rdma".into();
                (response.rdma_port, response.rdma_end) = (*theirs as u32, Some(ready.end()));
            }
            socket.write_all(&answer(&header, Ok(Response::new(&response))).flat()).await?;
            match ready {
                Some((ready, _)) => Ok((peer, connect_rdma(socket, policy, ready).await?)),
                None => Ok((peer, Agreed::Tcp(None))),
            }
        }
        Err(error) => {
            socket.write_all(&answer(&header, Err(error.clone())).flat()).await?;
            socket.linger().await;
            Err(error)
        }
    }
}

/// What a client that seems to be on this host can get memory by.
fn offer_memory(socket: &Socket, transport: &Transport) -> Option<Offer> {
    transport.shared_memory().filter(|_| socket.is_local())?;
    Offer::new().inspect_err(|error| tracing::debug!("no shared memory is offered: {error}")).ok().flatten()
}

/// Exchange memory with a client, and wait for what it makes of it; `None` when there will be none.
async fn share_memory(socket: &Socket, policy: &HelloPolicy, offer: Offer) -> Result<Option<SharedMemory>> {
    let counters = policy.transport.shared_memory().expect("it was offered").clone();
    let serving = tokio::task::spawn_blocking(move || offer.serve(counters));
    let (header, body) = socket.read_frame(Limits::UNAUTHENTICATED).await;
    let Some(header) = header.filter(|h| h.method == Method::ShareMemory as u16) else {
        return Err(Error::new(Code::Protocol, "an answer to the offer of shared memory was expected"));
    };
    let request = ShareMemoryRequest::decode(body?)
        .map_err(|_| Error::new(Code::Protocol, "the answer to the offer of shared memory cannot be read"))?;
    let shared = match request.ready {
        true => serving.await.map_err(io::Error::from).flatten(),
        false => Err(io::Error::other("the client cannot")),
    };
    let told = shared.as_ref().map(|_| Response::default());
    let told = told.map_err(|error| Error::new(Code::NotSupported, format!("no shared memory: {error}")));
    socket.write_all(&answer(&header, told).flat()).await?;
    Ok(shared.inspect_err(|error| tracing::debug!("no shared memory with a client, using TCP: {error}")).ok())
}

/// Read the client's end of an RDMA connection and connect to it; TCP is used when that fails.
async fn connect_rdma(socket: &Socket, policy: &HelloPolicy, mut ready: Ready) -> Result<Agreed> {
    let (header, body) = socket.read_frame(Limits::UNAUTHENTICATED).await;
    let Some(header) = header.filter(|h| h.method == Method::RdmaConnect as u16) else {
        return Err(Error::new(Code::Protocol, "an RDMA connection was expected to be made"));
    };
    let peer = decode_end(&body?)?;
    let connected = match peer.number {
        0 => Err(Error::new(Code::Unavailable, "the client cannot connect by RDMA")),
        _ => ready.connect(&peer, policy.transport.settings()).await,
    };
    let told = connected.as_ref().map(|()| Response::default()).map_err(Clone::clone);
    socket.write_all(&answer(&header, told).flat()).await?;
    if let Err(error) = &connected {
        ready.nic.counters.fell_back();
        tracing::info!("a client gets TCP instead of RDMA: {}", error.message);
    }
    Ok(match connected {
        Ok(()) => Agreed::Rdma(Box::new(ready), peer.receives),
        Err(_) => Agreed::Tcp(None),
    })
}

impl Outgoing {
    fn flat(&self) -> Vec<u8> {
        self.pieces().flatten().copied().collect()
    }
}

/// The frame that answers `request`.
fn answer(request: &Header, result: Result<Response>) -> Outgoing {
    let result = result.and_then(|response| {
        let payload_bytes: usize = response.payload.iter().map(|piece| piece.len()).sum();
        if response.body.len() > BODY_BYTES_MAX || payload_bytes > PAYLOAD_BYTES_MAX {
            return Err(Error::new(Code::MessageTooBig, "the response is over the limit of a frame; ask for less"));
        }
        Ok((response, payload_bytes))
    });
    let (status, response, payload_bytes) = match result {
        Ok((response, payload_bytes)) => (0, response, payload_bytes),
        Err(error) => (error.code as u16, Response::new(&error_to_detail(&error)), 0),
    };
    let header = Header {
        kind: Kind::Response,
        request_id: request.request_id,
        method: request.method,
        status,
        deadline_ms: 0,
        body_bytes: response.body.len() as u32,
        payload_bytes: payload_bytes as u32,
    };
    Outgoing {
        head: header.encode().to_vec(),
        body: response.body,
        payload: response.payload,
        with_crcs: false,
        segments: response.segments,
        landing: None,
        permit: None,
    }
}

/// Unanswered requests of one connection.
#[derive(Default)]
struct Load {
    requests: AtomicUsize,
    freed: Notify,
}

/// Counts one request from its arrival until its response has left.
struct Admission {
    load: Arc<Load>,
    shared: Arc<Shared>,
}

impl Drop for Admission {
    fn drop(&mut self) {
        if self.load.requests.fetch_sub(1, Ordering::AcqRel) == REQUESTS_IN_FLIGHT_MAX {
            self.load.freed.notify_one();
        }
        if self.shared.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 && self.shared.stopping.load(Ordering::SeqCst) {
            self.shared.idle.notify_one();
        }
    }
}

/// The receiving side of a connection at the server.
struct Callee<S: Service> {
    number: u64,
    link: Arc<dyn Link>,
    peer: PeerInfo,
    service: Arc<S>,
    shared: Arc<Shared>,
    load: Arc<Load>,
}

/// Where the payload of one request goes.
struct RequestLanding {
    /// In one, or in parts; `None`: there is none, or it was refused.
    memory: Option<Vec<RegionMut>>,
    /// Next byte to fill: part and offset in it.
    part: usize,
    filled: usize,
    refusal: Option<Error>,
    crcs: Option<Crcs>,
    sent_crcs: Option<Bytes>,
}

impl Landing for RequestLanding {
    fn fill(&mut self, bytes: usize, tail: &mut [u8], io: Fill<'_>) -> Option<std::io::Result<usize>> {
        let mut windows = Windows::new();
        let (mut filled, mut room) = (self.filled, 0);
        let mut complete = true;
        for part in self.memory.as_mut()?.iter_mut().skip(self.part) {
            let window = &mut part[std::mem::take(&mut filled)..];
            room += window.len();
            if room - window.len() >= bytes || !windows.push(window) {
                complete = false;
                break;
            }
        }
        Some(windows.run(complete, tail, io))
    }

    fn advance(&mut self, mut bytes: usize) {
        while let Some(part) = self.memory.as_ref().and_then(|parts| parts.get(self.part)) {
            let step = bytes.min(part.len() - self.filled);
            self.filled += step;
            bytes -= step;
            let is_all = self.filled == part.len();
            if let Some(crcs) = &mut self.crcs {
                crcs.follow(&part[..self.filled], is_all);
            }
            if !is_all {
                return;
            }
            (self.part, self.filled) = (self.part + 1, 0);
        }
    }

    fn sent_crcs(&mut self, crcs: Vec<u8>) {
        self.sent_crcs = Some(crcs.into());
    }

    fn memory(&mut self) -> Option<&mut [u8]> {
        match &mut self.memory.as_mut()?[..] {
            [buffer] => Some(buffer),
            _ => None,
        }
    }

    fn refuse(&mut self, error: Error) {
        (self.memory, self.refusal) = (None, Some(error));
    }
}

/// A request that is answered even if its handler panics.
struct Asked<S: Service> {
    callee: Arc<Callee<S>>,
    header: Header,
    admission: Option<Admission>,
}

impl<S: Service> Asked<S> {
    fn respond(mut self, result: Result<Response>, flush: Flush) {
        self.send(result, flush);
    }

    fn send(&mut self, result: Result<Response>, flush: Flush) {
        if let Some(admission) = self.admission.take() {
            let mut message = answer(&self.header, result);
            message.permit = Some(Box::new(admission));
            self.callee.link.send(message, flush);
        }
    }
}

impl<S: Service> Drop for Asked<S> {
    fn drop(&mut self) {
        self.send(
            Err(Error::new(Code::Internal, "the handler failed; see the server's log").maybe_applied()),
            Flush::Soon,
        );
    }
}

impl<S: Service> Callee<S> {
    fn begin(number: u64, link: Arc<dyn Link>, peer: PeerInfo, service: Arc<S>, shared: &Arc<Shared>) -> Arc<Self> {
        shared.links.lock().insert(number, (link.clone(), peer));
        if shared.stopping.load(Ordering::SeqCst) {
            link.close();
        }
        Arc::new(Self { number, link, peer, service, shared: shared.clone(), load: Arc::new(Load::default()) })
    }

    fn method(&self, header: &Header) -> Result<Method> {
        if self.shared.stopping.load(Ordering::Relaxed) {
            return Err(Error::new(Code::Unavailable, "the server is shutting down"));
        }
        match Method::try_from(i32::from(header.method)) {
            Ok(Method::Hello | Method::RdmaConnect | Method::ShareMemory) => {
                Err(Error::new(Code::Protocol, "hello is said once"))
            }
            Ok(method) => Ok(method),
            Err(_) => Err(Error::new(Code::Unimplemented, format!("no method {} here", header.method))),
        }
    }

    fn memory(&self, header: &Header, body: &[u8]) -> Result<Option<Vec<RegionMut>>> {
        let method = self.method(header)?;
        let bytes = header.payload_bytes as usize;
        if bytes == 0 {
            return Ok(None);
        }
        let in_parts = match self.link.rdma_device() {
            Some(_) => None,
            None => self.service.payload_parts(method, body, bytes),
        };
        let memory = in_parts.or_else(|| self.service.payload_buffer(method, bytes).map(|buffer| vec![buffer]));
        let memory = memory.ok_or_else(|| Error::new(Code::Busy, "no memory for the payload now; retry later"))?;
        if memory.iter().map(|part| part.len()).sum::<usize>() != bytes {
            return Err(Error::new(Code::Internal, "the service gave memory of the wrong size"));
        }
        Ok(Some(memory))
    }
}

impl<S: Service> Endpoint for Callee<S> {
    type Landing = RequestLanding;

    async fn admit(&self) {
        while self.load.requests.load(Ordering::Acquire) >= REQUESTS_IN_FLIGHT_MAX {
            self.load.freed.notified().await;
        }
    }

    fn place(&self, header: &Header, body: &[u8]) -> Result<RequestLanding> {
        if header.kind != Kind::Request {
            return Err(Error::new(Code::Protocol, "a client sent a response"));
        }
        let (memory, refusal) = match self.memory(header, body) {
            Ok(memory) => (memory, None),
            Err(error) => (None, Some(error)),
        };
        let wanted = Method::try_from(i32::from(header.method)).is_ok_and(|method| self.service.wants_crcs(method));
        let crcs = (wanted && memory.is_some()).then(Crcs::default);
        Ok(RequestLanding { memory, part: 0, filled: 0, refusal, crcs, sent_crcs: None })
    }

    fn deliver(self: &Arc<Self>, header: Header, body: Bytes, landing: RequestLanding) {
        self.load.requests.fetch_add(1, Ordering::AcqRel);
        self.shared.in_flight.fetch_add(1, Ordering::SeqCst);
        let admission = Admission { load: self.load.clone(), shared: self.shared.clone() };
        let asked = Asked { callee: self.clone(), header, admission: Some(admission) };
        let method = match landing.refusal.map_or_else(|| self.method(&header), Err) {
            Ok(Method::Ping) => return asked.respond(Ok(Response::default()), Flush::Batch),
            Ok(method) => method,
            Err(error) => return asked.respond(Err(error), Flush::Batch),
        };
        let wait_ms = if header.deadline_ms == 0 { DEADLINE_MS_DEFAULT } else { header.deadline_ms };
        let deadline = Instant::now() + Duration::from_millis(u64::from(wait_ms));
        let mut parts: Vec<Region> = landing.memory.into_iter().flatten().map(RegionMut::freeze).collect();
        let payload = if parts.len() == 1 { parts.remove(0) } else { Region::empty() };
        let payload_crcs = landing.crcs.and_then(|crcs| crcs.of(header.payload_bytes as usize)).map(Bytes::from);
        let sent_crcs = landing.sent_crcs;
        let request = Request { peer: self.peer, method, deadline, body, payload, parts, payload_crcs, sent_crcs };
        let callee = self.clone();
        let mut handling = Box::pin(async move { callee.service.handle(request).await });
        fs3_rt::Handle::current().begin(async move {
            // Only what is answered at once is sent from within this call.
            let mut flush = Some(Flush::Batch);
            let handled = poll_fn(|cx| {
                let flush = flush.take().unwrap_or_else(Flush::of_this_thread);
                handling.as_mut().poll(cx).map(|result| (result, flush))
            });
            let (result, flush) = handled.await;
            asked.respond(result, flush);
        });
    }

    fn refused(&self, header: Option<&Header>, error: &Error) {
        if let Some(header) = header {
            self.link.send(answer(header, Err(error.clone())), Flush::Now);
        }
    }

    fn closed(&self, error: &Error) {
        tracing::debug!("a connection ended: {error}");
        self.shared.links.lock().remove(&self.number);
    }
}
