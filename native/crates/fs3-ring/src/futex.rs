//! Sleeping on a word of memory that processes share.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Until when to sleep.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Until {
    /// This long from now.
    For(Duration),
    /// A time of CLOCK_REALTIME.
    Realtime(libc::timespec),
}

/// Sleep while `word` is `seen`, until somebody wakes sleepers or the time is over. May return early.
pub(crate) fn wait(word: &AtomicU32, seen: u32, until: Until) {
    let (operation, time) = match until {
        Until::For(duration) => (libc::FUTEX_WAIT, timespec(duration)),
        Until::Realtime(time) => (libc::FUTEX_WAIT_BITSET | libc::FUTEX_CLOCK_REALTIME, time),
    };
    let none = std::ptr::null::<u32>();
    // SAFETY: the word and the time are valid for the call; the kernel only reads them.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            operation,
            seen,
            &raw const time,
            none,
            libc::FUTEX_BITSET_MATCH_ANY,
        )
    };
}

/// Wake all that sleep on `word`.
pub(crate) fn wake(word: &AtomicU32) {
    // SAFETY: the kernel only uses the address.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

fn timespec(duration: Duration) -> libc::timespec {
    libc::timespec { tv_sec: duration.as_secs() as libc::time_t, tv_nsec: duration.subsec_nanos().into() }
}

/// CLOCK_REALTIME.
pub(crate) fn realtime() -> libc::timespec {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is valid for writing.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut now) };
    now
}

/// As nanoseconds, for comparing; far times are the last ones.
pub(crate) fn nanos(time: &libc::timespec) -> i128 {
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

/// The other way round.
pub(crate) fn from_nanos(nanos: i128) -> libc::timespec {
    libc::timespec { tv_sec: (nanos / 1_000_000_000) as i64, tv_nsec: (nanos % 1_000_000_000) as i64 }
}
