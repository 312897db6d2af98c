//! What moved by RDMA, counted per device.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one device in one process, since its transport was made. Thread-safe; counting costs one atomic addition.
#[derive(Default)]
pub(crate) struct Counters {
    connections: AtomicU64,
    connections_lost: AtomicU64,
    tcp_fallbacks: AtomicU64,
    messages_sent: AtomicU64,
    messages_received: AtomicU64,
    read_bytes: AtomicU64,
    write_bytes: AtomicU64,
    peer_read_bytes: AtomicU64,
    peer_write_bytes: AtomicU64,
    copied_bytes: AtomicU64,
    registrations: AtomicU64,
    registered_bytes: AtomicU64,
}

impl Counters {
    /// An RDMA connection was made.
    pub fn connected(&self) {
        add(&self.connections, 1);
    }

    /// A connection ended although no side wanted it to.
    pub fn lost(&self) {
        add(&self.connections_lost, 1);
    }

    /// A connection that was to be made on this device uses TCP.
    pub fn fell_back(&self) {
        add(&self.tcp_fallbacks, 1);
    }

    /// A message was given to the device.
    pub fn sent(&self) {
        add(&self.messages_sent, 1);
    }

    /// A message came.
    pub fn received(&self) {
        add(&self.messages_received, 1);
    }

    /// Payload was read from a peer's memory.
    pub fn read(&self, bytes: u64) {
        add(&self.read_bytes, bytes);
    }

    /// Payload is written to a peer's memory.
    pub fn wrote(&self, bytes: u64) {
        add(&self.write_bytes, bytes);
    }

    /// A peer was given payload to read from here.
    pub fn exposed(&self, bytes: u64) {
        add(&self.peer_read_bytes, bytes);
    }

    /// A peer has written payload into memory here.
    pub fn pushed(&self, bytes: u64) {
        add(&self.peer_write_bytes, bytes);
    }

    /// Memory that is not registered is copied through memory that is.
    pub fn copied(&self, bytes: usize) {
        add(&self.copied_bytes, bytes as u64);
    }

    /// Memory was registered.
    pub fn registered(&self, bytes: usize) {
        add(&self.registrations, 1);
        add(&self.registered_bytes, bytes as u64);
    }

    /// Memory is not registered any more.
    pub fn deregistered(&self, bytes: usize) {
        self.registered_bytes.fetch_sub(bytes as u64, Ordering::Relaxed);
    }

    /// All of them by name, as docs/rdma.md explains them.
    pub fn all(&self) -> Vec<(&'static str, u64)> {
        [
            ("connections", &self.connections),
            ("connections_lost", &self.connections_lost),
            ("tcp_fallbacks", &self.tcp_fallbacks),
            ("messages_sent", &self.messages_sent),
            ("messages_received", &self.messages_received),
            ("read_bytes", &self.read_bytes),
            ("write_bytes", &self.write_bytes),
            ("peer_read_bytes", &self.peer_read_bytes),
            ("peer_write_bytes", &self.peer_write_bytes),
            ("copied_bytes", &self.copied_bytes),
            ("registrations", &self.registrations),
            ("registered_bytes", &self.registered_bytes),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
        .into()
    }
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_has_its_name_and_only_registered_memory_goes_down() {
        let counters = Counters::default();
        counters.connected();
        counters.read(5);
        counters.wrote(7);
        counters.registered(100);
        counters.registered(50);
        counters.deregistered(100);
        let all = counters.all();
        let nonzero: Vec<_> = all.iter().filter(|(_, n)| *n > 0).copied().collect();
        let expected = [("connections", 1), ("read_bytes", 5), ("write_bytes", 7), ("registrations", 2)];
        assert_eq!(nonzero[..4], expected);
        assert_eq!(nonzero[4..], [("registered_bytes", 50)]);
    }
}
