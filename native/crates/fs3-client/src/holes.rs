//! Where a file has data and where holes: chunks that storage does not have are holes, and so is what a chunk lacks at its end.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fs3_core::{ChunkId, Code, Error, Result};
use fs3_proto::v1::{ChunkInfo, Layout, ListChunksRequest, ListChunksResponse, Method};
use fs3_rt::{Instant, JoinSet};
use prost::Message;

use crate::OpenFile;
use crate::backoff::Backoff;
use crate::inner::Inner;
use crate::routing::stripe_width;
use crate::trace;
use crate::write::locate;

/// Chunks asked of a chain at first, and at most; a search that goes on asks for more at a time.
const PAGE_CHUNKS: std::ops::RangeInclusive<u32> = 16..=4096;
const PAGE_GROWTH: u32 = 4;
/// Chains of a stripe that are asked at a time.
const QUESTIONS_MAX: usize = 64;
/// No chunk has this index.
const END: u64 = u32::MAX as u64;

/// Chunks of a file in the order of their indexes, all there are below `until`.
struct Page {
    /// Where bytes begin and end in the file.
    data: Vec<(u64, u64)>,
    until: u64,
}

/// The first byte at or after `offset` and before the end of the file that is not in a hole.
pub(crate) async fn seek_data(file: &OpenFile, offset: u64) -> Result<Option<u64>> {
    let mut walk = Walk::new(file, offset);
    while let Some(page) = walk.next().await? {
        if let Some(&(start, _)) = page.data.iter().find(|(_, end)| *end > offset) {
            let position = start.max(offset);
            return Ok((position < file.length()).then_some(position));
        }
    }
    Ok(None)
}

/// The first byte at or after `offset` that is in a hole; the end of the file counts as one. `None` beyond it.
pub(crate) async fn seek_hole(file: &OpenFile, offset: u64) -> Result<Option<u64>> {
    if offset >= file.length() {
        return Ok(None);
    }
    let mut position = offset;
    let mut walk = Walk::new(file, offset);
    while let Some(page) = walk.next().await? {
        for (start, end) in page.data {
            if start > position {
                return Ok(Some(position.min(file.length())));
            }
            position = position.max(end);
        }
        if position < page.until.saturating_mul(walk.chunk_bytes()) {
            break;
        }
    }
    Ok(Some(position.min(file.length())))
}

/// Goes through the chunks of a file from one on.
struct Walk<'a> {
    file: &'a OpenFile,
    layout: Layout,
    next: u64,
    limit: u32,
    deadline: Instant,
}

impl<'a> Walk<'a> {
    fn new(file: &'a OpenFile, offset: u64) -> Self {
        let layout = file.layout();
        let next = offset / u64::from(layout.chunk_bytes);
        Self { file, layout, next, limit: *PAGE_CHUNKS.start(), deadline: file.client().inner().deadline() }
    }

    fn chunk_bytes(&self) -> u64 {
        u64::from(self.layout.chunk_bytes)
    }

    async fn next(&mut self) -> Result<Option<Page>> {
        let end = self.file.length().div_ceil(self.chunk_bytes()).min(END);
        if self.next >= end {
            return Ok(None);
        }
        self.file.check_open()?;
        let (mut chunks, until) = self.ask_stripe(end).await?;
        self.next = until;
        self.limit = (self.limit * PAGE_GROWTH).min(*PAGE_CHUNKS.end());
        chunks.sort_unstable_by_key(|(index, _)| *index);
        let place = |(index, bytes): (u64, u64)| {
            let start = index * self.chunk_bytes();
            (start, start + bytes)
        };
        let known = chunks.into_iter().filter(|(index, bytes)| *index < until && *bytes > 0);
        Ok(Some(Page { data: known.map(place).collect(), until }))
    }

