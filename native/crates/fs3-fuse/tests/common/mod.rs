//! One process that stands in for a cluster: a namespace in memory and storage in memory, on a real connection.
//! It checks no permissions and keeps one replica; everything else is as the schemas say.
#![allow(dead_code)]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use fs3_client::{Client, ClientConfig};
use fs3_core::{Code, Error, Region, RegionMut, Result, crc_blocks, pack_crcs};
use fs3_net::{HelloPolicy, Request, Response, Server, Service};
use fs3_proto::v1::*;
use parking_lot::Mutex;
use prost::Message;

const TOKEN: &str = "secret";
const NODE: u32 = 7;
const CHAINS: u32 = 4;
/// Chunk size of new files.
pub const CHUNK: u32 = 1 << 18;

#[derive(Default)]
pub struct Log {
    /// Every request, in order of arrival.
    pub methods: Vec<Method>,
    /// (offset within the chunk, length) of every write.
    pub writes: Vec<(u32, u32)>,
}

impl Log {
    pub fn count(&self, method: Method) -> usize {
        self.methods.iter().filter(|m| **m == method).count()
    }
}

#[derive(Default)]
pub struct State {
    names: Mutex<Names>,
    chunks: Mutex<BTreeMap<Vec<u8>, Vec<u8>>>,
    pub log: Mutex<Log>,
    /// All writes of data fail with this.
    pub write_error: Mutex<Option<Code>>,
}

#[derive(Default)]
struct Names {
    inodes: HashMap<u64, Attr>,
    entries: BTreeMap<(u64, Vec<u8>), u64>,
    sessions: HashSet<(u64, Vec<u8>)>,
    /// Where what was reserved ends, by inode and truncate version.
    reserved: HashMap<(u64, u64), u64>,
    xattrs: BTreeMap<(u64, Bytes), Bytes>,
    /// Whole locks: a part of one is not ended by itself.
    locks: Vec<(u64, Bytes, FileLock)>,
    next: u64,
}

pub struct FakeCluster {
    pub state: Arc<State>,
    meta: String,
    _server: Server,
}

fn now_ns() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as i64
}

fn refuse<T>(code: Code) -> Result<T> {
    Err(Error::new(code, "refused"))
}

fn reply(message: impl Message) -> Result<Response> {
    Ok(Response::new(&message))
}

impl FakeCluster {
    pub async fn start() -> Self {
        let state = Arc::new(State::default());
        {
            let mut names = state.names.lock();
            names.next = 2;
            let root = Attr { inode: 1, mode: 0o777, nlink: 2, parent: 1, ..attr(FileType::Directory) };
            names.inodes.insert(1, root);
        }
        let policy = HelloPolicy {
            cluster_id: "test".into(),
            token: TOKEN.into(),
            node_id: NODE,
            role: Role::Meta,
            transport: fs3_net::Transport::tcp(),
        };
        let fake = Arc::new(Fake { state: state.clone(), port: Mutex::new(0) });
        let server = Server::bind("127.0.0.1:0", policy, fake.clone()).await.unwrap();
        let port = server.local_addr().port();
        *fake.port.lock() = port;
        Self { state, meta: format!("127.0.0.1:{port}"), _server: server }
    }

    pub async fn client(&self) -> Client {
        let config = ClientConfig {
            metas: vec![self.meta.clone()],
            token: TOKEN.into(),
            op_timeout: Duration::from_secs(10),
            ..Default::default()
        };
        Client::connect(config).await.unwrap()
    }

    /// Inodes that exist, named or held.
    pub fn inode_count(&self) -> usize {
        self.state.names.lock().inodes.len()
    }

    /// Sessions that are open.
    pub fn session_count(&self) -> usize {
        self.state.names.lock().sessions.len()
    }

    pub fn take_log(&self) -> Log {
        std::mem::take(&mut *self.state.log.lock())
    }
}

fn attr(kind: FileType) -> Attr {
    let now = now_ns();
    let layout =
        Layout { table_id: 1, table_version: 1, chunk_bytes: CHUNK, stripe: CHAINS, first: 0, ..Default::default() };
    Attr {
        r#type: kind as i32,
        nlink: 1,
        atime_ns: now,
        mtime_ns: now,
        ctime_ns: now,
        layout: Some(layout),
        ..Default::default()
    }
}

