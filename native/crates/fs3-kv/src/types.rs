//! What goes into the cache and what comes out.

use bytes::Bytes;
use fs3_core::Region;

/// Bytes counted for an entry besides its key and value.
pub const ENTRY_BYTES: u64 = 256;

/// How much a node keeps.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of memory for values, keys and the index.
    pub memory_bytes: u64,
}

/// What is known of a namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// The inode of its directory.
    pub id: u64,
    /// Bytes of values for each target; 0: as many as the node can keep.
    pub share_bytes: u64,
    /// How long after its put an entry expires, in milliseconds; 0: never.
    pub ttl_ms: u64,
    /// Settings of a higher generation replace those of a lower one.
    pub generation: u64,
}

/// Which put made an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PutId {
    /// The client.
    pub writer: u64,
    /// Rises with each put and removal of that client.
    pub sequence: u64,
}

/// Names an entry.
#[derive(Clone, Copy, Debug)]
pub struct Key<'a> {
    /// The target that holds it.
    pub target: u64,
    /// The namespace.
    pub namespace: u64,
    /// Hash of namespace, key and piece.
    pub address: u128,
    /// The key itself.
    pub key: &'a [u8],
    /// Which piece of a value.
    pub piece: u32,
}

/// Bytes and their checksums.
#[derive(Clone)]
pub struct Value {
    /// The bytes.
    pub data: Region,
    /// Packed CRC32C of the 4 KiB blocks.
    pub crcs: Bytes,
    /// Bytes of memory that `data` keeps from other use.
    pub held_bytes: u64,
}

/// A put that has been admitted.
pub struct Put<'a> {
    /// Where it goes.
    pub key: Key<'a>,
    /// Settings of the namespace, as the client knows them.
    pub namespace: Namespace,
    /// [`Cache::epoch`](crate::Cache::epoch) from before the put was admitted.
    pub epoch: u64,
    /// Who puts.
    pub id: PutId,
    /// Length of the whole value, in bytes.
    pub total: u64,
    /// The bytes of this piece.
    pub value: Value,
}

/// What a put or removal did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// It took effect.
    Applied,
    /// A later one of the same client is there already, so it took effect before that.
    Superseded,
}

/// Why a put has no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The target stopped serving after the put was admitted.
    Moved,
    /// A later put or removal of the same client is over already.
    Late,
    /// It does not fit the node's memory, or the namespace's share.
    TooLarge,
}

/// A hit.
#[derive(Clone)]
pub struct Found {
    /// Bytes and checksums of the piece.
    pub value: Value,
    /// Length of the whole value, in bytes.
    pub total: u64,
    /// Which put made it.
    pub id: PutId,
}

/// An entry as the index keeps it.
pub struct Entry {
    pub(crate) target: u64,
    pub(crate) namespace: u64,
    pub(crate) address: u128,
    pub(crate) key: Box<[u8]>,
    pub(crate) piece: u32,
    pub(crate) value: Value,
    pub(crate) total: u64,
    pub(crate) id: PutId,
    pub(crate) put_ms: u64,
    pub(crate) used_ms: u64,
}

impl Entry {
    /// Bytes of memory it takes.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.value.held_bytes + self.key.len() as u64 + self.value.crcs.len() as u64 + ENTRY_BYTES
    }

    pub(crate) fn is(&self, key: &Key<'_>) -> bool {
        self.namespace == key.namespace && self.piece == key.piece && *self.key == *key.key
    }

    pub(crate) fn expired(&self, ttl_ms: u64, now_ms: u64) -> bool {
        ttl_ms != 0 && now_ms.saturating_sub(self.put_ms) >= ttl_ms
    }
}

/// One value in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The key.
    pub key: Box<[u8]>,
    /// Length of the whole value, in bytes.
    pub total: u64,
    /// Milliseconds since it was put.
    pub age_ms: u64,
    /// Milliseconds since it was put or read.
    pub idle_ms: u64,
}

/// One page of a listing.
#[derive(Debug, Default)]
pub struct Listing {
    /// The values.
    pub entries: Vec<Listed>,
    /// Where the next page begins; `None`: this is the last one.
    pub next: Option<u64>,
}

macro_rules! stats {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: u64,)*
        }

        impl $name {
            /// All of them with their names.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($field), self.$field)),*]
            }

            /// Add another's counts.
            pub fn add(&mut self, other: &Self) {
                $(self.$field += other.$field;)*
            }
        }
    };
}

stats!(
    /// What happened in a namespace on this node since the process began, and what it holds now.
    NamespaceStats {
        /// Gets that found their value.
        hits,
        /// Gets that did not.
        misses,
        /// Entries put.
        puts,
        /// Entries removed by clients.
        removed,
        /// Entries that made room within the namespace's capacity.
        evicted_capacity,
        /// Entries that made room for others on the node.
        evicted_memory,
        /// Entries evicted because somebody asked for it.
        evicted_asked,
        /// Entries whose time was over.
        expired,
        /// Entries that gave way to another key of the same address.
        collisions,
        /// Entries forgotten because their target stopped serving.
        lost,
        /// Entries now.
        entries,
        /// Bytes of values now.
        bytes,
    }
);

/// The whole node.
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheStats {
    /// Sums over all namespaces.
    pub sums: NamespaceStats,
    /// Bytes of memory held now.
    pub memory_bytes: u64,
    /// Namespaces known.
    pub namespaces: u64,
}
