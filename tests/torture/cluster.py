"""A local cluster in network namespaces or on one host, on faulty disks, whose services see a boot id of our making."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from fs3.core.errors import Fs3Error
from fs3.fuse.table import mounted_at
from fs3.testing.cluster import ClusterSpec, LocalCluster, Service
from fs3.testing.process import ProcessRef
from tests.torture.disks import FaultDisk, Losses
from tests.torture.network import Host, Network

CLIENT = "client"
MOUNT_S = 60.0
RUNNING_S = 120.0
MOUNT_OPERATION_S = 60

# The store learns from the machine's boot id whether unsynced writes may be lost. A simulated power cut gives the
# services another one by binding a file over it, in a mount namespace of their own.
_WITH_BOOT_ID = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'


class TortureCluster(LocalCluster):
    """The cluster, its network and its disks. Use `build`, and `destroy` whatever happens."""

    network: Host
    disks: dict[str, FaultDisk]

    @classmethod
    def build(cls, directory: Path, spec: ClusterSpec, seed: int, *, one_host: bool) -> TortureCluster:
        """Make network and disks and start the cluster; nothing is left when that fails."""
        cluster = cls.create(directory, spec)
        assert isinstance(cluster, cls)
        members = [*(s.name for s in cluster.services()), CLIENT]
        cluster.network = Host(members) if one_host else Network(members)
        backing = cluster.directory / "backing"
        cluster.disks = {
            s.name: FaultDisk(s.directory / "disk-1", backing / s.name)
            for s in cluster.services()
            if s.kind == "storage"
        }
        cluster.disks["kv"] = FaultDisk(cluster.directory / "kv", backing / "kv")
        try:
            cluster.network.create()
            for disk in cluster.disks.values():
                disk.start(seed)
            cluster.new_boot_id()
            cluster.up()
        except BaseException:
            cluster.destroy()
            raise
        return cluster

    def destroy(self) -> None:
        """End every process, mount and namespace of it. Files stay."""
        self.unmount()
        with contextlib.suppress(Exception):
            self.down()
        for service in self.services():
            if process := service.process():
                process.kill()
        for disk in self.disks.values():
            disk.stop()
        self.network.destroy()

    # ---- where services run

    @property
    def mgmtd_addresses(self) -> list[str]:
        """host:port of every cluster manager."""
        pairs = zip(self.names_of("mgmtd"), self.mgmtd_ports, strict=True)
        return [f"{self.network.address(name)}:{port}" for name, port in pairs]

    @property
    def url(self) -> str:
        """What clients connect to."""
        pairs = zip(self.names_of("meta"), self.meta_ports, strict=True)
        return "fs3://" + ",".join(f"{self.network.address(name)}:{port}" for name, port in pairs) + "/"

    def _config(self, service: Service) -> dict[str, object]:
        return {**super()._config(service), "host": self.network.address(service.name)}

    def _argv(self, service: Service) -> list[str]:
        boot = ["unshare", "--mount", "--propagation", "slave", "--", "sh", "-c", _WITH_BOOT_ID, str(self._boot_file)]
        return [*self.network.inside(service.name), *boot, *super()._argv(service)]

    @property
    def _boot_file(self) -> Path:
        return self.directory / "boot_id"

    def new_boot_id(self) -> None:
        """What starts from now on sees a machine that has been restarted."""
        self._boot_file.write_text(f"{uuid.uuid4()}\n")

    def names_of(self, kind: str) -> list[str]:
        """Names of the services of a kind."""
        return [s.name for s in self.services() if s.kind == kind]

    @property
    def storage_names(self) -> list[str]:
        """Names of the storage services."""
        return self.names_of("storage")

    # ---- what happens to it

    def kill_many(self, names: list[str]) -> list[str]:
        """kill -9 of those of `names` that run, all at once; returns them."""
        running = [(name, p) for name in names if (p := self.service(name).process())]
        for _, process in running:
            process.signal(signal.SIGKILL)
        for _, process in running:
            process.wait(timeout_s=30)
        return [name for name, _ in running]

    def signal_many(self, names: list[str], number: signal.Signals) -> None:
        """Send a signal to those of `names` that run."""
        for name in names:
            if process := self.service(name).process():
                process.signal(number)

    def spawn_missing(self, names: list[str]) -> None:
        """Start those of `names` that do not run, without waiting for them."""
        for service in self.services():
            if service.name in names and service.process() is None:
                self._spawn(service)

    def ensure_running(self) -> None:
        """Start what does not run and wait until all are ready; one that gave up for lack of another is tried again."""
        deadline = time.monotonic() + RUNNING_S
        for service in self.services():
            while service.ready() is None:
                self.spawn_missing([service.name])
                try:
                    self._wait_ready(service)
                except Fs3Error:
                    if time.monotonic() > deadline:
                        raise

    def power_cut(self, seed: int) -> dict[str, Losses]:
        """Every service ends at once and every disk loses what was not synced. Nothing is started again."""
        self.kill_many([s.name for s in self.services()])
        self.new_boot_id()
        return {name: disk.power_cycle(seed * 16 + i) for i, (name, disk) in enumerate(sorted(self.disks.items()))}

    # ---- the mount

    @property
    def mountpoint(self) -> Path:
        """Where clients find the mount."""
        return self.directory / "mnt"

    @property
    def _mount_pid(self) -> Path:
        return self.directory / "mount.pid"

    def mount(self) -> None:
        """Mount the cluster, the daemon in the clients' network. Raises RuntimeError."""
        self.mountpoint.mkdir(exist_ok=True)
        argv = [*self.network.inside(CLIENT), sys.executable, "-m", "fs3", "mount", str(self.mountpoint)]
        argv += ["--url", self.url, "--token-file", str(self.token_file), "-o", f"op_timeout_s={MOUNT_OPERATION_S}"]
        argv += ["--pid-file", str(self._mount_pid), "--log-file", str(self.directory / "mount.log")]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=MOUNT_S, check=False)
        if done.returncode:
            raise RuntimeError(f"the mount failed: {done.stderr.strip()}")

    def mount_daemon(self) -> ProcessRef | None:
        """The process behind the mount."""
        return ProcessRef.load(self._mount_pid)

    def unmount(self) -> None:
        """kill -9 of the mount daemon; the dead mount is cleared away."""
        if daemon := self.mount_daemon():
            daemon.signal(signal.SIGCONT)
            daemon.kill()
        while mounted_at(str(self.mountpoint)) is not None:
            subprocess.run(["umount", "-l", str(self.mountpoint)], check=True, capture_output=True)
