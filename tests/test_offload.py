"""The parts of the offload module: the bridge, what is refused, what is sent."""

from __future__ import annotations

import contextvars
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from offloaded import Item, Traces, act, is_gone, threads, until
from trio.testing import wait_all_tasks_blocked

from trio_pool import JobTimeout, Pool, Restart, WorkerCrashed, offload, open_pool
from trio_pool._errors import WorkerGone
from trio_pool.offload import (
    EngineError,
    PayloadWarning,
    RemoteError,
    _child,
    _shim,
    in_thread,
    on_executor,
    wait_future,
)
from trio_pool.offload._remote import PAYLOAD, Payloads, opened, pack_work
from trio_pool.testing import InlinePool, assert_books_balance

with_processes = pytest.mark.skipif(
    find_spec("trio_parallel") is None, reason="trio_parallel is not installed"
)


# ----------------------------------------------------------------------
# The bridge.


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as made:
        yield made


async def test_a_future_is_waited_for(executor: Executor) -> None:
    assert await wait_future(executor.submit(str, 5)) == "5"
    done: Future[int] = Future()
    done.set_result(3)
    assert await wait_future(done) == 3
    with pytest.raises(ValueError, match="invalid literal"):
        await wait_future(executor.submit(int, "five"))
    cancelled: Future[int] = Future()
    cancelled.cancel()
    with pytest.raises(CancelledError):
        await wait_future(cancelled)


async def test_a_future_that_has_not_begun_is_cancelled_with_its_waiter() -> None:
    future: Future[int] = Future()
    with trio.CancelScope() as scope:
        scope.cancel()
        await wait_future(future)
    assert scope.cancelled_caught
    assert future.cancelled()


async def test_a_running_future_is_waited_for_or_left_behind() -> None:
    future: Future[int] = Future()
    future.set_running_or_notify_cancel()
    with trio.move_on_after(0) as scope:
        await wait_future(future, abandon_on_cancel=True)
    assert scope.cancelled_caught
    results: list[int] = []
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            results.append(await wait_future(future))

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await wait_all_tasks_blocked()
        assert results == []
        future.set_result(5)
    assert results == [5]


async def test_a_future_whose_cancel_is_not_to_be_trusted_is_not_asked() -> None:
    class Liar(Future[int]):
        def cancel(self) -> bool:
            raise AssertionError("it was asked")

    future = Liar()
    with trio.move_on_after(0) as scope:
        await wait_future(future, may_cancel=False, abandon_on_cancel=True)
    assert scope.cancelled_caught
    future.set_result(1)
    assert await wait_future(future, may_cancel=False) == 1


async def test_a_future_that_is_done_keeps_its_result_from_a_cancelled_waiter() -> None:
    future: Future[int] = Future()
    results: list[int] = []
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                results.append(await wait_future(future))

            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            future.set_result(5)
            # In the same step, before the wake-up.
            scope.cancel()
    assert results == [5]


async def test_twenty_thousand_futures_with_random_cancels() -> None:
    chance = random.Random(5)
    rounds = 20_000
    ended: list[str] = []

    async def wait(submit: Callable[..., Future[int]], number: int) -> None:
        with trio.CancelScope() as scope:
            if chance.random() < 0.2:
                scope.cancel()
            elif chance.random() < 0.3:
                scope.deadline = trio.current_time() + chance.uniform(0, 0.002)
            assert await wait_future(submit(abs, -number)) == number
            ended.append("done")
        if scope.cancelled_caught:
            ended.append("cancelled")
        await trio.lowlevel.checkpoint()

    with ThreadPoolExecutor(4) as executor:
        for start in range(0, rounds, 500):
            async with trio.open_nursery() as nursery:
                for number in range(start, start + 500):
                    nursery.start_soon(wait, executor.submit, number)
    assert len(ended) == rounds
    assert min(map(ended.count, ("done", "cancelled"))) > 1000


