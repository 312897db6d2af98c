use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use fs3_chunk::{
    Allocator, BLOCK_BYTES, Block, Blocks, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, ChunkMeta, Record, Table, Version,
    VersionInfo, WriterRecord,
};
use fs3_core::{BufferPool, ChainVersion, CheckedBytes, ChunkId, Code, Error, Region, Result, UpdateVersion};
use parking_lot::{Mutex, RwLock};

use crate::cache::ReadCache;
use crate::disk::{Disk, RealDisk};
use crate::log::{GROW_BYTES, Log, disk_error};
use crate::maintain::DataFiles;
use crate::recover::note_failure;
use crate::threads::{IoThreads, caught, result_of};

/// Reads up to this size go through io_uring; it gains nothing for larger ones, whose checksums take time besides.
const SMALL_READ_BYTES_MAX: u32 = 64 << 10;

/// How a target's store runs.
#[derive(Clone)]
pub struct StoreOptions {
    /// Shared by all targets of the process.
    pub read_cache: Arc<ReadCache>,
    /// Memory for what is not cached, shared by all targets of the process.
    pub pool: BufferPool,
    /// Shared by all targets of the process.
    pub threads: Arc<IoThreads>,
    /// `prepare` and `commit` return only when they survive power loss.
    pub durable_writes: bool,
    /// Bytes of disk space that the target's data files may take; beyond it writes fail with NoSpace.
    pub capacity_bytes: u64,
    /// Free disk blocks whose space is kept for new chunks, in bytes (an eighth of the used ones if that is more); the
    /// space of others is given back in the background.
    pub free_bytes_kept: u64,
    /// Age after which a tombstone is dropped, in milliseconds.
    pub tombstone_ms: i64,
    /// Freed bytes and small overwrites waiting in memory for the log to become durable; beyond either the
    /// store syncs in the background.
    pub unsynced_free_bytes_max: u64,
    /// See `unsynced_free_bytes_max`.
    pub patch_bytes_max: u64,
    /// A log segment of this size is replaced by a snapshot; one as large as the last snapshot if that is larger.
    pub log_bytes_max: u64,
    /// Chunks whose metadata are kept in the form that is fast to use (about 1 KiB each); those of the others take a
    /// quarter of the memory and are unpacked when they are used.
    pub live_chunks_max: usize,
}

impl StoreOptions {
    /// Defaults: not durable per write, no capacity limit, tombstones for one hour.
    pub fn new(read_cache: Arc<ReadCache>, pool: BufferPool) -> Self {
        Self {
            read_cache,
            pool,
            threads: IoThreads::shared(),
            durable_writes: false,
            capacity_bytes: u64::MAX,
            free_bytes_kept: 64 << 20,
            tombstone_ms: 3_600_000,
            unsynced_free_bytes_max: 64 << 20,
            patch_bytes_max: 4 << 20,
            log_bytes_max: 16 << 20,
            live_chunks_max: 8192,
        }
    }
}

/// What an update does to a chunk.
#[derive(Clone)]
pub enum Change {
    /// Write the bytes at their offset; a gap after the old end reads as zeros.
    Write(CheckedBytes),
    /// The chunk is `bytes`, whatever it was before.
    Replace {
        /// From offset 0.
        bytes: CheckedBytes,
        /// Replace the chunk's exactly-once records.
        writers: Vec<WriterRecord>,
    },
    /// Cut to `length`; a shorter chunk keeps its bytes (the version is raised all the same).
    Truncate {
        /// New length in bytes.
        length: u32,
    },
    /// Make a range zeros, as far as it lies in the chunk; the length stays (the version is raised in any case).
    Punch {
        /// Bytes from the start of the chunk.
        offset: u32,
        /// Bytes.
        length: u32,
    },
    /// Remove; leaves a tombstone.
    Remove,
}

/// A change of one chunk's content.
#[derive(Clone)]
pub struct Update {
    /// The chunk.
    pub id: ChunkId,
    /// The file's chunk size: a power of two, 64 KiB to 64 MiB.
    pub chunk_bytes: u32,
    /// Version it creates; greater than the committed one, except for a replace.
    pub update_version: UpdateVersion,
    /// Chain version under which it is made.
    pub chain_version: ChainVersion,
    /// Remembered with the commit.
    pub writer: Option<WriterRecord>,
    /// What it does.
    pub change: Change,
}

