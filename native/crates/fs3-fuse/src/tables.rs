//! Small fixed-size tables of what the kernel was told lately. A lost entry only costs a call.

use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A direct-mapped table whose entries expire. Keys that fall on one place replace each other.
pub(crate) struct Recent<V> {
    hasher: RandomState,
    entries: Mutex<Vec<Option<(u64, Instant, V)>>>,
    life: Duration,
}

impl<V: Copy> Recent<V> {
    /// A table of `places` (a power of two) whose entries count for `life`.
    pub fn new(places: usize, life: Duration) -> Self {
        assert!(places.is_power_of_two());
        Self { hasher: RandomState::new(), entries: Mutex::new(vec![None; places]), life }
    }

    fn place(&self, key: impl std::hash::Hash) -> (u64, usize) {
        let hash = self.hasher.hash_one(key);
        (hash, hash as usize)
    }

    pub fn put(&self, key: impl std::hash::Hash, value: V) {
        let (hash, place) = self.place(key);
        let mut entries = self.entries.lock();
        let mask = entries.len() - 1;
        entries[place & mask] = Some((hash, Instant::now(), value));
    }

    pub fn get(&self, key: impl std::hash::Hash) -> Option<V> {
        let (hash, place) = self.place(key);
        let entries = self.entries.lock();
        let (found, at, value) = entries[place & (entries.len() - 1)]?;
        (found == hash && at.elapsed() <= self.life).then_some(value)
    }

    pub fn remove(&self, key: impl std::hash::Hash) {
        let (hash, place) = self.place(key);
        let mut entries = self.entries.lock();
        let mask = entries.len() - 1;
        entries[place & mask].take_if(|(found, ..)| *found == hash);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_value_of_a_key_is_found_until_it_is_removed_or_too_old() {
        let table = Recent::new(64, Duration::from_secs(60));
        table.put((1u64, "a"), 5);
        table.put((1u64, "a"), 6);
        assert_eq!((table.get((1u64, "a")), table.get((2u64, "a"))), (Some(6), None));
        table.remove((2u64, "a"));
        table.remove((1u64, "a"));
        assert_eq!(table.get((1u64, "a")), None);
        let brief = Recent::new(1, Duration::ZERO);
        brief.put(1, 1);
        while brief.get(1).is_some() {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn colliding_keys_never_answer_for_each_other() {
        let table = Recent::new(1, Duration::from_secs(60));
        table.put(1, 10);
        table.put(2, 20);
        assert_eq!((table.get(1), table.get(2)), (None, Some(20)));
    }
}