def test_a_future_may_be_shared_by_two_runs_and_outlive_both() -> None:
    future: Future[int] = Future()

    async def give_up() -> bool:
        with trio.move_on_after(0.01) as scope:
            await wait_future(future, may_cancel=False, abandon_on_cancel=True)
        return scope.cancelled_caught

    with ThreadPoolExecutor(2) as executor:
        waits = [executor.submit(trio.run, give_up) for _ in range(2)]
        assert [wait.result() for wait in waits] == [True, True]
    future.set_result(1)

    async def wait() -> int:
        return await wait_future(future)

    assert trio.run(wait) == 1


# ----------------------------------------------------------------------
# Threads.

variable = contextvars.ContextVar("variable", default="nothing")


async def test_a_thread_sees_the_callers_context_and_keeps_its_own() -> None:
    def look(_: object) -> str:
        seen = variable.get()
        variable.set("a thread's")
        return seen

    async with open_pool(1, worker=in_thread(look)) as pool:
        variable.set("mine")
        assert await pool.process(1) == "mine"
        assert await pool.map(range(4), chunk=4) == ["mine"] * 4
        assert variable.get() == "mine"


async def test_a_thread_that_asks_whether_it_is_cancelled_ends_early() -> None:
    begun = threading.Event()

    def ask(_: object) -> None:
        while True:
            begun.set()
            trio.from_thread.check_cancelled()
            time.sleep(0.001)

    async with open_pool(1, worker=in_thread(ask)) as pool:
        for call in (pool.process, lambda item: pool.map([item, item], chunk=2)):
            begun.clear()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call, 1)
                await trio.to_thread.run_sync(begun.wait)
                nursery.cancel_scope.cancel()
        assert_books_balance(pool)
        assert pool.statistics().restarts == 0


async def test_no_more_threads_run_than_there_are_workers() -> None:
    lock, running, most = threading.Lock(), 0, 0

    def count(_: object) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1

    worker = in_thread(count, abandon_on_cancel=True)
    async with open_pool(3, worker=worker) as pool:
        async with trio.open_nursery() as nursery:
            for number in range(40):

                async def call(timeout: float = 0.002 if number % 2 else 1) -> None:
                    with trio.move_on_after(timeout):
                        await pool.process(1)

                nursery.start_soon(call)
    assert most <= 3
    assert pool.statistics().restarts == 0


# ----------------------------------------------------------------------
# Executors.


