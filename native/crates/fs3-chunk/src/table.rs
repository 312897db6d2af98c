use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, Weak};

use fs3_core::{ChunkId, Region};

use crate::packed::Packed;
use crate::{
    BLOCK_BYTES, Block, Blocks, Body, ChunkImage, ChunkMeta, Location, Prepare, Record, VersionImage, VersionInfo,
    WriterRecord, block_count, chunk_crc, remember, zero_block, zero_block_crc,
};

/// A crc block of new bytes that is in the log but not yet in its place.
#[derive(Clone)]
pub struct Patch {
    /// 4 KiB; the last block of a chunk is padded.
    pub bytes: Region,
    /// Position of the record that committed it (of its prepare before that). It may be written in place once
    /// the log is durable up to here; earlier, a power loss could bring back the version without it.
    pub position: u64,
}

impl Patch {
    // Patches of zeros share their bytes. Taking one for another is fine: what they make of the block is the same.
    fn same(&self, other: &Patch) -> bool {
        std::ptr::eq(self.bytes.as_ptr(), other.bytes.as_ptr())
    }
}

/// One immutable version of a chunk. A reader that holds it can read all its bytes for as long as it likes.
#[derive(Clone)]
pub struct Version {
    /// What it is.
    pub info: VersionInfo,
    /// Where its bytes are, except for those in `patches`; none when it has no bytes.
    pub block: Option<Arc<Block>>,
    /// Checksums of its crc blocks.
    pub crcs: Vec<u32>,
    /// Crc blocks whose bytes are not in `block` yet.
    pub patches: Arc<BTreeMap<u32, Patch>>,
    /// Wall-clock milliseconds of the commit.
    pub time_ms: i64,
}

/// A prepared version.
#[derive(Clone)]
pub struct Pending {
    /// The version.
    pub version: Arc<Version>,
    writer: Option<WriterRecord>,
    writers: Option<Vec<WriterRecord>>,
}

/// The state of one chunk.
#[derive(Clone, Default)]
pub struct Chunk {
    /// Position of the last record applied to it.
    pub position: u64,
    /// What readers get.
    pub committed: Option<Arc<Version>>,
    /// Prepared, not yet committed.
    pub pending: Option<Pending>,
    /// Exactly-once records, oldest first.
    pub writers: Vec<WriterRecord>,
    // Former versions in the committed version's block: while a reader holds one, patches it does not
    // have must not be written in place.
    superseded: Vec<Weak<Version>>,
    // Used since it was last looked at for packing.
    used: bool,
    // Waits in `Table::live_queue`.
    queued: bool,
}

impl Chunk {
    /// Whether nobody holds anything of it and nothing of it is under way.
    pub(crate) fn is_at_rest(&mut self) -> bool {
        !self.has_old_readers()
            && self.pending.is_none()
            && self.committed.as_ref().is_some_and(|v| {
                v.patches.is_empty()
                    && Arc::strong_count(v) == 1
                    && v.block.as_ref().is_none_or(|b| Arc::strong_count(b) == 1)
            })
    }

    /// The state without the bytes.
    pub fn meta(&self) -> ChunkMeta {
        ChunkMeta {
            committed: self.committed.as_ref().map(|v| v.info.clone()),
            pending: self.pending.as_ref().map(|p| p.version.info.clone()),
            writers: self.writers.clone(),
            rotten: self.committed.as_ref().and_then(|v| v.block.as_ref()).is_some_and(|b| b.is_rotten()),
        }
    }

    /// Whether a reader may still hold a former version in the same block.
    pub fn has_old_readers(&mut self) -> bool {
        self.superseded.retain(|v| v.strong_count() > 0);
        !self.superseded.is_empty()
    }

