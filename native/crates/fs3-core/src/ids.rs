use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

id!(
    /// A service process' node, numbered by the cluster manager from 1.
    NodeId(u32)
);
id!(
    /// One replica of a chain on one disk.
    TargetId(u64)
);
id!(
    /// A replication chain.
    ChainId(u32)
);
id!(
    /// Raised by every change of a chain's membership, state or order.
    ChainVersion(u64)
);
id!(
    /// Version of one chunk's content; 0 is "never written".
    UpdateVersion(u64)
);
id!(
    /// An inode; 1 is the root directory.
    InodeId(u64)
);

/// Random identity of one client instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(pub [u8; 16]);

/// Names a chunk: `space` (0: files), `inode`, `index`. Byte order on the wire is the order of the tuple.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId {
    /// Key space; 0 holds the chunks of files.
    pub space: u32,
    /// Owner within the space.
    pub inode: u64,
    /// Position within the owner, in chunks.
    pub index: u32,
}

impl ChunkId {
    /// Size of the encoded form in bytes.
    pub const BYTES: usize = 16;

    /// A chunk of a file.
    pub fn file(inode: InodeId, index: u32) -> Self {
        Self { space: 0, inode: inode.0, index }
    }

    /// Big-endian encoding; sorts like the tuple.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..4].copy_from_slice(&self.space.to_be_bytes());
        out[4..12].copy_from_slice(&self.inode.to_be_bytes());
        out[12..].copy_from_slice(&self.index.to_be_bytes());
        out
    }

    /// Decode; `None` unless exactly 16 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 16] = bytes.try_into().ok()?;
        Some(Self {
            space: u32::from_be_bytes(bytes[..4].try_into().ok()?),
            inode: u64::from_be_bytes(bytes[4..12].try_into().ok()?),
            index: u32::from_be_bytes(bytes[12..].try_into().ok()?),
        })
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{:x}:{}", self.space, self.inode, self.index)
    }
}