class Brittle(Executor):
    """Breaks when it is told to, as an executor of processes does."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.pending: list[Future[Any]] = []
        self.broken = False
        self.shut = False

    def submit(self, fn: Any, /, *args: Any, **_: Any) -> Future[Any]:
        from concurrent.futures import BrokenExecutor

        if self.broken:
            raise BrokenExecutor("broken before")
        future: Future[Any] = Future()
        items = args[2]
        if items == ["wait"]:
            future.set_running_or_notify_cancel()
            self.pending.append(future)
        elif items == ["break"]:
            self.broken = True
            future.set_running_or_notify_cancel()
            self.pending.append(future)
            for other in self.pending:
                other.set_exception(BrokenExecutor("broken now"))
        else:
            future.set_result(fn(*args))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.shut = True


async def test_an_executor_that_breaks_is_replaced_once_and_is_one_crash() -> None:
    made: list[Brittle] = []

    def make() -> Brittle:
        made.append(Brittle())
        return made[-1]

    async with open_pool(3, worker=on_executor(make, str)) as pool:
        assert len(made) == 1
        replies = [await pool.submit(item) for item in ("wait", "wait")]
        while len(made[0].pending) < 2:
            await trio.lowlevel.checkpoint()
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process("break")
        assert caught.value.started
        for reply in replies:
            with pytest.raises(WorkerCrashed) as caught:
                await reply.wait()
            assert caught.value.started
        assert await pool.map(["a", "b", "c"]) == ["a", "b", "c"]
        assert len(made) == 2
        assert pool.statistics().restarts == 1
        # Broken while nothing ran: no job has to pay for it.
        made[1].broken = True
        assert await pool.process("d") == "d"
        assert (len(made), pool.statistics().lost) == (3, 3)
    assert [executor.shut for executor in made] == [True] * 3


async def test_a_factory_has_to_make_executors() -> None:
    worker = on_executor(lambda: 5, str)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match=r"factory must be .*Executor.*returned 5"):
        async with open_pool(1, worker=worker):
            pytest.fail("it is open")


async def test_an_executor_that_is_broken_from_the_start_fails_the_opening() -> None:
    def make() -> Brittle:
        made = Brittle()
        made.broken = True
        return made

    with pytest.raises((EngineError, TypeError), match="broke"):
        async with open_pool(1, worker=on_executor(make, str)):
            pytest.fail("it is open")


async def test_an_executor_that_somebody_shuts_down_is_replaced() -> None:
    made: list[Executor] = []

    def make() -> Executor:
        made.append(threads())
        return made[-1]

    async with open_pool(2, worker=on_executor(make, str)) as pool:
        assert await pool.process(1) == "1"
        made[0].shutdown()
        assert await pool.process(2) == "2"
        assert len(made) == 2


# ----------------------------------------------------------------------
# What is refused, before anything has run.


async def coroutine(item: object) -> object:
    return item


WORKERS: list[tuple[str, Any]] = [
    ("in_thread", in_thread),
    ("on_executor", partial(on_executor, threads)),
]
if find_spec("trio_parallel"):
    WORKERS.append(("in_process", offload.in_process))
if find_spec("distributed"):
    WORKERS.append(("on_dask", offload.on_dask))
if find_spec("ray"):
    WORKERS.append(("on_ray", offload.on_ray))
each_worker = pytest.mark.parametrize(
    "make", [make for _, make in WORKERS], ids=[name for name, _ in WORKERS]
)
with_setup = pytest.mark.parametrize(
    "make",
    [make for name, make in WORKERS if name in {"in_process", "on_dask", "on_ray"}],
)


@each_worker
def test_an_async_function_is_for_the_pool_itself(make: Any) -> None:
    with pytest.raises(TypeError, match=r"fn must be a sync function.*open_pool"):
        make(coroutine)
    with pytest.raises(TypeError, match="fn must be a sync function, got 5"):
        make(5)


@with_setup
def test_a_function_takes_the_item_or_what_was_set_up_and_the_item(make: Any) -> None:
    with pytest.raises(TypeError, match="fn must be a sync function of the job's"):
        make(lambda: 1)
    with pytest.raises(TypeError, match="fn must be a sync function of the job's"):
        make(lambda state, item: 1)
    with pytest.raises(TypeError, match=r"fn must be .* of what setup returned"):
        make(lambda a, b, c: 1, setup=list)
    with pytest.raises(TypeError, match="setup must be a sync function without arg"):
        make(str, setup=lambda item: item)
    with pytest.raises(TypeError, match="setup must be a sync function, got"):
        make(str, setup=coroutine)
    for good in (str, int, abs, lambda item, more=1: item, lambda *items: items):
        make(good)
        make(good, setup=list)
    make(lambda state, item: item, setup=list)


@with_setup
@pytest.mark.parametrize("value", [0, -5, 1.5, "much"])
def test_a_payload_is_a_number_of_bytes(make: Any, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="warn_above must be an int, 1"):
        make(str, warn_above=value)


@with_setup
def test_a_function_that_cannot_be_pickled_is_refused_at_once(make: Any) -> None:
    lock = threading.Lock()
    with pytest.raises(TypeError, match="fn must be something that can be pickled"):
        make(lambda item: lock)


@pytest.mark.parametrize("make", [in_thread, partial(on_executor, threads)])
def test_whether_to_abandon_is_yes_or_no(make: Any) -> None:
    with pytest.raises(TypeError, match="abandon_on_cancel must be a bool, got 1"):
        make(str, abandon_on_cancel=1)


def test_a_worker_is_no_handler() -> None:
    with pytest.raises(TypeError, match="worker="):
        open_pool(2, in_thread(str))  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="worker="):
        open_pool(2, on_executor(threads, str))  # type: ignore[call-overload]


def test_a_sync_handler_is_told_of_threads() -> None:
    with pytest.raises(TypeError, match=r"worker=trio_pool\.offload\.in_thread"):
        open_pool(2, abs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "needs", "extra"),
    [
        ("in_process", "trio_parallel", "process"),
        ("on_dask", "distributed", "dask"),
        ("on_ray", "ray", "ray"),
    ],
)
def test_an_engine_that_is_missing_names_the_extra(
    name: str, needs: str, extra: str
) -> None:
    program = f"""
