//! One port of one device, opened: receives, registered memory, queue pairs.

use super::cm::{Acceptor, Expectation};
use super::counters::Counters;
use super::memory::{Registered, Registrations};
use super::wire::MESSAGE_BYTES;
use super::{LocalPort, RdmaSettings, Transport, unavailable};
use bytes::Bytes;
use fs3_core::{AlignedBuf, BufferPool, Code, Error, RegionMut, Result};
use fs3_proto::v1::{RdmaEnd, RdmaPort, rdma_port::Kind};
use fs3_verbs::{
    Address, CompletionQueue, Device, MemoryRegion, PathSettings, QueuePair, QueuePairSettings, Sge, SharedReceiveQueue,
};
use parking_lot::Mutex;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;

/// Receives of one device; all its connections share them.
const RECEIVES_MAX: u32 = 4096;
/// Receives whose memory is made at a time.
const SLAB: usize = 256;
/// Receives that one connection grants its peer, while there are enough.
const RECEIVES_PER_CONNECTION: u32 = 64;
/// With fewer than these a connection cannot work.
const RECEIVES_MIN: u32 = 4;
/// Work requests of one queue pair.
const WORK_REQUESTS: u32 = 512;
/// Pieces of memory per work request.
const SGES: u32 = 16;
/// Bytes that a work request carries itself, where the device can.
const INLINE_BYTES: u32 = 220;
/// RDMA READs of one connection under way at a time.
const READS: u8 = 16;
/// Memory for messages, and for payload whose own memory is not registered.
const STAGING_BYTES_MAX: usize = 256 << 20;

/// An opened port. Thread-safe.
pub(crate) struct Nic {
    device: Arc<Device>,
    port: LocalPort,
    mtu: u8,
    /// Longest RDMA operation.
    pub operation_bytes_max: usize,
    receives: Arc<Receives>,
    registrations: Arc<Registrations>,
    staging: BufferPool,
    pub counters: Arc<Counters>,
    /// Of an iWARP port, once a server needs it.
    acceptor: Mutex<Option<Arc<Acceptor>>>,
}

/// Receives that are posted, each for one message, and how many of them peers may count on.
struct Receives {
    device: Arc<Device>,
    counters: Arc<Counters>,
    queue: Arc<SharedReceiveQueue>,
    state: Mutex<Granted>,
}

/// Memory of [`SLAB`] receives.
struct Slab {
    // Dropped before its memory.
    region: MemoryRegion,
    memory: AlignedBuf,
}

#[derive(Default)]
struct Granted {
    slabs: Vec<Slab>,
    granted: u32,
    /// Receives posted so far; one that was used is posted again when its message is done with.
    made: u32,
    max: u32,
}

/// Memory of a received message; goes back when it is dropped.
pub(crate) struct Received {
    receives: Arc<Receives>,
    /// Start of its memory, which lives as long as the receives.
    start: *mut u8,
    index: u64,
    bytes: usize,
}

// SAFETY: the memory belongs to this message until its receive is posted again, in Drop.
unsafe impl Send for Received {}
// SAFETY: shared access is read-only.
unsafe impl Sync for Received {}

/// Receives that a connection may promise to its peer.
pub(crate) struct Grant {
    receives: Arc<Receives>,
    pub count: u32,
}

/// A queue pair that is not connected yet.
pub(crate) struct Ready {
    pub nic: Arc<Nic>,
    pub completions: Arc<CompletionQueue>,
    pub pair: QueuePair,
    pub grant: Grant,
    psn: u32,
    reads_asked: u8,
    reads_answered: u8,
    /// The connection that the client makes, when that is not this end's to do.
    expectation: Option<Expectation>,
}

