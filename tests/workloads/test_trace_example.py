"""The example that trains under a trace, and the pictures of the documents."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fs3.testing.cluster import LocalCluster
from fs3.tracing.files import read_trace

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "trace"


def run(*command: object, url: str = "") -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"FS3_URL": url},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("ahead", [0, 2])
def test_training_is_traced_with_its_reads_and_drawn(shared_cluster: LocalCluster, tmp_path: Path, ahead: int) -> None:
    pytest.importorskip("torch")
    url = f"{shared_cluster.url}?token_file={shared_cluster.directory / 'token'}"
    trace, picture, steps = tmp_path / "train.json", tmp_path / "train.svg", 4
    said = run(EXAMPLE / "train.py", "--steps", steps, "--batch", 32, "--ahead", ahead, "--trace", trace, url=url)
    loss = re.match(r"loss ([\d.]+) at first, ([\d.]+) at last\n", said)
    assert loss
    events = [e for e in read_trace(trace)["traceEvents"] if e["ph"] == "X"]
    computing = {e["tid"] for e in events if e["name"] == "compute"}
    reads = [e for e in events if e["name"] == "fs3.read"]
    assert sorted(e["args"]["offset"] for e in reads) == [32 * 257 * 4 * step for step in range(steps)]
    assert {e["tid"] for e in reads}.isdisjoint(computing) == bool(ahead)
    if not ahead:
        assert ", 0% of it while computing" in said
    run(EXAMPLE / "timeline.py", trace, "-o", picture)
    drawn = picture.read_text()
    assert all(f">{text}<" in drawn for text in ("compute", "fs3.read", "storage.read", "MainThread"))


Overlap = Callable[[list[tuple[float, float]], list[tuple[float, float]]], float]


@pytest.fixture
def common_us(monkeypatch: pytest.MonkeyPatch) -> Overlap:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from overlap import common_us  # type: ignore[import-not-found]

    sys.modules.pop("overlap")
    return common_us  # type: ignore[no-any-return]


def test_the_time_in_common_is_that_of_counting_instants(common_us: Overlap) -> None:
    first = [(0.0, 4.0), (6.0, 7.0), (9.0, 15.0)]
    other = [(1.0, 2.0), (3.0, 10.0), (10.0, 11.0), (14.0, 20.0)]
    instants = [at + 0.5 for at in range(20)]
    counted = sum(any(a < at < b for a, b in first) and any(a < at < b for a, b in other) for at in instants)
    assert common_us(first, other) == common_us(other, first) == counted == 6
    assert common_us([], other) == common_us(first, []) == 0


def test_the_picture_of_throughput_shows_what_the_results_say(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run(ROOT / "benchmarks" / "plot.py", "-o", tmp_path)
    labels = re.compile(r"> ?([\d,]+, [\d.]+ × [^<]+)<")
    now = labels.findall((tmp_path / "throughput.svg").read_text())
    committed = labels.findall((ROOT / "docs" / "pictures" / "throughput.svg").read_text())
    assert len(now) > 5
    assert committed == now, "benchmarks/RESULTS.md has changed: run `make pictures`"


def test_the_picture_of_the_key_value_cache_shows_every_store(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "results.md").write_text(
        "# Today; then\n\n| work | rate | ratio |\n| - | - | - |\n| large reads | 4,000 MB/s | 0.50 × ping_pong |\n"
        "| small reads | 4,000/s | 0.50 × large reads, in turn with it |\n\n"
        "| KV cache | fs3 | redis | × redis |\n| - | - | - | - |\n"
        "| get 1 MiB | 2,345 MB/s, 321 / 1,234 µs, 0.50 s/GiB | 99 MB/s, 9,876 / 9,999 µs, 4.0 s/GiB | 23.69 |\n"
    )
    run(ROOT / "benchmarks" / "plot.py", tmp_path / "results.md", "-o", tmp_path)
    drawn = (tmp_path / "kv.svg").read_text()
    assert "fs3: 321 µs, p99 1,234 µs, 2,345 MB/s<" in drawn
    assert "redis: 9,876 µs, p99 9,999 µs, 99 MB/s<" in drawn
    assert "in the same run: Today<" in drawn
    assert "0.50 × large reads<" in (tmp_path / "throughput.svg").read_text()


def test_a_file_without_figures_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "none.md").write_text("# Nothing\n\n| work | rate |\n| --- | --- |\n| a | 1/s |\n")
    plot = [
        sys.executable,
        str(ROOT / "benchmarks" / "plot.py"),
        str(tmp_path / "none.md"),
        "-o",
        str(tmp_path),
    ]
    done = subprocess.run(plot, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "no table" in done.stderr
