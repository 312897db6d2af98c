//! Disk space: blocks for new data, and space of free blocks given back.

use std::io;
use std::sync::Arc;

use fs3_chunk::Block;
use fs3_core::{Code, Error, Result};

use crate::disk::{Access, Disk};
use crate::log::disk_error;
use crate::store::TargetStore;

/// Disk space for the log of a target whose disk is full: with it the target opens, and chunks can be removed.
const SPARE: &str = "meta.spare";
const SPARE_BYTES: u64 = 4 << 20;
/// Given back at least when somebody finds the disk full.
const GIVE_BACK_BYTES_MIN: u64 = 1 << 20;

/// Give up the spare space; returns whether there was any.
pub(crate) fn use_spare(disk: &dyn Disk) -> Result<bool> {
    match disk.remove(SPARE) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(disk_error("cannot use spare space", e)),
    }
}

impl TargetStore {
    /// Reserve the spare space again if it was used and the disk has room.
    pub(crate) fn keep_spare(&self) -> Result<()> {
        let cannot = |e| disk_error("cannot reserve spare space", e);
        let reserve = || {
            if self.disk.list().map_err(cannot)?.iter().any(|name| name == SPARE) {
                return Ok(());
            }
            let file = self.disk.open(SPARE, Access::Buffered).map_err(cannot)?;
            file.allocate(0, SPARE_BYTES).map_err(cannot)
        };
        match reserve() {
            Err(e) if e.code == Code::NoSpace => use_spare(&*self.disk).map(drop),
            done => self.fail_on_disk_error(done),
        }
    }

    /// A free block of `class` whose disk space is reserved.
    ///
    /// # Errors
    /// `NoSpace` when the target's capacity or the disk is used up.
    pub(crate) fn take_block(&self, class: u8) -> Result<Arc<Block>> {
        self.collect_returned();
        let (wanted, mut freed) = (1u64 << class, 0);
        loop {
            let full = match self.try_take_block(class) {
                Err(e) if e.code == Code::NoSpace => e,
                done => return done,
            };
            let before = self.files.space()?;
            let over_capacity = before + wanted > self.options.capacity_bytes;
            // What was given back and is not there any more went to somebody else.
            if (freed >= wanted && !over_capacity) || !self.make_room(wanted)? {
                return Err(full);
            }
            freed += before.saturating_sub(self.files.space()?);
        }
    }

    fn try_take_block(&self, class: u8) -> Result<Arc<Block>> {
        let mut alloc = self.alloc.lock();
        if let Some(location) = alloc.take(class) {
            return Ok(self.blocks.handle(location));
        }
        let room = self.options.capacity_bytes.saturating_sub(self.fail_on_disk_error(self.files.space())?) >> class;
        if room == 0 {
            return Err(Error::new(Code::NoSpace, "the target has reached its capacity; add disks or free space"));
        }
        let growth = alloc.growth(class).min(u32::try_from(room).unwrap_or(u32::MAX));
        // Near the end of the disk one more block may still fit.
        for blocks_max in [growth, 1] {
            let run = alloc.next_run(class, blocks_max);
            match self.files.reserve(&run) {
                Ok(()) => {
                    alloc.reserved(run);
                    break;
                }
                Err(e) => {
                    alloc.hollow(run);
                    if e.code != Code::NoSpace || blocks_max == 1 {
                        drop(alloc);
                        return self.fail_on_disk_error(Err(e));
                    }
                }
            }
        }
        let location = alloc.take(class).ok_or_else(|| Error::new(Code::Internal, "reserved blocks are gone"))?;
        Ok(self.blocks.handle(location))
    }

    /// The disk is full for somebody who needs `bytes`: release what only waits for the log to become durable, else give
    /// back the space of free blocks of any class. Returns whether there was anything.
    pub(crate) fn make_room(&self, bytes: u64) -> Result<bool> {
        self.collect_returned();
        if self.alloc.lock().quarantined_bytes() > 0 {
            self.sync_blocking()?;
            return Ok(true);
        }
        self.give_back(bytes.max(GIVE_BACK_BYTES_MIN))
    }

    /// Give `bytes` bytes of disk space of free blocks back, as far as there are any.
    fn give_back(&self, bytes: u64) -> Result<bool> {
        let runs = self.alloc.lock().take_surplus(bytes);
        let (mut result, any) = (Ok(()), !runs.is_empty());
        for run in runs {
            if result.is_ok() {
                result = self.files.punch(&run);
            }
            self.alloc.lock().hollow(run);
        }
        self.fail_on_disk_error(result)?;
        Ok(any)
    }

    /// Give back what is free beyond what new chunks will soon need.
    pub(crate) fn give_back_surplus(&self) -> Result<()> {
        let keep = self.options.free_bytes_kept.max(self.used_bytes() / 8);
        let free = self.alloc.lock().free_bytes();
        if free > keep { self.give_back(free - keep).map(drop) } else { Ok(()) }
    }

    /// Bytes of disk space that the data files take: blocks in use, and free ones whose space is kept.
    pub fn disk_bytes(&self) -> Result<u64> {
        self.files.space()
    }

    /// Take note of blocks nobody refers to any more.
    pub(crate) fn collect_returned(&self) {
        let returned = self.blocks.take_returned();
        if returned.is_empty() {
            return;
        }
        // Whatever freed them is in the log before this position.
        let position = self.log.end();
        let mut alloc = self.alloc.lock();
        for location in returned {
            if !alloc.quarantine(location, position) {
                debug_assert!(false, "{location:?} was freed twice");
                tracing::error!(?location, "a disk block was freed twice; it is not used twice");
            }
        }
    }

    /// Whether every disk block has at most one owner and is otherwise free; else what is wrong. Nobody may be using
    /// the store.
    #[doc(hidden)]
    pub fn audit_for_tests(&self) -> std::result::Result<(), String> {
        self.collect_returned();
        let used = self.table.lock().locations();
        self.alloc.lock().audit(&used)
    }
}
