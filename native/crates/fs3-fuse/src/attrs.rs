//! Between the schema's attributes and the kernel's.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fs3_client::{Attr, FileType, Setattr};
use fuser::{FileAttr, INodeNo, TimeOrNow};

/// What `stat` shows as the preferred size of an operation: large enough that standard I/O buffers gather
/// small writes, small enough not to waste their memory.
const BLKSIZE: u32 = 128 << 10;

/// Set-user-id and set-group-id.
pub(crate) const SET_ID_BITS: u32 = 0o6000;

/// The mode of a file after a write: no set-user-id, and no set-group-id where the group executes.
pub(crate) fn without_set_id(mode: u32) -> u32 {
    if mode & 0o010 != 0 { mode & !SET_ID_BITS } else { mode & !0o4000 }
}

pub(crate) fn kind(file_type: FileType) -> fuser::FileType {
    match file_type {
        FileType::Unspecified | FileType::File => fuser::FileType::RegularFile,
        FileType::Directory => fuser::FileType::Directory,
        FileType::Symlink => fuser::FileType::Symlink,
        FileType::Fifo => fuser::FileType::NamedPipe,
        FileType::Socket => fuser::FileType::Socket,
        FileType::CharDevice => fuser::FileType::CharDevice,
        FileType::BlockDevice => fuser::FileType::BlockDevice,
    }
}

/// The schema's type of a `mknod` mode.
pub(crate) fn type_of_mode(mode: u32) -> FileType {
    match mode & libc::S_IFMT {
        libc::S_IFIFO => FileType::Fifo,
        libc::S_IFSOCK => FileType::Socket,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        _ => FileType::File,
    }
}

/// A point in time, before or after 1970.
pub(crate) fn system_time(ns: i64) -> SystemTime {
    let distance = Duration::from_nanos(ns.unsigned_abs());
    if ns >= 0 { UNIX_EPOCH + distance } else { UNIX_EPOCH - distance }
}

/// Nanoseconds since 1970 of a time that fuser parsed from the kernel.
///
/// fuser turns (seconds, nanoseconds) with negative seconds into `epoch - (|seconds| + nanoseconds)` although the
/// kernel's nanoseconds always count forward; this takes the two apart again.
pub(crate) fn request_ns(time: SystemTime) -> i64 {
    let (seconds, nanos) = match time.duration_since(UNIX_EPOCH) {
        Ok(d) => (i64::try_from(d.as_secs()).unwrap_or(i64::MAX), d.subsec_nanos()),
        Err(before) => {
            let d = before.duration();
            (i64::try_from(d.as_secs()).map_or(i64::MIN, |s| -s), d.subsec_nanos())
        }
    };
    seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(nanos))
}

/// Nanoseconds since 1970 now.
pub(crate) fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// What `stat` shows as used, in units of 512 bytes. What is used is not known, but whether there may be holes is: programs
/// look for holes in files that use less than their length.
fn blocks(attr: &Attr, size: u64) -> u64 {
    let may_have_holes = attr.layout.is_some_and(|layout| size > u64::from(layout.chunk_bytes));
    if may_have_holes { size / 512 - 1 } else { size.div_ceil(512) }
}

/// What the kernel is told.
pub(crate) fn file_attr(attr: &Attr) -> FileAttr {
    let size = match attr.r#type() {
        FileType::Symlink => attr.symlink_target.len() as u64,
        _ => attr.length,
    };
    FileAttr {
        ino: INodeNo(attr.inode),
        size,
        blocks: blocks(attr, size),
        atime: system_time(attr.atime_ns),
        mtime: system_time(attr.mtime_ns),
        ctime: system_time(attr.ctime_ns),
        crtime: UNIX_EPOCH,
        kind: kind(attr.r#type()),
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev as u32,
        blksize: BLKSIZE,
        flags: 0,
    }
}

/// Times of a `setattr`, put into `change`.
pub(crate) fn set_times(change: &mut Setattr, atime: Option<TimeOrNow>, mtime: Option<TimeOrNow>) {
    match atime {
        Some(TimeOrNow::Now) => change.atime_now = true,
        Some(TimeOrNow::SpecificTime(t)) => change.atime_ns = Some(request_ns(t)),
        None => {}
    }
    match mtime {
        Some(TimeOrNow::Now) => change.mtime_now = true,
        Some(TimeOrNow::SpecificTime(t)) => change.mtime_ns = Some(request_ns(t)),
        None => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_survive() {
        for ns in [0, 1, -1, 1_700_000_000_123_456_789, -1_700_000_000_123_456_789] {
            let time = system_time(ns);
            let shown = match time.duration_since(UNIX_EPOCH) {
                Ok(d) => d.as_nanos() as i64,
                Err(e) => -(e.duration().as_nanos() as i64),
            };
            assert_eq!(shown, ns);
        }
        // 0.2 s before 1970 is (-1 s, +0.8 s) to the kernel, which fuser parses as 1.8 s before.
        assert_eq!(request_ns(UNIX_EPOCH - Duration::new(1, 800_000_000)), -200_000_000);
        assert_eq!(request_ns(UNIX_EPOCH + Duration::new(5, 7)), 5_000_000_007);
    }

    #[test]
    fn a_symlink_is_as_long_as_its_target() {
        let mut attr = Attr { inode: 9, mode: 0o777, nlink: 1, ..Attr::default() };
        attr.set_type(FileType::Symlink);
        attr.symlink_target = b"a/b".to_vec().into();
        let shown = file_attr(&attr);
        assert_eq!((shown.size, shown.blocks, shown.kind), (3, 1, fuser::FileType::Symlink));
    }

    #[test]
    fn a_file_of_many_chunks_looks_as_if_it_had_holes() {
        let layout = fs3_client::Layout { chunk_bytes: 1 << 16, ..Default::default() };
        let shown = |length| file_attr(&Attr { length, layout: Some(layout), ..Attr::default() });
        assert_eq!(shown(1 << 16).blocks, 128);
        let large = shown((1 << 16) + 1);
        assert!(large.blocks < large.size / 512 && large.blocks + 2 > large.size / 512);
    }

    #[test]
    fn mknod_modes_name_their_types() {
        assert_eq!(type_of_mode(libc::S_IFIFO | 0o600), FileType::Fifo);
        assert_eq!(type_of_mode(libc::S_IFREG | 0o600), FileType::File);
        assert_eq!(type_of_mode(0o600), FileType::File);
        assert_eq!(type_of_mode(libc::S_IFBLK), FileType::BlockDevice);
    }
}
