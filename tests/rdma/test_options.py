"""What is configured of RDMA is what is used."""

from __future__ import annotations

from pathlib import Path

import pytest

import fs3
from fs3.core.config import StorageConfig
from fs3.core.errors import Fs3Error
from fs3.storage.engine import engine_config, native_engine
from fs3.testing.cluster import LocalCluster, Service
from tests.cluster.conftest import MakeCluster, cluster, make_cluster
from tests.rdma.test_cluster import MIB, read, transports, write

__all__ = ["cluster", "make_cluster"]

# Of the addresses of rxe0 the first is link-local, the second is made of the IPv4 address, which is the one chosen.
LINK_LOCAL = 0


def test_a_device_that_is_not_there_is_an_error_with_those_that_are(cluster: LocalCluster) -> None:
    nowhere = fs3.RdmaOptions(devices=("nosuch",))
    with pytest.raises(Fs3Error, match="no RDMA device named nosuch on this machine; there are rxe0, siw0"):
        fs3.connect(cluster.url, token=cluster.token, transport="rdma", rdma=nowhere)
    with fs3.connect(cluster.url, token=cluster.token, rdma=nowhere) as fs:
        write(fs, "/file", b"x" * MIB)
        assert transports(cluster)["client", "rxe0"] == 0


def test_the_configured_address_is_the_one_used(make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LocalCluster._config

    def with_address(self: LocalCluster, service: Service) -> dict[str, object]:
        more = {"transport": "rdma", "rdma.devices": ["rxe0"], "rdma.gid_index": LINK_LOCAL}
        return {**config(self, service), **(more if service.kind == "storage" else {})}

    monkeypatch.setattr(LocalCluster, "_config", with_address)
    cluster = make_cluster()
    same = fs3.RdmaOptions(devices=["rxe0"], gid_index=LINK_LOCAL, mtu=1024, traffic_class=104, ack_timeout=16)
    with fs3.connect(cluster.url, token=cluster.token, transport="rdma", rdma=same) as fs:
        write(fs, "/file", b"x" * MIB)
        assert read(fs, "/file") == b"x" * MIB
        assert transports(cluster)["client", "rxe0"] > 0
    # A link-local address and one of IPv4 do not reach each other.
    with (
        fs3.connect(cluster.url, token=cluster.token, transport="rdma", timeout_s=5) as fs,
        pytest.raises(OSError, match="no RDMA with"),
    ):
        read(fs, "/file")


def test_a_storage_service_that_cannot_have_what_is_configured_says_so(tmp_path: Path) -> None:
    config = StorageConfig(
        cluster_id="c",
        mgmtd=("127.0.0.1:1",),
        data_dir=str(tmp_path),
        disks=(str(tmp_path / "disk"),),
        transport="rdma",
        rdma=fs3.RdmaOptions(gid_index=200),
    )
    with pytest.raises(Fs3Error, match="usable address at gid_index 200"):
        native_engine(engine_config(config, node_id=1, node_uuid=bytes(16), token="", disks=()))
