"""Safetensors on fs3, beside the package of that name."""

from __future__ import annotations

import json
import mmap
import posixpath
import uuid
from collections.abc import Iterator

import pytest
import safetensors
import safetensors.torch as reference
import torch

import fs3
from fs3.checkpoint import catalog
from fs3.checkpoint.fastsafetensors import ThreeFSFileReader
from fs3.checkpoint.safetensors import DTYPES, load_file, read_header, save_file, save_sharded
from fs3.client import FileSystem
from fs3.core.errors import Fs3Error
from fs3.testing.cluster import LocalCluster

MIB = 1 << 20


@pytest.fixture(scope="module")
def fs(shared_cluster: LocalCluster) -> Iterator[FileSystem]:
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as connected:
        yield connected


@pytest.fixture
def path(fs: FileSystem) -> Iterator[str]:
    """A file's name in a directory of the test's own."""
    home = f"/safe-{uuid.uuid4().hex[:8]}"
    fs.makedirs(home)
    yield f"{home}/model.safetensors"
    fs.rmtree(home)


def model() -> dict[str, torch.Tensor]:
    """Tensors of every type of the format, and of shapes that matter."""
    tensors = {name: (torch.rand(7, 3) * 100).to(dtype) for name, dtype in DTYPES.items() if name != "F8_E8M0"}
    return tensors | {
        "large": torch.rand(3 * MIB // 4 + 1, 2),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "turned": torch.rand(40, 30).t(),
        "namé": torch.ones(5, dtype=torch.uint8),
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].contiguous().view(-1).tolist() == other[name].contiguous().view(-1).tolist()
        for name in one
    )


def contents(fs: FileSystem, path: str) -> bytes:
    with fs.open(path, "rb") as file:
        return file.read()


def put(fs: FileSystem, path: str, data: bytes) -> None:
    with fs.open(path, "wb") as file:
        file.write(data)


def test_the_package_reads_what_is_saved_here(fs: FileSystem, path: str) -> None:
    saved = model()
    save_file(saved, fs, path, {"format": "pt"})
    assert same(reference.load(contents(fs, path)), saved)
    assert read_header(fs, path).metadata == {"format": "pt"}
    assert fs.listdir(posixpath.dirname(path)) == ["model.safetensors"]


def test_what_the_package_saved_is_loaded_here(fs: FileSystem, path: str) -> None:
    saved = {name: tensor.contiguous() for name, tensor in model().items()}
    put(fs, path, reference.save(saved, {"who": "the package"}))
    loaded = load_file(fs, path)
    assert same(loaded, saved)
    assert read_header(fs, path).metadata == {"who": "the package"}
    # Views of one buffer.
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values() if tensor.numel()}) == 1


def test_tensors_are_loaded_by_name(fs: FileSystem, path: str) -> None:
    saved = model()
    save_file(saved, fs, path)
    assert same(load_file(fs, path, ["F16", "large"]), {name: saved[name] for name in ("F16", "large")})
    assert load_file(fs, path, []) == {}
    with pytest.raises(KeyError, match="no tensor 'none'"):
        load_file(fs, path, ["F16", "none"])


def test_given_tensors_are_filled_where_they_are(fs: FileSystem, path: str) -> None:
    saved = model()
    save_file(saved, fs, path)
    module = torch.nn.Linear(3, 7, bias=False)
    into = {"F32": module.weight, "turned": torch.zeros(40, 30).t(), "I64": torch.zeros(7, 3, dtype=torch.float64)}
    place = module.weight.data_ptr()
    found = load_file(fs, path, into=into)
    assert all(found[name] is tensor for name, tensor in into.items())
    assert module.weight.data_ptr() == place
    assert torch.equal(module.weight, saved["F32"])
    assert torch.equal(into["turned"], saved["turned"])
    assert torch.equal(into["I64"], saved["I64"].double())
    with pytest.raises(ValueError, match="shape"):
        load_file(fs, path, into={"F32": torch.zeros(3, 7)})


