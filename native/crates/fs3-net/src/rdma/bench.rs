//! Measuring RDMA between two machines: raw verbs, then calls, over queue pairs that are made alike.

use super::memory::Registered;
use super::nic::{Grant, Nic, Ready, decode_end};
use super::{Transport, unavailable};
use crate::{Connection, Hello, HelloPolicy, Request, Response, Server, Service, Sink};
use fs3_core::{BufferPool, Code, Error, Region, RegionMut, Result};
use fs3_proto::v1::{GetRoutingRequest, HelloRequest, HelloResponse, Method, Role};
use fs3_verbs::{Completion, CompletionQueue, QueuePair, Remote, Sge, Work, WorkRequest};
use parking_lot::Mutex;
use prost::Message;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

/// Largest operation that can be measured, bytes.
pub const OPERATION_BYTES_MAX: usize = 8 << 20;

const CLUSTER: &str = "fs3-rdma-bench";
/// Large operations under way at a time.
const DEPTH: usize = 4;
const MESSAGE_BYTES: u32 = 64;
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long a completion is waited for at a time.
const WAIT_MS: i32 = 100;
const SEND_ID: u64 = 1 << 62;
/// What the calls mean here: the ports of the client, answered with an end; the client's end, answered with memory.
const OFFER: Method = Method::StorageCheck;
const CONNECT: Method = Method::StorageSync;
/// Looks at a completion queue before its event is waited for.
static LOOKS: LazyLock<u32> =
    LazyLock::new(|| if std::thread::available_parallelism().map_or(1, usize::from) >= 4 { 20_000 } else { 1 });

/// One measurement.
#[derive(Clone, Debug)]
pub struct Measured {
    /// `raw_read`, `raw_write`, `raw_ping`, `fs3_read`, `fs3_write` or `fs3_ping`. Reads bring data to the measuring side.
    pub name: &'static str,
    /// Payload moved per second; 0 for pings.
    pub bytes_per_s: f64,
    /// Operations done per second.
    pub operations_per_s: f64,
    /// Median time of one operation, microseconds.
    pub median_us: f64,
    /// Time that one operation in a hundred exceeds, microseconds.
    pub p99_us: f64,
}

impl Measured {
    fn new(name: &'static str, bytes: usize, wall: Duration, mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let at = |share: usize| times.get(times.len() * share / 100).map_or(0.0, |t| t.as_secs_f64() * 1e6);
        let operations_per_s = times.len() as f64 / wall.as_secs_f64();
        let bytes_per_s = operations_per_s * bytes as f64;
        Self { name, bytes_per_s, operations_per_s, median_us: at(50), p99_us: at(99) }
    }
}

/// The side that is measured against: it answers until it is dropped. Anybody who reaches it may use it.
pub struct BenchServer(Server);

impl BenchServer {
    /// Listen on `host:port` (port 0 picks one). Must run on the runtime that serves.
    ///
    /// # Errors
    /// `Unavailable` without RDMA in `transport`, or when the address cannot be listened on.
    pub async fn listen(addr: &str, transport: Transport) -> Result<Self> {
        let policy = HelloPolicy {
            cluster_id: CLUSTER.into(),
            token: String::new(),
            node_id: 1,
            role: Role::Storage,
            transport: transport.clone(),
        };
        let data = pool_buffer(&pool(), OPERATION_BYTES_MAX)?.freeze();
        let bench = Bench { transport, data, pool: pool(), raw: Mutex::default() };
        Ok(Self(Server::bind(addr, policy, Arc::new(bench)).await?))
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.0.local_addr().port()
    }
}