    // In-place writes happen only after patches of the same blocks were put in place. In a replay such a patch
    // is there again; written once more it would undo the later write.
    fn drop_patches_from(&mut self, first: u32) {
        if let Some(v) = self.committed.as_mut().filter(|v| v.patches.range(first..).next().is_some()) {
            let mut new = (**v).clone();
            Arc::make_mut(&mut new.patches).retain(|block, _| *block < first);
            *v = Arc::new(new);
        }
    }

    fn supersede(&mut self, new: Arc<Version>) {
        if let Some(old) = self.committed.replace(new.clone()) {
            let same = matches!((&old.block, &new.block), (Some(a), Some(b)) if Arc::ptr_eq(a, b));
            if same {
                self.superseded.retain(|v| v.strong_count() > 0);
                self.superseded.push(Arc::downgrade(&old));
            } else {
                self.superseded.clear();
            }
        }
    }
}

/// Live chunks looked at for packing by each operation that adds one.
const PACK_STEPS: usize = 2;

enum Entry {
    Live(Box<Chunk>),
    Packed(Packed),
}

impl Entry {
    fn meta(&self, id: ChunkId) -> ChunkMeta {
        match self {
            Entry::Live(chunk) => chunk.meta(),
            Entry::Packed(packed) => packed.meta(id),
        }
    }
}

/// All chunks of a target: the state that the records of the log build.
pub struct Table {
    entries: BTreeMap<ChunkId, Entry>,
    // Live chunks as they came to life. One that was used meanwhile goes round again (CLOCK).
    live_queue: VecDeque<ChunkId>,
    live_chunks_max: usize,
    blocks: Arc<Blocks>,
    patched: BTreeSet<ChunkId>,
    patch_blocks: u64,
    readable: u64,
    // Removed chunks in the order of removal, to be forgotten some time later.
    tombstones: VecDeque<(i64, ChunkId)>,
}

/// A table being filled from a snapshot, whose chunks come in order.
pub struct SnapshotLoad {
    table: Table,
    entries: Vec<(ChunkId, Entry)>,
}

impl SnapshotLoad {
    /// Into a table as [`Table::new`] makes it.
    pub fn new(blocks: Arc<Blocks>, live_chunks_max: usize) -> Self {
        Self { table: Table::new(blocks, live_chunks_max), entries: vec![] }
    }

    /// Take the record of a chunk, encoded as `payload`.
    pub fn add(&mut self, payload: &[u8], image: ChunkImage) {
        let id = image.id;
        match Packed::from_record(payload, &image) {
            Some(packed) => {
                let summary = packed.summary();
                self.table.readable += u64::from(!summary.removed);
                if let Some(at) = summary.at {
                    self.table.blocks.note_parked(at);
                }
                if summary.removed {
                    self.table.tombstones.push_back((summary.time_ms, id));
                }
                self.entries.push((id, Entry::Packed(packed)));
            }
            None => self.table.apply(image.position, Record::Chunk(image), None),
        }
    }

    /// The filled table.
    pub fn finish(self) -> Table {
        let mut table = self.table;
        // Made of sorted entries a tree is dense.
        let mut packed = BTreeMap::from_iter(self.entries);
        table.entries.append(&mut packed);
        table.tombstones.make_contiguous().sort_unstable();
        table
    }
}

impl Table {
    /// An empty table whose block handles are made by `blocks`. Beyond `live_chunks_max`, chunks that are not used and
    /// of which nobody holds anything are packed.
    pub fn new(blocks: Arc<Blocks>, live_chunks_max: usize) -> Self {
        Self {
            entries: BTreeMap::new(),
            live_queue: VecDeque::new(),
            live_chunks_max,
            blocks,
            patched: BTreeSet::new(),
            patch_blocks: 0,
            readable: 0,
            tombstones: VecDeque::new(),
        }
    }

