//! Entries of the key-value cache that are kept in memory.

mod common;

use bytes::Bytes;
use common::*;
use fs3_core::{Code, Region, crc_blocks, pack_crcs};
use fs3_proto::v1::*;

const NAMESPACE: u64 = 92;
/// Of values in one payload, which begin and end within blocks of it and at their borders.
const LENGTHS: [usize; 7] = [4096, 8192, 100, 70_000, 4096, 65_536, 5];
/// Of values that come each into its own memory, as little of that is left over.
const PARTED: [usize; 5] = [4096, 65_536, 60_001, 4000, 8192];

/// Put values of these lengths by one request, the byte `damage` of their payload being another than was checksummed; what
/// became of each.
fn put(c: &mut Cluster, lengths: &[usize], damage: Option<usize>) -> Vec<Option<Code>> {
    put_with(c, lengths, damage, |value| pack_crcs(&crc_blocks(0, value)))
}

fn put_with(
    c: &mut Cluster,
    lengths: &[usize],
    damage: Option<usize>,
    crcs: impl Fn(&[u8]) -> Vec<u8>,
) -> Vec<Option<Code>> {
    let mut payload = Vec::new();
    let ops = lengths.iter().enumerate().map(|(number, &length)| {
        c.sequence += 1;
        let value = bytes_of(number as u8, length);
        payload.extend_from_slice(&value);
        KvPutOp {
            chain_id: CHAIN,
            chain_version: c.chain_version(),
            target_id: target(0),
            address: Bytes::copy_from_slice(&(number as u128).to_be_bytes()),
            key: format!("key-{number}").into(),
            length: length as u32,
            total: length as u64,
            sequence: c.sequence,
            crcs: crcs(&value).into(),
            ..KvPutOp::default()
        }
    });
    let ops = ops.collect();
    damage.into_iter().for_each(|at| payload[at] ^= 1);
    let request = KvPutRequest { namespace: Some(KvNamespace { id: NAMESPACE, ..KvNamespace::default() }), ops };
    let body = c.call(0, Method::StorageKvPut, request, vec![Region::from_vec(payload)]).unwrap();
    let response = <KvPutResponse as prost::Message>::decode(body).unwrap();
    response.results.iter().map(|r| (r.code != 0).then(|| Code::from_wire(r.code as u16))).collect()
}

#[test]
fn of_values_that_come_together_only_the_damaged_one_is_refused() {
    let mut c = Cluster::start();
    for lengths in [&LENGTHS[..], &PARTED] {
        assert_eq!(put(&mut c, lengths, None), vec![None; lengths.len()]);
        let mut start = 0;
        for (number, length) in lengths.iter().enumerate() {
            for at in [start, start + length / 2, start + length - 1] {
                let mut expected = vec![None; lengths.len()];
                expected[number] = Some(Code::PayloadChecksum);
                assert_eq!(put(&mut c, lengths, Some(at)), expected, "byte {at}");
            }
            start += length;
        }
    }
}

#[test]
fn a_value_alone_is_checked_to_its_last_byte() {
    let mut c = Cluster::start();
    for length in [1, 4095, 4096, 4097, 300_000, 1 << 20] {
        assert_eq!(put(&mut c, &[length], None), [None]);
        for at in [0, length / 2, length - 1] {
            assert_eq!(put(&mut c, &[length], Some(at)), [Some(Code::PayloadChecksum)], "byte {at} of {length}");
        }
    }
}

#[test]
fn a_value_that_comes_without_checksums_is_refused() {
    let mut c = Cluster::start();
    let refused = Some(Code::PayloadChecksum);
    assert_eq!(put_with(&mut c, &[4096, 1 << 20, 7], None, |_| Vec::new()), [refused; 3]);
    assert_eq!(put_with(&mut c, &[1 << 20], None, |_| Vec::new()), [refused]);
}
