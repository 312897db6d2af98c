//! A cluster of fakes on real connections: two metas and three storage nodes, with faults on demand.
#![allow(dead_code)]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fs3_client::{Client, ClientConfig};
use fs3_core::{Code, Error, Region, RegionMut, Result, crc_blocks, pack_crcs};
use fs3_net::{HelloPolicy, Request, Response, Server, Service};
use fs3_proto::v1::*;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::watch;

pub const TOKEN: &str = "secret";
pub const CHUNK: u32 = 1 << 16;
pub const CHAINS: u32 = 4;
pub const NODES: [u32; 3] = [11, 12, 13];

type Chunks = BTreeMap<Vec<u8>, Vec<u8>>;

/// What goes wrong.
#[derive(Default)]
pub struct Faults {
    /// Nodes whose storage finds its bytes rotten.
    pub rotten: HashSet<u32>,
    /// Nodes whose read replies have a bit flipped.
    pub flips: HashSet<u32>,
    /// Nodes whose reads take that long.
    pub slow: HashMap<u32, Duration>,
    /// Nodes that do not answer.
    pub hung: HashSet<u32>,
    /// The next requests of a method are applied, but the answer is an error.
    pub lose_answers: HashMap<i32, usize>,
    /// The next writes are refused as damaged.
    pub damage: usize,
    /// All writes fail with this.
    pub write_error: Option<Code>,
    /// All reads of chunks fail with this.
    pub read_error: Option<Code>,
    /// All syncs fail with this.
    pub sync_error: Option<Code>,
    /// The next changes of the routing are told to be of another one.
    pub misfits: usize,
    /// How long quotas let files become.
    pub length_max: Option<u64>,
}

#[derive(Default)]
pub struct Log {
    /// (method, op sequence, meta index) of every metadata request.
    pub metas: Vec<(Method, u64, usize)>,
    pub writes: Vec<WriteRequest>,
    pub applied_writes: usize,
    /// (node, number of ops) of every read request.
    pub reads: Vec<(u32, usize)>,
    pub read_targets: HashSet<u64>,
    pub syncs: Vec<u32>,
    pub closes: Vec<CloseRequest>,
    pub holds: Vec<HoldRequest>,
    pub reports: Vec<WriteReport>,
    /// Chunks that clients asked to check.
    pub checks: Vec<CheckRequest>,
    /// Of every routing that was told: whether as a delta.
    pub routings: Vec<bool>,
    /// Requests that met a hung node.
    pub hanging: usize,
}

pub struct State {
    pub routing: watch::Sender<Routing>,
    told: Mutex<Vec<Routing>>,
    pub stores: HashMap<u32, Mutex<Chunks>>,
    pub faults: Mutex<Faults>,
    pub log: Mutex<Log>,
    pub files: Mutex<HashMap<u64, Attr>>,
    pub names: Mutex<BTreeMap<Vec<u8>, u64>>,
    /// Where what was reserved ends, by inode and truncate version.
    reserved: Mutex<HashMap<(u64, u64), u64>>,
    answers: Mutex<HashMap<(Vec<u8>, u64), Bytes>>,
    written: Mutex<HashMap<(Vec<u8>, u32), u64>>,
}

pub struct FakeCluster {
    pub state: Arc<State>,
    pub servers: HashMap<u32, Server>,
    pub metas: Vec<String>,
}

