use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use fs3_core::{Code, Error, Region, RegionMut, Result};
use fs3_proto::v1::{
    AppendRequest, AppendResponse, Attr, AttrResponse, Caller, CloseRequest, ContentVersion, Layout, Method,
    OpenResponse, SyncRequest,
};
use fs3_rt::Instant;
use tokio::sync::Mutex;

use crate::inode::{InodeState, Pending};
use crate::{Client, at_inode};

/// How long an inode that was seen to exist is taken to.
const CONFIRM_EVERY: Duration = Duration::from_secs(1);

/// An open file. Shared by `Arc`; all methods may be called from any task at once.
///
/// Open files of one inode in one client share what is known of it: acknowledged writes through one are seen
/// by reads through another at once. Other clients see them after [`OpenFile::sync`], [`OpenFile::publish`] or
/// [`OpenFile::close`] (close-to-open). Overlapping writes at the same time are the caller's to order.
pub struct OpenFile {
    handle: Arc<Handle>,
}

/// What a close in the background needs after the [`OpenFile`] is gone.
struct Handle {
    client: Client,
    caller: Caller,
    state: Arc<InodeState>,
    /// Empty for opens without write.
    session: Bytes,
    created: bool,
    closed: AtomicBool,
    closing: Mutex<()>,
    /// Reading it leaves no trace.
    keeps_atime: AtomicBool,
    /// When the inode was last seen to exist by [`OpenFile::confirm_exists`].
    confirmed: Mutex<Option<Instant>>,
}

impl OpenFile {
    pub(crate) fn new(client: Client, caller: Caller, attr: &Attr, opened: OpenResponse) -> Arc<Self> {
        let writes = !opened.session.is_empty();
        let state = client.inner().inodes.open(attr, writes, Instant::now());
        if !writes {
            client.inner().holds.need(client.inner());
        }
        if !opened.session.is_empty() {
            client.inner().session_opened();
            state.limit_length(opened.length_limit);
        }
        let keeps_atime = AtomicBool::new(!client.inner().config.access_times);
        let handle = Handle {
            client,
            caller,
            state,
            session: opened.session,
            created: opened.created,
            closed: AtomicBool::new(false),
            closing: Mutex::new(()),
            keeps_atime,
            confirmed: Mutex::new(None),
        };
        Arc::new(Self { handle: Arc::new(handle) })
    }

    pub(crate) fn state(&self) -> &Arc<InodeState> {
        &self.handle.state
    }

    /// Whether it was closed; every use then fails with StaleHandle.
    pub fn is_closed(&self) -> bool {
        self.handle.closed.load(Ordering::Acquire)
    }

    pub(crate) fn check_open(&self) -> Result<()> {
        self.handle.check_open()
    }

    fn check_writable(&self) -> Result<()> {
        self.check_open()?;
        if !self.writable() {
            return Err(Error::new(Code::InvalidArgument, "the file is not open for writing"));
        }
        Ok(())
    }

