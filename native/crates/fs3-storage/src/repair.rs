//! Putting rotten chunks right with the bytes of other replicas.
//!
//! A replica knows the checksum of every block of its committed version, so it may take the bytes from anybody who has
//! them, whatever state that replica is in. The repair holds the chunk: nothing changes it meanwhile, and readers of its
//! good parts go on. The target stays in its chain.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fs3_chain::{Kind, Origin, Outcome, Role};
use fs3_core::{
    CRC_BLOCK_BYTES, CheckedBytes, ChunkId, Code, Error, Region, RegionMut, Result, TargetId, crc32c, pack_crcs,
    unpack_crcs,
};
use fs3_io::{BadBlock, Change};
use fs3_net::Sink;
use fs3_proto::v1::{Method, ReadOp, ReadRequest, ReadResponse};
use fs3_rt::Instant;
use prost::Message;

use crate::content::{Body, Job};
use crate::core::Counters;
use crate::target::Target;
use crate::upkeep::Rot;
use crate::{DAMAGED_RETRY_MS, REPAIR_BLOCKS_PER_REQUEST, REPAIR_RETRY_MS, REPAIRS_WAITING_MAX};

/// How long a repair may wait for its turn at the chunk and take.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(30);
/// How long one replica may take to answer.
const FETCH_TIMEOUT: Duration = Duration::from_secs(2);

/// How an attempt ended.
enum Attempt {
    /// The chunk is sound, gone, or somebody else's to care for.
    Settled,
    /// No replica that answered has good bytes.
    Damaged,
    Later,
}

impl Target {
    /// Stored bytes of the chunk were found not to match their checksums: repair it soon.
    pub(crate) fn found_rot(self: &Arc<Self>, chunk: ChunkId) {
        let mut rot = self.upkeep.rot.lock();
        if rot.damaged.get(&chunk).is_some_and(|retry_at| Instant::now() < *retry_at)
            || rot.waiting.len() >= REPAIRS_WAITING_MAX
        {
            return;
        }
        if rot.waiting.insert(chunk) && !rot.damaged.contains_key(&chunk) {
            Counters::add(&self.core.counters.rotten_chunks, 1);
        }
        if !std::mem::replace(&mut rot.repairing, true) {
            self.core.spawn(self.clone().repair_all());
        }
    }

    /// The chain changed: another replica may be there to ask.
    pub(crate) fn retry_repairs(self: &Arc<Self>) {
        let mut rot = self.upkeep.rot.lock();
        let Rot { waiting, damaged, .. } = &mut *rot;
        waiting.extend(damaged.keys());
        if !rot.waiting.is_empty() && !std::mem::replace(&mut rot.repairing, true) {
            self.core.spawn(self.clone().repair_all());
        }
    }

    async fn repair_all(self: Arc<Self>) {
        loop {
            let round: Vec<ChunkId> = self.upkeep.rot.lock().waiting.iter().copied().collect();
            let mut later = 0;
            for chunk in round {
                let attempt = self.repair_chunk(chunk).await;
                let mut rot = self.upkeep.rot.lock();
                match attempt {
                    Attempt::Later => later += 1,
                    Attempt::Settled => {
                        rot.waiting.remove(&chunk);
                        rot.damaged.remove(&chunk);
                    }
                    Attempt::Damaged => {
                        rot.waiting.remove(&chunk);
                        rot.damaged.insert(chunk, Instant::now() + Duration::from_millis(DAMAGED_RETRY_MS));
                    }
                }
            }
            let failed = self.has_failed();
            {
                let mut rot = self.upkeep.rot.lock();
                if rot.waiting.is_empty() || failed {
                    rot.repairing = false;
                    return;
                }
            }
            if later > 0 {
                fs3_rt::sleep(Duration::from_millis(REPAIR_RETRY_MS)).await;
            }
        }
    }