    /// One chunk, in its live form.
    pub fn get(&mut self, id: ChunkId) -> Option<&Chunk> {
        self.pack_surplus();
        let entry = self.entries.get_mut(&id)?;
        if let Entry::Packed(packed) = entry {
            let mut chunk = std::mem::take(packed).unpack(id, &self.blocks);
            chunk.queued = true;
            self.live_queue.push_back(id);
            *entry = Entry::Live(chunk);
        }
        match entry {
            Entry::Live(chunk) => {
                chunk.used = true;
                Some(chunk)
            }
            Entry::Packed(_) => unreachable!("made live above"),
        }
    }

    /// State of one chunk without its bytes.
    pub fn meta(&self, id: ChunkId) -> Option<ChunkMeta> {
        self.entries.get(&id).map(|entry| entry.meta(id))
    }

    /// States of up to all chunks after `after`, in order.
    pub fn metas_after(&self, after: Option<ChunkId>) -> impl Iterator<Item = (ChunkId, ChunkMeta)> {
        let range = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        self.entries.range(range).map(|(id, entry)| (*id, entry.meta(*id)))
    }

    /// States of the chunks `first..=last`, in order.
    pub fn metas_within(&self, first: ChunkId, last: ChunkId) -> impl Iterator<Item = (ChunkId, ChunkMeta)> {
        self.entries.range(first..=last).map(|(id, entry)| (*id, entry.meta(*id)))
    }

    /// Call `each` with up to `limit` chunks after `after`, in order, and what appends the chunk's record of a snapshot
    /// to a buffer. Returns the last of them.
    pub fn for_snapshot(
        &self,
        after: Option<ChunkId>,
        limit: usize,
        mut each: impl FnMut(&dyn Fn(&mut Vec<u8>)),
    ) -> Option<ChunkId> {
        let range = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let mut last = None;
        for (id, entry) in self.entries.range(range).take(limit) {
            match entry {
                Entry::Live(chunk) => each(&|out| Record::Chunk(ChunkImage::from((id, &**chunk))).encode(out)),
                Entry::Packed(packed) => each(&|out| packed.encode(*id, out)),
            }
            last = Some(*id);
        }
        last
    }

    fn pack_surplus(&mut self) {
        for _ in 0..PACK_STEPS {
            if self.live_queue.len() <= self.live_chunks_max {
                return;
            }
            let Some(id) = self.live_queue.pop_front() else { return };
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            let Entry::Live(chunk) = entry else { continue };
            if std::mem::take(&mut chunk.used) {
                self.live_queue.push_back(id);
                continue;
            }
            match Packed::pack(id, std::mem::take(chunk)) {
                Ok(packed) => *entry = Entry::Packed(packed),
                Err(live) => {
                    *chunk = live;
                    self.live_queue.push_back(id);
                }
            }
        }
    }

    /// Chunks that have readable content.
    pub fn live_chunks(&self) -> u64 {
        self.readable
    }

    /// Position of the last record applied to a chunk; 0 when there is no trace of it.
    pub fn position(&self, id: ChunkId) -> u64 {
        match self.entries.get(&id) {
            Some(Entry::Live(chunk)) => chunk.position,
            Some(Entry::Packed(packed)) => packed.summary().position,
            None => 0,
        }
    }

    /// Bytes of patches of committed versions.
    pub fn patch_bytes(&self) -> u64 {
        self.patch_blocks * u64::from(BLOCK_BYTES)
    }

    /// Chunks whose committed version has patches.
    pub fn patched(&self) -> Vec<ChunkId> {
        self.patched.iter().copied().collect()
    }

    /// Locations of all blocks referred to, ascending, once for each chunk.
    pub fn locations(&self) -> Vec<Location> {
        let mut all = vec![];
        for entry in self.entries.values() {
            match entry {
                Entry::Live(c) => {
                    let at = |v: &Arc<Version>| v.block.as_ref().map(|b| b.location);
                    let (committed, pending) =
                        (c.committed.as_ref().and_then(at), c.pending.as_ref().and_then(|p| at(&p.version)));
                    all.extend(committed);
                    all.extend(pending.filter(|_| pending != committed));
                }
                Entry::Packed(packed) => all.extend(packed.summary().at),
            }
        }
        all.sort();
        all
    }

