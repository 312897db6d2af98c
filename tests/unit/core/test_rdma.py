"""`fs3 rdma check` on trees as sysfs shows them for the devices of a data centre."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from fs3.cli import rdma as command
from fs3.core.errors import Fs3Error
from fs3.core.rdma import CM_LIBRARY, LIBRARY, Gid, Port, Report, Verbs, choose_gid, inspect
from fs3.native import RegisteredMemory

LINK_LOCAL = "fe80:0000:0000:0000:0002:c9ff:fe00:0001"
IPV4 = "0000:0000:0000:0000:0000:ffff:0a09:0001"
GLOBAL = "2001:0db8:0000:0000:0000:0000:0000:0001"
EMPTY = "0000:0000:0000:0000:0000:0000:0000:0000"
GIB = 1 << 30


class Machine:
    """A root directory with RDMA devices, each right until something is changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: list[str] = []

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def add(
        self, name: str, gids: list[tuple[str, str]], link_layer: str = "Ethernet", node_type: str = "1: CA"
    ) -> str:
        """Add a device with one port; `gids` are (address, type). Return the path of the port."""
        uverbs = f"uverbs{len(self.names)}"
        self.names.append(name)
        device = f"sys/class/infiniband/{name}"
        port = f"{device}/ports/1"
        self.write(f"{device}/node_type", node_type)
        self.write(f"{device}/fw_ver", "28.39.1002")
        self.write(f"{device}/device/numa_node", 1)
        (self.root / "sys/bus/pci/drivers/mlx5_core").mkdir(parents=True, exist_ok=True)
        (self.root / device / "device/driver").symlink_to(self.root / "sys/bus/pci/drivers/mlx5_core")
        self.write(f"sys/class/infiniband_verbs/{uverbs}/ibdev", name)
        self.write(f"dev/infiniband/{uverbs}", "")
        self.write("sys/class/net/eth0/mtu", 9000)
        for file, text in {
            "state": "4: ACTIVE",
            "phys_state": "5: LinkUp",
            "link_layer": link_layer,
            "rate": "400 Gb/sec (4X NDR)",
            "lid": "0x1f" if link_layer == "InfiniBand" else "0x0",
            "counters/symbol_error": 0,
            "hw_counters/out_of_sequence": 0,
        }.items():
            self.write(f"{port}/{file}", text)
        for index, (address, kind) in enumerate(gids):
            self.write(f"{port}/gids/{index}", address)
            self.write(f"{port}/gid_attrs/types/{index}", kind)
            if link_layer == "Ethernet":
                self.write(f"{port}/gid_attrs/ndevs/{index}", "eth0")
        return port

    def roce(self) -> str:
        return self.add(
            "mlx5_0",
            [(LINK_LOCAL, "IB/RoCE v1"), (LINK_LOCAL, "RoCE v2"), (IPV4, "IB/RoCE v1"), (IPV4, "RoCE v2"), (EMPTY, "")],
        )

    def infiniband(self) -> str:
        return self.add("mlx5_0", [(LINK_LOCAL, "IB/RoCE v1")], link_layer="InfiniBand")

    def inspect(self, verbs: Verbs | None = None, locked_bytes: int = GIB) -> Report:
        opened = verbs or Verbs(LIBRARY, CM_LIBRARY, dict.fromkeys(self.names, 0))
        return inspect(self.root, verbs=lambda: opened, locked_bytes=locked_bytes)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def complaints(report: Report) -> list[str]:
    """What the only device, its port and the machine have to say."""
    places = [report, *report.devices, *(p for d in report.devices for p in d.ports)]
    return [f"{'fail' if p.fatal else 'warn'}: {p.what}: {p.advice}" for place in places for p in place.problems]


def only_port(report: Report) -> Port:
    return report.devices[0].ports[0]


def test_memory_of_a_gpu_needs_a_device_that_takes_it() -> None:
    if Path("/sys/class/infiniband").exists():
        pytest.skip("this machine may have RDMA devices")
    with open("/dev/zero", "rb") as no_dmabuf, pytest.raises(Fs3Error, match="cannot be registered for RDMA"):
        RegisteredMemory(bytearray(4096), dmabuf=no_dmabuf.fileno())
    with pytest.raises(ValueError, match="no descriptor"):
        RegisteredMemory(bytearray(4096), dmabuf=-1)


def test_a_machine_with_nothing_is_told_that_it_uses_tcp(machine: Machine) -> None:
    report = machine.inspect(Verbs(), locked_bytes=8 << 20)
    assert not report.usable
    assert len(complaints(report)) == 3
    assert "no RDMA device, nor are its RDMA modules loaded" in complaints(report)[0]
    assert "apt-get install libibverbs1 ibverbs-providers" in complaints(report)[1]
    assert "LimitMEMLOCK=infinity" in complaints(report)[2]


