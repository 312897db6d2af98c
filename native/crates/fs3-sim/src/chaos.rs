//! What goes wrong, when, and for how long; all of it from the seed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fs3_io::fault::{Fault, FaultDisk};
use fs3_rt::sim::{Process, Simulator};
use fs3_rt::sleep;
use parking_lot::Mutex;

use crate::history::Loss;
use crate::load::Load;
use crate::network::{Host, Hosts, Weather};
use crate::nodes::Nodes;
use crate::options::Options;

/// Troubles that are remembered for a trace.
const STRUCK_MAX: usize = 100;
const MS: u64 = 1_000_000;
/// How long a crashed node stays away, a paused one stands still, a partition lasts: one of these, at most, at pace 1.
const SPANS_MS: [u64; 4] = [300, 3_000, 12_000, 40_000];

/// The faults of a world.
pub(crate) struct Chaos {
    sim: Simulator,
    options: Options,
    nodes: Arc<Nodes>,
    weather: Arc<Weather>,
    load: Arc<Load>,
    calm: AtomicBool,
    counts: Mutex<BTreeMap<&'static str, u64>>,
    /// Time and words of the last troubles.
    struck: Mutex<VecDeque<(u64, String)>>,
}

/// Something that goes wrong.
#[derive(Clone, Copy)]
enum Trouble {
    Crash,
    TotalCrash,
    Power,
    TotalPower,
    Pause,
    Partition,
    Deaf,
    SlowDisk,
    DiskError,
    Rot,
    ClientCrash,
}

impl Chaos {
    pub fn new(
        sim: Simulator,
        options: Options,
        nodes: Arc<Nodes>,
        weather: Arc<Weather>,
        load: Arc<Load>,
    ) -> Arc<Self> {
        let (calm, counts, struck) = (AtomicBool::new(false), Mutex::default(), Mutex::default());
        Arc::new(Self { sim, options, nodes, weather, load, calm, counts, struck })
    }

    /// Begin, in `process`.
    pub fn begin(self: &Arc<Self>, process: &Process) {
        let o = &self.options;
        let kinds = [
            (Trouble::Crash, o.crash_ms),
            (Trouble::TotalCrash, o.total_crash_ms),
            (Trouble::Power, o.power_ms),
            (Trouble::TotalPower, o.total_power_ms),
            (Trouble::Pause, o.pause_ms),
            (Trouble::Partition, o.partition_ms),
            (Trouble::Deaf, o.deaf_ms),
            (Trouble::SlowDisk, o.slow_disk_ms),
            (Trouble::DiskError, o.disk_error_ms),
            (Trouble::Rot, o.rot_ms),
            (Trouble::ClientCrash, o.client_crash_ms),
        ];
        for (trouble, period_ms) in kinds.into_iter().filter(|(_, period_ms)| *period_ms > 0) {
            let this = self.clone();
            drop(process.spawn(async move { this.repeat(trouble, period_ms).await }));
        }
    }

