//! `3fs-virt/iovs`: shared memory and rings that processes announce, and the files that they registered for them.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use fs3_ring::daemon::{Iov, Served};
use fs3_ring::guard::Guarded;
use fs3_ring::names::Name;
use fs3_ring::{Memory, layout};
use fuser::Errno;
use parking_lot::{Mutex, RwLock};
use rand::Rng;
use tokio::io::unix::AsyncFd;

use crate::caller::Who;
use crate::core::{Core, Handle};
use crate::virt::Link;
use crate::virt::ring::{Ring, serve};

/// Rings of a mount at most; each has a thread.
const RINGS_MAX: usize = 1024;
/// What a process hears whose ring was withdrawn, and whose mount has ended.
const WITHDRAWN: i32 = libc::ENODEV;
const UNMOUNTED: i32 = libc::ENOTCONN;

/// Memory for data, and whose it is.
pub(crate) struct Announced {
    pub iov: Iov,
    pub uid: u32,
}

/// A file that a process may name in its rings.
#[derive(Clone)]
pub(crate) struct Registration {
    pub handle: Arc<Handle>,
    pub id: u64,
    pub uid: u32,
    pub process: u32,
}

/// What the processes of a mount announced. Thread-safe.
#[derive(Default)]
pub(crate) struct Rings {
    iovs: RwLock<HashMap<[u8; 16], Arc<Announced>>>,
    rings: Mutex<Serving>,
    files: RwLock<HashMap<u64, Registration>>,
}

#[derive(Default)]
struct Serving {
    by_name: HashMap<Vec<u8>, Arc<Ring>>,
    /// Nothing is taken from rings, new ones included.
    paused: bool,
    ended: bool,
}

fn errno(error: fs3_ring::Errno) -> Errno {
    Errno::from_i32(error.0)
}

/// The file that a link names: one directly in `/dev/shm`.
fn shared_file(target: &[u8]) -> Result<&Path, Errno> {
    let path = Path::new(std::ffi::OsStr::from_bytes(target));
    let inside = path.strip_prefix("/dev/shm").map_err(|_| Errno::EINVAL)?;
    let mut parts = inside.components();
    match (parts.next(), parts.next()) {
        (Some(std::path::Component::Normal(_)), None) => Ok(path),
        _ => Err(Errno::EINVAL),
    }
}

impl Core {
    /// A link was made: map what it announces, while its maker waits. Errors: EINVAL for a name or target that cannot be,
    /// EEXIST, ENOENT, EACCES for the memory of another user, ENOSPC when there are too many, ESRCH when the process
    /// is out of sight.
    pub fn announced(self: &Arc<Self>, link: &Link) -> Result<(), Errno> {
        let name = std::str::from_utf8(&link.name).ok().and_then(Name::decode).ok_or(Errno::EINVAL)?;
        let process = link.process.ok_or(Errno::ESRCH)?.number;
        let memory = Memory::open_announced(shared_file(&link.target)?, link.who.uid).map_err(errno)?;
        let memory = Guarded::new(memory).map_err(errno)?;
        match name.ring {
            None => {
                let iov = Iov { memory: Arc::new(memory), block_bytes: name.block_bytes };
                self.rings.add_iov(name.id, Announced { iov, uid: link.who.uid })
            }
            Some((config, places)) => {
                if config.flags & !(layout::READ_UNCOMMITTED | layout::FORBID_HOLES) != 0 {
                    return Err(Errno::EINVAL);
                }
                let served = Served::new(memory, places).map_err(errno)?;
                self.start_ring(&link.name, Ring { served, config, who: link.who, process })
            }
        }
    }

    /// Serve a ring on a thread of its own. Errors: EAGAIN when there cannot be one, those of too many or known names.
    pub fn start_ring(self: &Arc<Self>, name: &[u8], ring: Ring) -> Result<(), Errno> {
        let ring = Arc::new(ring);
        self.rings.add_ring(name, ring.clone())?;
        let core = self.clone();
        let thread = std::thread::Builder::new().name("fs3-ring".to_owned());
        thread.spawn(move || serve(&core, &ring)).map(drop).map_err(|_| {
            self.rings.forget_ring(name);
            Errno::EAGAIN
        })
    }

    /// Withdraw a link when the process that made it has ended, however it did.
    pub fn reap_with_process(self: &Arc<Self>, link: &Link, inode: u64) {
        let process = link.process.and_then(|process| process.watch());
        let core = Arc::downgrade(self);
        self.io.runtime.spawn(async move {
            // One that is gone already is not waited for.
            if let Some(process) = process
                // SAFETY: the descriptor is owned here and stays the same until it is dropped with the registration.
                && let Ok(process) = unsafe { AsyncFd::register(process) }
            {
                let _ = process.readable().await;
            }
            if let Some(core) = core.upgrade() {
                core.reap_link(inode);
            }
        });
    }

    /// The token by which rings of the caller's process name an open file. Errors: EBADF, ESRCH.
    pub fn register_file(&self, who: Who, id: u64) -> Result<u64, Errno> {
        let handle = self.usable(id)?;
        let process = who.process().ok_or(Errno::ESRCH)?;
        let mut files = self.rings.files.write();
        let known = files.iter().find(|(_, r)| (r.id, r.uid, r.process) == (id, who.uid, process));
        if let Some((token, _)) = known {
            return Ok(*token);
        }
        let token = rand::rng().random();
        files.insert(token, Registration { handle, id, uid: who.uid, process });
        Ok(token)
    }
}