struct Fake {
    state: Arc<State>,
    port: Mutex<u16>,
}

impl Service for Fake {
    fn payload_buffer(&self, _method: Method, bytes: usize) -> Option<RegionMut> {
        Some(RegionMut::zeroed(bytes))
    }

    async fn handle(&self, request: Request) -> Result<Response> {
        let body = &request.body[..];
        if request.method != Method::GetRouting && request.method != Method::MetaKeepalive {
            self.state.log.lock().methods.push(request.method);
        }
        match request.method {
            Method::GetRouting => self.routing(body).await,
            Method::StorageRead => self.read(body),
            Method::StorageWrite => self.write(body, &request.payload),
            Method::StorageSync => reply(SyncChainResponse::default()),
            Method::StorageListChunks => self.list_chunks(body),
            Method::StoragePunch => self.punch(body),
            Method::MetaAwaitLock => {
                tokio::time::sleep(Duration::from_millis(5)).await;
                reply(AwaitLockResponse { free: true })
            }
            method => self.meta(method, body),
        }
    }
}

impl Fake {
    async fn routing(&self, body: &[u8]) -> Result<Response> {
        let request = GetRoutingRequest::decode(body).unwrap();
        if request.known_version >= 1 {
            tokio::time::sleep(Duration::from_millis(u64::from(request.wait_ms))).await;
            return reply(GetRoutingResponse { version: 1, ..Default::default() });
        }
        let serving = PublicState::Serving as i32;
        let chains = (1..=CHAINS).map(|id| Chain {
            chain_id: id,
            version: 1,
            targets: vec![ChainTarget { target_id: u64::from(NODE) * 1000 + u64::from(id), state: serving }],
        });
        let targets = (1..=CHAINS).map(|id| Target {
            target_id: u64::from(NODE) * 1000 + u64::from(id),
            node_id: NODE,
            chain_id: id,
            ..Default::default()
        });
        let (host, frame_port) = ("127.0.0.1".to_owned(), u32::from(*self.port.lock()));
        let routing = Routing {
            version: 1,
            cluster_id: "test".into(),
            nodes: vec![Node { node_id: NODE, role: "storage".into(), host, frame_port, ..Default::default() }],
            targets: targets.collect(),
            chains: chains.collect(),
            tables: vec![ChainTable { table_id: 1, table_version: 1, chain_ids: (1..=CHAINS).collect(), replicas: 1 }],
            ..Default::default()
        };
        reply(GetRoutingResponse { version: 1, routing: Some(routing), delta: None })
    }

    fn read(&self, body: &[u8]) -> Result<Response> {
        let request = ReadRequest::decode(body).unwrap();
        let chunks = self.state.chunks.lock();
        let (mut results, mut payload) = (Vec::new(), Vec::new());
        for op in &request.ops {
            let Some(chunk) = chunks.get(&op.chunk_id[..]) else {
                results.push(ReadResult { code: Code::ChunkNotFound as u32, ..Default::default() });
                continue;
            };
            let from = (op.offset as usize).min(chunk.len());
            let to = ((op.offset + op.length) as usize).min(chunk.len());
            let bytes = chunk[from..to].to_vec();
            let crcs = pack_crcs(&crc_blocks(0, &bytes)).into();
            results.push(ReadResult { length: bytes.len() as u32, crcs, ..Default::default() });
            payload.push(Region::from_vec(bytes));
        }
        let segments = results.iter().map(|r| r.length).collect();
        Ok(Response::with_payload(&ReadResponse { results, routing_version: 1 }, payload, segments))
    }

    fn write(&self, body: &[u8], payload: &[u8]) -> Result<Response> {
        let request = WriteRequest::decode(body).unwrap();
        if let Some(code) = *self.state.write_error.lock() {
            return refuse(code);
        }
        self.state.log.lock().writes.push((request.offset, request.length));
        let mut chunks = self.state.chunks.lock();
        let chunk = chunks.entry(request.chunk_id.to_vec()).or_default();
        let end = request.offset as usize + payload.len();
        chunk.resize(chunk.len().max(end), 0);
        chunk[request.offset as usize..end].copy_from_slice(payload);
        reply(WriteResponse::default())
    }

