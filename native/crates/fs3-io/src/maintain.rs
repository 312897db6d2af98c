//! What happens behind the updates: data files, space, sync, patches going to their places.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fs3_chunk::{BLOCK_BYTES, Block, Patch, Record, Run, Version};
use fs3_core::{ChunkId, Code, Error, Result};
use parking_lot::Mutex;

use crate::cache::PAGE_BLOCKS;
use crate::disk::{Access, Disk, DiskFile};
use crate::log::{disk_error, sync_error};
use crate::store::{TargetStore, now_ms};

/// Framed size of a mark in the log: frame header, format, kind, position.
const SYNCED_RECORD_BYTES: u64 = fs3_chunk::FRAME_HEADER_BYTES as u64 + 2 + 8;

/// One file of blocks per size class, opened when first needed.
pub(crate) struct DataFiles {
    disk: Arc<dyn Disk>,
    files: Mutex<BTreeMap<u8, Arc<DataFile>>>,
}

pub(crate) struct DataFile {
    file: Arc<dyn DiskFile>,
    // Written since the last sync; true at open, as a former process may not have synced.
    dirty: AtomicBool,
}

impl DataFiles {
    pub fn new(disk: Arc<dyn Disk>) -> Self {
        Self { disk, files: Mutex::default() }
    }

    pub fn name(class: u8) -> String {
        format!("data.{class:02}.blk")
    }

    fn get(&self, class: u8) -> Result<Arc<DataFile>> {
        let mut files = self.files.lock();
        if let Some(file) = files.get(&class) {
            return Ok(file.clone());
        }
        let cannot = |e| disk_error("cannot open a data file", e);
        let file = self.disk.open(&Self::name(class), Access::Direct).map_err(cannot)?;
        if file.is_empty().map_err(cannot)? {
            // Its name must be durable before any record that names its blocks.
            self.disk.sync_dir().map_err(|e| sync_error("a data file", e))?;
        }
        let file = Arc::new(DataFile { file, dirty: AtomicBool::new(true) });
        files.insert(class, file.clone());
        Ok(file)
    }

    /// Number of blocks in the file of `class`.
    pub fn blocks(&self, class: u8) -> Result<u32> {
        let len = self.get(class)?.file.len().map_err(|e| disk_error("cannot open data", e))?;
        Ok((len >> class) as u32)
    }

    /// Reserve disk space for the blocks of `run`.
    pub fn reserve(&self, run: &Run) -> Result<()> {
        let file = self.get(run.class)?;
        let done = file.file.allocate(run.offset(), run.bytes());
        file.dirty.store(true, Ordering::Release);
        done.map_err(|e| disk_error("cannot reserve space for data", e))
    }

    /// Give the disk space of the blocks of `run` back.
    pub fn punch(&self, run: &Run) -> Result<()> {
        let done = self.get(run.class)?.file.punch(run.offset(), run.bytes());
        done.map_err(|e| disk_error("cannot give back the space of free blocks", e))
    }

    /// Bytes of disk space that all data files take.
    pub fn space(&self) -> Result<u64> {
        let files = self.files.lock();
        let sum = files.values().map(|f| f.file.space()).sum::<std::io::Result<u64>>();
        sum.map_err(|e| disk_error("cannot tell the space of data files", e))
    }

    /// Write at `offset` of a block; everything is aligned to 4096.
    pub fn write(&self, block: &Block, offset: u32, bufs: &mut [IoSlice]) -> Result<()> {
        let file = self.get(block.location.class)?;
        let at = block.location.offset() + u64::from(offset);
        let done = file.file.write_at(bufs, at);
        file.dirty.store(true, Ordering::Release);
        done.map_err(|e| disk_error("cannot write data", e))
    }

    /// Read at `offset` of a block; everything is aligned to 4096.
    pub fn read(&self, block: &Block, offset: u32, bufs: &mut [IoSliceMut]) -> Result<()> {
        let file = self.get(block.location.class)?;
        let wanted: usize = bufs.iter().map(|b| b.len()).sum();
        let at = block.location.offset() + u64::from(offset);
        let read = file.file.read_at(bufs, at).map_err(|e| disk_error("cannot read data", e))?;
        if read < wanted {
            return Err(Error::new(Code::DiskError, "a data file is shorter than its blocks; was it truncated?"));
        }
        Ok(())
    }

    /// The file of a block.
    pub fn file(&self, block: &Block) -> Result<Arc<dyn DiskFile>> {
        Ok(self.get(block.location.class)?.file.clone())
    }

    pub fn sync(&self) -> Result<()> {
        let files: Vec<_> = self.files.lock().values().cloned().collect();
        for file in files {
            // Cleared before the sync: a write during it makes the file dirty again.
            if file.dirty.swap(false, Ordering::AcqRel) {
                file.file.sync().map_err(|e| sync_error("data", e))?;
            }
        }
        Ok(())
    }
}

