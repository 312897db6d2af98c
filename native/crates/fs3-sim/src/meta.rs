//! What clients need of a metadata service: the routing, and one file whose chunks are the world's.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use fs3_core::{Code, Error, RegionMut, Result};
use fs3_net::{HelloPolicy, Request, Response, Server, Service};
use fs3_proto::routing::diff;
use fs3_proto::v1::{
    Attr, AttrResponse, Empty, FileType, GetRoutingRequest, GetRoutingResponse, KeepaliveResponse, Layout, Method,
    OpenResponse, Role, Routing, RoutingDelta, RoutingKnown,
};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::watch;

/// Where it listens.
pub(crate) const META_ADDRESS: &str = "meta:7000";
/// The secret of the simulated cluster, for whoever does not bring one.
pub const TOKEN: &str = "simulated";
/// Inode of the file of chunks.
pub(crate) const INODE: u64 = 1000;

/// Who knows one of so many routings is told of changes.
const TOLD_MAX: usize = 8;

/// The routing that clients learn; `None` until there is one.
pub(crate) type Published = watch::Sender<Option<Arc<Routing>>>;

pub(crate) struct Meta {
    pub routing: Published,
    /// The last routings that clients were told.
    pub told: Mutex<VecDeque<Arc<Routing>>>,
    pub chunk_bytes: u32,
}

impl Meta {
    /// Listen in the current process, for ever.
    pub async fn serve(self: Arc<Self>) {
        let mut routing = self.routing.subscribe();
        let Ok(first) = routing.wait_for(Option::is_some).await.map(|r| r.clone()) else { return };
        let cluster_id = first.map(|r| r.cluster_id.clone()).unwrap_or_default();
        let policy = HelloPolicy {
            cluster_id,
            token: TOKEN.into(),
            node_id: u32::MAX,
            role: Role::Meta,
            transport: fs3_net::Transport::tcp(),
        };
        let server = Server::bind(META_ADDRESS, policy, self).await;
        let _server = server.expect("the address is free");
        std::future::pending::<()>().await;
    }

    fn attr(&self) -> Result<Attr> {
        let routing = self.routing.borrow().clone();
        let table = routing.as_ref().and_then(|r| r.tables.last());
        let table = table.ok_or_else(|| Error::new(Code::Unavailable, "there is no chain table yet"))?;
        let layout = Layout {
            table_id: table.table_id,
            table_version: table.table_version,
            chunk_bytes: self.chunk_bytes,
            stripe: table.chain_ids.len() as u32,
            first: 0,
            ..Default::default()
        };
        Ok(Attr {
            inode: INODE,
            r#type: FileType::File as i32,
            nlink: 1,
            // As long as can be: reads are never cut short.
            length: u64::from(self.chunk_bytes) << 20,
            layout: Some(layout),
            truncate_version: 1,
            ..Attr::default()
        })
    }

    async fn routing_after(&self, request: GetRoutingRequest) -> GetRoutingResponse {
        let mut routing = self.routing.subscribe();
        let newer = |r: &Option<Arc<Routing>>| r.as_ref().is_some_and(|r| r.version > request.known_version);
        let wait = Duration::from_millis(u64::from(request.wait_ms));
        let found = fs3_rt::timeout(wait, routing.wait_for(newer)).await;
        let routing = found.ok().and_then(Result::ok).and_then(|r| r.clone());
        let Some(routing) = routing else {
            return GetRoutingResponse { version: request.known_version, ..GetRoutingResponse::default() };
        };
        let delta = request.known.and_then(|known| self.delta(&known, &routing));
        let whole = delta.is_none().then(|| (*routing).clone());
        GetRoutingResponse { version: routing.version, routing: whole, delta }
    }

    /// What changed since a routing that clients were told; `routing` is told now.
    fn delta(&self, known: &RoutingKnown, routing: &Arc<Routing>) -> Option<RoutingDelta> {
        let mut told = self.told.lock();
        if told.back().is_none_or(|last| last.version < routing.version) {
            told.push_back(routing.clone());
            if told.len() > TOLD_MAX {
                told.pop_front();
            }
        }
        let base = (known.history, known.version);
        let old = told.iter().find(|old| (old.history, old.version) == base)?;
        (old.history == routing.history).then(|| diff(old, routing))
    }
}

impl Service for Meta {
    fn payload_buffer(&self, _method: Method, _bytes: usize) -> Option<RegionMut> {
        None
    }

    async fn handle(&self, request: Request) -> Result<Response> {
        match request.method {
            Method::GetRouting => {
                let asked = GetRoutingRequest::decode(request.body)
                    .map_err(|e| Error::new(Code::InvalidArgument, format!("no routing request: {e}")))?;
                Ok(Response::new(&self.routing_after(asked).await))
            }
            Method::MetaOpen => {
                let session = vec![7; 16].into();
                Ok(Response::new(&OpenResponse {
                    attr: Some(self.attr()?),
                    session,
                    created: false,
                    length_limit: None,
                }))
            }
            Method::MetaStat | Method::MetaSync | Method::MetaClose => {
                Ok(Response::new(&AttrResponse { attr: Some(self.attr()?), ..Default::default() }))
            }
            Method::MetaKeepalive => Ok(Response::new(&KeepaliveResponse { interval_ms: 30_000, session_ms: 120_000 })),
            _ => Ok(Response::new(&Empty {})),
        }
    }
}
