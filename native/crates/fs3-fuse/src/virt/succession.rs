//! What processes announced, on its way from a daemon to its successor: links, memory, counters of rings, files.
//!
//! The memory goes as descriptors, as its file may have no name any more. Rings are paused before, and begin in the
//! successor once it serves the mount.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use fs3_client::{Code, Error, Result};
use fs3_ring::Memory;
use fs3_ring::daemon::{Iov, Served};
use fs3_ring::guard::Guarded;
use fs3_ring::names::Name;
use fuser::Errno;
use serde::{Deserialize, Serialize};

use crate::caller::Who;
use crate::core::Core;
use crate::virt::iovs::{Announced, Registration};
use crate::virt::process::Process;
use crate::virt::ring::Ring;
use crate::virt::{Link, Node};

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct VirtState {
    next_handle: u64,
    next_link: u64,
    /// Those that announce memory; its descriptors are in the same order.
    links: Vec<LinkState>,
    files: Vec<FileState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct LinkState {
    inode: u64,
    parent: u64,
    name: Vec<u8>,
    target: Vec<u8>,
    uid: u32,
    gid: u32,
    pid: u32,
    process: Process,
    since: SystemTime,
    /// Mapped of its memory.
    bytes: usize,
    /// Of a ring.
    ring: Option<RingState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct RingState {
    /// I/Os taken and told, of which there are as many.
    told: u64,
    /// It was closed for what was in it.
    closed: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct FileState {
    token: u64,
    handle: u64,
    uid: u32,
    process: u32,
}

impl VirtState {
    /// Descriptors that come with it.
    pub fn descriptors(&self) -> usize {
        self.links.len()
    }
}

fn failed(what: &str, errno: i32) -> Error {
    Error::new(Code::Unavailable, format!("{what}: {}", std::io::Error::from_raw_os_error(errno)))
}

fn name_of(link: &[u8]) -> Option<Name> {
    std::str::from_utf8(link).ok().and_then(Name::decode)
}

impl Core {
    /// What a successor has to know, and the memory. The rings are paused. Errors: Busy when one does not come to rest
    /// until `deadline`, Unavailable without descriptors left.
    pub fn export_virtual(&self, deadline: Instant) -> Result<(VirtState, Vec<OwnedFd>)> {
        let mut state = VirtState {
            next_handle: self.virt.next_handle(),
            next_link: self.virt.links.next_inode(),
            ..VirtState::default()
        };
        let mut memory = Vec::new();
        for (inode, link) in self.virt.links.all() {
            // One that is being withdrawn has none any more.
            if let Some((told, shared)) = self.export_link(inode, link, deadline)? {
                state.links.push(told);
                memory.push(shared);
            }
        }
        let files = self.rings.registrations().into_iter();
        let files = files.map(|(token, r)| FileState { token, handle: r.id, uid: r.uid, process: r.process });
        state.files = files.collect();
        Ok((state, memory))
    }

    fn export_link(&self, inode: u64, link: Link, deadline: Instant) -> Result<Option<(LinkState, OwnedFd)>> {
        let (Some(name), Some(process)) = (name_of(&link.name), link.process) else { return Ok(None) };
        let share = |memory: &Memory| {
            let shared = memory.share().map_err(|e| failed("shared memory cannot be handed over", e.0))?;
            Ok((memory.bytes(), shared))
        };
        let ((bytes, shared), ring) = if name.ring.is_some() {
            let Some(ring) = self.rings.ring(&link.name) else { return Ok(None) };
            let rest = ring.served.wait_for_rest(deadline);
            let (told, closed) = rest.ok_or_else(|| Error::new(Code::Busy, "I/Os of a ring did not end"))?;
            (share(ring.served.memory())?, Some(RingState { told, closed }))
        } else {
            let Some(announced) = self.rings.any_iov(&name.id) else { return Ok(None) };
            (share(&announced.iov.memory)?, None)
        };
        let Link { parent, name, target, who, since, .. } = link;
        let (uid, gid, pid) = (who.uid, who.gid, who.pid());
        Ok(Some((LinkState { inode, parent, name, target, uid, gid, pid, process, since, bytes, ring }, shared)))
    }

    /// Go on with what was announced to a predecessor, as far as that can be done before the mount is served: rings stay
    /// paused until [`Core::begin_rings`], or are left by [`crate::virt::Rings::leave_all`]. The files are open already.
    pub fn import_virtual(self: &Arc<Self>, state: &VirtState, memory: Vec<OwnedFd>) -> Result<()> {
        self.virt.skip_handles(state.next_handle);
        self.rings.pause();
        for (link, memory) in state.links.iter().zip(memory) {
            self.import_link(link, memory).map_err(|e| failed("shared memory cannot be taken over", e.code()))?;
        }
        self.virt.links.skip_inodes(state.next_link);
        for file in &state.files {
            if let Some(handle) = self.handle(file.handle) {
                let registration = Registration { handle, id: file.handle, uid: file.uid, process: file.process };
                self.rings.put_file(file.token, registration);
            }
        }
        Ok(())
    }

    fn import_link(self: &Arc<Self>, link: &LinkState, memory: OwnedFd) -> std::result::Result<(), Errno> {
        let errno = |e: fs3_ring::Errno| Errno::from_i32(e.0);
        let name = name_of(&link.name).ok_or(Errno::EINVAL)?;
        let who = Who::new(link.uid, link.gid, link.pid, self.ids);
        let memory = Guarded::new(Memory::inherited(memory, link.bytes).map_err(errno)?).map_err(errno)?;
        match (name.ring, &link.ring) {
            (None, None) => {
                let iov = Iov { memory: Arc::new(memory), block_bytes: name.block_bytes };
                self.rings.add_iov(name.id, Announced { iov, uid: who.uid })?;
            }
            (Some((config, places)), Some(ring)) => {
                let served = Served::succeeding(memory, places, ring.told, ring.closed).map_err(errno)?;
                self.start_ring(&link.name, Ring { served, config, who, process: link.process.number })?;
            }
            _ => return Err(Errno::EINVAL),
        }
        let (name, target) = (link.name.clone(), link.target.clone());
        let (parent, process, since) = (link.parent, Some(link.process), link.since);
        self.virt.links.put(link.inode, Link { parent, name, target, who, process, since });
        Ok(())
    }

    /// The mount is served here: serve the rings that were taken over, and watch over the processes.
    pub fn begin_rings(self: &Arc<Self>) {
        self.rings.resume();
        for (inode, link) in self.virt.links.all() {
            if let Some(Node::Links(dir)) = self.virt.node(link.parent) {
                dir.stays(self, &link, inode);
            }
        }
    }
}
