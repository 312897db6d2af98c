"""Is there one order of all operations on names that explains every answer? A history, its rules, and the search.

The search is Wing and Gong's with Lowe's memory, as in ``fs3-sim/src/check_search.rs``: an operation may come next when
no other, not yet placed, ended before it began; a set of placed operations that left the same names behind is not tried
twice. What only looks and fits is placed at once. Operations without an answer may be placed late, or never.

Histories are divided where nothing was under way and every outcome is known: each part begins with what the part before
it may have left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from fs3.v1.frame_pb2 import Code

# Steps of one search before it gives up: such a history says nothing.
STEPS_MAX: Final = 400_000
ROOT: Final = 1

Path = tuple[str, ...]
# (parent, name) -> (inode, whether it is a directory), in the order of keys. An inode below 0 is one that nobody has
# been told of: that of the operation with this number.
Names = tuple[tuple[tuple[int, str], tuple[int, bool]], ...]


@dataclass(frozen=True)
class Answer:
    """What a caller was told: an error code, or 0 with the inode and its link count where there are any."""

    code: int = 0
    inode: int = 0
    nlink: int = 0


@dataclass
class Operation:
    """One call. Times are of one clock; `answer` None: it never came, and the effect may come at any time or never."""

    kind: str
    path: Path
    to: Path = ()
    began: float = 0.0
    ended: float = float("inf")
    answer: Answer | None = None
    number: int = 0

    def __str__(self) -> str:
        to = f" -> /{'/'.join(self.to)}" if self.to else ""
        told = "no answer" if self.answer is None else Code.Name(self.answer.code) if self.answer.code else self.answer
        return f"[{self.began:.6f} .. {self.ended:.6f}] {self.kind} /{'/'.join(self.path)}{to}: {told}"


class _Failed(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class Tree:
    """Names at one moment, to be changed by one operation."""

    entries: dict[tuple[int, str], tuple[int, bool]]

    @classmethod
    def of(cls, names: Names) -> Tree:
        return cls(dict(names))

    def frozen(self) -> Names:
        return tuple(sorted(self.entries.items()))

    def parent(self, path: Path) -> int:
        current = ROOT
        for name in path[:-1]:
            found = self.entries.get((current, name))
            if found is None:
                raise _Failed(Code.CODE_NOT_FOUND)
            if not found[1]:
                raise _Failed(Code.CODE_NOT_DIRECTORY)
            current = found[0]
        return current

    def get(self, path: Path) -> tuple[int, bool]:
        found = self.entries.get((self.parent(path), path[-1]))
        if found is None:
            raise _Failed(Code.CODE_NOT_FOUND)
        return found

    def is_empty(self, inode: int) -> bool:
        return all(parent != inode for parent, _ in self.entries)

    def nlink(self, inode: int, directory: bool) -> int:
        if directory:
            return 2 + sum(is_dir for (parent, _), (_, is_dir) in self.entries.items() if parent == inode)
        return sum(found == (inode, False) for found in self.entries.values())

    def inside(self, inode: int, top: int) -> bool:
        """Whether directory `inode` is `top` or below it."""
        while inode != top:
            above = [parent for (parent, _), found in self.entries.items() if found == (inode, True)]
            if not above:
                return False
            inode = above[0]
        return True

    # -- the operations: each returns the inode it answers with, 0 for none -------------------------------

    def make(self, operation: Operation, new: int) -> int:
        key = (self.parent(operation.path), operation.path[-1])
        if key in self.entries:
            raise _Failed(Code.CODE_EXISTS)
        self.entries[key] = (new, operation.kind == "mkdir")
        return new

    def lookup(self, operation: Operation) -> int:
        return self.get(operation.path)[0]

    def unlink(self, operation: Operation) -> int:
        if self.get(operation.path)[1]:
            raise _Failed(Code.CODE_IS_DIRECTORY)
        del self.entries[self.parent(operation.path), operation.path[-1]]
        return 0

    def rmdir(self, operation: Operation) -> int:
        inode, directory = self.get(operation.path)
        if not directory:
            raise _Failed(Code.CODE_NOT_DIRECTORY)
        if not self.is_empty(inode):
            raise _Failed(Code.CODE_NOT_EMPTY)
        del self.entries[self.parent(operation.path), operation.path[-1]]
        return 0

    def link(self, operation: Operation) -> int:
        found = self.get(operation.path)
        key = (self.parent(operation.to), operation.to[-1])
        if key in self.entries:
            raise _Failed(Code.CODE_EXISTS)
        if found[1]:
            raise _Failed(Code.CODE_NOT_PERMITTED)
        self.entries[key] = found
        return found[0]

    def rename(self, operation: Operation) -> int:
        old, new = self.parent(operation.path), self.parent(operation.to)
        inode, directory = self.get(operation.path)
        key = (new, operation.to[-1])
        other = self.entries.get(key)
        if other == (inode, directory):
            return inode
        if directory and self.inside(new, inode):
            raise _Failed(Code.CODE_INVALID_ARGUMENT)
        if other is not None:
            self._check_replaceable(directory, other)
        del self.entries[old, operation.path[-1]]
        self.entries[key] = (inode, directory)
        return inode

    def _check_replaceable(self, directory: bool, other: tuple[int, bool]) -> None:
        if other[1]:
            if not directory:
                raise _Failed(Code.CODE_IS_DIRECTORY)
            if not self.is_empty(other[0]):
                raise _Failed(Code.CODE_NOT_EMPTY)
        elif directory:
            raise _Failed(Code.CODE_NOT_DIRECTORY)

    def identified(self, unknown: int, inode: int) -> None:
        """An inode that nobody had been told of turns out to be `inode`."""
        for (parent, name), (child, directory) in list(self.entries.items()):
            if unknown in (parent, child):
                del self.entries[parent, name]
                key = (inode if parent == unknown else parent, name)
                self.entries[key] = (inode if child == unknown else child, directory)


_RULES: Final = {
    "create": Tree.make,
    "mkdir": Tree.make,
    "lookup": Tree.lookup,
    "unlink": Tree.unlink,
    "rmdir": Tree.rmdir,
    "link": Tree.link,
    "rename": Tree.rename,
}
MAKES: Final = frozenset({"create", "mkdir"})


def apply(names: Names, operation: Operation, told: frozenset[int]) -> Names | None:
    """The names after `operation`; None when its answer is not what it would be told with these names.

    `told`: the inodes that makers were told of; an inode of unknown origin is none of them.
    """
    tree, answer = Tree.of(names), operation.answer
    rule = _RULES[operation.kind]
    new = answer.inode if answer is not None and answer.inode else -operation.number
    try:
        inode = rule(tree, operation, new) if operation.kind in MAKES else rule(tree, operation)  # type: ignore[operator]
    except _Failed as failed:
        # Without an answer it may as well have failed.
        return names if answer is None or answer.code == failed.code else None
    if answer is None:
        return tree.frozen()
    if answer.code:
        return None
    if answer.inode and inode != answer.inode:
        if inode > 0 or answer.inode in told:
            return None
        tree.identified(inode, answer.inode)
        inode = answer.inode
    if answer.inode:
        directory = any(found == (inode, True) for found in tree.entries.values())
        if answer.nlink != tree.nlink(inode, directory):
            return None
    return tree.frozen()


@dataclass(frozen=True)
class _State:
    names: Names
    # First operation with an answer that is not placed.
    next: int
    # Placed ones after `next`, and placed ones without an answer.
    placed: frozenset[int]


@dataclass
class _Search:
    operations: list[Operation]
    told: frozenset[int]
    tried: set[_State] = field(default_factory=set)
    steps: int = 0
    furthest: int = 0

    def ends(self, starts: set[Names]) -> set[Names] | None:
        """Every state that an order leads to; empty when there is none, None when the search gave up."""
        found: set[Names] = set()
        stack = [self._settled(_State(names, 0, frozenset())) for names in starts]
        while stack:
            state = stack.pop()
            if state in self.tried:
                continue
            self.tried.add(state)
            self.steps += 1
            if self.steps > STEPS_MAX:
                return None
            self.furthest = max(self.furthest, state.next)
            if state.next == len(self.operations):
                found.add(state.names)
            for index in self._minimal(state):
                after = apply(state.names, self.operations[index], self.told)
                if after is not None:
                    stack.append(self._settled(self._place(state, index, after)))
        return found

    def _place(self, state: _State, index: int, names: Names) -> _State:
        return _State(names, state.next, state.placed | {index})

    def _settled(self, state: _State) -> _State:
        """Place what looks and fits, and move on past what is placed; what has no answer need not be."""
        again = True
        while again:
            following, placed = state.next, state.placed
            while following < len(self.operations) and (
                following in placed or self.operations[following].answer is None
            ):
                if self.operations[following].answer is not None:
                    placed -= {following}
                following += 1
            state = _State(state.names, following, placed)
            again = False
            for index in self._minimal(state):
                operation = self.operations[index]
                if operation.answer is None or not (operation.kind == "lookup" or operation.answer.code):
                    continue
                if apply(state.names, operation, self.told) == state.names:
                    state, again = self._place(state, index, state.names), True
                    break
        return state

    def _minimal(self, state: _State) -> Iterator[int]:
        """Operations that may come next."""
        bound = float("inf")
        for index in range(state.next, len(self.operations)):
            operation = self.operations[index]
            if operation.began > bound:
                break
            if index not in state.placed:
                bound = min(bound, operation.ended)
        for index, operation in enumerate(self.operations):
            if operation.began > bound:
                return
            if index not in state.placed and (index >= state.next or operation.answer is None):
                yield index


def parts(history: list[Operation]) -> Iterator[list[Operation]]:
    """Cut a history, in order of beginning, at moments when nothing is under way."""
    part: list[Operation] = []
    until = 0.0
    for operation in history:
        if part and operation.began > until:
            yield part
            part = []
        part.append(operation)
        until = max(until, operation.ended)
    if part:
        yield part


def explain(history: list[Operation], names: Names = ()) -> str | None:
    """None when some order explains the history that began with `names`; else where every order fails.

    Raises OverflowError when the search gave up.
    """
    ordered = sorted(history, key=lambda operation: (operation.began, operation.ended))
    for number, operation in enumerate(ordered, 1):
        operation.number = number
    told = frozenset(o.answer.inode for o in ordered if o.kind in MAKES and o.answer is not None and o.answer.inode)
    states = {names}
    for part in parts(ordered):
        search = _Search(part, told)
        ends = search.ends(states)
        if ends is None:
            raise OverflowError(f"the search gave up after {STEPS_MAX} steps")
        if not ends:
            lines = [f"{'-> ' if i == search.furthest else '   '}{o}" for i, o in enumerate(part)]
            return "no order explains these operations; all before the arrow can be:\n" + "\n".join(lines)
        states = ends
    return None
