"""Generated programs for pools of users' workers: sound ones pass, others do not.

Each test runs some dozens of trio runs, and shrinks what fails, so these take
a second or so each.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test

from trio_pool import (
    CircuitBreaker,
    JobCancelled,
    JobState,
    Rate,
    Restart,
    Retry,
    open_pool,
)
from trio_pool import _worker as worker_module
from trio_pool._backlog import Keys
from trio_pool._dispatch import Dispatch
from trio_pool._supervisor import Supervisor
from trio_pool._telling import HookCalls
from trio_pool._worker import Worker
from trio_pool.testing import PoolMachine, StressReport, stress_pool

STRESS = bool(os.environ.get("TRIO_POOL_STRESS"))

# The same programs in every run, so that nothing is found on Tuesdays only.
EXACT = settings(
    database=None,
    derandomize=True,
    deadline=None,
    max_examples=100,
    stateful_step_count=25,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)
BRIEF = settings(EXACT, max_examples=15)
UNSHRUNK = settings(EXACT, phases=[Phase.generate])
# It ends with the first that fails. To shrink takes several times as long as to find.
SEARCH = settings(EXACT if STRESS else UNSHRUNK, max_examples=1_000)


def steps_of(error: BaseException) -> list[str]:
    """Name the steps of the program that hypothesis shows."""
    shown = "\n".join(getattr(error, "__notes__", []))
    steps = re.findall(r"^ *(?:\w+ = )?state\.(\w+)\(", shown, re.MULTILINE)
    assert steps[:1] == ["open"], shown
    assert steps[-1] == "teardown", shown
    return steps[1:-1]


def assert_short(steps: list[str], most: int) -> None:
    """Check that a program was shrunk to this length, where it was shrunk at all."""
    if STRESS:
        assert len(steps) <= most


def find(
    worker: Any, inputs: Any = None, settings: settings = SEARCH, **options: Any
) -> tuple[BaseException, list[str]]:
    """Run a stress that must fail; return the error, and the steps to it."""
    with pytest.raises(BaseException) as caught:
        stress_pool(worker, inputs, settings=settings, **options)
    assert not isinstance(caught.value, (TypeError, KeyboardInterrupt))
    return caught.value, steps_of(caught.value)


async def double(number: int) -> int:
    await trio.sleep(0.25)
    return 2 * number


def is_double(number: int, result: int) -> bool:
    return result == 2 * number


# Sound workers pass.


def test_a_sound_handler_passes() -> None:
    report = stress_pool(double, check=is_double, settings=BRIEF)
    assert isinstance(report, StressReport)
    assert report.programs >= 15
    assert report.counts["results"] <= report.jobs


@asynccontextmanager
async def connection() -> AsyncGenerator[Callable[[int], Awaitable[int]], None]:
    await trio.sleep(1)
    try:
        yield double
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(0.5)


def test_a_sound_context_with_setup_and_cleanup_that_take_time_passes() -> None:
    report = stress_pool(connection, check=is_double, settings=BRIEF)
    assert report.counts["setups"] >= report.programs


class Doubler:
    def __init__(self) -> None:
        self.is_open = False

    async def __aenter__(self) -> Callable[[int], Awaitable[int]]:
        await trio.sleep(0.25)
        self.is_open = True
        return self.work

    async def __aexit__(self, *_: object) -> None:
        self.is_open = False

    async def work(self, number: int) -> int:
        assert self.is_open
        await trio.sleep(0.25)
        assert self.is_open
        return 2 * number


def test_a_sound_class_of_workers_passes() -> None:
    stress_pool(Doubler, st.integers(), check=is_double, settings=BRIEF)


class Prepared:
    """A handler that is asked whether it is ready before each job."""

    def __init__(self) -> None:
        self.looks = 0

    async def ready(self) -> None:
        self.looks += 1
        await trio.sleep(0.25)

    async def __call__(self, number: int) -> int:
        assert self.looks
        await trio.sleep(0.25)
        return 2 * number


def test_a_handler_with_ready_passes() -> None:
    stress_pool(Prepared(), check=is_double, settings=BRIEF)


async def halve(job: Any, call_next: Callable[[], Awaitable[int]]) -> int:
    await trio.sleep(0.25)
    return await call_next() // 2


@pytest.mark.parametrize(
    "options",
    [
        {"retry": Retry(3, backoff=lambda _: 0.5)},
        {"rate": Rate(2, per=1)},
        {"breaker": CircuitBreaker(3)},
        {"max_backlog": 0},
        {"max_jobs": 1, "max_age": 1.0, "max_idle": 1.0},
        {"timeout": 0.25, "unobserved": "raise"},
        {"restart": Restart(1)},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_the_user_are_kept(options: dict[str, Any]) -> None:
    stress_pool(double, check=is_double, settings=BRIEF, **options)


def test_middleware_may_change_results() -> None:
    def is_same(number: int, result: int) -> bool:
        return result == number

    stress_pool(double, check=is_same, middleware=[halve], settings=BRIEF)


def test_a_limiter_of_the_user_is_free_again_after_each_program() -> None:
    class Machine(PoolMachine):
        handler = staticmethod(double)

        def __init__(self) -> None:
            super().__init__()
            self.limiter = trio.CapacityLimiter(2)
            self.options = {"limiter": self.limiter}

        def check_end(self) -> None:
            assert not self.limiter.borrowed_tokens

    run_state_machine_as_test(Machine, settings=BRIEF)


def test_pools_may_have_no_workers_at_times() -> None:
    report = stress_pool(double, sizes=st.integers(0, 2), settings=BRIEF)
    assert report.counts["resizes"]


async def pick(number: int) -> int:
    await trio.sleep(0.25)
    return {1: 1, 2: 4}[number]


def test_errors_that_may_be_raised_are_no_news() -> None:
    report = stress_pool(pick, raises=KeyError, settings=BRIEF)
    assert report.counts["KeyError"]


def test_an_error_that_may_not_be_raised_is_found_in_one_step() -> None:
    error, steps = find(pick)
    assert isinstance(error, KeyError)
    assert_short(steps, 1)


# Bugs of users' workers are found, and shown in a few steps.


class Mixed:
    """Answers with what came in first, and so goes wrong after a cancellation."""

    def __init__(self) -> None:
        self.pending: list[int] = []

    async def __call__(self, number: int) -> int:
        self.pending.append(number)
        await trio.sleep(0.25)
        return self.pending.pop(0)

    @asynccontextmanager
    async def alone(self) -> AsyncGenerator[Callable[[int], Awaitable[int]], None]:
        yield Mixed()


def is_same(number: int, result: int) -> bool:
    return result == number


def test_state_that_leaks_when_a_job_is_cancelled_is_found() -> None:
    error, steps = find(Mixed().alone, st.integers(0, 3), check=is_same)
    assert "returned False" in str(error)
    assert_short(steps, 4)


def test_the_result_of_the_job_before_is_found() -> None:
    @asynccontextmanager
    async def stale() -> AsyncGenerator[Callable[[int], Awaitable[int]], None]:
        results: list[int] = []

        async def work(number: int) -> int:
            results.append(number)
            return results[max(0, len(results) - 2)]

        yield work

    error, steps = find(stale, st.integers(0, 3), check=is_same)
    assert "returned False" in str(error)
    assert_short(steps, 2)


class Borrowers(PoolMachine):
    """Workers that take something, and do not give it back if they crash."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0

    @asynccontextmanager
    async def worker(self) -> AsyncGenerator[Callable[[int], Awaitable[int]], None]:
        self.taken += 1
        yield double
        self.taken -= 1

    def check_end(self) -> None:
        assert not self.taken, f"{self.taken} are still taken"


