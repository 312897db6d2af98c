//! The file as one mount shows it: descriptors, mapping, system calls.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::mapping::{Mapping, PAGE};
use crate::operation::Reopen;

/// Descriptors of one file through one mount.
pub(crate) struct Side {
    pub path: PathBuf,
    now: Opened,
    /// From before another mount took over.
    old: Vec<Opened>,
}

/// What is open at a time.
#[derive(Default)]
struct Opened {
    file: Option<File>,
    append: Option<File>,
    direct: Option<File>,
    map: Option<Mapping>,
}

impl Opened {
    fn new(path: &Path, how: u64, end: u64) -> io::Result<Self> {
        let open = |wanted: bool, flags| wanted.then(|| options(flags).open(path)).transpose();
        let file = open(true, 0)?;
        let append = open(how & Reopen::APPEND != 0, libc::O_APPEND)?;
        let direct = open(how & Reopen::DIRECT != 0, libc::O_DIRECT)?;
        let map = match &file {
            Some(file) if how & Reopen::MAP != 0 && end > 0 => Some(Mapping::new(file.as_raw_fd(), 0, end)?),
            _ => None,
        };
        Ok(Self { file, append, direct, map })
    }

    /// Unmap and close everything. `close` tells of writes that failed.
    fn close(&mut self) -> io::Result<()> {
        let opened = std::mem::take(self);
        drop(opened.map);
        for file in [opened.direct, opened.append, opened.file].into_iter().flatten() {
            // SAFETY: a descriptor that nobody else has.
            check(unsafe { libc::close(file.into_raw_fd()) })?;
        }
        Ok(())
    }
}

/// Reading and writing.
fn options(flags: i32) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(flags);
    options
}

