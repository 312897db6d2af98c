use std::io::IoSliceMut;
use std::ops::Range;

use fs3_chunk::{BLOCK_BYTES, Block, Version, block_count};
use fs3_core::{ChunkId, Code, Error, Region, RegionMut, Result, crc32c};

use crate::cache::{PAGE_BLOCKS, PAGE_BYTES};
use crate::log::disk_error;
use crate::maintain::DataFiles;
use crate::store::{ReadOut, TargetStore};
use crate::uring::Uring;

/// The part of a read that lies in one page of a disk block.
struct Piece {
    page: u32,
    /// Crc blocks of the chunk wanted from it.
    blocks: Range<u32>,
    /// Those that come from the disk block, as bits of the page; the others have patches.
    wanted: u16,
    memory: Option<Region>,
}

impl Piece {
    fn missing(&self) -> bool {
        self.wanted != 0 && self.memory.is_none()
    }

    /// Bytes of the page that the blocks take.
    fn window(&self) -> Range<usize> {
        let at = |block: u32| ((block - self.page * PAGE_BLOCKS) * BLOCK_BYTES) as usize;
        at(self.blocks.start)..at(self.blocks.end)
    }
}

impl TargetStore {
    pub(crate) fn read_blocking(&self, id: ChunkId, offset: u32, length: u32) -> Result<ReadOut> {
        let version = self.readable(id, offset, length)?;
        let read = self.read_version(&version, offset, length).inspect_err(|e| self.note_rot(id, &version, e));
        read.map_err(|e| Error {
            message: format!("chunk {id} version {}: {}", version.info.update_version, e.message).into(),
            ..e
        })
    }

    /// A read through io_uring; `None` when it has to go through the threads: there is no ring, it has too much to do,
    /// or it did not read everything. Errors of the disk are final.
    pub(crate) async fn read_small(&self, id: ChunkId, offset: u32, length: u32) -> Option<Result<ReadOut>> {
        let version = self.readable(id, offset, length).ok()?;
        let end = end_of(&version, offset, length);
        let mut pieces = self.pieces(&version, offset, end);
        let block = version.block.as_ref()?;
        let changes = block.changes();
        let mut missing: Vec<&mut Piece> = pieces.iter_mut().filter(|p| p.missing()).collect();
        // One read of neighbours, as nearly all are.
        let neighbours = missing.windows(2).all(|pair| pair[0].page + 1 == pair[1].page);
        if missing.is_empty() || !neighbours || fs3_rt::is_simulated() {
            return None;
        }
        let file = self.files.file(block).ok()?;
        let (uring, fd) = (Uring::shared()?, file.raw()?);
        let windows: Vec<_> =
            missing.iter().enumerate().map(|(i, p)| (i, p.window().start, p.window().len())).collect();
        let pages = missing.iter().map(|_| self.options.read_cache.page()).collect();
        let at = block.location.offset() + u64::from(missing[0].blocks.start * BLOCK_BYTES);
        let (read, pages) = uring.read(file, fd, at, pages, &windows)?.await?;
        let wanted: usize = windows.iter().map(|w| w.2).sum();
        match read {
            Ok(bytes) if bytes == wanted => {}
            Ok(_) => return None,
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::ECANCELED)) => return None,
            Err(e) => return Some(self.fail_on_disk_error(Err(disk_error("cannot read data", e)))),
        }
        let mut fresh = vec![];
        for (page, piece) in pages.into_iter().zip(&mut missing) {
            // The threads read it again, and say what is wrong.
            verify(&version, piece, &page).ok()?;
            piece.memory = Some(page.freeze());
            fresh.extend(piece.memory.clone().map(|memory| (piece.page, piece.wanted, memory)));
        }
        self.options.read_cache.insert(block, changes, fresh);
        Some(Ok(read_out(&version, offset, end, &pieces)))
    }

    /// If `error` says that stored bytes of `version` are rotten, remember it, and log once what a hunt for the cause
    /// needs.
    pub(crate) fn note_rot(&self, id: ChunkId, version: &Version, error: &Error) {
        let Some(block) = version.block.as_ref().filter(|_| error.code == Code::ChecksumMismatch) else { return };
        if block.note_rot() {
            return;
        }
        let pending = self.chunk(id).and_then(|m| m.pending).map(|p| p.update_version.0);
        tracing::error!(
            chunk = %id,
            version = version.info.update_version.0,
            chain_version = version.info.chain_version.0,
            pending,
            length = version.info.length,
            high_water = block.high_water(),
            patches = ?version.patches.keys(),
            file = DataFiles::name(block.location.class),
            file_offset = block.location.offset(),
            block_generation = block.generation,
            log_position = self.log.end(),
            "rot: {}", error.message
        );
    }

    /// Read the chunk from the disk the next time, whatever memory holds of it.
    pub fn forget_cached(&self, id: ChunkId) {
        let version = self.table.lock().get(id).and_then(|chunk| chunk.committed.clone());
        if let Some((version, block)) = version.as_ref().and_then(|v| Some((v, v.block.as_ref()?))) {
            let pages = block_count(version.info.length).div_ceil(PAGE_BLOCKS);
            self.options.read_cache.invalidate(block.generation, 0..pages);
        }
    }

    /// The read if all its bytes are in memory.
    pub(crate) fn read_cached(&self, version: &Version, offset: u32, length: u32) -> Option<ReadOut> {
        let end = end_of(version, offset, length);
        let pieces = self.pieces(version, offset, end);
        if pieces.iter().any(Piece::missing) {
            return None;
        }
        Some(read_out(version, offset, end, &pieces))
    }

    /// Verified bytes of a version, from memory or disk. `offset` is a multiple of 4096, `length` is not
    /// restricted.
    pub(crate) fn read_version(&self, version: &Version, offset: u32, length: u32) -> Result<ReadOut> {
        let end = end_of(version, offset, length);
        let mut pieces = self.pieces(version, offset, end);
        if let Some(block) = &version.block {
            let changes = block.changes();
            let mut fresh = vec![];
            for run in pieces.chunk_by_mut(|a, b| a.missing() == b.missing()) {
                if run[0].missing() {
                    self.read_run(version, block, run)?;
                    fresh.extend(run.iter().filter_map(|p| Some((p.page, p.wanted, p.memory.clone()?))));
                }
            }
            if !fresh.is_empty() {
                self.options.read_cache.insert(block, changes, fresh);
            }
        }
        Ok(read_out(version, offset, end, &pieces))
    }

    fn pieces(&self, version: &Version, offset: u32, end: u32) -> Vec<Piece> {
        let blocks = offset / BLOCK_BYTES..block_count(end);
        if blocks.is_empty() {
            return vec![];
        }
        let pages = blocks.start / PAGE_BLOCKS..=(blocks.end - 1) / PAGE_BLOCKS;
        let mut pieces: Vec<Piece> = pages
            .map(|page| {
                let start = blocks.start.max(page * PAGE_BLOCKS);
                let end = blocks.end.min((page + 1) * PAGE_BLOCKS);
                let bits = |b: u32| 1u32 << (b - page * PAGE_BLOCKS);
                let mut wanted = (start..end).map(bits).sum::<u32>();
                version.patches.range(start..end).for_each(|(&b, _)| wanted &= !bits(b));
                Piece { page, blocks: start..end, wanted: wanted as u16, memory: None }
            })
            .collect();
        if let Some(block) = &version.block {
            let wanted: Vec<(u32, u16)> = pieces.iter().map(|p| (p.page, p.wanted)).collect();
            let found = self.options.read_cache.get(block.generation, &wanted);
            pieces.iter_mut().zip(found).for_each(|(piece, memory)| piece.memory = memory);
        }
        pieces
    }

    /// Read neighbouring pages with one system call and verify them.
    fn read_run(&self, version: &Version, block: &Block, run: &mut [Piece]) -> Result<()> {
        let mut pages: Vec<RegionMut> = run.iter().map(|_| self.options.read_cache.page()).collect();
        let mut slices: Vec<IoSliceMut> =
            pages.iter_mut().zip(&*run).map(|(page, piece)| IoSliceMut::new(&mut page[piece.window()])).collect();
        self.fail_on_disk_error(self.files.read(block, run[0].blocks.start * BLOCK_BYTES, &mut slices))?;
        for (page, piece) in pages.into_iter().zip(run) {
            verify(version, piece, &page)?;
            piece.memory = Some(page.freeze());
        }
        Ok(())
    }
}

