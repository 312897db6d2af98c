use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use fs3_core::{ClientId, Code, Error, RegionMut, Result};
use fs3_proto::v1::{
    Attr, AttrResponse, BatchStatRequest, BatchStatResponse, Caller, CloseRequest, CreateRequest, DirEntry, Empty,
    FileType, GetRoutingRequest, GetRoutingResponse, GetxattrRequest, GetxattrResponse, Layout, LinkRequest,
    ListRequest, ListResponse, ListxattrRequest, ListxattrResponse, LookupRequest, Method, MkdirRequest, OpenRequest,
    OpenResponse, PathAt, RemoveAllRequest, RemovexattrRequest, RenameRequest, RenameResponse, RmdirRequest, Routing,
    SetattrRequest, SetxattrRequest, StatRequest, StatfsRequest, StatfsResponse, SymlinkRequest, TruncateRequest,
    UnlinkRequest, UnlinkResponse,
};

use fs3_rt::JoinSet;
use prost::Message;

use crate::inner::{Inner, follow_routing, keep_sessions};
use crate::meta::{CallLimits, Encoded, Metas, RequestHead, call, decoded};
use crate::routing::check_layout;
use crate::types::is_special;
use crate::wire::Wire;
use crate::{
    ClientConfig, CreateOptions, OpenFile, OpenOptions, ReadOp, ReadSum, ReplicaListing, Setattr, SetxattrMode, Stats,
    WriteOp, accesses, holds, trace,
};

/// How long the end of a client waits for the service to take what nobody depends on.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Items of one batch_stat request.
const BATCH_STAT_MAX: usize = 1024;
/// Opens of one `open_many` that are on their way at a time.
const OPENING_MAX: usize = 64;

/// A connection to a cluster. Cheap to clone; all clones share connections, caches and limits. Its background
/// tasks run on the tokio runtime that `connect` ran on and end with [`Client::close`] or the last clone.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    inner: Arc<Inner>,
    tasks: Vec<fs3_rt::AbortHandle>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.inner.close();
        self.tasks.iter().for_each(fs3_rt::AbortHandle::abort);
    }
}

impl Client {
    /// Reach a meta service and learn the routing. Errors: Unauthenticated, WrongCluster, InvalidArgument,
    /// Timeout or Unavailable when no meta service answered within `op_timeout`.
    pub async fn connect(config: ClientConfig) -> Result<Client> {
        config.validate()?;
        let id = ClientId(fs3_rt::random_bytes());
        let routing = {
            let wire = Wire::new(id, &config, config.cluster_id.as_deref().unwrap_or_default());
            first_routing(&wire, &config).await?
        };
        if let Some(wanted) = config.cluster_id.as_ref().filter(|wanted| **wanted != routing.cluster_id) {
            let message = format!("this is cluster {:?}, not {wanted:?}", routing.cluster_id);
            return Err(Error::new(Code::WrongCluster, message));
        }
        // From here on nobody of another cluster is listened to.
        let wire = Wire::new(id, &config, &routing.cluster_id);
        let inner = Inner::new(id, config, wire, routing);
        let tasks = vec![
            fs3_rt::spawn(follow_routing(inner.clone())).abort_handle(),
            fs3_rt::spawn(keep_sessions(inner.clone())).abort_handle(),
            fs3_rt::spawn(accesses::keep_telling(inner.clone())).abort_handle(),
        ];
        Ok(Client { shared: Arc::new(Shared { inner, tasks }) })
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.shared.inner
    }

    /// Random identity of this client.
    pub fn client_id(&self) -> ClientId {
        self.inner().id
    }

    /// The cluster's id.
    pub fn cluster_id(&self) -> String {
        self.inner().view().raw.cluster_id.clone()
    }

    /// Version of the routing in use.
    pub fn routing_version(&self) -> u64 {
        self.inner().view().version()
    }

    /// The routing in use.
    pub fn routing(&self) -> Routing {
        self.inner().view().raw.clone()
    }

    /// Ask for newer routing now and return the version in use afterwards.
    pub async fn refresh_routing(&self) -> Result<u64> {
        self.inner().refresh_routing().await?;
        Ok(self.routing_version())
    }

    /// The tokio runtime this client lives on.
    pub fn runtime(&self) -> &fs3_rt::Handle {
        &self.inner().runtime
    }

