//! The client: metadata calls and batches of reads.

use std::sync::Arc;
use std::time::Duration;

use fs3_client::trace::{Outcome, Shown};
use fs3_client::{
    Caller, ClientConfig, CreateOptions, FileType, Method, OpenFile, OpenOptions, PathAt, ReadOp, ReadSum, Region,
    RegionMut, Result, Setattr, SetxattrMode, WriteOp,
};
use prost::Message;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use crate::buffer::{readable, writable};
use crate::errors::to_object;
use crate::file::File;
use crate::locks::Locks;
use crate::operation::Operation;
use crate::records::{Attr, DirEntry, Replica, Statfs};
use crate::runtime::Owned;
use crate::trace;
use crate::transport::{self, RdmaOptions};

/// A connection to a cluster, made by `Client.connect`. Thread-safe. Paths are bytes, relative to the directory
/// inode given with them (1: the root); an empty path is that inode itself.
#[pyclass(frozen, module = "fs3._native")]
pub struct Client {
    client: Owned<fs3_client::Client>,
    caller: Arc<Caller>,
}

impl Client {
    /// The Rust client, for other parts of the module. Errors in a forked child.
    pub fn native(&self) -> PyResult<fs3_client::Client> {
        Ok(self.client.get()?.clone())
    }

    fn attr<F>(&self, shown: Shown, work: impl FnOnce(fs3_client::Client, Arc<Caller>) -> F) -> PyResult<Operation>
    where
        F: Future<Output = Result<fs3_client::Attr>> + Send + 'static,
    {
        let work = shown.run(work(self.native()?, self.caller.clone()), Outcome::plain);
        Ok(Operation::new(work, |py, attr| Py::new(py, Attr::from(attr))))
    }
}

fn at(inode: u64, path: &[u8], follow: bool) -> PathAt {
    PathAt { follow, ..fs3_client::at_child(inode, path) }
}

fn duration(seconds: f64, name: &str) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| PyValueError::new_err(format!("{name} must be a number of seconds")))
}

