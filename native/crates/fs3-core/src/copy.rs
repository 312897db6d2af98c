//! Copying of payloads.
//!
//! The C library copies what is larger than some KiB by `rep movsb`. On AMD's Zen 3 and 4 that runs at half its speed, or a
//! quarter, when the destination lies a little further in its page than the source does in its own (glibc's bug 30994).
//! Memory of `malloc`, and so most arrays and buffers of programs, begins 16 bytes into a page, and what comes to it from a
//! peer at the beginning of one. Vector instructions know no such difference; elsewhere they are no faster.

/// From this size on the C library may use `rep movsb`.
const VECTOR_BYTES_MIN: usize = 4096;
/// The destination is close behind the source when it lies less than this further in its page.
const CLOSE_BYTES: usize = 64;
const PAGE_BYTES: usize = 4096;

/// Copy `from` to `to`, of the same length. Panics when the lengths differ.
pub fn copy(to: &mut [u8], from: &[u8]) {
    assert_eq!(to.len(), from.len(), "copies fill their destination");
    // SAFETY: both are of this length, and a slice that can be written to overlaps no other.
    unsafe { copy_raw(to.as_mut_ptr(), from.as_ptr(), from.len()) }
}

/// Copy memory that a slice may not cover, because another process writes to it or reads it meanwhile.
///
/// # Safety
/// `from` can be read and `to` written for `bytes`, and the two do not overlap.
pub unsafe fn copy_raw(to: *mut u8, from: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    if bytes >= VECTOR_BYTES_MIN && is_close_behind(to, from) && std::arch::is_x86_feature_detected!("avx") {
        // SAFETY: the caller's promise, and the instructions are there.
        return unsafe { by_vectors(to, from, bytes) };
    }
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) }
}

#[cfg(target_arch = "x86_64")]
fn is_close_behind(to: *const u8, from: *const u8) -> bool {
    (1..CLOSE_BYTES).contains(&(to.addr().wrapping_sub(from.addr()) % PAGE_BYTES))
}

/// At least [`VECTOR_BYTES_MIN`] bytes.
///
/// # Safety
/// As for [`copy_raw`], on a processor with AVX.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn by_vectors(to: *mut u8, from: *const u8, bytes: usize) {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_store_si256};
    const VECTOR_BYTES: usize = size_of::<__m256i>();
    const STEP_BYTES: usize = 4 * VECTOR_BYTES;
    // Stores are aligned: those that cross cache lines cost twice.
    let head = to.align_offset(VECTOR_BYTES);
    let steps = (bytes - head) / STEP_BYTES;
    let tail = head + steps * STEP_BYTES;
    // SAFETY: head, steps and tail are parts of the range, and every store is aligned as `head` makes it.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, head);
        let (mut source, mut target) = (from.add(head).cast::<__m256i>(), to.add(head).cast::<__m256i>());
        for _ in 0..steps {
            // Not by a loop over the four, whose closures could not be inlined.
            let (first, second) = (_mm256_loadu_si256(source), _mm256_loadu_si256(source.add(1)));
            let (third, fourth) = (_mm256_loadu_si256(source.add(2)), _mm256_loadu_si256(source.add(3)));
            _mm256_store_si256(target, first);
            _mm256_store_si256(target.add(1), second);
            _mm256_store_si256(target.add(2), third);
            _mm256_store_si256(target.add(3), fourth);
            (source, target) = (source.add(4), target.add(4));
        }
        std::ptr::copy_nonoverlapping(from.add(tail), to.add(tail), bytes - tail);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_and_no_other_is_copied_wherever_the_ends_lie() {
        let source: Vec<u8> = (0..3 * VECTOR_BYTES_MIN).map(|i| (i * 31 % 251) as u8).collect();
        for bytes in
            [0, 1, 100, VECTOR_BYTES_MIN - 1, VECTOR_BYTES_MIN, VECTOR_BYTES_MIN + 1, 2 * VECTOR_BYTES_MIN + 77]
        {
            for (from, to) in [(0, 0), (0, 16), (1, 31), (63, 5), (33, 64)] {
                let mut room = vec![0xee; 3 * VECTOR_BYTES_MIN];
                copy(&mut room[to..to + bytes], &source[from..from + bytes]);
                assert!(room[to..to + bytes] == source[from..from + bytes], "{bytes} from {from} to {to}");
                assert!(room[..to].iter().chain(&room[to + bytes..]).all(|&byte| byte == 0xee));
            }
        }
    }

    #[test]
    #[should_panic(expected = "fill")]
    fn lengths_that_differ_are_refused() {
        copy(&mut [0; 4], &[0; 5]);
    }
}