import sys
sys.modules[{needs!r}] = None
import trio_pool.offload
try:
    trio_pool.offload.{name}
except ImportError as error:
    print(error)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert f"needs {needs}" in found.stdout
    assert f"pip install trio-pool[{extra}]" in found.stdout


def test_no_engine_is_imported_before_it_is_asked_for() -> None:
    program = """
import sys, trio_pool.offload
found = {"trio_parallel", "cloudpickle", "tblib", "distributed", "dask", "ray"}
print(sorted(found & set(sys.modules)), sorted(set(dir(trio_pool.offload))))
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("[]")
    assert "in_process" in found.stdout
    assert not hasattr(offload, "on_mars")


UNGUARDED = """
import trio
from trio_pool import open_pool
from trio_pool.offload import in_process

async def main():
    async with open_pool(1, worker=in_process(str)) as pool:
        print(await pool.process(1))

{start}
"""


@with_processes
@pytest.mark.parametrize("guarded", [True, False])
def test_a_program_without_a_guard_is_told_so(tmp_path: Path, guarded: bool) -> None:
    start = "trio.run(main)"
    if guarded:
        start = f"if __name__ == '__main__': {start}"
    program = tmp_path / "program.py"
    program.write_text(UNGUARDED.format(start=start))
    found = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if guarded:
        assert (found.stdout, found.stderr) == ("1\n", "")
    else:
        assert 'if __name__ == "__main__": trio.run(main)' in found.stderr
        assert found.returncode == 1


# ----------------------------------------------------------------------
# What is sent.


def refuse(_: object) -> None:
    raise LookupError("refused")


def host_of(fn: Any, setup: Any = None, takes_state: bool = False) -> _shim.Host:
    host = _shim.Host(pack_work(fn, setup, takes_state), "one")
    assert host.set_up()[2] is None
    return host


def run(host: _shim.Host, *items: Any, call: int = 1) -> list[Any]:
    report = host.run("one", call, [_shim.pack(item) for item in items])
    assert report is not None
    seconds, fates = report
    assert seconds >= 0
    return opened(fates, len(items), Payloads(PAYLOAD))


def test_a_host_runs_no_call_twice_and_none_of_another() -> None:
    host = host_of(str)
    assert host.run("two", 1, []) is None
    assert host.run("one", 1, []) is not None
    assert host.run("one", 1, []) is None
    assert host.run("one", 3, []) is not None
    assert host.run("one", 2, []) is None
    assert _shim.Host(b"", "one").run("one", 1, []) is None


def test_a_host_keeps_what_was_set_up() -> None:
    host = host_of(lambda state, item: state.append(item) or len(state), list, True)
    assert [result.value for result in run(host, "a", "b")] == [1, 2]


def test_a_host_that_cannot_be_set_up_says_why() -> None:
    for work in (pack_work(str, partial(refuse, 1), False), b"no pickle"):
        _, version, trouble = _shim.Host(work).set_up()
        assert version.startswith("3.")
        (result,) = opened([trouble], 1, Payloads(PAYLOAD))  # type: ignore[list-item]
        assert isinstance(result.error, (LookupError, pickle.UnpicklingError))


def test_errors_come_back_with_their_frames_and_causes() -> None:
    def fail(item: str) -> None:
        try:
            refuse(item)
        except LookupError as error:
            raise KeyError(item) from error

    (result,) = run(host_of(fail), "a")
    error = result.error
    assert isinstance(error, KeyError)
    frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert frames[0] == "fail"
    assert isinstance(error.__cause__, LookupError)


def test_an_exit_ends_its_call_and_what_follows_never_started() -> None:
    def leave(item: int) -> int:
        if item == 1:
            sys.exit("enough")
        return item

    first, second, third = run(host_of(leave), 0, 1, 2)
    assert first.value == 0
    assert isinstance(second.error, WorkerGone)
    assert second.error.started
    assert isinstance(second.error.__cause__, SystemExit)
    assert isinstance(third.error, WorkerGone)
    assert not third.error.started


def test_an_interrupt_at_the_other_end_is_none_here() -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    (result,) = run(host_of(interrupt), 0)
    assert isinstance(result.error, WorkerGone)
    assert isinstance(result.error.__cause__, EngineError)


def test_an_argument_that_cannot_be_read_fails_alone() -> None:
    host = host_of(str)
    report = host.run("one", 1, [_shim.pack(1), b"no pickle", _shim.pack(3)])
    assert report is not None
    first, second, third = opened(report[1], 3, Payloads(PAYLOAD))
    assert (first.value, third.value) == ("1", "3")  # type: ignore[union-attr]
    error: Any = second.error  # type: ignore[union-attr]
    assert isinstance(error, RemoteError)
    assert (error.what, error.started) == ("argument", False)


def test_a_process_that_knows_nothing_runs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_child, "_hosts", [])
    assert _child.run(1, []) is None


def test_the_errors_can_be_pickled() -> None:
    for error in (
        RemoteError("result", "a.B", "no", True, "text"),
        EngineError("it broke"),
        PayloadWarning("large"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.args, str(again)) == (
            *(type(error), error.args, str(error)),
        )


def test_a_payload_is_warned_of_once() -> None:
    payloads = Payloads(100)
    payloads.look(100, "argument")
    with pytest.warns(PayloadWarning, match=r"argument of a job takes 101 bytes.*=100"):
        payloads.look(101, "argument")
    payloads.look(1000, "result")


@with_processes
async def test_what_main_defines_is_the_same_at_both_ends(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import trio
from trio_pool import open_pool
from trio_pool.offload import in_process

class Point:
    def __init__(self, x):
        self.x = x

class Far(Exception):
    pass

model = None

def set_up():
    global model
    model = "loaded"

def move(point):
    assert isinstance(point, Point), point
    if point.x > 5:
        raise Far(point.x)
    return Point(point.x + 1), model

async def main():
    async with open_pool(1, worker=in_process(move, setup=set_up)) as pool:
        moved, model = await pool.process(Point(1))
        print(isinstance(moved, Point), moved.x, model)
        try:
            await pool.process(Point(9))
        except Far as error:
            print("far", error)

if __name__ == "__main__":
    trio.run(main)
"""
    )
    found = await trio.run_process(
        [sys.executable, program], capture_stdout=True, capture_stderr=True
    )
    assert found.stdout == b"True 2 loaded\nfar 9\n"
    assert found.stderr == b""