/// Committed bytes of a chunk.
pub struct ReadOut {
    /// The bytes, in order. They stay valid and unchanged while held.
    pub data: Vec<Region>,
    /// Bytes in `data` together; less than asked for at the end of the chunk.
    pub length: u32,
    /// Checksums of the crc blocks returned; the last may cover a partial block at the end of the chunk.
    pub crcs: Vec<u32>,
    /// The version the bytes belong to.
    pub version: VersionInfo,
}

/// Callers of `sync` who wait for the next one.
#[derive(Default)]
pub(crate) struct SyncQueue {
    waiting: Vec<Box<dyn FnOnce(Result<()>) + Send>>,
    running: bool,
}

/// The chunks of one target on one disk. Thread-safe.
///
/// Updates of one chunk are serialised by the caller, from prepare to commit or abort; different chunks are
/// independent. Reads may come at any time: they get one committed version, never wait for a writer and are
/// never torn.
///
/// Durability: what returned survives the end of the process at any moment; what returned before a `sync`
/// that returned survives a power loss. After a failed write of metadata or a failed sync the store is
/// `failed`: updates are refused, reads of good data go on.
pub struct TargetStore {
    pub(crate) options: StoreOptions,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) files: DataFiles,
    pub(crate) log: Log,
    pub(crate) table: Mutex<Table>,
    pub(crate) alloc: Mutex<Allocator>,
    pub(crate) blocks: Arc<Blocks>,
    // Held shared from the append of a record until the table has it; exclusively by a checkpoint, which
    // needs a position that the table is not behind.
    pub(crate) applying: RwLock<()>,
    // Held by the one sync that runs.
    pub(crate) syncing: Mutex<()>,
    pub(crate) sync_queue: Mutex<SyncQueue>,
    pub(crate) synced: AtomicU64,
    pub(crate) maintaining: Mutex<()>,
    pub(crate) maintenance_queued: AtomicBool,
    pub(crate) snapshot_bytes: AtomicU64,
    pub(crate) failure: Mutex<Option<Error>>,
    pub(crate) closed: AtomicBool,
}

