//! Three storage engines in one process, and a client of their frame protocol.
#![allow(dead_code)]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use fs3_core::{ChunkId, Code, Error, InodeId, Region, RegionMut, Result, crc_blocks, monotonic_ns, pack_crcs};
use fs3_net::{Hello, Peers, Sink};
use fs3_proto::v1::engine_status::TargetStatus;
use fs3_proto::v1::*;
use fs3_storage::{DiskConfig, EngineConfig, Healing, StorageEngine};
use prost::Message;
use tempfile::TempDir;

pub const CHAIN: u32 = 5;
pub const CHUNK_BYTES: u32 = 256 << 10;
pub const NODES: usize = 3;
pub const TIMEOUT: Duration = Duration::from_secs(10);
const CLUSTER: &str = "test-cluster";

pub fn target(node: usize) -> u64 {
    (node as u64 + 1) * 1000 + 1
}

pub fn chunk(index: u32) -> ChunkId {
    ChunkId::file(InodeId(77), index)
}

pub struct Cluster {
    pub engines: Vec<Option<StorageEngine>>,
    pub routing: Routing,
    pub sequence: u64,
    serve_until_ns: u64,
    healing: Healing,
    runtime: tokio::runtime::Runtime,
    client: Peers,
    dirs: Vec<TempDir>,
}

/// What a read of one op gave.
pub struct Read {
    pub result: ReadResult,
    pub data: Vec<u8>,
}

impl Cluster {
    /// Three nodes, one chain of three new targets, all serving.
    pub fn start() -> Self {
        Self::start_with_lease(monotonic_ns() + 3_600_000_000_000)
    }

    /// As [`Cluster::start`], with leases until this time.
    pub fn start_with_lease(serve_until_ns: u64) -> Self {
        Self::start_with(serve_until_ns, Healing::default())
    }

    /// As [`Cluster::start`], with these limits.
    pub fn start_healing(healing: Healing) -> Self {
        Self::start_with(monotonic_ns() + 3_600_000_000_000, healing)
    }

    fn start_with(serve_until_ns: u64, healing: Healing) -> Self {
        let hello = Hello {
            cluster_id: CLUSTER.into(),
            role: Role::Client,
            peer_id: [200; 16],
            token: "secret".into(),
            transport: fs3_net::Transport::tcp(),
        };
        let mut cluster = Self {
            engines: (0..NODES).map(|_| None).collect(),
            routing: Routing { version: 1, cluster_id: CLUSTER.into(), lease_ms: 6000, ..Routing::default() },
            sequence: 0,
            serve_until_ns,
            healing,
            runtime: tokio::runtime::Runtime::new().unwrap(),
            client: Peers::new(hello, 2),
            dirs: (0..NODES).map(|_| TempDir::new().unwrap()).collect(),
        };
        for node in 0..NODES {
            cluster.start_node(node);
            cluster.routing.targets.push(Target {
                target_id: target(node),
                node_id: node as u32 + 1,
                disk_uuid: vec![node as u8 + 1; 16].into(),
                chain_id: CHAIN,
                ..Target::default()
            });
        }
        let targets = (0..NODES).map(|n| (n, PublicState::Serving)).collect::<Vec<_>>();
        cluster.routing.chains = vec![Chain { chain_id: CHAIN, version: 0, targets: vec![] }];
        cluster.reroute(&targets);
        for node in 0..NODES {
            cluster.wait_state(node, LocalState::Uptodate);
        }
        cluster
    }

    /// Start a node on its disk and make its address known; routing and lease come later.
    pub fn start_node(&mut self, node: usize) {
        let engine = StorageEngine::start(EngineConfig {
            node_id: node as u32 + 1,
            node_uuid: [node as u8 + 100; 16],
            cluster_id: CLUSTER.into(),
            token: "secret".into(),
            host: "127.0.0.1".into(),
            frame_port: 0,
            disks: vec![DiskConfig { path: self.dir(node).to_owned(), uuid: [node as u8 + 1; 16] }],
            read_cache_bytes: 1 << 20,
            kv_memory_bytes: 16 << 20,
            durable_writes: false,
            healing: self.healing,
            transport: fs3_net::Transport::tcp(),
        })
        .unwrap();
        engine.renew_lease(self.serve_until_ns);
        self.routing.nodes.retain(|n| n.node_id != node as u32 + 1);
        self.routing.nodes.push(Node {
            node_id: node as u32 + 1,
            role: "storage".into(),
            host: "127.0.0.1".into(),
            frame_port: u32::from(engine.frame_port()),
            ..Node::default()
        });
        self.engines[node] = Some(engine);
    }

