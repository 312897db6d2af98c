//! A store on a disk in memory next to a model of what it must hold.
#![allow(dead_code, missing_docs)]

use std::collections::BTreeMap;
use std::sync::Arc;

use fs3_core::{
    BufferPool, ChainVersion, CheckedBytes, ChunkId, ClientId, Code, InodeId, Region, Result, UpdateVersion,
    verify_crcs,
};
use fs3_io::fault::FaultDisk;
use fs3_io::{Change, IoThreads, ReadCache, ReadOut, StoreOptions, TargetStore, Update, VersionInfo, WriterRecord};

pub const CHUNK: u32 = 256 << 10;

pub fn options(threads: &Arc<IoThreads>) -> StoreOptions {
    let mut options = StoreOptions::new(ReadCache::new(1 << 20), BufferPool::new(8 << 20));
    options.threads = threads.clone();
    options.live_chunks_max = 1;
    options
}

pub fn id(index: u32) -> ChunkId {
    ChunkId::file(InodeId(7), index)
}

/// `len` bytes that differ from version to version and from place to place.
pub fn pattern(version: u64, offset: u32, len: u32) -> Vec<u8> {
    (offset..offset + len).map(|i| (i / 61) as u8 ^ (i as u8).wrapping_mul(version as u8 | 1)).collect()
}

pub fn writer(sequence: u64) -> WriterRecord {
    WriterRecord {
        client: ClientId([3; 16]),
        channel: 1,
        sequence,
        update_version: UpdateVersion(sequence),
        time_ms: sequence as i64,
    }
}

pub fn update(index: u32, version: u64, change: Change) -> Update {
    Update {
        id: id(index),
        chunk_bytes: CHUNK,
        update_version: UpdateVersion(version),
        chain_version: ChainVersion(1),
        writer: Some(writer(version)),
        change,
    }
}

pub fn write(offset: u32, data: Vec<u8>) -> Change {
    Change::Write(CheckedBytes::new(offset, Region::from_vec(data)))
}

pub fn replace(data: Vec<u8>, writers: Vec<WriterRecord>) -> Change {
    Change::Replace { bytes: CheckedBytes::new(0, Region::from_vec(data)), writers }
}

pub fn bytes_of(out: &ReadOut) -> Vec<u8> {
    out.data.iter().flat_map(|r| r.iter().copied()).collect()
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().unwrap()
}

/// A store on a disk in memory, and a runtime to drive it.
pub struct Bed {
    pub disk: FaultDisk,
    pub options: StoreOptions,
    pub store: Arc<TargetStore>,
    pub runtime: tokio::runtime::Runtime,
}

impl Bed {
    pub fn new() -> Self {
        Self::on(FaultDisk::new(1))
    }

    pub fn on(disk: FaultDisk) -> Self {
        let options = options(&IoThreads::new(2));
        let store = TargetStore::open_on(Arc::new(disk.clone()), options.clone()).unwrap();
        Self { disk, options, store, runtime: runtime() }
    }

    pub fn reopen(&mut self) {
        self.options.read_cache.clear();
        self.store = TargetStore::open_on(Arc::new(self.disk.clone()), self.options.clone()).unwrap();
    }

    pub fn prepare(&self, chunk: u32, version: u64, change: Change) -> Result<VersionInfo> {
        self.runtime.block_on(self.store.prepare(update(chunk, version, change)))
    }

    pub fn commit(&self, chunk: u32, version: u64) -> Result<VersionInfo> {
        self.runtime.block_on(self.store.commit(id(chunk), UpdateVersion(version)))
    }

    pub fn put(&self, chunk: u32, version: u64, change: Change) {
        self.prepare(chunk, version, change).unwrap();
        self.commit(chunk, version).unwrap();
    }

    pub fn read(&self, chunk: u32) -> std::result::Result<Vec<u8>, Code> {
        self.runtime.block_on(self.store.read(id(chunk), 0, CHUNK)).map(|out| bytes_of(&out)).map_err(|e| e.code)
    }

    pub fn sync(&self) -> Result<()> {
        self.runtime.block_on(self.store.sync())
    }
}

pub fn code<T>(result: Result<T>) -> Option<Code> {
    result.err().map(|e| e.code)
}

