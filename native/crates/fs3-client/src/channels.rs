//! Identities of writes in flight, for exactly-once.

use fs3_core::{ClientId, Code, Error, Result};
use fs3_proto::v1::WriterId;
use fs3_rt::Instant;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};

/// A bounded set of channels. At most one write is on its way per channel, and its sequence is greater than
/// that of every earlier one of the channel: storage keeps one record per channel to know a repeated write.
pub(crate) struct Channels {
    client: ClientId,
    free: Mutex<Vec<Channel>>,
    permits: Semaphore,
}

struct Channel {
    number: u32,
    sequence: u64,
}

/// A channel in use; the same `id` goes with every try of one write.
pub(crate) struct Claim<'a> {
    channels: &'a Channels,
    number: u32,
    sequence: u64,
    _permit: SemaphorePermit<'a>,
}

impl Channels {
    pub fn new(client: ClientId, count: usize) -> Self {
        // Popped from the end: low numbers are used first, so a light writer leaves few records.
        let free = (0..count as u32).rev().map(|number| Channel { number, sequence: 0 }).collect();
        Self { client, free: Mutex::new(free), permits: Semaphore::new(count) }
    }

    /// A free channel, as soon as there is one. Errors: Timeout.
    pub async fn claim(&self, deadline: Instant) -> Result<Claim<'_>> {
        let busy = |_| Error::new(Code::Timeout, "too many writes were on their way already; raise write_channels");
        let permit = fs3_rt::timeout_at(deadline, self.permits.acquire()).await.map_err(busy)?;
        let permit = permit.expect("the semaphore is never closed");
        let channel = self.free.lock().pop().expect("as many permits as channels");
        Ok(Claim { channels: self, number: channel.number, sequence: channel.sequence + 1, _permit: permit })
    }
}

impl Claim<'_> {
    pub fn id(&self) -> WriterId {
        WriterId {
            client_id: bytes::Bytes::copy_from_slice(&self.channels.client.0),
            channel: self.number,
            sequence: self.sequence,
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        // The channel goes back before the permit does (fields drop after this body).
        self.channels.free.lock().push(Channel { number: self.number, sequence: self.sequence });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_channel_has_one_write_at_a_time_and_growing_sequences() {
        let channels = Channels::new(ClientId([1; 16]), 2);
        let soon = Instant::now() + std::time::Duration::from_millis(5);
        let a = channels.claim(soon).await.unwrap();
        let b = channels.claim(soon).await.unwrap();
        assert_ne!(a.id().channel, b.id().channel);
        assert_eq!(channels.claim(soon).await.err().unwrap().code, Code::Timeout);
        let before = a.id();
        drop(a);
        let again = channels.claim(soon).await.unwrap().id();
        assert_eq!((again.channel, again.sequence), (before.channel, before.sequence + 1));
    }
}
