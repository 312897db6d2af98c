//! Records survive encoding, and arbitrary bytes neither panic nor pass for a framed record.

use fs3_chunk::{Body, Location, Prepare, Record, WriterRecord, frame, unframe};
use fs3_core::{AlignedBuf, ChainVersion, ChunkId, ClientId, Region, UpdateVersion};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Seed {
    ids: (u32, u64, u32, u32, u64, u64, u32),
    kind: u8,
    location: Option<(u8, u32)>,
    crcs: Vec<u32>,
    tail_crc: Option<u32>,
    writer: Option<WriterRecord>,
    writers: Option<Vec<WriterRecord>>,
}

impl Seed {
    fn record(&self) -> Record {
        let (space, inode, index, chunk_bytes, update, chain, length) = self.ids;
        let (at, crcs) = (self.location.map(|(class, index)| Location { class, index }), self.crcs.clone());
        let body = match self.kind {
            0 => Body::Whole { at, crcs },
            1 => Body::Append { first: index, crcs },
            2 => Body::Patch { first: index, blocks: crcs.iter().map(|&c| block(c as u8)).collect(), crcs },
            3 => Body::Cut { tail_crc: self.tail_crc },
            4 => Body::Punch {
                first: index % 100,
                end: index % 100 + chunk_bytes % 100,
                edges: crcs.iter().take(2).map(|&c| (c, c, block(c as u8))).collect(),
            },
            _ => Body::Tombstone,
        };
        Record::Prepare(Prepare {
            id: ChunkId { space, inode, index },
            chunk_bytes,
            update_version: UpdateVersion(update),
            chain_version: ChainVersion(chain),
            length,
            body,
            writer: self.writer,
            writers: self.writers.clone(),
        })
    }
}

fn block(fill: u8) -> Region {
    let mut buf = AlignedBuf::new(4096);
    buf.fill(fill);
    Region::from_aligned(buf, 4096)
}

fn writer() -> impl Strategy<Value = WriterRecord> {
    any::<([u8; 16], u32, u64, u64, i64)>().prop_map(|(client, channel, sequence, version, time_ms)| WriterRecord {
        client: ClientId(client),
        channel,
        sequence,
        update_version: UpdateVersion(version),
        time_ms,
    })
}

fn seeds() -> impl Strategy<Value = Seed> {
    let fields =
        (prop::option::of((16u8..=26, any::<u32>())), prop::collection::vec(any::<u32>(), 0..5), any::<Option<u32>>());
    let writers = (prop::option::of(writer()), prop::option::of(prop::collection::vec(writer(), 0..5)));
    (any::<(u32, u64, u32, u32, u64, u64, u32)>(), 0u8..5, fields, writers).prop_map(
        |(ids, kind, (location, crcs, tail_crc), (writer, writers))| Seed {
            ids,
            kind,
            location,
            crcs,
            tail_crc,
            writer,
            writers,
        },
    )
}

fn encoded(record: &Record) -> Vec<u8> {
    let mut out = vec![];
    record.encode(&mut out);
    out
}

proptest! {
    #[test]
    fn decoding_what_was_encoded_gives_the_same_record(seed in seeds()) {
        let bytes = encoded(&seed.record());
        let again = Record::decode(&bytes).expect("it decodes");
        prop_assert_eq!(encoded(&again), bytes);
    }

    #[test]
    fn a_cut_or_extended_record_is_refused(seed in seeds(), cut in any::<prop::sample::Index>()) {
        let mut bytes = encoded(&seed.record());
        bytes.push(0);
        prop_assert!(Record::decode(&bytes).is_none());
        bytes.truncate(cut.index(bytes.len() - 1));
        prop_assert!(Record::decode(&bytes).is_none());
    }

    #[test]
    fn arbitrary_bytes_never_panic_the_decoder(mut bytes in prop::collection::vec(any::<u8>(), 0..300), kind in 1u8..8) {
        let _ = Record::decode(&bytes);
        bytes.splice(0..0, [1, kind]);
        let _ = Record::decode(&bytes);
        let _ = unframe(0, &bytes);
    }

    #[test]
    fn a_framed_record_is_found_only_whole_and_at_its_position(
        payload in prop::collection::vec(any::<u8>(), 1..200), position: u64, flip in any::<prop::sample::Index>()
    ) {
        let mut out = vec![];
        frame(position, &mut out, |o| o.extend_from_slice(&payload));
        prop_assert_eq!(unframe(position, &out), Some(&payload[..]));
        prop_assert_eq!(unframe(position.wrapping_add(1), &out), None);
        let at = flip.index(out.len());
        out[at] ^= 0x10;
        prop_assert!(unframe(position, &out) != Some(&payload[..]));
    }
}
