//! The engine as the control plane sees it.

use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use fs3_core::{Arena, BufferPool, Code, Error, Result};
use fs3_io::{ReadCache, StoreOptions, TargetStore};
use fs3_net::{Hello, HelloPolicy, Peers, Server, Transport};
use fs3_proto::v1::{EngineStatus, Role, Routing};
use parking_lot::Mutex;
use prost::Message;

use crate::core::{Core, Slot};
use crate::disks::{Disks, TargetDisks};
use crate::kv::{KvStore, SWEEP_EVERY};
use crate::routing::RoutingState;
use crate::service::StorageService;
use crate::{CONNECTIONS_PER_PEER, PAYLOAD_BYTES_HELD_MAX};

/// How long running requests may finish in when the engine stops.
const STOP_PATIENCE: Duration = Duration::from_secs(3);
/// Threads that serve the network.
const NETWORK_THREADS_MAX: usize = 4;

/// One disk of the node.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// Directory of the disk.
    pub path: PathBuf,
    /// Its uuid, as in the routing.
    pub uuid: [u8; 16],
}

/// How an engine is started.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// This node's number.
    pub node_id: u32,
    /// This node's uuid.
    pub node_uuid: [u8; 16],
    /// The cluster.
    pub cluster_id: String,
    /// The cluster's shared secret.
    pub token: String,
    /// Address to listen on.
    pub host: String,
    /// Port to listen on; 0 picks one.
    pub frame_port: u16,
    /// The node's disks.
    pub disks: Vec<DiskConfig>,
    /// Bytes of verified file data kept in memory.
    pub read_cache_bytes: usize,
    /// Bytes of memory for the key-value cache; 0: the node keeps none.
    pub kv_memory_bytes: u64,
    /// Every write survives power loss before it is acknowledged.
    pub durable_writes: bool,
    /// Work behind the clients' requests.
    pub healing: Healing,
    /// TCP; RDMA and shared memory too.
    pub transport: Transport,
}

/// How much a node does to stay sound.
#[derive(Clone, Copy, Debug)]
pub struct Healing {
    /// Bytes per second that the scrub reads from each disk at most; 0: no scrub.
    pub scrub_bytes_per_s: u64,
    /// From the begin of a scrub of a target to the begin of its next one.
    pub scrub_interval: Duration,
    /// Bytes per second that the node sends at most to bring other replicas up to date; 0: no limit.
    pub resync_bytes_per_s: u64,
}

impl Default for Healing {
    fn default() -> Self {
        Self {
            scrub_bytes_per_s: 16 << 20,
            scrub_interval: Duration::from_secs(24 * 3600),
            resync_bytes_per_s: 256 << 20,
        }
    }
}

/// A running storage service. Thread-safe; methods may block for short times and must not be called from the
/// engine's own runtime. It ends when it is stopped or dropped.
pub struct StorageEngine {
    core: Arc<Core>,
    frame_port: u16,
    running: Mutex<Option<Running>>,
}

struct Running {
    server: Server,
    /// `None`: it runs on its starter's.
    runtime: Option<tokio::runtime::Runtime>,
}

impl StorageEngine {
    /// Listen and wait for routing. No target serves before routing and a lease are given.
    ///
    /// # Errors
    /// `Unavailable` when the address cannot be listened on.
    pub fn start(mut config: EngineConfig) -> Result<Self> {
        if config.transport.shares_memory() {
            let _ = Arena::enable().inspect_err(|e| tracing::warn!("no memory can be shared with clients here: {e}"));
        }
        let threads = std::thread::available_parallelism().map_or(2, |n| n.get()).min(NETWORK_THREADS_MAX);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name("fs3-storage")
            .enable_all()
            .build()
            .map_err(|e| Error::new(Code::Internal, format!("cannot start threads: {e}")))?;
        let disks = Disks::new(std::mem::take(&mut config.disks), &config.cluster_id);
        let engine = runtime.block_on(Self::start_here(config, Box::new(disks)))?;
        if let Some(running) = &mut *engine.running.lock() {
            running.runtime = Some(runtime);
        }
        Ok(engine)
    }