def test_what_a_crashed_worker_does_not_give_back_is_found() -> None:
    with pytest.raises(AssertionError, match="still taken") as caught:
        run_state_machine_as_test(Borrowers, settings=EXACT)
    assert len(steps_of(caught.value)) <= 2


def test_a_handler_that_no_cancellation_ends_is_found() -> None:
    async def stubborn(number: int) -> None:
        while number:
            with trio.CancelScope(shield=True):
                await trio.sleep(60)

    error, steps = find(stubborn)
    assert "has been cancelled, but had not ended" in str(error)
    assert_short(steps, 2)


def test_a_handler_that_swallows_cancellation_in_a_loop_is_found() -> None:
    async def deaf(number: int) -> None:
        while number == 1:
            try:
                await trio.sleep(1)
            except trio.Cancelled:
                pass

    error, steps = find(deaf)
    assert "goes on and on at one moment" in str(error)
    assert_short(steps, 2)


def test_a_task_that_a_handler_leaves_behind_is_found() -> None:
    async def forgetful(number: int) -> None:
        if number == 2:
            trio.lowlevel.spawn_system_task(trio.sleep_forever)

    error, steps = find(forgetful, st.integers(0, 3))
    assert "tasks are left" in str(error)
    assert_short(steps, 1)


class Places(PoolMachine):
    """Workers that share some places; one that crashes leaves its own occupied."""

    sizes = 2

    def __init__(self) -> None:
        super().__init__()
        self.free = [0, 1]

    @asynccontextmanager
    async def worker(self) -> AsyncGenerator[Callable[[int], Awaitable[int]], None]:
        place = self.free.pop()
        yield double
        self.free.append(place)