impl Nic {
    pub fn open(port: &LocalPort, settings: &RdmaSettings, counters: &Arc<Counters>) -> Result<Arc<Self>> {
        let device = Device::open(&port.device).map_err(unavailable)?;
        let state = device.port(port.number).map_err(unavailable)?;
        let limits = device.limits();
        let max = RECEIVES_MAX.min(limits.shared_receives_max);
        if max < RECEIVES_MIN {
            return Err(Error::new(Code::Unavailable, format!("{} has no shared receive queues", port.device)));
        }
        let queue = Arc::new(SharedReceiveQueue::new(&device, max).map_err(unavailable)?);
        let state_of_receives = Mutex::new(Granted { max, ..Granted::default() });
        let receives = Receives { device: device.clone(), counters: counters.clone(), queue, state: state_of_receives };
        let registrations = Registrations::new(&device, settings.registered_bytes_max, counters);
        tracing::info!("RDMA on {} port {}", port.device, port.number);
        Ok(Arc::new(Self {
            mtu: state.mtu.min(settings.mtu_max),
            operation_bytes_max: (state.message_bytes_max as usize).min(8 << 20),
            device,
            port: port.clone(),
            receives: Arc::new(receives),
            registrations,
            staging: BufferPool::new(STAGING_BYTES_MAX),
            counters: counters.clone(),
            acceptor: Mutex::default(),
        }))
    }

    /// Name of the device.
    pub fn device_name(&self) -> &str {
        &self.port.device
    }

    /// Whether a completion queue can wait for messages only. Soft-iWARP, in Linux 6.1 at least, makes no event of a
    /// message then.
    pub fn tells_solicited(&self) -> bool {
        self.port.kind != Kind::Iwarp
    }

    /// Keys for memory, when it is or can be registered.
    pub fn registered(&self, start: *const u8, bytes: usize) -> Option<Registered> {
        self.registrations.find(start, bytes)
    }

    /// Registered memory to copy through.
    pub fn stage(&self, bytes: usize) -> Result<(RegionMut, Registered)> {
        // A buffer beyond the pool's limit must be a mapping of its own to be registered.
        let fresh = || RegionMut::from_aligned(AlignedBuf::new(bytes.max(AlignedBuf::MAP_BYTES_MIN)), bytes);
        let mut region = self.staging.get(bytes).unwrap_or_else(fresh);
        let registered = self.registered(region.as_mut_ptr(), bytes.max(1));
        let refused = || Error::new(Code::Unavailable, "no memory can be registered for RDMA; see `fs3 rdma check`");
        Ok((region, registered.ok_or_else(refused)?))
    }

    /// Make a queue pair on this port.
    pub fn prepare(self: &Arc<Self>, settings: &RdmaSettings) -> Result<Ready> {
        let limits = self.device.limits();
        let grant = self.receives.grant()?;
        let work_requests = WORK_REQUESTS.min(limits.work_requests_max);
        let entries = (work_requests + grant.count + 16).min(limits.completions_max);
        let completions = Arc::new(CompletionQueue::new(&self.device, entries).map_err(unavailable)?);
        let wanted = QueuePairSettings {
            work_requests,
            sges: SGES.min(limits.sges_max).min(limits.read_sges_max).max(1),
            inline_bytes: INLINE_BYTES,
            port: self.port.number,
            pkey_index: settings.pkey_index,
        };
        let pair = QueuePair::new(&completions, &self.receives.queue, wanted).map_err(unavailable)?;
        Ok(Ready {
            nic: self.clone(),
            completions,
            pair,
            grant,
            psn: rand_psn(),
            reads_asked: READS.min(limits.reads_asked_max),
            reads_answered: READS.min(limits.reads_answered_max),
            expectation: None,
        })
    }

    fn acceptor(&self) -> Result<Arc<Acceptor>> {
        let mut acceptor = self.acceptor.lock();
        if let Some(acceptor) = &*acceptor {
            return Ok(acceptor.clone());
        }
        let ip = Ipv6Addr::from(self.port.gid.value);
        Ok(acceptor.insert(Acceptor::start(ip.to_canonical())?).clone())
    }

    /// A message that came into receive `index`.
    pub fn received(&self, index: u64, bytes: u32) -> Received {
        let start = self.receives.state.lock().slot(index).0;
        Received { receives: self.receives.clone(), start, index, bytes: bytes as usize }
    }
}

