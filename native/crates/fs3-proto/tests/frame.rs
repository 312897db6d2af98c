//! The frame codec against its golden vectors and against arbitrary input.

use fs3_core::{Code, Error};
use fs3_proto::frame::*;
use fs3_proto::v1;
use proptest::prelude::*;
use prost::Message;
use serde_json::{Value, json};
use std::path::PathBuf;

fn any_header() -> impl Strategy<Value = Header> {
    let sizes = (0..=BODY_BYTES_MAX as u32, 0..=PAYLOAD_BYTES_MAX as u32);
    (any::<bool>(), any::<u64>(), any::<u16>(), any::<u16>(), any::<u32>(), sizes).prop_map(
        |(request, request_id, method, status, deadline_ms, (body_bytes, payload_bytes))| {
            let kind = if request { Kind::Request } else { Kind::Response };
            Header {
                kind,
                request_id,
                method,
                status: if request { 0 } else { status },
                deadline_ms: if request { deadline_ms } else { 0 },
                body_bytes,
                payload_bytes: if !request && status != 0 { 0 } else { payload_bytes },
            }
        },
    )
}

proptest! {
    #[test]
    fn decoding_what_was_encoded_gives_the_same_header(header in any_header()) {
        prop_assert_eq!(Header::decode(&header.encode(), Limits::AUTHENTICATED).unwrap(), header);
    }

    #[test]
    fn arbitrary_bytes_are_refused_without_panic(bytes in any::<[u8; HEADER_BYTES]>()) {
        let error = Header::decode(&bytes, Limits::AUTHENTICATED).unwrap_err();
        prop_assert_eq!(error.code, Code::Protocol);
    }

    #[test]
    fn arbitrary_fields_behind_a_right_checksum_never_panic(bytes in any::<[u8; HEADER_BYTES]>()) {
        let mut bytes = bytes;
        bytes[..5].copy_from_slice(b"FS3F\x01");
        bytes[5] = bytes[5] % 3 + 1;
        bytes[6..8].fill(0);
        bytes[32..36].fill(0);
        let crc = fs3_core::crc32c(&bytes[..36]);
        bytes[36..].copy_from_slice(&crc.to_le_bytes());
        if let Ok(header) = Header::decode(&bytes, Limits::AUTHENTICATED) {
            prop_assert_eq!(header.encode(), bytes);
            prop_assert!(header.body_bytes as usize <= BODY_BYTES_MAX);
            prop_assert!(header.payload_bytes as usize <= PAYLOAD_BYTES_MAX);
        }
    }

    #[test]
    fn arbitrary_flags_and_references_never_panic(
        header in any_header(), flags in any::<u16>(), count in any::<u32>(), wire in prop::collection::vec(any::<u8>(), 0..100)
    ) {
        let mut bytes = header.encode();
        bytes[6..8].copy_from_slice(&flags.to_le_bytes());
        bytes[32..36].copy_from_slice(&count.to_le_bytes());
        let crc = fs3_core::crc32c(&bytes[..36]);
        bytes[36..].copy_from_slice(&crc.to_le_bytes());
        match Header::parse_by_reference(&bytes) {
            Ok((back, Some(count))) => prop_assert_eq!(back.encode_by_reference(count), bytes),
            Ok((back, None)) => prop_assert_eq!(back.encode(), bytes),
            Err(error) => prop_assert_eq!(error.code, Code::Protocol),
        }
        if let Ok(all) = Reference::decode_all(&wire, header.payload_bytes as usize) {
            prop_assert_eq!(all.iter().map(|one| one.bytes as usize).sum::<usize>(), header.payload_bytes as usize);
        }
    }

    #[test]
    fn one_flipped_bit_is_always_noticed(header in any_header(), bit in 0..HEADER_BYTES * 8) {
        let mut bytes = header.encode();
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Header::decode(&bytes, Limits::AUTHENTICATED).is_err());
    }

    #[test]
    fn arbitrary_error_bodies_never_panic(status in 1u16.., body in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert_eq!(error_from_response(status, &body).code, Code::from_wire(status));
    }
}

