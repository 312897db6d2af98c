//! A mount that goes on in another process.
//!
//! The kernel keeps the mount as long as somebody has its device open; what it knows are numbers of inodes, which mean the
//! same in every process, and numbers of handles. So a predecessor stops receiving requests, ends those it has, writes
//! everything, and gives its devices and the list of its handles away, with what processes announced for rings. The successor is another client of the cluster: it
//! opens the files again, before the predecessor closes its own, and takes over its locks. Requests that wait for a
//! lock stay unanswered: the successor answers them.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fs3_client::{ClientId, Code, Error, OpenOptions, Result, at_inode};
use fuser::{LeftRequest, ReplyEmpty};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::caller::superuser;
use crate::core::{Core, HandleFlags};
use crate::dirs::DirStream;
use crate::locks::{Asked, LockEnd};
use crate::stats::Op;
use crate::virt::VirtState;

/// What is handed over has this form.
const FORMAT: u32 = 3;
/// Files that a successor opens at the same time.
const OPENING_MAX: usize = 64;
/// How long a predecessor keeps its files open for the successor to tell the services of its own.
const LINGER: Duration = Duration::from_secs(5);

/// What a successor gets.
pub struct Predecessor {
    /// The state as bytes of a form of its own, which later releases know.
    pub state: Vec<u8>,
    /// Of the kernel's device, and of the memory that processes announced; the state tells which.
    pub descriptors: Vec<OwnedFd>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct State {
    format: u32,
    client: [u8; 16],
    /// The directory of the cluster that is the root of the mount.
    root: u64,
    next_handle: u64,
    /// The first descriptors are of the kernel's device.
    devices: usize,
    virt: VirtState,
    handles: Vec<HandleState>,
    dirs: Vec<DirState>,
    waits: Vec<WaitState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct HandleState {
    handle: u64,
    inode: u64,
    read: bool,
    write: bool,
    durable: bool,
    direct: bool,
    sync: bool,
    unflushed: bool,
    keeps_atime: bool,
    /// Owners of locks that it was used for: kind and number.
    owners: Vec<(i32, u64)>,
    /// Its locks are lost.
    lost: bool,
    /// A failure of a background write that it was not told of: code and message.
    failure: Option<(u16, String)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct DirState {
    handle: u64,
    inode: u64,
    parent: u64,
    /// Where pages began that were seen: offset, and the name before it.
    pages: Vec<(u64, Vec<u8>)>,
}

/// A request that waits for a lock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct WaitState {
    device: usize,
    request: u64,
    handle: u64,
    asked: Asked,
}

impl WaitState {
    pub fn left(&self) -> LeftRequest {
        LeftRequest { device: self.device, request: self.request }
    }
}

impl State {
    /// Errors: NotSupported for what a release of another form wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let unknown =
            |e: serde_json::Error| Error::new(Code::Protocol, format!("the state of the mount is wrong: {e}"));
        let head: Head = serde_json::from_slice(bytes).map_err(unknown)?;
        if head.format != FORMAT {
            let message = format!("the mount is served by a release that hands over in form {}", head.format);
            return Err(Error::new(Code::NotSupported, message));
        }
        serde_json::from_slice(bytes).map_err(unknown)
    }

    pub fn root(&self) -> u64 {
        self.root
    }

    /// Part the descriptors that came with it: those of the kernel's device, those of memory. Errors: Protocol.
    pub fn part(&self, mut descriptors: Vec<OwnedFd>) -> Result<(Vec<OwnedFd>, Vec<OwnedFd>)> {
        let wanted = self.devices + self.virt.descriptors();
        if descriptors.len() != wanted {
            let message = format!("{} descriptors came with the mount, and not {wanted}", descriptors.len());
            return Err(Error::new(Code::Protocol, message));
        }
        let memory = descriptors.split_off(self.devices);
        Ok((descriptors, memory))
    }

    pub fn virt(&self) -> &VirtState {
        &self.virt
    }

    pub fn waits(&self) -> &[WaitState] {
        &self.waits
    }
}

impl Core {
    /// Everything a successor needs to know. Nothing may be at work.
    pub fn export(&self, waits: Vec<WaitState>, devices: usize, virt: VirtState) -> Vec<u8> {
        let handles = self.handles_by_number().into_iter().map(|(number, handle)| HandleState {
            handle: number,
            inode: handle.inode.id,
            read: handle.read,
            write: handle.write,
            durable: handle.durable,
            direct: handle.direct,
            sync: handle.sync,
            unflushed: handle.unflushed,
            keeps_atime: handle.open_file().is_some_and(|file| file.keeps_atime()),
            owners: self.locks.owners_of(&handle.locks, handle.inode.id),
            lost: self.check_locks(&handle).is_err(),
            failure: handle.inode.untold_error(&handle.told).map(|e| (e.code as u16, e.message.to_string())),
        });
        let dirs = self.dirs_by_number().into_iter().map(|(number, dir)| {
            let (parent, pages) = dir.stream.try_lock().map(|stream| stream.seen()).unwrap_or_default();
            DirState { handle: number, inode: dir.inode, parent, pages }
        });
        let state = State {
            format: FORMAT,
            client: self.client.client_id().0,
            root: self.root,
            next_handle: self.next_handle.load(Ordering::Relaxed),
            devices,
            virt,
            handles: handles.collect(),
            dirs: dirs.collect(),
            waits,
        };
        serde_json::to_vec(&state).expect("plain data can be written as JSON")
    }

