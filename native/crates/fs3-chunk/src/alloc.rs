use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::{CHUNK_BYTES_MAX, CHUNK_BYTES_MIN};

const CLASS_MIN: u8 = CHUNK_BYTES_MIN.trailing_zeros() as u8;
const CLASSES: usize = (CHUNK_BYTES_MAX.trailing_zeros() as u8 - CLASS_MIN + 1) as usize;

/// Where a block lies: block `index` of the data file of size class `class` (log2 of the block's bytes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    /// log2 of the block size.
    pub class: u8,
    /// Position in the file, in blocks.
    pub index: u32,
}

impl Location {
    /// Byte offset in the data file.
    pub fn offset(self) -> u64 {
        u64::from(self.index) << self.class
    }

    /// Whether the class exists.
    pub fn is_valid(self) -> bool {
        (CLASS_MIN..CLASS_MIN + CLASSES as u8).contains(&self.class)
    }
}

/// The smallest size class whose blocks hold `length` bytes. `length` is at most [`CHUNK_BYTES_MAX`].
pub fn class_of(length: u32) -> u8 {
    length.max(CHUNK_BYTES_MIN).next_power_of_two().trailing_zeros() as u8
}

/// Bytes of a block of `class`.
pub fn block_bytes(class: u8) -> u32 {
    1 << class
}

/// What all blocks of a target share: where dropped ones are reported, and how much is in use.
#[derive(Default)]
pub struct Blocks {
    returned: Mutex<Vec<Location>>,
    used_bytes: AtomicU64,
}

static GENERATION: AtomicU64 = AtomicU64::new(1);

impl Blocks {
    /// A handle of the block at `location`. There must be at most one handle per location at a time.
    pub fn handle(self: &Arc<Self>, location: Location) -> Arc<Block> {
        self.used_bytes.fetch_add(1 << location.class, Ordering::Relaxed);
        Arc::new(Block {
            location,
            generation: GENERATION.fetch_add(1, Ordering::Relaxed),
            high_water: AtomicU32::new(0),
            changes: AtomicU64::new(0),
            rotten: AtomicBool::new(false),
            parked: false,
            blocks: self.clone(),
        })
    }

    /// The handle of a block that was parked or [noted](Blocks::note_parked).
    pub(crate) fn resume(self: &Arc<Self>, parked: Parked) -> Arc<Block> {
        let fresh = || GENERATION.fetch_add(1, Ordering::Relaxed);
        Arc::new(Block {
            location: parked.location,
            generation: if parked.generation == 0 { fresh() } else { parked.generation },
            high_water: AtomicU32::new(0),
            changes: AtomicU64::new(0),
            rotten: AtomicBool::new(parked.rotten),
            parked: false,
            blocks: self.clone(),
        })
    }

    /// The block at `location` is in use without a handle.
    pub(crate) fn note_parked(&self, location: Location) {
        self.used_bytes.fetch_add(1 << location.class, Ordering::Relaxed);
    }

    /// Blocks nobody refers to any more, since the last call.
    pub fn take_returned(&self) -> Vec<Location> {
        std::mem::take(&mut self.returned.lock().expect("no panic under this lock"))
    }

    /// Bytes of the blocks that have a handle or are parked.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }
}

/// What is remembered of a block in use that has no handle. Its high-water mark is in the image of the chunk.
pub(crate) struct Parked {
    pub location: Location,
    /// 0: it never had a handle in this process.
    pub generation: u64,
    pub rotten: bool,
}

/// A disk block in use. Versions and readers share it; when the last of them drops it, it is returned.
pub struct Block {
    /// Where it lies.
    pub location: Location,
    /// Unique within the process for one life of the block: caches keyed by it never serve a former life.
    pub generation: u64,
    high_water: AtomicU32,
    changes: AtomicU64,
    rotten: AtomicBool,
    parked: bool,
    blocks: Arc<Blocks>,
}

impl Block {
    /// The largest length any version in this block ever had. Bytes beyond it were never referred to, so
    /// they may be written in place.
    pub fn high_water(&self) -> u32 {
        self.high_water.load(Ordering::Acquire)
    }

    /// Records that a version of `length` bytes refers to the block.
    pub fn raise_high_water(&self, length: u32) {
        self.high_water.fetch_max(length, Ordering::AcqRel);
    }