    pub fn dir(&self, node: usize) -> &Path {
        self.dirs[node].path()
    }

    pub fn stop_node(&mut self, node: usize) {
        self.engines[node].take().unwrap().stop();
    }

    pub fn engine(&self, node: usize) -> &StorageEngine {
        self.engines[node].as_ref().unwrap()
    }

    pub fn chain_version(&self) -> u64 {
        self.routing.chains[0].version
    }

    /// Publish a new version of the chain.
    pub fn reroute(&mut self, targets: &[(usize, PublicState)]) {
        self.routing.version += 1;
        self.routing.chains[0].version += 1;
        self.routing.chains[0].targets = targets
            .iter()
            .map(|(node, state)| ChainTarget { target_id: target(*node), state: *state as i32 })
            .collect();
        self.publish();
    }

    pub fn publish(&self) {
        for engine in self.engines.iter().flatten() {
            engine.apply_routing(&self.routing.encode_to_vec()).unwrap();
        }
    }

    pub fn status(&self, node: usize) -> Option<TargetStatus> {
        self.engine(node).status().targets.into_iter().find(|t| t.target_id == target(node))
    }

    pub fn wait_state(&self, node: usize, state: LocalState) {
        let is = || self.status(node).is_some_and(|s| s.local_state == state as u32);
        wait_or(&format!("node {node} to be {state:?}"), is, || format!("{:?}", self.status(node)));
    }

    pub fn call(&self, node: usize, method: Method, body: impl Message, payload: Vec<Region>) -> Result<bytes::Bytes> {
        let address = self.address(node);
        let call = self.client.call(&address, method, body, payload, Sink::none(), TIMEOUT);
        self.runtime.block_on(call).map(|reply| reply.body)
    }

    fn address(&self, node: usize) -> String {
        let found = self.routing.nodes.iter().find(|n| n.node_id == node as u32 + 1).unwrap();
        format!("127.0.0.1:{}", found.frame_port)
    }

    pub fn write_request(&self, node: usize, chunk: ChunkId, offset: u32, data: &[u8]) -> WriteRequest {
        WriteRequest {
            chain_id: CHAIN,
            chain_version: self.chain_version(),
            target_id: target(node),
            chunk_id: chunk.to_bytes().to_vec().into(),
            chunk_bytes: CHUNK_BYTES,
            offset,
            length: data.len() as u32,
            crcs: pack_crcs(&crc_blocks(offset as usize, data)).into(),
            writer: Some(WriterId { client_id: vec![9; 16].into(), channel: 1, sequence: self.sequence }),
            ..WriteRequest::default()
        }
    }

    pub fn send_write(&self, node: usize, request: WriteRequest, data: &[u8]) -> Result<WriteResponse> {
        let body = self.call(node, Method::StorageWrite, request, vec![Region::from_vec(data.to_vec())])?;
        Ok(WriteResponse::decode(body).unwrap())
    }

    /// Write as a new write of the client's channel.
    pub fn write(&mut self, head: usize, chunk: ChunkId, offset: u32, data: &[u8]) -> Result<WriteResponse> {
        self.sequence += 1;
        self.send_write(head, self.write_request(head, chunk, offset, data), data)
    }

    /// Write until it is accepted, as a client does that waits for a chain to be repaired.
    pub fn write_retrying(&mut self, head: usize, chunk: ChunkId, offset: u32, data: &[u8]) -> WriteResponse {
        self.sequence += 1;
        let ends = Instant::now() + TIMEOUT;
        loop {
            match self.send_write(head, self.write_request(head, chunk, offset, data), data) {
                Ok(response) => return response,
                Err(e) => assert!(e.retryable() && Instant::now() < ends, "write: {e}"),
            }
            std::thread::yield_now();
        }
    }

    pub fn read(&self, node: usize, chunk: ChunkId, offset: u32, length: u32) -> Result<Read> {
        self.read_at(node, self.chain_version(), chunk, offset, length)
    }

