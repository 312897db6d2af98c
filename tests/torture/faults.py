"""The faults of a campaign: each is drawn from a seed, begins, holds for a while, and heals."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from tests.torture.cluster import TortureCluster
from tests.torture.network import Network

KILL_S = (0.0, 4.0)
# A stopped or unreachable service is left alone from less than half the lease to twice the lease.
SILENT_LEASES = (0.3, 2.0)
SLOW_MS = 10
ROTTEN_BLOCKS = 30
FULL_BYTES_MAX = 4 << 20


class Scene(Protocol):
    """What a fault acts upon."""

    cluster: TortureCluster
    rng: random.Random

    def disturbed(self, storage: list[str]) -> None:
        """These storage services are about to be disturbed; several at once may take back what was only read."""

    def kill_worker(self) -> None:
        """kill -9 of a client process; it starts again."""

    def power_cut(self) -> None:
        """Cut the power of all services and disks."""


@dataclass
class Fault:
    """One fault. `heal` is called once, after `hold_s` seconds."""

    kind: str
    begin: Callable[[], object]
    heal: Callable[[], object]
    hold_s: float
    storage: list[str] = field(default_factory=list)


def _some(rng: random.Random, names: list[str]) -> list[str]:
    """A non-empty subset, often a single one, sometimes all."""
    count = rng.choice([1, 1, 1, 2, len(names)])
    return sorted(rng.sample(names, min(count, len(names))))


def _silent_s(scene: Scene) -> float:
    return scene.rng.uniform(*SILENT_LEASES) * scene.cluster.spec.lease_ms / 1000


def _nothing() -> None:
    return None


def kill_storage(scene: Scene) -> Fault:
    """kill -9 of one, some or all storage services."""
    names = _some(scene.rng, scene.cluster.storage_names)
    return Fault(
        "kill storage",
        lambda: scene.cluster.kill_many(names),
        lambda: scene.cluster.spawn_missing(names),
        scene.rng.uniform(*KILL_S),
        names,
    )


def _kill_service(scene: Scene, name: str, kind: str) -> Fault:
    return Fault(
        f"kill {kind}",
        lambda: scene.cluster.kill_many([name]),
        lambda: scene.cluster.spawn_missing([name]),
        scene.rng.uniform(*KILL_S),
    )


def kill_meta(scene: Scene) -> Fault:
    """kill -9 of a metadata service."""
    return _kill_service(scene, scene.rng.choice(scene.cluster.names_of("meta")), "meta")


def kill_mgmtd(scene: Scene) -> Fault:
    """kill -9 of the cluster manager."""
    return _kill_service(scene, "mgmtd", "mgmtd")


def kill_client(scene: Scene) -> Fault:
    """kill -9 of a writer, a reader or the worker of names."""
    return Fault("kill client", scene.kill_worker, _nothing, 0.0)


def kill_mount(scene: Scene) -> Fault:
    """kill -9 of the mount daemon; it is mounted again."""
    return Fault("kill mount", scene.cluster.unmount, _nothing, 0.0)


def stop(scene: Scene) -> Fault:
    """SIGSTOP of some services for a while, past the lease or not, then SIGCONT."""
    cluster = scene.cluster
    names = (
        _some(scene.rng, cluster.storage_names) if scene.rng.random() < 0.7 else [scene.rng.choice(["mgmtd", "meta-1"])]
    )
    return Fault(
        "stop",
        lambda: cluster.signal_many(names, signal.SIGSTOP),
        lambda: cluster.signal_many(names, signal.SIGCONT),
        _silent_s(scene),
        [n for n in names if n in cluster.storage_names],
    )


def _network(scene: Scene, kind: str, pairs: list[tuple[str, str]], percent: int) -> Fault:
    network = scene.cluster.network
    assert isinstance(network, Network), "members of one host are not parted"
    touched = {name for pair in pairs for name in pair}
    return Fault(
        kind,
        lambda: [network.drop(a, b, percent) for a, b in pairs],
        lambda: [network.restore(a, b) for a, b in pairs],
        _silent_s(scene),
        [n for n in scene.cluster.storage_names if n in touched],
    )


def partition(scene: Scene) -> Fault:
    """The network falls into two parts."""
    members = scene.cluster.network.members
    part = set(scene.rng.sample(members, scene.rng.randrange(1, len(members))))
    pairs = [(a, b) for a in members for b in members if (a in part) != (b in part)]
    return _network(scene, "partition", pairs, 100)


def one_way(scene: Scene) -> Fault:
    """Some members' packets no longer reach some others; the other direction works."""
    members = scene.cluster.network.members
    part = set(scene.rng.sample(members, scene.rng.randrange(1, len(members))))
    pairs = [(a, b) for a in members for b in members if a in part and b not in part]
    return _network(scene, "one-way partition", pairs, 100)


