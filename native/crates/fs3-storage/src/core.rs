//! What all targets of a node share.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fs3_chain::Event;
use fs3_core::{BufferPool, Code, Error, Result};
use fs3_io::{StoreOptions, TargetStore};
use fs3_net::{Connections, Peers};
use fs3_rt::{Handle, Instant};
use parking_lot::{Mutex, RwLock};
use tokio::sync::Semaphore;

use crate::disks::TargetDisks;
use crate::engine::Healing;
use crate::kv::KvStore;
use crate::pace::{Foreground, Pace};
use crate::routing::RoutingState;
use crate::target::Target;
use crate::upkeep::{DiskState, Upkeep};

/// How long a target that gave up stays away the first time; twice as long each time that follows soon.
const LIFE_PAUSE_MIN: Duration = Duration::from_millis(10);
const LIFE_PAUSE_MAX: Duration = Duration::from_secs(10);
/// How long the disk work of a target that gave up may take to end.
const CHANGES_PATIENCE: Duration = Duration::from_secs(60);
/// How often that is looked at.
const CHANGES_POLL: Duration = Duration::from_millis(10);

/// A target that routing assigns to this node.
#[derive(Clone)]
pub(crate) enum Slot {
    Opening { chain_id: u32 },
    Failed { chain_id: u32, error: String },
    Open(Arc<Target>),
}

macro_rules! counters {
    ($($name:ident),* $(,)?) => {
        /// Counters shown in the status, all since the start of the process.
        #[derive(Default)]
        pub(crate) struct Counters {
            $(pub $name: AtomicU64,)*
        }

        impl Counters {
            /// All of them with their names.
            pub fn all(&self) -> Vec<(&'static str, &AtomicU64)> {
                vec![$((stringify!($name), &self.$name)),*]
            }

            pub fn add(counter: &AtomicU64, n: u64) {
                counter.fetch_add(n, Ordering::Relaxed);
            }
        }
    };
}

counters!(
    reads,
    read_bytes,
    writes,
    write_bytes,
    forwards,
    resync_chunks,
    resync_bytes,
    checksum_errors,
    checks_asked,
    rotten_chunks,
    repaired_chunks,
    repaired_blocks,
    unrepairable_blocks,
    scrubbed_chunks,
    scrubbed_bytes,
);

/// Shared state of one engine. Thread-safe.
pub(crate) struct Core {
    pub node_id: u32,
    pub disks: Box<dyn TargetDisks>,
    pub peers: Peers,
    /// Set once the node listens.
    pub connections: OnceLock<Connections>,
    pub pool: BufferPool,
    pub options: StoreOptions,
    pub kv: KvStore,
    pub counters: Counters,
    /// Checks that clients may still ask for.
    pub checks: Semaphore,
    pub healing: Healing,
    pub foreground: Foreground,
    /// Limits what the node sends to other replicas in resyncs.
    pub resync_pace: Pace,
    /// Raised to begin a scrub of every target.
    pub scrub_now: tokio::sync::watch::Sender<u64>,
    disk_states: Mutex<BTreeMap<Vec<u8>, Arc<DiskState>>>,
    handle: Handle,
    routing: RwLock<Arc<RoutingState>>,
    /// Held while routing is taken over, so that targets see versions in order.
    applying: Mutex<()>,
    targets: RwLock<BTreeMap<u64, Slot>>,
    serve_until_ns: AtomicU64,
}