/// Measure everything against the [`BenchServer`] at `host:port`, `limit` long each, with large operations of `bytes`
/// bytes (at most [`OPERATION_BYTES_MAX`]). Returns also the RDMA device in use here.
///
/// # Errors
/// `Unavailable` when nobody listens there or there is no RDMA between the two, `Timeout`.
pub async fn run(transport: Transport, addr: &str, bytes: usize, limit: Duration) -> Result<(String, Vec<Measured>)> {
    let hello = Hello {
        cluster_id: CLUSTER.into(),
        role: Role::Client,
        peer_id: [1; 16],
        token: String::new(),
        transport: transport.clone(),
    };
    let (connection, _) = Connection::connect(addr, &hello, TIMEOUT).await?;
    let device = connection.rdma_device().map(str::to_owned);
    let device = device.ok_or_else(|| Error::new(Code::Unavailable, format!("no RDMA with {addr}")))?;
    let (raw, remote) = RawEnd::connect(&transport, &connection, addr, bytes).await?;
    let measure = move || {
        Ok(vec![
            raw.transfer("raw_read", Work::Read, remote, bytes, limit)?,
            raw.transfer("raw_write", Work::Write, remote, bytes, limit)?,
            raw.ping(limit)?,
        ])
    };
    let stopped = |_| Error::new(Code::Internal, "the measuring thread ended");
    let mut all: Vec<Measured> = tokio::task::spawn_blocking(measure).await.map_err(stopped)??;
    all.push(calls("fs3_read", &connection, Method::StorageRead, DEPTH, bytes, limit).await?);
    all.push(calls("fs3_write", &connection, Method::StorageWrite, DEPTH, bytes, limit).await?);
    all.push(calls("fs3_ping", &connection, Method::StorageStatus, 1, 0, limit).await?);
    Ok((device, all))
}

fn pool() -> BufferPool {
    BufferPool::new(4 * DEPTH * OPERATION_BYTES_MAX)
}

fn pool_buffer(pool: &BufferPool, bytes: usize) -> Result<RegionMut> {
    pool.get(bytes).ok_or_else(|| Error::new(Code::Busy, "no memory for the measurement"))
}

/// One end of a raw connection, and memory that the other may touch.
struct RawEnd {
    // First: dropping it ends all access to the memory.
    pair: QueuePair,
    completions: Arc<CompletionQueue>,
    _grant: Grant,
    nic: Arc<Nic>,
    registered: Registered,
    _memory: RegionMut,
}

impl RawEnd {
    fn new(ready: Ready, bytes: usize) -> Result<Self> {
        let (memory, registered) = ready.nic.stage(bytes)?;
        let Ready { nic, completions, pair, grant, .. } = ready;
        Ok(Self { pair, completions, _grant: grant, nic, registered, _memory: memory })
    }

    /// Make a connection beside that of the calls; with it comes the other side's memory.
    async fn connect(
        transport: &Transport,
        connection: &Connection,
        addr: &str,
        bytes: usize,
    ) -> Result<(Self, Remote)> {
        let unreadable = |_| Error::new(Code::Protocol, "the answer of the listener cannot be read");
        let offer = HelloRequest { rdma_ports: transport.offers(addr), ..HelloRequest::default() };
        let reply = connection.call(OFFER, offer, Vec::new(), Sink::none(), TIMEOUT).await?;
        let welcome = HelloResponse::decode(reply.body).map_err(unreadable)?;
        let end = welcome.rdma_end.ok_or_else(|| Error::new(Code::Protocol, "the listener offers no queue pair"))?;
        let ready = transport.prepare(welcome.rdma_port as usize, &end).await?;
        let reply = connection.call(CONNECT, ready.end(), Vec::new(), Sink::none(), TIMEOUT).await?;
        let memory = GetRoutingRequest::decode(reply.body).map_err(unreadable)?;
        Ok((Self::new(ready, DEPTH * bytes)?, Remote { address: memory.known_version, key: memory.wait_ms }))
    }

