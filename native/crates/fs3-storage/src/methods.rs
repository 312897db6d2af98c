//! The methods of the frame protocol that a storage node serves.

pub(crate) mod check;
pub(crate) mod kv;
pub(crate) mod kv_chunks;
pub(crate) mod query;
pub(crate) mod read;
pub(crate) mod remove;
pub(crate) mod write;
