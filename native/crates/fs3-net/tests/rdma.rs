//! What RDMA adds to a transport: memory that a peer writes to by itself. Those that need a device run in
//! `make test-rdma`; FS3_TEST_RDMA names it.

mod common;

use common::*;
use fs3_core::{BufferPool, Code, Region, RegionMut, Result};
use fs3_net::{Connection, Hello, Mode, RdmaSettings, Request, Response, Server, Service, Sink, Transport};
use fs3_proto::v1::{GetRoutingRequest, Method};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Answers reads with 0xaa bytes: `StorageRead` when the gate is open, `StorageCheck` after having blocked the whole
/// runtime as long as `frozen` says.
struct Gated {
    pool: BufferPool,
    gate: Semaphore,
    arrived: AtomicUsize,
    frozen: AtomicBool,
}

impl Gated {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            pool: BufferPool::new(256 << 20),
            gate: Semaphore::new(0),
            arrived: AtomicUsize::new(0),
            frozen: AtomicBool::new(false),
        })
    }
}

impl Service for Gated {
    fn payload_buffer(&self, _method: Method, bytes: usize) -> Option<RegionMut> {
        self.pool.get(bytes)
    }

    async fn handle(&self, request: Request) -> Result<Response> {
        let bytes = <GetRoutingRequest as prost::Message>::decode(request.body.clone()).unwrap().known_version as usize;
        self.arrived.fetch_add(1, Ordering::SeqCst);
        match request.method {
            Method::StorageRead => self.gate.acquire().await.unwrap().forget(),
            Method::StorageCheck => {
                while self.frozen.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            Method::StorageWrite => {
                assert!(request.payload.iter().all(|byte| *byte == request.payload[0]), "a torn payload");
                return Ok(Response { body: request.body, ..Response::default() });
            }
            _ => {}
        }
        let mut payload = self.pool.take(bytes);
        payload.fill(0xaa);
        Ok(Response { body: request.body, payload: vec![payload.freeze()], ..Response::default() })
    }
}

/// A window in the middle of memory of which the test sees every byte; `owner` is gone when the window is.
struct Canary {
    memory: Watched,
    alive: std::sync::Weak<()>,
}

const MARGIN: usize = 4096;

fn canary(bytes: usize) -> (Canary, RegionMut) {
    let memory = Watched::new(bytes + 2 * MARGIN);
    let (_, rest) = memory.window().split_at(MARGIN);
    let (mut window, _) = rest.split_at(bytes);
    let owner = Arc::new(());
    let alive = Arc::downgrade(&owner);
    let start = window.as_mut_ptr();
    let owner: Arc<(Arc<()>, RegionMut)> = Arc::new((owner, window));
    // SAFETY: the owner keeps the memory; only the window writes to it.
    let window = unsafe { RegionMut::from_raw(start, bytes, owner) };
    (Canary { memory, alive }, window)
}

impl Canary {
    fn is_free(&self) -> bool {
        self.alive.strong_count() == 0
    }

    fn all(&self, bytes: usize, value: u8) -> bool {
        (MARGIN..MARGIN + bytes).all(|at| self.memory.byte(at) == value)
    }

