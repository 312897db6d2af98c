//! What all clones of a client share, and its background tasks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use fs3_core::{ClientId, Code, Error, Result};
use fs3_proto::routing::{Misfit, apply, known};
use fs3_proto::v1::{
    Attr, GetRoutingRequest, GetRoutingResponse, KeepaliveRequest, KeepaliveResponse, Method, OpId, Routing,
};
use fs3_rt::Instant;
use prost::Message;
use tokio::sync::{Mutex, Notify, Semaphore, SemaphorePermit, watch};

use crate::ClientConfig;
use crate::accesses::Accesses;
use crate::backoff::Backoff;
use crate::channels::Channels;
use crate::health::Health;
use crate::holds::HoldTask;
use crate::latency::Latencies;
use crate::locks::Lease;
use crate::meta::{CallLimits, Metas, call, decoded};
use crate::open_inodes::OpenInodes;
use crate::pool::ScratchPool;
use crate::report::Reports;
use crate::routing::RoutingView;
use crate::wire::Wire;

/// How long the service holds a question for newer routing.
const ROUTING_WAIT_MS: u32 = 10_000;
/// Keepalives are never further apart than this, whatever the service says.
const KEEPALIVE_MS: std::ops::RangeInclusive<u32> = 100..=30_000;

/// Shared state of a client.
pub(crate) struct Inner {
    pub id: ClientId,
    pub config: ClientConfig,
    pub wire: Wire,
    pub metas: Metas,
    pub routing: watch::Sender<Arc<RoutingView>>,
    pub health: Health,
    pub latencies: Latencies,
    pub lease: Lease,
    pub reports: Reports,
    pub inodes: OpenInodes,
    pub accesses: Accesses,
    pub holds: HoldTask,
    pub channels: Channels,
    pub scratch: ScratchPool,
    pub read_budget: Semaphore,
    pub write_budget: Semaphore,
    pub counters: Counters,
    pub runtime: fs3_rt::Handle,
    sequence: AtomicU64,
    kv_sequence: AtomicU64,
    sessions: AtomicUsize,
    session_opened: Notify,
    refreshing: Mutex<()>,
    /// The routing is asked for whole: a delta that came did not fit.
    misfit: AtomicBool,
    pub closed: AtomicBool,
}

/// What happened so far; for metrics and tests.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub checksum_failures: AtomicU64,
    pub read_failovers: AtomicU64,
    pub read_hedges: AtomicU64,
    pub read_hedges_won: AtomicU64,
    pub write_retries: AtomicU64,
    pub payload_resends: AtomicU64,
}

impl Inner {
    pub fn new(id: ClientId, config: ClientConfig, wire: Wire, routing: Routing) -> Arc<Self> {
        let view = Arc::new(RoutingView::new(routing));
        let metas = Metas::new(config.metas.clone());
        metas.learn(view.metas());
        Arc::new(Self {
            id,
            wire,
            metas,
            routing: watch::Sender::new(view),
            health: Health::default(),
            latencies: Latencies::default(),
            lease: Lease::default(),
            reports: Reports::default(),
            inodes: OpenInodes::default(),
            accesses: Accesses::default(),
            holds: HoldTask::default(),
            channels: Channels::new(id, config.write_channels),
            scratch: ScratchPool::default(),
            read_budget: Semaphore::new(config.read_bytes_in_flight),
            write_budget: Semaphore::new(config.write_bytes_in_flight),
            counters: Counters::default(),
            runtime: fs3_rt::Handle::current(),
            sequence: AtomicU64::new(0),
            kv_sequence: AtomicU64::new(0),
            sessions: AtomicUsize::new(0),
            session_opened: Notify::new(),
            refreshing: Mutex::new(()),
            misfit: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            config,
        })
    }

