//! Memory of others that may lose its file under us.
//!
//! Who owns a file of `/dev/shm` can cut it while the daemon reads or writes the mapping; the processor then raises SIGBUS,
//! which would end the daemon and with it the mount of everybody. A handler puts zero pages where the file was and the
//! instruction goes on; what it meets belongs to the one who cut it. In system calls the same is an error (EFAULT), which
//! [`Guarded::mend`] ends.

use std::ops::Deref;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::{Errno, Memory, Result};

/// Guarded mappings of a process at most.
pub const GUARDED_MAX: usize = 1 << 13;

/// A mapping, as the signal handler finds it. `start` is [`FREE`], [`CLAIMED`], or an address.
struct Slot {
    start: AtomicUsize,
    bytes: AtomicUsize,
}

const FREE: usize = 0;
const CLAIMED: usize = 1;
const PAGE: usize = 4096;

static SLOTS: [Slot; GUARDED_MAX] =
    [const { Slot { start: AtomicUsize::new(FREE), bytes: AtomicUsize::new(0) } }; GUARDED_MAX];
/// Slots below this one may be in use.
static USED: AtomicUsize = AtomicUsize::new(0);
static INSTALL: Once = Once::new();
static mut BEFORE: libc::sigaction = unsafe { std::mem::zeroed() };

/// A mapping whose loss does no harm.
#[derive(Debug)]
pub struct Guarded {
    memory: Memory,
    slot: usize,
}

impl Guarded {
    /// Guard a mapping as long as the result lives. Errors: ENOSPC when too many are.
    pub fn new(memory: Memory) -> Result<Self> {
        INSTALL.call_once(install);
        for (at, slot) in SLOTS.iter().enumerate() {
            if slot.start.compare_exchange(FREE, CLAIMED, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                slot.bytes.store(memory.bytes(), Ordering::Relaxed);
                slot.start.store(memory.start() as usize, Ordering::Release);
                USED.fetch_max(at + 1, Ordering::AcqRel);
                return Ok(Self { memory, slot: at });
            }
        }
        Err(Errno(libc::ENOSPC))
    }

    /// Put zeros where the file was cut, so that system calls find memory there. Says whether it was cut.
    pub fn mend(&self) -> bool {
        if self.memory.is_whole() {
            return false;
        }
        replace(self.memory.start() as usize, self.memory.bytes());
        true
    }
}

impl Deref for Guarded {
    type Target = Memory;
    fn deref(&self) -> &Memory {
        &self.memory
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // Before the mapping goes: its addresses may soon be another's.
        SLOTS[self.slot].start.store(FREE, Ordering::Release);
    }
}

/// Private zero pages in place of what is mapped there. Safe in a signal handler.
fn replace(start: usize, bytes: usize) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the range lies in a mapping of ours, which stays one.
    unsafe { libc::mmap(start as *mut libc::c_void, bytes, protection, flags, -1, 0) != libc::MAP_FAILED }
}

fn install() {
    // SAFETY: all zeros is a valid value; the handler only does what is allowed in one. `BEFORE` is written once, before
    // the handler that reads it can run.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut BEFORE);
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
    }
}

extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid structure.
    let address = unsafe { (*info).si_addr() } as usize;
    for slot in &SLOTS[..USED.load(Ordering::Acquire)] {
        let start = slot.start.load(Ordering::Acquire);
        let end = start.saturating_add(slot.bytes.load(Ordering::Relaxed));
        if start > CLAIMED && (start..end).contains(&address) {
            let page = address & !(PAGE - 1);
            // A file is cut at its end: what lies behind is gone, too.
            if replace(page, end - page) {
                return;
            }
        }
    }
    // SAFETY: written before this handler was installed; a handler of that kind has this type.
    unsafe {
        let before = (&raw const BEFORE).read();
        match before.sa_sigaction {
            libc::SIG_DFL | libc::SIG_IGN => {
                // The instruction comes again and ends the process as it would have.
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &raw const default, std::ptr::null_mut());
            }
            handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
                let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(handler);
                handler(signal, info, context);
            }
            handler => {
                let handler: extern "C" fn(libc::c_int) = std::mem::transmute(handler);
                handler(signal);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::shm;

    #[test]
    fn memory_whose_file_was_cut_reads_as_zeros_and_takes_writes() {
        let (path, made) = shm(1 << 20);
        // SAFETY: the mapping has that many bytes.
        unsafe { made.start().add(900_000).write_volatile(7) };
        let guarded = Guarded::new(Memory::open(&path, 1 << 20).unwrap()).unwrap();
        assert!(!guarded.mend());
        let at = |offset: usize| guarded.start().wrapping_add(offset);
        // SAFETY: in the mapping; the file behind it is cut, which is what is tried.
        unsafe {
            assert_eq!(at(900_000).read_volatile(), 7);
            std::fs::File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
            assert_eq!(at(900_000).read_volatile(), 0);
            at(5000).write_volatile(1);
            at(1).write_volatile(2);
            assert_eq!((at(5000).read_volatile(), at(1).read_volatile()), (1, 2));
        }
        assert!(guarded.mend());
        std::fs::remove_file(path).unwrap();
    }
}
