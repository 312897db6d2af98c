//! The simulated world. Everything is driven by one queue of timed actions and one random stream of the seed.

mod check;
mod client;
mod manager;
mod node;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use fs3_chain::{Kind, OpId, Origin, Outcome, Refusal, RequestId, Writer, WriterRecord};
use fs3_core::{ChunkId, Code, InodeId, TargetId};

pub use node::Node;

pub const MS: u64 = 1_000_000;
pub const NODES: usize = 3;
pub const CHUNKS: u32 = 3;
pub const CLIENTS: usize = 4;
/// Silence after which the manager gives a node up; a node serves half of it after its last heartbeat.
pub const LEASE_NS: u64 = 200 * MS;
const FAULTS_END_NS: u64 = 6_000 * MS;
const HEALED_NS_MAX: u64 = 60_000 * MS;

#[derive(Clone, Copy, Default)]
pub struct Options {
    pub drop_percent: u64,
    pub duplicate_percent: u64,
    pub slow_percent: u64,
    pub crashes: bool,
    pub partitions: bool,
    pub removes: bool,
    pub total_crash: bool,
    /// How often the bytes that an append builds on are found rotten.
    pub rot_percent: u64,
    /// When a node crashes and is back soon, the two others do not hear each other for a while.
    pub cuts: bool,
    /// How often a disk takes its time.
    pub slow_disk_percent: u64,
}

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// A chunk's content: the ids of the writes it includes, in order.
pub type Content = Vec<u64>;

/// What an update carries; the simulation's bytes.
#[derive(Clone, Debug)]
pub enum Payload {
    Append(u64),
    Whole(Content, Vec<WriterRecord>),
    Remove,
    Mirror,
}

/// An update on its way to a replica.
#[derive(Clone, Debug)]
pub struct Message {
    pub chunk: ChunkId,
    pub chain_version: u64,
    pub payload: Payload,
    pub writer: Option<Writer>,
    /// Version, base, replace; `None` from a client.
    pub forward: Option<(u64, u64, bool)>,
}

impl Message {
    pub fn kind(&self) -> Kind {
        match self.payload {
            Payload::Append(_) | Payload::Whole(..) => Kind::Write,
            Payload::Remove => Kind::Remove,
            Payload::Mirror => Kind::Mirror,
        }
    }
}

/// Who is told the answer of a request.
#[derive(Clone, Copy, Debug)]
pub enum Asker {
    Client { client: usize, call: u64 },
    Predecessor { node: usize, life: u64, op: OpId, chunk: ChunkId, attempt: u32 },
    Nobody,
}

pub enum Action {
    Deliver { to: usize, message: Message, asker: Asker },
    DeliverRead { to: usize, chunk: ChunkId, chain_version: u64, client: usize, call: u64 },
    Answer { asker: Asker, from: usize, result: Result<Outcome, Refusal> },
    ReadAnswer { client: usize, call: u64, result: Result<(u64, Content), Code> },
    Timeout { asker: Asker, from: usize },
    StoreDone { node: usize, life: u64, done: node::StoreDone },
    SendForward { node: usize, life: u64, forward: node::Forward },
    Expire { node: usize, life: u64, id: RequestId, chunk: ChunkId },
    Heartbeat { node: usize },
    HeartbeatAccepted { node: usize, life: u64, sent_ns: u64 },
    Routing { node: usize, chain: manager::Chain },
    ManagerTick,
    ClientTick { client: usize },
    Resync { node: usize, life: u64, chain_version: u64 },
    Chaos,
    Restart { node: usize },
    HealPartition { node: usize },
    Heal { node: usize, life: u64, chain_version: u64, serving: Vec<usize> },
}

