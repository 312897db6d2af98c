use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;

use fs3_core::AlignedBuf;

use crate::disk::prepared_file;
use crate::tcp::join;
use crate::{MESSAGE_BYTES, Measured, measure};

/// Blocks that each connection writes in turn at each node: recycled, as a chunk store does.
const BLOCKS: u64 = 16;

struct Hop {
    upstream: TcpStream,
    downstream: Option<TcpStream>,
    file: File,
}

fn linked() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    for stream in [&near, &far] {
        stream.set_nodelay(true)?;
    }
    Ok((near, far))
}

/// One connection of client → A → B → C, and the files of its three nodes.
fn connection(dir: &Path, number: usize, nodes: usize) -> io::Result<(TcpStream, Vec<Hop>)> {
    let links = (0..nodes).map(|_| linked()).collect::<io::Result<Vec<_>>>()?;
    let (mut near, far): (Vec<_>, Vec<_>) = links.into_iter().unzip();
    let client = near.remove(0);
    let mut hops = Vec::new();
    let mut downstreams = near.into_iter().map(Some).chain([None]);
    for (node, upstream) in far.into_iter().enumerate() {
        let path = dir.join(format!("fs3-bench-chain-{number}-{node}"));
        let file = prepared_file(&path, BLOCKS * MESSAGE_BYTES as u64)?;
        std::fs::remove_file(&path)?;
        hops.push(Hop { upstream, downstream: downstreams.next().flatten(), file });
    }
    Ok((client, hops))
}

/// Receive, send on, write, wait for the successor, acknowledge.
fn relay(mut hop: Hop, messages: u64) -> io::Result<()> {
    let mut buffer = AlignedBuf::new(MESSAGE_BYTES);
    let mut acknowledgement = [0u8; 1];
    for message in 0..messages {
        hop.upstream.read_exact(&mut buffer)?;
        if let Some(next) = &mut hop.downstream {
            next.write_all(&buffer)?;
        }
        hop.file.write_all_at(&buffer, message % BLOCKS * MESSAGE_BYTES as u64)?;
        if let Some(next) = &mut hop.downstream {
            next.read_exact(&mut acknowledgement)?;
        }
        hop.upstream.write_all(&acknowledgement)?;
    }
    Ok(())
}

/// What a replicated write costs at the least: client → A → B → C over loopback TCP, messages of 1 MiB, every node
/// writing with direct I/O to allocated, recycled blocks, one acknowledgement back; `connections` of them at once.
/// No checksums, no metadata, no concurrency control.
pub fn bare_chain(dir: &Path, connections: usize, nodes: usize, total_bytes: u64) -> io::Result<Measured> {
    let messages = total_bytes / MESSAGE_BYTES as u64 / connections as u64;
    let lanes = (0..connections).map(|n| connection(dir, n, nodes)).collect::<io::Result<Vec<_>>>()?;
    measure(|| {
        thread::scope(|scope| {
            let mut workers = Vec::new();
            for (mut client, hops) in lanes {
                workers.extend(hops.into_iter().map(|hop| scope.spawn(move || relay(hop, messages))));
                workers.push(scope.spawn(move || {
                    let data = vec![9u8; MESSAGE_BYTES];
                    let mut acknowledgement = [0u8; 1];
                    for _ in 0..messages {
                        client.write_all(&data)?;
                        client.read_exact(&mut acknowledgement)?;
                    }
                    Ok(())
                }));
            }
            join(workers)
        })?;
        Ok((messages * (connections * MESSAGE_BYTES) as u64, messages * connections as u64))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_moves_every_message_once() {
        let dir = tempfile::tempdir_in(std::env::temp_dir()).expect("a directory");
        let measured = bare_chain(dir.path(), 2, 3, 16 << 20).expect("direct I/O");
        assert_eq!((measured.bytes, measured.operations), (16 << 20, 16));
        assert!(measured.seconds > 0.0 && std::fs::read_dir(dir.path()).expect("readable").next().is_none());
    }
}
