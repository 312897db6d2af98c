"""An asyncio event loop in virtual time: deterministic, without selector, threads or real I/O.

Time stands still while anything can run and then jumps to the next timer. Code under test needs no changes: it
sleeps, times out and spawns tasks as always. Simulated processes share the loop; which one a callback belongs to
travels in its context, so that a whole process can be paused (nothing of it runs, its timers and messages wait)
or killed (nothing of it runs ever again, not even a ``finally``), as SIGSTOP and SIGKILL do.

With the same seed and the same program every run is the same: timers due at one moment run in an order drawn
from the seed, and so do callbacks that are ready together when ``shuffle`` is on. Tasks hash by their serial
number, so that sets of tasks have an order of their own.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import enum
import heapq
import random
import warnings
from collections.abc import Callable, Coroutine
from typing import Any, Final, NoReturn, TypeVar

T = TypeVar("T")

# Cancelled timers are swept out once there are so many of them and they are the larger part.
CANCELLED_TIMERS_MIN: Final = 64
AWAITS_AT_CLOSE_MAX: Final = 16
NS: Final = 1_000_000_000


class Stuck(RuntimeError):
    """Nothing can run and no timer is set: the program waits for something that will never happen."""


class RealInput(RuntimeError):
    """The program asked for a socket, a pipe, a signal or a child: those of a real machine cannot be simulated."""


class State(enum.Enum):
    """Whether a process runs."""

    RUNNING = "running"
    PAUSED = "paused"
    DEAD = "dead"


_PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("fs3_virtual_process", default=None)


def current_process() -> Process | None:
    """Return the process whose code runs; None in the driver's own."""
    return _PROCESS.get()


class _Task(asyncio.Task[Any]):
    """A task with a serial number for a hash."""

    def __init__(self, coro: Any, *, loop: VirtualLoop, **rest: Any) -> None:
        # Before the base class: it hashes the task.
        self.serial = loop._next_serial()
        context = rest.get("context")
        self.process: Process | None = _PROCESS.get() if context is None else context.get(_PROCESS)
        super().__init__(coro, loop=loop, **rest)

    def __hash__(self) -> int:
        return self.serial


