//! Calls to services, as the rest of the client makes them.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use fs3_core::{ClientId, Code, Error, Region, Result};
use fs3_net::{Hello, Payload, Peers, Reply, Sink};
use fs3_proto::v1::{Method, Role};
use fs3_rt::Instant;
use prost::Message;

use crate::{ClientConfig, trace};

/// Connections to metas and storage nodes.
pub(crate) struct Wire {
    peers: Peers,
    closed: AtomicBool,
}

impl Wire {
    /// Connects to services of `cluster_id` only; empty: any.
    pub fn new(id: ClientId, config: &ClientConfig, cluster_id: &str) -> Self {
        let hello = Hello {
            cluster_id: cluster_id.to_owned(),
            role: Role::Client,
            peer_id: id.0,
            token: config.token.clone(),
            transport: config.transport.clone(),
        };
        Self { peers: Peers::new(hello, config.connections_per_peer), closed: AtomicBool::new(false) }
    }

    /// A call without payload either way; the encoded response.
    pub async fn call(&self, addr: &str, method: Method, body: impl Message, until: Instant) -> Result<Bytes> {
        self.transfer(addr, method, body, Vec::new(), Sink::none(), until).await.map(|reply| reply.body)
    }

    /// A call with payload. Once it has returned or was dropped, nothing touches the sink's memory any more.
    pub async fn transfer(
        &self,
        addr: &str,
        method: Method,
        body: impl Message,
        payload: impl Into<Payload>,
        sink: Sink,
        until: Instant,
    ) -> Result<Reply> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(Error::new(Code::Unavailable, "the client is closed"));
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::new(Code::Timeout, format!("no time left to ask {addr}")));
        }
        let payload = payload.into();
        let sent = payload.pieces.iter().map(|region| region.len()).sum();
        // Boxed, so that the futures of whatever makes calls are small: who wraps a future in another one copies it.
        let call = Box::pin(self.peers.call(addr, method, body, payload, sink, left));
        trace::request(addr, method, sent, call).await
    }

    /// Whether this payload would go with its checksums, so that they need not be made before. Not for certain.
    pub fn sends_crcs(&self, addr: &str, payload: &[Region]) -> bool {
        self.peers.sends_crcs(addr, payload)
    }

    /// What moved by each RDMA device.
    pub fn rdma_counters(&self) -> Vec<(String, Vec<(&'static str, u64)>)> {
        self.peers.rdma_counters()
    }

    /// What moved through shared memory.
    pub fn shared_memory_counters(&self) -> Vec<(&'static str, u64)> {
        self.peers.shared_memory_counters()
    }

    /// Drop connections to other addresses than these.
    pub fn retain(&self, keep: impl Fn(&str) -> bool) {
        self.peers.retain(keep);
    }

    /// End all connections and refuse calls.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.peers.retain(|_| false);
    }
}
