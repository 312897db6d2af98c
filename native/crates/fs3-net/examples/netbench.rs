//! Speed of framed calls against plain TCP, both over loopback with server and client in separate processes.
//!
//! `cargo run --release -p fs3-net --example netbench [seconds per measurement] [current|multi]`

use fs3_core::{BufferPool, Code, Error, Region, RegionMut, Result};
use fs3_net::{Connection, Hello, HelloPolicy, Request, Response, Server, Service, Sink};
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
    let limit = Duration::from_secs_f64(seconds);
    let mut server = Spawned::start(flavour);
    println!("runtime: {flavour}");
    let mut raw_large: f64 = 0.0;
    for streams in [1, 2] {
        let before = server.cpu_seconds();
        let (rate, gib) = raw_streams(&server.raw_addr, streams, limit);
        let cpu = (server.cpu_seconds() - before) / gib;
        println!("raw  1 MiB, {streams} streams:            {rate:6.2} GB/s, {cpu:.2} CPU-s/GiB");
        raw_large = raw_large.max(rate);
    }
    let (raw_p50, raw_rate) = raw_ping_pong(&server.raw_addr, limit);
    println!("raw  4 KiB ping-pong:             p50 {raw_p50:6.1} us, {raw_rate:8.0}/s");
    let raw_pipelined = raw_pipelined(&server.raw_addr, limit);
    println!("raw  4 KiB, 32 pipelined:                      {raw_pipelined:8.0}/s");
    runtime(flavour).block_on(framed(&server, limit, raw_large, raw_p50, raw_pipelined));
    server.stop();
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
        Ok(Response { body, payload: vec![self.data.slice(0, bytes)] })
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
        let policy = HelloPolicy { cluster_id: "bench".into(), token: "t".into(), node_id: 1, role: Role::Storage };
        let blocks = Blocks { data: Region::from_vec(vec![7; LARGE]), pool: BufferPool::new(256 << 20) };
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

/// GB/s and GiB moved with four requests in flight on each stream.
fn raw_streams(addr: &str, streams: usize, limit: Duration) -> (f64, f64) {
    let started = Instant::now();
    let threads: Vec<_> = (0..streams)
        .map(|_| {
            let mut stream = raw_connect(addr);
            std::thread::spawn(move || {
                let mut buf = vec![0u8; LARGE];
                (0..4).for_each(|_| stream.write_all(&raw_request(LARGE)).expect("send"));
                let mut moved = 0;
                while started.elapsed() < limit {
                    stream.read_exact(&mut buf).expect("receive");
                    stream.write_all(&raw_request(LARGE)).expect("send");
                    moved += LARGE;
                }
                moved
            })
        })
        .collect();
    let moved: usize = threads.into_iter().map(|t| t.join().expect("a thread")).sum();
    (moved as f64 / started.elapsed().as_secs_f64() / 1e9, moved as f64 / f64::from(1 << 30))
}

fn raw_ping_pong(addr: &str, limit: Duration) -> (f64, f64) {
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
    (p50(&mut times), times.len() as f64 / started.elapsed().as_secs_f64())
}

fn raw_pipelined(addr: &str, limit: Duration) -> f64 {
    let mut stream = raw_connect(addr);
    let requests: Vec<u8> = std::iter::repeat_n(raw_request(SMALL), 32).flatten().collect();
    let mut buf = vec![0u8; SMALL * 32];
    let (mut count, started) = (0, Instant::now());
    while started.elapsed() < limit {
        stream.write_all(&requests).expect("send");
        stream.read_exact(&mut buf).expect("receive");
        count += 32;
    }
    f64::from(count) / started.elapsed().as_secs_f64()
}

fn p50(times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}

// Framed calls.

async fn connect(addr: &str) -> Connection {
    let hello = Hello { cluster_id: "bench".into(), role: Role::Client, peer_id: [1; 16], token: "t".into() };
    Connection::connect(addr, &hello, TIMEOUT).await.expect("the server").0
}

async fn fetch(connection: &Connection, window: RegionMut) -> RegionMut {
    let body = GetRoutingRequest { known_version: window.len() as u64, wait_ms: 0 };
    let lengths: fn(&[u8]) -> Result<Vec<usize>> =
        |body| Ok(vec![u32::from_le_bytes(body.try_into().expect("four bytes")) as usize]);
    let sink = Sink { windows: vec![window], lengths };
    let reply = connection.call(Method::StorageRead, body, Vec::new(), sink, TIMEOUT).await.expect("a reply");
    reply.windows.into_iter().next().expect("the window")
}

/// Bytes moved by `tasks` callers that fetch one after another.
async fn fetch_many(connections: &[Connection], tasks: usize, bytes: usize, limit: Duration) -> f64 {
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
    calls as f64 / started.elapsed().as_secs_f64()
}

async fn framed(server: &Spawned, limit: Duration, raw_large: f64, raw_p50: f64, raw_pipelined: f64) {
    for (count, tasks) in [(1, 4), (2, 8), (4, 8)] {
        let mut connections = Vec::new();
        for _ in 0..count {
            connections.push(connect(&server.addr).await);
        }
        let (before, started) = (server.cpu_seconds(), Instant::now());
        let rate = fetch_many(&connections, tasks, LARGE, limit).await * LARGE as f64 / 1e9;
        let gib = rate * 1e9 * started.elapsed().as_secs_f64() / f64::from(1 << 30);
        let cpu = (server.cpu_seconds() - before) / gib;
        let ratio = rate / raw_large;
        println!(
            "fs3  1 MiB, {count} connections, {tasks} calls: {rate:6.2} GB/s, {cpu:.2} CPU-s/GiB, {ratio:.2} x raw"
        );
    }
    let connection = connect(&server.addr).await;
    let caller = connection.clone();
    let (p50, rate) = tokio::spawn(async move {
        let (mut window, mut times, started) = (RegionMut::zeroed(SMALL), Vec::new(), Instant::now());
        while started.elapsed() < limit {
            let at = Instant::now();
            window = fetch(&caller, window).await;
            times.push(at.elapsed());
        }
        (p50(&mut times), times.len() as f64 / started.elapsed().as_secs_f64())
    })
    .await
    .expect("a task");
    println!("fs3  4 KiB ping-pong:             p50 {p50:6.1} us, {rate:8.0}/s, {:.2} x raw p50", p50 / raw_p50);
    for tasks in [32, 256] {
        let rate = fetch_many(std::slice::from_ref(&connection), tasks, SMALL, limit).await;
        println!(
            "fs3  4 KiB, {tasks:3} in flight:                     {rate:8.0}/s, {:.2} x raw",
            rate / raw_pipelined
        );
    }
}
