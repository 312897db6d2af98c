//! Registrations of memory with one device.

use super::counters::Counters;
use fs3_core::{MappingWatcher, mapping_of};
use fs3_verbs::{Device, MemoryRegion, Sge};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Registrations by mapping: a mapping is registered whole when some of it is first used, and stays registered until
/// it is unmapped or others need the room.
pub(crate) struct Registrations {
    device: Arc<Device>,
    bytes_max: usize,
    state: Mutex<State>,
    warned: AtomicBool,
}

#[derive(Default)]
struct State {
    /// By the start of the mapping.
    known: BTreeMap<usize, Known>,
    bytes: usize,
    clock: u64,
    counters: Arc<Counters>,
}

struct Known {
    bytes: usize,
    region: Arc<MemoryRegion>,
    used: u64,
}

/// Registered memory: keys of a range, and what keeps them valid.
#[derive(Clone)]
pub(crate) struct Registered {
    pub address: u64,
    pub bytes: u32,
    region: Arc<MemoryRegion>,
}

impl Registered {
    pub fn new(start: *const u8, bytes: usize, region: &Arc<MemoryRegion>) -> Self {
        Self { address: start as u64, bytes: bytes as u32, region: region.clone() }
    }

    pub fn local(&self) -> Sge {
        Sge { addr: self.address, length: self.bytes, lkey: self.region.lkey() }
    }

    pub fn remote_key(&self) -> u32 {
        self.region.rkey()
    }
}

impl Registrations {
    pub fn new(device: &Arc<Device>, bytes_max: usize, counters: &Arc<Counters>) -> Arc<Self> {
        let this = Arc::new(Self {
            device: device.clone(),
            bytes_max,
            state: Mutex::new(State { counters: counters.clone(), ..State::default() }),
            warned: AtomicBool::new(false),
        });
        let watcher: Arc<dyn MappingWatcher> = this.clone();
        fs3_core::watch_mappings(Arc::downgrade(&watcher));
        this
    }

    /// Keys for memory that the caller keeps mapped while it uses them. `None` when it is not part of a mapping
    /// that fs3 knows, or cannot be registered: then it has to be copied.
    pub fn find(&self, start: *const u8, bytes: usize) -> Option<Registered> {
        if bytes == 0 {
            return None;
        }
        let at = start as usize;
        let mut state = self.state.lock();
        state.clock += 1;
        let clock = state.clock;
        if let Some((from, known)) = state.known.range_mut(..=at).next_back()
            && at + bytes <= from + known.bytes
        {
            known.used = clock;
            return Some(Registered::new(start, bytes, &known.region));
        }
        let (from, length, dmabuf) = mapping_of(at, bytes)?;
        if !state.make_room(length, self.bytes_max) {
            return None;
        }
        let registered = match dmabuf {
            Some(buffer) => self.device.register_dmabuf(buffer.fd.as_fd(), buffer.offset, from as *mut u8, length),
            // SAFETY: the mapping lives while somebody has a window of it, as the caller has; `unmapping` ends the
            // registration before it goes.
            None => unsafe { self.device.register(from as *mut u8, length) },
        };
        let region = match registered {
            Ok(region) => Arc::new(region),
            Err(error) => {
                if !self.warned.swap(true, Ordering::Relaxed) {
                    tracing::warn!("RDMA copies what it cannot register: {error}");
                }
                return None;
            }
        };
        state.bytes += length;
        state.counters.registered(length);
        let found = Registered::new(start, bytes, &region);
        state.known.insert(from, Known { bytes: length, region, used: clock });
        Some(found)
    }
}

impl State {
    /// Drop registrations that are not in use, the longest unused first, until `bytes` more fit.
    fn make_room(&mut self, bytes: usize, bytes_max: usize) -> bool {
        while self.bytes + bytes > bytes_max {
            let idle = self.known.iter().filter(|(_, known)| Arc::strong_count(&known.region) == 1);
            let Some((&from, _)) = idle.min_by_key(|(_, known)| known.used) else { return false };
            self.forget(from);
        }
        true
    }

    fn forget(&mut self, from: usize) {
        if let Some(known) = self.known.remove(&from) {
            self.bytes -= known.bytes;
            self.counters.deregistered(known.bytes);
        }
    }
}

impl MappingWatcher for Registrations {
    fn unmapping(&self, start: usize, _bytes: usize) {
        self.state.lock().forget(start);
    }
}
