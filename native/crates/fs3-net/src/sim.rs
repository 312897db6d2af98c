//! The simulated transport: whole messages between processes of a simulator, in memory.
//!
//! A connection keeps the order of its messages, as TCP does. What may happen to it follows from the world's
//! [`Network`]: delay, silence while a partition lasts, damage, a reset, and requests that arrive once more over another
//! connection.

use crate::PEER_SILENT_MS_MAX;
use crate::hello::{Hello, HelloPolicy, PeerInfo};
use crate::link::{Endpoint, Flush, Landing, Link, Outgoing};
use crate::tcp::scatter;
use bytes::Bytes;
use fs3_core::{Code, Error, Result};
use fs3_proto::frame::{HEADER_BYTES, Header, Kind, Limits};
use fs3_proto::v1::HelloResponse;
use fs3_rt::sim::{Process, Simulator};
use fs3_rt::{Instant, sleep};
use parking_lot::Mutex;
use prost::Message;
use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Notify;

/// How often a message that is held back by a partition is looked at.
const PARTITION_POLL: Duration = Duration::from_millis(20);
/// Port of a listener that asked for any.
const PORT: u16 = 7000;

/// What becomes of one message.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fate {
    /// Time on the way, nanoseconds.
    pub delay_ns: u64,
    /// The connection breaks instead.
    pub reset: bool,
    /// One bit of the payload is changed.
    pub damaged: bool,
    /// A request arrives once more, after this time, over another connection.
    pub replay_ns: Option<u64>,
}

/// The world's network. Hosts are named by the processes on them.
pub trait Network: Send + Sync {
    /// Decide about a message of `bytes` bytes from one process to another.
    fn fate(&self, from: u32, to: u32, bytes: usize) -> Fate;
    /// Whether messages from one process to another are held back now.
    fn is_cut(&self, from: u32, to: u32) -> bool;
    /// Whether the process has gone without the system telling its peers (the host lost power).
    fn is_dark(&self, process: u32) -> bool;
}

/// What a world must make known to its simulator before anybody connects.
pub struct Net {
    network: Box<dyn Network>,
    listeners: Mutex<BTreeMap<String, Arc<Listener>>>,
}

struct Listener {
    process: Process,
    policy: HelloPolicy,
    accept: Accept,
}

type Accept = Box<dyn Fn(End, PeerInfo) + Send + Sync>;

impl Net {
    /// Nobody listens yet.
    pub fn new(network: impl Network + 'static) -> Arc<Self> {
        Arc::new(Self { network: Box::new(network), listeners: Mutex::default() })
    }

    fn current() -> (Simulator, Arc<Self>) {
        let sim = Simulator::current().expect("a simulated connection is made in a simulator");
        let net = sim.extension::<Self>().expect("the world has a network");
        (sim, net)
    }

    fn listener(&self, addr: &str) -> Option<Arc<Listener>> {
        self.listeners.lock().get(addr).filter(|l| l.process.is_alive()).cloned()
    }

    /// Wait as long as a message from one process to another takes now.
    async fn travel(&self, from: u32, to: u32) {
        sleep(Duration::from_nanos(self.network.fate(from, to, 0).delay_ns)).await;
        while self.network.is_cut(from, to) {
            sleep(PARTITION_POLL).await;
        }
    }
}

/// Keeps an address listened to.
pub(crate) struct Listening {
    net: Arc<Net>,
    addr: String,
    listener: Arc<Listener>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        let mut listeners = self.net.listeners.lock();
        if listeners.get(&self.addr).is_some_and(|l| Arc::ptr_eq(l, &self.listener)) {
            listeners.remove(&self.addr);
        }
    }
}

/// Listen on `host:port` for the current process; `accept` is called in it.
pub(crate) fn listen(addr: &str, policy: HelloPolicy, accept: Accept) -> Result<(Listening, SocketAddr)> {
    let (_, net) = Net::current();
    let (host, port) = addr.rsplit_once(':').unwrap_or((addr, "0"));
    let port = port.parse().ok().filter(|port| *port != 0).unwrap_or(PORT);
    let addr = format!("{host}:{port}");
    let local = SocketAddr::new(host.parse().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)), port);
    let process = Process::current().expect("inside of a simulator");
    let listener = Arc::new(Listener { process, policy, accept });
    net.listeners.lock().insert(addr.clone(), listener.clone());
    Ok((Listening { net, addr, listener }, local))
}

