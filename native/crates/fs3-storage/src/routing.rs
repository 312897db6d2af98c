//! The parts of the routing that a storage node looks at.

use std::collections::HashMap;

use fs3_chain::{Role, RoutingView, Successor};
use fs3_core::TargetId;
use fs3_proto::v1::{Chain, PublicState, Routing};

/// Routing with the look-ups of the data path.
#[derive(Default)]
pub(crate) struct RoutingState {
    pub version: u64,
    chains: HashMap<u32, Chain>,
    address_of: HashMap<u64, String>,
    /// Targets assigned to this node: (target, chain, disk uuid).
    pub own: Vec<(u64, u32, Vec<u8>)>,
}

impl RoutingState {
    pub fn new(routing: Routing, node_id: u32) -> Self {
        let hosts: HashMap<u32, String> =
            routing.nodes.iter().map(|n| (n.node_id, format!("{}:{}", n.host, n.frame_port))).collect();
        let address = |t: &fs3_proto::v1::Target| Some((t.target_id, hosts.get(&t.node_id)?.clone()));
        let mine = routing.targets.iter().filter(|t| t.node_id == node_id && t.chain_id != 0);
        Self {
            version: routing.version,
            address_of: routing.targets.iter().filter_map(address).collect(),
            own: mine.map(|t| (t.target_id, t.chain_id, t.disk_uuid.to_vec())).collect(),
            chains: routing.chains.into_iter().map(|c| (c.chain_id, c)).collect(),
        }
    }

    pub fn chain(&self, chain_id: u32) -> Option<&Chain> {
        self.chains.get(&chain_id)
    }

    pub fn address(&self, target: TargetId) -> Option<&str> {
        self.address_of.get(&target.0).map(String::as_str)
    }

    /// Whether a target lives there.
    pub fn has_address(&self, address: &str) -> bool {
        self.address_of.values().any(|a| a == address)
    }

    pub fn state_of(&self, chain_id: u32, target: u64) -> PublicState {
        let chain = self.chain(chain_id);
        let found = chain.and_then(|c| c.targets.iter().find(|t| t.target_id == target));
        found.map_or(PublicState::Unspecified, |t| t.state())
    }

    pub fn in_state(&self, chain_id: u32, state: PublicState) -> Vec<TargetId> {
        let targets = self.chain(chain_id).map_or(&[][..], |c| &c.targets);
        targets.iter().filter(|t| t.state() == state).map(|t| TargetId(t.target_id)).collect()
    }

    /// The place of a target in its chain. `usable`: its life is known to the manager.
    pub fn view(&self, chain_id: u32, target: u64, usable: bool) -> RoutingView {
        let Some(chain) = self.chain(chain_id) else { return RoutingView::default() };
        let serving = self.in_state(chain_id, PublicState::Serving);
        let at = serving.iter().position(|t| t.0 == target);
        let role = match self.state_of(chain_id, target) {
            PublicState::Serving if usable => Role::Serving,
            PublicState::Syncing if usable => Role::Syncing,
            _ => Role::Idle,
        };
        let successors = match at {
            Some(at) if at + 1 < serving.len() => vec![Successor { target: serving[at + 1], syncing: false }],
            Some(_) => {
                let syncing = self.in_state(chain_id, PublicState::Syncing);
                syncing.into_iter().map(|target| Successor { target, syncing: true }).collect()
            }
            None => Vec::new(),
        };
        RoutingView { chain_version: chain.version, role, head: at == Some(0), successors }
    }
}
