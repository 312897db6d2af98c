//! The key-value cache.

use std::time::Duration;

use bytes::Bytes;
use fs3_client::trace::Outcome;
use fs3_client::{KvCache as Cache, KvGot, KvKeep, KvSettings, KvSpace, Region, RegionMut, Result};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use crate::buffer::{readable, writable};
use crate::client::Client;
use crate::errors::{to_object, to_python};
use crate::operation::Operation;
use crate::runtime::Owned;
use crate::trace;

/// An open namespace of the key-value cache. Thread-safe.
#[pyclass(frozen, module = "fs3._native")]
pub struct KvCache(Owned<Cache>);

impl KvCache {
    fn native(&self) -> PyResult<Cache> {
        Ok(self.0.get()?.clone())
    }
}

#[pymethods]
impl KvCache {
    /// A namespace by what its directory says of it. Sends nothing.
    #[new]
    #[pyo3(signature = (client, *, id, table, first, chains, chunk_bytes, replicas, durable, version, capacity_bytes, ttl_ms,
        generation, timeout_s))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        client: &Client,
        id: u64,
        table: (u32, u32),
        first: u32,
        chains: u32,
        chunk_bytes: u32,
        replicas: u32,
        durable: bool,
        version: Vec<u8>,
        capacity_bytes: u64,
        ttl_ms: u64,
        generation: u64,
        timeout_s: f64,
    ) -> PyResult<Self> {
        let timeout = Duration::try_from_secs_f64(timeout_s)
            .map_err(|_| PyValueError::new_err("timeout must be a number of seconds"))?;
        let (table_id, table_version) = table;
        let space =
            KvSpace { id, table_id, table_version, first, chains, chunk_bytes, replicas, durable, version, timeout };
        let settings = KvSettings { capacity_bytes, ttl_ms, generation };
        let cache = Cache::new(client.native()?, space, settings).map_err(|error| to_python(py, &error))?;
        Ok(Self(Owned::new(cache)))
    }

    /// Keep one value; whether all its replicas have it.
    fn put(&self, key: &[u8], value: &Bound<'_, PyAny>) -> PyResult<Operation> {
        let cache = self.native()?;
        let (key, value) = (Bytes::copy_from_slice(key), readable(value)?);
        let kept = value.clone();
        // The buffer goes back where the interpreter is at hand.
        let shown = trace::on_cache("kv_put", &cache, 1);
        let work = shown.run(async move { cache.put(vec![(key, value)]).await.map(|stored| (stored, kept)) }, |done| {
            stored(done, |kept: &Region| kept.len())
        });
        Ok(Operation::new(work, |_, (stored, _kept): (Vec<bool>, Region)| Ok(stored[0])))
    }

    /// Keep many values.
    fn put_many(&self, keys: Vec<Vec<u8>>, values: Vec<Bound<'_, PyAny>>) -> PyResult<Operation> {
        let cache = self.native()?;
        same_length(keys.len(), values.len())?;
        let values = values.iter().map(readable).collect::<PyResult<Vec<_>>>()?;
        let kept = values.clone();
        let items = keys.into_iter().map(Bytes::from).zip(values).collect();
        let shown = trace::on_cache("kv_put_batch", &cache, kept.len());
        let work = shown.run(async move { cache.put(items).await.map(|stored| (stored, kept)) }, |done| {
            stored(done, |kept: &Vec<Region>| kept.iter().map(|value| value.len()).sum())
        });
        Ok(Operation::new(work, |_, (stored, _kept): (Vec<bool>, Vec<Region>)| Ok(stored)))
    }

    /// One value, or None.
    fn get(&self, key: &[u8]) -> PyResult<Operation> {
        let (cache, key) = (self.native()?, Bytes::copy_from_slice(key));
        let work = trace::on_cache("kv_get", &cache, 1).run(async move { cache.get(vec![key]).await }, values_got);
        Ok(Operation::new(work, |py, values| Ok(values[0].as_ref().map(|value| PyBytes::new(py, value).unbind()))))
    }

    /// Many values; None for each that is not there.
    fn get_many(&self, keys: Vec<Vec<u8>>) -> PyResult<Operation> {
        let cache = self.native()?;
        let shown = trace::on_cache("kv_get_batch", &cache, keys.len());
        let keys = keys.into_iter().map(Bytes::from).collect();
        let work = shown.run(async move { cache.get(keys).await }, values_got);
        Ok(Operation::new(work, |py, values| {
            let value = |value: Option<Region>| value.map(|value| PyBytes::new(py, &value).unbind());
            Ok(values.into_iter().map(value).collect::<Vec<_>>())
        }))
    }

    /// One value into writable memory: its length, None for a miss, and minus its length when it does not fit.
    fn get_into(&self, key: &[u8], buffer: &Bound<'_, PyAny>) -> PyResult<Operation> {
        let cache = self.native()?;
        let item = (Bytes::copy_from_slice(key), writable(buffer)?);
        let work = trace::on_cache("kv_get", &cache, 1).run(async move { cache.get_into(vec![item]).await }, got_into);
        Ok(Operation::new(work, |_, got| Ok(count(&got[0]))))
    }

    /// Many values, each into its memory, as `get_into`.
    fn get_many_into(&self, keys: Vec<Vec<u8>>, buffers: Vec<Bound<'_, PyAny>>) -> PyResult<Operation> {
        let cache = self.native()?;
        same_length(keys.len(), buffers.len())?;
        let buffers = buffers.iter().map(writable).collect::<PyResult<Vec<_>>>()?;
        let shown = trace::on_cache("kv_get_batch", &cache, keys.len());
        let items = keys.into_iter().map(Bytes::from).zip(buffers).collect();
        let work = shown.run(async move { cache.get_into(items).await }, got_into);
        Ok(Operation::new(work, |_, got| Ok(got.iter().map(count).collect::<Vec<_>>())))
    }

    /// Whether each is there.
    fn exists(&self, keys: Vec<Vec<u8>>) -> PyResult<Operation> {
        let cache = self.native()?;
        let shown = trace::on_cache("kv_exists", &cache, keys.len());
        let keys = keys.into_iter().map(Bytes::from).collect();
        let work = shown.run(async move { cache.exists(keys).await }, |found| {
            let hits = found.as_ref().ok().map(|found| found.iter().filter(|there| **there).count() as u64);
            Outcome { hits, ..Outcome::plain(found) }
        });
        Ok(Operation::new(work, |_, found| Ok(found)))
    }

    /// Forget many; for each whether it was there, or the error.
    fn remove(&self, keys: Vec<Vec<u8>>) -> PyResult<Operation> {
        let cache = self.native()?;
        let shown = trace::on_cache("kv_remove", &cache, keys.len());
        let keys = keys.into_iter().map(Bytes::from).collect();
        let work = shown.run(async move { cache.remove(keys).await }, Outcome::plain);
        Ok(Operation::new(work, |py, removed| {
            let mut list = Vec::with_capacity(removed.len());
            for result in removed {
                list.push(match result {
                    Ok(removed) => removed.into_pyobject(py)?.to_owned().into_any().unbind(),
                    Err(error) => to_object(py, &error),
                });
            }
            Ok(PyList::new(py, list)?.unbind())
        }))
    }

    /// Numbers of the nodes that may hold some of it.
    fn nodes(&self) -> PyResult<Vec<u32>> {
        Ok(self.0.get()?.nodes())
    }

    /// Some values of one node, as (key, bytes, age_ms, idle_ms), and where to go on, None at the end.
    fn list_page(&self, node: u32, prefix: Vec<u8>, after: u64, limit: u32) -> PyResult<Operation> {
        let cache = self.native()?;
        Ok(Operation::new(async move { cache.list(node, &prefix, after, limit).await }, |py, page| {
            let entry = |entry: fs3_client::KvEntry| {
                (PyBytes::new(py, &entry.key).unbind(), entry.bytes, entry.age_ms, entry.idle_ms)
            };
            Ok((page.entries.into_iter().map(entry).collect::<Vec<_>>(), page.next))
        }))
    }

    /// Counters of all nodes that answer, added up.
    fn stat(&self) -> PyResult<Operation> {
        let cache = self.native()?;
        Ok(Operation::with(async move { cache.stat().await }, |_, counters| Ok(counters)))
    }

    /// Counters of this handle; `get_p50_s` and the like in seconds.
    fn calls<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let cache = self.0.get()?;
        let dict = PyDict::new(py);
        for (name, count) in cache.calls().counters() {
            dict.set_item(name, count)?;
        }
        for (kind, latency) in [("get", cache.calls().get_latency()), ("put", cache.calls().put_latency())] {
            dict.set_item(format!("{kind}_calls"), latency.calls)?;
            dict.set_item(format!("{kind}_p50_s"), latency.p50.as_secs_f64())?;
            dict.set_item(format!("{kind}_p99_s"), latency.p99.as_secs_f64())?;
        }
        Ok(dict)
    }

    /// Bring settings to all nodes.
    fn configure(&self, capacity_bytes: u64, ttl_ms: u64, generation: u64) -> PyResult<Operation> {
        let cache = self.native()?;
        cache.set_settings(KvSettings { capacity_bytes, ttl_ms, generation });
        Ok(Operation::new(async move { cache.evict(KvKeep::Part(1.0)).await }, |_, _| Ok(())))
    }

    /// Forget what was used the longest ago, until so many bytes, or such a part, are left: entries and bytes that went.
    #[pyo3(signature = (*, keep_bytes=None, keep_part=0.0))]
    fn evict(&self, keep_bytes: Option<u64>, keep_part: f64) -> PyResult<Operation> {
        let cache = self.native()?;
        let keep = keep_bytes.map_or(KvKeep::Part(keep_part), KvKeep::Bytes);
        Ok(Operation::new(async move { cache.evict(keep).await }, |_, gone| Ok(gone)))
    }
}

