"""Safetensors files straight between fs3 and tensor memory.

The format (huggingface/safetensors, README "Format"): 8 bytes with the length of the header, little-endian; the header,
JSON, padded with spaces; the tensors' bytes in C order, without gaps. A model in several files has an index,
``*.safetensors.index.json``, that says which tensor is in which.
"""

from __future__ import annotations

import json
import math
import posixpath
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from fs3.checkpoint import catalog
from fs3.checkpoint.manifest import split, temporary
from fs3.checkpoint.pytorch import torch
from fs3.checkpoint.stream import ChunkStream, write_file, write_small
from fs3.client import FileSystem
from fs3.client.buffers import exported
from fs3.client.file import RawFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
METADATA = "__metadata__"
# What is read of a file at first: the whole header of all but the largest models.
HEAD_BYTES = 256 << 10
# The limit of the safetensors package.
HEADER_BYTES_MAX = 100_000_000
# Where tensors that are not neighbours in a file begin in the buffer that they are read into.
ALIGN_BYTES = 64

_TYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
DTYPES: dict[str, Any] = {name: getattr(torch, attribute) for name, attribute in _TYPES.items()}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file. `start` and `end` are bytes of the file."""

    dtype: Any
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file holds."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


# ---- saving


def save_file(
    tensors: Mapping[str, torch.Tensor], fs: FileSystem, path: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to the safetensors file `path`, in place of one that is there; `metadata` is text by name.

    Tensors are written from where they are; those with gaps or elsewhere than on the CPU are copied first. Tensors that
    share memory are written once each. The file appears whole, in one step, and survives power loss when this returns.
    Raises ValueError for what the format has no type for.
    """
    directory, name = split(path)
    for left in catalog.unfinished(fs, directory):
        if left.name == name:
            catalog.remove(fs, left)
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header = dump_header(ordered, metadata or {})

    def produce(stream: ChunkStream) -> None:
        stream.add(memoryview(header))
        for tensor in ordered.values():
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            stream.add(memoryview(exported(plain)).cast("B"))

    unfinished = temporary(path)
    write_file(fs, unfinished, produce, claimed=True)
    fs.replace(unfinished, path)