impl FakeCluster {
    pub async fn start() -> Self {
        let state = Arc::new(State {
            routing: watch::Sender::new(Routing::default()),
            told: Mutex::default(),
            stores: NODES.iter().map(|node| (*node, Mutex::default())).collect(),
            faults: Mutex::default(),
            log: Mutex::default(),
            files: Mutex::default(),
            names: Mutex::default(),
            reserved: Mutex::default(),
            answers: Mutex::default(),
            written: Mutex::default(),
        });
        let mut servers = HashMap::new();
        let mut nodes = Vec::new();
        let mut metas = Vec::new();
        for (id, role) in
            [(1, Role::Meta), (2, Role::Meta), (11, Role::Storage), (12, Role::Storage), (13, Role::Storage)]
        {
            let policy = HelloPolicy {
                cluster_id: "test".into(),
                token: TOKEN.into(),
                node_id: id,
                role,
                transport: fs3_net::Transport::tcp(),
            };
            let service = Arc::new(Fake { state: state.clone(), node: id });
            let server = Server::bind("127.0.0.1:0", policy, service).await.unwrap();
            let port = server.local_addr().port();
            let name = if role == Role::Meta { "meta" } else { "storage" };
            nodes.push(Node {
                node_id: id,
                role: name.into(),
                host: "127.0.0.1".into(),
                frame_port: u32::from(port),
                ..Default::default()
            });
            if role == Role::Meta {
                metas.push(format!("127.0.0.1:{port}"));
            }
            servers.insert(id, server);
        }
        state.routing.send_replace(routing(nodes));
        Self { state, servers, metas }
    }

    pub fn config(&self) -> ClientConfig {
        ClientConfig {
            metas: self.metas.clone(),
            token: TOKEN.into(),
            op_timeout: Duration::from_secs(10),
            read_attempt_timeout: Duration::from_millis(500),
            meta_attempt_timeout: Duration::from_secs(2),
            ..Default::default()
        }
    }

    pub async fn client(&self) -> Client {
        Client::connect(self.config()).await.unwrap()
    }

    /// Take a node out of all chains, as the manager does.
    pub fn drop_from_chains(&self, node: u32) {
        self.state.routing.send_modify(|routing| {
            routing.version += 1;
            for chain in &mut routing.chains {
                chain.version += 1;
                for target in &mut chain.targets {
                    if target.target_id / 1000 == u64::from(node) {
                        target.state = PublicState::Offline as i32;
                    }
                }
                chain.targets.sort_by_key(|target| target.state);
            }
        });
    }

    /// End a node's server.
    pub fn kill(&mut self, node: u32) {
        self.servers.remove(&node);
    }

    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.state.faults.lock());
    }

    /// What a node holds of a file, chunk by chunk.
    pub fn stored(&self, node: u32) -> Chunks {
        self.state.stores[&node].lock().clone()
    }
}

fn routing(nodes: Vec<Node>) -> Routing {
    let chains = (0..CHAINS).map(|chain| {
        let targets = (0..3).map(|i| ChainTarget {
            target_id: u64::from(NODES[((chain + i) % 3) as usize]) * 1000 + u64::from(chain),
            state: PublicState::Serving as i32,
        });
        Chain { chain_id: 100 + chain, version: 1, targets: targets.collect() }
    });
    let targets = NODES.iter().flat_map(|node| {
        (0..CHAINS).map(|chain| Target {
            target_id: u64::from(*node) * 1000 + u64::from(chain),
            node_id: *node,
            chain_id: 100 + chain,
            ..Default::default()
        })
    });
    Routing {
        version: 1,
        history: 1,
        cluster_id: "test".into(),
        nodes,
        targets: targets.collect(),
        chains: chains.collect(),
        tables: vec![ChainTable {
            table_id: 1,
            table_version: 1,
            chain_ids: (100..100 + CHAINS).collect(),
            replicas: 3,
        }],
        ..Default::default()
    }
}

struct Fake {
    state: Arc<State>,
    node: u32,
}

impl Service for Fake {
    fn payload_buffer(&self, _method: Method, bytes: usize) -> Option<RegionMut> {
        Some(RegionMut::zeroed(bytes))
    }

