"""Memory of all kinds is used in place, or refused with a reason."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fs3 import native
from fs3.client.buffers import exported, flat


@dataclass
class Tensor:
    """The part of ``torch.Tensor`` that tells where its memory is; like it, no buffer."""

    array: Any
    device: str = "cpu"
    conjugate: bool = False

    def data_ptr(self) -> int:
        address: int = self.array.ctypes.data
        return address

    def element_size(self) -> int:
        size: int = self.array.itemsize
        return size

    def numel(self) -> int:
        count: int = self.array.size
        return count

    def is_contiguous(self) -> bool:
        return bool(self.array.flags.c_contiguous)

    def is_conj(self) -> bool:
        return self.conjugate

    def numpy(self) -> Any:
        raise TypeError("Got unsupported ScalarType BFloat16")


@pytest.mark.parametrize(
    "memory",
    [
        bytearray(16),
        memoryview(bytearray(16)),
        mmap.mmap(-1, 16),
        (ctypes.c_int32 * 4)(),
        np.zeros((2, 2), np.float32),
        np.zeros(2, "M8[s]"),
        np.zeros((), np.complex128),
        np.zeros(2, [("O", "i4"), ("b", "f4")]),
        Tensor(np.zeros((4, 2), np.int16)),
    ],
    ids=lambda memory: type(memory).__name__,
)
def test_memory_is_used_in_place(memory: Any) -> None:
    view = flat(memory)
    assert view.nbytes == 16
    view[0] = 7
    assert bytes(flat(memory))[:1] == b"\7"
    assert memoryview(exported(memory)).nbytes == 16
    assert native.crc32c(exported(memory)) == native.crc32c(bytes(view))


def test_an_export_keeps_its_owner_alive() -> None:
    tensor = Tensor(np.full(4096, 9, np.uint8))
    view = flat(tensor)
    del tensor
    junk = [np.zeros(4096, np.uint8) for _ in range(50)]
    assert bytes(view) == b"\t" * 4096
    assert len(junk) == 50


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_empty_memory_is_fine(shape: tuple[int, ...]) -> None:
    for memory in (np.zeros(shape), np.zeros(shape, "M8[s]"), Tensor(np.zeros(shape))):
        assert flat(memory).nbytes == 0


def test_what_has_gaps_is_refused() -> None:
    gaps = np.zeros(8, np.uint8)[::2]
    for memory in (gaps, Tensor(gaps), np.zeros((2, 3), "M8[s]").T):
        with pytest.raises(BufferError, match="contiguous"):
            flat(memory)


def test_what_cannot_be_written_is_refused() -> None:
    frozen, times = np.zeros(4), np.zeros(4, "M8[s]")
    frozen.flags.writeable = times.flags.writeable = False
    for memory in (b"abc", frozen, times):
        with pytest.raises(BufferError, match="writable"):
            flat(memory)


def test_python_objects_are_never_overwritten() -> None:
    for memory in (
        np.zeros(2, object),
        np.zeros(2, [("a", "i4"), ("b", object)]),
        np.zeros(2, [("a", "M8[s]"), ("b", "O")]),
    ):
        with pytest.raises(TypeError, match="no bytes to read or write"):
            exported(memory)


def test_tensors_elsewhere_say_where_they_are() -> None:
    with pytest.raises(TypeError, match=r"on cuda:1.*tensor\.cpu\(\)"):
        exported(Tensor(np.zeros(2), device="cuda:1"))
    with pytest.raises(BufferError, match="resolve_conj"):
        exported(Tensor(np.zeros(2), conjugate=True))


def test_tensors_of_torch_are_used_in_place() -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch: make workloads")
    for tensor in (torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, requires_grad=True), torch.zeros(2, 2)):
        flat(tensor)[:2] = b"\x80\x3f"
        assert tensor.flatten()[0] != 0
    with pytest.raises(BufferError, match="contiguous"):
        flat(torch.zeros(4, 4).T)
    with pytest.raises(TypeError, match="meta"):
        flat(torch.zeros(4, device="meta"))