def save_sharded(
    tensors: Mapping[str, torch.Tensor],
    fs: FileSystem,
    directory: str,
    *,
    shard_bytes: int = 5 << 30,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model to a directory as Hugging Face's libraries do: files of at most `shard_bytes`, and their index.

    A tensor that is larger has a file of its own. Without need for several files there is one, and no index. The index
    is written last; files that are there are replaced one by one.
    """
    fs.makedirs(directory, exist_ok=True)
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        save_file(shards[0], fs, posixpath.join(directory, SINGLE), metadata)
        return
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, fs, posixpath.join(directory, name), metadata)
        placed |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    unfinished = temporary(posixpath.join(directory, INDEX))
    write_small(fs, {unfinished: json.dumps(index, indent=2, sort_keys=True).encode()})
    fs.replace(unfinished, posixpath.join(directory, INDEX))


def _shards(tensors: Mapping[str, torch.Tensor], shard_bytes: int) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def dump_header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The header of a file with these tensors in this order, its length before it."""
    listed: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name}: safetensors has no type for {tensor.dtype}")
        if name == METADATA:
            raise ValueError(f"{METADATA} is no name for a tensor")
        end = at + tensor.nbytes
        listed[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# ---- loading


def load_file(
    fs: FileSystem,
    path: str,
    names: Iterable[str] | None = None,
    *,
    into: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a model, or those of `names`: of a safetensors file, an index, or a directory that has either.

    All ranges go out in one batch, into one buffer for each file; the tensors are views of these, so a buffer lives as
    long as any tensor of it. With `into`, tensors by name are filled instead, in place where they are contiguous, of
    the same type and on the CPU. Raises FileNotFoundError, KeyError for a name that is not there, ValueError for what
    is no safetensors file and for a tensor in `into` of another shape.
    """
    placed = _files(fs, path)
    if names is not None or into is not None:
        placed = _chosen(placed, set(into or () if names is None else names), path)
    with ExitStack() as stack:
        files = [stack.enter_context(fs.open(name, "rb", buffering=0)) for name in placed]
        loads = [
            _Load(file, header, held, into or {})
            for file, header, held in zip(files, _headers(fs, files), placed.values(), strict=True)
        ]
        reads = [read for load in loads for read in load.reads]
        for (file, offset, view), count in zip(reads, fs.read_many(reads), strict=True):
            if count < len(view):
                raise ValueError(f"{file.name} ends at byte {offset + count}, in the middle of a tensor")
        return {name: tensor for load in loads for name, tensor in load.results().items()}


def read_header(fs: FileSystem, path: str) -> Header:
    """What a safetensors file holds, without reading any tensor. Raises ValueError when it is none."""
    with fs.open(path, "rb", buffering=0) as file:
        return _headers(fs, [file])[0]


def _files(fs: FileSystem, path: str) -> dict[str, set[str] | None]:
    """The files of a model with the names in each; None where there is no index that says so."""
    if fs.isdir(path):
        index = posixpath.join(path, INDEX)
        path = index if fs.exists(index) else posixpath.join(path, SINGLE)
    if not path.endswith(".json"):
        return {path: None}
    with fs.open(path, "rb") as file:
        try:
            placed = json.load(file)["weight_map"]
            found: dict[str, set[str] | None] = {}
            for name, part in placed.items():
                if "/" in part:
                    raise ValueError(f"it names {part!r}, which is not beside it")
                held = found.setdefault(posixpath.join(posixpath.dirname(path), part), set())
                assert held is not None
                held.add(name)
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise ValueError(f"{path} is no index of safetensors files: {e}") from e
    return found


def _chosen(files: dict[str, set[str] | None], wanted: set[str], path: str) -> dict[str, set[str] | None]:
    """The files that have wanted names, and which."""
    chosen = {file: wanted if held is None else held & wanted for file, held in files.items()}
    missing = wanted.difference(*chosen.values())
    if missing:
        raise KeyError(f"{path} has no tensor {min(missing)!r}")
    return {file: held for file, held in chosen.items() if held}


def _headers(fs: FileSystem, files: list[RawFile]) -> list[Header]:
    """The headers of files, in two batches at most."""
    heads = fs.read_batch([(file, 0, min(HEAD_BYTES, file.length)) for file in files])
    lengths = [_header_bytes(file, head) for file, head in zip(files, heads, strict=True)]
    long = [number for number, length in enumerate(lengths) if 8 + length > len(heads[number])]
    rest = fs.read_batch([(files[number], 0, 8 + lengths[number]) for number in long])
    for number, head in zip(long, rest, strict=True):
        heads[number] = head
    return [
        parse_header(bytes(head[8 : 8 + length]), file.length, file.name)
        for file, head, length in zip(files, heads, lengths, strict=True)
    ]


def _header_bytes(file: RawFile, head: memoryview) -> int:
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > min(HEADER_BYTES_MAX, file.length - 8):
        raise ValueError(f"{file.name} is no safetensors file: its header does not fit into it")
    return length


def parse_header(text: bytes, file_bytes: int, name: str) -> Header:
    """Parse and check a header without its length. Raises ValueError that names the file."""
    try:
        listed = json.loads(text)
        metadata = listed.pop(METADATA, {})
        tensors = {tensor: _entry(fields, 8 + len(text)) for tensor, fields in listed.items()}
        end = 8 + len(text)
        for tensor, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != end:
                raise ValueError(f"{tensor} does not begin where the one before it ends")
            end = entry.end
        if end != file_bytes:
            raise ValueError(f"its tensors end at byte {end} of {file_bytes}")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{name} is no safetensors file: {e}") from e
    return Header(tensors, metadata)


def _entry(fields: dict[str, Any], base: int) -> Entry:
    kind, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    if kind not in DTYPES:
        raise ValueError(f"type {kind} is not known here")
    if any(size < 0 for size in shape) or end - start != math.prod(shape) * DTYPES[kind].itemsize:
        raise ValueError(f"a tensor of shape {shape} and type {kind} does not have {end - start} bytes")
    return Entry(DTYPES[kind], shape, base + start, base + end)


class _Load:
    """What is wanted of one file: the reads that bring it, and then the tensors."""

    def __init__(self, file: RawFile, header: Header, names: set[str] | None, into: Mapping[str, torch.Tensor]) -> None:
        missing = (names or set()) - header.tensors.keys()
        if missing:
            raise KeyError(f"{file.name} has no tensor {min(missing)!r}")
        wanted = {name: entry for name, entry in header.tensors.items() if names is None or name in names}
        self._entries = dict(sorted(wanted.items(), key=lambda item: item[1].start))
        self._into = into
        self._places: dict[str, int] = {}
        self.reads: list[tuple[RawFile, int, memoryview]] = []
        self._plan(file)

    def _plan(self, file: RawFile) -> None:
        buffered = []
        for name, entry in self._entries.items():
            target = self._into.get(name)
            if target is not None and tuple(target.shape) != entry.shape:
                raise ValueError(f"{name} has shape {entry.shape}, the tensor to fill {tuple(target.shape)}")
            if target is not None and _fits(target, entry):
                self.reads.append((file, entry.start, memoryview(exported(target)).cast("B")))
            else:
                buffered.append((name, entry))
        # Neighbours in the file are neighbours in the buffer, and one read.
        runs: list[tuple[int, int, int]] = []
        size = 0
        for name, entry in buffered:
            if runs and runs[-1][1] == entry.start:
                runs[-1] = (runs[-1][0], entry.end, runs[-1][2])
            else:
                size += -size % ALIGN_BYTES
                runs.append((entry.start, entry.end, size))
            self._places[name] = size
            size += entry.end - entry.start
        self._buffer = torch.empty(size, dtype=torch.uint8)
        view = memoryview(exported(self._buffer)).cast("B")
        self.reads += [(file, start, view[at : at + end - start]) for start, end, at in runs if end > start]

    def results(self) -> dict[str, torch.Tensor]:
        """The tensors by name, once the reads are done."""
        found = {}
        for name, entry in self._entries.items():
            target = self._into.get(name)
            if name in self._places:
                loaded = self._view(self._places[name], entry)
                target = loaded if target is None else target.detach().copy_(loaded)
            found[name] = self._into.get(name, target)
        return found

    def _view(self, at: int, entry: Entry) -> torch.Tensor:
        data = self._buffer[at : at + entry.end - entry.start]
        if at % entry.dtype.itemsize:
            # Its writer did not align it.
            data = data.clone()
        return data.view(entry.dtype).reshape(entry.shape)


def _fits(target: torch.Tensor, entry: Entry) -> bool:
    """Whether bytes of the file may go straight into `target`."""
    lazy = target.is_conj() or target.is_neg()
    return target.device.type == "cpu" and target.dtype == entry.dtype and target.is_contiguous() and not lazy
