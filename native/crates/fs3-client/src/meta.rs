//! One metadata call: the same bytes (and so the same OpId) to one meta service after another until the
//! deadline.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use fs3_core::{Code, Error, Result};
use fs3_rt::Instant;
use parking_lot::RwLock;
use prost::encoding::{DecodeContext, WireType, skip_field};
use prost::{DecodeError, Message};

use crate::backoff::Backoff;
use crate::wire::Wire;
use fs3_proto::v1::{Caller, Method, OpId};

/// A service that failed is not asked first for this long.
const AVOID: Duration = Duration::from_secs(2);

/// The meta services and which one is in use.
pub(crate) struct Metas {
    /// Those of the routing, then the configured ones that it does not have.
    list: RwLock<Vec<Service>>,
    configured: Vec<String>,
    current: AtomicUsize,
}

struct Service {
    address: String,
    hash: u64,
    /// It may be asked by inode: all clients know it.
    routed: bool,
    failed: Option<Instant>,
}

impl Service {
    fn new(address: &str, routed: bool) -> Self {
        Self { address: address.to_owned(), hash: fnv(address.as_bytes()), routed, failed: None }
    }
}

/// FNV-1a of 64 bits.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// Weight of a service for an inode.
fn weight(service: &Service, inode: u64) -> u64 {
    let mixed = (service.hash ^ inode).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Metas {
    pub fn new(configured: Vec<String>) -> Self {
        // Clients start at different services.
        let start = fs3_rt::random_below(configured.len().max(1) as u64) as usize;
        let list = configured.iter().map(|address| Service::new(address, false)).collect();
        Self { list: RwLock::new(list), configured, current: AtomicUsize::new(start) }
    }

    /// Take the services of a new routing: those first, then the configured ones it does not have.
    pub fn learn(&self, routed: &[String]) {
        if routed.is_empty() {
            return;
        }
        let mut list = self.list.write();
        let using = list[self.current.load(Ordering::Relaxed) % list.len()].address.clone();
        let mut next: Vec<_> = routed.iter().map(|address| Service::new(address, true)).collect();
        let others = self.configured.iter().filter(|address| !routed.contains(address));
        next.extend(others.map(|address| Service::new(address, false)));
        for service in &mut next {
            service.failed = list.iter().find(|known| known.address == service.address).and_then(|known| known.failed);
        }
        if let Some(at) = next.iter().position(|service| service.address == using) {
            self.current.store(at, Ordering::Relaxed);
        }
        *list = next;
    }

    /// The one in use, with the number to pass to [`Metas::failed`].
    pub fn pick(&self) -> (usize, String) {
        let list = self.list.read();
        let at = self.current.load(Ordering::Relaxed) % list.len();
        (at, list[at].address.clone())
    }

    /// The service where all clients change this inode: changes that meet there wait for each other instead of
    /// conflicting in the store. Any other does as well. By rendezvous hash (Thaler and Ravishankar, 1998).
    pub fn owner(&self, inode: u64) -> (usize, String) {
        let list = self.list.read();
        let fit = |service: &Service| service.routed && service.failed.is_none_or(|at| at.elapsed() >= AVOID);
        let candidates = list.iter().enumerate().filter(|(_, service)| fit(service));
        match candidates.max_by_key(|(_, service)| weight(service, inode)) {
            Some((at, service)) => (at, service.address.clone()),
            None => {
                drop(list);
                self.pick()
            }
        }
    }

    /// Move on from `at`, unless somebody has already.
    pub fn failed(&self, at: usize) {
        let mut list = self.list.write();
        let count = list.len();
        if let Some(service) = list.get_mut(at) {
            service.failed = Some(Instant::now());
        }
        drop(list);
        let _ = self
            .current
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| (now % count == at).then_some((at + 1) % count));
    }

    /// Whether `address` is one of them.
    pub fn has(&self, address: &str) -> bool {
        self.list.read().iter().any(|known| known.address == address)
    }

    pub fn count(&self) -> usize {
        self.list.read().len()
    }
}

