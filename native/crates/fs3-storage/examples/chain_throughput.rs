//! What three engines in one process move over loopback: `cargo run --release -p fs3-storage --example
//! chain_throughput -- [MiB per thread] [threads]`. Prints MB/s and CPU-seconds per GiB of the whole process, client
//! included.

#[allow(clippy::wildcard_imports)]
#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Instant;

use common::{CHUNK_BYTES, Cluster, bytes_of, chunk};
use fs3_proto::v1::{WriteRequest, WriterId};

fn main() {
    let mut args = std::env::args().skip(1).map(|a| a.parse::<u32>().expect("a number"));
    let mib = args.next().unwrap_or(128);
    let threads = args.next().unwrap_or(4);
    let cluster = Cluster::start();
    let chunks = mib * ((1 << 20) / CHUNK_BYTES);
    for round in ["first write", "overwrite", "overwrite"] {
        measure(round, mib * threads, || {
            each_thread(threads, |thread| {
                let data = bytes_of(thread as u8, CHUNK_BYTES as usize);
                for index in 0..chunks {
                    let request = cluster.write_request(0, chunk(thread * chunks + index), 0, &data);
                    let writer =
                        Some(WriterId { client_id: vec![7; 16].into(), channel: thread, sequence: next_sequence() });
                    cluster.send_write(0, WriteRequest { writer, ..request }, &data).expect("a write");
                }
            });
        });
    }
    for round in ["read", "read again"] {
        measure(round, mib * threads, || {
            each_thread(threads, |thread| {
                for index in 0..chunks {
                    let id = chunk(thread * chunks + index);
                    let read = cluster.read(index as usize % 3, id, 0, CHUNK_BYTES).expect("a read");
                    assert_eq!(read.data.len(), CHUNK_BYTES as usize);
                }
            });
        });
    }
}

/// Rises with every write, so that none counts as a retry.
fn next_sequence() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn each_thread(threads: u32, work: impl Fn(u32) + Sync) {
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let work = &work;
            scope.spawn(move || work(thread));
        }
    });
}

fn measure(what: &str, mib: u32, work: impl FnOnce()) {
    let (began, cpu) = (Instant::now(), cpu_seconds());
    work();
    let (seconds, cpu) = (began.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let bytes = f64::from(mib) * f64::from(1 << 20);
    println!("{what:12} {:8.0} MB/s {:6.2} CPU-s/GiB", bytes / seconds / 1e6, cpu * 1024.0 / f64::from(mib));
}

fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").expect("procfs");
    let fields: Vec<&str> = text.rsplit(')').next().expect("a stat line").split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<f64>().expect("ticks");
    (ticks(11) + ticks(12)) / 100.0
}
