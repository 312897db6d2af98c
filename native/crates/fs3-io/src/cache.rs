use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fs3_chunk::Block;
use fs3_core::{BufferPool, Region, RegionMut};
use parking_lot::Mutex;

/// Bytes of a page.
pub(crate) const PAGE_BYTES: usize = 64 << 10;
/// Crc blocks of a page.
pub(crate) const PAGE_BLOCKS: u32 = (PAGE_BYTES / fs3_core::CRC_BLOCK_BYTES) as u32;

/// Verified bytes of disk blocks in memory, shared by all targets of a process. Thread-safe.
///
/// Keyed by (generation of the block's life, page): a recycled block never serves bytes of its former life.
/// Pages are 64 KiB of recycled memory and may be valid in part, per 4 KiB. Eviction is CLOCK.
pub struct ReadCache {
    state: Mutex<State>,
    pool: BufferPool,
    pages_max: usize,
}

#[derive(Default)]
struct State {
    index: HashMap<(u64, u32), usize>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    hand: usize,
}

struct Slot {
    key: (u64, u32),
    page: Option<Region>,
    // Bit b: crc block b of the page holds the disk's bytes.
    valid: u16,
    used: AtomicBool,
}

impl ReadCache {
    /// A cache of at most `bytes_max` bytes. Memory is taken when it is first needed.
    pub fn new(bytes_max: usize) -> Arc<Self> {
        let pages_max = (bytes_max / PAGE_BYTES).max(1);
        // Pages that were evicted while they are being sent need memory too; beyond this it is not recycled.
        let pool = BufferPool::new(pages_max * PAGE_BYTES + (pages_max * PAGE_BYTES / 8).max(4 << 20));
        Arc::new(Self { state: Mutex::default(), pool, pages_max })
    }

    /// An empty page to read into.
    pub(crate) fn page(&self) -> RegionMut {
        self.pool.take(PAGE_BYTES)
    }

    /// For each of `pages` (page, wanted blocks): the page if all wanted blocks are valid.
    pub(crate) fn get(&self, generation: u64, pages: &[(u32, u16)]) -> Vec<Option<Region>> {
        let state = self.state.lock();
        pages
            .iter()
            .map(|&(page, wanted)| {
                let slot = &state.slots[*state.index.get(&(generation, page))?];
                if slot.valid & wanted != wanted {
                    return None;
                }
                slot.used.store(true, Ordering::Relaxed);
                slot.page.clone()
            })
            .collect()
    }

    /// Keep pages whose blocks in the mask were read from disk and verified, unless the block was changed
    /// in place since `changes` was taken (before the read).
    pub(crate) fn insert(&self, block: &Block, changes: u64, pages: Vec<(u32, u16, Region)>) {
        let mut state = self.state.lock();
        if block.changes() != changes {
            return;
        }
        for (page, valid, buf) in pages {
            if valid != 0 {
                state.insert(self.pages_max, (block.generation, page), valid, buf);
            }
        }
    }

    /// Forget pages of a block that were changed in place.
    pub(crate) fn invalidate(&self, generation: u64, pages: impl Iterator<Item = u32>) {
        let mut state = self.state.lock();
        for page in pages {
            state.remove((generation, page));
        }
    }

    /// Forget everything.
    pub fn clear(&self) {
        *self.state.lock() = State::default();
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.state.lock().index.len() * PAGE_BYTES
    }
}

impl State {
    fn insert(&mut self, pages_max: usize, key: (u64, u32), valid: u16, buf: Region) {
        if let Some(&at) = self.index.get(&key) {
            let slot = &mut self.slots[at];
            let missing = valid & !slot.valid;
            if missing == 0 {
                return;
            }
            if slot.valid & !valid == 0 {
                slot.page = Some(buf);
                slot.valid = valid;
            } else if let Some(page) = &slot.page {
                for block in (0..16).filter(|b| missing & (1 << b) != 0) {
                    copy_block(&buf, page, block);
                }
                slot.valid |= valid;
            }
            return;
        }
        let at = self.vacancy(pages_max);
        self.slots[at] = Slot { key, page: Some(buf), valid, used: AtomicBool::new(false) };
        self.index.insert(key, at);
    }

    fn vacancy(&mut self, pages_max: usize) -> usize {
        if let Some(at) = self.free.pop() {
            return at;
        }
        if self.slots.len() < pages_max {
            self.slots.push(Slot { key: (0, 0), page: None, valid: 0, used: AtomicBool::new(false) });
            return self.slots.len() - 1;
        }
        loop {
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &self.slots[self.hand];
            if !slot.used.swap(false, Ordering::Relaxed) {
                self.index.remove(&slot.key);
                return self.hand;
            }
        }
    }

    fn remove(&mut self, key: (u64, u32)) {
        if let Some(at) = self.index.remove(&key) {
            self.slots[at].page = None;
            self.slots[at].valid = 0;
            self.free.push(at);
        }
    }
}

fn copy_block(from: &Region, to: &Region, block: usize) {
    let at = block * fs3_core::CRC_BLOCK_BYTES;
    let bytes = &from[at..at + fs3_core::CRC_BLOCK_BYTES];
    // SAFETY: the block is not valid in `to` yet, so no region covers it, and the cache's lock is held, so
    // nobody else fills it. The buffers are distinct.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr().add(at).cast_mut(), bytes.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs3_chunk::{Blocks, Location};

    fn block() -> Arc<Block> {
        Arc::new(Blocks::default()).handle(Location { class: 20, index: 0 })
    }

    fn page(cache: &ReadCache, fill: u8) -> Region {
        let mut page = cache.page();
        page.fill(fill);
        page.freeze()
    }

    #[test]
    fn a_page_is_served_only_for_its_valid_blocks_and_parts_are_merged() {
        let cache = ReadCache::new(1 << 20);
        let block = block();
        cache.insert(&block, 0, vec![(3, 0b0011, page(&cache, 1))]);
        assert!(cache.get(block.generation, &[(3, 0b0100)])[0].is_none());
        assert!(cache.get(block.generation + 1, &[(3, 0b0001)])[0].is_none());
        cache.insert(&block, 0, vec![(3, 0b0110, page(&cache, 2))]);
        let merged = cache.get(block.generation, &[(3, 0b0111)])[0].clone().unwrap();
        assert_eq!((merged[0], merged[4096], merged[8192]), (1, 1, 2));
    }

    #[test]
    fn bytes_read_before_an_in_place_change_are_not_kept() {
        let cache = ReadCache::new(1 << 20);
        let block = block();
        let before = block.changes();
        block.note_change();
        cache.insert(&block, before, vec![(0, 1, page(&cache, 1))]);
        assert_eq!(cache.bytes(), 0);
        cache.insert(&block, block.changes(), vec![(0, 1, page(&cache, 1))]);
        cache.invalidate(block.generation, 0..1);
        assert!(cache.get(block.generation, &[(0, 1)])[0].is_none());
    }

    #[test]
    fn the_byte_limit_holds_and_used_pages_outlive_unused_ones() {
        let cache = ReadCache::new(4 * PAGE_BYTES);
        let block = block();
        for i in 0..4 {
            cache.insert(&block, 0, vec![(i, 1, page(&cache, 1))]);
        }
        assert!(cache.get(block.generation, &[(2, 1)])[0].is_some());
        for i in 4..7 {
            cache.insert(&block, 0, vec![(i, 1, page(&cache, 1))]);
        }
        assert_eq!(cache.bytes(), 4 * PAGE_BYTES);
        assert!(cache.get(block.generation, &[(2, 1)])[0].is_some());
    }
}
