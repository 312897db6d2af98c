"""`fs3 rdma check` on devices that are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fs3
from fs3.core.errors import Fs3Error
from fs3.v1.frame_pb2 import Code

DEADLINE_S = 10.0
# A user of no privileges: what root may do everywhere is not allowed to it.
NOBODY = 65534


def check(*prefix: str, **environment: str) -> dict[str, Any]:
    """Run it and return what it says, with its exit status as `status`."""
    command = [*prefix, sys.executable, "-m", "fs3", "rdma", "check", "--json"]
    told = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert told.stdout, told.stderr
    report: dict[str, Any] = json.loads(told.stdout)
    return {**report, "status": told.returncode}


def check_until(right: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Run it until its answer is right: the state of a port follows that of its net device a little later."""
    deadline = time.monotonic() + DEADLINE_S
    while not right(report := check()) and time.monotonic() < deadline:
        pass
    return report


def device(report: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(d for d in report["devices"] if d["name"] == name)
    return found


def advice(found: list[dict[str, Any]]) -> str:
    return " ".join(p["advice"] for p in found)


@pytest.fixture
def port_down() -> Iterator[None]:
    """Take soft-RoCE's port down for a while."""
    subprocess.run(["ip", "link", "set", "rd0", "down"], check=True)
    yield
    subprocess.run(["ip", "link", "set", "rd0", "up"], check=True)
    check_until(lambda report: bool(device(report, "rxe0")["usable"]))


def test_roce_is_usable_over_its_routable_address_and_iwarp_by_its_connection_manager() -> None:
    report = check()
    assert (report["status"], report["usable"], report["library"]) == (0, True, "libibverbs.so.1")
    assert [d["name"] for d in report["devices"] if d["usable"]] == ["rxe0", "siw0"]
    (roce,) = device(report, "rxe0")["ports"]
    assert roce["chosen_gid"] == {"index": 1, "address": "::ffff:10.9.0.1", "type": "RoCE v2", "net_device": "rd0"}
    assert (roce["state"], roce["mtu_bytes"]) == ("ACTIVE", 4096)
    assert device(report, "siw0")["ports"][0]["chosen_gid"]["type"] == "iWARP"


def test_memory_of_gpus_is_refused_where_no_device_takes_dma_bufs() -> None:
    # Neither does in Linux 6.1.
    assert [d["takes_dmabufs"] for d in check()["devices"]] == [False, False]
    with open("/dev/zero", "rb") as no_dmabuf, pytest.raises(Fs3Error, match="rxe0, siw0 cannot do that") as refused:
        fs3.RegisteredMemory(bytearray(4096), dmabuf=no_dmabuf.fileno())
    assert refused.value.code == Code.CODE_NOT_SUPPORTED


def test_pyverbs_adds_the_limits_of_the_devices(pyverbs_path: str) -> None:
    report = check(PYTHONPATH=pyverbs_path)
    for name in ("rxe0", "siw0"):
        found = device(report, name)
        assert found["limits"]["max_qp"] > 1000
        assert found["limits"]["max_sge"] >= 1
    assert device(report, "rxe0")["ports"][0]["mtu_bytes"] == 4096


@pytest.mark.usefixtures("port_down")
def test_a_port_that_is_down_is_not_usable() -> None:
    report = check_until(lambda report: not device(report, "rxe0")["usable"])
    assert not device(report, "rxe0")["usable"]
    assert "ip link set rd0 up" in advice(device(report, "rxe0")["ports"][0]["problems"])
    assert report["usable"], "siw0, the other device, goes on"


def test_a_user_without_access_to_a_device_is_told_how_to_get_it() -> None:
    for node, name in (("uverbs0", "rxe0"), ("rdma_cm", "siw0")):
        os.chmod(f"/dev/infiniband/{node}", 0o600)
        try:
            report = check("setpriv", f"--reuid={NOBODY}", "--clear-groups")
        finally:
            os.chmod(f"/dev/infiniband/{node}", 0o666)
        assert not device(report, name)["usable"]
        assert "udev rule" in advice(device(report, name)["problems"])


def test_a_low_limit_of_locked_memory_makes_it_unusable() -> None:
    report = check("prlimit", "--memlock=65536", "setpriv", f"--reuid={NOBODY}", "--clear-groups")
    assert (report["status"], report["usable"]) == (1, False)
    assert "LimitMEMLOCK=infinity" in advice(report["problems"])


def test_a_device_that_libibverbs_has_no_provider_for_is_told_so() -> None:
    hide = 'mount -t tmpfs none /usr/lib/*/libibverbs && exec "$@"'
    report = check("unshare", "--mount", "bash", "-c", hide, "bash")
    assert not report["usable"]
    assert "ibverbs-providers" in advice(device(report, "rxe0")["problems"])


def test_a_cgroup_without_handles_is_named() -> None:
    limited = (
        "mkdir /sys/fs/cgroup/limited && echo +rdma >/sys/fs/cgroup/cgroup.subtree_control && "
        "echo rxe0 hca_handle=0 >/sys/fs/cgroup/limited/rdma.max && "
        'echo $$ >/sys/fs/cgroup/limited/cgroup.procs && exec "$@"'
    )
    try:
        report = check("bash", "-c", limited, "bash")
    finally:
        os.rmdir("/sys/fs/cgroup/limited")
    assert not device(report, "rxe0")["usable"]
    told = [p["what"] for p in device(report, "rxe0")["problems"]]
    assert any("cannot be opened" in what for what in told)
    assert "the cgroup limits rxe0 to hca_handle=0" in told
