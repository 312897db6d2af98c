use std::sync::Arc;

use fs3_core::{ClientId, Code, Error, RegionMut, Result};
use fs3_proto::v1::{Attr, Caller, DirEntry, FileType, Layout, ListResponse, PathAt, RenameResponse, StatfsResponse};

use crate::types::is_special;
use crate::{ClientConfig, CreateOptions, OpenFile, OpenOptions, ReadOp, ReplicaListing, Setattr};

/// A connection to a cluster. Cheap to clone; all clones share connections, caches and limits. Its background
/// tasks run on the tokio runtime that `connect` ran on and end with [`Client::close`] or the last clone.
#[derive(Clone)]
pub struct Client {
    id: ClientId,
}

fn later<T>() -> Result<T> {
    Err(Error::new(Code::Unimplemented, "not connected"))
}

#[allow(clippy::unused_async)]
impl Client {
    /// Reach a meta service and learn the routing. Errors: Unauthenticated, WrongCluster, InvalidArgument,
    /// Timeout when no meta service answered within `op_timeout`.
    pub async fn connect(config: ClientConfig) -> Result<Client> {
        config.validate()?;
        later()
    }

    /// Random identity of this client.
    pub fn client_id(&self) -> ClientId {
        self.id
    }

    /// The cluster's id.
    pub fn cluster_id(&self) -> String {
        String::new()
    }

    /// Version of the routing in use.
    pub fn routing_version(&self) -> u64 {
        0
    }

    /// End the background tasks and connections. Open files fail afterwards with Unavailable.
    pub async fn close(&self) {}

    /// Attributes of entry `name` of directory `parent`; a symlink is not followed.
    pub async fn lookup(&self, caller: &Caller, parent: u64, name: &[u8]) -> Result<Attr> {
        let _ = (caller, parent, name);
        later()
    }

    /// Attributes of one inode.
    pub async fn stat(&self, caller: &Caller, at: PathAt) -> Result<Attr> {
        let _ = (caller, at);
        later()
    }

    /// Attributes of many, in the order asked, in few round trips.
    pub async fn batch_stat(&self, caller: &Caller, at: Vec<PathAt>) -> Result<Vec<Result<Attr>>> {
        let _ = (caller, at);
        later()
    }

    /// One page of a directory: names greater than `after`, at most `limit` (0: the server's choice).
    pub async fn list(
        &self,
        caller: &Caller,
        at: PathAt,
        after: &[u8],
        limit: u32,
        with_attr: bool,
    ) -> Result<ListResponse> {
        let _ = (caller, at, after, limit, with_attr);
        later()
    }

    /// A whole directory in name order. Not a snapshot: entries made or removed meanwhile may be missed.
    pub async fn list_all(&self, caller: &Caller, at: PathAt, with_attr: bool) -> Result<Vec<DirEntry>> {
        let _ = (caller, at, with_attr);
        later()
    }

    /// Create a file, or open it when it exists and `exclusive` is not set; [`OpenFile::created`] tells.
    pub async fn create(&self, caller: &Caller, at: PathAt, options: CreateOptions) -> Result<Arc<OpenFile>> {
        let _ = (caller, at, options);
        later()
    }

    /// Make a file, fifo, socket or device without opening it. Errors: Exists.
    pub async fn mknod(&self, caller: &Caller, at: PathAt, mode: u32, kind: FileType, rdev: u64) -> Result<Attr> {
        if !is_special(kind) {
            return Err(Error::new(Code::InvalidArgument, "mknod makes files, fifos, sockets and devices"));
        }
        let _ = (caller, at, mode, rdev);
        later()
    }

    /// Open an existing file.
    pub async fn open(&self, caller: &Caller, at: PathAt, options: OpenOptions) -> Result<Arc<OpenFile>> {
        let _ = (caller, at, options);
        later()
    }

    /// Make a directory; with `parents` also the missing ones above, an existing directory being fine.
    pub async fn mkdir(
        &self,
        caller: &Caller,
        at: PathAt,
        mode: u32,
        parents: bool,
        layout: Option<Layout>,
    ) -> Result<Attr> {
        let _ = (caller, at, mode, parents, layout);
        later()
    }

    /// Make a symlink to `target`.
    pub async fn symlink(&self, caller: &Caller, at: PathAt, target: &[u8]) -> Result<Attr> {
        let _ = (caller, at, target);
        later()
    }

    /// Make `to` a hard link to `from`.
    pub async fn link(&self, caller: &Caller, from: PathAt, to: PathAt) -> Result<Attr> {
        let _ = (caller, from, to);
        later()
    }

    /// Remove a name that is not a directory; returns the attributes afterwards (nlink 0: it is going).
    ///
    /// `known`: the inode that `at` names, when the caller knows it. An inode with open files in this client
    /// lives on until the last of them is closed; knowing it saves a round trip where there are none.
    pub async fn unlink(&self, caller: &Caller, at: PathAt, known: Option<u64>) -> Result<Attr> {
        let _ = (caller, at, known);
        later()
    }

    /// Remove an empty directory.
    pub async fn rmdir(&self, caller: &Caller, at: PathAt) -> Result<()> {
        let _ = (caller, at);
        later()
    }

    /// Remove a whole tree in one atomic step.
    pub async fn remove_all(&self, caller: &Caller, at: PathAt) -> Result<()> {
        let _ = (caller, at);
        later()
    }

    /// Rename; `no_replace` fails with Exists when `to` is taken, `exchange` swaps the two. The response has the
    /// moved inode and the one that was replaced, if any, which lives on while it is open in this client
    /// (`known_replaced`: as in [`Client::unlink`]).
    pub async fn rename(
        &self,
        caller: &Caller,
        from: PathAt,
        to: PathAt,
        no_replace: bool,
        exchange: bool,
        known_replaced: Option<u64>,
    ) -> Result<RenameResponse> {
        let _ = (caller, from, to, no_replace, exchange, known_replaced);
        later()
    }

    /// Change mode, owner or times.
    pub async fn setattr(&self, caller: &Caller, at: PathAt, change: Setattr) -> Result<Attr> {
        let _ = (caller, at, change);
        later()
    }

    /// Cut or extend a file to `length` bytes.
    pub async fn truncate(&self, caller: &Caller, at: PathAt, length: u64) -> Result<Attr> {
        let _ = (caller, at, length);
        later()
    }

    /// Capacity and use.
    pub async fn statfs(&self, caller: &Caller, at: PathAt) -> Result<StatfsResponse> {
        let _ = (caller, at);
        later()
    }

    /// Many reads at once, batched per node; results in the order asked, each as [`OpenFile::read`].
    pub async fn read_many(&self, ops: Vec<ReadOp>) -> Vec<(Result<usize>, RegionMut)> {
        ops.into_iter().map(|op| (later(), op.buf)).collect()
    }

    /// What every target of every chain holds, for comparing replicas.
    pub async fn list_replicas(&self) -> Result<Vec<ReplicaListing>> {
        later()
    }
}