    fn margins_untouched(&self, bytes: usize) -> bool {
        (0..MARGIN).chain(MARGIN + bytes..2 * MARGIN + bytes).all(|at| self.memory.byte(at) == 0)
    }
}

fn sink(window: RegionMut) -> Sink {
    Sink { windows: vec![window], ..one_window(0) }
}

async fn serve_gated(service: &Arc<Gated>) -> (Server, String) {
    let server = Server::bind("127.0.0.1:0", policy(), service.clone()).await.unwrap();
    let addr = server.local_addr().to_string();
    (server, addr)
}

const BYTES: usize = 1 << 20;

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_call_that_is_given_up_gets_its_memory_back_though_the_server_never_answers() {
    let service = Gated::new();
    let (server, addr) = serve_gated(&service).await;
    let connection = connect(&addr).await;
    let (canary, window) = canary(BYTES);
    let short = Duration::from_millis(100);
    let call = connection.call(Method::StorageRead, body(BYTES as u64), Vec::new(), sink(window), short);
    assert_eq!(call.await.err().unwrap().code, Code::Timeout);
    eventually("the server lets go of the memory", || canary.is_free()).await;
    // The answer comes now, and goes nowhere.
    service.gate.add_permits(1);
    connection.call(Method::Ping, body(0), Vec::new(), Sink::none(), LONG).await.unwrap();
    server.shutdown(LONG).await;
    assert!(canary.all(BYTES, 0) && canary.margins_untouched(BYTES));
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn memory_of_a_call_that_is_given_up_stays_alive_until_the_server_cannot_write_to_it() {
    let service = Gated::new();
    // A server on one thread, which the handler blocks: it answers nothing, not even a revoke.
    let (tell, told) = std::sync::mpsc::channel();
    service.frozen.store(true, Ordering::SeqCst);
    let served = service.clone();
    let server = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (server, addr) = serve_gated(&served).await;
            tell.send(addr).unwrap();
            eventually("the test ends", || served.gate.available_permits() > 0).await;
            drop(server);
        });
    });
    let connection = connect(&told.recv().unwrap()).await;
    let (canary, window) = canary(BYTES);
    let call = connection.call(Method::StorageCheck, body(BYTES as u64), Vec::new(), sink(window), LONG);
    let call = tokio::time::timeout(Duration::from_millis(200), call);
    assert!(call.await.is_err());
    assert_eq!(service.arrived.load(Ordering::SeqCst), 1);
    assert!(!canary.is_free(), "the server may still write there");
    eventually("the connection is ended", || canary.is_free()).await;
    assert!(connection.is_closed());
    service.frozen.store(false, Ordering::SeqCst);
    service.gate.add_permits(1);
    server.join().unwrap();
    assert!(canary.all(BYTES, 0) && canary.margins_untouched(BYTES));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_server_that_goes_away_fails_all_calls_and_frees_all_memory() {
    let service = Gated::new();
    let (server, addr) = serve_gated(&service).await;
    let connection = connect(&addr).await;
    let mut calls = Vec::new();
    let mut canaries = Vec::new();
    for _ in 0..20 {
        let (canary, window) = canary(BYTES);
        canaries.push(canary);
        let (connection, payload) = (connection.clone(), vec![Region::from_vec(vec![7; BYTES])]);
        calls.push(tokio::spawn(async move {
            connection.call(Method::StorageRead, body(BYTES as u64), payload, sink(window), LONG).await.map(|_| ())
        }));
    }
    eventually("all requests arrive", || service.arrived.load(Ordering::SeqCst) == 20).await;
    drop(server);
    for call in calls {
        let error = call.await.unwrap().err().unwrap();
        assert_eq!((error.code, error.maybe_applied), (Code::Unavailable, true));
    }
    assert!(connection.is_closed());
    for canary in &canaries {
        eventually("its memory is free", || canary.is_free()).await;
        assert!(canary.all(BYTES, 0) && canary.margins_untouched(BYTES));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn many_transfers_of_all_sizes_some_given_up_bring_the_right_bytes_and_touch_nothing_else() {
    let service = Gated::new();
    service.gate.add_permits(1 << 20);
    let (server, addr) = serve_gated(&service).await;
    let connection = connect(&addr).await;
    let mut calls = tokio::task::JoinSet::new();
    for i in 0..400usize {
        let connection = connection.clone();
        calls.spawn(async move {
            let bytes = [1, 4095, 4096, 4097, 65_536, 300_001, 1 << 20][i % 7] + i;
            let (canary, window) = canary(bytes);
            let payload = vec![Region::from_vec(vec![i as u8; bytes / 2]), Region::from_vec(vec![i as u8; bytes / 3])];
            connection.call(Method::StorageWrite, body(0), payload, Sink::none(), LONG).await.unwrap();
            let patience = if i % 5 == 0 { Duration::from_millis(i as u64 % 13) } else { LONG };
            let call = connection.call(Method::StorageRead, body(bytes as u64), Vec::new(), sink(window), LONG);
            match tokio::time::timeout(patience, call).await {
                Ok(reply) => {
                    let reply = reply.unwrap();
                    assert!(reply.windows[0].iter().all(|byte| *byte == 0xaa), "call {i}");
                    drop(reply);
                }
                Err(_) => {
                    eventually("its memory is free", || canary.is_free()).await;
                    let at_rest: Vec<u8> = (0..bytes).map(|at| canary.memory.byte(MARGIN + at)).collect();
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    assert!((0..bytes).all(|at| canary.memory.byte(MARGIN + at) == at_rest[at]), "call {i}");
                }
            }
            assert!(canary.margins_untouched(bytes), "call {i}");
        });
    }
    while let Some(done) = calls.join_next().await {
        done.unwrap();
    }
    assert!(!connection.is_closed());
    server.shutdown(LONG).await;
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_server_without_rdma_is_reached_by_tcp_unless_only_rdma_is_wanted() {
    let service = Gated::new();
    let plain = fs3_net::HelloPolicy { transport: Transport::tcp(), ..policy() };
    let server = Server::bind("127.0.0.1:0", plain, service.clone()).await.unwrap();
    let addr = server.local_addr().to_string();
    let auto = Transport::new(Mode::Auto, RdmaSettings::default()).unwrap();
    let (connection, _) = Connection::connect(&addr, &Hello { transport: auto, ..hello() }, LONG).await.unwrap();
    assert!(connection.rdma_device().is_none());
    connection.call(Method::Ping, body(0), Vec::new(), Sink::none(), LONG).await.unwrap();
    let error = Connection::connect(&addr, &hello(), LONG).await.err().unwrap();
    assert_eq!(error.code, Code::Unavailable);
    assert!(error.message.contains("transport = \"rdma\""), "{error}");
}

#[test]
fn a_machine_without_rdma_uses_tcp_and_says_why_when_only_rdma_is_wanted() {
    if !fs3_verbs::devices_in(std::path::Path::new(fs3_verbs::SYSFS)).is_empty() {
        return;
    }
    let auto = Transport::new(Mode::Auto, RdmaSettings::default()).unwrap();
    assert!(!auto.has_rdma() && auto.why_not().is_some());
    let error = Transport::new(Mode::Rdma, RdmaSettings::default()).err().unwrap();
    assert!(error.message.contains("transport = \"rdma\"") && error.message.contains("fs3 rdma check"), "{error}");
    assert_eq!("RDMA".parse::<Mode>().err().unwrap().code, Code::InvalidArgument);
}