    /// The next tombstone that was made before `time_ms`, if it still is one.
    pub fn pop_tombstone(&mut self, time_ms: i64) -> Option<ChunkId> {
        while self.tombstones.front().is_some_and(|(at, _)| *at < time_ms) {
            let (at, id) = self.tombstones.pop_front()?;
            let Some(chunk) = self.get(id) else { continue };
            let same = chunk.committed.as_ref().is_some_and(|v| v.info.removed && v.time_ms == at);
            if same && chunk.pending.is_none() {
                return Some(id);
            }
        }
        None
    }

    /// Apply a record of log position `position`. `block` is the handle of the block a whole prepare
    /// names; replays pass `None` and it is made here. A record that does not fit the state (possible only
    /// before a later record of the replay that drops the chunk) is ignored.
    pub fn apply(&mut self, position: u64, record: Record, block: Option<Arc<Block>>) {
        let Some(id) = record.id() else { return };
        let mut chunk = self.take_out(id);
        chunk.position = position;
        match record {
            Record::Prepare(prepare) => {
                if let Body::Append { first, .. } = prepare.body {
                    chunk.drop_patches_from(first);
                }
                if let Some(pending) = pending_of(&chunk, prepare, position, block, &self.blocks) {
                    chunk.pending = Some(pending);
                }
            }
            Record::Commit { version, time_ms, .. } => commit(&mut chunk, position, version, time_ms),
            Record::Abort { version, .. } => {
                if chunk.pending.as_ref().is_some_and(|p| p.version.info.update_version == version) {
                    chunk.pending = None;
                }
            }
            Record::Forget { .. } => chunk.committed = None,
            Record::Chunk(image) => *chunk = chunk_of(image, |at| self.blocks.handle(at)),
            Record::Synced { .. } | Record::End { .. } => {}
        }
        self.put_back(id, chunk);
    }

    /// `blocks` of the committed version were written in place; patches that came since stay.
    pub fn patches_applied(&mut self, id: ChunkId, written: &BTreeMap<u32, Patch>) {
        let mut chunk = self.take_out(id);
        if let Some(committed) = chunk.committed.clone()
            && let Some(version) = without(&committed, written)
        {
            chunk.supersede(version);
        }
        if let Some(pending) = &mut chunk.pending
            && let Some(version) = without(&pending.version, written)
        {
            pending.version = version;
        }
        self.put_back(id, chunk);
    }

    /// Whether former versions of the chunk may still be read.
    pub fn has_old_readers(&mut self, id: ChunkId) -> bool {
        match self.entries.get_mut(&id) {
            Some(Entry::Live(chunk)) => chunk.has_old_readers(),
            _ => false,
        }
    }

    /// Put a chunk back to a former state, or drop it.
    pub fn restore(&mut self, id: ChunkId, state: Option<Chunk>) {
        self.take_out(id);
        let mut chunk = Box::new(state.unwrap_or_default());
        chunk.queued = false;
        self.put_back(id, chunk);
    }

    // The chunk is taken out of all sums while it is changed.
    fn take_out(&mut self, id: ChunkId) -> Box<Chunk> {
        let chunk = match self.entries.remove(&id) {
            Some(Entry::Live(chunk)) => chunk,
            Some(Entry::Packed(packed)) => packed.unpack(id, &self.blocks),
            None => Box::default(),
        };
        if let Some(v) = &chunk.committed {
            self.readable -= u64::from(!v.info.removed);
            self.patch_blocks -= v.patches.len() as u64;
            self.patched.remove(&id);
        }
        chunk
    }

