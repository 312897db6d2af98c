//! A scripted cluster manager that never fails, for worlds without the real one: heartbeats in, leases and chains out.

use std::collections::BTreeMap;

use fs3_proto::v1::{
    Chain, ChainTable, ChainTarget, EngineStatus, LocalState, Node, NodeStatus, PublicState, Routing, Target,
};
use fs3_sim::{HappeningKind, World};
use fs3_storage::{EngineConfig, Healing};
use prost::Message;

pub const CLUSTER: &str = "simulated";
pub const TOKEN: &str = "simulated";
const MS: u64 = 1_000_000;
const TICK_NS: u64 = 50 * MS;
const HEARTBEAT_NS: u64 = 500 * MS;
const LEASE_NS: u64 = 4_000 * MS;

/// What a node is as the manager and its own control plane see it.
#[derive(Default)]
struct Member {
    /// Number of its process, 0: none.
    life: u64,
    paused: bool,
    next_heartbeat_ns: u64,
    /// Life and arrival of the last heartbeat.
    heard_life: u64,
    heard_ns: u64,
    /// Life whose targets may take part.
    known_life: u64,
    reports: BTreeMap<u64, (LocalState, u64)>,
}

enum Mail {
    Heartbeat { node: usize, life: u64, sent_ns: u64, status: Box<EngineStatus> },
    Accepted { node: usize, life: u64, sent_ns: u64, routing: Option<Vec<u8>> },
}

pub struct Manager {
    pub world: World,
    pub routing: Routing,
    members: Vec<Member>,
    mail: BTreeMap<(u64, u64), Mail>,
    posted: u64,
    lives: u64,
}

impl Manager {
    /// A cluster of one chain per node, each of three replicas (or as many as there are nodes).
    pub fn new(world: World) -> Self {
        let nodes = world.options().nodes as usize;
        let replicas = nodes.min(3);
        let id = |chain: usize, at: usize| ((((chain + at) % nodes) as u64) + 1) * 1000 + chain as u64;
        let mut routing = Routing { version: 1, cluster_id: CLUSTER.into(), lease_ms: 4000, ..Routing::default() };
        for node in 0..nodes {
            routing.nodes.push(Node {
                node_id: node as u32 + 1,
                uuid: vec![node as u8 + 1; 16].into(),
                role: "storage".into(),
                host: host(node),
                frame_port: 7000,
                status: NodeStatus::Connected as i32,
                ..Node::default()
            });
        }
        for chain in 0..nodes {
            let targets: Vec<u64> = (0..replicas).map(|at| id(chain, at)).collect();
            for &target_id in &targets {
                let node = target_id / 1000;
                routing.targets.push(Target {
                    target_id,
                    node_id: node as u32,
                    disk_uuid: vec![node as u8; 16].into(),
                    chain_id: chain as u32 + 1,
                    ..Target::default()
                });
            }
            let serving = |target_id| ChainTarget { target_id, state: PublicState::Serving as i32 };
            let targets = targets.into_iter().map(serving).collect();
            routing.chains.push(Chain { chain_id: chain as u32 + 1, version: 1, targets });
        }
        let chain_ids = (1..=nodes as u32).collect();
        routing.tables.push(ChainTable { table_id: 1, table_version: 1, chain_ids, replicas: replicas as u32 });
        let members = (0..nodes).map(|_| Member { known_life: u64::MAX, ..Member::default() }).collect();
        let mut this = Self { world, routing, members, mail: BTreeMap::new(), posted: 0, lives: 0 };
        this.publish();
        this
    }

    pub fn run_until(&mut self, until_ns: u64) {
        while self.world.now_ns() < until_ns && self.world.violation().is_empty() {
            let now_ns = self.world.now_ns();
            self.take_happenings();
            self.send_heartbeats(now_ns);
            while let Some(entry) = self.mail.first_entry().filter(|entry| entry.key().0 <= now_ns) {
                let mail = entry.remove();
                self.receive(mail, now_ns);
            }
            self.judge(now_ns);
            self.world.run_until(now_ns + TICK_NS);
        }
    }

