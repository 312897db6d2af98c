//! The cache by examples.

use bytes::Bytes;
use fs3_core::Region;
use fs3_kv::{Cache, Done, Key, Limits, Namespace, Put, PutId, Refused, Value};

const SPACE: u64 = 77;

fn value(bytes: usize) -> Value {
    Value { data: Region::from_vec(vec![7; bytes]), crcs: Bytes::new(), held_bytes: bytes as u64 }
}

fn key(address: u128, key: &[u8]) -> Key<'_> {
    Key { target: 1, namespace: SPACE, address, key, piece: 0 }
}

struct Trial {
    cache: Cache,
    namespace: Namespace,
    now_ms: u64,
    sequence: u64,
}

impl Trial {
    fn new(memory_bytes: u64, share_bytes: u64) -> Self {
        let namespace = Namespace { id: SPACE, share_bytes, ttl_ms: 0, generation: 1 };
        Self { cache: Cache::new(Limits { memory_bytes }), namespace, now_ms: 0, sequence: 0 }
    }

    fn put_as(&mut self, key: Key<'_>, bytes: usize, writer: u64, sequence: u64) -> Result<Done, Refused> {
        let epoch = self.cache.epoch(key.target);
        let id = PutId { writer, sequence };
        let put = Put { key, namespace: self.namespace, epoch, id, total: bytes as u64, value: value(bytes) };
        self.cache.put(put, self.now_ms)
    }

    fn put(&mut self, number: u128, bytes: usize) -> Result<Done, Refused> {
        self.sequence += 1;
        self.put_as(key(number, &number.to_be_bytes()), bytes, 1, self.sequence)
    }

    fn has(&mut self, number: u128) -> bool {
        self.cache.get(&key(number, &number.to_be_bytes()), true, self.now_ms).is_some()
    }

    fn bytes(&self) -> u64 {
        self.cache.namespace_stats(SPACE).bytes
    }
}

#[test]
fn what_was_put_is_found_until_it_is_removed() {
    let mut t = Trial::new(1 << 20, 0);
    assert_eq!(t.put(5, 100), Ok(Done::Applied));
    let found = t.cache.get(&key(5, &5u128.to_be_bytes()), true, 0).unwrap();
    assert_eq!((found.value.data.len(), found.total, found.id.sequence), (100, 100, 1));
    assert!(!t.has(6));
    let id = PutId { writer: 1, sequence: 2 };
    assert_eq!(t.cache.remove(&key(5, &5u128.to_be_bytes()), id, 0), Some(100));
    assert!(!t.has(5));
    let stats = t.cache.namespace_stats(SPACE);
    assert_eq!((stats.hits, stats.misses, stats.puts, stats.removed, stats.entries, stats.bytes), (1, 2, 1, 1, 0, 0));
    assert_eq!(t.cache.stats().memory_bytes, 0);
}

#[test]
fn another_key_of_the_same_address_misses_and_its_put_replaces() {
    let mut t = Trial::new(1 << 20, 0);
    t.put_as(key(9, b"one"), 10, 1, 1).unwrap();
    assert!(t.cache.get(&key(9, b"two"), true, 0).is_none());
    assert!(t.cache.get(&Key { namespace: SPACE + 1, ..key(9, b"one") }, true, 0).is_none());
    assert!(t.cache.get(&Key { piece: 1, ..key(9, b"one") }, true, 0).is_none());
    t.put_as(key(9, b"two"), 20, 1, 2).unwrap();
    assert!(t.cache.get(&key(9, b"one"), true, 0).is_none());
    assert_eq!(t.cache.get(&key(9, b"two"), true, 0).unwrap().total, 20);
    assert_eq!(t.cache.namespace_stats(SPACE).collisions, 1);
}

#[test]
fn what_was_used_the_longest_ago_makes_room_within_the_capacity() {
    let mut t = Trial::new(1 << 30, 64_000);
    for number in 0..64 {
        t.put(number, 1000).unwrap();
    }
    assert_eq!(t.bytes(), 64_000);
    assert!(t.has(0) && t.has(1));
    t.put(64, 1000).unwrap();
    assert!(t.bytes() <= 63_000);
    assert!(t.has(0) && t.has(1) && t.has(64) && !t.has(2) && !t.has(3));
    assert_eq!(t.cache.namespace_stats(SPACE).evicted_capacity, 2);
}

#[test]
fn the_node_keeps_to_its_memory_whatever_namespaces_may_hold() {
    let mut t = Trial::new(100_000, 0);
    for number in 0..1000 {
        t.put(number, 1000).unwrap();
        assert!(t.cache.stats().memory_bytes <= 100_000);
    }
    assert!(t.has(999) && !t.has(0));
    assert!(t.cache.namespace_stats(SPACE).evicted_memory > 900);
    assert_eq!(t.put(1001, 200_000), Err(Refused::TooLarge));
    t.cache.evict_memory(50_000, 0);
    assert!(t.cache.stats().memory_bytes <= 50_000);
}

