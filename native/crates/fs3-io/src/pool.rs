use std::collections::BTreeMap;
use std::sync::Arc;

use fs3_core::{AlignedBuf, Region};
use parking_lot::Mutex;

/// Recycles page-aligned buffers: memory touched for the first time is dear. Thread-safe.
///
/// Buffers have power-of-two sizes from 4 KiB up. At most `idle_bytes_max` bytes are kept while unused.
pub struct BufferPool {
    idle: Mutex<Idle>,
    idle_bytes_max: usize,
}

#[derive(Default)]
struct Idle {
    bufs: BTreeMap<usize, Vec<AlignedBuf>>,
    bytes: usize,
}

/// A buffer of a pool; goes back to it when dropped. Its contents are whatever was there before.
pub struct PooledBuf {
    buf: Option<AlignedBuf>,
    pool: Arc<BufferPool>,
}

impl BufferPool {
    /// A pool that keeps at most `idle_bytes_max` bytes of unused buffers.
    pub fn new(idle_bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { idle: Mutex::default(), idle_bytes_max })
    }

    /// A buffer of at least `bytes` bytes with arbitrary contents.
    pub fn take(self: &Arc<Self>, bytes: usize) -> PooledBuf {
        let size = bytes.max(AlignedBuf::ALIGN).next_power_of_two();
        let recycled = {
            let mut idle = self.idle.lock();
            let buf = idle.bufs.get_mut(&size).and_then(Vec::pop);
            idle.bytes -= buf.as_ref().map_or(0, |b| b.len());
            buf
        };
        PooledBuf { buf: Some(recycled.unwrap_or_else(|| AlignedBuf::new(size))), pool: self.clone() }
    }
}

impl PooledBuf {
    /// Share `len` bytes from `start` on, read-only; the buffer goes back when the last reader is done.
    pub fn freeze(self, start: usize, len: usize) -> Region {
        let shared = Arc::new(self);
        shared_region(&shared, start, len)
    }
}

/// A window of a shared buffer.
pub(crate) fn shared_region(buf: &Arc<PooledBuf>, start: usize, len: usize) -> Region {
    let bytes = &buf[start..start + len];
    // SAFETY: the owner keeps the memory; a shared PooledBuf is written to only where no region reads.
    unsafe { Region::from_raw(bytes.as_ptr(), bytes.len(), buf.clone()) }
}

impl std::ops::Deref for PooledBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.buf.as_ref().expect("present until drop")
    }
}

impl std::ops::DerefMut for PooledBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.buf.as_mut().expect("present until drop")
    }
}

impl Drop for PooledBuf {
    fn drop(&mut self) {
        let Some(buf) = self.buf.take() else { return };
        let mut idle = self.pool.idle.lock();
        if idle.bytes + buf.len() <= self.pool.idle_bytes_max {
            idle.bytes += buf.len();
            idle.bufs.entry(buf.len()).or_default().push(buf);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_recycled_and_the_idle_limit_holds() {
        let pool = BufferPool::new(8192);
        let a = pool.take(5000);
        let at = a.as_ptr();
        assert_eq!(a.len(), 8192);
        let region = a.freeze(10, 100);
        assert_eq!(pool.idle.lock().bytes, 0);
        let b = pool.take(8192);
        drop(region);
        drop(b);
        assert_eq!(pool.idle.lock().bytes, 8192);
        assert_eq!(pool.take(8192).as_ptr(), at);
    }
}