    async fn repair_chunk(self: &Arc<Self>, chunk: ChunkId) -> Attempt {
        // What does not serve is made equal by a resync, which replaces rotten chunks.
        if self.view().role != Role::Serving || !self.store.chunk(chunk).is_some_and(|m| m.rotten) {
            return Attempt::Settled;
        }
        let (chain_version, deadline) = (self.view().chain_version, Instant::now() + REPAIR_TIMEOUT);
        match self.update(Job::mirror(chunk), Kind::Mirror, chain_version, Origin::Repair, deadline).await {
            Ok(_) => Attempt::Settled,
            Err(e) if e.code == Code::ChecksumMismatch => Attempt::Damaged,
            Err(e) => {
                tracing::debug!(target_id = self.id, %chunk, "repair: {e}");
                Attempt::Later
            }
        }
    }

    /// With the chunk held: find its rotten blocks and write what other replicas have over them.
    pub(crate) async fn mend(&self, chunk: ChunkId) -> Result<()> {
        let verified = self.store.verify(chunk, 0, u32::MAX).await?;
        let Some(version) = verified.version else { return Ok(()) };
        let (mut missing, mut found) = (verified.bad, Vec::new());
        self.take_cached(chunk, &mut missing, &mut found);
        for other in self.other_replicas() {
            if missing.is_empty() {
                break;
            }
            if let Err(e) = self.fetch_blocks(other, chunk, &mut missing, &mut found).await {
                tracing::debug!(target_id = self.id, from = other.0, %chunk, "fetching good bytes: {e}");
            }
        }
        let blocks = found.len() as u64;
        let result = self.store.repair(chunk, version.update_version, found).await;
        Counters::add(&self.core.counters.repaired_blocks, blocks);
        if !missing.is_empty() {
            Counters::add(&self.core.counters.unrepairable_blocks, missing.len() as u64);
            tracing::error!(
                target_id = self.id,
                %chunk,
                blocks = missing.len(),
                "no replica that answers has good bytes for damaged blocks; the rest of the chunk is still served"
            );
        } else if result.is_ok() && blocks > 0 {
            Counters::add(&self.core.counters.repaired_chunks, 1);
            tracing::warn!(target_id = self.id, %chunk, blocks, "a rotten chunk was repaired");
        }
        result
    }

    /// The cache may hold what the disk has lost.
    fn take_cached(&self, chunk: ChunkId, missing: &mut Vec<BadBlock>, found: &mut Vec<(u32, Vec<u8>)>) {
        missing.retain(|bad| {
            let offset = bad.index * CRC_BLOCK_BYTES as u32;
            let Some(Ok(read)) = self.store.try_read_cached(chunk, offset, CRC_BLOCK_BYTES as u32) else { return true };
            let bytes: Vec<u8> = read.data.iter().flat_map(|region| region.iter().copied()).collect();
            !take(*bad, bytes, found)
        });
    }

    /// All other targets of the chain, those that serve first.
    fn other_replicas(&self) -> Vec<TargetId> {
        let routing = self.core.routing();
        let targets = routing.chain(self.chain_id).map_or(&[][..], |c| &c.targets);
        targets.iter().map(|t| TargetId(t.target_id)).filter(|t| t.0 != self.id).collect()
    }

    async fn fetch_blocks(
        &self,
        from: TargetId,
        chunk: ChunkId,
        missing: &mut Vec<BadBlock>,
        found: &mut Vec<(u32, Vec<u8>)>,
    ) -> Result<()> {
        let wanted = std::mem::take(missing);
        for (at, batch) in wanted.chunks(REPAIR_BLOCKS_PER_REQUEST).enumerate() {
            let unit = CRC_BLOCK_BYTES as u32;
            let ranges = batch.iter().map(|bad| (bad.index * unit, unit)).collect();
            let (_, data) = match self.fetch(from, chunk, ranges).await {
                Ok(fetched) => fetched,
                Err(e) => {
                    missing.extend(&wanted[at * REPAIR_BLOCKS_PER_REQUEST..]);
                    return Err(e);
                }
            };
            missing
                .extend(batch.iter().zip(data).filter_map(|(bad, bytes)| (!take(*bad, bytes, found)).then_some(*bad)));
        }
        Ok(())
    }

