//! Measures one target's store: `cargo run --release -p fs3-io --example storebench [directory] [seconds]`.
//!
//! Prints throughput and CPU seconds per GiB (or per 1000 operations). Memory and files are warmed first.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fs3_core::{AlignedBuf, BufferPool, ChainVersion, CheckedBytes, ChunkId, InodeId, Region, UpdateVersion};
use fs3_io::{Change, ReadCache, StoreOptions, TargetStore, Update};

const CHUNK: u32 = 1 << 20;
const CHUNKS: u32 = 512;

fn main() {
    let mut args = std::env::args().skip(1);
    let dir = args.next().map_or_else(|| std::env::temp_dir().join("fs3-storebench"), PathBuf::from);
    let seconds: f64 = args.next().and_then(|s| s.parse().ok()).unwrap_or(3.0);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().expect("a runtime");
    let cache = ReadCache::new(768 << 20);
    let options = StoreOptions::new(cache.clone(), BufferPool::new(64 << 20));
    let store = TargetStore::open(&dir, options.clone()).expect("the directory is usable");
    let bench = Bench { store, duration: Duration::from_secs_f64(seconds) };
    let whole = CheckedBytes::new(0, region(CHUNK as usize));
    for round in ["first writes", "warm writes"] {
        for depth in [1, 4] {
            let whole = whole.clone();
            bench.run(&runtime, &format!("1 MiB {round}, depth {depth}"), depth, 1 << 20, move |store, i| {
                let whole = whole.clone();
                async move { put(&store, i as u32 % CHUNKS, Change::Write(whole)).await }
            });
        }
    }
    fill(&runtime, &bench.store, &whole);
    for (name, depth) in [("cold", 1), ("cold", 4), ("cached", 1), ("cached", 4)] {
        let cold = name == "cold";
        let cache = cache.clone();
        bench.run(&runtime, &format!("1 MiB reads {name}, depth {depth}"), depth, 1 << 20, move |store, i| {
            if cold && i.is_multiple_of(64) {
                cache.clear();
            }
            async move {
                let out =
                    store.read(id(i as u32 % if cold { CHUNKS } else { 64 }), 0, CHUNK).await.expect("it is there");
                assert_eq!(out.length, CHUNK);
            }
        });
    }
    bench.run(&runtime, "4 KiB reads cached, depth 1", 1, 4096, |store, i| async move {
        let out = store.read(id(i as u32 % 64), (scatter(i) as u32 & 255) * 4096, 4096).await.expect("it is there");
        assert_eq!(out.length, 4096);
    });
    for depth in [1, 32] {
        let cache = cache.clone();
        cache.clear();
        bench.run(&runtime, &format!("4 KiB reads cold, depth {depth}"), depth, 4096, move |store, i| {
            if i.is_multiple_of(4096) {
                cache.clear();
            }
            let (chunk, block) = (scatter(i) % u64::from(CHUNKS), scatter(i) >> 32 & 255);
            async move {
                store.read(id(chunk as u32), block as u32 * 4096, 4096).await.expect("it is there");
            }
        });
    }
    let small = region(4096);
    let before = disk_writes();
    let mut total = 0;
    for depth in [1, 32] {
        let small = small.clone();
        total += bench.run(&runtime, &format!("4 KiB overwrites, depth {depth}"), depth, 4096, move |store, i| {
            let change = Change::Write(CheckedBytes::new((scatter(i) as u32 & 255) * 4096, small.clone()));
            async move { put(&store, i as u32 % CHUNKS, change).await }
        });
    }
    bench.run(&runtime, "metadata-only updates, depth 32", 32, 4096, |store, i| async move {
        put(&store, i as u32 % CHUNKS, Change::Truncate { length: CHUNK }).await;
    });
    runtime.block_on(bench.store.sync()).expect("sync");
    if let (Some(before), Some(after)) = (before, disk_writes()) {
        println!("{:<34} {:>9.2} x", "4 KiB overwrite amplification", (after - before) as f64 / (total * 4096) as f64);
    }
    let new = CheckedBytes::new(0, small.clone());
    bench.run(&runtime, "4 KiB new chunks, depth 4", 4, 4096, move |store, i| {
        let change = Change::Write(new.clone());
        async move { put(&store, 1_000_000 + i as u32 % 20_000, change).await }
    });
    bench.run(&runtime, "sync after a 4 KiB write, depth 1", 1, 4096, {
        let second = CheckedBytes::new(4096, small.clone());
        move |store, _| {
            let change = Change::Write(second.clone());
            async move {
                put(&store, 0, change).await;
                store.sync().await.expect("sync");
            }
        }
    });
    for depth in [1, 32] {
        let small = small.clone();
        bench.run(&runtime, &format!("durable 4 KiB overwrites, depth {depth}"), depth, 4096, move |store, i| {
            let change = Change::Write(CheckedBytes::new((scatter(i) as u32 & 255) * 4096, small.clone()));
            async move {
                put(&store, i as u32 % CHUNKS, change).await;
                store.sync().await.expect("sync");
            }
        });
    }
    println!("used {} MiB, {} chunks", bench.store.used_bytes() >> 20, bench.store.chunks());
    runtime.block_on(bench.store.close());
    drop(bench);
    let start = Instant::now();
    let store = TargetStore::open(&dir, options).expect("it opens again");
    println!("{:<34} {:>9.1} ms for {} chunks", "reopen", start.elapsed().as_secs_f64() * 1e3, store.chunks());
    drop(store);
    let _ = std::fs::remove_dir_all(&dir);
}

