//! The metadata log: framed records in numbered segments, written by group commit.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

use fs3_chunk::{Body, FRAME_HEADER_BYTES, Record, frame};
use fs3_core::{Code, Error, Result};
use parking_lot::Mutex;

use crate::disk::{Access, Disk, DiskFile};
use crate::frames::Frames;
use crate::space::use_spare;

const MAGIC: &[u8; 8] = b"FS3CLOG1";
const HEADER_BYTES: u64 = 128;
/// A segment grows by this much at a time.
pub(crate) const GROW_BYTES: u64 = 4 << 20;
/// Kept free for what makes room on a full disk: removals and cuts.
const REMOVE_RESERVE_BYTES: u64 = 512 << 10;
/// Kept free for what follows a prepare: commits, aborts and marks never meet a full disk.
const COMMIT_RESERVE_BYTES: u64 = 512 << 10;

pub(crate) fn segment_name(number: u64) -> String {
    format!("meta.{number:016x}.log")
}

pub(crate) fn segment_number(name: &str) -> Option<u64> {
    u64::from_str_radix(name.strip_prefix("meta.")?.strip_suffix(".log")?, 16).ok()
}

/// Positions count the bytes of all records ever written, across segments.
pub(crate) struct Log {
    disk: Arc<dyn Disk>,
    // Lock order: file, then buffer.
    buffer: Mutex<Buffer>,
    file: Mutex<Segment>,
}

struct Buffer {
    bytes: Vec<u8>,
    spare: Vec<u8>,
    end: u64,
    // Up to which position the current segment has space.
    space_end: u64,
}

struct Segment {
    file: Arc<dyn DiskFile>,
    number: u64,
    start: u64,
    written: u64,
    // After a failed write the records after it must never be taken for written.
    failed: Option<Error>,
}

/// What is known of a segment without its records.
pub(crate) struct Scan {
    pub number: u64,
    pub start: u64,
    pub boot_id: String,
    pub end: u64,
    /// Position of its last [`Record::Synced`].
    pub mark: Option<u64>,
}

pub(crate) fn disk_error(what: &str, e: std::io::Error) -> Error {
    if matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) {
        return Error::new(Code::NoSpace, "the disk is full; free space or add disks");
    }
    Error::new(Code::DiskError, format!("{what}: {e}; check or replace the disk"))
}

/// As [`disk_error`] for a sync: whatever its reason, what was to become durable may be lost, and no later sync can
/// tell.
pub(crate) fn sync_error(what: &str, e: std::io::Error) -> Error {
    Error::new(Code::DiskError, format!("cannot make {what} durable: {e}; check or replace the disk"))
}

impl Log {
    /// Start a new segment `number` at position `start`.
    pub fn create(disk: Arc<dyn Disk>, number: u64, start: u64) -> Result<Self> {
        let (file, bytes) = new_segment(&*disk, number, start)?;
        Ok(Self {
            disk,
            buffer: Mutex::new(Buffer {
                bytes: vec![],
                spare: vec![],
                end: start,
                space_end: start + bytes - HEADER_BYTES,
            }),
            file: Mutex::new(Segment { file, number, start, written: start, failed: None }),
        })
    }

    /// Position after the last record appended.
    pub fn end(&self) -> u64 {
        self.buffer.lock().end
    }

    /// Bytes in the current segment.
    pub fn segment_bytes(&self) -> u64 {
        let file = self.file.lock();
        file.written - file.start
    }

    /// Queue a record for writing; returns the position after it. Fails with NoSpace when the disk is full, writes
    /// first, removals later, and what follows a prepare last.
    pub fn append(&self, record: &Record) -> Result<u64> {
        let keep = match record {
            Record::Prepare(p) if matches!(p.body, Body::Tombstone | Body::Cut { .. }) => COMMIT_RESERVE_BYTES,
            Record::Prepare(_) => COMMIT_RESERVE_BYTES + REMOVE_RESERVE_BYTES,
            _ => 0,
        };
        loop {
            let mut buffer = self.buffer.lock();
            let space_end = buffer.space_end;
            if buffer.end + record_bytes_max(record) + keep <= space_end {
                return Ok(buffer.push(record));
            }
            drop(buffer);
            self.grow(space_end, record_bytes_max(record))?;
        }
    }

