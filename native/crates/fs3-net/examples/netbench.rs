//! Speed of framed calls against plain TCP, both over loopback with server and client in separate processes.
//!
//! `cargo run --release -p fs3-net --example netbench [seconds per measurement] [current|multi] [part of a name]`

use fs3_core::{BufferPool, Code, Error, Region, RegionMut, Result};
use fs3_net::{
    Connection, Hello, HelloPolicy, Mode, RdmaSettings, Request, Response, Server, Service, Sink, Transport,
};
use fs3_proto::v1::{GetRoutingRequest, Method, Role};
use prost::Message;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const LARGE: usize = 1 << 20;
const SMALL: usize = 4 << 10;
const TIMEOUT: Duration = Duration::from_secs(10);

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|a| a == "serve") {
        return serve(&args[2]);
    }
    let seconds = args.get(1).and_then(|a| a.parse().ok()).unwrap_or(2.0);
    let flavour = args.get(2).map_or("current", String::as_str);
    let only = args.get(3).map_or("", String::as_str);
    let slice = Duration::from_secs_f64(seconds / f64::from(ROUNDS));
    let mut server = Spawned::start(flavour);
    println!("runtime: {flavour}; best of {ROUNDS} rounds");
    let runtime = runtime(flavour);
    let mut best: Vec<Measure> = Vec::new();
    for _ in 0..ROUNDS {
        for (at, measure) in round(&server, &runtime, slice, only).into_iter().enumerate() {
            match best.get_mut(at) {
                Some(known) => known.keep_best(&measure),
                None => best.push(measure),
            }
        }
    }
    drop(runtime);
    server.stop();
    report(&best);
}

/// Measurements in slices that take turns, so that a busy machine disturbs all of them alike.
const ROUNDS: u32 = 6;

/// One kind of work in one round; what is compared is per unit (bytes or calls).
struct Measure {
    name: &'static str,
    /// The name of the plain counterpart.
    against: &'static str,
    bytes: usize,
    per_second: f64,
    cpu_us: f64,
    p50_us: f64,
}

impl Measure {
    fn keep_best(&mut self, other: &Self) {
        self.per_second = self.per_second.max(other.per_second);
        self.cpu_us = self.cpu_us.min(other.cpu_us);
        self.p50_us = self.p50_us.min(other.p50_us);
    }
}

fn report(measures: &[Measure]) {
    for m in measures {
        let raw = measures
            .iter()
            .filter(|r| r.name.starts_with(m.against))
            .max_by(|a, b| a.per_second.total_cmp(&b.per_second));
        let raw = raw.unwrap_or(m);
        let gb = m.per_second * m.bytes as f64 / 1e9;
        let cpu_gib = m.cpu_us * f64::from(1 << 30) / m.bytes as f64 / 1e6;
        println!(
            "{:34} {gb:6.2} GB/s {cpu_gib:5.2} CPU-s/GiB {:9.0}/s {:7.2} CPU-us p50 {:7.1} us | rate {:.2} x, CPU {:.2} x, p50 {:.2} x",
            m.name,
            m.per_second,
            m.cpu_us,
            m.p50_us,
            m.per_second / raw.per_second,
            m.cpu_us / raw.cpu_us,
            m.p50_us / raw.p50_us
        );
    }
}

/// Calls made and the median time of one (0 where it was not measured).
type Work = (u64, f64);

fn measure(
    server: &Spawned,
    name: &'static str,
    against: &'static str,
    bytes: usize,
    work: impl FnOnce() -> Work,
) -> Measure {
    let (cpu, started) = (server.cpu_seconds(), Instant::now());
    let (calls, p50_us) = work();
    let calls = calls.max(1) as f64;
    let (cpu, wall) = (server.cpu_seconds() - cpu, started.elapsed().as_secs_f64());
    Measure { name, against, bytes, per_second: calls / wall, cpu_us: cpu * 1e6 / calls, p50_us }
}