pub struct World {
    pub now: u64,
    pub rng: Rng,
    pub options: Options,
    pub nodes: Vec<Node>,
    pub clients: Vec<client::Client>,
    pub manager: manager::Manager,
    pub history: check::History,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    actions: BTreeMap<u64, Action>,
    next_action: u64,
    pub healing: bool,
    /// Bytes were found rotten in this run.
    rots: bool,
    /// Until then the two that do not meet do not hear each other.
    cut: (u64, [usize; 2]),
    /// Print every event and effect (FS3_CHAIN_TRACE).
    pub trace: bool,
}

pub fn chunk_id(index: u32) -> ChunkId {
    ChunkId::file(InodeId(7), index)
}

pub fn target(node: usize) -> TargetId {
    TargetId(node as u64 + 1)
}

impl World {
    pub fn new(seed: u64, options: Options) -> Self {
        let mut world = Self {
            now: 0,
            rng: Rng(seed),
            options,
            nodes: (0..NODES).map(Node::new).collect(),
            clients: (0..CLIENTS).map(client::Client::new).collect(),
            manager: manager::Manager::new(),
            history: check::History { total_crash: options.total_crash, ..Default::default() },
            queue: BinaryHeap::new(),
            actions: BTreeMap::new(),
            next_action: 0,
            healing: false,
            rots: options.rot_percent > 0,
            cut: (0, [0, 0]),
            trace: std::env::var_os("FS3_CHAIN_TRACE").is_some(),
        };
        for node in 0..NODES {
            world.after(0, Action::Routing { node, chain: world.manager.chain.clone() });
            world.after(0, Action::Heartbeat { node });
        }
        for client in 0..CLIENTS {
            world.after(MS, Action::ClientTick { client });
        }
        world.after(10 * MS, Action::ManagerTick);
        world.after(300 * MS, Action::Chaos);
        world
    }

    pub fn after(&mut self, delay: u64, action: Action) {
        self.next_action += 1;
        self.queue.push(Reverse((self.now + delay, self.next_action)));
        self.actions.insert(self.next_action, action);
    }

    /// Run to the end; returns the number of acknowledged writes.
    pub fn run(mut self) -> usize {
        while let Some(Reverse((at, number))) = self.queue.pop() {
            self.now = at;
            if at > FAULTS_END_NS && !self.healing {
                self.heal();
            }
            if self.healing && self.is_settled() {
                self.check_end();
                return self.history.acked();
            }
            assert!(at < HEALED_NS_MAX, "liveness: the chain did not settle: {}", self.describe());
            let action = self.actions.remove(&number).expect("every queued action exists");
            self.act(action);
        }
        unreachable!("heartbeats never end");
    }

    fn heal(&mut self) {
        self.healing = true;
        self.cut.0 = 0;
        self.options = Options { removes: self.options.removes, ..Options::default() };
        for node in 0..NODES {
            self.nodes[node].partitioned = false;
            if !self.nodes[node].up {
                self.restart(node);
            }
        }
    }

