//! What the storage service does to a store, under kill -9 at any moment: overlapping writes of all sizes, prepares
//! that are superseded, aborted or cut off, syncs and maintenance behind them, readers beside them. After every kill
//! each chunk is read from the disk.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use common::{bytes_of, id, options, replace, runtime, update, write};
use fs3_core::{Code, Result, UpdateVersion, crc_blocks, verify_crcs};
use fs3_io::fault::{Fault, FaultDisk};
use fs3_io::{Change, IoThreads, StoreOptions, TargetStore, Update, VersionInfo};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

const CHUNKS: u32 = 4;
const CHUNK: u32 = 1 << 20;
const LIVES: usize = 12;
const UPDATES_PER_LIFE: usize = 40;
/// How long the seeds of a usual run may take together; the rest is left out on a slow machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// A prepared version: `None` is a removed chunk.
#[derive(Clone, PartialEq)]
struct Made {
    version: u64,
    bytes: Option<Vec<u8>>,
}

impl Made {
    fn is(&self, info: &VersionInfo) -> bool {
        let crcs = crc_blocks(0, self.bytes.as_deref().unwrap_or(&[]));
        self.version == info.update_version.0
            && info.removed == self.bytes.is_none()
            && info.chunk_crc32c == fs3_core::crc32c(&fs3_core::pack_crcs(&crcs))
    }
}

#[derive(Default, Clone)]
struct Model {
    committed: Option<Made>,
    /// What may be pending: several after a kill.
    pending: Vec<Made>,
    /// A kill may have come before or after the pending version was dropped or committed.
    unsure: bool,
}

struct Rig {
    disk: FaultDisk,
    options: StoreOptions,
    store: Arc<TargetStore>,
    model: Vec<Model>,
    random: StdRng,
    runtime: tokio::runtime::Runtime,
}

impl Rig {
    fn new(seed: u64) -> Self {
        let (disk, mut options) = (FaultDisk::new(seed), options(&IoThreads::new(2)));
        options.log_bytes_max = 1 << 20;
        options.unsynced_free_bytes_max = 4 << 20;
        options.patch_bytes_max = 256 << 10;
        let store = TargetStore::open_on(Arc::new(disk.clone()), options.clone()).unwrap();
        let model = vec![Model::default(); CHUNKS as usize];
        Self { disk, options, store, model, random: StdRng::seed_from_u64(seed), runtime: runtime() }
    }

    fn update(&mut self, chunk: u32) -> (Update, Made) {
        let random = &mut self.random;
        let committed = self.model[chunk as usize].committed.as_ref();
        let version = committed.map_or(0, |c| c.version) + 1;
        let mut bytes = committed.and_then(|c| c.bytes.clone()).unwrap_or_default();
        let old = bytes.len() as u32;
        let any = random.random_range(1..300_000);
        let len = [100, 4096, 70_000, any][random.random_range(0..4)];
        let mut data = vec![0; len as usize];
        random.fill_bytes(&mut data);
        let change = match random.random_range(0..20) {
            0 => {
                bytes = data.clone();
                replace(data, vec![])
            }
            1 if old > 0 => {
                let length = random.random_range(0..=old);
                bytes.truncate(length as usize);
                Change::Truncate { length }
            }
            2 if random.random_range(0..4) == 0 => {
                return (update(chunk, version, Change::Remove), Made { version, bytes: None });
            }
            _ => {
                let offset = [old.min(CHUNK - len), random.random_range(0..=CHUNK - len)][random.random_range(0..2)];
                let end = (offset + len) as usize;
                bytes.resize(bytes.len().max(end), 0);
                bytes[offset as usize..end].copy_from_slice(&data);
                write(offset, data)
            }
        };
        let update = Update { chunk_bytes: CHUNK, ..update(chunk, version, change) };
        (update, Made { version, bytes: Some(bytes) })
    }

    /// One update from prepare to commit or abort, as the chain does it. The disk may halt anywhere in it.
    fn step(&mut self, chunk: u32) -> Result<()> {
        let attempts = [1, 1, 1, 1, 2, 3][self.random.random_range(0..6)];
        for _ in 0..attempts {
            let (update, made) = self.update(chunk);
            self.model[chunk as usize].pending.push(made.clone());
            let info = self.runtime.block_on(self.store.prepare(update))?;
            assert!(made.is(&info), "chunk {chunk}: the prepared version is not what was asked for");
            self.model[chunk as usize].pending = vec![made];
        }
        let made = self.model[chunk as usize].pending[0].clone();
        let version = UpdateVersion(made.version);
        self.model[chunk as usize].unsure = true;
        if self.random.random_range(0..10) == 0 {
            self.runtime.block_on(self.store.abort(id(chunk), version))?;
        } else {
            self.runtime.block_on(self.store.commit(id(chunk), version))?;
            self.model[chunk as usize].committed = Some(made);
        }
        self.model[chunk as usize].pending.clear();
        self.model[chunk as usize].unsure = false;
        match self.random.random_range(0..40) {
            0 => self.runtime.block_on(self.store.sync()),
            1 => self.store.maintain_for_tests(),
            _ => Ok(()),
        }
    }