    fn punch(&self, body: &[u8]) -> Result<Response> {
        let request = PunchChunkRequest::decode(body).unwrap();
        if let Some(chunk) = self.state.chunks.lock().get_mut(&request.chunk_id[..]) {
            let end = ((request.offset + request.length) as usize).min(chunk.len());
            chunk[(request.offset as usize).min(end)..end].fill(0);
        }
        reply(WriteResponse::default())
    }

    fn list_chunks(&self, body: &[u8]) -> Result<Response> {
        let request = ListChunksRequest::decode(body).unwrap();
        let chunks = self.state.chunks.lock();
        let asked = |id: &[u8]| {
            let id = fs3_core::ChunkId::from_bytes(id).unwrap();
            id.inode == request.inode && 1 + id.index % CHAINS == request.chain_id
        };
        let found = chunks.iter().filter(|(id, _)| id[..] > request.after[..] && asked(id));
        let listed = found.map(|(id, data)| ChunkInfo {
            chunk_id: id.clone().into(),
            committed_version: 1,
            length: data.len() as u32,
            ..Default::default()
        });
        reply(ListChunksResponse { chunks: listed.collect(), end: true })
    }

    fn cut(&self, inode: u64, length: u64) {
        let mut chunks = self.state.chunks.lock();
        chunks.retain(|id, data| {
            let id = fs3_core::ChunkId::from_bytes(id).unwrap();
            let start = u64::from(id.index) * u64::from(CHUNK);
            if id.inode == inode && start < length {
                data.truncate((length - start) as usize);
            }
            id.inode != inode || start < length
        });
    }

