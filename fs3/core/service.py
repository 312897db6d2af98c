"""Scaffolding of a service process: event loop, signals, log lines, the ready file, one-line errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import uvloop

from fs3.core import settings
from fs3.core.errors import Fs3Error

log = logging.getLogger("fs3.service")

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class _LineFormatter(logging.Formatter):
    """One line per event: UTC time, level, logger, message. A traceback follows only for bugs."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")


def setup_logging(level: str) -> None:
    """Send every event of `level` and above to stderr, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)


class LogLevel:
    """Follows the setting of the cluster; `own` is the level of this service's configuration.

    `also` is told of every level, for what is not logged by Python.
    """

    def __init__(self, own: str, also: Callable[[str], None] = lambda _: None) -> None:
        self._own = own
        self._also = also
        self._text: str | None = None

    def follow(self, values: Mapping[str, str]) -> None:
        """Log what the settings say from now on. Nothing is touched as long as they say nothing."""
        text = values.get(settings.LOG_LEVEL)
        if text != self._text:
            self._text = text
            level = settings.value_of(values, settings.LOG_LEVEL, self._own)
            logging.getLogger().setLevel(level.upper())
            self._also(level)


def one_line(exc: BaseException) -> str:
    """Describe an operating error for a person, in one line."""
    if isinstance(exc, Fs3Error):
        text = exc.message
    elif isinstance(exc, OSError) and exc.strerror:
        text = f"{exc.filename}: {exc.strerror}" if exc.filename else exc.strerror
    else:
        text = str(exc) or type(exc).__name__
    return " ".join(text.split())


def write_ready(
    path: str, *, host: str, frame_port: int = 0, grpc_port: int = 0, node_id: int = 0, pid: int | None = None
) -> None:
    """Write the ready file atomically. Nothing when `path` is empty. Raises OSError."""
    if not path:
        return
    record = {
        "pid": os.getpid() if pid is None else pid,
        "host": host,
        "frame_port": frame_port,
        "grpc_port": grpc_port,
        "node_id": node_id,
    }
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(json.dumps(record) + "\n")
    os.replace(temporary, path)


def remove_ready(path: str) -> None:
    """Remove the ready file if it is there."""
    if path:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def run_service(
    main: Callable[[asyncio.Event], Awaitable[None]],
    *,
    name: str,
    log_level: str = "info",
    ready_file: str = "",
    expected: tuple[type[Exception], ...] = (),
) -> int:
    """Run ``main(stop)`` on a uvloop until it returns; SIGTERM and SIGINT set `stop`. Returns the exit code.

    An Fs3Error, an OSError or one of `expected` ends the process with one line on stderr and code 1; anything
    else is a bug and shows its traceback in the log. The ready file is removed at the end. To be called from
    the main thread.
    """
    setup_logging(log_level)

    async def body() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, _asked_to_stop, name, number, stop)
        try:
            await main(stop)
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    operating: tuple[type[Exception], ...] = (Fs3Error, OSError, *expected)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(body())
    except operating as exc:
        print(f"fs3 {name}: {one_line(exc)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception:
        log.critical("fs3 %s ended by a bug", name, exc_info=True)
        return 1
    finally:
        remove_ready(ready_file)
    return 0


def _asked_to_stop(name: str, number: int, stop: asyncio.Event) -> None:
    if not stop.is_set():
        log.info("fs3 %s stops: %s", name, signal.Signals(number).name)
    stop.set()
