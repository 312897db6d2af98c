"""`fs3://` through fsspec: its own conformance suites, and what they do not ask."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.tests import abstract

from fs3.client.fsspec import Fs3FileSystem
from fs3.testing.cluster import LocalCluster


def _host(cluster: LocalCluster) -> str:
    return cluster.url.removeprefix("fs3://").rstrip("/")


@pytest.fixture
def fs(shared_cluster: LocalCluster) -> Iterator[Fs3FileSystem]:
    # The name that the entry point gives.
    made = fsspec.filesystem("fs3", host=_host(shared_cluster), token_file=str(shared_cluster.token_file))
    assert isinstance(made, Fs3FileSystem)
    yield made
    Fs3FileSystem.clear_instance_cache()


@pytest.fixture
def fs_path(fs: Fs3FileSystem, request: pytest.FixtureRequest) -> str:
    path = f"/{request.node.name.replace('[', '-').rstrip(']')}"
    if fs.exists(path):
        fs.rm(path, recursive=True)
    fs.makedirs(path)
    return path


class Fixtures(abstract.AbstractFixtures):
    """Where fsspec's suites run."""

    @pytest.fixture
    def fs(self, shared_cluster: LocalCluster) -> Fs3FileSystem:
        return Fs3FileSystem(_host(shared_cluster), shared_cluster.token)

    @pytest.fixture
    def fs_path(self, fs: Fs3FileSystem) -> Iterator[str]:
        path = "/suite"
        fs.makedirs(path)
        yield path
        fs.rm(path, recursive=True)


class TestCopy(abstract.AbstractCopyTests, Fixtures):
    pass


class TestGet(abstract.AbstractGetTests, Fixtures):
    pass


class TestPut(abstract.AbstractPutTests, Fixtures):
    pass


class TestOpen(abstract.AbstractOpenTests, Fixtures):
    pass


class TestPipe(abstract.AbstractPipeTests, Fixtures):
    pass


# ---- names


def test_urls_name_cluster_and_path(shared_cluster: LocalCluster, fs: Fs3FileSystem, fs_path: str) -> None:
    host = _host(shared_cluster)
    url = f"fs3://{host}{fs_path}/a?b"
    with fsspec.open(url, "w", token=shared_cluster.token) as file:
        file.write("text")
    assert fs.cat(f"{fs_path}/a?b".replace("?", "[?]")) == {f"{fs_path}/a?b": b"text"}
    named = f"fs3://{host}{fs_path}/a?b?token_file={shared_cluster.token_file}"
    found, path = fsspec.url_to_fs(named)
    assert (path, found.cat_file(path)) == (f"{fs_path}/a?b", b"text")
    assert found.unstrip_protocol(path) == url
    assert found.fs is fs.fs
    for given, stripped in {
        "fs3://h:1": "/",
        "fs3://h:1/": "/",
        "fs3://h:1,i:2/a/b/": "/a/b",
        "fs3:///a": "/a",
        "a/b": "/a/b",
        "/a//": "/a",
        "fs3://h:1?token_file=/x": "/",
        Path("/a/b"): "/a/b",
    }.items():
        assert Fs3FileSystem._strip_protocol(given) == stripped