    /// Open what a predecessor has open, under its numbers, and take over its locks. Errors: those of opening and
    /// locking, but for files that are gone: their handles stay and fail when they are used.
    pub async fn import(self: &Arc<Self>, state: &State) -> Result<()> {
        self.next_handle.fetch_max(state.next_handle, Ordering::Relaxed);
        let mut opening = JoinSet::new();
        for handle in &state.handles {
            while opening.len() >= OPENING_MAX {
                joined(opening.join_next().await)?;
            }
            let (core, inode, write) = (self.clone(), handle.inode, handle.write);
            let (number, flags) = (handle.handle, handle.flags());
            let keeps_atime = handle.keeps_atime;
            opening.spawn(async move {
                let options = OpenOptions { read: true, write, truncate: false };
                let file = match core.client.open(&superuser(), at_inode(inode), options).await {
                    Ok(file) => Some(file),
                    Err(e) if matches!(e.code, Code::StaleHandle | Code::NotFound) => None,
                    Err(e) => return Err(e),
                };
                if let Some(file) = file.as_ref().filter(|_| keeps_atime) {
                    file.keep_atime();
                }
                let entered = core.enter(inode);
                if let Some(file) = &file {
                    entered.note_mode(file.attr().mode);
                }
                core.put_handle(number, entered, file, flags);
                Ok(())
            });
        }
        while let Some(opened) = opening.join_next().await {
            joined(Some(opened))?;
        }
        for dir in &state.dirs {
            self.put_dir(dir.handle, dir.inode, DirStream::resumed(dir.parent, dir.pages.clone()));
        }
        self.import_failures(state);
        self.inherit(state).await
    }

    fn import_failures(&self, state: &State) {
        for handle in &state.handles {
            if let (Some((code, message)), Some(made)) = (&handle.failure, self.handle(handle.handle)) {
                made.inode.fail(Error::new(Code::from_wire(*code), message.clone()));
            }
        }
    }