/// What one step of a random run does.
#[derive(Clone, Debug)]
pub enum Op {
    Write { chunk: u32, offset: u32, len: u32 },
    Append { chunk: u32, len: u32, gap: u32 },
    Replace { chunk: u32, len: u32 },
    Truncate { chunk: u32, length: u32 },
    Punch { chunk: u32, offset: u32, len: u32 },
    Remove { chunk: u32 },
    Commit { chunk: u32 },
    Abort { chunk: u32 },
    Sync,
    Maintain,
    ForgetCache,
    Reopen,
    Crash,
}

type Content = Option<Vec<u8>>;

#[derive(Default, Clone)]
pub struct ChunkModel {
    pub version: u64,
    pub content: Content,
    pub pending: Option<(u64, Content)>,
    pub next: u64,
}

/// The store under test and its model.
pub struct Rig {
    pub disk: FaultDisk,
    pub threads: Arc<IoThreads>,
    pub options: StoreOptions,
    pub store: Arc<TargetStore>,
    pub model: BTreeMap<u32, ChunkModel>,
    /// Content of every version ever prepared.
    pub history: BTreeMap<(u32, u64), Content>,
    /// Committed version at the last sync.
    pub synced: BTreeMap<u32, u64>,
    runtime: tokio::runtime::Runtime,
}

impl Rig {
    pub fn new(seed: u64) -> Self {
        let (disk, threads) = (FaultDisk::new(seed), IoThreads::new(1));
        let options = options(&threads);
        let store = TargetStore::open_on(Arc::new(disk.clone()), options.clone()).unwrap();
        Self {
            disk,
            threads,
            options,
            store,
            model: BTreeMap::new(),
            history: BTreeMap::new(),
            synced: BTreeMap::new(),
            runtime: runtime(),
        }
    }

    pub fn reopen(&mut self) {
        self.store = TargetStore::open_on(Arc::new(self.disk.clone()), self.options.clone()).unwrap();
    }

    fn prepare(&mut self, chunk: u32, change: Change, content: Content) -> Result<()> {
        let state = self.model.entry(chunk).or_default();
        state.next = state.next.max(state.version) + 1;
        let version = state.next;
        self.history.insert((chunk, version), content.clone());
        self.runtime.block_on(self.store.prepare(update(chunk, version, change)))?;
        self.model.get_mut(&chunk).unwrap().pending = Some((version, content));
        Ok(())
    }

    pub fn apply(&mut self, op: &Op) -> Result<()> {
        match *op {
            Op::Write { chunk, offset, len } => {
                let next = self.model.get(&chunk).map_or(0, |m| m.next);
                let data = pattern(next + 1, offset, len);
                let mut content = self.model.get(&chunk).and_then(|m| m.content.clone()).unwrap_or_default();
                let end = (offset + len) as usize;
                content.resize(content.len().max(if len == 0 { 0 } else { end }), 0);
                if len > 0 {
                    content[offset as usize..end].copy_from_slice(&data);
                }
                self.prepare(chunk, write(offset, data), Some(content))
            }
            Op::Append { chunk, len, gap } => {
                let end = self.model.get(&chunk).and_then(|m| m.content.as_ref()).map_or(0, |c| c.len() as u32);
                let offset = (end + gap).min(CHUNK - 1);
                self.apply(&Op::Write { chunk, offset, len: len.min(CHUNK - offset) })
            }
            Op::Replace { chunk, len } => {
                let data = pattern(self.model.get(&chunk).map_or(0, |m| m.next) + 1, 0, len);
                let change = replace(data.clone(), vec![]);
                self.prepare(chunk, change, Some(data))
            }
            Op::Truncate { chunk, length } => {
                let Some(mut content) = self.model.get(&chunk).and_then(|m| m.content.clone()) else { return Ok(()) };
                content.truncate(length as usize);
                self.prepare(chunk, Change::Truncate { length }, Some(content))
            }
            Op::Punch { chunk, offset, len } => {
                let Some(mut content) = self.model.get(&chunk).and_then(|m| m.content.clone()) else { return Ok(()) };
                let end = content.len().min((offset + len) as usize);
                content[end.min(offset as usize)..end].fill(0);
                self.prepare(chunk, Change::Punch { offset, length: len }, Some(content))
            }
            Op::Remove { chunk } => self.prepare(chunk, Change::Remove, None),
            Op::Commit { chunk } => self.commit(chunk),
            Op::Abort { chunk } => {
                let Some((version, _)) = self.model.get(&chunk).and_then(|m| m.pending.clone()) else { return Ok(()) };
                self.runtime.block_on(self.store.abort(id(chunk), UpdateVersion(version)))?;
                self.model.get_mut(&chunk).unwrap().pending = None;
                Ok(())
            }
            Op::Sync => {
                self.runtime.block_on(self.store.sync())?;
                self.synced = self.model.iter().map(|(c, m)| (*c, m.version)).collect();
                Ok(())
            }
            Op::Maintain => self.store.maintain_for_tests(),
            Op::ForgetCache => {
                self.options.read_cache.clear();
                Ok(())
            }
            Op::Reopen => {
                self.disk.restart();
                self.reopen();
                Ok(())
            }
            Op::Crash => {
                self.disk.crash();
                self.options.read_cache.clear();
                self.reopen();
                self.store.audit_for_tests().unwrap();
                self.check_after_power_loss();
                Ok(())
            }
        }
    }

