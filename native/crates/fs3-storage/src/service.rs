//! The frame service: one method of the protocol each to its handler.

use std::sync::Arc;

use fs3_core::{Code, Error, RegionMut, Result};
use fs3_net::{Request, Response, Service};
use fs3_proto::v1::{Method, Role};
use prost::Message;

use crate::core::Core;
use crate::methods;

pub(crate) struct StorageService(pub Arc<Core>);

impl Service for StorageService {
    fn payload_buffer(&self, method: Method, bytes: usize) -> Option<RegionMut> {
        match method {
            Method::StorageKvPut => self.0.kv.payload_buffer(bytes),
            _ => self.0.pool.get(bytes),
        }
    }

    fn payload_parts(&self, method: Method, body: &[u8], bytes: usize) -> Option<Vec<RegionMut>> {
        match method {
            Method::StorageKvPut => methods::kv::put_parts(&self.0, body, bytes),
            _ => None,
        }
    }

    fn wants_crcs(&self, method: Method) -> bool {
        matches!(method, Method::StorageWrite | Method::StorageKvPut)
    }

    async fn handle(&self, request: Request) -> Result<Response> {
        let core = &self.0;
        match request.method {
            Method::StorageRead => methods::read::read(core, request).await,
            Method::StorageWrite => methods::write::write(core, request).await,
            Method::StorageTruncate => methods::write::truncate(core, request).await,
            Method::StoragePunch => methods::write::punch(core, request).await,
            Method::StorageRemove => methods::remove::remove(core, request).await,
            Method::StorageQueryLast => methods::query::query_last(core, &request),
            Method::StorageSync => methods::query::sync(core, request).await,
            Method::StorageSpace => Ok(methods::query::space(core)),
            Method::StorageListChunks => methods::query::list_chunks(core, &request),
            Method::StorageResyncDone => methods::query::resync_done(core, request).await,
            Method::StorageStatus => Ok(Response::new(&core.status())),
            Method::StorageCheck => methods::check::check(core, request).await,
            Method::StorageScrub => methods::query::scrub(core),
            Method::StorageKvGet => methods::kv::get(core, &request).await,
            Method::StorageKvPut => methods::kv::put(core, request).await,
            Method::StorageKvRemove => methods::kv::remove(core, &request).await,
            Method::StorageKvList => methods::kv::list(core, &request).await,
            Method::StorageKvStat => methods::kv::stat(core, &request),
            Method::StorageKvEvict => methods::kv::evict(core, &request).await,
            other => {
                let message = format!("a storage node does not serve {}", other.as_str_name());
                Err(Error::new(Code::Unimplemented, message))
            }
        }
    }
}

/// The request message.
pub(crate) fn decode<M: Message + Default>(request: &Request) -> Result<M> {
    M::decode(request.body.clone())
        .map_err(|e| Error::new(Code::InvalidArgument, format!("the request cannot be read: {e}")))
}

/// Messages of the replication itself come from storage nodes only.
pub(crate) fn check_replica(request: &Request) -> Result<()> {
    if request.peer.role == Role::Storage {
        return Ok(());
    }
    Err(Error::new(Code::NotPermitted, "only a storage node may send forwarded updates"))
}
