use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;

use fs3_core::AlignedBuf;

use crate::tcp::join;
use crate::{MESSAGE_BYTES, Measured, measure};

/// A file for direct I/O whose blocks are allocated and have been written once.
pub(crate) fn prepared_file(path: &Path, bytes: u64) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)?;
    // SAFETY: plain system call on an open descriptor.
    let status = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes as libc::off_t) };
    if status != 0 {
        return Err(io::Error::from_raw_os_error(status));
    }
    let buffer = AlignedBuf::new(MESSAGE_BYTES);
    for offset in (0..bytes).step_by(MESSAGE_BYTES) {
        file.write_all_at(&buffer, offset)?;
    }
    Ok(file)
}

fn direct(dir: &Path, depth: usize, total_bytes: u64, write: bool) -> io::Result<Measured> {
    let path = dir.join("fs3-bench-disk");
    let bytes = (total_bytes / MESSAGE_BYTES as u64).max(depth as u64) * MESSAGE_BYTES as u64;
    let file = prepared_file(&path, bytes)?;
    std::fs::remove_file(&path)?;
    let file = &file;
    measure(|| {
        thread::scope(|scope| {
            let workers = (0..depth)
                .map(|worker| {
                    scope.spawn(move || {
                        let mut buffer = AlignedBuf::new(MESSAGE_BYTES);
                        let start = (worker * MESSAGE_BYTES) as u64;
                        for offset in (start..bytes).step_by(depth * MESSAGE_BYTES) {
                            if write {
                                file.write_all_at(&buffer, offset)?;
                            } else {
                                file.read_exact_at(&mut buffer, offset)?;
                            }
                        }
                        Ok(())
                    })
                })
                .collect();
            join(workers)
        })?;
        Ok((bytes, bytes / MESSAGE_BYTES as u64))
    })
}

/// Direct reads of 1 MiB below `dir`, `depth` at a time.
pub fn disk_read(dir: &Path, depth: usize, total_bytes: u64) -> io::Result<Measured> {
    direct(dir, depth, total_bytes, false)
}

/// Direct writes of 1 MiB to allocated blocks below `dir`, `depth` at a time.
pub fn disk_write(dir: &Path, depth: usize, total_bytes: u64) -> io::Result<Measured> {
    direct(dir, depth, total_bytes, true)
}