@pytest.mark.skipif(not STRESS, reason="takes half a minute")
def test_a_worker_that_cannot_be_set_up_again_is_found() -> None:
    with pytest.raises(IndexError) as caught:
        run_state_machine_as_test(Places, settings=EXACT)
    assert len(steps_of(caught.value)) <= 3, steps_of(caught.value)


def test_a_resource_that_two_workers_use_at_once_is_found() -> None:
    class Resource:
        def __init__(self) -> None:
            self.users = 0

        async def __call__(self, number: int) -> None:
            assert not self.users, "two at once"
            self.users += 1
            try:
                await trio.sleep(0.25)
            finally:
                self.users -= 1

    error, steps = find(Resource(), sizes=st.integers(1, 2))
    assert "two at once" in str(error)
    assert_short(steps, 2)


def test_a_transaction_that_a_timeout_leaves_open_is_found() -> None:
    @asynccontextmanager
    async def store() -> AsyncGenerator[Callable[[int], Awaitable[int]], None]:
        is_open = False

        async def work(number: int) -> int:
            nonlocal is_open
            assert not is_open, "a transaction is open"
            if number:
                is_open = True
                await trio.sleep(1)
                is_open = False
            return number

        yield work

    error, steps = find(store, st.integers(0, 3))
    assert "transaction is open" in str(error)
    assert_short(steps, 4)


class Counters(PoolMachine):
    """A count that two tasks read before either has written it."""

    sizes = 2
    faults = None

    def __init__(self) -> None:
        super().__init__()
        self.calls_made = self.count = 0

    async def handler(self, number: int) -> None:
        self.calls_made += 1
        count = self.count
        if number == 3:
            await trio.lowlevel.cancel_shielded_checkpoint()
        self.count = count + 1

    def check_end(self) -> None:
        lost = self.calls_made - self.count
        assert not lost, "an update is lost"


def test_a_bug_that_needs_an_order_of_tasks_is_found() -> None:
    with pytest.raises(AssertionError, match="update is lost"):
        run_state_machine_as_test(Counters, settings=UNSHRUNK)


def test_a_check_that_raises_fails_with_what_it_raised() -> None:
    def check(number: int, result: int) -> None:
        if number == 3:
            raise ZeroDivisionError

    error, steps = find(double, st.integers(0, 3), check=check)
    assert isinstance(error, ZeroDivisionError)
    assert_short(steps, 1)


# Bugs of the pool are found: each is planted into its private parts, and only here.


async def nap(number: int) -> int:
    await trio.sleep(0.25)
    return number


@asynccontextmanager
async def napper() -> AsyncGenerator[Callable[[int], Awaitable[int]], None]:
    yield nap


def plant(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, make: Callable[[Any], Any]
) -> None:
    monkeypatch.setattr(owner, name, make(getattr(owner, name)))


