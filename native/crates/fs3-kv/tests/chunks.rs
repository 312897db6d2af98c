//! Which entries in the chunk store go, and when.

use fs3_kv::{ChunkIndex, ChunkKey, Namespace, Stored, Turn};

const MOST: usize = 1000;

fn key(index: u32) -> ChunkKey {
    ChunkKey { namespace: 7, index }
}

fn stored(bytes: u64, put_ms: u64) -> Stored {
    Stored { bytes, held_bytes: bytes.next_power_of_two(), put_ms }
}

fn settings(share_bytes: u64, ttl_ms: u64, generation: u64) -> Namespace {
    Namespace { id: 7, share_bytes, ttl_ms, generation }
}

fn put(index: &mut ChunkIndex, number: u32, bytes: u64, now_ms: u64) {
    assert_eq!(index.begin_put(key(number)), Turn::Go);
    _ = index.end_put(key(number), Some(stored(bytes, now_ms)));
}

#[test]
fn a_namespace_beyond_its_share_comes_down_to_95_percent_with_the_longest_unused_first() {
    let mut index = ChunkIndex::default();
    index.configure(settings(1000, 0, 1));
    for number in 0..100 {
        put(&mut index, number, 10, u64::from(number));
    }
    assert_eq!(index.surplus(MOST, 200), []);
    index.used(key(0), true, true, 300);
    put(&mut index, 100, 10, 400);
    let gone: Vec<u32> = index.surplus(MOST, 500).into_iter().map(|key| key.index).collect();
    assert_eq!(gone, [1, 2, 3, 4, 5, 6]);
    assert_eq!((index.bytes(7), index.stats(7).evicted_capacity), (950, 6));
    assert_eq!(index.surplus(MOST, 500), []);
}

#[test]
fn surplus_is_handed_out_in_parts_until_all_of_it_is_gone() {
    let mut index = ChunkIndex::default();
    for number in 0..100 {
        put(&mut index, number, 10, 1);
    }
    index.configure(settings(100, 0, 1));
    let mut parts = 0;
    while !index.surplus(10, 2).is_empty() {
        parts += 1;
    }
    assert_eq!((parts, index.bytes(7)), (10, 90));
}

#[test]
fn an_entry_on_its_way_out_cannot_be_put_and_one_being_put_does_not_go() {
    let mut index = ChunkIndex::default();
    put(&mut index, 1, 10, 1);
    put(&mut index, 2, 10, 2);
    assert_eq!(index.begin_put(key(1)), Turn::Go);
    assert_eq!(index.evict(7, 0, MOST), [key(2)]);
    assert_eq!(index.begin_put(key(2)), Turn::Wait);
    index.load(key(2), stored(10, 1));
    index.gone(key(2));
    assert_eq!(index.begin_put(key(2)), Turn::Go);
    index.end_put(key(2), None);
    index.end_put(key(1), None);
    assert_eq!(index.evict(7, 0, MOST), [key(1)]);
}

#[test]
fn entries_expire_by_the_newest_settings() {
    let mut index = ChunkIndex::default();
    index.configure(settings(0, 10_000, 2));
    index.configure(settings(0, 1, 1));
    put(&mut index, 1, 10, 100_000);
    put(&mut index, 2, 10, 105_000);
    assert!(!index.is_expired(7, 100_000, 109_999) && index.is_expired(7, 100_000, 110_000));
    assert_eq!(index.surplus(MOST, 111_000), [key(1)]);
    assert_eq!(index.stats(7).expired, 1);
    index.configure(settings(0, 0, 3));
    assert_eq!(index.surplus(MOST, 900_000), []);
}

#[test]
fn without_space_the_longest_unused_go_whatever_namespace_they_are_of() {
    let mut index = ChunkIndex::default();
    for number in 0..10 {
        let key = ChunkKey { namespace: u64::from(number % 2), index: number };
        assert_eq!(index.begin_put(key), Turn::Go);
        index.end_put(key, Some(stored(64, u64::from(number))));
    }
    let gone: Vec<u32> = index.make_room(3 * 64 - 1, MOST).into_iter().map(|key| key.index).collect();
    assert_eq!((gone, index.held_bytes(), index.sums().evicted_memory), (vec![0, 1, 2], 7 * 64, 3));
}

#[test]
fn what_is_found_on_the_disk_does_not_replace_what_is_known() {
    let mut index = ChunkIndex::default();
    put(&mut index, 1, 10, 5000);
    index.load(key(1), stored(99, 1));
    index.load(key(2), stored(20, 4000));
    assert_eq!((index.bytes(7), index.stats(7).entries, index.used_ms(key(2))), (30, 2, Some(4000)));
    assert_eq!(index.evict(7, 10, MOST), [key(2)]);
}

#[test]
fn a_namespace_that_has_ended_takes_no_more_puts() {
    let mut index = ChunkIndex::default();
    put(&mut index, 1, 10, 1);
    assert_eq!(index.begin_put(key(2)), Turn::Go);
    assert!(!index.end(7));
    index.end_put(key(2), Some(stored(10, 2)));
    assert!(index.end(7) && index.is_empty() && index.held_bytes() == 0);
    assert_eq!((index.sums().puts, index.sums().entries, index.stats(7).puts), (1, 0, 0));
    index.clear();
    assert_eq!(index.sums().puts, 1);
    assert_eq!(index.begin_put(key(3)), Turn::Ended);
}

#[test]
fn a_put_says_whether_its_namespace_is_beyond_its_share() {
    let mut index = ChunkIndex::default();
    index.configure(settings(15, 0, 1));
    for (number, beyond) in [(1, false), (2, true)] {
        assert_eq!(index.begin_put(key(number)), Turn::Go);
        assert_eq!(index.end_put(key(number), Some(stored(10, 1))), beyond);
    }
}

#[test]
fn many_namespaces_without_entries_are_forgotten() {
    let mut index = ChunkIndex::default();
    put(&mut index, 1, 10, 1);
    for id in 100..40_000 {
        index.configure(Namespace { id, ..settings(1, 0, 1) });
    }
    assert!(index.namespaces() < 20_000 && index.bytes(7) == 10);
}