fn round(server: &Spawned, runtime: &tokio::runtime::Runtime, slice: Duration, only: &str) -> Vec<Measure> {
    let connect_many = |n| runtime.block_on(connect(&server.addr, n));
    let many =
        |connections: &[Connection], tasks, bytes| runtime.block_on(fetch_many(connections, tasks, bytes, slice));
    let (one, two, four) = (connect_many(1), connect_many(2), connect_many(4));
    let measure = |name: &'static str, against, bytes, work: &dyn Fn() -> Work| {
        name.contains(only).then(|| measure(server, name, against, bytes, work))
    };
    let measures = [
        measure("raw 1 MiB, 1 stream", "raw 1 MiB", LARGE, &|| raw_streams(&server.raw_addr, 1, slice)),
        measure("fs3 1 MiB, 1 connection, 4 calls", "raw 1 MiB", LARGE, &|| many(&one, 4, LARGE)),
        measure("raw 1 MiB, 2 streams", "raw 1 MiB", LARGE, &|| raw_streams(&server.raw_addr, 2, slice)),
        measure("fs3 1 MiB, 2 connections, 8 calls", "raw 1 MiB", LARGE, &|| many(&two, 8, LARGE)),
        measure("fs3 1 MiB, 4 connections, 8 calls", "raw 1 MiB", LARGE, &|| many(&four, 8, LARGE)),
        measure("fs3 1 MiB writes, 1 connection, 4 calls", "raw 1 MiB", LARGE, &|| {
            runtime.block_on(store_many(&one, 4, slice))
        }),
        measure("raw 4 KiB ping-pong", "raw 4 KiB ping", SMALL, &|| raw_ping_pong(&server.raw_addr, slice)),
        measure("fs3 4 KiB ping-pong", "raw 4 KiB ping", SMALL, &|| runtime.block_on(ping_pong(one[0].clone(), slice))),
        measure("raw 4 KiB, 32 in flight", "raw 4 KiB, 32", SMALL, &|| raw_pipelined(&server.raw_addr, slice)),
        measure("fs3 4 KiB, 32 in flight", "raw 4 KiB, 32", SMALL, &|| many(&one, 32, SMALL)),
        measure("fs3 4 KiB, 256 in flight", "raw 4 KiB, 32", SMALL, &|| many(&one, 256, SMALL)),
    ];
    measures.into_iter().flatten().collect()
}

fn runtime(flavour: &str) -> tokio::runtime::Runtime {
    let mut builder = match flavour {
        "current" => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    if flavour == "multi" {
        builder.worker_threads(2);
    }
    builder.enable_all().build().expect("a runtime")
}

// The server process: one framed server and one plain one.

struct Blocks {
    data: Region,
    pool: BufferPool,
}

impl Service for Blocks {
    fn payload_buffer(&self, _method: Method, bytes: usize) -> Option<RegionMut> {
        self.pool.get(bytes)
    }

    async fn handle(&self, request: Request) -> Result<Response> {
        let wanted =
            GetRoutingRequest::decode(request.body).map_err(|_| Error::new(Code::InvalidArgument, "bad body"))?;
        let bytes = wanted.known_version as usize;
        let body = (bytes as u32).to_le_bytes().to_vec().into();
        Ok(Response { body, payload: vec![self.data.slice(0, bytes)], ..Response::default() })
    }
}

fn serve(flavour: &str) {
    let raw = TcpListener::bind("127.0.0.1:0").expect("a port");
    let raw_addr = raw.local_addr().expect("an address");
    std::thread::spawn(move || {
        for stream in raw.incoming().flatten() {
            std::thread::spawn(move || raw_serve(stream));
        }
    });
    runtime(flavour).block_on(async {
        let policy = HelloPolicy {
            cluster_id: "bench".into(),
            token: "t".into(),
            node_id: 1,
            role: Role::Storage,
            transport: transport(),
        };
        let blocks = Blocks { data: RegionMut::zeroed(LARGE).freeze(), pool: BufferPool::new(256 << 20) };
        let server = Server::bind("127.0.0.1:0", policy, Arc::new(blocks)).await.expect("a port");
        println!("{} {raw_addr}", server.local_addr());
        let (ended, wait) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let _ = std::io::stdin().read(&mut [0]);
            let _ = ended.send(());
        });
        let _ = wait.await;
        server.shutdown(TIMEOUT).await;
    });
}

