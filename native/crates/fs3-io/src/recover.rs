//! Opening a target: snapshot, log replay, and after a power loss the verification of what was not synced.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use fs3_chunk::{Allocator, Blocks, Chunk, Run, Table, Version};
use fs3_core::{CRC_BLOCK_BYTES, ChunkId, Code, Error, Result};
use parking_lot::{Mutex, RwLock};

use crate::checkpoint::{SNAPSHOT_NEW, SnapshotHead, load, remove_if_there, remove_segments_before};
use crate::disk::{Access, Disk};
use crate::log::{
    GROW_BYTES, Log, Scan, disk_error, give_back_tail, replay, scan, segment_name, segment_number, write_again,
};
use crate::maintain::DataFiles;
use crate::store::{StoreOptions, SyncQueue, TargetStore};

/// Segments and bytes of log at open beyond which a snapshot is made at once.
const SEGMENTS_MAX: usize = 4;
const LOG_BYTES_MAX: u64 = 4 << 20;

/// There since an error of the disk, until the target was opened well after it. A failed sync may have left what it was to
/// make durable in memory only, where a later sync does not find it (Rebello et al., *Can Applications Recover from fsync
/// Failures?*, 2020); so everything since the last good one is written once more.
const DISK_FAILED: &str = "disk.failed";

/// Chunks as they were at the last mark in the log, for those that changed since.
type Marked = BTreeMap<ChunkId, Option<Chunk>>;

pub(crate) fn open(disk: Arc<dyn Disk>, options: StoreOptions) -> Result<Arc<TargetStore>> {
    let opened = try_open(&disk, options);
    if matches!(&opened, Err(e) if e.code == Code::DiskError) {
        note_failure(&*disk);
    }
    opened
}

/// Let the next open know that a sync may have failed. Nothing can be done when this fails too.
pub(crate) fn note_failure(disk: &dyn Disk) {
    if let Err(e) = disk.open(DISK_FAILED, Access::Buffered) {
        tracing::warn!(error = %e, "a disk error could not be noted");
    }
}

fn try_open(disk: &Arc<dyn Disk>, options: StoreOptions) -> Result<Arc<TargetStore>> {
    let cannot = |e| disk_error("cannot open the target", e);
    let has_failed = disk.list().map_err(cannot)?.iter().any(|name| name == DISK_FAILED);
    let blocks = Arc::new(Blocks::default());
    remove_if_there(&**disk, SNAPSHOT_NEW)?;
    let (mut table, snapshot) = load(&**disk, blocks.clone(), options.live_chunks_max)?;
    let head = snapshot.unwrap_or_default();
    let scans = scan_segments(&**disk, head, snapshot.is_some(), has_failed)?;
    let (end, number) = scans.last().map_or((head.position, head.first_segment), |s| (s.end, s.number + 1));
    let log_bytes: u64 = scans.iter().map(|s| s.end - s.start).sum();
    let segments = scans.len();
    // Any segment: an open that was cut off after a power loss has verified nothing yet.
    let boot_id = disk.boot_id();
    let lost_power = scans.iter().any(|s| s.boot_id != boot_id);
    let marked = replay_all(&**disk, &mut table, &scans)?;
    let mut alloc = Allocator::default();
    let files = DataFiles::new(disk.clone());
    rebuild_allocator(&table, &files, &disk.list().map_err(cannot)?, &mut alloc)?;
    let log = create_log(disk, number.max(1), end, &files, &mut alloc)?;
    let store = Arc::new(TargetStore {
        options,
        files,
        log,
        table: Mutex::new(table),
        alloc: Mutex::new(alloc),
        blocks,
        applying: RwLock::new(()),
        syncing: Mutex::new(()),
        sync_queue: Mutex::new(SyncQueue::default()),
        synced: AtomicU64::new(0),
        maintaining: Mutex::new(()),
        maintenance_queued: AtomicBool::new(false),
        snapshot_bytes: AtomicU64::new(head.bytes),
        failure: Mutex::new(None),
        closed: AtomicBool::new(false),
        disk: disk.clone(),
    });
    let unsynced: Vec<ChunkId> = marked.keys().copied().collect();
    let rolled_back = store.roll_back_lost(marked, lost_power)?;
    if has_failed {
        store.write_again(&unsynced)?;
    }
    store.settle(rolled_back || segments >= SEGMENTS_MAX || log_bytes > LOG_BYTES_MAX)?;
    if has_failed {
        remove_if_there(&**disk, DISK_FAILED)?;
    }
    Ok(store)
}

/// Read all segments that follow the snapshot. Every one must begin where the one before ends.
fn scan_segments(disk: &dyn Disk, head: SnapshotHead, has_snapshot: bool, has_failed: bool) -> Result<Vec<Scan>> {
    let cannot = |e| disk_error("cannot open the target", e);
    remove_segments_before(disk, head.first_segment)?;
    let mut numbers: Vec<u64> = disk.list().map_err(cannot)?.iter().filter_map(|name| segment_number(name)).collect();
    numbers.sort();
    let mut scans: Vec<Scan> = vec![];
    let mut end = head.position;
    for (i, &number) in numbers.iter().enumerate() {
        let file = disk.open(&segment_name(number), Access::Buffered).map_err(cannot)?;
        let last = i + 1 == numbers.len();
        let Some(found) = scan(&*file)? else {
            if last {
                disk.remove(&segment_name(number)).map_err(cannot)?;
                continue;
            }
            return Err(damaged(format!("segment {number} has no header")));
        };
        if found.number != number || found.start != end {
            let (name, start) = (found.number, found.start);
            return Err(damaged(format!("segment {number} says {name} and begins at {start} instead of {end}")));
        }
        if last {
            if has_failed {
                write_again(&*file, &found)?;
            }
            // A former process may not have synced it; the segment that follows must not be durable before.
            file.sync().map_err(cannot)?;
        }
        give_back_tail(&*file, &found)?;
        end = found.end;
        scans.push(found);
    }
    if has_snapshot && scans.first().is_none_or(|s| s.number != head.first_segment) {
        return Err(damaged(format!("segment {} is missing", head.first_segment)));
    }
    Ok(scans)
}

