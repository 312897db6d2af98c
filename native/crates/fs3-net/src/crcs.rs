//! Checksums of payloads, made while these come: the peer still sends the rest, and the bytes are in the core's cache.

use fs3_core::{CRC_BLOCK_BYTES, crc32c};

/// CRC32C of each [`CRC_BLOCK_BYTES`] of the segments of a payload, little-endian one after another. Every segment
/// begins with a block of its own and ends with one that may be shorter.
#[derive(Default)]
pub(crate) struct Crcs {
    packed: Vec<u8>,
    /// Bytes of the segment that is coming which they cover.
    bytes: usize,
    /// Bytes of all segments before it.
    before: usize,
}

impl Crcs {
    /// Cover the whole blocks of what came of a segment, and when that is all of it the last one whatever its size; the next
    /// segment comes then.
    pub fn follow(&mut self, came: &[u8], is_all: bool) {
        let end = if is_all { came.len() } else { came.len() - came.len() % CRC_BLOCK_BYTES };
        for block in came[self.bytes.min(end)..end].chunks(CRC_BLOCK_BYTES) {
            self.packed.extend_from_slice(&crc32c(block).to_le_bytes());
        }
        self.bytes = self.bytes.max(end);
        if is_all {
            self.before += std::mem::take(&mut self.bytes);
        }
    }

    /// All of them, if they cover a payload of so many bytes.
    pub fn of(self, bytes: usize) -> Option<Vec<u8>> {
        (self.before == bytes).then_some(self.packed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs3_core::{crc_blocks, pack_crcs};

    #[test]
    fn checksums_made_while_a_payload_comes_are_those_of_its_blocks() {
        let payload: Vec<u8> = (0..20_000u32).map(|i| (i * 7) as u8).collect();
        for bytes in [1, 4095, 4096, 4097, 20_000] {
            for step in [1, 100, 4096, 5000, 20_000] {
                let mut crcs = Crcs::default();
                for end in (step..bytes).step_by(step).chain([bytes]) {
                    crcs.follow(&payload[..end], end == bytes);
                }
                assert_eq!(crcs.of(bytes), Some(pack_crcs(&crc_blocks(0, &payload[..bytes]))), "{bytes} by {step}");
            }
        }
        assert_eq!(Crcs::default().of(1), None);
    }

    #[test]
    fn every_segment_has_blocks_of_its_own() {
        let payload: Vec<u8> = (0..20_000u32).map(|i| (i * 11) as u8).collect();
        let mut crcs = Crcs::default();
        let mut expected = Vec::new();
        for segment in [&payload[..5000], &[], &payload[5000..5001], &payload[5001..]] {
            crcs.follow(&segment[..segment.len() / 2], segment.is_empty());
            if !segment.is_empty() {
                crcs.follow(segment, true);
            }
            expected.extend(pack_crcs(&crc_blocks(0, segment)));
        }
        assert_eq!(crcs.of(20_000), Some(expected));
    }

    #[test]
    fn what_is_not_complete_has_none() {
        let mut crcs = Crcs::default();
        crcs.follow(&[1; 8192], false);
        assert_eq!(crcs.of(8192), None);
    }
}
