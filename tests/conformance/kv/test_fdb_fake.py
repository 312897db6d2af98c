"""The FoundationDB engine on a stand-in for its binding: the common suite, errors, threads, lifetimes."""

from __future__ import annotations

import ast
import asyncio
import gc
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fs3.kv import fdb as engine
from fs3.kv.api import (
    CommitUnknown,
    Conflict,
    KvError,
    LimitExceeded,
    TooOld,
    Unavailable,
    UsedAfterCommit,
)
from fs3.kv.fdb import FdbKv
from fs3.kv.memory import MemoryKv
from fs3.kv.open import open_store

from . import fake_fdb
from .fake_fdb import NETWORK, PAGE_ROWS, FakeFdb
from .suite import KvConformance
from .support import ALL, DEADLINE_S, contents, write


def fake(clock: Callable[[], int] | None = None) -> FakeFdb:
    return FakeFdb(MemoryKv() if clock is None else MemoryKv(now_ms=clock))


def opened(binding: FakeFdb) -> FdbKv:
    return FdbKv(os.devnull, binding=binding)


@contextmanager
def network_held() -> Iterator[None]:
    NETWORK.gate.clear()
    try:
        yield
    finally:
        NETWORK.gate.set()


class TestFdbFake(KvConformance):
    def open_kv(self, clock: Callable[[], int] | None = None) -> FdbKv:
        return opened(fake(clock))


# What a code means in a read, and in a commit.
MEANINGS = (
    (1007, TooOld, TooOld),
    (1009, Unavailable, Unavailable),
    (1020, Conflict, Conflict),
    (1021, CommitUnknown, CommitUnknown),
    (1022, CommitUnknown, CommitUnknown),
    (1025, UsedAfterCommit, CommitUnknown),
    (1031, Unavailable, CommitUnknown),
    (1036, KvError, CommitUnknown),
    (1037, Unavailable, Unavailable),
    (1038, Unavailable, Unavailable),
    (1039, CommitUnknown, CommitUnknown),
    (1042, Unavailable, Unavailable),
    (1051, Unavailable, Unavailable),
    (1078, Unavailable, Unavailable),
    (1100, KvError, CommitUnknown),
    (1213, Unavailable, Unavailable),
    (1223, Unavailable, Unavailable),
    (2000, KvError, KvError),
    (2004, KvError, KvError),
    (2017, UsedAfterCommit, UsedAfterCommit),
    (2101, LimitExceeded, LimitExceeded),
    (2102, LimitExceeded, LimitExceeded),
    (2103, LimitExceeded, LimitExceeded),
    (4100, KvError, CommitUnknown),
    (9999, KvError, CommitUnknown),
)


@pytest.mark.parametrize(("code", "in_read", "in_commit"), MEANINGS)
def test_a_code_of_foundationdb_becomes_an_error_of_the_interface(
    code: int, in_read: type[KvError], in_commit: type[KvError]
) -> None:
    async def main() -> None:
        binding = fake()
        store = opened(binding)
        for kind in ("get", "range", "version"):
            binding.failures = {kind: [code]}
            txn = store.transaction()
            reads = {"get": txn.get(b"a"), "range": txn.get_range(*ALL), "version": txn.get_read_version()}
            read = reads.pop(kind)
            for unused in reads.values():
                unused.close()
            with pytest.raises(KvError) as caught:
                await read
            assert type(caught.value) is in_read
            assert f"({code})" in str(caught.value)
            assert caught.value.__cause__ is not None
        binding.failures = {"commit": [code]}
        txn = store.transaction()
        txn.set(b"a", b"1")
        with pytest.raises(KvError) as caught:
            await txn.commit()
        assert type(caught.value) is in_commit
        with pytest.raises(UsedAfterCommit):
            txn.set(b"a", b"2")
        await store.close()

    asyncio.run(main())


def test_nothing_waits_for_ever_for_a_cluster_that_is_away() -> None:
    async def main() -> None:
        binding = fake()
        store = opened(binding)
        binding.unreachable = True
        reader, writer = store.transaction(), store.transaction()
        with pytest.raises(Unavailable):
            await reader.get(b"a")
        writer.set(b"a", b"1")
        with pytest.raises(CommitUnknown):
            await writer.commit()
        await store.close()

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


