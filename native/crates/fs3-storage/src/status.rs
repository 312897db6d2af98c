//! What a node says of itself.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fs3_net::Way;
use fs3_proto::v1::engine_status::{Connection, RdmaDevice, ResyncStatus, TargetStatus};
use fs3_proto::v1::space_response::Disk;
use fs3_proto::v1::{EngineStatus, LocalState};

use crate::core::{Core, Slot};
use crate::resync::Progress;
use crate::target::Target;

impl Core {
    /// Targets, disks and counters as they are now.
    pub fn status(&self) -> EngineStatus {
        let (payload_bytes, _) = self.pool.usage();
        let mut counters: Vec<(&str, u64)> =
            self.counters.all().into_iter().map(|(name, n)| (name, n.load(Ordering::Relaxed))).collect();
        counters.push(("payload_bytes_held", payload_bytes as u64));
        counters.extend(self.peers.shared_memory_counters());
        EngineStatus {
            targets: self.slots().into_iter().map(|(id, slot)| slot_status(id, slot)).collect(),
            disks: self.disks.space().into_iter().map(|disk| self.disk_status(disk)).collect(),
            routing_version: self.routing().version,
            counters: counters
                .into_iter()
                .map(|(name, n)| (name.to_owned(), n))
                .chain(self.kv.counters())
                .chain(self.kv_chunk_counters())
                .collect(),
            connections: self.connection_states(),
            rdma_devices: self.peers.rdma_counters().into_iter().map(rdma_device).collect(),
        }
    }

    fn connection_states(&self) -> Vec<Connection> {
        let state = |peer, outgoing, way: Way| Connection {
            peer,
            outgoing,
            shared_memory: way == Way::SharedMemory,
            rdma_device: if let Way::Rdma(device) = way { device } else { String::new() },
        };
        let incoming = self.connections.get().map_or_else(Vec::new, |c| c.list());
        let incoming = incoming.into_iter().map(|(peer, way)| {
            let role = peer.role.as_str_name().trim_start_matches("ROLE_").to_lowercase();
            state(format!("{role} {:032x}", u128::from_be_bytes(peer.peer_id)), false, way)
        });
        let outgoing = self.peers.list().into_iter().map(|(addr, way)| state(addr, true, way));
        incoming.chain(outgoing).collect()
    }

    fn disk_status(&self, disk: Disk) -> Disk {
        let known = self.disk_state(&disk.uuid);
        let error = known.error().map_or(disk.error, |error| error.to_string());
        Disk { error, warning: known.warning().unwrap_or_default(), ..disk }
    }
}

fn rdma_device((name, counters): (String, Vec<(&'static str, u64)>)) -> RdmaDevice {
    RdmaDevice { name, counters: counters.into_iter().map(|(counter, n)| (counter.to_owned(), n)).collect() }
}

fn slot_status(target_id: u64, slot: Slot) -> TargetStatus {
    let closed = |chain_id, state: LocalState, error| TargetStatus {
        target_id,
        chain_id,
        local_state: state as u32,
        error,
        ..TargetStatus::default()
    };
    match slot {
        // Nothing is known yet, so nothing is said: the manager keeps what it assumes of the target.
        Slot::Opening { chain_id } => closed(chain_id, LocalState::Unspecified, "opening".into()),
        Slot::Failed { chain_id, error } => closed(chain_id, LocalState::Offline, error),
        Slot::Open(target) => target_status(&target),
    }
}

fn target_status(target: &Arc<Target>) -> TargetStatus {
    let (state, error) = target.local_state();
    let life = target.life.lock();
    let resyncs: Vec<ResyncStatus> = life.resyncs.iter().map(|(to, progress)| resync_status(*to, progress)).collect();
    drop(life);
    let mut status = TargetStatus {
        target_id: target.id,
        chain_id: target.chain_id,
        local_state: state as u32,
        chain_version: target.view().chain_version,
        used_bytes: target.store.used_bytes(),
        chunks: target.store.chunks(),
        resync_done_chunks: resyncs.iter().map(|r| r.done_chunks).sum(),
        resync_total_chunks: resyncs.iter().map(|r| r.total_chunks).sum(),
        resyncs,
        error: error.unwrap_or_default(),
        ..TargetStatus::default()
    };
    target.upkeep.describe(&mut status, |id| target.store.chunk(id).is_some_and(|meta| meta.rotten));
    status
}

fn resync_status(to_target_id: u64, progress: &Progress) -> ResyncStatus {
    let seconds = progress.began.elapsed().as_secs_f64().max(0.001);
    ResyncStatus {
        to_target_id,
        done_chunks: progress.done_chunks,
        total_chunks: progress.total_chunks,
        done_bytes: progress.done_bytes,
        total_bytes: progress.total_bytes,
        sent_bytes: progress.sent_bytes,
        bytes_per_s: (progress.sent_bytes as f64 / seconds) as u64,
        stuck_chunks: progress.stuck_chunks,
    }
}
