"""Random operations against a namespace of plain dictionaries; the stored one must agree after every step."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.fsck.harness import kinds
from meta.harness import Meta, audit

NAMES = ("a", "b", "c")
paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(tuple)


class File:
    """A file of the model: identity is what hard links share."""


Dir = dict


class Refused(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Model:
    def __init__(self) -> None:
        self.root: dict[str, Any] = {}

    def parent(self, path: tuple[str, ...]) -> dict[str, Any]:
        current: Any = self.root
        for name in path[:-1]:
            if not isinstance(current, dict):
                raise Refused(Code.CODE_NOT_DIRECTORY)
            if name not in current:
                raise Refused(Code.CODE_NOT_FOUND)
            current = current[name]
        if not isinstance(current, dict):
            raise Refused(Code.CODE_NOT_DIRECTORY)
        return current

    def get(self, path: tuple[str, ...]) -> Any:
        parent = self.parent(path)
        if path[-1] not in parent:
            raise Refused(Code.CODE_NOT_FOUND)
        return parent[path[-1]]

    def create(self, path: tuple[str, ...]) -> None:
        parent = self.parent(path)
        if path[-1] in parent:
            raise Refused(Code.CODE_EXISTS)
        parent[path[-1]] = File()

    def mkdir(self, path: tuple[str, ...]) -> None:
        parent = self.parent(path)
        if path[-1] in parent:
            raise Refused(Code.CODE_EXISTS)
        parent[path[-1]] = {}

    def unlink(self, path: tuple[str, ...]) -> None:
        if isinstance(self.get(path), dict):
            raise Refused(Code.CODE_IS_DIRECTORY)
        del self.parent(path)[path[-1]]

    def rmdir(self, path: tuple[str, ...]) -> None:
        node = self.get(path)
        if not isinstance(node, dict):
            raise Refused(Code.CODE_NOT_DIRECTORY)
        if node:
            raise Refused(Code.CODE_NOT_EMPTY)
        del self.parent(path)[path[-1]]

    def remove_all(self, path: tuple[str, ...]) -> None:
        self.get(path)
        del self.parent(path)[path[-1]]

    def link(self, source: tuple[str, ...], dest: tuple[str, ...]) -> None:
        node = self.get(source)
        parent = self.parent(dest)
        if dest[-1] in parent:
            raise Refused(Code.CODE_EXISTS)
        if isinstance(node, dict):
            raise Refused(Code.CODE_NOT_PERMITTED)
        parent[dest[-1]] = node

    def rename(self, source: tuple[str, ...], dest: tuple[str, ...], no_replace: bool, exchange: bool) -> None:
        old, new = self.parent(source), self.parent(dest)
        node = self.get(source)
        other = new.get(dest[-1])
        if other is None and exchange:
            raise Refused(Code.CODE_NOT_FOUND)
        if other is not None and no_replace:
            raise Refused(Code.CODE_EXISTS)
        if other is node:
            return
        if self.inside(new, node) or (exchange and self.inside(old, other)):
            raise Refused(Code.CODE_INVALID_ARGUMENT)
        if exchange:
            old[source[-1]], new[dest[-1]] = other, node
            return
        if isinstance(other, dict):
            if not isinstance(node, dict):
                raise Refused(Code.CODE_IS_DIRECTORY)
            if other:
                raise Refused(Code.CODE_NOT_EMPTY)
        elif other is not None and isinstance(node, dict):
            raise Refused(Code.CODE_NOT_DIRECTORY)
        del old[source[-1]]
        new[dest[-1]] = node

    def inside(self, directory: Any, top: Any) -> bool:
        """Whether `directory` is `top` or below it."""
        if not isinstance(top, dict):
            return False
        return directory is top or any(self.inside(directory, child) for child in top.values())


class Namespace(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.meta = self.loop.run_until_complete(Meta.start())
        self.model = Model()

    def teardown(self) -> None:
        self.loop.run_until_complete(self.meta.collect())
        self.loop.run_until_complete(audit(self.meta))
        assert self.loop.run_until_complete(kinds(self.meta)) == []
        self.loop.close()

    def both(self, expected: Any, name: str, path: tuple[str, ...] | None = None, **fields: Any) -> None:
        """Do it on both; they must agree on success and on the error."""
        code = 0
        try:
            expected()
        except Refused as refused:
            code = refused.code
        text = None if path is None else "/".join(path)
        assert self.loop.run_until_complete(self.meta.code(name, text, **fields)) == code

    @rule(path=paths)
    def create(self, path: tuple[str, ...]) -> None:
        self.both(lambda: self.model.create(path), "Create", path, exclusive=True)

    @rule(path=paths)
    def mkdir(self, path: tuple[str, ...]) -> None:
        self.both(lambda: self.model.mkdir(path), "Mkdir", path, mode=0o755)

    @rule(path=paths)
    def unlink(self, path: tuple[str, ...]) -> None:
        self.both(lambda: self.model.unlink(path), "Unlink", path)

    @rule(path=paths)
    def rmdir(self, path: tuple[str, ...]) -> None:
        self.both(lambda: self.model.rmdir(path), "Rmdir", path)

    @rule(path=paths)
    def remove_all(self, path: tuple[str, ...]) -> None:
        self.both(lambda: self.model.remove_all(path), "RemoveAll", path)

    @rule(source=paths, dest=paths)
    def link(self, source: tuple[str, ...], dest: tuple[str, ...]) -> None:
        self.both(lambda: self.model.link(source, dest), "Link", **named(source, dest))

    @rule(source=paths, dest=paths, flags=st.sampled_from([(False, False), (True, False), (False, True)]))
    def rename(self, source: tuple[str, ...], dest: tuple[str, ...], flags: tuple[bool, bool]) -> None:
        fields = {**named(source, dest), "no_replace": flags[0], "exchange": flags[1]}
        self.both(lambda: self.model.rename(source, dest, *flags), "Rename", **fields)

    @rule()
    def collect(self) -> None:
        self.loop.run_until_complete(self.meta.collect())

    @invariant()
    def agrees(self) -> None:
        self.loop.run_until_complete(self.compare())

    async def compare(self) -> None:
        await audit(self.meta)
        links: dict[int, int] = {}
        count_links(self.model.root, links)
        inodes: dict[int, int] = {}

        async def walk(node: dict[str, Any], inode: int) -> None:
            entries = (await self.meta.do("List", "", inode=inode, with_attr=True)).entries
            assert [e.name.decode() for e in entries] == sorted(node)
            for entry in entries:
                child = node[entry.name.decode()]
                if isinstance(child, dict):
                    assert entry.type == pb.FILE_TYPE_DIRECTORY
                    assert entry.attr.nlink == 2 + sum(isinstance(c, dict) for c in child.values())
                    await walk(child, entry.inode)
                else:
                    assert entry.attr.nlink == links[id(child)]
                    assert inodes.setdefault(id(child), entry.inode) == entry.inode

        await walk(self.model.root, 1)


def named(source: tuple[str, ...], dest: tuple[str, ...]) -> dict[str, pb.PathAt]:
    at = [pb.PathAt(inode=1, path="/".join(path).encode()) for path in (source, dest)]
    return {"from": at[0], "to": at[1]}


def count_links(node: dict[str, Any], links: dict[int, int]) -> None:
    for child in node.values():
        if isinstance(child, dict):
            count_links(child, links)
        else:
            links[id(child)] = links.get(id(child), 0) + 1


TestNamespace = Namespace.TestCase
TestNamespace.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