    /// Begin updates whose callers go away at once; their disk work goes on until the kill.
    fn leave_prepares_behind(&mut self) {
        for chunk in 0..CHUNKS {
            if !self.model[chunk as usize].unsure && self.random.random_range(0..2) == 0 {
                let (update, made) = self.update(chunk);
                self.model[chunk as usize].pending.push(made);
                let store = self.store.clone();
                let mut prepare = Box::pin(store.prepare(update));
                let polled = prepare.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                assert!(matches!(polled, Poll::Pending | Poll::Ready(_)));
            }
        }
    }

    fn kill(&mut self) {
        self.disk.kill();
        self.options.read_cache.clear();
        self.store = TargetStore::open_on(Arc::new(self.disk.clone()), self.options.clone()).unwrap();
        for chunk in 0..CHUNKS {
            self.learn(chunk);
        }
    }

    /// The model takes over what the kill left undecided, of what is allowed.
    fn learn(&mut self, chunk: u32) {
        let meta = self.store.chunk(id(chunk));
        let model = &mut self.model[chunk as usize];
        let committed = meta.as_ref().and_then(|m| m.committed.as_ref());
        match (committed, &model.committed) {
            (None, None) => {}
            (Some(info), Some(made)) if made.is(info) => {}
            (Some(info), _) => {
                let made = model.pending.iter().find(|p| model.unsure && p.is(info)).cloned();
                model.committed = Some(made.unwrap_or_else(|| panic!("chunk {chunk}: nobody committed {info:?}")));
                model.pending.clear();
            }
            (None, Some(_)) => panic!("chunk {chunk}: a commit is lost"),
        }
        match meta.as_ref().and_then(|m| m.pending.as_ref()) {
            Some(info) => {
                model.pending.retain(|p| p.is(info));
                assert!(!model.pending.is_empty(), "chunk {chunk}: nobody prepared {info:?}");
            }
            None => model.pending.clear(),
        }
        model.unsure = false;
    }

    /// Every chunk is what the model says, from the disk.
    fn check(&self) {
        self.options.read_cache.clear();
        for (chunk, model) in self.model.iter().enumerate() {
            let Some(bytes) = model.committed.as_ref().and_then(|c| c.bytes.as_ref()) else { continue };
            let read = self.runtime.block_on(self.store.read(id(chunk as u32), 0, CHUNK));
            let read = read.unwrap_or_else(|e| panic!("{e}"));
            assert!(bytes_of(&read) == *bytes, "chunk {chunk} has other bytes");
            verify_crcs(0, &bytes_of(&read), &read.crcs).unwrap();
        }
    }

    /// One life of the process, up to its kill.
    fn live(&mut self) {
        // A version that was pending at the kill goes on like any other.
        for chunk in 0..CHUNKS {
            let model = &mut self.model[chunk as usize];
            if let Some(made) = model.pending.first().cloned()
                && self.random.random_range(0..2) == 0
            {
                self.runtime.block_on(self.store.commit(id(chunk), UpdateVersion(made.version))).unwrap();
                *model = Model { committed: Some(made), ..Model::default() };
            }
        }
        self.check();
        if self.random.random_range(0..2) == 0 {
            self.disk.inject(Fault::Halt, self.random.random_range(0..200));
        }
        for _ in 0..UPDATES_PER_LIFE {
            let chunk = self.random.random_range(0..CHUNKS);
            match self.step(chunk) {
                Ok(()) => {}
                Err(e) if e.code == Code::DiskError => break,
                Err(e) => panic!("chunk {chunk}: {e}"),
            }
        }
        self.leave_prepares_behind();
    }
}

/// Reads all the time: it may find no rot.
fn read_until(stop: &AtomicBool, store: &Arc<TargetStore>) {
    let runtime = runtime();
    while !stop.load(Ordering::Acquire) {
        for chunk in 0..CHUNKS {
            match runtime.block_on(store.read(id(chunk), 0, CHUNK)) {
                Err(e) if e.code == Code::ChecksumMismatch => panic!("{e}"),
                Ok(read) => verify_crcs(0, &bytes_of(&read), &read.crcs).unwrap(),
                Err(_) => {}
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `FS3_KILL_SEEDS=first..end` runs other seeds than the few of every run.
#[test]
fn a_store_killed_at_any_moment_holds_every_commit_and_no_rot() {
    let chosen = std::env::var("FS3_KILL_SEEDS").ok();
    let seeds = chosen.as_deref().unwrap_or("0..8");
    let (first, end) = seeds.split_once("..").expect("FS3_KILL_SEEDS is first..end");
    let started = Instant::now();
    for seed in first.parse::<u64>().unwrap()..end.parse().unwrap() {
        let mut rig = Rig::new(seed);
        for life in 0..LIVES {
            if chosen.is_none() && started.elapsed() > PATIENCE {
                return;
            }
            let (stop, store) = (AtomicBool::new(false), rig.store.clone());
            std::thread::scope(|scope| {
                scope.spawn(|| read_until(&stop, &store));
                let lived = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    rig.live();
                    rig.kill();
                }));
                stop.store(true, Ordering::Release);
                lived.unwrap_or_else(|_| panic!("seed {seed}, life {life}"));
            });
            drop(store);
            rig.check();
        }
    }
}
