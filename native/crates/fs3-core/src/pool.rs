use crate::{AlignedBuf, Arena, RegionMut};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const CLASS_BITS_MIN: u32 = 12;
const CLASS_BITS_MAX: u32 = 26;
/// Smaller buffers are cut from slabs of this size, which is that of a huge page.
const SLAB_BYTES: usize = 2 << 20;
const CLASSES: usize = (CLASS_BITS_MAX - CLASS_BITS_MIN + 1) as usize;

/// Recycled page-aligned memory in power-of-two size classes from 4 KiB to 64 MiB.
///
/// Touching fresh memory costs several times more than moving the bytes, so buffers are handed out last in,
/// first out and kept. Buffers below 2 MiB are cut from slabs of that size, because huge pages make the first touch
/// several times cheaper. The bytes held, in use or idle, never exceed the limit; idle slabs of other classes
/// are given back to the system when a class needs the room. Contents of a buffer are whatever was there
/// before. Cheap to clone; clones share the pool. Thread-safe.
#[derive(Clone)]
pub struct BufferPool(Arc<Shared>);

struct Shared {
    bytes_max: usize,
    /// Where slabs come from; `None`: from wherever the process has its memory.
    arena: Option<&'static Arena>,
    state: Mutex<State>,
}

struct State {
    /// In use and idle together, slabs counted whole.
    bytes_held: usize,
    bytes_idle: usize,
    idle: [Vec<Piece>; CLASSES],
}

/// One buffer: all or a part of a slab.
struct Piece {
    slab: Arc<AlignedBuf>,
    offset: usize,
}

/// Owner of a buffer that returns it when the last region over it is dropped.
struct Pooled {
    piece: Option<Piece>,
    class: usize,
    pool: Arc<Shared>,
}

impl BufferPool {
    /// Largest buffer in bytes.
    pub const BUFFER_BYTES_MAX: usize = 1 << CLASS_BITS_MAX;

    /// A pool that holds at most `bytes_max` bytes. Nothing is allocated yet.
    pub fn new(bytes_max: usize) -> Self {
        Self::with_source(bytes_max, None)
    }

    /// A pool of memory that other processes can be given to read, which belongs to the process that has the arena: a
    /// forked child must not use it.
    pub fn of_arena(bytes_max: usize, arena: &'static Arena) -> Self {
        Self::with_source(bytes_max, Some(arena))
    }

    fn with_source(bytes_max: usize, arena: Option<&'static Arena>) -> Self {
        let state = State { bytes_held: 0, bytes_idle: 0, idle: std::array::from_fn(|_| Vec::new()) };
        Self(Arc::new(Shared { bytes_max, arena, state: Mutex::new(state) }))
    }

    /// A window of exactly `len` bytes at the start of a recycled or new buffer, page-aligned.
    /// `None` when the limit is reached or `len` exceeds [`BufferPool::BUFFER_BYTES_MAX`].
    /// The whole buffer returns to the pool when the last region over it is dropped.
    pub fn get(&self, len: usize) -> Option<RegionMut> {
        let class = class_of(len)?;
        let recycled = self.0.lock().take_idle(class);
        let piece = match recycled {
            Some(piece) => piece,
            None => self.0.new_slab(class)?,
        };
        // SAFETY: the offset is within the slab.
        let ptr = unsafe { piece.slab.as_mut_ptr().add(piece.offset) };
        let owner = Arc::new(Pooled { piece: Some(piece), class, pool: self.0.clone() });
        // SAFETY: the owner keeps the slab alive and the piece out of the pool; this is the only window over it.
        Some(unsafe { RegionMut::from_raw(ptr, len, owner) })
    }

    /// As [`BufferPool::get`], but never refused: at the limit, or beyond the largest buffer, the memory is fresh and
    /// is given back to the system. For work that must go on under memory pressure and is bounded otherwise.
    pub fn take(&self, len: usize) -> RegionMut {
        self.get(len).unwrap_or_else(|| RegionMut::zeroed(len))
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

    /// Make a slab for `class`, as large as useful and possible, and take its first piece.
    fn new_slab(&self, class: usize) -> Option<Piece> {
        let piece_bytes = class_bytes(class);
        let mut slab_bytes = piece_bytes.max(SLAB_BYTES);
        let surplus = {
            let mut state = self.lock();
            if state.bytes_held - state.bytes_idle + piece_bytes > self.bytes_max {
                return None;
            }
            let surplus = state.make_room(slab_bytes, self.bytes_max);
            while state.bytes_held + slab_bytes > self.bytes_max && slab_bytes > piece_bytes {
                slab_bytes /= 2;
            }
            let fits = state.bytes_held + slab_bytes <= self.bytes_max;
            state.bytes_held += if fits { slab_bytes } else { 0 };
            fits.then_some(surplus)
        }?;
        drop(surplus);
        let slab = match self.arena {
            Some(arena) => AlignedBuf::of(arena, slab_bytes),
            None => Some(AlignedBuf::shareable(slab_bytes)),
        };
        let mut state = self.lock();
        let Some(slab) = slab.map(Arc::new) else {
            state.bytes_held -= slab_bytes;
            return None;
        };
        for offset in (piece_bytes..slab_bytes).step_by(piece_bytes).rev() {
            state.idle[class].push(Piece { slab: slab.clone(), offset });
            state.bytes_idle += piece_bytes;
        }
        Some(Piece { slab, offset: 0 })
    }
}

impl State {
    fn take_idle(&mut self, class: usize) -> Option<Piece> {
        let piece = self.idle[class].pop()?;
        self.bytes_idle -= class_bytes(class);
        Some(piece)
    }

