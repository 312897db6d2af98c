//! Blocks of a file that were read ahead and not consumed yet.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use fs3_client::Region;
use parking_lot::Mutex;

use crate::buffers::Buffer;
use crate::event::Event;
use crate::io::FileIo;
use crate::readahead::BLOCK;

/// Blocks of one inode kept at most; one more drops the oldest.
const BLOCKS_MAX: usize = 32;
/// A block that nobody consumed is dropped after this long: it holds memory, and its bytes grow old.
pub(crate) const BLOCK_AGE_MAX: Duration = Duration::from_secs(3);

/// The blocks of one inode, by number.
#[derive(Default)]
pub(crate) struct Blocks {
    blocks: Mutex<BTreeMap<u64, Arc<Block>>>,
}

/// One block, perhaps still on its way.
pub(crate) struct Block {
    number: u64,
    born: Instant,
    arrived: Event,
    /// The bytes, fewer than a block at the end of the file; `None` when reading failed.
    bytes: OnceLock<Option<Region>>,
    consumed: AtomicU64,
}

impl Block {
    /// Bytes `offset..offset+len` of the file once they are there; `None` when this block does not have them all.
    pub async fn read(&self, offset: u64, len: usize) -> Option<Region> {
        self.arrived.wait().await;
        let bytes = self.bytes.get()?.as_ref()?;
        let start = (offset - self.number * BLOCK) as usize;
        (start + len <= bytes.len()).then(|| bytes.slice(start, len))
    }
}

impl Blocks {
    /// Block `number` if it is there or on its way.
    pub fn get(&self, number: u64) -> Option<Arc<Block>> {
        self.blocks.lock().get(&number).cloned()
    }

    /// Start reading block `number` of `file` into `buffer`, unless it is there.
    pub fn fetch<F: FileIo>(
        &self,
        runtime: &tokio::runtime::Handle,
        file: &Arc<F>,
        number: u64,
        buffer: Buffer,
    ) -> Arc<Block> {
        let block = {
            let mut blocks = self.blocks.lock();
            if let Some(block) = blocks.get(&number) {
                return block.clone();
            }
            if blocks.len() >= BLOCKS_MAX
                && let Some(oldest) = blocks.values().min_by_key(|b| b.born).map(|b| b.number)
            {
                blocks.remove(&oldest);
            }
            let block = Arc::new(Block {
                number,
                born: Instant::now(),
                arrived: Event::new(),
                bytes: OnceLock::new(),
                consumed: AtomicU64::new(0),
            });
            blocks.insert(number, block.clone());
            block
        };
        let (file, filled) = (file.clone(), block.clone());
        runtime.spawn(async move {
            let (result, region) = file.read(number * BLOCK, buffer.into_region_mut(BLOCK as usize)).await;
            let bytes = result.ok().map(|n| region.freeze().slice(0, n));
            let _ = filled.bytes.set(bytes);
            filled.arrived.set();
        });
        block
    }

    /// `len` bytes of `block` were handed on; a block that was read through is dropped.
    pub fn consumed(&self, block: &Arc<Block>, len: usize) {
        let have = block.bytes.get().and_then(Option::as_ref).map_or(0, |b| b.len() as u64);
        if block.consumed.fetch_add(len as u64, Ordering::Relaxed) + len as u64 >= have {
            self.drop_block(block);
        }
    }

    /// Forget one block.
    pub fn drop_block(&self, block: &Arc<Block>) {
        let mut blocks = self.blocks.lock();
        if blocks.get(&block.number).is_some_and(|b| Arc::ptr_eq(b, block)) {
            blocks.remove(&block.number);
        }
    }

    /// Forget blocks that hold bytes of `start..end`, which were written.
    pub fn drop_range(&self, start: u64, end: u64) {
        let mut blocks = self.blocks.lock();
        if !blocks.is_empty() {
            blocks.retain(|number, _| number * BLOCK >= end || (number + 1) * BLOCK <= start);
        }
    }

    /// Forget all blocks.
    pub fn clear(&self) {
        self.blocks.lock().clear();
    }

    /// Forget blocks that have been waiting too long.
    pub fn drop_aged(&self) {
        self.blocks.lock().retain(|_, block| block.born.elapsed() < BLOCK_AGE_MAX);
    }
}
