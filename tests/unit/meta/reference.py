"""What the metadata service has to do, as plain objects: a file system with one caller at a time that never fails.

An operation that cannot be done raises :class:`Refused` with every reason there is: which of several a caller is told
is not promised. Paths are tuples of names from the root; targets of symbolic links end with a name.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

from fs3.v1.frame_pb2 import Code

SYMLINKS_MAX = 40
READ, WRITE, SEARCH = 4, 2, 1
SET_UID, SET_GID, STICKY = 0o4000, 0o2000, 0o1000

Path = tuple[str, ...]


class Refused(Exception):
    """The operation fails with one of these codes and changes nothing."""

    def __init__(self, *codes: int) -> None:
        super().__init__(*codes)
        self.codes = frozenset(codes)


def refuse(*reasons: tuple[bool, int]) -> None:
    """Raise Refused with the codes of the reasons that hold."""
    codes = [code for holds, code in reasons if holds]
    if codes:
        raise Refused(*codes)


class Kind(enum.Enum):
    """What an inode is."""

    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3


@dataclass(frozen=True)
class User:
    """Who calls."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    def member_of(self, gid: int) -> bool:
        """Whether a group is one of the user's."""
        return gid == self.gid or gid in self.groups


@dataclass(eq=False)
class Node:
    """An inode; its identity is what hard links share.

    ``stored``: the end of the bytes that storage has; ``reserved``: of those that appends have been given.
    """

    kind: Kind
    mode: int
    uid: int
    gid: int
    links: int = 1
    length: int = 0
    stored: int = 0
    reserved: int = 0
    truncations: int = 0
    target: str = ""
    parent: Node | None = None
    entries: dict[str, Node] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    # Session ids; those that only hold an unlinked file are in `holds` too.
    sessions: set[bytes] = field(default_factory=set)
    holds: set[bytes] = field(default_factory=set)
    # A client has said that it is open for reading.
    reading: bool = False
    # Explicit times; None: the service's clock has set them since.
    times_ns: tuple[int, int] | None = None

    @property
    def gone(self) -> bool:
        """Whether neither a name nor a client keeps it."""
        return self.links == 0 and not self.sessions and not self.reading

    @property
    def nlink(self) -> int:
        """Link count as callers see it."""
        if self.kind is not Kind.DIRECTORY:
            return self.links
        return 2 + sum(child.kind is Kind.DIRECTORY for child in self.entries.values()) if self.links else 0

    def allows(self, user: User, want: int) -> bool:
        """Whether the permission bits grant all of `want`."""
        if user.uid == 0:
            return True
        shift = 6 if user.uid == self.uid else 3 if user.member_of(self.gid) else 0
        return self.mode >> shift & want == want

    def owned_by(self, user: User) -> bool:
        """Whether the user may do what only owners do."""
        return user.uid in (0, self.uid)

    def protects(self, child: Node, user: User) -> bool:
        """Whether the sticky bit keeps the user from taking `child` away."""
        return bool(self.mode & STICKY) and not self.owned_by(user) and not child.owned_by(user)

    def contains(self, other: Node) -> bool:
        """Whether `other` is this directory or below it."""
        above: Node | None = other
        while above is not None and above is not self:
            above = above.parent
        return above is self

    def below(self) -> Iterator[Node]:
        """Every node below this one, once per name."""
        for child in self.entries.values():
            yield child
            yield from child.below()

    def content_changed(self, user: User) -> None:
        """Somebody wrote: times, and set-id bits."""
        self.times_ns = None
        if user.uid:
            self.drop_set_id()

    def drop_set_id(self) -> None:
        """No set-uid, and no set-gid where the group executes."""
        self.mode &= ~SET_UID
        if self.mode & 0o010:
            self.mode &= ~SET_GID


@dataclass(frozen=True)
class Place:
    """Where a path leads: the directory, the name in it, and what has that name."""

    parent: Node
    name: str
    node: Node | None

    def existing(self) -> Node:
        """What is there. Raises Refused."""
        if self.node is None:
            raise Refused(Code.CODE_NOT_FOUND)
        return self.node