impl Receives {
    fn grant(self: &Arc<Self>) -> Result<Grant> {
        let mut state = self.state.lock();
        // Later connections find fewer left, so that many can live.
        let count = RECEIVES_PER_CONNECTION.min((state.max - state.granted) / 4).max(RECEIVES_MIN);
        if state.granted + count > state.max {
            return Err(Error::new(Code::Unavailable, "all RDMA receives of the device are in use"));
        }
        while state.made < state.granted + count {
            if state.made as usize == state.slabs.len() * SLAB {
                state.slabs.push(Slab::new(&self.device)?);
                self.counters.registered(SLAB * MESSAGE_BYTES);
            }
            let (start, lkey) = state.slot(u64::from(state.made));
            self.post(u64::from(state.made), start, lkey)?;
            state.made += 1;
        }
        state.granted += count;
        Ok(Grant { receives: self.clone(), count })
    }

    fn post(&self, index: u64, start: *mut u8, lkey: u32) -> Result<()> {
        let memory = Sge { addr: start as u64, length: MESSAGE_BYTES as u32, lkey };
        // SAFETY: the slot is untouched until its receive completes; memory, region and queue live together.
        unsafe { self.queue.post(index, memory) }.map_err(unavailable)
    }
}

impl Slab {
    fn new(device: &Arc<Device>) -> Result<Self> {
        let memory = AlignedBuf::new(SLAB * MESSAGE_BYTES);
        // SAFETY: the memory is dropped after the region, by the order of the fields.
        let region = unsafe { device.register(memory.as_mut_ptr(), memory.len()) }.map_err(unavailable)?;
        Ok(Self { region, memory })
    }
}

impl Granted {
    /// Start and key of a receive's memory.
    fn slot(&self, index: u64) -> (*mut u8, u32) {
        let slab = &self.slabs[index as usize / SLAB];
        // SAFETY: within the slab.
        let start = unsafe { slab.memory.as_mut_ptr().add(index as usize % SLAB * MESSAGE_BYTES) };
        (start, slab.region.lkey())
    }
}

impl std::ops::Deref for Received {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the slot belongs to this message until it is posted again, in Drop.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes.min(MESSAGE_BYTES)) }
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        let lkey = self.receives.state.lock().slot(self.index).1;
        if let Err(error) = self.receives.post(self.index, self.start, lkey) {
            tracing::error!("a receive is lost: {error}");
        }
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.receives.state.lock().granted -= self.count;
    }
}

impl Ready {
    /// How the peer reaches this end.
    pub fn end(&self) -> RdmaEnd {
        RdmaEnd {
            number: self.pair.number(),
            psn: self.psn,
            gid: self.nic.port.gid.value.to_vec().into(),
            lid: u32::from(self.nic.port.lid),
            mtu: u32::from(self.nic.mtu),
            reads_asked: u32::from(self.reads_asked),
            reads_answered: u32::from(self.reads_answered),
            receives: self.grant.count,
            message_bytes: MESSAGE_BYTES as u32,
            cm_port: self.expectation.as_ref().map_or(0, |e| u32::from(e.port())),
            cm_key: self.expectation.as_ref().map_or_else(Bytes::new, |e| Bytes::copy_from_slice(&e.key)),
        }
    }

    /// As a server: on a port whose connections the connection manager makes, be ready for the client's.
    pub fn expecting(mut self) -> Result<Self> {
        if self.nic.port.kind == Kind::Iwarp {
            self.expectation = Some(self.nic.acceptor()?.expect(self.pair.number(), self.reads_answered));
        }
        Ok(self)
    }

    /// Connect to the other end.
    pub async fn connect(&mut self, peer: &RdmaEnd, settings: &RdmaSettings) -> Result<()> {
        check(peer)?;
        if self.nic.port.kind == Kind::Iwarp {
            self.connect_managed(peer).await
        } else {
            self.connect_here(peer, settings)
        }
    }

    async fn connect_managed(&mut self, peer: &RdmaEnd) -> Result<()> {
        if let Some(expectation) = self.expectation.take() {
            self.pair.connected_by(expectation.established().await?);
            return Ok(());
        }
        let gid: [u8; 16] = peer.gid[..].try_into().map_err(|_| wrong())?;
        let port = u16::try_from(peer.cm_port).map_err(|_| wrong())?;
        let to = SocketAddr::new(Ipv6Addr::from(gid).to_canonical(), port);
        let reads = self.reads_asked.min(u8::try_from(peer.reads_answered).map_err(|_| wrong())?);
        let (number, device, key) = (self.pair.number(), self.nic.port.device.clone(), peer.cm_key.clone());
        let connect = move || fs3_verbs::cm::connect(number, &device, to, reads, &key, super::cm::CONNECT_TIMEOUT);
        let connected = tokio::task::spawn_blocking(connect).await;
        let stopped = |_| Error::new(Code::Unavailable, "the runtime is being shut down");
        self.pair.connected_by(connected.map_err(stopped)?.map_err(unavailable)?);
        Ok(())
    }

