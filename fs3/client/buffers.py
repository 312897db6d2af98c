"""Memory of callers: what takes part in the buffer protocol, NumPy arrays of every type, and tensors."""

from __future__ import annotations

import ctypes
import math
import re
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class Tensor(Protocol):
    """What is asked of a tensor on the CPU; ``torch.Tensor`` has it. `device` and lazy conjugates are looked at too."""

    def data_ptr(self) -> int:
        """Where its memory is."""

    def element_size(self) -> int:
        """Bytes of an element."""

    def numel(self) -> int:
        """Elements."""

    def is_contiguous(self) -> bool:
        """Whether the memory has no gaps."""


# Memory that is read into, and memory that is written from.
Writable: TypeAlias = "WriteableBuffer | Tensor"
Readable: TypeAlias = "ReadableBuffer | Tensor"

_PLAIN = (bytes, bytearray, memoryview)
# Types of `__array_interface__` that are plain bytes: numbers, times, and records, which is what bfloat16 looks like.
_PLAIN_TYPE = re.compile(r"[<>|=]?[biufcmMV](\d+)")


def exported(memory: Any) -> Any:
    """`memory` as an object of the buffer protocol; the same bytes, never a copy. The result keeps `memory` alive.

    Taken are bytes-like objects, arrays whose type the buffer protocol does not know (datetime64, bfloat16) by their
    ``__array_interface__``, and tensors on the CPU with the interface of ``torch.Tensor``. Raises BufferError for what
    is not contiguous, TypeError for tensors elsewhere and arrays of Python objects.
    """
    if isinstance(memory, _PLAIN):
        return memory
    if hasattr(memory, "data_ptr") and hasattr(memory, "element_size"):
        return _tensor(memory)
    try:
        # Exports of ctypes lack strides, which the native client asks for; those of memoryview have them. So it is with
        # the shape of a single value.
        view = memoryview(memory)
        view = view if view.ndim else view.cast("B")
    except (TypeError, ValueError, BufferError):
        interface = getattr(memory, "__array_interface__", None)
        # Anything else is refused by the native client, in its words.
        return memory if interface is None else _array(memory, interface)
    # Names of fields stand between colons.
    if "O" in re.sub(":[^:]*:", "", view.format):
        raise TypeError("an array of Python objects has no bytes to read or write")
    return view


def _tensor(tensor: Any) -> memoryview:
    if str(tensor.device).partition(":")[0] != "cpu":
        raise TypeError(f"the tensor is on {tensor.device}: only memory of the CPU can be used; see tensor.cpu()")
    if not tensor.is_contiguous():
        raise BufferError("the tensor must be contiguous; see tensor.contiguous()")
    if getattr(tensor, "is_conj", bool)() or getattr(tensor, "is_neg", bool)():
        raise BufferError("the tensor is a lazy conjugate or negative; see tensor.resolve_conj() and resolve_neg()")
    return _at(tensor.data_ptr(), tensor.numel() * tensor.element_size(), tensor)


def _array(array: Any, interface: dict[str, Any]) -> memoryview:
    kind = _PLAIN_TYPE.match(interface["typestr"])
    if kind is None or "O'" in repr(interface.get("descr")):
        raise TypeError(f"an array of type {interface['typestr']} has no bytes to read or write")
    if interface.get("strides") is not None:
        raise BufferError("the array must be contiguous (C order)")
    address, readonly = interface["data"]
    view = _at(address, math.prod(interface["shape"]) * int(kind[1]), array)
    return view.toreadonly() if readonly else view


def _at(address: int, length: int, owner: Any) -> memoryview:
    """Memory at an address; what `owner` is kept alive by every export of it."""
    if length == 0:
        return memoryview(bytearray())
    memory = (ctypes.c_char * length).from_address(address)
    memory._owner = owner  # type: ignore[attr-defined]
    return memoryview(memory)


def flat(memory: Any) -> memoryview:
    """The bytes of contiguous, writable memory of any kind that :func:`exported` takes."""
    buffer = exported(memory)
    view = memoryview(buffer)
    if view.readonly or not view.c_contiguous:
        raise BufferError(f"memory to read into must be {'writable' if view.readonly else 'contiguous (C order)'}")
    try:
        return view.cast("B")
    except (TypeError, ValueError):
        # Records, and shapes with a zero.
        return memoryview((ctypes.c_char * view.nbytes).from_buffer(buffer) if view.nbytes else bytearray()).cast("B")