    /// Counters since `connect`.
    pub fn stats(&self) -> Stats {
        let counters = &self.inner().counters;
        Stats {
            checksum_failures: counters.checksum_failures.load(Ordering::Relaxed),
            read_failovers: counters.read_failovers.load(Ordering::Relaxed),
            read_hedges: counters.read_hedges.load(Ordering::Relaxed),
            read_hedges_won: counters.read_hedges_won.load(Ordering::Relaxed),
            write_retries: counters.write_retries.load(Ordering::Relaxed),
            payload_resends: counters.payload_resends.load(Ordering::Relaxed),
        }
    }

    /// What moved by each RDMA device that may be used, by its name: counters by name, which docs/rdma.md explains.
    /// Clients of one process with the same transport are counted together.
    pub fn rdma_counters(&self) -> Vec<(String, Vec<(&'static str, u64)>)> {
        self.inner().wire.rdma_counters()
    }

    /// What moved through memory that is shared with storage services of this host: counters by name, which
    /// docs/operations.md explains. Clients of one process with the same transport are counted together.
    pub fn shared_memory_counters(&self) -> Vec<(&'static str, u64)> {
        self.inner().wire.shared_memory_counters()
    }

    /// End the background tasks and connections. Calls on their way and open files fail with Unavailable.
    pub async fn close(&self) {
        let _ = fs3_rt::timeout(LAST_WORDS, async {
            holds::end_all(self.inner()).await;
            accesses::tell(self.inner()).await;
        })
        .await;
        self.inner().close();
        self.shared.tasks.iter().for_each(fs3_rt::AbortHandle::abort);
    }

    /// Attributes of entry `name` of directory `parent`; a symlink is not followed.
    pub async fn lookup(&self, caller: &Caller, parent: u64, name: &[u8]) -> Result<Attr> {
        let name = Bytes::copy_from_slice(name);
        self.attr(Method::MetaLookup, &LookupRequest { caller: some(caller), parent, name }).await
    }

    /// Attributes of one inode.
    pub async fn stat(&self, caller: &Caller, at: PathAt) -> Result<Attr> {
        self.attr(Method::MetaStat, &StatRequest { caller: some(caller), at: Some(at) }).await
    }

    /// Attributes of many, in the order asked, in few round trips.
    pub async fn batch_stat(&self, caller: &Caller, at: Vec<PathAt>) -> Result<Vec<Result<Attr>>> {
        let mut results = Vec::with_capacity(at.len());
        for part in at.chunks(BATCH_STAT_MAX) {
            let request = BatchStatRequest { caller: some(caller), at: part.to_vec() };
            let response: BatchStatResponse = self.inner().meta(Method::MetaBatchStat, &request).await?;
            if response.items.len() != part.len() {
                return Err(Error::new(Code::Protocol, "the service answered another number of items than asked"));
            }
            results.extend(response.items.into_iter().map(|item| match (item.code, item.attr) {
                (0, Some(attr)) => Ok(self.inner().merge(attr)),
                (code, _) => Err(plain_error(Code::from_wire(code as u16))),
            }));
        }
        Ok(results)
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
        let after = Bytes::copy_from_slice(after);
        let request = ListRequest { caller: some(caller), at: Some(at), after, limit, with_attr };
        let mut page: ListResponse = self.inner().meta(Method::MetaList, &request).await?;
        for entry in &mut page.entries {
            entry.attr = entry.attr.take().map(|attr| self.inner().merge(attr));
        }
        Ok(page)
    }

    /// A whole directory in name order. Not a snapshot: entries made or removed meanwhile may be missed.
    pub async fn list_all(&self, caller: &Caller, at: PathAt, with_attr: bool) -> Result<Vec<DirEntry>> {
        let mut page = self.list(caller, at, b"", 0, with_attr).await?;
        let mut all = std::mem::take(&mut page.entries);
        while !page.end {
            let Some(last) = all.last().map(|entry| entry.name.clone()) else {
                return Err(Error::new(Code::Protocol, "the service sent an empty page that is not the last"));
            };
            // Later pages name the inode, so that a rename of the path does not mix two directories.
            let dir = crate::at_inode(page.inode);
            page = self.list(caller, dir, &last, 0, with_attr).await?;
            if page.entries.is_empty() && !page.end {
                return Err(Error::new(Code::Protocol, "the service sent an empty page that is not the last"));
            }
            all.append(&mut page.entries);
        }
        Ok(all)
    }

    /// Create a file, or open it when it exists and `exclusive` is not set; [`OpenFile::created`] tells.
    pub async fn create(&self, caller: &Caller, at: PathAt, options: CreateOptions) -> Result<Arc<OpenFile>> {
        let request = CreateRequest {
            caller: some(caller),
            op: self.inner().op_id(),
            at: Some(at),
            mode: options.mode,
            umask: options.umask,
            exclusive: options.exclusive,
            truncate: options.truncate,
            open_write: options.write,
            r#type: FileType::File as i32,
            layout: options.layout,
            open_read: options.read,
            ..Default::default()
        };
        let response: OpenResponse = self.inner().meta(Method::MetaCreate, &request).await?;
        self.opened(caller, response, options.write)
    }

    /// Create a file without a name in the directory `at`, open for writing; it goes with its last open file. Unless
    /// `options.exclusive` is set, [`Client::link`] may give it a name.
    pub async fn create_unnamed(&self, caller: &Caller, at: PathAt, options: CreateOptions) -> Result<Arc<OpenFile>> {
        let request = CreateRequest {
            caller: some(caller),
            op: self.inner().op_id(),
            at: Some(at),
            mode: options.mode,
            umask: options.umask,
            exclusive: options.exclusive,
            open_write: true,
            open_read: options.read,
            layout: options.layout,
            unnamed: true,
            ..Default::default()
        };
        let response: OpenResponse = self.inner().meta(Method::MetaCreate, &request).await?;
        self.opened(caller, response, true)
    }

    /// Make a file, fifo, socket or device without opening it. Errors: Exists.
    pub async fn mknod(
        &self,
        caller: &Caller,
        at: PathAt,
        mode: u32,
        umask: u32,
        kind: FileType,
        rdev: u64,
    ) -> Result<Attr> {
        if !is_special(kind) {
            return Err(Error::new(Code::InvalidArgument, "mknod makes files, fifos, sockets and devices"));
        }
        let request = CreateRequest {
            caller: some(caller),
            op: self.inner().op_id(),
            at: Some(at),
            mode,
            umask,
            exclusive: true,
            r#type: kind as i32,
            rdev,
            ..Default::default()
        };
        let response: OpenResponse = self.inner().meta(Method::MetaCreate, &request).await?;
        response.attr.ok_or_else(no_attr)
    }

    /// Open an existing file.
    pub async fn open(&self, caller: &Caller, at: PathAt, options: OpenOptions) -> Result<Arc<OpenFile>> {
        let request = OpenRequest {
            caller: some(caller),
            op: self.inner().op_id(),
            at: Some(at),
            read: options.read,
            write: options.write,
            truncate: options.truncate,
        };
        let response: OpenResponse = self.inner().meta(Method::MetaOpen, &request).await?;
        self.opened(caller, response, options.write)
    }

    /// Open many existing files for reading, several at a time; results in the order asked, each as [`Client::open`].
    pub async fn open_many(&self, caller: &Arc<Caller>, at: Vec<PathAt>) -> Vec<Result<Arc<OpenFile>>> {
        let count = at.len();
        let mut waiting = at.into_iter().enumerate();
        let mut tasks = JoinSet::new();
        let failed = || Err(Error::new(Code::Internal, "an open failed; see the log"));
        let mut results: Vec<_> = (0..count).map(|_| failed()).collect();
        loop {
            while tasks.len() < OPENING_MAX
                && let Some((number, at)) = waiting.next()
            {
                let (client, caller) = (self.clone(), caller.clone());
                let options = OpenOptions { read: true, ..OpenOptions::default() };
                tasks.spawn(trace::inherit(async move { (number, client.open(&caller, at, options).await) }));
            }
            match tasks.join_next().await {
                Some(Ok((number, result))) => results[number] = result,
                Some(Err(_)) => {}
                None => return results,
            }
        }
    }

    /// Make a directory, `umask` as in [`CreateOptions`]; with `parents` also the missing ones above, an existing directory being fine.
    pub async fn mkdir(
        &self,
        caller: &Caller,
        at: PathAt,
        mode: u32,
        umask: u32,
        parents: bool,
        layout: Option<Layout>,
    ) -> Result<Attr> {
        let op = self.inner().op_id();
        let request = MkdirRequest { caller: some(caller), op, at: Some(at), mode, umask, parents, layout };
        self.attr(Method::MetaMkdir, &request).await
    }

    /// Make a symlink to `target`.
    pub async fn symlink(&self, caller: &Caller, at: PathAt, target: &[u8]) -> Result<Attr> {
        let (op, target) = (self.inner().op_id(), Bytes::copy_from_slice(target));
        self.attr(Method::MetaSymlink, &SymlinkRequest { caller: some(caller), op, at: Some(at), target }).await
    }

    /// Make `to` a hard link to `from`.
    pub async fn link(&self, caller: &Caller, from: PathAt, to: PathAt) -> Result<Attr> {
        let op = self.inner().op_id();
        self.attr(Method::MetaLink, &LinkRequest { caller: some(caller), op, from: Some(from), to: Some(to) }).await
    }

    /// Remove a name that is not a directory; returns the attributes afterwards (nlink 0: it is going).
    ///
    /// `known`: the inode that `at` names, when the caller knows it. An inode with open files in this client
    /// lives on until the last of them is closed; knowing it saves a round trip where there are none.
    pub async fn unlink(&self, caller: &Caller, at: PathAt, known: Option<u64>) -> Result<Attr> {
        let hold = self.hold_for(known);
        let request = UnlinkRequest {
            caller: some(caller),
            op: self.inner().op_id(),
            at: Some(at),
            hold_session: hold_bytes(hold),
        };
        let response: UnlinkResponse = self.inner().meta(Method::MetaUnlink, &request).await?;
        let attr = response.attr.ok_or_else(no_attr)?;
        self.held(caller, &attr, hold).await;
        Ok(self.inner().merge(attr))
    }

    /// Remove an empty directory.
    pub async fn rmdir(&self, caller: &Caller, at: PathAt) -> Result<()> {
        let request = RmdirRequest { caller: some(caller), op: self.inner().op_id(), at: Some(at) };
        self.inner().meta::<_, Empty>(Method::MetaRmdir, &request).await.map(drop)
    }

    /// Remove a whole tree in one atomic step; `skip_trash`: for good, also where directories keep what is removed.
    pub async fn remove_all(&self, caller: &Caller, at: PathAt, skip_trash: bool) -> Result<()> {
        let request = RemoveAllRequest { caller: some(caller), op: self.inner().op_id(), at: Some(at), skip_trash };
        self.inner().meta::<_, Empty>(Method::MetaRemoveAll, &request).await.map(drop)
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
        let hold = if no_replace || exchange { None } else { self.hold_for(known_replaced) };
        let request = RenameRequest {
            caller: some(caller),
            op: self.inner().op_id(),
            from: Some(from),
            to: Some(to),
            no_replace,
            exchange,
            hold_session: hold_bytes(hold),
        };
        let mut response: RenameResponse = self.inner().meta(Method::MetaRename, &request).await?;
        if let Some(replaced) = &response.replaced {
            self.held(caller, replaced, hold).await;
        }
        response.attr = response.attr.map(|attr| self.inner().merge(attr));
        response.replaced = response.replaced.map(|attr| self.inner().merge(attr));
        Ok(response)
    }

    /// Change mode, owner, times, or the layout of what is made in a directory.
    pub async fn setattr(&self, caller: &Caller, at: PathAt, change: Setattr) -> Result<Attr> {
        let request = SetattrRequest {
            caller: some(caller),
            op: self.inner().op_id(),
            at: Some(at),
            mode: change.mode,
            uid: change.uid,
            gid: change.gid,
            atime_ns: change.atime_ns,
            mtime_ns: change.mtime_ns,
            atime_now: change.atime_now,
            mtime_now: change.mtime_now,
            chunk_bytes: change.chunk_bytes,
            stripe: change.stripe,
            trash_ms: None,
        };
        let response: AttrResponse = self.inner().meta(Method::MetaSetattr, &request).await?;
        let attr = response.attr.ok_or_else(no_attr)?;
        if change.atime_now || change.atime_ns.is_some() {
            self.inner().accesses.forget(attr.inode);
        }
        let sets_mtime = change.mtime_now || change.mtime_ns.is_some();
        if let Some(state) = self.inner().inodes.get(attr.inode).filter(|_| sets_mtime) {
            state.set_mtime();
        }
        Ok(self.inner().merge(attr))
    }

    /// Cut or extend a file to `length` bytes.
    pub async fn truncate(&self, caller: &Caller, at: PathAt, length: u64) -> Result<Attr> {
        if at.path.is_empty() {
            return self.truncate_inode(caller, at.inode, length, Bytes::new()).await;
        }
        // Which inode is meant decides whose writes must wait.
        let inode = self.stat(caller, PathAt { follow: true, ..at }).await?.inode;
        self.truncate_inode(caller, inode, length, Bytes::new()).await
    }

    /// Truncate with this client's writes to the inode held back, so that each of them is wholly before or after.
    pub(crate) async fn truncate_inode(
        &self,
        caller: &Caller,
        inode: u64,
        length: u64,
        session: Bytes,
    ) -> Result<Attr> {
        let state = self.inner().inodes.get(inode);
        let _alone = match &state {
            Some(state) => Some(state.gate.write().await),
            None => None,
        };
        let at = Some(crate::at_inode(inode));
        let request = TruncateRequest { caller: some(caller), op: self.inner().op_id(), at, length, session };
        let response: AttrResponse = self.inner().meta(Method::MetaTruncate, &request).await?;
        let attr = self.inner().merge(response.attr.ok_or_else(no_attr)?);
        if let Some(state) = &state {
            state.limit_length(response.length_limit);
            state.set_mtime();
        }
        Ok(attr)
    }

    /// Any metadata operation that needs nothing of the client but its name: `request` is the encoded message without
    /// `caller` and `op`, which are fields 1 and 2 of every request (`with_op`: it has the second). The encoded response.
    pub async fn meta_call(&self, caller: &Caller, method: Method, request: Bytes, with_op: bool) -> Result<Bytes> {
        let head = RequestHead { caller: some(caller), op: if with_op { self.inner().op_id() } else { None } };
        let mut body = head.encode_to_vec();
        body.extend_from_slice(&request);
        self.inner().meta_bytes(method, &Encoded(body.into()), None).await
    }

    /// The value of an extended attribute. Errors: NoData, Access, NotSupported (unknown prefix).
    pub async fn getxattr(&self, caller: &Caller, at: PathAt, name: &[u8]) -> Result<Bytes> {
        let request = GetxattrRequest { caller: some(caller), at: Some(at), name: Bytes::copy_from_slice(name) };
        let response: GetxattrResponse = self.inner().meta(Method::MetaGetxattr, &request).await?;
        Ok(response.value)
    }

    /// The names of the extended attributes that the caller may know of, in byte order.
    pub async fn listxattr(&self, caller: &Caller, at: PathAt) -> Result<Vec<Bytes>> {
        let request = ListxattrRequest { caller: some(caller), at: Some(at) };
        let response: ListxattrResponse = self.inner().meta(Method::MetaListxattr, &request).await?;
        Ok(response.names)
    }

    /// Set an extended attribute; returns the attributes afterwards. Errors: Exists, NoData, Access, NotPermitted,
    /// NotSupported (unknown prefix), TooLarge, NoSpace.
    pub async fn setxattr(
        &self,
        caller: &Caller,
        at: PathAt,
        name: &[u8],
        value: &[u8],
        mode: SetxattrMode,
    ) -> Result<Attr> {
        let request = SetxattrRequest {
            caller: some(caller),
            op: self.inner().op_id(),
            at: Some(at),
            name: Bytes::copy_from_slice(name),
            value: Bytes::copy_from_slice(value),
            create: mode.create,
            replace: mode.replace,
        };
        self.attr(Method::MetaSetxattr, &request).await
    }

    /// Remove an extended attribute; returns the attributes afterwards. Errors: NoData, Access, NotPermitted.
    pub async fn removexattr(&self, caller: &Caller, at: PathAt, name: &[u8]) -> Result<Attr> {
        let (op, name) = (self.inner().op_id(), Bytes::copy_from_slice(name));
        self.attr(Method::MetaRemovexattr, &RemovexattrRequest { caller: some(caller), op, at: Some(at), name }).await
    }

    /// Capacity and use.
    pub async fn statfs(&self, caller: &Caller, at: PathAt) -> Result<StatfsResponse> {
        self.inner().meta(Method::MetaStatfs, &StatfsRequest { caller: some(caller), at: Some(at) }).await
    }

    /// Many reads at once, batched per node; results in the order asked, each as [`OpenFile::read`].
    pub async fn read_many(&self, ops: Vec<ReadOp>) -> Vec<(Result<usize>, RegionMut)> {
        crate::read::read_many(self.inner(), ops).await
    }

    /// Like [`Client::read_many`], and compares checksums of the caller's own where there are any; `None`: the bytes are
    /// not what theirs says.
    pub async fn read_checked(&self, ops: Vec<(ReadOp, Option<ReadSum>)>) -> Vec<(Result<Option<usize>>, RegionMut)> {
        crate::checked::read_checked(self.inner(), ops).await
    }

    /// Many writes at once, on their way together; results in the order asked, each as [`OpenFile::write`]. Writes to
    /// the same bytes may be applied in any order.
    pub async fn write_many(&self, ops: Vec<WriteOp>) -> Vec<Result<usize>> {
        let count = ops.len();
        let mut tasks = JoinSet::new();
        for (at, WriteOp { file, offset, data }) in ops.into_iter().enumerate() {
            tasks.spawn(trace::inherit(async move { (at, file.write(offset, data).await) }));
        }
        let failed = || Err(Error::new(Code::Internal, "a write failed; see the log").maybe_applied());
        let mut results: Vec<_> = (0..count).map(|_| failed()).collect();
        while let Some(joined) = tasks.join_next().await {
            if let Ok((at, result)) = joined {
                results[at] = result;
            }
        }
        results
    }

    /// What every target of every chain holds, for comparing replicas.
    pub async fn list_replicas(&self) -> Result<Vec<ReplicaListing>> {
        crate::audit::list_replicas(self.inner()).await
    }

    async fn attr<Req: prost::Message + Clone>(&self, method: Method, request: &Req) -> Result<Attr> {
        let response: AttrResponse = self.inner().meta(method, request).await?;
        Ok(self.inner().merge(response.attr.ok_or_else(no_attr)?))
    }

    fn opened(&self, caller: &Caller, mut response: OpenResponse, write: bool) -> Result<Arc<OpenFile>> {
        let attr = response.attr.take().ok_or_else(no_attr)?;
        match attr.r#type() {
            FileType::File => check_layout(&attr.layout.unwrap_or_default())?,
            FileType::Directory => return Err(Error::new(Code::IsDirectory, "a directory cannot be read as a file")),
            _ => {}
        }
        if write && response.session.is_empty() {
            return Err(Error::new(Code::Protocol, "the service opened a file for writing without a session"));
        }
        Ok(OpenFile::new(self.clone(), caller.clone(), &attr, response))
    }

