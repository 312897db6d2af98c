//! Serving rings: what was prepared goes between shared memory and the network, without a copy.

use std::sync::Arc;

use fs3_client::{Code, OpenFile, ReadOp, Region, RegionMut, WriteOp};
use fs3_ring::daemon::{Served, Taken};
use fs3_ring::guard::Guarded;
use fs3_ring::layout::{Config, FORBID_HOLES};

use crate::caller::Who;
use crate::core::{Core, Handle};
use crate::stats::Op as Counted;
use crate::virt::iovs::Announced;

/// I/Os and bytes that go to the services together: large ones answer for themselves, small ones share requests.
const GROUP_OPS_MAX: usize = 256;
const GROUP_BYTES_MAX: usize = 2 << 20;

/// A ring of a process.
pub(crate) struct Ring {
    pub served: Served,
    pub config: Config,
    pub who: Who,
    pub process: u32,
}

/// An I/O that was checked.
struct Op {
    number: u64,
    handle: Arc<Handle>,
    offset: u64,
    window: Window,
}

/// Memory of the application, kept mapped.
struct Window {
    start: *mut u8,
    bytes: usize,
    owner: Arc<Guarded>,
}

// SAFETY: the owner keeps the memory mapped; it is shared with the application in any case.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    fn writable(&self) -> RegionMut {
        // SAFETY: checked to lie in the owner's mapping. No other part of the daemon uses the bytes unless the application
        // names them twice, whose bytes are wrong then, or fail their checksums.
        unsafe { RegionMut::from_raw(self.start, self.bytes, self.owner.clone()) }
    }

    fn readable(&self) -> Region {
        // SAFETY: as above; what the application changes meanwhile is refused as damaged, or stored as of some moment.
        unsafe { Region::from_raw(self.start, self.bytes, self.owner.clone()) }
    }
}

/// Take batches from a ring and begin them, until it ends. Runs on a thread of its own, which sleeps while there is none.
pub(crate) fn serve(core: &Arc<Core>, ring: &Arc<Ring>) {
    loop {
        match ring.served.take(&ring.config) {
            Ok(Some(batch)) => core.begin_batch(ring, batch),
            Ok(None) => return,
            Err(error) => {
                let uid = ring.who.uid;
                tracing::warn!(ring.process, uid, errno = error.0, "a ring has impossible counters: it is closed");
                return ring.served.close(error.0);
            }
        }
    }
}

impl Core {
    fn begin_batch(self: &Arc<Self>, ring: &Arc<Ring>, batch: Vec<Taken>) {
        let (mut group, mut bytes) = (Vec::new(), 0);
        let mut last = None;
        for taken in batch {
            match self.check_io(ring, &taken, &mut last) {
                Err(errno) => ring.served.complete([(taken.number, -i64::from(errno))]),
                Ok(op) => {
                    if !group.is_empty() && bytes + op.window.bytes > GROUP_BYTES_MAX || group.len() >= GROUP_OPS_MAX {
                        self.begin_group(ring, std::mem::take(&mut group));
                        bytes = 0;
                    }
                    bytes += op.window.bytes;
                    group.push(op);
                }
            }
        }
        if !group.is_empty() {
            self.begin_group(ring, group);
        }
    }

    /// Whether the application may do what it wrote; `last` is the memory of the I/O before, known to be whole.
    fn check_io(&self, ring: &Ring, taken: &Taken, last: &mut Option<([u8; 16], Arc<Announced>)>) -> Result<Op, i32> {
        let io = &taken.submission;
        let handle = self.rings.file(io.token, ring.who, ring.process).ok_or(libc::EBADF)?;
        let allowed = if ring.config.for_read { handle.read } else { handle.write };
        if !allowed {
            return Err(libc::EACCES);
        }
        self.check_locks(&handle).map_err(|e| e.code())?;
        if last.as_ref().is_none_or(|(id, _)| *id != io.iov) {
            let announced = self.rings.iov(&io.iov, ring.who).ok_or(libc::EINVAL)?;
            if announced.iov.memory.mend() {
                return Err(libc::EFAULT);
            }
            *last = Some((io.iov, announced));
        }
        let (_, announced) = last.as_ref().expect("just set");
        let (start, bytes) = announced.iov.window(io.iov_offset, io.length).map_err(|e| e.0)?;
        if io.offset.checked_add(io.length).is_none_or(|end| end > i64::MAX as u64) {
            return Err(libc::EINVAL);
        }
        let window = Window { start, bytes, owner: announced.iov.memory.clone() };
        Ok(Op { number: taken.number, handle, offset: io.offset, window })
    }

    fn begin_group(self: &Arc<Self>, ring: &Arc<Ring>, group: Vec<Op>) {
        let (core, ring) = (self.clone(), ring.clone());
        let job = if ring.config.for_read { Counted::RingRead } else { Counted::RingWrite };
        self.spawn(job, async move {
            let unfinished = Unfinished { ring: &ring, numbers: group.iter().map(|op| op.number).collect() };
            let results = if ring.config.for_read {
                core.read_group(&ring, &group).await
            } else {
                core.write_group(&ring, &group).await
            };
            let bytes = results.iter().filter_map(|result| usize::try_from(*result).ok()).sum();
            if ring.config.for_read {
                core.stats.read(bytes)
            } else {
                core.stats.written(bytes)
            }
            unfinished.finish(results);
        });
    }

