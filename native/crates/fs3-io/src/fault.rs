//! A disk in memory that fails on demand and forgets unsynced writes. For tests of the store and of what is
//! built on it.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::disk::{Access, Disk, DiskFile};

const SECTOR: usize = 512;
/// Unit of disk space.
const PAGE: u64 = 4096;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A write stores a part of its bytes and reports EIO.
    Write,
    /// A sync reports EIO; what was not synced before is lost at the next crash.
    Sync,
    /// A read reports EIO.
    Read,
    /// A direct write does nothing and reports success.
    Lose,
    /// A direct write goes to another place of its file and reports success.
    Misdirect,
    /// Reserving space reports ENOSPC, until the next restart, crash or injection.
    Space,
    /// A write stores a part of its bytes and reports ENOSPC.
    Full,
    /// From this write, sync, reservation or rename on nothing has an effect: the process is dying.
    Halt,
}

/// A disk in memory. Handles made by `clone` are the same disk.
#[derive(Clone)]
pub struct FaultDisk(Arc<Mutex<State>>);

struct State {
    files: BTreeMap<u64, FileState>,
    names: BTreeMap<String, u64>,
    // Directory states since the last directory sync; a crash keeps one of them.
    names_unsynced: Vec<BTreeMap<String, u64>>,
    next_file: u64,
    boot: u64,
    // Open files of former processes are dead.
    process: u64,
    random: u64,
    fault: Option<(Fault, u64)>,
    halted: bool,
    operations: u64,
    space_max: u64,
}

#[derive(Default)]
struct FileState {
    durable: Vec<u8>,
    current: Vec<u8>,
    unsynced: Vec<(usize, Vec<u8>)>,
    // By page: whether it has disk space.
    pages: Vec<bool>,
}

impl FileState {
    fn space(&self) -> u64 {
        self.pages.iter().filter(|page| **page).count() as u64 * PAGE
    }
}

struct FaultFile {
    disk: Arc<Mutex<State>>,
    file: u64,
    process: u64,
    access: Access,
}

impl FaultDisk {
    /// An empty disk whose choices follow from `seed`.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            files: BTreeMap::new(),
            names: BTreeMap::new(),
            names_unsynced: vec![BTreeMap::new()],
            next_file: 1,
            boot: 1,
            process: 1,
            random: seed.wrapping_mul(2).wrapping_add(1),
            fault: None,
            halted: false,
            operations: 0,
            space_max: u64::MAX,
        })))
    }

    /// Let `fault` happen after `after` more operations of its kind (for `Halt`: of any kind).
    pub fn inject(&self, fault: Fault, after: u64) {
        self.0.lock().fault = Some((fault, after));
    }

    /// The disk has space for `bytes` bytes from now on, in pages of 4 KiB.
    pub fn set_space(&self, bytes: u64) {
        self.0.lock().space_max = bytes;
    }

    /// Bytes of disk space in use.
    pub fn space_used(&self) -> u64 {
        self.0.lock().space_used()
    }

    /// Operations that changed something so far.
    pub fn operations(&self) -> u64 {
        self.0.lock().operations
    }

    /// The machine loses power and restarts: every unsynced write is kept, lost or torn on its own, unsynced
    /// growth and names may be lost. Open files of before are dead.
    pub fn crash(&self) {
        let mut state = self.0.lock();
        let state = &mut *state;
        state.boot += 1;
        state.process += 1;
        state.fault = None;
        state.halted = false;
        let pick = draw(&mut state.random) as usize % state.names_unsynced.len();
        state.names = state.names_unsynced.swap_remove(pick);
        state.names_unsynced = vec![state.names.clone()];
        for file in state.files.values_mut() {
            for (at, bytes) in std::mem::take(&mut file.unsynced) {
                keep_some(&mut file.durable, at, &bytes, &mut state.random);
            }
            if draw(&mut state.random).is_multiple_of(2) {
                let grown = file.current.len().max(file.durable.len());
                file.durable.resize(grown, 0);
            }
            file.current = file.durable.clone();
        }
    }

    /// The process dies and is started again on the same running machine: nothing is lost.
    pub fn restart(&self) {
        let mut state = self.0.lock();
        state.fault = None;
        state.halted = false;
    }

    /// The process is killed, whatever its threads are doing, and started again on the same running machine: nothing
    /// that was written is lost, and open files of before are dead.
    pub fn kill(&self) {
        self.restart();
        self.0.lock().process += 1;
    }

    /// Flip one bit of a file.
    pub fn flip(&self, name: &str, offset: usize) {
        let mut state = self.0.lock();
        let id = state.names[name];
        let file = state.files.get_mut(&id).expect("a named file exists");
        file.current[offset] ^= 1;
        if let Some(byte) = file.durable.get_mut(offset) {
            *byte ^= 1;
        }
    }

    /// Names of the files.
    pub fn names(&self) -> Vec<String> {
        self.0.lock().names.keys().cloned().collect()
    }

    /// Some byte of a file that is not zero, chosen by `random`; `None` when there is none.
    pub fn written_byte(&self, name: &str, random: u64) -> Option<usize> {
        let bytes = self.contents(name);
        let from = random as usize % bytes.len().max(1);
        let at = bytes[from..].iter().position(|b| *b != 0).map(|at| from + at);
        at.or_else(|| bytes.iter().position(|b| *b != 0))
    }

    /// Bytes of a file as the running machine sees them.
    pub fn contents(&self, name: &str) -> Vec<u8> {
        let state = self.0.lock();
        state.files[&state.names[name]].current.clone()
    }
}