    async fn handle(&self, request: Request) -> Result<Response> {
        let hung = || self.state.faults.lock().hung.contains(&self.node);
        self.state.log.lock().hanging += usize::from(hung());
        while hung() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let method = request.method;
        let slow = self.state.faults.lock().slow.get(&self.node).copied();
        if let Some(latency) = slow.filter(|_| method == Method::StorageRead) {
            tokio::time::sleep(latency).await;
        }
        let result = match method {
            Method::GetRouting => self.get_routing(&request.body).await,
            Method::StorageRead => self.read(&request.body),
            Method::StorageWrite => self.write(&request.body, &request.payload),
            Method::StorageSync => self.sync(&request.body),
            Method::StorageCheck => {
                self.state.log.lock().checks.push(CheckRequest::decode(&request.body[..]).unwrap());
                reply(CheckResponse::default())
            }
            Method::StorageListChunks => self.list_chunks(&request.body),
            _ => self.meta(method, &request.body),
        };
        let mut faults = self.state.faults.lock();
        if let Some(left) = faults.lose_answers.get_mut(&(method as i32)).filter(|left| **left > 0) {
            *left -= 1;
            return Err(Error::new(Code::Unavailable, "the answer got lost"));
        }
        result
    }
}

fn reply(message: impl Message) -> Result<Response> {
    Ok(Response::new(&message))
}

impl Fake {
    async fn get_routing(&self, body: &[u8]) -> Result<Response> {
        let request = GetRoutingRequest::decode(body).unwrap();
        let mut changes = self.state.routing.subscribe();
        let newer = changes.wait_for(|routing| routing.version > request.known_version);
        let _ = tokio::time::timeout(Duration::from_millis(u64::from(request.wait_ms)), newer).await;
        let routing = self.state.routing.borrow().clone();
        let version = routing.version;
        if version <= request.known_version {
            return reply(GetRoutingResponse { version, ..Default::default() });
        }
        let delta = request.known.and_then(|known| self.delta(&known, &routing));
        self.state.told.lock().push(routing.clone());
        self.state.log.lock().routings.push(delta.is_some());
        let routing = delta.is_none().then_some(routing);
        reply(GetRoutingResponse { version, routing, delta })
    }

    fn delta(&self, known: &RoutingKnown, routing: &Routing) -> Option<RoutingDelta> {
        let told = self.state.told.lock();
        let old = told.iter().find(|old| (old.version, old.history) == (known.version, known.history))?;
        let mut delta = fs3_proto::routing::diff(old, routing);
        let mut faults = self.state.faults.lock();
        if faults.misfits > 0 {
            faults.misfits -= 1;
            delta.from_version += 1;
        }
        Some(delta)
    }

    /// The nodes of a chain's serving replicas, if this node is asked under the current version.
    fn admit(&self, chain_id: u32, version: u64, target: u64) -> Result<Vec<u32>> {
        let routing = self.state.routing.borrow();
        let chain = routing.chains.iter().find(|chain| chain.chain_id == chain_id).unwrap();
        let serving: Vec<_> =
            chain.targets.iter().filter(|t| t.state() == PublicState::Serving).map(|t| t.target_id).collect();
        if version != chain.version || !serving.contains(&target) || target / 1000 != u64::from(self.node) {
            return Err(Error::new(Code::StaleChain, "another version").with_routing(routing.version));
        }
        Ok(serving.iter().map(|target| (target / 1000) as u32).collect())
    }

    fn read(&self, body: &[u8]) -> Result<Response> {
        let request = ReadRequest::decode(body).unwrap();
        {
            let mut log = self.state.log.lock();
            log.reads.push((self.node, request.ops.len()));
            log.read_targets.extend(request.ops.iter().map(|op| op.target_id));
        }
        let (mut results, mut payload) = (Vec::new(), Vec::new());
        for op in &request.ops {
            assert!(op.offset % 4096 == 0 && op.length % 4096 == 0);
            match self.read_one(op) {
                Ok((result, bytes)) => {
                    results.push(result);
                    payload.push(Region::from_vec(bytes));
                }
                Err(error) => results.push(ReadResult {
                    code: error.code as u32,
                    message: error.message.into_owned(),
                    ..Default::default()
                }),
            }
        }
        let routing_version = self.state.routing.borrow().version;
        let segments = results.iter().map(|r| r.length).collect();
        Ok(Response::with_payload(&ReadResponse { results, routing_version }, payload, segments))
    }