impl TargetStore {
    pub(crate) fn sync_blocking(&self) -> Result<()> {
        let wanted = self.log.end();
        let _one = self.syncing.lock();
        if self.synced.load(Ordering::Acquire) >= wanted {
            return Ok(());
        }
        if let Some(e) = self.failed() {
            return Err(e);
        }
        self.collect_returned();
        let position = self.log.end();
        let result = self.files.sync().and_then(|()| {
            // Data first, then the mark that says so: who reads the mark may trust the data.
            let end = self.log.append(&Record::Synced { position })?;
            self.log.sync()?;
            Ok(end)
        });
        // A failed sync is never retried: the kernel may have dropped the dirty pages.
        let end = match result {
            Ok(end) => end,
            // No mark was made; the data are durable all the same.
            Err(e) if e.code == Code::NoSpace => return Err(e),
            Err(e) => return self.fail_on_disk_error(Err(e)),
        };
        // With nothing but the mark itself after `position` the log is clean to its end.
        let clean = end - position == SYNCED_RECORD_BYTES;
        self.synced.store(if clean { end } else { position }, Ordering::Release);
        self.alloc.lock().release(position);
        Ok(())
    }

    /// Start maintenance in the background when enough has gathered.
    pub(crate) fn maintain_if_due(self: &Arc<Self>) {
        self.collect_returned();
        let due = self.alloc.lock().quarantined_bytes() > self.options.unsynced_free_bytes_max
            || self.table.lock().patch_bytes() > self.options.patch_bytes_max
            || self.checkpoint_due();
        if due && !self.maintenance_queued.swap(true, Ordering::AcqRel) {
            let store = self.clone();
            self.options.threads.spawn(move || {
                store.maintenance_queued.store(false, Ordering::Release);
                // An error of the disk is remembered as the store's failure.
                if let Err(e) = store.maintain() {
                    tracing::warn!(error = %e, "maintenance of a target stopped early");
                }
            });
        }
    }

    /// Wait in the caller when patches come faster than they can be put into their places.
    pub(crate) fn brake(&self) -> Result<()> {
        if self.table.lock().patch_bytes() > 4 * self.options.patch_bytes_max {
            self.maintain()?;
        }
        Ok(())
    }

    pub(crate) fn maintain(&self) -> Result<()> {
        let _one = self.maintaining.lock();
        self.check_usable()?;
        self.sync_blocking()?;
        self.apply_patches()?;
        self.forget_tombstones()?;
        self.give_back_surplus()?;
        self.keep_spare()?;
        if self.checkpoint_due() {
            self.fail_on_disk_error(self.checkpoint())?;
        }
        Ok(())
    }

    /// Do at once what happens in the background when enough has gathered. Blocking.
    #[doc(hidden)]
    pub fn maintain_for_tests(&self) -> Result<()> {
        self.maintain()
    }

    fn forget_tombstones(&self) -> Result<()> {
        let before = now_ms().saturating_sub(self.options.tombstone_ms);
        loop {
            let Some(id) = self.table.lock().pop_tombstone(before) else { return Ok(()) };
            self.persist(Record::Forget { id }, None)?;
        }
    }

    /// Write durable patches to their places.
    pub(crate) fn apply_patches(&self) -> Result<()> {
        let synced = self.synced.load(Ordering::Acquire);
        let patched = self.table.lock().patched();
        for id in patched {
            let version = {
                let mut table = self.table.lock();
                // A reader of a version without the patch could see it appear; the next round comes soon.
                if table.has_old_readers(id) {
                    continue;
                }
                table.get(id).and_then(|c| c.committed.clone())
            };
            if let Some(version) = version {
                self.fail_on_disk_error(self.apply_patches_of(id, &version, synced))?;
            }
        }
        Ok(())
    }

    fn apply_patches_of(&self, id: ChunkId, version: &Version, synced: u64) -> Result<()> {
        let Some(block) = &version.block else { return Ok(()) };
        let mut patches = (*version.patches).clone();
        patches.retain(|_, p| p.position <= synced);
        let runs = runs(&patches);
        if runs.is_empty() {
            return Ok(());
        }
        block.note_change();
        let written = runs.iter().try_for_each(|(first, run)| {
            let mut slices: Vec<IoSlice> = run.iter().map(|p| IoSlice::new(&p.bytes)).collect();
            self.files.write(block, first * BLOCK_BYTES, &mut slices)
        });
        block.note_change();
        self.options.read_cache.invalidate(block.generation, patches.keys().map(|b| b / PAGE_BLOCKS));
        written?;
        self.table.lock().patches_applied(id, &patches);
        Ok(())
    }

    pub(crate) fn close_blocking(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Ok(());
        }
        let _one = self.maintaining.lock();
        let result = self.sync_blocking().and_then(|()| self.apply_patches());
        self.closed.store(true, Ordering::Release);
        result
    }
}

/// Patches of neighbouring blocks together.
fn runs(patches: &BTreeMap<u32, Patch>) -> Vec<(u32, Vec<&Patch>)> {
    let mut runs: Vec<(u32, Vec<&Patch>)> = vec![];
    for (&block, patch) in patches {
        match runs.last_mut() {
            Some((first, run)) if *first + run.len() as u32 == block => run.push(patch),
            _ => runs.push((block, vec![patch])),
        }
    }
    runs
}