/// xorshift64*.
fn draw(random: &mut u64) -> u64 {
    *random ^= *random >> 12;
    *random ^= *random << 25;
    *random ^= *random >> 27;
    random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
}

fn keep_some(durable: &mut Vec<u8>, at: usize, bytes: &[u8], random: &mut u64) {
    let choice = draw(random) % 4;
    if choice == 0 {
        return;
    }
    for (i, sector) in bytes.chunks(SECTOR).enumerate() {
        if choice == 1 && draw(random).is_multiple_of(2) {
            continue;
        }
        put(durable, at + i * SECTOR, sector);
    }
}

fn put(to: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if to.len() < at + bytes.len() {
        to.resize(at + bytes.len(), 0);
    }
    to[at..at + bytes.len()].copy_from_slice(bytes);
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

impl State {
    // Whether the injected fault strikes an operation of `kind` now.
    fn strikes(&mut self, kind: Fault) -> bool {
        let Some((fault, after)) = &mut self.fault else { return false };
        if *fault != kind {
            return false;
        }
        if *after > 0 {
            *after -= 1;
            return false;
        }
        if kind != Fault::Space {
            self.fault = None;
        }
        true
    }

    fn change(&mut self) -> io::Result<()> {
        self.operations += 1;
        if self.strikes(Fault::Halt) {
            self.halted = true;
        }
        if self.halted { Err(eio()) } else { Ok(()) }
    }

    fn space_used(&self) -> u64 {
        self.names.values().map(|file| self.files[file].space()).sum()
    }

    /// Give `file` disk space for a range, as far as the disk has any.
    fn reserve(&mut self, file: u64, offset: u64, bytes: u64) -> io::Result<()> {
        let mut left = self.space_max.saturating_sub(self.space_used()) / PAGE;
        let pages = &mut self.files.get_mut(&file).expect("an open file exists").pages;
        let range = (offset / PAGE) as usize..(offset + bytes).div_ceil(PAGE) as usize;
        pages.resize(pages.len().max(range.end), false);
        for page in pages[range].iter_mut().filter(|page| !**page) {
            left = left.checked_sub(1).ok_or(io::Error::from_raw_os_error(libc::ENOSPC))?;
            *page = true;
        }
        Ok(())
    }

    fn names_changed(&mut self) {
        self.names_unsynced.push(self.names.clone());
    }
}

impl Disk for FaultDisk {
    fn open(&self, path: &str, access: Access) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.0.lock();
        let file = match state.names.get(path) {
            Some(&file) => file,
            None => {
                state.change()?;
                let file = state.next_file;
                state.next_file += 1;
                state.files.insert(file, FileState::default());
                state.names.insert(path.to_owned(), file);
                state.names_changed();
                file
            }
        };
        let process = state.process;
        Ok(Arc::new(FaultFile { disk: self.0.clone(), file, process, access }))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().names.keys().cloned().collect())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        state.change()?;
        let file = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.to_owned(), file);
        state.names_changed();
        Ok(())
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        if !state.names.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.change()?;
        state.names.remove(path);
        state.names_changed();
        Ok(())
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut state = self.0.lock();
        state.change()?;
        state.names_unsynced = vec![state.names.clone()];
        Ok(())
    }

    fn boot_id(&self) -> String {
        self.0.lock().boot.to_string()
    }
}