    fn put_back(&mut self, id: ChunkId, mut chunk: Box<Chunk>) {
        if let Some(v) = &chunk.committed {
            self.readable += u64::from(!v.info.removed);
            self.patch_blocks += v.patches.len() as u64;
            if !v.patches.is_empty() {
                self.patched.insert(id);
            }
            if v.info.removed && self.tombstones.back() != Some(&(v.time_ms, id)) && chunk.pending.is_none() {
                self.tombstones.push_back((v.time_ms, id));
            }
        }
        if chunk.committed.is_some() || chunk.pending.is_some() {
            chunk.used = true;
            if !std::mem::replace(&mut chunk.queued, true) {
                self.live_queue.push_back(id);
            }
            self.entries.insert(id, Entry::Live(chunk));
            self.pack_surplus();
        }
    }
}

/// The chunk of an image, whose blocks `handle` makes.
pub(crate) fn chunk_of(image: ChunkImage, handle: impl Fn(Location) -> Arc<Block>) -> Chunk {
    let committed = image.committed.map(|v| {
        let block = v.at.map(&handle);
        Arc::new(version_of(v, block))
    });
    let pending = image.pending.map(|(v, writer, writers)| {
        let shared = committed.as_ref().and_then(|c| c.block.clone()).filter(|b| Some(b.location) == v.at);
        let block = shared.or_else(|| v.at.map(&handle));
        Pending { version: Arc::new(version_of(v, block)), writer, writers }
    });
    Chunk { position: image.position, committed, pending, writers: image.writers, ..Chunk::default() }
}

/// The chunk's state as a snapshot keeps it.
impl From<(&ChunkId, &Chunk)> for ChunkImage {
    fn from((id, chunk): (&ChunkId, &Chunk)) -> Self {
        Self {
            id: *id,
            position: chunk.position,
            committed: chunk.committed.as_deref().map(image_of),
            pending: chunk.pending.as_ref().map(|p| (image_of(&p.version), p.writer, p.writers.clone())),
            writers: chunk.writers.clone(),
        }
    }
}

fn image_of(v: &Version) -> VersionImage {
    VersionImage {
        update_version: v.info.update_version,
        chain_version: v.info.chain_version,
        length: v.info.length,
        chunk_bytes: v.info.chunk_bytes,
        removed: v.info.removed,
        time_ms: v.time_ms,
        at: v.block.as_ref().map(|b| b.location),
        high_water: v.block.as_ref().map_or(0, |b| b.high_water()),
        crcs: v.crcs.clone(),
        patches: v.patches.iter().map(|(block, p)| (*block, p.bytes.clone())).collect(),
    }
}

fn version_of(image: VersionImage, block: Option<Arc<Block>>) -> Version {
    if let Some(block) = &block {
        block.raise_high_water(image.high_water.max(image.length));
    }
    Version {
        info: VersionInfo {
            update_version: image.update_version,
            chain_version: image.chain_version,
            length: image.length,
            chunk_bytes: image.chunk_bytes,
            chunk_crc32c: chunk_crc(&image.crcs),
            removed: image.removed,
        },
        block,
        crcs: image.crcs,
        // What a snapshot holds is durable, so its patches may be written in place at once.
        patches: Arc::new(
            image.patches.into_iter().map(|(block, bytes)| (block, Patch { bytes, position: 0 })).collect(),
        ),
        time_ms: image.time_ms,
    }
}

fn commit(chunk: &mut Chunk, position: u64, version: fs3_core::UpdateVersion, time_ms: i64) {
    if chunk.pending.as_ref().is_none_or(|p| p.version.info.update_version != version) {
        return;
    }
    let Some(pending) = chunk.pending.take() else { return };
    let mut new = Arc::unwrap_or_clone(pending.version);
    new.time_ms = time_ms;
    if !new.patches.is_empty() {
        let old = chunk.committed.as_ref().map(|v| v.patches.clone()).unwrap_or_default();
        for (block, patch) in Arc::make_mut(&mut new.patches) {
            if old.get(block).is_none_or(|o| !o.same(patch)) {
                patch.position = position;
            }
        }
    }
    chunk.supersede(Arc::new(new));
    if let Some(writers) = pending.writers {
        chunk.writers = writers;
    }
    if let Some(writer) = pending.writer {
        remember(&mut chunk.writers, writer);
    }
}