    /// The chunk as a successor has committed it, instead of the update on top of rotten bytes here.
    pub(crate) async fn fetch_updated(&self, job: &Job, from: TargetId, outcome: Outcome) -> Result<Change> {
        let unlike = |what: &str| {
            Error::new(
                Code::ChecksumMismatch,
                format!("chunk {} of target {from} is not this update: {what}", job.chunk),
            )
        };
        let mut crcs = Vec::new();
        let mut data = Vec::new();
        if outcome.length > 0 {
            let (response, mut read) = self.fetch(from, job.chunk, vec![(0, outcome.length)]).await?;
            let result = &response.results[0];
            crcs = unpack_crcs(&result.crcs).ok_or_else(|| unlike("no checksums"))?;
            data = read.pop().unwrap_or_default();
            if result.update_version != outcome.update_version {
                return Err(unlike("its version"));
            }
        }
        let same = data.len() == outcome.length as usize && crc32c(&pack_crcs(&crcs)) == outcome.crc;
        if !same {
            return Err(unlike("its checksums"));
        }
        let data = Region::from_vec(data);
        let bytes = CheckedBytes::check(0, data.clone(), crcs).map_err(|_| unlike("its checksums"))?;
        // Versions name updates as long as not all replicas crash at once; then this tells them apart.
        let is_this = match &job.body {
            Body::Write(written) => {
                data.get(written.offset() as usize..written.end() as usize) == Some(&written.data()[..])
            }
            Body::Truncate { length } => outcome.length <= *length,
            Body::Punch { offset, length } => {
                data.iter().skip(*offset as usize).take(*length as usize).all(|byte| *byte == 0)
            }
            _ => false,
        };
        if !is_this {
            return Err(unlike("its bytes"));
        }
        let writers = self.store.chunk(job.chunk).map_or_else(Vec::new, |m| m.writers);
        tracing::warn!(target_id = self.id, chunk = %job.chunk, from = from.0, "a rotten chunk was replaced by its successor's");
        Counters::add(&self.core.counters.repaired_chunks, 1);
        Ok(Change::Replace { bytes, writers })
    }

    /// Ranges of a chunk from another replica, whatever that does with it. A range it cannot give is empty.
    async fn fetch(
        &self,
        from: TargetId,
        chunk: ChunkId,
        ranges: Vec<(u32, u32)>,
    ) -> Result<(ReadResponse, Vec<Vec<u8>>)> {
        let chunk_id = Bytes::copy_from_slice(&chunk.to_bytes());
        let windows = ranges.iter().map(|(_, length)| RegionMut::zeroed(*length as usize)).collect();
        let op = |(offset, length)| ReadOp {
            chain_id: self.chain_id,
            target_id: from.0,
            chunk_id: chunk_id.clone(),
            offset,
            length,
            ..ReadOp::default()
        };
        let count = ranges.len();
        let request = ReadRequest { ops: ranges.into_iter().map(op).collect(), repair: true };
        let reply = self
            .call_into(from, Method::StorageRead, request, Vec::new(), Sink { windows, lengths }, FETCH_TIMEOUT)
            .await?;
        let response = decode(&reply.body)?;
        if response.results.len() != count || reply.lengths.len() != count {
            return Err(Error::new(Code::Protocol, "a replica answered another number of reads than asked"));
        }
        let bytes =
            reply.windows.iter().zip(&reply.lengths).map(|(window, length)| window[..*length].to_vec()).collect();
        Ok((response, bytes))
    }
}

/// Keep the bytes if they are those of the block.
fn take(bad: BadBlock, bytes: Vec<u8>, found: &mut Vec<(u32, Vec<u8>)>) -> bool {
    let good = bytes.len() == bad.length as usize && crc32c(&bytes) == bad.crc;
    if good {
        found.push((bad.index, bytes));
    }
    good
}

fn decode(body: &[u8]) -> Result<ReadResponse> {
    ReadResponse::decode(body).map_err(|e| Error::new(Code::Protocol, format!("a read reply cannot be read: {e}")))
}

fn lengths(body: &[u8]) -> Result<Vec<usize>> {
    Ok(decode(body)?.results.iter().map(|r| r.length as usize).collect())
}
