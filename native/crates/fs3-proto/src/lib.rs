//! Wire and disk schemas (generated) and the frame codec.

pub mod frame;
pub mod routing;

/// Messages of `proto/fs3/v1`.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/fs3.v1.rs"));
}
