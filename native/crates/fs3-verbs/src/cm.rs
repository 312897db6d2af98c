//! Connections by the RDMA connection manager, which iWARP cannot do without: its queue pairs begin as TCP connections.

use crate::ffi::{self, CmLibrary, rdma_cm_event, rdma_cm_id, rdma_conn_param, rdma_event_channel};
use crate::{Error, Result, failed};
use std::ffi::CStr;
use std::net::{IpAddr, SocketAddr};
use std::ptr::{null, null_mut};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Where events arrive.
struct Channel {
    library: &'static CmLibrary,
    channel: *mut rdma_event_channel,
}

// SAFETY: the library is thread-safe; the pointer is used until Drop.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    fn new() -> Result<Arc<Self>> {
        let library = CmLibrary::get().map_err(Error)?;
        // SAFETY: no arguments.
        let channel = unsafe { (library.rdma_create_event_channel)() };
        if channel.is_null() {
            return Err(failed("the RDMA connection manager cannot be used"));
        }
        Ok(Arc::new(Self { library, channel }))
    }

    fn id(self: &Arc<Self>) -> Result<CmId> {
        let mut id = null_mut();
        // SAFETY: the channel is open and outlives the id.
        let made = unsafe { (self.library.rdma_create_id)(self.channel, &raw mut id, null_mut(), ffi::PS_TCP) };
        if made != 0 {
            return Err(failed("the RDMA connection manager gives no id"));
        }
        Ok(CmId { channel: self.clone(), id })
    }

    /// Look at the next event, if one comes before `deadline`.
    fn next<T>(&self, deadline: Instant, look: impl FnOnce(&rdma_cm_event) -> T) -> Result<Option<T>> {
        let left = deadline.saturating_duration_since(Instant::now());
        // SAFETY: the channel is open.
        let fd = unsafe { (*self.channel).fd };
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let timeout_ms = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
        // SAFETY: one descriptor.
        if unsafe { libc::poll(&raw mut poll, 1, timeout_ms) } <= 0 {
            return Ok(None);
        }
        let mut event = null_mut();
        // SAFETY: there is an event, so that this does not wait.
        if unsafe { (self.library.rdma_get_cm_event)(self.channel, &raw mut event) } != 0 {
            return Err(failed("no event of the RDMA connection manager can be taken"));
        }
        // SAFETY: the event lives until it is acknowledged.
        let seen = look(unsafe { &*event });
        // SAFETY: taken above, and only once.
        unsafe { (self.library.rdma_ack_cm_event)(event) };
        Ok(Some(seen))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: ids hold the channel, so none is left.
        unsafe { (self.library.rdma_destroy_event_channel)(self.channel) };
    }
}

/// A connection, or one being made. Dropping it ends it; a queue pair of it goes first.
pub struct CmId {
    channel: Arc<Channel>,
    id: *mut rdma_cm_id,
}

// SAFETY: the library is thread-safe; the pointer is used until Drop.
unsafe impl Send for CmId {}
// SAFETY: as above.
unsafe impl Sync for CmId {}

impl Drop for CmId {
    fn drop(&mut self) {
        // SAFETY: made on this channel and not destroyed before.
        unsafe { (self.channel.library.rdma_destroy_id)(self.id) };
    }
}

impl CmId {
    /// The device that the connection goes through.
    fn device(&self) -> Option<String> {
        // SAFETY: the id lives; a device that it is bound to has a name that ends with a zero.
        unsafe {
            let verbs = (*self.id).verbs;
            (!verbs.is_null()).then(|| CStr::from_ptr((*(*verbs).device).name.as_ptr()).to_string_lossy().into_owned())
        }
    }

    /// Wait for one kind of event.
    fn wait(&self, wanted: i32, deadline: Instant, what: &str) -> Result<()> {
        match self.channel.next(deadline, |event| (event.event, event.status))? {
            Some((event, 0)) if event == wanted => Ok(()),
            Some((event, status)) => {
                let why = std::io::Error::from_raw_os_error(status.saturating_abs());
                Err(Error(format!("{what}: event {event} of the RDMA connection manager ({why})")))
            }
            None => Err(Error(format!("{what}: no answer in time"))),
        }
    }
}

/// What a connection of the queue pair `number` is to be like, with data for the peer.
fn parameters(number: u32, reads: u8, data: &[u8]) -> rdma_conn_param {
    rdma_conn_param {
        private_data: if data.is_empty() { null() } else { data.as_ptr().cast() },
        private_data_len: data.len() as u8,
        responder_resources: reads,
        initiator_depth: reads,
        flow_control: 0,
        retry_count: 7,
        rnr_retry_count: 7,
        srq: 1,
        qp_num: number,
    }
}

