//! Recycled memory for reads that cannot go straight into the caller's buffer: memory touched the first time is
//! dear.

use std::sync::Arc;

use fs3_core::{AlignedBuf, RegionMut};
use parking_lot::Mutex;

/// Bytes of free buffers kept at most; more are given back to the allocator.
const FREE_BYTES_MAX: usize = 32 << 20;
/// Sizes are powers of two from 4 KiB (class 0) to 64 MiB.
const CLASSES: usize = 15;

/// Free buffers by size class.
#[derive(Clone, Default)]
pub(crate) struct ScratchPool {
    free: Arc<Mutex<Free>>,
}

#[derive(Default)]
struct Free {
    bytes: usize,
    classes: [Vec<AlignedBuf>; CLASSES],
}

struct Pooled {
    buf: Option<AlignedBuf>,
    class: usize,
    free: Arc<Mutex<Free>>,
}

impl ScratchPool {
    /// Memory of `len` bytes with undefined (but initialised) content; it returns to the pool when dropped.
    pub fn take(&self, len: usize) -> RegionMut {
        let size = len.max(AlignedBuf::ALIGN).next_power_of_two();
        let class = (size / AlignedBuf::ALIGN).trailing_zeros() as usize;
        assert!(class < CLASSES, "no read is larger than a chunk");
        let recycled = {
            let mut free = self.free.lock();
            let buf = free.classes[class].pop();
            free.bytes -= if buf.is_some() { size } else { 0 };
            buf
        };
        let buf = recycled.unwrap_or_else(|| AlignedBuf::new(size));
        let ptr = buf.as_mut_ptr();
        let owner = Arc::new(Pooled { buf: Some(buf), class, free: self.free.clone() });
        // SAFETY: the owner holds the buffer, and gives it to nobody else, while it lives.
        unsafe { RegionMut::from_raw(ptr, len, owner) }
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        let Some(buf) = self.buf.take() else { return };
        let mut free = self.free.lock();
        if free.bytes + buf.len() <= FREE_BYTES_MAX {
            free.bytes += buf.len();
            free.classes[self.class].push(buf);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_recycled_by_size() {
        let pool = ScratchPool::default();
        let mut first = pool.take(5000);
        let at = first.as_mut_ptr();
        assert_eq!(first.len(), 5000);
        drop(first);
        assert_ne!(pool.take(4096).as_mut_ptr(), at);
        assert_eq!(pool.take(8192).as_mut_ptr(), at);
    }

    #[test]
    fn the_pool_keeps_a_bounded_amount() {
        let pool = ScratchPool::default();
        let taken: Vec<_> = (0..5).map(|_| pool.take(16 << 20)).collect();
        drop(taken);
        assert_eq!(pool.free.lock().bytes, FREE_BYTES_MAX);
    }
}
