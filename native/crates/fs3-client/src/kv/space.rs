//! A namespace, and where its entries are.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use fs3_core::{Code, Error, KV_HEADER_BYTES_MAX, Result};
use fs3_proto::v1::Layout;
use fs3_rt::Instant;

use crate::inner::Inner;
use crate::routing::{ChainView, Replica, RoutingView};

/// Longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 4096;
/// Longest format version, in bytes.
const VERSION_BYTES_MAX: usize = 1024;
/// Largest value, in pieces.
const PIECES_MAX: u64 = 4096;

/// What never changes of a namespace, and how it is used.
#[derive(Clone, Debug)]
pub struct KvSpace {
    /// The inode of its directory.
    pub id: u64,
    /// The chain table.
    pub table_id: u32,
    /// Its version.
    pub table_version: u32,
    /// Position of the first chain in the table.
    pub first: u32,
    /// How many chains from there on hold it.
    pub chains: u32,
    /// Largest piece of a value, in bytes.
    pub chunk_bytes: u32,
    /// Targets that keep each value, when it is not durable.
    pub replicas: u32,
    /// Entries are chunks on the disks of their chain, instead of in the memory of some of its nodes.
    pub durable: bool,
    /// Values put under another one are never found.
    pub version: Vec<u8>,
    /// How long an operation may take.
    pub timeout: Duration,
}

/// What may change of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvSettings {
    /// Bytes of values, not counting replicas; 0: as many as storage can keep.
    pub capacity_bytes: u64,
    /// Milliseconds after which entries expire; 0: never.
    pub ttl_ms: u64,
    /// Which settings are newer.
    pub generation: u64,
}

/// Where an entry is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub hash: u128,
    /// The key as storage keeps it: with the format version before it.
    pub key: Bytes,
    pub piece: u32,
}

impl Address {
    pub fn wire(&self) -> Bytes {
        Bytes::copy_from_slice(&self.hash.to_be_bytes())
    }

    /// Another piece of the same value.
    pub fn of_piece(&self, space: &KvSpace, piece: u32) -> Self {
        Self { hash: hash(space.id, piece, &self.key), key: self.key.clone(), piece }
    }
}

impl KvSpace {
    pub(super) fn check(&self) -> Result<()> {
        let bad = |what: &'static str| Err(Error::new(Code::InvalidArgument, what));
        if !self.chunk_bytes.is_power_of_two() || !(1 << 16..=1 << 26).contains(&self.chunk_bytes) {
            return bad("the namespace has an impossible chunk size");
        }
        if self.chains == 0 || self.replicas == 0 || self.timeout.is_zero() {
            return bad("chains, replicas and timeout must be more than zero");
        }
        if self.version.len() > VERSION_BYTES_MAX {
            return bad("the version is longer than 1024 bytes");
        }
        Ok(())
    }

    /// Bytes of the largest piece of a value: what its header leaves of a chunk, if it is one.
    pub(super) fn piece_bytes(&self) -> usize {
        self.chunk_bytes as usize - if self.durable { KV_HEADER_BYTES_MAX } else { 0 }
    }

    /// How many pieces a value of `bytes` has.
    pub(super) fn pieces_of(&self, bytes: usize) -> Result<u32> {
        let count = bytes.div_ceil(self.piece_bytes()).max(1) as u64;
        if count > PIECES_MAX {
            let most = PIECES_MAX * self.piece_bytes() as u64;
            let message = format!("a value of {bytes} bytes is larger than the namespace takes ({most})");
            return Err(Error::new(Code::InvalidArgument, message));
        }
        Ok(count as u32)
    }

    /// What stands before the keys that storage keeps.
    pub(super) fn prefix(&self) -> BytesMut {
        let mut prefix = BytesMut::with_capacity(2 + self.version.len());
        prefix.put_u16_le(self.version.len() as u16);
        prefix.put_slice(&self.version);
        prefix
    }

    pub(super) fn address(&self, key: &[u8], piece: u32) -> Address {
        let mut stored = self.prefix();
        stored.put_slice(key);
        let key = stored.freeze();
        Address { hash: hash(self.id, piece, &key), key, piece }
    }

    /// The chain of an address, if the routing has it.
    pub(super) fn chain<'a>(&self, view: &'a RoutingView, hash: u128) -> Option<&'a ChainView> {
        view.chain(view.chain_of(&self.layout(), (hash >> 64) as u64)?)
    }

    /// Those of a chain that have its entries, in the order in which they are asked. Of chunks the head comes first,
    /// which learns so what is used.
    pub(super) fn group<'a>(&self, chain: &'a ChainView) -> &'a [Replica] {
        let count = if self.durable { chain.serving.len() } else { self.replicas as usize };
        &chain.serving[..chain.serving.len().min(count)]
    }

    /// Those of a chain that are told of puts and removals: what is written to the head goes through the chain.
    pub(super) fn told<'a>(&self, chain: &'a ChainView) -> &'a [Replica] {
        let count = if self.durable { 1 } else { self.replicas as usize };
        &chain.serving[..chain.serving.len().min(count)]
    }

    /// Chains are chosen as those of a file's chunks are.
    pub(super) fn layout(&self) -> Layout {
        Layout {
            table_id: self.table_id,
            table_version: self.table_version,
            chunk_bytes: self.chunk_bytes,
            stripe: self.chains,
            first: self.first,
            ..Layout::default()
        }
    }
}

