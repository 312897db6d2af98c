"""The event loop in virtual time."""

from __future__ import annotations

import asyncio
import time

import pytest

from fs3.testing.virtual_loop import LoopClock, Process, RealInput, Stuck, VirtualLoop


def test_an_hour_of_sleep_takes_no_time_and_wakes_in_order() -> None:
    loop = VirtualLoop()
    woken: list[float] = []

    async def sleeper(seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append(loop.time())

    async def main() -> None:
        await asyncio.gather(*(sleeper(s) for s in (3600.0, 1.0, 60.0)))

    began = time.monotonic()
    loop.run_until_complete(main())
    loop.close()
    assert woken == pytest.approx([1.0, 60.0, 3600.0], abs=1e-6)
    assert time.monotonic() - began < 5


def test_timeouts_and_task_groups_work() -> None:
    loop = VirtualLoop(shuffle=True)

    async def main() -> float:
        async with asyncio.TaskGroup() as group:
            for delay in range(5):
                group.create_task(asyncio.sleep(delay))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.5):
                await asyncio.Event().wait()
        return loop.time()

    assert loop.run_until_complete(main()) == pytest.approx(6.5, abs=1e-6)
    loop.close()


def test_a_wait_for_what_never_happens_is_said_at_once() -> None:
    loop = VirtualLoop()
    with pytest.raises(Stuck):
        loop.run_until_complete(asyncio.Event().wait())
    loop.close()


def test_real_input_is_refused_in_words() -> None:
    loop = VirtualLoop()

    async def main() -> None:
        await asyncio.open_connection("127.0.0.1", 1)

    with pytest.raises(RealInput, match="create_connection"):
        loop.run_until_complete(main())
    loop.close()


def test_a_thread_is_not_started_the_function_runs_here() -> None:
    loop = VirtualLoop()

    async def main() -> int:
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        return await asyncio.to_thread(lambda: 42)

    assert loop.run_until_complete(main()) == 42
    loop.close()


def order(seed: int, shuffle: bool) -> list[int]:
    loop = VirtualLoop(seed, shuffle=shuffle)
    seen: list[int] = []

    async def one(i: int) -> None:
        await asyncio.sleep(1)
        await asyncio.sleep(0)
        seen.append(i)

    async def main() -> None:
        # A set: its order must not be that of memory addresses.
        await asyncio.wait({asyncio.create_task(one(i)) for i in range(20)})

    loop.run_until_complete(main())
    loop.close()
    return seen


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_order_of_what_is_due_together_is_the_seeds(shuffle: bool) -> None:
    assert order(1, shuffle) == order(1, shuffle)
    assert order(1, shuffle) != order(2, shuffle)
    assert sorted(order(1, shuffle)) == list(range(20))


class Ticking:
    """A process that counts its seconds and says when its `finally` ran."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.ticks = 0
        self.ended = False
        self.process = Process(loop, "ticking")
        self.task = self.process.start(self.main())

    async def main(self) -> None:
        try:
            while True:
                await asyncio.create_task(asyncio.sleep(1))
                self.ticks += 1
        finally:
            self.ended = True


def test_a_paused_process_stands_still_with_all_its_tasks_and_then_goes_on() -> None:
    loop = VirtualLoop()
    ticking = Ticking(loop)

    async def main() -> None:
        await asyncio.sleep(3.5)
        ticking.process.pause()
        assert ticking.ticks == 3
        await asyncio.sleep(100)
        assert ticking.ticks == 3
        ticking.process.resume()
        await asyncio.sleep(2.4)
        assert ticking.ticks == 6

    loop.run_until_complete(main())
    loop.close()


def test_a_killed_process_runs_nothing_any_more_not_even_finally() -> None:
    loop = VirtualLoop()
    ticking = Ticking(loop)

    async def main() -> None:
        await asyncio.sleep(3.5)
        ticking.process.kill()
        ticking.task.cancel()
        await asyncio.sleep(10)
        assert (ticking.ticks, ticking.ended) == (3, False)

    loop.run_until_complete(main())
    loop.close()


def test_a_clock_of_another_machine_drifts() -> None:
    loop = VirtualLoop()
    clock = LoopClock(loop, origin_ns=5_000_000_000, rate=1.01)

    async def main() -> None:
        await asyncio.sleep(100)
        assert clock.monotonic_ns() == pytest.approx(106_000_000_000, abs=1000)
        began_s = loop.time()
        await clock.sleep(1.01)
        assert loop.time() - began_s == pytest.approx(1, abs=1e-6)

    loop.run_until_complete(main())
    loop.close()


def test_the_world_beside_the_loop_is_moved_along_first() -> None:
    loop = VirtualLoop()
    seen: list[int] = []
    loop.on_advance = seen.append

    async def main() -> None:
        await asyncio.sleep(1)
        assert seen[-1] >= 1_000_000_000
        await asyncio.sleep(1)

    loop.run_until_complete(main())
    loop.close()
    assert seen == sorted(seen)
    assert len(seen) == 2
