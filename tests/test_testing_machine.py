"""Generated programs for pools of users' workers: sound ones pass, others do not.

Each test runs some dozens of trio runs, and shrinks what fails, so these take
a second or so each.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self

import pytest
import trio
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test

from trio_pool import (
    CircuitBreaker,
    JobCancelled,
    PoolBroken,
    Rate,
    Restart,
    Retry,
    open_pool,
)
from trio_pool._backlog import Keys
from trio_pool._dispatch import Dispatch
from trio_pool._telling import HookCalls
from trio_pool._worker import Worker
from trio_pool import _worker as worker_module
from trio_pool.testing import Fault, PoolMachine, StressReport, stress_pool

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


def steps_of(error: BaseException) -> list[str]:
    """Name the steps of the program that hypothesis shows."""
    shown = "\n".join(getattr(error, "__notes__", []))
    steps = re.findall(r"^ *(?:\w+ = )?state\.(\w+)\(", shown, re.MULTILINE)
    assert steps[:1] == ["open"], shown
    assert steps[-1] == "teardown", shown
    return steps[1:-1]


def find(
    worker: Any, inputs: Any = None, settings: settings = EXACT, **options: Any
) -> tuple[BaseException, list[str]]:
    """Run a stress that must fail; return the error, and the steps to it."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011
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
    assert len(steps) == 1


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
    assert 2 <= len(steps) <= 4


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
    assert len(steps) <= 2


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
    assert "had not ended after" in str(error)
    assert len(steps) <= 2


def test_a_handler_that_swallows_cancellation_in_a_loop_is_found() -> None:
    async def deaf(number: int) -> None:
        while number == 1:
            try:
                await trio.sleep(1)
            except trio.Cancelled:  # noqa: TRIO103
                pass

    error, steps = find(deaf)
    assert "goes on and on at one moment" in str(error)
    assert len(steps) <= 2


def test_a_task_that_a_handler_leaves_behind_is_found() -> None:
    async def forgetful(number: int) -> None:
        if number == 2:
            trio.lowlevel.spawn_system_task(trio.sleep_forever)

    error, steps = find(forgetful)
    assert "tasks are left" in str(error)
    assert len(steps) == 1


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

    @rule()
    def resize(self, **_: Any) -> None: ...


def test_a_worker_that_cannot_be_set_up_again_is_found() -> None:
    with pytest.raises(IndexError) as caught:
        run_state_machine_as_test(Places, settings=EXACT)
    assert len(steps_of(caught.value)) <= 2


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
    assert len(steps) <= 2


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
    assert len(steps) <= 4


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
        assert self.count == self.calls_made, "an update is lost"


def test_a_bug_that_needs_an_order_of_tasks_is_found() -> None:
    with pytest.raises(AssertionError, match="update is lost") as caught:
        run_state_machine_as_test(Counters, settings=EXACT)
    assert len(steps_of(caught.value)) <= 3


def test_a_check_that_raises_fails_with_what_it_raised() -> None:
    def check(number: int, result: int) -> None:
        if number == 3:
            raise ZeroDivisionError

    error, steps = find(double, check=check)
    assert isinstance(error, ZeroDivisionError)
    assert len(steps) == 1