def packet_loss(scene: Scene) -> Fault:
    """A share of all packets is lost, and with it comes delay."""
    members = scene.cluster.network.members
    pairs = [(a, b) for a in members for b in members if a != b]
    return _network(scene, "packet loss", pairs, scene.rng.choice([2, 5, 15]))


def slow_disk(scene: Scene) -> Fault:
    """Every operation of one disk takes 10 ms longer."""
    disk = scene.cluster.disks[scene.rng.choice(sorted(scene.cluster.disks))]
    return Fault("slow disk", lambda: disk.set_faults(latency_ms=SLOW_MS), disk.set_faults, _silent_s(scene))


def full_disk(scene: Scene) -> Fault:
    """Some disks, the key-value store's perhaps, have hardly any space left."""
    disks = [scene.cluster.disks[name] for name in _some(scene.rng, sorted(scene.cluster.disks))]
    space = scene.rng.randrange(FULL_BYTES_MAX)
    return Fault(
        "full disk",
        lambda: [disk.set_faults(space_bytes=space) for disk in disks],
        lambda: [disk.set_faults() for disk in disks],
        _silent_s(scene),
    )


def power_cut(scene: Scene) -> Fault:
    """All machines lose power at once, with what their disks had not flushed."""
    return Fault("power cut", scene.power_cut, _nothing, 0.0, scene.cluster.storage_names)


# ---- damage to one replica: while it lasts, the other replicas are left alone


def _mended(scene: Scene, name: str) -> None:
    """The disk works again; its service is restarted, as an operator would."""
    scene.cluster.disks[name].set_faults()
    scene.cluster.kill_many([name])
    scene.cluster.spawn_missing([name])


def disk_errors(scene: Scene) -> Fault:
    """One storage service's disk fails reads, writes or syncs with EIO; a failed sync may drop what was not synced."""
    name = scene.rng.choice(scene.cluster.storage_names)
    chosen = scene.rng.choice(["read_eio", "write_eio", "sync_eio"])
    settings = {
        chosen: scene.rng.choice([0.02, 0.2, 1.0]),
        "sync_drops": scene.rng.random() < 0.5,
        "only": scene.rng.choice(["", "data", "meta"]),
    }
    return Fault(
        f"disk errors ({chosen.removesuffix('_eio')})",
        lambda: scene.cluster.disks[name].set_faults(**settings),
        lambda: _mended(scene, name),
        _silent_s(scene),
        [name],
    )


def store_errors(scene: Scene) -> Fault:
    """The key-value store's disk fails writes or syncs; its services give the store up until they are restarted."""
    chosen = scene.rng.choice(["write_eio", "sync_eio"])
    settings = {chosen: scene.rng.choice([0.02, 0.2, 1.0]), "sync_drops": scene.rng.random() < 0.5, "only": "data.mdb"}
    users = ["mgmtd", *scene.cluster.names_of("meta")]

    def mend() -> None:
        scene.cluster.disks["kv"].set_faults()
        scene.cluster.kill_many(users)
        scene.cluster.spawn_missing(users)

    return Fault(
        f"store errors ({chosen.removesuffix('_eio')})",
        lambda: scene.cluster.disks["kv"].set_faults(**settings),
        mend,
        _silent_s(scene),
    )


def flipped_bits(scene: Scene) -> Fault:
    """Blocks of one storage service's data files read back with a flipped bit."""
    name = scene.rng.choice(scene.cluster.storage_names)
    disk, seed = scene.cluster.disks[name], scene.rng.randrange(1 << 30)
    return Fault(
        "flipped bits",
        lambda: disk.order({"do": "rot", "count": ROTTEN_BLOCKS, "seed": seed, "only": "data"}),
        lambda: disk.order({"do": "heal_rot"}),
        2 * _silent_s(scene),
        [name],
    )


Maker = Callable[[Scene], Fault]

ORDINARY: list[Maker] = [
    kill_storage,
    kill_storage,
    kill_storage,
    kill_meta,
    kill_mgmtd,
    kill_client,
    kill_mount,
    stop,
    stop,
    partition,
    one_way,
    packet_loss,
    slow_disk,
    full_disk,
]
ON_ONE_HOST: list[Maker] = [maker for maker in ORDINARY if maker not in (partition, one_way, packet_loss)]
DAMAGE: list[Maker] = [disk_errors, disk_errors, flipped_bits, store_errors]
# What may come on top of damage: it takes no healthy replica away.
HARMLESS: list[Maker] = [kill_meta, kill_mgmtd, kill_client, kill_mount]
