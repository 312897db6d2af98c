//! Many reads whose bytes have checksums of the caller's own. These are compared with what the verified checksums of blocks
//! make together, so that only bytes beside whole blocks are read once more, by the tasks that read them first.

use std::sync::Arc;

use fs3_core::{CRC_BLOCK_BYTES, RegionMut, Result, crc32c, crc32c_join, crc32c_of_blocks};
use fs3_rt::JoinSet;

use crate::inner::Inner;
use crate::loan::{KnownCrcs, Loan};
use crate::types::{ReadOp, ReadSum};
use crate::{read, trace};

/// Reads that one task does: enough for requests of a good size, so few that several tasks work at a time.
const GROUP_BYTES: usize = 4 << 20;

/// What became of a read: the count, `None` where the bytes are not what their checksum says; and its buffer.
pub(crate) type Checked = (Result<Option<usize>>, RegionMut);

/// Read many ranges; results in the order of `ops`.
pub(crate) async fn read_checked(inner: &Arc<Inner>, ops: Vec<(ReadOp, Option<ReadSum>)>) -> Vec<Checked> {
    let mut groups = grouped(ops);
    if groups.len() <= 1 {
        return match groups.pop() {
            Some(group) => read_group(inner.clone(), group).await,
            None => Vec::new(),
        };
    }
    let mut tasks = JoinSet::new();
    for (number, group) in groups.into_iter().enumerate() {
        let inner = inner.clone();
        tasks.spawn(trace::inherit(async move { (number, read_group(inner, group).await) }));
    }
    let mut done = tasks.join_all().await;
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().flat_map(|(_, group)| group).collect()
}

fn grouped(ops: Vec<(ReadOp, Option<ReadSum>)>) -> Vec<Vec<(ReadOp, Option<ReadSum>)>> {
    let mut groups: Vec<Vec<_>> = Vec::new();
    let mut bytes = GROUP_BYTES;
    for op in ops {
        if bytes >= GROUP_BYTES {
            groups.push(Vec::new());
            bytes = 0;
        }
        bytes += op.0.buf.len();
        groups.last_mut().expect("just pushed").push(op);
    }
    groups
}

async fn read_group(inner: Arc<Inner>, group: Vec<(ReadOp, Option<ReadSum>)>) -> Vec<Checked> {
    let (ops, sums): (Vec<_>, Vec<_>) = group.into_iter().unzip();
    let read = read::read_loans(&inner, ops, Loan::keeping_crcs).await;
    let compared = read.into_iter().zip(sums).map(|((result, data, known), sum)| {
        let result = result.map(|count| sum.is_none_or(|sum| sum.holds(&data[..count], &known)).then_some(count));
        (result, data)
    });
    compared.collect()
}

impl ReadSum {
    /// Whether what was read has this checksum. What is short is not compared: its count says that it is.
    fn holds(&self, data: &[u8], known: &[KnownCrcs]) -> bool {
        let Some(part) = data.get(self.range.clone()) else { return true };
        let (crc, covered) = if self.range.start == 0 { known_start(known, part.len()) } else { (0, 0) };
        let crc = match &part[covered..] {
            [] => crc,
            rest => crc32c_join(crc, crc32c(rest), rest.len()),
        };
        crc == self.crc
    }
}

/// Checksum of the first bytes of a buffer, at most `bytes_max`, as far as those of its blocks are known; and how many
/// bytes that is.
fn known_start(known: &[KnownCrcs], bytes_max: usize) -> (u32, usize) {
    let mut crcs = Vec::with_capacity(bytes_max / CRC_BLOCK_BYTES);
    for (at, packed) in known {
        if *at != crcs.len() * CRC_BLOCK_BYTES {
            break;
        }
        crcs.extend(packed.as_chunks::<4>().0.iter().map(|crc| u32::from_le_bytes(*crc)));
    }
    crcs.truncate(bytes_max / CRC_BLOCK_BYTES);
    let covered = crcs.len() * CRC_BLOCK_BYTES;
    (crc32c_of_blocks(crcs), covered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs3_core::{crc_blocks, pack_crcs};

    #[test]
    fn a_checksum_is_that_of_its_part_and_of_nothing_short() {
        let sum = ReadSum { range: 2..5, crc: crc32c(b"cde") };
        assert!(sum.holds(b"abcdefg", &[]));
        assert!(!sum.holds(b"abcdEfg", &[]));
        assert!(sum.holds(b"abcd", &[]));
    }

    #[test]
    fn what_is_known_of_blocks_gives_the_checksum_of_a_part_from_the_start() {
        const B: usize = CRC_BLOCK_BYTES;
        let data: Vec<u8> = (0..5 * B + 100).map(|i| (i * i / 7) as u8).collect();
        let known = |from: usize, to: usize| (from, pack_crcs(&crc_blocks(0, &data[from..to])).into());
        for known in [
            vec![],
            vec![known(0, 5 * B)],
            vec![known(0, 2 * B), known(2 * B, 5 * B)],
            vec![known(0, B), known(3 * B, 5 * B)],
            vec![known(B, 5 * B)],
        ] {
            for end in [0, 1, B - 1, B, 2 * B + 1, 5 * B, 5 * B + 100] {
                let good = ReadSum { range: 0..end, crc: crc32c(&data[..end]) };
                assert!(good.holds(&data, &known), "{end}");
                let bad = ReadSum { range: 0..end, crc: good.crc ^ 1 };
                assert!(!bad.holds(&data, &known), "{end}");
            }
        }
    }
}
