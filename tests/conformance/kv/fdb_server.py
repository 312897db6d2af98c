"""A FoundationDB cluster for tests, whose key space they erase, and never that of somebody else.

The tests need the whole key space. A cluster that is empty when this process first looks may be used; one that holds
data only if FS3_TEST_FDB_ERASE=1 says that it may be lost.
"""

from __future__ import annotations

import asyncio
import os

import pytest

from fs3.kv.api import KvError, Transaction
from fs3.kv.fdb import FdbKv
from fs3.kv.retry import run

from .support import ALL

FILE = "FDB_CLUSTER_FILE"
ERASE = "FS3_TEST_FDB_ERASE"

# Cluster files that may be erased from now on: this process found them empty, or was told.
_ours: set[str] = set()


def skip_without_server() -> None:
    """Skip the test module that is being imported when no server is named."""
    if not os.environ.get(FILE):
        pytest.skip(
            f"needs a FoundationDB server for tests: make test-fdb {FILE}=/path/to/fdb.cluster",
            allow_module_level=True,
        )


def erase() -> None:
    """Empty the cluster of $FDB_CLUSTER_FILE. Skips the test when it holds data of somebody else."""
    try:
        asyncio.run(_erase(os.environ[FILE]))
    except KvError as error:
        pytest.fail(f"{FILE}={os.environ[FILE]} cannot be used: {error}")


async def _erase(file: str) -> None:
    store = FdbKv()
    try:
        if file not in _ours:
            if os.environ.get(ERASE) != "1" and await run(store, lambda txn: txn.get_range(*ALL, limit=1)):
                pytest.skip(f"the cluster of {file} holds data; {ERASE}=1 lets the tests erase all of it")
            _ours.add(file)

        async def clear(txn: Transaction) -> None:
            txn.clear_range(*ALL)

        await run(store, clear, idempotent=True)
    finally:
        await store.close()
