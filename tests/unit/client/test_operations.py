"""Waiting for native work: errors, interrupts, asyncio, forks. No cluster is needed for any of it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

import fs3
from fs3 import native
from fs3.core.errors import Fs3Error, TimedOut
from fs3.v1.frame_pb2 import Code


@pytest.fixture
def silent() -> Iterator[str]:
    """Address of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def nobody() -> str:
    """Address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"127.0.0.1:{port}"


def test_crc32c_is_castagnoli_for_any_contiguous_buffer() -> None:
    assert native.crc32c(b"123456789") == 0xE3069283
    assert native.crc32c(memoryview(bytearray(b"x123456789"))[1:]) == 0xE3069283
    assert native.crc32c(b"") == 0
    blocks = native.crc_blocks(bytes(5000))
    assert blocks == native.crc32c(bytes(4096)).to_bytes(4, "little") + native.crc32c(bytes(904)).to_bytes(4, "little")
    with pytest.raises(BufferError, match="contiguous"):
        native.crc32c(memoryview(b"123456789")[::2])
    with pytest.raises(TypeError):
        native.crc32c("text")  # type: ignore[arg-type]


def test_connecting_to_nobody_is_one_clear_error(nobody: str) -> None:
    with pytest.raises(Fs3Error) as caught:
        fs3.connect(f"fs3://{nobody}", timeout_s=0.3)
    assert caught.value.code == Code.CODE_UNAVAILABLE
    assert caught.value.retryable
    assert nobody in caught.value.message


def test_a_service_that_does_not_answer_is_a_timeout(silent: str) -> None:
    began = time.monotonic()
    with pytest.raises(TimedOut):
        fs3.connect(f"fs3://{silent}", timeout_s=0.3)
    assert time.monotonic() - began < 5


def test_bad_options_are_refused() -> None:
    with pytest.raises(Fs3Error, match="at least one meta service"):
        native.Client.connect([], "").wait()
    with pytest.raises(ValueError, match="op_timeout_s must be a number of seconds"):
        native.Client.connect(["h:1"], "", op_timeout_s=-1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        fs3.connect("fs3://h:1", colour="red")


def test_an_operation_is_waited_for_once(nobody: str) -> None:
    operation = native.Client.connect([nobody], "", op_timeout_s=0.2)
    with pytest.raises(Fs3Error):
        operation.wait()
    with pytest.raises(RuntimeError, match="waited for already"):
        operation.wait()


def test_waiting_is_interrupted_by_signals(silent: str) -> None:
    def on_alarm(number: int, frame: object) -> None:
        raise InterruptedError("the alarm")

    old = signal.signal(signal.SIGALRM, on_alarm)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        began = time.monotonic()
        with pytest.raises(InterruptedError, match="the alarm"):
            fs3.connect(f"fs3://{silent}", timeout_s=60)
        assert time.monotonic() - began < 10
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_other_threads_run_while_one_waits(silent: str) -> None:
    def wait() -> None:
        with pytest.raises(TimedOut):
            native.Client.connect([silent], "", op_timeout_s=1.0).wait()

    waiting = threading.Thread(target=wait)
    waiting.start()
    counted = 0
    while waiting.is_alive():
        counted += 1
    waiting.join()
    assert counted > 1000


def test_operations_are_awaited_in_asyncio(nobody: str, silent: str) -> None:
    async def run() -> None:
        both = await asyncio.gather(
            fs3.connect_async(f"fs3://{nobody}", timeout_s=0.2),
            fs3.connect_async(f"fs3://{silent}", timeout_s=0.2),
            return_exceptions=True,
        )
        assert [type(e) for e in both] == [Fs3Error, TimedOut]

    asyncio.run(run())


def test_cancelling_an_awaited_operation_ends_it(silent: str) -> None:
    async def run() -> None:
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.05):
                await native.Client.connect([silent], "", op_timeout_s=60)

    began = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - began < 5


def test_an_event_loop_may_close_before_its_results_come(silent: str) -> None:
    async def start(operation: native.Operation[native.Client]) -> None:
        task = asyncio.ensure_future(operation)
        await asyncio.sleep(0)
        assert not task.done()

    for _ in range(3):
        asyncio.run(start(native.Client.connect([silent], "", op_timeout_s=0.05)))
    # A later loop is served as usual.
    with pytest.raises(TimedOut):
        asyncio.run(fs3.connect_async(f"fs3://{silent}", timeout_s=0.2))


def test_a_forked_child_can_connect_by_itself(nobody: str) -> None:
    with pytest.raises(Fs3Error):
        fs3.connect(f"fs3://{nobody}", timeout_s=0.1)
    stale = native.Client.connect([nobody], "", op_timeout_s=0.1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            try:
                stale.wait()
            except RuntimeError as e:
                status = 2 if "fork" in str(e) else 3
            try:
                fs3.connect(f"fs3://{nobody}", timeout_s=0.1)
            except Fs3Error:
                status = 0 if status == 2 else status
        finally:
            os._exit(status)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pid, result = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(result) == 0


def test_importing_fs3_does_not_load_the_native_module() -> None:
    import subprocess
    import sys

    code = "import sys, fs3; assert 'fs3._native' not in sys.modules; fs3.connect; assert 'fs3._native' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