/// Connect to a listener and say hello.
pub(crate) async fn connect(addr: &str, hello: &Hello) -> Result<(End, HelloResponse)> {
    let (sim, net) = Net::current();
    let me = Process::current().expect("inside of a simulator").number();
    let refused = || Error::new(Code::Unavailable, format!("cannot connect to {addr}: connection refused"));
    let Some(listener) = net.listener(addr) else {
        sleep(Duration::from_micros(200)).await;
        return Err(refused());
    };
    let server = listener.process.number();
    net.travel(me, server).await;
    if net.network.is_dark(server) {
        std::future::pending::<()>().await;
    }
    let (tell, told) = tokio::sync::oneshot::channel();
    let (request, accepting, network) = (hello.to_request(addr).encode_to_vec(), listener.clone(), net.clone());
    let address = addr.to_owned();
    listener.process.spawn(async move {
        let answer = accepting.policy.admit(&request).map(|(peer, welcome, _)| {
            let (here, there) = pair(&sim, &network, (server, me), Some(Route { addr: address, peer }));
            (accepting.accept)(here, peer);
            (there, welcome)
        });
        let _ = tell.send(answer);
    });
    let answer = told.await.map_err(|_| refused())?;
    net.travel(server, me).await;
    answer
}

/// How requests of a connection get to its server again.
#[derive(Clone)]
struct Route {
    addr: String,
    peer: PeerInfo,
}

/// The two ends of a connection between processes (a, b); `route`: b's requests go to a.
fn pair(sim: &Simulator, net: &Arc<Net>, (a, b): (u32, u32), route: Option<Route>) -> (End, End) {
    let (to_a, to_b) = (Arc::new(Inbox::default()), Arc::new(Inbox::default()));
    let end = |me, peer, inbox: &Arc<Inbox>, outbox: &Arc<Inbox>, route| {
        End(Arc::new(SimLink {
            sim: sim.clone(),
            net: net.clone(),
            me,
            peer,
            inbox: inbox.clone(),
            outbox: outbox.clone(),
            route,
            closed: AtomicBool::new(false),
        }))
    };
    (end(a, b, &to_a, &to_b, None), end(b, a, &to_b, &to_a, route))
}

/// Messages on their way to one end.
#[derive(Default)]
struct Inbox {
    state: Mutex<Arriving>,
    changed: Notify,
}

#[derive(Default)]
struct Arriving {
    messages: VecDeque<(u64, Arrival)>,
    last_ns: u64,
    /// Nobody takes messages any more.
    abandoned: bool,
}

#[derive(Clone)]
enum Arrival {
    Message(Arc<Frame>),
    /// The other end was closed, or the connection broke.
    End,
}

struct Frame {
    head: Vec<u8>,
    payload: Vec<u8>,
}

impl Inbox {
    /// Messages arrive in the order in which they were sent.
    fn push(&self, arrives_ns: u64, arrival: Arrival) {
        let mut state = self.state.lock();
        state.last_ns = state.last_ns.max(arrives_ns);
        let at = state.last_ns;
        state.messages.push_back((at, arrival));
        drop(state);
        self.changed.notify_one();
    }

    fn next_ns(&self) -> Option<u64> {
        self.state.lock().messages.front().map(|(at, _)| *at)
    }
}

/// One end of a connection.
struct SimLink {
    sim: Simulator,
    net: Arc<Net>,
    me: u32,
    peer: u32,
    inbox: Arc<Inbox>,
    outbox: Arc<Inbox>,
    /// At the client's end.
    route: Option<Route>,
    closed: AtomicBool,
}

/// One end of a connection that has no endpoint yet.
pub(crate) struct End(Arc<SimLink>);

impl End {
    /// Begin to receive, in the current process.
    pub fn start<E: Endpoint>(self, make_endpoint: impl FnOnce(Arc<dyn Link>) -> Arc<E>) -> Arc<E> {
        let endpoint = make_endpoint(self.0.clone());
        let guard = ClosedGuard { link: self.0, endpoint: endpoint.clone(), reason: None };
        fs3_rt::spawn(async move {
            let mut guard = guard;
            guard.reason = Some(receive(&guard.link, &guard.endpoint).await);
        });
        endpoint
    }
}

impl Link for SimLink {
    fn send(&self, message: Outgoing, _flush: Flush) {
        if self.is_closed() {
            return;
        }
        if let Some(slot) = &message.landing {
            slot.mark_sent();
        }
        let fate = self.net.network.fate(self.me, self.peer, message.bytes());
        if fate.reset {
            self.reset();
            return;
        }
        let mut head = message.head.clone();
        head.extend_from_slice(&message.body);
        let mut payload: Vec<u8> = message.payload.iter().flat_map(|piece| piece.iter().copied()).collect();
        if fate.damaged && !payload.is_empty() {
            let at = self.sim.below(payload.len() as u64) as usize;
            payload[at] ^= 1 << self.sim.below(8);
        }
        self.sim.trace(2, u64::from(self.me) << 32 | u64::from(self.peer), u64::from(fs3_core::crc32c(&head)));
        let frame = Arc::new(Frame { head, payload });
        if let (Some(delay_ns), Some(route)) = (fate.replay_ns, &self.route) {
            self.replay(route.clone(), frame.clone(), delay_ns);
        }
        if self.outbox.state.lock().abandoned {
            // Nobody is there any more: the system of a host that is up says so.
            if !self.net.network.is_dark(self.peer) {
                self.inbox.push(self.sim.now_ns() + 2 * fate.delay_ns, Arrival::End);
            }
            return;
        }
        self.outbox.push(self.sim.now_ns() + fate.delay_ns, Arrival::Message(frame));
    }