    /// Counts in-place changes: raised before and after each. Bytes read from disk may be cached only if the
    /// count did not move since before the read.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// To be called before and after an in-place change.
    pub fn note_change(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether bytes in it were found not to match their checksums. Forgotten when the process ends.
    pub fn is_rotten(&self) -> bool {
        self.rotten.load(Ordering::Acquire)
    }

    /// Give up the handle while the block stays in use.
    pub(crate) fn park(mut self) -> Parked {
        self.parked = true;
        Parked { location: self.location, generation: self.generation, rotten: self.is_rotten() }
    }

    /// Remember that; returns whether it was known.
    pub fn note_rot(&self) -> bool {
        self.rotten.swap(true, Ordering::AcqRel)
    }

    /// The bytes were put right and verified.
    pub fn forget_rot(&self) {
        self.rotten.store(false, Ordering::Release);
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.parked {
            return;
        }
        self.blocks.used_bytes.fetch_sub(1 << self.location.class, Ordering::Relaxed);
        if let Ok(mut returned) = self.blocks.returned.lock() {
            returned.push(self.location);
        }
    }
}

#[derive(Default)]
struct ClassState {
    blocks: u32,
    // Free with their disk space reserved; the one freed last is at the end.
    ready: Vec<u32>,
    // Free since the target was opened: whether they have disk space is not known.
    unknown: Vec<u32>,
    // Free without disk space.
    hollow: Vec<u32>,
    // By block: neither free nor in quarantine. A block freed twice would get two owners.
    taken: Vec<bool>,
    // (log position from which the block is safe to reuse once durable, block)
    quarantine: std::collections::VecDeque<(u64, u32)>,
}

/// Neighbouring blocks of one size class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// log2 of the block size.
    pub class: u8,
    /// Positions in the file, in blocks.
    pub blocks: std::ops::Range<u32>,
}

impl Run {
    /// Byte offset in the data file.
    pub fn offset(&self) -> u64 {
        u64::from(self.blocks.start) << self.class
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        (self.blocks.len() as u64) << self.class
    }
}

/// Which blocks are free. Rebuilt from the table at open, so it needs no records of its own.
///
/// A returned block is quarantined until the log is durable up to the position at which it was returned:
/// until then a power loss may bring back the version that used it.
///
/// A free block need not have disk space: what is free in one size class can be given to another one by taking the disk
/// space of the free blocks away ([`Allocator::take_surplus`]) and reserving it again when they are used
/// ([`Allocator::next_run`]).
#[derive(Default)]
pub struct Allocator {
    classes: [ClassState; CLASSES],
    quarantined_bytes: u64,
}

impl Allocator {
    fn class(&mut self, class: u8) -> &mut ClassState {
        &mut self.classes[usize::from(class - CLASS_MIN)]
    }

    /// All size classes.
    pub fn classes() -> impl Iterator<Item = u8> {
        CLASS_MIN..CLASS_MIN + CLASSES as u8
    }

    /// A free block of `class` that has disk space, the one freed last first (its extent is written and warm).
    pub fn take(&mut self, class: u8) -> Option<Location> {
        let state = self.class(class);
        let index = state.ready.pop()?;
        state.taken[index as usize] = true;
        Some(Location { class, index })
    }

    /// Blocks that the file of `class` has.
    pub fn blocks(&mut self, class: u8) -> u32 {
        self.class(class).blocks
    }

    /// For how many blocks of `class` to reserve disk space at once: at least 4 MiB or one block, an eighth of the
    /// file, at most 64 MiB or one block.
    pub fn growth(&mut self, class: u8) -> u32 {
        let floor = ((4u32 << 20) >> class).max(1);
        let ceiling = ((64u32 << 20) >> class).max(1);
        (self.class(class).blocks / 8).clamp(floor, ceiling)
    }

    /// Blocks of `class` to reserve disk space for, at most `blocks_max` (at least 1): free ones, else new ones at the
    /// end of the file. To be handed to [`Allocator::reserved`] or [`Allocator::hollow`].
    pub fn next_run(&mut self, class: u8, blocks_max: u32) -> Run {
        let state = self.class(class);
        let from = if state.unknown.is_empty() { &mut state.hollow } else { &mut state.unknown };
        let Some(last) = from.pop() else {
            return Run { class, blocks: state.blocks..state.blocks.saturating_add(blocks_max) };
        };
        let mut first = last;
        while last - first + 1 < blocks_max && first > 0 && from.pop_if(|index| *index == first - 1).is_some() {
            first -= 1;
        }
        Run { class, blocks: first..last + 1 }
    }