    /// Reserve more space for the segment, unless somebody did since it ended at `space_end`.
    fn grow(&self, space_end: u64, bytes: u64) -> Result<()> {
        let file = self.file.lock();
        if self.buffer.lock().space_end != space_end {
            return Ok(());
        }
        let more = GROW_BYTES.max(bytes.next_multiple_of(GROW_BYTES));
        let offset = HEADER_BYTES + (space_end - file.start);
        file.file.allocate(offset, more).map_err(|e| disk_error("cannot extend the metadata log", e))?;
        self.buffer.lock().space_end = space_end + more;
        Ok(())
    }

    /// Write everything appended up to `position` to the operating system. Whoever comes first writes for
    /// all that wait.
    pub fn flush(&self, position: u64) -> Result<()> {
        let mut file = self.file.lock();
        if file.written >= position {
            return Ok(());
        }
        self.flush_locked(&mut file)
    }

    fn flush_locked(&self, file: &mut Segment) -> Result<()> {
        if let Some(e) = &file.failed {
            return Err(e.clone());
        }
        let mut bytes = {
            let mut buffer = self.buffer.lock();
            let spare = std::mem::take(&mut buffer.spare);
            std::mem::replace(&mut buffer.bytes, spare)
        };
        if bytes.is_empty() {
            return Ok(());
        }
        file.write(&bytes)?;
        bytes.clear();
        if bytes.capacity() <= 1 << 20 {
            self.buffer.lock().spare = bytes;
        }
        Ok(())
    }

    /// Make everything appended before the call durable.
    pub fn sync(&self) -> Result<()> {
        let file = {
            let mut file = self.file.lock();
            self.flush_locked(&mut file)?;
            file.file.clone()
        };
        file.sync().map_err(|e| sync_error("the metadata log", e))
    }

    /// Continue in a new segment; returns its number and start.
    pub fn switch(&self) -> Result<(u64, u64)> {
        let mut file = self.file.lock();
        self.flush_locked(&mut file)?;
        let mut buffer = self.buffer.lock();
        let rest = std::mem::take(&mut buffer.bytes);
        if !rest.is_empty() {
            file.write(&rest)?;
        }
        // The old segment is whole on disk before a later one can be: recovery never sees a gap.
        file.file.sync().map_err(|e| sync_error("the metadata log", e))?;
        let (number, start) = (file.number + 1, buffer.end);
        let (new, bytes) = new_segment(&*self.disk, number, start)?;
        buffer.space_end = start + bytes - HEADER_BYTES;
        *file = Segment { file: new, number, start, written: start, failed: None };
        Ok((number, start))
    }
}

impl Segment {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let at = HEADER_BYTES + (self.written - self.start);
        if let Err(e) = self.file.write_at(&mut [IoSlice::new(bytes)], at) {
            let e =
                Error::new(Code::DiskError, format!("cannot write the metadata log: {e}; check or replace the disk"));
            self.failed = Some(e.clone());
            return Err(e);
        }
        self.written += bytes.len() as u64;
        Ok(())
    }
}

impl Buffer {
    fn push(&mut self, record: &Record) -> u64 {
        let before = self.bytes.len();
        frame(self.end, &mut self.bytes, |out| record.encode(out));
        self.end += (self.bytes.len() - before) as u64;
        self.end
    }
}

/// An upper bound of a framed record's size.
fn record_bytes_max(record: &Record) -> u64 {
    let body = match record {
        Record::Prepare(p) => match &p.body {
            Body::Whole { crcs, .. } | Body::Append { crcs, .. } => crcs.len() * 4,
            Body::Patch { crcs, .. } => crcs.len() * 4100,
            Body::Punch { edges, .. } => edges.len() * 4104,
            Body::Cut { .. } | Body::Tombstone => 0,
        },
        _ => 0,
    };
    // 64 writer records of 44 bytes, and the fixed fields.
    body as u64 + 4096
}

