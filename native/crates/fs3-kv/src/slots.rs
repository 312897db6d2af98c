//! Entries by number, and two orders of them from the least to the most recently used: all of the node's, and those of
//! each namespace.

use crate::types::Entry;

/// No entry.
pub const NONE: u32 = u32::MAX;

/// Which order.
#[derive(Clone, Copy)]
pub enum Order {
    Node = 0,
    Namespace = 1,
}

#[derive(Clone, Copy)]
struct Links {
    older: u32,
    newer: u32,
}

const APART: Links = Links { older: NONE, newer: NONE };

struct Slot {
    entry: Option<Entry>,
    links: [Links; 2],
}

/// Both ends of an order.
#[derive(Clone, Copy)]
pub struct Ends {
    pub oldest: u32,
    pub newest: u32,
}

impl Default for Ends {
    fn default() -> Self {
        Self { oldest: NONE, newest: NONE }
    }
}

/// All entries of a node.
#[derive(Default)]
pub struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

impl Slots {
    /// Keep an entry; its number. `None` when there are as many as there are numbers.
    pub fn insert(&mut self, entry: Entry) -> Option<u32> {
        if let Some(at) = self.free.pop() {
            self.slots[at as usize].entry = Some(entry);
            return Some(at);
        }
        let at = u32::try_from(self.slots.len()).ok().filter(|at| *at != NONE)?;
        self.slots.push(Slot { entry: Some(entry), links: [APART; 2] });
        Some(at)
    }

    /// Take an entry out that is in no order any more.
    pub fn take(&mut self, at: u32) -> Entry {
        self.free.push(at);
        self.slots[at as usize].entry.take().expect("a number in use has its entry")
    }

    pub fn entry(&self, at: u32) -> &Entry {
        self.slots[at as usize].entry.as_ref().expect("a number in use has its entry")
    }

    pub fn entry_mut(&mut self, at: u32) -> &mut Entry {
        self.slots[at as usize].entry.as_mut().expect("a number in use has its entry")
    }

    /// The entry of a number that may be free.
    pub fn get(&self, at: u32) -> Option<&Entry> {
        self.slots.get(at as usize)?.entry.as_ref()
    }

    /// Numbers go up to here.
    pub fn end(&self) -> u32 {
        self.slots.len() as u32
    }

    /// Make it the most recently used one.
    pub fn append(&mut self, order: Order, ends: &mut Ends, at: u32) {
        self.slots[at as usize].links[order as usize] = Links { older: ends.newest, newer: NONE };
        match ends.newest {
            NONE => ends.oldest = at,
            last => self.slots[last as usize].links[order as usize].newer = at,
        }
        ends.newest = at;
    }

    pub fn unlink(&mut self, order: Order, ends: &mut Ends, at: u32) {
        let Links { older, newer } = std::mem::replace(&mut self.slots[at as usize].links[order as usize], APART);
        match older {
            NONE => ends.oldest = newer,
            older => self.slots[older as usize].links[order as usize].newer = newer,
        }
        match newer {
            NONE => ends.newest = older,
            newer => self.slots[newer as usize].links[order as usize].older = older,
        }
    }
}
