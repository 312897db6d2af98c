"""These tests are collected inside the guest of `make test-rdma` alone: nowhere else are the devices that they name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fs3.testing.cluster import LocalCluster, Service

INSIDE = "FS3_TEST_RDMA" in os.environ and Path("/sys/class/infiniband").exists()
collect_ignore_glob = [] if INSIDE else ["test_*.py"]


def pytest_report_header() -> str | None:
    """Say so to who asks for them elsewhere."""
    return None if INSIDE else "tests/rdma: left out, there are no RDMA devices here; `make test-rdma` makes some"


@pytest.fixture(scope="session")
def numbers() -> Iterator[dict[str, float]]:
    """Collect what was measured, under names with units; it is left in numbers.json of the run's results."""
    found: dict[str, float] = {}
    yield found
    text = json.dumps(found, indent=1)
    Path(os.environ["RIG_OUT"], "numbers.json").write_text(f"{text}\n")


@pytest.fixture(scope="session", autouse=True)
def no_shared_memory() -> Iterator[None]:
    """All processes are on one host, and are to use RDMA nevertheless."""
    config = LocalCluster._config

    def without(self: LocalCluster, service: Service) -> dict[str, object]:
        return {**config(self, service), **({"shared_memory": False} if service.kind == "storage" else {})}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalCluster, "_config", without)
        yield


def set_roce_port(state: str) -> None:
    """Bring the port of rxe0 up or down."""
    subprocess.run(["ip", "link", "set", "rd0", state], check=True)


@pytest.fixture
def port_up_again() -> Iterator[None]:
    """Leave the port as it was found."""
    yield
    set_roce_port("up")


@pytest.fixture(params=["rxe0", "siw0"])
def device(request: pytest.FixtureRequest, port_up_again: None) -> str:
    """Give the device that clusters use from here on: soft-RoCE, or soft-iWARP while the other one is down."""
    name: str = request.param
    if name == "siw0":
        set_roce_port("down")
    return name


@pytest.fixture(scope="session")
def pyverbs_path() -> str:
    """What puts pyverbs on the path of a Python process; skips where this Python is not the one it was built for."""
    path = os.environ["FS3_TEST_PYVERBS"]
    suffix = "cpython-{}{}".format(*sys.version_info)
    if not any(suffix in f.name for f in Path(path, "pyverbs").glob("device.*.so")):
        pytest.skip(f"Debian's pyverbs is not for this Python ({suffix})")
    return path