    fn meta(&self, method: Method, body: &[u8]) -> Result<Response> {
        let mut names = self.state.names.lock();
        let names = &mut *names;
        let done = |attr: Attr| reply(AttrResponse { attr: Some(attr), ..Default::default() });
        match method {
            Method::MetaLookup => {
                let r = LookupRequest::decode(body).unwrap();
                let id = names.child(r.parent, &r.name)?;
                done(names.get(id)?)
            }
            Method::MetaStat => done(names.at(&StatRequest::decode(body).unwrap().at.unwrap())?),
            Method::MetaList => names.list(&ListRequest::decode(body).unwrap()),
            Method::MetaCreate => {
                let r = CreateRequest::decode(body).unwrap();
                let (parent, name) = place(r.at.as_ref().unwrap());
                let session = session(r.open_write);
                if let Ok(id) = names.child(parent, &name) {
                    if r.exclusive {
                        return refuse(Code::Exists);
                    }
                    if r.truncate {
                        self.cut(id, 0);
                        names.truncated(id, 0);
                    }
                    names.open(id, &session);
                    return reply(OpenResponse {
                        attr: Some(names.get(id)?),
                        session,
                        created: false,
                        length_limit: None,
                    });
                }
                let kind = if r.r#type() == FileType::Unspecified { FileType::File } else { r.r#type() };
                let c = r.caller.unwrap_or_default();
                let new = Attr { mode: r.mode & !r.umask, uid: c.uid, gid: c.gid, rdev: r.rdev, ..attr(kind) };
                let made = names.add(parent, name, new)?;
                names.open(made.inode, &session);
                reply(OpenResponse { attr: Some(made), session, created: true, length_limit: None })
            }
            Method::MetaOpen => {
                let r = OpenRequest::decode(body).unwrap();
                let id = names.at(&r.at.unwrap())?.inode;
                if r.truncate {
                    self.cut(id, 0);
                    names.truncated(id, 0);
                }
                let session = session(r.write);
                names.open(id, &session);
                reply(OpenResponse { attr: Some(names.get(id)?), session, created: false, length_limit: None })
            }
            Method::MetaClose => {
                let r = CloseRequest::decode(body).unwrap();
                names.report(r.inode, r.report);
                names.sessions.remove(&(r.inode, r.session.to_vec()));
                let attr = names.get(r.inode)?;
                self.collect(names, r.inode);
                done(attr)
            }
            Method::MetaSync => {
                let r = SyncRequest::decode(body).unwrap();
                names.report(r.inode, r.report);
                done(names.get(r.inode)?)
            }
            Method::MetaAppend => {
                let r = AppendRequest::decode(body).unwrap();
                names.report(r.inode, r.report);
                let attr = names.get(r.inode)?;
                let end = names.reserved.entry((r.inode, attr.truncate_version)).or_default();
                let offset = attr.length.max(*end);
                *end = offset + r.bytes;
                reply(AppendResponse { attr: Some(attr), offset, ..Default::default() })
            }
            Method::MetaMkdir => {
                let r = MkdirRequest::decode(body).unwrap();
                let (parent, name) = place(r.at.as_ref().unwrap());
                done(names.add(
                    parent,
                    name,
                    Attr { mode: r.mode & !r.umask, nlink: 2, parent, ..attr(FileType::Directory) },
                )?)
            }
            Method::MetaSymlink => {
                let r = SymlinkRequest::decode(body).unwrap();
                let (parent, name) = place(r.at.as_ref().unwrap());
                done(names.add(
                    parent,
                    name,
                    Attr { symlink_target: r.target, mode: 0o777, ..attr(FileType::Symlink) },
                )?)
            }
            Method::MetaLink => {
                let r = LinkRequest::decode(body).unwrap();
                let id = names.at(&r.from.unwrap())?.inode;
                let to = place(r.to.as_ref().unwrap());
                if names.entries.contains_key(&to) {
                    return refuse(Code::Exists);
                }
                names.entries.insert(to, id);
                names.inodes.get_mut(&id).unwrap().nlink += 1;
                done(names.get(id)?)
            }
            Method::MetaUnlink => {
                let r = UnlinkRequest::decode(body).unwrap();
                let place = place(r.at.as_ref().unwrap());
                let id = names.child(place.0, &place.1)?;
                names.entries.remove(&place);
                let attr = names.drop_link(id, &r.hold_session);
                names.touch(place.0, attr.ctime_ns);
                self.collect(names, id);
                reply(UnlinkResponse { attr: Some(attr) })
            }
            Method::MetaRmdir => {
                let r = RmdirRequest::decode(body).unwrap();
                let place = place(r.at.as_ref().unwrap());
                let id = names.child(place.0, &place.1)?;
                if names.entries.range((id, Vec::new())..).next().is_some_and(|(key, _)| key.0 == id) {
                    return refuse(Code::NotEmpty);
                }
                names.entries.remove(&place);
                names.inodes.remove(&id);
                reply(Empty {})
            }
            Method::MetaRename => self.rename(names, RenameRequest::decode(body).unwrap()),
            Method::MetaSetattr => {
                let r = SetattrRequest::decode(body).unwrap();
                let id = names.at(r.at.as_ref().unwrap())?.inode;
                let (now, a) = (now_ns(), names.inodes.get_mut(&id).unwrap());
                (a.mode, a.uid, a.gid) = (r.mode.unwrap_or(a.mode), r.uid.unwrap_or(a.uid), r.gid.unwrap_or(a.gid));
                a.atime_ns = if r.atime_now { now } else { r.atime_ns.unwrap_or(a.atime_ns) };
                a.mtime_ns = if r.mtime_now { now } else { r.mtime_ns.unwrap_or(a.mtime_ns) };
                a.ctime_ns = now;
                done(a.clone())
            }
            Method::MetaTruncate => {
                let r = TruncateRequest::decode(body).unwrap();
                let id = names.at(r.at.as_ref().unwrap())?.inode;
                self.cut(id, r.length);
                names.truncated(id, r.length);
                done(names.get(id)?)
            }
            Method::MetaGetxattr => {
                let r = GetxattrRequest::decode(body).unwrap();
                let id = names.at(&r.at.unwrap())?.inode;
                let value = names.xattrs.get(&(id, r.name)).cloned();
                reply(GetxattrResponse { value: value.ok_or_else(|| Error::new(Code::NoData, "none"))? })
            }
            Method::MetaSetxattr => {
                let r = SetxattrRequest::decode(body).unwrap();
                let id = names.at(&r.at.unwrap())?.inode;
                match names.xattrs.contains_key(&(id, r.name.clone())) {
                    true if r.create => return refuse(Code::Exists),
                    false if r.replace => return refuse(Code::NoData),
                    _ => names.xattrs.insert((id, r.name), r.value),
                };
                done(names.xattrs_changed(id))
            }
            Method::MetaListxattr => {
                let id = names.at(&ListxattrRequest::decode(body).unwrap().at.unwrap())?.inode;
                reply(ListxattrResponse { names: names.xattrs_of(id) })
            }
            Method::MetaRemovexattr => {
                let r = RemovexattrRequest::decode(body).unwrap();
                let id = names.at(&r.at.unwrap())?.inode;
                names.xattrs.remove(&(id, r.name)).ok_or_else(|| Error::new(Code::NoData, "none"))?;
                done(names.xattrs_changed(id))
            }
            Method::MetaStatfs => {
                let inodes = names.inodes.len() as u64;
                let (capacity_bytes, free_bytes) = (1 << 40, 1 << 39);
                reply(StatfsResponse { capacity_bytes, free_bytes, inodes, chunk_bytes: CHUNK, ..Default::default() })
            }
            Method::MetaLock => {
                let r = LockRequest::decode(body).unwrap();
                let (client, lock) = (r.op.unwrap().client_id, r.lock.unwrap());
                let mine = |(inode, by, held): &(u64, Bytes, FileLock)| {
                    (*inode, by, held.kind, held.owner) == (r.inode, &client, lock.kind, lock.owner)
                };
                let conflict = |held: &&(u64, Bytes, FileLock)| {
                    let types = [held.2.r#type(), lock.r#type()];
                    let overlap = held.2.start <= lock.end && lock.start <= held.2.end;
                    held.0 == r.inode && held.2.kind == lock.kind && overlap && types.contains(&LockType::Write)
                };
                let unlock = lock.r#type() == LockType::Unlock;
                let granted = unlock || !names.locks.iter().any(|held| !mine(held) && conflict(&held));
                if granted {
                    let kept = |held: &FileLock| held.end < lock.start || lock.end < held.start;
                    names.locks.retain(|held| !mine(held) || kept(&held.2));
                    names.locks.extend((!unlock).then_some((r.inode, client.clone(), lock)));
                }
                let attr = names.inodes.get(&r.inode).cloned();
                reply(LockResponse { granted, attr, session_ms: 60_000 })
            }
            Method::MetaKeepalive => reply(KeepaliveResponse { interval_ms: 1000, ..Default::default() }),
            other => panic!("the mount does not use {other:?}"),
        }
    }

    fn rename(&self, names: &mut Names, r: RenameRequest) -> Result<Response> {
        let (from, to) = (place(r.from.as_ref().unwrap()), place(r.to.as_ref().unwrap()));
        let moved = names.child(from.0, &from.1)?;
        let target = names.entries.get(&to).copied();
        if r.no_replace && target.is_some() {
            return refuse(Code::Exists);
        }
        let mut replaced = None;
        if r.exchange {
            let other = target.ok_or_else(|| Error::new(Code::NotFound, "nothing to exchange with"))?;
            names.entries.insert(from, other);
            replaced = Some(names.get(other)?);
        } else {
            names.entries.remove(&from);
            if let Some(other) = target {
                replaced = Some(names.drop_link(other, &r.hold_session));
            }
        }
        names.entries.insert(to, moved);
        if let Some(other) = target.filter(|_| !r.exchange) {
            self.collect(names, other);
        }
        reply(RenameResponse { attr: Some(names.get(moved)?), replaced })
    }

    /// The chunks and the record of an inode without names and sessions go.
    fn collect(&self, names: &mut Names, id: u64) {
        let dead = names.inodes.get(&id).is_some_and(|a| a.nlink == 0);
        if dead && !names.sessions.iter().any(|(inode, _)| *inode == id) {
            names.inodes.remove(&id);
            self.cut(id, 0);
        }
    }
}

impl Names {
    fn get(&self, id: u64) -> Result<Attr> {
        self.inodes.get(&id).cloned().ok_or_else(|| Error::new(Code::NotFound, "no such inode"))
    }

