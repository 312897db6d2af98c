"""Identity of a node and of its disks: who they belong to, and that one process at a time uses them.

The node's directory holds `node.json`, `life.json` and `lock`; every disk holds `disk.json` and `lock`. All are made at
the first start and never change, except for `life.json`: the number of the node's life is greater at every start.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass
from typing import Final

from fs3.core.errors import error
from fs3.core.ids import UUID_BYTES
from fs3.v1.frame_pb2 import Code

FORMAT: Final = 1
NODE_FILE: Final = "node.json"
LIFE_FILE: Final = "life.json"
DISK_FILE: Final = "disk.json"
LOCK_FILE: Final = "lock"


class Lock:
    """An exclusive lock on a directory; the kernel gives it back when the process ends."""

    def __init__(self, directory: str, what: str) -> None:
        self._fd = os.open(os.path.join(directory, LOCK_FILE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise error(
                Code.CODE_BUSY, f"{what} {directory} is in use by another running storage service; stop that one first"
            ) from None

    def release(self) -> None:
        """Give the lock back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class DiskIdentity:
    """A disk directory and its uuid (16 bytes)."""

    path: str
    uuid: bytes


@dataclass
class NodeIdentity:
    """What :func:`open_node` found; holds the locks until :meth:`close`. ``life``: greater at every start."""

    uuid: bytes
    life: int
    disks: list[DiskIdentity]
    locks: list[Lock]

    def close(self) -> None:
        """Release the locks."""
        for lock in self.locks:
            lock.release()


def open_node(data_dir: str, disk_paths: tuple[str, ...], cluster_id: str) -> NodeIdentity:
    """Lock and identify the node and its disks, making their records at the first start.

    Raises Fs3Error with one line: BUSY when another process uses them, WRONG_CLUSTER, EXISTS for a disk of another
    node, INVALID_ARGUMENT for a record that cannot be read, ACCESS for a directory that cannot be used.
    """
    locks: list[Lock] = []
    try:
        _make_directory(data_dir, "data_dir")
        locks.append(Lock(data_dir, "data_dir"))
        node_uuid = _node_uuid(data_dir, cluster_id)
        life = _begin_life(data_dir)
        disks = []
        for path in disk_paths:
            _make_directory(path, "disk")
            # A disk may be the node's own directory.
            if not os.path.samefile(path, data_dir):
                locks.append(Lock(path, "disk"))
            disks.append(DiskIdentity(os.path.abspath(path), _disk_uuid(path, cluster_id, node_uuid)))
        if len({d.uuid for d in disks}) != len(disks):
            raise error(Code.CODE_EXISTS, "two disks have the same uuid: one is a copy of the other; remove one")
    except BaseException as exc:
        for lock in locks:
            lock.release()
        if isinstance(exc, OSError) and not hasattr(exc, "code"):
            raise error(Code.CODE_ACCESS, f"{exc.filename or data_dir} cannot be used: {exc.strerror}") from exc
        raise
    return NodeIdentity(node_uuid, life, disks, locks)


def _make_directory(path: str, what: str) -> None:
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as exc:
        raise error(Code.CODE_ACCESS, f"{what} {path} cannot be used: {exc.strerror}") from exc
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise error(Code.CODE_ACCESS, f"{what} {path} is not readable and writable")


def _node_uuid(data_dir: str, cluster_id: str) -> bytes:
    path = os.path.join(data_dir, NODE_FILE)
    record = _read(path)
    if record is None:
        uuid = os.urandom(UUID_BYTES)
        _write(path, {"format": FORMAT, "cluster_id": cluster_id, "node_uuid": uuid.hex()})
        return uuid
    _check_cluster(path, record, cluster_id)
    return _uuid(path, record, "node_uuid")


def _begin_life(data_dir: str) -> int:
    """A number greater than that of every start before: of the clock, or of the record where the clock went back."""
    path = os.path.join(data_dir, LIFE_FILE)
    record = _read(path)
    last = 0 if record is None else record.get("life")
    if not isinstance(last, int):
        raise error(Code.CODE_INVALID_ARGUMENT, f"{path} is damaged: remove it")
    life = max(last + 1, time.time_ns())
    _write(path, {"format": FORMAT, "life": life})
    return life


def _disk_uuid(directory: str, cluster_id: str, node_uuid: bytes) -> bytes:
    path = os.path.join(directory, DISK_FILE)
    record = _read(path)
    if record is None:
        if os.path.isdir(os.path.join(directory, "targets")):
            raise error(
                Code.CODE_INVALID_ARGUMENT, f"disk {directory} holds targets but no {DISK_FILE}; its record was lost"
            )
        uuid = os.urandom(UUID_BYTES)
        _write(
            path,
            {"format": FORMAT, "cluster_id": cluster_id, "disk_uuid": uuid.hex(), "node_uuid": node_uuid.hex()},
        )
        return uuid
    _check_cluster(path, record, cluster_id)
    owner = _uuid(path, record, "node_uuid")
    if owner != node_uuid:
        raise error(
            Code.CODE_EXISTS,
            f"disk {directory} belongs to node {owner.hex()}, not to this one ({node_uuid.hex()}); name the right disk",
        )
    return _uuid(path, record, "disk_uuid")


def _check_cluster(path: str, record: dict[str, object], cluster_id: str) -> None:
    if record.get("format") != FORMAT:
        raise error(
            Code.CODE_NOT_SUPPORTED, f"{path} has format {record.get('format')}; this fs3 reads format {FORMAT}"
        )
    if record.get("cluster_id") != cluster_id:
        raise error(
            Code.CODE_WRONG_CLUSTER,
            f"{path} belongs to cluster {record.get('cluster_id')!r}, this service to {cluster_id!r}; "
            "name the right directory",
        )


def _uuid(path: str, record: dict[str, object], key: str) -> bytes:
    try:
        uuid = bytes.fromhex(str(record.get(key)))
    except ValueError:
        uuid = b""
    if len(uuid) != UUID_BYTES:
        raise error(Code.CODE_INVALID_ARGUMENT, f"{path} is damaged: {key} is not 32 hexadecimal digits")
    return uuid


def _read(path: str) -> dict[str, object] | None:
    try:
        with open(path, "rb") as handle:
            record = json.load(handle)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise error(Code.CODE_ACCESS, f"{path} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise error(Code.CODE_INVALID_ARGUMENT, f"{path} is damaged: it is not JSON") from exc
    if not isinstance(record, dict):
        raise error(Code.CODE_INVALID_ARGUMENT, f"{path} is damaged: it is not a JSON object")
    return record


def _write(path: str, record: dict[str, object]) -> None:
    """Write durably and atomically: a crash leaves the whole record or none."""
    temporary = path + ".tmp"
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(json.dumps(record) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