@pytest.mark.parametrize("reverse", [False, True])
def test_ranges_come_whole_from_pages_and_in_one_piece_with_a_limit(reverse: bool) -> None:
    async def main() -> None:
        binding = fake()
        store = opened(binding)
        rows = {b"k%02d" % i: b"v%d" % i for i in range(3 * PAGE_ROWS)}
        await write(store, rows)
        want = sorted(rows.items(), reverse=reverse)
        txn = store.transaction()
        assert await txn.get_range(*ALL, reverse=reverse) == want
        assert binding.pages == 4
        assert await txn.get_range(*ALL, limit=7, reverse=reverse) == want[:7]
        assert binding.pages == 5
        await store.close()

    asyncio.run(main())


def test_a_transaction_lives_while_something_of_it_is_pending() -> None:
    async def main() -> None:
        store = opened(fake())
        await write(store, {b"a": b"1"})
        with network_held():
            read = asyncio.ensure_future(store.transaction().get(b"a"))
            commit = asyncio.ensure_future(write(store, {b"b": b"2"}))
            abandoned = asyncio.ensure_future(write(store, {b"c": b"3"}))
            await asyncio.sleep(0)
            abandoned.cancel()
            await asyncio.wait([abandoned])
            del abandoned
            gc.collect()
        assert await read == b"1"
        await commit
        assert await contents(store) == {b"a": b"1", b"b": b"2", b"c": b"3"}
        await store.close()

    asyncio.run(main())


def test_cancelling_a_transaction_ends_its_reads() -> None:
    async def main() -> None:
        store = opened(fake())
        txn = store.transaction()
        with network_held():
            read = asyncio.ensure_future(txn.get(b"a"))
            await asyncio.sleep(0)
            txn.cancel()
        with pytest.raises(UsedAfterCommit):
            await read
        await store.close()

    asyncio.run(main())


def test_closing_waits_for_commits_that_are_under_way() -> None:
    async def main() -> None:
        store = opened(fake())
        with network_held():
            commit = asyncio.ensure_future(write(store, {b"a": b"1"}))
            await asyncio.sleep(0)
            close = asyncio.ensure_future(store.close())
            await asyncio.sleep(0)
            assert not close.done()
        await close
        assert store._completions is not None
        await commit

    asyncio.run(main())


def test_answers_that_come_after_the_loop_has_ended_disturb_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        store = opened(fake())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(store.transaction().get(b"a"), 0)

    with network_held():
        asyncio.run(main())

    async def after() -> None:
        store = opened(fake())
        assert await contents(store) == {}
        await store.close()

    asyncio.run(after())
    assert capfd.readouterr().err == ""


def test_many_answers_share_a_wake_up_of_the_loop() -> None:
    async def main() -> None:
        store = opened(fake())
        loop = asyncio.get_running_loop()
        wakeups = 0
        original = loop.call_soon_threadsafe

        def counting(*args: object) -> object:
            nonlocal wakeups
            wakeups += 1
            return original(*args)  # type: ignore[arg-type]

        loop.call_soon_threadsafe = counting  # type: ignore[assignment, method-assign]
        txn = store.transaction()
        with network_held():
            reads = [asyncio.ensure_future(txn.get(b"%d" % i)) for i in range(500)]
            await asyncio.sleep(0)
        # The loop does not turn while the network thread answers all of them.
        assert txn._native.get(b"last")._ready.wait(DEADLINE_S)
        assert await asyncio.gather(*reads) == [None] * 500
        assert wakeups == 1
        await store.close()

    asyncio.run(main())


def test_a_declared_read_takes_the_snapshot_then() -> None:
    async def main() -> None:
        store = opened(fake())
        txn = store.transaction()
        txn.add_read_conflict_key(b"m")
        await write(store, {b"m": b"1"})
        txn.set(b"out", b"x")
        with pytest.raises(Conflict):
            await txn.commit()
        await store.close()

    asyncio.run(main())