#[pymethods]
impl Client {
    /// Reach a cluster. `metas` are "host:port"; `uid`, `gid` and `groups` are who calls.
    #[staticmethod]
    #[pyo3(signature = (metas, token, *, cluster_id=None, uid=0, gid=0, groups=Vec::new(), op_timeout_s=30.0,
        read_attempt_timeout_s=5.0, meta_attempt_timeout_s=10.0, read_bytes_in_flight=16 << 20,
        write_bytes_in_flight=16 << 20, write_channels=64, connections_per_peer=2, transport="auto".into(),
        rdma=None, shared_memory=true, noatime=false, description=String::new()))]
    #[allow(clippy::too_many_arguments)]
    fn connect(
        py: Python<'_>,
        metas: Vec<String>,
        token: String,
        cluster_id: Option<String>,
        uid: u32,
        gid: u32,
        groups: Vec<u32>,
        op_timeout_s: f64,
        read_attempt_timeout_s: f64,
        meta_attempt_timeout_s: f64,
        read_bytes_in_flight: usize,
        write_bytes_in_flight: usize,
        write_channels: usize,
        connections_per_peer: usize,
        transport: String,
        rdma: Option<RdmaOptions>,
        shared_memory: bool,
        noatime: bool,
        description: String,
    ) -> PyResult<Operation> {
        let config = ClientConfig {
            metas,
            token,
            cluster_id,
            op_timeout: duration(op_timeout_s, "op_timeout_s")?,
            read_attempt_timeout: duration(read_attempt_timeout_s, "read_attempt_timeout_s")?,
            meta_attempt_timeout: duration(meta_attempt_timeout_s, "meta_attempt_timeout_s")?,
            read_bytes_in_flight,
            write_bytes_in_flight,
            write_channels,
            connections_per_peer,
            transport: transport::transport(py, &transport, rdma, shared_memory)?,
            access_times: !noatime,
            description,
        };
        let caller = Arc::new(Caller { uid, gid, groups });
        Ok(Operation::new(fs3_client::Client::connect(config), move |py, client| {
            Py::new(py, Client { client: Owned::new(client), caller })
        }))
    }

    /// The same client on behalf of somebody else. It shares everything else, so making one costs nothing.
    fn acting_as(&self, uid: u32, gid: u32, groups: Vec<u32>) -> PyResult<Self> {
        Ok(Self { client: Owned::new(self.native()?), caller: Arc::new(Caller { uid, gid, groups }) })
    }

    /// Locks of files.
    fn locks(&self) -> PyResult<Locks> {
        Ok(Locks::new(self.native()?))
    }

    /// Random identity of this client, 16 bytes.
    #[getter]
    fn client_id<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.client.get()?.client_id().0))
    }

    /// The cluster's id.
    #[getter]
    fn cluster_id(&self) -> PyResult<String> {
        Ok(self.client.get()?.cluster_id())
    }

    /// Version of the routing in use.
    #[getter]
    fn routing_version(&self) -> PyResult<u64> {
        Ok(self.client.get()?.routing_version())
    }

    /// The routing in use, an encoded `fs3.v1.Routing`.
    fn routing<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.client.get()?.routing().encode_to_vec()))
    }

    /// Ask for newer routing; the version in use afterwards.
    fn refresh_routing(&self) -> PyResult<Operation> {
        let client = self.native()?;
        Ok(Operation::new(async move { client.refresh_routing().await }, |_, version| Ok(version)))
    }

    /// Counters since `connect`; those of RDMA, `rdma.DEVICE.NAME`, and of shared memory since the process first used
    /// them.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let client = self.client.get()?;
        let stats = client.stats();
        let dict = PyDict::new(py);
        dict.set_item("checksum_failures", stats.checksum_failures)?;
        dict.set_item("read_failovers", stats.read_failovers)?;
        dict.set_item("read_hedges", stats.read_hedges)?;
        dict.set_item("read_hedges_won", stats.read_hedges_won)?;
        dict.set_item("write_retries", stats.write_retries)?;
        dict.set_item("payload_resends", stats.payload_resends)?;
        for (device, counters) in client.rdma_counters() {
            for (name, count) in counters {
                dict.set_item(format!("rdma.{device}.{name}"), count)?;
            }
        }
        for (name, count) in client.shared_memory_counters() {
            dict.set_item(name, count)?;
        }
        Ok(dict)
    }

    /// End the connections; later calls and open files fail.
    fn close(&self) -> PyResult<Operation> {
        let client = self.native()?;
        Ok(Operation::with(
            async move {
                client.close().await;
            },
            |_, ()| Ok(()),
        ))
    }

    /// Attributes of an inode.
    #[pyo3(signature = (path, *, inode=1, follow=true))]
    fn stat(&self, path: Vec<u8>, inode: u64, follow: bool) -> PyResult<Operation> {
        self.attr(trace::on_path("stat", inode, &path), move |client, caller| async move {
            client.stat(&caller, at(inode, &path, follow)).await
        })
    }

    /// Attributes of many paths; each result is an Attr or the error.
    #[pyo3(signature = (paths, *, inode=1, follow=true))]
    fn batch_stat(&self, paths: Vec<Vec<u8>>, inode: u64, follow: bool) -> PyResult<Operation> {
        let (client, caller) = (self.native()?, self.caller.clone());
        let list = paths.iter().map(|path| at(inode, path, follow)).collect();
        let shown = trace::on_paths("batch_stat", inode, &paths);
        let work = shown.run(async move { client.batch_stat(&caller, list).await }, Outcome::plain);
        Ok(Operation::new(work, |py, results| {
            listed(py, results, |attr| Ok(Py::new(py, Attr::from(attr))?.into_any()))
        }))
    }

    /// All entries of a directory in name order.
    #[pyo3(signature = (path, *, inode=1, with_attr=false))]
    fn list(&self, path: Vec<u8>, inode: u64, with_attr: bool) -> PyResult<Operation> {
        let (client, caller) = (self.native()?, self.caller.clone());
        let shown = trace::on_path("list", inode, &path);
        let work = async move { client.list_all(&caller, at(inode, &path, true), with_attr).await };
        let work = shown.run(work, Outcome::plain);
        Ok(Operation::new(work, |py, entries| {
            entries.into_iter().map(|entry| Py::new(py, DirEntry::from(entry))).collect::<PyResult<Vec<_>>>()
        }))
    }

    /// Entries of a directory in name order, greater than `after` and `limit` at most; whether they are the last ones, and the
    /// directory's parent.
    #[pyo3(signature = (path, after, limit, *, inode=1, with_attr=false))]
    fn list_page(&self, path: Vec<u8>, after: Vec<u8>, limit: u32, inode: u64, with_attr: bool) -> PyResult<Operation> {
        let (client, caller) = (self.native()?, self.caller.clone());
        let shown = trace::on_path("list", inode, &path);
        let work = async move { client.list(&caller, at(inode, &path, true), &after, limit, with_attr).await };
        let work = shown.run(work, Outcome::plain);
        Ok(Operation::new(work, |py, page| {
            let entries = page.entries.into_iter().map(|entry| Py::new(py, DirEntry::from(entry)));
            Ok((entries.collect::<PyResult<Vec<_>>>()?, page.end, page.parent))
        }))
    }

    /// Create and open a file; without `exclusive` an existing one is opened. `umask` is taken from the mode unless the
    /// directory has a default access control list.
    #[pyo3(signature = (path, *, inode=1, mode=0o644, umask=0, exclusive=false, truncate=false, read=true, write=true,
        chunk_bytes=0, follow=true))]
    #[allow(clippy::too_many_arguments)]
    fn create(
        &self,
        path: Vec<u8>,
        inode: u64,
        mode: u32,
        umask: u32,
        exclusive: bool,
        truncate: bool,
        read: bool,
        write: bool,
        chunk_bytes: u32,
        follow: bool,
    ) -> PyResult<Operation> {
        let layout = layout(chunk_bytes);
        let options = CreateOptions { mode, umask, exclusive, truncate, read, write, layout };
        let (client, caller) = (self.native()?, self.caller.clone());
        let (shown, name) = (trace::on_path("create", inode, &path), trace::shown_path(inode, &path));
        let work = async move { client.create(&caller, at(inode, &path, follow), options).await };
        let work = shown.run(work, Outcome::plain);
        Ok(Operation::new(work, |py, file| Py::new(py, File::new(file, name))))
    }

    /// Open an existing file.
    #[pyo3(signature = (path, *, inode=1, read=true, write=false, truncate=false, follow=true))]
    fn open(
        &self,
        path: Vec<u8>,
        inode: u64,
        read: bool,
        write: bool,
        truncate: bool,
        follow: bool,
    ) -> PyResult<Operation> {
        let options = OpenOptions { read, write, truncate };
        let (client, caller) = (self.native()?, self.caller.clone());
        let (shown, name) = (trace::on_path("open", inode, &path), trace::shown_path(inode, &path));
        let work = async move { client.open(&caller, at(inode, &path, follow), options).await };
        let work = shown.run(work, Outcome::plain);
        Ok(Operation::new(work, |py, file| Py::new(py, File::new(file, name))))
    }

    /// Open many existing files for reading, several at a time. Each result is the file or the error.
    #[pyo3(signature = (paths, *, inode=1, follow=true))]
    fn open_many(&self, paths: Vec<Vec<u8>>, inode: u64, follow: bool) -> PyResult<Operation> {
        let (client, caller) = (self.native()?, self.caller.clone());
        let at = paths.iter().map(|path| at(inode, path, follow)).collect();
        let shown = trace::on_paths("open_many", inode, &paths);
        let failed = |results: &Vec<Result<_>>| Outcome {
            error: results.iter().find_map(|one| Outcome::plain(one).error),
            ..Outcome::default()
        };
        let work = shown.run(async move { client.open_many(&caller, at).await }, failed);
        Ok(Operation::with(work, move |py, files| {
            let files = files
                .into_iter()
                .zip(paths)
                .map(|(file, path)| file.map(|file| (file, trace::shown_path(inode, &path))));
            listed(py, files, |(file, path)| Ok(Py::new(py, File::new(file, path))?.into_any()))
        }))
    }

    /// Make a file, fifo, socket or device without opening it; `kind` is a number of `fs3.v1.FileType`, `umask` as in `create`.
    #[pyo3(signature = (path, *, inode=1, mode=0o644, umask=0, kind=1, rdev=0))]
    fn mknod(&self, path: Vec<u8>, inode: u64, mode: u32, umask: u32, kind: i32, rdev: u64) -> PyResult<Operation> {
        let kind = FileType::try_from(kind).map_err(|_| PyValueError::new_err("kind is no FileType"))?;
        self.attr(trace::on_path("mknod", inode, &path), move |client, caller| async move {
            client.mknod(&caller, at(inode, &path, false), mode, umask, kind, rdev).await
        })
    }

    /// Make a directory; with `parents` also those above, an existing one being fine. `chunk_bytes`: what new files
    /// in it inherit, 0: from its parent.
    #[pyo3(signature = (path, *, inode=1, mode=0o755, umask=0, parents=false, chunk_bytes=0))]
    fn mkdir(
        &self,
        path: Vec<u8>,
        inode: u64,
        mode: u32,
        umask: u32,
        parents: bool,
        chunk_bytes: u32,
    ) -> PyResult<Operation> {
        self.attr(trace::on_path("mkdir", inode, &path), move |client, caller| async move {
            client.mkdir(&caller, at(inode, &path, false), mode, umask, parents, layout(chunk_bytes)).await
        })
    }

    /// Make a symlink.
    #[pyo3(signature = (path, target, *, inode=1))]
    fn symlink(&self, path: Vec<u8>, target: Vec<u8>, inode: u64) -> PyResult<Operation> {
        self.attr(trace::on_path("symlink", inode, &path), move |client, caller| async move {
            client.symlink(&caller, at(inode, &path, false), &target).await
        })
    }

    /// Make `destination` a hard link to `source`; it is relative to the directory `to_inode`, if that is given.
    #[pyo3(signature = (source, destination, *, inode=1, follow=false, to_inode=None))]
    fn link(
        &self,
        source: Vec<u8>,
        destination: Vec<u8>,
        inode: u64,
        follow: bool,
        to_inode: Option<u64>,
    ) -> PyResult<Operation> {
        self.attr(trace::on_path("link", inode, &source), move |client, caller| async move {
            let to = at(to_inode.unwrap_or(inode), &destination, false);
            client.link(&caller, at(inode, &source, follow), to).await
        })
    }

    /// Remove a name that is not a directory.
    #[pyo3(signature = (path, *, inode=1))]
    fn unlink(&self, path: Vec<u8>, inode: u64) -> PyResult<Operation> {
        self.attr(trace::on_path("unlink", inode, &path), move |client, caller| async move {
            client.unlink(&caller, at(inode, &path, false), None).await
        })
    }

    /// Remove an empty directory.
    #[pyo3(signature = (path, *, inode=1))]
    fn rmdir(&self, path: Vec<u8>, inode: u64) -> PyResult<Operation> {
        let (client, caller) = (self.native()?, self.caller.clone());
        let shown = trace::on_path("rmdir", inode, &path);
        let work = shown.run(async move { client.rmdir(&caller, at(inode, &path, false)).await }, Outcome::plain);
        Ok(Operation::new(work, |_, ()| Ok(())))
    }

    /// Remove a whole tree in one atomic step.
    #[pyo3(signature = (path, *, inode=1, skip_trash=false))]
    fn remove_all(&self, path: Vec<u8>, inode: u64, skip_trash: bool) -> PyResult<Operation> {
        let (client, caller) = (self.native()?, self.caller.clone());
        let shown = trace::on_path("remove_all", inode, &path);
        let work = shown
            .run(async move { client.remove_all(&caller, at(inode, &path, false), skip_trash).await }, Outcome::plain);
        Ok(Operation::new(work, |_, ()| Ok(())))
    }

    /// Rename; an existing destination is replaced atomically unless `no_replace`. It is relative to the directory
    /// `to_inode`, if that is given.
    #[pyo3(signature = (source, destination, *, inode=1, no_replace=false, exchange=false, to_inode=None))]
    fn rename(
        &self,
        source: Vec<u8>,
        destination: Vec<u8>,
        inode: u64,
        no_replace: bool,
        exchange: bool,
        to_inode: Option<u64>,
    ) -> PyResult<Operation> {
        let (client, caller) = (self.native()?, self.caller.clone());
        let shown = trace::on_path("rename", inode, &source);
        let work = async move {
            let (from, to) = (at(inode, &source, false), at(to_inode.unwrap_or(inode), &destination, false));
            client.rename(&caller, from, to, no_replace, exchange, None).await
        };
        Ok(Operation::new(shown.run(work, Outcome::plain), |_, _| Ok(())))
    }

    /// Change mode, owner or times, or of a directory the layout of new files in it; None leaves a field as it is.
    /// Times are nanoseconds since 1970.
    #[pyo3(signature = (path, *, inode=1, follow=true, mode=None, uid=None, gid=None, atime_ns=None, mtime_ns=None,
        atime_now=false, mtime_now=false, chunk_bytes=None, stripe=None))]
    #[allow(clippy::too_many_arguments)]
    fn setattr(
        &self,
        path: Vec<u8>,
        inode: u64,
        follow: bool,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        atime_ns: Option<i64>,
        mtime_ns: Option<i64>,
        atime_now: bool,
        mtime_now: bool,
        chunk_bytes: Option<u32>,
        stripe: Option<u32>,
    ) -> PyResult<Operation> {
        let change = Setattr { mode, uid, gid, atime_ns, mtime_ns, atime_now, mtime_now, chunk_bytes, stripe };
        self.attr(trace::on_path("setattr", inode, &path), move |client, caller| async move {
            client.setattr(&caller, at(inode, &path, follow), change).await
        })
    }

    /// Any metadata operation: the encoded request without `caller` and `op` (`with_op`: it has one); the encoded
    /// response.
    fn meta_call(&self, method: i32, request: Vec<u8>, with_op: bool) -> PyResult<Operation> {
        let (client, caller) = (self.native()?, self.caller.clone());
        let method =
            Method::try_from(method).map_err(|_| PyValueError::new_err(format!("there is no method {method}")))?;
        let work = async move { client.meta_call(&caller, method, request.into(), with_op).await };
        let work = trace::on_path(method.as_str_name(), 0, b"").run(work, Outcome::plain);
        Ok(Operation::new(work, |py, response| Ok(PyBytes::new(py, &response).unbind())))
    }

    /// The value of an extended attribute.
    #[pyo3(signature = (path, name, *, inode=1, follow=true))]
    fn getxattr(&self, path: Vec<u8>, name: Vec<u8>, inode: u64, follow: bool) -> PyResult<Operation> {
        let (client, caller) = (self.native()?, self.caller.clone());
        let shown = trace::on_path("getxattr", inode, &path);
        let work =
            shown.run(async move { client.getxattr(&caller, at(inode, &path, follow), &name).await }, Outcome::plain);
        Ok(Operation::new(work, |py, value| Ok(PyBytes::new(py, &value).unbind())))
    }

    /// The names of all extended attributes, in byte order.
    #[pyo3(signature = (path, *, inode=1, follow=true))]
    fn listxattr(&self, path: Vec<u8>, inode: u64, follow: bool) -> PyResult<Operation> {
        let (client, caller) = (self.native()?, self.caller.clone());
        let shown = trace::on_path("listxattr", inode, &path);
        let work = shown.run(async move { client.listxattr(&caller, at(inode, &path, follow)).await }, Outcome::plain);
        Ok(Operation::new(work, |py, names| {
            Ok(PyList::new(py, names.iter().map(|name| PyBytes::new(py, name)))?.unbind())
        }))
    }

    /// Set an extended attribute; `flags` are XATTR_CREATE and XATTR_REPLACE of Linux.
    #[pyo3(signature = (path, name, value, flags=0, *, inode=1, follow=true))]
    fn setxattr(
        &self,
        path: Vec<u8>,
        name: Vec<u8>,
        value: Vec<u8>,
        flags: i32,
        inode: u64,
        follow: bool,
    ) -> PyResult<Operation> {
        self.attr(trace::on_path("setxattr", inode, &path), move |client, caller| async move {
            let mode = SetxattrMode::from_flags(flags)?;
            client.setxattr(&caller, at(inode, &path, follow), &name, &value, mode).await
        })
    }

    /// Remove an extended attribute.
    #[pyo3(signature = (path, name, *, inode=1, follow=true))]
    fn removexattr(&self, path: Vec<u8>, name: Vec<u8>, inode: u64, follow: bool) -> PyResult<Operation> {
        self.attr(trace::on_path("removexattr", inode, &path), move |client, caller| async move {
            client.removexattr(&caller, at(inode, &path, follow), &name).await
        })
    }

    /// Cut or extend a file.
    #[pyo3(signature = (path, length, *, inode=1))]
    fn truncate(&self, path: Vec<u8>, length: u64, inode: u64) -> PyResult<Operation> {
        self.attr(trace::on_path("truncate", inode, &path), move |client, caller| async move {
            client.truncate(&caller, at(inode, &path, true), length).await
        })
    }

    /// Capacity and use.
    #[pyo3(signature = (path=Vec::new(), *, inode=1))]
    fn statfs(&self, path: Vec<u8>, inode: u64) -> PyResult<Operation> {
        let (client, caller) = (self.native()?, self.caller.clone());
        let shown = trace::on_path("statfs", inode, &path);
        let work = shown.run(async move { client.statfs(&caller, at(inode, &path, true)).await }, Outcome::plain);
        Ok(Operation::new(work, |py, statfs| Py::new(py, Statfs::from(statfs))))
    }

    /// Many reads at once: (file, offset, writable buffer) each. Each result is the count or the error.
    fn read_many(&self, ops: Vec<(Bound<'_, File>, u64, Bound<'_, PyAny>)>) -> PyResult<Operation> {
        let client = self.native()?;
        let read = |(file, offset, buffer): &(Bound<'_, File>, u64, Bound<'_, PyAny>)| {
            Ok(ReadOp { file: file.get().open_file()?, offset: *offset, buf: writable(buffer)? })
        };
        let shown = ranges("read_many", &ops);
        let ops = ops.iter().map(read).collect::<PyResult<Vec<_>>>()?;
        let work = async move { client.read_many(ops).await };
        let work = shown.run(work, |results| Outcome::summed(results.iter().map(|(result, _)| result)));
        Ok(Operation::with(work, |py, results: Vec<(Result<usize>, RegionMut)>| {
            counts(py, results.into_iter().map(|(result, _region)| result))
        }))
    }

    /// Many ranges into one writable, contiguous buffer, with checksums of the caller's own. `spans` is a contiguous
    /// buffer of native u64, seven for each: the number of its file among `files`, offset, where it goes in the buffer, length;
    /// the part with a checksum, from the first byte on, and its length (0: it has none), the CRC-32C. Places must rise and
    /// not overlap. Each result is the count, None when the bytes are not what their checksum says, or the error.
    fn read_spans(
        &self,
        files: Vec<Bound<'_, File>>,
        spans: &Bound<'_, PyAny>,
        buffer: &Bound<'_, PyAny>,
    ) -> PyResult<Operation> {
        let client = self.native()?;
        let spans = PyBuffer::<u64>::get(spans)?.to_vec(buffer.py())?;
        let opened = files.iter().map(|file| file.get().open_file()).collect::<PyResult<Vec<_>>>()?;
        let shown = trace::on_ranges("read_many", || {
            let numbers = spans.chunks_exact(SPAN_FIELDS).filter(|span| (span[0] as usize) < opened.len());
            let range = |span: &[u64]| {
                let number = span[0] as usize;
                (opened[number].clone(), files[number].get().path(), span[1])
            };
            numbers.map(range).collect()
        });
        let ops = span_ops(&opened, &spans, writable(buffer)?)
            .ok_or_else(|| PyValueError::new_err("the spans do not fit each other, the files or the buffer"))?;
        let work = async move { client.read_checked(ops).await };
        let work = shown.run(work, |results| {
            let counts: Vec<_> =
                results.iter().map(|(result, _)| result.clone().map(Option::unwrap_or_default)).collect();
            Outcome::summed(&counts)
        });
        Ok(Operation::with(work, |py, results: Vec<(Result<Option<usize>>, RegionMut)>| {
            listed(py, results.into_iter().map(|(result, _region)| result), |count| {
                Ok(count.into_pyobject(py)?.into_any().unbind())
            })
        }))
    }

    /// Many writes at once: (file, offset, contiguous buffer) each. Each result is the count or the error.
    fn write_many(&self, ops: Vec<(Bound<'_, File>, u64, Bound<'_, PyAny>)>) -> PyResult<Operation> {
        let client = self.native()?;
        let (mut list, mut regions) = (Vec::with_capacity(ops.len()), Vec::with_capacity(ops.len()));
        for (file, offset, buffer) in &ops {
            let data = readable(buffer)?;
            regions.push(data.clone());
            list.push(WriteOp { file: file.get().open_file()?, offset: *offset, data });
        }
        // The buffers go back where the interpreter is at hand.
        let work = async move { (client.write_many(list).await, regions) };
        let work = ranges("write_many", &ops).run(work, |(results, _)| Outcome::summed(results));
        Ok(Operation::with(work, |py, (results, regions): (Vec<Result<usize>>, Vec<Region>)| {
            drop(regions);
            counts(py, results)
        }))
    }

    /// What every target of every chain holds.
    fn list_replicas(&self) -> PyResult<Operation> {
        let client = self.native()?;
        Ok(Operation::new(async move { client.list_replicas().await }, |py, listings| {
            let replica = |listing| Py::new(py, Replica::new(py, listing)?);
            listings.into_iter().map(replica).collect::<PyResult<Vec<_>>>()
        }))
    }
}

