use super::*;
use crate::hello::{Hello, HelloPolicy};
use crate::rdma::Transport;
use crate::{Connection, Request, Response, Server, Service, Sink, Way};
use fs3_core::{AlignedBuf, BufferPool, RegionMut, crc_blocks, pack_crcs};
use fs3_proto::frame::Kind;
use fs3_proto::v1::{GetRoutingRequest, HelloRequest, HelloResponse, Method, Role, ShareMemoryRequest};
use prost::Message;
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;

const LONG: Duration = Duration::from_secs(20);
const MIB: usize = 1 << 20;

/// Answers with the payload that it got.
struct Echo {
    pool: BufferPool,
}

impl Service for Echo {
    fn payload_buffer(&self, _method: Method, bytes: usize) -> Option<RegionMut> {
        self.pool.get(bytes)
    }

    async fn handle(&self, request: Request) -> Result<Response> {
        Ok(Response { body: request.body, payload: vec![request.payload], ..Response::default() })
    }
}

fn sharing() -> Transport {
    Arena::enable().unwrap();
    Transport::tcp().sharing_memory()
}

fn policy(transport: &Transport) -> HelloPolicy {
    let (cluster_id, token) = ("blue".into(), "secret".into());
    HelloPolicy { cluster_id, token, node_id: 7, role: Role::Storage, transport: transport.clone() }
}

fn hello(transport: &Transport) -> Hello {
    let (cluster_id, token) = ("blue".into(), "secret".into());
    Hello { cluster_id, token, role: Role::Client, peer_id: [9; 16], transport: transport.clone() }
}

async fn serve(transport: &Transport) -> (Server, String) {
    let echo = Arc::new(Echo { pool: BufferPool::new(64 * MIB) });
    let server = Server::bind("127.0.0.1:0", policy(transport), echo).await.unwrap();
    let addr = server.local_addr().to_string();
    (server, addr)
}

fn patterned(bytes: usize) -> Region {
    let mut data = RegionMut::from_aligned(AlignedBuf::shareable(bytes), bytes);
    data.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i ^ (i >> 8) ^ (i >> 16)) as u8);
    data.freeze()
}

/// Send the payload there and back.
async fn echo(connection: &Connection, payload: Vec<Region>) -> Result<RegionMut> {
    let bytes: usize = payload.iter().map(|piece| piece.len()).sum();
    let lengths = |body: &[u8]| Ok(vec![GetRoutingRequest::decode(body).unwrap().known_version as usize]);
    let sink = Sink { windows: vec![RegionMut::zeroed(bytes)], lengths };
    let body = GetRoutingRequest { known_version: bytes as u64, wait_ms: 0, known: None };
    let mut reply = connection.call(Method::StorageWrite, body, payload, sink, LONG).await?;
    let echoed = reply.windows.remove(0);
    assert_eq!(reply.crcs, pack_crcs(&crc_blocks(0, &echoed)));
    Ok(echoed)
}

