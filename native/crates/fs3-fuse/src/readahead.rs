//! Finds sequential readers and says what to read ahead for them. Pure: no I/O, no clock.

use std::ops::Range;

use crate::buffers::LARGE;

/// Unit of read-ahead in bytes.
pub(crate) const BLOCK: u64 = LARGE as u64;
/// Bytes read in sequence before a reader counts as sequential.
const RUN_MIN: u64 = 256 << 10;
/// How far from its turn a read may come and still belong to the sequence: the kernel sends several at once
/// and threads reorder them.
const SLACK: u64 = 4 << 20;
/// Blocks read ahead of one reader at most.
const WINDOW_MAX: u64 = 6;

/// What is known of one open file's reads.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    expected: u64,
    run: u64,
    issued: u64,
}

/// How to serve one read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Exactly what was asked.
    Exact,
    /// From whole blocks; these, after the ones asked for, should be on their way too.
    Blocks {
        /// Block numbers to read ahead.
        ahead: Range<u64>,
    },
}

impl Stream {
    /// Take note of a read of `offset..offset+len` in a file of `length` bytes and plan it.
    pub fn on_read(&mut self, offset: u64, len: u64, length: u64) -> Plan {
        let end = (offset + len).min(length);
        if offset >= end {
            return Plan::Exact;
        }
        let sequential_before = self.run >= RUN_MIN;
        let slack = if sequential_before { SLACK } else { 0 };
        if offset <= self.expected.saturating_add(slack) && offset.saturating_add(slack) >= self.expected {
            self.run = self.run.saturating_add(end - offset);
            self.expected = self.expected.max(end);
        } else {
            *self = Self { expected: end, run: end - offset, issued: 0 };
            // The first read after a jump may be the only one.
            self.run = self.run.min(RUN_MIN - 1);
        }
        let last_of_file = (length - 1) / BLOCK;
        if self.run < RUN_MIN || (last_of_file == 0 && offset == 0 && end == length) {
            return Plan::Exact;
        }
        let last = (end - 1) / BLOCK;
        let window = (self.run / BLOCK).clamp(1, WINDOW_MAX);
        let first = self.issued.max(last + 1);
        let stop = (last + window).min(last_of_file) + 1;
        self.issued = self.issued.max(stop);
        Plan::Blocks { ahead: first..stop.max(first) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequential_reader_is_kept_ahead_of_and_every_block_is_asked_for_once() {
        let mut stream = Stream::default();
        let length = 40 * BLOCK + 17;
        let mut asked = Vec::new();
        let mut offset = 0;
        while offset < length {
            if let Plan::Blocks { ahead } = stream.on_read(offset, 128 << 10, length) {
                asked.extend(ahead);
            }
            offset += 128 << 10;
        }
        assert_eq!(asked, (1..=40).collect::<Vec<_>>());
    }

    #[test]
    fn random_reads_are_exact() {
        let mut stream = Stream::default();
        for i in [5u64, 900, 3, 77, 1200, 4, 60] {
            assert_eq!(stream.on_read(i * BLOCK, 4096, 2000 * BLOCK), Plan::Exact);
        }
    }

    #[test]
    fn reads_that_overtake_each_other_stay_one_sequence() {
        let mut stream = Stream::default();
        let length = 100 * BLOCK;
        assert_eq!(stream.on_read(0, BLOCK, length), Plan::Blocks { ahead: 1..2 });
        for block in [2u64, 1, 4, 3, 6, 5] {
            assert!(matches!(stream.on_read(block * BLOCK, BLOCK, length), Plan::Blocks { .. }));
        }
        assert_eq!(stream.on_read(70 * BLOCK, 4096, length), Plan::Exact);
    }

    #[test]
    fn a_small_file_read_whole_and_reads_at_the_end_are_exact() {
        let mut stream = Stream::default();
        assert_eq!(stream.on_read(0, 1 << 20, 700_000), Plan::Exact);
        assert_eq!(stream.on_read(700_000, 1 << 20, 700_000), Plan::Exact);
        assert_eq!(Stream::default().on_read(0, 4096, 0), Plan::Exact);
    }
}
