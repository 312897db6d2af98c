//! Draws operations.

use crate::draw::Draw;
use crate::mapping::PAGE;
use crate::operation::{Kind, Operation, Reopen};

/// How often each kind comes, in parts of their sum.
const WEIGHTS: [(Kind, u64); 19] = [
    (Kind::Read, 14),
    (Kind::Write, 18),
    (Kind::Append, 4),
    (Kind::MapRead, 10),
    (Kind::MapWrite, 14),
    (Kind::MapSync, 4),
    (Kind::DirectRead, 4),
    (Kind::DirectWrite, 4),
    (Kind::Truncate, 5),
    (Kind::Allocate, 2),
    (Kind::Punch, 4),
    (Kind::Zero, 3),
    (Kind::Copy, 4),
    (Kind::Seek, 2),
    (Kind::Sync, 2),
    (Kind::Forget, 2),
    (Kind::Reopen, 2),
    (Kind::Switch, 8),
    (Kind::Whole, 1),
];

/// What Linux does to a part of a page of a FUSE file without looking at what is written to the rest through mappings
/// meanwhile: an older copy of the page may be written back right behind it.
const PAGEWISE: [Kind; 3] = [Kind::Punch, Kind::Zero, Kind::Copy];

/// What may be done where.
#[derive(Clone, Debug)]
pub(crate) struct Bounds {
    /// Kinds that are left out.
    pub without: Vec<Kind>,
    /// First and last position that may be touched.
    pub start: u64,
    pub end: u64,
    /// Most bytes of one operation.
    pub oplen: u64,
    /// Others use the pages at the borders: what the kernel does by whole pages stays off them.
    pub shared: bool,
}

/// Random operations from a seed.
pub(crate) struct Plan {
    draw: Draw,
    bounds: Bounds,
}

impl Plan {
    pub fn new(seed: u64, bounds: Bounds) -> Self {
        Self { draw: Draw::new(seed), bounds }
    }

    /// The next operation; `stamp` is its own, `end` that of the file now.
    pub fn next(&mut self, stamp: u64, end: u64) -> Operation {
        loop {
            let kind = self.kind();
            if let Some(operation) = self.operation(kind, stamp, end) {
                return operation;
            }
        }
    }

    fn kind(&mut self) -> Kind {
        let mut place = self.draw.below(WEIGHTS.iter().map(|(_, weight)| weight).sum());
        for (kind, weight) in WEIGHTS {
            if place < weight {
                return kind;
            }
            place -= weight;
        }
        Kind::Whole
    }

    /// `None` when it is left out or does not fit.
    fn operation(&mut self, kind: Kind, stamp: u64, end: u64) -> Option<Operation> {
        if self.bounds.without.contains(&kind) {
            return None;
        }
        let whole_pages = self.bounds.shared && PAGEWISE.contains(&kind);
        let (at, len) = match kind {
            Kind::DirectRead | Kind::DirectWrite => self.pages(),
            _ if whole_pages => self.pages(),
            _ => self.range(end),
        }?;
        let arg = match kind {
            Kind::Write | Kind::MapWrite | Kind::MapSync | Kind::DirectWrite => stamp,
            Kind::Append if end + len <= self.bounds.end => stamp,
            Kind::Append => return None,
            Kind::Truncate => u64::from(self.draw.one_in(4)),
            Kind::Allocate | Kind::Zero => u64::from(self.bounds.shared || self.draw.one_in(2)),
            Kind::Copy => {
                let (to, _) = if whole_pages { self.pages() } else { self.range(end) }?;
                self.apart(to, at, len)?
            }
            Kind::Sync => self.draw.below(3),
            Kind::Reopen | Kind::Switch => self.draw.below(Reopen::ALL + 1),
            _ => 0,
        };
        Some(Operation { kind, at, len, arg })
    }

    /// `to`, if a copy of `from..from+len` to there stays in bounds and does not overlap its source.
    fn apart(&self, to: u64, from: u64, len: u64) -> Option<u64> {
        let fits = to + len <= self.bounds.end - if self.bounds.shared { PAGE } else { 0 };
        (fits && to.abs_diff(from) >= len).then_some(to)
    }

    /// A few bytes, some pages, or many bytes.
    fn len(&mut self) -> u64 {
        let oplen = self.bounds.oplen;
        match self.draw.below(4) {
            0 => 1 + self.draw.below(64),
            1 => 1 + self.draw.below(PAGE),
            2 => PAGE * (1 + self.draw.below(oplen / PAGE)),
            _ => 1 + self.draw.below(oplen),
        }
    }

    /// Anywhere, near the end of the file, or at the border of a page.
    fn range(&mut self, end: u64) -> Option<(u64, u64)> {
        let (first, last) = (self.bounds.start, self.bounds.end);
        let len = self.len();
        let anywhere = first + self.draw.below(last - first);
        let at = match self.draw.below(6) {
            0 => end.saturating_sub(self.draw.below(2 * PAGE)).max(first),
            1 => (anywhere / PAGE * PAGE).max(first),
            2 => (anywhere.div_ceil(PAGE) * PAGE).saturating_sub(len).max(first),
            3 | 4 if end > first => first + (anywhere - first) % (end - first),
            _ => anywhere,
        };
        (at < last).then(|| (at, len.min(last - at)))
    }

    /// Whole pages inside the bounds.
    fn pages(&mut self) -> Option<(u64, u64)> {
        let first = self.bounds.start.div_ceil(PAGE);
        let count = (self.bounds.end / PAGE).checked_sub(first).filter(|pages| *pages > 0)?;
        let at = self.draw.below(count);
        let len = 1 + self.draw.below((count - at).min(self.bounds.oplen / PAGE));
        Some(((first + at) * PAGE, len * PAGE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds(shared: bool) -> Bounds {
        Bounds { without: vec![Kind::Zero], start: 1000, end: 301_000, oplen: 50_000, shared }
    }

    #[test]
    fn operations_stay_in_bounds_and_follow_from_the_seed() {
        for shared in [false, true] {
            let draw = |seed| {
                let mut plan = Plan::new(seed, bounds(shared));
                (0..20_000).map(|stamp| plan.next(stamp, 1000 + stamp * 15 % 300_000)).collect::<Vec<_>>()
            };
            let operations = draw(5);
            assert_eq!(operations, draw(5));
            assert_ne!(operations, draw(6));
            for o in &operations {
                assert!(1000 <= o.at && o.at + o.len <= 301_000 && o.kind != Kind::Zero, "{o}");
                if o.kind == Kind::Copy {
                    assert!(o.arg + o.len <= 301_000 && o.arg.abs_diff(o.at) >= o.len, "{o}");
                }
                if matches!(o.kind, Kind::DirectRead | Kind::DirectWrite) || (shared && PAGEWISE.contains(&o.kind)) {
                    assert!(o.at % PAGE == 0 && o.len % PAGE == 0, "{o}");
                }
            }
            for (kind, _) in WEIGHTS.iter().filter(|(kind, _)| *kind != Kind::Zero) {
                assert!(operations.iter().any(|o| o.kind == *kind), "{kind:?} never comes");
            }
        }
    }
}
