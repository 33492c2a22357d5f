"""A job and its reply: what is read, how often, and what stays the handler's own."""

from __future__ import annotations

import traceback
from contextvars import ContextVar, copy_context

import outcome
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_pool import (
    JobCancelled,
    JobError,
    JobState,
    PoolBroken,
    Restart,
    WorkerCrashed,
    open_pool,
)

VAR: ContextVar[object] = ContextVar("VAR")


async def run(job):
    """Be the handler of most pools here: the input of a job is what it does."""
    return await job()


async def next_job():
    return "the next job"


class Gate:
    """A job that waits to be let through."""

    def __init__(self):
        self.started = self.cancelled = 0
        self.open = trio.Event()

    async def __call__(self):
        self.started += 1
        try:
            await self.open.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        return "through"


def frames(error):
    """Name the functions that a traceback goes through, outermost first."""
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


async def read(reply):
    """Read a reply; return what it raises."""
    try:
        await reply.wait()
    except Exception as error:
        return error
    raise AssertionError("no error was raised")


# Reading a reply ----------------------------------------------------------


async def test_many_readers_get_the_same_object():
    value = object()
    gate = Gate()

    async def job():
        await gate()
        return value

    seen = []

    async def reader():
        seen.append(await reply.wait())

    async with open_pool(1, run) as pool:
        reply = await pool.submit(job)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(reader)
            await wait_all_tasks_blocked()
            assert not seen
            gate.open.set()
        for _ in range(2):
            await reader()
    # A reply can be kept and read after the block.
    await reader()
    assert len(seen) == 8
    assert all(one is value for one in seen)


async def test_many_readers_get_the_same_error_and_its_traceback_does_not_grow():
    error = ValueError("of the handler")
    gate = Gate()

    async def innermost():
        await gate()
        raise error

    async def job():
        await innermost()

    lengths = []

    async def reader():
        caught = await read(reply)
        assert caught is error
        lengths.append(len(frames(caught)))

    async with open_pool(1, run) as pool:
        reply = await pool.submit(job)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(reader)
            await wait_all_tasks_blocked()
            gate.open.set()
        for _ in range(3):
            await reader()
    await reader()
    assert len(lengths) == 7
    assert len(set(lengths)) == 1


async def test_an_error_shows_the_frames_of_the_handler_innermost_last():
    async def innermost():
        raise ValueError("of the handler")

    async def job():
        await innermost()

    async with open_pool(1, run) as pool:
        with pytest.raises(ValueError) as direct:
            await run(job)
        with pytest.raises(ValueError) as processed:
            await pool.process(job)
        replied = await read(await pool.submit(job))
    names = ["run", "job", "innermost"]
    assert frames(direct.value)[-3:] == names
    assert frames(processed.value)[-3:] == names
    assert frames(replied)[-3:] == names


async def test_an_error_that_was_read_once_is_not_raised_again_at_the_end():
    async def fail():
        raise ValueError("heard")

    async with open_pool(1, run) as pool:
        reply = await pool.submit(fail)
        for _ in range(2):
            assert str(await read(reply)) == "heard"


async def test_reading_the_outcome_counts_as_reading_the_error():
    async def fail():
        raise ValueError("heard")

    async with open_pool(1, run) as pool:
        reply = await pool.submit(fail)
        await pool.join()
        assert isinstance(reply.outcome, outcome.Error)


async def test_looking_at_the_state_is_not_reading_the_error():
    async def fail():
        raise ValueError("not heard")

    with pytest.raises(ExceptionGroup) as caught:
        async with open_pool(1, run) as pool:
            reply = await pool.submit(fail)
            await pool.join()
            assert reply.done
            assert reply.state is JobState.FAILED
    assert [str(error) for error in caught.value.exceptions] == ["not heard"]


async def test_outcome_is_none_until_done_and_then_fresh_at_each_look():
    gate = Gate()
    async with open_pool(1, run) as pool:
        reply = await pool.submit(gate)
        assert reply.outcome is None
        await wait_all_tasks_blocked()
        assert reply.outcome is None
        gate.open.set()
        await reply.wait()
        # An outcome can be unwrapped once; a reply can be read for ever.
        for _ in range(2):
            assert isinstance(reply.outcome, outcome.Value)
            assert reply.outcome.unwrap() == "through"