#[test]
fn errors_survive_the_wire() {
    let error = Error::new(Code::StaleChain, "the chain moved on").maybe_applied().with_routing(77);
    let back = error_from_detail(error_to_detail(&error));
    assert_eq!(
        (back.code, back.message, back.maybe_applied, back.routing_version),
        (error.code, error.message, true, 77)
    );
}

#[test]
fn every_wire_code_has_a_native_code() {
    for value in 1..200u16 {
        if let Ok(code) = v1::Code::try_from(i32::from(value)) {
            assert_eq!(Code::from_wire(value) as u16, value, "{}", code.as_str_name());
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn whole(header: &Header, body: &[u8], payload: &[u8]) -> Vec<u8> {
    [&header.encode()[..], body, payload].concat()
}

fn header_json(h: &Header) -> Value {
    json!({
        "version": VERSION, "kind": h.kind as u8, "flags": 0, "request_id": h.request_id,
        "method": h.method, "status": h.status, "deadline_ms": h.deadline_ms,
        "body_bytes": h.body_bytes, "payload_bytes": h.payload_bytes,
        "method_name": v1::Method::try_from(i32::from(h.method)).map_or("unknown", |m| m.as_str_name()),
        "status_name": v1::Code::try_from(i32::from(h.status)).map_or("unknown", |c| c.as_str_name()),
    })
}

fn request(id: u64, method: u16, deadline_ms: u32, body: &[u8], payload: &[u8]) -> Header {
    Header {
        kind: Kind::Request,
        request_id: id,
        method,
        status: 0,
        deadline_ms,
        body_bytes: body.len() as u32,
        payload_bytes: payload.len() as u32,
    }
}

fn response(id: u64, method: u16, status: u16, body: &[u8], payload: &[u8]) -> Header {
    Header { kind: Kind::Response, status, deadline_ms: 0, ..request(id, method, 0, body, payload) }
}

/// Name, message type of the body, header, body, payload.
type ValidCase<'a> = (&'a str, &'a str, Header, &'a [u8], &'a [u8]);

fn valid_frames() -> Vec<Value> {
    let hello = v1::HelloRequest {
        protocol_min: 1,
        protocol_max: 1,
        cluster_id: "c0ffee".into(),
        role: v1::Role::Client as i32,
        peer_id: (0u8..16).collect::<Vec<_>>().into(),
        token: "secret".into(),
        transports: vec!["tcp".into()],
        rdma_ports: Vec::new(),
    };
    let welcome = v1::HelloResponse {
        protocol: 1,
        cluster_id: "c0ffee".into(),
        role: v1::Role::Storage as i32,
        node_id: 7,
        transport: "tcp".into(),
        body_bytes_max: BODY_BYTES_MAX as u32,
        payload_bytes_max: PAYLOAD_BYTES_MAX as u32,
        server_version: "0.1.0".into(),
        ..v1::HelloResponse::default()
    };
    let stale = Error::new(Code::StaleChain, "the chain moved on; refresh the routing").with_routing(42);
    let unsure = Error::new(Code::Timeout, "the deadline passed").maybe_applied();
    let poll = v1::GetRoutingRequest { known_version: 41, wait_ms: 10_000, known: None };
    let (hello, welcome, poll) = (hello.encode_to_vec(), welcome.encode_to_vec(), poll.encode_to_vec());
    let (stale, unsure) = (error_to_detail(&stale).encode_to_vec(), error_to_detail(&unsure).encode_to_vec());
    let payload: Vec<u8> = (0..=255).collect();
    let cases: Vec<ValidCase<'_>> = vec![
        ("hello_request", "HelloRequest", request(1, 0, 5000, &hello, &[]), &hello, &[]),
        ("hello_response", "HelloResponse", response(1, 0, 0, &welcome, &[]), &welcome, &[]),
        ("ping_request", "", request(2, 1, 1000, &[], &[]), &[], &[]),
        ("ping_response", "", response(2, 1, 0, &[], &[]), &[], &[]),
        ("routing_request", "GetRoutingRequest", request(3, 16, 15_000, &poll, &[]), &poll, &[]),
        ("stale_chain_response", "ErrorDetail", response(4, 513, 50, &stale, &[]), &stale, &[]),
        ("maybe_applied_response", "ErrorDetail", response(5, 260, 33, &unsure, &[]), &unsure, &[]),
        ("payload_request", "", request(6, 513, 30_000, &[], &payload), &[], &payload),
        ("payload_response", "", response(6, 512, 0, &[], &payload), &[], &payload),
        ("unknown_method_request", "", request(u64::MAX, 65_535, u32::MAX, &[], &[]), &[], &[]),
        ("unknown_status_response", "", response(8, 1, 65_535, &[], &[]), &[], &[]),
    ];
    let to_json = |(name, message, header, body, payload): ValidCase<'_>| {
        json!({
            "name": name, "hex": hex(&whole(&header, body, payload)), "header": header_json(&header),
            "body_hex": hex(body), "payload_hex": hex(payload), "limits": "authenticated",
            "body_message": if message.is_empty() { String::new() } else { format!("fs3.v1.{message}") },
        })
    };
    cases.into_iter().map(to_json).collect()
}

/// Header bytes with one part overwritten and the checksum made right again.
fn patched(header: Header, at: usize, with: &[u8]) -> Vec<u8> {
    let mut bytes = header.encode();
    bytes[at..at + with.len()].copy_from_slice(with);
    let crc = fs3_core::crc32c(&bytes[..36]);
    bytes[36..].copy_from_slice(&crc.to_le_bytes());
    bytes.to_vec()
}

fn refused_frames() -> Vec<Value> {
    let ping = request(2, 1, 1000, &[], &[]);
    let pong = response(2, 1, 0, &[], &[]);
    let mut bad_crc = ping.encode().to_vec();
    bad_crc[8] ^= 1;
    let at_limit = Header { body_bytes: BODY_BYTES_MAX as u32, payload_bytes: PAYLOAD_BYTES_MAX as u32, ..ping };
    let body_over = Header { body_bytes: BODY_BYTES_MAX as u32 + 1, ..ping };
    let payload_over = Header { payload_bytes: PAYLOAD_BYTES_MAX as u32 + 1, ..ping };
    let hello_over = Header { method: 0, body_bytes: (UNAUTHENTICATED_BYTES_MAX - HEADER_BYTES + 1) as u32, ..ping };
    let cases: Vec<(&str, Vec<u8>, &str, &str)> = vec![
        ("bad_magic", patched(ping, 0, b"FS3G"), "authenticated", "CODE_PROTOCOL"),
        ("unknown_version", patched(ping, 4, &[2]), "authenticated", "CODE_PROTOCOL"),
        ("bad_crc", bad_crc, "authenticated", "CODE_PROTOCOL"),
        ("unknown_kind", patched(ping, 5, &[3]), "authenticated", "CODE_PROTOCOL"),
        ("unknown_flags", patched(ping, 6, &[1]), "authenticated", "CODE_PROTOCOL"),
        ("reserved_not_zero", patched(ping, 32, &[1]), "authenticated", "CODE_PROTOCOL"),
        (
            "references_not_agreed_on",
            response(6, 512, 0, &[], &[0; 64])
                .encode_by_reference(References { count: 2, copying: false, crcs: false })
                .to_vec(),
            "authenticated",
            "CODE_PROTOCOL",
        ),
        ("request_with_status", patched(ping, 18, &[1]), "authenticated", "CODE_PROTOCOL"),
        ("response_with_deadline", patched(pong, 20, &[1]), "authenticated", "CODE_PROTOCOL"),
        (
            "error_response_with_payload",
            whole(&response(2, 1, 1, &[], &[0; 4]), &[], &[0; 4]),
            "authenticated",
            "CODE_PROTOCOL",
        ),
        ("body_too_long", body_over.encode().to_vec(), "authenticated", "CODE_MESSAGE_TOO_BIG"),
        ("payload_too_long", payload_over.encode().to_vec(), "authenticated", "CODE_MESSAGE_TOO_BIG"),
        ("hello_too_long", hello_over.encode().to_vec(), "unauthenticated", "CODE_MESSAGE_TOO_BIG"),
        ("large_before_hello", at_limit.encode().to_vec(), "unauthenticated", "CODE_MESSAGE_TOO_BIG"),
    ];
    cases
        .into_iter()
        .map(|(name, bytes, limits, error)| json!({"name": name, "hex": hex(&bytes), "limits": limits, "error": error}))
        .collect()
}

#[test]
fn references_come_back_where_they_were_agreed_on() {
    let header = response(6, 512, 0, &[], &[0; 300]);
    for (count, copying, crcs) in
        [(1, true, false), (1, false, false), (2, true, true), (REFERENCES_MAX as u32, false, true)]
    {
        let references = References { count, copying, crcs };
        let back = Header::parse_by_reference(&header.encode_by_reference(references)).unwrap();
        assert_eq!(back, (header, Some(references)));
    }
    assert_eq!(Header::parse_by_reference(&header.encode()).unwrap(), (header, None));
    for count in [0, REFERENCES_MAX as u32 + 1] {
        let bytes = header.encode_by_reference(References { count, copying: false, crcs: false });
        assert_eq!(Header::parse_by_reference(&bytes).unwrap_err().code, Code::Protocol);
    }
    let all = [Reference { offset: 1 << 40, bytes: 100 }, Reference { offset: 0, bytes: 200 }];
    let wire: Vec<u8> = all.iter().flat_map(Reference::encode).collect();
    assert_eq!(Reference::decode_all(&wire, 300).unwrap(), all);
    assert_eq!(Reference::decode_all(&wire, 299).unwrap_err().code, Code::Protocol);
}

fn golden_path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../tests/golden/frames.json")
}