async def check_pool(pool: Pool[Any, Any]) -> None:
    assert await pool.process(Item("echo", 1)) == 1


@with_processes
async def test_two_pools_and_two_runs_have_processes_of_their_own() -> None:
    worker = offload.in_process(act)
    async with open_pool(1, worker=worker) as one, open_pool(1, worker=worker) as two:
        pids = [await pool.process(Item("pid")) for pool in (one, two)]
        assert len({*pids, os.getpid()}) == 3
        await check_pool(one)

    async def again() -> None:
        async with open_pool(1, worker=worker) as pool:
            await check_pool(pool)

    await trio.to_thread.run_sync(trio.run, again)


@with_processes
async def test_restarts_of_processes_spend_the_budget() -> None:
    worker = offload.in_process(act)
    with pytest.raises(Exception, match="crashed 2 times within"):
        async with open_pool(1, worker=worker, restart=Restart(limit=1)) as pool:
            for _ in range(2):
                with pytest.raises(WorkerCrashed):
                    await pool.process(Item("die", 1))
            await trio.sleep(5)


@with_processes
async def test_an_inline_pool_has_a_process_too() -> None:
    async with InlinePool(worker=offload.in_process(act)) as pool:
        pid = await pool.process(Item("pid"))
        assert pid != os.getpid()
        with pytest.raises(JobTimeout):
            await pool.process(Item("sleep", 30.0), timeout=0.1)
        assert await pool.process(Item("pid")) not in {pid, os.getpid()}
        with pytest.raises(WorkerCrashed):
            await pool.process(Item("die", 1))
        await check_pool(pool)


