//! Bytes of a chunk as registers with unique values.
//!
//! The borders of all operations cut the chunk into pieces that are written and read as wholes: registers. All operations
//! on one value form a cluster. From the first end to the last beginning of a cluster's operations, when they are in that
//! order, the register must have held the value: the cluster's zone. Zones of two values must not overlap, and no
//! acknowledged update may lie wholly inside another value's zone (Gibbons and Korach, 1997). Zeros are not unique
//! (removals, truncations, gaps); they are checked against the zones of the values.

use std::collections::{BTreeMap, BTreeSet};

use crate::check::{Property, describe, end};
use crate::history::{Kind, Loss, Operation, Outcome, Run};

/// Registers of one chunk that are looked at between two losses; each costs a pass over all operations.
const REGISTERS_MAX: usize = 500;

type Found = Option<(Property, String)>;

/// Check every register of the chunk.
pub(crate) fn check(operations: &[&Operation], losses: &[(u64, Loss)]) -> Found {
    if let Some(found) = integrity(operations) {
        return Some(found);
    }
    // A loss may take back what was only read, and a power loss what was acknowledged: reads of different lives are not
    // compared with each other, nor with updates that a power loss may have taken.
    let (mut from, mut safe) = (0, 0);
    for (life, (at, loss)) in losses.iter().copied().chain([(u64::MAX, Loss::Processes)]).enumerate() {
        let alive: Vec<&Operation> = operations.iter().copied().filter(|o| lives_in(o, from, at, safe)).collect();
        // Without a read nothing contradicts anything.
        let reads = alive.iter().any(|o| matches!(o.kind, Kind::Read { .. }));
        if let Some(found) = reads.then(|| registers(&alive, life)).flatten() {
            return Some(found);
        }
        from = at;
        if loss == Loss::Power {
            safe = at;
        }
    }
    None
}

fn lives_in(o: &Operation, from: u64, until: u64, safe: u64) -> bool {
    match o.kind {
        Kind::Read { .. } => o.invoked_ns >= from && (end(o) < until || until == u64::MAX),
        // The acknowledgement of a write that was lost may have been on its way when the power was lost.
        Kind::Write { .. } => o.invoked_ns >= safe,
        _ => end(o) >= safe,
    }
}

/// Reads show what was written there, by writes that had begun and were not refused.
fn integrity(operations: &[&Operation]) -> Found {
    let writes = writes(operations);
    for read in operations.iter().filter(|o| o.outcome == Outcome::Ok) {
        let Kind::Read { seen, .. } = &read.kind else { continue };
        for run in seen.iter().filter(|run| run.value != 0) {
            let Some(write) = writes.get(&run.value) else {
                let text = format!("{} shows {}, which nobody wrote to this chunk", describe(read), run.value);
                return Some((Property::Integrity, text));
            };
            let Kind::Write { offset, length, .. } = write.kind else { continue };
            let wrong = if run.offset < offset || run.offset + run.length > offset + length {
                "written elsewhere"
            } else if write.invoked_ns > end(read) {
                "not yet written"
            } else if write.outcome == Outcome::Failed {
                "which was refused"
            } else {
                continue;
            };
            let text = format!("{} shows bytes {wrong}: {}", describe(read), describe(write));
            return Some((Property::Integrity, text));
        }
    }
    None
}

fn writes<'a>(operations: &[&'a Operation]) -> BTreeMap<u64, &'a Operation> {
    let value = |o: &&'a Operation| if let Kind::Write { value, .. } = o.kind { Some((value, *o)) } else { None };
    operations.iter().filter_map(value).collect()
}

/// Check the registers of one life; of very many only every so many-th, in each life others.
fn registers(operations: &[&Operation], life: usize) -> Found {
    let mut borders = BTreeSet::new();
    for o in operations {
        match &o.kind {
            Kind::Write { offset, length, .. } | Kind::Punch { offset, length } => {
                borders.extend([*offset, offset + length]);
            }
            Kind::Truncate { length } => borders.extend([*length]),
            Kind::Read { offset, length, seen } => {
                borders.extend([*offset, offset + length]);
                borders.extend(seen.iter().map(|r| r.offset));
            }
            Kind::Remove | Kind::Sync => {}
        }
    }
    let mut borders: Vec<u32> = borders.into_iter().collect();
    borders.pop();
    let step = borders.len().div_ceil(REGISTERS_MAX).max(1);
    borders.into_iter().skip(life % step).step_by(step).find_map(|at| register(operations, at))
}

/// All that concerns the register that begins at a byte.
#[derive(Default)]
struct Register<'a> {
    clusters: BTreeMap<u64, Vec<&'a Operation>>,
    clears: Vec<&'a Operation>,
    zeros: Vec<&'a Operation>,
}

