"""Pools work wherever trio does: strict Python, guest mode, threads, other libraries.

Most of it is the program in `broad.py`, under one host after the other. Here time
is real, as the hosts have their own: each test takes some tenths of a second.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import outcome
import pytest
import trio
from broad import Program
from broad import main as broad

from trio_pool import JobTimeout, PoolClosed, WorkerCrashed, WrongThread, open_pool

STRESS = bool(os.environ.get("TRIO_POOL_STRESS"))
ROUNDS = 50 if STRESS else 1

JOBS_AT_LEAST = 100
"""Of the broad program; how many more depends on what meets."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """That workers crash is meant, and need not be said."""
    logger = logging.getLogger("trio_pool")
    logger.disabled = True
    yield
    logger.disabled = False


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Where the tests run in the background Ctrl-C may be ignored."""
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, ours)


def test_nothing_is_said_where_every_warning_is_an_error() -> None:
    """No resource left open, no coroutine not awaited, no generator not closed."""
    program = Path(__file__).parent / "broad.py"
    command = [sys.executable, "-X", "dev", "-W", "error", str(program)]
    for _ in range(ROUNDS):
        done = subprocess.run(command, capture_output=True, check=False, timeout=50)
        assert done.stderr.decode() == ""
        assert int(done.stdout) >= JOBS_AT_LEAST
        assert done.returncode == 0


# Guest mode: trio runs within the loop of a host.


def run_in_asyncio(
    main: Callable[[], Awaitable[Any]],
    beside: Callable[[], Awaitable[object]] | None = None,
) -> outcome.Outcome[Any]:
    """Have asyncio be the host; its own tasks go on meanwhile."""

    async def host() -> outcome.Outcome[Any]:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[outcome.Outcome[Any]] = loop.create_future()
        trio.lowlevel.start_guest_run(
            main,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=done.set_result,
            host_uses_signal_set_wakeup_fd=True,
        )
        if beside is not None:
            await beside()
        return await done

    return asyncio.run(host())


def run_in_a_small_loop(main: Callable[[], Awaitable[Any]]) -> outcome.Outcome[Any]:
    """Have a host that knows nothing but to call what it is given."""
    calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
    done: list[outcome.Outcome[Any]] = []
    trio.lowlevel.start_guest_run(
        main, run_sync_soon_threadsafe=calls.put, done_callback=done.append
    )
    while not done:
        calls.get(timeout=50)()
    return done[0]


each_host = pytest.mark.parametrize("run", [run_in_asyncio, run_in_a_small_loop])
Run = Callable[[Callable[[], Awaitable[Any]]], outcome.Outcome[Any]]


@each_host
def test_a_guest_of_another_loop_can_do_everything(run: Run) -> None:
    for _ in range(ROUNDS):
        assert run(broad).unwrap() >= JOBS_AT_LEAST


def test_ctrl_c_in_a_handler_reaches_the_host(ctrl_c: None) -> None:
    """Where it is trio that hears of it; asyncio would keep it for itself."""
    program = Program()

    async def interrupted(_: int) -> None:
        signal.raise_signal(signal.SIGINT)

    async def main() -> None:
        async with open_pool(1, worker=program.member):
            async with open_pool(2, interrupted) as pool:
                await pool.map(range(5))

    with pytest.raises(KeyboardInterrupt):
        run_in_a_small_loop(main).unwrap()
    assert program.set_up == program.cleaned_up == 1


def test_a_host_that_shuts_down_has_every_worker_cleaned_up() -> None:
    """It cancels what its guest is doing, in the middle of it."""
    program = Program()
    scope = trio.CancelScope()
    ticks = 0

    async def main() -> str:
        nonlocal token
        token = trio.lowlevel.current_trio_token()
        with scope:
            async with open_pool(4, worker=program.member) as pool:
                async with pool.stream(iter(lambda: "sleep", None)) as stream:
                    async for _ in stream:
                        pass
        return "left"

    async def beside() -> None:
        nonlocal ticks
        while ticks < 20:
            await asyncio.sleep(0.001)
            ticks += 1
        assert token is not None
        token.run_sync_soon(scope.cancel)

    token: trio.lowlevel.TrioToken | None = None
    assert run_in_asyncio(main, beside).unwrap() == "left"
    assert scope.cancelled_caught
    assert program.attempts["sleep"] > 4
    assert program.set_up == program.cleaned_up == 4


