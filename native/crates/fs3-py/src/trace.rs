//! Traces: what is noted of operations, and what Python gets of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use fs3_client::trace::{self, Event, Outcome, Shown, Subject, What};
use fs3_client::{KvCache, OpenFile};
use pyo3::prelude::*;

use crate::runtime::process;

/// The inode of the root directory.
const ROOT: u64 = 1;

/// A path as it is shown: from the root, if that is where it begins.
pub fn shown_path(inode: u64, path: &[u8]) -> Arc<[u8]> {
    if inode == ROOT && !path.starts_with(b"/") { [b"/", path].concat().into() } else { path.into() }
}

/// An operation that this thread asks for; the trace learns the thread's name.
fn shown(subject: impl FnOnce() -> Subject) -> Shown {
    trace::shown(|| {
        note_thread();
        subject()
    })
}

fn note_thread() {
    // SAFETY: it always succeeds.
    let thread = unsafe { libc::gettid() };
    let Ok(process) = process() else { return };
    if process.thread_names.lock().contains_key(&thread) {
        return;
    }
    // Without the lock: another thread may hold it and want the interpreter.
    let name = Python::attach(|py| {
        py.import("threading")?.call_method0("current_thread")?.getattr("name")?.extract::<String>()
    });
    if let Ok(name) = name {
        process.thread_names.lock().insert(thread, name);
    }
}

/// An operation on a path.
pub fn on_path(name: &'static str, inode: u64, path: &[u8]) -> Shown {
    shown(|| Subject { name, path: shown_path(inode, path), inode, ..Subject::default() })
}

/// An operation on `count` paths.
pub fn on_paths(name: &'static str, inode: u64, paths: &[Vec<u8>]) -> Shown {
    let count = Some(paths.len() as u64);
    let path = || if let [path] = paths { shown_path(inode, path) } else { Arc::default() };
    shown(|| Subject { name, path: path(), inode, count, ..Subject::default() })
}

/// An operation on an open file.
pub fn on_file(name: &'static str, file: &OpenFile, path: &Arc<[u8]>, offset: Option<u64>) -> Shown {
    shown(|| Subject { name, path: path.clone(), inode: file.inode(), offset, ..Subject::default() })
}

/// An operation on ranges of open files: (file, its path, offset) each.
pub fn on_ranges(name: &'static str, ranges: impl FnOnce() -> Vec<(Arc<OpenFile>, Arc<[u8]>, u64)>) -> Shown {
    shown(|| {
        let ranges = ranges();
        let count = Some(ranges.len() as u64);
        let subject = Subject { name, count, ..Subject::default() };
        match ranges.as_slice() {
            [(file, path, offset), rest @ ..] if rest.iter().all(|(other, _, _)| other.inode() == file.inode()) => {
                let offset = rest.is_empty().then_some(*offset);
                Subject { path: path.clone(), inode: file.inode(), offset, ..subject }
            }
            _ => subject,
        }
    })
}

/// An operation on `count` keys of a namespace of the key-value cache.
pub fn on_cache(name: &'static str, cache: &KvCache, count: usize) -> Shown {
    let count = Some(count as u64);
    shown(|| Subject { name, inode: cache.space().id, count, ..Subject::default() })
}

/// What a trace has of one operation. Times are nanoseconds, those of beginnings since the trace began.
#[pyclass(frozen, get_all, module = "fs3._native")]
pub struct TracedOperation {
    start_ns: u64,
    duration_ns: u64,
    number: u64,
    name: &'static str,
    path: Vec<u8>,
    inode: u64,
    offset: Option<u64>,
    count: Option<u64>,
    thread: i32,
    background: bool,
    finished: bool,
    bytes: Option<u64>,
    hits: Option<u64>,
    error: Option<u16>,
}

/// What a trace has of one request that an operation made.
#[pyclass(frozen, get_all, module = "fs3._native")]
pub struct TracedRequest {
    start_ns: u64,
    duration_ns: u64,
    operation: u64,
    address: String,
    method: i32,
    node_id: u32,
    target_id: u64,
    chunks: u32,
    attempt: u32,
    hedge: bool,
    sent: u64,
    received: u64,
    finished: bool,
    error: Option<u16>,
}

/// Begin to note operations and requests of all clients of this process, the newest `events_max` of them; False when that is
/// done already.
#[pyfunction]
pub fn trace_start(events_max: usize) -> PyResult<bool> {
    let began = trace::start(events_max);
    if began {
        process()?.thread_names.lock().clear();
    }
    Ok(began)
}

/// When a trace began (nanoseconds since 1970), operations and requests in the order in which they ended, how many more
/// there were before, and names of threads.
type Traced = (i64, Vec<Py<TracedOperation>>, Vec<Py<TracedRequest>>, u64, BTreeMap<i32, String>);

/// End that. None when nothing is noted.
#[pyfunction]
pub fn trace_stop(py: Python<'_>) -> PyResult<Option<Traced>> {
    let Some(trace) = trace::stop() else { return Ok(None) };
    let (mut operations, mut requests) = (Vec::new(), Vec::new());
    for event in trace.events {
        convert(py, event, &mut operations, &mut requests)?;
    }
    let names = std::mem::take(&mut *process()?.thread_names.lock());
    Ok(Some((trace.began_wall_ns, operations, requests, trace.dropped, names)))
}

fn convert(
    py: Python<'_>,
    event: Event,
    operations: &mut Vec<Py<TracedOperation>>,
    requests: &mut Vec<Py<TracedRequest>>,
) -> PyResult<()> {
    let (start_ns, duration_ns) = (event.start.as_nanos() as u64, event.duration.as_nanos() as u64);
    let finished = event.outcome.is_some();
    let Outcome { bytes, hits, error } = event.outcome.unwrap_or_default();
    let error = error.map(|code| code as u16);
    match event.what {
        What::Operation { subject, background } => {
            let Subject { name, path, inode, offset, count, thread } = *subject;
            let (number, path) = (event.operation, path.to_vec());
            let operation = TracedOperation {
                start_ns,
                duration_ns,
                number,
                name,
                path,
                inode,
                offset,
                count,
                thread,
                background,
                finished,
                bytes,
                hits,
                error,
            };
            operations.push(Py::new(py, operation)?);
        }
        What::Request { address, method, sent, detail } => {
            let request = TracedRequest {
                start_ns,
                duration_ns,
                operation: event.operation,
                address: address.into(),
                method: method as i32,
                node_id: detail.node_id,
                target_id: detail.target_id,
                chunks: detail.chunks,
                attempt: detail.attempt,
                hedge: detail.hedge,
                sent,
                received: bytes.unwrap_or(0),
                finished,
                error,
            };
            requests.push(Py::new(py, request)?);
        }
    }
    Ok(())
}
