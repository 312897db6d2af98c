//! The deterministic simulation of storage: real clients and real storage services over a simulated network and
//! simulated disks, in virtual time, all of it owned by one seed.

mod check;
mod check_order;
mod check_registers;
mod check_search;
#[cfg(test)]
mod check_tests;
mod history;

pub use check::{Property, Violation, check};
pub use history::{History, Kind, Loss, Operation, Outcome, Run, TORN, VALUE_BYTES, bytes_of, runs_of};