/// Limits of one call.
#[derive(Clone, Copy)]
pub(crate) struct CallLimits {
    pub deadline: Instant,
    pub attempt: Duration,
}

/// Call a meta service, failing over while the error is worth it; the encoded response.
///
/// Every try carries the same OpId. All but the first say that others may have arrived: what is refused then takes no
/// effect later either.
///
/// `inode`: of a change of that inode alone, which [`Metas::owner`] is asked for first.
pub(crate) async fn call<Req: Message>(
    wire: &Wire,
    metas: &Metas,
    method: Method,
    request: &Req,
    inode: Option<u64>,
    limits: CallLimits,
) -> Result<Bytes> {
    let mut body = Encoded(request.encode_to_vec().into());
    let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
    let mut failures = 0;
    let mut sent = false;
    // Says more than the time-out of a last try that was cut short by the deadline.
    let mut telling: Option<Error> = None;
    loop {
        let (at, address) = match inode.filter(|_| failures == 0) {
            Some(inode) => metas.owner(inode),
            None => metas.pick(),
        };
        let (now, cut) = (Instant::now(), Instant::now() + limits.attempt > limits.deadline);
        let attempt = if cut { limits.deadline } else { now + limits.attempt };
        let error = match wire.call(&address, method, body.clone(), attempt).await {
            Ok(reply) => return Ok(reply),
            Err(error) => error,
        };
        if !error.retryable() {
            return Err(error);
        }
        sent |= error.code == Code::Timeout || error.maybe_applied;
        if error.code != Code::Busy {
            metas.failed(at);
        }
        failures += 1;
        if failures == 1 {
            body = resent(body);
        }
        // One quick round over all services, then with pauses.
        let pause = if failures < metas.count() { Duration::ZERO } else { backoff.next() };
        let error = if cut && error.code == Code::Timeout { telling.take().unwrap_or(error) } else { error };
        if Instant::now() + pause >= limits.deadline {
            return Err(give_up(error, sent));
        }
        tracing::debug!(%address, ?method, error = %error, "metadata call failed; trying again");
        telling = Some(error);
        fs3_rt::sleep(pause).await;
    }
}

/// The response in what [`call`] gave.
pub(crate) fn decoded<Resp: Message + Default>(reply: Bytes) -> Result<Resp> {
    Resp::decode(reply)
        .map_err(|e| Error::new(Code::Protocol, format!("a meta service sent a reply that is none: {e}")))
}

/// What every request of a metadata operation begins with; those that change nothing have no `op`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct RequestHead {
    #[prost(message, optional, tag = "1")]
    pub caller: Option<Caller>,
    #[prost(message, optional, tag = "2")]
    pub op: Option<OpId>,
}

/// A message that is encoded already.
#[derive(Clone, Debug, Default)]
pub(crate) struct Encoded(pub Bytes);

