"""One suite for every engine: what the pool promises holds off the thread too.

Real processes, real seconds: these tests kill what they test. With
``TRIO_POOL_STRESS=1`` there are more seeds of chaos.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from offloaded import (
    BACKENDS,
    Backend,
    Item,
    LoadedError,
    State,
    StubbornError,
    Traces,
    act,
    act_with_state,
    is_gone,
    kill,
    until,
)

from trio_pool import (
    JobCancelled,
    JobTimeout,
    Pool,
    Restart,
    Retry,
    WorkerCrashed,
    open_pool,
)
from trio_pool.offload import PayloadWarning, RemoteError
from trio_pool.testing import assert_books_balance, settle

SEEDS = range(20 if os.environ.get("TRIO_POOL_STRESS") else 2)
PATIENT = Restart(limit=1000)


def each(*wanted: Callable[[Backend], bool]) -> pytest.MarkDecorator:
    """Run a test for each engine that is here, of those of which all this is true."""
    return pytest.mark.parametrize(
        "backend",
        [
            pytest.param(
                backend,
                id=backend.name,
                marks=[pytest.mark.skip(backend.missing)] if backend.missing else [],
            )
            for backend in BACKENDS
            if all(wants(backend) for wants in wanted)
        ],
    )


def stops(backend: Backend) -> bool:
    return backend.stops


def waits(backend: Backend) -> bool:
    return not backend.stops


def remote(backend: Backend) -> bool:
    return backend.remote


def crashes_alone(backend: Backend) -> bool:
    return backend.crashes_alone


def in_time(
    test: Callable[..., Awaitable[None]],
) -> Callable[..., Awaitable[None]]:
    """Fail a test that hangs; no engine takes so long."""

    @functools.wraps(test)
    async def bounded(*args: Any, **kwargs: Any) -> None:
        with trio.fail_after(60):
            await test(*args, **kwargs)

    return bounded


@pytest.fixture
def traces(tmp_path: Path) -> Traces:
    return Traces(tmp_path / "traces")


async def check_gone(pids: list[int], backend: Backend) -> None:
    """See that processes are gone, in the time that the engine is given for it."""
    if backend.grace:
        await until(lambda: all(map(is_gone, pids)), backend.grace)
    assert [pid for pid in pids if not is_gone(pid)] == []


async def check_usable(pool: Pool[Item, Any]) -> None:
    """See that every worker still does what it is there for."""
    results = await pool.map([Item("echo", n) for n in range(4)], chunk=1)
    assert results == [0, 1, 2, 3]
    await settle(pool)
    assert_books_balance(pool)


async def check_left_behind(
    pool: Pool[Item, Any], traces: Traces, *, seconds: float, timeout: float
) -> None:
    """See that a job of so many seconds goes on, and its worker takes no other."""
    item = Item("burn", seconds, 1, str(traces.path))
    with pytest.raises(JobTimeout):
        await pool.process(item, timeout=timeout)
    assert [what for what, *_ in traces.lines()][-1] == "beat"
    await pool.process(Item("echo", 1, 2, str(traces.path)))
    whats = [(what, number) for what, number, _ in traces.lines()]
    assert whats.index(("end", 1)) < whats.index(("start", 2))
    assert pool.statistics().restarts == 0


# ----------------------------------------------------------------------
# As if called directly.


@each()
@in_time
async def test_values_and_errors_come_back_as_themselves(backend: Backend) -> None:
    async with open_pool(2, worker=backend.worker(act)) as pool:
        assert await pool.process(Item("echo", {"a": [1, None]})) == {"a": [1, None]}
        with pytest.raises(LookupError, match="far off") as caught:
            await pool.process(Item("fail", "far off"))
        frames = [
            frame.name for frame in traceback.extract_tb(caught.value.__traceback__)
        ]
        assert "act" in frames or "act" in "".join(caught.value.__notes__)
        await check_usable(pool)


@each()
@in_time
async def test_a_closure_and_a_lambda_are_run_where_they_can_be_sent(
    backend: Backend,
) -> None:
    factor = 3
    worker = backend.worker(lambda item: item * factor)
    if backend.name == "processes":
        with pytest.raises(TypeError, match="fn must be something that the executor"):
            async with open_pool(1, worker=worker):
                pass
        return
    async with open_pool(1, worker=worker) as pool:
        assert await pool.process(5) == 15


@each()
@in_time
async def test_results_come_in_the_order_of_the_input(backend: Backend) -> None:
    items = [Item("echo", n) for n in range(100)]
    expected = list(range(100))
    async with open_pool(2, worker=backend.worker(act)) as pool:
        assert await pool.map(items) == expected
        assert await pool.map(items, chunk=7) == expected
        async with pool.stream(items, chunk=3) as results:
            assert [result async for result in results] == expected
        async with pool.stream(items, ordered=False) as results:
            assert sorted([result async for result in results]) == expected
        count = pool.statistics()
        assert count.accepted == count.done == 400
        assert_books_balance(pool)


@each()
@in_time
async def test_each_item_of_a_chunk_has_an_outcome_of_its_own(backend: Backend) -> None:
    acts = ["echo", "fail", "echo", "fail", "fail", "echo", "echo"]
    items = [Item(name, n) for n, name in enumerate(acts)]
    async with open_pool(1, worker=backend.worker(act)) as pool:
        settled = await pool.settle(items, chunk=5)
        assert [type(s.outcome).__name__ for s in settled] == [
            "Value" if name == "echo" else "Error" for name in acts
        ]
        assert [s.outcome.unwrap() for s in settled if acts[s.index] == "echo"] == [
            *(0, 2, 5, 6)
        ]
        count = pool.statistics()
        assert (count.accepted, count.done, count.failed) == (7, 4, 3)
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map(items, chunk=7)
        assert [type(error) for error in caught.value.exceptions] == [LookupError] * 3
        assert_books_balance(pool)


@each()
@in_time
async def test_a_failed_item_of_a_chunk_is_tried_again_alone(
    backend: Backend, traces: Traces
) -> None:
    items = [Item("echo", n, n, str(traces.path)) for n in range(6)]
    items[2] = items[2]._replace(act="fail")
    again = Retry(attempts=3, backoff=lambda _: 0.0)
    async with open_pool(2, worker=backend.worker(act)) as pool:
        settled = await pool.settle(items, chunk=6, retry=again)
        assert [s.outcome.unwrap() for s in settled if s.index != 2] == [0, 1, 3, 4, 5]
        assert traces.starts() == {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 1}
        count = pool.statistics()
        assert (count.accepted, count.failed, count.retries) == (6, 1, 2)


# ----------------------------------------------------------------------
# Cancelled and out of time.

LONG = {"burn": 30.0, "sleep": 30.0, "hold": 10**10, "child": 30.0}


@each(stops)
@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "cancel") for name in LONG),
        *(("burn", "timeout"), ("hold", "timeout"), ("burn", "reply")),
    ],
)
@in_time
async def test_a_running_job_is_stopped_with_its_process(
    backend: Backend, name: str, way: str, traces: Traces
) -> None:
    item = Item(name, LONG[name], 1, str(traces.path))
    async with open_pool(1, worker=backend.worker(act)) as pool:
        pid = await pool.process(Item("pid"))
        if way == "timeout":
            with pytest.raises(JobTimeout) as caught:
                await pool.process(item, timeout=0.5)
            assert caught.value.started
        elif way == "reply":
            reply = await pool.submit(item)
            await until(traces.starts)
            assert reply.cancel()
            with pytest.raises(JobCancelled) as cancelled:
                await reply.wait()
            assert cancelled.value.started
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.process, item)
                await until(traces.children if name == "child" else traces.starts)
                nursery.cancel_scope.cancel()
        await check_gone([pid], backend)
        # Nobody hears of the end of what was started by another.
        await until(lambda: all(map(is_gone, traces.children())), 1)
        before = traces.lines()
        assert await pool.process(Item("pid")) != pid
        assert traces.lines() == before
        assert traces.starts() == {1: 1}
        assert pool.statistics().restarts == 0
        await check_usable(pool)


@each(waits)
@pytest.mark.parametrize("way", ["cancel", "timeout"])
@in_time
async def test_a_running_job_that_cannot_be_stopped_is_waited_for(
    backend: Backend, way: str, traces: Traces
) -> None:
    item = Item("burn", 0.3, 1, str(traces.path))
    async with open_pool(1, worker=backend.worker(act)) as pool:
        if way == "timeout":
            # It has its result all the same, which wins.
            assert await pool.process(item, timeout=0.05) is None
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.process, item)
                await until(traces.starts)
                nursery.cancel_scope.cancel()
        assert [what for what, *_ in traces.lines()][-1] == "end"
        assert traces.starts() == {1: 1}
        await check_usable(pool)


@each(waits)
@in_time
async def test_a_job_that_is_left_behind_keeps_its_worker_from_others(
    backend: Backend, traces: Traces
) -> None:
    worker = backend.worker(act, abandon_on_cancel=True)
    async with open_pool(1, worker=worker) as pool:
        await check_left_behind(pool, traces, seconds=0.4, timeout=0.1)
        await check_usable(pool)


@each()
@in_time
async def test_a_job_that_is_cancelled_as_it_waits_never_starts(
    backend: Backend, traces: Traces
) -> None:
    item = Item("echo", 1, 1, str(traces.path))
    async with open_pool(1, worker=backend.worker(act)) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.process, Item("sleep", 0.2))
            await trio.sleep(0.05)
            with trio.move_on_after(0.05) as scope:
                await pool.process(item)
            assert scope.cancelled_caught
            with trio.CancelScope() as cancelled:
                cancelled.cancel()
                await pool.process(item)
            assert cancelled.cancelled_caught
        with trio.CancelScope() as cancelled:
            cancelled.cancel()
            await pool.process(item)
        await check_usable(pool)
        assert traces.lines() == []


@each()
@in_time
async def test_a_chunk_that_is_called_off_leaves_the_books_balanced(
    backend: Backend, traces: Traces
) -> None:
    items = [Item("burn", 0.1, n, str(traces.path)) for n in range(8)]
    async with open_pool(2, worker=backend.worker(act)) as pool:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(functools.partial(pool.settle, items, chunk=4))
                await until(traces.starts)
                scope.cancel()
        assert set(traces.starts().values()) == {1}
        await check_usable(pool)
        settled = await pool.settle(items[:4], chunk=4, timeout=0.04)
        outcomes = {type(s.outcome).__name__ for s in settled}
        if backend.stops or backend.name == "thread":
            # A thread looks whether it is cancelled between two items.
            assert outcomes == {"Error"}
            with pytest.raises(JobTimeout):
                settled[3].outcome.unwrap()
        else:
            assert outcomes == {"Value"}
        await check_usable(pool)


# ----------------------------------------------------------------------
# Crashes.


@each(crashes_alone)
@in_time
async def test_a_killed_process_costs_its_own_job_alone(
    backend: Backend, traces: Traces
) -> None:
    victim = Item("burn", 30.0, 1, str(traces.path))
    other = Item("burn", 0.5, 2, str(traces.path))
    waiting = Item("echo", 3, 3, str(traces.path))
    worker = backend.worker(act_with_state, setup=State)
    async with open_pool(2, worker=worker) as pool:
        replies = [await pool.submit(item) for item in (victim, other)]
        await until(lambda: len(traces.starts()) == 2)
        replies.append(await pool.submit(waiting))
        kill(traces.pid_of(1))
        with pytest.raises(WorkerCrashed) as caught:
            await replies[0].wait()
        assert caught.value.started
        assert caught.value.__cause__ is not None
        assert await replies[1].wait() is None
        assert await replies[2].wait() == 3
        assert traces.starts() == {1: 1, 2: 1, 3: 1}
        states = set(await pool.map([Item("state")] * 20, chunk=1))
        # The one that has run the other job has kept what it had.
        assert (traces.pid_of(2), 1) not in states
        assert traces.pid_of(2) in {pid for pid, _ in states}
        assert pool.statistics().restarts == 1


@each(remote)
@in_time
async def test_a_process_that_is_killed_idle_costs_no_job(backend: Backend) -> None:
    worker = backend.worker(act)
    async with open_pool(1, worker=worker, restart=PATIENT) as pool:
        # Right after the start, then after a job, and twice in a row. That the
        # end of a process is heard of takes its time.
        for pause in (0.05, 0.05, 0.3):
            pid = await pool.process(Item("pid"))
            kill(pid)
            await until(lambda pid=pid: is_gone(pid))
            await trio.sleep(pause)
            assert await pool.process(Item("echo", 1)) == 1
        assert pool.statistics().lost == 0
        await check_usable(pool)


@each(crashes_alone)
@in_time
async def test_a_process_that_is_killed_at_once_never_hangs_its_job(
    backend: Backend,
) -> None:
    worker = backend.worker(act)
    async with open_pool(1, worker=worker, restart=PATIENT) as pool:
        for _ in range(3):
            kill(await pool.process(Item("pid")))
            # It may die before, under, or after the call.
            try:
                assert await pool.process(Item("echo", 1)) == 1
            except WorkerCrashed as error:
                assert error.started  # noqa: PT017
        await check_usable(pool)


@each(crashes_alone)
@pytest.mark.parametrize("seed", SEEDS)
@in_time
async def test_chaos_leaves_no_job_in_doubt(
    backend: Backend, seed: int, traces: Traces
) -> None:
    chance = random.Random(seed)
    jobs, workers = 150, 2
    killed: set[int] = set()
    fates: dict[int, BaseException | None] = {}

    async def run(pool: Pool[Item, Any], number: int) -> None:
        took = chance.uniform(0, 0.03)
        try:
            await pool.process(Item("sleep", took, number, str(traces.path)))
        except WorkerCrashed as error:
            fates[number] = error
        else:
            fates[number] = None

    async def kill_some() -> None:
        while len(killed) < backend.kills:
            await trio.sleep(chance.uniform(0.05, 0.3))
            pids = {pid for what, _, pid in traces.lines() if what == "start"}
            # One that was killed may take its time to be gone.
            alive = sorted(pid for pid in pids - killed if not is_gone(pid))
            if alive:
                pid = chance.choice(alive)
                kill(pid)
                killed.add(pid)

    worker = backend.worker(act)
    async with open_pool(workers, worker=worker, restart=PATIENT) as pool:
        async with trio.open_nursery() as killer:
            killer.start_soon(kill_some)
            async with trio.open_nursery() as nursery:
                for number in range(jobs):
                    nursery.start_soon(run, pool, number)
            killer.cancel_scope.cancel()
        assert len(fates) == jobs
        assert len(killed) >= 3
        # Of one that was killed when it had nothing to do any more nobody knows yet.
        restarts = pool.statistics().restarts
        assert len(killed) - workers <= restarts <= len(killed)
        starts = traces.starts()
        assert set(starts.values()) == {1}
        for number, fate in fates.items():
            if fate is None or starts[number]:
                assert starts[number] == 1
                assert fate is None or fate.started  # type: ignore[attr-defined]
        await check_usable(pool)


@each(remote)
@in_time
async def test_a_chunk_that_is_lost_may_all_have_run(backend: Backend) -> None:
    items = [Item("echo", 0), Item("die", 3), Item("echo", 2)]
    worker = backend.worker(act)
    async with open_pool(1, worker=worker, restart=PATIENT) as pool:
        for settled in await pool.settle(items, chunk=3):
            with pytest.raises(WorkerCrashed) as caught:
                settled.outcome.unwrap()
            assert caught.value.started
        await check_usable(pool)
        count = pool.statistics()
        assert (count.done, count.lost, count.restarts) == (4, 3, 1)


# ----------------------------------------------------------------------
# Odd jobs.


@each()
@pytest.mark.parametrize("name", ["exit", "interrupt", "die"])
@in_time
async def test_a_job_that_ends_its_process_takes_no_other(
    backend: Backend, name: str, traces: Traces
) -> None:
    if not backend.remote and name != "exit":
        pytest.skip("it would end this very process, as a direct call would")
    items = [Item("echo", n, n, str(traces.path)) for n in range(4)]
    items[1] = items[1]._replace(act=name)
    worker = backend.worker(act)
    async with open_pool(1, worker=worker, restart=PATIENT) as pool:
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process(Item(name, 3))
        assert caught.value.started
        if name == "exit":
            assert isinstance(caught.value.__cause__, SystemExit)
        await check_usable(pool)
        if name != "die":
            # Of a call, what has not begun is none of its business.
            settled = await pool.settle(items, chunk=4)
            assert [s.outcome.unwrap() for s in settled if s.index != 1] == [0, 2, 3]
            assert set(traces.starts().values()) == {1}
        await check_usable(pool)


@each(remote)
@in_time
async def test_what_cannot_be_sent_is_named(backend: Backend) -> None:
    async with open_pool(1, worker=backend.worker(act)) as pool:
        with pytest.raises(
            RemoteError, match=r"result of type _thread\.lock"
        ) as caught:
            await pool.process(Item("odd result"))
        assert (caught.value.what, caught.value.started) == ("result", True)
        with pytest.raises(RemoteError, match="LoadedError") as caught:
            await pool.process(Item("odd error"))
        assert (caught.value.what, caught.value.started) == ("error", True)
        assert "_raise(LoadedError())" in caught.value.text
        with pytest.raises((RemoteError, StubbornError), match=r"StubbornError|ab"):
            await pool.process(Item("stubborn error"))
        with pytest.raises(RemoteError, match="cannot be read") as caught:
            await pool.process(Item("unreadable"))
        assert caught.value.what == "result"
        with pytest.raises(RemoteError, match="argument") as caught:
            await pool.process(Item("echo", trio.lowlevel.current_task()))
        assert (caught.value.what, caught.value.started) == ("argument", False)
        settled = await pool.settle(
            [Item("echo", 1), Item("echo", LoadedError().lock), Item("echo", 3)],
            chunk=3,
        )
        assert [type(s.outcome).__name__ for s in settled] == [
            *("Value", "Error", "Value")
        ]
        assert pool.statistics().restarts == 0
        await check_usable(pool)


@each()
@in_time
async def test_a_large_payload_goes_through_with_one_warning(backend: Backend) -> None:
    large = Item("size", bytes(100_000_000))
    async with open_pool(1, worker=backend.worker(act)) as pool:
        if backend.remote and backend.name != "processes":
            with pytest.warns(PayloadWarning, match="pass paths or handles"):
                assert await pool.process(large) == 100_000_000
        assert await pool.process(large) == 100_000_000
        await check_usable(pool)


# ----------------------------------------------------------------------
# Setup.


def has_setup(backend: Backend) -> bool:
    return backend.crashes_alone


def _fail_to_set_up() -> None:
    raise LookupError("no such model")


@each(has_setup)
@in_time
async def test_a_setup_that_fails_is_no_failure_of_a_job(backend: Backend) -> None:
    worker = backend.worker(act, setup=_fail_to_set_up)
    with pytest.raises(LookupError, match="no such model"):
        async with open_pool(2, worker=worker):
            pytest.fail("it is open")


@each(has_setup)
@in_time
async def test_what_is_set_up_outlives_errors_and_is_made_anew_after_a_crash(
    backend: Backend,
) -> None:
    worker = backend.worker(act_with_state, setup=State)
    async with open_pool(1, worker=worker) as pool:
        pid, jobs = await pool.process(Item("state"))
        assert jobs == 1
        with pytest.raises(LookupError):
            await pool.process(Item("fail", "no matter"))
        assert await pool.process(Item("state")) == (pid, 3)
        with pytest.raises(WorkerCrashed):
            await pool.process(Item("die", 3))
        other, jobs = await pool.process(Item("state"))
        assert other != pid
        assert jobs == 1


@each()
@in_time
async def test_a_leased_worker_is_one_other_end(backend: Backend) -> None:
    async with open_pool(2, worker=backend.worker(act)) as pool:
        async with pool.lease() as worker:
            pids = {await worker.process(Item("pid")) for _ in range(5)}
            if backend.name != "processes":
                assert len(pids) == 1
            if backend.stops:
                with pytest.raises(JobTimeout):
                    await worker.process(Item("burn", 30.0), timeout=0.2)
                # What it had set up is gone, so the lease is lost.
                with pytest.raises(WorkerCrashed) as caught:
                    await worker.process(Item("echo", 1))
                assert not caught.value.started
        await check_usable(pool)


# ----------------------------------------------------------------------
# The pool's life.


@each()
@in_time
async def test_nothing_is_left_of_a_pool_that_is_cancelled(
    backend: Backend, traces: Traces
) -> None:
    items = [Item("burn", 0.3, n, str(traces.path)) for n in range(4)]
    with trio.CancelScope() as scope:
        async with open_pool(2, worker=backend.worker(act)) as pool:
            for item in items:
                await pool.submit(item)
            await until(lambda: len(traces.starts()) == 2)
            scope.cancel()
    assert scope.cancelled_caught
    assert len(traces.starts()) == 2
    if backend.remote:
        pids = [pid for _, _, pid in traces.lines()]
        await check_gone(sorted({*pids} - {os.getpid()}), backend)


@each()
@in_time
async def test_a_worker_can_be_used_for_one_pool_after_another(
    backend: Backend,
) -> None:
    worker = backend.worker(act)
    for _ in range(2):
        async with open_pool(1, worker=worker) as pool:
            assert await pool.process(Item("echo", 1)) == 1
            await pool.resize(2)
            await check_usable(pool)
            await pool.resize(1)
            await check_usable(pool)


@each(remote)
@in_time
async def test_workers_are_recycled_as_planned(backend: Backend) -> None:
    async with open_pool(1, worker=backend.worker(act), max_jobs=3) as pool:
        pids = await pool.map([Item("pid")] * 9, chunk=2)
        if backend.name != "processes":
            assert sorted(pids.count(pid) for pid in set(pids)) == [3, 3, 3]
        assert pool.statistics().restarts == 0


# ----------------------------------------------------------------------
# The program's end.

PROGRAM = Path(__file__).parent / "offloading.py"
MARK = "TRIO_POOL_OFFLOADING"


def marked(mark: str) -> list[int]:
    """Find the processes that were started, however far down, by a program."""
    found: list[int] = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdecimal() and f"{MARK}={mark}".encode() in (
                (folder / "environ").read_bytes()
            ):
                pid = int(folder.name)
                if not is_gone(pid):
                    found.append(pid)
    return found


@pytest.fixture
def program(traces: Traces) -> Iterator[Callable[[Backend, float], Any]]:
    """Start a program whose jobs are running; kill what is left of it by the end."""
    mark = f"{os.getpid()}-{traces.path}"
    programs: list[subprocess.Popen[str]] = []

    def start(backend: Backend, seconds: float) -> subprocess.Popen[str]:
        environment = {**os.environ, MARK: mark}
        started = subprocess.Popen(
            [sys.executable, PROGRAM, backend.name, traces.path, str(seconds)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        programs.append(started)
        assert started.stdout is not None
        line = started.stdout.readline()
        assert line == "ready\n", started.stderr.read()  # type: ignore[union-attr]
        assert len(marked(mark)) >= 1 + 2 * backend.remote
        return started

    start.left = lambda: marked(mark)  # type: ignore[attr-defined]
    yield start
    for pid in marked(mark):
        kill(pid)
    for one in programs:
        one.communicate()


def wait_until(claim: Callable[[], bool], seconds: float) -> bool:
    """Say whether something becomes so in time."""
    end = time.monotonic() + seconds
    while not claim() and time.monotonic() < end:
        time.sleep(0.05)
    return claim()


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@on_linux
@each(remote)
def test_nothing_is_left_of_a_program_that_is_killed(
    backend: Backend, program: Any, traces: Traces
) -> None:
    if backend.name == "processes":
        pytest.skip("an executor of the standard library leaves its processes")
    started = program(backend, 30.0)
    started.kill()
    started.communicate(timeout=20)
    jobs = [*(pid for _, _, pid in traces.lines()), *traces.children()]
    assert wait_until(lambda: all(map(is_gone, jobs)), 8)
    assert wait_until(lambda: not program.left(), 8)


@on_linux
@each()
@pytest.mark.parametrize("whom", ["program", "group"])
def test_ctrl_c_is_the_programs_own(backend: Backend, whom: str, program: Any) -> None:
    started = program(backend, 30.0 if backend.stops else 1.0)
    if whom == "program":
        os.kill(started.pid, signal.SIGINT)
    else:
        os.killpg(started.pid, signal.SIGINT)
    output, errors = started.communicate(timeout=30)
    assert output == "interrupted\n"
    if backend.name != "processes":
        # Those of an executor of the standard library hear of it too.
        assert errors == ""
    if backend.stops:
        assert wait_until(lambda: not program.left(), 8)