# Threads.


async def test_threads_reach_the_pool_by_way_of_trio() -> None:
    threads, calls = (16, 200) if STRESS else (8, 20)

    async def double(number: int) -> int:
        await trio.lowlevel.checkpoint()
        return 2 * number

    async with open_pool(3, double, max_backlog=2) as pool:

        def call(thread: int) -> int:
            with pytest.raises(WrongThread):
                pool.submit_nowait(0)
            right = 0
            for number in range(calls):
                right += trio.from_thread.run(pool.process, number) == 2 * number
            reply = trio.from_thread.run(pool.submit, thread)
            right += trio.from_thread.run(reply.wait) == 2 * thread
            assert pool.statistics().accepted >= right
            return right

        right: list[int] = []

        async def have_called(thread: int) -> None:
            right.append(await trio.to_thread.run_sync(call, thread))

        async with trio.open_nursery() as nursery:
            for thread in range(threads):
                nursery.start_soon(have_called, thread)
        assert sum(right) == pool.statistics().done == threads * (calls + 1)


async def test_a_thread_that_a_job_waits_for_can_use_the_pool() -> None:
    async def factorial(number: int) -> int:
        def below() -> int:
            return trio.from_thread.run(pool.process, number - 1)

        if number == 0:
            return 1
        return number * await trio.to_thread.run_sync(below)

    async with open_pool(6, factorial) as pool:
        assert await pool.process(5) == 120
        assert pool.statistics().done == 6


def test_an_asyncio_loop_in_another_thread_can_use_the_pool() -> None:
    """As does a web server that is not written for trio."""
    requests = 500 if STRESS else 50

    async def serve(pool: Any, token: trio.lowlevel.TrioToken) -> list[str]:
        async def request(number: int) -> str:
            def call() -> str:
                return trio.from_thread.run(
                    pool.process, f"sleep {number}", trio_token=token
                )

            return await asyncio.to_thread(call)

        return await asyncio.gather(*map(request, range(requests)))

    async def main() -> None:
        program = Program()
        token = trio.lowlevel.current_trio_token()
        async with open_pool(4, worker=program.member) as pool:
            answers = await trio.to_thread.run_sync(
                lambda: asyncio.run(serve(pool, token))
            )
            assert answers == [f"SLEEP {number}" for number in range(requests)]
            assert pool.statistics().done == requests
        assert program.set_up == program.cleaned_up == 4

    trio.run(main)


async def test_several_pools_in_one_run_know_nothing_of_each_other() -> None:
    programs = [Program() for _ in range(4 * ROUNDS)]
    jobs: list[int] = []

    async def run(program: Program) -> None:
        jobs.append(await program.run())

    async with trio.open_nursery() as nursery:
        for program in programs:
            nursery.start_soon(run, program)
    assert len(jobs) == len(programs)
    assert min(jobs) >= JOBS_AT_LEAST


async def test_pools_can_be_stacked_on_each_other() -> None:
    limiter = trio.CapacityLimiter(3)
    most = running = 0

    async def innermost(number: int) -> int:
        nonlocal most, running
        running += 1
        most = max(most, running)
        await trio.sleep(0.001)
        running -= 1
        return number

    async with open_pool(8, innermost, limiter=limiter) as lower:

        async def ask(number: int) -> int:
            return sum(await lower.map(range(number)))

        async with open_pool(4, ask) as upper, open_pool(4, ask) as other:
            assert await upper.map([5, 10, 15]) == [10, 45, 105]
            assert await other.process(4) == 6
    assert most == 3
    assert limiter.borrowed_tokens == 0


def test_several_runs_in_several_threads_know_nothing_of_each_other() -> None:
    jobs: list[int] = []
    problems: list[BaseException] = []

    def run() -> None:
        try:
            jobs.extend(trio.run(broad) for _ in range(ROUNDS))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(jobs) == 4 * ROUNDS
    assert min(jobs) >= JOBS_AT_LEAST


