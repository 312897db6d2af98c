//! A simulated world, as its driver sees it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fs3_core::{Code, Error, Result};
use fs3_net::sim::Net;
use fs3_proto::v1::{LocalState, Routing};
use fs3_rt::sim::{Process, Simulator};
use fs3_storage::{EngineConfig, Healing, StorageEngine};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::watch;

use crate::audit;
use crate::chaos::Chaos;
use crate::check::{check, describe};
use crate::history::History;
use crate::load::Load;
use crate::meta::{Meta, Published};
use crate::network::{Host, Shared, Weather};
use crate::nodes::{Happening, Nodes};
use crate::options::Options;

/// How long the checks at the end may take, virtual nanoseconds.
const CHECK_NS_MAX: u64 = 300_000_000_000;

/// From one scrub of a target to the next, at pace 1.
const SCRUB_INTERVAL: Duration = Duration::from_secs(10);
/// Operations told in a trace.
const TRACE_MAX: usize = 200;

/// Storage nodes, clients, network and disks in virtual time. Times are nanoseconds since the world began. Belongs to one
/// thread at a time.
///
/// The driver starts the engines (a [`Happening`] says when a node has a new process), hands them routing and leases,
/// publishes the routing for the clients and lets time go on. Nothing else decides what happens but the seed.
pub struct World {
    sim: Simulator,
    options: Options,
    weather: Arc<Weather>,
    nodes: Arc<Nodes>,
    load: Arc<Load>,
    chaos: Arc<Chaos>,
    routing: Published,
    /// What belongs to no host.
    keeper: Process,
    violation: Mutex<String>,
    /// The chunk that the violation is about.
    violated_chunk: Mutex<Option<u32>>,
}

impl World {
    /// A world at time 0: every node has a process, clients wait for routing, the load is off, faults happen.
    pub fn new(seed: u64, options: Options) -> Self {
        let sim = Simulator::new(seed);
        let weather = Arc::new(Weather::new(sim.clone(), options.clone()));
        sim.extend(Net::new(Shared(weather.clone())));
        let keeper = sim.process("keeper");
        let nodes = Arc::new(Nodes::new(sim.clone(), weather.clone(), options.nodes));
        let load = Load::new(sim.clone(), options.clone(), weather.clone());
        let chaos = Chaos::new(sim.clone(), options.clone(), nodes.clone(), weather.clone(), load.clone());
        let routing: Published = watch::Sender::new(None);
        let meta =
            Arc::new(Meta { routing: routing.clone(), told: Mutex::default(), chunk_bytes: options.chunk_bytes });
        drop(keeper.spawn(meta.serve()));
        (0..options.nodes).for_each(|node| nodes.start(node));
        (0..options.clients).for_each(|client| load.start_client(client));
        chaos.begin(&keeper);
        Self {
            sim,
            options,
            weather,
            nodes,
            load,
            chaos,
            routing,
            keeper,
            violation: Mutex::default(),
            violated_chunk: Mutex::default(),
        }
    }

    /// What the world is like.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Virtual nanoseconds since the world began.
    pub fn now_ns(&self) -> u64 {
        self.sim.now_ns()
    }

    /// Let everything happen up to `until_ns`.
    pub fn run_until(&self, until_ns: u64) {
        self.sim.run_until(until_ns);
        if let Some(failure) = self.sim.take_failures().into_iter().next() {
            let mut violation = self.violation.lock();
            if violation.is_empty() {
                *violation = failure;
            }
        }
    }

    /// What happened to storage nodes since the last call.
    pub fn happenings(&self) -> Vec<Happening> {
        self.nodes.take_happenings()
    }

    /// Start the engine of a node's process; returns its port. The disks of `config` are not used: a node has whatever
    /// disks the routing names.
    ///
    /// # Errors
    /// `Unavailable` when the node has no process or has an engine already.
    pub fn start_engine(&self, node: u32, config: EngineConfig) -> Result<u16> {
        // The interesting bugs of a scrub are those of many of them.
        let healing = Healing { scrub_interval: SCRUB_INTERVAL * self.options.pace as u32, ..config.healing };
        let config = EngineConfig { durable_writes: self.options.durable_writes, healing, ..config };
        self.nodes.start_engine(node, config)
    }

    /// Do something with the engine of a node, as a part of its process.
    ///
    /// # Errors
    /// `Unavailable` when the node has no process or no engine.
    pub fn with_engine<T>(&self, node: u32, run: impl FnOnce(&StorageEngine) -> T) -> Result<T> {
        self.nodes.with_engine(node, run)
    }

    /// End a node's engine in good order. Nothing happens when it has none.
    pub fn stop_engine(&self, node: u32) {
        self.nodes.stop_engine(node);
    }

    /// Let clients know a routing (an encoded `fs3.v1.Routing`); an older one than known is ignored.
    ///
    /// # Errors
    /// `InvalidArgument` when the bytes are no routing.
    pub fn publish_routing(&self, routing: &[u8]) -> Result<()> {
        let routing = Routing::decode(routing)
            .map_err(|e| Error::new(Code::InvalidArgument, format!("the routing cannot be read: {e}")))?;
        self.sim.enter(|| {
            self.routing.send_if_modified(|known| {
                let newer = known.as_ref().is_none_or(|known| routing.version > known.version);
                if newer {
                    *known = Some(Arc::new(routing));
                }
                newer
            });
        });
        Ok(())
    }