    async fn inherit(&self, state: &State) -> Result<()> {
        let mut eras = HashMap::new();
        let with_owners = || state.handles.iter().filter(|handle| !handle.owners.is_empty());
        for inode in with_owners().map(|handle| handle.inode).collect::<HashSet<_>>() {
            let kept = self.client.keep_alive();
            match self.client.inherit_locks(inode, ClientId(state.client)).await {
                Ok(granted) => eras.insert(inode, granted.era),
                Err(e) if e.code == Code::StaleHandle => continue,
                Err(e) => return Err(e),
            };
            drop(kept);
        }
        for handle in with_owners() {
            let (Some(made), Some(era)) = (self.handle(handle.handle), eras.get(&handle.inode)) else { continue };
            for owner in &handle.owners {
                self.locks.inherited(&made.locks, handle.inode, *owner, *era, || self.client.keep_alive());
            }
            if handle.lost {
                made.locks.lose();
            }
        }
        Ok(())
    }

    /// Locks that a successor took over before it failed are this client's again, as far as that can be had.
    pub async fn take_back(&self, successor: ClientId) {
        for inode in self.locks.inodes() {
            if let Err(error) = self.client.inherit_locks(inode, successor).await {
                tracing::warn!(inode, %error, "locks could not be taken back from a successor that failed");
            }
        }
    }

    /// Set a lock for a request and answer it, or leave it to a successor.
    pub async fn answer_lock(&self, number: u64, asked: Asked, wait: Option<u64>, reply: ReplyEmpty) {
        let Some(handle) = self.handle(number) else { return reply.error(fuser::Errno::EBADF) };
        match self.set_lock(&handle, asked, wait).await {
            Ok(()) => reply.ok(),
            Err(LockEnd::Failed(error)) => reply.error(error),
            Err(LockEnd::Left) => {
                let LeftRequest { device, request } = reply.leave();
                self.locks.leave(WaitState { device, request, handle: number, asked });
            }
        }
    }

    /// Go on with a wait that was left.
    pub fn resume_wait(self: &Arc<Self>, wait: WaitState, reply: ReplyEmpty) {
        let core = self.clone();
        self.spawn(Op::Lock, async move { core.answer_lock(wait.handle, wait.asked, Some(wait.request), reply).await });
    }

    /// A successor has the mount. Close the files, once it has told the services of its own.
    pub async fn retire(&self) {
        self.rings.leave_all();
        tokio::time::sleep(LINGER).await;
        self.locks.forget_all();
        self.release_all().await;
    }
}

impl HandleState {
    fn flags(&self) -> HandleFlags {
        HandleFlags {
            read: self.read,
            write: self.write,
            durable: self.durable,
            direct: self.direct,
            sync: self.sync,
            unflushed: self.unflushed,
        }
    }
}

fn joined(result: Option<std::result::Result<Result<()>, tokio::task::JoinError>>) -> Result<()> {
    match result {
        None => Ok(()),
        Some(Ok(result)) => result,
        Some(Err(e)) => Err(Error::new(Code::Internal, format!("a file could not be opened: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_of_another_form_is_refused_and_one_of_this_is_read_again() {
        let asked = Asked { flock: true, owner: 3, start: 0, end: 9, kind: libc::F_WRLCK, pid: 1 };
        let state = State {
            format: FORMAT,
            client: [7; 16],
            root: 1,
            next_handle: 12,
            devices: 2,
            virt: VirtState::default(),
            handles: Vec::new(),
            dirs: vec![DirState { handle: 4, inode: 5, parent: 1, pages: vec![(2, b"\xff/".to_vec())] }],
            waits: vec![WaitState { device: 1, request: 99, handle: 3, asked }],
        };
        let bytes = serde_json::to_vec(&state).unwrap();
        let again = State::decode(&bytes).unwrap();
        assert_eq!(
            (again.client, again.next_handle, again.dirs[0].pages[0].clone()),
            ([7; 16], 12, (2, b"\xff/".to_vec()))
        );
        assert_eq!(again.waits()[0].left(), LeftRequest { device: 1, request: 99 });
        assert_eq!(State::decode(br#"{"format": 1}"#).unwrap_err().code, Code::NotSupported);
        assert_eq!(State::decode(b"{").unwrap_err().code, Code::Protocol);
        assert_eq!(again.part(Vec::new()).unwrap_err().code, Code::Protocol, "descriptors are missing");
    }
}
