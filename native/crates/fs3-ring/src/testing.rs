//! For tests.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::Memory;

/// New shared memory and its file, which the test removes.
pub(crate) fn shm(bytes: usize) -> (PathBuf, Memory) {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = PathBuf::from(format!("/dev/shm/fs3-ring-test-{}-{number}", std::process::id()));
    let memory = Memory::create(&path, bytes, -1).unwrap();
    (path, memory)
}