    async fn read_group(self: &Arc<Self>, ring: &Ring, group: &[Op]) -> Vec<i64> {
        let mut results: Vec<Option<i64>> = vec![None; group.len()];
        let (mut reads, mut places) = (Vec::with_capacity(group.len()), Vec::with_capacity(group.len()));
        for (at, op) in group.iter().enumerate() {
            let end = op.offset + op.window.bytes as u64;
            op.handle.inode.settle(&self.io, op.offset, end).await;
            match self.file_for_read(ring, op).await {
                Ok(file) => {
                    reads.push(ReadOp { file, offset: op.offset, buf: op.window.writable() });
                    places.push(at);
                }
                Err(errno) => results[at] = Some(-i64::from(errno)),
            }
        }
        for (at, (result, region)) in places.into_iter().zip(self.client.read_many(reads).await) {
            drop(region);
            results[at] = match result {
                Ok(bytes) => Some(bytes as i64),
                // It was closed early in the middle of it.
                Err(e) if e.code == Code::StaleHandle => Some(self.read_again(&group[at]).await),
                Err(e) => Some(-i64::from(e.errno())),
            };
        }
        results.into_iter().map(|result| result.expect("every I/O was done or refused")).collect()
    }

    /// The file of a read. Errors: ENODATA when holes are forbidden and it would meet one.
    async fn file_for_read(&self, ring: &Ring, op: &Op) -> Result<Arc<OpenFile>, i32> {
        let file = self.file(&op.handle).await.map_err(|e| e.errno())?;
        if ring.config.flags & FORBID_HOLES == 0 {
            return Ok(file);
        }
        let end = op.handle.inode.length(&*file).min(op.offset + op.window.bytes as u64);
        match file.seek_hole(op.offset).await {
            Ok(Some(hole)) if hole < end => Err(libc::ENODATA),
            Ok(_) => Ok(file),
            Err(e) => Err(e.errno()),
        }
    }

    async fn read_again(&self, op: &Op) -> i64 {
        let read = |file: Arc<OpenFile>| async move { file.read(op.offset, op.window.writable()).await.0 };
        self.with_file(&op.handle, read).await.map_or_else(|e| -i64::from(e.errno()), |bytes| bytes as i64)
    }

    async fn write_group(self: &Arc<Self>, ring: &Ring, group: &[Op]) -> Vec<i64> {
        let mut results: Vec<Option<i64>> = vec![None; group.len()];
        let (mut writes, mut places) = (Vec::with_capacity(group.len()), Vec::with_capacity(group.len()));
        for (at, op) in group.iter().enumerate() {
            match self.file_for_write(ring, op).await {
                Ok(file) => {
                    writes.push(WriteOp { file, offset: op.offset, data: op.window.readable() });
                    places.push(at);
                }
                Err(errno) => results[at] = Some(-i64::from(errno)),
            }
        }
        for (at, result) in places.into_iter().zip(self.client.write_many(writes).await) {
            let op = &group[at];
            let result = match result {
                Err(e) if e.code == Code::StaleHandle => self.write_again(op).await,
                other => other,
            };
            op.handle.inode.written_through(&self.io, op.offset, op.offset + op.window.bytes as u64);
            results[at] = Some(result.map_or_else(|e| -i64::from(e.errno()), |bytes| bytes as i64));
        }
        self.settle_writes(group, &mut results).await;
        results.into_iter().map(|result| result.expect("every I/O was done or refused")).collect()
    }

    /// The file of a write, when everything written before by other ways is where it belongs.
    async fn file_for_write(&self, ring: &Ring, op: &Op) -> Result<Arc<OpenFile>, i32> {
        let inode = &op.handle.inode;
        if !ring.who.is_root() && inode.has_set_id() {
            self.drop_set_id(inode.id).await.map_err(|e| e.errno())?;
        }
        inode.settle(&self.io, op.offset, op.offset + op.window.bytes as u64).await;
        self.file(&op.handle).await.map_err(|e| e.errno())
    }

    async fn write_again(&self, op: &Op) -> fs3_client::Result<usize> {
        let write = |file: Arc<OpenFile>| async move { file.write(op.offset, op.window.readable()).await };
        self.with_file(&op.handle, write).await
    }

    /// Before writes are told: no page of the kernel is older than them, and files that are open with O_SYNC are synced.
    async fn settle_writes(&self, group: &[Op], results: &mut [Option<i64>]) {
        let mut inodes: Vec<_> = group.iter().map(|op| op.handle.inode.id).collect();
        inodes.sort_unstable();
        inodes.dedup();
        let forgotten: Vec<_> = inodes.into_iter().filter_map(|inode| self.io.forget_pages(inode)).collect();
        for done in forgotten {
            let _ = done.await;
        }
        let mut durable: Vec<_> = group.iter().map(|op| &op.handle).filter(|handle| handle.durable).collect();
        durable.dedup_by(|a, b| Arc::ptr_eq(a, b));
        for handle in durable {
            let Err(error) = self.fsync(handle).await else { continue };
            for (op, result) in group.iter().zip(&mut *results) {
                if Arc::ptr_eq(&op.handle, handle) && result.is_some_and(|r| r >= 0) {
                    *result = Some(-i64::from(error.errno()));
                }
            }
        }
    }
}

/// I/Os whose results are owed to the application, whatever becomes of the task that does them.
struct Unfinished<'a> {
    ring: &'a Ring,
    numbers: Vec<u64>,
}

impl Unfinished<'_> {
    fn finish(mut self, results: Vec<i64>) {
        self.ring.served.complete(std::mem::take(&mut self.numbers).into_iter().zip(results));
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        let lost = std::mem::take(&mut self.numbers);
        if !lost.is_empty() {
            self.ring.served.complete(lost.into_iter().map(|number| (number, -i64::from(libc::EIO))));
        }
    }
}