    /// How a message of the control plane from one party to another fares now: the delay of each copy that arrives,
    /// nanoseconds. Parties are "node0", "mgmtd0" and so on.
    pub fn delays(&self, from: &str, to: &str) -> Vec<u64> {
        self.weather.control(Host::named(from), Host::named(to))
    }

    /// Let clients work, or only end what they have begun.
    pub fn set_load(&self, on: bool) {
        self.sim.enter(|| self.load.set_on(on));
    }

    /// No faults from now on: partitions end, every node gets a new process on sound disks.
    pub fn heal(&self) {
        self.sim.enter(|| self.chaos.heal());
    }

    /// Whether every client operation has ended.
    pub fn is_quiescent(&self) -> bool {
        self.load.is_quiet()
    }

    /// The first violated property so far, in words; empty: none.
    pub fn violation(&self) -> String {
        self.violation.lock().clone()
    }

    /// Check everything, after healing, with the load off, once every target of the published routing serves again:
    /// replicas equal, checksums right, the history linearizable up to what can be read now. Takes virtual time.
    /// Returns the first violated property in words; empty: none.
    pub fn check(&self) -> String {
        if let Err(found) = self.check_now() {
            let mut violation = self.violation.lock();
            if violation.is_empty() {
                *violation = found;
            }
        }
        self.violation()
    }

    fn check_now(&self) -> std::result::Result<(), String> {
        let routing = self.routing.borrow().clone().ok_or("no routing was ever published")?;
        if let Some((target_id, words)) = audit::not_serving(&routing).first() {
            let why = self.target_error(*target_id).unwrap_or_default();
            return Err(format!("after healing {words} {why}"));
        }
        self.finish(audit::replicas_agree(self.nodes.clone(), routing))??;
        let load = self.load.clone();
        self.finish(load.read_all())?.map_err(|e| format!("after healing a read failed: {e}"))?;
        match self.with_history(check) {
            None => Ok(()),
            Some(violation) => {
                *self.violated_chunk.lock() = Some(violation.chunk);
                Err(violation.to_string())
            }
        }
    }

    /// What a target's node says of it.
    fn target_error(&self, target_id: u64) -> Option<String> {
        let statuses = (0..self.nodes.count()).filter_map(|node| self.nodes.with_engine(node, |e| e.status()).ok());
        let target = statuses.flat_map(|s| s.targets).find(|t| t.target_id == target_id)?;
        let state = LocalState::try_from(target.local_state as i32).unwrap_or_default();
        Some(format!(
            "(its node says {}, chain version {}: {:?})",
            state.as_str_name(),
            target.chain_version,
            target.error
        ))
    }

    /// Run a task to its end.
    fn finish<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> std::result::Result<T, String> {
        let result = Arc::new(Mutex::new(None));
        let slot = result.clone();
        drop(self.keeper.spawn(async move {
            let value = task.await;
            *slot.lock() = Some(value);
        }));
        let ends_ns = self.now_ns() + CHECK_NS_MAX;
        while self.now_ns() < ends_ns {
            self.run_until(self.now_ns() + 100_000_000);
            if let Some(value) = result.lock().take() {
                return Ok(value);
            }
        }
        Err("the check at the end did not end".into())
    }

    /// What clients did and saw.
    pub fn with_history<T>(&self, look: impl FnOnce(&History) -> T) -> T {
        look(&self.load.history.lock())
    }

    /// Hash of everything that happened; two runs of a seed under the same driver have the same.
    pub fn trace_hash(&self) -> u64 {
        self.sim.trace_hash()
    }

    /// The last happenings and operations in words, for a report of a failure.
    pub fn trace(&self) -> Vec<String> {
        self.with_history(|history| {
            let chunk = *self.violated_chunk.lock();
            let told = history.operations().iter().filter(|o| chunk.is_none_or(|chunk| o.chunk == chunk));
            let mut lines: Vec<(u64, String)> =
                told.rev().take(TRACE_MAX).map(|o| (o.invoked_ns, describe(o))).collect();
            lines.extend(self.chaos.trace());
            lines.sort();
            lines.into_iter().map(|(at_ns, line)| format!("{:>12.6} s  {line}", at_ns as f64 / 1e9)).collect()
        })
    }

    /// Faults by kind, operations, and other numbers of what happened.
    pub fn statistics(&self) -> BTreeMap<String, u64> {
        let mut all: BTreeMap<String, u64> = BTreeMap::new();
        for (name, count) in self.weather.counts().into_iter().chain(self.chaos.counts()) {
            all.insert(name.to_owned(), count);
        }
        self.with_history(|history| {
            let ok = |o: &&crate::Operation| o.outcome == crate::Outcome::Ok;
            all.insert("operations".into(), history.operations().len() as u64);
            all.insert("operations that succeeded".into(), history.operations().iter().filter(ok).count() as u64);
        });
        all.insert("virtual seconds".into(), self.now_ns() / 1_000_000_000);
        all
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for node in 0..self.nodes.count() {
            self.nodes.crash(node, false);
        }
        self.sim.end();
    }
}
