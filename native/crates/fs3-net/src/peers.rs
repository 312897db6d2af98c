use crate::client::{Connection, Payload, Reply, Sink};
use crate::hello::Hello;
use crate::link::Way;
use fs3_core::{Code, Error, Region, Result};
use fs3_proto::v1::Method;
use fs3_rt::Instant;
use parking_lot::Mutex;
use prost::Message;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How long connecting may take, hello included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// After a failed attempt an address is not tried again for this long, doubled by each further failure.
const BACK_OFF_MIN: Duration = Duration::from_millis(50);
/// Longest back-off.
const BACK_OFF_MAX: Duration = Duration::from_secs(1);

/// Connections to any number of servers, made when they are first needed and again when they broke. Cheap to clone;
/// clones share the connections. May be used from any thread of the runtime it is used on.
#[derive(Clone)]
pub struct Peers(Arc<Shared>);

struct Shared {
    hello: Hello,
    connections_per_peer: usize,
    peers: Mutex<BTreeMap<String, Arc<Peer>>>,
}

#[derive(Default)]
struct Peer {
    state: Mutex<PeerState>,
    /// Held by the one caller that connects.
    connecting: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct PeerState {
    connections: Vec<Connection>,
    failure: Option<Failure>,
}

struct Failure {
    error: Error,
    back_off: Duration,
    until: Instant,
}

impl Peers {
    /// A pool that opens up to `connections_per_peer` (at least one) connections to each address: another
    /// one when all there are have calls in flight.
    pub fn new(hello: Hello, connections_per_peer: usize) -> Self {
        let connections_per_peer = connections_per_peer.max(1);
        Self(Arc::new(Shared { hello, connections_per_peer, peers: Mutex::default() }))
    }

    /// [`Connection::call`] on the least loaded connection to `addr`; connecting counts against `timeout`.
    ///
    /// # Errors
    /// Those of [`Connection::call`]. An address that could not be connected to a moment ago fails at once with that
    /// error. Nothing is retried here.
    pub async fn call(
        &self,
        addr: &str,
        method: Method,
        body: impl Message,
        payload: impl Into<Payload>,
        sink: Sink,
        timeout: Duration,
    ) -> Result<Reply> {
        let started = Instant::now();
        let peer = self.peer(addr);
        let connection = match peer.pick(self.0.connections_per_peer) {
            Some(connection) => connection,
            // Boxed, so that the future of a call is small: callers move it about.
            None => Box::pin(self.connect(addr, &peer, timeout)).await?,
        };
        let left = timeout.saturating_sub(started.elapsed());
        connection.call(method, body, payload, sink, left).await
    }

    /// [`Connection::sends_crcs`] of the connection that would be used now; false when there is none.
    pub fn sends_crcs(&self, addr: &str, pieces: &[Region]) -> bool {
        self.peer(addr).least_loaded().is_some_and(|connection| connection.sends_crcs(pieces))
    }

    /// Drop the connections to all addresses but these; calls in flight on them fail.
    pub fn retain(&self, keep: impl Fn(&str) -> bool) {
        self.0.peers.lock().retain(|addr, _| keep(addr));
    }

    /// All live connections: address, and how their messages travel.
    pub fn list(&self) -> Vec<(String, Way)> {
        let peers: Vec<_> = self.0.peers.lock().iter().map(|(addr, peer)| (addr.clone(), peer.clone())).collect();
        let mut all = Vec::new();
        for (addr, peer) in peers {
            let state = peer.state.lock();
            let live = state.connections.iter().filter(|c| !c.is_closed());
            all.extend(live.map(|c| (addr.clone(), c.way())));
        }
        all
    }

    /// [`crate::Transport::rdma_counters`] of what the connections are made with.
    pub fn rdma_counters(&self) -> Vec<(String, Vec<(&'static str, u64)>)> {
        self.0.hello.transport.rdma_counters()
    }

    /// [`crate::Transport::shared_memory_counters`] of what the connections are made with.
    pub fn shared_memory_counters(&self) -> Vec<(&'static str, u64)> {
        self.0.hello.transport.shared_memory_counters()
    }

    /// Live connections to `addr`.
    pub fn connections(&self, addr: &str) -> usize {
        let peer = self.peer(addr);
        let state = peer.state.lock();
        state.connections.iter().filter(|c| !c.is_closed()).count()
    }

    fn peer(&self, addr: &str) -> Arc<Peer> {
        let mut peers = self.0.peers.lock();
        match peers.get(addr) {
            Some(peer) => peer.clone(),
            None => peers.entry(addr.to_owned()).or_default().clone(),
        }
    }

    async fn connect(&self, addr: &str, peer: &Peer, timeout: Duration) -> Result<Connection> {
        let late = || Error::new(Code::Timeout, format!("connecting to {addr} took longer than {timeout:?}"));
        let _turn = fs3_rt::timeout(timeout, peer.connecting.lock()).await.map_err(|_| late())?;
        // Somebody else may have connected, or failed to, while this caller waited for its turn.
        if let Some(connection) = peer.pick(self.0.connections_per_peer) {
            return Ok(connection);
        }
        peer.check_back_off()?;
        match Connection::connect(addr, &self.0.hello, timeout.min(CONNECT_TIMEOUT)).await {
            Ok((connection, _)) => {
                let mut state = peer.state.lock();
                state.failure = None;
                state.connections.push(connection.clone());
                Ok(connection)
            }
            Err(error) => {
                peer.fail(&error);
                peer.least_loaded().ok_or(error)
            }
        }
    }
}

impl Peer {
    /// A connection to use now; `None` when another one should be opened first.
    fn pick(&self, connections_max: usize) -> Option<Connection> {
        let best = self.least_loaded()?;
        // One queue pair moves all that a link can; several TCP connections use several cores for copying.
        let connections_max = if best.rdma_device().is_some() { 1 } else { connections_max };
        let state = self.state.lock();
        let full = state.connections.len() >= connections_max || state.failure.is_some();
        (full || best.in_flight() == 0).then_some(best)
    }

    fn least_loaded(&self) -> Option<Connection> {
        let mut state = self.state.lock();
        state.connections.retain(|c| !c.is_closed());
        state.connections.iter().min_by_key(|c| c.in_flight()).cloned()
    }

    fn check_back_off(&self) -> Result<()> {
        match &self.state.lock().failure {
            Some(failure) if Instant::now() < failure.until => Err(failure.error.clone()),
            _ => Ok(()),
        }
    }

    fn fail(&self, error: &Error) {
        let mut state = self.state.lock();
        let back_off = state.failure.as_ref().map_or(BACK_OFF_MIN, |f| (f.back_off * 2).min(BACK_OFF_MAX));
        state.failure = Some(Failure { error: error.clone(), back_off, until: Instant::now() + back_off });
    }
}
