//! The checks at the end: replicas are equal byte for byte, and nothing stored is rotten.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fs3_core::{ChunkId, Code, crc32c};
use fs3_io::TargetStore;
use fs3_proto::v1::{ChainTarget, PublicState, Routing};
use fs3_rt::sleep;

use crate::nodes::Nodes;

/// Seconds in which a rotten chunk has to be repaired.
const REPAIR_S_MAX: u64 = 60;
/// Chunks looked at at a time.
const PAGE: usize = 1024;

/// What a replica holds of a chunk: version, length, crc of the bytes read.
type Content = BTreeMap<ChunkId, (u64, u32, u32)>;

/// Compare the serving replicas of every chain. Nothing must be under way. `Err`: the first difference in words.
pub(crate) async fn replicas_agree(nodes: Arc<Nodes>, routing: Arc<Routing>) -> Result<(), String> {
    (0..nodes.count()).for_each(|node| drop(nodes.with_engine(node, |engine| engine.scrub())));
    for chain in &routing.chains {
        let mut first: Option<(u64, Content)> = None;
        for target in chain.targets.iter().filter(|t| t.state() == PublicState::Serving) {
            let store = store_of(&nodes, &routing, target.target_id)?;
            let content = content_of(target.target_id, &store).await?;
            match &first {
                None => first = Some((target.target_id, content)),
                Some((other, expected)) => {
                    if let Some(difference) = difference(expected, &content) {
                        return Err(format!(
                            "targets {other} and {} of chain {} differ: {difference}",
                            target.target_id, chain.chain_id
                        ));
                    }
                }
            }
        }
    }
    Ok(())
}

/// Targets that do not serve, in words; empty when all do.
pub(crate) fn not_serving(routing: &Routing) -> Vec<(u64, String)> {
    let states = routing.chains.iter().flat_map(|c| c.targets.iter().map(move |t| (c.chain_id, t)));
    let absent = states.filter(|(_, t)| t.state() != PublicState::Serving);
    let words =
        |chain, t: &ChainTarget| format!("target {} of chain {chain} is {}", t.target_id, t.state().as_str_name());
    absent.map(|(chain, t)| (t.target_id, words(chain, t))).collect()
}

fn store_of(nodes: &Nodes, routing: &Routing, target_id: u64) -> Result<Arc<TargetStore>, String> {
    let gone = || format!("target {target_id} serves, but no node has it open");
    let node_id = routing.targets.iter().find(|t| t.target_id == target_id).map(|t| t.node_id).ok_or_else(gone)?;
    let mut engines = (0..nodes.count()).filter_map(|node| {
        nodes.with_engine(node, |e| (e.node_id() == node_id).then(|| e.store(target_id)).flatten()).ok().flatten()
    });
    engines.next().ok_or_else(gone)
}

async fn content_of(target_id: u64, store: &Arc<TargetStore>) -> Result<Content, String> {
    let (mut content, mut after) = (Content::new(), None);
    loop {
        let page = store.list(after, PAGE);
        let Some((last, _)) = page.last() else { return Ok(content) };
        after = Some(*last);
        for (id, meta) in page {
            if meta.pending.is_some() {
                return Err(format!("target {target_id} holds an unresolved update of chunk {id}"));
            }
            let Some(version) = meta.committed.filter(|v| !v.removed) else { continue };
            let mut tries = 0..REPAIR_S_MAX;
            let read = loop {
                match store.read(id, 0, version.length).await {
                    // The scrub that was begun is to find it and another replica to mend it.
                    Err(e) if e.code == Code::ChecksumMismatch && tries.next().is_some() => {
                        sleep(Duration::from_secs(1)).await;
                    }
                    done => break done.map_err(|e| format!("target {target_id} cannot read chunk {id}: {e}"))?,
                }
            };
            let bytes: Vec<u8> = read.data.iter().flat_map(|region| region.iter().copied()).collect();
            content.insert(id, (version.update_version.0, version.length, crc32c(&bytes)));
        }
    }
}

fn difference(expected: &Content, found: &Content) -> Option<String> {
    for (id, a) in expected {
        match found.get(id) {
            Some(b) if a == b => {}
            other => return Some(format!("chunk {id} is {a:?} (version, length, crc) there and {other:?} here")),
        }
    }
    found.iter().find(|(id, _)| !expected.contains_key(id)).map(|(id, b)| format!("chunk {id} is only here: {b:?}"))
}
