//! Many reads whose bytes have checksums of the caller's own: compared by the tasks that read them, while others still
//! come and before the bytes leave the processor's caches.

use std::sync::Arc;

use fs3_core::{RegionMut, Result, crc32c};
use fs3_rt::JoinSet;

use crate::inner::Inner;
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
    let read = read::read_many(&inner, ops).await;
    let compare = |((result, data), sum): ((Result<usize>, RegionMut), Option<ReadSum>)| {
        let result = result.map(|count| sum.is_none_or(|sum| sum.holds(&data[..count])).then_some(count));
        (result, data)
    };
    read.into_iter().zip(sums).map(compare).collect()
}

impl ReadSum {
    /// Whether what was read has this checksum. What is short is not compared: its count says that it is.
    fn holds(&self, data: &[u8]) -> bool {
        data.get(self.range.clone()).is_none_or(|part| crc32c(part) == self.crc)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_is_that_of_its_part_and_of_nothing_short() {
        let sum = ReadSum { range: 2..5, crc: crc32c(b"cde") };
        assert!(sum.holds(b"abcdefg"));
        assert!(!sum.holds(b"abcdEfg"));
        assert!(sum.holds(b"abcd"));
    }
}
