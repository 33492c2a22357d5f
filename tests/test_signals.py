"""Ctrl-C, as a real signal to a real process, ends a pool as it ends plain trio.

The processes are those of `interrupted.py`. By default there are 15 of them; with
``TRIO_POOL_STRESS=1`` more than two hundred.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from linecache import getline
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import trio
from offloaded import Distant
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_pool
from trio_pool import (
    Drain,
    JobCancelled,
    Pool,
    PoolError,
    Rate,
    Restart,
    Retry,
    WorkerCrashed,
    open_pool,
)
from trio_pool._supervisor import Supervisor
from trio_pool._worker import Worker, _is_ours
from trio_pool.offload._remote import Handler
from trio_pool.testing import settle

on_posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")

STRESS = bool(os.environ.get("TRIO_POOL_STRESS"))
ROUNDS = 20 if STRESS else 1

PROGRAM = Path(__file__).parent / "interrupted.py"
LOADS = ("process", "map", "stream", "submit", "lease", "one caller")
STATES = ("idle", "setup", "restart", "cleanup", "shutdown")
WORKERS = 4

NOISE = (
    *("Exception ignored", "never awaited", "TrioInternalError", "Warning"),
    *("Cancelled", "WorkerCrashed", "PoolClosed", "Fatal Python error"),
)

# In every program Ctrl-C can land after a coroutine was made and before it is
# awaited, or after a context manager was entered and before its block is. Of that
# Python or trio warns, with a traceback of its own.
BETWEEN = re.compile(
    r"\A(Exception ignored in: <(coroutine|async_generator) .*>\n"
    r"(Traceback .*\n( .*\n)*)?"
    r"(RuntimeWarning: .* never awaited|ResourceWarning: Async generator) ?.*\n)+"
)


def interrupt(scenes: tuple[str, ...], signals: int) -> list[dict[str, Any]]:
    """Interrupt a process in each scene; the time limit is only to end a hang."""
    runs = len(scenes) * ROUNDS
    command = [sys.executable, "-W", "error", str(PROGRAM), str(runs)]
    # The moments are others each time, and told if something is wrong.
    seed = os.urandom(4).hex()
    done = subprocess.run(
        [*command, seed, str(signals), *scenes],
        capture_output=True,
        check=False,
        timeout=50 if not STRESS else 3000,
    )
    assert done.returncode == 0, (seed, done.stderr.decode())
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == runs
    return reports


def tell_figures(
    record_property: Callable[[str, object], None], reports: list[dict[str, Any]]
) -> None:
    figures = {
        "processes": len(reports),
        "workers set up": sum(report["set up"] for report in reports),
        "workers cleaned up": sum(report["cleaned up"] for report in reports),
        "between two steps of Python": sum(
            BETWEEN.match(report["errors"]) is not None for report in reports
        ),
        "seconds to the end of the run, at most": max(
            report["seconds to the end of the run"] for report in reports
        ),
        "seconds to the end of the process, at most": max(
            report["seconds to the end of the process"] for report in reports
        ),
    }
    for name, figure in figures.items():
        record_property(name, figure)
    print(figures)
    assert figures["between two steps of Python"] <= 2 + len(reports) / 20


@on_posix
def test_ctrl_c_leaves_as_plain_trio_does(
    record_property: Callable[[str, object], None],
) -> None:
    """Killed by the signal, one traceback and no other word, every worker cleaned up.

    It takes about 5 s, as each process leaves through the whole of Python's exit.
    """
    reports = interrupt(LOADS + STATES, signals=1)
    tell_figures(record_property, reports)
    for report in reports:
        errors, scene = BETWEEN.sub("", report["errors"]), report["scene"]
        assert report["status"] == -2, report
        assert report["set up"] == (0 if scene == "setup" else WORKERS), report
        assert report["cleaned up"] == report["set up"], report
        # That of the worker that the program itself has crash.
        assert report["logged"] == (scene == "restart"), report
        assert errors.startswith("Traceback (most recent call last):\n"), report
        assert errors.count("Traceback (most recent call last):") == 1, report
        assert errors.endswith("\nKeyboardInterrupt\n"), report
        assert not [noise for noise in NOISE if noise in errors], report


@on_posix
def test_ctrl_c_twice_costs_one_cleanup_at_most(
    record_property: Callable[[str, object], None],
) -> None:
    """The second may come at any moment of the end, and even after it.

    It takes about 2 s, for the same reason.
    """
    reports = interrupt(("process", "stream", "idle", "cleanup"), signals=2)
    tell_figures(record_property, reports)
    for report in reports:
        errors = report["errors"]
        # It may land where the program itself sorts out what the first has left.
        assert report["status"] in (-2, 1), report
        assert "KeyboardInterrupt" in errors or report["status"] == -2, report
        # Or before the first step of a cleanup, as in any `async with`.
        assert report["set up"] == WORKERS, report
        assert report["cleaned up"] >= WORKERS - 1, report
        assert "TrioInternalError" not in errors, report


def jumps_from_outside(code: CodeType) -> list[int]:
    """Return the lines of the jumps into a block that are not in it themselves.

    From 3.12 on the jump back of a loop with a condition is left out of the table
    of exceptions, so that Ctrl-C there leaves the block without its end.
    """
    instructions = dis.Bytecode(code)
    blocks = [entry for entry in instructions.exception_entries if entry.depth]

    def block_of(offset: int) -> int | None:
        within = (b.target for b in blocks if b.start <= offset < b.end)
        return next(within, None)

    return [
        each.positions.lineno
        for each in instructions
        if each.opname.startswith("JUMP_BACKWARD") and each.positions is not None
        # What has no line is run where an `await` has failed.
        if each.positions.lineno is not None and "NO_INTERRUPT" not in each.opname
        if block_of(each.argval) not in (None, block_of(each.offset))
    ]


def while_in_a_block(items: list[int]) -> None:
    with suppress(IndexError):
        while items:
            items.pop()


@pytest.mark.parametrize("method", [Worker.serve, Supervisor.shut_down])
def test_ctrl_c_finds_the_end_of_the_block_around_a_loop(
    method: Callable[..., Any],
) -> None:
    assert jumps_from_outside(method.__code__) == []


@pytest.mark.skipif(sys.version_info < (3, 12), reason="each has its block there")
def test_a_loop_whose_jump_is_outside_of_its_block_is_found() -> None:
    assert jumps_from_outside(while_in_a_block.__code__)


# Where it lands in the task of a caller: in any line of the pool.


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Whoever runs the tests in the background may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# Where Python looks for no signal, as at the end of a block, but may be traced.
DEAF = re.compile(r"\s*((async )?with\b|try:)")


class Interruption:
    """Sends Ctrl-C before the ``number``-th line of the pool that the task runs.

    A line of what stands between a block and the pool is one too. Or, if they are
    what it is ``for_others``, before that line of the pool that all others run.
    """

    houses: tuple[str, ...] = (str(Path(trio_pool.__file__).parent),)

    def __init__(self, number: int, for_others: bool = False) -> None:
        self.left = number
        self.for_others = for_others
        if not for_others:
            self.houses += (contextlib.__file__,)
        # What measures coverage.
        self.before = sys.gettrace()

    def __enter__(self) -> None:
        self.task = trio.lowlevel.current_task()
        sys.settrace(self.look)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    @property
    def has_come(self) -> bool:
        return self.left <= 0

    def look(self, frame: FrameType, event: str, _: object) -> Any:
        path = frame.f_code.co_filename
        if not path.startswith(self.houses):
            return None
        if event == "line" and not DEAF.match(getline(path, frame.f_lineno)):
            # Between tasks there is none.
            with suppress(RuntimeError):
                is_own = trio.lowlevel.current_task() is self.task
                self.left -= is_own is not self.for_others
            if not self.left:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return self.look


def lines(all_to: int, step: int) -> Iterator[int]:
    """Number all lines up to one, and some of those after it; or really all."""
    yield from range(1, all_to)
    yield from itertools.count(all_to, 1 if STRESS else step)


def interruptions(
    numbers: Iterable[int], at_least: int, for_others: bool = False
) -> Iterator[Interruption]:
    """Give one for each of these lines, up to the first that no line is left for."""
    for number in numbers:
        interruption = Interruption(number, for_others)
        yield interruption
        if not interruption.has_come:
            assert number > at_least
            return


async def quit_at_once() -> None:
    raise SystemExit


async def obey(job: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return await job() if callable(job) else job


async def numbers() -> AsyncIterator[int]:
    for number in range(3):
        yield number


async def by_process(pool: Pool[Any, Any]) -> None:
    await pool.process(1)


async def by_submit(pool: Pool[Any, Any]) -> None:
    await (await pool.submit(1)).wait()


async def by_map(pool: Pool[Any, Any]) -> None:
    await pool.map(range(3))


async def by_settle(pool: Pool[Any, Any]) -> None:
    await pool.settle(numbers())


async def by_stream(pool: Pool[Any, Any]) -> None:
    async with pool.stream(range(3)) as results:
        async for _ in results:
            pass


async def by_stream_of_a_feed(pool: Pool[Any, Any]) -> None:
    async with pool.stream(numbers()) as results:
        async for _ in results:
            break


async def by_lease(pool: Pool[Any, Any]) -> None:
    async with pool.lease() as worker:
        await worker.process(1)


async def by_submit_batch(pool: Pool[Any, Any]) -> None:
    for reply in await pool.submit_batch([1, 2, 3]):
        await reply.wait()


async def by_submit_nowait(pool: Pool[Any, Any]) -> None:
    for options in ({}, {"timeout": 5.0}, {"key": "a"}, {"ttl": 5.0}):
        pool.submit_nowait(1, **options)
    await pool.join()


async def by_cancelling_replies(pool: Pool[Any, Any]) -> None:
    replies = [pool.submit_nowait(trio.sleep_forever) for _ in range(4)]
    try:
        await wait_all_tasks_blocked()
        for reply in replies:
            reply.cancel()
        for reply in replies:
            with suppress(JobCancelled):
                await reply.wait()
    finally:
        for reply in replies:
            reply.cancel()


async def by_pause(pool: Pool[Any, Any]) -> None:
    replies = [pool.submit_nowait(1)]
    try:
        pool.pause()
        replies += [pool.submit_nowait(1) for _ in range(2)]
        pool.resume()
    finally:
        pool.resume()
    for reply in replies:
        await reply.wait()


async def by_process_with_options(pool: Pool[Any, Any]) -> None:
    retry = Retry(2, lambda _: 0.25)
    await pool.process(1, timeout=5.0, key="a", priority=1, retry=retry)


async def by_events(pool: Pool[Any, Any]) -> None:
    async with pool.events() as events:
        await pool.process(1)
        async for _ in events:
            break


async def by_resize(pool: Pool[Any, Any]) -> None:
    await pool.resize(3)
    await pool.resize(2)


WAYS = (by_process, by_submit, by_map, by_settle, by_stream, by_lease)


@pytest.mark.parametrize(
    "call",
    [
        *WAYS,
        by_stream_of_a_feed,
        by_submit_batch,
        by_submit_nowait,
        by_cancelling_replies,
        by_pause,
        by_process_with_options,
        by_events,
        by_resize,
    ],
)
def test_who_catches_ctrl_c_in_a_call_has_a_pool_that_goes_on(
    ctrl_c: None, call: Callable[[Pool[Any, Any]], Awaitable[None]]
) -> None:
    """No worker is lost, nothing is left in line, and the books are balanced.

    It takes a second: it lands in each of the first hundred lines that the call
    runs, and in every fifth of the others.
    """

    async def main(interruption: Interruption) -> None:
        meeting = 0
        both = trio.Event()

        async def meet() -> None:
            nonlocal meeting
            meeting += 1
            if meeting == 2:
                both.set()
            await both.wait()

        async with open_pool(2, obey) as pool:
            await wait_all_tasks_blocked()
            with suppress(KeyboardInterrupt):
                with interruption:
                    await call(pool)
                # Where it was held back, it comes here.
                await wait_all_tasks_blocked()
            for _ in range(2):
                await wait_all_tasks_blocked()
            assert pool.size == len(pool.workers())
            with trio.fail_after(1.5):
                await settle(pool)
            assert pool.size == len(pool.workers())
            with trio.fail_after(1.5):
                await pool.map([meet, meet])
            await pool.join()

    for interruption in interruptions(lines(100, 5), at_least=50):
        trio.run(main, interruption, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("way", ["shutdown", "cancel"])
def test_who_catches_ctrl_c_in_a_call_that_ends_a_pool_can_call_again(
    ctrl_c: None, way: str
) -> None:
    async def main(interruption: Interruption) -> None:
        heard: list[str] = []

        async def call() -> None:
            try:
                await pool.process(functools.partial(trio.sleep, 1))
            except PoolError as error:
                heard.append(type(error).__name__)
            else:
                heard.append("done")

        async def end() -> None:
            if way == "shutdown":
                await pool.shutdown()
            else:
                pool.cancel()

        with trio.fail_after(5):
            async with (
                open_pool(1, obey, max_backlog=1) as pool,
                trio.open_nursery() as nursery,
            ):
                for _ in range(3):
                    nursery.start_soon(call)
                    await wait_all_tasks_blocked()
                with suppress(KeyboardInterrupt):
                    with interruption:
                        await end()
                    await wait_all_tasks_blocked()
                await end()
        # The third has waited for room all the time, and was never let in.
        ends = {"shutdown": ["done", "done"], "cancel": ["JobCancelled"] * 2}
        assert sorted(heard) == sorted([*ends[way], "PoolClosed"])

    for interruption in interruptions(itertools.count(1), at_least=30):
        trio.run(main, interruption, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", ["plain", "guarded", "distant"])
def test_ctrl_c_in_a_line_of_a_whole_program_is_all_that_is_heard(
    ctrl_c: None, caplog: pytest.LogCaptureFixture, kind: str, own: bool
) -> None:
    """It lands in the task of the block, or in the pool's own tasks."""
    options: dict[str, Any] = {"restart": Restart(backoff=lambda _: 0.5)}
    if kind == "guarded":
        options["rate"] = Rate(1000.0, burst=5)
        options["limiter"] = trio.CapacityLimiter(2)

    @asynccontextmanager
    async def member() -> AsyncIterator[Callable[[Any], Awaitable[Any]]]:
        await trio.lowlevel.checkpoint()
        counts["set up"] += 1
        try:
            yield Handler(Distant(obey)) if kind == "distant" else obey
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            counts["cleaned up"] += 1

    async def main(interruption: Interruption) -> None:
        with interruption:
            async with open_pool(2, worker=member, **options) as pool:
                await pool.process(1)
                await pool.map([2, trio.lowlevel.checkpoint, 3], chunk=2)
                with suppress(WorkerCrashed):
                    await pool.process(quit_at_once)
                pool.submit_nowait(4, timeout=5.0)
                await pool.resize(1)
                await pool.join()

    for interruption in interruptions(lines(60, 5), at_least=100, for_others=own):
        counts = Counter[str]()
        caplog.clear()
        try:
            trio.run(main, interruption, clock=MockClock(autojump_threshold=0))
        except KeyboardInterrupt:
            assert interruption.has_come
        else:
            assert not interruption.has_come
        assert counts["set up"] == counts["cleaned up"]
        crashes = [record.getMessage() for record in caplog.records]
        assert len(crashes) <= 1