    fn read_one(&self, op: &ReadOp) -> Result<(ReadResult, Vec<u8>)> {
        self.admit(op.chain_id, op.chain_version, op.target_id)?;
        let faults = self.state.faults.lock();
        if let Some(code) = faults.read_error {
            return Err(Error::new(code, "as told"));
        }
        if faults.rotten.contains(&self.node) {
            return Err(Error::new(Code::ChecksumMismatch, "rotten"));
        }
        let store = self.state.stores[&self.node].lock();
        let chunk = store.get(&op.chunk_id[..]).ok_or_else(|| Error::new(Code::ChunkNotFound, "a hole"))?;
        let from = (op.offset as usize).min(chunk.len());
        let to = (op.offset + op.length).min(chunk.len() as u32) as usize;
        let mut bytes = chunk[from..to].to_vec();
        let crcs = pack_crcs(&crc_blocks(0, &bytes)).into();
        if faults.flips.contains(&self.node) && !bytes.is_empty() {
            bytes[0] ^= 1;
        }
        Ok((ReadResult { length: bytes.len() as u32, crcs, ..Default::default() }, bytes))
    }

    fn write(&self, body: &[u8], payload: &[u8]) -> Result<Response> {
        let request = WriteRequest::decode(body).unwrap();
        self.state.log.lock().writes.push(request.clone());
        {
            let mut faults = self.state.faults.lock();
            if let Some(code) = faults.write_error {
                return Err(Error::new(code, "as told"));
            }
            if faults.damage > 0 {
                faults.damage -= 1;
                return Err(Error::new(Code::PayloadChecksum, "damaged"));
            }
        }
        assert_eq!(request.crcs, pack_crcs(&crc_blocks(request.offset as usize, payload)));
        let nodes = self.admit(request.chain_id, request.chain_version, request.target_id)?;
        assert_eq!(nodes[0], self.node, "clients write to the head");
        let writer = request.writer.clone().unwrap();
        let last = self.state.written.lock().insert((request.chunk_id.to_vec(), writer.channel), writer.sequence);
        if last != Some(writer.sequence) {
            assert!(last < Some(writer.sequence), "sequences of a channel grow");
            self.state.log.lock().applied_writes += 1;
            for node in nodes {
                let mut store = self.state.stores[&node].lock();
                let chunk = store.entry(request.chunk_id.to_vec()).or_default();
                let end = request.offset as usize + payload.len();
                chunk.resize(chunk.len().max(end), 0);
                chunk[request.offset as usize..end].copy_from_slice(payload);
            }
        }
        reply(WriteResponse::default())
    }

    fn sync(&self, body: &[u8]) -> Result<Response> {
        let request = SyncChainRequest::decode(body).unwrap();
        self.admit(request.chain_id, request.chain_version, request.target_id)?;
        if let Some(code) = self.state.faults.lock().sync_error {
            return Err(Error::new(code, "as told"));
        }
        self.state.log.lock().syncs.push(request.chain_id);
        reply(SyncChainResponse::default())
    }

    fn list_chunks(&self, body: &[u8]) -> Result<Response> {
        let request = ListChunksRequest::decode(body).unwrap();
        if request.inode != 0 {
            self.admit(request.chain_id, request.chain_version, request.target_id)?;
        }
        // As the layout of new files says; listings for comparisons show all chunks.
        let asked = |id: &[u8]| {
            let id = fs3_core::ChunkId::from_bytes(id).unwrap();
            request.inode == 0
                || (id.inode == request.inode && 100 + (1 + id.index % CHAINS) % CHAINS == request.chain_id)
        };
        let store = self.state.stores[&self.node].lock();
        let found = store.iter().filter(|(id, _)| id[..] > request.after[..] && asked(id)).take(2);
        let chunks: Vec<_> = found
            .map(|(id, data)| ChunkInfo {
                chunk_id: id.clone().into(),
                length: data.len() as u32,
                ..Default::default()
            })
            .collect();
        let end = chunks.len() < 2;
        reply(ListChunksResponse { chunks, end })
    }

