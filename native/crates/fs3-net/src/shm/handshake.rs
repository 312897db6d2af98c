//! How two processes of one host get mappings of each other's memory.
//!
//! The server listens on an abstract Unix socket, which exists only in its network namespace, for this one connection. The
//! client says there what the hello told it, and brings its memory; the server answers with the page of counters and its
//! memory. Whatever fails leaves the connection with plain TCP.

use super::memory::{Control, Mapped};
use super::{Counters, SharedMemory, descriptors};
use fs3_core::Arena;
use fs3_proto::v1::SharedMemoryOffer;
use socket2::SockRef;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

/// How long one step may take.
const STEP_MAX: Duration = Duration::from_secs(1);
/// Strangers that a server turns away before it gives up.
const STRANGERS_MAX: usize = 4;
const NONCE_BYTES: usize = 16;

/// What a server offers to one client.
pub(crate) struct Offer {
    listener: UnixListener,
    socket: Vec<u8>,
    nonce: [u8; NONCE_BYTES],
    arena: &'static Arena,
}

impl Offer {
    /// `None` when this process has no memory to share.
    ///
    /// # Errors
    /// Those of the system.
    pub fn new() -> io::Result<Option<Self>> {
        let Some(arena) = Arena::get() else { return Ok(None) };
        let name = u64::from_le_bytes(fs3_rt::random_bytes());
        let socket = format!("fs3-{name:016x}").into_bytes();
        let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&socket)?)?;
        SockRef::from(&listener).set_read_timeout(Some(STEP_MAX))?;
        Ok(Some(Self { listener, socket, nonce: fs3_rt::random_bytes(), arena }))
    }

    /// What the client is told.
    pub fn to_wire(&self) -> SharedMemoryOffer {
        SharedMemoryOffer { socket: self.socket.clone().into(), nonce: self.nonce.to_vec().into() }
    }

    /// Wait for the client, and exchange mappings with it. Blocking, some seconds at most.
    ///
    /// # Errors
    /// Those of the system; `PermissionDenied` when only strangers came.
    pub fn serve(self, counters: Arc<Counters>) -> io::Result<SharedMemory> {
        for _ in 0..STRANGERS_MAX {
            let (stream, _) = self.listener.accept()?;
            limit(&stream)?;
            let mut said = [0; NONCE_BYTES + 1];
            let Ok((n, files)) = descriptors::receive(&stream, &mut said) else { continue };
            if said[..n] != self.nonce || !descriptors::peer_is_trusted(&stream)? {
                continue;
            }
            let theirs = files.first().map(Mapped::map).transpose()?;
            let (control, file) = Control::create()?;
            descriptors::send(&stream, b"s", &[file.as_fd(), self.arena.descriptor()])?;
            return Ok(SharedMemory::new(control, true, true, theirs, counters));
        }
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

/// Take a server's offer. Blocking, some seconds at most.
///
/// # Errors
/// Those of the system; `ConnectionRefused` where the socket is in another network namespace.
pub(crate) fn fetch(offer: &SharedMemoryOffer, counters: Arc<Counters>) -> io::Result<SharedMemory> {
    let stream = UnixStream::connect_addr(&SocketAddr::from_abstract_name(&offer.socket)?)?;
    limit(&stream)?;
    if !descriptors::peer_is_trusted(&stream)? || offer.nonce.is_empty() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let ours: Vec<BorrowedFd<'_>> = Arena::open().map(Arena::descriptor).into_iter().collect();
    descriptors::send(&stream, &offer.nonce, &ours)?;
    let (_, files) = descriptors::receive(&stream, &mut [0; 1])?;
    let [control, memory] = &files[..] else {
        return Err(io::Error::other("the server sent no descriptors"));
    };
    let (control, theirs) = (Control::map(control)?, Mapped::map(memory)?);
    Ok(SharedMemory::new(control, false, !ours.is_empty(), Some(theirs), counters))
}

fn limit(stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(STEP_MAX))?;
    stream.set_write_timeout(Some(STEP_MAX))
}
