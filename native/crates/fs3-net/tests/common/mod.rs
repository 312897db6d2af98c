//! What the tests of a transport share: a scripted service and raw peers.
#![allow(dead_code, missing_docs)]

use fs3_core::{BufferPool, Code, Error, Region, RegionMut, Result};
use fs3_net::{
    Connection, Hello, HelloPolicy, Mode, RdmaSettings, Request, Response, Server, Service, Sink, Transport,
};
use fs3_proto::frame::{HEADER_BYTES, Header, Kind, Limits};
use fs3_proto::v1::{GetRoutingRequest, HelloResponse, Method, Role};
use prost::Message;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

pub const LONG: Duration = Duration::from_secs(20);

/// What the service does with each method; the request body is a GetRoutingRequest of two numbers.
/// `StorageWrite` echoes the payload, `StorageRead` answers `known_version` patterned bytes, `StorageSync` waits for the gate,
/// `StorageRemove` opens it, `StorageTruncate` panics, `StorageSpace` fails with NoSpace.
pub struct Scripted {
    pub pool: BufferPool,
    pub gate: Semaphore,
    /// Counts requests that wait at the gate.
    pub waiting: Semaphore,
}

impl Scripted {
    pub fn new(pool_bytes: usize) -> Arc<Self> {
        let (gate, waiting) = (Semaphore::new(0), Semaphore::new(0));
        Arc::new(Self { pool: BufferPool::new(pool_bytes), gate, waiting })
    }
}

impl Service for Scripted {
    fn payload_buffer(&self, _method: Method, bytes: usize) -> Option<RegionMut> {
        self.pool.get(bytes)
    }

    async fn handle(&self, request: Request) -> Result<Response> {
        assert_eq!(request.peer.peer_id, [9; 16]);
        let body = GetRoutingRequest::decode(request.body.clone()).unwrap();
        match request.method {
            Method::StorageWrite => {
                Ok(Response { body: request.body, payload: vec![request.payload], ..Response::default() })
            }
            Method::StorageRead => {
                let payload = Region::from_vec(pattern(body.known_version as usize));
                // `wait_ms` asks for that many segments of rising length.
                let segments = (0..body.wait_ms).map(|i| 7 * (i % 100)).collect();
                Ok(Response { body: request.body, payload: vec![payload], segments })
            }
            Method::StorageSync => {
                self.waiting.add_permits(1);
                self.gate.acquire().await.unwrap().forget();
                Ok(Response { body: request.body, ..Response::default() })
            }
            Method::StorageRemove => {
                self.gate.add_permits(body.known_version as usize);
                Ok(Response::default())
            }
            Method::StorageTruncate => panic!("a bug in the handler"),
            _ => Err(Error::new(Code::NoSpace, "the disks are full").with_routing(42)),
        }
    }
}

pub fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
}

pub fn body(number: u64) -> GetRoutingRequest {
    GetRoutingRequest { known_version: number, wait_ms: 0, known: None }
}

/// TCP; or RDMA with the device that FS3_TEST_RDMA names.
pub fn transport() -> Transport {
    static TRANSPORT: LazyLock<Transport> = LazyLock::new(|| match std::env::var("FS3_TEST_RDMA") {
        Ok(device) => {
            Transport::new(Mode::Rdma, RdmaSettings { devices: vec![device], ..RdmaSettings::default() }).unwrap()
        }
        Err(_) => Transport::tcp(),
    });
    TRANSPORT.clone()
}

pub fn policy() -> HelloPolicy {
    HelloPolicy {
        cluster_id: "blue".into(),
        token: "secret".into(),
        node_id: 7,
        role: Role::Storage,
        transport: transport(),
    }
}

pub fn hello() -> Hello {
    Hello {
        cluster_id: "blue".into(),
        role: Role::Client,
        peer_id: [9; 16],
        token: "secret".into(),
        transport: transport(),
    }
}

pub async fn serve(service: &Arc<Scripted>) -> (Server, String) {
    let server = Server::bind("127.0.0.1:0", policy(), service.clone()).await.unwrap();
    let addr = server.local_addr().to_string();
    (server, addr)
}

