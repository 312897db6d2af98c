"""What goes to the trash and when it leaves; the operations on it are tested in ops/."""

from __future__ import annotations

import asyncio
import random

from fs3.core.clock import VirtualClock
from fs3.meta import keys, trash
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.fsck.harness import change, kinds
from meta.harness import Meta, audit, code, faults, memory_of, run, user


def test_names_in_the_trash_are_in_the_order_of_expiry_and_tell_what_they_say() -> None:
    parts = [(10**18 + i, 5 + i % 3, 2**63 - i) for i in range(50)]
    names = [keys.trash_name(*each) for each in parts]
    assert sorted(names) == names
    assert [keys.trash_parts(name) for name in names] == parts
    assert all(len(name) == keys.TRASH_NAME_BYTES for name in names)


def test_only_directories_that_are_told_to_keep_what_is_removed_and_pass_it_on() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/plain/sub", parents=True)
        await meta.mkdir("/kept/old", parents=True)
        assert (await meta.do("Statfs", "/")).inodes == 5
        await meta.keep("/kept", 100)
        await meta.mkdir("/kept/new")
        for directory in ("/plain", "/plain/sub", "/kept", "/kept/old", "/kept/new"):
            await meta.create(f"{directory}/f")
            await meta.do("Unlink", f"{directory}/f")
        assert {entry.path for entry in await meta.trash()} == {b"/kept/f", b"/kept/new/f"}
        await meta.keep("/kept/new", 0)
        await meta.create("/kept/new/g")
        await meta.do("Unlink", "/kept/new/g")
        assert len(await meta.trash()) == 2
        await meta.collect()
        await audit(meta)

    run(main())


def test_setting_it_is_the_owners_and_of_directories() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d", caller=user(0), mode=0o777)
        await meta.create("/f")
        assert await meta.code("Setattr", "/d", trash_ms=5, caller=user(4)) == Code.CODE_NOT_PERMITTED
        assert await meta.code("Setattr", "/f", trash_ms=5) == Code.CODE_NOT_DIRECTORY
        assert await meta.code("Setattr", "/d", trash_ms=trash.KEEP_MS_MAX + 1) == Code.CODE_INVALID_ARGUMENT
        assert (await meta.stat("/d")).trash_ms == 0
        await meta.do("Setattr", "/d", trash_ms=5)
        assert (await meta.stat("/d")).trash_ms == 5

    run(main())


def test_a_file_with_other_names_and_one_removed_past_the_trash_are_not_kept() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        await meta.keep("/d", 100)
        await meta.create("/d/f")
        await meta.link("/d/f", "/d/g")
        await meta.do("Unlink", "/d/g")
        await meta.do("RemoveAll", "/d/f", skip_trash=True)
        await meta.mkdir("/d/e")
        await meta.do("RemoveAll", "/d/e", skip_trash=True)
        assert not await meta.trash()
        await meta.collect()
        await audit(meta)

    run(main())


def test_an_open_file_in_the_trash_goes_on_and_is_gone_when_purged_and_closed() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        await meta.keep("/d", 100)
        made = await meta.create("/d/f", open_write=True)
        await meta.do("Unlink", "/d/f", hold_session=made.session)
        await meta.purge(*await meta.trash())
        await meta.collect()
        assert (await meta.stat(inode=made.attr.inode)).nlink == 0
        await meta.do("Close", inode=made.attr.inode, session=made.session)
        await meta.collect()
        assert await meta.code("Stat", "", inode=made.attr.inode) == Code.CODE_STALE_HANDLE
        await audit(meta)

    run(main())


def test_a_directory_in_the_trash_takes_and_shows_nothing() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.keep("/", 100)
        made = await meta.mkdir("/d")
        await meta.create("/d/f")
        await meta.do("RemoveAll", "/d")
        assert (await meta.stat(inode=made.inode)).nlink == 0
        assert await meta.names(inode=made.inode) == []
        assert await meta.code("Create", "g", inode=made.inode) == Code.CODE_NOT_FOUND
        assert await meta.code("Lookup", parent=made.inode, name=b"f") == Code.CODE_NOT_FOUND
        assert await meta.code("Stat", "..", inode=made.inode) == Code.CODE_NOT_FOUND
        await audit(meta)

    run(main())


def test_what_has_expired_goes_and_nothing_before() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock)
        await meta.mkdir("/short")
        await meta.mkdir("/long")
        await meta.keep("/short", 10)
        await meta.keep("/long", 1000)
        for directory in ("/short", "/long"):
            for i in range(100):
                await meta.create(f"{directory}/{i}")
                await meta.do("Unlink", f"{directory}/{i}")
        assert await meta.engine.expirer.step() == 0
        await clock.advance(11)
        assert await meta.engine.expirer.step() == 100
        assert {entry.parent for entry in await meta.trash()} == {(await meta.stat("/long")).inode}
        await meta.collect()
        await audit(meta)
        await clock.advance(1000)
        assert await meta.engine.expirer.step() == 100
        await meta.collect()
        assert (await meta.do("Statfs", "/")).inodes == 4

    run(main())


def test_services_that_expire_restore_and_purge_at_once_under_faults_lose_and_double_nothing() -> None:
    async def main(seed: int) -> None:
        rng = random.Random(seed)
        meta = await Meta.start(seed=seed)
        await meta.mkdir("/d", mode=0o777)
        await meta.keep("/d", 3600)
        peer = await meta.peer(seed + 1)
        for i in range(20):
            await meta.create(f"/d/{i}")
        memory_of(meta).faults = faults(seed)

        codes: set[int] = set()

        async def worker(service: Meta) -> None:
            for _ in range(30):
                name = f"/d/{rng.randrange(20)}"
                match rng.randrange(4):
                    case 0 | 1:
                        codes.add(await service.code("Unlink", name))
                    case 2:
                        for entry in (await service.trash())[:3]:
                            codes.add(await code(service.restore(entry)))
                    case 3:
                        await service.engine.expirer.step()

        await asyncio.gather(*(worker(service) for service in (meta, peer, meta, peer)))
        memory_of(meta).faults = None
        assert codes <= {0, Code.CODE_NOT_FOUND, Code.CODE_EXISTS}
        names = set(await meta.names("/d"))
        assert len(names) + len(await meta.trash()) == 20
        assert names.isdisjoint(entry.name for entry in await meta.trash())
        await audit(meta)
        assert await kinds(meta) == []

    for seed in range(5):
        run(main(seed))


def test_fsck_mends_the_records_of_the_trash() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        await meta.keep("/d", 100)
        for name in ("f", "g"):
            await meta.create(f"/d/{name}")
            await meta.do("Unlink", f"/d/{name}")
        assert await kinds(meta) == []
        first, second = [entry.id for entry in await meta.trash()]
        await change(meta, clears=(keys.trash(first),))
        stray = keys.trash(keys.trash_name(1, 2, 3))
        [(_, value)] = [row for row in await meta.rows(keys.TRASH) if row[0] == keys.trash(second)]
        await change(meta, sets={stray: value})
        assert await kinds(meta) == ["stray-trash", "trash-record"]
        assert await kinds(meta, repair=True) == ["stray-trash", "trash-record"]
        assert await kinds(meta) == []
        assert len(await meta.trash()) == 2
        assert (await meta.restore(pb.TrashEntry(id=first))).nlink == 1
        await audit(meta)

    run(main())