def test_who_catches_ctrl_c_in_a_call_has_a_drain_that_has_lost_nothing(
    ctrl_c: None,
) -> None:
    async def main(interruption: Interruption) -> None:
        drain = Drain[int]()
        values: list[int] = []

        async def read() -> None:
            async for value in drain:
                values.append(value)  # noqa: PERF401 - one by one

        async with trio.open_nursery() as nursery:
            with suppress(KeyboardInterrupt), interruption:
                for value in range(2):
                    drain.send(value)
                values.extend(drain.collect())
                for value in range(2):
                    drain.send(value)
                values.append(await anext(drain))
            with suppress(KeyboardInterrupt):
                await wait_all_tasks_blocked()
            for _ in range(2):
                nursery.start_soon(read)
            await wait_all_tasks_blocked()
            with suppress(KeyboardInterrupt), interruption:
                drain.send(5)
                drain.close()
            with suppress(KeyboardInterrupt):
                await wait_all_tasks_blocked()
            drain.close()
        assert len(values) == drain.total

    for interruption in interruptions(itertools.count(1), at_least=20):
        trio.run(main, interruption, clock=MockClock(autojump_threshold=0))


# What was wrong with it once.


@pytest.mark.parametrize("way", ["process", "submit", "map", "stream"])
async def test_ctrl_c_in_a_handler_is_all_that_is_heard(
    caplog: pytest.LogCaptureFixture, way: str
) -> None:
    """It came about while the block was cancelled, but not by that."""

    async def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        async with open_pool(1, interrupted) as pool:
            match way:
                case "process":
                    await pool.process(0)
                case "submit":
                    pool.submit_nowait(0)
                    await trio.sleep_forever()
                case "map":
                    await pool.map([0])
                case "stream":
                    async with pool.stream([0]) as stream:
                        async for _ in stream:
                            pass
    assert caught.value.__context__ is None
    assert caplog.records == []


