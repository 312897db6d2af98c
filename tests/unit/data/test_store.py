"""The local store: few files open at a time, names expanded, new files whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fs3 import native
from fs3.data.store import LocalStore, expand, locate, matching, present, published


def descriptors_below(directory: Path) -> int:
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(f"{directory}/") for link in links if link.is_symlink())


def test_few_files_are_open_however_many_are_read(tmp_path: Path) -> None:
    store = LocalStore(open_files_max=3)
    paths = [str(tmp_path / f"{n}") for n in range(10)]
    for n, path in enumerate(paths):
        Path(path).write_bytes(bytes([n]) * 10)
    for _ in range(2):
        views = [memoryview(bytearray(4)) for _ in paths]
        assert store.read([(path, 8, view) for path, view in zip(paths, views, strict=True)]) == [2] * 10
        assert [view[0] for view in views] == list(range(10))
        assert descriptors_below(tmp_path) == 3
    store.close()
    assert descriptors_below(tmp_path) == 0


def test_names_are_expanded_in_their_order(tmp_path: Path) -> None:
    for name in ("b.x", "a.x", ".hidden.x", "c.y"):
        (tmp_path / name).touch()
    store = LocalStore()
    assert expand(store, [str(tmp_path)], (".x",)) == [f"{tmp_path}/a.x", f"{tmp_path}/b.x"]
    assert matching(store, f"{tmp_path}/[bc].*") == [f"{tmp_path}/b.x", f"{tmp_path}/c.y"]
    assert expand(store, [f"{tmp_path}/c.y", str(tmp_path)], (".x",))[0] == f"{tmp_path}/c.y"
    assert [status.bytes for status in present(store, [f"{tmp_path}/c.y"])] == [0]
    with pytest.raises(FileNotFoundError, match="it does not exist"):
        present(store, [f"{tmp_path}/c.y", f"{tmp_path}/none"])
    store.close()


def test_sources_lie_in_one_place() -> None:
    with pytest.raises(OSError, match="all paths must be local, or URLs of the same cluster"):
        locate(["fs3://a:1/x", "/local"])
    with pytest.raises(OSError, match="all paths must be local, or URLs of the same cluster"):
        locate(["fs3://a:1/x", "fs3://b:1/x"])


def test_a_file_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    store, path = LocalStore(), tmp_path / "a"
    path.write_bytes(b"old")

    def stop() -> None:
        with published(store, str(path)) as output:
            output.pwrite(b"half", 0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stop()
    assert path.read_bytes() == b"old"
    with published(store, str(path)) as output:
        output.pwrite(b"new", 0)
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]
    store.close()


def test_spans_are_compared_with_their_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"-first--second-third")
    sums = [native.crc32c(part) for part in (b"first", b"SECOND", b"third")]
    rows = [(0, 0, 0, 8, 1, 5, sums[0]), (0, 8, 8, 6, 0, 6, sums[1]), (0, 15, 16, 8, 0, 5, sums[2])]
    unsummed, beyond = (0, 8, 24, 4, 0, 0, 0), (0, 15, 28, 8, 0, 8, 1)
    store, memory = LocalStore(), np.zeros(36, np.uint8)
    spans = np.array([*rows, unsummed, beyond], np.uint64)
    assert store.read_spans([str(path)], spans, memory) == [8, None, 5, 4, 5]
    assert bytes(memory[:21]) == b"-first--second" + bytes(2) + b"third"
    store.close()