async def test_a_worker_that_shares_with_others_can_be_opened_alone() -> None:
    async with on_executor(threads, str)() as handler:
        assert await handler(5) == "5"


@with_processes
async def test_what_a_setup_has_started_ends_with_it(tmp_path: Path) -> None:
    traces = Traces(tmp_path / "traces")
    start = partial(act, Item("child", 30.0, 1, str(traces.path)))
    with trio.move_on_after(30) as scope:
        async with trio.open_nursery() as nursery:

            async def open_one() -> None:
                async with open_pool(1, worker=offload.in_process(act, setup=start)):
                    pytest.fail("it is open")

            nursery.start_soon(open_one)
            await until(traces.children)
            nursery.cancel_scope.cancel()
    assert not scope.cancelled_caught
    await until(lambda: all(map(is_gone, traces.children())), 1)


# ----------------------------------------------------------------------
# What is odd, and costs nobody else anything.


class OddError(Exception):
    """Cannot even be looked at."""

    @property
    def exceptions(self) -> Any:
        raise KeyError("odd")


def test_an_odd_error_is_its_own_items_alone() -> None:
    def fail(item: str) -> str:
        if item == "odd":
            raise OddError(item)
        if item == "deep":
            error: BaseException | None = None
            for number in range(1500):
                new = ValueError(number)
                new.__context__, error = error, new
            assert error is not None
            raise error
        return item

    first, odd, deep, last = run(host_of(fail), "a", "odd", "deep", "b")
    assert (first.value, last.value) == ("a", "b")
    assert isinstance(odd.error, OddError)
    assert isinstance(deep.error, ValueError)


def test_an_endless_recursion_comes_back_as_itself() -> None:
    def recurse(item: int) -> int:
        return recurse(item)

    (result,) = run(host_of(recurse), 1)
    assert isinstance(result.error, RecursionError)
    # With its frames, or where these are too many told of in a note.
    frames = traceback.extract_tb(result.error.__traceback__)
    notes = getattr(result.error, "__notes__", [])
    assert "recurse" in "".join([*notes, *(frame.name for frame in frames)])


class Counting(ThreadPoolExecutor):
    """Is shut down after some calls, and can send no locks."""

    def __init__(self, calls: int) -> None:
        super().__init__(1)
        self._left = calls

    def submit(self, fn: Any, /, *args: Any, **how: Any) -> Future[Any]:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if any(isinstance(item, type(threading.Lock())) for item in args[2]):
            refused: Future[Any] = Future()
            refused.set_exception(TypeError("cannot pickle"))
            return refused
        return super().submit(fn, *args, **how)


async def test_what_has_run_is_not_run_again_for_what_cannot_be_sent() -> None:
    ran: list[Any] = []
    made: list[Counting] = []

    def make() -> Executor:
        # Its calls: one to try it out, the chunk, and then one item each.
        made.append(Counting(4 if not made else 100))
        return made[-1]

    items = ["a", threading.Lock(), "b"]
    async with open_pool(1, worker=on_executor(make, ran.append)) as pool:
        settled = await pool.settle(items, chunk=3)
        kinds = [type(s.outcome).__name__ for s in settled]
    assert kinds == ["Value", "Error", "Value"]
    assert ran == ["a", "b"]


