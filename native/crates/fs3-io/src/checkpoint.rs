//! Snapshots of the metadata, which let old log segments go.
//!
//! A snapshot is taken while updates go on: every chunk carries the position of its last record, and the
//! replay of the log skips what a chunk has already.

use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fs3_chunk::{Blocks, FRAME_HEADER_BYTES, Record, SnapshotLoad, Table, frame};
use fs3_core::{ChunkId, Code, Error, Result, crc32c};

use crate::disk::{Access, Disk};
use crate::frames::Frames;
use crate::log::{disk_error, segment_number, sync_error};
use crate::store::TargetStore;

pub(crate) const SNAPSHOT: &str = "meta.snap";
pub(crate) const SNAPSHOT_NEW: &str = "meta.snap.new";
const MAGIC: &[u8; 8] = b"FS3CSNP1";
const HEADER_BYTES: usize = 28;
/// Chunks encoded while the table is locked.
const BATCH: usize = 256;

/// Where the log continues a snapshot.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SnapshotHead {
    pub first_segment: u64,
    pub position: u64,
    pub bytes: u64,
}

impl TargetStore {
    pub(crate) fn checkpoint_due(&self) -> bool {
        let snapshot = self.snapshot_bytes.load(Ordering::Relaxed);
        self.log.segment_bytes() > self.options.log_bytes_max.max(snapshot)
    }

    /// Write a snapshot and remove the log segments it replaces. One at a time.
    pub(crate) fn checkpoint(&self) -> Result<()> {
        let cannot = |e| disk_error("cannot write a metadata snapshot", e);
        let (first_segment, position) = {
            let _still = self.applying.write();
            self.log.switch()?
        };
        let written = self.write_snapshot(first_segment, position).inspect_err(|_| {
            // Unfinished it is of no use, and the disk may be full. The next open removes it if this fails too.
            let _ = self.disk.remove(SNAPSHOT_NEW);
        })?;
        self.disk.rename(SNAPSHOT_NEW, SNAPSHOT).map_err(cannot)?;
        self.disk.sync_dir().map_err(|e| sync_error("a metadata snapshot", e))?;
        self.snapshot_bytes.store(written, Ordering::Relaxed);
        remove_segments_before(&*self.disk, first_segment)
    }

    /// Write all chunks to a new file and make it durable; returns its size.
    fn write_snapshot(&self, first_segment: u64, position: u64) -> Result<u64> {
        let cannot = |e| disk_error("cannot write a metadata snapshot", e);
        remove_if_there(&*self.disk, SNAPSHOT_NEW)?;
        let file = self.disk.open(SNAPSHOT_NEW, Access::Buffered).map_err(cannot)?;
        let mut out = header(first_segment, position);
        let mut written = 0u64;
        let mut after: Option<ChunkId> = None;
        let mut chunks = 0u64;
        loop {
            after = self.table.lock().for_snapshot(after, BATCH, |encode| {
                frame(written + out.len() as u64, &mut out, encode);
                chunks += 1;
            });
            let last = after.is_none();
            if last {
                frame(written + out.len() as u64, &mut out, |o| Record::End { chunks }.encode(o));
            }
            if last || out.len() >= 1 << 20 {
                file.write_at(&mut [IoSlice::new(&out)], written).map_err(cannot)?;
                written += out.len() as u64;
                out.clear();
            }
            if last {
                break;
            }
        }
        // The log that is about to go has patches that were put into their places: those must be durable.
        // A sync that finds no new records does not touch the data files, hence the first line.
        self.files.sync()?;
        self.sync_blocking()?;
        file.sync().map_err(|e| sync_error("a metadata snapshot", e))?;
        Ok(written)
    }
}

/// Remove a file that may not exist.
pub(crate) fn remove_if_there(disk: &dyn Disk, name: &str) -> Result<()> {
    match disk.remove(name) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(disk_error("cannot remove a file", e)),
        _ => Ok(()),
    }
}

pub(crate) fn remove_segments_before(disk: &dyn Disk, first: u64) -> Result<()> {
    let cannot = |e| disk_error("cannot remove an old log segment", e);
    for name in disk.list().map_err(cannot)? {
        if segment_number(&name).is_some_and(|number| number < first) {
            disk.remove(&name).map_err(cannot)?;
        }
    }
    Ok(())
}

fn header(first_segment: u64, position: u64) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&first_segment.to_le_bytes());
    out.extend_from_slice(&position.to_le_bytes());
    out.extend_from_slice(&crc32c(&out).to_le_bytes());
    out
}

/// The table as the snapshot has it; an empty one if there is no snapshot.
pub(crate) fn load(
    disk: &dyn Disk,
    blocks: Arc<Blocks>,
    live_chunks_max: usize,
) -> Result<(Table, Option<SnapshotHead>)> {
    if !disk.list().map_err(|e| disk_error("cannot list the target", e))?.iter().any(|n| n == SNAPSHOT) {
        return Ok((Table::new(blocks, live_chunks_max), None));
    }
    let damaged =
        || Error::new(Code::DiskError, "the metadata snapshot is damaged; rebuild this target from its chain");
    let file = disk.open(SNAPSHOT, Access::Buffered).map_err(|e| disk_error("cannot read the metadata", e))?;
    let mut frames = Frames::new(&*file)?;
    let fields = frames.take(HEADER_BYTES)?.ok_or_else(damaged)?;
    let word = |at: usize| u64::from_le_bytes(fields[at..at + 8].try_into().expect("8 bytes"));
    if &fields[..8] != MAGIC || crc32c(&fields[..24]).to_le_bytes() != fields[24..] {
        return Err(damaged());
    }
    let (first_segment, position) = (word(8), word(16));
    let (mut load, mut at, mut seen) = (SnapshotLoad::new(blocks, live_chunks_max), HEADER_BYTES as u64, 0);
    loop {
        let payload = frames.next(at)?.ok_or_else(damaged)?;
        at += (payload.len() + FRAME_HEADER_BYTES) as u64;
        match Record::decode(payload).ok_or_else(damaged)? {
            Record::Chunk(image) => {
                load.add(payload, image);
                seen += 1;
            }
            Record::End { chunks } if chunks == seen => break,
            _ => return Err(damaged()),
        }
    }
    Ok((load.finish(), Some(SnapshotHead { first_segment, position, bytes: at })))
}