    /// Metadata with one directory; mutating requests are answered once per OpId.
    fn meta(&self, method: Method, body: &[u8]) -> Result<Response> {
        let op = match method {
            Method::MetaCreate => CreateRequest::decode(body).unwrap().op,
            Method::MetaOpen => OpenRequest::decode(body).unwrap().op,
            Method::MetaUnlink => UnlinkRequest::decode(body).unwrap().op,
            Method::MetaTruncate => TruncateRequest::decode(body).unwrap().op,
            Method::MetaClose => CloseRequest::decode(body).unwrap().op,
            Method::MetaHold => HoldRequest::decode(body).unwrap().op,
            Method::MetaSync => SyncRequest::decode(body).unwrap().op,
            Method::MetaAppend => AppendRequest::decode(body).unwrap().op,
            Method::MetaSetattr => SetattrRequest::decode(body).unwrap().op,
            _ => None,
        };
        let sequence = op.as_ref().map_or(0, |op| op.sequence);
        self.state.log.lock().metas.push((method, sequence, self.node as usize));
        let Some(op) = op else { return self.meta_once(method, body) };
        let key = (op.client_id.to_vec(), op.sequence);
        if let Some(known) = self.state.answers.lock().get(&key) {
            return Ok(Response { body: known.clone(), ..Response::default() });
        }
        let response = self.meta_once(method, body)?;
        self.state.answers.lock().insert(key, response.body.clone());
        Ok(response)
    }

