"""What became of a routing: deltas between its versions, and who gets one. Pure.

Rust applies them as well (native/crates/fs3-proto/src/routing.rs); tests/golden/routing.json holds both to each other.

A version and its history (`Routing.history`) name one content. A delta says from which version it leads to which, and
holds everything that changed in between: so deltas that follow each other can be joined, and what leads from version 5
to version 9 leads there from version 7 as well. Nobody applies one to anything but the routing it was asked for with.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from google.protobuf.unknown_fields import UnknownFieldSet

from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code
from fs3.v1.mgmtd_pb2 import HeartbeatResponse
from fs3.v1.routing_pb2 import (
    ChainTable,
    GetRoutingResponse,
    Routing,
    RoutingCounts,
    RoutingDelta,
    RoutingKnown,
    RoutingSent,
)

DELTA_FORMAT: Final = 1
# Who is further behind than these deltas reach gets the whole.
STEPS_MAX: Final = 256
STEP_BYTES_MAX: Final = 1 << 20
# Answers are kept for so many versions that askers have.
ANSWERS_MAX: Final = 64
_CHAIN_VERSIONS: Final = (1 << 64) - 1


def _table_id(table: ChainTable) -> tuple[int, int]:
    return table.table_id, table.table_version


def _table_named(key: tuple[int, int]) -> ChainTable:
    return ChainTable(table_id=key[0], table_version=key[1])


def _same(key: Any) -> Any:
    return key


class _List(NamedTuple):
    """A list of the routing, and how a delta names what is gone of it."""

    name: str
    removed: str
    id_of: Callable[[Any], Any]
    id_of_removed: Callable[[Any], Any] = _same
    as_removed: Callable[[Any], Any] = _same


_LISTS: Final = (
    _List("nodes", "removed_nodes", lambda node: node.node_id),
    _List("disks", "removed_disks", lambda disk: disk.uuid),
    _List("targets", "removed_targets", lambda target: target.target_id),
    _List("chains", "removed_chains", lambda chain: chain.chain_id),
    _List("tables", "removed_tables", _table_id, _table_id, _table_named),
)
_REST: Final = set(Routing.DESCRIPTOR.fields_by_name) - {kind.name for kind in _LISTS}


def counts(routing: Routing) -> RoutingCounts:
    """What a routing has to have to be taken for the right one."""
    return RoutingCounts(
        nodes=len(routing.nodes),
        disks=len(routing.disks),
        targets=len(routing.targets),
        chains=len(routing.chains),
        tables=len(routing.tables),
        chain_versions=sum(chain.version for chain in routing.chains) & _CHAIN_VERSIONS,
    )


def diff(old: Routing, new: Routing) -> RoutingDelta:
    """Say how `old` became `new`, the version that followed it in the same history."""
    assert old.history == new.history
    assert old.version < new.version
    delta = RoutingDelta(from_version=old.version, changed=new, counts=counts(new))
    for kind in _LISTS:
        delta.changed.ClearField(kind.name)  # type: ignore[arg-type]
        if getattr(old, kind.name) == getattr(new, kind.name):
            continue
        before = {kind.id_of(item): item for item in getattr(old, kind.name)}
        changed = getattr(delta.changed, kind.name)
        changed.extend(item for item in getattr(new, kind.name) if before.pop(kind.id_of(item), None) != item)
        getattr(delta, kind.removed).extend(kind.as_removed(key) for key in before)
    return delta


def join(deltas: Sequence[RoutingDelta], from_version: int) -> RoutingDelta:
    """Make one of deltas that follow each other, oldest first, for `from_version`, which the first one covers."""
    joined = RoutingDelta()
    joined.CopyFrom(deltas[-1])
    joined.from_version = from_version
    for kind in _LISTS:
        changed, removed = getattr(joined.changed, kind.name), getattr(joined, kind.removed)
        newer = {kind.id_of(item) for item in changed} | {kind.id_of_removed(item) for item in removed}
        for delta in reversed(deltas[:-1]):
            items = [item for item in getattr(delta.changed, kind.name) if kind.id_of(item) not in newer]
            gone = [item for item in getattr(delta, kind.removed) if kind.id_of_removed(item) not in newer]
            changed.extend(items)
            removed.extend(gone)
            newer.update(map(kind.id_of, items))
            newer.update(map(kind.id_of_removed, gone))
    return joined


def apply(routing: Routing, delta: RoutingDelta) -> Routing:
    """Make the routing that `delta` leads to from `routing`, which stays as it is.

    Raises PROTOCOL when the delta is to another one, or what comes out is not what it should be: ask for the whole.
    """
    base = (routing.history, routing.version)
    if base != (delta.changed.history, delta.from_version) or delta.changed.version <= routing.version:
        raise error(Code.CODE_PROTOCOL, f"a delta to another routing than version {routing.version} came for it")
    after, rest = _lists_of(routing), Routing()
    rest.CopyFrom(delta.changed)
    for kind in _LISTS:
        rest.ClearField(kind.name)  # type: ignore[arg-type]
    after.MergeFrom(rest)
    for kind in _LISTS:
        items = getattr(after, kind.name)
        for item in getattr(delta.changed, kind.name):
            at, there = _place(items, kind, kind.id_of(item))
            if there:
                items[at].CopyFrom(item)
            else:
                items.insert(at, item)
        for item in getattr(delta, kind.removed):
            at, there = _place(items, kind, kind.id_of_removed(item))
            if there:
                del items[at]
    if counts(after) != delta.counts:
        raise error(Code.CODE_PROTOCOL, f"the delta to routing version {after.version} leads to something else")
    return after


def _lists_of(routing: Routing) -> Routing:
    """Copy the lists and nothing else, fields that are not known here included."""
    lists = Routing()
    if len(UnknownFieldSet(routing)):
        for kind in _LISTS:
            getattr(lists, kind.name).MergeFrom(getattr(routing, kind.name))
        return lists
    # Several times as fast.
    lists.CopyFrom(routing)
    for name in _REST:
        lists.ClearField(name)  # type: ignore[arg-type]
    return lists


def _place(items: Any, kind: _List, key: Any) -> tuple[int, bool]:
    """Where the item of that id is in a list, or belongs, and whether it is there."""
    at = bisect_left(items, key, key=kind.id_of)
    return at, at < len(items) and kind.id_of(items[at]) == key


class News(NamedTuple):
    """A newer routing, and the delta that brought it; None: it came whole."""

    routing: Routing
    delta: RoutingDelta | None


def known(routing: Routing) -> RoutingKnown:
    """What a request says for an answer to it by delta. An empty routing asks for the whole."""
    return RoutingKnown(version=routing.version, history=routing.history, delta_format=DELTA_FORMAT)


def received(routing: Routing, answer: GetRoutingResponse | HeartbeatResponse) -> News | None:
    """Read the answer to a request that said `routing`; None when it brings nothing. Raises PROTOCOL as `apply`."""
    if answer.HasField("delta"):
        return News(apply(routing, answer.delta), answer.delta)
    return News(answer.routing, None) if answer.HasField("routing") else None


class RoutingTeller:
    """Tells the newest routing to whoever asks: as a delta to what he has where it can be, else whole.

    Belongs to one event loop. What it returned is not to be changed.
    """

    def __init__(self) -> None:
        self.sent = RoutingSent()
        self._routing = Routing()
        self._whole_bytes = 0
        # Each covers all versions between the ends of those before and its own end.
        self._steps: deque[tuple[RoutingDelta, int]] = deque()
        self._step_bytes = 0
        self._answers: dict[int, tuple[GetRoutingResponse, int]] = {}

    def advance(self, news: News) -> None:
        """Tell a newer routing from now on."""
        routing, delta = news
        follows = (
            delta is not None
            and routing.history == self._routing.history
            and delta.from_version <= self._routing.version < routing.version
        )
        if delta is not None and follows:
            self._remember(delta)
        else:
            self._steps.clear()
            self._step_bytes = 0
        self._routing = routing
        self._whole_bytes = routing.ByteSize()
        self._answers.clear()

    def _remember(self, delta: RoutingDelta) -> None:
        size = delta.ByteSize()
        self._steps.append((delta, size))
        self._step_bytes += size
        while len(self._steps) > STEPS_MAX or self._step_bytes > STEP_BYTES_MAX:
            _, size = self._steps.popleft()
            self._step_bytes -= size

    def tell(self, asker: RoutingKnown) -> GetRoutingResponse:
        """Answer one who knows this, and count the answer as sent."""
        base = asker.version if self._reaches(asker) else 0
        if base not in self._answers:
            if len(self._answers) == ANSWERS_MAX:
                self._answers.clear()
            answer = self._answer(base)
            self._answers[base] = answer, answer.ByteSize()
        answer, size = self._answers[base]
        if answer.HasField("delta"):
            self.sent.deltas += 1
            self.sent.delta_bytes += size
        else:
            self.sent.wholes += 1
            self.sent.whole_bytes += size
        return answer

    def _reaches(self, asker: RoutingKnown) -> bool:
        """Tell whether the deltas start at what the asker has, or before it."""
        return (
            asker.delta_format >= DELTA_FORMAT
            and bool(self._steps)
            and asker.history == self._routing.history != 0
            and self._steps[0][0].from_version <= asker.version < self._routing.version
        )

    def _answer(self, base: int) -> GetRoutingResponse:
        version = self._routing.version
        if base:
            missed = [delta for delta, _ in self._steps if delta.changed.version > base]
            joined = join(missed, base)
            if joined.ByteSize() < self._whole_bytes:
                return GetRoutingResponse(version=version, delta=joined)
        return GetRoutingResponse(version=version, routing=self._routing)
