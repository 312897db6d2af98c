//! Random operations against the model, and crashes at random points.

mod common;

use common::{CHUNK, Op, Rig};
use fs3_io::fault::Fault;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn ops() -> impl Strategy<Value = Op> {
    let chunk = 0..3u32;
    let small = (chunk.clone(), 0..CHUNK, 1..70_000u32).prop_map(|(chunk, offset, len)| Op::Write {
        chunk,
        offset,
        len: len.min(CHUNK - offset),
    });
    let aligned = (chunk.clone(), 0..CHUNK / 4096, 1..20u32).prop_map(|(chunk, block, blocks)| {
        let offset = block * 4096;
        Op::Write { chunk, offset, len: (blocks * 4096).min(CHUNK - offset) }
    });
    let append = (chunk.clone(), 0..60_000u32, prop_oneof![3 => Just(0u32), 1 => 0..30_000u32])
        .prop_map(|(chunk, len, gap)| Op::Append { chunk, len, gap });
    prop_oneof![
        4 => small,
        4 => aligned,
        4 => append,
        1 => (chunk.clone(), 0..=CHUNK).prop_map(|(chunk, len)| Op::Replace { chunk, len }),
        2 => (chunk.clone(), 0..=CHUNK).prop_map(|(chunk, length)| Op::Truncate { chunk, length }),
        1 => chunk.clone().prop_map(|chunk| Op::Remove { chunk }),
        14 => chunk.clone().prop_map(|chunk| Op::Commit { chunk }),
        1 => chunk.prop_map(|chunk| Op::Abort { chunk }),
        2 => Just(Op::Sync),
        2 => Just(Op::Maintain),
        2 => Just(Op::ForgetCache),
        1 => Just(Op::Reopen),
        1 => Just(Op::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_store_always_holds_what_the_model_holds(ops in prop::collection::vec(ops(), 1..60), seed: u64) {
        let mut rig = Rig::new(seed);
        for op in &ops {
            rig.apply(op).unwrap();
            rig.check();
        }
    }
}

/// Power is lost before any one operation of the disk, many times in one life of the store.
/// `FS3_CRASH_SEEDS=first..end` runs other seeds than the few of every run.
#[test]
fn synced_data_survive_power_loss_at_any_point_and_every_readable_byte_verifies() {
    let seeds = std::env::var("FS3_CRASH_SEEDS").unwrap_or("0..12".into());
    let (first, end) = seeds.split_once("..").expect("FS3_CRASH_SEEDS is first..end");
    for seed in first.parse::<u64>().unwrap()..end.parse().unwrap() {
        let mut random = StdRng::seed_from_u64(seed);
        let mut rig = Rig::new(seed);
        rig.options.log_bytes_max = 64 << 10;
        rig.options.unsynced_free_bytes_max = 512 << 10;
        rig.options.patch_bytes_max = 64 << 10;
        for _ in 0..12 {
            rig.disk.inject(Fault::Halt, random.random_range(0..60));
            loop {
                let op = random_op(&mut random);
                if rig.apply(&op).is_err() {
                    break;
                }
            }
            rig.apply(&Op::Crash).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        }
    }
}

fn random_op(random: &mut StdRng) -> Op {
    let chunk = random.random_range(0..3);
    let offset = random.random_range(0..CHUNK / 512) * 512;
    let len = random.random_range(1..=(CHUNK - offset).min(90_000));
    match random.random_range(0..20) {
        0..4 => Op::Write { chunk, offset, len },
        4..6 => Op::Append { chunk, len: len.min(50_000), gap: 0 },
        6 => Op::Append { chunk, len, gap: offset % 9000 },
        7 => Op::Replace { chunk, len },
        8 => Op::Truncate { chunk, length: offset },
        9 => Op::Abort { chunk },
        10 => Op::Sync,
        11 => Op::Maintain,
        12 if random.random_range(0..3) == 0 => Op::Remove { chunk },
        _ => Op::Commit { chunk },
    }
}