/// Numbers of one span of [`Client::read_spans`].
const SPAN_FIELDS: usize = 7;

/// The reads that spans describe; `None` when they make no sense.
fn span_ops(files: &[Arc<OpenFile>], spans: &[u64], buffer: RegionMut) -> Option<Vec<(ReadOp, Option<ReadSum>)>> {
    if !spans.len().is_multiple_of(SPAN_FIELDS) {
        return None;
    }
    let (mut rest, mut at, mut ops) = (buffer, 0, Vec::with_capacity(spans.len() / SPAN_FIELDS));
    for span in spans.chunks_exact(SPAN_FIELDS) {
        let &[file, offset, place, length, skip, summed, crc] = span else { return None };
        let (place, length) = (usize::try_from(place).ok()?, usize::try_from(length).ok()?);
        let gap = place.checked_sub(at)?;
        if gap.checked_add(length)? > rest.len() || skip.checked_add(summed)? > length as u64 {
            return None;
        }
        let (buf, behind) = rest.split_at(gap).1.split_at(length);
        (rest, at) = (behind, place + length);
        let range = skip as usize..(skip + summed) as usize;
        let sum = (summed > 0).then_some(ReadSum { range, crc: u32::try_from(crc).ok()? });
        ops.push((ReadOp { file: files.get(usize::try_from(file).ok()?)?.clone(), offset, buf }, sum));
    }
    Some(ops)
}