def find_in_pool(match: str, worker: Any = nap, **options: Any) -> None:
    # Most are found in the first hundred, whatever these are.
    many = settings(UNSHRUNK, max_examples=1_000)
    error, _ = find(worker, st.integers(0, 3), settings=many, **options)
    assert re.search(match, str(error)), error


def test_a_worker_that_is_not_replaced_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Dispatch, "is_spent", lambda *_: False)
    find_in_pool("was to be replaced after 2", napper, max_jobs=2)


def test_a_job_that_is_counted_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(end: Any) -> Any:
        def wrong(self: Any, job: Any, state: Any) -> None:
            end(self, job, state)
            self.ended[state] += 1

        return wrong

    plant(monkeypatch, Dispatch, "end", make)
    find_in_pool("do not balance|heard of")


def test_a_job_that_runs_again_after_its_answer_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make(fail: Any) -> Any:
        def wrong(self: Any, job: Any, state: Any) -> None:
            fail(self, job, state)
            if job.state is state and job.batch is None and not self.closed:
                self.accepted += 1
                job.state = JobState.QUEUED
                self.line.push(job)
                self.rouse(1)

        return wrong

    plant(monkeypatch, Dispatch, "fail", make)
    find_in_pool(
        "more than once|do not balance|runs twice|still (ran|is|running)|is still"
    )


def test_two_jobs_of_one_key_at_once_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, Keys, "is_first", lambda _: lambda self, key, job: True)
    find_in_pool("with the key")


@pytest.mark.skipif(not STRESS, reason="three jobs of one key seldom wait at once")
def test_jobs_of_one_key_out_of_order_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make(leave: Any) -> Any:
        def wrong(self: Any, key: Any, job: Any) -> Any:
            arrivals = self._arrivals[key]
            if isinstance(arrivals, dict) and len(arrivals) > 2:
                arrivals.move_to_end([*arrivals][1])
            return leave(self, key, job)

        return wrong

    plant(monkeypatch, Keys, "leave", make)
    find_in_pool("was given in before", faults=False, examples=1000)


def test_more_jobs_than_workers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(hire: Any) -> Any:
        def wrong(self: Any, nursery: trio.Nursery) -> None:
            hire(self, nursery)
            if len(self.dispatch.workers) == self.dispatch.wanted:
                hire(self, nursery)

        return wrong

    plant(monkeypatch, Supervisor, "_hire", make)
    find_in_pool("jobs run at one time|there are")


def test_a_job_that_denies_its_start_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(make_error: Any) -> Any:
        def wrong(*facts: Any) -> Any:
            error = make_error(*facts)
            error.started = False
            return error

        return wrong

    plant(monkeypatch, worker_module, "JobTimeout", make)
    find_in_pool("was started, despite")


def test_a_job_that_claims_a_start_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(cancelled: Any) -> Any:
        def wrong(self: Any, job: Any) -> Any:
            error = cancelled(self, job)
            return JobCancelled(error.job_id, True, 1, 0)

        return wrong

    plant(monkeypatch, Dispatch, "cancelled", make)
    find_in_pool("was never started, despite")


def test_a_job_that_gets_lost_on_its_way_back_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch, Dispatch, "_make_ready", lambda _: lambda self, job: None)
    find_in_pool("after its delay|nothing runs any more")


def test_a_cleanup_that_is_skipped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []

    def make(_: Any) -> Any:
        @asynccontextmanager
        async def wrong(factory: Any) -> AsyncGenerator[Any, None]:
            context = factory()
            kept.append(context)
            yield await context.__aenter__()

        return wrong

    plant(monkeypatch, worker_module, "_open", make)
    find_in_pool("workers are open", napper)
    for context in kept:
        context.gen.aclose().close()


def test_a_worker_that_is_idle_in_vain_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make(rouse: Any) -> Any:
        def wrong(self: Any, count: float) -> None:
            if not self.line.ready:
                rouse(self, count)

        return wrong

    plant(monkeypatch, Dispatch, "rouse", make)
    find_in_pool("are idle|nothing runs any more")


