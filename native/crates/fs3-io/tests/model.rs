//! Random operations against the model, and crashes at random points.

mod common;

use common::{CHUNK, Op, Rig};
use fs3_core::Code;
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
        3 => (chunk.clone(), 0..CHUNK, 0..CHUNK).prop_map(|(chunk, offset, len)| Op::Punch {
            chunk,
            offset,
            len: len.min(CHUNK - offset),
        }),
        1 => (chunk.clone(), 0..CHUNK / 4096, 0..20u32).prop_map(|(chunk, block, blocks)| Op::Punch {
            chunk,
            offset: block * 4096,
            len: (blocks * 4096).min(CHUNK - block * 4096),
        }),
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

/// What differs between the lives whose power is cut.
#[derive(Clone, Copy, Debug)]
enum Workload {
    /// Updates of all kinds and sizes, seldom synced.
    Mixed,
    /// Every acknowledgement is durable.
    Durable,
    /// The disk is full again and again.
    Full,
    /// Many chunks, small writes, few bytes until the store cleans up.
    Small,
    /// A sync fails, and what it was for is lost with the power.
    Failing,
}

const WORKLOADS: [Workload; 5] =
    [Workload::Mixed, Workload::Durable, Workload::Full, Workload::Small, Workload::Failing];
const LIVES: u32 = 12;
/// A life in which no disk operation halts ends after so many operations.
const OPS_MAX: u32 = 200;

/// Power is lost before any one operation of the disk, many times in one life of the store: 240 images.
/// `FS3_CRASH_SEEDS=first..end` runs other seeds than the few of every run.
#[test]
fn synced_data_survive_power_loss_at_any_point_and_every_readable_byte_verifies() {
    let seeds = std::env::var("FS3_CRASH_SEEDS").unwrap_or("0..20".into());
    let (first, end) = seeds.split_once("..").expect("FS3_CRASH_SEEDS is first..end");
    for seed in first.parse::<u64>().unwrap()..end.parse().unwrap() {
        let workload = WORKLOADS[seed as usize % WORKLOADS.len()];
        let mut random = StdRng::seed_from_u64(seed);
        let mut rig = Rig::new(seed);
        rig.options.log_bytes_max = 64 << 10;
        rig.options.unsynced_free_bytes_max = 512 << 10;
        rig.options.patch_bytes_max = 64 << 10;
        rig.options.free_bytes_kept = 1 << 20;
        rig.options.durable_writes = matches!(workload, Workload::Durable);
        rig.reopen();
        for life in 0..LIVES {
            if matches!(workload, Workload::Full) {
                rig.disk.set_space(random.random_range(11..15) << 20);
            }
            match workload {
                Workload::Failing => rig.disk.inject(Fault::Sync, random.random_range(0..8)),
                _ => rig.disk.inject(Fault::Halt, random.random_range(0..60)),
            }
            for _ in 0..OPS_MAX {
                let op = match workload {
                    Workload::Small => small_op(&mut random),
                    _ => random_op(&mut random),
                };
                match rig.apply(&op) {
                    Err(e) if e.code == Code::NoSpace && matches!(workload, Workload::Full) => {}
                    Err(_) => break,
                    Ok(()) => {}
                }
            }
            rig.disk.set_space(u64::MAX);
            rig.apply(&Op::Crash).unwrap_or_else(|e| panic!("{workload:?} seed {seed} life {life}: {e}"));
        }
    }
}

fn small_op(random: &mut StdRng) -> Op {
    let chunk = random.random_range(0..8);
    let offset = random.random_range(0..CHUNK / 4096) * 4096;
    match random.random_range(0..10) {
        0..3 => Op::Write { chunk, offset, len: 4096 },
        3 => Op::Append { chunk, len: random.random_range(1..30_000), gap: 0 },
        4 => Op::Punch { chunk, offset, len: random.random_range(0..=CHUNK - offset) },
        5 if random.random_range(0..4) == 0 => Op::Sync,
        _ => Op::Commit { chunk },
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
        9 if random.random_range(0..2) == 0 => Op::Abort { chunk },
        9 => Op::Punch { chunk, offset, len },
        10 => Op::Sync,
        11 => Op::Maintain,
        12 if random.random_range(0..3) == 0 => Op::Remove { chunk },
        _ => Op::Commit { chunk },
    }
}