    /// Heal, let the load end, and run the checks. What is wrong in words; empty: nothing.
    pub fn finish(&mut self) -> String {
        self.world.heal();
        // Whatever was begun under faults ends, and new work succeeds.
        self.run_until(self.world.now_ns() + 60_000 * MS);
        self.world.set_load(false);
        for _ in 0..10 {
            self.run_until(self.world.now_ns() + 30_000 * MS);
            let serves = |t: &ChainTarget| t.state() == PublicState::Serving;
            let all = self.routing.chains.iter().all(|c| c.targets.iter().all(serves));
            if self.world.is_quiescent() && all {
                break;
            }
        }
        if !self.world.violation().is_empty() {
            return self.world.violation();
        }
        if !self.world.is_quiescent() {
            return "operations do not end after healing".into();
        }
        // Leases that last through the checks, which run without this manager.
        for node in 0..self.members.len() {
            let _ = self.world.with_engine(node as u32, |e| e.renew_lease(u64::MAX / 2));
        }
        self.world.check()
    }

    fn take_happenings(&mut self) {
        for happening in self.world.happenings() {
            let node = happening.node as usize;
            let member = &mut self.members[node];
            match happening.kind {
                HappeningKind::Crashed => member.life = 0,
                HappeningKind::Paused => member.paused = true,
                HappeningKind::Resumed => member.paused = false,
                HappeningKind::Started => {
                    self.lives += 1;
                    (member.life, member.paused) = (self.lives, false);
                    // The first process of a node is known from the start.
                    if member.known_life == u64::MAX {
                        member.known_life = self.lives;
                        member.heard_life = self.lives;
                    }
                    member.next_heartbeat_ns = self.world.now_ns();
                    let _ = self.world.start_engine(node as u32, config(node));
                    let routing = self.routing.encode_to_vec();
                    // What a node learns when it registers.
                    let _ = self.world.with_engine(node as u32, |e| e.apply_routing(&routing));
                }
            }
        }
    }

    fn post(&mut self, delay_ns: u64, mail: Mail) {
        self.posted += 1;
        self.mail.insert((self.world.now_ns() + delay_ns, self.posted), mail);
    }

    fn send_heartbeats(&mut self, now_ns: u64) {
        for node in 0..self.members.len() {
            let member = &mut self.members[node];
            if member.life == 0 || member.paused || member.next_heartbeat_ns > now_ns {
                continue;
            }
            member.next_heartbeat_ns = now_ns + HEARTBEAT_NS;
            let life = member.life;
            let Ok(status) = self.world.with_engine(node as u32, |e| e.status()) else { continue };
            for delay_ns in self.world.delays(&format!("node{node}"), "mgmtd0") {
                let status = Box::new(status.clone());
                self.post(delay_ns, Mail::Heartbeat { node, life, sent_ns: now_ns, status });
            }
        }
    }

    fn receive(&mut self, mail: Mail, now_ns: u64) {
        match mail {
            Mail::Heartbeat { node, life, sent_ns, status } => {
                let member = &mut self.members[node];
                if life < member.heard_life {
                    return;
                }
                let state = |t: &fs3_proto::v1::engine_status::TargetStatus| {
                    (t.target_id, (LocalState::try_from(t.local_state as i32).unwrap_or_default(), t.chain_version))
                };
                member.reports = status.targets.iter().map(state).collect();
                (member.heard_life, member.heard_ns) = (life, now_ns);
                let newer = status.routing_version < self.routing.version;
                let routing = newer.then(|| self.routing.encode_to_vec());
                for delay_ns in self.world.delays("mgmtd0", &format!("node{node}")) {
                    self.post(delay_ns, Mail::Accepted { node, life, sent_ns, routing: routing.clone() });
                }
            }
            Mail::Accepted { node, life, sent_ns, routing } => {
                let member = &self.members[node];
                if member.life != life {
                    return;
                }
                if member.paused {
                    return self.post(TICK_NS, Mail::Accepted { node, life, sent_ns, routing });
                }
                let _ = self.world.with_engine(node as u32, |engine| {
                    engine.renew_lease(sent_ns + LEASE_NS / 2);
                    if let Some(routing) = routing {
                        engine.apply_routing(&routing).expect("the routing is one");
                    }
                });
            }
        }
    }