@pytest.mark.parametrize("factor", [0.5, 2.0], ids=["early", "late"])
def test_timeouts_at_the_wrong_time_are_found(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(act: Any) -> Any:
        def wrong(self: Any, *args: Any) -> Any:
            job = self.job
            if job is not None:
                job.timeout *= factor
            try:
                return act(self, *args)
            finally:
                if job is not None:
                    job.timeout /= factor

        return wrong

    plant(monkeypatch, Worker, "_start", make)
    plant(monkeypatch, Worker, "_look_at_job", make)
    find_in_pool("too early" if factor < 1 else "longer than its timeout|still runs")


def test_a_timeout_that_never_comes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, Worker, "_watch_until", lambda _: lambda self, end: None)
    find_in_pool("despite its timeout|longer than its timeout")


def test_a_ttl_that_is_not_kept_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, Dispatch, "_expire", lambda _: lambda self, job: None)
    find_in_pool("despite its ttl")


def test_a_delay_that_is_not_kept_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(begin: Any) -> Any:
        def wrong(self: Any, job: Any) -> None:
            begin(self, job)
            job.terms.delay = 0.0

        return wrong

    plant(monkeypatch, Dispatch, "_begin_terms", make)
    find_in_pool("despite its delay")


def test_hooks_that_are_told_twice_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(call: Any) -> Any:
        def wrong(self: Any, hook: str, event: Any) -> None:
            call(self, hook, event)
            if hook == "on_job_error":
                call(self, hook, event)

        return wrong

    plant(monkeypatch, HookCalls, "call", make)
    find_in_pool("ended more than once")


def test_a_pool_that_gives_up_too_soon_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make(_: Any) -> Any:
        def wrong(self: Any, worker: Any, error: BaseException) -> None:
            self._give_up("for no reason", error)

        return wrong

    plant(monkeypatch, Supervisor, "_spend", make)
    find_in_pool("for no reason")


# Mistakes in the use are told at once.


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"inputs": [1]}, TypeError, r"inputs.*strategy.*\[1\]"),
        ({"raises": "KeyError"}, TypeError, "raises.*'KeyError'"),
        ({"raises": KeyboardInterrupt}, TypeError, "raises.*KeyboardInterrupt"),
        ({"examples": 0}, ValueError, "examples.*0"),
        ({"steps": 1.5}, TypeError, "steps.*1.5"),
        ({"timeout": -1.0}, ValueError, "timeout.*-1"),
        ({"bogus": 1}, TypeError, "bogus"),
        ({"check": 3}, TypeError, "check.*3"),
        ({"check": double}, TypeError, "check.*plain function.*double"),
        ({"sizes": -1}, ValueError, "sizes.*-1"),
        ({"sizes": "x"}, TypeError, "sizes.*'x'"),
        ({"settings": 3}, TypeError, "settings.*3"),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        stress_pool(double, **{"settings": BRIEF, **options})


def test_what_is_no_worker_is_named() -> None:
    with pytest.raises(TypeError, match=r"worker.*42"):
        stress_pool(42, st.none())  # type: ignore[arg-type]


def test_a_handler_or_worker_of_a_machine_may_be_a_method_or_none() -> None:
    """Python makes methods of functions in a class; whether they are shows."""

    class Function(PoolMachine):
        handler = double

    class Method(PoolMachine):
        async def handler(self, number: int) -> int:
            return await double(number)

    class Factory(PoolMachine):
        worker = connection

    class FactoryMethod(PoolMachine):
        @asynccontextmanager
        async def worker(self) -> AsyncGenerator[Callable[[int], Awaitable[int]], None]:
            assert isinstance(self, FactoryMethod)
            yield double

    for machine in Function, Method, Factory, FactoryMethod:
        run_state_machine_as_test(machine, settings=BRIEF)


def test_a_machine_needs_a_handler_or_a_worker() -> None:
    class Neither(PoolMachine): ...

    class Both(PoolMachine):
        handler = staticmethod(double)
        worker = staticmethod(connection)

    for machine in Neither, Both:
        with pytest.raises(TypeError, match="either a handler or a worker"):
            run_state_machine_as_test(machine, settings=BRIEF)