async def test_the_outcome_of_a_failure_raises_the_same_error_each_time():
    error = ValueError("of the handler")

    async def fail():
        raise error

    async with open_pool(1, run) as pool:
        reply = await pool.submit(fail)
        await pool.join()
        lengths = set()
        for _ in range(3):
            with pytest.raises(ValueError) as caught:
                reply.outcome.unwrap()
            assert caught.value is error
            lengths.add(len(frames(caught.value)))
        assert len(lengths) == 1


async def test_none_is_a_result_too():
    async def nothing():
        return None

    async with open_pool(1, run) as pool:
        reply = await pool.submit(nothing)
        assert await reply.wait() is None
        assert await pool.process(nothing) is None
        assert reply.outcome == outcome.Value(None)


async def test_an_exception_that_is_returned_is_a_value():
    error = ValueError("returned")

    async def give():
        return error

    async with open_pool(1, run) as pool:
        assert await pool.process(give) is error
        reply = await pool.submit(give)
        assert await reply.wait() is error
        assert reply.state is JobState.DONE


# Where a job is -------------------------------------------------------------


async def test_a_reply_follows_its_job_from_the_backlog_to_its_end():
    first, second = Gate(), Gate()
    async with open_pool(1, run) as pool:
        one, two = await pool.submit(first), await pool.submit(second)
        await wait_all_tasks_blocked()
        assert (one.state, one.attempts, one.worker) == (JobState.RUNNING, 1, 0)
        assert (two.state, two.attempts, two.worker) == (JobState.QUEUED, 0, None)
        assert not one.done
        assert not two.done
        first.open.set()
        await wait_all_tasks_blocked()
        assert (one.state, one.attempts, one.worker) == (JobState.DONE, 1, 0)
        assert (two.state, two.attempts, two.worker) == (JobState.RUNNING, 1, 0)
        assert one.done
        second.open.set()
        await two.wait()
        assert (two.state, two.attempts, two.worker) == (JobState.DONE, 1, 0)


async def test_a_job_handed_to_an_idle_worker_counts_as_running_at_once():
    async with open_pool(1, run) as pool:
        reply = pool.submit_nowait(next_job)
        assert reply.state is JobState.RUNNING
        assert pool.statistics().running == 1
        assert await reply.wait() == "the next job"


async def test_ids_are_unique_in_a_pool():
    async with open_pool(2, run) as pool:
        replies = [await pool.submit(next_job) for _ in range(20)]
        assert len({reply.id for reply in replies}) == 20
        await pool.join()


async def test_a_reply_names_its_job_and_state():
    async with open_pool(1, run) as pool:
        reply = await pool.submit(next_job)
        await reply.wait()
        assert "Reply" in repr(reply)
        assert str(reply.id) in repr(reply)
        assert "done" in repr(reply)


async def test_the_workers_of_replies_are_those_of_the_pool():
    gate = Gate()
    async with open_pool(3, run) as pool:
        replies = [await pool.submit(gate) for _ in range(3)]
        await wait_all_tasks_blocked()
        assert {reply.worker for reply in replies} == {w.id for w in pool.workers()}
        gate.open.set()


# Cancelling by the reply ------------------------------------------------------


async def test_cancel_of_a_queued_job_ends_it_at_once():
    gate, other = Gate(), Gate()
    async with open_pool(1, run) as pool:
        running, queued = await pool.submit(other), await pool.submit(gate)
        await wait_all_tasks_blocked()
        assert queued.cancel() is True
        assert queued.state is JobState.CANCELLED
        assert pool.statistics().queued == 0
        assert queued.cancel() is False
        with pytest.raises(JobCancelled) as caught:
            await queued.wait()
        error = caught.value
        assert (error.job_id, error.started) == (queued.id, False)
        assert (error.attempts, error.worker) == (0, None)
        other.open.set()
        assert await running.wait() == "through"
    assert gate.started == 0


