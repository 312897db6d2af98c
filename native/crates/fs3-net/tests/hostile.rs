//! Peers that are wrong, slow, dead or malicious.

mod common;

use common::*;
use fs3_core::Code;
use fs3_net::{Connection, Hello, Peers, Sink};
use fs3_proto::frame::{BODY_BYTES_MAX, HEADER_BYTES, Header, Kind, PAYLOAD_BYTES_MAX, UNAUTHENTICATED_BYTES_MAX};
use fs3_proto::v1::Method;
use proptest::prelude::*;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};

#[tokio::test]
async fn a_hello_with_the_wrong_token_or_cluster_is_refused() {
    let service = Scripted::new(0);
    let (server, addr) = serve(&service).await;
    for (cluster, token, code) in [
        ("blue", "", Code::Unauthenticated),
        ("blue", "secre", Code::Unauthenticated),
        ("blue", "secret2", Code::Unauthenticated),
        ("red", "secret", Code::WrongCluster),
        ("red", "wrong", Code::Unauthenticated),
    ] {
        let hello = Hello { cluster_id: cluster.into(), token: token.into(), ..hello() };
        let error = Connection::connect(&addr, &hello, LONG).await.err().unwrap();
        assert_eq!(error.code, code, "{cluster} {token}");
    }
    let any = Hello { cluster_id: String::new(), ..hello() };
    let (_connection, welcome) = Connection::connect(&addr, &any, LONG).await.unwrap();
    assert_eq!((&*welcome.cluster_id, welcome.node_id), ("blue", 7));
    server.shutdown(LONG).await;
}

#[tokio::test]
async fn a_request_before_hello_is_refused() {
    let service = Scripted::new(0);
    let (server, addr) = serve(&service).await;
    let mut raw = RawPeer(TcpStream::connect(&addr).await.unwrap());
    raw.send(Kind::Request, 3, Method::Ping, &[], 0).await;
    assert_eq!(raw.receive().await.unwrap().0.status, Code::Unauthenticated as u16);
    assert!(raw.is_closed_by_peer().await);
    server.shutdown(LONG).await;
}

#[tokio::test]
async fn oversize_is_refused_by_the_header_alone_before_and_after_hello() {
    let service = Scripted::new(usize::MAX / 2);
    let (server, addr) = serve(&service).await;
    let mut before = RawPeer(TcpStream::connect(&addr).await.unwrap());
    before.send(Kind::Request, 1, Method::Hello, &vec![0; UNAUTHENTICATED_BYTES_MAX], 0).await;
    assert_eq!(before.receive().await.unwrap().0.status, Code::MessageTooBig as u16);
    assert!(before.is_closed_by_peer().await);

    for (body_bytes, payload_bytes) in [(BODY_BYTES_MAX + 1, 0), (0, PAYLOAD_BYTES_MAX + 1)] {
        let mut after = RawPeer::greeted(&addr).await;
        let header = Header {
            kind: Kind::Request,
            request_id: 2,
            method: Method::StorageWrite as u16,
            status: 0,
            deadline_ms: 0,
            body_bytes: body_bytes as u32,
            payload_bytes: payload_bytes as u32,
        };
        after.0.write_all(&header.encode()).await.unwrap();
        let (header, _) = after.receive().await.unwrap();
        assert_eq!((header.request_id, header.status), (2, Code::MessageTooBig as u16));
        assert!(after.is_closed_by_peer().await);
    }
    assert_eq!(service.pool.usage(), (0, 0));
    server.shutdown(LONG).await;
}

// The clock of these is virtual: it jumps when everything waits.

#[tokio::test(start_paused = true)]
async fn silent_and_half_spoken_hellos_time_out() {
    let service = Scripted::new(0);
    let (server, addr) = serve(&service).await;
    let mut silent = RawPeer(TcpStream::connect(&addr).await.unwrap());
    assert!(silent.is_closed_by_peer().await);
    let mut half = RawPeer(TcpStream::connect(&addr).await.unwrap());
    half.0.write_all(&b"FS3F\x01\x01"[..]).await.unwrap();
    assert!(half.is_closed_by_peer().await);
    server.shutdown(LONG).await;
}