impl TargetStore {
    /// Open the target in `dir`, creating or recovering it. Blocking.
    ///
    /// Fails with DiskError when the disk fails or its metadata is damaged beyond a torn tail.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Arc<Self>> {
        let disk = RealDisk::new(dir).map_err(|e| disk_error("cannot open the target's directory", e))?;
        Self::open_on(Arc::new(disk), options)
    }

    /// As [`TargetStore::open`], on any disk.
    pub fn open_on(disk: Arc<dyn Disk>, options: StoreOptions) -> Result<Arc<Self>> {
        crate::recover::open(disk, options)
    }

    /// State of a chunk; `None` when there is no trace of it. Memory only.
    pub fn chunk(&self, id: ChunkId) -> Option<ChunkMeta> {
        self.table.lock().meta(id)
    }

    /// Up to `limit` chunks after `after` in id order, tombstones included. Memory only.
    pub fn list(&self, after: Option<ChunkId>, limit: usize) -> Vec<(ChunkId, ChunkMeta)> {
        self.table.lock().metas_after(after).take(limit).collect()
    }

    /// The chunks of an inode with an index in `first..=last`, tombstones included. Memory only.
    pub fn inode_chunks(&self, space: u32, inode: u64, first: u32, last: u32) -> Vec<(ChunkId, ChunkMeta)> {
        if first > last {
            return vec![];
        }
        let id = |index| ChunkId { space, inode, index };
        self.table.lock().metas_within(id(first), id(last)).collect()
    }

    /// Make `update` the chunk's pending version, replacing one that is there.
    ///
    /// Errors: ChecksumMismatch when old bytes it has to be merged with are rotten; NoSpace; ChunkNotFound for a
    /// truncate or punch of a missing chunk; InvalidArgument; DiskError. After an error the chunk is as it was.
    pub async fn prepare(self: &Arc<Self>, update: Update) -> Result<VersionInfo> {
        result_of(|done| self.prepare_then(update, done)).await
    }

    /// Make the pending version the committed one, together with its exactly-once record. A version that is
    /// committed already is fine; one that was never prepared is a VersionGap.
    pub async fn commit(self: &Arc<Self>, id: ChunkId, version: UpdateVersion) -> Result<VersionInfo> {
        result_of(|done| self.commit_then(id, version, done)).await
    }

    /// As [`TargetStore::prepare`] without waiting: `done` gets the result on the thread that did it and must not block.
    pub fn prepare_then(self: &Arc<Self>, update: Update, done: impl FnOnce(Result<VersionInfo>) + Send + 'static) {
        let store = self.clone();
        self.change_then(move || store.prepare_blocking(update), done);
    }

    /// As [`TargetStore::commit`] without waiting: `done` gets the result on the thread that did it and must not block.
    pub fn commit_then(
        self: &Arc<Self>,
        id: ChunkId,
        version: UpdateVersion,
        done: impl FnOnce(Result<VersionInfo>) + Send + 'static,
    ) {
        let store = self.clone();
        self.change_then(move || store.commit_blocking(id, version), done);
    }

    /// Drop the pending version if it is `version`.
    pub async fn abort(self: &Arc<Self>, id: ChunkId, version: UpdateVersion) -> Result<()> {
        let store = self.clone();
        result_of(|done| self.change_then(move || store.abort_blocking(id, version), done)).await
    }

    /// Run `change` on a disk thread, and a sync after it when every change has to be durable; then `done`.
    fn change_then<T: Send + 'static>(
        self: &Arc<Self>,
        change: impl FnOnce() -> Result<T> + Send + 'static,
        done: impl FnOnce(Result<T>) + Send + 'static,
    ) {
        let store = self.clone();
        self.options.threads.run_then(change, move |changed| match changed {
            Ok(value) if store.options.durable_writes => store.sync_then(|synced| done(synced.map(|()| value))),
            changed => done(changed),
        });
    }

    /// Committed bytes from `offset` on: at most `length`, cut at the chunk's end. `offset` is a multiple of
    /// 4096, and so is `length` unless it reaches the chunk's end.
    ///
    /// Errors: ChunkNotFound for a chunk that is missing, removed or never committed; ChecksumMismatch;
    /// InvalidArgument; DiskError.
    pub async fn read(self: &Arc<Self>, id: ChunkId, offset: u32, length: u32) -> Result<ReadOut> {
        if let Some(done) = self.try_read_cached(id, offset, length) {
            return done;
        }
        if length <= SMALL_READ_BYTES_MAX
            && let Some(done) = self.read_small(id, offset, length).await
        {
            return done;
        }
        let store = self.clone();
        self.options.threads.run(move || store.read_blocking(id, offset, length)).await
    }

    /// As [`TargetStore::read`] when no disk has to be touched, else `None`. Never blocks.
    pub fn try_read_cached(&self, id: ChunkId, offset: u32, length: u32) -> Option<Result<ReadOut>> {
        let version = match self.readable(id, offset, length) {
            Ok(version) => version,
            Err(e) => return Some(Err(e)),
        };
        self.read_cached(&version, offset, length).map(Ok)
    }

    /// Make everything that has returned survive a power loss. Calls that wait at the same time share one sync.
    pub async fn sync(self: &Arc<Self>) -> Result<()> {
        result_of(|done| self.sync_then(done)).await
    }

    /// As [`TargetStore::sync`] without waiting: `done` must not block.
    fn sync_then(self: &Arc<Self>, done: impl FnOnce(Result<()>) + Send + 'static) {
        let mut queue = self.sync_queue.lock();
        queue.waiting.push(Box::new(done));
        if !std::mem::replace(&mut queue.running, true) {
            let store = self.clone();
            self.options.threads.spawn(move || store.serve_syncs());
        }
    }

    /// Sync for all that wait until nobody does.
    fn serve_syncs(&self) {
        loop {
            let waiting = {
                let mut queue = self.sync_queue.lock();
                queue.running = !queue.waiting.is_empty();
                std::mem::take(&mut queue.waiting)
            };
            if waiting.is_empty() {
                return;
            }
            let result = caught(|| self.sync_blocking());
            for done in waiting {
                done(result.clone());
            }
        }
    }

    /// Bytes of the disk blocks in use.
    pub fn used_bytes(&self) -> u64 {
        self.blocks.used_bytes()
    }

    /// Chunks with readable content.
    pub fn chunks(&self) -> u64 {
        self.table.lock().live_chunks()
    }

    /// Why the store refuses updates, if it does.
    pub fn failed(&self) -> Option<Error> {
        self.failure.lock().clone()
    }

    /// Sync, bring pending disk writes to their places and refuse updates from now on. An error is kept in
    /// [`TargetStore::failed`].
    pub async fn close(self: &Arc<Self>) {
        let store = self.clone();
        let _ = self.options.threads.run(move || store.close_blocking()).await;
    }

    pub(crate) fn check_usable(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::new(Code::NotServing, "the target is closed"));
        }
        match &*self.failure.lock() {
            Some(e) => Err(e.clone()),
            None => Ok(()),
        }
    }

    /// Remember a disk error: from now on updates are refused.
    pub(crate) fn fail_on_disk_error<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(e) = &result
            && e.code == Code::DiskError
        {
            tracing::error!(error = %e, "target failed");
            note_failure(&*self.disk);
            self.failure.lock().get_or_insert_with(|| e.clone());
        }
        result
    }

    /// Write a record to the log and apply it to the table.
    pub(crate) fn persist(&self, record: Record, block: Option<Arc<Block>>) -> Result<()> {
        let mut applying = self.applying.read();
        let mut appended = self.log.append(&record);
        for _ in 0..2 {
            if matches!(&appended, Err(e) if e.code == Code::NoSpace) {
                drop(applying);
                self.make_room(2 * GROW_BYTES)?;
                applying = self.applying.read();
                appended = self.log.append(&record);
            }
        }
        let position = self.fail_on_disk_error(appended)?;
        self.fail_on_disk_error(self.log.flush(position))?;
        self.table.lock().apply(position, record, block);
        drop(applying);
        Ok(())
    }

    pub(crate) fn commit_blocking(self: &Arc<Self>, id: ChunkId, version: UpdateVersion) -> Result<VersionInfo> {
        self.check_usable()?;
        let (pending, committed) = match self.chunk(id) {
            Some(meta) => (meta.pending, meta.committed),
            None => (None, None),
        };
        if pending.is_none_or(|p| p.update_version != version) {
            return committed.filter(|c| c.update_version >= version).ok_or_else(|| {
                Error::new(Code::VersionGap, format!("chunk {id} has no pending version {version} to commit"))
            });
        }
        self.persist(Record::Commit { id, version, time_ms: now_ms() }, None)?;
        self.maintain_if_due();
        let meta = self.chunk(id).and_then(|m| m.committed);
        meta.ok_or_else(|| Error::new(Code::Internal, "a committed chunk vanished"))
    }

    pub(crate) fn abort_blocking(&self, id: ChunkId, version: UpdateVersion) -> Result<()> {
        self.check_usable()?;
        let pending = self.chunk(id).and_then(|m| m.pending);
        if pending.is_some_and(|p| p.update_version == version) {
            self.persist(Record::Abort { id, version }, None)?;
        }
        Ok(())
    }

    /// The version a read of `id` gets.
    pub(crate) fn readable(&self, id: ChunkId, offset: u32, length: u32) -> Result<Arc<Version>> {
        if !offset.is_multiple_of(BLOCK_BYTES) {
            return Err(Error::new(Code::InvalidArgument, format!("read offset {offset} is not a multiple of 4096")));
        }
        let committed = self.table.lock().get(id).and_then(|c| c.committed.clone());
        let version = committed
            .filter(|v| !v.info.removed)
            .ok_or_else(|| Error::new(Code::ChunkNotFound, format!("chunk {id} is not there")))?;
        let end = offset.saturating_add(length);
        if end < version.info.length && !end.is_multiple_of(BLOCK_BYTES) {
            return Err(Error::new(Code::InvalidArgument, format!("read length {length} is not a multiple of 4096")));
        }
        Ok(version)
    }
}

/// Refuse what no caller may ask for.
pub(crate) fn check_update(update: &Update) -> Result<()> {
    let invalid = |what: String| Err(Error::new(Code::InvalidArgument, what));
    let bytes = update.chunk_bytes;
    if !bytes.is_power_of_two() || !(CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&bytes) {
        return invalid(format!("chunk size {bytes} is not a power of two from 64 KiB to 64 MiB"));
    }
    if update.update_version.0 == 0 {
        return invalid("update version 0 means never written".into());
    }
    let end = match &update.change {
        Change::Write(bytes) | Change::Replace { bytes, .. } => u64::from(bytes.offset()) + bytes.data().len() as u64,
        Change::Truncate { length } => u64::from(*length),
        Change::Punch { offset, length } => u64::from(*offset) + u64::from(*length),
        Change::Remove => 0,
    };
    if end > u64::from(bytes) {
        return invalid(format!("the write ends at {end}, past the chunk size {bytes}"));
    }
    Ok(())
}

/// Wall-clock milliseconds, for the age of tombstones only.
pub(crate) fn now_ms() -> i64 {
    fs3_rt::wall_ns() / 1_000_000
}
