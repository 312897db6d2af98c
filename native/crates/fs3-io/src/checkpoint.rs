//! Snapshots of the metadata, which let old log segments go.
//!
//! A snapshot is taken while updates go on: every chunk carries the position of its last record, and the
//! replay of the log skips what a chunk has already.

use std::io::IoSlice;
use std::sync::atomic::Ordering;

use fs3_chunk::{ChunkImage, Record, Table, frame, unframe};
use fs3_core::{ChunkId, Code, Error, Result, crc32c};

use crate::disk::{Access, Disk};
use crate::log::{disk_error, read_all, segment_number};
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
        self.log.segment_bytes() > self.options.log_bytes_max.max(2 * snapshot)
    }

    /// Write a snapshot and remove the log segments it replaces. One at a time.
    pub(crate) fn checkpoint(&self) -> Result<()> {
        let cannot = |e| disk_error("cannot write a metadata snapshot", e);
        let (first_segment, position) = {
            let _still = self.applying.write();
            self.log.switch()?
        };
        let _ = self.disk.remove(SNAPSHOT_NEW);
        let file = self.disk.open(SNAPSHOT_NEW, Access::Buffered).map_err(cannot)?;
        let mut out = header(first_segment, position);
        let mut written = 0u64;
        let mut after: Option<ChunkId> = None;
        let mut chunks = 0u64;
        loop {
            let images: Vec<ChunkImage> = {
                let table = self.table.lock();
                table.after(after).take(BATCH).map(ChunkImage::from).collect()
            };
            let last = images.is_empty();
            after = images.last().map(|image| image.id);
            chunks += images.len() as u64;
            for image in images {
                frame(written + out.len() as u64, &mut out, |o| Record::Chunk(image).encode(o));
            }
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
        file.sync().map_err(cannot)?;
        self.disk.rename(SNAPSHOT_NEW, SNAPSHOT).map_err(cannot)?;
        self.disk.sync_dir().map_err(cannot)?;
        self.snapshot_bytes.store(written, Ordering::Relaxed);
        remove_segments_before(&*self.disk, first_segment)
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

/// Fill `table` from the snapshot, if there is one.
pub(crate) fn load(disk: &dyn Disk, table: &mut Table) -> Result<Option<SnapshotHead>> {
    if !disk.list().map_err(|e| disk_error("cannot list the target", e))?.iter().any(|n| n == SNAPSHOT) {
        return Ok(None);
    }
    let damaged =
        || Error::new(Code::DiskError, "the metadata snapshot is damaged; rebuild this target from its chain");
    let file = disk.open(SNAPSHOT, Access::Buffered).map_err(|e| disk_error("cannot read the metadata", e))?;
    let bytes = read_all(&*file)?;
    let fields = bytes.get(..HEADER_BYTES).ok_or_else(damaged)?;
    let word = |at: usize| u64::from_le_bytes(fields[at..at + 8].try_into().expect("8 bytes"));
    if &fields[..8] != MAGIC || crc32c(&fields[..24]).to_le_bytes() != fields[24..] {
        return Err(damaged());
    }
    let (mut at, mut seen) = (HEADER_BYTES, 0);
    loop {
        let payload = unframe(at as u64, &bytes[at..]).ok_or_else(damaged)?;
        at += payload.len() + fs3_chunk::FRAME_HEADER_BYTES;
        match Record::decode(payload).ok_or_else(damaged)? {
            Record::Chunk(image) => {
                table.apply(image.position, Record::Chunk(image), None);
                seen += 1;
            }
            Record::End { chunks } if chunks == seen => break,
            _ => return Err(damaged()),
        }
    }
    Ok(Some(SnapshotHead { first_segment: word(8), position: word(16), bytes: bytes.len() as u64 }))
}
