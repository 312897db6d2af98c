//! Reading, writing and syncing open files.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fs3_client::{Code, Error, OpenFile, Region, Result, at_inode, at_path};
use fuser::{ReplyData, ReplyWrite};

use crate::blocks::Block;
use crate::buffers::LARGE;
use crate::caller::{Who, superuser};
use crate::core::{Core, Handle, Job, errno};
use crate::inode::{Accepted, Place};
use crate::mount::Cache;
use crate::readahead::{BLOCK, Plan};
use crate::stats::Op;
use crate::told::Teller;

/// A write that found no memory is given up after this long.
const WRITE_WAIT_MAX: Duration = Duration::from_secs(120);

/// A read as planned on arrival, when the order of requests is still known.
pub(crate) struct PlannedRead {
    pub handle: Arc<Handle>,
    pub offset: u64,
    pub len: usize,
    pub plan: Plan,
}

impl Core {
    /// Plan a read. Never waits.
    pub fn plan_read(&self, handle: Arc<Handle>, offset: u64, len: usize) -> PlannedRead {
        let len = len.min(LARGE);
        let plan = match handle.open_file() {
            // What was read ahead could be older than the open or the attributes that the kernel goes by.
            Some(file) if !handle.direct && self.options.cache != Cache::Strict => {
                let length = handle.inode.length(&file);
                handle.stream.lock().on_read(offset, len as u64, length)
            }
            _ => Plan::Exact,
        };
        PlannedRead { handle, offset, len, plan }
    }