def test_a_pool_is_of_no_use_in_another_run() -> None:
    """It says so, and nothing hangs."""

    async def main() -> Any:
        async with open_pool(1, trio.sleep) as pool:
            await pool.process(0)
        return pool

    async def later(pool: Any) -> None:
        with pytest.raises((PoolClosed, WrongThread)):
            await pool.process(0)

    trio.run(later, trio.run(main))


# Other libraries.


def test_anyio_on_trio_can_use_a_pool() -> None:
    anyio = pytest.importorskip("anyio")
    program = Program()

    @asynccontextmanager
    async def member() -> AsyncGenerator[Callable[[int], Awaitable[int]], None]:
        async with anyio.create_task_group() as group:

            async def handle(number: int) -> int:
                match number % 4:
                    case 0:
                        await anyio.sleep(0.001)
                    case 1:
                        return int(await anyio.to_thread.run_sync(lambda: 2 * number))
                    case 2:
                        with anyio.move_on_after(0.001):
                            await anyio.sleep(60)
                return 2 * number

            yield handle
            group.cancel_scope.cancel()

    async def main() -> None:
        jobs = await program.run()
        async with open_pool(3, worker=member, timeout=20.0) as pool:
            sender, receiver = anyio.create_memory_object_stream(5)
            results: list[int] = []

            async def send() -> None:
                async with sender:
                    for number in range(50):
                        await sender.send(number)

            async def call(number: int) -> None:
                results.append(await pool.process(number))

            async with anyio.create_task_group() as group:
                group.start_soon(send)
                async with receiver:
                    doubles = await pool.map(receiver)
                for number in range(50):
                    group.start_soon(call, number)
            assert doubles == sorted(results) == [2 * number for number in range(50)]
            with anyio.move_on_after(0.01) as scope:
                pool.pause()
                await pool.process(0)
            assert scope.cancelled_caught
            pool.resume()
            with pytest.raises(TimeoutError):
                with anyio.fail_after(0.01):
                    await anyio.sleep_forever()
            assert pool.statistics().done == 100
        assert jobs >= JOBS_AT_LEAST

    anyio.run(main, backend="trio")


def test_asyncio_within_trio_can_use_a_pool() -> None:
    """Both ways, by trio-asyncio: called from asyncio, and with handlers of it."""
    trio_asyncio = pytest.importorskip("trio_asyncio")
    as_trio = trio_asyncio.aio_as_trio
    program = Program()
    left = 0

    async def count(number: int) -> int:
        """Run in asyncio, and leave as asyncio's cancellation asks."""
        nonlocal left
        try:
            await asyncio.sleep(0.001 if number >= 0 else 60)
        except asyncio.CancelledError:
            left += 1
            raise
        if number == 13:
            raise LookupError(number)
        return number

    async def handle(number: int) -> int:
        return int(await as_trio(count)(number))

    async def main() -> None:
        async with trio_asyncio.open_loop():
            async with open_pool(4, worker=program.member) as pool:
                process = trio_asyncio.trio_as_aio(pool.process)

                async def gather() -> list[str]:
                    return await asyncio.gather(*(process(str(n)) for n in range(50)))

                assert await as_trio(gather)() == [str(n) for n in range(50)]

                async def give_up() -> None:
                    await asyncio.wait_for(process("hang"), 0.01)

                with pytest.raises(TimeoutError):
                    await as_trio(give_up)()

                async def crash() -> None:
                    await process("crash")

                with pytest.raises(WorkerCrashed):
                    await as_trio(crash)()
                assert pool.statistics().cancelled == pool.statistics().lost == 1
                assert await pool.process("again") == "AGAIN"
            async with open_pool(4, handle) as pool:
                assert await pool.map(range(13)) == list(range(13))
                with pytest.raises(LookupError):
                    await pool.process(13)
                with pytest.raises(JobTimeout):
                    await pool.process(-1, timeout=0.01)
                with trio.move_on_after(0.01):
                    await pool.process(-1)
                assert left == 2

    trio.run(main)
    assert program.set_up == program.cleaned_up == 5
