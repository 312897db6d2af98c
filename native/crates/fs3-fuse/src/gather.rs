//! Gathers the writes of one file into large pieces. Pure: no I/O, no clock.
//!
//! The file is divided into slots of [`LARGE`] bytes (a power of two that divides, or is a multiple of, every
//! chunk size). At most one piece per slot is kept; a piece is one contiguous range inside its slot.

use std::collections::{BTreeMap, VecDeque};

use crate::buffers::{Buffer, LARGE, SMALL};

/// Pieces kept per file; one more sends the oldest. Enough for several threads writing to one file.
const PIECES_MAX: usize = 8;
const SLOT: u64 = LARGE as u64;

/// Bytes waiting to be written: `start..end` of slot `slot`. The buffer is laid out like the slot.
pub(crate) struct Piece {
    slot: u64,
    start: usize,
    end: usize,
    buf: Buffer,
}

impl Piece {
    /// First byte's position in the file.
    pub fn offset(&self) -> u64 {
        self.slot * SLOT + self.start as u64
    }

    /// Position behind the last byte.
    pub fn end(&self) -> u64 {
        self.slot * SLOT + self.end as u64
    }

    /// Its bytes, with the memory.
    pub fn into_region(self) -> fs3_core::Region {
        self.buf.into_region(self.start, self.end - self.start)
    }
}

/// The pieces of one file.
#[derive(Default)]
pub(crate) struct Gather {
    pieces: BTreeMap<u64, Piece>,
    order: VecDeque<u64>,
}

impl Gather {
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Position behind the last byte kept, 0 when nothing is.
    pub fn end(&self) -> u64 {
        self.pieces.last_key_value().map_or(0, |(_, p)| p.end())
    }