async def test_a_factory_that_fails_later_costs_no_job() -> None:
    made: list[Executor] = []

    def make() -> Executor:
        if len(made) == 1:
            made.append(made[0])
            raise OSError("no more")
        made.append(threads())
        return made[-1]

    async with open_pool(1, worker=on_executor(make, str)) as pool:
        made[0].shutdown()
        assert await pool.process(1) == "1"
        assert pool.statistics().failed == 0


async def test_a_call_that_somebody_else_cancels_waits_for_another() -> None:
    blocked = threading.Event()
    executor = ThreadPoolExecutor(1)
    made = [executor]

    def make() -> Executor:
        if len(made) == 2:
            made.append(threads())
        else:
            made.append(executor)
        return made[-1]

    async with open_pool(2, worker=on_executor(make, lambda _: blocked.wait(20))) as (
        pool
    ):
        first = await pool.submit(1)
        second = await pool.submit(2)
        while executor._work_queue.qsize() < 1:  # noqa: ASYNC110, SLF001
            await trio.sleep(0.001)
        executor.shutdown(wait=False, cancel_futures=True)
        await trio.sleep(0.01)
        blocked.set()
        assert await first.wait()
        assert await second.wait()


async def test_threads_that_were_left_behind_are_their_own_pools() -> None:
    gate = threading.Event()
    worker = in_thread(lambda seconds: gate.wait(seconds), abandon_on_cancel=True)
    with trio.fail_after(10):
        async with open_pool(1, worker=worker) as pool:
            with pytest.raises(JobTimeout):
                await pool.process(5.0, timeout=0.01)
        async with open_pool(1, worker=worker) as pool:
            assert not await pool.process(0.0)
        gate.set()


async def test_a_cancelled_chunk_ends_with_the_item_that_its_thread_is_at() -> None:
    ran: list[int] = []

    def work(item: int) -> None:
        ran.append(item)
        time.sleep(0.02)

    async with open_pool(1, worker=in_thread(work)) as pool:
        with trio.move_on_after(0.05) as scope:
            await pool.map(range(100), chunk=100)
        assert scope.cancelled_caught
    assert len(ran) < 50


async def test_a_function_that_gives_a_coroutine_is_refused_in_a_chunk_too() -> None:
    async with open_pool(1, worker=in_thread(lambda item: coroutine(item))) as pool:
        with pytest.raises(TypeError):
            await pool.process(1)
        for settled in await pool.settle([1, 2], chunk=2):
            with pytest.raises(TypeError, match="sync function"):
                settled.outcome.unwrap()


def test_a_factory_of_executors_is_called_for_one() -> None:
    for factory in (ThreadPoolExecutor(1), 5, coroutine, lambda more: threads()):
        with pytest.raises(TypeError, match=r"factory must be a function without arg"):
            on_executor(factory, str)  # type: ignore[arg-type]
    for make in (in_thread, partial(on_executor, threads)):
        with pytest.raises(TypeError, match="fn must be a sync function of the job"):
            make(lambda: 1)  # type: ignore[operator]


@with_processes
@pytest.mark.parametrize("cancelled", [True, False])
async def test_what_a_job_has_started_ends_with_its_process(
    tmp_path: Path, cancelled: bool
) -> None:
    traces = Traces(tmp_path / "traces")
    start = Item("child", 0.01, 1, str(traces.path))
    with trio.CancelScope() as scope:
        async with open_pool(1, worker=offload.in_process(act)) as pool:
            await pool.process(start)
            if cancelled:
                scope.cancel()
    assert len(traces.children()) == 1
    await until(lambda: all(map(is_gone, traces.children())), 1)