struct Bench {
    store: Arc<TargetStore>,
    duration: Duration,
}

impl Bench {
    /// Run `job(store, i)` for the duration with `depth` tasks; returns how many ran.
    fn run<F, Fut>(&self, runtime: &tokio::runtime::Runtime, name: &str, depth: u64, bytes: u64, job: F) -> u64
    where
        F: Fn(Arc<TargetStore>, u64) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send,
    {
        let (job, start, cpu) = (Arc::new(job), Instant::now(), cpu_seconds());
        let tasks: Vec<_> = (0..depth)
            .map(|task| {
                let (job, store, until) = (job.clone(), self.store.clone(), start + self.duration);
                runtime.spawn(async move {
                    let mut done = 0;
                    while Instant::now() < until {
                        // A chunk has one writer at a time: tasks take turns over disjoint numbers.
                        job(store.clone(), done * depth + task).await;
                        done += 1;
                    }
                    done
                })
            })
            .collect();
        let done: u64 = tasks.into_iter().map(|t| runtime.block_on(t).expect("no panic")).sum();
        let (wall, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu);
        let gib = (done * bytes) as f64 / (1u64 << 30) as f64;
        println!(
            "{name:<34} {:>9.0} /s {:>8.0} MB/s {:>7.2} CPU-s/GiB {:>7.1} us CPU each",
            done as f64 / wall,
            (done * bytes) as f64 / wall / 1e6,
            cpu / gib,
            cpu * 1e6 / done as f64
        );
        done
    }
}

fn id(index: u32) -> ChunkId {
    ChunkId::file(InodeId(1), index)
}

async fn put(store: &Arc<TargetStore>, index: u32, change: Change) {
    let id = id(index);
    let version = store.chunk(id).and_then(|m| m.committed).map_or(1, |c| c.update_version.0 + 1);
    let update_version = UpdateVersion(version);
    let chain_version = ChainVersion(1);
    let update = Update { id, chunk_bytes: CHUNK, update_version, chain_version, writer: None, change };
    store.prepare(update).await.expect("prepare");
    store.commit(id, update_version).await.expect("commit");
}

fn fill(runtime: &tokio::runtime::Runtime, store: &Arc<TargetStore>, whole: &CheckedBytes) {
    runtime.block_on(async {
        for i in 0..CHUNKS {
            put(store, i, Change::Write(whole.clone())).await;
        }
    });
}

fn region(len: usize) -> Region {
    let mut buf = AlignedBuf::new(len);
    buf.iter_mut().enumerate().for_each(|(i, b)| *b = (i * 31 / 7) as u8);
    Region::from_aligned(buf, len)
}

/// A number that looks random, the same for the same `i`.
fn scatter(i: u64) -> u64 {
    let x = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (x ^ (x >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 8
}

fn cpu_seconds() -> f64 {
    // SAFETY: `usage` is a valid out pointer.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Bytes this process caused to be written to disks.
fn disk_writes() -> Option<u64> {
    let io = std::fs::read_to_string("/proc/self/io").ok()?;
    io.lines().find_map(|l| l.strip_prefix("write_bytes: ")?.parse().ok())
}