/// Page-aligned memory, as O_DIRECT needs it.
struct Aligned {
    bytes: Vec<u8>,
    skip: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + PAGE as usize];
        let skip = bytes.as_ptr().align_offset(PAGE as usize);
        Self { bytes, skip, len }
    }

    fn of(data: &[u8]) -> Self {
        let mut aligned = Self::new(data.len());
        aligned.get().copy_from_slice(data);
        aligned
    }

    fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.skip..self.skip + self.len]
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Side {
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_path_buf(), now: Opened::default(), old: Vec::new() }
    }

    /// Make an empty file, or one of `length` bytes of zeros, and close it.
    pub fn make(&self, length: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(&self.path)?;
        file.set_len(length)?;
        file.sync_all()
    }

    /// Open as `how` (bits of [`Reopen`]) says; `end`: length of the file. What was open is closed.
    pub fn open(&mut self, how: u64, end: u64) -> io::Result<()> {
        if how & Reopen::OVERLAP == 0 {
            self.close()?;
        }
        let opened = Opened::new(&self.path, how, end)?;
        self.close()?;
        self.now = opened;
        Ok(())
    }

    /// Close everything.
    pub fn close(&mut self) -> io::Result<()> {
        self.now.close()?;
        self.old.drain(..).try_for_each(|mut opened| opened.close())
    }

    /// Keep everything open for as long as another mount has the file.
    pub fn rest(&mut self) {
        self.old.push(std::mem::take(&mut self.now));
    }

    fn main(&self) -> io::Result<&File> {
        self.now.file.as_ref().ok_or_else(|| io::Error::other("the file is not open"))
    }

    fn fd(&self) -> io::Result<RawFd> {
        Ok(self.main()?.as_raw_fd())
    }

    /// Length as `fstat` tells it.
    pub fn length(&self) -> io::Result<u64> {
        Ok(self.main()?.metadata()?.len())
    }

    /// One `pread`: of a regular file it returns all that is there.
    pub fn read(&self, at: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let read = self.main()?.read_at(&mut bytes, at)?;
        bytes.truncate(read);
        Ok(bytes)
    }

    pub fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.main()?.write_all_at(data, at)
    }

    /// One `write`, which takes all.
    pub fn append(&self, data: &[u8]) -> io::Result<()> {
        let fresh;
        let mut file = match &self.now.append {
            Some(file) => file,
            None => {
                fresh = OpenOptions::new().append(true).open(&self.path)?;
                &fresh
            }
        };
        let written = file.write(data)?;
        if written == data.len() { Ok(()) } else { Err(io::Error::other(format!("{written} bytes were appended"))) }
    }

    fn with_direct<T>(&self, use_file: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        match &self.now.direct {
            Some(file) => use_file(file),
            None => use_file(&options(libc::O_DIRECT).open(&self.path)?),
        }
    }

    pub fn direct_read(&self, at: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut buf = Aligned::new(len);
        let read = self.with_direct(|file| file.read_at(buf.get(), at))?;
        Ok(buf.get()[..read].to_vec())
    }

    pub fn direct_write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        let mut buf = Aligned::of(data);
        self.with_direct(|file| file.write_all_at(buf.get(), at))
    }

    /// Use the lasting mapping if it has the range, else a new one.
    pub fn mapped<T>(
        &self,
        start: u64,
        end: u64,
        use_mapping: impl FnOnce(&Mapping) -> io::Result<T>,
    ) -> io::Result<T> {
        match &self.now.map {
            Some(mapping) if mapping.covers(start, end) => use_mapping(mapping),
            _ => use_mapping(&Mapping::new(self.fd()?, start, end)?),
        }
    }

    /// `msync` of the lasting mapping, as far as the file (of `length` bytes) goes.
    pub fn sync_mapping(&self, length: u64) -> io::Result<()> {
        match &self.now.map {
            Some(mapping) if length > 0 => mapping.sync(mapping.start, mapping.end.min(length)),
            _ => Ok(()),
        }
    }

    pub fn sync(&self, data_only: bool) -> io::Result<()> {
        if data_only { self.main()?.sync_data() } else { self.main()?.sync_all() }
    }

    pub fn truncate(&self, length: u64, by_name: bool) -> io::Result<()> {
        if !by_name {
            return self.main()?.set_len(length);
        }
        let path = CString::new(self.path.as_os_str().as_encoded_bytes())?;
        // SAFETY: a system call with a string that ends in NUL.
        check(unsafe { libc::truncate(path.as_ptr(), length as libc::off_t) })
    }

    pub fn fallocate(&self, mode: libc::c_int, at: u64, len: u64) -> io::Result<()> {
        // SAFETY: a system call without pointers.
        check(unsafe { libc::fallocate(self.fd()?, mode, at as libc::off_t, len as libc::off_t) })
    }

    /// `copy_file_range` of `len` bytes until the `there` that the file has of them are copied or it copies no more; how many
    /// were. (The copy may make the file longer, so that there is more to copy by the end.)
    pub fn copy(&self, from: u64, to: u64, len: u64, there: u64) -> io::Result<u64> {
        let (fd, mut done) = (self.fd()?, 0);
        while done < there {
            let (mut source, mut target) = ((from + done) as libc::loff_t, (to + done) as libc::loff_t);
            // SAFETY: the pointers are to locals that outlive the call.
            let copied =
                unsafe { libc::copy_file_range(fd, &mut source, fd, &mut target, (len - done) as libc::size_t, 0) };
            match copied {
                0 => break,
                1.. => done += copied as u64,
                _ => return Err(io::Error::last_os_error()),
            }
        }
        Ok(done)
    }

    /// Next data or hole at or behind `at`; `None` for ENXIO.
    pub fn seek(&self, at: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
        // SAFETY: a system call without pointers.
        let found = unsafe { libc::lseek(self.fd()?, at as libc::off_t, whence) };
        if found >= 0 {
            return Ok(Some(found as u64));
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(error) }
    }

    pub fn forget(&self) -> io::Result<()> {
        // SAFETY: a system call without pointers. It returns the error itself.
        let failed = unsafe { libc::posix_fadvise(self.fd()?, 0, 0, libc::POSIX_FADV_DONTNEED) };
        if failed == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(failed)) }
    }
}
