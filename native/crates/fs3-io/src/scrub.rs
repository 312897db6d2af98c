//! Checking stored bytes, and putting rotten ones right.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;

use fs3_chunk::{BLOCK_BYTES, Block, Version, VersionInfo, block_count};
use fs3_core::{ChunkId, Code, Error, Result, UpdateVersion, crc32c};

use crate::cache::PAGE_BLOCKS;
use crate::store::TargetStore;

/// Bytes read from the disk at a time while checking.
const READ_BYTES: u32 = 1 << 20;

/// A crc block whose stored bytes do not match their checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadBlock {
    /// Its number in the chunk.
    pub index: u32,
    /// Bytes of the chunk in it; less than 4096 only in the last one.
    pub length: u32,
    /// What their CRC32C should be.
    pub crc: u32,
}

/// What a check of stored bytes found.
#[derive(Clone, Debug, Default)]
pub struct Verified {
    /// The committed version that was checked; `None` when there is no readable chunk.
    pub version: Option<VersionInfo>,
    /// Bytes read from the disk.
    pub read_bytes: u64,
    /// In order.
    pub bad: Vec<BadBlock>,
}

impl TargetStore {
    /// Read the stored bytes of the committed version in `offset..offset + length` (cut at its end) from the disk, past
    /// every cache, and compare them with their checksums. `offset` is a multiple of 4096. Rot is remembered and
    /// logged once.
    ///
    /// Errors: DiskError.
    pub async fn verify(self: &Arc<Self>, id: ChunkId, offset: u32, length: u32) -> Result<Verified> {
        let store = self.clone();
        self.options.threads.run(move || store.verify_blocking(id, offset, length)).await
    }

    /// Write `blocks` (number, bytes) of version `version` over rotten ones, in place, and verify the whole chunk. The
    /// caller keeps every update of the chunk away meanwhile, and there is no pending version: it might share the
    /// disk block. Survives the end of the process; after a power loss before the next sync the rot may be back.
    ///
    /// Errors: VersionGap when the chunk is at another version or has a pending one; PayloadChecksum for bytes that
    /// are not those of the version; ChecksumMismatch when the chunk is still rotten afterwards; DiskError.
    pub async fn repair(
        self: &Arc<Self>,
        id: ChunkId,
        version: UpdateVersion,
        blocks: Vec<(u32, Vec<u8>)>,
    ) -> Result<()> {
        let store = self.clone();
        self.options.threads.run(move || store.repair_blocking(id, version, &blocks)).await
    }

    fn verify_blocking(&self, id: ChunkId, offset: u32, length: u32) -> Result<Verified> {
        let committed = self.table.lock().get(id).and_then(|c| c.committed.clone());
        let Some(version) = committed.filter(|v| !v.info.removed) else { return Ok(Verified::default()) };
        let end = block_count(offset.saturating_add(length).min(version.info.length));
        let mut verified = Verified { version: Some(version.info.clone()), ..Verified::default() };
        let Some(block) = &version.block else { return Ok(verified) };
        let mut at = offset / BLOCK_BYTES;
        while at < end {
            let next = end.min(at + READ_BYTES / BLOCK_BYTES);
            self.verify_run(&version, block, at..next, &mut verified)?;
            at = next;
        }
        if let Some(bad) = verified.bad.first() {
            let at = bad.index * BLOCK_BYTES;
            let message = format!("the stored bytes at {at} do not match their checksum {:08x}", bad.crc);
            self.note_rot(id, &version, &Error::new(Code::ChecksumMismatch, message));
        }
        Ok(verified)
    }

    /// Blocks with a patch are not read: their place on the disk is still to be written.
    fn verify_run(&self, version: &Version, block: &Block, run: Range<u32>, out: &mut Verified) -> Result<()> {
        let bytes = ((run.end - run.start) * BLOCK_BYTES) as usize;
        let mut buf = self.options.pool.take(bytes);
        let mut slices = [IoSliceMut::new(&mut buf[..bytes])];
        self.fail_on_disk_error(self.files.read(block, run.start * BLOCK_BYTES, &mut slices))?;
        out.read_bytes += bytes as u64;
        for index in run.clone().filter(|index| !version.patches.contains_key(index)) {
            let bad = expected(version, index);
            let at = ((index - run.start) * BLOCK_BYTES) as usize;
            if crc32c(&buf[at..at + bad.length as usize]) != bad.crc {
                out.bad.push(bad);
            }
        }
        Ok(())
    }

    fn repair_blocking(&self, id: ChunkId, wanted: UpdateVersion, blocks: &[(u32, Vec<u8>)]) -> Result<()> {
        self.check_usable()?;
        let found = {
            let mut table = self.table.lock();
            table.get(id).filter(|c| c.pending.is_none()).and_then(|c| c.committed.clone())
        };
        let version = found
            .filter(|v| !v.info.removed && v.info.update_version == wanted)
            .ok_or_else(|| Error::new(Code::VersionGap, format!("chunk {id} is no longer at version {wanted}")))?;
        if let Some(block) = &version.block {
            blocks.iter().try_for_each(|(index, bytes)| self.write_back(&version, block, *index, bytes))?;
        }
        let verified = self.verify_blocking(id, 0, u32::MAX)?;
        if let Some(bad) = verified.bad.first() {
            let message =
                format!("chunk {id}: {} blocks are still rotten, the first is {}", verified.bad.len(), bad.index);
            return Err(Error::new(Code::ChecksumMismatch, message));
        }
        if let Some(block) = &version.block {
            block.forget_rot();
        }
        Ok(())
    }

    fn write_back(&self, version: &Version, block: &Block, index: u32, bytes: &[u8]) -> Result<()> {
        let right = (index < block_count(version.info.length)).then(|| expected(version, index));
        if !right.is_some_and(|right| bytes.len() == right.length as usize && crc32c(bytes) == right.crc) {
            return Err(Error::new(Code::PayloadChecksum, "the bytes are not those of the chunk's version"));
        }
        // A patch that is still to be written in place makes what is on the disk irrelevant.
        if version.patches.contains_key(&index) {
            return Ok(());
        }
        let unit = BLOCK_BYTES as usize;
        let mut buf = self.options.pool.take(unit);
        buf[..bytes.len()].copy_from_slice(bytes);
        buf[bytes.len()..unit].fill(0);
        block.note_change();
        let done = self.files.write(block, index * BLOCK_BYTES, &mut [IoSlice::new(&buf[..unit])]);
        block.note_change();
        let page = index / PAGE_BLOCKS;
        self.options.read_cache.invalidate(block.generation, page..page + 1);
        self.fail_on_disk_error(done)
    }
}

fn expected(version: &Version, index: u32) -> BadBlock {
    let length = (version.info.length - index * BLOCK_BYTES).min(BLOCK_BYTES);
    BadBlock { index, length, crc: version.crcs[index as usize] }
}
