//! A directory that behaves like a bad disk: a FUSE file system over a plain directory that forgets unsynced writes
//! when the power is cut, and fails, fills up, slows down or rots on command. For tests; see `tests/torture`.
//!
//! What is durable follows POSIX to the letter: bytes and length of a file after `fsync` of that file, names after
//! `fsync` of a directory. Name changes become durable in their order, as in every journaling file system.

mod control;
mod draw;
mod faults;
mod filesystem;
mod journal;
mod names;
mod tree;

pub use control::serve;
pub use filesystem::{Fs, mount};
pub use tree::Tree;