/// Start the log's next segment. On a full disk the free blocks make room for it.
fn create_log(disk: &Arc<dyn Disk>, number: u64, start: u64, files: &DataFiles, alloc: &mut Allocator) -> Result<Log> {
    match Log::create(disk.clone(), number, start) {
        Err(e) if e.code == Code::NoSpace => {
            for run in alloc.take_surplus(2 * GROW_BYTES) {
                files.punch(&run)?;
                alloc.hollow(run);
            }
            Log::create(disk.clone(), number, start)
        }
        done => done,
    }
}

fn damaged(what: String) -> Error {
    Error::new(Code::DiskError, format!("the metadata log is damaged ({what}); rebuild this target from its chain"))
}

/// Apply the log. Returns the chunks that changed after the last mark as they were at the mark.
fn replay_all(disk: &dyn Disk, table: &mut Table, scans: &[Scan]) -> Result<Marked> {
    let mark = scans.iter().filter_map(|s| s.mark).max().unwrap_or(0);
    let mut marked = Marked::new();
    for scan in scans {
        let name = segment_name(scan.number);
        let file = disk.open(&name, Access::Buffered).map_err(|e| disk_error("cannot open the target", e))?;
        replay(&*file, |position, record| {
            let Some(id) = record.id().filter(|id| table.position(*id) < position) else { return };
            if position > mark {
                marked.entry(id).or_insert_with(|| table.get(id).cloned());
            }
            table.apply(position, record, None);
        })?;
    }
    Ok(marked)
}

fn rebuild_allocator(table: &Table, files: &DataFiles, names: &[String], alloc: &mut Allocator) -> Result<()> {
    let locations = table.locations();
    for class in Allocator::classes() {
        let used: Vec<u32> = locations.iter().filter(|l| l.class == class).map(|l| l.index).collect();
        let exists = names.contains(&DataFiles::name(class));
        if !exists && used.is_empty() {
            continue;
        }
        // A power loss may undo the growth of a file; what was lost with it fails its checksums.
        let needed = used.last().map_or(0, |last| last + 1);
        let there = files.blocks(class)?;
        if there < needed {
            files.reserve(&Run { class, blocks: there..needed })?;
        }
        let blocks = files.blocks(class)?;
        alloc.rebuild(class, blocks, &used);
    }
    Ok(())
}

impl TargetStore {
    /// Write the content of chunks to where it is, as it is.
    fn write_again(&self, chunks: &[ChunkId]) -> Result<()> {
        for id in chunks {
            let versions: Vec<Arc<Version>> = {
                let mut table = self.table.lock();
                let Some(chunk) = table.get(*id) else { continue };
                chunk.pending.iter().map(|p| p.version.clone()).chain(chunk.committed.clone()).collect()
            };
            for version in versions {
                let Some(block) = &version.block else { continue };
                let length = (version.info.length as usize).next_multiple_of(CRC_BLOCK_BYTES);
                let mut buffer = self.options.pool.take(length);
                self.files.read(block, 0, &mut [IoSliceMut::new(&mut buffer)])?;
                self.files.write(block, 0, &mut [IoSlice::new(&buffer)])?;
            }
        }
        Ok(())
    }

    /// After a power loss the log may have kept records whose data were lost. Those chunks go back to the
    /// state that was synced, whose blocks were not reused since. Returns whether there were any.
    ///
    /// Takes `marked` whether power was lost or not: no handle of a former version may outlive this, as `settle`
    /// declares its block free, and dropped later it would free the block again, under its next owner.
    fn roll_back_lost(&self, marked: Marked, lost_power: bool) -> Result<bool> {
        if !lost_power {
            return Ok(false);
        }
        let mut rolled_back = false;
        for (id, state) in marked {
            let versions: Vec<Arc<Version>> = {
                let mut table = self.table.lock();
                let chunk = table.get(id);
                let pending = chunk.and_then(|c| c.pending.as_ref()).map(|p| p.version.clone());
                chunk.and_then(|c| c.committed.clone()).into_iter().chain(pending).collect()
            };
            for version in versions {
                match self.read_version(&version, 0, version.info.length) {
                    Ok(_) => {}
                    Err(e) if e.code == Code::ChecksumMismatch => {
                        tracing::warn!(chunk = %id, version = %version.info.update_version, "unsynced update lost");
                        self.table.lock().restore(id, state);
                        rolled_back = true;
                        break;
                    }
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(rolled_back)
    }

    /// Make the opened state durable, so that from here on it counts as synced.
    fn settle(&self, snapshot: bool) -> Result<()> {
        let used = self.table.lock().locations();
        // Handles dropped by the replay and by rolling back say nothing about what is in use now.
        self.blocks.take_returned();
        if used.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(damaged("a block is used twice".into()));
        }
        let mut alloc = self.alloc.lock();
        for class in Allocator::classes() {
            let blocks = alloc.blocks(class);
            let of_class: Vec<u32> = used.iter().filter(|l| l.class == class).map(|l| l.index).collect();
            alloc.rebuild(class, blocks, &of_class);
        }
        drop(alloc);
        let done = if snapshot { self.checkpoint() } else { self.sync_blocking() };
        match done {
            // The log has it all; a snapshot is made when there is space.
            Err(e) if e.code == Code::NoSpace => self.sync_blocking(),
            done => done,
        }?;
        self.keep_spare()
    }
}
