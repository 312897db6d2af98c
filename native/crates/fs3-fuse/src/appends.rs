//! Keeps what was appended until it is known where in the file it goes. Pure: no I/O, no clock.

use fs3_core::Region;

use crate::buffers::{Buffer, LARGE, SMALL};

/// Bytes without a place, in the order in which they were appended.
#[derive(Default)]
pub(crate) struct Appends {
    parts: Vec<Part>,
    bytes: usize,
    /// Where the kernel believes the first byte to be; `None` when it believes the bytes not to follow each other.
    believed: Option<u64>,
}

/// `start..end` of a buffer.
struct Part {
    start: usize,
    end: usize,
    buf: Buffer,
}

/// What goes to one place.
pub(crate) struct Batch {
    pub regions: Vec<Region>,
    pub bytes: u64,
    pub believed: Option<u64>,
}

impl Appends {
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Whether waiting for more does not make the writes to storage any larger.
    pub fn is_full(&self) -> bool {
        self.bytes >= LARGE || self.parts.iter().any(|part| part.end == LARGE)
    }

    /// Keep `data`, which goes to `likely` if nobody else appends, and which the kernel believes to go to `believed`.
    /// All of it or, when `alloc` has no memory, nothing: what was appended at once lies together.
    pub fn push(
        &mut self,
        likely: u64,
        believed: u64,
        data: &[u8],
        mut alloc: impl FnMut(usize) -> Option<Buffer>,
    ) -> bool {
        let room = self.parts.last().map_or(0, |part| part.buf.len() - part.end).min(data.len());
        let behind = likely + room as u64;
        let Some(fresh) = self.allocate(behind, data.len() - room, &mut alloc) else { return false };
        if self.is_empty() {
            self.believed = Some(believed);
        } else if self.believed.is_none_or(|first| first + self.bytes() != believed) {
            self.believed = None;
        }
        let (head, mut rest) = data.split_at(room);
        if let Some(part) = self.parts.last_mut() {
            part.fill(head);
        }
        for mut part in fresh {
            let (head, tail) = rest.split_at(rest.len().min(part.buf.len() - part.start));
            part.fill(head);
            self.parts.push(part);
            rest = tail;
        }
        self.bytes += data.len();
        true
    }

    /// Parts for `len` more bytes, laid out so that they end where slots of the file end.
    fn allocate(&self, likely: u64, len: usize, alloc: &mut impl FnMut(usize) -> Option<Buffer>) -> Option<Vec<Part>> {
        let size = if self.is_empty() && len <= SMALL { SMALL } else { LARGE };
        let (mut parts, mut done) = (Vec::new(), 0);
        while done < len {
            let start = ((likely + done as u64) % size as u64) as usize;
            parts.push(Part { start, end: start, buf: alloc(size)? });
            done += (size - start).min(len - done);
        }
        Some(parts)
    }

    /// Everything that is kept.
    pub fn take(&mut self) -> Batch {
        let taken = std::mem::take(self);
        let regions = taken.parts.into_iter().map(|part| part.buf.into_region(part.start, part.end - part.start));
        Batch { regions: regions.collect(), bytes: taken.bytes as u64, believed: taken.believed }
    }
}

impl Part {
    fn fill(&mut self, data: &[u8]) {
        let end = self.end + data.len();
        self.buf[self.end..end].copy_from_slice(data);
        self.end = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::Pool;

    fn joined(batch: &Batch) -> Vec<u8> {
        batch.regions.iter().flat_map(|region| region.to_vec()).collect()
    }

    #[test]
    fn what_is_appended_comes_out_in_order_and_ends_where_slots_end() {
        let pool = Pool::new(64 << 20);
        let (mut appends, mut model) = (Appends::default(), Vec::new());
        let end = (5 << 20) + 12_345;
        for round in 0..700u64 {
            let data = vec![round as u8; (round * 7919 % 9000) as usize + 1];
            let position = end + model.len() as u64;
            assert!(appends.push(position, position, &data, |n| pool.try_take(n, 0)));
            model.extend_from_slice(&data);
        }
        let batch = appends.take();
        assert!(appends.is_empty() && appends.take().regions.is_empty());
        assert_eq!((batch.bytes, batch.believed), (model.len() as u64, Some(end)));
        assert!(joined(&batch) == model);
        let mut position = end;
        for (at, region) in batch.regions.iter().enumerate() {
            position += region.len() as u64;
            let slot = if at == 0 { SMALL } else { LARGE };
            assert!(position.is_multiple_of(slot as u64) || at + 1 == batch.regions.len());
        }
        drop(batch);
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn without_memory_nothing_of_an_append_is_taken() {
        let pool = Pool::new(4 * LARGE);
        let mut appends = Appends::default();
        assert!(appends.push(0, 0, &vec![1; 3 * LARGE + 5], |n| pool.try_take(n, 0)));
        assert!(!appends.push(0, 0, &vec![2; LARGE], |n| pool.try_take(n, 0)));
        let batch = appends.take();
        assert_eq!((batch.bytes, batch.regions.len()), (3 * LARGE as u64 + 5, 4));
        assert!(joined(&batch).iter().all(|byte| *byte == 1));
    }

    #[test]
    fn a_belief_of_the_kernel_that_does_not_hold_together_is_no_belief() {
        let pool = Pool::new(0);
        let mut appends = Appends::default();
        let mut push = |believed| {
            appends.push(0, believed, &[0; 10], |n| pool.try_take(n, 0));
            appends.believed
        };
        assert_eq!([push(100), push(110), push(125), push(130)], [Some(100), Some(100), None, None]);
    }

    #[test]
    fn it_is_full_once_a_large_write_can_be_made_of_it() {
        let pool = Pool::new(0);
        let mut appends = Appends::default();
        let end = LARGE as u64 - 1000;
        appends.push(end, end, &[0; 999], |n| pool.try_take(n, 0));
        assert!(!appends.is_full());
        appends.push(end + 999, end + 999, &[0; 2], |n| pool.try_take(n, 0));
        assert!(!appends.is_full(), "a small buffer is full, a large one is not");
        appends.push(end + 1001, end + 1001, &vec![0; LARGE], |n| pool.try_take(n, 0));
        assert!(appends.is_full());
    }
}
