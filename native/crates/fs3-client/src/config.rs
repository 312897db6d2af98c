use std::time::Duration;

use fs3_core::{Code, Error, Result};
use fs3_net::Transport;

/// How to reach a cluster and how much to use. `Default` has the tuned limits and no meta address.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// `host:port` of meta services, tried in turn; the routing adds the others.
    pub metas: Vec<String>,
    /// The cluster's shared secret.
    pub token: String,
    /// Refuse any other cluster. `None`: take the one that answers.
    pub cluster_id: Option<String>,
    /// How long one operation may take in all, retries included.
    pub op_timeout: Duration,
    /// How long one try of a read waits for a replica before the next one is asked.
    pub read_attempt_timeout: Duration,
    /// How long one try of a metadata call waits for a meta service before the next one is asked.
    pub meta_attempt_timeout: Duration,
    /// Bytes of reads that may be on their way at a time, per client.
    pub read_bytes_in_flight: usize,
    /// Bytes of writes that may be on their way at a time, per client.
    pub write_bytes_in_flight: usize,
    /// Writes that may be on their way at a time, per client (channels of exactly-once).
    pub write_channels: usize,
    /// Connections to each storage node.
    pub connections_per_peer: usize,
    /// TCP, or RDMA too.
    pub transport: Transport,
    /// Reading changes access times, by the rule of Linux' `relatime`; else never.
    pub access_times: bool,
    /// Shown in the service's list of clients.
    pub description: String,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            metas: Vec::new(),
            token: String::new(),
            cluster_id: None,
            op_timeout: Duration::from_secs(30),
            read_attempt_timeout: Duration::from_secs(5),
            meta_attempt_timeout: Duration::from_secs(10),
            read_bytes_in_flight: 16 << 20,
            write_bytes_in_flight: 16 << 20,
            write_channels: 64,
            connections_per_peer: 2,
            transport: Transport::tcp(),
            access_times: true,
            description: String::new(),
        }
    }
}

impl ClientConfig {
    /// Check the ranges. Errors: InvalidArgument naming the field.
    pub fn validate(&self) -> Result<()> {
        let bad = |what: &'static str| Err(Error::new(Code::InvalidArgument, what));
        if self.metas.is_empty() {
            return bad("metas is empty: name at least one meta service as host:port");
        }
        if self.op_timeout.is_zero() || self.read_attempt_timeout.is_zero() || self.meta_attempt_timeout.is_zero() {
            return bad("timeouts must be longer than zero");
        }
        if self.read_bytes_in_flight < 1 << 16 || self.write_bytes_in_flight < 1 << 16 {
            return bad("read_bytes_in_flight and write_bytes_in_flight must be at least 65536");
        }
        if self.write_channels == 0 || self.write_channels > 65_536 || self.connections_per_peer == 0 {
            return bad("write_channels must be 1..65536 and connections_per_peer at least 1");
        }
        Ok(())
    }
}