    pub fn read_at(&self, node: usize, chain_version: u64, chunk: ChunkId, offset: u32, length: u32) -> Result<Read> {
        let op = ReadOp {
            chain_id: CHAIN,
            chain_version,
            target_id: target(node),
            chunk_id: chunk.to_bytes().to_vec().into(),
            offset,
            length,
        };
        let lengths = |body: &[u8]| {
            let response = ReadResponse::decode(body).map_err(|_| Error::new(Code::Protocol, "unreadable"))?;
            Ok(response.results.iter().map(|r| r.length as usize).collect())
        };
        let sink = Sink { windows: vec![RegionMut::zeroed(length as usize)], lengths };
        let request = ReadRequest { ops: vec![op], repair: false };
        let address = self.address(node);
        let call = self.client.call(&address, Method::StorageRead, request, Vec::new(), sink, TIMEOUT);
        let reply = self.runtime.block_on(call)?;
        let result = ReadResponse::decode(reply.body.clone()).unwrap().results.remove(0);
        let data = reply.windows[0][..reply.lengths[0]].to_vec();
        Ok(Read { result, data })
    }

    pub fn request<R: Message + Default>(&self, node: usize, method: Method, body: impl Message) -> Result<R> {
        self.call(node, method, body, Vec::new()).map(|body| R::decode(body).unwrap())
    }

    /// Chunks of a target: id, version, length, checksum, pending version.
    pub fn list(&self, node: usize) -> Vec<(ChunkId, u64, u32, u32, u64)> {
        let request = ListChunksRequest { chain_id: CHAIN, target_id: target(node), ..ListChunksRequest::default() };
        let response: ListChunksResponse = self.request(node, Method::StorageListChunks, request).unwrap();
        assert!(response.end);
        let of = |c: ChunkInfo| {
            let id = ChunkId::from_bytes(&c.chunk_id).unwrap();
            (id, c.committed_version, c.length, c.chunk_crc32c, c.pending_version)
        };
        response.chunks.into_iter().map(of).collect()
    }

    pub fn assert_replicas_equal(&self, nodes: &[usize]) {
        let first = self.list(nodes[0]);
        for node in &nodes[1..] {
            assert_eq!(first, self.list(*node), "replicas {} and {node} differ", nodes[0]);
        }
    }

    /// Manager's part of a node's way back: seen offline, then waiting, then syncing until it is up to date, then
    /// serving at the end of the chain.
    pub fn bring_back(&mut self, node: usize, serving: &[usize]) {
        self.start_node(node);
        self.let_in(node, serving);
    }

    /// As [`Cluster::bring_back`], for a node that runs.
    pub fn let_in(&mut self, node: usize, serving: &[usize]) {
        let with = |state| {
            let mut targets: Vec<_> = serving.iter().map(|n| (*n, PublicState::Serving)).collect();
            targets.push((node, state));
            targets
        };
        self.reroute(&with(PublicState::Offline));
        self.wait_state(node, LocalState::Online);
        self.reroute(&with(PublicState::Syncing));
        self.wait_state(node, LocalState::Uptodate);
        self.reroute(&with(PublicState::Serving));
    }
}

pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    wait_or(what, condition, String::new);
}

fn wait_or(what: &str, condition: impl Fn() -> bool, instead: impl Fn() -> String) {
    let ends = Instant::now() + TIMEOUT;
    while !condition() {
        assert!(Instant::now() < ends, "waited too long for {what} {}", instead());
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn bytes_of(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) ^ (i >> 8) as u8).collect()
}

pub fn code_of<T>(result: Result<T>) -> Code {
    match result {
        Ok(_) => panic!("it was not refused"),
        Err(e) => e.code,
    }
}

/// Invert the byte after every place in the data files under `dir` that hold `pattern`; returns how many there are.
pub fn flip(dir: &Path, pattern: &[u8]) -> usize {
    let mut flipped = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            flipped += flip(&path, pattern);
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        for at in (0..bytes.len().saturating_sub(pattern.len())).filter(|at| bytes[*at..].starts_with(pattern)) {
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&[!bytes[at]], at as u64).unwrap();
            flipped += 1;
        }
    }
    flipped
}

/// Bytes without repetitions, so that a piece of them is found in one place only.
pub fn noise(seed: u8, length: usize) -> Vec<u8> {
    let mut state = u64::from(seed) + 1;
    let next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}