    /// Keep `data` for `offset`. Pieces that are complete or must give way move to `out`, in the order in which
    /// they must be written. Returns how many bytes were taken: fewer than given when `alloc` had no memory.
    pub fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        mut alloc: impl FnMut(usize) -> Option<Buffer>,
        out: &mut Vec<Piece>,
    ) -> usize {
        let mut taken = 0;
        while taken < data.len() {
            let at = offset + taken as u64;
            let (slot, start) = (at / SLOT, (at % SLOT) as usize);
            let part = &data[taken..data.len().min(taken + LARGE - start)];
            if !self.put(slot, start, part, &mut alloc, out) {
                break;
            }
            taken += part.len();
        }
        taken
    }

    fn put(
        &mut self,
        slot: u64,
        start: usize,
        part: &[u8],
        alloc: &mut impl FnMut(usize) -> Option<Buffer>,
        out: &mut Vec<Piece>,
    ) -> bool {
        let end = start + part.len();
        if self.pieces.get(&slot).is_some_and(|p| start > p.end || end < p.start) {
            out.extend(self.remove(slot));
        }
        if let Some(piece) = self.pieces.get_mut(&slot) {
            if end > piece.buf.len() {
                let Some(mut larger) = alloc(LARGE) else { return false };
                larger[piece.start..piece.end].copy_from_slice(&piece.buf[piece.start..piece.end]);
                piece.buf = larger;
            }
            piece.buf[start..end].copy_from_slice(part);
            (piece.start, piece.end) = (piece.start.min(start), piece.end.max(end));
        } else {
            let Some(mut buf) = alloc(if end <= SMALL { SMALL } else { LARGE }) else { return false };
            buf[start..end].copy_from_slice(part);
            self.pieces.insert(slot, Piece { slot, start, end, buf });
            self.order.push_back(slot);
        }
        // Nothing can follow within the slot: a streaming writer is done with it.
        if self.pieces[&slot].end == LARGE {
            out.extend(self.remove(slot));
        } else if self.pieces.len() > PIECES_MAX {
            let oldest = self.order.front().copied().expect("as many as pieces");
            out.extend(self.remove(oldest));
        }
        true
    }

    fn remove(&mut self, slot: u64) -> Option<Piece> {
        self.order.retain(|s| *s != slot);
        self.pieces.remove(&slot)
    }

    /// Whether a byte of `start..end` is kept.
    pub fn overlaps(&self, start: u64, end: u64) -> bool {
        let slots = start / SLOT..=end.saturating_sub(1) / SLOT;
        start < end && self.pieces.range(slots).any(|(_, p)| p.offset() < end && start < p.end())
    }

    /// The bytes `offset..offset+len` when one piece has them all.
    pub fn read(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let piece = self.pieces.get(&(offset / SLOT))?;
        let start = (offset % SLOT) as usize;
        (piece.start <= start && start + len <= piece.end).then(|| &piece.buf[start..start + len])
    }

    /// Every piece, by position.
    pub fn take_all(&mut self) -> Vec<Piece> {
        self.order.clear();
        std::mem::take(&mut self.pieces).into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::Pool;

    /// Applies pieces like the storage would, in order.
    fn apply(file: &mut Vec<u8>, pieces: Vec<Piece>) {
        for piece in pieces {
            let (start, end) = (piece.offset() as usize, piece.end() as usize);
            file.resize(file.len().max(end), 0);
            file[start..end].copy_from_slice(&piece.into_region());
        }
    }

    #[test]
    fn a_sequential_writer_sends_whole_slots() {
        let pool = Pool::new(64 << 20);
        let (mut gather, mut out) = (Gather::default(), Vec::new());
        let data = vec![7u8; 128 << 10];
        for i in 0..20u64 {
            let taken = gather.write(i * data.len() as u64, &data, |n| pool.try_take(n, 0), &mut out);
            assert_eq!(taken, data.len());
        }
        let sent: Vec<_> = out.iter().map(|p| (p.offset(), p.end())).collect();
        assert_eq!(sent, vec![(0, SLOT), (SLOT, 2 * SLOT)]);
        assert_eq!((gather.end(), gather.take_all().len()), (20 * (128 << 10), 1));
    }

    #[test]
    fn random_writes_end_up_as_a_plain_file_would() {
        let pool = Pool::new(64 << 20);
        let (mut gather, mut model, mut file) = (Gather::default(), Vec::new(), Vec::new());
        let mut seed = 0x2545_f491_4f6c_dd1du64;
        let mut next = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        for round in 0..4000u32 {
            let offset = next(12 << 20);
            let len = if next(10) == 0 { next(300_000) } else { next(9000) } as usize + 1;
            let data = vec![round as u8; len];
            let end = offset as usize + len;
            if model.len() < end {
                model.resize(end, 0);
            }
            model[offset as usize..end].copy_from_slice(&data);
            let mut out = Vec::new();
            assert_eq!(gather.write(offset, &data, |n| pool.try_take(n, 0), &mut out), len);
            apply(&mut file, out);
            let (at, n) = (next(12 << 20), next(5000) as usize + 1);
            if let Some(bytes) = gather.read(at, n) {
                assert_eq!(bytes, &model[at as usize..at as usize + n]);
                assert!(gather.overlaps(at, at + n as u64));
            }
            assert!(gather.pieces.len() <= PIECES_MAX && gather.order.len() == gather.pieces.len());
        }
        apply(&mut file, gather.take_all());
        assert!(file == model);
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn without_memory_a_write_is_taken_in_part() {
        let pool = Pool::new(4 << 20);
        let (mut gather, mut out) = (Gather::default(), Vec::new());
        let data = vec![1u8; 6 << 20];
        assert_eq!(gather.write(0, &data, |n| pool.try_take(n, 0), &mut out), 4 << 20);
        assert_eq!(out.len(), 4);
    }

    #[test]
    fn a_gap_in_a_slot_sends_the_earlier_piece_first() {
        let pool = Pool::new(0);
        let (mut gather, mut out) = (Gather::default(), Vec::new());
        gather.write(100, &[1; 10], |n| pool.try_take(n, 0), &mut out);
        gather.write(90, &[2; 10], |n| pool.try_take(n, 0), &mut out);
        assert!(out.is_empty() && gather.read(90, 20).is_some());
        gather.write(200, &[3; 10], |n| pool.try_take(n, 0), &mut out);
        assert_eq!((out[0].offset(), out[0].end()), (90, 110));
        assert!(!gather.overlaps(90, 200) && gather.overlaps(209, 300) && !gather.overlaps(210, 210));
    }
}