    /// Take idle slabs out of the pool until `bytes` more fit under `bytes_max`. What was taken is to be dropped
    /// after the lock.
    fn make_room(&mut self, bytes: usize, bytes_max: usize) -> Vec<Piece> {
        let mut surplus = Vec::new();
        for class in (0..CLASSES).rev() {
            if self.bytes_held + bytes <= bytes_max {
                break;
            }
            let mut busy_bytes: HashMap<*const AlignedBuf, usize> = HashMap::new();
            for piece in &self.idle[class] {
                *busy_bytes.entry(Arc::as_ptr(&piece.slab)).or_insert(piece.slab.len()) -= class_bytes(class);
            }
            let mut chosen: HashSet<*const AlignedBuf> = HashSet::new();
            for piece in &self.idle[class] {
                let slab = Arc::as_ptr(&piece.slab);
                let needed = self.bytes_held + bytes > bytes_max;
                if needed && busy_bytes[&slab] == 0 && chosen.insert(slab) {
                    self.bytes_held -= piece.slab.len();
                    self.bytes_idle -= piece.slab.len();
                }
            }
            let taken = self.idle[class].extract_if(.., |piece| chosen.contains(&Arc::as_ptr(&piece.slab)));
            surplus.extend(taken);
        }
        surplus
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        if let Some(piece) = self.piece.take() {
            let mut state = self.pool.lock();
            state.bytes_idle += class_bytes(self.class);
            state.idle[self.class].push(piece);
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
        assert_eq!((region.len(), pool.usage().0), (5000, 8192));
        let (left, right) = region.split_at(100);
        drop(left);
        let frozen = right.freeze();
        let part = frozen.slice(10, 20);
        drop(frozen);
        assert_eq!(pool.usage().0, 8192);
        drop(part);
        assert_eq!(pool.usage(), (0, 1 << 20));
        assert_eq!(pool.get(8192).unwrap().as_ptr(), start);
    }

    #[test]
    fn a_buffer_taken_at_the_limit_is_not_kept() {
        let pool = BufferPool::new(1 << 20);
        let held = pool.get(1 << 20).unwrap();
        let fresh = pool.take(10_000);
        assert_eq!((fresh.len(), pool.usage()), (10_000, (1 << 20, 0)));
        assert!(fresh.as_ptr().addr().is_multiple_of(AlignedBuf::ALIGN));
        drop(fresh);
        drop(held);
        assert_eq!(pool.usage(), (0, 1 << 20));
    }

    #[test]
    fn buffers_of_one_slab_do_not_overlap() {
        let pool = BufferPool::new(5 << 20);
        let mut regions: Vec<_> = (0..5).map(|_| pool.get(1 << 20).unwrap()).collect();
        assert!(pool.get(1).is_none());
        for (i, region) in regions.iter_mut().enumerate() {
            region.fill(i as u8);
        }
        for (i, region) in regions.iter().enumerate() {
            assert!(region.iter().all(|&b| b == i as u8));
            assert!(region.as_ptr().addr().is_multiple_of(AlignedBuf::ALIGN));
        }
    }

    #[test]
    fn the_limit_holds_and_idle_slabs_of_other_classes_make_room() {
        let pool = BufferPool::new(4 << 20);
        let small: Vec<_> = (0..1024).map(|_| pool.get(4096).unwrap()).collect();
        assert!(pool.get(1).is_none());
        drop(small);
        assert_eq!(pool.usage(), (0, 4 << 20));
        let large = pool.get(3 << 20).unwrap();
        assert_eq!(pool.usage(), (4 << 20, 0));
        drop(large);
        assert!(pool.get((4 << 20) + 1).is_none());
        let small = pool.get(4096).unwrap();
        assert_eq!(pool.usage(), (4096, (2 << 20) - 4096));
        assert!(pool.get(3 << 20).is_none(), "a slab in use cannot be given back");
        drop(small);
        assert!(pool.get(3 << 20).is_some());
    }

    #[test]
    fn buffers_over_the_largest_class_are_refused() {
        let pool = BufferPool::new(usize::MAX / 2);
        assert!(pool.get(BufferPool::BUFFER_BYTES_MAX + 1).is_none());
        assert_eq!(pool.get(0).unwrap().len(), 0);
    }
}