    fn child(&self, parent: u64, name: &[u8]) -> Result<u64> {
        self.entries.get(&(parent, name.to_vec())).copied().ok_or_else(|| Error::new(Code::NotFound, "no such name"))
    }

    fn at(&self, at: &PathAt) -> Result<Attr> {
        let id = if at.path.is_empty() { at.inode } else { self.child(at.inode, &at.path)? };
        self.get(id)
    }

    fn add(&mut self, parent: u64, name: Vec<u8>, new: Attr) -> Result<Attr> {
        if self.entries.contains_key(&(parent, name.clone())) {
            return refuse(Code::Exists);
        }
        let attr = Attr { inode: self.next, ..new };
        self.next += 1;
        self.touch(parent, attr.ctime_ns);
        self.entries.insert((parent, name), attr.inode);
        self.inodes.insert(attr.inode, attr.clone());
        Ok(attr)
    }

    /// An entry of a directory changed.
    fn touch(&mut self, directory: u64, at_ns: i64) {
        if let Some(attr) = self.inodes.get_mut(&directory) {
            (attr.mtime_ns, attr.ctime_ns) = (at_ns, at_ns);
        }
    }

    fn open(&mut self, id: u64, session: &Bytes) {
        if !session.is_empty() {
            self.sessions.insert((id, session.to_vec()));
        }
    }

