//! The mount daemon for Python: one class, blocking calls with the GIL released.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use fs3_client::{Client, ClientConfig, ClientId};
use fs3_fuse::{Cache, IdMap, IdMaps, IdRange, MountHandle, MountOptions, Predecessor};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tokio::runtime::Runtime;

use crate::errors::to_python;
use crate::runtime::runtime;
use crate::transport::{self, RdmaOptions};

/// How long the end of a mount waits for the connections to close.
const CLOSE_WAIT_MAX: Duration = Duration::from_secs(5);

/// A mount that is being served by this process. All methods block, release the GIL and may be called from any
/// thread. It stays mounted until `unmount`, or until somebody else unmounts it.
#[pyclass(frozen, module = "fs3._native")]
pub struct Mount {
    runtime: &'static Runtime,
    client: Client,
    handle: MountHandle,
}

fn start(
    py: Python<'_>,
    config: ClientConfig,
    mountpoint: PathBuf,
    options: MountOptions,
    predecessor: Option<Py<PyAny>>,
) -> PyResult<Mount> {
    let runtime = runtime()?;
    if config.transport.shares_memory() {
        // Without it, what is written goes by TCP.
        let _ = fs3_core::Arena::enable().inspect_err(|e| tracing::debug!("no memory can be shared: {e}"));
    }
    let client = py.detach(|| runtime.block_on(Client::connect(config))).map_err(|e| to_python(py, &e))?;
    let (client_id, handle) = (client.client_id(), runtime.handle().clone());
    let mounted = match predecessor {
        None => {
            py.detach(|| fs3_fuse::mount(client.clone(), handle, &mountpoint, options)).map_err(|e| to_python(py, &e))
        }
        Some(predecessor) => taken_over(py, &predecessor, client_id).and_then(|state| {
            let ready = py.detach(|| fs3_fuse::succeed(client.clone(), handle, &mountpoint, options, state));
            begun(py, &predecessor, ready.map_err(|e| to_python(py, &e))?)
        }),
    };
    match mounted {
        Ok(handle) => Ok(Mount { runtime, client, handle }),
        Err(error) => {
            py.detach(|| runtime.block_on(client.close()));
            Err(error)
        }
    }
}

fn parse_cache(name: &str) -> PyResult<Cache> {
    match name {
        "auto" => Ok(Cache::Auto),
        "strict" => Ok(Cache::Strict),
        "none" => Ok(Cache::None),
        _ => Err(PyValueError::new_err("cache is auto, strict or none")),
    }
}

/// `ranges`: triples of local id, id of the cluster and count.
fn id_map(all: Option<u32>, ranges: Vec<(u32, u32, u32)>) -> IdMap {
    let range = |(local, cluster, count)| IdRange { local, cluster, count };
    match all {
        Some(id) => IdMap::All(id),
        None if ranges.is_empty() => IdMap::Same,
        None => IdMap::Ranges(ranges.into_iter().map(range).collect()),
    }
}

/// What a predecessor hands over to the client of this id.
fn taken_over(py: Python<'_>, predecessor: &Py<PyAny>, client_id: ClientId) -> PyResult<Predecessor> {
    let answer = predecessor.call_method1(py, "hand_over", (PyBytes::new(py, &client_id.0),))?;
    let (state, descriptors): (Vec<u8>, Vec<i32>) = answer.extract(py)?;
    // SAFETY: the descriptors are the caller's, who gives them away.
    let descriptors = descriptors.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
    Ok(Predecessor { state, descriptors })
}

/// Serve the mount that is ready to be, once the predecessor has left it.
fn begun(py: Python<'_>, predecessor: &Py<PyAny>, ready: MountHandle) -> PyResult<MountHandle> {
    if let Err(error) = predecessor.call_method0(py, "depart") {
        ready.abandon();
        return Err(error);
    }
    py.detach(|| ready.begin());
    Ok(ready)
}

fn client_id(bytes: &[u8]) -> PyResult<ClientId> {
    bytes.try_into().map(ClientId).map_err(|_| PyValueError::new_err("a client id has 16 bytes"))
}

impl Mount {
    /// After the mount has ended: leave the cluster in good order.
    fn leave(&self) {
        self.runtime.block_on(async {
            let _ = tokio::time::timeout(CLOSE_WAIT_MAX, self.client.close()).await;
        });
    }
}

