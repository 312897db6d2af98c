//! Framed calls between fs3 processes: client connections, a pool of them, and the server.
//!
//! Callers see [`Connection`] / [`Peers`] on one side and [`Server`] / [`Service`] on the other. Both stand on the
//! `Link` trait (`link.rs`), which moves whole messages and places incoming payload directly in its final
//! memory; TCP is the transport of processes, with RDMA or shared memory (`shm`) for the payload where both ends have
//! it; `sim` is that of simulated ones.
//!
//! Everything runs on the tokio runtime in which it was created, and can be called from any thread: by tasks, or by
//! threads that block with a [`Waiter`] and receive their answers themselves. Measured (`examples/netbench.rs`): large
//! payloads want several connections and a runtime with as many workers as cores; many small calls want a current-thread
//! runtime per core.

mod blocking;
mod client;
mod crcs;
mod hello;
mod incoming;
mod link;
mod peers;
mod rdma;
mod server;
mod shm;
pub mod sim;
mod spin;
mod tcp;

pub use blocking::Waiter;
pub use client::{Connection, Payload, Reply, Sink};
pub use hello::{Hello, HelloPolicy, PeerInfo};
pub use link::Way;
pub use peers::Peers;
pub use rdma::{Mode, RdmaSettings, Transport, bench, takes_dmabufs};
pub use server::{Connections, Request, Response, Server, Service};

/// Requests of one connection that may be unanswered at a time: a client waits, a server stops reading.
pub const REQUESTS_IN_FLIGHT_MAX: usize = 1024;
/// How long connecting and saying hello may take at the server's side.
pub const HELLO_TIMEOUT_MS: u64 = 5_000;
/// A frame that has begun must make progress within this time, or the connection is ended.
pub const STALL_TIMEOUT_MS: u64 = 10_000;
/// Unacknowledged data older than this means the peer is gone (TCP_USER_TIMEOUT).
pub const PEER_SILENT_MS_MAX: u64 = 15_000;
/// Connections a server holds at a time.
pub const CONNECTIONS_MAX: usize = 8192;
/// Connections a server holds at a time whose hello has not been accepted yet.
pub const UNAUTHENTICATED_CONNECTIONS_MAX: usize = 256;
