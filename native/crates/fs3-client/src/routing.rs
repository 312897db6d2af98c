//! The routing as the data path reads it: indexed, immutable, one value per version.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use fs3_core::{ChunkId, Code, Error, Result};
use fs3_proto::v1::{ChainTable, Layout, PublicState, Routing};

/// One replica that serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Replica {
    pub target_id: u64,
    pub node_id: u32,
    /// Names the disk it is on.
    pub disk: u64,
}

/// A chain as a client needs it.
#[derive(Clone, Debug, Default)]
pub(crate) struct ChainView {
    pub id: u32,
    pub version: u64,
    /// Head first. Writes go to the head, reads to any.
    pub serving: Vec<Replica>,
}

type IdMap<T> = HashMap<u32, T, BuildHasherDefault<IdHasher>>;

/// Ids are given out by the manager, one after another: multiplying spreads them well enough, and every chunk
/// that is read looks one up.
#[derive(Default)]
pub(crate) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("only u32 keys are hashed")
    }
    fn write_u32(&mut self, id: u32) {
        self.0 = u64::from(id).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }
}

/// One version of the routing.
#[derive(Debug, Default)]
pub(crate) struct RoutingView {
    pub raw: Routing,
    chains: IdMap<ChainView>,
    addresses: IdMap<Arc<str>>,
    metas: Vec<String>,
}

impl RoutingView {
    pub fn new(raw: Routing) -> Self {
        let place_of: HashMap<u64, (u32, u64)> =
            raw.targets.iter().map(|t| (t.target_id, (t.node_id, disk_key(t.node_id, &t.disk_uuid)))).collect();
        let chains = raw
            .chains
            .iter()
            .map(|chain| {
                let serving = chain
                    .targets
                    .iter()
                    .filter(|t| t.state() == PublicState::Serving)
                    .filter_map(|t| {
                        let &(node_id, disk) = place_of.get(&t.target_id)?;
                        Some(Replica { target_id: t.target_id, node_id, disk })
                    })
                    .collect();
                (chain.chain_id, ChainView { id: chain.chain_id, version: chain.version, serving })
            })
            .collect();
        let served = || raw.nodes.iter().filter(|n| n.frame_port != 0);
        let addresses = served().map(|n| (n.node_id, join(&n.host, n.frame_port).into())).collect();
        let metas = served().filter(|n| n.role == "meta").map(|n| join(&n.host, n.frame_port)).collect();
        Self { raw, chains, addresses, metas }
    }

    pub fn version(&self) -> u64 {
        self.raw.version
    }

    /// Addresses of the meta services.
    pub fn metas(&self) -> &[String] {
        &self.metas
    }

    pub fn chain(&self, id: u32) -> Option<&ChainView> {
        self.chains.get(&id)
    }

    /// `host:port` of a node's frame server.
    pub fn address(&self, node_id: u32) -> Option<&Arc<str>> {
        self.addresses.get(&node_id)
    }

    /// Whether some node is reached there.
    pub fn serves_at(&self, address: &str) -> bool {
        self.addresses.values().any(|known| **known == *address)
    }

    /// The chain of chunk `index`: table.chain_ids[(first + index % width) % len]. `None` when this routing
    /// does not have the table (yet).
    pub fn chain_of(&self, layout: &Layout, index: u64) -> Option<u32> {
        let is_it = |t: &&ChainTable| (t.table_id, t.table_version) == (layout.table_id, layout.table_version);
        let table = self.raw.tables.iter().rev().find(is_it)?;
        let count = table.chain_ids.len() as u64;
        let width = stripe_width(layout, index);
        if count == 0 || width == 0 {
            return None;
        }
        let position = (u64::from(layout.first) + index % width) % count;
        Some(table.chain_ids[position as usize])
    }
}

/// A stripe that grows doubles when each of its chains has so many chunks of the file.
const GROWTH_ROUNDS: u64 = 8;

/// Over how many chains chunk `index` and those before it are spread; see `Layout` in meta.proto.
pub(crate) fn stripe_width(layout: &Layout, index: u64) -> u64 {
    if layout.stripe > 0 {
        return layout.stripe.into();
    }
    let (mut width, limit) = (u64::from(layout.stripe_first), u64::from(layout.stripe_max));
    while width < limit && index >= GROWTH_ROUNDS * width {
        width *= 2;
    }
    width.min(limit)
}