def test_an_async_rule_is_refused_where_it_is_written() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.act must be a plain function"):

        class Wrong(PoolMachine):
            @rule()
            async def act(self) -> None: ...


def test_it_cannot_be_called_within_a_run_of_trio() -> None:
    async def main() -> None:
        stress_pool(double, settings=BRIEF)

    with pytest.raises(RuntimeError, match="call it from a plain function"):
        trio.run(main)


def test_the_pool_is_not_there_in_an_initialize_rule() -> None:
    class Early(PoolMachine):
        handler = staticmethod(double)

        @initialize()
        def act(self) -> None:
            self.run(self.pool.join)

    with pytest.raises(RuntimeError, match="not open yet"):
        run_state_machine_as_test(Early, settings=EXACT)


def test_without_hypothesis_the_error_says_what_to_install() -> None:
    program = """
import sys
sys.modules["hypothesis"] = None
import trio_pool.testing
try:
    trio_pool.testing.stress_pool
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "pip install trio-pool[testing]" in done.stdout


def test_inputs_follow_from_the_annotation_of_a_handler() -> None:
    async def shout(text: str) -> str:
        assert isinstance(text, str)
        return text.upper()

    stress_pool(shout, check=lambda _, result: isinstance(result, str), settings=BRIEF)


def test_inputs_follow_from_the_annotation_of_a_context() -> None:
    stress_pool(napper, check=is_same, settings=BRIEF)


def test_inputs_follow_from_the_annotation_of_a_callable_object() -> None:
    stress_pool(Prepared(), settings=settings(BRIEF, max_examples=3))


def test_inputs_follow_from_the_annotation_of_a_class_of_workers() -> None:
    stress_pool(Doubler, check=is_double, settings=BRIEF)


def test_inputs_that_nothing_says_are_asked_for() -> None:
    async def anything(job_input): ...  # type: ignore[no-untyped-def]

    with pytest.raises(TypeError, match="annotations of anything do not say"):
        stress_pool(anything)


# Machines of the user's own.


class Store:
    """Workers that write to the same dict, a value at a time."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    async def add(self, number: int) -> int:
        await trio.sleep(0.25)
        self.values["sum"] = self.values.get("sum", 0) + number
        return number


class StoreMachine(PoolMachine):
    """Adds jobs in ways of its own."""

    sizes = 2
    begun = 0

    def __init__(self) -> None:
        super().__init__()
        self.store = Store()

    async def handler(self, number: int) -> int:
        return await self.store.add(number)

    def check_result(self, job_input: int, result: int) -> None:
        assert job_input == result

    @rule(number=st.integers(0, 9))
    def add_now(self, number: int) -> None:
        if not self.pool.closed and self.pool.size and not self.is_paused:
            assert self.run(self.add, number) == number

    @rule(number=st.integers(0, 9))
    def add_later(self, number: int) -> None:
        if not self.pool.closed:
            self.begin(self.pool.submit, number)

    async def add(self, number: int) -> int:
        return await self.store.add(number)

    is_paused = False

    @invariant()
    def sum_is_right(self) -> None:
        assert self.store.values.get("sum", 0) >= 0


StoreMachine.TestCase.settings = BRIEF
TestStore = StoreMachine.TestCase


