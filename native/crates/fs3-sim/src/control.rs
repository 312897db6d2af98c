//! Truncates and removes of chunks, as metadata services send them: to the head, again under the same identity until the
//! chain has it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fs3_client::Client;
use fs3_core::{ChunkId, Code, Error, InodeId, Result};
use fs3_net::{Hello, Peers, Sink};
use fs3_proto::v1::{Chain, Method, PublicState, RemoveRequest, Role, Routing, TruncateChunkRequest, WriterId};
use fs3_rt::{Instant, sleep};
use prost::Message;

use crate::meta::{INODE, TOKEN};

/// How long one try may take.
const TRY: Duration = Duration::from_secs(5);
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);

pub(crate) struct Control {
    client: Client,
    peers: Peers,
    client_id: [u8; 16],
    sequence: AtomicU64,
    chunk_bytes: u32,
}

impl Control {
    pub fn new(client: Client, chunk_bytes: u32) -> Self {
        let client_id = fs3_rt::random_bytes();
        let hello = Hello {
            cluster_id: client.cluster_id(),
            role: Role::Meta,
            peer_id: client_id,
            token: TOKEN.into(),
            transport: fs3_net::Transport::tcp(),
        };
        Self { client, peers: Peers::new(hello, 1), client_id, sequence: AtomicU64::new(0), chunk_bytes }
    }

    /// Cut a chunk.
    pub async fn truncate(&self, chunk: u32, length: u32, timeout: Duration) -> Result<()> {
        let writer = self.writer();
        let build = |chain: &Chain, target_id: u64| TruncateChunkRequest {
            chain_id: chain.chain_id,
            chain_version: chain.version,
            target_id,
            chunk_id: bytes::Bytes::copy_from_slice(&ChunkId::file(InodeId(INODE), chunk).to_bytes()),
            chunk_bytes: self.chunk_bytes,
            length,
            writer: Some(writer.clone()),
            ..Default::default()
        };
        self.call(chunk, Method::StorageTruncate, build, timeout).await
    }

    /// Remove a chunk.
    pub async fn remove(&self, chunk: u32, timeout: Duration) -> Result<()> {
        let writer = self.writer();
        let build = |chain: &Chain, target_id: u64| RemoveRequest {
            chain_id: chain.chain_id,
            chain_version: chain.version,
            target_id,
            space: 0,
            inode: INODE,
            first_index: chunk,
            last_index: chunk,
            writer: Some(writer.clone()),
            ..Default::default()
        };
        self.call(chunk, Method::StorageRemove, build, timeout).await
    }

    /// Every request is a channel of its own: it is never followed by another one.
    fn writer(&self) -> WriterId {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        let client_id = bytes::Bytes::copy_from_slice(&self.client_id);
        WriterId { client_id, channel: (sequence % 256) as u32, sequence }
    }

    async fn call<Req: Message>(
        &self,
        chunk: u32,
        method: Method,
        build: impl Fn(&Chain, u64) -> Req,
        timeout: Duration,
    ) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let (mut pause, mut sent) = (PAUSE_MIN, false);
        loop {
            let routing = self.client.routing();
            let error = match head(&routing, chunk) {
                None => Error::new(Code::Unavailable, "the chain has no serving replica"),
                Some((chain, target, address)) => {
                    let limit = TRY.min(deadline.saturating_duration_since(Instant::now()));
                    let request = build(chain, target);
                    match self.peers.call(&address, method, request, Vec::new(), Sink::none(), limit).await {
                        Ok(_) => return Ok(()),
                        Err(error) if error.code == Code::ChunkNotFound => return Ok(()),
                        Err(error) => error,
                    }
                }
            };
            sent |= error.maybe_applied;
            if Instant::now() + pause >= deadline {
                return Err(if sent { error.maybe_applied() } else { error });
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

/// The head of a chunk's chain: chain, target, address.
fn head(routing: &Routing, chunk: u32) -> Option<(&Chain, u64, String)> {
    let table = routing.tables.last()?;
    let chain_id = table.chain_ids[chunk as usize % table.chain_ids.len()];
    let chain = routing.chains.iter().find(|c| c.chain_id == chain_id)?;
    let target = chain.targets.iter().find(|t| t.state() == PublicState::Serving)?.target_id;
    let node_id = routing.targets.iter().find(|t| t.target_id == target)?.node_id;
    let node = routing.nodes.iter().find(|n| n.node_id == node_id)?;
    Some((chain, target, format!("{}:{}", node.host, node.frame_port)))
}