/// A number for a disk, the same in every version of the routing (FNV-1a).
fn disk_key(node_id: u32, uuid: &[u8]) -> u64 {
    let bytes = node_id.to_le_bytes().into_iter().chain(uuid.iter().copied());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn join(host: &str, port: u32) -> String {
    if host.contains(':') && !host.starts_with('[') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Check a layout from the network before dividing by its fields.
pub(crate) fn check_layout(layout: &Layout) -> Result<()> {
    let bytes = layout.chunk_bytes;
    let stripe = layout.stripe > 0 || (1..=layout.stripe_max).contains(&layout.stripe_first);
    if bytes.is_power_of_two() && (1 << 16..=1 << 26).contains(&bytes) && stripe {
        return Ok(());
    }
    Err(Error::new(Code::Internal, format!("the file has an impossible layout (chunk_bytes {bytes})")))
}

/// Spreads chunks over replicas: the same chunk always prefers the same replica, so that the caches of the
/// servers do not all hold the same chunks. splitmix64 of (inode, index).
pub(crate) fn spread(chunk: &ChunkId) -> u64 {
    let mut z = chunk.inode.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(u64::from(chunk.index));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs3_proto::v1::{Chain, ChainTarget, Node, Target};

    fn view() -> RoutingView {
        RoutingView::new(Routing {
            version: 7,
            nodes: vec![
                Node { node_id: 1, role: "meta".into(), host: "a".into(), frame_port: 9, ..Default::default() },
                Node { node_id: 2, role: "storage".into(), host: "::1".into(), frame_port: 8, ..Default::default() },
                Node { node_id: 3, role: "mgmtd".into(), host: "c".into(), ..Default::default() },
            ],
            targets: vec![Target { target_id: 2001, node_id: 2, ..Default::default() }],
            chains: vec![Chain {
                chain_id: 10,
                version: 4,
                targets: vec![
                    ChainTarget { target_id: 2001, state: PublicState::Serving as i32 },
                    ChainTarget { target_id: 2002, state: PublicState::Syncing as i32 },
                ],
            }],
            tables: vec![ChainTable { table_id: 1, table_version: 1, chain_ids: vec![10, 11, 12, 13], replicas: 3 }],
            ..Default::default()
        })
    }

    #[test]
    fn chunks_stripe_over_the_table_from_first_and_wrap() {
        let view = view();
        let layout =
            Layout { table_id: 1, table_version: 1, chunk_bytes: 1 << 20, stripe: 3, first: 2, ..Default::default() };
        let chains: Vec<_> = (0..7).map(|i| view.chain_of(&layout, i).unwrap()).collect();
        assert_eq!(chains, [12, 13, 10, 12, 13, 10, 12]);
        assert_eq!(view.chain_of(&Layout { table_version: 2, ..layout }, 0), None);
    }

    #[test]
    fn the_last_chunks_are_on_every_chain_that_any_is_on() {
        for (stripe, stripe_first, stripe_max) in [(3, 0, 0), (0, 1, 6), (0, 4, 100), (0, 16, 128)] {
            let layout = Layout { stripe, stripe_first, stripe_max, ..Default::default() };
            let place = |index: u64| index % stripe_width(&layout, index);
            let mut places = std::collections::BTreeSet::new();
            for chunks in 1..3000u64 {
                places.insert(place(chunks - 1));
                let width = stripe_width(&layout, chunks - 1);
                let last = (chunks.saturating_sub(2 * width)..chunks).map(place).collect();
                assert_eq!(places, last, "{layout:?}, {chunks} chunks");
            }
        }
    }

    #[test]
    fn only_serving_targets_and_serving_nodes_are_addressed() {
        let view = view();
        assert_eq!(view.chain(10).unwrap().serving, [Replica { target_id: 2001, node_id: 2, disk: disk_key(2, b"") }]);
        assert_eq!(view.address(2).map(|a| &**a), Some("[::1]:8"));
        assert!(view.address(3).is_none());
        assert_eq!(view.metas(), ["a:9"]);
    }

    #[test]
    fn spread_uses_every_replica_evenly() {
        let mut counts = [0u32; 3];
        for index in 0..3000 {
            counts[(spread(&ChunkId { space: 0, inode: 42, index }) % 3) as usize] += 1;
        }
        assert!(counts.iter().all(|c| (850..1150).contains(c)), "{counts:?}");
    }

    #[test]
    fn impossible_layouts_are_refused() {
        let good =
            Layout { table_id: 1, table_version: 1, chunk_bytes: 1 << 20, stripe: 1, first: 0, ..Default::default() };
        assert!(check_layout(&good).is_ok());
        for bad in [0, 4096, 100_000, 1 << 27] {
            assert!(check_layout(&Layout { chunk_bytes: bad, ..good }).is_err());
        }
        assert!(check_layout(&Layout { stripe: 0, ..good }).is_err());
        assert!(check_layout(&Layout { stripe: 0, stripe_max: 4, ..good }).is_err());
        assert!(check_layout(&Layout { stripe: 0, stripe_first: 4, stripe_max: 3, ..good }).is_err());
        assert!(check_layout(&Layout { stripe: 0, stripe_first: 4, stripe_max: 4, ..good }).is_ok());
    }
}
