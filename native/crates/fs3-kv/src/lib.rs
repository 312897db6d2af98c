//! The index of the key-value cache on one storage node: which entries there are, whose turn it is to go, and what late
//! requests may still do. Pure: no I/O, no clock, no threads.
//!
//! An entry belongs to a target and is found by a 128-bit address; what is compared is the whole key. What makes stale
//! values impossible is in three rules that hold here:
//! - a target that stops serving forgets everything ([`Cache::clear_target`]), and what was admitted before comes too
//!   late afterwards ([`Refused::Moved`]);
//! - puts and removals of one client carry rising numbers, and one that arrives after a later one of the same key has no
//!   effect;
//! - that holds also when the later one is not there any more: each entry that goes leaves its number behind
//!   ([`writers::Writers`]).

mod cache;
mod chunks;
mod slots;
mod types;
mod writers;

pub use cache::Cache;
pub use chunks::{ChunkIndex, ChunkKey, Eviction, Stored, Turn};
pub use types::{
    CacheStats, Done, Entry, Found, Key, Limits, Listed, Listing, Namespace, NamespaceStats, Put, PutId, Refused, Value,
};
