//! Noticing that this process is a forked child: what the kernel and the daemon know of its parent is not its own.

use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// How often the line of this process forked, its own start counted as 0.
static GENERATION: AtomicU32 = AtomicU32::new(0);
static WATCH: Once = Once::new();

/// A number that a forked child has different from its parent. The first call must come before the fork.
pub(crate) fn generation() -> u32 {
    WATCH.call_once(|| {
        // SAFETY: the handler only counts, which is safe in a child of many threads.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    });
    GENERATION.load(Ordering::Relaxed)
}

unsafe extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_has_another_number_than_its_parent() {
        let before = generation();
        // SAFETY: the child only compares numbers and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: ends the child without running anything of the test.
            unsafe { libc::_exit(i32::from(generation() == before)) };
        }
        let mut status = -1;
        // SAFETY: `status` is valid for writing.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!((status, generation()), (0, before));
    }
}