/// Answers each 64-byte request with as many bytes as its first 4 bytes say, requests that arrived together with
/// one write.
fn raw_serve(mut stream: TcpStream) {
    let data = vec![7u8; LARGE];
    stream.set_nodelay(true).expect("nodelay");
    let mut requests = BufReader::with_capacity(64 << 10, stream.try_clone().expect("a second handle"));
    let mut request = [0u8; 64];
    while requests.read_exact(&mut request).is_ok() {
        let mut bytes = u32::from_le_bytes(request[..4].try_into().expect("four bytes")) as usize;
        if bytes == SMALL {
            let more = requests.buffer().len() / request.len();
            requests.consume(more * request.len());
            bytes = (SMALL * (1 + more)).min(LARGE);
        }
        if stream.write_all(&data[..bytes]).is_err() {
            return;
        }
    }
}

struct Spawned {
    child: Child,
    addr: String,
    raw_addr: String,
}

impl Spawned {
    fn start(flavour: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["serve", flavour])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a server process");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("the addresses");
        let (addr, raw_addr) = line.trim().split_once(' ').expect("two addresses");
        Self { addr: addr.into(), raw_addr: raw_addr.into(), child }
    }

    /// CPU time of both processes so far.
    fn cpu_seconds(&self) -> f64 {
        [self.child.id(), std::process::id()]
            .iter()
            .map(|pid| {
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process");
                let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
                (fields[11].parse::<f64>().expect("utime") + fields[12].parse::<f64>().expect("stime")) / 100.0
            })
            .sum()
    }

    fn stop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().expect("the server ends");
    }
}

// Plain TCP.

fn raw_connect(addr: &str) -> TcpStream {
    let stream = TcpStream::connect(addr).expect("the raw server");
    stream.set_nodelay(true).expect("nodelay");
    stream
}

fn raw_request(bytes: usize) -> [u8; 64] {
    let mut request = [0u8; 64];
    request[..4].copy_from_slice(&(bytes as u32).to_le_bytes());
    request
}

/// With four requests in flight on each stream.
fn raw_streams(addr: &str, streams: usize, limit: Duration) -> Work {
    let started = Instant::now();
    let threads: Vec<_> = (0..streams)
        .map(|_| {
            let mut stream = raw_connect(addr);
            std::thread::spawn(move || {
                // As many destinations as requests in flight, like any real reader.
                let mut bufs = vec![vec![0u8; LARGE]; 4];
                (0..4).for_each(|_| stream.write_all(&raw_request(LARGE)).expect("send"));
                let mut calls = 0;
                while started.elapsed() < limit {
                    stream.read_exact(&mut bufs[calls as usize % 4]).expect("receive");
                    stream.write_all(&raw_request(LARGE)).expect("send");
                    calls += 1;
                }
                calls
            })
        })
        .collect();
    (threads.into_iter().map(|t| t.join().expect("a thread")).sum(), 0.0)
}

fn raw_ping_pong(addr: &str, limit: Duration) -> Work {
    let mut stream = raw_connect(addr);
    let mut buf = vec![0u8; SMALL];
    let mut times = Vec::new();
    let started = Instant::now();
    while started.elapsed() < limit {
        let at = Instant::now();
        stream.write_all(&raw_request(SMALL)).expect("send");
        stream.read_exact(&mut buf).expect("receive");
        times.push(at.elapsed());
    }
    (times.len() as u64, p50(&mut times))
}