def test_an_error_out_of_begin_fails_the_test() -> None:
    class Machine(PoolMachine):
        handler = staticmethod(double)

        @rule()
        def fail(self) -> None:
            self.begin(self.raise_it)

        async def raise_it(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        run_state_machine_as_test(Machine, settings=EXACT)
    assert steps_of(caught.value) == ["fail"]


def test_a_rule_that_awaits_in_vain_fails_the_test() -> None:
    class Machine(PoolMachine):
        handler = staticmethod(double)

        @rule()
        def wait(self) -> None:
            self.run(trio.sleep_forever)

    with pytest.raises(AssertionError, match="sleep_forever had not ended") as caught:
        run_state_machine_as_test(Machine, settings=EXACT)
    assert steps_of(caught.value) == ["wait"]


# Whatever happens, nothing is left behind.


@contextmanager
def nothing_changes() -> Iterator[None]:
    log = logging.getLogger("trio_pool")
    filters, state = list(log.filters), random.getstate()
    looks = worker_module.perf_counter
    yield
    assert log.filters == filters
    assert random.getstate() == state
    assert worker_module.perf_counter is looks
    gc.collect()

    async def main() -> int:
        async with open_pool(2, double) as pool:
            return await pool.process(21)

    assert trio.run(main) == 42


def test_a_run_that_fails_leaves_nothing_behind() -> None:
    with nothing_changes():
        find(pick)


def test_a_program_that_fails_in_a_rule_leaves_nothing_behind() -> None:
    class Machine(PoolMachine):
        handler = staticmethod(double)

        @rule()
        def fail(self) -> None:
            raise ZeroDivisionError

    with nothing_changes(), pytest.raises(ZeroDivisionError):
        run_state_machine_as_test(Machine, settings=UNSHRUNK)


def test_a_worker_that_cannot_be_set_up_leaves_nothing_behind() -> None:
    @asynccontextmanager
    async def broken() -> AsyncGenerator[Callable[[int], Awaitable[int]], None]:
        raise ZeroDivisionError
        yield

    with nothing_changes():
        error, steps = find(broken, settings=UNSHRUNK)
    assert isinstance(error, ZeroDivisionError)
    assert not steps


@pytest.mark.parametrize("where", ["handler", "rule"])
def test_ctrl_c_leaves_nothing_behind(where: str) -> None:
    class Machine(PoolMachine):
        faults = None

        async def handler(self, number: int) -> None:
            if where == "handler":
                raise KeyboardInterrupt

        @rule()
        def interrupt(self) -> None:
            if where == "rule":
                raise KeyboardInterrupt

    with nothing_changes(), pytest.raises(KeyboardInterrupt):
        run_state_machine_as_test(Machine, settings=UNSHRUNK)


# The campaign on ourselves.

ENOUGH = {
    **dict.fromkeys(["attempts", "results"], 1.0),
    **dict.fromkeys(["cancellations", "resizes", "JobCancelled"], 0.1),
    **dict.fromkeys(["WorkerCrashed", "JobTimeout"], 0.1),
    # Most of them are tried again, and then succeed, where jobs are retried.
    "InjectedFault": 0.05,
    **dict.fromkeys(["closings", "PoolClosed", "JobDropped", "BacklogFull"], 0.01),
    "JobExpired": 0.01,
}
"""How often what has to happen at least, per program."""


@pytest.mark.parametrize(
    ("worker", "options"),
    [
        (double, {}),
        (connection, {}),
        (double, {"retry": Retry(3, backoff=lambda _: 0.5)}),
        (connection, {"rate": Rate(4, per=1, burst=2), "max_age": 3.0}),
    ],
    ids=["handler", "context", "retry", "rate"],
)
def test_generated_programs_keep_the_promises(
    worker: Any, options: dict[str, Any], record_property: Callable[..., None]
) -> None:
    # 10,000 programs and more in all take some minutes.
    examples = 3_000 if STRESS else 25
    report = stress_pool(worker, check=is_double, examples=examples, **options)
    record_property("counts", report.counts)
    print(report)
    assert report.programs >= examples
    if STRESS:
        few = {
            kind: report.counts.get(kind, 0)
            for kind, least in ENOUGH.items()
            if report.counts.get(kind, 0) < least * report.programs
        }
        assert not few


def test_a_batch_may_be_cancelled_in_the_moment_in_which_its_items_fail() -> None:
    class Sleepers(PoolMachine):
        async def handler(self, number: int) -> None:
            await trio.sleep(1)

    machine = Sleepers()
    options = {"max_backlog": 0, "grace": 0.0, "timeout": 0.5}
    machine.open(size=2, options=options, watched=False, ending="leave", order=1)
    for _ in range(3):
        items = [(0, None), (0, None)]
        call = machine.batch("map", items, options={}, sleep=0.0)
        machine.sleep(seconds=0.5)
        machine.cancel(call=call)
    assert machine.counts["JobTimeout"]
    machine.teardown()