/// For traces: what a put did, and how many bytes it had.
fn stored<T>(done: &Result<(Vec<bool>, T)>, bytes: impl FnOnce(&T) -> usize) -> Outcome {
    let Ok((stored, values)) = done else { return Outcome::plain(done) };
    let hits = stored.iter().filter(|stored| **stored).count() as u64;
    Outcome { bytes: Some(bytes(values) as u64), hits: Some(hits), error: None }
}

/// For traces: what a get found.
fn values_got(done: &Result<Vec<Option<Region>>>) -> Outcome {
    let Ok(values) = done else { return Outcome::plain(done) };
    found(values.iter().flatten().map(|value| value.len()))
}

/// For traces: what a get into memory found.
fn got_into(done: &Result<Vec<(KvGot, RegionMut)>>) -> Outcome {
    let Ok(got) = done else { return Outcome::plain(done) };
    found(got.iter().filter_map(|(got, _)| if let KvGot::Hit(bytes) = got { Some(*bytes) } else { None }))
}

fn found(lengths: impl Iterator<Item = usize> + Clone) -> Outcome {
    Outcome { hits: Some(lengths.clone().count() as u64), bytes: Some(lengths.sum::<usize>() as u64), error: None }
}

fn count((got, _buffer): &(KvGot, RegionMut)) -> Option<i64> {
    match got {
        KvGot::Miss => None,
        KvGot::Hit(bytes) => Some(*bytes as i64),
        KvGot::TooLong(bytes) => Some(-(*bytes as i64)),
    }
}

fn same_length(keys: usize, others: usize) -> PyResult<()> {
    if keys == others {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("{keys} keys and {others} buffers: there must be one for each")))
}
