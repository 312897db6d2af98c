//! Choices that follow from a seed.

/// xorshift64*: the same choices on every machine and in every release.
#[derive(Clone, Debug)]
pub(crate) struct Draw(u64);

impl Draw {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2).wrapping_add(1))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    /// 0 .. `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True with `probability` 0 .. 1.
    pub fn chance(&mut self, probability: f64) -> bool {
        probability > 0.0 && (self.next() as f64) < probability * 4_294_967_296.0
    }
}