    /// (index, length in bytes) of chunks from all chains, and up to where that is all of them.
    async fn ask_stripe(&self, end: u64) -> Result<(Vec<(u64, u64)>, u64)> {
        let inner = self.file.client().inner();
        let (mut tasks, mut chunks, mut until) = (JoinSet::new(), Vec::new(), END);
        let mut asked = self.chains(end).await?.into_iter();
        loop {
            while let Some(chain_id) = (tasks.len() < QUESTIONS_MAX).then(|| asked.next()).flatten() {
                let (inner, inode, from, limit) = (inner.clone(), self.file.inode(), self.next as u32, self.limit);
                let deadline = self.deadline;
                let asking = async move { ask_chain(&inner, chain_id, inode, from, limit, deadline).await };
                tasks.spawn(trace::inherit(asking));
            }
            let Some(joined) = tasks.join_next().await else { return Ok((chunks, until)) };
            let listed = joined.map_err(|e| Error::new(Code::Internal, format!("a listing failed: {e}")))??;
            let indexes = listed.chunks.iter().filter_map(|chunk| self.place(chunk));
            if let Some((last, _)) = indexes.clone().last().filter(|_| !listed.end) {
                until = until.min(last + 1);
            }
            chunks.extend(indexes);
        }
    }

    /// The chains of the chunks from `next` up to `end`: the last of them are on every chain that any of them is on.
    async fn chains(&self, end: u64) -> Result<BTreeSet<u32>> {
        let width = stripe_width(&self.layout, end - 1);
        let mut chains = BTreeSet::new();
        for index in end.saturating_sub(2 * width).max(self.next)..end {
            chains.insert(locate(self.file.client().inner(), &self.layout, index, self.deadline).await?);
        }
        Ok(chains)
    }

    /// Index and length of a chunk of this file. One that is being changed may have any length.
    fn place(&self, chunk: &ChunkInfo) -> Option<(u64, u64)> {
        let id = ChunkId::from_bytes(&chunk.chunk_id).filter(|id| id.inode == self.file.inode())?;
        let bytes = if chunk.pending_version != 0 { self.layout.chunk_bytes } else { chunk.length };
        Some((u64::from(id.index), u64::from(bytes)))
    }
}

/// Ask a replica of the chain that serves, one after another, until one answers.
async fn ask_chain(
    inner: &Arc<Inner>,
    chain_id: u32,
    inode: u64,
    from: u32,
    limit: u32,
    deadline: Instant,
) -> Result<ListChunksResponse> {
    let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(1));
    for attempt in 0.. {
        let view = inner.view();
        let asked = view.chain(chain_id).and_then(|chain| {
            let replica = chain.serving.get(attempt % chain.serving.len().max(1))?;
            let request = ListChunksRequest {
                chain_id,
                chain_version: chain.version,
                target_id: replica.target_id,
                after: before(inode, from),
                limit,
                resync: false,
                inode,
            };
            Some((view.address(replica.node_id)?, request))
        });
        let result = match asked {
            None => Err(Error::new(Code::NotServing, format!("chain {chain_id} has no serving replica"))),
            Some((address, request)) => {
                let until = deadline.min(Instant::now() + inner.config.read_attempt_timeout);
                inner.wire.call(address, Method::StorageListChunks, request, until).await
            }
        };
        let error = match result {
            Ok(body) => {
                return ListChunksResponse::decode(body)
                    .map_err(|e| Error::new(Code::Protocol, format!("a listing cannot be read: {e}")));
            }
            Err(error) => error,
        };
        let pause = backoff.next();
        if !error.retryable() || Instant::now() + pause >= deadline {
            return Err(error);
        }
        inner.wait_routing(view.version(), error.routing_version, pause).await;
    }
    unreachable!("attempts do not run out")
}

/// The id right before a chunk's.
fn before(inode: u64, index: u32) -> Bytes {
    let (inode, index) = if index == 0 { (inode - 1, u32::MAX) } else { (inode, index - 1) };
    Bytes::copy_from_slice(&ChunkId { space: 0, inode, index }.to_bytes())
}