    /// A session to keep an inode alive that may be open here while it loses its last name.
    fn hold_for(&self, known: Option<u64>) -> Option<[u8; 16]> {
        let inodes = &self.inner().inodes;
        let may_be_open = match known {
            Some(inode) => inodes.get(inode).is_some(),
            None => !inodes.is_empty(),
        };
        may_be_open.then(fs3_rt::random_bytes)
    }

    /// The service has answered a request that offered `hold`.
    async fn held(&self, caller: &Caller, gone: &Attr, hold: Option<[u8; 16]>) {
        let Some(session) = hold.filter(|_| gone.nlink == 0) else { return };
        self.inner().session_opened();
        if !self.inner().inodes.unlinked(gone.inode, session) {
            self.release_hold(caller, gone.inode, session).await;
        }
    }

    /// End a hold. A failure leaves it to the service, which reaps sessions of clients that are gone.
    pub(crate) async fn release_hold(&self, caller: &Caller, inode: u64, session: [u8; 16]) {
        let request = CloseRequest {
            caller: some(caller),
            op: self.inner().op_id(),
            inode,
            session: Bytes::copy_from_slice(&session),
            report: None,
        };
        if let Err(error) = self.inner().meta::<_, AttrResponse>(Method::MetaClose, &request).await {
            tracing::debug!(inode, %error, "could not end the session of an unlinked file");
        }
        self.inner().session_closed();
    }
}

async fn first_routing(wire: &Wire, config: &ClientConfig) -> Result<Routing> {
    let metas = Metas::new(config.metas.clone());
    let deadline = fs3_rt::Instant::now() + config.op_timeout;
    let limits = CallLimits { deadline, attempt: config.meta_attempt_timeout };
    let request = GetRoutingRequest::default();
    let response: GetRoutingResponse = decoded(call(wire, &metas, Method::GetRouting, &request, None, limits).await?)?;
    let none = || Error::new(Code::Unavailable, "the cluster has no routing yet; is its manager running?");
    response.routing.ok_or_else(none)
}

fn some(caller: &Caller) -> Option<Caller> {
    Some(caller.clone())
}

fn hold_bytes(hold: Option<[u8; 16]>) -> Bytes {
    hold.map_or_else(Bytes::new, |session| Bytes::copy_from_slice(&session))
}

/// An error that came without a message.
fn plain_error(code: Code) -> Error {
    let text = std::io::Error::from_raw_os_error(code.errno()).to_string();
    // "No such file or directory (os error 2)"
    let message = text.split(" (os error").next().unwrap_or_default().to_owned();
    Error::new(code, message)
}

fn no_attr() -> Error {
    Error::new(Code::Protocol, "the service answered without attributes")
}