    /// The run has disk space now and is free.
    pub fn reserved(&mut self, run: Run) {
        let state = self.class(run.class);
        state.blocks = state.blocks.max(run.blocks.end);
        state.taken.resize(state.blocks as usize, false);
        state.ready.extend(run.blocks.rev());
    }

    /// The run has no disk space (any more) and is free.
    pub fn hollow(&mut self, run: Run) {
        let state = self.class(run.class);
        // What lies beyond the file was never part of it.
        let blocks = run.blocks.start..run.blocks.end.min(state.blocks);
        state.hollow.extend(blocks);
    }

    /// Take free blocks that may have `bytes` bytes of disk space or more, as far as there are any: those of unknown
    /// state first, then the ones free for longest. To be handed to [`Allocator::hollow`] or [`Allocator::reserved`].
    pub fn take_surplus(&mut self, bytes: u64) -> Vec<Run> {
        let (mut runs, mut taken) = (vec![], 0);
        for unknown in [true, false] {
            for class in Self::classes() {
                let state = self.class(class);
                let from = if unknown { &mut state.unknown } else { &mut state.ready };
                let wanted = bytes.saturating_sub(taken).div_ceil(1 << class).min(from.len() as u64);
                let mut blocks: Vec<u32> = from.drain(..wanted as usize).collect();
                taken += wanted << class;
                blocks.sort_unstable();
                let neighbours = blocks.chunk_by(|a, b| a + 1 == *b);
                runs.extend(neighbours.map(|n| Run { class, blocks: n[0]..n[n.len() - 1] + 1 }));
            }
        }
        runs
    }

    /// Bytes of free blocks that have disk space or may have it.
    pub fn free_bytes(&self) -> u64 {
        let free = |s: &ClassState| (s.ready.len() + s.unknown.len()) as u64;
        self.classes.iter().enumerate().map(|(i, s)| free(s) << (i + usize::from(CLASS_MIN))).sum()
    }

    /// At open: the file of `class` has `blocks` blocks, of which `used` (ascending) are referred to.
    pub fn rebuild(&mut self, class: u8, blocks: u32, used: &[u32]) {
        let mut taken = vec![false; blocks as usize];
        used.iter().for_each(|&index| taken[index as usize] = true);
        let unknown = (0..blocks).filter(|&index| !taken[index as usize]).collect();
        let state = self.class(class);
        let waiting = state.quarantine.len() as u64;
        *state = ClassState { blocks, unknown, taken, ..ClassState::default() };
        self.quarantined_bytes -= waiting << class;
    }

    /// Whether every block is either one of `used` (each once, ascending) or free or quarantined once. Else what is wrong.
    pub fn audit(&self, used: &[Location]) -> Result<(), String> {
        if let Some(twice) = used.windows(2).find(|w| w[0] == w[1]) {
            return Err(format!("{:?} has two owners", twice[0]));
        }
        for (i, state) in self.classes.iter().enumerate() {
            let class = i as u8 + CLASS_MIN;
            let free = state.ready.iter().chain(&state.unknown).chain(&state.hollow);
            let waiting = state.quarantine.iter().map(|(_, index)| index);
            let owned = used.iter().filter(|l| l.class == class).map(|l| &l.index);
            let mut all: Vec<u32> = free.chain(waiting).chain(owned).copied().collect();
            all.sort_unstable();
            if !all.iter().copied().eq(0..state.blocks) {
                return Err(format!("class {class} has {} blocks, listed are {all:?}", state.blocks));
            }
        }
        Ok(())
    }

    /// Nobody refers to the block since log position `position`. `false`, and nothing is changed: it was not taken,
    /// which is a bug of the caller.
    #[must_use]
    pub fn quarantine(&mut self, location: Location, position: u64) -> bool {
        let state = self.class(location.class);
        if !std::mem::take(&mut state.taken[location.index as usize]) {
            return false;
        }
        state.quarantine.push_back((position, location.index));
        self.quarantined_bytes += 1 << location.class;
        true
    }

    /// The log is durable up to `position`: frees what was quarantined until then.
    pub fn release(&mut self, position: u64) {
        for (i, state) in self.classes.iter_mut().enumerate() {
            while let Some(&(_, index)) = state.quarantine.front().filter(|(at, _)| *at <= position) {
                state.quarantine.pop_front();
                state.ready.push(index);
                self.quarantined_bytes -= 1 << (i + usize::from(CLASS_MIN));
            }
        }
    }