async def test_cancel_of_a_running_job_cancels_its_handler():
    gate = Gate()
    async with open_pool(1, run) as pool:
        reply = await pool.submit(gate)
        await wait_all_tasks_blocked()
        assert reply.cancel() is True
        # The handler has been asked and has not ended yet.
        assert reply.state is JobState.RUNNING
        assert reply.cancel() is False
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        error = caught.value
        assert (error.job_id, error.started) == (reply.id, True)
        assert (error.attempts, error.worker) == (1, 0)
        assert reply.state is JobState.CANCELLED
        assert reply.cancel() is False
        assert gate.cancelled == 1
        assert await pool.process(next_job) == "the next job"


async def test_cancel_of_a_job_handed_over_in_the_same_step_never_starts_it():
    gate = Gate()
    async with open_pool(1, run) as pool:
        reply = pool.submit_nowait(gate)
        assert reply.cancel() is True
        assert reply.state is JobState.CANCELLED
        assert await pool.process(next_job) == "the next job"
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        assert not caught.value.started
    assert gate.started == 0


async def test_cancel_of_a_done_job_changes_nothing():
    async with open_pool(1, run) as pool:
        reply = await pool.submit(next_job)
        await reply.wait()
        assert reply.cancel() is False
        assert reply.state is JobState.DONE
        assert await reply.wait() == "the next job"
    assert reply.cancel() is False


async def test_a_value_wins_over_cancel():
    async def swallow():
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            return "swallowed"

    async with open_pool(1, run) as pool:
        reply = await pool.submit(swallow)
        await wait_all_tasks_blocked()
        assert reply.cancel() is True
        assert await reply.wait() == "swallowed"
        assert reply.state is JobState.DONE
        assert await pool.process(next_job) == "the next job"


async def test_an_error_in_the_cleanup_wins_over_cancel():
    async def fail():
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("cleanup failed")

    async with open_pool(1, run) as pool:
        reply = await pool.submit(fail)
        await wait_all_tasks_blocked()
        reply.cancel()
        assert isinstance(await read(reply), ValueError)
        assert reply.state is JobState.FAILED


async def test_cancel_wakes_every_reader():
    gate = Gate()
    errors = []

    async def reader():
        errors.append(await read(reply))

    async with open_pool(1, run) as pool:
        reply = await pool.submit(gate)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(reader)
            await wait_all_tasks_blocked()
            reply.cancel()
    assert [type(error) for error in errors] == [JobCancelled] * 3


async def test_a_cancelled_wait_goes_on_with_another(autojump_clock):
    gate = Gate()
    async with open_pool(1, run) as pool:
        reply = await pool.submit(gate)
        for _ in range(3):
            with trio.move_on_after(0.25) as scope:
                await reply.wait()
            assert scope.cancelled_caught
            assert reply.state is JobState.RUNNING
        gate.open.set()
        assert await reply.wait() == "through"
    assert gate.cancelled == 0


async def test_a_job_may_cancel_itself():
    replies = []

    async def cancel_myself():
        assert replies[0].cancel()
        await trio.lowlevel.checkpoint()

    async with open_pool(1, run) as pool:
        replies.append(pool.submit_nowait(cancel_myself))
        assert isinstance(await read(replies[0]), JobCancelled)
        assert await pool.process(next_job) == "the next job"


# Context variables ------------------------------------------------------------


async def seen():
    return VAR.get("unset")


async def test_the_handler_sees_the_variables_of_its_caller():
    results = {}

    async def caller(value):
        VAR.set(value)
        results[value] = await pool.process(seen)

    async with open_pool(2, run) as pool:
        async with trio.open_nursery() as nursery:
            for value in range(7):
                nursery.start_soon(caller, value)
        # The worker's own context never shows through.
        assert await pool.process(seen) == "unset"
    assert results == {value: value for value in range(7)}