def test_a_forked_child_is_told_that_it_cannot_use_the_store() -> None:
    store = opened(fake())
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            store.transaction()
        except KvError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        assert "forked" in said.read()
    os.waitpid(child, 0)


# Opening by URL.


def test_without_the_client_library_one_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    fdb = pytest.importorskip("fdb")

    def no_library(version: int) -> None:
        assert version == engine.API_VERSION
        raise Exception("Unable to locate the FoundationDB API shared library!")

    monkeypatch.setattr(fdb, "api_version", no_library)
    with pytest.raises(KvError, match=r"Unable to locate.*Install the package foundationdb-clients"):
        engine.load_binding()


def test_without_the_python_package_one_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fdb", None)
    with pytest.raises(KvError, match="pip install"):
        engine.load_binding()


@pytest.mark.parametrize("url", ["fdb:{file}", "fdb:{file}?timeout_ms=2000", "fdb:", "fdb"])
def test_open_store_opens_a_cluster_file(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "fdb.cluster"
    file.write_text("test:test@127.0.0.1:4500")
    monkeypatch.setattr(engine, "load_binding", fake)
    monkeypatch.setenv("FDB_CLUSTER_FILE", str(file))
    store = open_store(url.format(file=file))
    assert isinstance(store, FdbKv)
    assert store.cluster_file == str(file)
    assert store._timeout_ms == (2000 if "timeout" in url else engine.TIMEOUT_MS)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("fdb:/does/not/exist", "cannot read the FoundationDB cluster file /does/not/exist"),
        ("fdb:", "FDB_CLUSTER_FILE"),
        ("fdb:/dev/null?durable=1", "unknown option 'durable'; known: timeout_ms"),
        ("fdb:/dev/null?timeout_ms=soon", "timeout_ms must be"),
        ("fdb:/dev/null?timeout_ms=0", "timeout_ms must be"),
    ],
)
def test_open_store_names_what_is_wrong(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "load_binding", fake)
    monkeypatch.setattr(engine, "DEFAULT_CLUSTER_FILE", "/does/not/exist")
    monkeypatch.delenv("FDB_CLUSTER_FILE", raising=False)
    with pytest.raises(KvError, match=message):
        open_store(url)


# The stand-in is true to the binding.


# What the stand-in adds.
OWN_METHODS = {
    ("Future", "__init__"),
    ("Future", "_finish"),
    ("KeySelector", "boundary"),
    ("TransactionRead", "__init__"),
    ("Transaction", "__init__"),
    ("Database", "__init__"),
}


def parameters_in_source(source: ast.Module) -> dict[tuple[str, str], list[str]]:
    """Parameter names of every method in the binding's source, by class and name."""
    return {
        (node.name, item.name): [argument.arg for argument in item.args.args]
        for node in source.body
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.FunctionDef)
    }


def test_the_stand_in_has_the_signatures_of_the_binding() -> None:
    fdb = pytest.importorskip("fdb")
    # The module itself cannot be imported where the client library is missing.
    source = ast.parse((Path(fdb.__file__).parent / "impl.py").read_text())
    real = parameters_in_source(source)
    # FoundationDB's atomic operations are made from a table.
    real |= {("Transaction", name): ["self", "key", "param"] for name in dir(fake_fdb.Transaction) if "stamped" in name}
    real["Transaction", "add"] = ["self", "key", "param"]
    for kind in ("FDBError", "KeySelector", "KeyValue", "TransactionRead", "Transaction", "Future", "Database"):
        for name, function in vars(getattr(fake_fdb, kind)).items():
            function = getattr(function, "__func__", function)
            if not inspect.isfunction(function) or (kind, name) in OWN_METHODS:
                continue
            assert list(inspect.signature(function).parameters) == real[kind, name], f"{kind}.{name}"


def test_the_stand_in_has_the_streaming_modes_of_the_binding() -> None:
    options = pytest.importorskip("fdb.fdboptions")
    real = {name.lower(): option[0] for name, option in options.StreamingMode.items()}
    assert vars(FakeFdb.StreamingMode) == real
    assert options.TransactionOption["timeout"][0] == 500
    assert {"add", "set_versionstamped_key", "set_versionstamped_value"} <= {n.lower() for n in options.MutationType}