class Process:
    """One life of a simulated process on a :class:`VirtualLoop`."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.name = name
        self.state = State.RUNNING
        self._loop = loop
        self._held: list[asyncio.Handle] = []
        self._context = contextvars.copy_context()
        self._context.run(_PROCESS.set, self)

    @property
    def running(self) -> bool:
        """Whether its code runs now."""
        return self.state is State.RUNNING

    @property
    def alive(self) -> bool:
        """Whether it has not been killed."""
        return self.state is not State.DEAD

    def start(self, main: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `main` as part of this process."""
        return self._loop.create_task(main, context=self._context.copy())

    def call_at(self, when_ns: int, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        """Run `callback` as part of this process at `when_ns`, or when it is resumed after that."""
        return self._loop.call_at_ns(when_ns, callback, *args, context=self._context.copy())

    def pause(self) -> None:
        """Stop it where it stands."""
        if self.state is State.RUNNING:
            self.state = State.PAUSED

    def resume(self) -> None:
        """Let it go on: what became due meanwhile runs now."""
        if self.state is State.PAUSED:
            self.state = State.RUNNING
            held, self._held = self._held, []
            self._loop._ready.extend(held)

    def kill(self) -> None:
        """End it without a word."""
        if self.state is not State.DEAD:
            self.state = State.DEAD
            self._loop._bury(self)
            self._held.clear()


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module. Belongs to one thread.

    ``on_advance(until_ns)`` is called before time moves on, with the time it moves to: a world that is simulated
    beside the loop catches up there. It may make callbacks ready, which run at the new time.
    """

    # The base class's own.
    _ready: collections.deque[asyncio.Handle]
    _stopping: bool

    def __init__(self, seed: int = 0, *, shuffle: bool = False, start_ns: int = 0) -> None:
        super().__init__()
        self.now_ns = start_ns
        self.on_advance: Callable[[int], None] | None = None
        self._rng = random.Random(f"loop {seed}")
        self._shuffle = shuffle
        self._serial = 0
        self._timers: list[tuple[int, float, int, asyncio.TimerHandle]] = []
        self._cancelled_timers = 0
        # What was running in processes that died. A coroutine that is collected runs its `finally` blocks, which a
        # dead process does not: it is kept until the loop is closed.
        self._buried: list[asyncio.Task[Any]] = []
        self.set_task_factory(_make_task)

    # -- time ---------------------------------------------------------------------------------------------

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.now_ns / NS

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """Call at virtual second `when`; never early by rounding."""
        return self.call_at_ns(int(when * NS) + 1, callback, *args, context=context)

    def call_at_ns(
        self, when_ns: int, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """Call at virtual nanosecond `when_ns`, or as soon as possible when that is past."""
        handle = asyncio.TimerHandle(when_ns / NS, callback, args, self, context)
        handle._scheduled = True  # type: ignore[attr-defined]
        heapq.heappush(self._timers, (when_ns, self._rng.random(), self._next_serial(), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self._cancelled_timers += 1
        if self._cancelled_timers > CANCELLED_TIMERS_MIN and 2 * self._cancelled_timers > len(self._timers):
            self._timers = [timer for timer in self._timers if not timer[3].cancelled()]
            heapq.heapify(self._timers)
            self._cancelled_timers = 0

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    # -- running ------------------------------------------------------------------------------------------

    def _run_once(self) -> None:
        ready = self._ready
        if not ready and not self._stopping:
            self._advance()
        if not self._shuffle:
            for _ in range(len(ready)):
                self._run_handle(ready.popleft())
            return
        batch = list(ready)
        ready.clear()
        self._rng.shuffle(batch)
        for handle in batch:
            self._run_handle(handle)

    def _run_handle(self, handle: Any) -> None:
        if handle._cancelled:
            return
        process = handle._context.get(_PROCESS)
        if process is None or process.state is State.RUNNING:
            handle._run()
        elif process.state is State.PAUSED:
            process._held.append(handle)

    def _advance(self) -> None:
        """Move to the next timer and make everything due then ready."""
        timers = self._timers
        while timers and timers[0][3].cancelled():
            heapq.heappop(timers)
            self._cancelled_timers -= 1
        if not timers:
            raise Stuck("every task waits for something that will never happen: no timer is set")
        until_ns = timers[0][0]
        if until_ns > self.now_ns:
            if self.on_advance is not None:
                self.on_advance(until_ns)
            self.now_ns = until_ns
        timers = self._timers
        while timers and timers[0][0] <= self.now_ns:
            handle: Any = heapq.heappop(timers)[3]
            handle._scheduled = False
            if handle.cancelled():
                self._cancelled_timers -= 1
            else:
                self._ready.append(handle)

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Run `func` at once, here: there are no threads. In virtual time it takes none."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as exc:
            future.set_exception(exc)
        return future

    def _write_to_self(self) -> None:
        """Nothing sleeps in a selector that would have to be woken."""

    # -- the end ------------------------------------------------------------------------------------------

    def _bury(self, process: Process) -> None:
        self._buried.extend(t for t in asyncio.all_tasks(self) if isinstance(t, _Task) and t.process is process)

    def close(self) -> None:
        """Dispose of every task that is left, those of dead processes included; their last words go unheard."""
        if self.is_closed():
            return
        left = [*asyncio.all_tasks(self), *self._buried]
        super().close()
        self._timers.clear()
        self._buried.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for task in left:
                _dispose(task)
            left.clear()


def _refuses(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RealInput(
            f"loop.{name} is not there in virtual time; give the code a simulated network or engine instead"
        )

    return refuse


for _name in (
    *("add_reader", "remove_reader", "add_writer", "remove_writer", "add_signal_handler", "remove_signal_handler"),
    *("sock_accept", "sock_connect", "sock_recv", "sock_recv_into", "sock_recvfrom", "sock_recvfrom_into"),
    *("sock_sendall", "sock_sendfile", "sock_sendto", "sendfile", "start_tls", "getaddrinfo", "getnameinfo"),
    *("create_connection", "create_server", "create_unix_connection", "create_unix_server"),
    *("create_datagram_endpoint", "connect_accepted_socket", "connect_read_pipe", "connect_write_pipe"),
    *("subprocess_exec", "subprocess_shell"),
):
    setattr(VirtualLoop, _name, _refuses(_name))


def _make_task(loop: Any, coro: Any, **rest: Any) -> asyncio.Task[Any]:
    return _Task(coro, loop=loop, **rest)


def _dispose(task: asyncio.Task[Any]) -> None:
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coro: Any = task.get_coro()
    for _ in range(AWAITS_AT_CLOSE_MAX):
        # A `finally` that awaits stops at that point; the next close goes on from there.
        with contextlib.suppress(BaseException):
            coro.close()
            return


class LoopClock:
    """The clocks of one simulated machine: virtual time with an origin and a rate of its own.

    ``rate`` is how many of its seconds pass in one true second: machines drift.
    """

    def __init__(self, loop: VirtualLoop, *, origin_ns: int = 0, rate: float = 1.0) -> None:
        self._loop = loop
        self._origin_ns = origin_ns
        self._rate = rate

    def monotonic_ns(self) -> int:
        """See fs3.core.clock.Clock."""
        now_ns = self._loop.now_ns
        return self._origin_ns + (now_ns if self._rate == 1.0 else int(now_ns * self._rate))

    def wall_ns(self) -> int:
        """See fs3.core.clock.Clock; the same as monotonic_ns."""
        return self.monotonic_ns()

    async def sleep(self, seconds: float) -> None:
        """See fs3.core.clock.Clock."""
        await asyncio.sleep(seconds / self._rate)
