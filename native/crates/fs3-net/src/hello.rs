use crate::rdma::Transport;
use bytes::Bytes;
use fs3_core::{Code, Error, Result};
use fs3_proto::frame::{BODY_BYTES_MAX, PAYLOAD_BYTES_MAX, VERSION};
use fs3_proto::v1::{HelloRequest, HelloResponse, RdmaPort, Role};
use prost::Message;

/// The name of TCP with payloads by reference.
pub(crate) const SHARED_MEMORY: &str = "shm";

/// Better ways than TCP that a client knows.
#[derive(Debug)]
pub(crate) struct Offered {
    pub shared_memory: bool,
    pub rdma_ports: Vec<RdmaPort>,
}

/// How a client introduces itself on every connection.
#[derive(Clone, Debug)]
pub struct Hello {
    /// Cluster that must be on the other side; empty accepts any.
    pub cluster_id: String,
    /// What this process is.
    pub role: Role,
    /// Client id or node uuid.
    pub peer_id: [u8; 16],
    /// The cluster's shared secret.
    pub token: String,
    /// How servers may be reached.
    pub transport: Transport,
}

/// What a server asks of those who connect, and how it introduces itself.
#[derive(Clone, Debug)]
pub struct HelloPolicy {
    /// The cluster this server belongs to.
    pub cluster_id: String,
    /// The shared secret that must be presented.
    pub token: String,
    /// This server's node number.
    pub node_id: u32,
    /// What this server is.
    pub role: Role,
    /// How clients may reach it.
    pub transport: Transport,
}

/// Who is on the other side of a connection, as it said in its hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerInfo {
    /// What the peer is.
    pub role: Role,
    /// Client id or node uuid.
    pub peer_id: [u8; 16],
}

impl Hello {
    /// The request to the server at `addr`.
    pub(crate) fn to_request(&self, addr: &str) -> HelloRequest {
        let rdma_ports = self.transport.offers(addr);
        let shm = self.transport.shares_memory().then(|| SHARED_MEMORY.to_owned());
        let rdma = (!rdma_ports.is_empty()).then(|| "rdma".to_owned());
        HelloRequest {
            protocol_min: u32::from(VERSION),
            protocol_max: u32::from(VERSION),
            cluster_id: self.cluster_id.clone(),
            role: self.role as i32,
            peer_id: Bytes::copy_from_slice(&self.peer_id),
            token: self.token.clone(),
            transports: shm.into_iter().chain(rdma).chain(["tcp".to_owned()]).collect(),
            rdma_ports,
        }
    }
}

impl HelloPolicy {
    /// Check the body of a hello request. What the client offers comes with the answer.
    pub(crate) fn admit(&self, body: &[u8]) -> Result<(PeerInfo, HelloResponse, Offered)> {
        let hello = HelloRequest::decode(body).map_err(|_| Error::new(Code::Protocol, "the hello cannot be read"))?;
        if !(hello.protocol_min..=hello.protocol_max).contains(&u32::from(VERSION)) {
            let message = format!(
                "the peer speaks protocol {}..{}, this server {VERSION}; upgrade the older one",
                hello.protocol_min, hello.protocol_max
            );
            return Err(Error::new(Code::Protocol, message));
        }
        if !equal_in_constant_time(hello.token.as_bytes(), self.token.as_bytes()) {
            return Err(Error::new(Code::Unauthenticated, "the token is not this cluster's; check FS3_TOKEN"));
        }
        if !hello.cluster_id.is_empty() && hello.cluster_id != self.cluster_id {
            let message = format!("this is cluster {:?}, not {:?}", self.cluster_id, hello.cluster_id);
            return Err(Error::new(Code::WrongCluster, message));
        }
        if !hello.transports.is_empty() && !hello.transports.iter().any(|t| t == "tcp") {
            return Err(Error::new(Code::Protocol, "no common transport; this server offers tcp"));
        }
        let peer_id = hello.peer_id[..]
            .try_into()
            .map_err(|_| Error::new(Code::InvalidArgument, "the peer id must have 16 bytes"))?;
        let role = Role::try_from(hello.role).unwrap_or(Role::Unspecified);
        let response = HelloResponse {
            protocol: u32::from(VERSION),
            cluster_id: self.cluster_id.clone(),
            role: self.role as i32,
            node_id: self.node_id,
            transport: "tcp".into(),
            body_bytes_max: BODY_BYTES_MAX as u32,
            payload_bytes_max: PAYLOAD_BYTES_MAX as u32,
            server_version: env!("CARGO_PKG_VERSION").into(),
            ..HelloResponse::default()
        };
        let shared_memory = hello.transports.iter().any(|t| t == SHARED_MEMORY);
        Ok((PeerInfo { role, peer_id }, response, Offered { shared_memory, rdma_ports: hello.rdma_ports }))
    }
}

/// Whether two secrets are equal, in a time that depends only on the length of `given`.
fn equal_in_constant_time(given: &[u8], secret: &[u8]) -> bool {
    let mut difference = usize::from(given.len() != secret.len());
    for (at, byte) in given.iter().enumerate() {
        let other = secret.get(at).copied().unwrap_or(0);
        difference |= usize::from(std::hint::black_box(byte ^ other));
    }
    std::hint::black_box(difference) == 0
}