    /// Take completions; none after [`WAIT_MS`] without any.
    fn wait(&self, into: &mut Vec<Completion>) -> Result<()> {
        into.clear();
        for _ in 0..*LOOKS {
            if self.completions.poll(into).map_err(unavailable)? > 0 {
                return check(into);
            }
        }
        while self.completions.take_event() {}
        self.completions.arm(false).map_err(unavailable)?;
        if self.completions.poll(into).map_err(unavailable)? == 0 {
            let mut wanted = libc::pollfd { fd: self.completions.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid structure.
            unsafe { libc::poll(&raw mut wanted, 1, WAIT_MS) };
            self.completions.poll(into).map_err(unavailable)?;
        }
        check(into)
    }

    fn wait_for_some(&self, into: &mut Vec<Completion>) -> Result<()> {
        let started = Instant::now();
        loop {
            self.wait(into)?;
            if !into.is_empty() {
                return Ok(());
            }
            if started.elapsed() > TIMEOUT {
                return Err(Error::new(Code::Timeout, "the listener does not answer by RDMA"));
            }
        }
    }

    fn post(&self, id: u64, work: Work, sge: Sge) -> Result<()> {
        let inline = matches!(work, Work::Send) && sge.length <= self.pair.settings().inline_bytes;
        let request = WorkRequest { id, work, sges: &[sge], signalled: true, inline };
        // SAFETY: the memory lives as long as the pair, and nothing reads it here.
        unsafe { self.pair.post(&[request]) }.map_err(unavailable)
    }

    fn send(&self) -> Result<()> {
        self.post(SEND_ID, Work::Send, Sge { length: MESSAGE_BYTES, ..self.registered.local() })
    }

    /// Move pieces of `bytes` bytes, [`DEPTH`] at a time.
    fn transfer(
        &self,
        name: &'static str,
        work: fn(Remote) -> Work,
        remote: Remote,
        bytes: usize,
        limit: Duration,
    ) -> Result<Measured> {
        let local = self.registered.local();
        let begin = |slot: usize| {
            let at = (slot * bytes) as u64;
            let sge = Sge { addr: local.addr + at, length: bytes as u32, lkey: local.lkey };
            self.post(slot as u64, work(Remote { address: remote.address + at, key: remote.key }), sge)
        };
        let (mut began, mut times, mut found) = ([Instant::now(); DEPTH], Vec::new(), Vec::new());
        let started = Instant::now();
        (0..DEPTH).try_for_each(begin)?;
        let mut under_way = DEPTH;
        while under_way > 0 {
            self.wait_for_some(&mut found)?;
            for completion in &found {
                let slot = completion.id as usize;
                times.push(began[slot].elapsed());
                if started.elapsed() < limit {
                    began[slot] = Instant::now();
                    begin(slot)?;
                } else {
                    under_way -= 1;
                }
            }
        }
        Ok(Measured::new(name, bytes, started.elapsed(), times))
    }

    /// Small messages there and back.
    fn ping(&self, limit: Duration) -> Result<Measured> {
        let (mut times, mut found, started) = (Vec::new(), Vec::new(), Instant::now());
        while started.elapsed() < limit {
            let at = Instant::now();
            self.send()?;
            let mut answered = false;
            while !answered {
                self.wait_for_some(&mut found)?;
                answered = self.take_messages(&found) > 0;
            }
            times.push(at.elapsed());
        }
        Ok(Measured::new("raw_ping", 0, started.elapsed(), times))
    }

    /// Give the receives of messages back; returns how many there were.
    fn take_messages(&self, found: &[Completion]) -> usize {
        found.iter().filter(|c| c.received).map(|c| drop(self.nic.received(c.id, c.bytes))).count()
    }

    /// Answer messages until told to stop.
    fn respond(&self, stop: &AtomicBool) -> Result<()> {
        let mut found = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            self.wait(&mut found)?;
            for _ in 0..self.take_messages(&found) {
                self.send()?;
            }
        }
        Ok(())
    }
}

fn check(found: &[Completion]) -> Result<()> {
    match found.iter().find(|c| c.status != 0) {
        Some(failed) => Err(Error::new(Code::Unavailable, format!("RDMA failed: {}", failed.reason()))),
        None => Ok(()),
    }
}

/// `tasks` callers that each make one call after another.
async fn calls(
    name: &'static str,
    connection: &Connection,
    method: Method,
    tasks: usize,
    bytes: usize,
    limit: Duration,
) -> Result<Measured> {
    let (pool, started) = (pool(), Instant::now());
    let mut callers = Vec::new();
    for _ in 0..tasks {
        let buffer = pool_buffer(&pool, bytes)?;
        let connection = connection.clone();
        callers.push(tokio::spawn(async move { call_again(&connection, method, buffer, started, limit).await }));
    }
    let mut times = Vec::new();
    for caller in callers {
        times.extend(caller.await.map_err(|_| Error::new(Code::Internal, "a caller ended"))??);
    }
    Ok(Measured::new(name, bytes, started.elapsed(), times))
}

