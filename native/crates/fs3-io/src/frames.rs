//! Reading a file of framed records from its start to its end, in bounded memory.

use std::io::IoSliceMut;

use fs3_chunk::{FRAME_HEADER_BYTES, unframe};
use fs3_core::Result;

use crate::disk::DiskFile;
use crate::log::disk_error;

/// Bytes read at a time; a larger record is read whole.
const WINDOW_BYTES: usize = 1 << 20;

/// A cursor over a file.
pub(crate) struct Frames<'a> {
    file: &'a dyn DiskFile,
    window: Vec<u8>,
    // The bytes `at..filled` of the window are read and not yet consumed.
    at: usize,
    filled: usize,
    // Offset in the file of the window's byte `filled`.
    read_to: u64,
    file_bytes: u64,
}

impl<'a> Frames<'a> {
    pub fn new(file: &'a dyn DiskFile) -> Result<Self> {
        let file_bytes = file.len().map_err(|e| disk_error("cannot read the metadata", e))?;
        Ok(Self { file, window: vec![], at: 0, filled: 0, read_to: 0, file_bytes })
    }

    /// The next `bytes` bytes, which stay to be consumed; fewer at the end of the file.
    fn peek(&mut self, bytes: usize) -> Result<&[u8]> {
        if self.filled - self.at < bytes && self.read_to < self.file_bytes {
            self.window.copy_within(self.at..self.filled, 0);
            (self.at, self.filled) = (0, self.filled - self.at);
            let wanted = (self.filled as u64 + self.file_bytes - self.read_to).min(bytes.max(WINDOW_BYTES) as u64);
            self.window.resize(self.window.len().max(wanted as usize), 0);
            let rest = &mut self.window[self.filled..];
            let read = self.file.read_at(&mut [IoSliceMut::new(rest)], self.read_to);
            let read = read.map_err(|e| disk_error("cannot read the metadata", e))?;
            self.filled += read;
            self.read_to = if read == 0 { self.file_bytes } else { self.read_to + read as u64 };
        }
        Ok(&self.window[self.at..self.filled.min(self.at + bytes)])
    }

    /// The next `bytes` bytes; `None` when the file ends before.
    pub fn take(&mut self, bytes: usize) -> Result<Option<&[u8]>> {
        if self.peek(bytes)?.len() < bytes {
            return Ok(None);
        }
        self.at += bytes;
        Ok(Some(&self.window[self.at - bytes..self.at]))
    }

    /// The payload of the next record, which lies at log position `position`; `None` at the end of what was written,
    /// or where it is torn.
    pub fn next(&mut self, position: u64) -> Result<Option<&[u8]>> {
        let header = self.peek(FRAME_HEADER_BYTES)?;
        let Some(length) = header.first_chunk::<4>().map(|b| u32::from_le_bytes(*b)) else { return Ok(None) };
        let left = self.file_bytes - self.read_to + (self.filled - self.at) as u64;
        let bytes = FRAME_HEADER_BYTES as u64 + u64::from(length);
        if bytes > left || self.peek(bytes as usize)?.len() < bytes as usize {
            return Ok(None);
        }
        let record = &self.window[self.at..self.at + bytes as usize];
        let payload = unframe(position, record);
        if payload.is_some() {
            self.at += bytes as usize;
        }
        Ok(payload)
    }
}
