//! What many chunks on one target cost: `cargo run --release -p fs3-io --example scale -- DIRECTORY [CHUNKS] [BYTES]`.
//!
//! Writes CHUNKS chunks of BYTES bytes each through the store, with real metadata files and data files whose bytes are
//! left out, so that a million chunks fit on any disk. Then a new process opens the target, from files that are not in
//! the page cache, and prints the seconds it took and the memory it holds.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use fs3_core::{AlignedBuf, BufferPool, ChainVersion, CheckedBytes, ChunkId, ClientId, InodeId, Region, UpdateVersion};
use fs3_io::{Access, Change, Disk, DiskFile, ReadCache, RealDisk, StoreOptions, TargetStore, Update, WriterRecord};

const WRITERS: u64 = 8;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let dir = Path::new(args.first().expect("usage: scale DIRECTORY [CHUNKS] [BYTES]"));
    if args.get(1).is_some_and(|a| a == "open") {
        return open(dir);
    }
    let number = |at: usize, default: u64| args.get(at).map_or(default, |a| a.parse().expect("a number"));
    let (chunks, bytes) = (number(1, 1_000_000), number(2, 64 << 10) as usize);
    fill(dir, chunks, bytes);
    let forget = std::fs::read_dir(dir).expect("the target's directory");
    let files: Vec<_> = forget.map(|entry| entry.expect("an entry").path()).collect();
    let size = |path: &Path| path.metadata().map_or(0, |m| m.len());
    let of = |end: &str| files.iter().filter(|p| p.to_string_lossy().ends_with(end)).map(|p| size(p)).sum::<u64>();
    println!("snapshot {} MiB, log {} MiB", of(".snap") >> 20, of(".log") >> 20);
    for _ in 0..2 {
        for path in files.iter().filter(|p| p.exists()) {
            let file = std::fs::File::open(path).expect("a file of the target");
            // SAFETY: plain system call on an open descriptor.
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        }
        let me = std::env::current_exe().expect("this program");
        let status = std::process::Command::new(me).arg(dir).arg("open").status().expect("a child process");
        assert!(status.success());
    }
    let _ = std::fs::remove_dir_all(dir);
}

fn options() -> StoreOptions {
    StoreOptions::new(ReadCache::new(1 << 20), BufferPool::new(64 << 20))
}

fn open_store(dir: &Path) -> Arc<TargetStore> {
    let disk = Hollow(RealDisk::new(dir).expect("the directory is usable"));
    TargetStore::open_on(Arc::new(disk), options()).expect("the target opens")
}

fn open(dir: &Path) {
    let (before, start) = (resident_bytes(), Instant::now());
    let store = open_store(dir);
    let (seconds, chunks) = (start.elapsed().as_secs_f64(), store.chunks());
    let held = resident_bytes() - before;
    let peak = status_bytes("VmHWM:");
    println!(
        "opened in {seconds:.2} s: {chunks} chunks, {} MiB resident, {} bytes per chunk; {} MiB at the peak",
        held >> 20,
        held / chunks.max(1),
        peak >> 20
    );
}

fn fill(dir: &Path, chunks: u64, bytes: usize) {
    let _ = std::fs::remove_dir_all(dir);
    let (before, start) = (resident_bytes(), Instant::now());
    let store = open_store(dir);
    let data = Region::from_aligned(AlignedBuf::new(bytes), bytes);
    let whole = CheckedBytes::new(0, data);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().expect("a runtime");
    let next = Arc::new(AtomicU64::new(0));
    let writers: Vec<_> = (0..WRITERS)
        .map(|_| {
            let (store, whole, next) = (store.clone(), whole.clone(), next.clone());
            runtime.spawn(async move {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= chunks {
                        return;
                    }
                    put(&store, i, Change::Write(whole.clone())).await;
                }
            })
        })
        .collect();
    writers.into_iter().for_each(|w| runtime.block_on(w).expect("no panic"));
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "wrote {chunks} chunks of {bytes} bytes in {seconds:.1} s; {} bytes resident per chunk",
        (resident_bytes() - before) / chunks
    );
    runtime.block_on(store.close());
}

async fn put(store: &Arc<TargetStore>, i: u64, change: Change) {
    // Files of 16 chunks.
    let (id, version) = (ChunkId::file(InodeId(i / 16), (i % 16) as u32), UpdateVersion(1));
    let writer = WriterRecord {
        client: ClientId([7; 16]),
        channel: (i % WRITERS) as u32,
        sequence: i,
        update_version: version,
        time_ms: i as i64,
    };
    let update = Update {
        id,
        chunk_bytes: 1 << 20,
        update_version: version,
        chain_version: ChainVersion(1),
        writer: Some(writer),
        change,
    };
    store.prepare(update).await.expect("prepare");
    store.commit(id, version).await.expect("commit");
}

fn resident_bytes() -> u64 {
    status_bytes("VmRSS:")
}

fn status_bytes(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a Linux system");
    let line = status.lines().find_map(|l| l.strip_prefix(field)).expect("a field of the status");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// A disk whose data files have their size but no bytes.
struct Hollow(RealDisk);

struct HollowFile(AtomicU64);

impl Disk for Hollow {
    fn open(&self, path: &str, access: Access) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.0.open(path, access)?;
        if access == Access::Buffered {
            return Ok(file);
        }
        // A restart grows it to the last block in use.
        Ok(Arc::new(HollowFile(AtomicU64::new(0))))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.0.list()
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.0.rename(from, to)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.0.remove(path)
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.0.sync_dir()
    }

    fn boot_id(&self) -> String {
        self.0.boot_id()
    }
}

impl DiskFile for HollowFile {
    fn read_at(&self, bufs: &mut [IoSliceMut], _: u64) -> io::Result<usize> {
        Ok(bufs.iter().map(|b| b.len()).sum())
    }

    fn write_at(&self, _: &mut [IoSlice], _: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.0.fetch_max(offset + bytes, Ordering::Relaxed);
        Ok(())
    }

    fn punch(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn space(&self) -> io::Result<u64> {
        self.len()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.load(Ordering::Relaxed))
    }
}