def test_roce_with_a_routable_address_has_nothing_to_complain_of(machine: Machine) -> None:
    machine.roce()
    report = machine.inspect()
    assert complaints(report) == []
    assert report.usable
    device = report.devices[0]
    assert (device.driver, device.numa_node, device.uverbs) == ("mlx5_core", 1, "/dev/infiniband/uverbs0")
    assert only_port(report).chosen_gid == Gid(3, "::ffff:10.9.0.1", "RoCE v2", "eth0")
    assert len(only_port(report).gids) == 4
    assert only_port(report).mtu_bytes == 4096


@pytest.mark.parametrize(("taken", "told"), [(True, "can be registered"), (False, "cannot be registered")])
def test_it_is_said_whether_memory_of_gpus_can_be_registered(machine: Machine, taken: bool, told: str) -> None:
    machine.roce()
    report = machine.inspect(Verbs(LIBRARY, CM_LIBRARY, {"mlx5_0": 0}, dmabufs={"mlx5_0": taken}))
    assert report.devices[0].takes_dmabufs is taken
    assert f"  GPU memory  {told} (dma-buf)" in list(command.lines(report))
    assert not any("GPU" in line for line in command.lines(machine.inspect()))


def test_infiniband_is_reached_by_its_lid(machine: Machine) -> None:
    machine.infiniband()
    report = machine.inspect(Verbs(LIBRARY, CM_LIBRARY, {"mlx5_0": 0}, mtu_bytes={("mlx5_0", 1): 2048}))
    assert complaints(report) == []
    port = only_port(report)
    assert (port.lid, port.mtu_bytes, port.rate) == (31, 2048, "400 Gb/sec (4X NDR)")
    assert port.chosen_gid == Gid(0, "fe80::2:c9ff:fe00:1", "InfiniBand", None)


def test_iwarp_needs_the_connection_manager(machine: Machine) -> None:
    machine.add("cxgb4_0", [("0007:4312:3456:0000:0000:0000:0000:0000", "IB/RoCE v1")], node_type="4: RNIC")
    report = machine.inspect(Verbs(LIBRARY, None, {"cxgb4_0": 0}))
    assert only_port(report).chosen_gid == Gid(0, "7:4312:3456::", "iWARP", "eth0")
    told = " ".join(complaints(report))
    assert f"cxgb4_0 speaks iWARP, and {CM_LIBRARY} cannot be loaded" in told
    assert "/dev/infiniband/rdma_cm is missing" in told
    assert not report.usable
    machine.write("dev/infiniband/rdma_cm", "")
    assert machine.inspect(Verbs(LIBRARY, CM_LIBRARY, {"cxgb4_0": 0})).usable


@pytest.mark.parametrize(
    ("gids", "index", "why"),
    [
        ([(GLOBAL, "RoCE v2"), (IPV4, "RoCE v2")], 1, "IPv4"),
        ([(IPV4, "IB/RoCE v1"), (GLOBAL, "RoCE v2")], 1, "IPv6"),
        ([(IPV4, "IB/RoCE v1"), (LINK_LOCAL, "RoCE v2")], 1, "link-local"),
        ([(LINK_LOCAL, "IB/RoCE v1")], 0, "there is no RoCE v2"),
        ([], None, "no GID"),
    ],
)
def test_the_gid_that_reaches_furthest_is_chosen(
    machine: Machine, gids: list[tuple[str, str]], index: int | None, why: str
) -> None:
    machine.add("mlx5_0", gids)
    report = machine.inspect()
    port = only_port(report)
    assert (port.chosen_gid.index if port.chosen_gid else None) == index
    assert why in port.chosen_because
    assert report.usable == (index is not None)


def test_of_equal_gids_the_first_is_chosen() -> None:
    first, second = (Gid(i, f"::ffff:10.0.0.{i}", "RoCE v2", "eth0") for i in (3, 5))
    assert choose_gid([second, first])[0] == first


def no_uverbs(machine: Machine, port: str) -> None:
    (machine.root / "sys/class/infiniband_verbs/uverbs0/ibdev").unlink()


def no_device_node(machine: Machine, port: str) -> None:
    (machine.root / "dev/infiniband/uverbs0").unlink()


def port_down(machine: Machine, port: str) -> None:
    machine.write(f"{port}/state", "1: DOWN")
    machine.write(f"{port}/phys_state", "3: Disabled")


@pytest.mark.parametrize(
    ("break_it", "what", "advice"),
    [
        (no_uverbs, "mlx5_0 is not offered to programs", "modprobe ib_uverbs"),
        (no_device_node, "/dev/infiniband/uverbs0 is missing", "--device /dev/infiniband/uverbs0"),
        (port_down, "port 1 is DOWN (Disabled)", "ip link set eth0 up"),
    ],
)
def test_what_makes_a_device_useless_is_named_with_its_remedy(
    machine: Machine, break_it: Callable[[Machine, str], None], what: str, advice: str
) -> None:
    break_it(machine, machine.roce())
    report = machine.inspect()
    assert not report.usable
    (complaint,) = complaints(report)
    assert complaint.startswith(f"fail: {what}")
    assert advice in complaint