    fn commit(&mut self, chunk: u32) -> Result<()> {
        let Some((version, _)) = self.model.get(&chunk).and_then(|m| m.pending.clone()) else { return Ok(()) };
        let info = self.runtime.block_on(self.store.commit(id(chunk), UpdateVersion(version)))?;
        assert_eq!(info.update_version, UpdateVersion(version));
        let state = self.model.get_mut(&chunk).unwrap();
        let (version, content) = state.pending.take().unwrap();
        (state.version, state.content) = (version, content);
        if self.options.durable_writes {
            self.synced.insert(chunk, version);
        }
        Ok(())
    }

    pub fn read(&self, chunk: u32, offset: u32, length: u32) -> Result<ReadOut> {
        self.runtime.block_on(self.store.read(id(chunk), offset, length))
    }

    /// Every readable byte is what the model says, whole and in parts.
    pub fn check(&self) {
        for (&chunk, model) in &self.model {
            let meta = self.store.chunk(id(chunk));
            let committed = meta.as_ref().and_then(|m| m.committed.clone());
            assert_eq!(committed.as_ref().map_or(0, |c| c.update_version.0), model.version, "chunk {chunk}");
            let pending = meta.and_then(|m| m.pending).map(|p| p.update_version.0);
            assert_eq!(pending, model.pending.as_ref().map(|(v, _)| *v), "chunk {chunk}");
            self.check_content(chunk, committed, &model.content);
        }
    }

    fn check_content(&self, chunk: u32, committed: Option<VersionInfo>, content: &Content) {
        let Some(content) = content else {
            assert_eq!(self.read(chunk, 0, CHUNK).err().map(|e| e.code), Some(Code::ChunkNotFound));
            return;
        };
        let info = committed.expect("content is committed");
        assert_eq!(info.length as usize, content.len());
        let middle = (content.len() as u32 / 2) / 4096 * 4096;
        for (offset, length) in [(middle, 8192), (0, CHUNK), (middle, CHUNK)] {
            let out = self.read(chunk, offset, length).unwrap_or_else(|e| panic!("chunk {chunk}: {e}"));
            let start = (offset as usize).min(content.len());
            let end = (start + length as usize).min(content.len());
            assert!(bytes_of(&out) == content[start..end], "chunk {chunk} version {} differs", info.update_version);
            verify_crcs(offset as usize, &bytes_of(&out), &out.crcs).unwrap();
        }
    }

    /// After a power loss every chunk is at a version not older than the synced one, its bytes are those of
    /// that version, and the model continues from there.
    pub fn check_after_power_loss(&mut self) {
        for chunk in self.model.keys().copied().collect::<Vec<_>>() {
            let meta = self.store.chunk(id(chunk));
            let committed = meta.as_ref().and_then(|m| m.committed.clone());
            let version = committed.as_ref().map_or(0, |c| c.update_version.0);
            let synced = self.synced.get(&chunk).copied().unwrap_or(0);
            assert!(version >= synced, "chunk {chunk} fell back to {version}, synced was {synced}");
            let content = if version == 0 { None } else { self.history[&(chunk, version)].clone() };
            self.check_content(chunk, committed, &content);
            let pending = meta.and_then(|m| m.pending).map(|p| p.update_version.0);
            let model = self.model.get_mut(&chunk).unwrap();
            (model.version, model.content) = (version, content);
            model.pending = pending.map(|v| (v, self.history[&(chunk, v)].clone()));
        }
        self.synced = self.model.iter().map(|(c, m)| (*c, m.version)).collect();
        // A pending version that survived must be readable too once it is committed.
        for chunk in self.model.keys().copied().collect::<Vec<_>>() {
            self.commit(chunk).unwrap();
        }
        self.check();
    }
}
