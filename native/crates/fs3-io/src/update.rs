use std::io::IoSlice;
use std::sync::Arc;

use fs3_chunk::{
    BLOCK_BYTES, Block, Body, Plan, Prepare, Record, Version, VersionInfo, WRITERS_MAX, block_count, class_of,
    plan_write,
};
use fs3_core::{CheckedBytes, Code, Error, RegionMut, Result, crc32c};

use crate::cache::PAGE_BLOCKS;
use crate::store::{Change, TargetStore, Update, check_update};

/// A prepare's record content, and the handle of its new block.
struct Built {
    body: Body,
    length: u32,
    block: Option<Arc<Block>>,
}

impl TargetStore {
    pub(crate) fn prepare_blocking(self: &Arc<Self>, update: Update) -> Result<VersionInfo> {
        self.check_usable()?;
        check_update(&update)?;
        self.brake()?;
        let id = update.id;
        let committed = self.table.lock().get(id).and_then(|c| c.committed.clone());
        let replaces = matches!(update.change, Change::Replace { .. });
        if let Some(v) = &committed
            && v.info.update_version >= update.update_version
            && !replaces
        {
            let (new, old) = (update.update_version, v.info.update_version);
            return Err(Error::new(
                Code::InvalidArgument,
                format!("chunk {id} is at version {old} already, not {new}"),
            ));
        }
        let base = committed.filter(|v| !v.info.removed);
        let mut writers = None;
        let built = match update.change {
            Change::Write(bytes) => self.build_write(base.as_deref(), &bytes),
            Change::Replace { bytes, writers: mut records } => {
                records.drain(..records.len().saturating_sub(WRITERS_MAX));
                writers = Some(records);
                self.build_whole(&bytes)
            }
            Change::Truncate { length } => self.build_cut(base.as_deref(), length),
            Change::Punch { offset, length } => self.build_punch(base.as_deref(), offset, length),
            Change::Remove => Ok(Built { body: Body::Tombstone, length: 0, block: None }),
        };
        let built = built.inspect_err(|e| {
            if let Some(base) = &base {
                self.note_rot(id, base, e);
            }
        })?;
        let prepare = Prepare {
            id,
            chunk_bytes: update.chunk_bytes,
            update_version: update.update_version,
            chain_version: update.chain_version,
            length: built.length,
            body: built.body,
            writer: update.writer,
            writers,
        };
        self.persist(Record::Prepare(prepare), built.block)?;
        self.maintain_if_due();
        let pending = self.chunk(id).and_then(|m| m.pending);
        pending.ok_or_else(|| Error::new(Code::Internal, "a prepared version vanished; updates of a chunk raced"))
    }

    fn build_write(&self, base: Option<&Version>, input: &CheckedBytes) -> Result<Built> {
        let old = base.map_or(0, |b| b.info.length);
        if input.data().is_empty() {
            return match base {
                Some(_) => Ok(Built { body: Body::Cut { tail_crc: None }, length: old, block: None }),
                None => Ok(Built { body: Body::Whole { at: None, crcs: vec![] }, length: 0, block: None }),
            };
        }
        let length = old.max(input.end());
        match plan_write(base, input.offset(), input.data().len() as u32) {
            Plan::Whole { .. } if input.offset() == 0 && input.end() >= old => self.build_whole(input),
            Plan::Whole { class } => {
                let bytes = self.assemble(base, input, 0, block_count(length))?;
                let crcs = merged_crcs(base, input, 0, block_count(length), &bytes);
                let block = self.take_block(class)?;
                self.write_padded(&block, &bytes[..length as usize])?;
                let body = Body::Whole { at: Some(block.location), crcs };
                Ok(Built { body, length, block: Some(block) })
            }
            Plan::Append { first } => {
                let base = base.expect("an append has a base");
                let bytes = self.assemble(Some(base), input, first, block_count(length))?;
                let crcs = merged_crcs(Some(base), input, first, block_count(length), &bytes);
                self.write_in_place(base, first, &bytes)?;
                Ok(Built { body: Body::Append { first, crcs }, length, block: None })
            }
            Plan::Patch { first, end } => {
                let bytes = self.assemble(base, input, first, end)?;
                let crcs = merged_crcs(base, input, first, end, &bytes);
                let all = bytes.freeze();
                let block = BLOCK_BYTES as usize;
                let blocks = (0..(end - first) as usize).map(|b| all.slice(b * block, block)).collect();
                Ok(Built { body: Body::Patch { first, crcs, blocks }, length, block: None })
            }
        }
    }