fn without(version: &Arc<Version>, written: &BTreeMap<u32, Patch>) -> Option<Arc<Version>> {
    let mut patches = (*version.patches).clone();
    patches.retain(|block, p| written.get(block).is_none_or(|w| !w.same(p)));
    (patches.len() != version.patches.len())
        .then(|| Arc::new(Version { patches: Arc::new(patches), ..(**version).clone() }))
}

/// The version that `prepare` makes of the committed one.
fn pending_of(
    chunk: &Chunk,
    prepare: Prepare,
    position: u64,
    block: Option<Arc<Block>>,
    blocks: &Arc<Blocks>,
) -> Option<Pending> {
    let base = chunk.committed.as_deref().filter(|v| !v.info.removed);
    let removed = matches!(prepare.body, Body::Tombstone);
    let (block, crcs, patches) = match prepare.body {
        Body::Whole { at, crcs } => (block.or_else(|| at.map(|at| blocks.handle(at))), crcs, Arc::default()),
        Body::Append { first, crcs } => {
            let base = base?;
            (base.block.clone(), spliced(&base.crcs, first, &crcs)?, base.patches.clone())
        }
        Body::Patch { first, crcs, blocks } => {
            let base = base?;
            let mut patches = base.patches.clone();
            let map = Arc::make_mut(&mut patches);
            for (i, bytes) in blocks.into_iter().enumerate() {
                map.insert(first + i as u32, Patch { bytes, position });
            }
            (base.block.clone(), spliced(&base.crcs, first, &crcs)?, patches)
        }
        Body::Punch { first, end, edges } => {
            let base = base?;
            let (mut crcs, mut patches) = (base.crcs.clone(), base.patches.clone());
            crcs.get_mut(first as usize..end as usize)?.fill(zero_block_crc());
            let map = Arc::make_mut(&mut patches);
            map.extend((first..end).map(|block| (block, Patch { bytes: zero_block(), position })));
            for (block, crc, bytes) in edges {
                *crcs.get_mut(block as usize)? = crc;
                map.insert(block, Patch { bytes, position });
            }
            (base.block.clone(), crcs, patches)
        }
        Body::Cut { tail_crc } => {
            let base = base?;
            let kept = block_count(prepare.length);
            let mut crcs = base.crcs.get(..kept as usize)?.to_vec();
            if let (Some(crc), Some(last)) = (tail_crc, crcs.last_mut()) {
                *last = crc;
            }
            let mut patches = base.patches.clone();
            if patches.range(kept..).next().is_some() {
                Arc::make_mut(&mut patches).retain(|block, _| *block < kept);
            }
            (base.block.clone().filter(|_| kept > 0), crcs, patches)
        }
        Body::Tombstone => (None, vec![], Arc::default()),
    };
    if crcs.len() != block_count(prepare.length) as usize {
        return None;
    }
    if let Some(block) = &block {
        block.raise_high_water(prepare.length);
    }
    let info = VersionInfo {
        update_version: prepare.update_version,
        chain_version: prepare.chain_version,
        length: prepare.length,
        chunk_bytes: prepare.chunk_bytes,
        chunk_crc32c: chunk_crc(&crcs),
        removed,
    };
    let version = Arc::new(Version { info, block, crcs, patches, time_ms: 0 });
    Some(Pending { version, writer: prepare.writer, writers: prepare.writers })
}

fn spliced(base: &[u32], first: u32, new: &[u32]) -> Option<Vec<u32>> {
    let first = first as usize;
    let mut crcs = base.get(..first)?.to_vec();
    crcs.extend_from_slice(new);
    crcs.extend_from_slice(base.get(crcs.len()..).unwrap_or(&[]));
    Some(crcs)
}
