//! What clients saw is what one copy of each chunk could have shown them.
//!
//! Three checkers, the cheap and telling ones first:
//! - [`crate::check_order`]: update versions only grow in real time, and one version has one content; O(n log n).
//! - [`crate::check_registers`]: the bytes of a chunk as registers with unique values. A value is in place from the first
//!   time an operation on it ended to the last time one began; these zones of different values must not collide
//!   (Gibbons and Korach, *Testing Shared Memories*, 1997). O(n log n) per register; tells lost, repeated and resurrected
//!   writes apart.
//! - [`crate::check_search`]: the complete check, a search for one order of all operations of the chunk (Wing and Gong,
//!   *Testing and Verifying Concurrent Objects*, 1993) that never tries a set of operations with the same result twice
//!   (Lowe, *Testing for Linearizability*, 2017).
//!
//! Operations that have not returned, or whose outcome is not known, take effect at some time after their invocation or
//! never. What is refused never does.

use std::collections::BTreeMap;
use std::fmt;

use crate::history::{History, Kind, Loss, Operation, Outcome};
use crate::{check_order, check_registers, check_search};

/// The property that a history violates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Property {
    /// A read shows bytes that nobody wrote there, or a write that was refused or not begun.
    Integrity,
    /// Update versions go backwards, or one version has two contents.
    Order,
    /// An acknowledged update is not in a later read, nor anything that replaced it.
    Lost,
    /// A write took effect again after another one had replaced it.
    Repeated,
    /// Bytes came back after an acknowledged removal or truncation.
    Resurrected,
    /// A read shows an older state than one that was seen or acknowledged before it began; a later read does not.
    Stale,
    /// There is no order of the operations that explains what the reads show.
    Linearizable,
}

impl fmt::Display for Property {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Property::Integrity => "integrity",
            Property::Order => "order of versions",
            Property::Lost => "no acknowledged write is lost",
            Property::Repeated => "exactly once",
            Property::Resurrected => "no resurrection",
            Property::Stale => "no stale read",
            Property::Linearizable => "linearizable per chunk",
        })
    }
}

/// What is wrong with a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which property.
    pub property: Property,
    /// Number of the chunk.
    pub chunk: u32,
    /// The operations that contradict each other, in words.
    pub text: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: chunk {}: {}", self.property, self.chunk, self.text)
    }
}

/// The first violation, if there is one.
pub fn check(history: &History) -> Option<Violation> {
    let mut chunks: BTreeMap<u32, Vec<&Operation>> = BTreeMap::new();
    for operation in history.operations() {
        chunks.entry(operation.chunk).or_default().push(operation);
    }
    chunks.into_iter().find_map(|(chunk, operations)| {
        let found = check_chunk(&operations, history.losses());
        found.map(|(property, text)| Violation { property, chunk, text })
    })
}

fn check_chunk(operations: &[&Operation], losses: &[(u64, Loss)]) -> Option<(Property, String)> {
    check_registers::check(operations, losses)
        .or_else(|| check_order::check(operations, losses))
        .or_else(|| check_search::check(operations, losses))
}

/// An operation in the words of a report.
pub(crate) fn describe(o: &Operation) -> String {
    let what = match &o.kind {
        Kind::Write { offset, length, value } => format!("write of {value} at {offset}..{}", offset + length),
        Kind::Truncate { length } => format!("truncate to {length}"),
        Kind::Punch { offset, length } => format!("hole at {offset}..{}", offset + length),
        Kind::Remove => "remove".to_string(),
        Kind::Sync => "sync".to_string(),
        Kind::Read { offset, length, seen } => {
            let runs: Vec<String> =
                seen.iter().map(|r| format!("{}..{}={}", r.offset, r.offset + r.length, r.value)).collect();
            format!("read of {offset}..{} -> [{}]", offset + length, runs.join(" "))
        }
    };
    let until = match (o.outcome, o.returned_ns) {
        (Outcome::Ok, Some(ns)) => format!("{ns}"),
        (Outcome::Failed, _) => "refused".to_string(),
        _ => "unknown".to_string(),
    };
    let version = o.version.map_or(String::new(), |v| format!(" version {v:#x}"));
    format!("client {} {what}{version} [{} to {until}]", o.client, o.invoked_ns)
}

/// When an operation is known to have taken effect or been served at the latest; `u64::MAX`: not known.
pub(crate) fn end(o: &Operation) -> u64 {
    if o.outcome == Outcome::Ok { o.returned_ns.unwrap_or(u64::MAX) } else { u64::MAX }
}
