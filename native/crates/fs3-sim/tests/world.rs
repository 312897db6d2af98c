//! Seeded worlds under a scripted manager. `FS3_SIM_SEED=<n> cargo test -p fs3-sim --test world` replays one seed;
//! `FS3_SIM_SEEDS=<n>` sets how many are tried; `FS3_SIM_OPTIONS=<json>` fixes options that seeds would draw.

mod common;

use common::Manager;
use fs3_sim::{Options, World};

const SECOND: u64 = 1_000_000_000;

fn seeds(default: u64) -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().map(|n| n.parse().expect("a number"));
    match number("FS3_SIM_SEED") {
        Some(seed) => vec![seed],
        None => {
            let first = number("FS3_SIM_FIRST").unwrap_or(1);
            (first..first + number("FS3_SIM_SEEDS").unwrap_or(default)).collect()
        }
    }
}

/// What became of a world.
#[derive(Debug, PartialEq, Eq)]
struct Ran {
    hash: u64,
    succeeded: u64,
    violation: String,
    trace: Vec<String>,
}

/// Run a world for a while.
fn run(seed: u64, options: Options, seconds: u64) -> Ran {
    let mut manager = Manager::new(World::new(seed, options));
    manager.world.set_load(true);
    manager.run_until(seconds * SECOND);
    let violation = manager.finish();
    let statistics = manager.world.statistics();
    if std::env::var("FS3_SIM_SHOW").is_ok() {
        eprintln!("seed {seed}: {:?} {statistics:?}", manager.world.options());
    }
    Ran {
        hash: manager.world.trace_hash(),
        succeeded: statistics["operations that succeeded"],
        violation,
        trace: manager.world.trace(),
    }
}

fn hunt(name: &str, seeds: Vec<u64>, options: impl Fn(u64) -> Options, seconds: u64) {
    let mut failures = Vec::new();
    for &seed in &seeds {
        let Ran { succeeded, violation, trace, .. } = run(seed, options(seed), seconds);
        if !violation.is_empty() {
            if std::env::var("FS3_SIM_TRACE").is_ok() {
                trace.iter().for_each(|line| eprintln!("{line}"));
            }
            eprintln!("FS3_SIM_SEED={seed} cargo test -p fs3-sim --test world {name}: {violation}");
            failures.push(seed);
        }
        assert!(succeeded > 0 || !violation.is_empty(), "seed {seed}: no operation succeeded");
    }
    assert!(failures.is_empty(), "{} of {} seeds failed: {failures:?}", failures.len(), seeds.len());
}

#[test]
fn without_faults_every_operation_succeeds() {
    let mut manager = Manager::new(World::new(1, Options::calm()));
    manager.world.set_load(true);
    manager.run_until(120 * SECOND);
    assert_eq!(manager.finish(), "");
    let statistics = manager.world.statistics();
    assert_eq!(statistics["operations"], statistics["operations that succeeded"], "{statistics:?}");
    assert!(statistics["operations"] > 300, "{statistics:?}");
}

#[test]
fn under_faults_of_any_kind_nothing_acknowledged_is_lost() {
    let given = std::env::var("FS3_SIM_OPTIONS").unwrap_or_default();
    hunt("under_faults", seeds(20), |seed| Options::draw(seed, &given).unwrap(), 120);
}

#[test]
fn a_seed_decides_everything() {
    for seed in [3, 4] {
        let options = Options::draw(seed, "").unwrap();
        assert_eq!(run(seed, options.clone(), 60), run(seed, options, 60), "seed {seed}");
    }
}
