"""What the KV cache is measured beside: redis, memcached, local files.

redis is measured twice: by redis-py with hiredis, which is what software uses, and, as memcached is, by the fastest
client that Python allows: one connection that sends from and receives into memory of the caller, reused. All go over
TCP on loopback; neither server writes to a disk. Both are installed by apt-get where they are missing and we are root.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

import redis as redis_py
from redis._parsers import Encoder
from redis.connection import ConnectionPool, PythonRespSerializer

from fs3.testing.ports import lasting_ports

START_S_MAX = 10.0
HEADER_BYTES_MAX = 4096
# Of a message that is sent, buffers that one system call takes.
SEND_BUFFERS_MAX = 512
# From here on redis-py packs a put faster by itself than hiredis does.
LARGE_PUT_BYTES = 256 << 10


class Unavailable(Exception):
    """A peer cannot be had here; says why and what to do."""


class Store(Protocol):
    """Values by key. The memory of a call is the caller's, and used before the call returns."""

    name: str
    pids: list[int]

    def put(self, keys: Sequence[bytes], values: Sequence[memoryview]) -> None:
        """Store values; several keys in one exchange."""

    def get(self, keys: Sequence[bytes], targets: Sequence[memoryview]) -> Sequence[bytes | memoryview]:
        """The values, several keys in one exchange: in `targets`, which have their length, or in memory of its own.

        Raises KeyError on a miss.
        """


class Files:
    """A file for each key in a directory, in the page cache, rewritten in place."""

    name = "files"

    def __init__(self, directory: Path) -> None:
        self.pids: list[int] = []
        self._directory = directory

    def put(self, keys: Sequence[bytes], values: Sequence[memoryview]) -> None:
        """One file after the other."""
        for key, value in zip(keys, values, strict=True):
            file = os.open(self._directory / key.decode(), os.O_WRONLY | os.O_CREAT)
            try:
                if os.pwrite(file, value, 0) != len(value):
                    raise OSError("a short write")
            finally:
                os.close(file)

    def get(self, keys: Sequence[bytes], targets: Sequence[memoryview]) -> Sequence[memoryview]:
        """One file after the other."""
        for key, target in zip(keys, targets, strict=True):
            file = os.open(self._directory / key.decode(), os.O_RDONLY)
            try:
                if os.preadv(file, [target], 0) != len(target):
                    raise KeyError(key)
            finally:
                os.close(file)
        return targets


