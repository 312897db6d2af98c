use super::*;
use crate::hello::{Hello, HelloPolicy};
use crate::rdma::Transport;
use crate::{Connection, Payload, Request, Response, Server, Service, Sink, Way};
use bytes::Bytes;
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
    /// The checksums that came with the last payload, and those made of it.
    crcs: Mutex<(Option<Bytes>, Option<Bytes>)>,
}

impl Service for Echo {
    fn payload_buffer(&self, _method: Method, bytes: usize) -> Option<RegionMut> {
        self.pool.get(bytes)
    }

    fn wants_crcs(&self, _method: Method) -> bool {
        true
    }

    async fn handle(&self, request: Request) -> Result<Response> {
        *self.crcs.lock() = (request.sent_crcs, request.payload_crcs);
        Ok(Response { body: request.body, payload: vec![request.payload], ..Response::default() })
    }
}

/// Takes payloads in parts of this many bytes.
struct Parting {
    part_bytes: usize,
    pool: BufferPool,
    crcs: Mutex<Option<Bytes>>,
}

impl Service for Parting {
    fn payload_buffer(&self, _method: Method, _bytes: usize) -> Option<RegionMut> {
        None
    }

    fn payload_parts(&self, _method: Method, _body: &[u8], bytes: usize) -> Option<Vec<RegionMut>> {
        let lengths = (0..bytes).step_by(self.part_bytes).map(|at| self.part_bytes.min(bytes - at));
        lengths.map(|length| self.pool.get(length)).collect()
    }

    fn wants_crcs(&self, _method: Method) -> bool {
        true
    }

    async fn handle(&self, request: Request) -> Result<Response> {
        *self.crcs.lock() = request.payload_crcs;
        let payload = if request.parts.is_empty() { vec![request.payload] } else { request.parts };
        Ok(Response { body: request.body, payload, ..Response::default() })
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
    let (server, addr, _) = serve_echo(transport).await;
    (server, addr)
}

async fn serve_echo(transport: &Transport) -> (Server, String, Arc<Echo>) {
    let echo = Arc::new(Echo { pool: BufferPool::new(64 * MIB), crcs: Mutex::default() });
    let server = Server::bind("127.0.0.1:0", policy(transport), echo.clone()).await.unwrap();
    let addr = server.local_addr().to_string();
    (server, addr, echo)
}

fn patterned(bytes: usize) -> Region {
    let mut data = RegionMut::from_aligned(AlignedBuf::shareable(bytes), bytes);
    data.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i ^ (i >> 8) ^ (i >> 16)) as u8);
    data.freeze()
}