    /// Nothing goes wrong from now on, and everything is there again in a moment.
    pub fn heal(&self) {
        self.calm.store(true, Ordering::Relaxed);
        self.weather.heal();
        for node in 0..self.nodes.count() {
            // A disk that reported an error is used again by a new process only.
            self.nodes.crash(node, false);
            for disk in self.nodes.disks(node).all() {
                disk.restart();
            }
            self.nodes.start(node);
        }
    }

    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.counts.lock().clone()
    }

    fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    async fn repeat(self: Arc<Self>, trouble: Trouble, period_ms: u64) {
        loop {
            sleep(Duration::from_nanos(self.sim.below(2 * period_ms * MS))).await;
            if self.is_calm() {
                return;
            }
            self.strike(trouble).await;
        }
    }

    /// The last troubles: time and words.
    pub fn trace(&self) -> Vec<(u64, String)> {
        self.struck.lock().iter().cloned().collect()
    }

    fn tell(&self, words: String) {
        let mut struck = self.struck.lock();
        if struck.len() == STRUCK_MAX {
            struck.pop_front();
        }
        struck.push_back((self.sim.now_ns(), words));
    }

    fn count(&self, what: &'static str) {
        *self.counts.lock().entry(what).or_default() += 1;
    }

    fn node(&self) -> u32 {
        let count = u64::from(self.nodes.count());
        // Where bytes rot on node 0, one sound replica of every chain has to stay: those on nodes 1 and 3.
        if self.options.rot_ms > 0 { (2 * self.sim.below(2) % count) as u32 } else { self.sim.below(count) as u32 }
    }

    fn span(&self) -> Duration {
        let most_ms = SPANS_MS[self.sim.below(SPANS_MS.len() as u64) as usize];
        Duration::from_nanos(self.sim.below(most_ms * self.options.pace * MS))
    }

    async fn strike(&self, trouble: Trouble) {
        match trouble {
            Trouble::Crash => self.crash(vec![self.node()], false, "crashes").await,
            Trouble::Power => self.crash(vec![self.node()], true, "power losses").await,
            Trouble::TotalCrash => self.crash((0..self.nodes.count()).collect(), false, "total crashes").await,
            Trouble::TotalPower => self.crash((0..self.nodes.count()).collect(), true, "total power losses").await,
            Trouble::Pause => self.pause().await,
            Trouble::Partition => self.partition().await,
            Trouble::Deaf => self.deafen().await,
            Trouble::SlowDisk => self.slow_disk().await,
            Trouble::DiskError => self.disk_error().await,
            Trouble::Rot => self.rot(),
            Trouble::ClientCrash => {
                self.count("client crashes");
                self.load.start_client(self.sim.below(u64::from(self.options.clients)) as u32);
            }
        }
    }

    async fn crash(&self, nodes: Vec<u32>, power: bool, what: &'static str) {
        self.count(what);
        self.tell(format!("{what}: {nodes:?}"));
        // The disks of a dying process stop somewhere within what it is doing.
        for &node in &nodes {
            for disk in self.nodes.disks(node).all() {
                if self.sim.below(2) == 0 {
                    disk.inject(Fault::Halt, self.sim.below(6));
                }
            }
        }
        sleep(Duration::from_nanos(self.sim.below(20 * MS))).await;
        if power && !self.options.durable_writes {
            self.load.history.lock().lose(self.sim.now_ns(), Loss::Power);
        }
        for &node in &nodes {
            self.nodes.crash(node, power);
        }
        for node in nodes {
            sleep(self.span()).await;
            self.nodes.start(node);
        }
    }

    async fn pause(&self) {
        let node = self.node();
        if self.nodes.is_up(node) && !self.nodes.is_paused(node) {
            self.count("pauses");
            self.tell(format!("node {node} pauses"));
            self.nodes.pause(node);
            sleep(self.span()).await;
            self.nodes.resume(node);
        }
    }

    async fn partition(&self) {
        let node = Hosts::One(Host::Node(self.node()));
        let (from, to) = match self.sim.below(5) {
            0 => (node, Hosts::All),
            1 => (node, Hosts::Others),
            2 => (node, Hosts::Nodes),
            3 => (node, Hosts::One(Host::Node(self.sim.below(u64::from(self.nodes.count())) as u32))),
            _ if self.options.rot_ms > 0 => (node, Hosts::Nodes),
            _ => {
                let salt = self.sim.draw();
                (Hosts::Half { salt, upper: true }, Hosts::Half { salt, upper: false })
            }
        };
        let span = self.span();
        let until_ns = self.sim.now_ns() + span.as_nanos() as u64;
        let way = self.sim.below(4);
        if way != 0 {
            self.weather.cut(from, to, until_ns);
        }
        if way != 1 {
            self.weather.cut(to, from, until_ns);
        }
        self.count("partitions");
        self.tell(format!("partition of {from:?} and {to:?}, ways {way}, for {span:?}"));
        sleep(span).await;
    }

    /// A client does not hear a node, which hears the client.
    async fn deafen(&self) {
        let (node, client) = (self.node(), self.sim.below(u64::from(self.options.clients)) as u32);
        let span = self.span();
        self.count("deaf clients");
        self.tell(format!("client {client} does not hear node {node} for {span:?}"));
        let until_ns = self.sim.now_ns() + span.as_nanos() as u64;
        self.weather.cut(Hosts::One(Host::Node(node)), Hosts::One(Host::Client(client)), until_ns);
        sleep(span).await;
    }

    async fn slow_disk(&self) {
        let node = self.node();
        self.count("slow disks");
        let most_ms = [10, 200, 2_000][self.sim.below(3) as usize];
        self.nodes.set_disk_ns(node, Some(MS..most_ms * MS));
        sleep(self.span()).await;
        self.nodes.set_disk_ns(node, None);
    }

    /// A disk fails in one way, once; its target needs a new process after it.
    async fn disk_error(&self) {
        let node = self.node();
        let Some(disk) = self.some_disk(node) else { return };
        let fault = [Fault::Write, Fault::Sync, Fault::Read, Fault::Space][self.sim.below(4) as usize];
        self.count("disk errors");
        self.tell(format!("{fault:?} error of a disk of node {node}"));
        disk.inject(fault, self.sim.below(4));
        sleep(self.span()).await;
        disk.restart();
        self.nodes.crash(node, false);
        sleep(self.span()).await;
        self.nodes.start(node);
    }

    /// Change stored bytes behind the back of the store.
    fn rot(&self) {
        let Some(disk) = self.some_disk(0) else { return };
        match self.sim.below(4) {
            0 => {
                self.count("writes lost by a disk");
                return disk.inject(Fault::Lose, self.sim.below(3));
            }
            1 => {
                self.count("misdirected writes");
                return disk.inject(Fault::Misdirect, self.sim.below(3));
            }
            _ => {}
        }
        let names: Vec<String> = disk.names().into_iter().filter(|name| name.ends_with(".blk")).collect();
        if names.is_empty() {
            return;
        }
        let name = &names[self.sim.below(names.len() as u64) as usize];
        if let Some(offset) = disk.written_byte(name, self.sim.draw()) {
            self.count("flipped bits");
            self.tell(format!("bit flip in {name} at {offset}"));
            disk.flip(name, offset);
        }
    }

    fn some_disk(&self, node: u32) -> Option<FaultDisk> {
        let disks = self.nodes.disks(node).all();
        let at = self.sim.below(disks.len().max(1) as u64) as usize;
        disks.into_iter().nth(at)
    }
}
