"""The key-value engine that the metadata tests run on: $FS3_TEST_KV is memory (the default), fdb or fdb-fake.

fdb is the server of $FDB_CLUSTER_FILE, emptied before each test; fdb-fake is that engine on a stand-in for its binding.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from fs3.kv.api import KvStore
from fs3.kv.fdb import FdbKv
from fs3.kv.memory import MemoryKv
from tests.conformance.kv.fake_fdb import FakeFdb
from tests.conformance.kv.fdb_server import erase

ENGINE = os.environ.get("FS3_TEST_KV", "memory")


def empty() -> None:
    """Empty what outlives a test."""
    if ENGINE == "fdb":
        erase()


def new_store(now_ms: Callable[[], int]) -> KvStore:
    """Open the store of a test."""
    match ENGINE:
        case "memory":
            return MemoryKv(now_ms=now_ms)
        case "fdb-fake":
            return FdbKv(os.devnull, binding=FakeFdb(MemoryKv(now_ms=now_ms)))
        case "fdb":
            return FdbKv()
        case _:
            raise ValueError(f"FS3_TEST_KV must be memory, fdb or fdb-fake, not {ENGINE!r}")
