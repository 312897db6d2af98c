"""Packing loses nothing, keeps the order, goes on where it was interrupted, and never mixes two runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fs3.data import RecordDataset, RecordWriter, pack
from fs3.data import packing as packing_module
from fs3.data.check import verify
from fs3.data.packing import LinesPiece, Progress
from fs3.data.store import LocalStore, present
from tests.unit.data.shards import write_tar

FILES = {f"class{n % 3}/{n:03}.bin": bytes([n]) * (n * 137) for n in range(100)}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    return tmp_path / "tree"


def content(directory: Path, **options: Any) -> list[Any]:
    with RecordDataset(directory, format="bytes", **options) as dataset:
        return list(dataset)


def test_files_become_records_with_their_paths_as_keys(tree: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    done = pack(str(tree), str(tmp_path / "out" / "deep"), shard_bytes=100_000, progress=seen.append)
    assert done.records == 100
    assert done.shards == done.shards_total == 7
    assert seen[-1] == done
    found = content(tmp_path / "out" / "deep", keys=True)
    assert {sample["__key__"]: sample["data"] for sample in found} == FILES
    assert [sample["__key__"] for sample in found] == sorted(FILES)
    assert sorted(os.listdir(tmp_path / "out" / "deep")) == [f"part-{n:05}-of-00007.fs3r" for n in range(7)]


def test_packing_again_does_only_what_is_missing(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    failing = {"class1/052.bin"}
    batches = packing_module.FilesPiece.batches

    def stumble(piece: packing_module.FilesPiece) -> Iterator[Any]:
        for batch in batches(piece):
            if failing & {key for _, key in batch}:
                raise OSError("the source is gone")
            yield batch

    monkeypatch.setattr(packing_module.FilesPiece, "batches", stumble)
    with pytest.raises(OSError, match="the source is gone"):
        pack(str(tree), str(out), shard_bytes=50_000, jobs=1)
    names = os.listdir(out)
    assert 0 < len(names) < 13
    assert not any(name.endswith(".tmp") for name in names)
    with pytest.raises(OSError, match=r"is missing: run `fs3 data pack` again"):
        RecordDataset(out)
    _, problems = verify(out)
    assert len(problems) == 13 - len(names)
    # As kill -9 leaves it.
    (out / f".{names[0]}.0123456789ab.tmp").write_bytes(b"half")
    (out / ".unrelated.tmp").touch()
    failing.clear()
    done = pack(str(tree), str(out), shard_bytes=50_000)
    assert (done.shards, done.skipped) == (13, len(names))
    assert {sample["__key__"]: sample["data"] for sample in content(out, keys=True)} == FILES
    assert [name for name in os.listdir(out) if name.startswith(".")] == [".unrelated.tmp"]
    assert verify(out) == (100, [])


def test_two_sources_are_never_mixed(tree: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    pack(str(tree), out, shard_bytes=100_000)
    with pytest.raises(FileExistsError, match="record files of something else"):
        pack(str(tree), out, shard_bytes=50_000)
    (tree / "class0" / "000.bin").write_bytes(b"changed")
    with pytest.raises(FileExistsError, match="packed from something else, or the sources changed"):
        pack(str(tree), out, shard_bytes=100_000)


@pytest.mark.parametrize("shard_bytes", [13, 64, 1 << 20])
@pytest.mark.parametrize("block_bytes", [5, 1 << 20])
def test_every_line_becomes_one_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, block_bytes: int
) -> None:
    monkeypatch.setattr(packing_module, "BATCH_BYTES", block_bytes)
    lines = [f'{{"n": {n}, "text": "{"x" * (n % 40)}"}}' for n in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:6]) + "\n")
    (tmp_path / "b.jsonl").write_bytes(b"\n\n" + "\r\n".join(lines[6:]).encode())
    pack([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], str(tmp_path / "out"), shard_bytes=shard_bytes)
    assert [record.decode() for record in content(tmp_path / "out")] == lines


def test_pieces_of_a_file_of_lines_share_it_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("one\ntwo\n\nthree")
    store = LocalStore()
    (status,) = present(store, [str(path)])
    for cut in range(status.bytes + 1):
        pieces = [LinesPiece(store, str(path), status, *part) for part in ((0, cut), (cut, status.bytes))]
        found = [bytes(line) for piece in pieces for batch in piece.batches() for line, _ in batch]
        assert found == [b"one", b"two", b"three"], cut
    store.close()


def test_samples_of_tar_shards_keep_their_fields(tmp_path: Path) -> None:
    for shard in range(2):
        members = []
        for n in range(20):
            members += [(f"{shard}/{n}.jpg", bytes([n]) * (n * 100)), (f"{shard}/{n}.cls", b"%d" % n)]
        write_tar(tmp_path / f"{shard}.tar", [*members, (f"{shard}/last.txt", b"alone")])
    pack(f"{tmp_path}/*.tar", str(tmp_path / "out"), shard_bytes=8000)
    found = content(tmp_path / "out", keys=True)
    assert len(found) == 42
    assert found[27] == {"__key__": "1/6", "jpg": b"\6" * 600, "cls": b"6"}
    assert found[41] == {"__key__": "1/last", "txt": b"alone"}
    write_tar(tmp_path / "single.tar", [("a.txt", b"A"), ("b.txt", b"B")])
    pack(tmp_path / "single.tar", str(tmp_path / "single"))
    assert content(tmp_path / "single") == [b"A", b"B"]


def test_what_cannot_be_packed_is_said(tree: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    write_tar(tmp_path / "a.tar", [])
    (tmp_path / "a.jsonl").touch()
    for sources, why in [
        ([tree, tmp_path / "a.tar"], "directories of their own"),
        ([tmp_path / "a.jsonl"], "nothing to pack"),
        ([tmp_path / "a.tar"], "nothing to pack"),
        ([tmp_path], r"it has a\.jsonl: name such shards"),
        ([tmp_path / "none"], "does not exist"),
        ([f"{tmp_path}/none-*"], "nothing matches"),
    ]:
        with pytest.raises(OSError, match=why):
            pack(sources, out)
    with pytest.raises(OSError, match="at least 1"):
        pack(tree, out, jobs=0)


def test_verifying_names_every_damaged_record(tmp_path: Path) -> None:
    for shard in range(3):
        with RecordWriter(str(tmp_path / f"{shard}.fs3r")) as writer:
            for n in range(70):
                writer.write(bytes([n]) * 1000)
    with RecordDataset(tmp_path / "1.fs3r") as dataset:
        starts = dataset.index(0).starts.tolist()
    with (tmp_path / "1.fs3r").open("r+b") as file:
        for n in (3, 69):
            file.seek(starts[n])
            file.write(b"\xff")
    with (tmp_path / "2.fs3r").open("r+b") as file:
        file.write(b"\xff")
    samples, problems = verify(tmp_path)
    assert samples == 140
    assert [(os.path.basename(p.path), p.sample) for p in problems] == [("1.fs3r", 3), ("1.fs3r", 69), ("2.fs3r", None)]
    assert "damaged" in problems[0].message
