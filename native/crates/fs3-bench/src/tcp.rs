use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use crate::{MESSAGE_BYTES, Measured, measure};

fn pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    Ok((near, far))
}

/// Move `total_bytes` over `streams` loopback connections at once, a sender and a receiver thread each.
pub fn tcp_stream(streams: usize, total_bytes: u64) -> io::Result<Measured> {
    let messages = total_bytes / MESSAGE_BYTES as u64 / streams as u64;
    let pairs = (0..streams).map(|_| pair()).collect::<io::Result<Vec<_>>>()?;
    measure(|| {
        thread::scope(|scope| {
            let mut workers = Vec::new();
            for (mut near, mut far) in pairs {
                workers.push(scope.spawn(move || {
                    let data = vec![5u8; MESSAGE_BYTES];
                    (0..messages).try_for_each(|_| near.write_all(&data))
                }));
                workers.push(scope.spawn(move || {
                    let mut data = vec![0u8; MESSAGE_BYTES];
                    (0..messages).try_for_each(|_| far.read_exact(&mut data))
                }));
            }
            join(workers)
        })?;
        Ok((messages * (streams * MESSAGE_BYTES) as u64, messages * streams as u64))
    })
}

pub(crate) fn join(workers: Vec<thread::ScopedJoinHandle<'_, io::Result<()>>>) -> io::Result<()> {
    for worker in workers {
        worker.join().map_err(|_| io::Error::other("a measuring thread panicked"))??;
    }
    Ok(())
}

/// Requests of 64 bytes with replies of 4 KiB, `in_flight` of them outstanding on one connection.
pub fn tcp_ping_pong(in_flight: usize, operations: u64) -> io::Result<Measured> {
    const REQUEST_BYTES: usize = 64;
    const REPLY_BYTES: usize = 4096;
    let (mut near, mut far) = pair()?;
    let batches = operations / in_flight as u64;
    let mut latencies = Vec::with_capacity(batches as usize);
    let mut measured = measure(|| {
        thread::scope(|scope| {
            let server = scope.spawn(move || {
                let (mut request, reply) = (vec![0u8; REQUEST_BYTES * in_flight], vec![7u8; REPLY_BYTES * in_flight]);
                for _ in 0..batches {
                    far.read_exact(&mut request)?;
                    far.write_all(&reply)?;
                }
                Ok(())
            });
            let (request, mut reply) = (vec![1u8; REQUEST_BYTES * in_flight], vec![0u8; REPLY_BYTES * in_flight]);
            for _ in 0..batches {
                let start = Instant::now();
                near.write_all(&request)?;
                near.read_exact(&mut reply)?;
                latencies.push(start.elapsed());
            }
            join(vec![server])
        })?;
        io::Result::Ok((0, batches * in_flight as u64))
    })?;
    latencies.sort_unstable();
    measured.p50_us = latencies.get(latencies.len() / 2).map_or(0.0, |d| d.as_secs_f64() * 1e6);
    Ok(measured)
}
