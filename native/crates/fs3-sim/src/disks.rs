//! The disks of a simulated node. They outlive its processes.

use std::collections::BTreeMap;
use std::sync::Arc;

use fs3_core::Result;
use fs3_io::Disk;
use fs3_io::fault::FaultDisk;
use fs3_proto::v1::space_response::Disk as Space;
use fs3_storage::TargetDisks;
use parking_lot::Mutex;

/// Capacity that is told of every disk.
const CAPACITY_BYTES: u64 = 1 << 40;

/// Files of each target of one node, by disk uuid and target id.
pub(crate) struct NodeDisks {
    seed: u64,
    disks: Mutex<BTreeMap<(Vec<u8>, u64), FaultDisk>>,
}

impl NodeDisks {
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self { seed, disks: Mutex::default() })
    }

    pub fn all(&self) -> Vec<FaultDisk> {
        self.disks.lock().values().cloned().collect()
    }
}

/// The disks as the engine sees them.
pub(crate) struct Mounted(pub Arc<NodeDisks>);

impl TargetDisks for Mounted {
    fn open_target(&self, disk_uuid: &[u8], target_id: u64) -> Result<(Arc<dyn Disk>, bool)> {
        let mut disks = self.0.disks.lock();
        let key = (disk_uuid.to_vec(), target_id);
        let created = !disks.contains_key(&key);
        let disk = disks.entry(key).or_insert_with(|| FaultDisk::new(self.0.seed ^ target_id << 8));
        Ok((Arc::new(disk.clone()), created))
    }

    fn space(&self) -> Vec<Space> {
        let mut uuids: Vec<Vec<u8>> = self.0.disks.lock().keys().map(|(uuid, _)| uuid.clone()).collect();
        uuids.dedup();
        let space = |uuid: Vec<u8>| Space {
            uuid: uuid.into(),
            capacity_bytes: CAPACITY_BYTES,
            free_bytes: CAPACITY_BYTES,
            ..Space::default()
        };
        uuids.into_iter().map(space).collect()
    }
}
