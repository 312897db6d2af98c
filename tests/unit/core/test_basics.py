"""Units, ids, clocks, errors over the wire, the service scaffolding."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs3.core.clock import RealClock, VirtualClock
from fs3.core.errors import Fs3Error, NotFound, error, from_detail
from fs3.core.ids import NodeId, TargetId, node_of, target_id
from fs3.core.service import run_service, write_ready
from fs3.core.units import format_bytes, parse_bytes
from fs3.v1.frame_pb2 import Code


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("4096", 4096), ("64MiB", 64 << 20), ("1.5 GiB", 3 << 29), ("2GB", 2 * 10**9), ("64k", 65536)],
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1.5", "1e3", "12 parsecs", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(Fs3Error):
        parse_bytes(text)


@given(st.integers(0, 1 << 50))
def test_a_written_size_reads_back_within_its_precision(count: int) -> None:
    text = format_bytes(count)
    number, unit = text.split()
    scale = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[unit]
    assert abs(float(number) * scale - count) <= 0.051 * scale


def test_target_ids_name_their_node() -> None:
    assert target_id(NodeId(7), 12) == 7012
    assert node_of(TargetId(7012)) == 7
    with pytest.raises(ValueError, match="ordinal"):
        target_id(NodeId(1), 1000)


def test_an_error_survives_the_wire() -> None:
    sent = error(Code.CODE_NOT_FOUND, "gone", maybe_applied=True, routing_version=4, primary="h:1")
    got = from_detail(sent.to_detail())
    assert isinstance(got, NotFound)
    assert (got.message, got.maybe_applied, got.routing_version, got.primary) == ("gone", True, 4, "h:1")
    assert got.to_detail() == sent.to_detail()


def test_virtual_time_wakes_sleepers_in_order_and_only_when_it_moves() -> None:
    async def main() -> None:
        clock = VirtualClock()
        woken: list[tuple[str, int]] = []

        async def sleeper(name: str, seconds: float) -> None:
            await clock.sleep(seconds)
            woken.append((name, clock.monotonic_ns()))

        start = clock.monotonic_ns()
        tasks = [asyncio.create_task(sleeper(n, s)) for n, s in (("b", 2.0), ("a", 1.0), ("c", 9.0))]
        await clock.advance(0.5)
        assert woken == []
        await clock.advance(2.0)
        assert woken == [("a", start + 1_000_000_000), ("b", start + 2_000_000_000)]
        await clock.advance(10)
        await asyncio.gather(*tasks)
        assert clock.wall_ns() == start + 12_500_000_000

    asyncio.run(main())


def test_the_real_clock_is_the_one_leases_are_judged_by() -> None:
    import time

    before = time.monotonic_ns()
    assert before <= RealClock().monotonic_ns() <= time.monotonic_ns()


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_the_ready_file_is_there_while_the_service_runs_and_sigterm_ends_it(tmp_path: Path) -> None:
    ready = str(tmp_path / "ready.json")

    async def main(stop: asyncio.Event) -> None:
        write_ready(ready, host="h", frame_port=1, grpc_port=2, node_id=3)
        with open(ready) as handle:  # noqa: ASYNC230
            record = json.load(handle)
        assert record == {"pid": os.getpid(), "host": "h", "frame_port": 1, "grpc_port": 2, "node_id": 3}
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()

    assert run_service(main, name="test", ready_file=ready) == 0
    assert not os.path.exists(ready)


def test_an_operating_error_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    async def main(stop: asyncio.Event) -> None:
        raise error(Code.CODE_BUSY, "somebody is\nhere already")

    assert run_service(main, name="test") == 1
    assert capsys.readouterr().err == "fs3 test: somebody is here already\n"


def test_a_bug_is_logged_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    async def main(stop: asyncio.Event) -> None:
        raise ZeroDivisionError("oops")

    assert run_service(main, name="test") == 1
    assert "Traceback" in capsys.readouterr().err