async def test_a_submitted_job_sees_what_was_set_when_it_was_submitted():
    gate = Gate()
    token = VAR.set("then")
    try:
        async with open_pool(1, run) as pool:
            running = await pool.submit(gate)
            queued = await pool.submit(seen)
            VAR.set("now")
            gate.open.set()
            assert await queued.wait() == "then"
            assert await running.wait() == "through"
            assert await pool.process(seen) == "now"
    finally:
        VAR.reset(token)


@pytest.mark.parametrize("queued", [False, True])
async def test_what_a_handler_sets_is_seen_by_nobody_else(queued):
    gate = Gate()

    async def set_it():
        if queued:
            await gate()
        before = VAR.get("unset")
        VAR.set("of the handler")
        await trio.lowlevel.checkpoint()
        return before, VAR.get()

    async with open_pool(1, run) as pool:
        first = await pool.submit(set_it)
        jobs = [await pool.submit(job) for job in (seen, set_it, seen)]
        gate.open.set()
        assert await first.wait() == ("unset", "of the handler")
        assert [await job.wait() for job in jobs] == [
            "unset",
            ("unset", "of the handler"),
            "unset",
        ]
        assert await pool.process(set_it) == ("unset", "of the handler")
        assert VAR.get("unset") == "unset"
        assert await pool.process(seen) == "unset"


@pytest.mark.parametrize("method", ["map", "settle"])
async def test_items_of_a_batch_do_not_see_what_the_others_set(method):
    async def set_it(item):
        before = VAR.get("unset")
        VAR.set(item)
        return before

    async with open_pool(1, set_it) as pool:
        token = VAR.set("of the caller")
        results = await getattr(pool, method)(range(5))
        VAR.reset(token)
    if method == "settle":
        results = [settled.outcome.unwrap() for settled in results]
    assert results == ["of the caller"] * 5


class Equal:
    """A value that claims to be equal to all others of its kind."""

    __hash__ = None

    def __eq__(self, other):
        return True


class NeverCompared:
    """A value that cannot be compared."""

    __hash__ = None

    def __eq__(self, other):
        raise AssertionError("a user's == was asked")

    def __bool__(self):
        raise AssertionError("a user's bool() was asked")


@pytest.mark.parametrize("value_type", [Equal, NeverCompared])
@pytest.mark.parametrize("busy", [False, True])
async def test_values_of_variables_are_told_apart_by_identity(value_type, busy):
    values = [value_type() for _ in range(4)]
    results = {}
    gate = Gate()

    async def caller(index):
        VAR.set(values[index])
        results[index] = await pool.process(seen)

    async with open_pool(1, run) as pool:
        if busy:
            await pool.submit(gate)
        async with trio.open_nursery() as nursery:
            for index in range(4):
                nursery.start_soon(caller, index)
            await wait_all_tasks_blocked()
            gate.open.set()
    assert sorted(results) == [0, 1, 2, 3]
    assert all(results[index] is values[index] for index in range(4))


async def test_a_variable_that_the_next_caller_has_not_set_is_not_set():
    gate = Gate()

    async def set_caller():
        VAR.set("set")
        await pool.process(gate)

    async with open_pool(1, run) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(set_caller)
            await wait_all_tasks_blocked()
            reply = await pool.submit(seen)
            gate.open.set()
        assert await reply.wait() == "unset"


async def test_tokens_of_the_handler_can_be_reset_in_the_handler():
    async def set_and_reset():
        token = VAR.set("inside")
        await trio.lowlevel.checkpoint()
        VAR.reset(token)
        return VAR.get("unset")

    async with open_pool(1, run) as pool:
        for _ in range(2):
            assert await pool.process(set_and_reset) == "unset"


async def test_the_worker_keeps_no_context_of_a_caller_alive():
    """What a worker's own setup and cleanup see is never a caller's."""
    ends = []

    class Worker:
        async def __aenter__(self):
            return run

        async def __aexit__(self, *exc_info):
            ends.append(VAR.get("unset"))

    async def caller():
        VAR.set("of the caller")
        assert await pool.process(seen) == "of the caller"

    async with open_pool(2, worker=Worker) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(caller)
    assert ends == ["unset", "unset"]