async def test_ctrl_c_is_raised_within_a_call_for_several_items(ctrl_c: None) -> None:
    called: list[Any] = []

    class Interrupted(Distant):
        async def many(self, jobs: list[Any]) -> tuple[list[Any], float]:
            called.append(jobs)
            signal.raise_signal(signal.SIGINT)
            called.append("goes on")
            return await super().many(jobs)

    @asynccontextmanager
    async def member() -> AsyncIterator[Handler]:
        yield Handler(Interrupted(obey))

    with pytest.raises(KeyboardInterrupt):
        async with open_pool(1, worker=member) as pool:
            await pool.map([1, 2, 3], chunk=3)
    assert called == [[1, 2, 3]]


def interrupt_python() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("hears", ["trio", "python"])
async def test_a_worker_knows_ctrl_c_in_its_own_frame_from_that_in_an_input(
    ctrl_c: None, hears: str
) -> None:
    """After the one the item in hand is lost, after the other it has ended."""
    if hears == "python":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt) as ours:
        signal.raise_signal(signal.SIGINT)
    assert _is_ours(ours.value)
    with pytest.raises(KeyboardInterrupt) as theirs:
        interrupt_python()
    assert not _is_ours(theirs.value)
    with pytest.raises(ValueError) as other:
        raise ValueError
    assert not _is_ours(other.value)