impl FaultFile {
    fn with<T>(&self, run: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.disk.lock();
        if state.process != self.process {
            return Err(eio());
        }
        run(&mut state)
    }

    fn check_aligned(&self, ptr: *const u8, len: usize, offset: u64) {
        if self.access == Access::Direct {
            assert!(ptr.addr().is_multiple_of(4096) && len.is_multiple_of(4096) && offset.is_multiple_of(4096));
        }
    }
}

impl DiskFile for FaultFile {
    fn read_at(&self, bufs: &mut [IoSliceMut], offset: u64) -> io::Result<usize> {
        self.with(|state| {
            if state.strikes(Fault::Read) {
                return Err(eio());
            }
            let bytes = &state.files[&self.file].current;
            let mut at = offset as usize;
            for buf in bufs {
                self.check_aligned(buf.as_ptr(), buf.len(), at as u64);
                let n = buf.len().min(bytes.len().saturating_sub(at));
                buf[..n].copy_from_slice(&bytes[at..at + n]);
                at += n;
            }
            Ok(at - offset as usize)
        })
    }

    fn write_at(&self, bufs: &mut [IoSlice], offset: u64) -> io::Result<()> {
        let mut at = offset;
        for buf in bufs.iter() {
            self.check_aligned(buf.as_ptr(), buf.len(), at);
            at += buf.len() as u64;
        }
        self.with(|state| {
            let mut bytes = Vec::with_capacity(bufs.iter().map(|b| b.len()).sum());
            bufs.iter().for_each(|b| bytes.extend_from_slice(b));
            let full = state.reserve(self.file, offset, bytes.len() as u64).is_err() || state.strikes(Fault::Full);
            let fails = state.change().is_err() || state.strikes(Fault::Write) || full;
            if fails {
                let keep = draw(&mut state.random) as usize % (bytes.len() + 1);
                bytes.truncate(keep / SECTOR * SECTOR);
            }
            let direct = self.access == Access::Direct;
            if !fails && direct && state.strikes(Fault::Lose) {
                return Ok(());
            }
            let elsewhere = (direct && state.strikes(Fault::Misdirect)).then(|| draw(&mut state.random) as usize);
            let file = state.files.get_mut(&self.file).expect("an open file exists");
            let places = file.current.len().saturating_sub(bytes.len()) / 4096 + 1;
            let offset = elsewhere.map_or(offset as usize, |random| random % places * 4096);
            put(&mut file.current, offset, &bytes);
            file.unsynced.push((offset, bytes));
            match (fails, full) {
                (true, true) => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
                (true, false) => Err(eio()),
                (false, _) => Ok(()),
            }
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.with(|state| {
            state.change()?;
            let fails = state.strikes(Fault::Sync);
            let file = state.files.get_mut(&self.file).expect("an open file exists");
            let unsynced = std::mem::take(&mut file.unsynced);
            if fails {
                return Err(eio());
            }
            for (at, bytes) in unsynced {
                put(&mut file.durable, at, &bytes);
            }
            let len = file.current.len();
            file.durable.resize(len, 0);
            Ok(())
        })
    }

    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.with(|state| {
            state.change()?;
            if state.strikes(Fault::Space) {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            state.reserve(self.file, offset, bytes)?;
            let file = state.files.get_mut(&self.file).expect("an open file exists");
            let len = file.current.len().max((offset + bytes) as usize);
            file.current.resize(len, 0);
            Ok(())
        })
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        assert!(offset.is_multiple_of(PAGE) && bytes.is_multiple_of(PAGE));
        self.with(|state| {
            state.change()?;
            let file = state.files.get_mut(&self.file).expect("an open file exists");
            let end = (file.current.len() as u64).min(offset + bytes) as usize;
            let zeros = vec![0; end.saturating_sub(offset as usize)];
            put(&mut file.current, offset as usize, &zeros);
            file.unsynced.push((offset as usize, zeros));
            let pages = (offset / PAGE) as usize..((offset + bytes) / PAGE) as usize;
            file.pages.get_mut(pages).into_iter().flatten().for_each(|page| *page = false);
            Ok(())
        })
    }

    fn space(&self) -> io::Result<u64> {
        self.with(|state| Ok(state.files[&self.file].space()))
    }

    fn len(&self) -> io::Result<u64> {
        self.with(|state| Ok(state.files[&self.file].current.len() as u64))
    }
}
