"""Each kind of damage to the namespace: found, repaired, and nothing is found afterwards."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from fs3.meta import keys, model
from fs3.v1 import meta_pb2 as pb
from fs3.v1.disk_meta_pb2 import GcRecord, HoldRecord, IdempotencyRecord, PendingTruncation, SessionRecord
from meta.fsck.harness import change, fsck, kinds, record, store
from meta.harness import Meta, audit, faults, memory_of, run

Damage = Callable[[Meta], Awaitable[None]]
DAMAGES: dict[str, tuple[Damage, list[str]]] = {}


def damage(*expected: str) -> Callable[[Damage], Damage]:
    """Register a way to damage a store with the kinds of findings that follow."""

    def register(function: Damage) -> Damage:
        DAMAGES[function.__name__] = (function, sorted(expected))
        return function

    return register


async def populated() -> Meta:
    """Directories /d, /d/e, /g; files /d/f with a second name /d/e/h, /d/s open for writing; a file that goes."""
    meta = await Meta.start()
    for path in ("/d", "/d/e", "/g"):
        await meta.mkdir(path)
    await meta.create("/d/f")
    await meta.link("/d/f", "/d/e/h")
    await meta.create("/d/s", open_write=True)
    made = await meta.create("/d/gone", open_write=True)
    meta.chunks.write(made.attr, 10)
    await meta.do("Close", inode=made.attr.inode, session=made.session, report=pb.WriteReport(wrote=True, length=10))
    await meta.do("Unlink", "/d/gone")
    return meta


async def inode(meta: Meta, path: str) -> int:
    return (await meta.stat(path)).inode


@damage("dangling-entry")
async def an_entry_names_nothing(meta: Meta) -> None:
    await change(meta, sets={keys.dirent(await inode(meta, "/d"), b"x"): model.encode_dirent(77 << 12, model.FILE)})


@damage("dangling-entry", "subdirectories")
async def an_entry_names_a_directory_that_is_gone(meta: Meta) -> None:
    entry = model.encode_dirent(77 << 12, model.DIRECTORY)
    await change(meta, sets={keys.dirent(await inode(meta, "/g"), b"x"): entry})


@damage("entry-type")
async def an_entry_has_the_wrong_type(meta: Meta) -> None:
    directory, file = await inode(meta, "/d"), await inode(meta, "/d/f")
    await change(meta, sets={keys.dirent(directory, b"f"): model.encode_dirent(file, model.SYMLINK)})


@damage("no-name", "stray-entry")
async def an_entry_is_in_no_directory(meta: Meta) -> None:
    file = (await meta.create("/g/moved")).attr.inode
    entry = model.encode_dirent(file, model.FILE)
    await change(
        meta, sets={keys.dirent(77 << 12, b"x"): entry}, clears=(keys.dirent(await inode(meta, "/g"), b"moved"),)
    )


@damage("no-name")
async def a_file_has_lost_its_name(meta: Meta) -> None:
    await meta.create("/g/file")
    await change(meta, clears=(keys.dirent(await inode(meta, "/g"), b"file"),))


@damage("no-name", "subdirectories")
async def a_directory_has_lost_its_name(meta: Meta) -> None:
    await change(meta, clears=(keys.dirent(await inode(meta, "/d"), b"e"),))


@damage("link-count")
async def a_link_count_is_too_high(meta: Meta) -> None:
    found = await record(meta, await inode(meta, "/d/f"))
    found.attr.nlink = 5
    await store(meta, found)


@damage("link-count")
async def a_link_count_is_too_low(meta: Meta) -> None:
    found = await record(meta, await inode(meta, "/d/f"))
    found.attr.nlink = 1
    await store(meta, found)


@damage("subdirectories")
async def a_counter_of_subdirectories_is_wrong(meta: Meta) -> None:
    await change(meta, sets={keys.directory_subdirs(await inode(meta, "/d")): model.encode_count(3)})


@damage("subdirectories")
async def an_empty_directory_counts_subdirectories(meta: Meta) -> None:
    await change(meta, sets={keys.directory_subdirs(await inode(meta, "/g")): model.encode_count(2)})


@damage("directory-parent")
async def a_directory_has_the_wrong_parent(meta: Meta) -> None:
    found = await record(meta, await inode(meta, "/d/e"))
    found.attr.parent = await inode(meta, "/g")
    await store(meta, found)


@damage("directory-names", "subdirectories")
async def a_directory_has_two_names(meta: Meta) -> None:
    entry = model.encode_dirent(await inode(meta, "/d/e"), model.DIRECTORY)
    await change(meta, sets={keys.dirent(await inode(meta, "/g"), b"again"): entry})


@damage("circle")
async def directories_lie_in_each_other(meta: Meta) -> None:
    upper, lower = await inode(meta, "/d"), await inode(meta, "/d/e")
    found = await record(meta, upper)
    found.attr.parent = lower
    await store(meta, found)
    entry = model.encode_dirent(upper, model.DIRECTORY)
    counters = {
        keys.directory_subdirs(keys.ROOT_INODE): model.encode_count(1),
        keys.directory_subdirs(lower): model.encode_count(1),
    }
    await change(meta, sets={keys.dirent(lower, b"d"): entry, **counters}, clears=(keys.dirent(1, b"d"),))


@damage("not-queued")
async def an_unlinked_file_is_not_queued(meta: Meta) -> None:
    rows = await meta.rows(keys.GC)
    assert len(rows) == 1
    await change(meta, clears=(rows[0][0],))


@damage("not-queued")
async def a_removed_directory_is_not_queued(meta: Meta) -> None:
    ino = await inode(meta, "/d")
    await meta.do("RemoveAll", "/d")
    await change(meta, clears=(keys.gc(0, ino),))


@damage("removed-directory", "queued-in-use")
async def a_directory_is_marked_as_removed(meta: Meta) -> None:
    found = await record(meta, await inode(meta, "/g"))
    found.detached = True
    await store(meta, found)
    await queue(meta, await inode(meta, "/d/e"), model.DIRECTORY)


async def queue(meta: Meta, ino: int, kind: pb.FileType) -> None:
    entry = GcRecord(format=model.FORMAT, time_ns=1, type=kind)
    await change(meta, sets={keys.gc(0, ino): entry.SerializeToString()})


@damage("queued-in-use")
async def a_file_with_names_is_queued(meta: Meta) -> None:
    await queue(meta, await inode(meta, "/d/f"), model.FILE)


@damage("queued-in-use")
async def a_file_is_queued_twice(meta: Meta) -> None:
    ((key, value),) = await meta.rows(keys.GC)
    await change(meta, sets={keys.gc(5, keys.gc_parts(key)[1]): value})


@damage("queued-in-use")
async def an_inode_that_is_gone_is_queued(meta: Meta) -> None:
    await queue(meta, 77 << 12, model.FILE)


@damage("stray-session")
async def a_session_belongs_to_nothing(meta: Meta) -> None:
    session = SessionRecord(format=model.FORMAT, client_id=b"c" * 16)
    await change(meta, sets={keys.session(77 << 12, b"s" * 16): session.SerializeToString()})


@damage("stray-hold", "stray-hold")
async def holds_belong_to_nothing(meta: Meta) -> None:
    file = await inode(meta, "/d/f")
    await meta.do("Hold", begin=[file])
    hold = HoldRecord(format=model.FORMAT).SerializeToString()
    await change(meta, sets={keys.hold(77 << 12, meta.client_id): hold, keys.hold(file, b"n" * 16): hold})


@damage("stray-hold")
async def a_file_is_kept_by_nobody_who_is_known(meta: Meta) -> None:
    file = await inode(meta, "/d/f")
    await meta.do("Hold", begin=[file])
    await meta.do("Unlink", "/d/f")
    await change(meta, clears=(keys.keepalive(meta.client_id),))


@damage("stray-truncation")
async def a_truncation_belongs_to_nothing(meta: Meta) -> None:
    pending = PendingTruncation(format=model.FORMAT)
    await change(meta, sets={keys.truncation(77 << 12): pending.SerializeToString()})


@damage("truncating")
async def a_file_waits_for_no_truncation(meta: Meta) -> None:
    found = await record(meta, await inode(meta, "/d/f"))
    found.truncating = True
    await store(meta, found)


@damage("stray-key", "stray-key")
async def keys_of_a_directory_are_left(meta: Meta) -> None:
    await change(
        meta,
        sets={
            keys.directory_times(77 << 12): model.encode_times(1, 1),
            keys.directory_subdirs(77 << 12): model.encode_count(1),
        },
    )


@damage("stray-xattr")
async def an_extended_attribute_belongs_to_nothing(meta: Meta) -> None:
    await change(meta, sets={keys.xattr(77 << 12, b"user.a"): model.encode_xattr(b"value")})


@damage("xattrs")
async def an_inode_does_not_tell_of_its_extended_attributes(meta: Meta) -> None:
    await change(meta, sets={keys.xattr(await inode(meta, "/g"), b"user.a"): model.encode_xattr(b"value")})


@damage("xattrs")
async def extended_attributes_are_counted_wrong(meta: Meta) -> None:
    await meta.do("Setxattr", "/g", name=b"user.a", value=b"value")
    found = await record(meta, await inode(meta, "/g"))
    found.xattr_bytes += 1
    await store(meta, found)


@damage("inode-counter")
async def the_counter_of_inodes_is_wrong(meta: Meta) -> None:
    await change(meta, sets={keys.counter(3): model.encode_count(7)})


@damage("old-answers")
async def stored_answers_are_kept(meta: Meta) -> None:
    answer = IdempotencyRecord(format=model.FORMAT, time_ns=1, method=1)
    await change(meta, sets={keys.idempotency(b"c" * 16, 1): answer.SerializeToString()})


@damage("allocator", "allocator")
async def ids_would_be_handed_out_again(meta: Meta) -> None:
    for i in range(keys.PIECE_IDS + 1):
        await meta.create(f"/g/{i}")
    assert {kind for kind, _ in [keys.allocation_of(await inode(meta, f"/g/{i}")) for i in (0, keys.PIECE_IDS)]} == {
        b"b",
        b"p",
    }
    await change(meta, clears=(keys.allocator(b"b"), keys.allocator(b"p")))


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_repaired(name: str) -> None:
    async def main() -> None:
        meta = await populated()
        assert await kinds(meta) == []
        cause, expected = DAMAGES[name]
        await cause(meta)
        assert await kinds(meta) == expected
        assert await kinds(meta) == expected, "looking does not repair"
        report = await fsck(meta, repair=True)
        # One repair may mend what another finding came from.
        assert {finding.kind for finding in report.findings} <= set(expected)
        assert report.findings
        assert [finding for finding in report.findings if not finding.repaired] == []
        assert report.unrepaired == 0
        assert await kinds(meta) == []
        await audit(meta)
        await meta.collect()
        await audit(meta)
        assert await kinds(meta) == []

    run(main())


@pytest.mark.parametrize("name", DAMAGES)
def test_repairs_take_effect_once_whatever_the_store_says(name: str) -> None:
    async def main(seed: int) -> None:
        meta = await populated()
        await DAMAGES[name][0](meta)
        memory_of(meta).faults = faults(seed, rate=0.12)
        report = await fsck(meta, repair=True)
        memory_of(meta).faults = None
        assert report.findings
        assert report.unrepaired == report.unsettled == 0
        assert await kinds(meta) == []
        await audit(meta)

    for seed in range(3):
        run(main(seed))


def test_what_lost_its_name_is_in_lost_and_found_with_all_it_has() -> None:
    async def main() -> None:
        meta = await populated()
        lost = await inode(meta, "/d/e")
        await change(meta, clears=(keys.dirent(await inode(meta, "/d"), b"e"),))
        report = await fsck(meta, repair=True)
        place = f"/lost+found/inode-{lost:x}"
        assert place in next(f.repair for f in report.findings if f.kind == "no-name")
        assert await meta.names(place) == [b"h"]
        assert (await meta.stat("/lost+found")).mode == 0o700
        assert (await meta.stat(f"{place}/h")).nlink == 2

    run(main())


def test_a_removed_entry_is_reported_with_its_path() -> None:
    async def main() -> None:
        meta = await populated()
        await an_entry_names_nothing(meta)
        (finding,) = (await fsck(meta, repair=True)).findings
        assert (finding.where, finding.inode, finding.repaired) == ("/d/x", 77 << 12, True)

    run(main())


def test_a_repair_that_is_not_possible_says_why() -> None:
    async def main() -> None:
        meta = await populated()
        await a_file_has_lost_its_name(meta)
        await meta.create("/lost+found")
        (finding,) = (await fsck(meta, repair=True)).findings
        assert not finding.repaired
        assert "/lost+found is not a directory" in finding.repair

    run(main())
