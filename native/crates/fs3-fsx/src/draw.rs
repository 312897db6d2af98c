//! Choices that follow from a seed.

/// xorshift64*: the same choices on every machine and in every release.
#[derive(Clone, Debug)]
pub(crate) struct Draw(u64);

impl Draw {
    pub fn new(seed: u64) -> Self {
        // Small seeds differ in few bits; spread them.
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// 0 .. `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }

    /// True once in `times`.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// The bytes that operation `stamp` writes to `offset..offset+len`: what an operation wrote is recognised anywhere.
pub(crate) fn fill(stamp: u64, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 16);
    let mut word = offset / 8;
    while bytes.len() < len + 8 {
        let mixed = (stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ word.wrapping_mul(0xbf58_476d_1ce4_e5b9))
            .wrapping_mul(0x94d0_49bb_1331_11eb);
        // No byte is zero: zeros are holes.
        bytes.extend((mixed ^ (mixed >> 31)).to_le_bytes().map(|byte| byte | 1));
        word += 1;
    }
    let skip = (offset % 8) as usize;
    bytes.drain(..skip);
    bytes.truncate(len);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_a_place_do_not_depend_on_where_the_write_began() {
        let whole = fill(7, 0, 100);
        assert_eq!(fill(7, 13, 50), whole[13..63]);
        assert!(whole.iter().all(|byte| *byte != 0));
        assert_ne!(fill(8, 0, 100), whole);
    }
}
