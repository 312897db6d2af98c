//! What a person asks of a namespace: its keys, its counters, room.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{BufMut, Bytes};
use fs3_core::{Code, Error, Result};
use fs3_proto::v1::{
    KvEvictRequest, KvEvictResponse, KvListRequest, KvListResponse, KvStatRequest, KvStatResponse, Method,
};
use fs3_rt::Instant;
use prost::Message;

use super::{KvCache, Shared};

/// One value, as one of its replicas knows it.
#[derive(Clone, Debug)]
pub struct KvEntry {
    /// The key.
    pub key: Bytes,
    /// Length of the value, in bytes.
    pub bytes: u64,
    /// Milliseconds since it was put.
    pub age_ms: u64,
    /// Milliseconds since it was put or read.
    pub idle_ms: u64,
}

/// Some values of one node.
#[derive(Clone, Debug, Default)]
pub struct KvPage {
    /// In no order.
    pub entries: Vec<KvEntry>,
    /// Where the node's next page begins; `None`: this was its last.
    pub next: Option<u64>,
}

/// How much to leave.
#[derive(Clone, Copy, Debug)]
pub enum KvKeep {
    /// Bytes on all nodes together, replicas counted each.
    Bytes(u64),
    /// A part of what there is, from 0 to 1.
    Part(f64),
}

impl KvCache {
    /// The nodes that may hold some of the namespace now.
    pub fn nodes(&self) -> Vec<u32> {
        let (view, space) = (self.shared.inner().view(), self.space());
        let layout = space.layout();
        let chains = (0..u64::from(space.chains)).filter_map(|index| view.chain(view.chain_of(&layout, index)?));
        chains
            .flat_map(|chain| &chain.serving)
            .map(|replica| replica.node_id)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect()
    }

    /// Values of one node whose keys begin with `prefix`, from place `after` on.
    ///
    /// # Errors
    /// Those of the call.
    pub async fn list(&self, node_id: u32, prefix: &[u8], after: u64, limit: u32) -> Result<KvPage> {
        let mut stored = self.space().prefix();
        let skip = stored.len();
        stored.put_slice(prefix);
        let (prefix, durable) = (stored.freeze(), self.shared.durable());
        let request = KvListRequest { namespace: self.space().id, after, limit, prefix, durable };
        let response: KvListResponse = ask(&self.shared, node_id, Method::StorageKvList, request).await?;
        let entries = response.entries.into_iter().filter(|entry| entry.key.len() >= skip).map(|entry| KvEntry {
            key: entry.key.slice(skip..),
            bytes: entry.total,
            age_ms: entry.age_ms,
            idle_ms: entry.idle_ms,
        });
        Ok(KvPage { entries: entries.collect(), next: (!response.end).then_some(response.next) })
    }

    /// Counters of the namespace on all nodes that answer, added up; under `nodes` how many these are, under
    /// `nodes_silent` how many do not answer.
    pub async fn stat(&self) -> BTreeMap<String, u64> {
        let mut sums = BTreeMap::from([("nodes".to_owned(), 0), ("nodes_silent".to_owned(), 0)]);
        for node_id in self.nodes() {
            let answer = self.stat_of(node_id).await;
            *sums.entry(if answer.is_ok() { "nodes" } else { "nodes_silent" }.to_owned()).or_default() += 1;
            for (name, count) in answer.into_iter().flatten() {
                *sums.entry(name).or_default() += count;
            }
        }
        sums
    }

    async fn stat_of(&self, node_id: u32) -> Result<BTreeMap<String, u64>> {
        let request = KvStatRequest { namespace: self.space().id, durable: self.shared.durable() };
        let response: KvStatResponse = ask(&self.shared, node_id, Method::StorageKvStat, request).await?;
        Ok(response.counters.into_iter().collect())
    }

    /// Bring the settings to all nodes, and have them forget what was used the longest ago: entries and bytes that went.
    ///
    /// # Errors
    /// Those of the first node that does not answer; the others have done it.
    pub async fn evict(&self, keep: KvKeep) -> Result<(u64, u64)> {
        let (mut held, mut failed) = (Vec::new(), None);
        for node_id in self.nodes() {
            match self.stat_of(node_id).await {
                Ok(counters) => held.push((node_id, counters.get("bytes").copied().unwrap_or_default())),
                Err(error) => failed = Some(error),
            }
        }
        let all: u64 = held.iter().map(|(_, bytes)| bytes).sum();
        let part = match keep {
            KvKeep::Part(part) => part.clamp(0.0, 1.0),
            KvKeep::Bytes(bytes) => (bytes as f64 / all.max(1) as f64).min(1.0),
        };
        let mut gone = (0, 0);
        for (node_id, bytes) in held {
            // Who keeps everything evicts nothing, whatever was put meanwhile.
            let keep_bytes = if part < 1.0 { (bytes as f64 * part) as u64 } else { u64::MAX };
            let request = KvEvictRequest { namespace: Some(self.shared.namespace()), keep_bytes };
            match ask::<KvEvictResponse>(&self.shared, node_id, Method::StorageKvEvict, request).await {
                Ok(response) => gone = (gone.0 + response.entries, gone.1 + response.bytes),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(gone), Err)
    }
}

async fn ask<T: Message + Default>(shared: &Shared, node_id: u32, method: Method, request: impl Message) -> Result<T> {
    let view = shared.inner().view();
    let address = view.address(node_id).ok_or_else(|| Error::new(Code::Unavailable, "the node is gone"))?;
    let deadline: Instant = shared.deadline();
    let body = shared.inner().wire.call(address, method, request, deadline).await?;
    T::decode(body).map_err(|e| Error::new(Code::Protocol, format!("an answer of the cache cannot be read: {e}")))
}
