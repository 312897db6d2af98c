use std::sync::Arc;

use fs3_core::{Code, Error, Region, RegionMut, Result};
use fs3_proto::v1::{ChunkInfo, FileType, Layout, PathAt};

use crate::OpenFile;

/// An inode itself.
pub fn at_inode(inode: u64) -> PathAt {
    PathAt { inode, path: Default::default(), follow: false }
}

/// The entry `name` of a directory, a symlink not followed.
pub fn at_child(parent: u64, name: &[u8]) -> PathAt {
    PathAt { inode: parent, path: bytes::Bytes::copy_from_slice(name), follow: false }
}

/// A path from the root directory.
pub fn at_path(path: &[u8], follow: bool) -> PathAt {
    PathAt { inode: 1, path: bytes::Bytes::copy_from_slice(path), follow }
}

/// How to open an existing file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Check read permission.
    pub read: bool,
    /// Check write permission and open a write session.
    pub write: bool,
    /// Cut to length 0 (needs `write`).
    pub truncate: bool,
}

/// How to create a file (and open it).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CreateOptions {
    /// Permission bits.
    pub mode: u32,
    /// Taken from the mode, unless the directory has a default access control list.
    pub umask: u32,
    /// Fail with Exists when the name is taken.
    pub exclusive: bool,
    /// Cut an existing file to length 0.
    pub truncate: bool,
    /// Open for reading.
    pub read: bool,
    /// Open for writing (a write session).
    pub write: bool,
    /// Chunk size and stripe; `None`: the directory's.
    pub layout: Option<Layout>,
}

/// What to change of an inode; `None` and `false` leave a field as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setattr {
    /// Permission and set-id bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Access time, nanoseconds since 1970.
    pub atime_ns: Option<i64>,
    /// Modification time, nanoseconds since 1970.
    pub mtime_ns: Option<i64>,
    /// Access time: the server's clock.
    pub atime_now: bool,
    /// Modification time: the server's clock.
    pub mtime_now: bool,
    /// Of a directory: chunk size in bytes of files made in it from now on; 0: the cluster's.
    pub chunk_bytes: Option<u32>,
    /// Of a directory: chains that such a file lies on; 0: the cluster's.
    pub stripe: Option<u32>,
}

/// What has to be there already when an extended attribute is set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetxattrMode {
    /// It must not exist.
    pub create: bool,
    /// It must exist.
    pub replace: bool,
}

impl SetxattrMode {
    const CREATE: i32 = 1;
    const REPLACE: i32 = 2;

    /// That of Linux' XATTR_CREATE and XATTR_REPLACE. Errors: InvalidArgument for other bits.
    pub fn from_flags(flags: i32) -> Result<Self> {
        if flags & !(Self::CREATE | Self::REPLACE) != 0 {
            return Err(Error::new(Code::InvalidArgument, "flags other than XATTR_CREATE and XATTR_REPLACE"));
        }
        Ok(Self { create: flags & Self::CREATE != 0, replace: flags & Self::REPLACE != 0 })
    }
}

/// One read of [`crate::Client::read_many`].
pub struct ReadOp {
    /// The file.
    pub file: Arc<OpenFile>,
    /// First byte.
    pub offset: u64,
    /// Filled from the start; its length is what is asked for.
    pub buf: RegionMut,
}

/// The CRC-32C of a part of what is read.
#[derive(Clone, Debug)]
pub struct ReadSum {
    /// The part, in bytes from the first one asked for.
    pub range: std::ops::Range<usize>,
    /// What it is to be.
    pub crc: u32,
}

/// One write of [`crate::Client::write_many`].
pub struct WriteOp {
    /// The file, open for writing.
    pub file: Arc<OpenFile>,
    /// First byte.
    pub offset: u64,
    /// The bytes; they must not change until the call returns.
    pub data: Region,
}

/// What one target holds, for audits.
#[derive(Clone, Debug)]
pub struct ReplicaListing {
    /// Chain of the target.
    pub chain_id: u32,
    /// The target.
    pub target_id: u64,
    /// Its public state as a `fs3.v1.PublicState` number.
    pub state: i32,
    /// Every chunk, in chunk-id order.
    pub chunks: Vec<ChunkInfo>,
}

/// The kinds of inode that [`crate::Client::mknod`] makes.
pub(crate) fn is_special(kind: FileType) -> bool {
    !matches!(kind, FileType::Unspecified | FileType::Directory | FileType::Symlink)
}

/// What a client has met so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Replies of storage whose bytes did not match their checksums, or that storage itself found rotten.
    pub checksum_failures: u64,
    /// Reads that went on to another replica, whatever the reason.
    pub read_failovers: u64,
    /// Reads that were sent to a second replica because the first one took long.
    pub read_hedges: u64,
    /// Those of them that the second replica answered first.
    pub read_hedges_won: u64,
    /// Writes sent again, because the chain changed or a node did not answer.
    pub write_retries: u64,
    /// Writes sent again because they were damaged on the way.
    pub payload_resends: u64,
}