    /// As [`StorageEngine::start`], on the current runtime or in the current simulated process, and on `disks` instead
    /// of those of the configuration. [`StorageEngine::stop`] then ends serving without waiting for anything.
    ///
    /// # Errors
    /// `Unavailable` when the address cannot be listened on.
    pub async fn start_here(config: EngineConfig, disks: Box<dyn TargetDisks>) -> Result<Self> {
        let hello = Hello {
            cluster_id: config.cluster_id.clone(),
            role: Role::Storage,
            peer_id: config.node_uuid,
            token: config.token.clone(),
            transport: config.transport.clone(),
        };
        let cache = ReadCache::new(config.read_cache_bytes);
        let pool = BufferPool::new(PAYLOAD_BYTES_HELD_MAX);
        let mut options = StoreOptions::new(cache, pool.clone());
        options.durable_writes = config.durable_writes;
        let core = Core::new(
            config.node_id,
            disks,
            Peers::new(hello, CONNECTIONS_PER_PEER),
            pool,
            options,
            KvStore::new(config.kv_memory_bytes),
            config.healing,
        );
        let policy = HelloPolicy {
            cluster_id: config.cluster_id,
            token: config.token,
            node_id: config.node_id,
            role: Role::Storage,
            transport: config.transport,
        };
        let address = format!("{}:{}", config.host, config.frame_port);
        let service = Arc::new(StorageService(core.clone()));
        let server = Server::bind(&address, policy, service).await?;
        let frame_port = server.local_addr().port();
        core.connections.get_or_init(|| server.connections());
        if core.kv.is_on() {
            core.spawn(sweep_kv(Arc::downgrade(&core)));
        }
        core.spawn(crate::kv_chunks::look_after(Arc::downgrade(&core)));
        Ok(Self { core, frame_port, running: Mutex::new(Some(Running { server, runtime: None })) })
    }

    /// The port it listens on.
    pub fn frame_port(&self) -> u16 {
        self.frame_port
    }

    /// The node's number.
    pub fn node_id(&self) -> u32 {
        self.core.node_id
    }

    /// The store of a target that is open, for audits.
    pub fn store(&self, target_id: u64) -> Option<Arc<TargetStore>> {
        match self.core.slots().remove(&target_id) {
            Some(Slot::Open(target)) => Some(target.store.clone()),
            _ => None,
        }
    }

    /// Take over an encoded `fs3.v1.Routing`; an older one than known is ignored. New targets are created and opened
    /// in the background and show up in the status.
    ///
    /// # Errors
    /// `InvalidArgument` when the bytes are no routing.
    pub fn apply_routing(&self, routing: &[u8]) -> Result<()> {
        let routing = Routing::decode(routing)
            .map_err(|e| Error::new(Code::InvalidArgument, format!("the routing cannot be read: {e}")))?;
        if self.running.lock().is_some() {
            self.core.apply_routing(RoutingState::new(routing, self.core.node_id));
        }
        Ok(())
    }

    /// Serve until this time of CLOCK_MONOTONIC in nanoseconds; an earlier time than known changes nothing.
    pub fn renew_lease(&self, serve_until_monotonic_ns: u64) {
        self.core.renew_lease(serve_until_monotonic_ns);
    }

    /// What to report to the manager.
    pub fn status(&self) -> EngineStatus {
        self.core.status()
    }

    /// Begin a scrub of all targets now, instead of the one that may be running.
    pub fn scrub(&self) {
        self.core.scrub_now.send_modify(|times| *times += 1);
    }

    /// End serving: running requests get a few seconds, then the stores are synced and closed. Blocking. A second call
    /// does nothing.
    pub fn stop(&self) {
        let Some(Running { server, runtime }) = self.running.lock().take() else { return };
        let Some(runtime) = runtime else {
            drop(server);
            return self.core.clear();
        };
        runtime.block_on(async {
            server.shutdown(STOP_PATIENCE).await;
            for slot in self.core.slots().into_values() {
                if let Slot::Open(target) = slot {
                    target.store.close().await;
                }
            }
        });
        runtime.shutdown_timeout(STOP_PATIENCE);
        self.core.clear();
    }
}

/// Forget expired entries of the key-value cache, as long as there is an engine.
async fn sweep_kv(core: Weak<Core>) {
    loop {
        fs3_rt::sleep(SWEEP_EVERY).await;
        match core.upgrade() {
            Some(core) => core.kv.sweep(),
            None => return,
        }
    }
}

impl Drop for StorageEngine {
    fn drop(&mut self) {
        self.stop();
    }
}
