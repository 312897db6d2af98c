"""A mount that goes on in another daemon: the socket over which its successor asks for it.

Messages are JSON with their length before them. The successor asks for the parameters, then for the mount, which
comes with descriptors of the kernel's device and of memory that programs announced, then for more descriptors until
it has all. When it is ready to serve the mount it tells its predecessor to depart, and takes the first request from
the kernel once that has answered. A successor that goes away before has taken none, and the predecessor serves on.
Whoever uses the mount only waits meanwhile.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fs3.core.errors import Fs3Error, error
from fs3.v1.frame_pb2 import Code

MESSAGE_BYTES_MAX = 1 << 30
# Of one message: the kernel takes 253.
DESCRIPTORS_MAX = 250
# How long the other end may take for one step.
STEP_S_MAX = 60.0

_LENGTH = struct.Struct("!I")


class HandsOver(Protocol):
    """What the native mount does of it."""

    def hand_over(self, successor: bytes) -> tuple[bytes, list[int]]:
        """Stop serving; the state, and descriptors of the device and of memory."""

    def take_back(self, successor: bytes) -> None:
        """Serve again."""

    def depart(self) -> None:
        """The mount is the successor's."""


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """A name of the socket that is short enough for the system, however long its directory's is."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _send(channel: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    data = json.dumps(message).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    channel.sendmsg([_LENGTH.pack(len(data))], rights)
    channel.sendall(data)


def _receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next message, empty at the end, and the descriptors that came with it."""
    head, descriptors, _, _ = socket.recv_fds(channel, _LENGTH.size, DESCRIPTORS_MAX)
    if not head:
        return {}, []
    (length,) = _LENGTH.unpack(head + _exactly(channel, _LENGTH.size - len(head)))
    if length > MESSAGE_BYTES_MAX:
        raise error(Code.CODE_PROTOCOL, f"a message of {length} bytes is too long")
    message = json.loads(_exactly(channel, length))
    if not isinstance(message, dict):
        raise error(Code.CODE_PROTOCOL, "a message is an object")
    return message, descriptors


def _exactly(channel: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        if (got := channel.recv_into(view)) == 0:
            raise error(Code.CODE_UNAVAILABLE, "the other daemon ended in the middle of a message")
        view = view[got:]
    return bytes(data)


class Opens(Protocol):
    """What only one of two daemons can have at a time."""

    def open(self) -> None:
        """Have it."""

    def close(self) -> None:
        """Have it no more."""


class Door:
    """Where a successor asks a daemon for its mount. Serves on a thread of its own until it is closed."""

    def __init__(self, path: Path, parameters: Callable[[], str], mount: HandsOver, single: Opens) -> None:
        """Listens at `path`, which is made. `parameters`: those of the daemon, as JSON.

        `single` is closed before a successor serves, and opened again if it fails.
        """
        self._path = path
        self._parameters = parameters
        self._mount = mount
        self._single = single
        self.departed = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        with _address(path) as address:
            self._listener.bind(address)
        path.chmod(0o600)
        self._inode = path.stat().st_ino
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, name="fs3-mount-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nobody can ask any more. The socket goes, unless a successor has put its own in its place."""
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        # Closing alone does not end an accept() that waits.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while not self.departed:
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return
            with channel, contextlib.suppress(OSError, ValueError, KeyError, Fs3Error):
                channel.settimeout(STEP_S_MAX)
                if _peer_uid(channel) in (0, os.geteuid()):
                    self._answer(channel)

    def _answer(self, channel: socket.socket) -> None:
        while not self.departed:
            message, _ = _receive(channel)
            match message.get("ask"):
                case "parameters":
                    _send(channel, {"parameters": json.loads(self._parameters())})
                case "mount":
                    self._give(channel, bytes.fromhex(message["client"]))
                case _:
                    return

    @staticmethod
    def _send_all(channel: socket.socket, state: bytes, descriptors: Sequence[int]) -> bool:
        """Send in portions, each when that before has arrived: the system bounds what is on its way. False: it left."""
        first = {"state": state.decode(), "descriptors": len(descriptors)}
        _send(channel, first, descriptors[:DESCRIPTORS_MAX])
        for start in range(DESCRIPTORS_MAX, len(descriptors), DESCRIPTORS_MAX):
            if _receive(channel)[0].get("ask") != "more":
                return False
            _send(channel, {"start": start}, descriptors[start : start + DESCRIPTORS_MAX])
        return True

    def _give(self, channel: socket.socket, successor: bytes) -> None:
        try:
            state, descriptors = self._mount.hand_over(successor)
        except Fs3Error as e:
            _send(channel, {"code": e.code, "message": e.message})
            return
        self._single.close()
        try:
            try:
                if not self._send_all(channel, state, descriptors):
                    return
            finally:
                _close_all(descriptors)
            # However long it takes: one that has not gone away may still take over locks.
            channel.settimeout(None)
            if _receive(channel)[0].get("ask") == "depart":
                # Cannot be sent to one that has gone away; who gets it may serve, and two must not.
                _send(channel, {"departed": True})
                self.departed = True
        finally:
            if self.departed:
                self._mount.depart()
            else:
                self._mount.take_back(successor)
                self._single.open()


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _peer_uid(channel: socket.socket) -> int:
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid


class Predecessor:
    """The daemon that serves a mount, as seen by its successor. Also a context manager that closes the connection."""

    def __init__(self, path: Path) -> None:
        """Raises UNAVAILABLE when no daemon listens at `path`."""
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channel.settimeout(STEP_S_MAX)
        try:
            with _address(path) as address:
                self._channel.connect(address)
        except OSError as e:
            self._channel.close()
            message = f"no daemon that hands over its mount listens at {path}: {e.strerror}"
            raise error(Code.CODE_UNAVAILABLE, message) from e

    def __enter__(self) -> Predecessor:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def _ask(self, message: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        try:
            _send(self._channel, message)
            answer, descriptors = _receive(self._channel)
        except OSError as e:
            raise error(Code.CODE_UNAVAILABLE, f"the daemon that serves the mount does not answer: {e}") from e
        if "code" in answer:
            raise error(int(answer["code"]), str(answer["message"]))
        if not answer:
            raise error(Code.CODE_UNAVAILABLE, "the daemon that serves the mount has ended")
        return answer, descriptors

    def parameters(self) -> dict[str, Any]:
        """Its parameters, as JSON gives them."""
        answer, _ = self._ask({"ask": "parameters"})
        parameters: dict[str, Any] = answer["parameters"]
        return parameters

    def hand_over(self, successor: bytes) -> tuple[bytes, list[int]]:
        """Have it stop and give the mount to the client with this id: the state, and descriptors, now the caller's."""
        answer, descriptors = self._ask({"ask": "mount", "client": successor.hex()})
        try:
            while len(descriptors) < answer.get("descriptors", 0):
                _, more = self._ask({"ask": "more"})
                if not more:
                    raise error(Code.CODE_PROTOCOL, "the daemon that serves the mount gives too few descriptors")
                descriptors += more
        except BaseException:
            _close_all(descriptors)
            raise
        return str(answer["state"]).encode(), descriptors

    def depart(self) -> None:
        """Have it leave the mount, which must not be served here before this returns.

        Raises UNAVAILABLE when it did not answer: it may serve on.
        """
        self._ask({"ask": "depart"})
