//! The deterministic simulation of storage: real clients and real storage services over a simulated network and
//! simulated disks, in virtual time, all of it owned by one seed.

mod history;

pub use history::{History, Kind, Operation, Outcome, Run, TORN, VALUE_BYTES, bytes_of, runs_of};
