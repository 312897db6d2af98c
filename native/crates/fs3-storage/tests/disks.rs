//! Disks that fail.

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use common::wait_until;
use fs3_core::{Result, monotonic_ns};
use fs3_io::Disk;
use fs3_io::fault::{Fault, FaultDisk};
use fs3_proto::v1::engine_status::TargetStatus;
use fs3_proto::v1::space_response::Disk as Space;
use fs3_proto::v1::*;
use fs3_storage::{EngineConfig, Healing, StorageEngine, TargetDisks};
use prost::Message;

/// Every target has files of its own that can be made to fail.
#[derive(Clone, Default)]
struct FaultDisks(Arc<Mutex<BTreeMap<u64, FaultDisk>>>);

impl TargetDisks for FaultDisks {
    fn open_target(&self, _disk_uuid: &[u8], target_id: u64) -> Result<(Arc<dyn Disk>, bool)> {
        let mut disks = self.0.lock().unwrap();
        let created = !disks.contains_key(&target_id);
        Ok((Arc::new(disks.entry(target_id).or_insert_with(|| FaultDisk::new(target_id)).clone()), created))
    }

    fn space(&self) -> Vec<Space> {
        [1, 2]
            .map(|disk| Space { uuid: vec![disk; 16].into(), path: format!("/disk{disk}"), ..Space::default() })
            .into()
    }
}

const NODE: u32 = 1;

fn routing() -> Routing {
    let place = |target_id: u64, disk: u8| Target {
        target_id,
        node_id: NODE,
        disk_uuid: vec![disk; 16].into(),
        chain_id: target_id as u32,
        ..Target::default()
    };
    let targets = vec![place(1, 1), place(2, 1), place(3, 2)];
    let chain = |target: &Target| Chain {
        chain_id: target.chain_id,
        version: 1,
        targets: vec![ChainTarget { target_id: target.target_id, state: PublicState::Serving as i32 }],
    };
    Routing { version: 1, chains: targets.iter().map(chain).collect(), targets, lease_ms: 6000, ..Routing::default() }
}

#[test]
fn a_failed_sync_takes_all_targets_of_the_disk_offline_and_says_why() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let disks = FaultDisks::default();
    let config = EngineConfig {
        node_id: NODE,
        node_uuid: [1; 16],
        cluster_id: "test-cluster".into(),
        token: "secret".into(),
        host: "127.0.0.1".into(),
        frame_port: 0,
        disks: Vec::new(),
        read_cache_bytes: 1 << 20,
        kv_memory_bytes: 16 << 20,
        durable_writes: false,
        healing: Healing::default(),
        transport: fs3_net::Transport::tcp(),
    };
    let engine = runtime.block_on(StorageEngine::start_here(config, Box::new(disks.clone()))).unwrap();
    engine.renew_lease(monotonic_ns() + 3_600_000_000_000);
    engine.apply_routing(&routing().encode_to_vec()).unwrap();
    let status =
        |target: u64| -> Option<TargetStatus> { engine.status().targets.into_iter().find(|t| t.target_id == target) };
    let is = |target, state: LocalState| status(target).is_some_and(|t| t.local_state == state as u32);
    wait_until("the targets", || (1..=3).all(|target| is(target, LocalState::Uptodate)));

    disks.0.lock().unwrap()[&2].inject(Fault::Sync, 0);
    let store = engine.store(2).unwrap();
    let refused = runtime.block_on(async {
        store.prepare(update()).await.unwrap();
        store.sync().await
    });
    assert!(refused.is_err());
    wait_until("the disk's targets to go offline", || [1, 2].iter().all(|target| is(*target, LocalState::Offline)));
    for target in [1, 2] {
        let error = status(target).unwrap().error;
        assert!(error.contains("Input/output error"), "{error}");
    }
    assert!(is(3, LocalState::Uptodate), "the other disk is sound");
    let described = engine.status().disks;
    assert!(described[0].error.contains("Input/output error") && described[1].error.is_empty(), "{described:?}");
    // It is not tried again: the kernel may have dropped what it could not write.
    assert!(runtime.block_on(store.sync()).is_err());
    let newer = Routing { version: 2, ..routing() };
    engine.apply_routing(&newer.encode_to_vec()).unwrap();
    assert!(is(1, LocalState::Offline) && is(2, LocalState::Offline));
}

fn update() -> fs3_io::Update {
    let data = vec![1; 4096];
    fs3_io::Update {
        id: common::chunk(0),
        chunk_bytes: common::CHUNK_BYTES,
        update_version: fs3_core::UpdateVersion(1),
        chain_version: fs3_core::ChainVersion(1),
        writer: None,
        change: fs3_io::Change::Write(fs3_core::CheckedBytes::new(0, fs3_core::Region::from_vec(data))),
    }
}