#[test]
fn the_golden_vectors_are_what_this_codec_makes() {
    let made: Vec<Value> = valid_frames().into_iter().chain(refused_frames()).collect();
    let text = serde_json::to_string_pretty(&made).unwrap() + "\n";
    if std::env::var_os("FS3_UPDATE_GOLDEN").is_some() {
        std::fs::write(golden_path(), &text).unwrap();
    }
    let stored = std::fs::read_to_string(golden_path()).unwrap();
    assert_eq!(stored, text, "run this test with FS3_UPDATE_GOLDEN=1 and review the difference");
}

#[test]
fn the_golden_vectors_decode_or_are_refused_as_they_say() {
    let text = std::fs::read_to_string(golden_path()).unwrap();
    for case in serde_json::from_str::<Vec<Value>>(&text).unwrap() {
        let hex = case["hex"].as_str().unwrap();
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
        let limits = if case["limits"] == "authenticated" { Limits::AUTHENTICATED } else { Limits::UNAUTHENTICATED };
        let decoded = Header::decode(bytes.first_chunk().unwrap(), limits);
        if let Some(name) = case["error"].as_str() {
            let code = decoded.unwrap_err().code as u16;
            assert_eq!(v1::Code::try_from(i32::from(code)).unwrap().as_str_name(), name, "{}", case["name"]);
        } else {
            let header = decoded.unwrap();
            assert_eq!(header_json(&header), case["header"], "{}", case["name"]);
            assert_eq!(bytes.len(), HEADER_BYTES + header.body_bytes as usize + header.payload_bytes as usize);
        }
    }
}
