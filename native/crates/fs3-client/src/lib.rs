//! The fs3 client: metadata calls, striped reads and writes, failover. Everything that applications and the
//! mount daemon do with a cluster goes through [`Client`] and [`OpenFile`].

mod accesses;
mod attempt;
mod audit;
mod backoff;
mod channels;
mod checked;
mod client;
mod config;
mod file;
#[cfg(test)]
mod golden;
mod health;
mod holds;
mod holes;
mod inner;
mod inode;
mod kv;
mod latency;
mod loan;
mod locks;
mod meta;
mod open_inodes;
mod plan;
mod pool;
mod read;
mod report;
mod routing;
pub mod trace;
mod types;
mod wire;
mod write;

pub use client::Client;
pub use config::ClientConfig;
pub use file::{OpenFile, Retained};
pub use fs3_core::{AlignedBuf, ClientId, Code, Error, Region, RegionMut, Result};
pub use fs3_net::Waiter;
pub use fs3_proto::v1::{
    Attr, Caller, ChunkInfo, ContentVersion, DirEntry, FileLock, FileType, Layout, ListResponse as DirPage, LockKind,
    LockType, Method, PathAt, Routing, StatfsResponse as Statfs, XattrBit,
};
pub use inode::content_version;
pub use kv::{KvCache, KvCalls, KvEntry, KvGot, KvKeep, KvLatency, KvPage, KvSettings, KvSpace};
pub use locks::{Granted, KeptAlive};
pub use types::{
    CreateOptions, OpenOptions, ReadOp, ReadSum, ReplicaListing, Setattr, SetxattrMode, Stats, WriteOp, at_child,
    at_inode, at_path,
};
