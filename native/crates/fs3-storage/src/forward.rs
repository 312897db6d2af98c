//! Sending an update to a successor.

use std::time::Duration;

use bytes::Bytes;
use fs3_chain::{Content, Outcome};
use fs3_core::{Code, Error, Region, Result, TargetId, pack_crcs};
use fs3_net::{Reply, Sink};
use fs3_proto::v1::{
    Method, PunchChunkRequest, RemoveRequest, RemoveResponse, TruncateChunkRequest, WriteRequest, WriteResponse,
    WriterId,
};
use prost::Message;

use crate::FORWARD_TIMEOUT_MS;
use crate::content::{Body, Job, Whole};
use crate::core::Counters;
use crate::target::Target;

/// One forward, as the machine wants it.
#[derive(Clone, Copy)]
pub(crate) struct Forward {
    pub to: TargetId,
    pub chain_version: u64,
    pub version: u64,
    pub base: u64,
    pub content: Content,
}

impl Target {
    pub(crate) async fn send_forward(&self, job: &Job, forward: Forward) -> Result<Outcome> {
        Counters::add(&self.core.counters.forwards, 1);
        match (&job.body, forward.content) {
            (Body::Remove, _) => self.forward_remove(job, forward).await,
            (Body::Truncate { length }, Content::Update) => self.forward_truncate(job, forward, *length).await,
            (Body::Punch { offset, length }, Content::Update) => {
                self.forward_punch(job, forward, *offset, *length).await
            }
            (Body::Write(bytes), Content::Update) => {
                let request = WriteRequest {
                    offset: bytes.offset(),
                    length: bytes.data().len() as u32,
                    crcs: pack_crcs(bytes.crcs()).into(),
                    ..self.write_request(job, forward)
                };
                self.write_call(forward.to, request, vec![bytes.data().clone()]).await
            }
            (_, content) => {
                let content = if content == Content::Update { Content::Whole } else { content };
                match job.whole(&self.store, &self.core.pool, content).await? {
                    Some(whole) => self.forward_whole(job, forward, whole).await,
                    None => self.forward_remove(job, forward).await,
                }
            }
        }
    }

    async fn forward_whole(&self, job: &Job, forward: Forward, whole: Whole) -> Result<Outcome> {
        let request = WriteRequest {
            chunk_bytes: whole.chunk_bytes,
            length: whole.length,
            crcs: pack_crcs(&whole.crcs).into(),
            replace: true,
            writers: whole.writers.iter().map(|w| w.to_proto()).collect(),
            ..self.write_request(job, forward)
        };
        self.write_call(forward.to, request, whole.data).await
    }

    fn write_request(&self, job: &Job, forward: Forward) -> WriteRequest {
        WriteRequest {
            chain_id: self.chain_id,
            chain_version: forward.chain_version,
            target_id: forward.to.0,
            chunk_id: Bytes::copy_from_slice(&job.chunk.to_bytes()),
            chunk_bytes: job.chunk_bytes,
            writer: if forward.content == Content::Committed { None } else { writer_id(job) },
            update_version: forward.version,
            base_version: forward.base,
            durable: job.durable,
            ..WriteRequest::default()
        }
    }

    async fn write_call(&self, to: TargetId, request: WriteRequest, payload: Vec<Region>) -> Result<Outcome> {
        let reply = self.call(to, Method::StorageWrite, request, payload).await?;
        outcome_of(&reply)
    }

    async fn forward_truncate(&self, job: &Job, forward: Forward, length: u32) -> Result<Outcome> {
        let request = TruncateChunkRequest {
            chain_id: self.chain_id,
            chain_version: forward.chain_version,
            target_id: forward.to.0,
            chunk_id: Bytes::copy_from_slice(&job.chunk.to_bytes()),
            chunk_bytes: job.chunk_bytes,
            length,
            writer: writer_id(job),
            update_version: forward.version,
            base_version: forward.base,
        };
        let reply = self.call(forward.to, Method::StorageTruncate, request, Vec::new()).await?;
        outcome_of(&reply)
    }

    async fn forward_punch(&self, job: &Job, forward: Forward, offset: u32, length: u32) -> Result<Outcome> {
        let request = PunchChunkRequest {
            chain_id: self.chain_id,
            chain_version: forward.chain_version,
            target_id: forward.to.0,
            chunk_id: Bytes::copy_from_slice(&job.chunk.to_bytes()),
            chunk_bytes: job.chunk_bytes,
            offset,
            length,
            writer: writer_id(job),
            update_version: forward.version,
            base_version: forward.base,
        };
        let reply = self.call(forward.to, Method::StoragePunch, request, Vec::new()).await?;
        outcome_of(&reply)
    }

    async fn forward_remove(&self, job: &Job, forward: Forward) -> Result<Outcome> {
        let request = RemoveRequest {
            chain_id: self.chain_id,
            chain_version: forward.chain_version,
            target_id: forward.to.0,
            space: job.chunk.space,
            inode: job.chunk.inode,
            first_index: job.chunk.index,
            last_index: job.chunk.index,
            writer: writer_id(job),
            forwarded: true,
            update_version: forward.version,
            base_version: forward.base,
        };
        let reply = self.call(forward.to, Method::StorageRemove, request, Vec::new()).await?;
        let response = RemoveResponse::decode(reply.body).map_err(unreadable)?;
        Ok(Outcome { update_version: response.update_version, length: 0, crc: 0 })
    }

    /// One call to the node of another target.
    pub(crate) async fn call(
        &self,
        to: TargetId,
        method: Method,
        request: impl Message,
        payload: Vec<Region>,
    ) -> Result<Reply> {
        let timeout = Duration::from_millis(FORWARD_TIMEOUT_MS);
        self.call_into(to, method, request, payload, Sink::none(), timeout).await
    }

    /// As [`Target::call`], with memory for the payload of the answer.
    pub(crate) async fn call_into(
        &self,
        to: TargetId,
        method: Method,
        request: impl Message,
        payload: Vec<Region>,
        sink: Sink,
        timeout: Duration,
    ) -> Result<Reply> {
        let routing = self.core.routing();
        let address = routing.address(to).ok_or_else(|| {
            Error::new(Code::Unavailable, format!("the routing has no address of target {to}'s node"))
        })?;
        // Boxed, so that the futures around it are small: they are copied before they run.
        Box::pin(self.core.peers.call(address, method, request, payload, sink, timeout)).await
    }
}

fn outcome_of(reply: &Reply) -> Result<Outcome> {
    let response = WriteResponse::decode(reply.body.clone()).map_err(unreadable)?;
    Ok(Outcome { update_version: response.update_version, length: response.chunk_length, crc: response.chunk_crc32c })
}

fn unreadable(error: prost::DecodeError) -> Error {
    Error::new(Code::Protocol, format!("the successor's answer cannot be read: {error}"))
}

fn writer_id(job: &Job) -> Option<WriterId> {
    job.writer.map(|w| WriterId {
        client_id: Bytes::copy_from_slice(&w.client.0),
        channel: w.channel,
        sequence: w.sequence,
    })
}