/// Connect the queue pair `number`, which is of `device`, to a listener; `data` tells it what for. Up to `reads` RDMA
/// READs may be under way in each direction. Blocking, until `timeout`.
///
/// # Errors
/// Without librdmacm, when the way there goes through another device, when nobody listens, or in the end.
pub fn connect(number: u32, device: &str, to: SocketAddr, reads: u8, data: &[u8], timeout: Duration) -> Result<CmId> {
    let deadline = Instant::now() + timeout;
    let id = Channel::new()?.id()?;
    let library = id.channel.library;
    let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    let mut address = Address::of(to);
    // SAFETY: the id lives, the address is one of its family.
    if unsafe { (library.rdma_resolve_addr)(id.id, null_mut(), address.as_mut_ptr(), timeout_ms) } != 0 {
        return Err(failed("the peer's RDMA address cannot be resolved"));
    }
    id.wait(ffi::CM_ADDR_RESOLVED, deadline, "the peer's RDMA address cannot be resolved")?;
    match id.device() {
        Some(found) if found == device => {}
        found => return Err(Error(format!("the way to {to} goes through {found:?}, not through {device}"))),
    }
    // SAFETY: the id lives.
    if unsafe { (library.rdma_resolve_route)(id.id, timeout_ms) } != 0 {
        return Err(failed("there is no RDMA route to the peer"));
    }
    id.wait(ffi::CM_ROUTE_RESOLVED, deadline, "there is no RDMA route to the peer")?;
    let mut param = parameters(number, reads, data);
    // SAFETY: the id and what `param` points to live.
    if unsafe { (library.rdma_connect)(id.id, &raw mut param) } != 0 {
        return Err(failed("the peer cannot be connected to"));
    }
    id.wait(ffi::CM_ESTABLISHED, deadline, "the peer did not accept the connection")?;
    Ok(id)
}

/// Takes connections at an address. Thread-safe.
pub struct Listener {
    id: CmId,
    port: u16,
}

/// What happened at a listener.
pub enum Event {
    /// Somebody wants to connect: [`Listener::accept`] it or drop it. `data` is what the peer said.
    Request {
        /// The connection to be.
        id: CmId,
        /// What the peer said.
        data: Vec<u8>,
    },
    /// An accepted connection, told by [`CmId::key`], is established.
    Established(usize),
    /// A connection ended, or never came to be.
    Ended(usize),
}

impl CmId {
    /// Tells connections apart as long as they live.
    pub fn key(&self) -> usize {
        self.id as usize
    }

    /// Accept a request, with the queue pair `number` of the device that it goes through. [`Event::Established`]
    /// follows, or [`Event::Ended`].
    ///
    /// # Errors
    /// When the peer is gone or the queue pair is not fit.
    pub fn accept(&self, number: u32, reads: u8) -> Result<()> {
        let mut param = parameters(number, reads, &[]);
        // SAFETY: the id lives.
        let accepted = unsafe { (self.channel.library.rdma_accept)(self.id, &raw mut param) };
        if accepted == 0 { Ok(()) } else { Err(failed("a connection cannot be accepted")) }
    }

    /// Refuse a request.
    pub fn reject(self) {
        // SAFETY: the id lives.
        unsafe { (self.channel.library.rdma_reject)(self.id, null(), 0) };
    }
}

impl Listener {
    /// Listen at `ip`, which is an address of an RDMA device, on a free port.
    ///
    /// # Errors
    /// Without librdmacm, or when the address is none of an RDMA device.
    pub fn bind(ip: IpAddr) -> Result<Self> {
        let id = Channel::new()?.id()?;
        let library = id.channel.library;
        let mut address = Address::of(SocketAddr::new(ip, 0));
        // SAFETY: the id lives, the address is one of its family.
        if unsafe { (library.rdma_bind_addr)(id.id, address.as_mut_ptr()) } != 0 {
            return Err(failed(&format!("cannot listen for RDMA connections at {ip}")));
        }
        // SAFETY: the id is bound.
        if unsafe { (library.rdma_listen)(id.id, BACKLOG) } != 0 {
            return Err(failed(&format!("cannot listen for RDMA connections at {ip}")));
        }
        // SAFETY: as above.
        let port = u16::from_be(unsafe { (library.rdma_get_src_port)(id.id) });
        Ok(Self { id, port })
    }

    /// The port that peers connect to, in the number space of the connection manager.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The next event; `None` when there is none in time. Blocking.
    ///
    /// # Errors
    /// When the connection manager is out of order.
    pub fn next(&self, timeout: Duration) -> Result<Option<Event>> {
        let channel = &self.id.channel;
        channel.next(Instant::now() + timeout, |event| match event.event {
            ffi::CM_CONNECT_REQUEST => {
                let id = CmId { channel: channel.clone(), id: event.id };
                let (start, bytes) = (event.conn.private_data.cast::<u8>(), event.conn.private_data_len as usize);
                // SAFETY: the event has that many bytes there, until it is acknowledged.
                let said = || unsafe { std::slice::from_raw_parts(start, bytes) }.to_vec();
                Event::Request { id, data: if start.is_null() { Vec::new() } else { said() } }
            }
            ffi::CM_ESTABLISHED => Event::Established(event.id as usize),
            _ => Event::Ended(event.id as usize),
        })
    }
}

/// A socket address as C has it.
enum Address {
    V4(libc::sockaddr_in),
    V6(libc::sockaddr_in6),
}

impl Address {
    fn of(address: SocketAddr) -> Self {
        match address {
            SocketAddr::V4(v4) => Self::V4(libc::sockaddr_in {
                sin_family: libc::AF_INET as u16,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            }),
            SocketAddr::V6(v6) => Self::V6(libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as u16,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            }),
        }
    }

    fn as_mut_ptr(&mut self) -> *mut libc::sockaddr {
        match self {
            Self::V4(address) => (&raw mut *address).cast(),
            Self::V6(address) => (&raw mut *address).cast(),
        }
    }
}
