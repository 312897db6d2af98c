"""POSIX access control lists: the format, what agrees with a mode, who is allowed what."""

import asyncio
import itertools
import struct

import pytest

from fs3.core.errors import Fs3Error
from fs3.meta import acl, tree, xattrs
from fs3.meta.acl import GROUP, GROUP_OBJ, MASK, OTHER, USER, USER_OBJ, Entry
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import ROOT, Meta, audit, faults, memory_of, run, user

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"
MINIMAL = [Entry(USER_OBJ, 6), Entry(GROUP_OBJ, 4), Entry(OTHER, 0)]
# user::rwx user:7:rwx user:8:--- group::r-x group:9:rw- mask::rw- other::---
NAMED = [
    Entry(USER_OBJ, 7),
    Entry(USER, 7, 7),
    Entry(USER, 0, 8),
    Entry(GROUP_OBJ, 5),
    Entry(GROUP, 6, 9),
    Entry(MASK, 6),
    Entry(OTHER, 0),
]


def raw(*entries: tuple[int, int, int], version: int = 2) -> bytes:
    return struct.pack("<I", version) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_lists_survive_encoding_in_the_form_of_the_kernel() -> None:
    for entries in (MINIMAL, NAMED):
        assert acl.decode(acl.encode(entries)) == entries
    assert acl.decode(b"") == acl.decode(raw()) == []
    none = 0xFFFF_FFFF
    assert acl.encode(MINIMAL) == raw((1, 6, none), (4, 4, none), (0x20, 0, none))


@pytest.mark.parametrize(
    "value",
    [
        b"\x02\0\0",
        raw((1, 6, 0))[:-1],
        raw((1, 6, 0), (4, 4, 0)),
        raw((1, 6, 0), (0x20, 0, 0), (4, 4, 0)),
        raw((1, 6, 0), (1, 6, 0), (4, 4, 0), (0x20, 0, 0)),
        raw((1, 8, 0), (4, 4, 0), (0x20, 0, 0)),
        raw((1, 6, 0), (2, 4, 7), (4, 4, 0), (0x20, 0, 0)),
        raw((1, 6, 0), (2, 4, 0xFFFF_FFFF), (4, 4, 0), (0x10, 4, 0), (0x20, 0, 0)),
        raw((1, 6, 0), (4, 4, 0), (0x10, 4, 0), (0x10, 4, 0), (0x20, 0, 0)),
        raw((1, 6, 0), (4, 4, 0), (0x20, 0, 0), (0x40, 0, 0)),
    ],
)
def test_what_the_kernel_would_refuse_is_refused(value: bytes) -> None:
    with pytest.raises(Fs3Error) as refused:
        acl.decode(value)
    assert refused.value.code == Code.CODE_INVALID_ARGUMENT


def test_other_versions_and_very_long_lists_are_refused() -> None:
    with pytest.raises(Fs3Error) as refused:
        acl.decode(raw((1, 6, 0), version=1))
    assert refused.value.code == Code.CODE_NOT_SUPPORTED
    users = [(2, 4, i) for i in range(acl.ENTRIES_MAX)]
    with pytest.raises(Fs3Error) as refused:
        acl.decode(raw((1, 6, 0), *users, (4, 4, 0), (0x10, 4, 0), (0x20, 0, 0)))
    assert refused.value.code == Code.CODE_NO_SPACE


def test_a_minimal_list_grants_what_its_mode_does() -> None:
    for mode, want in itertools.product(range(0o1000), range(8)):
        entries = acl.with_mode(MINIMAL, mode)
        assert acl.mode_of(entries) == mode
        for owner, group, shift in ((True, True, 6), (False, True, 3), (False, False, 0)):
            got = acl.allowed(entries, owner=owner, group=group, uid=1, groups=set(), want=want)
            assert got == (mode >> shift & want == want)


@pytest.mark.parametrize(
    ("uid", "groups", "granted"),
    [(5, (), 7), (7, (), 6), (8, (9,), 0), (1, (6,), 4), (1, (9,), 6), (1, (6, 9), 6), (1, (), 0)],
)
def test_the_first_class_that_fits_decides_within_the_mask(uid: int, groups: tuple[int, ...], granted: int) -> None:
    for want in (1, 2, 4):
        is_owner, in_group = uid == 5, 6 in groups
        got = acl.allowed(NAMED, owner=is_owner, group=in_group, uid=uid, groups=set(groups), want=want)
        assert got == bool(granted & want)


def test_chmod_changes_the_mask_and_inheritance_takes_what_the_creator_does_not_give() -> None:
    assert acl.mode_of(NAMED) == 0o760
    changed = acl.with_mode(NAMED, 0o124)
    assert (acl.mode_of(changed), changed[3], changed[5]) == (0o124, NAMED[3], Entry(MASK, 2))
    entries, mode = acl.inherited(NAMED, 0o666)
    assert mode == 0o660
    assert [entry.perm for entry in entries] == [6, 7, 0, 5, 6, 6, 0]
    assert acl.inherited(MINIMAL, 0o777) == (MINIMAL, 0o640)


async def put(meta: Meta, path: str, entries: list[Entry], name: bytes = ACCESS, caller: pb.Caller = ROOT) -> int:
    return await meta.code("Setxattr", path, name=name, value=acl.encode(entries), caller=caller)


async def kept(meta: Meta, path: str, name: bytes = ACCESS) -> list[Entry]:
    if name not in (await meta.do("Listxattr", path)).names:
        return []
    return acl.decode((await meta.do("Getxattr", path, name=name)).value)


async def prepared() -> Meta:
    meta = await Meta.start()
    await meta.do("Setattr", "/", mode=0o777)
    await meta.create("/f", mode=0o640, caller=user(5, 6))
    await meta.mkdir("/d", mode=0o750, caller=user(5, 6))
    return meta