/// A new segment and the bytes reserved for it; on a full disk only enough for what makes room.
fn new_segment(disk: &dyn Disk, number: u64, start: u64) -> Result<(Arc<dyn DiskFile>, u64)> {
    let cannot = |e| disk_error("cannot start a metadata log segment", e);
    let name = segment_name(number);
    let file = disk.open(&name, Access::Buffered).map_err(cannot)?;
    let reserve = |bytes| file.allocate(0, bytes).map(|()| bytes).map_err(cannot);
    let full = |done: &Result<u64>| matches!(done, Err(e) if e.code == Code::NoSpace);
    let mut bytes = reserve(GROW_BYTES);
    if full(&bytes) && use_spare(disk)? {
        bytes = reserve(GROW_BYTES);
    }
    if full(&bytes) {
        bytes = reserve(COMMIT_RESERVE_BYTES + REMOVE_RESERVE_BYTES);
    }
    let bytes = bytes?;
    let mut header = Vec::with_capacity(HEADER_BYTES as usize);
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&number.to_le_bytes());
    header.extend_from_slice(&start.to_le_bytes());
    let boot_id = disk.boot_id();
    let boot_id = &boot_id.as_bytes()[..boot_id.len().min(64)];
    header.push(boot_id.len() as u8);
    header.extend_from_slice(boot_id);
    header.resize(HEADER_BYTES as usize - 4, 0);
    let crc = fs3_core::crc32c(&header);
    header.extend_from_slice(&crc.to_le_bytes());
    file.write_at(&mut [IoSlice::new(&header)], 0).map_err(cannot)?;
    // Durable with its name before any record in it can be: recovery never misses a segment.
    file.sync().map_err(|e| sync_error("a metadata log segment", e))?;
    disk.sync_dir().map_err(|e| sync_error("a metadata log segment", e))?;
    Ok((file, bytes))
}

/// Find out how far a segment was written. `None` when its header never became whole, which happens only when its
/// creation was cut off, before it had any record.
pub(crate) fn scan(file: &dyn DiskFile) -> Result<Option<Scan>> {
    let mut frames = Frames::new(file)?;
    let Some(mut scan) = header(&mut frames)? else { return Ok(None) };
    while let Some(payload) = frames.next(scan.end)? {
        scan.end += (payload.len() + FRAME_HEADER_BYTES) as u64;
        scan.mark = scan.mark.max(Record::mark(payload));
    }
    Ok(Some(scan))
}

/// Write all of a segment to where it is, as it is.
pub(crate) fn write_again(file: &dyn DiskFile, scan: &Scan) -> Result<()> {
    let mut bytes = vec![0; (HEADER_BYTES + scan.end - scan.start) as usize];
    let read = file.read_at(&mut [IoSliceMut::new(&mut bytes)], 0).map_err(|e| disk_error("cannot read the log", e))?;
    file.write_at(&mut [IoSlice::new(&bytes[..read])], 0).map_err(|e| disk_error("cannot write the log again", e))
}

/// Give back the space reserved behind a segment that is not continued, and with it what a torn write left there.
pub(crate) fn give_back_tail(file: &dyn DiskFile, scan: &Scan) -> Result<()> {
    let cannot = |e| disk_error("cannot give back the space of an old log segment", e);
    let used = (HEADER_BYTES + scan.end - scan.start).next_multiple_of(4096);
    let len = file.len().map_err(cannot)?.next_multiple_of(4096);
    if len > used { file.punch(used, len - used).map_err(cannot) } else { Ok(()) }
}

/// Call `each` with the end position and the record of all that a segment has, in order.
pub(crate) fn replay(file: &dyn DiskFile, mut each: impl FnMut(u64, Record)) -> Result<()> {
    let mut frames = Frames::new(file)?;
    let Some(scan) = header(&mut frames)? else { return Ok(()) };
    let mut position = scan.start;
    while let Some(payload) = frames.next(position)? {
        position += (payload.len() + FRAME_HEADER_BYTES) as u64;
        let record = Record::decode(payload).ok_or_else(|| {
            let what = "the metadata log has a record of an unknown format; was it written by a newer release?";
            Error::new(Code::DiskError, what)
        })?;
        each(position, record);
    }
    Ok(())
}

fn header(frames: &mut Frames) -> Result<Option<Scan>> {
    let Some(header) = frames.take(HEADER_BYTES as usize)? else { return Ok(None) };
    let (fields, crc) = header.split_at(HEADER_BYTES as usize - 4);
    if fs3_core::crc32c(fields).to_le_bytes() != crc || &fields[..8] != MAGIC {
        return Ok(None);
    }
    let word = |at: usize| u64::from_le_bytes(fields[at..at + 8].try_into().expect("8 bytes"));
    let (number, start) = (word(8), word(16));
    let boot_id = String::from_utf8_lossy(&fields[25..25 + usize::from(fields[24]).min(64)]).into_owned();
    Ok(Some(Scan { number, start, boot_id, end: start, mark: None }))
}
