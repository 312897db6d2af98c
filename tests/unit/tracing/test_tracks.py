"""Events of operations and requests, on tracks where they do not overlap."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fs3.tracing.tracks import FIRST_TRACK, Tracks, lanes
from fs3.v1.frame_pb2 import Code, Method

THREAD = 4711


def operation(number: int, start_ns: int, duration_ns: int, **others: Any) -> Any:
    fields = {
        "name": "read",
        "path": b"/data/a",
        "inode": 1,
        "offset": 5,
        "count": None,
        "thread": THREAD,
        "background": False,
        "finished": True,
        "bytes": 3,
        "hits": None,
        "error": None,
    }
    return SimpleNamespace(**fields | others, number=number, start_ns=start_ns, duration_ns=duration_ns)


def request(number: int, start_ns: int, duration_ns: int, **others: Any) -> Any:
    fields = {
        "address": "10.0.0.1:7",
        "method": Method.METHOD_STORAGE_READ,
        "node_id": 3,
        "target_id": 9,
        "chunks": 2,
        "attempt": 0,
        "hedge": False,
        "sent": 0,
        "received": 8,
        "finished": True,
        "error": None,
    }
    return SimpleNamespace(**fields | others, operation=number, start_ns=start_ns, duration_ns=duration_ns)


def made(operations: list[Any], requests: list[Any]) -> list[dict[str, Any]]:
    return list(Tracks(17, "train.py", {THREAD: "MainThread"}, 1_000).make(operations, requests))


def names(events: list[dict[str, Any]]) -> dict[int, str]:
    return {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}


def complete(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [e for e in events if e["ph"] == "X"]


SPANS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=30)


@given(SPANS)
def test_lanes_hold_everything_without_overlap_and_are_as_few_as_possible(spans: list[tuple[int, int]]) -> None:
    items = [SimpleNamespace(start_ns=start, duration_ns=duration) for start, duration in spans]
    found = lanes(items)
    assert sorted(map(id, (i for lane in found for i in lane))) == sorted(map(id, items))
    for lane in found:
        assert all(a.start_ns + a.duration_ns <= b.start_ns for a, b in pairwise(lane))
    busiest = max((sum(s <= at < s + d for s, d in spans) for at in range(71)), default=0)
    # What takes no time overlaps nothing, but needs a place.
    assert busiest <= len(found) <= busiest + any(d == 0 for _, d in spans)


def test_a_call_that_blocks_is_on_its_thread_with_what_is_known_of_it() -> None:
    events = made([operation(1, 2_000, 500)], [])
    assert complete(events) == [
        {
            "ph": "X",
            "name": "fs3.read",
            "cat": "fs3",
            "pid": 17,
            "tid": THREAD,
            "ts": 3.0,
            "dur": 0.5,
            "args": {"operation": 1, "path": "/data/a", "offset": 5, "bytes": 3},
        }
    ]
    assert names(events)[THREAD] == "MainThread"


def test_awaited_calls_that_overlap_get_tracks_of_their_own() -> None:
    calls = [operation(n, 10 * n, 15, background=True) for n in range(4)]
    events = made(calls, [])
    tracks = names(events)
    assert set(tracks.values()) == {"fs3 awaited by MainThread #1", "fs3 awaited by MainThread #2"}
    assert min(tracks) == FIRST_TRACK
    assert [e["tid"] - FIRST_TRACK for e in complete(events)] == [0, 0, 1, 1]


def test_requests_are_on_tracks_of_their_service_with_an_arrow_from_their_operation() -> None:
    asked = request(1, 2_100, 100)
    hedged = request(1, 2_150, 100, hedge=True, attempt=2, error=Code.CODE_TIMEOUT)
    orphan = request(77, 2_300, 1, method=Method.METHOD_META_STAT, node_id=0, address="m:1", finished=False)
    events = made([operation(1, 2_000, 500)], [asked, hedged, orphan])
    tracks = names(events)
    shown = [(tracks[e["tid"]], e["name"], e["args"].get("error")) for e in complete(events)[1:]]
    assert shown == [
        ("fs3 meta m:1 #1", "meta.stat", "given up"),
        ("fs3 storage node 3 (10.0.0.1:7) #1", "storage.read", None),
        ("fs3 storage node 3 (10.0.0.1:7) #2", "storage.read", "TIMEOUT"),
    ]
    assert complete(events)[3]["args"] | {"hedge": True, "earlier tries": 2} == complete(events)[3]["args"]
    arrows = [e for e in events if e["ph"] in "sf"]
    assert [e["ph"] for e in arrows] == ["s", "f", "s", "f"]
    assert {e["tid"] for e in arrows if e["ph"] == "s"} == {THREAD}
    assert arrows[0]["id"] == arrows[1]["id"] != arrows[2]["id"] == arrows[3]["id"]
    assert all(e["id"] < 1 << 53 for e in arrows)


def test_failures_and_inodes_are_said() -> None:
    failed = operation(1, 0, 1, path=b"", inode=66, error=Code.CODE_NOT_FOUND, bytes=None, name="METHOD_META_QUOTA_SET")
    [event] = complete(made([failed], []))
    assert (event["name"], event["args"]) == (
        "fs3.quota_set",
        {"operation": 1, "inode": 66, "offset": 5, "error": "NOT_FOUND"},
    )