pub async fn connect(addr: &str) -> Connection {
    let connection = connect_plain(addr).await;
    assert_eq!(connection.rdma_device().is_some(), transport().has_rdma());
    connection
}

/// For servers that speak TCP by hand.
pub async fn connect_plain(addr: &str) -> Connection {
    Connection::connect(addr, &hello(), LONG).await.unwrap().0
}

/// One window that takes a payload as long as the body's first number says.
pub fn one_window(bytes: usize) -> Sink {
    let lengths = |body: &[u8]| Ok(vec![GetRoutingRequest::decode(body).unwrap().known_version as usize]);
    Sink { windows: vec![RegionMut::zeroed(bytes)], lengths }
}

/// Frames written and read by hand.
pub struct RawPeer(pub TcpStream);

impl RawPeer {
    /// A client that has said hello.
    pub async fn greeted(addr: &str) -> Self {
        let mut peer = Self(TcpStream::connect(addr).await.unwrap());
        peer.send_hello(&hello()).await;
        let (header, _) = peer.receive().await.unwrap();
        assert_eq!(header.status, 0);
        peer
    }

    pub async fn send_hello(&mut self, hello: &Hello) {
        let request = fs3_proto::v1::HelloRequest {
            protocol_min: 1,
            protocol_max: 1,
            cluster_id: hello.cluster_id.clone(),
            role: hello.role as i32,
            peer_id: hello.peer_id.to_vec().into(),
            token: hello.token.clone(),
            transports: vec!["tcp".into()],
            rdma_ports: Vec::new(),
        };
        self.send(Kind::Request, 1, Method::Hello, &request.encode_to_vec(), 0).await;
    }

    /// The server's part of the hello.
    pub async fn welcome(&mut self) {
        let (header, _) = self.receive().await.unwrap();
        assert_eq!(header.method, Method::Hello as u16);
        let response = HelloResponse { protocol: 1, cluster_id: "blue".into(), ..Default::default() };
        self.send(Kind::Response, header.request_id, Method::Hello, &response.encode_to_vec(), 0).await;
    }

    /// Send header and body; the payload is only announced.
    pub async fn send(&mut self, kind: Kind, request_id: u64, method: Method, body: &[u8], payload_bytes: usize) {
        let header = Header {
            kind,
            request_id,
            method: method as u16,
            status: 0,
            deadline_ms: if kind == Kind::Request { 10_000 } else { 0 },
            body_bytes: body.len() as u32,
            payload_bytes: payload_bytes as u32,
        };
        self.0.write_all(&[&header.encode()[..], body].concat()).await.unwrap();
    }

    /// The next frame's header and body; `None` when the other side closed.
    pub async fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut head = [0u8; HEADER_BYTES];
        self.0.read_exact(&mut head).await.ok()?;
        let header = Header::decode(&head, Limits::AUTHENTICATED).unwrap();
        let mut body = vec![0u8; header.body_bytes as usize];
        self.0.read_exact(&mut body).await.ok()?;
        Some((header, body))
    }

    /// Whether the other side closes the connection (rather than sending more).
    pub async fn is_closed_by_peer(&mut self) -> bool {
        matches!(self.0.read(&mut [0u8; 1]).await, Ok(0) | Err(_))
    }
}

/// Memory whose content a test may watch while it is also a window of a call.
pub struct Watched {
    owner: Arc<fs3_core::AlignedBuf>,
}

impl Watched {
    pub fn new(bytes: usize) -> Self {
        Self { owner: Arc::new(fs3_core::AlignedBuf::new(bytes)) }
    }

    pub fn window(&self) -> RegionMut {
        // SAFETY: the owner keeps the memory; the test itself only reads it, through `byte`.
        unsafe { RegionMut::from_raw(self.owner.as_mut_ptr(), self.owner.len(), self.owner.clone()) }
    }

    pub fn byte(&self, at: usize) -> u8 {
        assert!(at < self.owner.len());
        // SAFETY: within the memory; volatile because a call may be writing to it.
        unsafe { self.owner.as_mut_ptr().add(at).read_volatile() }
    }
}

/// Wait for a condition that another task or the kernel brings about.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + LONG;
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "never happened: {what}");
        tokio::task::yield_now().await;
    }
}
