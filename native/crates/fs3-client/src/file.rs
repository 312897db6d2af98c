use fs3_core::{Code, Error, Region, RegionMut, Result};
use fs3_proto::v1::{Attr, Layout};

/// An open file. Shared by `Arc`; all methods may be called from any task at once.
///
/// Open files of one inode in one client share what is known of it: acknowledged writes through one are seen
/// by reads through another at once. Other clients see them after [`OpenFile::sync`] or [`OpenFile::close`]
/// (close-to-open). Overlapping writes at the same time are the caller's to order.
pub struct OpenFile {
    attr: Attr,
}

fn later<T>() -> Result<T> {
    Err(Error::new(Code::Unimplemented, "not connected"))
}

impl OpenFile {
    /// The inode.
    pub fn inode(&self) -> u64 {
        self.attr.inode
    }

    /// Attributes as last seen, length merged with this client's acknowledged writes.
    pub fn attr(&self) -> Attr {
        self.attr.clone()
    }

    /// Where the chunks live.
    pub fn layout(&self) -> Layout {
        self.attr.layout.unwrap_or_default()
    }

    /// The file's length in bytes as this client knows it.
    pub fn length(&self) -> u64 {
        self.attr.length
    }

    /// Whether the open made the file.
    pub fn created(&self) -> bool {
        false
    }

    /// Whether it is open for writing (has a write session).
    pub fn writable(&self) -> bool {
        false
    }

    /// Fill `buf` from `offset`. Returns the count, short only at the end of the file, together with the buffer.
    /// Holes are zeros. Every byte was verified against its writer's checksum.
    /// Errors: ChecksumMismatch when no replica is right; Timeout or Unavailable when none answered in time.
    pub async fn read(&self, offset: u64, buf: RegionMut) -> (Result<usize>, RegionMut) {
        let _ = offset;
        (later(), buf)
    }

    /// Write all of `data` at `offset`. Returns after every serving replica has it (it survives kill -9 of all);
    /// power loss needs [`OpenFile::sync`]. On an error a part may have been applied.
    /// Errors: NoSpace, FileTooLarge, InvalidArgument when not open for writing, Timeout.
    pub async fn write(&self, offset: u64, data: Region) -> Result<usize> {
        let _ = (offset, data);
        later()
    }

    /// Make every acknowledged write survive power loss and publish length and mtime.
    pub async fn sync(&self) -> Result<Attr> {
        later()
    }

    /// Publish length and mtime without asking the disks to sync (close-to-open for readers elsewhere).
    pub async fn publish(&self) -> Result<Attr> {
        later()
    }

    /// Cut or extend to `length` bytes.
    pub async fn truncate(&self, length: u64) -> Result<Attr> {
        let _ = length;
        later()
    }

    /// Ask the service for the attributes now.
    pub async fn refresh(&self) -> Result<Attr> {
        later()
    }

    /// Publish length and mtime and end the session. Later calls return the same attributes; reads and writes
    /// after it fail. Dropping an open file without it closes in the background, errors unseen.
    pub async fn close(&self) -> Result<Attr> {
        later()
    }
}
