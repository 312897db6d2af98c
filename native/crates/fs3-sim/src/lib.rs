//! The deterministic simulation of storage: real clients and real storage services over a simulated network and
//! simulated disks, in virtual time, all of it owned by one seed.
//!
//! [`World`] is driven from outside: whoever drives it plays the cluster manager (the real one, in Python, or a scripted
//! one in tests), hands routing and leases to the nodes' engines and lets time go on.

mod audit;
mod chaos;
mod check;
mod check_order;
mod check_registers;
mod check_search;
#[cfg(test)]
mod check_tests;
mod control;
mod disks;
mod history;
mod load;
mod meta;
mod network;
mod nodes;
mod options;
mod world;

pub use check::{Property, Violation, check};
pub use history::{History, Kind, Loss, Operation, Outcome, Run, TORN, VALUE_BYTES, bytes_of, runs_of};
pub use nodes::{Happening, HappeningKind};
pub use options::Options;
pub use world::World;
