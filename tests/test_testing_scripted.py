"""The scripted worker: it plays its steps, and finds who does not follow them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_pool import Backoff, JobTimeout, Retry, WorkerCrashed, open_pool
from trio_pool.testing import (
    Faults,
    InjectedCrash,
    InjectedFault,
    ScriptedWorker,
    Step,
)


@pytest.fixture(autouse=True)
def quiet():
    """Crashes on purpose need no log."""
    logger = logging.getLogger("trio_pool")
    logger.disabled = True
    yield
    logger.disabled = False


async def test_the_steps_are_played_in_order(autojump_clock: MockClock) -> None:
    script = ScriptedWorker(
        [
            1,
            ValueError("no"),
            Step("two", to="b", after=0.5),
            Step(crash=True),
            Step(error=SystemExit(3)),
            Step(hang=True),
            None,
        ]
    )
    with script:
        async with open_pool(1, script, timeout=5) as pool:
            assert await pool.process("a") == 1
            with pytest.raises(ValueError, match="no"):
                await pool.process("a")
            assert await pool.process("b") == "two"
            assert trio.current_time() == 0.5
            for kind in (InjectedCrash, SystemExit):
                with pytest.raises(WorkerCrashed) as caught:
                    await pool.process("c")
                assert isinstance(caught.value.__cause__, kind)
            with pytest.raises(JobTimeout):
                await pool.process("d")
            assert len(script.pending) == 1
            assert await pool.process("e") is None
    assert script.received == ["a", "a", "b", "c", "c", "d", "e"]
    assert script.pending == ()
    assert repr(script).endswith("7 of 7 steps played>")


async def test_a_class_of_errors_stands_for_one_of_them() -> None:
    with ScriptedWorker([OSError]) as script:
        with pytest.raises(OSError, match=r"^$"):
            await script(1)


async def test_many_workers_take_the_steps_as_their_jobs_start(
    autojump_clock: MockClock,
) -> None:
    with ScriptedWorker([Step(n, after=1) for n in range(4)]) as script:
        async with open_pool(4, script) as pool:
            assert sorted(await pool.map("abcd")) == [0, 1, 2, 3]
    assert trio.current_time() == 1.0


async def test_a_function_of_a_task_pool_can_be_scripted() -> None:
    with ScriptedWorker([Step(3, to=(1, 2)), Step(4, to=())]) as script:
        async with open_pool(1) as pool:
            assert await pool.process(script, 1, 2) == 3
            assert await pool.process(script) == 4
    assert script.received == [(1, 2), ()]


async def test_faults_go_around_a_script() -> None:
    faults = Faults()
    faults.fail_next(moment="after")
    with ScriptedWorker([1, 2]) as script:
        async with open_pool(1, faults.handler(script)) as pool:
            with pytest.raises(InjectedFault):
                await pool.process("a")
            assert await pool.process("b") == 2


async def test_another_input_fails_at_once_and_at_the_end() -> None:
    script = ScriptedWorker([Step(1, to="a")])
    with pytest.raises(AssertionError) as last, script:
        async with open_pool(1, script) as pool:
            with pytest.raises(AssertionError) as first:
                await pool.process("b")
    text = "job 1 came with 'b', but its step expects 'a'"
    assert text in str(first.value)
    assert text in str(last.value)


async def test_a_job_beyond_the_script_fails_at_once_and_at_the_end() -> None:
    script = ScriptedWorker([1])
    with pytest.raises(AssertionError) as last, script:
        assert await script("a") == 1
        with pytest.raises(AssertionError) as first:
            await script("b")
    text = "job 2 came with 'b', and no step is left"
    assert text in str(first.value)
    assert text in str(last.value)
    assert str(last.value).endswith("received: ['a', 'b']")


def test_steps_that_were_not_played_are_found() -> None:
    with pytest.raises(AssertionError) as caught, ScriptedWorker([1, Step(2, to="b")]):
        pass
    assert "step 1 was not played: Step(result=1" in str(caught.value)
    assert "step 2 was not played: Step(result=2" in str(caught.value)
    ScriptedWorker().assert_used_up()


async def test_an_error_of_the_block_stands_with_a_note() -> None:
    script = ScriptedWorker([1])
    with pytest.raises(KeyError) as caught, script:
        raise KeyError("mine")
    (told,) = caught.value.__notes__
    assert "step 1 was not played" in told
    script = ScriptedWorker([1])
    with pytest.raises(KeyError) as caught, script:
        await script(0)
        raise KeyError("mine")
    assert not hasattr(caught.value, "__notes__")


async def test_an_error_that_is_raised_again_keeps_its_traceback_short() -> None:
    error = ValueError("no")
    script = ScriptedWorker([error, error])
    lengths = []
    for _ in range(2):
        with pytest.raises(ValueError, match="no") as caught:
            await script(1)
        lengths.append(len(caught.traceback))
    assert lengths[0] == lengths[1]


async def test_every_step_is_a_checkpoint() -> None:
    script = ScriptedWorker([1])
    with trio.testing.assert_checkpoints():
        await script("a")


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ScriptedWorker("abc"), TypeError),
        (lambda: ScriptedWorker(1), TypeError),  # type: ignore[arg-type]
        (lambda: Step(after=-1), ValueError),
        (lambda: Step(error="no"), TypeError),  # type: ignore[arg-type]
        (lambda: Step(1, error=ValueError()), ValueError),
        (lambda: Step(hang=True, crash=True), ValueError),
    ],
)
def test_bad_steps_are_refused(make: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        make()


async def test_code_that_tries_again_in_secret_is_found(
    autojump_clock: MockClock,
) -> None:
    """The bug of the user: a retry that nobody wanted swallows the first error."""
    retry = Retry(2, Backoff(1, jitter=0))
    with pytest.raises(AssertionError, match="job 2 came with 'order'"):
        with ScriptedWorker([OSError("charged, but the answer was lost")]) as script:
            async with open_pool(1, script, retry=retry) as pool:
                with pytest.raises(AssertionError):
                    await pool.process("order")