#[test]
fn a_value_that_does_not_fit_takes_what_it_replaces_along() {
    let mut t = Trial::new(1 << 20, 5000);
    t.put(1, 1000).unwrap();
    assert_eq!(t.put(1, 6000), Err(Refused::TooLarge));
    assert!(!t.has(1), "the older value must not be found after a newer one was put");
}

#[test]
fn entries_expire_and_new_settings_of_a_namespace_hold_at_once() {
    let mut t = Trial::new(1 << 20, 0);
    t.namespace.ttl_ms = 1000;
    t.put(1, 10).unwrap();
    t.now_ms = 999;
    assert!(t.has(1));
    t.now_ms = 1000;
    assert!(!t.has(1));
    t.put(2, 10).unwrap();
    t.now_ms = 5000;
    t.cache.sweep(100, t.now_ms);
    let stats = t.cache.namespace_stats(SPACE);
    assert_eq!((stats.expired, stats.entries), (2, 0));
    t.put(3, 10).unwrap();
    t.cache.configure(Namespace { ttl_ms: 1, generation: 0, ..t.namespace }, t.now_ms);
    t.now_ms += 10;
    assert!(t.has(3), "settings of an older generation do not count");
    t.cache.configure(Namespace { ttl_ms: 1, generation: 2, ..t.namespace }, t.now_ms);
    assert!(!t.has(3));
}

#[test]
fn a_target_that_stops_serving_forgets_and_refuses_what_was_admitted_before() {
    let mut t = Trial::new(1 << 20, 0);
    t.put(1, 10).unwrap();
    let other = Key { target: 2, ..key(1, b"x") };
    t.put_as(other, 10, 1, 50).unwrap();
    let epoch = t.cache.epoch(1);
    t.cache.clear_target(1, 0);
    assert!(!t.has(1) && t.cache.get(&other, true, 0).is_some());
    let id = PutId { writer: 1, sequence: 60 };
    let put = Put { key: key(1, b"k"), namespace: t.namespace, epoch, id, total: 1, value: value(1) };
    assert_eq!(t.cache.put(put, 0), Err(Refused::Moved));
    assert_eq!(t.cache.namespace_stats(SPACE).lost, 1);
}

#[test]
fn a_late_put_never_replaces_or_follows_a_newer_one_of_its_client() {
    let mut t = Trial::new(1 << 20, 0);
    t.put_as(key(1, b"k"), 20, 1, 5).unwrap();
    assert_eq!(t.put_as(key(1, b"k"), 10, 1, 4), Ok(Done::Superseded));
    assert_eq!(t.cache.get(&key(1, b"k"), true, 0).unwrap().total, 20);
    t.cache.evict(SPACE, 0, 0);
    assert_eq!(t.put_as(key(1, b"k"), 10, 1, 4), Err(Refused::Late), "also when the newer one was evicted");
    assert_eq!(t.cache.remove(&key(1, b"k"), PutId { writer: 1, sequence: 8 }, 0), None);
    assert_eq!(t.put_as(key(1, b"k"), 10, 1, 7), Err(Refused::Late), "or removed");
    assert_eq!(t.put_as(key(1, b"k"), 10, 2, 1), Ok(Done::Applied), "other clients have numbers of their own");
    assert_eq!(t.cache.remove(&key(1, b"k"), PutId { writer: 2, sequence: 1 }, 0), Some(10));
}

#[test]
fn a_listing_shows_values_by_prefix_page_by_page() {
    let mut t = Trial::new(1 << 20, 0);
    for number in 0..10u128 {
        t.put_as(key(number, format!("a{number}").as_bytes()), 10, 1, number as u64 + 1).unwrap();
    }
    t.put_as(key(100, b"b"), 10, 1, 90).unwrap();
    t.put_as(Key { piece: 1, ..key(101, b"a1") }, 10, 1, 91).unwrap();
    let (mut found, mut after) = (Vec::new(), Some(0));
    while let Some(from) = after {
        let page = t.cache.list(SPACE, b"a", from, 3, 5);
        assert!(page.entries.len() <= 3);
        found.extend(page.entries.into_iter().map(|entry| entry.key));
        after = page.next;
    }
    found.sort();
    assert_eq!(found, (0..10).map(|n| format!("a{n}").into_bytes().into()).collect::<Vec<Box<[u8]>>>());
}

#[test]
fn evicting_a_part_takes_the_oldest() {
    let mut t = Trial::new(1 << 20, 0);
    for number in 0..10 {
        t.put(number, 100).unwrap();
    }
    assert_eq!(t.cache.evict(SPACE, 500, 0), (5, 500));
    assert!(!t.has(4) && t.has(5));
    assert_eq!(t.cache.evict(SPACE, 0, 0), (5, 500));
    assert_eq!(t.cache.take_gone().len(), 10);
}