#[pymethods]
impl Mount {
    /// Connect to the cluster and mount it. Times in seconds, sizes in bytes. `predecessor`: go on with a mount in place of
    /// mounting. Its `hand_over`, called with this client's id, returns what that of the process that serves it returned; its
    /// `depart` returns once that process has left the mount, which is not served here before.
    #[new]
    #[pyo3(signature = (*, metas, mountpoint, token="".to_owned(), cluster_id=None, allow_other=false,
        default_permissions=true, read_only=false, suid=false, dev=false, threads=0, max_memory_bytes=256 << 20,
        attr_timeout_s=1.0, entry_timeout_s=1.0, readahead_bytes=4 << 20, local_locks=false, noatime=false, op_timeout_s=30.0,
        transport="auto", rdma=None, shared_memory=true, exec=true, cache="auto", subdir=Vec::new(), uid=None, gid=None, uidmap=Vec::new(),
        gidmap=Vec::new(), source="fs3".to_owned(), config=String::new(), predecessor=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        metas: Vec<String>,
        mountpoint: PathBuf,
        token: String,
        cluster_id: Option<String>,
        allow_other: bool,
        default_permissions: bool,
        read_only: bool,
        suid: bool,
        dev: bool,
        threads: usize,
        max_memory_bytes: usize,
        attr_timeout_s: f64,
        entry_timeout_s: f64,
        readahead_bytes: usize,
        local_locks: bool,
        noatime: bool,
        op_timeout_s: f64,
        transport: &str,
        rdma: Option<RdmaOptions>,
        shared_memory: bool,
        exec: bool,
        cache: &str,
        subdir: Vec<u8>,
        uid: Option<u32>,
        gid: Option<u32>,
        uidmap: Vec<(u32, u32, u32)>,
        gidmap: Vec<(u32, u32, u32)>,
        source: String,
        config: String,
        predecessor: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let seconds = |s: f64| Duration::try_from_secs_f64(s).unwrap_or(Duration::ZERO);
        let client = ClientConfig {
            metas,
            token,
            cluster_id,
            op_timeout: seconds(op_timeout_s),
            transport: transport::transport(py, transport, rdma, shared_memory)?,
            access_times: !noatime,
            description: format!("mount {}", mountpoint.display()),
            ..ClientConfig::default()
        };
        let options = MountOptions {
            allow_other,
            default_permissions,
            read_only,
            suid,
            dev,
            threads,
            max_memory_bytes,
            readahead_bytes,
            local_locks,
            exec,
            cache: parse_cache(cache)?,
            subdir,
            ids: IdMaps { users: id_map(uid, uidmap), groups: id_map(gid, gidmap) },
            fsname: source,
            config,
            attr_timeout: seconds(attr_timeout_s),
            entry_timeout: seconds(entry_timeout_s),
            ..MountOptions::default()
        };
        start(py, client, mountpoint, options, predecessor)
    }

    /// Stop serving and write everything, for a successor that is the client with this id (16 bytes). Returns what the
    /// `hand_over` of its `predecessor` has to: the state, and descriptors of the kernel's device and of announced memory, which are the
    /// caller's to close. Call `depart` or `take_back` afterwards: meanwhile whoever uses the mount waits. Raises BUSY when
    /// requests do not end; it is served on then.
    fn hand_over<'py>(&self, py: Python<'py>, successor: &[u8]) -> PyResult<(Bound<'py, PyBytes>, Vec<i32>)> {
        let successor = client_id(successor)?;
        let handed = py.detach(|| self.handle.hand_over(successor)).map_err(|e| to_python(py, &e))?;
        let descriptors = handed.descriptors.into_iter().map(IntoRawFd::into_raw_fd).collect();
        Ok((PyBytes::new(py, &handed.state), descriptors))
    }

    /// The successor failed: serve again.
    fn take_back(&self, py: Python<'_>, successor: &[u8]) -> PyResult<()> {
        let successor = client_id(successor)?;
        py.detach(|| self.handle.take_back(successor));
        Ok(())
    }

    /// The successor has the mount: `wait` returns some seconds later, and it stays mounted.
    fn depart(&self) {
        self.handle.depart();
    }

    /// Wait until the mount has ended; with `timeout_s`, that many seconds at most. Returns whether it has.
    #[pyo3(signature = (timeout_s=None))]
    fn wait(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<bool> {
        let result = py.detach(|| {
            let ended = match timeout_s {
                None => Some(self.handle.wait()),
                Some(s) => self.handle.wait_for(Duration::try_from_secs_f64(s).unwrap_or(Duration::ZERO)),
            };
            if ended.is_some() {
                self.leave();
            }
            ended
        });
        result.transpose().map(|ended| ended.is_some()).map_err(|e| to_python(py, &e))
    }

    /// What the mount did since it began, as the text of a JSON object (docs/operations.md explains it).
    fn stats(&self) -> String {
        self.handle.stats()
    }

    /// Write everything, unmount and wait for the end. Raises BUSY when files are still open half a minute later.
    fn unmount(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            let result = self.handle.unmount();
            self.leave();
            result
        })
        .map_err(|e| to_python(py, &e))
    }
}

/// Add the class to the extension module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Mount>()
}
