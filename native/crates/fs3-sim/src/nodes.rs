//! The storage processes of a world: started, killed, stopped and continued.

use std::ops::Range;
use std::sync::Arc;

use fs3_core::{Code, Error, Result};
use fs3_io::fault::FaultDisk;
use fs3_rt::sim::{Process, Simulator};
use fs3_storage::{EngineConfig, StorageEngine};
use parking_lot::Mutex;

use crate::disks::{Mounted, NodeDisks};
use crate::network::{Host, Weather};

/// How long disk work takes, nanoseconds.
const DISK_NS: Range<u64> = 10_000..300_000;

/// What happened to a storage node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HappeningKind {
    /// Its process is gone.
    Crashed,
    /// A new process begins; it has no engine yet.
    Started,
    /// Its process is not run.
    Paused,
    /// Its process is run again.
    Resumed,
}

impl HappeningKind {
    /// As one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Crashed => "crashed",
            Self::Started => "started",
            Self::Paused => "paused",
            Self::Resumed => "resumed",
        }
    }
}

/// Something that happened to a storage node, for its control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Happening {
    /// When, virtual nanoseconds.
    pub at_ns: u64,
    /// What.
    pub kind: HappeningKind,
    /// To which node.
    pub node: u32,
}

struct Node {
    disks: Arc<NodeDisks>,
    life: Option<Life>,
    lives: u32,
}

struct Life {
    process: Process,
    engine: Option<Arc<StorageEngine>>,
    paused: bool,
}

/// All storage nodes of a world.
pub(crate) struct Nodes {
    sim: Simulator,
    weather: Arc<Weather>,
    nodes: Mutex<Vec<Node>>,
    happenings: Mutex<Vec<Happening>>,
}

impl Nodes {
    pub fn new(sim: Simulator, weather: Arc<Weather>, count: u32) -> Self {
        let node = |_| Node { disks: NodeDisks::new(sim.draw()), life: None, lives: 0 };
        let nodes = Mutex::new((0..count).map(node).collect());
        Self { sim, weather, nodes, happenings: Mutex::default() }
    }

    pub fn count(&self) -> u32 {
        self.nodes.lock().len() as u32
    }

    pub fn take_happenings(&self) -> Vec<Happening> {
        std::mem::take(&mut *self.happenings.lock())
    }

    fn happened(&self, kind: HappeningKind, node: u32) {
        self.sim.trace(10 + kind as u64, u64::from(node), 0);
        self.happenings.lock().push(Happening { at_ns: self.sim.now_ns(), kind, node });
    }

    /// Begin a process on a node that has none.
    pub fn start(&self, node: u32) {
        {
            let mut nodes = self.nodes.lock();
            let state = &mut nodes[node as usize];
            if state.life.is_some() {
                return;
            }
            state.lives += 1;
            let process = self.sim.process(&format!("node{node}"));
            process.set_blocking_ns(DISK_NS);
            self.weather.place(process.number(), Host::Node(node));
            state.life = Some(Life { process, engine: None, paused: false });
        }
        self.weather.lighten_host(Host::Node(node));
        self.happened(HappeningKind::Started, node);
    }

    /// Start the engine of a node's process; returns its port.
    ///
    /// # Errors
    /// `Unavailable` when the node has no process or has an engine already.
    pub fn start_engine(&self, node: u32, config: EngineConfig) -> Result<u16> {
        let (process, disks) = {
            let nodes = self.nodes.lock();
            let state = nodes.get(node as usize).ok_or_else(|| down(node))?;
            let life = state.life.as_ref().filter(|life| life.engine.is_none()).ok_or_else(|| down(node))?;
            (life.process.clone(), state.disks.clone())
        };
        let engine = process.enter(|| at_once(StorageEngine::start_here(config, Box::new(Mounted(disks)))))?;
        let port = engine.frame_port();
        if let Some(life) = &mut self.nodes.lock()[node as usize].life {
            life.engine = Some(Arc::new(engine));
        }
        Ok(port)
    }

    /// Do something with the engine of a node, as a part of its process.
    ///
    /// # Errors
    /// `Unavailable` when the node is down.
    pub fn with_engine<T>(&self, node: u32, run: impl FnOnce(&StorageEngine) -> T) -> Result<T> {
        let (process, engine) = {
            let nodes = self.nodes.lock();
            let life = nodes.get(node as usize).and_then(|n| n.life.as_ref()).ok_or_else(|| down(node))?;
            (life.process.clone(), life.engine.clone().ok_or_else(|| down(node))?)
        };
        Ok(process.enter(|| run(&engine)))
    }

    /// End the engine in good order; the process goes on without one.
    pub fn stop_engine(&self, node: u32) {
        let taken = {
            let mut nodes = self.nodes.lock();
            let state = nodes.get_mut(node as usize);
            state
                .and_then(|s| Some((s.life.as_mut()?, s.disks.clone())))
                .and_then(|(life, disks)| Some((life.process.clone(), life.engine.take()?, disks)))
        };
        if let Some((process, engine, disks)) = taken {
            process.enter(|| engine.stop());
            // Its directories are locked until it is gone: what it has under way ends before the next engine's begin.
            disks.all().iter().for_each(FaultDisk::kill);
        }
    }

    pub fn is_up(&self, node: u32) -> bool {
        self.nodes.lock()[node as usize].life.is_some()
    }

    pub fn is_paused(&self, node: u32) -> bool {
        self.nodes.lock()[node as usize].life.as_ref().is_some_and(|life| life.paused)
    }

    pub fn disks(&self, node: u32) -> Arc<NodeDisks> {
        self.nodes.lock()[node as usize].disks.clone()
    }

    /// End the process at once. With `power`, unsynced writes are lost or torn.
    pub fn crash(&self, node: u32, power: bool) {
        let (life, disks) = {
            let mut nodes = self.nodes.lock();
            let state = &mut nodes[node as usize];
            let Some(life) = state.life.take() else { return };
            (life, state.disks.clone())
        };
        if power {
            self.weather.darken(life.process.number());
        }
        // Dead tasks must not write: what they drop on their way out is not carried out any more.
        for disk in disks.all() {
            if power { disk.crash() } else { disk.kill() }
        }
        life.process.kill();
        life.process.enter(|| drop(life.engine));
        self.happened(HappeningKind::Crashed, node);
    }

    pub fn pause(&self, node: u32) {
        if let Some(life) = &mut self.nodes.lock()[node as usize].life
            && !life.paused
        {
            life.paused = true;
            life.process.pause();
            self.happened(HappeningKind::Paused, node);
        }
    }

    pub fn resume(&self, node: u32) {
        if let Some(life) = &mut self.nodes.lock()[node as usize].life
            && life.paused
        {
            life.paused = false;
            life.process.resume();
            self.happened(HappeningKind::Resumed, node);
        }
    }

    pub fn set_disk_ns(&self, node: u32, range: Option<Range<u64>>) {
        if let Some(life) = &self.nodes.lock()[node as usize].life {
            life.process.set_blocking_ns(range.unwrap_or(DISK_NS));
        }
    }
}

fn down(node: u32) -> Error {
    Error::new(Code::Unavailable, format!("node {node} of the simulation is down"))
}

/// The result of a future that waits for nothing.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    match future.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
        std::task::Poll::Ready(value) => value,
        std::task::Poll::Pending => panic!("a simulated engine starts without waiting"),
    }
}
