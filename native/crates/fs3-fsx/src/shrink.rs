//! A short sequence that still fails.

use std::time::{Duration, Instant};

use crate::operation::Operation;
use crate::options::{Options, added};
use crate::run::Trial;

/// How long the search may take.
const SEARCH: Duration = Duration::from_secs(120);
/// How many of the last operations are tried before all of them.
const TAILS: [usize; 4] = [30, 200, 1_000, 10_000];

/// Fewer of the operations `done` that fail, too, in their order. `None` when not even all of them do again.
pub(crate) fn shrink(options: &Options, done: &[Operation]) -> Option<Vec<Operation>> {
    let until = Instant::now() + SEARCH;
    let fails = |operations: &[Operation]| Instant::now() < until && fails(options, operations);
    let tails = TAILS.iter().filter(|tail| **tail < done.len()).map(|tail| &done[done.len() - tail..]);
    let found = tails.chain([done]).find(|tail| fails(tail))?;
    Some(minimal(found.to_vec(), fails))
}

/// Leave out parts, halves first, as long as it goes on failing (Zeller's ddmin, with complements only).
fn minimal(mut operations: Vec<Operation>, fails: impl Fn(&[Operation]) -> bool) -> Vec<Operation> {
    let mut part = operations.len().div_ceil(2);
    while part > 0 {
        let (mut start, mut shrunk) = (0, false);
        while start < operations.len() {
            let end = (start + part).min(operations.len());
            let rest = [&operations[..start], &operations[end..]].concat();
            if !rest.is_empty() && fails(&rest) {
                operations = rest;
                shrunk = true;
            } else {
                start = end;
            }
        }
        if !shrunk || part > operations.len() {
            part /= 2;
        }
    }
    operations
}

fn fails(options: &Options, operations: &[Operation]) -> bool {
    let path = added(&options.path, "shrink");
    let second = options.second.as_ref().map(|second| added(second, "shrink"));
    let Ok(mut trial) = Trial::new(&path, second.as_deref(), None) else { return false };
    let failed = operations.iter().any(|o| trial.step(*o).is_err()) || trial.finish().is_err();
    drop(trial);
    let _ = std::fs::remove_file(&path);
    failed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation::Kind;

    #[test]
    fn only_what_is_needed_to_fail_is_left() {
        let operations: Vec<_> = (0..97).map(|at| Operation { kind: Kind::Read, at, len: 1, arg: 0 }).collect();
        let needed = |rest: &[Operation]| [3, 50, 96].iter().all(|at| rest.iter().any(|o| o.at == *at));
        let short = minimal(operations, needed);
        assert_eq!(short.iter().map(|o| o.at).collect::<Vec<_>>(), [3, 50, 96]);
    }
}
