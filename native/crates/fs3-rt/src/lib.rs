//! The seam between fs3 and what is not deterministic: tasks, timers, clocks, threads that block, randomness.
//!
//! In a process everything here is tokio, std and rand, at no measurable cost. On a thread that is inside a
//! [`sim::Simulator`] it is the simulator's: virtual time, one seeded source of randomness, an order of tasks that
//! follows from the seed. Storage, client, network calls and disk work use this crate and never the originals.
//! `tokio::sync` needs no runtime and is used as it is; `tokio::select!` only with `biased`.

mod clock;
mod near;
pub mod sim;
mod task;
mod time;

use rand::TryRngCore;

pub use clock::{Instant, monotonic_ns, wall_ns};
pub use near::{begin_behind, run_woken};
pub use task::{AbortHandle, Handle, JoinError, JoinHandle, JoinSet, spawn, spawn_blocking, yield_now};
pub use time::{Elapsed, Sleep, Timeout, sleep, timeout, timeout_at};

/// Whether the calling thread is inside a simulator.
pub fn is_simulated() -> bool {
    sim::is_current()
}

/// Random bytes, for identities. From the operating system each time: a generator in this process would give a forked
/// child the identities of its parent and of its parent's other children.
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let Some(sim) = sim::Simulator::current() else {
        let mut bytes = [0; N];
        rand::rngs::OsRng.try_fill_bytes(&mut bytes).expect("the operating system has random numbers");
        return bytes;
    };
    let mut bytes = [0; N];
    for part in bytes.chunks_mut(8) {
        part.copy_from_slice(&sim.draw().to_le_bytes()[..part.len()]);
    }
    bytes
}

/// A random number below `bound`, which is at least 1.
pub fn random_below(bound: u64) -> u64 {
    match sim::Simulator::current() {
        Some(sim) => sim.below(bound),
        None => rand::random_range(0..bound),
    }
}