async def test_the_callers_context_object_is_not_changed_by_the_call():
    before = copy_context()

    async def set_it():
        VAR.set("of the handler")

    async with open_pool(1, run) as pool:
        await pool.process(set_it)
        await (await pool.submit(set_it)).wait()
    after = copy_context()
    assert set(before) == set(after)


# Errors stay the handler's own --------------------------------------------------


async def chained():
    try:
        raise KeyError("the context")
    except KeyError as context:
        error = ValueError("of the handler")
        error.add_note("a note of the handler")
        raise error from context


async def in_context():
    try:
        raise KeyError("the context")
    except KeyError:
        raise ValueError("of the handler")  # noqa: B904 - the context is the point


@pytest.mark.parametrize("job", [chained, in_context])
@pytest.mark.parametrize("how", ["process", "wait"])
async def test_cause_context_and_notes_are_those_of_the_handler(job, how):
    with pytest.raises(ValueError) as direct:
        await job()
    async with open_pool(1, run) as pool:
        # What the reader is handling just now is no context of the handler's.
        try:
            raise OSError("of the reader")
        except OSError:
            try:
                if how == "process":
                    await pool.process(job)
                else:
                    await (await pool.submit(job)).wait()
            except ValueError as error:
                caught = error
    expected = direct.value
    assert type(caught.__context__) is type(expected.__context__) is KeyError
    assert type(caught.__cause__) is type(expected.__cause__)
    assert caught.__suppress_context__ == expected.__suppress_context__
    notes = getattr(caught, "__notes__", [])
    assert notes == getattr(expected, "__notes__", [])


async def test_reading_a_failure_twice_adds_no_notes():
    async with open_pool(1, run) as pool:
        reply = await pool.submit(chained)
        for _ in range(3):
            error = await read(reply)
            assert error.__notes__ == ["a note of the handler"]
            assert isinstance(error.__cause__, KeyError)
            assert error.__context__ is error.__cause__


async def test_a_failure_read_after_a_cancellation_has_no_cancelled_context():
    gate = Gate()

    async def fail():
        await gate()
        raise ValueError("of the handler")

    async with open_pool(1, run) as pool:
        reply = await pool.submit(fail)
        await wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await reply.wait()
        gate.open.set()
        error = await read(reply)
    assert error.__context__ is None
    assert error.__cause__ is None


@pytest.mark.parametrize("how", ["process", "wait"])
async def test_the_exception_is_the_very_object_that_the_handler_raised(how):
    error = ValueError("of the handler")

    async def fail():
        raise error

    async with open_pool(1, run) as pool:
        for _ in range(2):
            with pytest.raises(ValueError) as caught:
                if how == "process":
                    await pool.process(fail)
                else:
                    await (await pool.submit(fail)).wait()
            assert caught.value is error


async def test_one_error_object_raised_by_many_jobs_does_not_grow():
    error = ValueError("shared")

    async def fail():
        raise error

    lengths = set()
    async with open_pool(1, run) as pool:
        for _ in range(10):
            # Each raise of the handler starts from a clean traceback, as a
            # handler that keeps its errors would have to do too.
            error.__traceback__ = None
            with pytest.raises(ValueError) as caught:
                await pool.process(fail)
            lengths.add(len(frames(caught.value)))
    assert len(lengths) == 1


async def test_a_group_of_the_handler_leaves_as_the_group():
    group = ExceptionGroup("of the handler", [ValueError("one"), KeyError("two")])

    async def fail():
        raise group

    async with open_pool(1, run) as pool:
        with pytest.raises(ExceptionGroup) as caught:
            await pool.process(fail)
        assert caught.value is group