fn end_of(version: &Version, offset: u32, length: u32) -> u32 {
    offset.saturating_add(length).min(version.info.length).max(offset.min(version.info.length))
}

fn verify(version: &Version, piece: &Piece, page: &[u8]) -> Result<()> {
    for block in piece.blocks.clone() {
        let bit = block - piece.page * PAGE_BLOCKS;
        if piece.wanted & (1 << bit) == 0 {
            continue;
        }
        let at = (bit * BLOCK_BYTES) as usize;
        let len = (version.info.length - block * BLOCK_BYTES).min(BLOCK_BYTES) as usize;
        let (found, expected) = (crc32c(&page[at..at + len]), version.crcs[block as usize]);
        if found != expected {
            let from = block * BLOCK_BYTES;
            return Err(Error::new(
                Code::ChecksumMismatch,
                format!(
                    "the stored bytes at {from} do not match their checksum ({found:08x}, not {expected:08x}); another \
                     replica may be right"
                ),
            ));
        }
    }
    Ok(())
}

fn read_out(version: &Version, offset: u32, end: u32, pieces: &[Piece]) -> ReadOut {
    let mut data = Vec::with_capacity(pieces.len());
    let bytes_of = |first: u32, after: u32| (after * BLOCK_BYTES).min(end) - first * BLOCK_BYTES;
    for piece in pieces {
        let base = piece.page * PAGE_BYTES as u32;
        let mut at = piece.blocks.start;
        let from_page = |first: u32, after: u32| {
            let memory = piece.memory.as_ref().expect("pieces are complete");
            memory.slice((first * BLOCK_BYTES - base) as usize, bytes_of(first, after) as usize)
        };
        for (&block, patch) in version.patches.range(piece.blocks.clone()) {
            if at < block {
                data.push(from_page(at, block));
            }
            data.push(patch.bytes.slice(0, bytes_of(block, block + 1) as usize));
            at = block + 1;
        }
        if at < piece.blocks.end {
            data.push(from_page(at, piece.blocks.end));
        }
    }
    let first = (offset / BLOCK_BYTES) as usize;
    let length: usize = data.iter().map(|r: &Region| r.len()).sum();
    let crcs = version.crcs.get(first..block_count(end) as usize).unwrap_or(&[]).to_vec();
    ReadOut { data, length: length as u32, crcs, version: version.info.clone() }
}