    fn xattrs_of(&self, id: u64) -> Vec<Bytes> {
        self.xattrs.keys().filter(|(inode, _)| *inode == id).map(|(_, name)| name.clone()).collect()
    }

    fn xattrs_changed(&mut self, id: u64) -> Attr {
        let names = self.xattrs_of(id);
        let capability = names.iter().any(|name| &name[..] == b"security.capability");
        let a = self.inodes.get_mut(&id).unwrap();
        a.ctime_ns = now_ns();
        let any = u32::from(!names.is_empty()) * XattrBit::Any as u32;
        a.xattrs = any | (u32::from(capability) * XattrBit::Capability as u32);
        a.clone()
    }

    fn truncated(&mut self, id: u64, length: u64) {
        let a = self.inodes.get_mut(&id).unwrap();
        a.length = length;
        a.truncate_version += 1;
        (a.mtime_ns, a.ctime_ns) = (now_ns(), now_ns());
    }

    fn report(&mut self, id: u64, report: Option<WriteReport>) {
        if let (Some(report), Some(a)) = (report.filter(|r| r.wrote), self.inodes.get_mut(&id)) {
            if report.truncate_version == a.truncate_version {
                a.length = a.length.max(report.length);
            }
            a.mtime_ns = if report.mtime_ns == 0 { now_ns() } else { report.mtime_ns };
            a.ctime_ns = now_ns();
        }
    }

    fn drop_link(&mut self, id: u64, hold: &Bytes) -> Attr {
        let a = self.inodes.get_mut(&id).unwrap();
        a.nlink = if a.r#type() == FileType::Directory { 0 } else { a.nlink - 1 };
        a.ctime_ns = now_ns();
        let attr = a.clone();
        if attr.nlink == 0 {
            self.open(id, hold);
        }
        attr
    }

    fn list(&self, r: &ListRequest) -> Result<Response> {
        let dir = self.at(r.at.as_ref().unwrap())?;
        let limit = if r.limit == 0 { 1000 } else { r.limit as usize };
        let all = self.entries.range((dir.inode, Vec::new())..).take_while(|((parent, _), _)| *parent == dir.inode);
        let mut rest = all.filter(|((_, name), _)| name[..] > r.after[..]).peekable();
        let mut entries = Vec::new();
        while entries.len() < limit {
            let Some(((_, name), id)) = rest.next() else { break };
            let attr = self.get(*id)?;
            entries.push(DirEntry {
                name: name.clone().into(),
                inode: *id,
                r#type: attr.r#type,
                attr: r.with_attr.then_some(attr),
            });
        }
        let end = rest.peek().is_none();
        reply(ListResponse { entries, end, inode: dir.inode, parent: dir.parent })
    }
}

fn place(at: &PathAt) -> (u64, Vec<u8>) {
    (at.inode, at.path.to_vec())
}

fn session(wanted: bool) -> Bytes {
    if wanted { Bytes::from(rand::random::<[u8; 16]>().to_vec()) } else { Bytes::new() }
}
