//! Where the bytes of a file range lie: chunks, crc blocks, and the windows of memory a reply goes into.

use fs3_core::{CRC_BLOCK_BYTES, ChunkId, Code, Error, InodeId, Result};

const BLOCK: u32 = CRC_BLOCK_BYTES as u32;
/// Chunks of the largest file. The last index, 0xffffffff, means "to the end" in a remove.
const CHUNKS_MAX: u64 = 0xffff_ffff;

/// The part of a file range that lies in one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub chunk: ChunkId,
    /// First byte within the chunk, and how many.
    pub offset: u32,
    pub len: u32,
    /// Where the piece begins in the caller's buffer.
    pub at: usize,
}

/// Cut [offset, offset+len) of a file at its chunk borders. Errors: FileTooLarge beyond the last chunk index.
pub(crate) fn pieces(inode: u64, chunk_bytes: u32, offset: u64, len: usize) -> Result<impl Iterator<Item = Piece>> {
    let chunk_bytes = u64::from(chunk_bytes);
    let end = offset.checked_add(len as u64).filter(|end| end.div_ceil(chunk_bytes) <= CHUNKS_MAX);
    let Some(end) = end else {
        return Err(Error::new(Code::FileTooLarge, "the range ends beyond the largest file of this chunk size"));
    };
    let mut from = offset;
    Ok(std::iter::from_fn(move || {
        if from >= end {
            return None;
        }
        let to = (from / chunk_bytes + 1).saturating_mul(chunk_bytes).min(end);
        let piece = Piece {
            chunk: ChunkId::file(InodeId(inode), (from / chunk_bytes) as u32),
            offset: (from % chunk_bytes) as u32,
            len: (to - from) as u32,
            at: (from - offset) as usize,
        };
        from = to;
        Some(piece)
    }))
}

/// The whole crc blocks that a piece touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blocks {
    /// First byte within the chunk; a multiple of the block size, as is `len`.
    pub offset: u32,
    pub len: u32,
    /// The blocks fit where the piece goes in the caller's buffer, so no copy is needed.
    pub direct: bool,
}

impl Blocks {
    /// `room`: length of the caller's buffer. Only the last piece can be shorter than its blocks, and the bytes
    /// of the buffer behind it are nobody's.
    pub fn of(piece: &Piece, room: usize) -> Self {
        let offset = piece.offset / BLOCK * BLOCK;
        let len = (piece.offset + piece.len).next_multiple_of(BLOCK) - offset;
        Self { offset, len, direct: offset == piece.offset && piece.at + len as usize <= room }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_at_chunk_borders() {
        let list = pieces(9, 1 << 16, 65_000, 140_000).unwrap();
        let shape: Vec<_> = list.map(|p| (p.chunk.index, p.offset, p.len, p.at)).collect();
        assert_eq!(shape, [(0, 65_000, 536, 0), (1, 0, 65_536, 536), (2, 0, 65_536, 66_072), (3, 0, 8_392, 131_608)]);
        assert!(pieces(9, 1 << 16, 5, 0).unwrap().next().is_none());
    }

    #[test]
    fn a_file_has_a_largest_chunk() {
        let end = CHUNKS_MAX << 16;
        assert_eq!(pieces(9, 1 << 16, end - 1, 1).unwrap().next().unwrap().chunk.index, u32::MAX - 1);
        assert_eq!(pieces(9, 1 << 16, end, 1).err().unwrap().code, Code::FileTooLarge);
        assert_eq!(pieces(9, 1 << 16, u64::MAX, 2).err().unwrap().code, Code::FileTooLarge);
    }

    #[test]
    fn whole_blocks_are_read_and_only_partial_ones_are_copied() {
        let blocks = |offset, len, room| Blocks::of(&pieces(9, 1 << 16, offset, len).unwrap().next().unwrap(), room);
        assert_eq!(blocks(8192, 12_288, 12_288), Blocks { offset: 8192, len: 12_288, direct: true });
        assert_eq!(blocks(100, 10_000, 20_000), Blocks { offset: 0, len: 12_288, direct: false });
        assert_eq!(blocks(4096, 10, 10), Blocks { offset: 4096, len: 4096, direct: false });
        assert_eq!(blocks(4096, 10, 4096), Blocks { offset: 4096, len: 4096, direct: true });
        assert_eq!(blocks(65_535, 1, 4096), Blocks { offset: 61_440, len: 4096, direct: false });
    }
}