/// What a read showed at a byte; its runs are in order.
fn value_at(seen: &[Run], at: u32) -> Option<u64> {
    let run = &seen[seen.partition_point(|r| r.offset <= at).checked_sub(1)?];
    (at < run.offset + run.length).then_some(run.value)
}

/// Where the register held one value without interruption, from the end of `first` to the beginning of `last`.
struct Zone<'a> {
    value: u64,
    from: u64,
    to: u64,
    first: &'a Operation,
    last: &'a Operation,
}

fn register(operations: &[&Operation], at: u32) -> Found {
    let mut all = Register::default();
    for o in operations.iter().filter(|o| o.outcome != Outcome::Failed) {
        match &o.kind {
            Kind::Write { offset, length, value } if (*offset..offset + length).contains(&at) => {
                all.clusters.entry(*value).or_default().push(o);
            }
            Kind::Truncate { length } if *length <= at => all.clears.push(o),
            Kind::Punch { offset, length } if (*offset..offset + length).contains(&at) => all.clears.push(o),
            Kind::Remove => all.clears.push(o),
            Kind::Read { seen, .. } if o.outcome == Outcome::Ok => match value_at(seen, at) {
                Some(0) => all.zeros.push(o),
                Some(value) => all.clusters.entry(value).or_default().push(o),
                None => {}
            },
            _ => {}
        }
    }
    let mut zones: Vec<Zone> = all.clusters.iter().filter_map(|(value, cluster)| zone(*value, cluster)).collect();
    zones.sort_by_key(|z| z.from);
    if let Some(pair) = zones.windows(2).find(|pair| pair[1].from < pair[0].to) {
        return Some(collision(&pair[0], &pair[1], at));
    }
    let inside = |value: u64, o: &Operation| {
        let i = zones.partition_point(|z| z.from < o.invoked_ns);
        zones[..i].last().filter(|z| z.value != value && end(o) < z.to)
    };
    let mut others = all.clusters.iter().flat_map(|(value, cluster)| cluster.iter().map(|o| (*value, *o)));
    if let Some((o, zone)) = others.find_map(|(value, o)| Some((o, inside(value, o)?))) {
        return Some(interrupted(zone, o, at));
    }
    if let Some((o, zone)) = all.zeros.iter().find_map(|o| Some((*o, inside(0, o)?))) {
        return Some(interrupted(zone, o, at));
    }
    if let Some((o, zone)) = all.clears.iter().find_map(|o| Some((*o, inside(0, o)?))) {
        let text = format!("byte {at}: {} was shown after {}", describe(zone.last), describe(o));
        return Some((Property::Resurrected, text));
    }
    all.zeros.iter().find_map(|read| unexplained_zero(&all, read, at))
}

/// Zeros where a value was acknowledged or seen, and nothing that may have cleared it.
fn unexplained_zero(all: &Register, read: &Operation, at: u32) -> Found {
    let before = all.clusters.values().flatten().filter(|o| end(o) < read.invoked_ns).max_by_key(|o| o.invoked_ns)?;
    // A read's value was in place when the read began; whatever cleared it ended after that.
    if all.clears.iter().any(|c| end(c) > before.invoked_ns && c.invoked_ns < end(read)) {
        return None;
    }
    let shown_only = matches!(before.kind, Kind::Read { .. });
    let property = if shown_only { Property::Stale } else { Property::Lost };
    Some((property, format!("byte {at}: {} is missing in {}", describe(before), describe(read))))
}

fn zone<'a>(value: u64, cluster: &[&'a Operation]) -> Option<Zone<'a>> {
    let first = cluster.iter().min_by_key(|o| end(o))?;
    let last = cluster.iter().max_by_key(|o| o.invoked_ns)?;
    let zone = Zone { value, from: end(first), to: last.invoked_ns, first, last };
    (zone.from < zone.to).then_some(zone)
}

fn collision(a: &Zone, b: &Zone, at: u32) -> (Property, String) {
    // The one that came to stay first is the one that came back.
    let (old, new) = if a.last.invoked_ns >= b.last.invoked_ns { (a, b) } else { (b, a) };
    let text = format!("byte {at}: {}, then {}, then {}", describe(new.first), describe(new.last), describe(old.last));
    (reappearance(old, new.first), text)
}

fn interrupted(zone: &Zone, by: &Operation, at: u32) -> (Property, String) {
    let text = format!("byte {at}: {}, then {}, then {}", describe(zone.first), describe(by), describe(zone.last));
    (reappearance(zone, by), text)
}

/// Why a value is shown after another was in place.
fn reappearance(old: &Zone, new: &Operation) -> Property {
    match (old.last.version, new.version) {
        (Some(old), Some(new)) if old > new => {
            // Under a newer version: the old write was applied on top again, or the new one is not in it.
            Property::Repeated
        }
        (Some(_), Some(_)) => Property::Stale,
        _ if matches!(new.kind, Kind::Write { .. }) => Property::Lost,
        _ => Property::Stale,
    }
}