    /// All bytes are new: they go to disk straight from the caller's memory.
    fn build_whole(&self, input: &CheckedBytes) -> Result<Built> {
        let length = input.end();
        if length == 0 {
            return Ok(Built { body: Body::Whole { at: None, crcs: vec![] }, length, block: None });
        }
        let block = self.take_block(class_of(length))?;
        self.write_padded(&block, input.data())?;
        Ok(Built {
            body: Body::Whole { at: Some(block.location), crcs: input.crcs().to_vec() },
            length,
            block: Some(block),
        })
    }

    fn build_cut(&self, base: Option<&Version>, length: u32) -> Result<Built> {
        let base = base.ok_or_else(|| Error::new(Code::ChunkNotFound, "no chunk to cut"))?;
        if length >= base.info.length {
            return Ok(Built { body: Body::Cut { tail_crc: None }, length: base.info.length, block: None });
        }
        let mut tail_crc = None;
        if !length.is_multiple_of(BLOCK_BYTES) {
            let start = length / BLOCK_BYTES * BLOCK_BYTES;
            let tail = self.read_version(base, start, length - start)?;
            tail_crc = Some(crc32c(&tail.data.iter().flat_map(|r| r.iter().copied()).collect::<Vec<u8>>()));
        }
        Ok(Built { body: Body::Cut { tail_crc }, length, block: None })
    }

    /// Whole crc blocks of the range become zeros without being read; those it covers in part are merged.
    fn build_punch(&self, base: Option<&Version>, offset: u32, length: u32) -> Result<Built> {
        let base = base.ok_or_else(|| Error::new(Code::ChunkNotFound, "no chunk to punch"))?;
        let (old, stop) = (base.info.length, (offset + length).min(base.info.length));
        if offset >= stop {
            return Ok(Built { body: Body::Cut { tail_crc: None }, length: old, block: None });
        }
        let end = stop / BLOCK_BYTES;
        let first = offset.div_ceil(BLOCK_BYTES).min(end);
        let mut partial = vec![offset / BLOCK_BYTES, (stop - 1) / BLOCK_BYTES];
        partial.dedup();
        partial.retain(|block| !(first..end).contains(block));
        let mut edges = vec![];
        for block in partial {
            let start = block * BLOCK_BYTES;
            let bytes = (old - start).min(BLOCK_BYTES);
            let mut buf = self.options.pool.take(BLOCK_BYTES as usize);
            self.copy_version(base, start, start + bytes, &mut buf, start)?;
            let at = |offset: u32| (offset.clamp(start, start + bytes) - start) as usize;
            buf[at(offset)..at(stop)].fill(0);
            buf[bytes as usize..].fill(0);
            edges.push((block, crc32c(&buf[..bytes as usize]), buf.freeze()));
        }
        Ok(Built { body: Body::Punch { first, end, edges }, length: old, block: None })
    }

    /// The bytes of the crc blocks `first..end` after the write: verified old bytes, zeros in gaps and
    /// padding, and the new bytes.
    fn assemble(&self, base: Option<&Version>, input: &CheckedBytes, first: u32, end: u32) -> Result<RegionMut> {
        let (from, to) = (first * BLOCK_BYTES, end * BLOCK_BYTES);
        let mut buf = self.options.pool.take((to - from) as usize);
        let old_end = base.map_or(0, |b| b.info.length).min(to);
        let head_end = input.offset().min(old_end).max(from);
        let tail_start = (input.end() / BLOCK_BYTES * BLOCK_BYTES).max(from);
        if let Some(base) = base {
            if from < head_end {
                self.copy_version(base, from, head_end, &mut buf, from)?;
            }
            if input.end() < old_end {
                self.copy_version(base, tail_start, old_end, &mut buf, from)?;
            }
        }
        let at = |offset: u32| (offset - from) as usize;
        buf[at(head_end)..at(input.offset().max(head_end))].fill(0);
        buf[at(input.offset())..at(input.end())].copy_from_slice(input.data());
        buf[at(input.end().max(old_end))..].fill(0);
        Ok(buf)
    }

