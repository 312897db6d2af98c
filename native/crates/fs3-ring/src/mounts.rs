//! Finding the mount that a path is on.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::fds;

/// The mountpoint of the mount with rings that a path is on, exactly as the system names it; `None` when it is on none,
/// or does not exist.
pub fn mountpoint_of(path: &Path) -> Option<PathBuf> {
    let path = path.canonicalize().ok()?;
    let table = std::fs::read("/proc/self/mountinfo").ok()?;
    let mut above: Vec<_> = fuse_mounts(&table).into_iter().filter(|mount| path.starts_with(mount)).collect();
    above.sort_by_key(|mount| std::cmp::Reverse(mount.as_os_str().len()));
    above.into_iter().find(|mount| File::open(mount).is_ok_and(|root| fds::is_of_mount(root.as_raw_fd())))
}

/// Mountpoints of FUSE file systems in a `mountinfo` table.
fn fuse_mounts(table: &[u8]) -> Vec<PathBuf> {
    let lines = table.split(|b| *b == b'\n');
    lines
        .filter_map(|line| {
            let mut fields = line.split(|b| *b == b' ');
            let mount = fields.nth(4)?;
            let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
            kind.starts_with(b"fuse").then(|| unescape(mount))
        })
        .collect()
}

/// Blanks and backslashes are written as three octal digits.
fn unescape(text: &[u8]) -> PathBuf {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|d| first == b'\\' && d.iter().all(|b| (b'0'..b'8').contains(b)));
        match digits {
            Some(d) => {
                plain.push(d.iter().fold(0, |value: u8, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')));
                rest = &tail[3..];
            }
            None => {
                plain.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(plain))
}

/// A path of C's.
pub fn path_of(text: &std::ffi::CStr) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(text.to_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_of_fuse_are_candidates() {
        let table = b"25 30 0:23 / /sys rw - sysfs sysfs rw\n\
            90 30 0:51 / /mnt/a\\040b rw,nosuid shared:1 - fuse.fs3 fs3 rw\n\n\
            91 30 0:52 / /mnt/c rw - fuse.other x rw\nbroken\n";
        assert_eq!(fuse_mounts(table), vec![PathBuf::from("/mnt/a b"), PathBuf::from("/mnt/c")]);
        assert_eq!(mountpoint_of(Path::new("/proc/self")), None);
        assert_eq!(mountpoint_of(Path::new("/does/not/exist")), None);
    }
}