@pytest.mark.parametrize("how", ["process", "wait", "map", "settle", "stream"])
async def test_stop_async_iteration_is_never_taken_for_an_end(how):
    error = StopAsyncIteration("of the handler")

    async def fail(item):
        raise error

    async with open_pool(1, fail) as pool:
        if how == "settle":
            (settled,) = await pool.settle([1])
            assert settled.outcome.error is error
            return
        with pytest.raises(Exception) as caught:
            if how == "process":
                await pool.process(1)
            elif how == "wait":
                await (await pool.submit(1)).wait()
            elif how == "map":
                await pool.map([1])
            else:
                async with pool.stream([1]) as results:
                    async for _ in results:
                        pass
        if how in ("process", "wait"):
            assert caught.value is error
        elif how == "map":
            assert caught.value.exceptions == (error,)
        else:
            # An iterator cannot raise it bare: it would say that it is over.
            assert isinstance(caught.value, RuntimeError)
            assert caught.value.__cause__ is error
        assert pool.statistics().failed == 1
        assert pool.statistics().restarts == 0


async def raise_stop_iteration():
    raise StopIteration("of the handler")


@pytest.mark.parametrize("how", ["process", "wait"])
async def test_stop_iteration_is_wrapped_as_python_wraps_it(how):
    """No coroutine can let it out: a direct call turns it into a RuntimeError."""
    with pytest.raises(RuntimeError) as direct:
        await raise_stop_iteration()
    async with open_pool(1, run) as pool:
        with pytest.raises(RuntimeError) as caught:
            if how == "process":
                await pool.process(raise_stop_iteration)
            else:
                await (await pool.submit(raise_stop_iteration)).wait()
        assert str(caught.value) == str(direct.value)
        assert isinstance(caught.value.__cause__, StopIteration)
        assert pool.statistics().failed == 1
        assert await pool.process(next_job) == "the next job"


@pytest.mark.parametrize("method", ["map", "settle"])
async def test_stop_iteration_of_a_handler_does_not_end_a_batch(method):
    async def odd(item):
        if item == 1:
            raise StopIteration
        return item

    async with open_pool(1, odd) as pool:
        if method == "map":
            with pytest.raises(ExceptionGroup) as caught:
                await pool.map(range(3))
            (error,) = caught.value.exceptions
            assert isinstance(error, RuntimeError)
        else:
            results = await pool.settle(range(3))
            assert [type(s.outcome) for s in results] == [
                outcome.Value,
                outcome.Error,
                outcome.Value,
            ]


@pytest.mark.parametrize(
    "killer", [SystemExit(3), GeneratorExit(), BaseException("odd")]
)
async def test_an_error_that_is_no_exception_costs_the_worker(killer, caplog):
    async def kill():
        raise killer

    async with open_pool(1, run) as pool:
        reply = await pool.submit(kill)
        error = await read(reply)
        assert isinstance(error, WorkerCrashed)
        assert (error.job_id, error.started) == (reply.id, True)
        assert (error.attempts, error.worker) == (1, 0)
        assert error.__cause__ is killer
        assert reply.state is JobState.LOST
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process(kill)
        assert caught.value.__cause__ is killer


async def test_the_reply_of_a_job_lost_with_the_pool_says_whether_it_ran(caplog):
    gate = Gate()

    class Crash(Exception):
        pass

    async def crash():
        await gate()
        raise Crash

    replies = []
    with pytest.raises(PoolBroken):
        async with open_pool(2, run, crash_on=Crash, restart=Restart(limit=0)) as pool:
            replies.append(await pool.submit(crash))
            await wait_all_tasks_blocked()
            other = Gate()
            replies.append(await pool.submit(other))
            replies.append(await pool.submit(other))
            await wait_all_tasks_blocked()
            gate.open.set()
            await trio.sleep_forever()
    assert [reply.state for reply in replies] == [
        JobState.FAILED,
        JobState.LOST,
        JobState.LOST,
    ]
    for reply, started in zip(replies[1:], (True, False), strict=True):
        error = await read(reply)
        assert isinstance(error, PoolBroken)
        assert (error.job_id, error.started) == (reply.id, started)
        assert error.attempts == started


async def test_every_error_of_the_pool_for_a_job_says_whether_it_started():
    gate = Gate()
    async with open_pool(1, run) as pool:
        replies = [await pool.submit(gate) for _ in range(2)]
        await wait_all_tasks_blocked()
        pool.cancel()
        for reply, started in zip(replies, (True, False), strict=True):
            error = await read(reply)
            assert isinstance(error, JobError)
            assert error.started is started