#[tokio::test(start_paused = true)]
async fn half_sent_frames_time_out_and_give_their_memory_back() {
    let service = Scripted::new(1 << 20);
    let (server, addr) = serve(&service).await;
    let mut half_header = RawPeer::greeted(&addr).await;
    half_header.0.write_all(&b"FS3F\x01\x01"[..]).await.unwrap();
    assert!(half_header.is_closed_by_peer().await);
    let mut half_payload = RawPeer::greeted(&addr).await;
    half_payload.send(Kind::Request, 2, Method::StorageWrite, &[], 1 << 20).await;
    half_payload.0.write_all(&pattern(1 << 19)).await.unwrap();
    assert!(half_payload.is_closed_by_peer().await);
    assert_eq!(service.pool.usage(), (0, 1 << 20));
    server.shutdown(LONG).await;
}

/// A listener for scripted servers.
async fn scripted_server() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    (listener, addr)
}

async fn accept_and_welcome(listener: &TcpListener) -> RawPeer {
    let mut peer = RawPeer(listener.accept().await.unwrap().0);
    peer.welcome().await;
    peer
}

#[tokio::test]
async fn a_server_that_dies_in_the_middle_of_a_payload_fails_all_calls_as_maybe_applied() {
    let (listener, addr) = scripted_server().await;
    let server = tokio::spawn(async move {
        let mut peer = accept_and_welcome(&listener).await;
        let (first, body) = peer.receive().await.unwrap();
        peer.receive().await.unwrap();
        peer.send(Kind::Response, first.request_id, Method::StorageRead, &body, 1 << 20).await;
        peer.0.write_all(&pattern(1 << 19)).await.unwrap();
    });
    let connection = connect_plain(&addr).await;
    let reading = connection.call(Method::StorageRead, body(1 << 20), Vec::new(), one_window(1 << 20), LONG);
    let other = connection.call(Method::Ping, body(0), Vec::new(), Sink::none(), LONG);
    for error in <[_; 2]>::from(tokio::join!(reading, other)).map(|result| result.err().unwrap()) {
        assert_eq!((error.code, error.maybe_applied), (Code::Unavailable, true));
    }
    assert!(connection.is_closed());
    let error = connection.call(Method::Ping, body(0), Vec::new(), Sink::none(), LONG).await.err().unwrap();
    assert_eq!((error.code, error.maybe_applied), (Code::Unavailable, false));
    server.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_call_is_never_written_to_again_and_the_connection_goes_on() {
    let (listener, addr) = scripted_server().await;
    let (half_sent, go_on) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn(async move {
        let mut peer = accept_and_welcome(&listener).await;
        let (first, body) = peer.receive().await.unwrap();
        peer.send(Kind::Response, first.request_id, Method::StorageRead, &body, 1 << 20).await;
        peer.0.write_all(&vec![1; 1 << 19]).await.unwrap();
        go_on.await.unwrap();
        peer.0.write_all(&vec![2; 1 << 19]).await.unwrap();
        let (ping, _) = peer.receive().await.unwrap();
        peer.send(Kind::Response, ping.request_id, Method::Ping, &[], 0).await;
        peer.receive().await
    });
    let connection = connect_plain(&addr).await;
    let memory = Watched::new(1 << 20);
    let sink = Sink { windows: vec![memory.window()], ..one_window(0) };
    let caller = connection.clone();
    let reading = tokio::spawn(async move {
        caller.call(Method::StorageRead, body(1 << 20), Vec::new(), sink, LONG).await.map(|_| ())
    });
    eventually("half of the payload arrives", || memory.byte((1 << 19) - 1) == 1).await;
    reading.abort();
    assert!(reading.await.unwrap_err().is_cancelled());
    assert_eq!(connection.in_flight(), 0);
    half_sent.send(()).unwrap();
    // The answer to this one comes behind the rest of the payload.
    connection.call(Method::Ping, body(0), Vec::new(), Sink::none(), LONG).await.unwrap();
    assert!((1 << 19..1 << 20).all(|at| memory.byte(at) == 0));
    drop(connection);
    assert!(server.await.unwrap().is_none(), "the connection ends with its last clone");
}

#[tokio::test]
async fn answers_to_questions_never_asked_end_the_connection() {
    let (listener, addr) = scripted_server().await;
    let server = tokio::spawn(async move {
        let mut peer = accept_and_welcome(&listener).await;
        peer.send(Kind::Response, 77, Method::Ping, &[], 0).await;
        peer.is_closed_by_peer().await
    });
    let connection = connect_plain(&addr).await;
    assert!(server.await.unwrap());
    eventually("the client closes", || connection.is_closed()).await;
}

#[tokio::test]
async fn the_pool_reconnects_when_the_server_is_back_and_fails_at_once_when_it_is_gone() {
    let service = Scripted::new(0);
    let (server, addr) = serve(&service).await;
    let peers = Peers::new(hello(), 2);
    let ping = || peers.call(&addr, Method::Ping, body(0), Vec::new(), Sink::none(), LONG);
    ping().await.unwrap();
    server.shutdown(LONG).await;
    let deadline = std::time::Instant::now() + LONG;
    // The first may still meet the ending connection; then connecting is refused.
    for _ in 0..5 {
        assert_eq!(ping().await.err().unwrap().code, Code::Unavailable);
    }
    let _server = fs3_net::Server::bind(&addr, policy(), service.clone()).await.unwrap();
    while let Err(error) = ping().await {
        assert_eq!(error.code, Code::Unavailable);
        assert!(std::time::Instant::now() < deadline, "never reconnected");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn the_pool_opens_another_connection_when_all_are_busy_up_to_its_limit() {
    let service = Scripted::new(0);
    let (server, addr) = serve(&service).await;
    let peers = Peers::new(hello(), 3);
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let (peers, addr) = (peers.clone(), addr.clone());
            tokio::spawn(async move {
                peers.call(&addr, Method::StorageSync, body(0), Vec::new(), Sink::none(), LONG).await.map(|_| ())
            })
        })
        .collect();
    service.waiting.acquire_many(20).await.unwrap().forget();
    // One connection by RDMA moves all that there is.
    assert_eq!(peers.connections(&addr), if transport().has_rdma() { 1 } else { 3 });
    service.gate.add_permits(20);
    for call in calls {
        call.await.unwrap().unwrap();
    }
    server.shutdown(LONG).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..Default::default() })]
    #[test]
    fn garbage_after_hello_ends_its_connection_and_nothing_else(
        garbage in prop::collection::vec(any::<u8>(), HEADER_BYTES..4096),
        fields in any::<[u8; 20]>(),
        valid in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let service = Scripted::new(1 << 20);
            let (server, addr) = serve(&service).await;
            let good = connect(&addr).await;
            let mut bad = RawPeer::greeted(&addr).await;
            // A server that waits for the rest of a message gives up at once. Calls and connections by RDMA take real time.
            tokio::time::pause();
            let mut bytes = garbage;
            if valid {
                // A readable header with arbitrary lengths, method and deadline.
                bytes[..8].copy_from_slice(b"FS3F\x01\x01\0\0");
                bytes[8..28].copy_from_slice(&fields);
                bytes[18..20].fill(0);
                bytes[26..28].fill(0);
                bytes[30..36].fill(0);
                let crc = fs3_core::crc32c(&bytes[..36]);
                bytes[36..40].copy_from_slice(&crc.to_le_bytes());
                // Requests that decode must not reach the scripted service.
                bytes[16..18].copy_from_slice(&[0xff, 0xff]);
                let crc = fs3_core::crc32c(&bytes[..36]);
                bytes[36..40].copy_from_slice(&crc.to_le_bytes());
            }
            let _ = bad.0.write_all(&bytes).await;
            let _ = bad.0.shutdown().await;
            while let Some((header, _)) = bad.receive().await {
                assert_ne!(header.status, 0);
            }
            tokio::time::resume();
            good.call(Method::Ping, body(0), Vec::new(), Sink::none(), LONG).await.unwrap();
            assert_eq!(service.pool.usage().0, 0);
            server.shutdown(LONG).await;
        });
    }
}