impl Message for Encoded {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        buf.put_slice(&self.0);
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        context: DecodeContext,
    ) -> std::result::Result<(), DecodeError> {
        skip_field(wire_type, tag, buf, context)
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

/// The request of a further try. A field that comes twice is merged, so the mark is added behind what is encoded.
fn resent(body: Encoded) -> Encoded {
    // Other messages than an OpId in its place have other types in theirs.
    let mutates = RequestHead::decode(body.0.clone()).is_ok_and(|head| head.op.is_some_and(|op| op.sequence > 0));
    if !mutates {
        return body;
    }
    let mark = RequestHead { caller: None, op: Some(OpId { resent: true, ..Default::default() }) };
    let mut bytes = body.0.to_vec();
    bytes.extend(mark.encode_to_vec());
    Encoded(bytes.into())
}

fn give_up(last: Error, sent: bool) -> Error {
    let message = format!("no meta service answered in time; the last error: {}", last.message);
    let error = Error::new(last.code, message);
    if sent { error.maybe_applied() } else { error }
}

#[cfg(test)]
mod tests {
    use fs3_proto::v1::{KeepaliveRequest, ListRequest, LookupRequest, MkdirRequest, PathAt, StatRequest};

    use super::*;

    #[test]
    fn only_operations_that_change_something_are_marked_as_sent_again() {
        let op = Some(OpId { client_id: vec![7; 16].into(), sequence: 9, resent: false });
        let at = Some(PathAt { inode: 1, path: "a".into(), follow: true });
        let caller = Some(Caller { uid: 5, ..Default::default() });
        let mkdir = MkdirRequest { caller: caller.clone(), op, at: at.clone(), mode: 0o700, ..Default::default() };
        let marked = MkdirRequest::decode(resent(Encoded(mkdir.encode_to_vec().into())).0).unwrap();
        assert!(marked.op.as_ref().unwrap().resent);
        assert_eq!(MkdirRequest { op: mkdir.op.clone(), ..marked }, mkdir);
        let unchanged = |body: Vec<u8>| assert_eq!(resent(Encoded(body.clone().into())).0, body);
        unchanged(LookupRequest { caller: caller.clone(), parent: 3, name: "n".into() }.encode_to_vec());
        for (inode, path, follow) in [(1, "a", true), (0, "a", false), (0, "", true), (1, "", false)] {
            let at = Some(PathAt { inode, path: path.into(), follow });
            unchanged(StatRequest { caller: caller.clone(), at: at.clone() }.encode_to_vec());
            unchanged(ListRequest { caller: caller.clone(), at, ..Default::default() }.encode_to_vec());
        }
        unchanged(KeepaliveRequest { client_id: vec![9; 16].into(), description: "d".into() }.encode_to_vec());
    }

    #[test]
    fn all_clients_ask_one_service_for_an_inode_and_few_inodes_move_when_one_goes() {
        let addresses: Vec<String> = (0..5).map(|i| format!("10.0.0.{i}:7000")).collect();
        let (one, other) = (Metas::new(vec![addresses[3].clone()]), Metas::new(vec!["other:1".into()]));
        one.learn(&addresses);
        other.learn(&addresses.iter().rev().cloned().collect::<Vec<_>>());
        let owners: Vec<_> = (1..=1000).map(|inode| one.owner(inode).1).collect();
        assert!((1..=1000).all(|inode| other.owner(inode).1 == owners[inode as usize - 1]));
        assert!(addresses.iter().all(|a| (100..300).contains(&owners.iter().filter(|o| *o == a).count())));
        let (at, gone) = one.owner(1);
        one.failed(at);
        for (inode, before) in (1..).zip(&owners) {
            let now = one.owner(inode).1;
            assert!(if *before == gone { now != gone } else { now == *before });
        }
    }

    #[test]
    fn without_a_routing_the_service_in_use_is_asked() {
        let metas = Metas::new(vec!["a:1".into(), "b:1".into()]);
        assert_eq!(metas.owner(7), metas.pick());
    }

    #[test]
    fn a_failed_service_is_left_once() {
        let metas = Metas::new(vec!["a:1".into(), "b:1".into(), "c:1".into()]);
        let (at, first) = metas.pick();
        metas.failed(at);
        metas.failed(at);
        let (next, second) = metas.pick();
        assert_eq!(next, (at + 1) % 3);
        assert_ne!(first, second);
    }

    #[test]
    fn the_service_in_use_stays_in_use_when_the_list_changes() {
        let metas = Metas::new(vec!["a:1".into()]);
        metas.learn(&["b:1".into(), "c:1".into(), "a:1".into()]);
        assert_eq!(metas.pick().1, "a:1");
        metas.learn(&["b:1".into(), "c:1".into()]);
        assert_eq!(metas.count(), 3);
    }
}
