//! Processes that announced something.

use std::os::fd::{FromRawFd, OwnedFd};

use serde::{Deserialize, Serialize};

use crate::caller::Who;

/// A process. A later one of the same number is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub number: u32,
    /// When it began, in ticks since the system did.
    started: u64,
}

impl Process {
    /// That behind a request; `None` when it is gone or out of sight.
    pub fn of(who: Who) -> Option<Self> {
        let number = who.process()?;
        Some(Self { number, started: started(number)? })
    }

    /// A descriptor that becomes readable when it ends; `None` when it has.
    pub fn watch(&self) -> Option<OwnedFd> {
        let descriptor = open(self.number).ok()?;
        // Looked at behind the opening: what the descriptor is of is not this one's successor.
        (started(self.number) == Some(self.started)).then_some(descriptor)
    }
}

fn open(process: u32) -> std::io::Result<OwnedFd> {
    // SAFETY: an ordinary system call.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, process, libc::PIDFD_NONBLOCK) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: just opened, and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn started(process: u32) -> Option<u64> {
    let stat = std::fs::read(format!("/proc/{process}/stat")).ok()?;
    parse_started(&String::from_utf8_lossy(&stat))
}

/// The 22nd field; the second is a name in parentheses, which may have anything in it.
fn parse_started(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_of_a_process_is_found_behind_any_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 19";
        assert_eq!(parse_started(&format!("12 (a) b) {rest}")), Some(777));
        assert_eq!((parse_started(""), parse_started("12 (a) S 1")), (None, None));
    }

    #[test]
    fn one_that_had_the_number_before_is_not_watched() {
        let me = Process::of(Who::new(0, 0, std::process::id(), None)).unwrap();
        assert!(me.watch().is_some());
        assert!(Process { started: me.started - 1, ..me }.watch().is_none());
    }
}