class _Connection:
    """A TCP connection whose answers are lines and values."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ahead = bytearray()

    def send(self, parts: list[bytes | memoryview]) -> None:
        """All of `parts`, without joining them."""
        for start in range(0, len(parts), SEND_BUFFERS_MAX):
            views = [memoryview(part) for part in parts[start : start + SEND_BUFFERS_MAX]]
            while views:
                sent = self._socket.sendmsg(views)
                while views and sent >= len(views[0]):
                    sent -= len(views.pop(0))
                if views:
                    views[0] = views[0][sent:]

    def line(self) -> bytes:
        """The next line, without its end."""
        while (end := self._ahead.find(b"\r\n")) < 0:
            received = self._socket.recv(HEADER_BYTES_MAX)
            if not received:
                raise ConnectionError("the server has closed the connection")
            self._ahead += received
        found = bytes(self._ahead[:end])
        del self._ahead[: end + 2]
        return found

    def value(self, target: memoryview) -> None:
        """Fill `target` and take the end of line behind it."""
        have = min(len(self._ahead), len(target))
        target[:have] = self._ahead[:have]
        del self._ahead[:have]
        while have < len(target):
            received = self._socket.recv_into(target[have:])
            if received == 0:
                raise ConnectionError("the server has closed the connection")
            have += received
        if self.line():
            raise ConnectionError("the value is longer than asked for")

    def close(self) -> None:
        """End it."""
        self._socket.close()


class RedisPy:
    """redis by its usual client, redis-py with hiredis; its own code packs large puts, as it is faster at them."""

    name = "redis"

    def __init__(self, port: int, pid: int) -> None:
        if not redis_py.utils.HIREDIS_AVAILABLE:
            raise Unavailable("hiredis is missing, without which redis-py is slow: make workloads")
        self.pids = [pid]
        packer = PythonRespSerializer(6000, Encoder("utf-8", "strict", False).encode)
        self._small = redis_py.Redis(port=port)
        self._large = redis_py.Redis(connection_pool=ConnectionPool(port=port, command_packer=packer))

    def put(self, keys: Sequence[bytes], values: Sequence[memoryview]) -> None:
        """`set`, or `mset` for several."""
        client = self._large if sum(map(len, values)) >= LARGE_PUT_BYTES else self._small
        if len(keys) == 1:
            client.set(keys[0], values[0])
        else:
            client.mset(dict(zip(keys, values, strict=True)))

    def get(self, keys: Sequence[bytes], targets: Sequence[memoryview]) -> Sequence[bytes]:
        """`get`, or `mget` for several."""
        found = [self._small.get(keys[0])] if len(keys) == 1 else self._small.mget(keys)
        if None in found:
            raise KeyError(keys[found.index(None)])
        return found

    def close(self) -> None:
        """End the connections."""
        self._small.close()
        self._large.close()


class Redis:
    """redis in its own protocol."""

    name = "redis, raw"

    def __init__(self, port: int, pid: int) -> None:
        self.pids = [pid]
        self._connection = _Connection(port)

    def put(self, keys: Sequence[bytes], values: Sequence[memoryview]) -> None:
        """SET, or MSET for several."""
        parts: list[bytes | memoryview] = [
            b"*%d\r\n" % (1 + 2 * len(keys)),
            _bulk(b"SET" if len(keys) == 1 else b"MSET"),
        ]
        for key, value in zip(keys, values, strict=True):
            parts += [_bulk(key) + b"$%d\r\n" % len(value), value, b"\r\n"]
        self._connection.send(parts)
        if (answer := self._connection.line()) != b"+OK":
            raise OSError(answer.decode())

    def get(self, keys: Sequence[bytes], targets: Sequence[memoryview]) -> Sequence[memoryview]:
        """GET, or MGET for several."""
        command = b"GET" if len(keys) == 1 else b"MGET"
        self._connection.send([b"*%d\r\n" % (1 + len(keys)), b"".join(map(_bulk, [command, *keys]))])
        if len(keys) > 1:
            self._connection.line()
        for key, target in zip(keys, targets, strict=True):
            if self._connection.line() != b"$%d" % len(target):
                raise KeyError(key)
            self._connection.value(target)
        return targets

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


def _bulk(text: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(text), text)


class Memcached:
    """memcached in its text protocol."""

    name = "memcached, raw"

    def __init__(self, port: int, pid: int) -> None:
        self.pids = [pid]
        self._connection = _Connection(port)

    def put(self, keys: Sequence[bytes], values: Sequence[memoryview]) -> None:
        """A `set` for each, all sent before the answers are read."""
        parts: list[bytes | memoryview] = []
        for key, value in zip(keys, values, strict=True):
            parts += [b"set %s 0 0 %d\r\n" % (key, len(value)), value, b"\r\n"]
        self._connection.send(parts)
        for _ in keys:
            if (answer := self._connection.line()) != b"STORED":
                raise OSError(answer.decode())

    def get(self, keys: Sequence[bytes], targets: Sequence[memoryview]) -> Sequence[memoryview]:
        """One `get` for all."""
        self._connection.send([b"get %s\r\n" % b" ".join(keys)])
        for key, target in zip(keys, targets, strict=True):
            if self._connection.line() != b"VALUE %s 0 %d" % (key, len(target)):
                raise KeyError(key)
            self._connection.value(target)
        if self._connection.line() != b"END":
            raise OSError("more values than asked for")
        return targets

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


def _program(name: str, package: str) -> str:
    """The path of a server, installed if need be."""
    found = shutil.which(name)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package]
        subprocess.run(
            install, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, check=False
        )
        found = shutil.which(name)
    if found is None:
        raise Unavailable(f"{name} is missing: install {package} (as root: apt-get install {package})")
    return found


@contextmanager
def _served(command: list[str], port: int) -> Iterator[int]:
    """A server that accepts connections; its pid. It ends with the context."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ends_s = time.monotonic() + START_S_MAX
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                if server.poll() is not None or time.monotonic() > ends_s:
                    raise Unavailable(f"{command[0]} does not start") from None
                time.sleep(0.02)
        yield server.pid
    finally:
        server.kill()
        server.wait()


@contextmanager
def redis(memory_mib: int) -> Iterator[list[Store]]:
    """Two clients of a redis of its own, without persistence. Raises Unavailable."""
    [port] = lasting_ports(1)
    options = (
        f"--port {port} --bind 127.0.0.1 --appendonly no --maxmemory {memory_mib}mb --maxmemory-policy allkeys-lru"
    )
    command = [_program("redis-server", "redis-server"), *options.split(), "--save", ""]
    with _served(command, port) as pid, closing(RedisPy(port, pid)) as usual, closing(Redis(port, pid)) as raw:
        yield [usual, raw]


@contextmanager
def memcached(memory_mib: int) -> Iterator[list[Store]]:
    """A client of a memcached of its own. Raises Unavailable."""
    [port] = lasting_ports(1)
    options = f"-l 127.0.0.1 -p {port} -U 0 -t 2 -I 8m -m {memory_mib} -u {'root' if os.geteuid() == 0 else 'nobody'}"
    command = [_program("memcached", "memcached"), *options.split()]
    with _served(command, port) as pid, closing(Memcached(port, pid)) as peer:
        yield [peer]