    /// When an operation that starts now has to be over.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.config.op_timeout
    }

    /// A part of a budget of bytes; more than there is in all counts as all.
    pub async fn reserve<'a>(
        &self,
        budget: &'a Semaphore,
        bytes: usize,
        limit: usize,
        deadline: Instant,
    ) -> Result<SemaphorePermit<'a>> {
        match fs3_rt::timeout_at(deadline, budget.acquire_many(bytes.min(limit) as u32)).await {
            Ok(permit) => Ok(permit.expect("budgets are never closed")),
            Err(_) => Err(Error::new(Code::Timeout, "too much was on its way already; raise the bytes in flight")),
        }
    }

    /// The routing in use.
    pub fn view(&self) -> Arc<RoutingView> {
        self.routing.borrow().clone()
    }

    /// Identity of a new mutating operation.
    pub fn op_id(&self) -> Option<OpId> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        Some(OpId { client_id: bytes::Bytes::copy_from_slice(&self.id.0), sequence, resent: false })
    }

    /// The number of a new put or removal in the key-value cache, above all before.
    pub fn kv_sequence(&self) -> u64 {
        self.kv_sequence.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// A metadata call with failover. The request carries its OpId, so every try is the same operation.
    pub async fn meta<Req: Message, Resp: Message + Default>(&self, method: Method, request: &Req) -> Result<Resp> {
        decoded(self.meta_bytes(method, request, None).await?)
    }

    /// As [`Inner::meta`], for a change of one inode that other clients are likely to change at the same time.
    pub async fn meta_of<Req: Message, Resp: Message + Default>(
        &self,
        inode: Option<u64>,
        method: Method,
        request: &Req,
    ) -> Result<Resp> {
        decoded(self.meta_bytes(method, request, inode).await?)
    }

    /// As [`Inner::meta`] and [`Inner::meta_of`]; the encoded response.
    pub async fn meta_bytes<Req: Message>(&self, method: Method, request: &Req, inode: Option<u64>) -> Result<Bytes> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(Error::new(Code::Unavailable, "the client is closed"));
        }
        let limits = CallLimits { deadline: self.deadline(), attempt: self.config.meta_attempt_timeout };
        call(&self.wire, &self.metas, method, request, inode, limits).await
    }

    /// Take in attributes of the service and return them as this client's users must see them.
    pub fn merge(&self, mut attr: Attr) -> Attr {
        self.accesses.merge(&mut attr);
        self.inodes.merge(attr)
    }

    /// A question for a newer routing than that of `view`.
    fn routing_request(&self, view: &RoutingView, wait_ms: u32) -> GetRoutingRequest {
        let whole = self.misfit.load(Ordering::Relaxed);
        let known = (!whole).then(|| known(&view.raw));
        GetRoutingRequest { known_version: view.version(), wait_ms, known }
    }

    /// Use what the answer to one who had `view` brought. When it does not fit, the next one is asked for whole.
    fn receive(&self, view: &RoutingView, response: GetRoutingResponse) -> Result<()> {
        let received = match response.delta {
            Some(delta) => apply(&view.raw, delta).map(Some),
            None => Ok(response.routing),
        };
        self.misfit.store(received.is_err(), Ordering::Relaxed);
        let message = "the service sent what changed of another routing; the whole is asked for next";
        let newer = received.map_err(|Misfit| Error::new(Code::Protocol, message))?;
        if let Some(routing) = newer {
            self.install(routing);
        }
        Ok(())
    }

    /// Use a routing if it is newer.
    fn install(&self, routing: Routing) {
        self.routing.send_if_modified(|view| {
            if routing.version <= view.version() || routing.cluster_id != view.raw.cluster_id {
                return false;
            }
            let next = RoutingView::new(routing);
            tracing::debug!(version = next.version(), "new routing");
            self.metas.learn(next.metas());
            self.wire.retain(|addr| next.serves_at(addr) || self.metas.has(addr));
            *view = Arc::new(next);
            true
        });
    }

    /// Ask for newer routing now. Callers that come while one asks share its answer.
    pub async fn refresh_routing(&self) -> Result<()> {
        let before = self.view().version();
        let _alone = self.refreshing.lock().await;
        let view = self.view();
        if view.version() > before {
            return Ok(());
        }
        let request = self.routing_request(&view, 0);
        let response: GetRoutingResponse = self.meta(Method::GetRouting, &request).await?;
        self.receive(&view, response)
    }

    /// Wait until the routing is newer than `version` or `pause` is over. `hint`: the version a server named; if
    /// that is newer, the service is asked at once.
    pub async fn wait_routing(&self, version: u64, hint: u64, pause: Duration) {
        let mut changes = self.routing.subscribe();
        let newer = async {
            let _ = changes.wait_for(|view| view.version() > version).await;
        };
        let ask = async {
            if hint > version {
                let _ = self.refresh_routing().await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            () = newer => {}
            () = ask => {}
            () = fs3_rt::sleep(pause) => {}
        }
    }

    /// A session began: keepalives are needed from now on.
    pub fn session_opened(&self) {
        self.sessions.fetch_add(1, Ordering::AcqRel);
        self.session_opened.notify_one();
    }

    /// A session ended.
    pub fn session_closed(&self) {
        self.sessions.fetch_sub(1, Ordering::AcqRel);
    }

    /// No more calls; those on their way fail.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.inodes.to_tell.notify_one();
        self.wire.close();
    }

    /// One long poll; the routing it brought is in use afterwards.
    async fn poll_routing(&self) -> Result<()> {
        let (at, address) = self.metas.pick();
        let view = self.view();
        let request = self.routing_request(&view, ROUTING_WAIT_MS);
        let limit = Duration::from_millis(u64::from(ROUTING_WAIT_MS)) + self.config.meta_attempt_timeout;
        let reply = self.wire.call(&address, Method::GetRouting, request, Instant::now() + limit).await;
        let reply = reply.inspect_err(|_| self.metas.failed(at))?;
        let response = GetRoutingResponse::decode(reply)
            .map_err(|e| Error::new(Code::Protocol, format!("{address} sent a routing that is none: {e}")))?;
        self.receive(&view, response)
    }
}