fn raw_pipelined(addr: &str, limit: Duration) -> Work {
    let mut stream = raw_connect(addr);
    let requests: Vec<u8> = std::iter::repeat_n(raw_request(SMALL), 32).flatten().collect();
    let mut buf = vec![0u8; SMALL * 32];
    let (mut count, started) = (0, Instant::now());
    while started.elapsed() < limit {
        stream.write_all(&requests).expect("send");
        stream.read_exact(&mut buf).expect("receive");
        count += 32;
    }
    (count, 0.0)
}

fn p50(times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}

// Framed calls.

/// TCP; or RDMA with the device that FS3_TEST_RDMA names.
fn transport() -> Transport {
    match std::env::var("FS3_TEST_RDMA") {
        Ok(device) => {
            let settings = RdmaSettings { devices: vec![device], ..RdmaSettings::default() };
            Transport::new(Mode::Rdma, settings).expect("RDMA on the device")
        }
        Err(_) => Transport::tcp(),
    }
}

async fn connect(addr: &str, count: usize) -> Vec<Connection> {
    let hello = Hello {
        cluster_id: "bench".into(),
        role: Role::Client,
        peer_id: [1; 16],
        token: "t".into(),
        transport: transport(),
    };
    let mut connections = Vec::new();
    for _ in 0..count {
        connections.push(Connection::connect(addr, &hello, TIMEOUT).await.expect("the server").0);
    }
    connections
}

async fn fetch(connection: &Connection, window: RegionMut) -> RegionMut {
    let body = GetRoutingRequest { known_version: window.len() as u64, wait_ms: 0, known: None };
    let lengths: fn(&[u8]) -> Result<Vec<usize>> =
        |body| Ok(vec![u32::from_le_bytes(body.try_into().expect("four bytes")) as usize]);
    let sink = Sink { windows: vec![window], lengths };
    let reply = connection.call(Method::StorageRead, body, Vec::new(), sink, TIMEOUT).await.expect("a reply");
    reply.windows.into_iter().next().expect("the window")
}

/// Calls made by `tasks` callers that each send a large payload after another.
async fn store_many(connections: &[Connection], tasks: usize, limit: Duration) -> Work {
    let data = RegionMut::zeroed(LARGE).freeze();
    let started = Instant::now();
    let work = (0..tasks).map(|i| {
        let (connection, data) = (connections[i % connections.len()].clone(), data.clone());
        tokio::spawn(async move {
            let mut count = 0;
            while started.elapsed() < limit {
                let body = GetRoutingRequest { known_version: 0, wait_ms: 0, known: None };
                let sink = Sink::none();
                connection.call(Method::StorageWrite, body, vec![data.clone()], sink, TIMEOUT).await.expect("a reply");
                count += 1;
            }
            count
        })
    });
    let mut count = 0;
    for task in work.collect::<Vec<_>>() {
        count += task.await.expect("the caller");
    }
    (count, 0.0)
}

/// Calls made by `tasks` callers that fetch one after another.
async fn fetch_many(connections: &[Connection], tasks: usize, bytes: usize, limit: Duration) -> Work {
    let pool = BufferPool::new(tasks * bytes.next_power_of_two());
    let started = Instant::now();
    let handles: Vec<_> = (0..tasks)
        .map(|i| {
            let connection = connections[i % connections.len()].clone();
            let mut window = pool.get(bytes).expect("room");
            tokio::spawn(async move {
                let mut calls = 0u64;
                while started.elapsed() < limit {
                    window = fetch(&connection, window).await;
                    calls += 1;
                }
                calls
            })
        })
        .collect();
    let mut calls = 0;
    for handle in handles {
        calls += handle.await.expect("a task");
    }
    (calls, 0.0)
}

async fn ping_pong(connection: Connection, limit: Duration) -> Work {
    let task = tokio::spawn(async move {
        let (mut window, mut times, started) = (RegionMut::zeroed(SMALL), Vec::new(), Instant::now());
        while started.elapsed() < limit {
            let at = Instant::now();
            window = fetch(&connection, window).await;
            times.push(at.elapsed());
        }
        (times.len() as u64, p50(&mut times))
    });
    task.await.expect("a task")
}
