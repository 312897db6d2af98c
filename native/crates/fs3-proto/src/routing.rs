//! What became of a routing: deltas between its versions. `fs3/core/routing.py` says what they promise;
//! `tests/golden/routing.json` holds both to each other.

use std::collections::BTreeMap;

use crate::v1::{Chain, ChainTable, Disk, Node, Routing, RoutingCounts, RoutingDelta, RoutingKnown, Target};

/// Newest form of a delta that is known here.
pub const DELTA_FORMAT: u32 = 1;

/// A delta that does not lead from the routing at hand to what it should. The whole has to be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Misfit;

/// An item of one of the routing's lists.
trait Item: Clone + PartialEq {
    type Id: Ord + Clone;
    fn id(&self) -> Self::Id;
}

macro_rules! item {
    ($item:ty, $id:ty, $get:expr) => {
        impl Item for $item {
            type Id = $id;
            fn id(&self) -> $id {
                let get: fn(&$item) -> $id = $get;
                get(self)
            }
        }
    };
}
item!(Node, u32, |n| n.node_id);
item!(Disk, bytes::Bytes, |d| d.uuid.clone());
item!(Target, u64, |t| t.target_id);
item!(Chain, u32, |c| c.chain_id);
item!(ChainTable, (u32, u32), |t| (t.table_id, t.table_version));

/// What a request says for an answer to it by delta. An empty routing asks for the whole.
pub fn known(routing: &Routing) -> RoutingKnown {
    RoutingKnown { version: routing.version, history: routing.history, delta_format: DELTA_FORMAT }
}

/// What a routing has to have to be taken for the right one.
pub fn counts(routing: &Routing) -> RoutingCounts {
    RoutingCounts {
        nodes: routing.nodes.len() as u32,
        disks: routing.disks.len() as u32,
        targets: routing.targets.len() as u32,
        chains: routing.chains.len() as u32,
        tables: routing.tables.len() as u32,
        chain_versions: routing.chains.iter().fold(0, |sum, c| sum.wrapping_add(c.version)),
    }
}

/// Say how `old` became `new`, the version that followed it in the same history.
pub fn diff(old: &Routing, new: &Routing) -> RoutingDelta {
    let (nodes, removed_nodes) = changes(&old.nodes, &new.nodes);
    let (disks, removed_disks) = changes(&old.disks, &new.disks);
    let (targets, removed_targets) = changes(&old.targets, &new.targets);
    let (chains, removed_chains) = changes(&old.chains, &new.chains);
    let (tables, removed_tables) = changes(&old.tables, &new.tables);
    let named = |(table_id, table_version)| ChainTable { table_id, table_version, ..ChainTable::default() };
    let changed = Routing {
        version: new.version,
        cluster_id: new.cluster_id.clone(),
        nodes,
        disks,
        targets,
        chains,
        tables,
        lease_ms: new.lease_ms,
        settings: new.settings.clone(),
        history: new.history,
    };
    RoutingDelta {
        from_version: old.version,
        changed: Some(changed),
        removed_nodes,
        removed_disks,
        removed_targets,
        removed_chains,
        removed_tables: removed_tables.into_iter().map(named).collect(),
        counts: Some(counts(new)),
    }
}

/// Make the routing that `delta` leads to from `routing`.
///
/// # Errors
/// [`Misfit`] when the delta is to another one, or what comes out is not what it should be.
pub fn apply(routing: &Routing, delta: RoutingDelta) -> Result<Routing, Misfit> {
    let mut after = delta.changed.ok_or(Misfit)?;
    let base = (routing.history, routing.version);
    if base != (after.history, delta.from_version) || after.version <= routing.version {
        return Err(Misfit);
    }
    let removed_tables: Vec<_> = delta.removed_tables.iter().map(Item::id).collect();
    after.nodes = merged(&routing.nodes, after.nodes, &delta.removed_nodes);
    after.disks = merged(&routing.disks, after.disks, &delta.removed_disks);
    after.targets = merged(&routing.targets, after.targets, &delta.removed_targets);
    after.chains = merged(&routing.chains, after.chains, &delta.removed_chains);
    after.tables = merged(&routing.tables, after.tables, &removed_tables);
    if delta.counts == Some(counts(&after)) { Ok(after) } else { Err(Misfit) }
}

/// What is new or other in a list, and whose items are gone.
fn changes<T: Item>(old: &[T], new: &[T]) -> (Vec<T>, Vec<T::Id>) {
    let mut before: BTreeMap<_, _> = old.iter().map(|item| (item.id(), item)).collect();
    let changed = new.iter().filter(|item| before.remove(&item.id()) != Some(*item)).cloned().collect();
    (changed, before.into_keys().collect())
}

fn merged<T: Item>(old: &[T], changed: Vec<T>, removed: &[T::Id]) -> Vec<T> {
    if changed.is_empty() && removed.is_empty() {
        return old.to_vec();
    }
    let mut items: BTreeMap<_, _> = old.iter().map(|item| (item.id(), item.clone())).collect();
    items.extend(changed.into_iter().map(|item| (item.id(), item)));
    for id in removed {
        items.remove(id);
    }
    items.into_values().collect()
}