    /// Make sure, at most once a second, that the inode still exists. Errors: StaleHandle.
    pub(crate) async fn confirm_exists(&self) -> Result<()> {
        let mut confirmed = self.handle.confirmed.lock().await;
        if confirmed.is_some_and(|at| at.elapsed() < CONFIRM_EVERY) {
            return Ok(());
        }
        match self.refresh().await {
            Ok(_) => *confirmed = Some(Instant::now()),
            Err(error) if error.code == Code::NotFound => {
                return Err(Error::new(Code::StaleHandle, "the file was removed by another client"));
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Reading it through this open file changes no access time from here on (O_NOATIME).
    pub fn keep_atime(&self) {
        self.handle.keeps_atime.store(true, Ordering::Relaxed);
    }

    /// Whether [`OpenFile::keep_atime`] was called.
    pub fn keeps_atime(&self) -> bool {
        self.handle.keeps_atime.load(Ordering::Relaxed)
    }

    /// The file was read through it, as far as access times go; also when the bytes came from a cache of the caller.
    pub fn note_read(&self) {
        let handle = &self.handle;
        if handle.keeps_atime.load(Ordering::Relaxed) {
            return;
        }
        let now_ns = fs3_rt::wall_ns();
        if handle.state.note_read(now_ns) {
            handle.client.inner().accesses.note(handle.state.inode, &handle.caller, now_ns);
        }
    }

    /// The client it was opened through.
    pub fn client(&self) -> &Client {
        &self.handle.client
    }

    /// The inode.
    pub fn inode(&self) -> u64 {
        self.state().inode
    }

    /// Attributes as last seen, length merged with this client's acknowledged writes.
    pub fn attr(&self) -> Attr {
        self.state().merged()
    }

    /// Where the chunks live.
    pub fn layout(&self) -> Layout {
        self.state().layout()
    }

    /// The file's length in bytes as this client knows it.
    pub fn length(&self) -> u64 {
        self.state().length()
    }

    /// Whether the open made the file.
    pub fn created(&self) -> bool {
        self.handle.created
    }

    /// Whether it is open for writing (has a write session).
    pub fn writable(&self) -> bool {
        !self.handle.session.is_empty()
    }

    /// Fill `buf` from `offset`. Returns the count, short only at the end of the file, together with the buffer
    /// (whose bytes beyond the count are undefined). Holes are zeros. Every byte was verified against its
    /// writer's checksum. Also works on files that are open for writing only.
    /// Errors: ChecksumMismatch when no replica is right; Timeout or Unavailable when none answered in time;
    /// StaleHandle when another client removed the file and the service did not know that it is open here.
    pub async fn read(&self, offset: u64, buf: RegionMut) -> (Result<usize>, RegionMut) {
        crate::read::read_one(self, offset, buf).await
    }

    /// Write all of `data` at `offset`. Returns after every serving replica has it (it survives kill -9 of all);
    /// power loss needs [`OpenFile::sync`]. On an error a part may have been applied. `data` must not change
    /// until this returns; a change is refused as damaged or stored as of some moment, never mixed unnoticed.
    /// Errors: NoSpace, QuotaExceeded, FileTooLarge, InvalidArgument when not open for writing, Timeout.
    pub async fn write(&self, offset: u64, data: Region) -> Result<usize> {
        self.check_writable()?;
        if data.is_empty() {
            return Ok(0);
        }
        let _shared = self.state().gate.read().await;
        self.require_room(offset.saturating_add(data.len() as u64)).await?;
        self.write_shared(offset, data).await
    }

    /// Write with the gate held.
    async fn write_shared(&self, offset: u64, data: Region) -> Result<usize> {
        let state = self.state();
        let (end, count) = (offset.saturating_add(data.len() as u64), data.len());
        match crate::write::write(self.client().inner(), state, offset, data).await {
            Ok(()) => {
                state.acknowledge_write(end, fs3_rt::wall_ns());
                Ok(count)
            }
            Err(error) => {
                state.fail_write();
                Err(error)
            }
        }
    }

    /// Make `[offset, offset + length)` a hole, as far as the file has it: it reads as zeros, and whole blocks give their
    /// disk space back. The file keeps its length. Returns after every serving replica has it; otherwise like
    /// [`OpenFile::write`].
    pub async fn punch(&self, offset: u64, length: u64) -> Result<()> {
        self.check_writable()?;
        let state = self.state();
        let _shared = state.gate.read().await;
        let length = length.min(self.length().saturating_sub(offset));
        if length == 0 {
            return Ok(());
        }
        match crate::write::punch(self.client().inner(), state, offset, length).await {
            Ok(()) => {
                state.acknowledge_write(0, fs3_rt::wall_ns());
                Ok(())
            }
            Err(error) => {
                state.fail_write();
                Err(error)
            }
        }
    }

    /// Make the file at least `length` bytes long, without writing: what is added reads as zeros. Others see it as they
    /// see a write; it never makes a file shorter, whatever they do meanwhile. Errors: InvalidArgument when not open
    /// for writing, FileTooLarge, QuotaExceeded.
    pub async fn extend(&self, length: u64) -> Result<()> {
        self.check_writable()?;
        let state = self.state();
        let _shared = state.gate.read().await;
        if length > self.length() {
            drop(crate::plan::pieces(state.inode, self.layout().chunk_bytes, length - 1, 1)?);
            self.require_room(length).await?;
            state.acknowledge_write(length, fs3_rt::wall_ns());
        }
        Ok(())
    }

    /// The first byte at or after `offset` that is not in a hole (as `lseek` with SEEK_DATA); `None` when there is none
    /// before the end of the file. Holes are chunks that were never written and what chunks lack at their ends. Bytes
    /// that other clients are writing may count as either. Errors: as [`OpenFile::read`].
    pub async fn seek_data(&self, offset: u64) -> Result<Option<u64>> {
        crate::holes::seek_data(self, offset).await
    }

    /// The first byte at or after `offset` that is in a hole, the end of the file being one (as `lseek` with SEEK_HOLE);
    /// `None` when `offset` is not in the file. Otherwise like [`OpenFile::seek_data`].
    pub async fn seek_hole(&self, offset: u64) -> Result<Option<u64>> {
        crate::holes::seek_hole(self, offset).await
    }

    /// Write all of `data` at the end of the file; returns its end in the file. Appends never overlap, through whichever
    /// open files and clients; those through one client have the order in which they were called. What other clients
    /// appended at the same time reads as zeros until it is written. Otherwise like [`OpenFile::write`].
    pub async fn append(&self, data: Region) -> Result<u64> {
        self.check_writable()?;
        if data.is_empty() {
            return Ok(self.length());
        }
        let turn = fs3_rt::timeout(self.client().inner().config.op_timeout, self.state().append_turn.lock()).await;
        let _turn = turn.map_err(|_| Error::new(Code::Timeout, "an earlier append did not end in time"))?;
        let _shared = self.state().gate.read().await;
        let offset = self.reserve_shared(data.len() as u64).await?;
        let count = self.write_shared(offset, data).await?;
        Ok(offset + count as u64)
    }

    /// Have the service reserve `bytes` bytes behind the end of the file, for this caller alone; returns the position of
    /// the first. What is acknowledged of this client's writes by then comes before it. Until they are written the
    /// file has a hole there, once others have appended behind it. Errors: QuotaExceeded, FileTooLarge, StaleHandle,
    /// InvalidArgument when not open for writing, Timeout.
    pub async fn reserve(&self, bytes: u64) -> Result<u64> {
        self.check_writable()?;
        let _shared = self.state().gate.read().await;
        self.reserve_shared(bytes).await
    }

    async fn reserve_shared(&self, bytes: u64) -> Result<u64> {
        let (state, client) = (self.state(), self.client());
        let pending = state.pending();
        let request = AppendRequest {
            caller: Some(self.handle.caller.clone()),
            op: client.inner().op_id(),
            inode: state.inode,
            session: self.handle.session.clone(),
            report: pending.as_ref().map(|pending| pending.report),
            bytes,
        };
        let response: AppendResponse =
            client.inner().meta_of(self.handle.shared_inode(), Method::MetaAppend, &request).await?;
        if let Some(pending) = &pending {
            state.published(pending);
            state.note_step(response.before, response.attr.as_ref());
        }
        state.limit_length(response.length_limit);
        response.attr.iter().for_each(|attr| state.observe(attr));
        Ok(response.offset)
    }

    /// Make every acknowledged write of this client to the inode survive power loss, and publish length and mtime.
    /// An error means that some of them may not: they count as unsynced until a later sync succeeds.
    pub async fn sync(&self) -> Result<Attr> {
        self.check_open()?;
        crate::write::sync_chains(self.client().inner(), self.state()).await?;
        self.publish().await
    }

    /// Publish length and mtime without asking the disks to sync (close-to-open for readers elsewhere).
    pub async fn publish(&self) -> Result<Attr> {
        self.check_open()?;
        match self.state().pending() {
            Some(pending) => self.tell(Some(pending), 0).await,
            None => Ok(self.state().merged()),
        }
    }

    /// How long the file may become by writing before the service is asked for more, in bytes; `u64::MAX` without a
    /// quota.
    pub fn length_limit(&self) -> u64 {
        self.state().length_limit()
    }

    /// Make sure that the quotas of the directories above let the file become `end` bytes long. Costs nothing within
    /// [`OpenFile::length_limit`]. Errors: QuotaExceeded.
    pub async fn require_room(&self, end: u64) -> Result<()> {
        let state = self.state();
        if end <= state.length_limit() {
            return Ok(());
        }
        let _turn = state.room_turn.lock().await;
        if end > state.length_limit() {
            self.tell(state.pending(), end).await?;
        }
        if end > state.length_limit() {
            return Err(Error::new(Code::QuotaExceeded, "the quota of a directory above has no room left"));
        }
        Ok(())
    }

    /// Sync with the service; it answers how long the file may become, `wanted_length` if there is room.
    async fn tell(&self, pending: Option<Pending>, wanted_length: u64) -> Result<Attr> {
        let (state, client) = (self.state(), self.client());
        let request = SyncRequest {
            caller: Some(self.handle.caller.clone()),
            op: client.inner().op_id(),
            inode: state.inode,
            session: self.handle.session.clone(),
            report: pending.as_ref().map(|pending| pending.report),
            wanted_length,
        };
        let response: AttrResponse =
            client.inner().meta_of(self.handle.shared_inode(), Method::MetaSync, &request).await?;
        if let Some(pending) = &pending {
            state.published(pending);
            state.note_step(response.before, response.attr.as_ref());
        }
        state.limit_length(response.length_limit);
        Ok(response.attr.map_or_else(|| state.merged(), |attr| state.merge(&attr)))
    }

    /// Cut or extend to `length` bytes.
    pub async fn truncate(&self, length: u64) -> Result<Attr> {
        self.check_open()?;
        let session = self.handle.session.clone();
        self.client().truncate_inode(&self.handle.caller, self.inode(), length, session).await
    }

    /// How the reports of this client's writes changed the version of the inode's content since this was last asked: each
    /// time before and after, in the order of the answers. When nobody asks for long, later ones are missing.
    pub fn take_steps(&self) -> Vec<(ContentVersion, ContentVersion)> {
        self.state().take_steps()
    }

    /// Ask the service for the attributes now.
    pub async fn refresh(&self) -> Result<Attr> {
        self.check_open()?;
        self.client().stat(&self.handle.caller, at_inode(self.inode())).await
    }

    /// Let the inode stay when this file is closed, until what is returned is dropped. For files that are not closed.
    pub fn retain(&self) -> Retained {
        let client = self.client().clone();
        client.inner().inodes.retain(self.inode(), Instant::now());
        client.inner().holds.need(client.inner());
        Retained { client, caller: self.handle.caller.clone(), inode: self.inode() }
    }

    /// Publish length and mtime and end the session, after the writes on their way. Reads and writes after it
    /// fail; closing again does nothing. On an error the file is closed, but others may not see its last length.
    /// Dropping an open file without closing it closes in the background, errors going to the log.
    pub async fn close(&self) -> Result<Attr> {
        self.handle.close().await
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        if self.handle.closed.load(Ordering::Acquire) {
            return;
        }
        let handle = self.handle.clone();
        let runtime = handle.client.runtime().clone();
        if handle.session.is_empty() {
            handle.closed.store(true, Ordering::Release);
            if let Some(hold) = handle.leave() {
                let inode = handle.state.inode;
                runtime.spawn(async move { handle.client.release_hold(&handle.caller, inode, hold).await });
            }
            return;
        }
        runtime.spawn(async move {
            if let Err(error) = handle.close().await {
                tracing::warn!(inode = handle.state.inode, %error, "closing a dropped file failed");
            }
        });
    }
}

/// Keeps an inode as an open file does, so that the file can be opened again by its number. Made by [`OpenFile::retain`].
pub struct Retained {
    client: Client,
    caller: Caller,
    inode: u64,
}

impl Drop for Retained {
    fn drop(&mut self) {
        let Some(session) = self.client.inner().inodes.close(self.inode, false, Instant::now()) else { return };
        let (client, caller, inode) = (self.client.clone(), self.caller.clone(), self.inode);
        let runtime = self.client.runtime().clone();
        runtime.spawn(async move { client.release_hold(&caller, inode, session).await });
    }
}

impl Handle {
    /// The inode has one open file less; returns the session to end.
    fn leave(&self) -> Option<[u8; 16]> {
        self.client.inner().inodes.close(self.state.inode, !self.session.is_empty(), Instant::now())
    }

    fn check_open(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::new(Code::StaleHandle, "the file is closed"));
        }
        Ok(())
    }

    async fn close(&self) -> Result<Attr> {
        let _alone = self.closing.lock().await;
        if self.closed.load(Ordering::Acquire) {
            return Ok(self.state.merged());
        }
        let writes_done = self.state.gate.write().await;
        self.closed.store(true, Ordering::Release);
        let result = self.end_session().await;
        drop(writes_done);
        if let Some(hold) = self.leave() {
            self.client.release_hold(&self.caller, self.state.inode, hold).await;
        }
        result
    }

    /// The inode, if others are likely to change it at the same time: not while its maker has it open.
    fn shared_inode(&self) -> Option<u64> {
        (!self.created).then_some(self.state.inode)
    }

    async fn end_session(&self) -> Result<Attr> {
        if self.session.is_empty() {
            return Ok(self.state.merged());
        }
        let pending = self.state.pending();
        let request = CloseRequest {
            caller: Some(self.caller.clone()),
            op: self.client.inner().op_id(),
            inode: self.state.inode,
            session: self.session.clone(),
            report: pending.as_ref().map(|pending| pending.report),
        };
        let inner = self.client.inner();
        let result = inner.meta_of::<_, AttrResponse>(self.shared_inode(), Method::MetaClose, &request).await;
        self.client.inner().session_closed();
        let response = result?;
        if let Some(pending) = &pending {
            self.state.published(pending);
            self.state.note_step(response.before, response.attr.as_ref());
        }
        Ok(response.attr.map_or_else(|| self.state.merged(), |attr| self.state.merge(&attr)))
    }
}
