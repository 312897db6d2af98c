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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fs3_core::{ChainVersion, Region, UpdateVersion};

    use super::*;
    use crate::{Blocks, Location, Patch, VersionInfo};

    fn version(length: u32) -> Version {
        let block = Arc::new(Blocks::default()).handle(Location { class: class_of(length), index: 0 });
        block.raise_high_water(length);
        let info = VersionInfo {
            update_version: UpdateVersion(1),
            chain_version: ChainVersion(1),
            length,
            chunk_bytes: 1 << 20,
            chunk_crc32c: 0,
            removed: false,
        };
        let crcs = vec![0; block_count(length) as usize];
        Version { info, block: Some(block), crcs, patches: Arc::default(), time_ms: 0 }
    }

    #[test]
    fn new_chunks_and_full_overwrites_get_a_new_block() {
        assert_eq!(plan_write(None, 0, 4096), Plan::Whole { class: 16 });
        assert_eq!(plan_write(None, 900_000, 10), Plan::Whole { class: 20 });
        assert_eq!(plan_write(Some(&version(4096)), 0, 4096), Plan::Whole { class: 16 });
    }

    #[test]
    fn small_overwrites_do_not_rewrite_the_chunk_and_large_ones_do() {
        let base = version(1 << 20);
        assert_eq!(plan_write(Some(&base), 8192, 4096), Plan::Patch { first: 2, end: 3 });
        assert_eq!(plan_write(Some(&base), 100, 65_536), Plan::Patch { first: 0, end: 17 });
        assert_eq!(plan_write(Some(&base), 4096, 200_000), Plan::Whole { class: 20 });
    }

    #[test]
    fn an_append_is_in_place_only_beyond_everything_the_block_ever_held() {
        let mut base = version(600_000);
        assert_eq!(plan_write(Some(&base), 600_000, 100_000), Plan::Append { first: 146 });
        base.patches = Arc::new([(146, Patch { bytes: Region::from_vec(vec![0; 4096]), position: 1 })].into());
        assert_eq!(plan_write(Some(&base), 600_000, 100_000), Plan::Whole { class: 20 });
        base.patches = Arc::default();
        base.block.as_ref().unwrap().raise_high_water(700_000);
        assert_eq!(plan_write(Some(&base), 600_000, 100_000), Plan::Whole { class: 20 });
    }

    #[test]
    fn growing_past_the_block_moves_to_a_larger_class() {
        assert_eq!(plan_write(Some(&version(65_536)), 65_536, 65_536), Plan::Whole { class: 17 });
    }
}