    fn judge(&mut self, now_ns: u64) {
        let node_of = |target_id: u64| target_id as usize / 1000 - 1;
        let mut changed = false;
        for chain in &mut self.routing.chains {
            let members = &self.members;
            let alive = |id: u64| {
                let m = &members[node_of(id)];
                m.heard_life == m.known_life && now_ns < m.heard_ns + LEASE_NS
            };
            let report = |id: u64| members[node_of(id)].reports.get(&id).copied().unwrap_or_default();
            let usable = |id: u64| alive(id) && report(id).0 != LocalState::Offline;
            let next = next_chain(chain, alive, usable, report);
            if next != chain.targets {
                chain.targets = next;
                chain.version += 1;
                changed = true;
            }
        }
        for (node, member) in self.members.iter_mut().enumerate() {
            // A process that was started anew counts once none of its node's targets takes part any more.
            let takes_part = |t: &&ChainTarget| matches!(t.state(), PublicState::Serving | PublicState::Syncing);
            let mine = self.routing.chains.iter().flat_map(|c| &c.targets).filter(|t| node_of(t.target_id) == node);
            if member.heard_life != member.known_life && mine.filter(takes_part).count() == 0 {
                member.known_life = member.heard_life;
                member.reports.clear();
            }
        }
        if changed {
            self.routing.version += 1;
            self.publish();
        }
    }

    fn publish(&mut self) {
        self.world.publish_routing(&self.routing.encode_to_vec()).expect("the routing is one");
        // Nodes learn it with the answer to a heartbeat.
        for member in &mut self.members {
            member.next_heartbeat_ns = member.next_heartbeat_ns.min(self.world.now_ns() + 100 * MS);
        }
    }
}

/// The states of a chain's targets after what is known now.
fn next_chain(
    chain: &Chain,
    alive: impl Fn(u64) -> bool,
    usable: impl Fn(u64) -> bool,
    report: impl Fn(u64) -> (LocalState, u64),
) -> Vec<ChainTarget> {
    use PublicState::{Lastsrv, Offline, Serving, Syncing};
    let survivor = chain.targets.iter().any(|t| t.state() == Serving && usable(t.target_id));
    let mut promoted = false;
    let mut next: Vec<(u64, PublicState)> = Vec::new();
    for target in &chain.targets {
        let (id, state) = (target.target_id, target.state());
        let state = match state {
            Serving if usable(id) => Serving,
            Serving if survivor => Offline,
            Serving => Lastsrv,
            // One at a time: two that synced side by side may differ in an update that is in flight.
            Syncing if usable(id) && report(id) == (LocalState::Uptodate, chain.version) && !promoted => {
                promoted = true;
                Serving
            }
            Syncing if usable(id) && survivor => Syncing,
            Syncing => Offline,
            Offline if alive(id) && report(id).0 == LocalState::Online && survivor => Syncing,
            other => other,
        };
        next.push((id, state));
    }
    // All of those that served last have all that was acknowledged; the one furthest down the chain serves first.
    if !survivor && chain.targets.iter().all(|t| t.state() != Serving) {
        let back = |(id, state): &&mut (u64, PublicState)| {
            *state == Lastsrv && alive(*id) && report(*id).0 == LocalState::Online
        };
        if let Some(first) = next.iter_mut().rfind(back) {
            first.1 = Serving;
            next.iter_mut().filter(|t| t.1 == Lastsrv).for_each(|t| t.1 = Offline);
        }
    }
    next.sort_by_key(|(_, state)| match state {
        Serving => 0,
        Lastsrv => 1,
        Syncing => 2,
        _ => 3,
    });
    next.into_iter().map(|(target_id, state)| ChainTarget { target_id, state: state as i32 }).collect()
}

fn host(node: usize) -> String {
    format!("10.0.0.{}", node + 1)
}

fn config(node: usize) -> EngineConfig {
    EngineConfig {
        node_id: node as u32 + 1,
        node_uuid: [node as u8 + 1; 16],
        cluster_id: CLUSTER.into(),
        token: TOKEN.into(),
        host: host(node),
        frame_port: 7000,
        disks: Vec::new(),
        read_cache_bytes: 1 << 20,
        kv_memory_bytes: 16 << 20,
        durable_writes: false,
        healing: Healing::default(),
        transport: fs3_net::Transport::tcp(),
    }
}