/// What a trace shows of a batch.
fn ranges(name: &'static str, ops: &[(Bound<'_, File>, u64, Bound<'_, PyAny>)]) -> Shown {
    let range = |(file, offset, _): &(Bound<'_, File>, u64, _)| {
        let file = file.get();
        Some((file.open_file().ok()?, file.path(), *offset))
    };
    trace::on_ranges(name, || ops.iter().filter_map(range).collect())
}

/// A list of what `make` makes of the results, and of errors.
fn listed<T>(
    py: Python<'_>,
    results: impl IntoIterator<Item = Result<T>>,
    make: impl Fn(T) -> PyResult<Py<PyAny>>,
) -> PyResult<Py<PyList>> {
    let objects = results.into_iter().map(|result| match result {
        Ok(value) => make(value),
        Err(error) => Ok(to_object(py, &error)),
    });
    Ok(PyList::new(py, objects.collect::<PyResult<Vec<_>>>()?)?.unbind())
}

/// A list of counts and errors.
fn counts(py: Python<'_>, results: impl IntoIterator<Item = Result<usize>>) -> PyResult<Py<PyList>> {
    listed(py, results, |count| Ok(count.into_pyobject(py)?.into_any().unbind()))
}

/// A layout that only chooses the chunk size; the service fills in the rest.
fn layout(chunk_bytes: u32) -> Option<fs3_client::Layout> {
    (chunk_bytes > 0).then(|| fs3_client::Layout { chunk_bytes, ..Default::default() })
}