def test_without_a_host_the_environment_says_where(
    shared_cluster: LocalCluster, fs: Fs3FileSystem, fs_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FS3_URL", f"{shared_cluster.url}{fs_path[1:]}")
    below, path = fsspec.url_to_fs("fs3:///f", token=shared_cluster.token)
    assert path == "/f"
    below.pipe_file(path, b"x")
    assert fs.cat_file(f"{fs_path}/f") == b"x"
    assert fsspec.url_to_fs(below.unstrip_protocol("/f"), token=shared_cluster.token)[1] == f"{fs_path}/f"


def test_instances_share_a_connection_and_are_pickled(
    shared_cluster: LocalCluster, fs: Fs3FileSystem, fs_path: str
) -> None:
    fs.pipe_file(f"{fs_path}/f", b"x")
    again = pickle.loads(pickle.dumps(fs))
    assert again is fs
    assert shared_cluster.token.encode() not in pickle.dumps(fs)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(pickle.loads(pickle.dumps(fs))))
    thread.start()
    thread.join()
    assert found[0].fs is fs.fs
    child = os.fork()
    if child == 0:
        os._exit(0 if pickle.loads(pickle.dumps(fs)).cat_file(f"{fs_path}/f") == b"x" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- what is there


def test_listings_tell_what_is_there_now(fs: Fs3FileSystem, fs_path: str) -> None:
    fs.pipe({f"{fs_path}/d/f": b"12345", f"{fs_path}/g": b""})
    fs.fs.symlink("d/f", f"{fs_path}/link")
    fs.fs.symlink("nowhere", f"{fs_path}/dangling")
    listed = {entry["name"].removeprefix(fs_path): entry for entry in fs.ls(fs_path)}
    assert {name: (e["type"], e["size"] if e["type"] == "file" else 0, e["islink"]) for name, e in listed.items()} == {
        "/d": ("directory", 0, False),
        "/g": ("file", 0, False),
        "/link": ("file", 5, True),
        "/dangling": ("link", 0, True),
    }
    for name, entry in listed.items():
        assert fs.info(fs_path + name) == entry
    assert fs.ls(f"{fs_path}/g", detail=False) == [f"{fs_path}/g"]
    assert fs.find(fs_path) == [f"{fs_path}/{name}" for name in ("d/f", "dangling", "g", "link")]
    assert fs.glob(f"{fs_path}/*/f") == [f"{fs_path}/d/f"]
    assert [(top, sorted(d), sorted(f)) for top, d, f in fs.walk(fs_path)] == [
        (fs_path, ["d"], ["dangling", "g", "link"]),
        (f"{fs_path}/d", [], ["f"]),
    ]
    assert fs.sizes([f"{fs_path}/d/f", f"{fs_path}/g"]) == [5, 0]
    assert fs.du(fs_path) >= 5
    with pytest.raises(FileNotFoundError):
        fs.ls(f"{fs_path}/none")
    assert (fs.exists(f"{fs_path}/dangling"), fs.lexists(f"{fs_path}/dangling")) == (False, True)


def test_times_are_those_of_the_file(fs: Fs3FileSystem, fs_path: str) -> None:
    path = f"{fs_path}/f"
    fs.touch(path)
    fs.fs.utime(path, (1, 2))
    assert fs.modified(path).isoformat() == "1970-01-01T00:00:02+00:00"
    before = fs.ukey(path)
    fs.touch(path, truncate=False)
    assert fs.modified(path).year > 2000
    assert fs.created(path).year > 2000
    assert fs.ukey(path) != before


# ---- content


def test_ranges_are_slices(fs: Fs3FileSystem, fs_path: str) -> None:
    path = f"{fs_path}/f"
    content = bytes(range(100))
    fs.pipe_file(path, content)
    bounds = [(None, None), (10, 20), (-5, None), (None, -5), (-10, -5), (20, 10), (90, 200), (200, 300), (-500, 3)]
    for start, end in bounds:
        assert fs.cat_file(path, start, end) == content[start:end]
    found = fs.cat_ranges([path] * len(bounds), [s for s, _ in bounds], [e for _, e in bounds])
    assert found == [content[start:end] for start, end in bounds]
    missing, three = fs.cat_ranges([f"{fs_path}/none", path], 0, 3)
    assert isinstance(missing, FileNotFoundError)
    assert three == content[:3]
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges([f"{fs_path}/none"], 0, -3, on_error="raise")


def test_many_files_are_read_at_once(fs: Fs3FileSystem, fs_path: str) -> None:
    contents = {f"{fs_path}/d/{number}": bytes([number]) * 10 for number in range(200)}
    fs.pipe(contents)
    assert fs.cat(list(contents)) == contents
    assert fs.cat(fs_path, recursive=True) == contents
    assert fs.cat(f"{fs_path}/d/7") == b"\7" * 10
    wanted = [f"{fs_path}/d/1", f"{fs_path}/none"]
    assert list(fs.cat(wanted, on_error="omit")) == wanted[:1]
    assert isinstance(fs.cat(wanted, on_error="return")[wanted[1]], FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        fs.cat(wanted)


def test_files_are_those_of_the_client(fs: Fs3FileSystem, fs_path: str) -> None:
    path = f"{fs_path}/made/on/the/way/f"
    with fs.open(path, "wb", chunk_bytes=1 << 16) as file:
        file.write(b"line 1\nline 2\n")
    assert fs.fs.stat(path).st_blksize == 1 << 16
    with fs.open(path, "ab") as file:
        file.write(b"line 3\n")
    with fs.open(path, "r+b") as file:
        file.seek(5)
        file.write(b"9")
    with fs.open(path, "rb", block_size=4) as file:
        assert file.size == 21
        assert [file.readline(), file.seek(-7, 2), file.read()] == [b"line 9\n", 14, b"line 3\n"]
    with fs.open(path, "rt", newline="\n") as file:
        assert list(file) == ["line 9\n", "line 2\n", "line 3\n"]
    with fs.open(f"{fs_path}/z.gz", "wb", compression="infer") as file:
        file.write(b"x" * 1000)
    assert fs.size(f"{fs_path}/z.gz") < 100
    assert (fs.head(path, 4), fs.tail(path, 2)) == (b"line", b"3\n")


def test_a_transaction_is_seen_at_its_end_or_not_at_all(fs: Fs3FileSystem, fs_path: str) -> None:
    fs.pipe_file(f"{fs_path}/a", b"old")
    with fs.transaction:
        with fs.open(f"{fs_path}/a", "wb") as file:
            file.write(b"new")
        fs.pipe_file(f"{fs_path}/d/b", b"b")
        assert fs.cat_file(f"{fs_path}/a") == b"old"
        assert not fs.exists(f"{fs_path}/d/b")
    assert fs.cat(fs_path, recursive=True) == {f"{fs_path}/a": b"new", f"{fs_path}/d/b": b"b"}
    with pytest.raises(RuntimeError, match="on purpose"), fs.transaction:
        fs.pipe_file(f"{fs_path}/a", b"newer")
        raise RuntimeError("on purpose")
    assert fs.find(fs_path) == [f"{fs_path}/a", f"{fs_path}/d/b"]
    assert fs.cat_file(f"{fs_path}/a") == b"new"


# ---- copies, moves, removal


def test_large_files_are_copied_whole_with_progress(fs: Fs3FileSystem, fs_path: str, tmp_path: Path) -> None:
    content = os.urandom((33 << 20) + 5)
    (tmp_path / "f").write_bytes(content)
    (tmp_path / "link").symlink_to("f")
    callback = fsspec.callbacks.Callback()
    fs.put_file(str(tmp_path / "f"), f"{fs_path}/d/f", callback=callback)
    assert (callback.size, callback.value) == (len(content), len(content))
    fs.put_file(str(tmp_path / "link"), f"{fs_path}/through")
    assert fs.info(f"{fs_path}/through")["size"] == len(content)
    assert not fs.info(f"{fs_path}/through")["islink"]
    with pytest.raises(FileExistsError):
        fs.put_file(str(tmp_path / "f"), f"{fs_path}/d/f", mode="create")
    fs.cp_file(f"{fs_path}/d/f", f"{fs_path}/e/g")
    fs.fs.symlink("e/g", f"{fs_path}/link")
    for name in ("e/g", "link"):
        fs.get_file(f"{fs_path}/{name}", str(tmp_path / "back" / "g"))
        assert (tmp_path / "back" / "g").read_bytes() == content
    with pytest.raises(OSError, match="are the same file"):
        fs.cp_file(f"{fs_path}/e/g", f"{fs_path}/link")
    assert fs.cat_file(f"{fs_path}/e/g") == content


def test_moves_are_renames(fs: Fs3FileSystem, fs_path: str) -> None:
    fs.pipe({f"{fs_path}/a/x": b"x", f"{fs_path}/f": b"f", f"{fs_path}/g": b"g"})
    inode = fs.info(f"{fs_path}/a")["ino"]
    fs.mv(f"{fs_path}/a", f"{fs_path}/new/b")
    assert fs.info(f"{fs_path}/new/b")["ino"] == inode
    fs.mv(f"{fs_path}/f", f"{fs_path}/new/b")
    fs.mv(f"{fs_path}/g", f"{fs_path}/new/b/f")
    assert fs.cat(f"{fs_path}/new", recursive=True) == {f"{fs_path}/new/b/x": b"x", f"{fs_path}/new/b/f": b"g"}
    with pytest.raises(FileNotFoundError):
        fs.mv(f"{fs_path}/none", f"{fs_path}/made/for/nothing")
    assert not fs.exists(f"{fs_path}/made")


def test_trees_are_removed_only_when_told(fs: Fs3FileSystem, fs_path: str) -> None:
    fs.pipe({f"{fs_path}/d/e/f": b"", f"{fs_path}/x1": b"", f"{fs_path}/x2": b"", f"{fs_path}/y": b""})
    with pytest.raises(IsADirectoryError):
        fs.rm(f"{fs_path}/d")
    with pytest.raises(FileExistsError):
        fs.mkdir(f"{fs_path}/d")
    with pytest.raises(OSError, match="not empty"):
        fs.rmdir(f"{fs_path}/d")
    fs.rm([f"{fs_path}/d", f"{fs_path}/x*"], recursive=True)
    assert fs.ls(fs_path, detail=False) == [f"{fs_path}/y"]
    with pytest.raises(FileNotFoundError):
        fs.rm(f"{fs_path}/none", recursive=True)
