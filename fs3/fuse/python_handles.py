"""What the fusepy engine remembers: open files and directories, and what the kernel was told. Thread-safe."""

from __future__ import annotations

import errno
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fs3.native import Attr, DirEntry, File

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

VERSIONS_MAX = 1 << 14
SET_ID_BITS = 0o6000
DIRECTORY_PAGE = 2048
FIRST_ENTRY = 2

# Calls that tell of failures. What one told is told again by those after it, and only by them: the error of a write is
# lost when the kernel had written a part of it before, and that of a close when the descriptor was a copy.
TELL_WRITE, TELL_CLOSE, TELL_SYNC = range(3)

# Errors of writes that were refused before anything was written: nothing is lost that had to be told later.
REFUSALS = frozenset({errno.EDQUOT, errno.EFBIG})


class Recent(Generic[K, V]):
    """The values set last, at most `places` of them, each for `life_s` seconds."""

    def __init__(self, places: int, life_s: float = float("inf")) -> None:
        self._places = places
        self._life_s = life_s
        self._values: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, key: K, value: V) -> None:
        """Remember a value."""
        with self._lock:
            self._values[key] = (time.monotonic() + self._life_s, value)
            self._values.move_to_end(key)
            if len(self._values) > self._places:
                self._values.popitem(last=False)

    def get(self, key: K) -> V | None:
        """The value, if it is still remembered."""
        with self._lock:
            until, value = self._values.get(key, (0.0, None))
        return value if until > time.monotonic() else None

    def forget(self, key: K) -> None:
        """Remember it no longer."""
        with self._lock:
            self._values.pop(key, None)


@dataclass(frozen=True, slots=True)
class Version:
    """The content of a file as far as caches are concerned: equal versions mean equal bytes."""

    length: int
    mtime_ns: int
    ctime_ns: int
    truncate_version: int

    @classmethod
    def of(cls, attr: Attr) -> Version:
        """The version that attributes tell."""
        return cls(attr.length, attr.mtime_ns, attr.ctime_ns, attr.truncate_version)


@dataclass(eq=False, slots=True)
class Node:
    """What all handles of one inode share. Its fields are guarded by the lock of :class:`OpenFiles`."""

    inode: int
    handles: int = 0
    writers: list[File] = field(default_factory=list)
    writing: int = 0
    """Writes on their way."""
    unpublished_since_s: float | None = None
    """Since when the service lacks a length or time of what was written (monotonic)."""
    written_s: float = 0.0
    """When the last write ended (monotonic)."""
    failures: int = 0
    failure: OSError | None = None
    set_id: bool = False
    """Whether set-id bits were last seen."""


@dataclass(eq=False, slots=True)
class Handle:
    """One open of the kernel."""

    node: Node
    file: File
    write: bool
    sync: bool
    """Every write has to be synced here: the kernel does not, without its page cache."""
    told: list[int]
    """How many failures each call has told."""
    lock_era: int = 0
    """The era of the client's locks in which it got the first; 0: it has none."""
    lock_owners: set[tuple[int, int, int]] = field(default_factory=set)
    """(inode, kind, owner) of the locks it was used for."""

    def new_failure(self, teller: int) -> OSError | None:
        """A failed write that `teller` has not told through this handle."""
        failures = self.node.failures
        fresh = self.told[teller] < failures
        for lesser in range(teller + 1):
            self.told[lesser] = max(self.told[lesser], failures)
        return self.node.failure if fresh else None