    fn connect_here(&self, peer: &RdmaEnd, settings: &RdmaSettings) -> Result<()> {
        let gid: [u8; 16] = peer.gid[..].try_into().map_err(|_| wrong())?;
        let small = |n: u32| u8::try_from(n).map_err(|_| wrong());
        let address = Address { number: peer.number, psn: peer.psn, lid: peer.lid as u16, gid };
        let path = PathSettings {
            gid_index: self.nic.port.gid.index,
            global: self.nic.port.kind != Kind::Infiniband || gid[..8] != self.nic.port.gid.value[..8],
            mtu: self.nic.mtu.min(small(peer.mtu)?).max(1),
            service_level: settings.service_level,
            traffic_class: settings.traffic_class,
            timeout: settings.timeout,
            retries: settings.retries.min(7),
            reads_asked: self.reads_asked.min(small(peer.reads_answered)?),
            reads_answered: self.reads_answered.min(small(peer.reads_asked)?),
        };
        self.pair.connect(self.psn, &address, &path).map_err(unavailable)
    }
}

/// Messages are as long at both ends, and some can be sent.
fn check(peer: &RdmaEnd) -> Result<()> {
    let fits = peer.message_bytes == MESSAGE_BYTES as u32 && peer.receives >= RECEIVES_MIN;
    if fits { Ok(()) } else { Err(wrong()) }
}

fn wrong() -> Error {
    Error::new(Code::Protocol, "the peer's end of an RDMA connection cannot be right")
}

/// A port here and an offered one that can reach each other: the pair with the most in common.
pub(crate) fn choose<'a>(transport: &'a Transport, offered: &[RdmaPort]) -> Option<(&'a LocalPort, usize)> {
    let mut best: Option<(u32, &LocalPort, usize)> = None;
    for here in transport.ports() {
        for (at, there) in offered.iter().enumerate() {
            let Some(common) = reach(here, there) else { continue };
            if best.is_none_or(|(most, ..)| common > most) {
                best = Some((common, here, at));
            }
        }
    }
    best.map(|(_, here, at)| (here, at))
}

/// Bits that the addresses have in common; `None` when one cannot be reached from the other.
fn reach(here: &LocalPort, there: &RdmaPort) -> Option<u32> {
    let gid: [u8; 16] = there.gid[..].try_into().ok()?;
    let common = (u128::from_be_bytes(gid) ^ u128::from_be_bytes(here.gid.value)).leading_zeros();
    let possible = here.kind as i32 == there.kind
        && match here.kind {
            Kind::Infiniband => common >= 64,
            // An IPv4 address (in IPv6 form) and an IPv6 address do not reach each other.
            Kind::RoceV2 | Kind::Iwarp => Ipv6Addr::from(gid).to_ipv4_mapped().is_some() == here.gid.is_ipv4(),
            _ => true,
        };
    possible.then_some(common)
}

fn rand_psn() -> u32 {
    // Unlike that of the connection before it on the same numbers; it is no secret.
    (fs3_core::monotonic_ns() as u32).wrapping_mul(0x9e37_79b1) & 0x00ff_ffff
}

/// The end of the peer, as it sent it.
pub(crate) fn decode_end(body: &Bytes) -> Result<RdmaEnd> {
    prost::Message::decode(body.clone())
        .map_err(|_| Error::new(Code::Protocol, "the peer's end of an RDMA connection cannot be read"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_with_other_messages_or_too_few_receives_is_refused() {
        let good = RdmaEnd { message_bytes: MESSAGE_BYTES as u32, receives: RECEIVES_MIN, ..RdmaEnd::default() };
        assert!(check(&good).is_ok());
        assert_eq!(check(&RdmaEnd { receives: 0, ..good.clone() }).unwrap_err().code, Code::Protocol);
        assert_eq!(check(&RdmaEnd { message_bytes: 4096, ..good }).unwrap_err().code, Code::Protocol);
    }
}