    fn meta_once(&self, method: Method, body: &[u8]) -> Result<Response> {
        match method {
            Method::MetaCreate => {
                let request = CreateRequest::decode(body).unwrap();
                let name = request.at.unwrap().path.to_vec();
                if self.state.names.lock().contains_key(&name) {
                    return Err(Error::new(Code::Exists, "it exists"));
                }
                let inode = 1000 + self.state.files.lock().len() as u64;
                let layout = Layout {
                    table_id: 1,
                    table_version: 1,
                    chunk_bytes: CHUNK,
                    stripe: CHAINS,
                    first: 1,
                    ..Default::default()
                };
                let attr =
                    Attr { inode, r#type: FileType::File as i32, nlink: 1, layout: Some(layout), ..Default::default() };
                self.state.names.lock().insert(name, inode);
                self.state.files.lock().insert(inode, attr.clone());
                let session = session(request.open_write);
                let length_limit = self.length_limit(0, 0);
                reply(OpenResponse { attr: Some(attr), session, created: true, length_limit })
            }
            Method::MetaOpen => {
                let request = OpenRequest::decode(body).unwrap();
                let attr = self.find(&request.at.unwrap())?;
                let (session, length_limit) = (session(request.write), self.length_limit(attr.length, 0));
                reply(OpenResponse { attr: Some(attr), session, created: false, length_limit })
            }
            Method::MetaStat => {
                let request = StatRequest::decode(body).unwrap();
                reply(AttrResponse {
                    attr: Some(self.find(&request.at.unwrap())?),
                    length_limit: None,
                    ..Default::default()
                })
            }
            Method::MetaClose => {
                let request = CloseRequest::decode(body).unwrap();
                self.state.log.lock().closes.push(request.clone());
                self.report(request.inode, request.report, 0)
            }
            Method::MetaHold => {
                self.state.log.lock().holds.push(HoldRequest::decode(body).unwrap());
                reply(HoldResponse::default())
            }
            Method::MetaSync => {
                let request = SyncRequest::decode(body).unwrap();
                self.report(request.inode, request.report, request.wanted_length)
            }
            Method::MetaAppend => self.reserve(AppendRequest::decode(body).unwrap()),
            Method::MetaTruncate => {
                let request = TruncateRequest::decode(body).unwrap();
                self.truncate(self.find(&request.at.unwrap())?, request.length)
            }
            Method::MetaUnlink => {
                let request = UnlinkRequest::decode(body).unwrap();
                let mut attr = self.find(request.at.as_ref().unwrap())?;
                self.state.names.lock().remove(&request.at.unwrap().path[..]);
                attr.nlink = 0;
                self.state.files.lock().insert(attr.inode, attr.clone());
                reply(UnlinkResponse { attr: Some(attr) })
            }
            Method::MetaSetattr => {
                let request = SetattrRequest::decode(body).unwrap();
                let mut attr = self.find(&request.at.unwrap())?;
                attr.mtime_ns = request.mtime_ns.unwrap_or(attr.mtime_ns);
                self.state.files.lock().insert(attr.inode, attr.clone());
                reply(AttrResponse { attr: Some(attr), ..Default::default() })
            }
            Method::MetaKeepalive => reply(KeepaliveResponse { interval_ms: 100, session_ms: 60_000 }),
            other => Err(Error::new(Code::Unimplemented, format!("the fake has no {other:?}"))),
        }
    }

    fn find(&self, at: &PathAt) -> Result<Attr> {
        let inode =
            if at.path.is_empty() { Some(at.inode) } else { self.state.names.lock().get(&at.path[..]).copied() };
        let files = self.state.files.lock();
        let attr = inode.and_then(|inode| files.get(&inode)).cloned();
        attr.ok_or_else(|| Error::new(Code::NotFound, "no such file"))
    }

    /// A chunk more than the service knows of, or what is wanted, if there is room.
    fn length_limit(&self, length: u64, wanted: u64) -> Option<u64> {
        let max = self.state.faults.lock().length_max?;
        Some(max.min(wanted.max(length + u64::from(CHUNK))))
    }

    fn report(&self, inode: u64, report: Option<WriteReport>, wanted: u64) -> Result<Response> {
        let mut files = self.state.files.lock();
        let attr = files.get_mut(&inode).ok_or_else(|| Error::new(Code::StaleHandle, "gone"))?;
        if let Some(report) = report {
            self.state.log.lock().reports.push(report);
            if report.truncate_version == attr.truncate_version {
                attr.length = attr.length.max(report.length);
            }
            attr.mtime_ns = report.mtime_ns;
        }
        let length_limit = self.length_limit(attr.length, wanted);
        reply(AttrResponse { attr: Some(attr.clone()), length_limit, ..Default::default() })
    }

    fn reserve(&self, request: AppendRequest) -> Result<Response> {
        self.report(request.inode, request.report, 0)?;
        let attr = self.state.files.lock()[&request.inode].clone();
        let mut reserved = self.state.reserved.lock();
        let end = reserved.entry((request.inode, attr.truncate_version)).or_default();
        let offset = attr.length.max(*end);
        *end = offset + request.bytes;
        if self.state.faults.lock().length_max.is_some_and(|max| *end > max) {
            return Err(Error::new(Code::QuotaExceeded, "full"));
        }
        let length_limit = self.length_limit(attr.length, *end);
        reply(AppendResponse { attr: Some(attr), offset, length_limit, ..Default::default() })
    }

    fn truncate(&self, mut attr: Attr, length: u64) -> Result<Response> {
        attr.length = length;
        attr.truncate_version += 1;
        self.state.files.lock().insert(attr.inode, attr.clone());
        for store in self.state.stores.values() {
            store.lock().retain(|id, data| {
                let id = fs3_core::ChunkId::from_bytes(id).unwrap();
                let start = u64::from(id.index) * u64::from(CHUNK);
                if id.inode == attr.inode {
                    data.truncate(length.saturating_sub(start) as usize);
                }
                id.inode != attr.inode || start < length
            });
        }
        reply(AttrResponse { attr: Some(attr), ..Default::default() })
    }
}

fn session(write: bool) -> Bytes {
    if write { Bytes::copy_from_slice(&fs3_rt::random_bytes::<16>()) } else { Bytes::new() }
}

/// Bytes that differ at every position and per seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        })
        .collect()
}

/// Wait until `condition` holds.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