def test_a_model_in_several_files_is_found_by_its_index(fs: FileSystem, path: str) -> None:
    home, saved = posixpath.dirname(path), model()
    save_sharded(saved, fs, home, shard_bytes=MIB, metadata={"format": "pt"})
    names = fs.listdir(home)
    assert names[0] == "model-00001-of-00003.safetensors"
    assert names[-1] == "model.safetensors.index.json"
    index = json.loads(contents(fs, f"{home}/{names[-1]}"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in saved.values())
    for name, part in index["weight_map"].items():
        assert name in reference.load(contents(fs, f"{home}/{part}"))
    assert same(load_file(fs, home), saved)
    assert same(load_file(fs, f"{home}/{names[-1]}", ["namé", "BF16"]), {n: saved[n] for n in ("namé", "BF16")})
    with pytest.raises(KeyError, match="none"):
        load_file(fs, home, ["none"])
    put(fs, f"{home}/{names[-1]}", json.dumps({"weight_map": {"x": "../secret"}}).encode())
    with pytest.raises(ValueError, match="not beside it"):
        load_file(fs, home)


def test_a_header_longer_than_the_first_read_is_read_whole(fs: FileSystem, path: str) -> None:
    saved = {f"{'layer' * 20}.{number}": torch.tensor([number]) for number in range(3000)}
    save_file(saved, fs, path)
    assert same(load_file(fs, path), saved)


def test_tensors_that_are_not_aligned_in_the_file_are_loaded(fs: FileSystem, path: str) -> None:
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}'
    )
    put(fs, path, len(header).to_bytes(8, "little") + header + b"\7" + b"\0\0\x80\x3f")
    assert load_file(fs, path)["b"].tolist() == [1.0]


WRONG = {
    "short": b"123",
    "length": (1 << 40).to_bytes(8, "little") + b"{}",
    "json": (4).to_bytes(8, "little") + b"{x: ",
    "list": (4).to_bytes(8, "little") + b"[1] ",
    "gap": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
    "type": b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,1]}}',
    "shape": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1]}}',
    "end": b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}',
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_safetensors_file_is_refused(fs: FileSystem, path: str, name: str) -> None:
    data = WRONG[name]
    if data.startswith(b"{"):
        data = len(data).to_bytes(8, "little") + data + b"\0"
    put(fs, path, data)
    with pytest.raises(safetensors.SafetensorError):
        reference.load(data)
    with pytest.raises(ValueError, match="no safetensors file"):
        load_file(fs, path)


def test_a_save_that_fails_leaves_what_was_there(fs: FileSystem, path: str) -> None:
    save_file({"x": torch.ones(3)}, fs, path)
    with pytest.raises(ValueError, match="no type for"):
        save_file({"x": torch.ones(3, dtype=torch.complex128)}, fs, path)
    with pytest.raises(NotImplementedError):
        save_file({"x": torch.ones(3, device="meta")}, fs, path)
    assert load_file(fs, path)["x"].tolist() == [1.0] * 3
    # What the second has begun goes with the next save, or `fs3 checkpoint clean`.
    assert [left.name for left in catalog.unfinished(fs, posixpath.dirname(path))] == ["model.safetensors"]
    save_file({"x": torch.zeros(3)}, fs, path)
    assert fs.listdir(posixpath.dirname(path)) == ["model.safetensors"]


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_the_reader_of_fastsafetensors_reads_to_addresses(fs: FileSystem, path: str) -> None:
    saved = {"x": torch.rand(MIB)}
    save_file(saved, fs, path)
    reader = ThreeFSFileReader("/mnt/3fs", fs, entries=64, io_depth=0, buffer_size=1 << 20)
    mounted = f"/mnt/3fs{path}"
    text, header_bytes, file_bytes = reader.read_headers_batch([mounted])[mounted]
    assert json.loads(text)["x"]["shape"] == [MIB]
    for chunk in (0, 1000_000):
        found = torch.zeros(MIB)
        assert reader.read_chunked(mounted, found.data_ptr(), header_bytes, 4 * MIB, chunk) == 4 * MIB
        assert torch.equal(found, saved["x"])
    assert reader.read_chunked(mounted, 0, 0, file_bytes) == file_bytes
    room = torch.zeros(100, dtype=torch.uint8)
    assert reader.read_chunked(mounted, room.data_ptr(), file_bytes - 10, 100) == 10
    with pytest.raises(Fs3Error, match="not below"):
        reader.read_chunked("/elsewhere/x", 0, 0, 1)
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ) as readonly:
        address = torch.frombuffer(readonly, dtype=torch.uint8).data_ptr()
        for wrong in (0x10, address):
            with pytest.raises(Fs3Error, match="not the CPU's"):
                reader.read_chunked(mounted, wrong, 0, 8)
    reader.close()
