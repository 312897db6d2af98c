"""Random operations under nested quotas against plain dictionaries that are counted anew at every step."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fs3.meta.ops.quota_set import NO_LIMIT
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.fsck.harness import kinds
from meta.harness import Meta, audit, code

Path = tuple[str, ...]

paths = st.lists(st.sampled_from(("a", "b", "c")), min_size=1, max_size=4).map(tuple)
lengths = st.integers(0, 200)
limits = st.one_of(st.none(), st.integers(0, 8))


class Refused(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class File:
    def __init__(self) -> None:
        self.length = 0


class Limits:
    """The limits of a quota; None: without."""

    def __init__(self) -> None:
        self.inodes: int | None = None
        self.bytes: int | None = None


class Directory(dict[str, Any]):
    """Entries, and the quota if there is one."""

    quota: Limits | None = None


def usage(node: Any) -> tuple[int, int]:
    """(inodes, bytes) of a node and what is below it."""
    if isinstance(node, File):
        return 1, node.length
    below = [usage(child) for child in node.values()]
    return 1 + sum(inodes for inodes, _ in below), sum(length for _, length in below)


class Model:
    def __init__(self) -> None:
        self.root = Directory()

    def parent(self, path: Path) -> Directory:
        current: Any = self.root
        for name in path[:-1]:
            if isinstance(current, File):
                raise Refused(Code.CODE_NOT_DIRECTORY)
            if name not in current:
                raise Refused(Code.CODE_NOT_FOUND)
            current = current[name]
        if isinstance(current, File):
            raise Refused(Code.CODE_NOT_DIRECTORY)
        assert isinstance(current, Directory)
        return current

    def get(self, path: Path) -> Any:
        parent = self.parent(path)
        if path[-1] not in parent:
            raise Refused(Code.CODE_NOT_FOUND)
        return parent[path[-1]]

    def chain(self, path: Path) -> list[Directory]:
        """The directories with a quota that count what is in the directory `path`, the innermost first."""
        found, current = [], self.root
        for name in path:
            current = current[name]
            if current.quota is not None:
                found.append(current)
        return found[::-1]

    def require_room(self, chain: list[Directory], inodes: int, length: int, less: tuple[int, int] = (0, 0)) -> None:
        """`less`: what goes before."""
        for directory in chain:
            assert directory.quota is not None
            used = usage(directory)
            limits = directory.quota.inodes, directory.quota.bytes
            for count, gone, more, limit in zip(used, less, (inodes, length), limits, strict=True):
                if limit is not None and more > max(0, limit - count + gone):
                    raise Refused(Code.CODE_QUOTA_EXCEEDED)

    def add(self, path: Path, node: Any) -> None:
        parent = self.parent(path)
        if path[-1] in parent:
            raise Refused(Code.CODE_EXISTS)
        self.require_room(self.chain(path[:-1]), 1, 0)
        parent[path[-1]] = node

    def write(self, path: Path, length: int) -> None:
        if path[-1] not in self.parent(path):
            self.add(path, File())
        node = self.get(path)
        if isinstance(node, dict):
            raise Refused(Code.CODE_IS_DIRECTORY)
        node.length = max(node.length, length)

    def truncate(self, path: Path, length: int) -> None:
        node = self.get(path)
        if isinstance(node, dict):
            raise Refused(Code.CODE_IS_DIRECTORY)
        self.require_room(self.chain(path[:-1]), 0, length - node.length)
        node.length = length

    def unlink(self, path: Path) -> None:
        if isinstance(self.get(path), Directory):
            raise Refused(Code.CODE_IS_DIRECTORY)
        del self.parent(path)[path[-1]]

    def rmdir(self, path: Path) -> None:
        node = self.get(path)
        if isinstance(node, File):
            raise Refused(Code.CODE_NOT_DIRECTORY)
        if node:
            raise Refused(Code.CODE_NOT_EMPTY)
        del self.parent(path)[path[-1]]

    def remove_all(self, path: Path) -> None:
        self.get(path)
        del self.parent(path)[path[-1]]

    def rename(self, source: Path, dest: Path, no_replace: bool, exchange: bool) -> None:
        old, new = self.parent(source), self.parent(dest)
        node, other = self.get(source), new.get(dest[-1])
        if other is None and exchange:
            raise Refused(Code.CODE_NOT_FOUND)
        if other is not None and no_replace:
            raise Refused(Code.CODE_EXISTS)
        if other is node:
            return
        self.check_move(source, dest, node, other, exchange)
        if self.inside(new, node) or (exchange and self.inside(old, other)):
            raise Refused(Code.CODE_INVALID_ARGUMENT)
        if exchange:
            old[source[-1]], new[dest[-1]] = other, node
            return
        if isinstance(other, Directory):
            if isinstance(node, File):
                raise Refused(Code.CODE_IS_DIRECTORY)
            if other:
                raise Refused(Code.CODE_NOT_EMPTY)
        elif other is not None and isinstance(node, Directory):
            raise Refused(Code.CODE_NOT_DIRECTORY)
        del old[source[-1]]
        new[dest[-1]] = node

    def inside(self, directory: Directory, top: Any) -> bool:
        """Whether `directory` is `top` or below it."""
        if isinstance(top, File):
            return False
        return directory is top or any(self.inside(directory, child) for child in top.values())

    def check_move(self, source: Path, dest: Path, node: Any, other: Any, exchange: bool) -> None:
        """Raise what is refused because of quotas, and what is refused before that."""
        here, there = self.chain(source[:-1]), self.chain(dest[:-1])
        if here[:1] == there[:1]:
            return
        if isinstance(node, dict):
            raise Refused(Code.CODE_CROSS_QUOTA)
        if isinstance(other, dict):
            raise Refused(Code.CODE_CROSS_QUOTA if exchange else Code.CODE_IS_DIRECTORY)
        entered = [top for top in there if not any(top is also for also in here)]
        left = [top for top in here if not any(top is also for also in there)]
        if exchange:
            self.require_room(entered, *usage(node))
            self.require_room(left, *usage(other), less=usage(node))
        else:
            self.require_room(entered, *usage(node), less=(0, 0) if other is None else usage(other))

    def set_quota(self, path: Path, inodes: int | None, length: int | None) -> None:
        node = self.get(path)
        if not isinstance(node, dict):
            raise Refused(Code.CODE_NOT_DIRECTORY)
        node.quota = Limits()
        node.quota.inodes, node.quota.bytes = inodes, length

    def clear_quota(self, path: Path) -> None:
        node = self.get(path)
        if not isinstance(node, dict):
            raise Refused(Code.CODE_NOT_DIRECTORY)
        if node.quota is None:
            raise Refused(Code.CODE_NOT_FOUND)
        node.quota = None

    def used(self, node: Any = None, path: str = "") -> dict[bytes, tuple[int, int]]:
        """What each quota counts, by path."""
        node = self.root if node is None else node
        found = {} if node.quota is None else {path.encode(): usage(node)}
        for name, child in node.items():
            if isinstance(child, dict):
                found |= self.used(child, f"{path}/{name}")
        return found


class Quotas(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.meta = self.wait(Meta.start())
        self.model = Model()

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        self.wait(self.meta.collect())
        self.wait(self.meta.settle_quotas())
        self.wait(audit(self.meta))
        assert self.wait(kinds(self.meta)) == []
        self.loop.close()

    def both(self, expected: Any, work: Coroutine[Any, Any, Any]) -> None:
        """Do it on both; they must agree on success and on the error."""
        refused = 0
        try:
            expected()
        except Refused as exc:
            refused = exc.code
        assert self.wait(code(work)) == refused

    @rule(path=paths, length=lengths)
    def write(self, path: Path, length: int) -> None:
        self.both(lambda: self.model.write(path, length), self.meta.write("/".join(path), length))

    @rule(path=paths, length=lengths)
    def truncate(self, path: Path, length: int) -> None:
        self.both(lambda: self.model.truncate(path, length), self.meta.do("Truncate", "/".join(path), length=length))

    @rule(path=paths)
    def mkdir(self, path: Path) -> None:
        self.both(lambda: self.model.add(path, Directory()), self.meta.mkdir("/".join(path)))

    @rule(path=paths)
    def unlink(self, path: Path) -> None:
        self.both(lambda: self.model.unlink(path), self.meta.do("Unlink", "/".join(path)))

    @rule(path=paths)
    def rmdir(self, path: Path) -> None:
        self.both(lambda: self.model.rmdir(path), self.meta.do("Rmdir", "/".join(path)))

    @rule(path=paths)
    def remove_all(self, path: Path) -> None:
        self.both(lambda: self.model.remove_all(path), self.meta.do("RemoveAll", "/".join(path)))
        self.wait(self.meta.collect())

    @rule(source=paths, dest=paths, flags=st.sampled_from([(False, False), (True, False), (False, True)]))
    def rename(self, source: Path, dest: Path, flags: tuple[bool, bool]) -> None:
        fields = {**named(source, dest), "no_replace": flags[0], "exchange": flags[1]}
        self.both(lambda: self.model.rename(source, dest, *flags), self.meta.do("Rename", **fields))

    @rule(path=paths, inodes=limits, length=st.one_of(st.none(), lengths))
    def set_quota(self, path: Path, inodes: int | None, length: int | None) -> None:
        fields = {
            "inodes_max": NO_LIMIT if inodes is None else inodes,
            "bytes_max": NO_LIMIT if length is None else length,
        }
        request = self.meta.do("QuotaSet", "/".join(path), **fields)
        self.both(lambda: self.model.set_quota(path, inodes, length), request)
        self.wait(self.meta.settle_quotas())

    @rule(path=paths)
    def clear_quota(self, path: Path) -> None:
        request = self.meta.do("QuotaSet", "/".join(path), clear=True)
        self.both(lambda: self.model.clear_quota(path), request)
        self.wait(self.meta.settle_quotas())

    @invariant()
    def agrees(self) -> None:
        self.wait(audit(self.meta))
        self.wait(self.meta.settle_quotas())
        listed = self.wait(self.meta.do("QuotaList")).quotas
        assert {quota.path: (quota.inodes, quota.bytes) for quota in listed} == self.model.used()


def named(source: Path, dest: Path) -> dict[str, pb.PathAt]:
    at = [pb.PathAt(inode=1, path="/".join(path).encode()) for path in (source, dest)]
    return {"from": at[0], "to": at[1]}


TestQuotas = Quotas.TestCase
TestQuotas.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
