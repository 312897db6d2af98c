//! Frozen records returned to Python.

use pyo3::prelude::*;

/// Where the chunks of a file live; see `Layout` in meta.proto.
#[pyclass(frozen, eq, hash, get_all, module = "fs3._native")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layout {
    table_id: u32,
    table_version: u32,
    chunk_bytes: u32,
    stripe: u32,
    first: u32,
    stripe_first: u32,
    stripe_max: u32,
}

/// Attributes of an inode. `type` is a number of `fs3.v1.FileType`; times are nanoseconds since 1970.
#[pyclass(frozen, eq, hash, module = "fs3._native")]
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Attr {
    #[pyo3(get)]
    inode: u64,
    #[pyo3(get, name = "type")]
    kind: i32,
    #[pyo3(get)]
    mode: u32,
    #[pyo3(get)]
    uid: u32,
    #[pyo3(get)]
    gid: u32,
    #[pyo3(get)]
    nlink: u32,
    #[pyo3(get)]
    length: u64,
    #[pyo3(get)]
    atime_ns: i64,
    #[pyo3(get)]
    mtime_ns: i64,
    #[pyo3(get)]
    ctime_ns: i64,
    layout: Option<Layout>,
    symlink_target: Vec<u8>,
    #[pyo3(get)]
    rdev: u64,
    #[pyo3(get)]
    truncate_version: u64,
    #[pyo3(get)]
    parent: u64,
    /// Which extended attributes it has: bits of `fs3.v1.XattrBit`.
    #[pyo3(get)]
    xattrs: u32,
}

#[pymethods]
impl Attr {
    /// Files: where the chunks are; directories: what new files inherit.
    #[getter]
    fn layout(&self, py: Python<'_>) -> PyResult<Option<Py<Layout>>> {
        self.layout.map(|layout| Py::new(py, layout)).transpose()
    }

    /// Symlinks: where it points.
    #[getter]
    fn symlink_target(&self) -> &[u8] {
        &self.symlink_target
    }

    fn __repr__(&self) -> String {
        format!(
            "Attr(inode={}, type={}, mode=0o{:o}, uid={}, gid={}, nlink={}, length={}, mtime_ns={})",
            self.inode, self.kind, self.mode, self.uid, self.gid, self.nlink, self.length, self.mtime_ns
        )
    }
}

impl From<fs3_client::Layout> for Layout {
    fn from(layout: fs3_client::Layout) -> Self {
        Self {
            table_id: layout.table_id,
            table_version: layout.table_version,
            chunk_bytes: layout.chunk_bytes,
            stripe: layout.stripe,
            first: layout.first,
            stripe_first: layout.stripe_first,
            stripe_max: layout.stripe_max,
        }
    }
}

impl From<fs3_client::Attr> for Attr {
    fn from(attr: fs3_client::Attr) -> Self {
        Self {
            inode: attr.inode,
            kind: attr.r#type,
            mode: attr.mode,
            uid: attr.uid,
            gid: attr.gid,
            nlink: attr.nlink,
            length: attr.length,
            atime_ns: attr.atime_ns,
            mtime_ns: attr.mtime_ns,
            ctime_ns: attr.ctime_ns,
            layout: attr.layout.map(Layout::from),
            symlink_target: attr.symlink_target.to_vec(),
            rdev: attr.rdev,
            truncate_version: attr.truncate_version,
            parent: attr.parent,
            xattrs: attr.xattrs,
        }
    }
}

/// One name of a directory.
#[pyclass(frozen, module = "fs3._native")]
pub struct DirEntry {
    name: Vec<u8>,
    #[pyo3(get)]
    inode: u64,
    #[pyo3(get, name = "type")]
    kind: i32,
    attr: Option<Attr>,
}

#[pymethods]
impl DirEntry {
    /// The name.
    #[getter]
    fn name(&self) -> &[u8] {
        &self.name
    }

    /// Attributes, if they were asked for.
    #[getter]
    fn attr(&self, py: Python<'_>) -> PyResult<Option<Py<Attr>>> {
        self.attr.clone().map(|attr| Py::new(py, attr)).transpose()
    }

    fn __repr__(&self) -> String {
        format!("DirEntry(name={:?}, inode={}, type={})", String::from_utf8_lossy(&self.name), self.inode, self.kind)
    }
}

impl From<fs3_client::DirEntry> for DirEntry {
    fn from(entry: fs3_client::DirEntry) -> Self {
        Self { name: entry.name.to_vec(), inode: entry.inode, kind: entry.r#type, attr: entry.attr.map(Attr::from) }
    }
}

/// Capacity and use of the cluster, as a user counts (raw capacity / replicas), or of what quotas leave of it.
#[pyclass(frozen, get_all, module = "fs3._native")]
pub struct Statfs {
    capacity_bytes: u64,
    free_bytes: u64,
    inodes: u64,
    chunk_bytes: u32,
    name_bytes_max: u32,
    free_inodes: Option<u64>,
}

impl From<fs3_client::Statfs> for Statfs {
    fn from(statfs: fs3_client::Statfs) -> Self {
        Self {
            capacity_bytes: statfs.capacity_bytes,
            free_bytes: statfs.free_bytes,
            inodes: statfs.inodes,
            chunk_bytes: statfs.chunk_bytes,
            name_bytes_max: statfs.name_bytes_max,
            free_inodes: statfs.free_inodes,
        }
    }
}

/// Metadata of one chunk on one target.
#[pyclass(frozen, eq, hash, module = "fs3._native")]
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Chunk {
    chunk_id: Vec<u8>,
    #[pyo3(get)]
    committed_version: u64,
    #[pyo3(get)]
    pending_version: u64,
    #[pyo3(get)]
    length: u32,
    #[pyo3(get)]
    chunk_crc32c: u32,
}

#[pymethods]
impl Chunk {
    /// 16 bytes; see storage.proto.
    #[getter]
    fn chunk_id(&self) -> &[u8] {
        &self.chunk_id
    }

    fn __repr__(&self) -> String {
        let id: String = self.chunk_id.iter().map(|byte| format!("{byte:02x}")).collect();
        format!(
            "Chunk(chunk_id={id}, committed_version={}, length={}, chunk_crc32c={:#010x})",
            self.committed_version, self.length, self.chunk_crc32c
        )
    }
}

/// What one target of a chain holds.
#[pyclass(frozen, module = "fs3._native")]
pub struct Replica {
    #[pyo3(get)]
    chain_id: u32,
    #[pyo3(get)]
    target_id: u64,
    #[pyo3(get)]
    state: i32,
    #[pyo3(get)]
    chunks: Vec<Py<Chunk>>,
}

impl Replica {
    pub fn new(py: Python<'_>, listing: fs3_client::ReplicaListing) -> PyResult<Self> {
        let chunk = |chunk: fs3_client::ChunkInfo| {
            let record = Chunk {
                chunk_id: chunk.chunk_id.to_vec(),
                committed_version: chunk.committed_version,
                pending_version: chunk.pending_version,
                length: chunk.length,
                chunk_crc32c: chunk.chunk_crc32c,
            };
            Py::new(py, record)
        };
        Ok(Self {
            chain_id: listing.chain_id,
            target_id: listing.target_id,
            state: listing.state,
            chunks: listing.chunks.into_iter().map(chunk).collect::<PyResult<_>>()?,
        })
    }
}
