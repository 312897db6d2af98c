//! A table that packs its chunks is the same as one that does not.

use std::sync::Arc;

use fs3_chunk::{
    Blocks, Body, ChunkImage, Location, Prepare, Record, SnapshotLoad, Table, WriterRecord, class_of, frame, unframe,
};
use fs3_core::{AlignedBuf, ChainVersion, ChunkId, ClientId, InodeId, Region, UpdateVersion};
use proptest::prelude::*;

const CHUNKS: u32 = 6;

#[derive(Clone, Debug)]
enum Step {
    Whole(u32, u32),
    Patch(u32),
    Cut(u32, u32),
    Remove(u32),
    Commit(u32),
    Abort(u32),
    Look(u32),
    Hold(u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let chunk = || 0..CHUNKS;
    let step = prop_oneof![
        3 => (chunk(), 1..200_000u32).prop_map(|(c, length)| Step::Whole(c, length)),
        1 => chunk().prop_map(Step::Patch),
        1 => (chunk(), 1..200_000u32).prop_map(|(c, length)| Step::Cut(c, length)),
        1 => chunk().prop_map(Step::Remove),
        6 => chunk().prop_map(Step::Commit),
        1 => chunk().prop_map(Step::Abort),
        2 => chunk().prop_map(Step::Look),
        1 => chunk().prop_map(Step::Hold),
    ];
    prop::collection::vec(step, 1..60)
}

fn id(chunk: u32) -> ChunkId {
    ChunkId::file(InodeId(1), chunk)
}

struct Bed {
    blocks: Arc<Blocks>,
    table: Table,
}

impl Bed {
    fn new(live_chunks_max: usize) -> Self {
        let blocks = Arc::new(Blocks::default());
        Self { table: Table::new(blocks.clone(), live_chunks_max), blocks }
    }

    fn state(&mut self) -> (Vec<u8>, u64, u64, Vec<Location>) {
        let mut image = vec![];
        self.table.for_snapshot(None, usize::MAX, |encode| frame(0, &mut image, encode));
        (image, self.table.live_chunks(), self.blocks.used_bytes(), self.table.locations())
    }

    fn reload(&self, live_chunks_max: usize) -> Self {
        let blocks = Arc::new(Blocks::default());
        let mut load = SnapshotLoad::new(blocks.clone(), live_chunks_max);
        self.table.for_snapshot(None, usize::MAX, |encode| {
            let mut framed = vec![];
            frame(7, &mut framed, encode);
            let payload = unframe(7, &framed).unwrap();
            let Some(Record::Chunk(image)) = Record::decode(payload) else { panic!("not the record of a chunk") };
            load.add(payload, image);
        });
        Self { table: load.finish(), blocks }
    }
}

fn record(step: &Step, version: u64, index: u32) -> Option<Record> {
    let (chunk, length, body) = match *step {
        Step::Whole(chunk, length) => {
            let at = Some(Location { class: class_of(length), index });
            (chunk, length, Body::Whole { at, crcs: vec![length; length.div_ceil(4096) as usize] })
        }
        Step::Patch(chunk) => {
            let bytes = Region::from_aligned(AlignedBuf::new(4096), 4096);
            (chunk, 4096, Body::Patch { first: 0, crcs: vec![version as u32], blocks: vec![bytes] })
        }
        Step::Cut(chunk, length) => (chunk, length, Body::Cut { tail_crc: Some(9) }),
        Step::Remove(chunk) => (chunk, 0, Body::Tombstone),
        Step::Commit(chunk) => {
            return Some(Record::Commit {
                id: id(chunk),
                version: UpdateVersion(version - 1),
                time_ms: version as i64,
            });
        }
        Step::Abort(chunk) => return Some(Record::Abort { id: id(chunk), version: UpdateVersion(version - 1) }),
        Step::Look(_) | Step::Hold(_) => return None,
    };
    let update_version = UpdateVersion(version);
    let writer = WriterRecord {
        client: ClientId([1; 16]),
        channel: version as u32 % 3,
        sequence: version,
        update_version,
        time_ms: 5,
    };
    Some(Record::Prepare(Prepare {
        id: id(chunk),
        chunk_bytes: 1 << 20,
        update_version,
        chain_version: ChainVersion(1),
        length,
        body,
        writer: Some(writer),
        writers: None,
    }))
}

proptest! {
    #[test]
    fn packing_changes_nothing_that_can_be_seen(steps in steps(), live_chunks_max in 0..3usize) {
        let (mut plain, mut packing) = (Bed::new(1000), Bed::new(live_chunks_max));
        let mut held = vec![];
        for (i, step) in steps.iter().enumerate() {
            if let Some(record) = record(step, i as u64 + 1, i as u32) {
                plain.table.apply(i as u64 + 1, record.clone(), None);
                packing.table.apply(i as u64 + 1, record, None);
            }
            if let Step::Look(chunk) | Step::Hold(chunk) = *step {
                let seen = packing.table.get(id(chunk)).map(|c| c.meta());
                prop_assert_eq!(plain.table.get(id(chunk)).map(|c| c.meta()), seen);
                prop_assert_eq!(plain.table.meta(id(chunk)), packing.table.meta(id(chunk)));
            }
            if let Step::Hold(chunk) = *step {
                held.push(packing.table.get(id(chunk)).and_then(|c| c.committed.clone()));
                held.push(plain.table.get(id(chunk)).and_then(|c| c.committed.clone()));
            }
            prop_assert_eq!(plain.table.position(id(0)), packing.table.position(id(0)));
        }
        held.clear();
        prop_assert_eq!(plain.state(), packing.state());
        let returned = |bed: &Bed| {
            let mut all = bed.blocks.take_returned();
            all.sort();
            all
        };
        prop_assert_eq!(returned(&plain), returned(&packing));
        for live_chunks_max in [0, 1000] {
            prop_assert_eq!(packing.reload(live_chunks_max).state(), packing.state());
        }
    }
}

#[test]
fn a_block_keeps_its_generation_and_its_rot_while_its_chunk_is_packed() {
    let mut bed = Bed::new(0);
    let step = Step::Whole(0, 9000);
    bed.table.apply(1, record(&step, 1, 0).unwrap(), None);
    bed.table.apply(2, Record::Commit { id: id(0), version: UpdateVersion(1), time_ms: 0 }, None);
    let of = |bed: &mut Bed| {
        let version = bed.table.get(id(0)).unwrap().committed.clone().unwrap();
        let block = version.block.clone().unwrap();
        block.note_rot();
        (Arc::downgrade(&version), block.generation, block.high_water())
    };
    let (live, generation, high_water) = of(&mut bed);
    // Others come and go until it is packed.
    for _ in 0..8 {
        bed.table.apply(3, record(&Step::Whole(1, 1), 3, 1).unwrap(), None);
    }
    assert!(live.upgrade().is_none(), "it was not packed");
    assert!(bed.table.meta(id(0)).unwrap().rotten);
    let image = |bed: &mut Bed| ChunkImage::from((&id(0), bed.table.get(id(0)).unwrap())).position;
    assert_eq!(image(&mut bed), 2);
    assert_eq!((of(&mut bed).1, of(&mut bed).2), (generation, high_water));
}
