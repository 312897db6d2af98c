"""Changes of one inode that come together go together."""

from __future__ import annotations

import asyncio

import pytest

from fs3.core.clock import RealClock
from fs3.core.errors import Fs3Error, error
from fs3.kv.api import Conflict, KvError, Transaction
from fs3.kv.memory import MemoryKv
from fs3.meta.batches import CHANGES_MAX, Batches
from fs3.meta.clock import monotonic_s
from fs3.meta.reports import version_of
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import AttrResponse, WriteReport
from meta.harness import Meta, memory_of, run


class Scene:
    """Batches over a store that counts transactions; the first change of inode 1 is held up until `go`."""

    def __init__(self) -> None:
        self.store, self.clock, self.go = MemoryKv(), RealClock(), asyncio.Event()
        self.batches = Batches(self.store, self.clock)
        self.begun = 0
        begin = self.store.transaction

        def transaction() -> Transaction:
            self.begun += 1
            return begin()

        self.store.transaction = transaction  # type: ignore[method-assign]

    def change(self, inode: int, name: str, *, left_s: float = 30, exc: Exception | None = None) -> asyncio.Task[str]:
        """A change that writes `name` and returns it, or writes it and raises `exc`."""

        async def attempt(tr: Transaction) -> str:
            tr.set(name.encode(), b"")
            if exc is not None:
                raise exc
            return name

        return asyncio.create_task(self.batches.run(inode, attempt, ends_s=monotonic_s(self.clock) + left_s))

    async def hold_up(self) -> asyncio.Task[str]:
        """A first change of inode 1, on its way until `go`."""
        began = asyncio.Event()

        async def attempt(tr: Transaction) -> str:
            began.set()
            await self.go.wait()
            tr.set(b"first", b"")
            return "first"

        task = asyncio.create_task(self.batches.run(1, attempt, ends_s=monotonic_s(self.clock) + 30))
        await began.wait()
        return task

    async def names(self) -> set[str]:
        """What was written."""
        transaction = self.store.transaction()
        return {key.decode() for key, _ in await transaction.get_range(b"", b"\xff")}


async def settled(scene: Scene) -> None:
    """Wait until nothing is left of past changes."""
    await asyncio.gather(*scene.batches._tasks)
    assert not scene.batches._waiting


def test_those_that_wait_go_in_one_transaction_and_other_inodes_do_not_wait() -> None:
    async def main() -> None:
        scene = Scene()
        first = await scene.hold_up()
        waiting = [scene.change(1, f"n{i}") for i in range(10)]
        assert await scene.change(2, "other") == "other"
        assert not any(task.done() for task in waiting)
        scene.go.set()
        assert await first == "first"
        assert await asyncio.gather(*waiting) == [f"n{i}" for i in range(10)]
        assert scene.begun == 3
        await settled(scene)

    run(main())


def test_a_crowd_goes_in_several_batches() -> None:
    async def main() -> None:
        scene = Scene()
        first = await scene.hold_up()
        waiting = [scene.change(1, f"n{i}") for i in range(2 * CHANGES_MAX + 1)]
        await asyncio.sleep(0)
        scene.go.set()
        await asyncio.gather(first, *waiting)
        assert scene.begun == 4
        await settled(scene)

    run(main())


def test_one_that_fails_leaves_nothing_and_the_others_go_without_it() -> None:
    async def main() -> None:
        scene = Scene()
        first = await scene.hold_up()
        refusal = error(Code.CODE_STALE_HANDLE, "gone")
        waiting = [scene.change(1, "a"), scene.change(1, "bad", exc=refusal), scene.change(1, "b")]
        await asyncio.sleep(0)
        scene.go.set()
        await first
        assert await asyncio.gather(*waiting, return_exceptions=True) == ["a", refusal, "b"]
        assert await scene.names() == {"first", "a", "b"}
        await settled(scene)

    run(main())


def test_a_failure_of_the_store_is_everybodys() -> None:
    async def main() -> None:
        scene = Scene()
        first = await scene.hold_up()
        waiting = [scene.change(1, "a", left_s=0.2), scene.change(1, "b", left_s=0.2, exc=Conflict("again"))]
        await asyncio.sleep(0)
        scene.go.set()
        await first
        failed = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(exc, KvError | Fs3Error) for exc in failed)
        assert await scene.names() == {"first"}
        await settled(scene)

    run(main())


def test_who_gives_up_waiting_is_told_and_passed_over() -> None:
    async def main() -> None:
        scene = Scene()
        first = await scene.hold_up()
        late, cancelled, patient = scene.change(1, "late", left_s=0.01), scene.change(1, "x"), scene.change(1, "y")
        with pytest.raises(Fs3Error) as caught:
            await late
        assert caught.value.code == Code.CODE_BUSY
        assert caught.value.retryable
        cancelled.cancel()
        await asyncio.sleep(0)
        scene.go.set()
        assert [await first, await patient] == ["first", "y"]
        assert await scene.names() == {"first", "y"}
        await settled(scene)

    run(main())


def test_a_first_change_that_is_cancelled_lets_the_others_go_on() -> None:
    async def main() -> None:
        scene = Scene()
        first = await scene.hold_up()
        other = scene.change(1, "other")
        await asyncio.sleep(0)
        first.cancel()
        assert await other == "other"
        await settled(scene)

    run(main())


def test_many_writers_of_one_file_publish_in_few_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        meta = await Meta.start()
        inode = (await meta.create("/f")).attr.inode
        opened = [await meta.do("Open", "/f", read=True, write=True) for _ in range(20)]
        store, begun = memory_of(meta), 0
        begin = store.transaction

        def transaction() -> Transaction:
            nonlocal begun
            begun += 1
            return begin()

        monkeypatch.setattr(store, "transaction", transaction)

        async def publish(number: int, session: bytes) -> None:
            report = WriteReport(wrote=True, length=100 * (number + 1))
            await meta.do("Sync", inode=inode, session=session, report=report)
            await meta.do("Close", inode=inode, session=session, report=report)

        await asyncio.gather(*(publish(number, one.session) for number, one in enumerate(opened)))
        assert begun <= 5
        assert (await meta.stat("/f")).length == 2000
        assert not await meta.has_session(inode)

    run(main())


def test_every_report_is_answered_with_the_version_that_it_changed() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f")
        inode, versions = made.attr.inode, [version_of(made.attr)]
        opened = [await meta.do("Open", "/f", read=True, write=True) for _ in range(10)]

        async def publish(number: int, session: bytes) -> None:
            report = WriteReport(wrote=True, length=100 * (number + 1), mtime_ns=1000 + number)
            method = "Close" if number % 2 else "Sync"
            answers.append(await meta.do(method, inode=inode, session=session, report=report))

        answers: list[AttrResponse] = []
        await asyncio.gather(*(publish(number, one.session) for number, one in enumerate(opened)))
        while answers:
            following = [answer for answer in answers if answer.before == versions[-1]]
            assert len(following) == 1, "each version was changed once"
            answers.remove(following[0])
            versions.append(version_of(following[0].attr))
        assert len(versions) == 11
        assert versions[-1] == version_of(await meta.stat("/f"))
        synced = await meta.do("Sync", inode=inode, session=opened[0].session)
        assert not synced.HasField("before")

    run(main())
