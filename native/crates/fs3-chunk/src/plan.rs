use crate::{BLOCK_BYTES, Version, block_bytes, block_count, class_of};

/// Blocks a patch may have: 64 KiB at any alignment.
const PATCH_BLOCKS_MAX: u32 = 17;
/// Appends from this size on are written in place at once; smaller ones travel through the log, where many
/// of them become one disk write.
const APPEND_BYTES_MIN: u32 = 16 << 10;

/// How the bytes of a write reach the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// The whole new content goes to a new block of `class`.
    Whole {
        /// Size class of the new block.
        class: u8,
    },
    /// The crc blocks from `first` to the end are written in place, beyond everything ever referred to in
    /// this block except that the first of them repeats the committed bytes it has.
    Append {
        /// First crc block written.
        first: u32,
    },
    /// The crc blocks from `first` up to `end` go into the log, and in place when the log is durable.
    Patch {
        /// First crc block written.
        first: u32,
        /// One past the last.
        end: u32,
    },
}

/// Decide how to write `bytes` bytes (more than 0) at `offset` over `base`.
pub fn plan_write(base: Option<&Version>, offset: u32, bytes: u32) -> Plan {
    let end = offset + bytes;
    let length = base.map_or(0, |b| b.info.length);
    let new_length = length.max(end);
    let whole = Plan::Whole { class: class_of(new_length) };
    let Some((base, block)) = base.and_then(|b| b.block.as_ref().map(|block| (b, block))) else { return whole };
    if new_length > block_bytes(block.location.class) || (offset == 0 && end >= length) {
        return whole;
    }
    let shared_tail = !length.is_multiple_of(BLOCK_BYTES);
    if offset >= length
        && end - length >= APPEND_BYTES_MIN
        && block.high_water() == length
        && !(shared_tail && base.patches.contains_key(&(length / BLOCK_BYTES)))
    {
        return Plan::Append { first: length / BLOCK_BYTES };
    }
    let first = offset.min(length) / BLOCK_BYTES;
    if block_count(end) - first <= PATCH_BLOCKS_MAX {
        return Plan::Patch { first, end: block_count(end) };
    }
    whole
}