/// The replicas of an entry now that may answer.
pub(super) fn healthy(inner: &Inner, chain: &ChainView, replica: &Replica) -> bool {
    !inner.health.suspect(replica.target_id, chain.version, Instant::now())
}

/// 128 bits of a namespace, a piece's number and a key, the same on every machine and for ever: entries are found by it.
/// Not cryptographic; who finds two keys of one address can only make one of them miss.
fn hash(namespace: u64, piece: u32, key: &[u8]) -> u128 {
    let mut low = mix(namespace ^ 0x9e37_79b9_7f4a_7c15, 0xa076_1d64_78bd_642f);
    let mut high = mix(u64::from(piece) ^ 0xe703_7ed1_a0b4_28db, 0x8ebc_6af0_9c88_c6e3);
    let mut take = |word: u64| {
        low = mix(low ^ word, 0xe703_7ed1_a0b4_28db).wrapping_add(high);
        high = mix(high.rotate_left(29) ^ word, 0x5899_65cc_7537_4cc3) ^ low.rotate_left(17);
    };
    take(namespace);
    take(u64::from(piece));
    for part in key.chunks(8) {
        let mut word = [0; 8];
        word[..part.len()].copy_from_slice(part);
        take(u64::from_le_bytes(word));
    }
    take(key.len() as u64);
    take(0x1d8e_4e27_c47d_124f);
    (u128::from(high) << 64) | u128::from(low)
}

/// Both halves of a product; the first factor is kept from zero, which would forget the second.
fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a ^ 0x2d35_8dcc_aa6c_78a5) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64) ^ a.rotate_left(32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn space() -> KvSpace {
        KvSpace {
            id: 42,
            table_id: 1,
            table_version: 1,
            first: 0,
            chains: 4,
            chunk_bytes: 1 << 20,
            replicas: 2,
            durable: false,
            version: b"v1".to_vec(),
            timeout: Duration::from_secs(1),
        }
    }

    #[test]
    fn addresses_are_the_same_for_ever() {
        let address = space().address(b"key", 0);
        assert_eq!(&address.key[..], b"\x02\x00v1key");
        assert_eq!(format!("{:032x}", address.hash), "890e859476065f3fd3747d09679190ec");
        assert_eq!(address.of_piece(&space(), 3), space().address(b"key", 3));
    }

    #[test]
    fn everything_that_names_an_entry_changes_its_address() {
        let base = space();
        let others = [
            base.address(b"key", 0),
            base.address(b"key", 1),
            base.address(b"kez", 0),
            base.address(b"key\0", 0),
            KvSpace { id: 43, ..base.clone() }.address(b"key", 0),
            KvSpace { version: b"v2".to_vec(), ..base.clone() }.address(b"key", 0),
            KvSpace { version: b"v1k".to_vec(), ..base.clone() }.address(b"ey", 0),
        ];
        assert_eq!(others.iter().map(|a| a.hash).collect::<HashSet<_>>().len(), others.len());
    }

    #[test]
    fn addresses_spread_over_chains_and_do_not_collide() {
        let (space, mut counts, mut seen) = (space(), [0u32; 7], HashSet::new());
        for number in 0..70_000u32 {
            let hash = space.address(format!("page-{number}").as_bytes(), 0).hash;
            counts[((hash >> 64) as u64 % 7) as usize] += 1;
            // Halves as well, as one chooses the chain and the other the place in the index.
            assert!(seen.insert(hash as u64) && seen.insert((hash >> 64) as u64));
        }
        assert!(counts.iter().all(|count| (9_600..10_400).contains(count)), "{counts:?}");
    }

    #[test]
    fn values_that_are_too_large_are_refused() {
        assert_eq!(space().pieces_of(0).unwrap(), 1);
        assert_eq!(space().pieces_of(1 << 20).unwrap(), 1);
        assert_eq!(space().pieces_of((1 << 20) + 1).unwrap(), 2);
        assert!(space().pieces_of((4096 << 20) + 1).is_err());
        assert!(KvSpace { version: vec![0; 2000], ..space() }.check().is_err());
    }

    #[test]
    fn a_durable_piece_and_its_header_fill_a_chunk() {
        let durable = KvSpace { durable: true, ..space() };
        let piece = durable.piece_bytes();
        assert_eq!(piece + KV_HEADER_BYTES_MAX, 1 << 20);
        assert_eq!((durable.pieces_of(piece).unwrap(), durable.pieces_of(piece + 1).unwrap()), (1, 2));
    }
}
