//! The disks of a node.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fs3_core::{Code, Error, Result};
use fs3_io::{Disk, RealDisk};
use fs3_proto::v1::space_response::Disk as Space;

use crate::engine::DiskConfig;

/// Where a node's targets keep their files.
pub trait TargetDisks: Send + Sync {
    /// The files of a target, made if it has none; whether they were made just now. Blocking.
    ///
    /// # Errors
    /// `NotFound` when this node has no such disk, or why it cannot be used.
    fn open_target(&self, disk_uuid: &[u8], target_id: u64) -> Result<(Arc<dyn Disk>, bool)>;

    /// Capacity and free bytes of each disk that can be asked.
    fn space(&self) -> Vec<Space>;
}

/// Directories of the machine's file systems.
pub(crate) struct Disks {
    disks: Vec<(DiskConfig, Result<()>)>,
}

impl Disks {
    /// Look at each disk's label. A disk of another cluster, or another disk than expected, is not used.
    pub fn new(disks: Vec<DiskConfig>, cluster_id: &str) -> Self {
        let check = |d: DiskConfig| {
            let checked = check_label(&d, cluster_id);
            if let Err(error) = &checked {
                tracing::error!("a disk is not used: {error}");
            }
            (d, checked)
        };
        Self { disks: disks.into_iter().map(check).collect() }
    }

    /// Where the disk is mounted.
    fn path(&self, uuid: &[u8]) -> Result<PathBuf> {
        let found = self.disks.iter().find(|(d, _)| d.uuid[..] == *uuid);
        let (disk, checked) =
            found.ok_or_else(|| Error::new(Code::NotFound, "this node was started without the target's disk"))?;
        checked.clone()?;
        Ok(disk.path.clone())
    }
}

impl TargetDisks for Disks {
    fn open_target(&self, disk_uuid: &[u8], target_id: u64) -> Result<(Arc<dyn Disk>, bool)> {
        let dir = self.path(disk_uuid)?.join("targets").join(target_id.to_string());
        let created = !dir.exists();
        let cannot = |e| Error::new(Code::DiskError, format!("cannot open the target in {}: {e}", dir.display()));
        Ok((Arc::new(RealDisk::new(&dir).map_err(cannot)?), created))
    }

    fn space(&self) -> Vec<Space> {
        let space = |(d, checked): &(DiskConfig, Result<()>)| {
            let (capacity_bytes, free_bytes) = statvfs(&d.path)?;
            let error = checked.as_ref().err().map(ToString::to_string).unwrap_or_default();
            let path = d.path.display().to_string();
            Some(Space { uuid: d.uuid.to_vec().into(), capacity_bytes, free_bytes, path, error, ..Space::default() })
        };
        self.disks.iter().filter_map(space).collect()
    }
}

fn check_label(disk: &DiskConfig, cluster_id: &str) -> Result<()> {
    let path = disk.path.join("disk.json");
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && disk.path.is_dir() => return Ok(()),
        Err(e) => return Err(Error::new(Code::DiskError, format!("cannot read {}: {e}", path.display()))),
    };
    let label: serde_json::Value = serde_json::from_slice(&text)
        .map_err(|e| Error::new(Code::DiskError, format!("{} is damaged: {e}", path.display())))?;
    let text_of = |key: &str| label.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
    let cluster = text_of("cluster_id");
    if !cluster.is_empty() && !cluster_id.is_empty() && cluster != cluster_id {
        let message = format!("{} belongs to cluster {cluster:?}, not {cluster_id:?}", disk.path.display());
        return Err(Error::new(Code::WrongCluster, message));
    }
    let uuid: String = disk.uuid.iter().map(|b| format!("{b:02x}")).collect();
    let labelled = text_of("disk_uuid").replace('-', "");
    if !labelled.is_empty() && labelled != uuid {
        let message = format!("{} holds disk {labelled}, not {uuid}", disk.path.display());
        return Err(Error::new(Code::InvalidArgument, message));
    }
    Ok(())
}

fn statvfs(path: &Path) -> Option<(u64, u64)> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path is a C string and `stat` a valid out pointer.
    if unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: filled in by the successful call.
    let stat = unsafe { stat.assume_init() };
    Some((stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize))
}