    fn flush(&self) {}

    fn close(&self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        self.inbox.state.lock().abandoned = true;
        self.inbox.changed.notify_one();
        if !self.net.network.is_dark(self.me) {
            let delay_ns = self.net.network.fate(self.me, self.peer, 0).delay_ns;
            self.outbox.push(self.sim.now_ns() + delay_ns, Arrival::End);
        }
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

impl SimLink {
    /// The connection breaks: each end notices in its own time.
    fn reset(&self) {
        let now_ns = self.sim.now_ns();
        self.inbox.push(now_ns + self.net.network.fate(self.peer, self.me, 0).delay_ns, Arrival::End);
        self.outbox.push(now_ns + self.net.network.fate(self.me, self.peer, 0).delay_ns, Arrival::End);
    }

    /// Let a request arrive again over a connection of its own, whose answer nobody waits for.
    fn replay(&self, route: Route, frame: Arc<Frame>, delay_ns: u64) {
        let (sim, net, me) = (self.sim.clone(), self.net.clone(), self.me);
        let Some(server) = net.listener(&route.addr).map(|l| l.process.clone()) else { return };
        server.spawn(async move {
            sleep(Duration::from_nanos(delay_ns)).await;
            let Some(listener) = net.listener(&route.addr) else { return };
            let (here, there) = pair(&sim, &net, (listener.process.number(), me), None);
            let now_ns = sim.now_ns();
            there.0.outbox.push(now_ns, Arrival::Message(frame));
            there.0.outbox.push(now_ns + 10_000_000_000, Arrival::End);
            listener.process.enter(|| (listener.accept)(here, route.peer));
        });
    }
}

/// Ends the connection when the receiving task ends for whatever reason, the end of its process included.
struct ClosedGuard<E: Endpoint> {
    link: Arc<SimLink>,
    endpoint: Arc<E>,
    reason: Option<Error>,
}

impl<E: Endpoint> Drop for ClosedGuard<E> {
    fn drop(&mut self) {
        self.link.close();
        let reason = self.reason.take().unwrap_or_else(|| Error::new(Code::Unavailable, "the connection was ended"));
        self.endpoint.closed(&reason);
    }
}

/// Take messages until the connection ends; says why it did.
async fn receive<E: Endpoint>(link: &SimLink, endpoint: &Arc<E>) -> Error {
    let closed = || Error::new(Code::Unavailable, "the peer closed the connection");
    loop {
        while link.inbox.next_ns().is_none() {
            if link.is_closed() {
                return closed();
            }
            link.inbox.changed.notified().await;
        }
        // Whatever is first now is so until it is taken: messages keep their order.
        let arrives_ns = link.inbox.next_ns().unwrap_or(0);
        let left_ns = arrives_ns.saturating_sub(link.sim.now_ns());
        if left_ns > 0 {
            sleep(Duration::from_nanos(left_ns)).await;
        }
        let patience = Instant::now() + Duration::from_millis(PEER_SILENT_MS_MAX);
        while link.net.network.is_cut(link.peer, link.me) {
            if Instant::now() > patience {
                return Error::new(Code::Unavailable, "the peer is silent");
            }
            sleep(PARTITION_POLL).await;
        }
        if link.is_closed() {
            return closed();
        }
        let next = link.inbox.state.lock().messages.pop_front();
        match next {
            Some((_, Arrival::Message(frame))) => {
                if let Err(error) = take(&frame, endpoint).await {
                    return error;
                }
            }
            _ => return closed(),
        }
    }
}

/// Give one message to the endpoint, checked as a transport has to.
async fn take<E: Endpoint>(frame: &Frame, endpoint: &Arc<E>) -> Result<()> {
    let head: &[u8; HEADER_BYTES] = frame.head.first_chunk().expect("a message has a header");
    let header = Header::decode(head, Limits::AUTHENTICATED)?;
    endpoint.admit().await;
    let body = Bytes::copy_from_slice(&frame.head[HEADER_BYTES..]);
    assert_eq!((header.body_bytes as usize, header.payload_bytes as usize), (body.len(), frame.payload.len()));
    debug_assert!(matches!(header.kind, Kind::Request | Kind::Response));
    let mut landing = endpoint.place(&header, &body)?;
    let mut rest = &frame.payload[..];
    while !rest.is_empty() {
        let copied = landing.fill(rest.len(), &mut [], &mut |windows| Ok(scatter(rest, windows)));
        // A landing that nobody wants any more swallows the bytes.
        let moved = copied.map_or(rest.len(), |n| n.expect("copying within memory cannot fail"));
        landing.advance(moved);
        rest = &rest[moved..];
    }
    endpoint.deliver(header, body, landing);
    Ok(())
}
