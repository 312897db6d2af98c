//! Entries of the key-value cache that are chunks, on three engines and one chain.

mod common;

use bytes::Bytes;
use common::*;
use fs3_core::{ChunkId, Code, KV_SPACE, KvHeader, Region, crc_blocks, pack_crcs};
use fs3_proto::v1::*;

const NAMESPACE: u64 = 91;
const ADDRESS: u128 = (7 << 64) | 0x1_0000_0005;

fn settings(share_bytes: u64) -> Option<KvNamespace> {
    Some(KvNamespace { id: NAMESPACE, share_bytes, ttl_ms: 0, generation: 1, chunk_bytes: CHUNK_BYTES })
}

fn address(hash: u128) -> Bytes {
    Bytes::copy_from_slice(&hash.to_be_bytes())
}

/// Put an entry; why it was refused.
fn put(c: &mut Cluster, node: usize, hash: u128, key: &str, value: &[u8]) -> Option<Code> {
    c.sequence += 1;
    put_numbered(c, node, hash, key, value, c.sequence)
}

fn put_numbered(c: &Cluster, node: usize, hash: u128, key: &str, value: &[u8], sequence: u64) -> Option<Code> {
    let header = KvHeader {
        key: key.as_bytes(),
        piece: 0,
        length: value.len() as u32,
        total: value.len() as u64,
        writer: 1,
        sequence,
    };
    let entry = [header.encode(), value.to_vec()].concat();
    send(c, node, hash, key, entry, sequence)
}

fn send(c: &Cluster, node: usize, hash: u128, key: &str, entry: Vec<u8>, sequence: u64) -> Option<Code> {
    let op = KvPutOp {
        chain_id: CHAIN,
        chain_version: c.chain_version(),
        target_id: target(node),
        address: address(hash),
        key: key.to_owned().into(),
        length: entry.len() as u32,
        sequence,
        crcs: pack_crcs(&crc_blocks(0, &entry)).into(),
        ..KvPutOp::default()
    };
    let request = KvPutRequest { namespace: settings(0), ops: vec![op] };
    let body = c.call(node, Method::StorageKvPut, request, vec![Region::from_vec(entry)]).unwrap();
    let response = <KvPutResponse as prost::Message>::decode(body).unwrap();
    let code = response.results[0].code as u16;
    (code != 0).then(|| Code::from_wire(code))
}

fn get(c: &Cluster, node: usize, hash: u128, key: &str) -> KvGetResult {
    let op = KvGetOp {
        chain_id: CHAIN,
        chain_version: c.chain_version(),
        target_id: target(node),
        address: address(hash),
        key: key.to_owned().into(),
        ..KvGetOp::default()
    };
    let request = KvGetRequest { namespace: NAMESPACE, ops: vec![op], probe: true, durable: settings(0) };
    c.request::<KvGetResponse>(node, Method::StorageKvGet, request).unwrap().results.remove(0)
}

fn found(c: &Cluster, node: usize, hash: u128, key: &str) -> bool {
    let result = get(c, node, hash, key);
    assert!(result.code == 0 || result.code == Code::NotFound as u32, "{}", result.message);
    result.code == 0
}

fn removal(c: &Cluster, key: &str, sequence: u64) -> KvRemoveRequest {
    let op = KvRemoveOp {
        chain_id: CHAIN,
        chain_version: c.chain_version(),
        target_id: target(0),
        address: address(ADDRESS),
        key: key.to_owned().into(),
        piece: 0,
        sequence,
    };
    KvRemoveRequest { namespace: NAMESPACE, ops: vec![op], durable: settings(0) }
}

#[test]
fn an_entry_is_found_on_every_replica_and_the_head_takes_puts_alone() {
    let mut c = Cluster::start();
    assert_eq!(put(&mut c, 0, ADDRESS, "key", &bytes_of(1, 70_000)), None);
    assert!((0..NODES).all(|node| found(&c, node, ADDRESS, "key") && get(&c, node, ADDRESS, "key").total == 70_000));
    assert!(!found(&c, 0, ADDRESS, "kez") && !found(&c, 0, ADDRESS + 1, "key"));
    assert_eq!(put(&mut c, 1, ADDRESS, "key", b"other"), Some(Code::NotServing));
    c.assert_replicas_equal(&[0, 1, 2]);
}

#[test]
fn of_two_keys_in_one_place_the_later_is_found_and_the_earlier_misses() {
    let mut c = Cluster::start();
    put(&mut c, 0, ADDRESS, "one", &bytes_of(1, 9_000));
    // The same chunk, though the rest of the hash differs.
    put(&mut c, 0, ADDRESS + (1 << 40), "two", &bytes_of(2, 100));
    for node in 0..NODES {
        assert!(!found(&c, node, ADDRESS, "one") && found(&c, node, ADDRESS + (1 << 40), "two"));
    }
    // What is not there is not removed.
    let removed: KvRemoveResponse = c.request(0, Method::StorageKvRemove, removal(&c, "one", 100)).unwrap();
    assert!(!removed.results[0].removed && found(&c, 0, ADDRESS + (1 << 40), "two"));
}