impl Rings {
    pub fn add_iov(&self, id: [u8; 16], announced: Announced) -> Result<(), Errno> {
        let mut iovs = self.iovs.write();
        if iovs.contains_key(&id) {
            return Err(Errno::EEXIST);
        }
        iovs.insert(id, Arc::new(announced));
        Ok(())
    }

    fn add_ring(&self, name: &[u8], ring: Arc<Ring>) -> Result<(), Errno> {
        let mut rings = self.rings.lock();
        if rings.ended {
            return Err(Errno::from_i32(UNMOUNTED));
        }
        if rings.by_name.len() >= RINGS_MAX {
            return Err(Errno::ENOSPC);
        }
        if rings.by_name.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        if rings.paused {
            ring.served.pause();
        }
        rings.by_name.insert(name.to_vec(), ring);
        Ok(())
    }

    /// A ring that was not begun is none.
    fn forget_ring(&self, name: &[u8]) {
        self.rings.lock().by_name.remove(name);
    }

    pub fn ring(&self, name: &[u8]) -> Option<Arc<Ring>> {
        self.rings.lock().by_name.get(name).cloned()
    }

    fn all_rings(&self) -> Vec<Arc<Ring>> {
        self.rings.lock().by_name.values().cloned().collect()
    }

    /// Take nothing more from any ring.
    pub fn pause(&self) {
        self.rings.lock().paused = true;
        for ring in self.all_rings() {
            ring.served.pause();
        }
    }

    /// Wait until everything that was taken before a pause is told. Says whether that was so at `deadline`.
    pub fn wait_for_rest(&self, deadline: Instant) -> bool {
        self.all_rings().iter().all(|ring| ring.served.wait_for_rest(deadline).is_some())
    }

    /// The end of a pause.
    pub fn resume(&self) {
        self.rings.lock().paused = false;
        for ring in self.all_rings() {
            ring.served.resume();
        }
    }

    /// Another daemon has what was announced: nothing of it is served here any more, and nobody is told.
    pub fn leave_all(&self) {
        let rings = {
            let mut state = self.rings.lock();
            state.ended = true;
            std::mem::take(&mut state.by_name)
        };
        for ring in rings.into_values() {
            ring.served.leave();
        }
        self.iovs.write().clear();
        self.files.write().clear();
    }

    /// A link is gone. I/Os that were begun end; the memory is theirs until then.
    pub fn withdrawn(&self, name: &[u8]) {
        if let Some(ring) = self.rings.lock().by_name.remove(name) {
            ring.served.close(WITHDRAWN);
            return;
        }
        let name = std::str::from_utf8(name).ok().and_then(Name::decode);
        if let Some(name) = name.filter(|name| name.ring.is_none()) {
            self.iovs.write().remove(&name.id);
        }
    }

    pub fn put_file(&self, token: u64, registration: Registration) {
        self.files.write().insert(token, registration);
    }

    /// All files, by token.
    pub fn registrations(&self) -> Vec<(u64, Registration)> {
        self.files.read().iter().map(|(token, r)| (*token, r.clone())).collect()
    }

    /// The kernel's last reference to an open file is gone.
    pub fn forget_file(&self, id: u64) {
        if !self.files.read().values().any(|r| r.id == id) {
            return;
        }
        self.files.write().retain(|_, r| r.id != id);
    }

    /// A file that `who` in `process` registered.
    pub fn file(&self, token: u64, who: Who, process: u32) -> Option<Arc<Handle>> {
        let files = self.files.read();
        let found = files.get(&token).filter(|r| r.uid == who.uid && r.process == process);
        found.map(|r| r.handle.clone())
    }

    /// Memory that `who` may use.
    pub fn iov(&self, id: &[u8; 16], who: Who) -> Option<Arc<Announced>> {
        self.iovs.read().get(id).filter(|iov| who.uid == 0 || iov.uid == who.uid).cloned()
    }

    /// Memory, whosever it is.
    pub fn any_iov(&self, id: &[u8; 16]) -> Option<Arc<Announced>> {
        self.iovs.read().get(id).cloned()
    }

    /// Put memory where files were cut, so that what is on its way ends.
    pub fn mend(&self) {
        let iovs: Vec<_> = self.iovs.read().values().cloned().collect();
        for announced in iovs {
            announced.iov.memory.mend();
        }
        for ring in self.all_rings() {
            ring.served.memory().mend();
        }
    }

    /// The mount ends: who waits for a ring gets an error, and there are no new ones.
    pub fn close_all(&self) {
        let rings = {
            let mut state = self.rings.lock();
            state.ended = true;
            std::mem::take(&mut state.by_name)
        };
        for ring in rings.into_values() {
            ring.served.close(UNMOUNTED);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_directly_in_dev_shm_are_announced() {
        for target in [&b"/dev/shm/x"[..], b"/dev/shm//x", b"/dev/shm/psm_12"] {
            assert!(shared_file(target).is_ok());
        }
        for target in [&b"/dev/shm"[..], b"/dev/shm/", b"/dev/shm/../x", b"/dev/shm/a/b", b"x", b"/etc/passwd", b""] {
            assert_eq!(shared_file(target).unwrap_err().code(), libc::EINVAL);
        }
    }
}
