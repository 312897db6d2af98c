//! What every transport must do, tried on TCP.

mod common;

use common::*;
use fs3_core::{Code, Region, RegionMut, Result};
use fs3_net::{Connection, REQUESTS_IN_FLIGHT_MAX, Reply, Sink};
use fs3_proto::frame::{BODY_BYTES_MAX, Header, Kind, PAYLOAD_BYTES_MAX};
use fs3_proto::v1::{GetRoutingRequest, Method};
use std::time::Duration;

async fn call(connection: &Connection, method: Method, number: u64) -> Result<Reply> {
    connection.call(method, body(number), Vec::new(), Sink::none(), LONG).await
}

#[tokio::test]
async fn answers_come_out_of_order_and_reach_their_callers() {
    let service = Scripted::new(0);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    let waiting: Vec<_> = (0..10u64)
        .map(|i| {
            let connection = connection.clone();
            tokio::spawn(async move { (i, call(&connection, Method::StorageSync, i).await.unwrap().body) })
        })
        .collect();
    service.waiting.acquire_many(10).await.unwrap().forget();
    // These overtake the ten.
    for i in 100..120u64 {
        let sink = one_window(200);
        let reply = connection.call(Method::StorageRead, body(i), Vec::new(), sink, LONG).await.unwrap();
        assert_eq!(reply.windows[0][..i as usize], pattern(i as usize));
        assert_eq!(reply.lengths, [i as usize]);
    }
    call(&connection, Method::StorageRemove, 10).await.unwrap();
    for task in waiting {
        let (i, answer) = task.await.unwrap();
        assert_eq!(answer, prost::Message::encode_to_vec(&body(i)));
    }
    server.shutdown(LONG).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_calls_than_the_limit_all_complete() {
    let service = Scripted::new(64 << 20);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    let calls: Vec<_> = (0..3 * REQUESTS_IN_FLIGHT_MAX)
        .map(|i| {
            let connection = connection.clone();
            tokio::spawn(async move {
                let bytes = i % 5000;
                let payload = vec![Region::from_vec(pattern(bytes))];
                let sink = one_window(5000);
                let reply =
                    connection.call(Method::StorageWrite, body(bytes as u64), payload, sink, LONG).await.unwrap();
                assert_eq!(reply.windows[0][..bytes], pattern(bytes));
                assert!(connection.in_flight() <= REQUESTS_IN_FLIGHT_MAX);
            })
        })
        .collect();
    for task in calls {
        task.await.unwrap();
    }
    server.shutdown(LONG).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_payload_travels_both_ways_in_pieces() {
    let service = Scripted::new(PAYLOAD_BYTES_MAX);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    let data = Region::from_vec(pattern(PAYLOAD_BYTES_MAX));
    let cuts = [0, 1, 4096, 1 << 20, PAYLOAD_BYTES_MAX];
    let payload: Vec<_> = cuts.windows(2).map(|w| data.slice(w[0], w[1] - w[0])).collect();
    let sink = one_window(PAYLOAD_BYTES_MAX);
    let number = body(PAYLOAD_BYTES_MAX as u64);
    let reply = connection.call(Method::StorageWrite, number, payload, sink, LONG).await.unwrap();
    assert!(reply.windows[0][..] == data[..]);
    server.shutdown(LONG).await;
}

#[tokio::test]
async fn segments_land_in_their_windows_and_holes_stay_untouched() {
    let service = Scripted::new(0);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    // 300 windows of 1000 bytes; segment i is 7 * (i % 100) bytes long, some of them empty.
    let lengths: fn(&[u8]) -> Result<Vec<usize>> = |_| Ok((0..300).map(|i| 7 * (i % 100)).collect());
    let expected = lengths(&[]).unwrap();
    let total: usize = expected.iter().sum();
    let windows = (0..300)
        .map(|_| {
            let mut window = RegionMut::zeroed(1000);
            window.fill(0xee);
            window
        })
        .collect();
    let sink = Sink { windows, lengths };
    let request = GetRoutingRequest { known_version: total as u64, wait_ms: 300, known: None };
    let reply = connection.call(Method::StorageRead, request, Vec::new(), sink, LONG).await.unwrap();
    let data = pattern(total);
    let mut at = 0;
    for (window, &length) in reply.windows.iter().zip(&expected) {
        assert_eq!(window[..length], data[at..at + length]);
        assert!(window[length..].iter().all(|&b| b == 0xee));
        at += length;
    }
    assert_eq!(reply.lengths, expected);
    server.shutdown(LONG).await;
}

#[tokio::test]
async fn a_payload_that_does_not_fit_fails_its_call_only() {
    let service = Scripted::new(0);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    for sink in [one_window(999_999), Sink::none(), Sink { windows: vec![], lengths: |_| Ok(vec![usize::MAX / 2, 9]) }]
    {
        let error = connection.call(Method::StorageRead, body(1_000_000), Vec::new(), sink, LONG).await.err().unwrap();
        assert_eq!(error.code, Code::Protocol);
    }
    let sink = one_window(1_000_000);
    let reply = connection.call(Method::StorageRead, body(1_000_000), Vec::new(), sink, LONG).await.unwrap();
    assert_eq!(reply.windows[0][..], pattern(1_000_000));
    server.shutdown(LONG).await;
}

#[tokio::test]
async fn a_payload_without_memory_for_it_is_refused_as_busy_and_the_connection_lives() {
    let service = Scripted::new(1 << 20);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    let payload = vec![Region::from_vec(pattern(2 << 20))];
    let error = connection.call(Method::StorageWrite, body(0), payload, Sink::none(), LONG).await.err().unwrap();
    assert_eq!(error.code, Code::Busy);
    let (payload, sink) = (vec![Region::from_vec(pattern(1 << 20))], one_window(1 << 20));
    connection.call(Method::StorageWrite, body(1 << 20), payload, sink, LONG).await.unwrap();
    server.shutdown(LONG).await;
    // The server's pool has everything back.
    assert_eq!(service.pool.usage().0, 0);
}

#[tokio::test]
async fn errors_of_the_service_reach_the_caller_with_their_hints() {
    let service = Scripted::new(0);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    let error = call(&connection, Method::StorageSpace, 0).await.err().unwrap();
    assert_eq!((error.code, &*error.message, error.routing_version), (Code::NoSpace, "the disks are full", 42));
    server.shutdown(LONG).await;
}

#[tokio::test]
async fn ping_is_answered_and_unknown_methods_are_refused() {
    let service = Scripted::new(0);
    let (server, addr) = serve(&service).await;
    call(&connect(&addr).await, Method::Ping, 0).await.unwrap();
    let mut raw = RawPeer::greeted(&addr).await;
    let unknown = Header {
        kind: Kind::Request,
        request_id: 5,
        method: 9999,
        status: 0,
        deadline_ms: 0,
        body_bytes: 0,
        payload_bytes: 0,
    };
    tokio::io::AsyncWriteExt::write_all(&mut raw.0, &unknown.encode()).await.unwrap();
    let (header, _) = raw.receive().await.unwrap();
    assert_eq!((header.request_id, header.status), (5, Code::Unimplemented as u16));
    raw.send(Kind::Request, 6, Method::Hello, &[], 0).await;
    assert_eq!(raw.receive().await.unwrap().0.status, Code::Protocol as u16);
    server.shutdown(LONG).await;
}

#[tokio::test]
async fn a_handler_that_panics_fails_its_request_and_not_the_server() {
    let service = Scripted::new(0);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    let error = call(&connection, Method::StorageTruncate, 0).await.err().unwrap();
    assert!(matches!(error.code, Code::Internal | Code::Unavailable) && error.maybe_applied, "{error:?}");
    call(&connect(&addr).await, Method::Ping, 0).await.unwrap();
    server.shutdown(LONG).await;
}

#[tokio::test]
async fn too_large_requests_are_refused_before_they_leave() {
    let service = Scripted::new(0);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    let piece = Region::from_vec(vec![0; 1 << 20]);
    let payload = vec![piece; PAYLOAD_BYTES_MAX / (1 << 20) + 1];
    let error = connection.call(Method::StorageWrite, body(0), payload, Sink::none(), LONG).await.err().unwrap();
    assert_eq!((error.code, error.maybe_applied), (Code::MessageTooBig, false));
    let long = vec![0u8; BODY_BYTES_MAX];
    let error = connection.call(Method::StorageWrite, long, Vec::new(), Sink::none(), LONG).await.err().unwrap();
    assert_eq!(error.code, Code::MessageTooBig);
    call(&connection, Method::Ping, 0).await.unwrap();
    server.shutdown(LONG).await;
}

#[tokio::test]
async fn a_call_without_answer_times_out_and_the_connection_goes_on() {
    let service = Scripted::new(0);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    let short = Duration::from_millis(30);
    let error = connection.call(Method::StorageSync, body(1), Vec::new(), Sink::none(), short).await.err().unwrap();
    assert_eq!((error.code, error.maybe_applied), (Code::Timeout, true));
    assert_eq!(connection.in_flight(), 0);
    // The late answer is thrown away.
    call(&connection, Method::StorageRemove, 1).await.unwrap();
    call(&connection, Method::Ping, 0).await.unwrap();
    server.shutdown(LONG).await;
}

#[tokio::test]
async fn shutdown_waits_for_running_handlers_and_refuses_new_requests() {
    let service = Scripted::new(0);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    let caller = connection.clone();
    let running = tokio::spawn(async move { call(&caller, Method::StorageSync, 1).await });
    service.waiting.acquire().await.unwrap().forget();
    let stopping = tokio::spawn(server.shutdown(LONG));
    loop {
        match call(&connection, Method::Ping, 0).await {
            Ok(_) => tokio::task::yield_now().await,
            Err(error) => break assert_eq!((error.code, error.maybe_applied), (Code::Unavailable, false)),
        }
    }
    assert!(!stopping.is_finished());
    service.gate.add_permits(1);
    running.await.unwrap().unwrap();
    stopping.await.unwrap();
    eventually("the connection ends with the server", || connection.is_closed()).await;
}

#[tokio::test]
async fn bodies_larger_than_any_buffer_travel_both_ways() {
    let service = Scripted::new(0);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    for bytes in [60_000, 65_400, 65_536, 70_000, 1_000_000, BODY_BYTES_MAX - 100] {
        // To the service this is a request for 9000 bytes with a long field that it does not know.
        let message =
            fs3_proto::v1::HelloRequest { protocol_min: 9000, cluster_id: "x".repeat(bytes), ..Default::default() };
        let encoded = prost::Message::encode_to_vec(&message);
        let calls = (0..3).map(|_| {
            let (connection, message) = (connection.clone(), message.clone());
            tokio::spawn(async move {
                connection.call(Method::StorageRead, message, Vec::new(), one_window(9000), LONG).await
            })
        });
        for call in calls.collect::<Vec<_>>() {
            let reply = call.await.unwrap().unwrap();
            assert!(reply.body == encoded);
            assert_eq!(reply.windows[0][..], pattern(9000));
        }
    }
    server.shutdown(LONG).await;
}
