//! CRC32C by carry-less multiplication of 256 bits, for processors that have it without AVX-512: AMD's Zen 3, Intel's client
//! processors since Alder Lake. There `crc-fast` multiplies 128 bits, at half the speed.
//!
//! Source: V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel, 2009.

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::{
    __m256i, _mm_clmulepi64_si128, _mm_crc32_u8, _mm_crc32_u64, _mm_cvtsi32_si128, _mm_extract_epi64, _mm_set_epi64x,
    _mm_xor_si128, _mm256_broadcastsi128_si256, _mm256_castsi256_si128, _mm256_clmulepi64_epi128,
    _mm256_extracti128_si256, _mm256_loadu_si256, _mm256_xor_si256, _mm256_zextsi128_si256,
};

const VECTOR_BYTES: usize = size_of::<__m256i>();
/// Four vectors in turn: six, eight and twelve were no faster.
const STEP_BYTES: usize = 4 * VECTOR_BYTES;
/// What is shorter is left to the library, which has another way for it.
const BYTES_MIN: usize = 2 * STEP_BYTES;

/// CRC32C of `data`; `None` where the library is at least as fast.
pub(crate) fn crc32c(data: &[u8]) -> Option<u32> {
    let is_best = data.len() >= BYTES_MIN && !is_x86_feature_detected!("avx512vl") && has_instructions();
    // SAFETY: the instructions are there.
    is_best.then(|| unsafe { fold(data) })
}

fn has_instructions() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("vpclmulqdq")
        && is_x86_feature_detected!("pclmulqdq")
        && is_x86_feature_detected!("sse4.2")
}

/// The remainder of x^(`bits` - 1), bits reversed as CRC32C has them.
const fn power(bits: usize) -> i64 {
    let mut remainder = 0x8000_0000u32;
    let mut bit = 1;
    while bit < bits {
        let carry = if remainder & 1 == 1 { 0x82f6_3b78 } else { 0 };
        remainder = (remainder >> 1) ^ carry;
        bit += 1;
    }
    remainder as i64
}

/// What moves 16 bytes by so many towards the end of the message: factors of their first and second half.
#[target_feature(enable = "avx2")]
fn moving<const BYTES: usize>() -> __m256i {
    let (first, second) = const { (power(8 * BYTES + 32), power(8 * BYTES - 32)) };
    _mm256_broadcastsi128_si256(_mm_set_epi64x(second, first))
}

/// `next` with `bytes` moved onto it.
#[target_feature(enable = "avx2,vpclmulqdq")]
fn onto(next: __m256i, bytes: __m256i, factors: __m256i) -> __m256i {
    let first = _mm256_clmulepi64_epi128(bytes, factors, 0x00);
    let second = _mm256_clmulepi64_epi128(bytes, factors, 0x11);
    _mm256_xor_si256(_mm256_xor_si256(first, next), second)
}

/// CRC32C of at least [`STEP_BYTES`]; panics when there are fewer.
#[target_feature(enable = "avx2,vpclmulqdq,pclmulqdq,sse4.2")]
fn fold(data: &[u8]) -> u32 {
    let (steps, rest) = data.as_chunks::<STEP_BYTES>();
    // SAFETY: each of the four vectors lies within the step.
    let load =
        |step: &[u8; STEP_BYTES], at: usize| unsafe { _mm256_loadu_si256(step.as_ptr().cast::<__m256i>().add(at)) };
    // The sum begins with all bits set.
    let before = _mm256_zextsi128_si256(_mm_cvtsi32_si128(-1));
    let mut first = _mm256_xor_si256(load(&steps[0], 0), before);
    let (mut second, mut third, mut fourth) = (load(&steps[0], 1), load(&steps[0], 2), load(&steps[0], 3));
    let factors = moving::<STEP_BYTES>();
    for step in &steps[1..] {
        first = onto(load(step, 0), first, factors);
        second = onto(load(step, 1), second, factors);
        third = onto(load(step, 2), third, factors);
        fourth = onto(load(step, 3), fourth, factors);
    }
    let factors = moving::<VECTOR_BYTES>();
    let all = onto(fourth, onto(third, onto(second, first, factors), factors), factors);
    let factors = _mm256_castsi256_si128(moving::<16>());
    let (half, next) = (_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    let moved = _mm_xor_si128(_mm_clmulepi64_si128(half, factors, 0x00), _mm_clmulepi64_si128(half, factors, 0x11));
    let sum = _mm_xor_si128(moved, next);
    let mut crc = _mm_crc32_u64(0, _mm_extract_epi64(sum, 0) as u64);
    crc = _mm_crc32_u64(crc, _mm_extract_epi64(sum, 1) as u64);
    let (words, bytes) = rest.as_chunks();
    for word in words {
        crc = _mm_crc32_u64(crc, u64::from_le_bytes(*word));
    }
    let mut crc = crc as u32;
    for byte in bytes {
        crc = _mm_crc32_u8(crc, *byte);
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_makes_the_library_s_sums_of_any_length_and_place() {
        if !has_instructions() {
            return;
        }
        let data: Vec<u8> = (0..10_000u32).map(|i| (i * i / 7) as u8).collect();
        for bytes in (STEP_BYTES..3 * STEP_BYTES).chain([4095, 4096, 4097, 9_000]) {
            for at in [0, 1, 15, 33] {
                let part = &data[at..at + bytes];
                let expected = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, part) as u32;
                // SAFETY: the instructions are there.
                assert_eq!(unsafe { fold(part) }, expected, "{bytes} at {at}");
            }
        }
    }
}
