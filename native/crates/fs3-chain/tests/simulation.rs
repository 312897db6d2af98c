//! Seeded simulation of chains: three replicas, clients and a manager over a network that drops, duplicates,
//! delays and reorders, with crashes, partitions and resyncs; then everything heals and must agree.
//!
//! `FS3_CHAIN_SEED=<n> cargo test -p fs3-chain --test simulation` replays one seed; `FS3_CHAIN_SEEDS=<n>` sets how many
//! are tried.

mod sim;

use sim::{Options, World};

fn seeds() -> Vec<u64> {
    if let Ok(seed) = std::env::var("FS3_CHAIN_SEED") {
        return vec![seed.parse().expect("FS3_CHAIN_SEED is a number")];
    }
    let count = std::env::var("FS3_CHAIN_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(150);
    (1..=count).collect()
}

fn run(name: &str, options: impl Fn(u64) -> Options) {
    let mut acked = 0;
    for seed in seeds() {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| World::new(seed, options(seed)).run()));
        match outcome {
            Ok(count) => acked += count,
            Err(panic) => {
                eprintln!("replay: FS3_CHAIN_SEED={seed} cargo test -p fs3-chain --test simulation {name}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    assert!(acked > 0, "no write was acknowledged in any run");
}

#[test]
fn without_faults_replicas_agree_and_reads_are_linearizable() {
    run("without_faults", |_| Options::default());
}

#[test]
fn loss_duplication_and_reordering_lose_no_acknowledged_write() {
    run("loss_duplication", |seed| Options {
        drop_percent: seed % 30,
        duplicate_percent: seed % 50,
        slow_percent: seed % 20,
        ..Options::default()
    });
}

#[test]
fn crashes_and_partitions_of_a_part_of_the_chain_lose_no_acknowledged_write() {
    run("crashes_and_partitions", |seed| Options {
        drop_percent: seed % 20,
        duplicate_percent: seed % 30,
        slow_percent: seed % 10,
        crashes: true,
        partitions: seed % 2 == 0,
        ..Options::default()
    });
}

#[test]
fn replicas_that_do_not_hear_each_other_while_a_third_returns_lose_no_acknowledged_write() {
    run("replicas_that_do_not_hear", |seed| Options {
        drop_percent: seed % 20,
        duplicate_percent: seed % 30,
        slow_percent: seed % 10,
        crashes: true,
        cuts: true,
        ..Options::default()
    });
}

#[test]
fn rotten_chunks_and_their_repair_lose_no_acknowledged_write() {
    run("rotten_chunks", |seed| Options {
        drop_percent: seed % 10,
        duplicate_percent: seed % 30,
        slow_percent: seed % 10,
        partitions: seed % 3 == 0,
        rot_percent: 2 + seed % 10,
        ..Options::default()
    });
}

#[test]
fn removed_chunks_do_not_come_back() {
    run("removed_chunks", |seed| Options {
        drop_percent: seed % 20,
        duplicate_percent: seed % 50,
        slow_percent: seed % 20,
        crashes: seed % 3 == 0,
        removes: true,
        ..Options::default()
    });
}

#[test]
fn all_replicas_crash_at_once_and_acknowledged_writes_survive() {
    run("all_replicas_crash", |seed| Options {
        drop_percent: seed % 10,
        duplicate_percent: seed % 20,
        crashes: seed % 2 == 0,
        total_crash: true,
        slow_disk_percent: seed % 30,
        ..Options::default()
    });
}