class OpenFiles:
    """The open files of a mount, and which version of each file the kernel's page cache may hold."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nodes: dict[int, Node] = {}
        self._handles: dict[int, Handle] = {}
        self._numbers = itertools.count(1)
        self._versions: Recent[int, Version] = Recent(VERSIONS_MAX)

    def add(self, file: File, *, write: bool, sync: bool) -> int:
        """Register an open file; the number that the kernel knows it by."""
        inode = file.inode
        with self._lock:
            node = self._nodes.setdefault(inode, Node(inode))
            node.handles += 1
            if write:
                node.writers.append(file)
            number = next(self._numbers)
            self._handles[number] = Handle(node, file, write, sync, [node.failures] * 3)
        return number

    def get(self, number: int) -> Handle | None:
        """The handle of a number."""
        return self._handles.get(number)

    def node(self, inode: int) -> Node | None:
        """The node of an inode that is open."""
        return self._nodes.get(inode)

    def remove(self, number: int) -> Handle | None:
        """Forget a handle; it is still to be closed."""
        with self._lock:
            handle = self._handles.pop(number, None)
            if handle is None:
                return None
            node = handle.node
            node.handles -= 1
            if handle.write:
                node.writers.remove(handle.file)
            if node.handles == 0:
                del self._nodes[node.inode]
        return handle

    def numbers(self) -> list[int]:
        """The numbers of all handles."""
        with self._lock:
            return list(self._handles)

    @contextmanager
    def writing(self, handle: Handle) -> Iterator[None]:
        """For the time of a write, whose failure is noted: what caches hold cannot be told from what others write."""
        node = handle.node
        with self._lock:
            node.writing += 1
        self._versions.forget(node.inode)
        try:
            yield
        except OSError as e:
            if e.errno not in REFUSALS:
                with self._lock:
                    node.failures += 1
                    node.failure = e
            raise
        finally:
            with self._lock:
                node.writing -= 1
                node.written_s = time.monotonic()
                if node.unpublished_since_s is None:
                    node.unpublished_since_s = node.written_s

    def published(self, node: Node, before_s: float) -> None:
        """What was written up to `before_s` (monotonic) is known to the service."""
        with self._lock:
            if node.unpublished_since_s is not None:
                node.unpublished_since_s = None if node.written_s < before_s else before_s

    def unpublished(self, age_s: float) -> list[tuple[Node, File]]:
        """Nodes written to that long ago, with a file to publish through."""
        limit = time.monotonic() - age_s
        with self._lock:
            return [
                (node, node.writers[-1])
                for node in self._nodes.values()
                if node.writers and node.unpublished_since_s is not None and node.unpublished_since_s <= limit
            ]

    def keep_cache(self, inode: int, now: Version) -> bool:
        """Whether what the kernel has cached of a file is the file as it is now; from here on it may cache that."""
        node = self.node(inode)
        if node is not None and (node.writing or node.unpublished_since_s is not None):
            self._versions.forget(inode)
            return False
        keep = self._versions.get(inode) == now
        self._versions.put(inode, now)
        return keep

    def truncated(self, inode: int) -> None:
        """The kernel's cache and the file part ways."""
        self._versions.forget(inode)


@dataclass(slots=True)
class Page:
    """Entries of a directory that follow each other; `first` is the offset of the first."""

    first: int
    entries: list[DirEntry]
    end: bool
    with_attr: bool


class Directory:
    """One opendir of the kernel. Offset 0 is ".", 1 is "..", then come the entries in name order.

    Only one page is kept, and the name that each earlier page began behind, so that memory stays small for any
    directory and an offset stays valid while entries come and go.
    """

    def __init__(self, inode: int) -> None:
        self.inode = inode
        self.parent = inode
        self.lock = threading.Lock()
        self._starts: list[tuple[int, bytes]] = []
        self._page: Page | None = None

    def rewind(self) -> None:
        """Start again: entries are asked for anew."""
        self._starts, self._page = [], None

    def at(self, offset: int, with_attr: bool) -> list[DirEntry] | tuple[int, bytes]:
        """Entries from `offset` on (none: the end), or the page to be fetched: its offset and the name before it."""
        page = self._page
        if page is not None and (page.with_attr or not with_attr):
            behind = page.first + len(page.entries)
            if page.first <= offset < behind:
                return page.entries[offset - page.first :]
            if offset >= behind and page.end:
                return []
            if offset == behind:
                return offset, page.entries[-1].name
        earlier = [start for start in self._starts if start[0] <= offset]
        if not earlier:
            return FIRST_ENTRY, b""
        first, name = earlier[-1]
        if page is not None and page.first == first and (page.with_attr or not with_attr):
            # Entries of that page have gone meanwhile: go on behind it.
            return offset, page.entries[-1].name
        return first, name

    def fill(self, first: int, after: bytes, entries: list[DirEntry], end: bool, with_attr: bool) -> None:
        """Take a page that was fetched. One without entries is the last, whatever the service says."""
        if (first, after) not in self._starts[-1:]:
            self._starts = [start for start in self._starts if start[0] < first] + [(first, after)]
        self._page = Page(first, entries, end or not entries, with_attr)


class Directories:
    """The open directories of a mount."""

    def __init__(self) -> None:
        self._open: dict[int, Directory] = {}
        self._numbers = itertools.count(1)

    def add(self, inode: int) -> int:
        """Register an open directory; its number."""
        number = next(self._numbers)
        self._open[number] = Directory(inode)
        return number

    def get(self, number: int) -> Directory | None:
        """The open directory of a number."""
        return self._open.get(number)

    def remove(self, number: int) -> None:
        """The kernel closed it."""
        self._open.pop(number, None)
