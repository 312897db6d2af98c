//! Speed of checksums, and of memory that is fresh or recycled.
//!
//! `cargo run --release -p fs3-core --example membench`

use fs3_core::{AlignedBuf, BufferPool, crc_blocks, crc32c};
use std::hint::black_box;
use std::time::Instant;

fn best_gb_per_second(bytes: usize, mut work: impl FnMut()) -> f64 {
    let best = (0..20)
        .map(|_| {
            let at = Instant::now();
            work();
            at.elapsed().as_secs_f64()
        })
        .fold(f64::MAX, f64::min);
    bytes as f64 / best / 1e9
}

fn main() {
    const BYTES: usize = 1 << 20;
    let data: Vec<u8> = (0..BYTES).map(|i| (i * 7) as u8).collect();
    let blocks = best_gb_per_second(BYTES, || {
        black_box(crc_blocks(0, black_box(&data)));
    });
    let whole = best_gb_per_second(BYTES, || {
        black_box(crc32c(black_box(&data)));
    });
    println!("crc32c of 4 KiB blocks {blocks:.1} GB/s, of 1 MiB {whole:.1} GB/s");
    for mib in [1usize, 4] {
        let bytes = mib << 20;
        let fresh = best_gb_per_second(bytes * 16, || {
            let bufs: Vec<_> = (0..16)
                .map(|_| {
                    let mut buf = AlignedBuf::new(bytes);
                    buf.fill(1);
                    buf
                })
                .collect();
            black_box(bufs);
        });
        let pool = BufferPool::new(bytes);
        let recycled = best_gb_per_second(bytes * 16, || {
            for _ in 0..16 {
                let mut buf = pool.get(bytes).expect("one at a time");
                buf.fill(1);
                black_box(buf);
            }
        });
        let first = best_gb_per_second(bytes * 16, || {
            let pool = BufferPool::new(bytes * 16);
            let bufs: Vec<_> = (0..16)
                .map(|_| {
                    let mut buf = pool.get(bytes).expect("room for all");
                    buf.fill(1);
                    buf
                })
                .collect();
            black_box(bufs);
        });
        println!("fill {mib} MiB buffers: fresh {fresh:.2} GB/s, first from a pool {first:.2}, recycled {recycled:.1}");
    }
}