class Reference:
    """The file system."""

    def __init__(self) -> None:
        self.root = Node(Kind.DIRECTORY, 0o755, 0, 0)

    # -- paths --------------------------------------------------------------------------------------------

    def find(self, user: User, path: Path, *, follow: bool = False) -> Place:
        """Walk; symbolic links on the way are followed, and the last one if `follow`. Raises Refused."""
        parts, current, links = list(reversed(path)), self.root, 0
        while True:
            name = parts.pop()
            refuse((current.kind is not Kind.DIRECTORY, Code.CODE_NOT_DIRECTORY))
            refuse((not current.allows(user, SEARCH), Code.CODE_ACCESS))
            if name == "..":
                current = current.parent or current
                continue
            child = current.entries.get(name)
            refuse((child is None and bool(parts), Code.CODE_NOT_FOUND))
            if child is not None and child.kind is Kind.SYMLINK and (parts or follow):
                links += 1
                refuse((links > SYMLINKS_MAX, Code.CODE_SYMLINK_LOOP))
                if child.target.startswith("/"):
                    current = self.root
                parts += reversed(child.target.strip("/").split("/"))
                continue
            if not parts:
                return Place(current, name, child)
            assert child is not None
            current = child

    def get(self, user: User, path: Path) -> Node:
        """What a path names, links followed; the empty path is the root. Raises Refused."""
        return self.find(user, path, follow=True).existing() if path else self.root

    # -- names --------------------------------------------------------------------------------------------

    def _make(self, user: User, place: Place, kind: Kind, mode: int, target: str = "") -> Node:
        above = place.parent
        refuse((not above.allows(user, WRITE), Code.CODE_ACCESS))
        inherits = bool(above.mode & SET_GID)
        node = Node(kind, mode, user.uid, above.gid if inherits else user.gid, target=target)
        if inherits and kind is Kind.DIRECTORY:
            node.mode |= SET_GID
        elif node.mode & SET_GID and node.mode & 0o010 and user.uid and not user.member_of(node.gid):
            node.mode &= ~SET_GID
        node.parent = above if kind is Kind.DIRECTORY else None
        node.length = len(target)
        above.entries[place.name] = node
        above.times_ns = None
        return node

    def _add(self, place: Place, node: Node) -> None:
        place.parent.entries[place.name] = node
        place.parent.times_ns = None
        if node.kind is Kind.DIRECTORY:
            node.parent = place.parent

    def _drop(self, node: Node, hold: bytes = b"") -> None:
        """One name less."""
        node.links -= 1
        if node.links == 0 and hold and hold not in node.sessions:
            node.sessions.add(hold)
            node.holds.add(hold)

    def _forget(self, place: Place) -> None:
        del place.parent.entries[place.name]
        place.parent.times_ns = None

    def create(self, user: User, path: Path, mode: int, *, exclusive: bool, truncate: bool, write: bool) -> Node:
        """Make a file or open the one that is there."""
        place = self.find(user, path, follow=not exclusive)
        if place.node is None:
            return self._make(user, place, Kind.FILE, mode)
        refuse((exclusive, Code.CODE_EXISTS))
        refuse((place.node.kind is Kind.DIRECTORY, Code.CODE_IS_DIRECTORY))
        return self._open(user, place.node, read=False, write=write, truncate=truncate)

    def open(self, user: User, path: Path, *, read: bool, write: bool, truncate: bool) -> Node:
        """Check what an open checks, and truncate."""
        return self._open(user, self.get(user, path), read=read, write=write, truncate=truncate)

    def _open(self, user: User, node: Node, *, read: bool, write: bool, truncate: bool) -> Node:
        changes = write or truncate
        refuse(
            (node.kind is Kind.DIRECTORY and changes, Code.CODE_IS_DIRECTORY),
            (not node.allows(user, READ * read | WRITE * changes), Code.CODE_ACCESS),
        )
        if truncate:
            self._cut(user, node, 0)
        return node

    def mkdir(self, user: User, path: Path, mode: int) -> Node:
        """Make a directory."""
        place = self.find(user, path)
        refuse((place.node is not None, Code.CODE_EXISTS))
        return self._make(user, place, Kind.DIRECTORY, mode)

    def symlink(self, user: User, path: Path, target: str) -> Node:
        """Make a symbolic link."""
        place = self.find(user, path)
        refuse((place.node is not None, Code.CODE_EXISTS))
        return self._make(user, place, Kind.SYMLINK, 0o777, target)

    def link(self, user: User, source: Path, dest: Path) -> Node:
        """Make another name."""
        node, place = self.find(user, source).existing(), self.find(user, dest)
        refuse(
            (place.node is not None, Code.CODE_EXISTS),
            (node.kind is Kind.DIRECTORY, Code.CODE_NOT_PERMITTED),
            (not place.parent.allows(user, WRITE), Code.CODE_ACCESS),
        )
        node.links += 1
        self._add(place, node)
        return node

    def _removable(self, user: User, path: Path) -> tuple[Place, Node, list[tuple[bool, int]]]:
        place = self.find(user, path)
        node, parent = place.existing(), place.parent
        denied = not parent.allows(user, WRITE)
        return place, node, [(denied, Code.CODE_ACCESS), (parent.protects(node, user), Code.CODE_NOT_PERMITTED)]

    def unlink(self, user: User, path: Path, hold: bytes) -> Node:
        """Remove a name that is not a directory's."""
        place, node, reasons = self._removable(user, path)
        refuse(*reasons, (node.kind is Kind.DIRECTORY, Code.CODE_IS_DIRECTORY))
        self._forget(place)
        self._drop(node, hold)
        return node

    def rmdir(self, user: User, path: Path) -> Node:
        """Remove an empty directory."""
        place, node, reasons = self._removable(user, path)
        reasons.append((node.kind is not Kind.DIRECTORY, Code.CODE_NOT_DIRECTORY))
        refuse(*reasons, (bool(node.entries), Code.CODE_NOT_EMPTY))
        self._forget(place)
        self._drop(node)
        return node

    def remove_all(self, user: User, path: Path) -> list[Node]:
        """Remove what is there and everything below it; who could not do it piece by piece cannot do it at once."""
        place, node, reasons = self._removable(user, path)
        nodes = [node, *node.below()]
        for directory in (n for n in nodes if n.entries):
            reasons.append((not directory.allows(user, READ | WRITE | SEARCH), Code.CODE_ACCESS))
            protected = any(directory.protects(child, user) for child in directory.entries.values())
            reasons.append((protected, Code.CODE_NOT_PERMITTED))
        refuse(*reasons)
        self._forget(place)
        for each in nodes:
            self._drop(each)
            each.entries = {}
        return nodes

    def rename(
        self, user: User, source: Path, dest: Path, *, no_replace: bool, exchange: bool, hold: bytes
    ) -> tuple[Node, Node | None]:
        """Move, replace or exchange; returns what was moved, and what had the name before."""
        old, new = self.find(user, source), self.find(user, dest)
        node, other = old.existing(), new.node
        if other is node:
            refuse((no_replace, Code.CODE_EXISTS))
            return node, other
        refuse(
            (other is None and exchange, Code.CODE_NOT_FOUND),
            (other is not None and no_replace, Code.CODE_EXISTS),
            *self._move_reasons(user, old, new, node, other),
            *(self._move_reasons(user, new, old, other, node) if exchange and other is not None else ()),
            *(self._replace_reasons(node, other) if other is not None and not exchange else ()),
        )
        self._forget(old)
        if exchange:
            assert other is not None
            self._add(old, other)
        elif other is not None:
            self._drop(other, hold)
        self._add(new, node)
        return node, other

    @staticmethod
    def _move_reasons(user: User, old: Place, new: Place, node: Node, other: Node | None) -> list[tuple[bool, int]]:
        moves = node.kind is Kind.DIRECTORY and old.parent is not new.parent
        return [
            (not old.parent.allows(user, WRITE) or not new.parent.allows(user, WRITE), Code.CODE_ACCESS),
            (old.parent.protects(node, user), Code.CODE_NOT_PERMITTED),
            (other is not None and new.parent.protects(other, user), Code.CODE_NOT_PERMITTED),
            (moves and not node.allows(user, WRITE), Code.CODE_ACCESS),
            (node.kind is Kind.DIRECTORY and node.contains(new.parent), Code.CODE_INVALID_ARGUMENT),
        ]

    @staticmethod
    def _replace_reasons(node: Node, other: Node) -> list[tuple[bool, int]]:
        kinds = [n.kind is Kind.DIRECTORY for n in (node, other)]
        return [
            (kinds == [False, True], Code.CODE_IS_DIRECTORY),
            (kinds == [True, False], Code.CODE_NOT_DIRECTORY),
            (bool(other.entries), Code.CODE_NOT_EMPTY),
        ]

    # -- attributes ---------------------------------------------------------------------------------------

    def chmod(self, user: User, path: Path, mode: int) -> Node:
        """Set the permission bits."""
        node = self.get(user, path)
        refuse((not node.owned_by(user), Code.CODE_NOT_PERMITTED))
        node.mode = mode if user.uid == 0 or user.member_of(node.gid) else mode & ~SET_GID
        return node

    def chown(self, user: User, path: Path, uid: int | None, gid: int | None) -> Node:
        """Set the owners that are not None."""
        node = self.get(user, path)
        uid, gid = node.uid if uid is None else uid, node.gid if gid is None else gid
        if user.uid:
            foreign = gid != node.gid and not user.member_of(gid)
            refuse((not node.owned_by(user) or uid != node.uid or foreign, Code.CODE_NOT_PERMITTED))
        node.uid, node.gid = uid, gid
        if node.kind is not Kind.DIRECTORY:
            node.drop_set_id()
        return node

    def utime(self, user: User, path: Path, times_ns: tuple[int, int]) -> Node:
        """Set both times."""
        node = self.get(user, path)
        refuse((not node.owned_by(user), Code.CODE_NOT_PERMITTED))
        node.times_ns = times_ns
        return node

    def _check_xattr(self, user: User, node: Node, name: bytes) -> None:
        if name.startswith(b"trusted."):
            refuse((user.uid != 0, Code.CODE_NOT_PERMITTED))
            return
        sticky = node.kind is Kind.DIRECTORY and bool(node.mode & STICKY) and not node.owned_by(user)
        refuse((sticky, Code.CODE_NOT_PERMITTED), (not node.allows(user, WRITE), Code.CODE_ACCESS))

    def setxattr(self, user: User, path: Path, name: bytes, value: bytes, *, create: bool, replace: bool) -> Node:
        """Set an extended attribute."""
        node = self.get(user, path)
        self._check_xattr(user, node, name)
        refuse((create and name in node.xattrs, Code.CODE_EXISTS))
        refuse((replace and name not in node.xattrs, Code.CODE_NO_DATA))
        node.xattrs[name] = value
        return node

    def removexattr(self, user: User, path: Path, name: bytes) -> Node:
        """Remove an extended attribute."""
        node = self.get(user, path)
        self._check_xattr(user, node, name)
        refuse((name not in node.xattrs, Code.CODE_NO_DATA))
        del node.xattrs[name]
        return node

    def getxattr(self, user: User, path: Path, name: bytes) -> bytes:
        """The value of an extended attribute."""
        node = self.get(user, path)
        refuse(
            (name not in node.xattrs or (name.startswith(b"trusted.") and user.uid != 0), Code.CODE_NO_DATA),
            (not name.startswith(b"trusted.") and not node.allows(user, READ), Code.CODE_ACCESS),
        )
        return node.xattrs[name]

    # -- content ------------------------------------------------------------------------------------------

    def truncate(self, user: User, path: Path, length: int) -> Node:
        """Set the length."""
        node = self.get(user, path)
        refuse(
            (node.kind is Kind.DIRECTORY, Code.CODE_IS_DIRECTORY),
            (not node.allows(user, WRITE), Code.CODE_ACCESS),
        )
        self._cut(user, node, length)
        return node

    def truncate_open(self, user: User, node: Node, session: bytes, length: int) -> Node:
        """Set the length of an open file: the session stands for the permission."""
        refuse((node.gone, Code.CODE_STALE_HANDLE))
        refuse(
            (node.kind is not Kind.FILE, Code.CODE_INVALID_ARGUMENT),
            (session not in node.sessions and not node.allows(user, WRITE), Code.CODE_ACCESS),
        )
        self._cut(user, node, length)
        return node

    def _cut(self, user: User, node: Node, length: int) -> None:
        node.length = length
        node.stored = min(node.stored, length)
        node.reserved = 0
        node.truncations += 1
        node.content_changed(user)

    def report(self, user: User, node: Node, session: bytes, end: int | None, truncations: int) -> Node:
        """Adopt what a writer wrote up to `end`, None for nothing, when it knew of so many truncations."""
        refuse((node.gone, Code.CODE_STALE_HANDLE))
        if end is not None:
            refuse((not self._entitled(user, node, session), Code.CODE_STALE_HANDLE))
            node.length = max(node.length, end if truncations == node.truncations else node.stored)
            node.content_changed(user)
        return node

    @staticmethod
    def _entitled(user: User, node: Node, session: bytes) -> bool:
        return session in node.sessions or node.allows(user, WRITE) or user.uid == node.uid

    def append(self, user: User, node: Node, session: bytes, end: int | None, truncations: int, count: int) -> int:
        """Adopt the report; the position of `count` bytes that nobody else is given."""
        refuse((node.gone, Code.CODE_STALE_HANDLE))
        refuse(
            (node.kind is not Kind.FILE, Code.CODE_INVALID_ARGUMENT),
            (not self._entitled(user, node, session), Code.CODE_STALE_HANDLE),
            (not node.links and session not in node.sessions, Code.CODE_STALE_HANDLE),
        )
        self.report(user, node, session, end, truncations)
        offset = max(node.length, node.reserved)
        node.reserved = offset + count
        return offset

    def close(self, user: User, node: Node, session: bytes, end: int | None, truncations: int) -> Node:
        """Adopt the report and end the session."""
        self.report(user, node, session, end, truncations)
        node.sessions.discard(session)
        node.holds.discard(session)
        return node

    def reap(self, node: Node) -> None:
        """Every client of the node has died: what it wrote counts as far as storage has it."""
        if node.sessions - node.holds and node.links:
            if node.stored > node.length:
                node.times_ns = None
            node.length = max(node.length, node.stored)
        node.sessions.clear()
        node.holds.clear()
        node.reading = False
