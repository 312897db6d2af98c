//! The limits of this machine, measured with as little code as possible: what fs3 is compared with.
//!
//! Plain threads and blocking calls; nothing here is used by fs3 itself. CPU time is that of the whole process, so
//! run one measurement at a time.

mod chain;
mod disk;
mod tcp;

pub use chain::bare_chain;
pub use disk::{disk_read, disk_write};
pub use tcp::{tcp_ping_pong, tcp_stream};

use std::time::Instant;

/// Size of one message of the streaming measurements, bytes.
pub const MESSAGE_BYTES: usize = 1 << 20;

/// What one measurement moved, and what it cost.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Bytes moved, or 0 where only operations count.
    pub bytes: u64,
    /// Operations done.
    pub operations: u64,
    /// Wall time in seconds.
    pub seconds: f64,
    /// User and system time of the process in seconds.
    pub cpu_seconds: f64,
    /// Median latency of one operation in microseconds; 0 where it was not measured.
    pub p50_us: f64,
}

/// User and system time of this process so far, seconds.
pub fn cpu_seconds() -> f64 {
    // SAFETY: an all-zero rusage is valid, and getrusage fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Run `work`, which says how many bytes and operations it did.
fn measure<E>(work: impl FnOnce() -> Result<(u64, u64), E>) -> Result<Measured, E> {
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let (bytes, operations) = work()?;
    Ok(Measured {
        bytes,
        operations,
        seconds: start.elapsed().as_secs_f64(),
        cpu_seconds: cpu_seconds() - cpu,
        p50_us: 0.0,
    })
}

/// Copy 256 MiB between two warm buffers until `total_bytes` are copied.
pub fn memory_copy(total_bytes: u64) -> Measured {
    const BUFFER_BYTES: usize = 256 << 20;
    let (source, mut target) = (vec![1u8; BUFFER_BYTES], vec![2u8; BUFFER_BYTES]);
    let rounds = total_bytes.div_ceil(BUFFER_BYTES as u64).max(1);
    let done: Result<_, std::convert::Infallible> = measure(|| {
        for _ in 0..rounds {
            target.copy_from_slice(std::hint::black_box(&source));
            std::hint::black_box(&mut target);
        }
        Ok((rounds * BUFFER_BYTES as u64, rounds))
    });
    match done {
        Ok(measured) => measured,
        Err(never) => match never {},
    }
}

/// CRC32C over warm memory in the blocks fs3 uses.
pub fn checksum(total_bytes: u64) -> Measured {
    let data = vec![3u8; 4 << 20];
    let rounds = total_bytes.div_ceil(data.len() as u64).max(1);
    let done: Result<_, std::convert::Infallible> = measure(|| {
        for _ in 0..rounds {
            std::hint::black_box(fs3_core::crc_blocks(0, std::hint::black_box(&data)));
        }
        Ok((rounds * data.len() as u64, rounds))
    });
    match done {
        Ok(measured) => measured,
        Err(never) => match never {},
    }
}