    /// Read and answer.
    pub async fn read(self: &Arc<Self>, read: PlannedRead, reply: ReplyData) {
        let PlannedRead { handle, offset, len, plan } = read;
        let inode = &handle.inode;
        let mut reply = Some(reply);
        let answer = |bytes: &[u8]| {
            self.stats.read(bytes.len());
            reply.take().expect("not answered yet").data(bytes);
        };
        if inode.read_kept(offset, len, answer) {
            return self.stats.cached(true);
        }
        let reply = reply.expect("not answered yet");
        inode.settle(&self.io, offset, offset + len as u64).await;
        let blocks = match self.file(&handle).await {
            Ok(file) => self.read_blocks(&handle, &file, offset, len, plan).await,
            Err(error) => return reply.error(errno(&error)),
        };
        if self.options.cache == Cache::None
            && let Err(error) = self.learn_length(&handle, offset + len as u64).await
        {
            return reply.error(errno(&error));
        }
        let result = match blocks {
            Some(bytes) => Ok(bytes),
            None => self.with_file(&handle, |file| async move { self.read_exact(&file, offset, len).await }).await,
        };
        match result {
            Ok(bytes) => {
                self.stats.read(bytes.len());
                reply.data(&bytes);
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    /// Before a read that ends at `end`: others may have made the file longer.
    async fn learn_length(&self, handle: &Arc<Handle>, end: u64) -> Result<()> {
        match handle.open_file() {
            Some(file) if handle.inode.length(&file) >= end => Ok(()),
            _ => self.client.stat(&superuser(), at_inode(handle.inode.id)).await.map(drop),
        }
    }

    pub async fn read_exact(&self, file: &Arc<OpenFile>, offset: u64, len: usize) -> Result<Region> {
        let buffer = self.io.read_pool.take(len, || {}).await?;
        let (result, region) = file.read(offset, buffer.into_region_mut(len)).await;
        result.map(|n| region.freeze().slice(0, n))
    }

    /// Serve a read from blocks and keep the reader's blocks coming. `None`: read exactly instead.
    async fn read_blocks(
        &self,
        handle: &Arc<Handle>,
        file: &Arc<OpenFile>,
        offset: u64,
        len: usize,
        plan: Plan,
    ) -> Option<Region> {
        let Plan::Blocks { ahead } = plan else { return None };
        let len = len.min(handle.inode.length(file).saturating_sub(offset) as usize);
        if len == 0 {
            return None;
        }
        let (first, last) = (offset / BLOCK, (offset + len as u64 - 1) / BLOCK);
        let mut blocks = Vec::with_capacity(2);
        for number in first..=last {
            let there = handle.inode.blocks.get(number);
            self.stats.cached(there.is_some());
            blocks.push(there.or_else(|| self.block(handle, file, number, 0)));
        }
        for number in ahead {
            if self.block(handle, file, number, self.io.read_pool.budget() / 4).is_none() {
                break;
            }
        }
        if first == last {
            return self.take_part(handle, blocks.pop()??, offset, len).await;
        }
        let mut joined = self.io.read_pool.take(len, || {}).await.ok()?;
        let mut done = 0;
        for block in blocks {
            let at = offset + done as u64;
            let part = (len - done).min((BLOCK - at % BLOCK) as usize);
            let bytes = self.take_part(handle, block?, at, part).await?;
            joined[done..done + part].copy_from_slice(&bytes);
            done += part;
        }
        Some(joined.into_region(0, len))
    }

    async fn take_part(&self, handle: &Handle, block: Arc<Block>, offset: u64, len: usize) -> Option<Region> {
        let bytes = block.read(offset, len).await;
        match &bytes {
            Some(_) => handle.inode.blocks.consumed(&block, len),
            None => handle.inode.blocks.drop_block(&block),
        }
        bytes
    }

    /// Block `number`, asked for now if need be; `None` when data of it is not written yet or memory is short.
    fn block(&self, handle: &Handle, file: &Arc<OpenFile>, number: u64, reserve: usize) -> Option<Arc<Block>> {
        let inode = &handle.inode;
        if let Some(block) = inode.blocks.get(number) {
            return Some(block);
        }
        let (start, end) = (number * BLOCK, (number + 1) * BLOCK);
        let before = inode.settled(start, end)?;
        let buffer = self.io.read_pool.try_take(BLOCK as usize, reserve)?;
        let block = inode.blocks.fetch(&self.io.runtime, file, number, buffer);
        if inode.settled(start, end) == Some(before) {
            return Some(block);
        }
        // A write came between: it may not have seen the block that it makes stale.
        inode.blocks.drop_block(&block);
        None
    }

    /// Write and answer. Buffered data is accepted at once; only when memory is short does the caller wait.
    pub fn write(self: &Arc<Self>, handle: Arc<Handle>, place: Place, data: &[u8], reply: ReplyWrite) {
        let timing = self.stats.begin(Op::Write);
        if let Some(error) = handle.inode.new_error(&handle.told, Teller::Write) {
            return reply.error(errno(&error));
        }
        let done = match handle.inode.write(&self.io, place, data) {
            Accepted::Taken(bytes) => bytes,
            Accepted::NoWriter | Accepted::Full | Accepted::Unplaced => 0,
        };
        if done == data.len() && !handle.direct && !handle.sync {
            self.stats.written(data.len());
            return reply.written(data.len() as u32);
        }
        let (core, place) = (self.clone(), place.behind(done));
        let (rest, len) = (data[done..].to_vec(), data.len());
        self.spawn(Job::BACKGROUND, async move {
            let _timing = timing;
            match core.finish_write(&handle, place, &rest).await {
                Ok(()) => {
                    core.stats.written(len);
                    reply.written(len as u32);
                }
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    pub async fn finish_write(&self, handle: &Arc<Handle>, mut place: Place, data: &[u8]) -> Result<()> {
        let deadline = Instant::now() + WRITE_WAIT_MAX;
        let mut done = 0;
        while done < data.len() {
            self.file(handle).await?;
            match handle.inode.write(&self.io, place, &data[done..]) {
                Accepted::Taken(bytes) => {
                    done += bytes;
                    place = place.behind(bytes);
                }
                // It is being closed early at this moment; then it is opened again.
                Accepted::NoWriter => tokio::task::yield_now().await,
                Accepted::Full => {
                    handle.inode.require_room(&self.io, place, data.len() - done).await?;
                    continue;
                }
                Accepted::Unplaced => {
                    handle.inode.place(&self.io).await;
                    continue;
                }
            }
            if done < data.len() {
                if Instant::now() >= deadline {
                    return Err(Error::new(Code::Busy, "no memory came free for a write"));
                }
                let pool = &self.io.write_pool;
                drop(pool.take_leaving(LARGE, place.memory_besides(), || self.io.reclaim()).await?);
            }
        }
        if handle.direct || handle.sync {
            handle.inode.flush(&self.io).await;
            if let Some(error) = handle.inode.new_error(&handle.told, Teller::Write) {
                return Err(error);
            }
            if handle.sync {
                return self.fsync(handle).await;
            }
            if self.options.cache == Cache::None {
                handle.inode.publish(None, false).await?;
            }
        }
        Ok(())
    }

    /// `fallocate(2)`: longer files, holes, zeros. Space is not reserved; a cluster that has less free refuses.
    pub async fn fallocate(&self, who: &Who, handle: &Arc<Handle>, mode: i32, offset: u64, length: u64) -> Result<()> {
        let (keep, zero) = (mode & libc::FALLOC_FL_KEEP_SIZE != 0, mode & !libc::FALLOC_FL_KEEP_SIZE);
        let clears = match zero {
            0 => false,
            libc::FALLOC_FL_ZERO_RANGE => true,
            libc::FALLOC_FL_PUNCH_HOLE if keep => true,
            _ => return Err(Error::new(Code::NotSupported, "fallocate makes longer files, holes and zeros")),
        };
        if zero == 0 {
            let space = self.client.statfs(&superuser(), at_path(b"", false)).await?;
            if space.free_bytes < length {
                return Err(Error::new(Code::NoSpace, "the cluster has less free space"));
            }
        }
        if keep && !clears {
            return Ok(());
        }
        if !who.is_root() && handle.inode.has_set_id() {
            self.drop_set_id(handle.inode.id).await?;
        }
        // Writes that were accepted before come first: what they wrote is cleared too, and the file is as long as they make it.
        handle.inode.flush(&self.io).await;
        if let Some(error) = handle.inode.new_error(&handle.told, Teller::Write) {
            return Err(error);
        }
        let changed = self.with_file(handle, |file| async move {
            if clears {
                file.punch(offset, length).await?;
            }
            if keep { Ok(()) } else { file.extend(offset.saturating_add(length)).await }
        });
        let changed = changed.await;
        handle.inode.reshaped(&self.io);
        changed
    }

    /// SEEK_DATA and SEEK_HOLE. Data that is not written yet goes out first, so that it counts as data.
    pub async fn seek(&self, handle: &Arc<Handle>, offset: u64, hole: bool) -> Result<Option<u64>> {
        self.getattr(handle.inode.id).await?;
        handle.inode.flush(&self.io).await;
        self.with_file(handle, |file| async move {
            if hole { file.seek_hole(offset).await } else { file.seek_data(offset).await }
        })
        .await
    }

    /// Make everything written to the file survive power loss.
    pub async fn fsync(&self, handle: &Arc<Handle>) -> Result<()> {
        let inode = &handle.inode;
        inode.flush(&self.io).await;
        if let Some(error) = inode.new_error(&handle.told, Teller::Sync) {
            return Err(error);
        }
        self.with_file(handle, |file| async move {
            // A handle that only reads has no session to publish a length with.
            let writer = inode.writer().unwrap_or_else(|| file.clone());
            match writer.sync().await {
                Err(e) if e.code == Code::StaleHandle && writer.is_closed() => file.sync().await,
                result => result,
            }
        })
        .await?;
        // What sync published need not be published again; this only takes note of it.
        inode.publish(None, false).await.map(drop)
    }
}