def test_permission_checks_follow_the_access_list() -> None:
    async def main() -> None:
        meta = await prepared()
        reader = user(7)
        assert await meta.code("Open", "/f", read=True, caller=reader) == Code.CODE_ACCESS
        assert await put(meta, "/f", NAMED, caller=user(5, 6)) == 0
        assert (await meta.stat("/f")).mode == 0o760
        assert await meta.code("Open", "/f", read=True, write=True, caller=reader) == 0
        assert await meta.code("Open", "/f", read=True, caller=user(8, 9)) == Code.CODE_ACCESS
        assert await put(meta, "/d", NAMED) == 0
        assert await meta.code("List", "/d", caller=reader) == 0
        assert await meta.code("Create", "/d/x", caller=reader) == Code.CODE_ACCESS
        await meta.do("Setattr", "/d", mode=0o770)
        assert await meta.code("Create", "/d/x", caller=reader) == 0
        await audit(meta)

    run(main())


def test_mode_and_access_list_agree_whichever_is_set() -> None:
    async def main() -> None:
        meta = await prepared()
        await put(meta, "/f", NAMED)
        await meta.do("Setattr", "/f", mode=0o604)
        changed = await kept(meta, "/f")
        assert (acl.mode_of(changed), changed[3]) == (0o604, NAMED[3])
        assert await put(meta, "/f", MINIMAL) == 0
        attr = await meta.stat("/f")
        assert (attr.mode, attr.xattrs, attr.access_acl) == (0o640, 0, b"")
        await put(meta, "/f", NAMED)
        await meta.do("Removexattr", "/f", name=ACCESS)
        await meta.do("Removexattr", "/f", name=ACCESS)
        assert (await meta.stat("/f")).mode == 0o760
        await put(meta, "/f", NAMED)
        await meta.do("Setxattr", "/f", name=ACCESS, value=b"")
        assert await kept(meta, "/f") == []
        await audit(meta)

    run(main())


def test_only_owners_set_lists_and_only_directories_have_default_ones() -> None:
    async def main() -> None:
        meta = await prepared()
        await meta.do("Symlink", "/s", target=b"f")
        assert await put(meta, "/f", NAMED, caller=user(7)) == Code.CODE_NOT_PERMITTED
        assert await put(meta, "/f", NAMED, DEFAULT, caller=user(5)) == Code.CODE_ACCESS
        assert await put(meta, "/s", NAMED) == Code.CODE_NOT_SUPPORTED
        assert await meta.code("Setxattr", "/f", name=ACCESS, value=b"rubbish") == Code.CODE_INVALID_ARGUMENT
        await meta.do("Setattr", "/f", mode=0o2750)
        assert await put(meta, "/f", NAMED, caller=user(5, 9)) == 0
        assert (await meta.stat("/f")).mode == 0o760
        assert list((await meta.do("Listxattr", "/f")).names) == [ACCESS]

    run(main())


def test_default_lists_are_inherited_in_place_of_the_umask() -> None:
    async def main() -> None:
        meta = await prepared()
        assert (await meta.create("/d/plain", mode=0o666, umask=0o027)).attr.mode == 0o640
        await put(meta, "/d", NAMED, DEFAULT)
        assert await kept(meta, "/d", DEFAULT) == NAMED
        assert (await meta.create("/d/f", mode=0o666, umask=0o077)).attr.mode == 0o660
        assert [entry.perm for entry in await kept(meta, "/d/f")] == [6, 7, 0, 5, 6, 6, 0]
        assert await kept(meta, "/d/f", DEFAULT) == []
        assert (await meta.mkdir("/d/sub/below", mode=0o777, umask=0o077, parents=True)).mode == 0o760
        for path in ("/d/sub", "/d/sub/below"):
            assert await kept(meta, path) == NAMED
            assert await kept(meta, path, DEFAULT) == NAMED
        assert (await meta.do("Symlink", "/d/s", target=b"f")).attr.mode == 0o777
        await put(meta, "/d", MINIMAL, DEFAULT)
        attr = (await meta.create("/d/minimal", mode=0o777, umask=0o777)).attr
        assert (attr.mode, attr.access_acl) == (0o640, b"")
        await meta.do("Removexattr", "/d", name=DEFAULT)
        assert (await meta.create("/d/again", mode=0o666, umask=0o022)).attr.mode == 0o644
        await audit(meta)

    run(main())


def test_a_recount_of_attributes_finds_the_lists() -> None:
    async def main() -> None:
        meta = await prepared()
        await put(meta, "/d", NAMED)
        await put(meta, "/d", NAMED, DEFAULT)
        tr = meta.store.transaction()
        record = await tree.load_handle(tr, (await meta.stat("/d")).inode)
        assert not await xattrs.recount(tr, record)
        tr.cancel()

    run(main())


def test_concurrent_changes_under_faults_keep_list_and_mode_in_agreement() -> None:
    async def main(seed: int) -> None:
        meta = await prepared()
        peer = await meta.peer()
        store = memory_of(meta)
        store.faults = faults(seed)
        for round_ in range(4):
            calls = []
            for i in range(8):
                server = (meta, peer)[i % 2]
                calls.append(put(server, "/d", acl.with_mode(NAMED, i * 0o11), (ACCESS, DEFAULT)[i % 3 == 0]))
                calls.append(server.code("Setattr", "/d", mode=0o700 + i))
                calls.append(server.code("Create", f"/d/{round_}.{i}", mode=0o666, umask=0o022))
            await asyncio.gather(*calls)
        store.faults = None
        await audit(meta)

    for seed in range(3):
        run(main(seed))
