//! Requests that left nothing in the store by which a late copy of them would be known.

use std::collections::BTreeMap;

use fs3_core::{ClientId, Code};

use crate::types::Writer;

/// Answers that are remembered at least; at most twice as many.
const REMEMBERED: usize = 1 << 15;

/// The last answered request of every channel, for each subject. The oldest are forgotten when there are many.
#[derive(Debug)]
pub(crate) struct Answered<T> {
    young: BTreeMap<(T, ClientId, u32), u64>,
    old: BTreeMap<(T, ClientId, u32), u64>,
}

impl<T> Default for Answered<T> {
    fn default() -> Self {
        Self { young: BTreeMap::new(), old: BTreeMap::new() }
    }
}

impl<T: Ord + Copy> Answered<T> {
    /// Whether this very request was answered.
    ///
    /// # Errors
    /// `Superseded` when a later one of its channel was.
    pub fn has(&self, subject: T, writer: Writer) -> Result<bool, Code> {
        let key = (subject, writer.client, writer.channel);
        match self.young.get(&key).or_else(|| self.old.get(&key)) {
            Some(sequence) if *sequence > writer.sequence => Err(Code::Superseded),
            found => Ok(found == Some(&writer.sequence)),
        }
    }

    /// A request is answered now.
    pub fn note(&mut self, subject: T, writer: Writer) {
        if self.young.len() >= REMEMBERED {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert((subject, writer.client, writer.channel), writer.sequence);
    }

    pub fn clear(&mut self) {
        self.young.clear();
        self.old.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer(channel: u32, sequence: u64) -> Writer {
        Writer { client: ClientId([7; 16]), channel, sequence }
    }

    #[test]
    fn a_late_copy_is_known_and_an_earlier_request_is_superseded() {
        let mut answered = Answered::default();
        assert_eq!(answered.has(1, writer(0, 5)), Ok(false));
        answered.note(1, writer(0, 5));
        assert_eq!(answered.has(1, writer(0, 5)), Ok(true));
        assert_eq!(answered.has(1, writer(0, 4)), Err(Code::Superseded));
        assert_eq!(answered.has(1, writer(0, 6)), Ok(false));
        assert_eq!(answered.has(1, writer(1, 5)), Ok(false));
        assert_eq!(answered.has(2, writer(0, 5)), Ok(false));
        answered.clear();
        assert_eq!(answered.has(1, writer(0, 5)), Ok(false));
    }

    #[test]
    fn many_answers_take_bounded_memory_and_the_latest_stay() {
        let mut answered = Answered::default();
        let last = 5 * REMEMBERED as u32;
        (0..=last).for_each(|subject| answered.note(subject, writer(0, 1)));
        assert!(answered.young.len() + answered.old.len() <= 2 * REMEMBERED);
        let known = |subject| answered.has(subject, writer(0, 1)) == Ok(true);
        assert!((last - REMEMBERED as u32 + 1..=last).all(known));
        assert!(!known(0));
    }
}
