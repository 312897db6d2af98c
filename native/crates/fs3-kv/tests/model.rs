//! The cache against a plain map that never forgets: what is found is always the newest value.

use std::collections::HashMap;

use bytes::Bytes;
use fs3_core::Region;
use fs3_kv::{Cache, Done, Key, Limits, Namespace, Put, PutId, Refused, Value};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Put {
        key: u8,
        bytes: usize,
    },
    /// A put that was sent when the last one was, and arrives now.
    LatePut {
        key: u8,
        age: u64,
    },
    Get {
        key: u8,
    },
    Remove {
        key: u8,
    },
    Clear {
        target: u64,
    },
    Evict {
        keep_bytes: u64,
    },
    EvictMemory {
        bytes: u64,
    },
    Wait {
        ms: u64,
    },
    Sweep,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let key = 0..40u8;
    let step = prop_oneof![
        6 => (key.clone(), 0..400usize).prop_map(|(key, bytes)| Step::Put { key, bytes }),
        2 => (key.clone(), 1..30u64).prop_map(|(key, age)| Step::LatePut { key, age }),
        6 => key.clone().prop_map(|key| Step::Get { key }),
        1 => key.prop_map(|key| Step::Remove { key }),
        1 => (0..3u64).prop_map(|target| Step::Clear { target }),
        1 => (0..3000u64).prop_map(|keep_bytes| Step::Evict { keep_bytes }),
        1 => (0..3000u64).prop_map(|bytes| Step::EvictMemory { bytes }),
        1 => (0..80u64).prop_map(|ms| Step::Wait { ms }),
        1 => Just(Step::Sweep),
    ];
    prop::collection::vec(step, 1..300)
}

const SPACE: u64 = 5;

/// Few addresses, so that keys collide.
fn name(key: &[u8; 1]) -> Key<'_> {
    Key { target: u64::from(key[0] % 3), namespace: SPACE, address: u128::from(key[0] % 30), key, piece: 0 }
}

struct Trial {
    cache: Cache,
    /// The number of the newest put or removal that was done, by key, and whether it was a put.
    newest: HashMap<u8, (u64, bool)>,
    sequence: u64,
    now_ms: u64,
}

impl Trial {
    fn put(&mut self, key: u8, sequence: u64, bytes: usize) -> Result<Done, Refused> {
        let names = [key];
        let name = name(&names);
        let namespace = Namespace { id: SPACE, share_bytes: 1500, ttl_ms: 100, generation: 1 };
        // The value says by which put it came.
        let mut data = sequence.to_le_bytes().to_vec();
        data.resize(8 + bytes, 0);
        let value = Value { held_bytes: data.len() as u64, data: Region::from_vec(data), crcs: Bytes::new() };
        let epoch = self.cache.epoch(name.target);
        let id = PutId { writer: 3, sequence };
        let total = value.data.len() as u64;
        self.cache.put(Put { key: name, namespace, epoch, id, total, value }, self.now_ms)
    }

    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Put { key, bytes } => {
                self.sequence += 1;
                match self.put(key, self.sequence, bytes) {
                    Ok(done) => {
                        prop_assert_eq!(done, Done::Applied);
                        self.newest.insert(key, (self.sequence, true));
                    }
                    Err(error) => prop_assert_eq!(error, Refused::TooLarge),
                }
            }
            Step::LatePut { key, age } => {
                let sequence = self.sequence.saturating_sub(age);
                let newest = self.newest.get(&key).map_or(0, |newest| newest.0);
                let done = self.put(key, sequence, 10);
                if done == Ok(Done::Applied) {
                    prop_assert!(sequence > newest, "put {} of key {} came after {}", sequence, key, newest);
                    self.newest.insert(key, (sequence, true));
                }
            }
            Step::Get { key } => {
                let names = [key];
                if let Some(found) = self.cache.get(&name(&names), true, self.now_ms) {
                    let sequence = u64::from_le_bytes(found.value.data[..8].try_into().unwrap());
                    prop_assert_eq!(self.newest.get(&key), Some(&(sequence, true)));
                    prop_assert_eq!(found.id.sequence, sequence);
                }
            }
            Step::Remove { key } => {
                self.sequence += 1;
                let id = PutId { writer: 3, sequence: self.sequence };
                let names = [key];
                self.cache.remove(&name(&names), id, self.now_ms);
                self.newest.insert(key, (self.sequence, false));
            }
            Step::Clear { target } => self.cache.clear_target(target, self.now_ms),
            Step::Evict { keep_bytes } => {
                self.cache.evict(SPACE, keep_bytes, self.now_ms);
                prop_assert!(self.cache.namespace_stats(SPACE).bytes <= keep_bytes);
            }
            Step::EvictMemory { bytes } => self.cache.evict_memory(bytes, self.now_ms),
            Step::Wait { ms } => self.now_ms += ms,
            Step::Sweep => self.cache.sweep(1000, self.now_ms),
        }
        Ok(())
    }

    /// The counters are those of the entries that a listing shows.
    fn check(&self) -> Result<(), TestCaseError> {
        let stats = self.cache.namespace_stats(SPACE);
        let listed = self.cache.list(SPACE, b"", 0, usize::MAX, 0).entries;
        prop_assert_eq!(stats.entries, listed.len() as u64);
        prop_assert_eq!(stats.bytes, listed.iter().map(|entry| entry.total).sum::<u64>());
        prop_assert!(stats.bytes <= 3 * 1500, "{} bytes", stats.bytes);
        prop_assert!(self.cache.stats().memory_bytes <= 8000);
        Ok(())
    }
}

proptest! {
    #[test]
    fn what_is_found_is_what_was_put_last(steps in steps()) {
        let cache = Cache::new(Limits { memory_bytes: 8000 });
        let mut trial = Trial { cache, newest: HashMap::new(), sequence: 100, now_ms: 0 };
        for step in steps {
            trial.step(step)?;
            trial.check()?;
        }
    }
}
