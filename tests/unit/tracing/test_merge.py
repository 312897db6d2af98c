"""Traces of several processes and tools on one clock."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fs3.cli.trace import trace_command
from fs3.core.errors import Fs3Error
from fs3.tracing import merge_traces
from fs3.tracing.files import read_trace, write_trace

BASE_NS = 1_790_857_026_000_000_000


def event(ts: float, name: str = "work", **others: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": 1, "tid": 1, "ts": ts, "dur": 1.0, **others}


def write(path: Path, *events: dict[str, Any], **header: Any) -> Path:
    path.write_text(json.dumps({**header, "traceEvents": list(events)}))
    return path


def test_times_are_moved_to_the_first_base_to_the_nanosecond(tmp_path: Path) -> None:
    one = write(tmp_path / "one", event(4_553_268_294_959.518), baseTimeNanoseconds=BASE_NS)
    other = write(tmp_path / "other", event(0.001), baseTimeNanoseconds=BASE_NS + 5_000_000_000)
    since_1970 = write(tmp_path / "since-1970", event(BASE_NS / 1000 + 7))
    merge_traces([one, other, since_1970], tmp_path / "merged")
    merged = read_trace(tmp_path / "merged")
    assert merged["baseTimeNanoseconds"] == BASE_NS
    assert [e["ts"] for e in merged["traceEvents"]] == [4_553_268_294_959.518, 5_000_000.001, 7.0]


def test_a_plain_list_is_a_trace_since_1970_and_files_may_be_compressed(tmp_path: Path) -> None:
    (tmp_path / "list").write_text(json.dumps([event(3.0)]))
    merge_traces([tmp_path / "list"], tmp_path / "merged.json.gz")
    with gzip.open(tmp_path / "merged.json.gz", "rt") as file:
        assert json.load(file)["traceEvents"] == [event(3.0)]
    assert read_trace(tmp_path / "merged.json.gz")["baseTimeNanoseconds"] == 0


def test_a_merged_trace_may_replace_one_of_its_sources(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", event(1.0)), write(tmp_path / "other", event(2.0))
    merge_traces([one, other], one)
    assert [e["ts"] for e in read_trace(one)["traceEvents"]] == [1.0, 2.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


def test_of_names_for_the_same_track_the_first_counts(tmp_path: Path) -> None:
    def naming(name: str) -> dict[str, Any]:
        return {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": name}}

    merge_traces([write(tmp_path / "a", naming("a")), write(tmp_path / "b", naming("b"))], tmp_path / "merged")
    assert read_trace(tmp_path / "merged")["traceEvents"] == [naming("a")]


def test_processes_of_other_hosts_stay_apart_and_dropped_events_add_up(tmp_path: Path) -> None:
    hosts = [("a", 1), ("b", 2), ("a", 3)]
    sources = [
        write(tmp_path / str(n), event(0.0), host_name=host, fs3={"dropped_events": n})
        for n, (host, _) in enumerate(hosts)
    ]
    merge_traces(sources, tmp_path / "merged")
    merged = read_trace(tmp_path / "merged")
    assert [e["pid"] for e in merged["traceEvents"]] == [1, "b 1", 1]
    assert merged["fs3"] == {"dropped_events": 3}


@pytest.mark.parametrize("text", ["", "{", "7", "{}", '{"traceEvents": 3}'])
def test_what_is_no_trace_is_refused_and_nothing_is_written(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad").write_text(text)
    with pytest.raises(Fs3Error, match="bad is no"):
        merge_traces([tmp_path / "bad"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_trace(tmp_path / "trace", {}, [{"name": object()}])
    assert not list(tmp_path.iterdir())


def test_the_command_merges(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", event(1.0)), write(tmp_path / "other", event(2.0))
    result = CliRunner().invoke(trace_command, ["merge", str(one), str(other), "-o", str(tmp_path / "merged")])
    assert (result.exit_code, result.output) == (0, "")
    assert len(read_trace(tmp_path / "merged")["traceEvents"]) == 2
