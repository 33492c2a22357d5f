"""The errors of the pool: their tree, their facts, their pickles."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trio_pool
from trio_pool import (
    BacklogFull,
    CircuitBreaker,
    CircuitOpen,
    JobCancelled,
    JobDropped,
    JobError,
    JobExpired,
    JobTimeout,
    PoolBroken,
    PoolClosed,
    PoolError,
    Restart,
    WorkerCrashed,
    WouldDeadlock,
    WrongThread,
    current_job,
    open_pool,
)

FATE = {"job_id": 7, "started": True, "attempts": 1, "worker": 3}
UNSTARTED = {"job_id": 7, "started": False, "attempts": 0, "worker": None}

# Every error with its facts, and words that its message has to have.
ERRORS: list[tuple[PoolError, dict[str, Any], list[str]]] = [
    (PoolClosed("press"), {"pool": "press", "started": False}, ["'press'", "closed"]),
    (
        BacklogFull("press", 5),
        {"pool": "press", "max_backlog": 5, "started": False},
        ["'press'", "room", "5"],
    ),
    (
        CircuitOpen("press", 1.5),
        {"pool": "press", "reopens_in": 1.5, "started": False},
        ["'press'", "open", "1.5 s"],
    ),
    (
        WouldDeadlock("press", "process()"),
        {"pool": "press", "wait": "process()", "started": False},
        ["'press'", "process()", "wait for ever"],
    ),
    (
        WrongThread("press"),
        {"pool": "press"},
        ["'press'", "another thread", "trio.from_thread"],
    ),
    (
        PoolBroken("press", "too many crashes"),
        {
            "pool": "press",
            "reason": "too many crashes",
            "job_id": None,
            "started": False,
            "attempts": 0,
            "worker": None,
        },
        ["'press'", "broken", "too many crashes"],
    ),
    (
        PoolBroken("press", "too many crashes", **FATE),
        {"pool": "press", "reason": "too many crashes", **FATE},
        ["'press'", "too many crashes", "job 7", "had started"],
    ),
    (
        PoolBroken("press", "too many crashes", **UNSTARTED),
        {"pool": "press", "reason": "too many crashes", **UNSTARTED},
        ["job 7", "had not started"],
    ),
    (JobError(**FATE), FATE, ["job 7", "had started"]),
    (
        JobTimeout(**FATE, timeout=1.5),
        {**FATE, "timeout": 1.5},
        ["job 7", "timeout", "1.5 s"],
    ),
    (JobDropped(**UNSTARTED), UNSTARTED, ["job 7", "dropped", "had not started"]),
    (JobExpired(**UNSTARTED), UNSTARTED, ["job 7", "ttl", "had not started"]),
    (
        JobExpired(**{**UNSTARTED, "job_id": "cover"}),
        {**UNSTARTED, "job_id": "cover"},
        ["job cover", "ttl", "had not started"],
    ),
    (JobCancelled(**FATE), FATE, ["job 7", "cancelled", "had started"]),
    (JobCancelled(**UNSTARTED), UNSTARTED, ["job 7", "cancelled", "had not started"]),
    (WorkerCrashed(**FATE), FATE, ["job 7", "worker", "had started"]),
]

each_error = pytest.mark.parametrize(
    ("error", "facts", "words"), ERRORS, ids=lambda value: type(value).__name__
)


def public_errors() -> list[type[BaseException]]:
    return [
        value
        for value in vars(trio_pool).values()
        if inspect.isclass(value) and issubclass(value, BaseException)
    ]


def test_every_public_error_is_looked_at_here() -> None:
    seen = {type(error) for error, _, _ in ERRORS} | {PoolError}
    assert seen == set(public_errors())


def test_every_error_is_below_pool_error() -> None:
    assert all(issubclass(kind, PoolError) for kind in public_errors())
    assert PoolError.__bases__ == (Exception,)


def test_the_errors_of_jobs_are_below_job_error() -> None:
    below = {kind for kind in public_errors() if issubclass(kind, JobError)}
    assert below == {
        *(JobError, JobTimeout, JobExpired, JobDropped, JobCancelled),
        WorkerCrashed,
    }


def test_errors_are_what_trio_calls_them_too() -> None:
    assert issubclass(JobTimeout, trio.TooSlowError)
    assert issubclass(BacklogFull, trio.WouldBlock)
    assert issubclass(WrongThread, RuntimeError)


@each_error
def test_errors_carry_their_facts(
    error: PoolError, facts: dict[str, Any], words: list[str]
) -> None:
    assert {name: getattr(error, name) for name in facts} == facts


@each_error
def test_messages_say_what_is_true(
    error: PoolError, facts: dict[str, Any], words: list[str]
) -> None:
    assert [word for word in words if word not in str(error)] == []
    assert type(error).__name__ in repr(error)


@each_error
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_pickling(
    error: PoolError, facts: dict[str, Any], words: list[str], protocol: int
) -> None:
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert {name: getattr(again, name) for name in facts} == facts
    assert (str(again), again.args) == (str(error), error.args)


@each_error
def test_errors_survive_copying(
    error: PoolError, facts: dict[str, Any], words: list[str]
) -> None:
    again = copy.copy(error)
    assert type(again) is type(error)
    assert {name: getattr(again, name) for name in facts} == facts
    assert str(again) == str(error)


async def obey(job: Any) -> Any:
    if isinstance(job, BaseException):
        raise job
    return await job() if callable(job) else job


async def test_errors_that_were_raised_survive_pickling_with_their_notes() -> None:
    async with open_pool(1, obey) as pool:
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process(SystemExit(3))
    caught.value.add_note("in the press")
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, WorkerCrashed)
    assert (again.started, again.attempts, again.worker) == (True, 1, 0)
    assert again.__notes__ == ["in the press"]


# "May it have run?" of errors as the pool raises them.


async def test_a_timeout_has_started(autojump_clock: trio.testing.MockClock) -> None:
    async with open_pool(1, obey) as pool:
        with pytest.raises(JobTimeout) as caught:
            await pool.process(trio.sleep_forever, timeout=0.25)
        error = caught.value
        assert (error.started, error.attempts, error.worker) == (True, 1, 0)
        assert error.timeout == 0.25


async def test_a_full_backlog_has_not_started_anything() -> None:
    async with open_pool(0, obey, max_backlog=1, overflow="reject") as pool:
        await pool.submit(1)
        with pytest.raises(BacklogFull) as caught:
            await pool.process(2)
        assert (caught.value.started, caught.value.max_backlog) == (False, 1)
        assert caught.value.pool == pool.name


async def test_a_dropped_job_has_not_started() -> None:
    async with open_pool(0, obey, max_backlog=1, overflow="drop_oldest") as pool:
        oldest = await pool.submit(1)
        await pool.submit(2)
        with pytest.raises(JobDropped) as caught:
            await oldest.wait()
        error = caught.value
        assert (error.job_id, error.started) == (oldest.id, False)
        assert (error.attempts, error.worker) == (0, None)


async def test_an_expired_job_has_not_started(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, obey) as pool:
        running = await pool.submit(trio.sleep_forever)
        late = await pool.submit(1, ttl=0.25, id="cover")
        with pytest.raises(JobExpired) as caught:
            await late.wait()
        error = caught.value
        assert (error.job_id, error.started) == (late.id, False)
        assert (error.attempts, error.worker) == (0, None)
        assert running.cancel()


async def test_what_an_open_circuit_refuses_has_not_started(
    autojump_clock: trio.testing.MockClock,
) -> None:
    breaker = CircuitBreaker(failures=1, open_for=1.5)
    async with open_pool(1, obey, breaker=breaker) as pool:
        with pytest.raises(ValueError):
            await pool.process(ValueError())
        await trio.sleep(0.25)
        with pytest.raises(CircuitOpen) as caught:
            await pool.process(1)
        assert (caught.value.started, caught.value.pool) == (False, pool.name)
        assert caught.value.reopens_in == 1.25


async def test_what_a_refused_wait_was_for_has_not_started() -> None:
    ran: list[int] = []

    async def outer() -> None:
        with pytest.raises(WouldDeadlock) as caught:
            await pool.process(ran.append, 1)  # type: ignore[arg-type]
        assert (caught.value.started, caught.value.pool) == (False, pool.name)
        assert caught.value.wait == "process()"

    async with open_pool(1) as pool:
        await pool.process(outer)
        assert pool.statistics().cancelled == 1
    assert ran == []


async def test_the_errors_of_a_named_job_show_its_name() -> None:
    async def cancel_itself() -> None:
        assert current_job().cancel()
        await trio.lowlevel.checkpoint()

    async with open_pool(1) as pool:
        reply = await pool.submit(cancel_itself, id="cover")
        with pytest.raises(JobCancelled, match="job cover was cancelled") as caught:
            await reply.wait()
    assert (caught.value.job_id, caught.value.started) == ("cover", True)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.job_id == "cover"


async def test_a_cancelled_reply_says_whether_its_job_had_started() -> None:
    async with open_pool(1, obey) as pool:
        running = await pool.submit(trio.sleep_forever)
        waiting = await pool.submit(1)
        await wait_all_tasks_blocked()
        for reply, started in ((waiting, False), (running, True)):
            assert reply.cancel()
            with pytest.raises(JobCancelled) as caught:
                await reply.wait()
            assert caught.value.job_id == reply.id
            assert caught.value.started is started
            assert caught.value.attempts == reply.attempts == int(started)


async def test_a_job_handed_over_but_not_begun_has_not_started() -> None:
    async with open_pool(1, obey) as pool:
        await wait_all_tasks_blocked()
        reply = pool.submit_nowait(1)
        assert pool.statistics().running == 1
        assert reply.cancel()
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        assert (caught.value.started, caught.value.attempts) == (False, 0)
        assert caught.value.worker is None


async def test_a_broken_pool_says_whether_a_job_had_started() -> None:
    go = trio.Event()

    async def crash() -> None:
        await go.wait()
        raise SystemExit

    with pytest.raises(PoolBroken):
        async with open_pool(2, obey, restart=Restart(limit=0)) as pool:
            pool.submit_nowait(crash)
            running = pool.submit_nowait(trio.sleep_forever)
            waiting = pool.submit_nowait(1)
            await wait_all_tasks_blocked()
            go.set()
            await trio.sleep_forever()
    for reply, started in ((running, True), (waiting, False)):
        with pytest.raises(PoolBroken) as caught:
            await reply.wait()
        assert caught.value.job_id == reply.id
        assert caught.value.started is started
        assert caught.value.attempts == int(started)


async def test_a_pool_that_is_over_keeps_nothing_of_what_nobody_read():
    class Input:
        pass

    async def fail(_):
        raise ValueError("no")

    def submit():
        job = Input()
        pool.submit_nowait(job)
        return weakref.ref(job)

    with pytest.raises(ExceptionGroup):
        async with open_pool(1, fail) as pool:
            ref = submit()
    gc.collect()
    assert ref() is None
    assert pool.statistics().failed == 1


async def test_a_failure_that_nobody_read_says_of_which_job_it_is():
    async def fail(_):
        raise ValueError("no")

    with pytest.raises(ExceptionGroup) as caught:
        async with open_pool(1, fail, name="named") as pool:
            pool.submit_nowait(1, id="mine")
    (error,) = caught.value.exceptions
    assert error.__notes__ == [
        "trio_pool: job mine of pool 'named', whose reply nobody read"
    ]
