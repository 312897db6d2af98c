//! A manager that never fails: heartbeats in, chains out.

use super::{Action, LEASE_NS, MS, NODES, World};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Serving,
    LastServing,
    Syncing,
    Offline,
}

#[derive(Clone, Debug)]
pub struct Chain {
    pub version: u64,
    pub targets: Vec<(usize, State)>,
}

impl Chain {
    pub fn state(&self, node: usize) -> State {
        self.targets.iter().find(|t| t.0 == node).map_or(State::Offline, |t| t.1)
    }
    pub fn in_state(&self, state: State) -> Vec<usize> {
        self.targets.iter().filter(|t| t.1 == state).map(|t| t.0).collect()
    }
    pub fn serving(&self) -> Vec<usize> {
        self.in_state(State::Serving)
    }
    pub fn syncing(&self) -> Vec<usize> {
        self.in_state(State::Syncing)
    }
}

pub struct Manager {
    pub chain: Chain,
    /// Every chain there was, the present one last.
    pub chains: Vec<Chain>,
    /// Life and time of the last heartbeat.
    heard: [(u64, u64); NODES],
    /// Life that serves or syncs.
    known_life: [u64; NODES],
    synced: [bool; NODES],
    /// Reported ONLINE: the node knows that the manager knows of its start.
    ready: [bool; NODES],
}

impl Manager {
    pub fn new() -> Self {
        let chain = Chain { version: 1, targets: (0..NODES).map(|n| (n, State::Serving)).collect() };
        Self {
            chains: vec![chain.clone()],
            chain,
            heard: [(1, 0); NODES],
            known_life: [1; NODES],
            synced: [false; NODES],
            ready: [true; NODES],
        }
    }

    pub fn all_serving(&self) -> bool {
        self.chain.serving().len() == NODES
    }
}

impl World {
    pub fn heartbeat(&mut self, node: usize) {
        if !self.nodes[node].up {
            return;
        }
        self.after(20 * MS, Action::Heartbeat { node });
        if self.nodes[node].partitioned {
            return;
        }
        let life = self.nodes[node].life;
        self.manager.heard[node] = (life, self.now);
        self.manager.ready[node] = self.nodes[node].ready;
        let sent_ns = self.now;
        let delay = 100_000 + self.rng.below(2 * MS);
        self.after(delay, Action::HeartbeatAccepted { node, life, sent_ns });
        // A heartbeat's answer carries newer routing.
        if self.nodes[node].chain_version() < self.manager.chain.version {
            let chain = self.manager.chain.clone();
            self.after(delay, Action::Routing { node, chain });
        }
    }

    pub fn manager_resync_done(&mut self, node: usize, chain_version: u64) {
        if self.manager.chain.version == chain_version && self.manager.chain.state(node) == State::Syncing {
            self.manager.synced[node] = true;
        }
    }

    pub fn manager_tick(&mut self) {
        self.after(10 * MS, Action::ManagerTick);
        let m = &mut self.manager;
        let alive: Vec<bool> = (0..NODES)
            .map(|n| self.now.saturating_sub(m.heard[n].1) < LEASE_NS && m.heard[n].0 == m.known_life[n])
            .collect();
        let restarted: Vec<bool> = (0..NODES).map(|n| m.heard[n].0 != m.known_life[n]).collect();
        let old = m.chain.targets.clone();
        let survivor = old.iter().any(|t| t.1 == State::Serving && alive[t.0]);
        // One at a time: two that synced side by side may differ in an update that is in flight.
        let mut promoted = false;
        let mut targets: Vec<(usize, State)> = Vec::new();
        for &(n, state) in &old {
            let next = match state {
                State::Serving if alive[n] => State::Serving,
                State::Serving if survivor => State::Offline,
                State::Serving => State::LastServing,
                State::Syncing if alive[n] && m.synced[n] && !promoted => {
                    promoted = true;
                    State::Serving
                }
                State::Syncing if alive[n] && survivor => State::Syncing,
                State::Syncing => State::Offline,
                State::Offline if alive[n] && m.ready[n] && survivor => State::Syncing,
                other => other,
            };
            targets.push((n, next));
        }
        // The whole set that served last returns together.
        let last: Vec<usize> = targets.iter().filter(|t| t.1 == State::LastServing).map(|t| t.0).collect();
        let settled = old.iter().filter(|t| t.1 == State::LastServing).count() == last.len();
        if !last.is_empty() && settled && last.iter().all(|n| alive[*n] && m.ready[*n]) {
            for t in targets.iter_mut().filter(|t| t.1 == State::LastServing) {
                t.1 = State::Serving;
            }
        }
        for (n, restarted) in restarted.into_iter().enumerate() {
            let state = targets.iter().find(|t| t.0 == n).expect("every node has a place").1;
            if restarted && matches!(state, State::Offline | State::LastServing) {
                m.known_life[n] = m.heard[n].0;
            }
        }
        targets.sort_by_key(|t| match t.1 {
            State::Serving => 0,
            State::LastServing => 1,
            State::Syncing => 2,
            State::Offline => 3,
        });
        if targets != m.chain.targets {
            m.chain = Chain { version: m.chain.version + 1, targets };
            m.chains.push(m.chain.clone());
            m.synced = [false; NODES];
            for node in 0..NODES {
                let delay = self.rng.below(30 * MS);
                if !self.nodes[node].partitioned {
                    let chain = self.manager.chain.clone();
                    self.after(delay, Action::Routing { node, chain });
                }
            }
        }
    }
}