fn counter(transport: &Transport, name: &str) -> usize {
    let all = transport.shared_memory_counters();
    all.iter().find(|(known, _)| *known == name).map_or(0, |(_, n)| *n as usize)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn payloads_arrive_intact_by_reference_both_ways() {
    let (ours, theirs) = (sharing(), sharing());
    let (server, addr) = serve(&theirs).await;
    let (connection, _) = Connection::connect(&addr, &hello(&ours), LONG).await.unwrap();
    assert_eq!(connection.way(), Way::SharedMemory);
    assert_eq!(server.connections().list()[0].1, Way::SharedMemory);
    let data = patterned(3 * MIB);
    let mut moved = 0;
    for cuts in
        [vec![0, 3 * MIB], vec![0, 1, 5000, MIB, 3 * MIB], vec![7, 100_007], (0..=2000).map(|i| i * 9).collect()]
    {
        let pieces = cuts.windows(2).map(|w| data.slice(w[0], w[1] - w[0])).collect();
        let (from, to) = (cuts[0], *cuts.last().unwrap());
        assert!(echo(&connection, pieces).await.unwrap()[..] == data[from..to]);
        moved += to - from;
    }
    for transport in [&ours, &theirs] {
        assert_eq!(counter(transport, "shared_memory_sent_bytes"), moved);
        assert_eq!(counter(transport, "shared_memory_received_bytes"), moved);
        assert_eq!(counter(transport, "shared_memory_tcp_bytes"), 0);
    }
    server.shutdown(LONG).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_payloads_go_by_tcp_and_private_memory_is_copied_once_more() {
    let (ours, theirs) = (sharing(), sharing());
    let (server, addr) = serve(&theirs).await;
    let (connection, _) = Connection::connect(&addr, &hello(&ours), LONG).await.unwrap();
    let small = patterned(PAYLOAD_BYTES_MIN - 1);
    assert!(echo(&connection, vec![small.clone()]).await.unwrap()[..] == small[..]);
    assert_eq!(counter(&ours, "shared_memory_sent_bytes") + counter(&ours, "shared_memory_tcp_bytes"), 0);
    let private = Region::from_vec(vec![7; MIB]);
    let bytes = PAYLOAD_BYTES_MIN - 1 + MIB;
    let echoed = echo(&connection, vec![small.clone(), private]).await.unwrap();
    assert!(echoed.starts_with(&small) && echoed.ends_with(&[7; MIB]));
    assert_eq!(counter(&ours, "shared_memory_staged_bytes"), bytes);
    assert_eq!(counter(&ours, "shared_memory_sent_bytes"), bytes);
    assert_eq!(counter(&ours, "shared_memory_tcp_bytes"), 0);
    server.shutdown(LONG).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_end_can_do_without() {
    let data = patterned(MIB);
    for (client, service) in [(Transport::tcp(), sharing()), (sharing(), Transport::tcp())] {
        let (server, addr) = serve(&service).await;
        let (connection, _) = Connection::connect(&addr, &hello(&client), LONG).await.unwrap();
        assert_eq!(connection.way(), Way::Tcp);
        assert!(echo(&connection, vec![data.clone()]).await.unwrap()[..] == data[..]);
        server.shutdown(LONG).await;
    }
}

/// Two ends of a connection that exists only here.
fn pair() -> (SharedMemory, SharedMemory) {
    let arena = Arena::enable().unwrap();
    let (control, page) = Control::create().unwrap();
    let theirs = Mapped::map(&File::from(arena.descriptor().try_clone_to_owned().unwrap())).unwrap();
    let server = SharedMemory::new(control, true, true, None, Arc::default());
    let client = SharedMemory::new(Control::map(&page).unwrap(), false, false, Some(theirs), Arc::default());
    (server, client)
}

fn message(payload: Vec<Region>) -> Outgoing {
    let payload_bytes = payload.iter().map(|piece| piece.len() as u32).sum();
    let header = Header {
        kind: Kind::Response,
        request_id: 1,
        method: Method::StorageRead as u16,
        status: 0,
        deadline_ms: 0,
        body_bytes: 0,
        payload_bytes,
    };
    let (head, body) = (header.encode().to_vec(), bytes::Bytes::new());
    Outgoing { head, body, payload, segments: Vec::new(), landing: None, permit: None }
}

/// Refer to the payload; its references, if it went so.
fn referred(end: &SharedMemory, payload: Vec<Region>) -> Option<Vec<Reference>> {
    let mut message = message(payload);
    end.refer(&mut message);
    let (header, count) = Header::parse_by_reference(message.head.first_chunk().unwrap()).unwrap();
    count.map(|_| Reference::decode_all(&message.payload[0], header.payload_bytes as usize).unwrap())
}

struct Window(Vec<u8>, usize);

impl Landing for Window {
    fn fill(&mut self, _tail: &mut [u8], io: crate::link::Fill<'_>) -> Option<std::io::Result<usize>> {
        Some(io(&mut [IoSliceMut::new(&mut self.0[self.1..])]))
    }

    fn advance(&mut self, bytes: usize) {
        self.1 += bytes;
    }

    fn refuse(&mut self, _error: Error) {}
}

#[test]
fn what_the_peer_has_copied_is_let_go_of_in_order() {
    let (server, client) = pair();
    let pool = BufferPool::new(64 * MIB);
    let payload = |byte| {
        let mut region = pool.get(MIB).unwrap();
        region.fill(byte);
        vec![region.freeze()]
    };
    let sent: Vec<_> = (0..3).map(|i| referred(&server, payload(i)).unwrap()).collect();
    server.release();
    assert_eq!(pool.usage().0, 3 * MIB);
    for (i, references) in sent.iter().enumerate() {
        let mut window = Window(vec![9; MIB], 0);
        client.receive(references, &mut window).unwrap();
        assert!(window.0.iter().all(|&byte| byte == i as u8));
        server.release();
        assert_eq!(pool.usage().0, (2 - i) * MIB);
    }
}

#[test]
fn beyond_the_bound_payloads_go_by_tcp_until_some_are_copied() {
    let (server, client) = pair();
    let payload = patterned(MIB);
    let first = referred(&server, vec![payload.clone()]).unwrap();
    for _ in 1..HELD_BYTES_MAX / MIB {
        assert!(referred(&server, vec![payload.clone()]).is_some());
    }
    assert!(referred(&server, vec![payload.clone()]).is_none());
    client.receive(&first, &mut Window(vec![0; MIB], 0)).unwrap();
    server.release();
    assert!(referred(&server, vec![payload.clone()]).is_some());
    assert_eq!(server.counters.tcp_bytes.load(Ordering::Relaxed), MIB as u64);
}

#[test]
fn a_sender_that_has_ended_keeps_nothing_and_its_late_payload_is_refused() {
    let (server, client) = pair();
    let pool = BufferPool::new(4 * MIB);
    let references = referred(&server, vec![pool.get(MIB).unwrap().freeze()]).unwrap();
    server.end();
    assert_eq!(pool.usage().0, 0);
    let error = client.receive(&references, &mut Window(vec![0; MIB], 0)).unwrap_err();
    assert_eq!(error.code, Code::Unavailable);
    assert!(referred(&server, vec![patterned(MIB)]).is_none());
}

#[test]
fn a_count_that_is_too_high_releases_no_more_than_was_sent() {
    let (server, client) = pair();
    client.control.lane(client.incoming).consumed.store(u64::MAX, Ordering::Relaxed);
    for _ in 0..3 {
        assert!(referred(&server, vec![patterned(MIB)]).is_some());
        server.release();
        assert_eq!(server.held.lock().bytes, 0);
    }
}

#[test]
fn a_reference_beyond_the_memory_is_refused() {
    let (_server, client) = pair();
    for offset in [u64::MAX, u64::MAX - 5, 1 << 50] {
        let reference = Reference { offset, bytes: 10 };
        let error = client.receive(&[reference], &mut Window(vec![0; 10], 0)).unwrap_err();
        assert_eq!(error.code, Code::Protocol);
    }
    let longer = Reference { offset: 0, bytes: 11 };
    assert!(client.receive(&[longer], &mut Window(vec![0; 10], 0)).is_err());
}

/// A client by hand, up to the answer to its hello.
fn greeted(addr: &str) -> (TcpStream, HelloResponse) {
    let mut stream = TcpStream::connect(addr).unwrap();
    let request = HelloRequest {
        protocol_min: 1,
        protocol_max: 1,
        cluster_id: "blue".into(),
        role: Role::Client as i32,
        peer_id: vec![9; 16].into(),
        token: "secret".into(),
        transports: vec!["shm".into(), "tcp".into()],
        rdma_ports: Vec::new(),
    };
    let body = ask(&mut stream, Method::Hello, &request.encode_to_vec());
    (stream, HelloResponse::decode(&body[..]).unwrap())
}

fn request(method: Method, body: &[u8], payload_bytes: usize) -> Header {
    let (body_bytes, payload_bytes) = (body.len() as u32, payload_bytes as u32);
    let method = method as u16;
    Header { kind: Kind::Request, request_id: 1, method, status: 0, deadline_ms: 9999, body_bytes, payload_bytes }
}

fn ask(stream: &mut TcpStream, method: Method, body: &[u8]) -> Vec<u8> {
    stream.write_all(&[&request(method, body, 0).encode()[..], body].concat()).unwrap();
    let mut head = [0; HEADER_BYTES];
    stream.read_exact(&mut head).unwrap();
    let header = Header::parse(&head).unwrap();
    assert_eq!(header.status, 0);
    let mut body = vec![0; header.body_bytes as usize];
    stream.read_exact(&mut body).unwrap();
    body
}

fn is_closed(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(LONG)).unwrap();
    matches!(stream.read(&mut [0; 1]), Ok(0))
        || stream.read(&mut [0; 1]).is_err_and(|e| e.raw_os_error().is_some_and(|code| code == libc::ECONNRESET))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_reference_ends_the_connection() {
    let transport = sharing();
    let (server, addr) = serve(&transport).await;
    let refused = tokio::task::spawn_blocking(move || {
        let (mut stream, welcome) = greeted(&addr);
        let memory = fetch(&welcome.shared_memory.unwrap(), Arc::default()).unwrap();
        ask(&mut stream, Method::ShareMemory, &ShareMemoryRequest { ready: true }.encode_to_vec());
        let reference = Reference { offset: u64::MAX - 9, bytes: 10 };
        let head = request(Method::StorageWrite, &[], 10).encode_by_reference(1);
        stream.write_all(&[&head[..], &reference.encode()].concat()).unwrap();
        let closed = is_closed(&mut stream);
        drop(memory);
        closed
    });
    assert!(refused.await.unwrap());
    server.shutdown(LONG).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_at_the_socket_gets_no_memory() {
    let transport = sharing();
    let (server, addr) = serve(&transport).await;
    let outcome = tokio::task::spawn_blocking(move || {
        let (mut stream, welcome) = greeted(&addr);
        let offer = welcome.shared_memory.unwrap();
        let guessed = fs3_proto::v1::SharedMemoryOffer { nonce: vec![1; 16].into(), ..offer.clone() };
        assert!(fetch(&guessed, Arc::default()).is_err());
        // The client itself still gets it.
        let memory = fetch(&offer, Arc::default()).unwrap();
        assert!(memory.takes_references());
        ask(&mut stream, Method::ShareMemory, &ShareMemoryRequest { ready: true }.encode_to_vec());
        ask(&mut stream, Method::Ping, &[])
    });
    assert!(outcome.await.unwrap().is_empty());
    server.shutdown(LONG).await;
}