/// Send the payload there and back.
async fn echo(connection: &Connection, payload: impl Into<Payload>) -> Result<RegionMut> {
    let payload = payload.into();
    let bytes: usize = payload.pieces.iter().map(|piece| piece.len()).sum();
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
        let pieces: Vec<_> = cuts.windows(2).map(|w| data.slice(w[0], w[1] - w[0])).collect();
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
async fn a_payload_comes_into_the_parts_that_the_service_gave() {
    let data = patterned(MIB + 4097);
    for transport in [sharing(), Transport::tcp()] {
        // In one part, in a few, in more than one system call takes.
        for part_bytes in [2 * MIB, 300_000, 65_536, 4096] {
            let service = Arc::new(Parting { part_bytes, pool: BufferPool::new(64 * MIB), crcs: Mutex::default() });
            let server = Server::bind("127.0.0.1:0", policy(&transport), service.clone()).await.unwrap();
            let addr = server.local_addr().to_string();
            let (connection, _) = Connection::connect(&addr, &hello(&transport), LONG).await.unwrap();
            for bytes in [1, 5000, 70_000, MIB, MIB + 4097] {
                let payload = vec![data.slice(0, bytes)];
                assert!(echo(&connection, payload).await.unwrap()[..] == data[..bytes], "{bytes} by {part_bytes}");
                let crcs: Vec<u8> =
                    data[..bytes].chunks(part_bytes).flat_map(|p| pack_crcs(&crc_blocks(0, p))).collect();
                assert!(service.crcs.lock().as_deref() == Some(&crcs[..]), "{bytes} by {part_bytes}");
            }
            server.shutdown(LONG).await;
        }
    }
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
async fn checksums_come_with_a_payload_that_is_copied_on_the_way() {
    let (ours, theirs) = (sharing(), sharing());
    let (server, addr, service) = serve_echo(&theirs).await;
    let (connection, _) = Connection::connect(&addr, &hello(&ours), LONG).await.unwrap();
    let private = |bytes| Region::from_vec(patterned(bytes).to_vec());
    let cases = [
        (vec![private(MIB + 5)], true),
        (vec![private(64 << 10), private(64 << 10), private(100_001)], true),
        (vec![private(100_001), private(64 << 10)], false),
        (vec![private(OVERLAP_BYTES_MIN - 1)], false),
        (vec![patterned(MIB)], false),
    ];
    for (pieces, come) in cases {
        let all: Vec<u8> = pieces.iter().flat_map(|piece| piece.to_vec()).collect();
        assert_eq!(connection.sends_crcs(&pieces), come);
        assert!(echo(&connection, Payload { pieces, with_crcs: true }).await.unwrap()[..] == all);
        let expected = pack_crcs(&crc_blocks(0, &all));
        assert_eq!(service.crcs.lock().0.as_deref(), come.then_some(&expected[..]));
        assert_eq!(service.crcs.lock().1.as_deref(), Some(&expected[..]));
    }
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
    Outgoing { head, body, payload, with_crcs: false, segments: Vec::new(), landing: None, permit: None }
}

/// Refer to the payload; its references, if it went so.
fn referred(end: &SharedMemory, payload: Vec<Region>) -> Option<Vec<Reference>> {
    let mut message = message(payload);
    end.refer(&mut message, None);
    let (header, references) = Header::parse_by_reference(message.head.first_chunk().unwrap()).unwrap();
    references.map(|_| Reference::decode_all(&message.payload[0], header.payload_bytes as usize).unwrap())
}

/// Refer to a payload in private memory before it is copied.
fn staged(end: &SharedMemory, payload: Vec<Region>) -> (Vec<Reference>, Staging) {
    let mut message = message(payload);
    let mut staging = end.stage(&mut message).expect("it is large enough");
    end.refer(&mut message, Some(&mut staging));
    let (header, references) = Header::parse_by_reference(message.head.first_chunk().unwrap()).unwrap();
    assert_eq!(references, Some(References { count: 1, copying: true, crcs: false }));
    (Reference::decode_all(&message.payload[0], header.payload_bytes as usize).unwrap(), staging)
}

struct Window(Vec<u8>, usize);

impl Landing for Window {
    fn fill(&mut self, _bytes: usize, _tail: &mut [u8], io: crate::link::Fill<'_>) -> Option<std::io::Result<usize>> {
        Some(io(&mut [IoSliceMut::new(&mut self.0[self.1..])]))
    }

    fn advance(&mut self, bytes: usize) {
        self.1 += bytes;
    }

    fn refuse(&mut self, _error: Error) {}
}

#[tokio::test]
async fn what_the_peer_has_copied_is_let_go_of_in_order() {
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
        client.receive(references, None, false, &mut window).await.unwrap();
        assert!(window.0.iter().all(|&byte| byte == i as u8));
        server.release();
        assert_eq!(pool.usage().0, (2 - i) * MIB);
    }
}

#[tokio::test]
async fn beyond_the_bound_payloads_go_by_tcp_until_some_are_copied() {
    let (server, client) = pair();
    let payload = patterned(MIB);
    let first = referred(&server, vec![payload.clone()]).unwrap();
    for _ in 1..HELD_BYTES_MAX / MIB {
        assert!(referred(&server, vec![payload.clone()]).is_some());
    }
    assert!(referred(&server, vec![payload.clone()]).is_none());
    client.receive(&first, None, false, &mut Window(vec![0; MIB], 0)).await.unwrap();
    server.release();
    assert!(referred(&server, vec![payload.clone()]).is_some());
    assert_eq!(server.counters.tcp_bytes.load(Ordering::Relaxed), MIB as u64);
}

#[tokio::test]
async fn a_sender_that_has_ended_keeps_nothing_and_its_late_payload_is_refused() {
    let (server, client) = pair();
    let pool = BufferPool::new(4 * MIB);
    let references = referred(&server, vec![pool.get(MIB).unwrap().freeze()]).unwrap();
    server.end();
    assert_eq!(pool.usage().0, 0);
    let error = client.receive(&references, None, false, &mut Window(vec![0; MIB], 0)).await.unwrap_err();
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

#[tokio::test]
async fn a_reference_beyond_the_memory_is_refused() {
    let (_server, client) = pair();
    for offset in [u64::MAX, u64::MAX - 5, 1 << 50] {
        let reference = Reference { offset, bytes: 10 };
        let error = client.receive(&[reference], None, false, &mut Window(vec![0; 10], 0)).await.unwrap_err();
        assert_eq!(error.code, Code::Protocol);
    }
    let longer = Reference { offset: 0, bytes: 11 };
    assert!(client.receive(&[longer], None, false, &mut Window(vec![0; 10], 0)).await.is_err());
    let payload = Reference { offset: 0, bytes: 4097 };
    for (offset, bytes) in [(0, 4), (0, 12), (u64::MAX - 7, 8)] {
        let crcs = Some(Reference { offset, bytes });
        assert!(client.receive(&[payload], crcs, false, &mut Window(vec![0; 4097], 0)).await.is_err());
    }
}

/// Two ends of which the client sends by reference.
fn sending_pair() -> (SharedMemory, SharedMemory) {
    let arena = Arena::enable().unwrap();
    let (control, page) = Control::create().unwrap();
    let theirs = Mapped::map(&File::from(arena.descriptor().try_clone_to_owned().unwrap())).unwrap();
    let server = SharedMemory::new(control, true, false, Some(theirs), Arc::default());
    let client = SharedMemory::new(Control::map(&page).unwrap(), false, true, None, Arc::default());
    (server, client)
}

fn private(byte: u8) -> Region {
    Region::from_vec((0..MIB + 5).map(|i| byte ^ (i >> 10) as u8).collect())
}

#[tokio::test]
async fn a_receiver_follows_the_sender_that_still_copies() {
    let (server, client) = sending_pair();
    for round in 0..3 * COPYING_MAX {
        let (mine, data) = (private(round as u8), private(round as u8));
        let (references, staging) = staged(&client, vec![mine.slice(0, 7), mine.slice(7, mine.len() - 7)]);
        let mut window = Window(vec![0; data.len()], 0);
        let mut received = Box::pin(server.receive(&references, None, true, &mut window));
        let waiting = tokio::time::timeout(FOLLOW_EVERY, received.as_mut()).await;
        assert!(waiting.is_err(), "nothing was copied yet");
        client.copy_staged(&staging);
        received.await.unwrap();
        assert!(window.0[..] == data[..]);
        client.release();
        assert_eq!(client.held.lock().bytes, 0);
    }
}

#[tokio::test]
async fn a_sender_that_ends_while_it_copies_frees_its_receiver_and_keeps_the_memory() {
    let (server, client) = sending_pair();
    let (references, staging) = staged(&client, vec![private(1)]);
    let mut window = Window(vec![0; MIB + 5], 0);
    let received = server.receive(&references, None, true, &mut window);
    client.end();
    assert_eq!(received.await.unwrap_err().code, Code::Unavailable);
    client.copy_staged(&staging);
    assert!(staging.room.region[..] == private(1)[..]);
}

#[test]
fn with_many_in_flight_a_payload_is_copied_before_it_leaves() {
    let (_server, client) = sending_pair();
    let staged: Vec<_> = (0..COPYING_MAX / 2).map(|_| staged(&client, vec![private(3)])).collect();
    let mut message = message(vec![private(3)]);
    assert!(client.stage(&mut message).is_none());
    assert!(Arena::get().unwrap().locate(message.payload[0].as_ptr(), MIB + 5).is_some());
    drop(staged);
}

#[tokio::test]
async fn what_could_not_go_by_reference_is_not_copied() {
    let (_server, client) = sending_pair();
    let mut message = message(vec![private(4)]);
    let mut staging = client.stage(&mut message).unwrap();
    client.end();
    client.refer(&mut message, Some(&mut staging));
    client.copy_staged(&staging);
    assert!(message.payload[0][..] == private(4)[..]);
    assert_eq!(Header::parse_by_reference(message.head.first_chunk().unwrap()).unwrap().1, None);
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
        let head = request(Method::StorageWrite, &[], 10).encode_by_reference(References {
            count: 1,
            copying: false,
            crcs: false,
        });
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