impl Core {
    /// On the runtime that is to do the node's work.
    pub fn new(
        node_id: u32,
        disks: Box<dyn TargetDisks>,
        peers: Peers,
        pool: BufferPool,
        options: StoreOptions,
        kv: KvStore,
        healing: Healing,
    ) -> Arc<Self> {
        Arc::new(Self {
            node_id,
            disks,
            peers,
            connections: OnceLock::new(),
            pool,
            options,
            kv,
            counters: Counters::default(),
            checks: Semaphore::new(crate::CHECKS_IN_FLIGHT_MAX),
            healing,
            resync_pace: Pace::new(healing.resync_bytes_per_s),
            foreground: Foreground::default(),
            scrub_now: tokio::sync::watch::Sender::new(0),
            disk_states: Mutex::default(),
            handle: Handle::current(),
            routing: RwLock::default(),
            applying: Mutex::default(),
            targets: RwLock::default(),
            serve_until_ns: AtomicU64::new(0),
        })
    }

    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.handle.spawn(task);
    }

    /// As [`Core::spawn`], but up to its first wait the task runs here: no lock that it takes may be held.
    pub fn begin(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.handle.begin(task);
    }

    pub fn routing(&self) -> Arc<RoutingState> {
        self.routing.read().clone()
    }

    pub fn slots(&self) -> BTreeMap<u64, Slot> {
        self.targets.read().clone()
    }

    /// Forget all targets, so that their stores end with the last operation on them.
    pub fn clear(&self) {
        self.targets.write().clear();
    }

    /// An open target of this chain.
    ///
    /// # Errors
    /// `NotServing` when this node has no such target or it is not open.
    pub fn target(&self, target_id: u64, chain_id: u32) -> Result<Arc<Target>> {
        match self.targets.read().get(&target_id) {
            Some(Slot::Open(target)) if target.chain_id == chain_id => Ok(target.clone()),
            _ => {
                let message = format!("target {target_id} of chain {chain_id} is not served by this node");
                Err(Error::new(Code::NotServing, message).with_routing(self.routing().version))
            }
        }
    }

    /// Serve until this monotonic time; an earlier time than before changes nothing.
    pub fn renew_lease(&self, serve_until_ns: u64) {
        let old = self.serve_until_ns.fetch_max(serve_until_ns, Ordering::SeqCst);
        if serve_until_ns > old {
            for slot in self.slots().into_values() {
                if let Slot::Open(target) = slot {
                    target.drive(Event::Lease { serve_until_ns });
                }
            }
        }
    }

    /// Take over a newer routing; an older one is ignored.
    pub fn apply_routing(self: &Arc<Self>, routing: RoutingState) {
        let _turn = self.applying.lock();
        if routing.version <= self.routing().version {
            return;
        }
        let routing = Arc::new(routing);
        *self.routing.write() = routing.clone();
        self.peers.retain(|address| routing.has_address(address));
        for (target_id, chain_id, disk_uuid) in &routing.own {
            // One that could not be opened is tried again with every newer routing.
            let known = !matches!(self.targets.read().get(target_id), None | Some(Slot::Failed { .. }));
            if !known {
                self.targets.write().insert(*target_id, Slot::Opening { chain_id: *chain_id });
                let (core, target_id, chain_id) = (self.clone(), *target_id, *chain_id);
                let disk_uuid = disk_uuid.clone();
                self.handle.spawn_blocking(move || core.open_target(target_id, chain_id, &disk_uuid));
            }
        }
        for slot in self.slots().into_values() {
            if let Slot::Open(target) = slot {
                target.reroute();
            }
        }
    }

    /// Open or create a target's store. Blocking.
    fn open_target(self: &Arc<Self>, target_id: u64, chain_id: u32, disk_uuid: &[u8]) {
        let opened = self.open_store(target_id, disk_uuid);
        let _turn = self.applying.lock();
        match opened {
            Ok((store, created)) => {
                let version = self.routing().chain(chain_id).map_or(0, |c| c.version);
                // A new target of a new chain has everything there is. Any other one waits until routing shows that
                // the manager has seen this start.
                let upkeep = Upkeep::new(self.disk_state(disk_uuid));
                self.enter(Target::new(target_id, chain_id, store, self.clone(), upkeep, created && version == 1));
            }
            Err(error) => {
                tracing::error!(target_id, "cannot open the target: {error}");
                self.targets.write().insert(target_id, Slot::Failed { chain_id, error: error.to_string() });
            }
        }
    }

    /// After a target gave up, let it come back by a resync, if its disk and metadata are sound: what it cannot be
    /// trusted with, such as a rotten chunk, is then replaced from another replica.
    pub async fn begin_next_life(self: Arc<Self>, former: Arc<Target>) {
        let deadline = Instant::now() + CHANGES_PATIENCE;
        // Updates of a chunk take turns, those of the next life too.
        while former.is_changing() {
            if Instant::now() > deadline {
                tracing::error!(target_id = former.id, "a disk does not answer; the target stays offline");
                return;
            }
            fs3_rt::sleep(CHANGES_POLL).await;
        }
        if former.store.failed().is_some() || former.upkeep.disk.error().is_some() {
            return;
        }
        // What it gave up for may not have passed: a full disk, say.
        fs3_rt::sleep(LIFE_PAUSE_MIN.saturating_mul(1 << former.setbacks().min(16)).min(LIFE_PAUSE_MAX)).await;
        let _turn = self.applying.lock();
        let current = matches!(self.targets.read().get(&former.id), Some(Slot::Open(t)) if Arc::ptr_eq(t, &former));
        if current {
            let next = former.next_life();
            tracing::warn!(target_id = next.id, "the target comes back");
            self.enter(next);
        }
    }

    /// Make a target known that has just begun to live. The caller holds `applying`.
    fn enter(&self, target: Arc<Target>) {
        if self.healing.scrub_bytes_per_s > 0 {
            self.spawn(target.clone().scrub());
        }
        // Of its former life nothing may be found.
        target.forget_cached();
        target.drive(Event::Lease { serve_until_ns: self.serve_until_ns.load(Ordering::SeqCst) });
        target.reroute();
        self.targets.write().insert(target.id, Slot::Open(target));
    }

    /// What is known of a disk; made when it is first asked for.
    pub fn disk_state(&self, uuid: &[u8]) -> Arc<DiskState> {
        let pace = || Pace::new(self.healing.scrub_bytes_per_s);
        let mut states = self.disk_states.lock();
        states.entry(uuid.to_vec()).or_insert_with(|| Arc::new(DiskState::new(pace()))).clone()
    }

    fn open_store(&self, target_id: u64, disk_uuid: &[u8]) -> Result<(Arc<TargetStore>, bool)> {
        if let Some(error) = self.disk_state(disk_uuid).error() {
            return Err(error);
        }
        let (disk, created) = self.disks.open_target(disk_uuid, target_id)?;
        Ok((TargetStore::open_on(disk, self.options.clone())?, created))
    }
}
