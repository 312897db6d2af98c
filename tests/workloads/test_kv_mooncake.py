"""The methods of Mooncake's store, as software written for it calls them."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import numpy as np
import pytest

from fs3.kvcache.connectors.mooncake import INVALID_PARAMS, OBJECT_NOT_FOUND, MooncakeDistributedStore
from fs3.testing.cluster import LocalCluster
from tests.workloads.kv_options import fresh_options


@pytest.fixture
def store(shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[MooncakeDistributedStore]:
    monkeypatch.setenv("FS3_TOKEN", shared_cluster.token)
    options = fresh_options(shared_cluster)
    made = MooncakeDistributedStore()
    where = f"fs3://{urlsplit(options['url']).netloc}{options['namespace']}"
    # Mooncake's own arguments, in its order.
    assert made.setup("localhost", where, 512 << 20, 128 << 20, "tcp", "", "localhost:50051", capacity="64MiB") == 0
    yield made
    assert made.close() == 0


def test_values_are_put_got_and_removed(store: MooncakeDistributedStore) -> None:
    assert store.put("a", b"one") == 0
    assert store.put_batch(["b", "c"], [b"two", bytearray(100_000)]) == 0
    assert store.get("a") == b"one"
    assert store.get("none") == b""
    assert store.get_batch(["b", "none"]) == [b"two", b""]
    assert (store.is_exist("a"), store.is_exist("none")) == (1, 0)
    assert store.batch_is_exist(["c", "none", "a"]) == [1, 0, 1]
    assert store.remove("a") == 0
    assert store.remove("a") == OBJECT_NOT_FOUND
    assert store.remove_all() == 2
    assert store.batch_is_exist(["a", "b", "c"]) == [0, 0, 0]


def test_memory_at_addresses_is_stored_and_filled(store: MooncakeDistributedStore) -> None:
    source = np.random.default_rng(1).integers(0, 256, (3, 40_000), np.uint8)
    target = np.zeros_like(source)
    assert store.register_buffer(source.ctypes.data, source.nbytes) == 0
    pages = [source[i].ctypes.data for i in range(3)]
    assert store.batch_put_from(["0", "1", "2"], pages, [40_000] * 3) == [0, 0, 0]
    into = [target[i].ctypes.data for i in range(3)]
    assert store.batch_get_into(["2", "none", "0"], into, [40_000] * 3) == [40_000, OBJECT_NOT_FOUND, 40_000]
    assert (target[0] == source[2]).all()
    assert not target[1].any()
    assert store.put_from("0", pages[1], 10) == 0
    assert store.get_into("0", into[1], 40_000) == 10
    assert (target[1][:10] == source[1][:10]).all()
    assert store.batch_get_into(["0"], [], []) == [INVALID_PARAMS]
    assert store.unregister_buffer(source.ctypes.data) == 0


def test_a_store_that_was_not_set_up_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"setup\(\)"):
        MooncakeDistributedStore().get("a")
