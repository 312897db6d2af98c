"""Locks of flock(2) and fcntl(2) that hold between mounts, for the fusepy engine; as `locks.rs` of the native one.

The service knows who holds what; here is remembered which owners may hold something, so that closing ends it, and who
waits. Waits are tasks of one event loop: they take no thread of those that serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from fs3.fuse.python_handles import Handle
from fs3.native import Attr, Client
from fs3.v1.meta_pb2 import LockKind, LockType

log = logging.getLogger(__name__)

OFFSET_MAX = (1 << 63) - 1
CLOSE_WAIT_S = 5.0
_TYPES = {
    fcntl.F_RDLCK: LockType.LOCK_TYPE_READ,
    fcntl.F_WRLCK: LockType.LOCK_TYPE_WRITE,
    fcntl.F_UNLCK: LockType.LOCK_TYPE_UNLOCK,
}


class Lock(NamedTuple):
    """A lock, in the order in which the native module takes it; `end` is the last byte."""

    kind: int
    type: int
    owner: int
    start: int
    end: int
    pid: int

    @classmethod
    def posix(cls, type_: int, owner: int, start: int, length: int, pid: int) -> Lock:
        """A lock of fcntl(2), `type_` being F_RDLCK, F_WRLCK or F_UNLCK; `length` 0: whatever follows."""
        end = start + length - 1 if length else OFFSET_MAX
        return cls(LockKind.LOCK_KIND_POSIX, _TYPES[type_], owner, start, end, pid)

    @classmethod
    def flock(cls, operation: int, owner: int, pid: int) -> Lock:
        """A lock as the system call of that name asks for it."""
        operation &= ~fcntl.LOCK_NB
        type_ = {fcntl.LOCK_SH: fcntl.F_RDLCK, fcntl.LOCK_EX: fcntl.F_WRLCK}.get(operation, fcntl.F_UNLCK)
        return cls(LockKind.LOCK_KIND_FLOCK, _TYPES[type_], owner, 0, OFFSET_MAX, pid)


class Key(NamedTuple):
    """An owner of locks of one inode."""

    inode: int
    kind: int
    owner: int


@dataclass(slots=True)
class Owner:
    """What is known of an owner until a close ends what it has."""

    asked: int = 0
    """Locks it asked for so far."""
    running: int = 0
    ended: int = 0
    """Whatever came of this many of them is ended."""
    era: int = 0


class Wait:
    """A request that waits for a lock."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.interrupted = asyncio.Event()

    def interrupt(self) -> None:
        """Its process got a signal, or the mount goes away."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and so has the wait
            self._loop.call_soon_threadsafe(self.interrupted.set)


class Locks:
    """The locks of one mount. Thread-safe."""

    def __init__(self, client: Client) -> None:
        self._native = client.locks()
        self._lock = threading.Lock()
        self._owners: dict[Key, Owner] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waits: dict[Wait, Future[Attr]] = {}

    def check(self, handle: Handle) -> None:
        """Raise EIO when locks the handle was used for are lost: others may have them."""
        if handle.lock_era and handle.lock_era != self._native.era:
            raise OSError(errno.EIO, "locks are lost: no service was reached for the session time")

    def try_lock(self, handle: Handle, lock: Lock) -> Attr:
        """Take a lock, or raise EAGAIN; the file's attributes at that moment."""
        key = self._begin(handle, lock)
        granted: tuple[Attr, int] | None = None
        try:
            granted = self._native.set(key.inode, lock, False).wait()
        except OSError as e:
            raise _lock_error(e) from e
        finally:
            self._finish(key, granted)
        return self._granted(handle, granted)

    def wait_lock(self, handle: Handle, lock: Lock) -> tuple[Wait, Future[Attr]]:
        """Begin to wait for a lock. The future raises EINTR after an interrupt of the wait."""
        loop = self._running_loop()
        wait = Wait(loop)
        with self._lock:
            future = asyncio.run_coroutine_threadsafe(self._wait(handle, lock, wait), loop)
            self._waits[wait] = future
        return wait, future

    async def _wait(self, handle: Handle, lock: Lock, wait: Wait) -> Attr:
        key = self._begin(handle, lock)
        granted: tuple[Attr, int] | None = None
        try:
            granted = await self._ask(key.inode, lock, wait.interrupted)
        except OSError as e:
            raise _lock_error(e) from e
        finally:
            self._finish(key, granted)
            with self._lock:
                del self._waits[wait]
        return self._granted(handle, granted)

    async def _ask(self, inode: int, lock: Lock, interrupted: asyncio.Event) -> tuple[Attr, int]:
        stop = asyncio.ensure_future(interrupted.wait())
        try:
            while True:
                granted = await self._native.set(inode, lock, True)
                if granted is not None:
                    return granted
                free = asyncio.ensure_future(self._until_free(inode, lock))
                await asyncio.wait({stop, free}, return_when=asyncio.FIRST_COMPLETED)
                free.cancel()
                if stop.done():
                    with contextlib.suppress(OSError):  # a place in the queue expires by itself, too
                        await self._native.leave(inode, lock)
                    raise InterruptedError(errno.EINTR, "interrupted")
        finally:
            stop.cancel()

    async def _until_free(self, inode: int, lock: Lock) -> None:
        # Whatever came of it: asking for the lock tells.
        with contextlib.suppress(OSError):
            await self._native.wait(inode, lock)

    def unlock(self, handle: Handle, lock: Lock, publish: Callable[[], None]) -> None:
        """End locks. What others see after a lock is theirs is what was written under it: `publish` comes first."""
        key = Key(handle.node.inode, lock.kind, lock.owner)
        with self._lock:
            owner = self._owners.get(key)
            if owner is None:
                return
            count = owner.ended if owner.running else owner.asked
        publish()
        self._native.unlock(key.inode, lock).wait()
        if lock.start == 0 and lock.end == OFFSET_MAX:
            with self._lock:
                owner.ended = max(owner.ended, count)

    def find(self, inode: int, lock: Lock) -> Lock | None:
        """The first lock in the way of one. Numbers of processes mean something on one machine only."""
        found = self._native.get(inode, lock).wait()
        if found is None:
            return None
        conflict, own = Lock(*found[0]), found[1]
        return conflict if own else conflict._replace(pid=0)

    def closed_by(self, inode: int, owner: int) -> None:
        """A process closed a descriptor of an inode: its locks of fcntl(2) end."""
        self._end(Key(inode, LockKind.LOCK_KIND_POSIX, owner))

    def released(self, handle: Handle) -> None:
        """A handle is gone, and with it its lock of flock(2)."""
        for key in handle.lock_owners:
            if key[1] == LockKind.LOCK_KIND_FLOCK:
                self._end(Key(*key))

    def end_lost(self) -> None:
        """End what the service may still keep of locks that are lost."""
        now = self._native.era
        with self._lock:
            lost = [key for key, owner in self._owners.items() if not owner.running and owner.era not in (0, now)]
        for key in lost:
            self._end(key)

    def close(self) -> None:
        """The mount has ended: nobody waits any more."""
        with self._lock:
            waits, loop = dict(self._waits), self._loop
        for wait in waits:
            wait.interrupt()
        futures.wait(waits.values(), timeout=CLOSE_WAIT_S)
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)

    def _begin(self, handle: Handle, lock: Lock) -> Key:
        key = Key(handle.node.inode, lock.kind, lock.owner)
        with self._lock:
            handle.lock_owners.add(key)
            owner = self._owners.setdefault(key, Owner())
            owner.asked += 1
            owner.running += 1
            self._native.keep(True)
        return key

    def _finish(self, key: Key, granted: tuple[Attr, int] | None) -> None:
        """It was answered. After a close that came between, the kernel unlocks."""
        with self._lock:
            owner = self._owners.setdefault(key, Owner(asked=1, running=1))
            owner.running = max(0, owner.running - 1)
            owner.era = max(owner.era, granted[1] if granted else 0)
            self._native.keep(True)

    def _granted(self, handle: Handle, granted: tuple[Attr, int] | None) -> Attr:
        if granted is None:
            raise OSError(errno.EAGAIN, "another lock is in the way")
        attr, era = granted
        handle.lock_era = handle.lock_era or era
        self.check(handle)
        return attr

    def _end(self, key: Key) -> None:
        with self._lock:
            owner = self._owners.pop(key, None)
        if owner is None:
            return
        if owner.ended < owner.asked:
            try:
                self._native.unlock(
                    key.inode, (key.kind, LockType.LOCK_TYPE_UNLOCK, key.owner, 0, OFFSET_MAX, 0)
                ).wait()
            except OSError as e:
                log.warning("a lock of inode %d could not be ended; it ends with this mount: %s", key.inode, e)
        with self._lock:
            if not self._owners:
                self._native.keep(False)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="fs3-fuse-locks", daemon=True).start()
            return self._loop


def _lock_error(error: OSError) -> OSError:
    return OSError(errno.ENOLCK, "too many locks") if error.errno == errno.ENOSPC else error
