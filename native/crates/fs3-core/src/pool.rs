use crate::{AlignedBuf, RegionMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const CLASS_BITS_MIN: u32 = 12;
const CLASS_BITS_MAX: u32 = 26;
const CLASSES: usize = (CLASS_BITS_MAX - CLASS_BITS_MIN + 1) as usize;

/// Recycled page-aligned memory in power-of-two size classes from 4 KiB to 64 MiB.
///
/// Touching fresh memory costs several times more than moving the bytes, so buffers are handed out last in,
/// first out and kept. The bytes held, in use or idle, never exceed the limit; idle buffers of other classes
/// are given back to the system when a class needs the room. Contents of a buffer are whatever was there
/// before. Cheap to clone; clones share the pool. Thread-safe.
#[derive(Clone)]
pub struct BufferPool(Arc<Shared>);

struct Shared {
    bytes_max: usize,
    state: Mutex<State>,
}

struct State {
    /// In use and idle together.
    bytes_held: usize,
    bytes_idle: usize,
    idle: [Vec<AlignedBuf>; CLASSES],
}

/// Owner of a buffer that returns it when the last region over it is dropped.
struct Pooled {
    buf: Option<AlignedBuf>,
    class: usize,
    pool: Arc<Shared>,
}

impl BufferPool {
    /// Largest buffer in bytes.
    pub const BUFFER_BYTES_MAX: usize = 1 << CLASS_BITS_MAX;

    /// A pool that holds at most `bytes_max` bytes. Nothing is allocated yet.
    pub fn new(bytes_max: usize) -> Self {
        let state = State { bytes_held: 0, bytes_idle: 0, idle: std::array::from_fn(|_| Vec::new()) };
        Self(Arc::new(Shared { bytes_max, state: Mutex::new(state) }))
    }

    /// A window of exactly `len` bytes at the start of a recycled or new buffer, page-aligned.
    /// `None` when the limit is reached or `len` exceeds [`BufferPool::BUFFER_BYTES_MAX`].
    /// The whole buffer returns to the pool when the last region over it is dropped.
    pub fn get(&self, len: usize) -> Option<RegionMut> {
        let class = class_of(len)?;
        let bytes = class_bytes(class);
        let mut state = self.0.lock();
        let recycled = state.idle[class].pop();
        if recycled.is_some() {
            state.bytes_idle -= bytes;
        } else {
            let surplus = state.make_room(bytes, self.0.bytes_max)?;
            state.bytes_held += bytes;
            drop(state);
            drop(surplus);
        }
        let buf = recycled.unwrap_or_else(|| AlignedBuf::new(bytes));
        let ptr = buf.as_mut_ptr();
        let owner = Arc::new(Pooled { buf: Some(buf), class, pool: self.0.clone() });
        // SAFETY: the owner keeps the buffer alive and out of the pool; this is the only window over it.
        Some(unsafe { RegionMut::from_raw(ptr, len, owner) })
    }

    /// Bytes (in use, idle).
    pub fn usage(&self) -> (usize, usize) {
        let state = self.0.lock();
        (state.bytes_held - state.bytes_idle, state.bytes_idle)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Take idle buffers out of the pool until `bytes` more fit under `bytes_max`; `None` when they cannot.
    fn make_room(&mut self, bytes: usize, bytes_max: usize) -> Option<Vec<AlignedBuf>> {
        if self.bytes_held - self.bytes_idle + bytes > bytes_max {
            return None;
        }
        let mut surplus = Vec::new();
        for class in (0..CLASSES).rev() {
            while self.bytes_held + bytes > bytes_max {
                let Some(buf) = self.idle[class].pop() else { break };
                self.bytes_held -= class_bytes(class);
                self.bytes_idle -= class_bytes(class);
                surplus.push(buf);
            }
        }
        Some(surplus)
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        if let Some(buf) = self.buf.take() {
            let mut state = self.pool.lock();
            state.bytes_idle += class_bytes(self.class);
            state.idle[self.class].push(buf);
        }
    }
}

fn class_bytes(class: usize) -> usize {
    1 << (class as u32 + CLASS_BITS_MIN)
}

fn class_of(len: usize) -> Option<usize> {
    let bits = len.max(1).next_power_of_two().trailing_zeros().max(CLASS_BITS_MIN);
    (bits <= CLASS_BITS_MAX).then(|| (bits - CLASS_BITS_MIN) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_returns_when_its_last_region_is_dropped_and_is_handed_out_again() {
        let pool = BufferPool::new(1 << 20);
        let region = pool.get(5000).unwrap();
        let start = region.as_ptr();
        assert_eq!((region.len(), pool.usage()), (5000, (8192, 0)));
        let (left, right) = region.split_at(100);
        drop(left);
        let frozen = right.freeze();
        let part = frozen.slice(10, 20);
        drop(frozen);
        assert_eq!(pool.usage(), (8192, 0));
        drop(part);
        assert_eq!(pool.usage(), (0, 8192));
        assert_eq!(pool.get(8192).unwrap().as_ptr(), start);
    }

    #[test]
    fn the_limit_holds_and_idle_buffers_of_other_classes_make_room() {
        let pool = BufferPool::new(64 << 10);
        let small: Vec<_> = (0..16).map(|_| pool.get(4096).unwrap()).collect();
        assert!(pool.get(1).is_none());
        drop(small);
        assert_eq!(pool.usage(), (0, 64 << 10));
        let large = pool.get(40 << 10).unwrap();
        assert_eq!(pool.usage(), (64 << 10, 0));
        drop(large);
        assert!(pool.get(65 << 10).is_none());
    }

    #[test]
    fn buffers_over_the_largest_class_are_refused() {
        let pool = BufferPool::new(usize::MAX / 2);
        assert!(pool.get(BufferPool::BUFFER_BYTES_MAX + 1).is_none());
        assert_eq!(pool.get(0).unwrap().len(), 0);
    }
}
