from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rdma.perftest import Bandwidth, bandwidth, parse

SYSFS = Path("/sys/class/infiniband")
READ_TABLE = """
 Mtu             : 4096[B]
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]
 262144     1000             4.72               3.20   \t\t   0.001429
---------------------------------------------------------------------------------------
"""
ENUMERATE = """
import json
from pyverbs.device import Context, get_device_list
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.enums import IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_REMOTE_WRITE

found = {}
for device in get_device_list():
    with Context(name=device.name.decode()) as context, PD(context) as pd:
        memory = MR(pd, 1 << 20, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE)
        found[device.name.decode()] = {"max_qp": context.query_device().max_qp, "rkey": memory.rkey}
        memory.close()
print(json.dumps(found))
"""


def attribute(device: str, name: str) -> str:
    return (SYSFS / device / name).read_text().strip()


def test_the_guest_has_one_device_of_each_kind() -> None:
    assert sorted(d.name for d in SYSFS.iterdir()) == ["rxe0", "siw0"]
    assert {d: attribute(d, "node_type") for d in ("rxe0", "siw0")} == {"rxe0": "1: CA", "siw0": "4: RNIC"}


@pytest.mark.parametrize("device", ["rxe0", "siw0"])
def test_ports_are_active(device: str) -> None:
    assert attribute(device, "ports/1/state") == "4: ACTIVE"
    assert attribute(device, "ports/1/link_layer") == "Ethernet"


def test_the_routable_gid_of_soft_roce_is_its_ipv4_address() -> None:
    assert attribute("rxe0", "ports/1/gids/1") == "0000:0000:0000:0000:0000:ffff:0a09:0001"
    assert attribute("rxe0", "ports/1/gid_attrs/types/1") == "RoCE v2"


def test_soft_iwarp_has_one_gid() -> None:
    assert attribute("siw0", "ports/1/gid_attrs/types/0") == "IB/RoCE v1"
    assert [g.name for g in (SYSFS / "siw0/ports/1/gids").iterdir()] == ["0"]


@pytest.mark.parametrize("device", ["rxe0", "siw0"])
def test_verbs_of_the_host_open_the_devices_of_the_guest(device: str) -> None:
    told = subprocess.run(["ibv_devinfo", "-d", device], capture_output=True, text=True, check=True).stdout
    assert "PORT_ACTIVE" in told


def test_files_of_the_guest_support_direct_io(tmp_path: Path) -> None:
    os.close(os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR | os.O_DIRECT))


def test_memory_can_be_locked() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    memory = ctypes.create_string_buffer(64 << 20)
    assert libc.mlock(memory, len(memory)) == 0
    assert libc.munlock(memory, len(memory)) == 0


def test_pyverbs_opens_every_device_and_registers_memory(pyverbs_path: str) -> None:
    environment = {**os.environ, "PYTHONPATH": pyverbs_path}
    told = subprocess.run([sys.executable, "-c", ENUMERATE], env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert sorted(found) == ["rxe0", "siw0"]
    assert all(d["max_qp"] > 1000 and d["rkey"] for d in found.values())


def test_the_table_of_perftest_is_understood() -> None:
    assert parse(READ_TABLE) == [Bandwidth(262144, 1000, 590e6, 400e6)]


@pytest.mark.parametrize("device", ["rxe0", "siw0"])
@pytest.mark.parametrize("tool", ["ib_read_bw", "ib_write_bw"])
def test_raw_verbs_move_data(tool: str, device: str, numbers: dict[str, float]) -> None:
    for message_bytes in (64 << 10, 1 << 20):
        bytes_per_s = bandwidth(tool, device, message_bytes, messages=(256 << 20) // message_bytes)
        numbers[f"{tool} {device} {message_bytes >> 10} KiB, MB/s"] = round(bytes_per_s / 1e6)
        assert bytes_per_s > 10e6