    fn is_settled(&self) -> bool {
        self.manager.all_serving()
            && self.clients.iter().all(client::Client::is_idle)
            && self.nodes.iter().all(|n| n.is_quiet() && n.chain_version() == self.manager.chain.version)
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Deliver { to, message, asker } => self.deliver(to, message, asker),
            Action::DeliverRead { to, chunk, chain_version, client, call } => {
                self.deliver_read(to, chunk, chain_version, client, call);
            }
            Action::Answer { asker, from, result } => self.answered(asker, from, result),
            Action::ReadAnswer { client, call, result } => self.client_read_done(client, call, result),
            Action::Timeout { asker, from } => {
                self.answered(asker, from, Err(Refusal { code: Code::Unavailable, maybe_applied: true }));
            }
            Action::StoreDone { node, life, done } => self.store_done(node, life, done),
            Action::SendForward { node, life, forward } => self.send_forward(node, life, forward),
            Action::Expire { node, life, id, chunk } => self.expire(node, life, id, chunk),
            Action::Heartbeat { node } => self.heartbeat(node),
            Action::HeartbeatAccepted { node, life, sent_ns } => self.heartbeat_accepted(node, life, sent_ns),
            Action::Routing { node, chain } => self.reroute(node, chain),
            Action::ManagerTick => self.manager_tick(),
            Action::ClientTick { client } => self.client_tick(client),
            Action::Resync { node, life, chain_version } => self.resync(node, life, chain_version),
            Action::Chaos => self.chaos(),
            Action::Restart { node } => self.restart(node),
            Action::HealPartition { node } => self.nodes[node].partitioned = false,
            Action::Heal { node, life, chain_version, serving } => {
                let n = &self.nodes[node];
                if n.up && n.life == life && n.chain_version() == chain_version {
                    self.heal_replicas(node, chain_version, &serving);
                }
            }
        }
    }

    fn chaos(&mut self) {
        if self.healing {
            return;
        }
        let next = (100 + self.rng.below(600)) * MS;
        self.after(next, Action::Chaos);
        let node = self.rng.below(NODES as u64) as usize;
        if self.options.rot_percent > 0 && self.nodes[node].up {
            let (chain_version, payload) = (self.nodes[node].chain_version(), Payload::Mirror);
            for index in 0..CHUNKS {
                let chunk = chunk_id(index);
                let message = Message { chunk, chain_version, payload: payload.clone(), writer: None, forward: None };
                self.ask(node, message, Origin::Repair, Asker::Nobody);
            }
        }
        if self.options.total_crash && self.rng.chance(25) {
            for node in 0..NODES {
                self.crash(node);
                let back = (1 + self.rng.below(400)) * MS;
                self.after(back, Action::Restart { node });
            }
            return;
        }
        // At most one node is missing at a time, so that a serving one is left.
        let whole = self.manager.all_serving() && self.nodes.iter().all(|n| n.up && !n.partitioned);
        if self.options.crashes && whole && self.rng.chance(60) {
            self.crash(node);
            let mut back = (1 + self.rng.below(600)) * MS;
            if self.options.cuts {
                back %= 100 * MS;
                let until = self.now + (200 + self.rng.below(600)) * MS;
                self.cut = (until, [(node + 1) % NODES, (node + 2) % NODES]);
            }
            self.after(back, Action::Restart { node });
        } else if self.options.partitions && whole && self.rng.chance(60) {
            self.nodes[node].partitioned = true;
            self.nodes[node].visible = self.rng.chance(50);
            let back = (1 + self.rng.below(800)) * MS;
            self.after(back, Action::HealPartition { node });
        }
    }

    /// Message delay; `None`: lost.
    pub fn delay(&mut self) -> Option<u64> {
        if self.rng.chance(self.options.drop_percent) {
            return None;
        }
        let slow = self.rng.chance(self.options.slow_percent);
        let ns = if slow { 20 * MS + self.rng.below(300 * MS) } else { 100_000 + self.rng.below(3 * MS) };
        Some(ns)
    }

    pub fn send(&mut self, from_node: Option<usize>, to: usize, message: &Message, asker: Asker) {
        let copies = 1 + u64::from(self.rng.chance(self.options.duplicate_percent));
        let cut = match from_node {
            Some(from) => self.nodes[to].partitioned || self.nodes[from].partitioned || self.is_cut(from, to),
            None => self.nodes[to].is_hidden(),
        };
        for _ in 0..copies {
            if let Some(delay) = self.delay().filter(|_| !cut) {
                self.after(delay, Action::Deliver { to, message: message.clone(), asker });
            }
        }
    }

    pub fn is_cut(&self, from: usize, to: usize) -> bool {
        let (until, two) = self.cut;
        self.now < until && two.contains(&from) && two.contains(&to)
    }

    fn describe(&self) -> String {
        let nodes: Vec<String> = self.nodes.iter().map(Node::describe).collect();
        format!("{:?} clients {:?} nodes {nodes:?}", self.manager.chain, self.clients)
    }
}
