"""Random operations through several metadata services over one unreliable store, compared with a reference after each.

Three users make, move, link, open, write, cut and remove; clients send an operation to another service when one fails,
now and then once more, and die with files open. Whatever the store does, the answers and the whole tree are those of
:class:`Reference`, which knows of none of it.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fs3.core.errors import Fs3Error
from fs3.kv.api import KvStore
from fs3.kv.fdb import FdbKv
from fs3.kv.lmdb import LmdbKv
from fs3.kv.memory import MemoryKv
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta import engines
from meta.faulty import FaultyStore
from meta.fsck.harness import kinds
from meta.harness import CHUNK, Meta, audit, faults
from meta.reference import Kind, Node, Path, Reference, Refused, User
from tests.conformance.kv.fake_fdb import FakeFdb

T = TypeVar("T")

SERVICES = 3
FAULT_RATE = 0.04
TRIES_MAX = 50
REPEATED = 0.15
# Examples on the engine that is fast; the others get a part.
EXAMPLES = int(os.environ.get("FS3_MODEL_EXAMPLES", "60"))
STEPS = 50

NAMES = ("a", "b", "c")
TYPES = {Kind.FILE: pb.FILE_TYPE_FILE, Kind.DIRECTORY: pb.FILE_TYPE_DIRECTORY, Kind.SYMLINK: pb.FILE_TYPE_SYMLINK}
USERS = (User(0, 0), User(1000, 1000, (2000,)), User(1001, 2000))

paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map(tuple)
users = st.sampled_from((USERS[0], USERS[0], *USERS))
file_modes = st.sampled_from([0o644, 0o666, 0o600, 0o400, 0o4755, 0o2777, 0o2666, 0o000])
directory_modes = st.sampled_from([0o777, 0o755, 0o1777, 0o2775, 0o700, 0o555, 0o777])
targets = st.sampled_from(["a", "b", "a/b", "../c", "/a", "/b/c", "c/../a", "../../b"])
lengths = st.sampled_from([0, 1, 4097, CHUNK, CHUNK + 5, 3 * CHUNK, 5 * CHUNK - 1])
xattr_names = st.sampled_from([b"user.x", b"user.y", b"trusted.z"])


@dataclass(eq=False)
class Handle:
    """An open file as its client knows it. ``end``: how far it has written without saying so."""

    user: User
    node: Node
    inode: int
    session: bytes
    truncations: int
    end: int | None = None


class Client:
    """Sends operations as the native client does: the same request until the answer is certain."""

    def __init__(self, servers: list[Meta], rng: random.Random) -> None:
        self._servers = servers
        self._rng = rng

    async def call(self, name: str, request: Any) -> tuple[int, Any]:
        """(code, answer) of an operation; a late copy of it gets the same."""
        result = await self._certain(name, request)
        if self._rng.random() < REPEATED:
            if hasattr(request, "op"):
                request.op.resent = True
            assert await self._certain(name, request) == result, f"a copy of {name} gets another answer"
        return result

    async def _certain(self, name: str, request: Any) -> tuple[int, Any]:
        for _ in range(TRIES_MAX):
            try:
                return 0, await self._rng.choice(self._servers).call(name, request)
            except Fs3Error as exc:
                if not exc.retryable:
                    return exc.code, None
            if hasattr(request, "op"):
                request.op.resent = True
        raise AssertionError(f"{name} fails again and again")


class Namespace(RuleBasedStateMachine):
    """The services, and beside them the reference."""

    engine = "memory"

    @initialize(seed=st.integers(0, 1 << 16))
    def start(self, seed: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.cleanup = ExitStack()
        self.cleanup.callback(self.loop.close)
        self.rng = random.Random(seed)
        self.store = FaultyStore(self._new_store())
        self.cleanup.callback(lambda: self.run(self.store.close()))
        self.meta = self.run(Meta.start(store=self.store, seed=seed))
        peers = [self.run(self.meta.peer(seed=seed + i)) for i in range(1, SERVICES)]
        # A service that takes every client for dead as soon as it looks.
        self.undertaker = self.run(self.meta.peer(seed=seed + SERVICES, session_ms=0))
        self.client = Client([self.meta, *peers], self.rng)
        self.reference = Reference()
        self.handles: list[Handle] = []
        self.readers: list[Node] = []
        self.inodes: dict[Node, int] = {self.reference.root: 1}
        self.faults = faults(seed, rate=FAULT_RATE)
        self.store.faults = self.faults

    def _new_store(self) -> KvStore:
        if self.engine == "lmdb":
            directory = self.cleanup.enter_context(tempfile.TemporaryDirectory(prefix="fs3-model-"))
            return LmdbKv(directory, durable=False)
        if self.engine == "fdb-fake":
            return FdbKv(os.devnull, binding=FakeFdb(MemoryKv()))
        return engines.new_store(lambda: int(self.loop.time() * 1000))

    def teardown(self) -> None:
        if not hasattr(self, "cleanup"):
            return
        with self.cleanup:
            self.settle()
            with self.calm():
                assert self.run(kinds(self.meta)) == []
            self.check_inode_count()

    def run(self, coro: Any) -> Any:
        return self.loop.run_until_complete(coro)

    # -- doing it on both ---------------------------------------------------------------------------------

    def both(
        self, expected: Callable[[], T], name: str, path: Path | None = None, /, **fields: Any
    ) -> tuple[T, Any] | None:
        """Do it on both; they must agree on success and on the reason. Returns what both answer, None for a refusal."""
        caller = fields.pop("by", None)
        if caller is not None:
            fields["caller"] = pb.Caller(uid=caller.uid, gid=caller.gid, groups=caller.groups)
        request = self.meta.request(name, None if path is None else "/".join(path), **fields)
        wanted: list[T] = []
        try:
            wanted.append(expected())
            codes = frozenset({0})
        except Refused as refused:
            codes = refused.codes
        code, answer = self.run(self.client.call(name, request))
        names = [Code.Name(c) for c in codes]
        assert code in codes, f"{name} gives {Code.Name(code)} instead of {' or '.join(names)}"
        return (wanted[0], answer) if wanted else None

    def settle(self) -> None:
        """Let the garbage collector of a calm store remove what has to go."""
        with self.calm():
            self.run(self.meta.collect())

    @contextmanager
    def calm(self) -> Iterator[None]:
        """Without faults."""
        self.store.faults = None
        try:
            yield
        finally:
            self.store.faults = self.faults

    def drop_gone(self, *nodes: Node | None) -> None:
        """Forget nodes that nothing keeps; their inodes must be gone, too."""
        gone = [node for node in nodes if node is not None and node.gone and node in self.inodes]
        if gone:
            self.settle()
        for node in gone:
            with self.calm():
                assert self.run(self.meta.code("Stat", "", inode=self.inodes.pop(node))) == Code.CODE_STALE_HANDLE

    def opened(self, user: User, node: Node, answer: pb.OpenResponse) -> None:
        if not answer.session:
            return
        node.sessions.add(answer.session)
        version = answer.attr.truncate_version
        assert version == node.truncations
        self.handles.append(Handle(user, node, answer.attr.inode, answer.session, version))

    # -- names --------------------------------------------------------------------------------------------

    @rule(by=users, path=paths, mode=file_modes, exclusive=st.booleans(), truncate=st.booleans(), write=st.booleans())
    def create(self, by: User, path: Path, mode: int, exclusive: bool, truncate: bool, write: bool) -> None:
        done = self.both(
            lambda: self.reference.create(by, path, mode, exclusive=exclusive, truncate=truncate, write=write),
            "Create",
            path,
            by=by,
            mode=mode,
            exclusive=exclusive,
            truncate=truncate,
            open_write=write,
            follow=not exclusive,
        )
        if done:
            self.opened(by, *done)

    @rule(by=users, path=paths, mode=directory_modes)
    def mkdir(self, by: User, path: Path, mode: int) -> None:
        self.both(lambda: self.reference.mkdir(by, path, mode), "Mkdir", path, by=by, mode=mode)

    @rule(by=users, path=paths, to=targets)
    def symlink(self, by: User, path: Path, to: str) -> None:
        self.both(lambda: self.reference.symlink(by, path, to), "Symlink", path, by=by, target=to.encode())

    @rule(by=users, source=paths, dest=paths)
    def link(self, by: User, source: Path, dest: Path) -> None:
        self.both(lambda: self.reference.link(by, source, dest), "Link", by=by, **two_paths(source, dest))

    @rule(by=users, path=paths, held=st.booleans())
    def unlink(self, by: User, path: Path, held: bool) -> None:
        hold = self.rng.randbytes(16) if held else b""
        done = self.both(lambda: self.reference.unlink(by, path, hold), "Unlink", path, by=by, hold_session=hold)
        if done:
            self.held(by, done[0], hold)

    @rule(by=users, path=paths)
    def rmdir(self, by: User, path: Path) -> None:
        done = self.both(lambda: self.reference.rmdir(by, path), "Rmdir", path, by=by)
        if done:
            self.drop_gone(done[0])

    @rule(by=users, path=paths)
    def remove_all(self, by: User, path: Path) -> None:
        done = self.both(lambda: self.reference.remove_all(by, path), "RemoveAll", path, by=by)
        if done:
            # The names below it go one by one.
            self.settle()
            self.drop_gone(*done[0])

    @rule(
        by=users,
        source=paths,
        dest=paths,
        flags=st.sampled_from([(False, False), (False, False), (True, False), (False, True)]),
        held=st.booleans(),
    )
    def rename(self, by: User, source: Path, dest: Path, flags: tuple[bool, bool], held: bool) -> None:
        hold = self.rng.randbytes(16) if held else b""
        options = {"no_replace": flags[0], "exchange": flags[1]}
        done = self.both(
            lambda: self.reference.rename(by, source, dest, hold=hold, **options),
            "Rename",
            by=by,
            hold_session=hold,
            **options,
            **two_paths(source, dest),
        )
        if done and done[0][1] is not None:
            self.held(by, done[0][1], hold)

    def held(self, by: User, node: Node, hold: bytes) -> None:
        """A file may have lost its last name."""
        if hold in node.holds:
            self.handles.append(Handle(by, node, self.inodes[node], hold, node.truncations))
        self.drop_gone(node)

    # -- attributes ---------------------------------------------------------------------------------------

    @rule(by=users, path=st.one_of(paths, st.just(())), mode=st.one_of(file_modes, directory_modes))
    def chmod(self, by: User, path: Path, mode: int) -> None:
        self.both(lambda: self.reference.chmod(by, path, mode), "Setattr", path, by=by, mode=mode, follow=True)

    @rule(by=users, path=paths, uid=st.sampled_from([None, 0, 1000, 1001]), gid=st.sampled_from([None, 0, 1000, 2000]))
    def chown(self, by: User, path: Path, uid: int | None, gid: int | None) -> None:
        fields = {name: number for name, number in (("uid", uid), ("gid", gid)) if number is not None}
        if fields:
            self.both(lambda: self.reference.chown(by, path, uid, gid), "Setattr", path, by=by, follow=True, **fields)

    @rule(by=users, path=paths, times_ns=st.tuples(st.integers(-5, 5), st.integers(-(10**18), 10**18)))
    def utime(self, by: User, path: Path, times_ns: tuple[int, int]) -> None:
        fields = {"atime_ns": times_ns[0], "mtime_ns": times_ns[1], "follow": True}
        self.both(lambda: self.reference.utime(by, path, times_ns), "Setattr", path, by=by, **fields)

    @rule(
        by=users,
        path=paths,
        name=xattr_names,
        value=st.binary(max_size=3),
        flag=st.sampled_from(["", "create", "replace"]),
    )
    def setxattr(self, by: User, path: Path, name: bytes, value: bytes, flag: str) -> None:
        options = {"create": flag == "create", "replace": flag == "replace"}
        self.both(
            lambda: self.reference.setxattr(by, path, name, value, **options),
            "Setxattr",
            path,
            by=by,
            name=name,
            value=value,
            follow=True,
            **options,
        )

    @rule(by=users, path=paths, name=xattr_names)
    def removexattr(self, by: User, path: Path, name: bytes) -> None:
        self.both(
            lambda: self.reference.removexattr(by, path, name), "Removexattr", path, by=by, name=name, follow=True
        )

    @rule(by=users, path=paths, name=xattr_names)
    def getxattr(self, by: User, path: Path, name: bytes) -> None:
        done = self.both(
            lambda: self.reference.getxattr(by, path, name), "Getxattr", path, by=by, name=name, follow=True
        )
        if done:
            assert done[0] == done[1].value

    # -- content ------------------------------------------------------------------------------------------

    @rule(by=users, path=paths, read=st.booleans(), write=st.booleans(), truncate=st.booleans())
    def open(self, by: User, path: Path, read: bool, write: bool, truncate: bool) -> None:
        options = {"read": read, "write": write, "truncate": truncate}
        done = self.both(lambda: self.reference.open(by, path, **options), "Open", path, by=by, follow=True, **options)
        if done:
            self.opened(by, *done)

    @rule(by=users, path=paths, length=lengths)
    def truncate(self, by: User, path: Path, length: int) -> None:
        self.both(
            lambda: self.reference.truncate(by, path, length), "Truncate", path, by=by, length=length, follow=True
        )

    @precondition(lambda self: self.handles)
    @rule(which=st.integers(0, 99), end=lengths)
    def write(self, which: int, end: int) -> None:
        handle = self.handles[which % len(self.handles)]
        if end and handle.session in handle.node.sessions - handle.node.holds:
            with self.calm():
                self.meta.chunks.write(self.run(self.meta.stat("", inode=handle.inode)), end)
            handle.node.stored = max(handle.node.stored, end)
            handle.end = max(handle.end or 0, end)

    @precondition(lambda self: self.handles)
    @rule(which=st.integers(0, 99), count=lengths, lands=st.booleans())
    def append(self, which: int, count: int, lands: bool) -> None:
        handle = self.handles[which % len(self.handles)]
        known = (handle.user, handle.node, handle.session, handle.end, handle.truncations)
        told = pb.WriteReport(wrote=handle.end is not None, length=handle.end or 0, truncate_version=handle.truncations)
        done = self.both(
            lambda: self.reference.append(*known, count + 1),
            "Append",
            inode=handle.inode,
            by=handle.user,
            session=handle.session,
            report=told,
            bytes=count + 1,
        )
        if not done:
            return
        offset, answer = done
        assert answer.offset == offset
        handle.end, handle.truncations = None, answer.attr.truncate_version
        if lands:
            handle.end = offset + count + 1
            self.meta.chunks.write(answer.attr, handle.end, offset)
            handle.node.stored = max(handle.node.stored, handle.end)

    @precondition(lambda self: self.handles)
    @rule(which=st.integers(0, 99), length=lengths)
    def truncate_open(self, which: int, length: int) -> None:
        handle = self.handles[which % len(self.handles)]
        done = self.both(
            lambda: self.reference.truncate_open(handle.user, handle.node, handle.session, length),
            "Truncate",
            (),
            inode=handle.inode,
            by=handle.user,
            length=length,
            session=handle.session,
        )
        if done:
            handle.truncations = done[1].attr.truncate_version

    @precondition(lambda self: self.handles)
    @rule(which=st.integers(0, 99), ends=st.booleans())
    def report(self, which: int, ends: bool) -> None:
        """Sync or close."""
        handle = self.handles[which % len(self.handles)]
        known = (handle.user, handle.node, handle.session, handle.end, handle.truncations)
        told = pb.WriteReport(wrote=handle.end is not None, length=handle.end or 0, truncate_version=handle.truncations)
        expected = self.reference.close if ends else self.reference.report
        self.both(
            lambda: expected(*known),
            "Close" if ends else "Sync",
            inode=handle.inode,
            by=handle.user,
            session=handle.session,
            report=told,
        )
        handle.end = None
        if ends or handle.node.gone:
            self.handles.remove(handle)
            self.drop_gone(handle.node)

    @rule(which=st.integers(0, 99))
    def hold(self, which: int) -> None:
        files = [node for node in self.inodes if node.kind is Kind.FILE and not node.gone and not node.reading]
        if not files:
            return
        node = files[which % len(files)]
        done = self.both(lambda: None, "Hold", begin=[self.inodes[node]])
        assert done is not None
        assert list(done[1].gone) == []
        node.reading = True
        self.readers.append(node)

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, 99))
    def end_hold(self, which: int) -> None:
        node = self.readers.pop(which % len(self.readers))
        self.both(lambda: None, "Hold", end=[self.inodes[node]])
        node.reading = False
        self.drop_gone(node)

    @precondition(lambda self: self.handles or self.readers)
    @rule()
    def clients_die(self) -> None:
        """All of them; the sessions that they leave are ended, but they may come back and not know of it."""
        with self.calm():
            self.run(self.undertaker.engine.reaper.step())
        nodes = dict.fromkeys([*(handle.node for handle in self.handles), *self.readers])
        self.readers.clear()
        for node in nodes:
            self.reference.reap(node)
        self.drop_gone(*nodes)

    # -- comparing ----------------------------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "cleanup"):
            return
        with self.calm():
            self.run(self._compare())

    async def _compare(self) -> None:
        await audit(self.meta)
        server = self.client._servers[self.rng.randrange(SERVICES)]
        self._compare_attr(self.reference.root, await server.stat(""))
        await self._compare_directory(server, self.reference.root)
        for node in dict.fromkeys([*(handle.node for handle in self.handles), *self.readers]):
            if node.links == 0 and not node.gone:
                self._compare_attr(node, await server.stat("", inode=self.inodes[node]))

    async def _compare_directory(self, server: Meta, directory: Node) -> None:
        entries = (await server.do("List", "", inode=self.inodes[directory], with_attr=True)).entries
        assert [entry.name.decode() for entry in entries] == sorted(directory.entries)
        for entry in entries:
            node = directory.entries[entry.name.decode()]
            assert self.inodes.setdefault(node, entry.inode) == entry.inode
            self._compare_attr(node, entry.attr)
            if node.xattrs or entry.attr.xattrs:
                names = (await server.do("Listxattr", "", inode=entry.inode)).names
                assert list(names) == sorted(node.xattrs)
            if node.kind is Kind.DIRECTORY:
                await self._compare_directory(server, node)

    def _compare_attr(self, node: Node, attr: pb.Attr) -> None:
        found = (attr.type, oct(attr.mode), attr.uid, attr.gid, attr.nlink, attr.length, attr.symlink_target.decode())
        mode = oct(node.mode)
        assert found == (TYPES[node.kind], mode, node.uid, node.gid, node.nlink, node.length, node.target)
        if node.times_ns is not None:
            assert (attr.atime_ns, attr.mtime_ns) == node.times_ns

    def check_inode_count(self) -> None:
        named = {id(node) for node in (self.reference.root, *self.reference.root.below())}
        open_nodes = {id(node) for node in [*(h.node for h in self.handles), *self.readers] if not node.gone}
        with self.calm():
            assert self.run(self.meta.do("Statfs", "")).inodes == len(named | open_nodes)


def two_paths(source: Path, dest: Path) -> dict[str, pb.PathAt]:
    at = [pb.PathAt(inode=1, path="/".join(path).encode()) for path in (source, dest)]
    return {"from": at[0], "to": at[1]}


@pytest.mark.parametrize(
    ("engine", "share"), [(engines.ENGINE, 1.0), *((e, 0.25) for e in ("lmdb", "fdb-fake") if e != engines.ENGINE)]
)
def test_services_over_an_unreliable_store_do_what_the_reference_does(engine: str, share: float) -> None:
    machine = type("Namespace", (Namespace,), {"engine": engine})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(1, round(EXAMPLES * share)),
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