#[test]
fn a_put_that_arrives_after_a_later_put_or_removal_of_its_client_has_no_effect() {
    let c = Cluster::start();
    assert_eq!(put_numbered(&c, 0, ADDRESS, "key", b"second", 5), None);
    assert_eq!(put_numbered(&c, 0, ADDRESS, "key", b"first", 4), Some(Code::Superseded));
    let removed: KvRemoveResponse = c.request(0, Method::StorageKvRemove, removal(&c, "key", 6)).unwrap();
    assert!(removed.results[0].removed);
    assert_eq!(put_numbered(&c, 0, ADDRESS, "key", b"second", 5), Some(Code::Superseded));
    // The same where there was nothing to remove.
    let removed: KvRemoveResponse = c.request(0, Method::StorageKvRemove, removal(&c, "key", 8)).unwrap();
    assert!(!removed.results[0].removed);
    assert_eq!(put_numbered(&c, 0, ADDRESS, "key", b"late", 7), Some(Code::Superseded));
    assert!(!found(&c, 0, ADDRESS, "key"));
    assert_eq!(put_numbered(&c, 0, ADDRESS, "key", b"new", 9), None);
}

#[test]
fn what_is_no_entry_of_the_key_is_refused() {
    let c = Cluster::start();
    let header = KvHeader { key: b"key", piece: 0, length: 5, total: 5, writer: 1, sequence: 1 };
    let right = [header.encode(), b"value".to_vec()].concat();
    assert_eq!(send(&c, 0, ADDRESS, "kez", right.clone(), 1), Some(Code::InvalidArgument));
    assert_eq!(send(&c, 0, ADDRESS, "key", right[..right.len() - 1].to_vec(), 2), Some(Code::InvalidArgument));
    assert_eq!(send(&c, 0, ADDRESS, "key", vec![0; 5_000], 3), Some(Code::InvalidArgument));
    assert_eq!(send(&c, 0, ADDRESS, "key", b"value".to_vec(), 4), Some(Code::InvalidArgument));
    let long = KvHeader { length: CHUNK_BYTES, ..header };
    let too_long = [long.encode(), vec![7; CHUNK_BYTES as usize]].concat();
    assert_eq!(send(&c, 0, ADDRESS, "key", too_long, 5), Some(Code::InvalidArgument));
    assert_eq!(send(&c, 0, ADDRESS, "key", right, 6), None);
    assert!(found(&c, 2, ADDRESS, "key"));
}

#[test]
fn a_new_head_knows_the_entries_of_the_former_one() {
    let mut c = Cluster::start();
    for number in 0..20 {
        put(&mut c, 0, number, &format!("key-{number}"), &bytes_of(1, 5_000));
    }
    let entries = |c: &Cluster, node| {
        let request = KvStatRequest { namespace: NAMESPACE, durable: settings(0) };
        c.request::<KvStatResponse>(node, Method::StorageKvStat, request).unwrap().counters["entries"]
    };
    assert_eq!((entries(&c, 0), entries(&c, 1)), (20, 0));
    c.reroute(&[(1, PublicState::Serving), (2, PublicState::Serving), (0, PublicState::Offline)]);
    wait_until("the new head to know the entries", || entries(&c, 1) == 20);
    let evict = KvEvictRequest { namespace: settings(0), keep_bytes: 0 };
    let gone: KvEvictResponse = c.request(1, Method::StorageKvEvict, evict).unwrap();
    assert_eq!(gone.entries, 20);
    assert!(c.list(2).is_empty() && !found(&c, 1, 3, "key-3"));
}

#[test]
fn a_namespace_that_was_removed_takes_no_more_puts() {
    let mut c = Cluster::start();
    put(&mut c, 0, ADDRESS, "key", b"value");
    let request = RemoveRequest {
        chain_id: CHAIN,
        chain_version: c.chain_version(),
        target_id: target(0),
        space: KV_SPACE,
        inode: NAMESPACE,
        last_index: u32::MAX,
        ..RemoveRequest::default()
    };
    assert_eq!(c.request::<RemoveResponse>(0, Method::StorageRemove, request).unwrap().removed_chunks, 1);
    assert_eq!(put(&mut c, 0, ADDRESS, "key", b"value"), Some(Code::NotFound));
    assert!(!found(&c, 1, ADDRESS, "key"));
    // Files with the same number are others.
    c.write(0, ChunkId { space: 0, inode: NAMESPACE, index: 0 }, 0, b"file").unwrap();
}