    /// Bytes waiting for the log to become durable.
    pub fn quarantined_bytes(&self) -> u64 {
        self.quarantined_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_takes_the_smallest_class_that_holds_it() {
        assert_eq!(class_of(0), 16);
        assert_eq!(class_of(4096), 16);
        assert_eq!(class_of((64 << 10) + 1), 17);
        assert_eq!(class_of(CHUNK_BYTES_MAX), 26);
    }

    fn grow(alloc: &mut Allocator, class: u8, blocks: u32) {
        let run = alloc.next_run(class, blocks);
        alloc.reserved(run);
    }

    #[test]
    fn a_returned_block_is_free_only_after_the_log_is_durable() {
        let mut alloc = Allocator::default();
        grow(&mut alloc, 20, 1);
        let location = alloc.take(20).unwrap();
        assert!(alloc.take(20).is_none());
        assert!(alloc.quarantine(location, 100));
        alloc.release(99);
        assert!(alloc.take(20).is_none());
        assert_eq!(alloc.quarantined_bytes(), 1 << 20);
        alloc.release(100);
        assert_eq!(alloc.take(20), Some(location));
        assert_eq!(alloc.quarantined_bytes(), 0);
    }

    #[test]
    fn a_block_that_is_not_taken_cannot_be_freed_again() {
        let mut alloc = Allocator::default();
        alloc.rebuild(16, 2, &[1]);
        let location = Location { class: 16, index: 1 };
        assert!(alloc.quarantine(location, 1));
        assert!(!alloc.quarantine(location, 2));
        assert!(!alloc.quarantine(Location { class: 16, index: 0 }, 2));
        alloc.release(2);
        alloc.audit(&[]).unwrap();
    }

    #[test]
    fn rebuild_frees_exactly_the_unused_blocks_which_need_disk_space_before_they_are_taken() {
        let mut alloc = Allocator::default();
        alloc.rebuild(16, 5, &[0, 3]);
        let used = [0, 3].map(|index| Location { class: 16, index });
        alloc.audit(&used).unwrap();
        assert!(alloc.audit(&used[..1]).is_err() && alloc.audit(&[used[0], used[0], used[1]]).is_err());
        assert_eq!(alloc.take(16), None);
        let runs: Vec<_> = (0..3).map(|_| alloc.next_run(16, 9).blocks).collect();
        assert_eq!(runs, vec![4..5, 1..3, 5..14]);
        alloc.reserved(Run { class: 16, blocks: 1..3 });
        assert_eq!(alloc.take(16).map(|l| l.index), Some(1));
    }

    #[test]
    fn disk_space_of_free_blocks_can_be_taken_away_and_comes_back_with_their_use() {
        let mut alloc = Allocator::default();
        alloc.rebuild(16, 4, &[0, 1, 2]);
        grow(&mut alloc, 16, 1);
        grow(&mut alloc, 20, 4);
        let kept = alloc.take(20).unwrap();
        assert_eq!(alloc.free_bytes(), (64 << 10) + (3 << 20));
        alloc.rebuild(17, 2, &[0]);
        let surplus = alloc.take_surplus(1 << 20);
        let of = |class, blocks| Run { class, blocks };
        assert_eq!(surplus, vec![of(17, 1..2), of(16, 3..4), of(20, 3..4)]);
        surplus.into_iter().for_each(|run| alloc.hollow(run));
        assert_eq!(alloc.free_bytes(), 2 << 20);
        let used =
            [(16, 0), (16, 1), (16, 2), (17, 0), (20, kept.index)].map(|(class, index)| Location { class, index });
        alloc.audit(&used).unwrap();
        assert_eq!(alloc.next_run(17, 8), of(17, 1..2));
        // Space that could not be reserved: new blocks are forgotten, old ones stay free.
        alloc.hollow(of(17, 1..2));
        alloc.hollow(of(17, 2..10));
        alloc.audit(&used).unwrap();
    }

    #[test]
    fn a_handle_reports_its_block_when_the_last_user_drops_it() {
        let blocks = Arc::new(Blocks::default());
        let location = Location { class: 16, index: 7 };
        let block = blocks.handle(location);
        let reader = block.clone();
        drop(block);
        assert_eq!(blocks.used_bytes(), 64 << 10);
        assert!(blocks.take_returned().is_empty());
        drop(reader);
        assert_eq!(blocks.take_returned(), vec![location]);
        assert_eq!(blocks.used_bytes(), 0);
    }
}