@pytest.mark.parametrize(
    ("state", "physical", "lid", "advice"),
    [
        ("2: INIT", "5: LinkUp", "0x0", "opensm"),
        ("1: DOWN", "2: Polling", "0x0", "cable"),
        ("4: ACTIVE", "5: LinkUp", "0x0", "opensm"),
    ],
)
def test_an_infiniband_port_without_subnet_manager_is_told_from_one_without_cable(
    machine: Machine, state: str, physical: str, lid: str, advice: str
) -> None:
    port = machine.infiniband()
    for file, text in (("state", state), ("phys_state", physical), ("lid", lid)):
        machine.write(f"{port}/{file}", text)
    report = machine.inspect()
    assert not report.usable
    assert advice in complaints(report)[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_a_device_that_this_user_may_not_open_is_named(machine: Machine) -> None:
    machine.roce()
    (machine.root / "dev/infiniband/uverbs0").chmod(0)
    assert "may not be opened by this user" in complaints(machine.inspect())[0]


def test_a_missing_provider_is_told_from_a_device_that_does_not_open(machine: Machine) -> None:
    machine.roce()
    missing = machine.inspect(Verbs(LIBRARY))
    assert "no provider for mlx5_0: install the providers" in complaints(missing)[0]
    refused = machine.inspect(Verbs(LIBRARY, CM_LIBRARY, {"mlx5_0": errno.EPERM}))
    assert "cannot be opened: Operation not permitted" in complaints(refused)[0]
    assert not missing.usable
    assert not refused.usable


@pytest.mark.parametrize(("locked_bytes", "usable"), [(8 << 20, False), (256 << 20, True)])
def test_a_low_limit_of_locked_memory_fails_and_a_modest_one_warns(
    machine: Machine, locked_bytes: int, usable: bool
) -> None:
    machine.roce()
    report = machine.inspect(locked_bytes=locked_bytes)
    assert report.usable == usable
    assert f"may lock {locked_bytes >> 10} KiB" in complaints(report)[0]


def test_who_may_lock_everything_is_not_bothered_with_the_limit(machine: Machine) -> None:
    machine.roce()
    machine.write("proc/self/status", f"Name:\tfs3\nCapEff:\t{1 << 14:016x}")
    report = machine.inspect(locked_bytes=64 << 10)
    assert complaints(report) == []
    assert report.locked_bytes_max is None


def test_small_packets_counted_errors_and_limits_of_the_cgroup_are_warnings(machine: Machine) -> None:
    port = machine.roce()
    machine.write("sys/class/net/eth0/mtu", 1500)
    machine.write(f"{port}/hw_counters/out_of_sequence", 12)
    machine.write("proc/self/cgroup", "0::/system.slice/fs3.service")
    machine.write("sys/fs/cgroup/system.slice/rdma.max", "mlx5_0 hca_handle=2 hca_object=max\nmlx5_1 hca_handle=1")
    report = machine.inspect()
    assert report.usable
    cgroup, mtu, errors = complaints(report)
    assert cgroup.startswith("warn: the cgroup limits mlx5_0 to hca_handle=2")
    assert mtu.startswith("warn: packets of port 1 carry 1024 bytes")
    assert errors.startswith("warn: port 1 has counted errors: out_of_sequence 12")


def test_one_good_port_is_enough(machine: Machine) -> None:
    port_down(machine, machine.roce())
    machine.add("mlx5_1", [(IPV4, "RoCE v2")])
    report = machine.inspect()
    assert report.usable
    assert [d.usable for d in report.devices] == [False, True]


def test_the_command_prints_what_was_found_and_says_it_with_its_status(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = machine.roce()
    monkeypatch.setattr(command, "inspect", machine.inspect)
    good = CliRunner().invoke(command.rdma_command, ["check"], standalone_mode=False)
    assert good.return_value == 0
    assert good.output.startswith("RDMA can be used, over mlx5_0 port 1\n")
    assert (
        "GID 3  ::ffff:10.9.0.1  RoCE v2  eth0  ← fs3 uses it: RoCE v2 of an IPv4 address can be routed" in good.output
    )
    port_down(machine, port)
    bad = CliRunner().invoke(command.rdma_command, ["check", "--json"], standalone_mode=False)
    assert bad.return_value == 1
    told = json.loads(bad.output)
    assert told["usable"] is False
    assert told["devices"][0]["ports"][0]["problems"][0]["fatal"] is True
