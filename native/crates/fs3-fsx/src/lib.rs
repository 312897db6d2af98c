//! Random operations on one file, compared with a model in memory after each of them; after `fsx` of the XFS test suite
//! (Apple, 1991; `ltp/fsx.c` of xfstests). For tests of mounts; any directory of a Linux file system will do.
//!
//! Beyond the original: a lasting shared mapping beside fresh ones, O_APPEND and O_DIRECT descriptors of the same file
//! that stay open, one file through two mounts that hand it over (close-to-open), neighbours that share a file at
//! borders inside pages, operations as text to replay, and failing sequences made short.

mod draw;
mod file;
mod mapping;
mod model;
mod operation;
mod options;
mod plan;
mod run;
mod shrink;

pub use options::{Options, USAGE};
pub use run::run;