    fn copy_version(&self, version: &Version, start: u32, end: u32, buf: &mut [u8], base: u32) -> Result<()> {
        let out = self.read_version(version, start, end - start)?;
        let mut at = (start - base) as usize;
        for region in &out.data {
            buf[at..at + region.len()].copy_from_slice(region);
            at += region.len();
        }
        Ok(())
    }

    /// Write to the start of a new block, padded to 4096. Direct from `data` where its memory is aligned.
    fn write_padded(&self, block: &Block, data: &[u8]) -> Result<()> {
        let unit = BLOCK_BYTES as usize;
        let direct = if data.as_ptr().addr().is_multiple_of(unit) { data.len() / unit * unit } else { 0 };
        let (head, tail) = data.split_at(direct);
        if tail.is_empty() {
            return self.fail_on_disk_error(self.files.write(block, 0, &mut [IoSlice::new(head)]));
        }
        let padded = tail.len().next_multiple_of(unit);
        let mut bounce = self.options.pool.take(padded);
        bounce[..tail.len()].copy_from_slice(tail);
        bounce[tail.len()..padded].fill(0);
        let tail = IoSlice::new(&bounce[..padded]);
        let done = match head.is_empty() {
            true => self.files.write(block, 0, &mut [tail]),
            false => self.files.write(block, 0, &mut [IoSlice::new(head), tail]),
        };
        self.fail_on_disk_error(done)
    }

    /// Write beyond the committed end. The first block may share its start with committed bytes: those are
    /// written again as they are, so that they are right whatever part of a torn write arrives.
    fn write_in_place(&self, base: &Version, first: u32, bytes: &[u8]) -> Result<()> {
        let block = base.block.as_ref().expect("an append has a block");
        block.note_change();
        let done = self.files.write(block, first * BLOCK_BYTES, &mut [IoSlice::new(bytes)]);
        block.note_change();
        let page = first / PAGE_BLOCKS;
        self.options.read_cache.invalidate(block.generation, page..page + 1);
        self.fail_on_disk_error(done)
    }
}

/// Checksums of the blocks `first..end` after the write, whose bytes are `bytes`. Old checksums are kept for
/// blocks that stay as they are, the writer's are used for blocks it covers.
fn merged_crcs(base: Option<&Version>, input: &CheckedBytes, first: u32, end: u32, bytes: &[u8]) -> Vec<u32> {
    let old = base.map_or(0, |b| b.info.length);
    let length = old.max(input.end());
    let changed_from = input.offset().min(old);
    (first..end)
        .map(|block| {
            let (start, stop) = (block * BLOCK_BYTES, ((block + 1) * BLOCK_BYTES).min(length));
            let kept = (stop <= changed_from || start >= input.end()) && stop.min(old) == stop;
            match (kept, base, whole_crc(input, block, length)) {
                (true, Some(base), _) => base.crcs[block as usize],
                (_, _, Some(crc)) => crc,
                _ => {
                    let at = (start - first * BLOCK_BYTES) as usize;
                    crc32c(&bytes[at..at + (stop - start) as usize])
                }
            }
        })
        .collect()
}

/// The writer's checksum of `block` in a chunk of `length` bytes, if it covers all of it.
fn whole_crc(input: &CheckedBytes, block: u32, length: u32) -> Option<u32> {
    let (start, end) = (block * BLOCK_BYTES, ((block + 1) * BLOCK_BYTES).min(length));
    let covered = input.offset() <= start && end <= input.end();
    covered.then(|| input.crcs()[(block - input.offset() / BLOCK_BYTES) as usize])
}