/// Keep the routing fresh, until the task is aborted or the client closed.
pub(crate) async fn follow_routing(inner: Arc<Inner>) {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    while !inner.closed.load(Ordering::Relaxed) {
        let (began, before) = (Instant::now(), inner.view().version());
        match inner.poll_routing().await {
            Ok(()) if inner.view().version() > before || began.elapsed() > Duration::from_secs(1) => {
                backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
            }
            // A service that does not hold the question must not be asked in a tight loop.
            Ok(()) => fs3_rt::sleep(backoff.next()).await,
            Err(error) => {
                tracing::debug!(%error, "no routing");
                fs3_rt::sleep(backoff.next()).await;
            }
        }
    }
}

/// Send keepalives while there are sessions, so that the service does not reap them; until the task is aborted or
/// the client closed.
pub(crate) async fn keep_sessions(inner: Arc<Inner>) {
    let mut lapses = 0;
    while !inner.closed.load(Ordering::Relaxed) {
        if inner.sessions.load(Ordering::Acquire) == 0 {
            // A permit stored by notify_one between the load and here ends the wait at once.
            inner.session_opened.notified().await;
            continue;
        }
        let request = KeepaliveRequest {
            client_id: bytes::Bytes::copy_from_slice(&inner.id.0),
            description: inner.config.description.clone(),
        };
        let sent = Instant::now();
        let result: Result<KeepaliveResponse> = inner.meta(Method::MetaKeepalive, &request).await;
        let pause = match result {
            Ok(response) => {
                let session = Duration::from_millis(u64::from(response.session_ms));
                inner.lease.renew(sent, session, Instant::now());
                let before = std::mem::replace(&mut lapses, inner.lease.lapses(Instant::now()));
                if lapses != before {
                    inner.inodes.forgotten(Instant::now());
                }
                response.interval_ms.clamp(*KEEPALIVE_MS.start(), *KEEPALIVE_MS.end())
            }
            Err(error) => {
                tracing::warn!(%error, "keepalive failed");
                1_000
            }
        };
        fs3_rt::sleep(Duration::from_millis(u64::from(pause))).await;
    }
}
