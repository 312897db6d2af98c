//! The order of update versions against real time.

use std::collections::BTreeMap;

use crate::check::{Property, describe, end};
use crate::history::{Kind, Loss, Operation, Outcome};

/// Update versions of acknowledged updates are unique and grow in real time; no read shows an older version than one
/// that was shown or acknowledged before it began; reads of one version agree. A loss of everything may take back what
/// was only read (processes) or not synced (power): then the floor begins anew.
pub(crate) fn check(operations: &[&Operation], losses: &[(u64, Loss)]) -> Option<(Property, String)> {
    let known: Vec<&Operation> = operations.iter().copied().filter(|o| end(o) < u64::MAX).collect();
    // After a power loss a version may be given again.
    let repeats = losses.iter().any(|(_, loss)| *loss == Loss::Power);
    let unique = if repeats { None } else { one_update_per_version(&known) };
    unique.or_else(|| grows(&known, losses)).or_else(|| one_content(&known, losses))
}

fn one_update_per_version(known: &[&Operation]) -> Option<(Property, String)> {
    let mut updates: BTreeMap<u64, &Operation> = BTreeMap::new();
    for o in known.iter().filter(|o| is_update(o)) {
        let Some(version) = o.version else { continue };
        if let Some(other) = updates.insert(version, o) {
            let text = format!("two updates have one version: {}; {}", describe(other), describe(o));
            return Some((Property::Order, text));
        }
    }
    None
}

fn grows(known: &[&Operation], losses: &[(u64, Loss)]) -> Option<(Property, String)> {
    let mut ends: Vec<(u64, Step)> = losses.iter().map(|(at, loss)| (*at, Step::Loss(*loss))).collect();
    ends.extend(known.iter().map(|o| (end(o), Step::Ended(o))));
    ends.sort_by_key(|(at, _)| *at);
    let mut begins: Vec<&Operation> = known.iter().copied().filter(|o| o.version.is_some()).collect();
    begins.sort_by_key(|o| o.invoked_ns);
    // What was acknowledged, and what was acknowledged or read, by the time the next operation begins.
    let (mut acknowledged, mut floor): (Option<&Operation>, Option<&Operation>) = (None, None);
    let mut ended = ends.into_iter().peekable();
    for o in begins {
        while let Some((_, step)) = ended.next_if(|(at, _)| *at < o.invoked_ns) {
            match step {
                Step::Loss(Loss::Processes) => floor = acknowledged,
                Step::Loss(Loss::Power) => (acknowledged, floor) = (None, None),
                Step::Ended(e) => {
                    floor = newer(floor, e);
                    if is_update(e) {
                        acknowledged = newer(acknowledged, e);
                    }
                }
            }
        }
        let Some(before) = floor else { continue };
        let backwards = if is_update(o) { o.version <= before.version } else { o.version < before.version };
        // A dedupe record answers a write that took effect earlier than its last attempt, never before it began.
        if backwards {
            let text = format!("{} comes after {}", describe(o), describe(before));
            let stale = if is_update(o) { Property::Order } else { Property::Stale };
            return Some((stale, text));
        }
    }
    None
}

enum Step<'a> {
    Ended(&'a Operation),
    Loss(Loss),
}

fn newer<'a>(a: Option<&'a Operation>, b: &'a Operation) -> Option<&'a Operation> {
    if b.version.is_some() && a.is_none_or(|a| a.version < b.version) { Some(b) } else { a }
}

fn one_content(known: &[&Operation], losses: &[(u64, Loss)]) -> Option<(Property, String)> {
    let mut seen_of: BTreeMap<(usize, u64), Vec<&Operation>> = BTreeMap::new();
    for o in known {
        let (Kind::Read { seen, .. }, Some(version)) = (&o.kind, o.version) else { continue };
        let life = losses.iter().filter(|(at, _)| *at < o.invoked_ns).count();
        if losses.iter().any(|(at, _)| (o.invoked_ns..=end(o)).contains(at)) {
            continue;
        }
        let others = seen_of.entry((life, version)).or_default();
        for other in others.iter() {
            let Kind::Read { seen: theirs, .. } = &other.kind else { continue };
            let differ = |a: &crate::Run, b: &crate::Run| {
                a.offset < b.offset + b.length && b.offset < a.offset + a.length && a.value != b.value
            };
            if seen.iter().any(|a| theirs.iter().any(|b| differ(a, b))) {
                let text = format!("one version has two contents: {}; {}", describe(other), describe(o));
                return Some((Property::Order, text));
            }
        }
        // Each new read is compared with a few: enough to find a second content, and linear.
        if others.len() < 4 {
            others.push(o);
        }
    }
    None
}

pub(crate) fn is_update(o: &Operation) -> bool {
    o.outcome == Outcome::Ok && !matches!(o.kind, Kind::Read { .. } | Kind::Sync)
}