async fn call_again(
    connection: &Connection,
    method: Method,
    buffer: RegionMut,
    started: Instant,
    limit: Duration,
) -> Result<Vec<Duration>> {
    let mut times = Vec::new();
    let body = GetRoutingRequest { known_version: buffer.len() as u64, wait_ms: 0, known: None };
    if method != Method::StorageRead {
        let payload = buffer.freeze();
        while started.elapsed() < limit {
            let at = Instant::now();
            let pieces = if payload.is_empty() { Vec::new() } else { vec![payload.clone()] };
            connection.call(method, body, pieces, Sink::none(), TIMEOUT).await?;
            times.push(at.elapsed());
        }
        return Ok(times);
    }
    let lengths: fn(&[u8]) -> Result<Vec<usize>> = |body| {
        let told = GetRoutingRequest::decode(body).map_err(|_| Error::new(Code::Protocol, "a wrong answer"))?;
        Ok(vec![told.known_version as usize])
    };
    let mut window = Some(buffer);
    while started.elapsed() < limit {
        let at = Instant::now();
        let sink = Sink { windows: window.take().into_iter().collect(), lengths };
        let reply = connection.call(method, body, Vec::new(), sink, TIMEOUT).await?;
        window = reply.windows.into_iter().next();
        times.push(at.elapsed());
    }
    Ok(times)
}

struct Bench {
    transport: Transport,
    data: Region,
    pool: BufferPool,
    raw: Mutex<Raw>,
}

/// The one raw connection: that of the last client.
#[derive(Default)]
struct Raw {
    offered: Option<Ready>,
    stop: Option<Arc<AtomicBool>>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.raw.get_mut().stop();
    }
}

impl Raw {
    fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop.store(true, Ordering::Relaxed);
        }
    }
}

impl Bench {
    fn offer(&self, request: &Request) -> Result<Response> {
        let hello = HelloRequest::decode(request.body.clone()).map_err(|_| bad_request())?;
        let no_way = || Error::new(Code::Unavailable, "no RDMA port here reaches the client");
        let (ready, port) = self.transport.answer(&hello.rdma_ports).ok_or_else(no_way)?;
        let (rdma_port, rdma_end) = (port as u32, Some(ready.end()));
        self.raw.lock().offered = Some(ready);
        Ok(Response::new(&HelloResponse { rdma_port, rdma_end, ..HelloResponse::default() }))
    }

    async fn connect(&self, request: &Request) -> Result<Response> {
        let mut ready = self.raw.lock().offered.take().ok_or_else(bad_request)?;
        ready.connect(&decode_end(&request.body)?, self.transport.settings()).await?;
        let end = RawEnd::new(ready, DEPTH * OPERATION_BYTES_MAX)?;
        let (address, key) = (end.registered.address, end.registered.remote_key());
        let stop = Arc::new(AtomicBool::new(false));
        let mut raw = self.raw.lock();
        raw.stop();
        raw.stop = Some(stop.clone());
        drop(raw);
        std::thread::spawn(move || {
            if let Err(error) = end.respond(&stop) {
                tracing::info!("a raw connection has ended: {}", error.message);
            }
        });
        Ok(Response::new(&GetRoutingRequest { known_version: address, wait_ms: key, known: None }))
    }
}

fn bad_request() -> Error {
    Error::new(Code::InvalidArgument, "not what a measurement asks for")
}

impl Service for Bench {
    fn payload_buffer(&self, _method: Method, bytes: usize) -> Option<RegionMut> {
        self.pool.get(bytes)
    }

    async fn handle(&self, request: Request) -> Result<Response> {
        match request.method {
            OFFER => self.offer(&request),
            CONNECT => self.connect(&request).await,
            Method::StorageRead => {
                let asked = GetRoutingRequest::decode(request.body).map_err(|_| bad_request())?;
                let bytes = usize::try_from(asked.known_version).unwrap_or(usize::MAX);
                if bytes > self.data.len() {
                    return Err(bad_request());
                }
                Ok(Response { payload: vec![self.data.slice(0, bytes)], ..Response::new(&asked) })
            }
            _ => Ok(Response::default()),
        }
    }
}
