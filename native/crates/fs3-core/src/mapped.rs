//! Which large buffers the process has mapped, for those who register memory with a device.
//!
//! A registration outlives nothing: a device that still knew pages which the process has given back would move wrong
//! bytes without any error. So buffers say here when they come and go, and watchers hear of it before memory goes.

use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

/// Hears that mapped memory is about to go.
pub trait MappingWatcher: Send + Sync {
    /// The `bytes` from `start` on are given back to the system after this call. Nobody refers to them any more.
    fn unmapping(&self, start: usize, bytes: usize);
}

/// Memory of another device that is mapped: the bytes from `offset` on of a dma-buf.
#[derive(Clone, Debug)]
pub struct DmaBuf {
    /// The buffer.
    pub fd: Arc<OwnedFd>,
    /// Where the mapping begins in it.
    pub offset: u64,
}

struct Mapping {
    bytes: usize,
    dmabuf: Option<DmaBuf>,
}

/// Mappings by their start.
static MAPPINGS: Mutex<BTreeMap<usize, Mapping>> = Mutex::new(BTreeMap::new());
static WATCHERS: RwLock<Vec<Weak<dyn MappingWatcher>>> = RwLock::new(Vec::new());

/// Call `watcher` for every mapping that goes, as long as it lives.
pub fn watch_mappings(watcher: Weak<dyn MappingWatcher>) {
    let mut watchers = WATCHERS.write();
    watchers.retain(|w| w.strong_count() > 0);
    watchers.push(watcher);
}

/// Start and length of the mapping that holds all of these bytes, and what it maps if that is no ordinary memory.
pub fn mapping_of(start: usize, bytes: usize) -> Option<(usize, usize, Option<DmaBuf>)> {
    let mappings = MAPPINGS.lock();
    let (&at, mapping) = mappings.range(..=start).next_back()?;
    (start.checked_add(bytes)? <= at + mapping.bytes).then(|| (at, mapping.bytes, mapping.dmabuf.clone()))
}

/// Memory of somebody else's (an array, a shared segment) that is to be treated as a mapping while this lives.
pub struct ForeignMapping {
    start: usize,
    bytes: usize,
}

impl ForeignMapping {
    /// # Safety
    /// The memory must stay mapped at this place while the result lives, and be that of `dmabuf` if there is one.
    pub unsafe fn new(start: *const u8, bytes: usize, dmabuf: Option<DmaBuf>) -> Self {
        MAPPINGS.lock().insert(start as usize, Mapping { bytes, dmabuf });
        Self { start: start as usize, bytes }
    }
}

impl Drop for ForeignMapping {
    fn drop(&mut self) {
        unmapping(self.start, self.bytes);
    }
}

pub(crate) fn mapped(start: usize, bytes: usize) {
    MAPPINGS.lock().insert(start, Mapping { bytes, dmabuf: None });
}

pub(crate) fn unmapping(start: usize, bytes: usize) {
    MAPPINGS.lock().remove(&start);
    for watcher in WATCHERS.read().iter().filter_map(Weak::upgrade) {
        watcher.unmapping(start, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AlignedBuf;

    #[derive(Default)]
    struct Seen(Mutex<Vec<(usize, usize)>>);

    impl MappingWatcher for Seen {
        fn unmapping(&self, start: usize, bytes: usize) {
            self.0.lock().push((start, bytes));
        }
    }

    #[test]
    fn a_large_buffer_is_known_from_its_making_to_just_before_its_end() {
        let seen = Arc::new(Seen::default());
        watch_mappings(Arc::downgrade(&seen) as Weak<dyn MappingWatcher>);
        let buf = AlignedBuf::new(1 << 20);
        let start = buf.as_mut_ptr() as usize;
        let place = |start, bytes| mapping_of(start, bytes).map(|(at, length, _)| (at, length));
        assert_eq!(place(start + 4096, 4096), Some((start, 1 << 20)));
        assert_eq!(place(start + 4096, 1 << 20), None);
        drop(buf);
        assert_eq!(place(start, 1), None);
        assert!(seen.0.lock().contains(&(start, 1 << 20)));
        let small = AlignedBuf::new(4096);
        assert_eq!(place(small.as_mut_ptr() as usize, 1), None);
    }
}
