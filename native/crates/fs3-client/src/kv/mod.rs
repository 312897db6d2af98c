//! The key-value cache: values found by the hash of their key, straight on the node that keeps them.
//!
//! A namespace is a directory; what it says of chains, chunk size and replicas was read when it was opened. After that no
//! metadata service is asked. A value is kept by the first `replicas` targets of one chain that serve, each by itself: a
//! put is told to all of them at once, a get asks the first, and the next one when that has nothing or does not answer.
//! Nothing here waits longer than the namespace's timeout.

mod admin;
mod get;
mod put;
mod remove;
mod space;
mod stats;
mod together;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use fs3_core::{Code, Error, Region, RegionMut, Result};
use fs3_proto::v1::KvNamespace;
use fs3_rt::Instant;
use parking_lot::RwLock;

use crate::Client;
use crate::inner::Inner;
use space::Address;

pub use admin::{KvEntry, KvKeep, KvPage};
pub use get::KvGot;
pub use space::{KvSettings, KvSpace};
pub use stats::{KvCalls, KvLatency};

/// Bytes that values are expected to have before one was seen.
const SIZE_FIRST: usize = 64 << 10;
/// Values are expected to be no larger than this: larger ones are asked for twice.
const SIZE_MAX: usize = 4 << 20;
/// Bytes that values of one call may have which nobody has named memory for; more come in several goes.
const UNNAMED_BYTES_MAX: usize = 32 << 20;

/// An open namespace. Cheap to clone, thread-safe.
#[derive(Clone)]
pub struct KvCache {
    shared: Arc<Shared>,
}

struct Shared {
    /// Keeps the client's tasks alive.
    client: Client,
    space: KvSpace,
    settings: RwLock<KvSettings>,
    calls: KvCalls,
    /// The largest value that was seen lately.
    size: AtomicUsize,
}

impl Shared {
    fn inner(&self) -> &Arc<Inner> {
        self.client.inner()
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.space.timeout
    }

    fn address(&self, key: &[u8]) -> Address {
        self.space.address(key, 0)
    }

    /// What storage is told of the namespace with every put.
    fn namespace(&self) -> KvNamespace {
        let settings = *self.settings.read();
        KvNamespace {
            id: self.space.id,
            share_bytes: settings.capacity_bytes.div_ceil(u64::from(self.space.chains)),
            ttl_ms: settings.ttl_ms,
            generation: settings.generation,
            chunk_bytes: if self.space.durable { self.space.chunk_bytes } else { 0 },
        }
    }

    /// What requests other than puts say of a durable namespace.
    fn durable(&self) -> Option<KvNamespace> {
        self.space.durable.then(|| self.namespace())
    }

    fn seen(&self, bytes: usize) {
        let bytes = bytes.min(SIZE_MAX);
        if bytes > self.size.load(Ordering::Relaxed) {
            self.size.store(bytes, Ordering::Relaxed);
        }
    }
}

impl KvCache {
    /// Use a namespace with what its directory says of it.
    ///
    /// # Errors
    /// `InvalidArgument` when that is impossible.
    pub fn new(client: Client, space: KvSpace, settings: KvSettings) -> Result<Self> {
        space.check()?;
        let (calls, size) = (KvCalls::default(), AtomicUsize::new(SIZE_FIRST));
        Ok(Self { shared: Arc::new(Shared { client, space, settings: RwLock::new(settings), calls, size }) })
    }

    /// What the namespace is.
    pub fn space(&self) -> &KvSpace {
        &self.shared.space
    }

    /// Use other settings from now on; storage hears of them with the next puts.
    pub fn set_settings(&self, settings: KvSettings) {
        *self.shared.settings.write() = settings;
    }

    /// Counters of this handle.
    pub fn calls(&self) -> &KvCalls {
        &self.shared.calls
    }

    /// Keep values; whether each is kept by all its replicas. One that is not may be found or not. The bytes must not
    /// change meanwhile.
    ///
    /// # Errors
    /// `InvalidArgument` for a key or value that no namespace takes.
    pub async fn put(&self, items: Vec<(Bytes, Region)>) -> Result<Vec<bool>> {
        for (key, value) in &items {
            check_key(key)?;
            self.shared.space.pieces_of(value.len())?;
            self.shared.seen(value.len());
        }
        let (began, count) = (Instant::now(), items.len());
        let stored = put::put(&self.shared, items).await;
        self.shared.calls.put(count, stored.iter().filter(|stored| **stored).count(), began.elapsed());
        Ok(stored)
    }

    /// Read values into the memory given for each, which comes back.
    ///
    /// # Errors
    /// `InvalidArgument` for a key that no namespace takes.
    pub async fn get_into(&self, items: Vec<(Bytes, RegionMut)>) -> Result<Vec<(KvGot, RegionMut)>> {
        items.iter().try_for_each(|(key, _)| check_key(key))?;
        let (began, count) = (Instant::now(), items.len());
        let got = get::get_into(&self.shared, items).await;
        let hits = got.iter().filter(|(got, _)| !matches!(got, KvGot::Miss)).count();
        self.shared.calls.get(hits, count - hits, began.elapsed());
        Ok(got)
    }

    /// Read values into memory of the client.
    ///
    /// # Errors
    /// `InvalidArgument` for a key that no namespace takes.
    pub async fn get(&self, keys: Vec<Bytes>) -> Result<Vec<Option<Region>>> {
        keys.iter().try_for_each(|key| check_key(key))?;
        let (began, count) = (Instant::now(), keys.len());
        let mut values = Vec::with_capacity(keys.len());
        let mut keys = keys.into_iter().peekable();
        while keys.peek().is_some() {
            let room = self.shared.size.load(Ordering::Relaxed);
            let some: Vec<Bytes> = keys.by_ref().take((UNNAMED_BYTES_MAX / room).max(1)).collect();
            values.extend(get::get(&self.shared, some, room).await);
        }
        let hits = values.iter().flatten().count();
        self.shared.calls.get(hits, count - hits, began.elapsed());
        Ok(values)
    }

    /// Whether the values are there. They count as used.
    ///
    /// # Errors
    /// `InvalidArgument` for a key that no namespace takes.
    pub async fn exists(&self, keys: Vec<Bytes>) -> Result<Vec<bool>> {
        keys.iter().try_for_each(|key| check_key(key))?;
        Ok(get::exists(&self.shared, keys).await)
    }

    /// Forget values; whether each was there. When this returns without an error, none of them is found any more.
    ///
    /// # Errors
    /// For each key, why it may still be there; for all, `InvalidArgument`.
    pub async fn remove(&self, keys: Vec<Bytes>) -> Result<Vec<Result<bool>>> {
        keys.iter().try_for_each(|key| check_key(key))?;
        Ok(remove::remove(&self.shared, keys).await)
    }
}

fn check_key(key: &[u8]) -> Result<()> {
    if key.is_empty() || key.len() > space::KEY_BYTES_MAX {
        let message = format!("a key has 1 to {} bytes, this one {}", space::KEY_BYTES_MAX, key.len());
        return Err(Error::new(Code::InvalidArgument, message));
    }
    Ok(())
}
