//! The mount daemon: serves a cluster to the kernel through FUSE.
//!
//! Requests are read by a few threads of fuser, begun on them, and go on where they are woken, so that a slow one holds
//! up nobody else. All handles of an inode share one state ([`inode`]): writes are gathered into
//! large pieces ([`gather`]) that go to storage in the background, reads see them at once, and `close` returns
//! after the data is on every serving replica and the length is published. Memory is bounded by two pools of
//! recycled buffers ([`buffers`]).

mod appends;
mod attrs;
mod blocks;
mod buffers;
mod caller;
mod copy;
mod core;
mod data;
mod dirattrs;
mod dirs;
mod event;
mod filesystem;
mod gather;
mod handover;
mod ids;
mod inode;
#[cfg(test)]
mod inode_tests;
mod io;
mod kills;
mod locks;
mod mount;
mod names;
mod readahead;
mod stats;
mod tables;
mod told;
mod virt;
mod xattrs;

pub use handover::Predecessor;
pub use ids::{IdMap, IdMaps, IdRange};
pub use mount::{Cache, MountHandle, MountOptions, mount, succeed};
