"""User code that calls back into the pool at bad moments: hooks, policies, inputs."""

from __future__ import annotations

import gc
import math
import sys
import weakref
from collections import Counter
from contextlib import asynccontextmanager, suppress
from contextvars import Context, ContextVar
from types import SimpleNamespace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_pool import (
    Autoscale,
    CircuitBreaker,
    Hooks,
    JobCancelled,
    JobDropped,
    JobState,
    JobTimeout,
    PoolBroken,
    Rate,
    Restart,
    Retry,
    WorkerCrashed,
    WorkerState,
    WouldDeadlock,
    WrongThread,
    current_job,
    open_pool,
)
from trio_pool._backlog import Line
from trio_pool._job import new_job, new_terms


class OnQueue(Hooks):
    """Calls back with each event of a job that was taken in."""

    def __init__(self, call):
        self.call = call

    def on_job_queue(self, event):
        self.call(event)


def ended(pool):
    """Count the jobs that ended, having asked whether the books balance."""
    count = pool.statistics()
    ends = {
        "done": count.done,
        "failed": count.failed,
        "timed_out": count.timed_out,
        "cancelled": count.cancelled,
        "expired": count.expired,
        "dropped": count.dropped,
        "lost": count.lost,
    }
    live = count.delayed + count.queued + count.running
    assert count.accepted == live + sum(ends.values())
    return {name: number for name, number in ends.items() if number}


# Hooks --------------------------------------------------------------------


@pytest.mark.parametrize("guarded", [False, True])
async def test_a_hook_that_cancels_a_map_keeps_its_item_from_starting(
    guarded, autojump_clock
):
    started, limiter = [], trio.CapacityLimiter(1)
    options = {"limiter": limiter} if guarded else {}

    def cancel(event):
        if event.state is JobState.RUNNING:
            scope.cancel()

    async def handler(item):
        started.append(item)
        return item

    class Told(OnQueue):
        def on_job_cancel(self, event):
            errors.append(event.error)

    hooks, errors = Told(cancel), []
    async with open_pool(1, handler, hooks=[hooks], **options) as pool:
        with trio.fail_after(20), trio.CancelScope() as scope:
            await pool.map([1, 2, 3])
        assert scope.cancelled_caught
        await wait_all_tasks_blocked()
        assert started == []
        assert [type(error) for error in errors] == [JobCancelled]
        assert limiter.borrowed_tokens == 0
        assert ended(pool) == {"cancelled": 1}
        hooks.call = id
        with trio.fail_after(20):
            assert await pool.process("next") == "next"
            assert pool.statistics().wait.count == 1
            await pool.shutdown(1)
    assert ended(pool) == {"cancelled": 1, "done": 1}


@pytest.mark.parametrize(
    ("max_backlog", "heard"),
    [
        pytest.param(0, 2, id="as the job itself gets in"),
        pytest.param(1, 3, id="as another job gets the room it leaves"),
    ],
)
async def test_a_job_whose_caller_a_hook_cancels_while_it_is_taken_never_starts(
    max_backlog, heard, autojump_clock
):
    started, scopes = [], {}

    def cancel(event):
        if event.job_id == heard:
            scopes[2].cancel()

    async def handler(number):
        started.append(number)
        await trio.sleep(1)
        return number

    async def call(number):
        with trio.CancelScope() as scopes[number]:
            assert await pool.process(number) == number

    async with open_pool(
        1, handler, max_backlog=max_backlog, hooks=[OnQueue(cancel)], grace=3
    ) as pool:
        numbers = range(1, heard + 1)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for number in numbers:
                    nursery.start_soon(call, number)
                    await wait_all_tasks_blocked()
                await trio.sleep(1.5)
                ended(pool)
                assert await pool.process("next") == "next"
        caught = [number for number in numbers if scopes[number].cancelled_caught]
        assert caught == [2]
        assert started == [number for number in numbers if number != 2] + ["next"]
        assert ended(pool) == {"cancelled": 1, "done": heard}


async def test_a_hook_that_stops_the_pool_as_a_job_is_dropped_for_another_ends_all(
    autojump_clock,
):
    ends = {}

    def stop(event):
        if event.job_id == 3:
            pool.cancel()

    async def call(number):
        with pytest.raises((JobCancelled, JobDropped)) as caught:
            await pool.process(number)
        ends[number] = caught.type

    with trio.fail_after(20):
        async with open_pool(
            1,
            trio.sleep,
            max_backlog=1,
            overflow="drop_oldest",
            hooks=[OnQueue(stop)],
        ) as pool:
            async with trio.open_nursery() as nursery:
                for number in (5, 6, 7):
                    nursery.start_soon(call, number)
                    await wait_all_tasks_blocked()
    assert ends == {5: JobCancelled, 6: JobDropped, 7: JobCancelled}
    assert ended(pool) == {"cancelled": 2, "dropped": 1}


# Policies -----------------------------------------------------------------


@pytest.mark.parametrize("whom", ["pool", "caller"])
async def test_a_job_is_not_retried_once_its_retry_predicate_cancelled_the(
    whom, autojump_clock
):
    attempts = []

    def cancel_and_retry(error):
        (pool if whom == "pool" else scope).cancel()
        return True

    async def handler(job):
        attempts.append(job)
        raise ValueError(job)

    retry = Retry(attempts=3, backoff=lambda attempt: 5.0, on=cancel_and_retry)
    async with open_pool(1, handler, retry=retry) as pool:
        began = trio.current_time()
        with trio.fail_after(20), trio.CancelScope() as scope:
            with pytest.raises(ValueError):
                await pool.process("job")
        assert trio.current_time() == began
    assert attempts == ["job"]
    assert ended(pool) == {"failed": 1}


async def test_autoscaling_below_its_most_is_no_deadlock(autojump_clock):
    async def handler(job):
        return await pool.process("inner") if job == "outer" else job

    scale = Autoscale(min=1, max=4, interval=1.0)
    with trio.fail_after(20):
        async with open_pool(1, handler, scale=scale) as pool:
            assert await pool.process("outer") == "inner"


async def test_autoscaling_at_its_most_is_a_deadlock(autojump_clock):
    async def handler(job):
        return await pool.process("inner") if job == "outer" else job

    scale = Autoscale(min=1, max=1, interval=1.0)
    with trio.fail_after(20):
        async with open_pool(1, handler, scale=scale) as pool:
            with pytest.raises(WouldDeadlock):
                await pool.process("outer")


async def test_a_worker_that_was_asked_for_and_is_not_here_yet_is_no_deadlock(
    autojump_clock,
):
    async def handler(job):
        if job == "inner":
            return job
        # In another task, as the wait of this one would be over with the hiring.
        nursery.start_soon(pool.resize, 2)
        while pool.size == 1:
            await trio.lowlevel.checkpoint()
        return await pool.process("inner")

    with trio.fail_after(20):
        async with open_pool(1, handler) as pool, trio.open_nursery() as nursery:
            assert await pool.process("outer") == "inner"


async def test_priorities_too_large_for_a_float_keep_their_order_with_aging(
    autojump_clock,
):
    order = []

    async def handler(job):
        order.append(job)
        await trio.sleep(1)

    with trio.fail_after(20):
        async with open_pool(1, handler, aging=1.0) as pool:
            pool.submit_nowait("first")
            pool.submit_nowait("last", priority=-(10**400))
            pool.submit_nowait("plain")
            pool.submit_nowait("huge", priority=10**400)
            await pool.join()
    assert order == ["first", "huge", "plain", "last"]


async def test_a_delayed_job_keeps_no_place_of_a_half_open_breaker(autojump_clock):
    breaker = CircuitBreaker(failures=1, open_for=1.0)

    async def handler(fails):
        if fails:
            raise ValueError
        return "well"

    async with open_pool(1, handler, breaker=breaker) as pool:
        with pytest.raises(ValueError):
            await pool.process(True)
        await trio.sleep(1.5)
        assert breaker.state == "half_open"
        delayed = pool.submit_nowait(False, delay=3600)
        assert await pool.process(False) == "well"
        assert breaker.state == "closed"
        assert await delayed.wait() == "well"


async def test_a_delayed_job_that_is_cancelled_frees_no_place_of_another(
    autojump_clock,
):
    breaker = CircuitBreaker(failures=1, open_for=1.0)

    async def handler(seconds):
        await trio.sleep(seconds)
        raise ValueError

    async with open_pool(2, handler, breaker=breaker, unobserved="ignore") as pool:
        pool.submit_nowait(0)
        await trio.sleep(1.0)
        delayed = pool.submit_nowait(0, delay=9)
        pool.submit_nowait(1.0)
        assert breaker.statistics().probing == 1
        delayed.cancel()
        assert breaker.statistics().probing == 1


async def test_a_job_withdrawn_as_it_is_taken_for_its_second_try_gives_back_one_token(
    autojump_clock,
):
    async def handler(job):
        if job == "fails":
            raise ValueError
        await trio.sleep(2.0)
        return job

    def cancel_first(event):
        if event.job_id == "third":
            first.cancel()

    limiter = trio.CapacityLimiter(1)
    retry = Retry(attempts=2, backoff=lambda attempt: 1.0)
    async with open_pool(
        1,
        handler,
        max_backlog=1,
        limiter=limiter,
        retry=retry,
        hooks=[OnQueue(cancel_first)],
        unobserved="ignore",
    ) as pool:
        first = pool.submit_nowait("fails")
        await trio.sleep(0.5)
        pool.submit_nowait("second")
        # It gets in as the first is taken, and waits for room until then.
        third = await pool.submit("third", id="third")
        assert first.state is JobState.CANCELLED
        assert await third.wait() == "third"
        assert limiter.borrowed_tokens == 0
    assert ended(pool) == {"cancelled": 1, "done": 2}


# The running job ----------------------------------------------------------


async def test_an_item_that_cancels_itself_and_is_done_leaves_the_next_alone(
    autojump_clock,
):
    async def handler(item):
        if item == 0:
            assert current_job().cancel()
        else:
            await trio.sleep(0.25)
        return item

    async with open_pool(1, handler) as pool:
        assert await pool.map([0, 1, 2]) == [0, 1, 2]
        settled = await pool.settle([0, 1, 2])
        assert [one.outcome.unwrap() for one in settled] == [0, 1, 2]
        assert ended(pool) == {"done": 6}


async def test_a_job_cannot_be_cancelled_from_a_thread(autojump_clock):
    async def handler(job):
        with pytest.raises(WrongThread):
            await trio.to_thread.run_sync(current_job().cancel)
        await trio.sleep(0.25)
        return job

    async with open_pool(1, handler) as pool:
        assert await pool.process("unharmed") == "unharmed"


async def test_a_background_task_of_a_worker_is_part_of_no_job(autojump_clock):
    seen = []

    async def handler(job):
        await trio.sleep(1)
        return job

    async def beat():
        # The worker is in the middle of its job by now.
        await trio.sleep(0.5)
        assert pool.statistics().running == 1
        with pytest.raises(RuntimeError, match="inside a job"):
            current_job()
        seen.append(await pool.process("beat"))

    @asynccontextmanager
    async def worker():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat)
            yield handler
            nursery.cancel_scope.cancel()

    with trio.fail_after(20):
        async with open_pool(1, worker=worker) as pool:
            assert await pool.process("job") == "job"
            await pool.join()
            await wait_all_tasks_blocked()
            assert seen == ["beat"]


# Waits inside, and leases -------------------------------------------------


async def wait_for_reply(pool):
    return await pool.submit_nowait("inner").wait()


async def wait_for_map(pool):
    (result,) = await pool.map(["inner"])
    return result


async def wait_for_settle(pool):
    (settled,) = await pool.settle(["inner"])
    return settled.outcome.unwrap()


async def wait_for_stream(pool):
    async with pool.stream(["inner"]) as results:
        (result,) = [result async for result in results]
    return result


async def wait_for_lease(pool):
    async with pool.lease() as worker:
        return await worker.process("inner")


async def wait_for_process(pool):
    return await pool.process("inner")


@pytest.mark.parametrize(
    "wait",
    [
        wait_for_process,
        wait_for_reply,
        wait_for_map,
        wait_for_settle,
        wait_for_stream,
        wait_for_lease,
    ],
)
async def test_of_jobs_that_wait_for_each_other_the_last_to_wait_hears_of_it(
    wait, autojump_clock
):
    async def handler(job):
        if job == "outer":
            return await wait(pool)
        if job == "inner":
            try:
                return await pool.process("third")
            except WouldDeadlock:
                return "would deadlock"
        return job

    with trio.fail_after(20):
        async with open_pool(2, handler) as pool:
            assert await pool.process("outer") == "would deadlock"
        async with open_pool(3, handler) as pool:
            assert await pool.process("outer") == "third"


@pytest.mark.parametrize("order", [("outer", "long"), ("long", "outer")])
@pytest.mark.parametrize(
    "wait",
    [
        wait_for_process,
        wait_for_reply,
        wait_for_map,
        wait_for_settle,
        wait_for_stream,
        wait_for_lease,
    ],
)
async def test_a_wait_inside_a_job_does_not_outlast_the_last_worker_that_could_end_it(
    wait, order, autojump_clock
):
    async def handler(job):
        if job == "outer":
            # Which of the two depends on whose worker leaves; both are an end.
            try:
                return await wait(pool)
            except WouldDeadlock:
                return "would deadlock"
        if job == "long":
            await trio.sleep(3)
        return job

    def first(idle):
        return min(idle, key=lambda worker: worker.id)

    with trio.fail_after(20):
        async with open_pool(2, handler, choose=first) as pool:
            replies = {job: pool.submit_nowait(job) for job in order}
            await trio.sleep(0.5)
            await pool.resize(1)
            assert await replies["outer"].wait() in ("inner", "would deadlock")
            assert await replies["long"].wait() == "long"
            assert await pool.process("next") == "next"
            await pool.join()
            ended(pool)


@pytest.mark.parametrize("order", [("outer", "long"), ("long", "outer")])
async def test_a_wait_for_room_inside_a_job_ends_with_the_last_worker_that_could_end_it(
    order, autojump_clock
):
    async def handler(job):
        if job == "outer":
            try:
                return await pool.process("inner")
            except WouldDeadlock:
                return "would deadlock"
        if job == "long":
            await trio.sleep(3)
        return job

    def first(idle):
        return min(idle, key=lambda worker: worker.id)

    with trio.fail_after(20):
        async with open_pool(2, handler, max_backlog=1, choose=first) as pool:
            replies = {job: pool.submit_nowait(job) for job in order}
            replies["filler"] = pool.submit_nowait("filler")
            await trio.sleep(0.5)
            await pool.resize(1)
            assert await replies["outer"].wait() in ("inner", "would deadlock")
            assert await replies["filler"].wait() == "filler"


@pytest.mark.parametrize("order", [("outer", "long"), ("long", "outer")])
async def test_who_could_not_go_on_waiting_for_a_reply_is_not_woken_by_it_later(
    order, autojump_clock
):
    async def wait_in_vain():
        with suppress(WouldDeadlock):
            await pool.submit_nowait("inner").wait()

    async def handler(job):
        if job == "outer":
            # In a task that is gone when the inner job ends.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_in_vain)
        if job == "long":
            await trio.sleep(3)
        return job

    def first(idle):
        return min(idle, key=lambda worker: worker.id)

    with trio.fail_after(20):
        async with open_pool(2, handler, choose=first) as pool:
            replies = [pool.submit_nowait(job) for job in order]
            await trio.sleep(0.5)
            await pool.resize(1)
            assert [await reply.wait() for reply in replies] == list(order)
            await pool.join()
            assert ended(pool) == {"done": 3}


async def test_the_lease_of_a_crashed_worker_is_over_before_its_cleanup(
    autojump_clock,
):
    context = ContextVar("context", default="the worker's own")
    seen = []

    async def handler(job):
        if job == "die":
            raise SystemExit

    @asynccontextmanager
    async def worker():
        try:
            yield handler
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(10)
            seen.append(context.get())

    async with open_pool(1, worker=worker) as pool:
        async with pool.lease() as leased:
            with pytest.raises(WorkerCrashed) as caught:
                await leased.process("die")
            assert caught.value.started
            context.set("the caller's")
            began = trio.current_time()
            with pytest.raises(WorkerCrashed) as caught:
                await leased.process("again")
            assert not caught.value.started
            assert trio.current_time() == began
            assert ended(pool) == {"lost": 1}
        await trio.sleep(10)
    assert seen[0] == "the worker's own"


async def test_a_worker_gets_ready_after_a_lease_that_was_left_with_its_job_running(
    autojump_clock,
):
    log = []

    class Handler:
        async def ready(self):
            log.append("ready")

        async def __call__(self, job):
            log.append(job)
            await trio.sleep(1)

    async with open_pool(1, Handler()) as pool:
        async with trio.open_nursery() as nursery:
            async with pool.lease() as leased:
                nursery.start_soon(leased.process, "leased")
                await trio.sleep(0.5)
            await pool.process("next")
    after = log[log.index("leased") + 1 :]
    assert after[:2] == ["ready", "next"]


# Inputs -------------------------------------------------------------------


class Contrary:
    """A key that can be hashed, but not compared with another."""

    def __hash__(self):
        return 1

    def __eq__(self, other):
        raise RuntimeError("not comparable")


async def test_a_key_that_cannot_be_compared_leaves_the_id_free(autojump_clock):
    async def handler(job):
        await trio.sleep(1)
        return job

    async with open_pool(1, handler) as pool:
        first = pool.submit_nowait("first", key=Contrary(), id="a")
        with pytest.raises(RuntimeError, match="not comparable"):
            pool.submit_nowait("refused", key=Contrary(), id="b")
        second = pool.submit_nowait("second", id="b")
        assert await first.wait() == "first"
        assert await second.wait() == "second"
        assert ended(pool) == {"done": 2}


# What is kept -------------------------------------------------------------


def push_and_pop(line, job):
    line.push(job)
    assert line.pop() is job


def push_and_discard(line, job):
    line.push(job)
    assert line.discard(job)


@pytest.mark.parametrize("aging", [math.inf, 1.0])
@pytest.mark.parametrize("pass_through", [push_and_pop, push_and_discard])
def test_a_line_keeps_nothing_of_past_priorities(pass_through, aging):
    line = Line(aging)
    # Larger than the integers that Python keeps for itself.
    priorities = [10**6 + number for number in range(100)]
    unused = [sys.getrefcount(priority) for priority in priorities]
    for number, priority in enumerate(priorities):
        job = new_job(
            SimpleNamespace(plain_terms=new_terms(None)), number, None, None, math.inf
        )
        job.priority, job.queued_at = priority, 0.0
        pass_through(line, job)
    del job, priority
    assert line.pop() is None
    assert line.top is line.plain
    assert [sys.getrefcount(priority) for priority in priorities] == unused


# It takes some hundred jobs to tell a leak from the slack that is allowed, and
# every object of the process is looked at.
async def test_timeouts_of_past_jobs_are_forgotten(autojump_clock):
    def count_lists():
        gc.collect()
        return sum(type(thing) is list for thing in gc.get_objects())

    async with open_pool(1, trio.sleep) as pool:
        before = count_lists()
        for _ in range(200):
            await pool.process(0.0, timeout=1e6)
            with pytest.raises(JobTimeout):
                await pool.process(1.0, timeout=0.25)
        # An alarm is a list.
        assert count_lists() - before < 150


async def test_unobserved_ignore_keeps_no_failed_job_alive(autojump_clock):
    class Input:
        """Something that shows whether it is still alive."""

    async def handler(job):
        raise ValueError(job)

    async with open_pool(1, handler, unobserved="ignore") as pool:
        inputs = weakref.WeakSet()
        for _ in range(20):
            job = Input()
            inputs.add(job)
            pool.submit_nowait(job)
        del job
        await pool.join()
        gc.collect()
        # The worker may know its last error.
        assert len(inputs) <= 1
        assert ended(pool) == {"failed": 20}


# What the short ways of a job must not leave out -------------------------------


async def test_a_retry_that_succeeds_under_a_breaker_has_no_error_left(autojump_clock):
    """Its worker comes to it straight from another job."""
    attempts = []

    async def handler(job):
        if job == "again":
            attempts.append(job)
            if len(attempts) == 1:
                raise ValueError("first try")
            return "well"
        await trio.sleep(job)
        return None

    retry = Retry(attempts=3, backoff=lambda attempt: 0.25)
    breaker = CircuitBreaker(failures=100)
    async with open_pool(1, handler, breaker=breaker, retry=retry) as pool:
        again = await pool.submit("again")
        await pool.process(1.0)
        await trio.sleep(1)
        assert again.state is JobState.DONE
        assert await again.wait() == "well"


@pytest.mark.parametrize("size", [1, 2])
async def test_a_job_of_a_lease_is_not_tried_again_elsewhere(size, autojump_clock):
    tries = []

    async def handler(job):
        tries.append(job)
        raise ValueError(job)

    async with open_pool(size, handler, retry=Retry(3)) as pool:
        async with pool.lease() as worker:
            with trio.fail_after(60), pytest.raises(ValueError, match="once"):
                await worker.process("once")
    assert tries == ["once"]


@pytest.mark.parametrize("other_pool", [False, True])
async def test_a_nested_job_sees_the_deadline_of_the_job_around_it(
    other_pool, autojump_clock
):
    async def look(_):
        return trio.current_effective_deadline()

    async def handler(nested):
        inner = other if other_pool else pool
        return await inner.process(False, timeout=100) if nested else await look(None)

    async with open_pool(2, look, timeout=50) as other:
        async with open_pool(2, handler, timeout=10) as pool:
            assert await pool.process(True) == 10


async def test_a_nested_job_sees_that_deadline_though_no_other_timer_is_set(
    autojump_clock,
):
    async def handler(job):
        if job == "look":
            return current_job().deadline
        await trio.sleep(1)
        return await pool.process("look")

    async with open_pool(2, handler, timeout=10) as pool:
        assert await pool.process("nested") == 10


async def test_a_context_that_a_handler_puts_in_its_place_hides_nothing():
    variable = ContextVar("variable", default=None)

    async def handler(item):
        seen = variable.get()
        variable.set(item)
        trio.lowlevel.current_task().context = Context()
        return seen

    def run_bare():
        async def main():
            async with open_pool(1, handler) as pool:
                replies = [pool.submit_nowait(number) for number in range(3)]
                submitted = [await reply.wait() for reply in replies]
                return submitted, await pool.map(range(3))

        return trio.run(main)

    found = await trio.to_thread.run_sync(Context().run, run_bare)
    assert found == ([None] * 3, [None] * 3)


async def test_a_job_given_in_by_a_hook_is_not_run_in_the_context_of_the_last():
    """The worker is on its feet as it is given the job, and stays in no sleep."""
    variable = ContextVar("variable", default=None)
    seen = {}
    go = trio.Event()

    async def handler(job):
        seen[job] = variable.get()
        if job == "first":
            await go.wait()

    replies = []

    def withdraw_and_submit(event):
        if go.is_set() and not replies:
            scope.cancel()
            replies.append(Context().run(pool.submit_nowait, "empty"))

    hooks = [OnQueue(withdraw_and_submit)]
    async with open_pool(1, handler, max_backlog=0, hooks=hooks) as pool:

        async def first():
            variable.set("secret")
            await pool.process("first")

        async def second():
            with scope:
                await pool.process("second")

        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await wait_all_tasks_blocked()
            nursery.start_soon(second)
            await wait_all_tasks_blocked()
            go.set()
        await replies[0].wait()
    assert seen == {"first": "secret", "empty": None}


async def test_a_job_that_has_not_begun_is_known_to_a_hook(autojump_clock):
    """Its deadline is not: its time runs from its start."""
    seen = []

    def look(event):
        try:
            seen.append(current_job().deadline)
        except RuntimeError:
            seen.append(None)

    async def handler(job):
        await trio.sleep(job)

    hooks = [OnQueue(look)]
    async with open_pool(1, handler, max_backlog=0, timeout=10, hooks=hooks) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.process, 1.0)
            await wait_all_tasks_blocked()
            nursery.start_soon(pool.process, 1.0)
    assert seen == [None, math.inf]


@pytest.mark.parametrize("way", ["submit_nowait", "process"])
async def test_a_keyed_job_may_be_ended_by_the_hook_that_hears_of_it(
    way, autojump_clock
):
    async def handler(job):
        await trio.sleep(job)

    def end_all(event):
        if event.key is not None:
            pool.cancel()

    hooks = [OnQueue(end_all)]
    async with open_pool(3, handler, hooks=hooks, rate=Rate(1, per=10)) as pool:
        pool.submit_nowait(0.0)
        await wait_all_tasks_blocked()
        if way == "process":
            with pytest.raises(JobCancelled):
                await pool.process(0.0, key="a")
        else:
            reply = pool.submit_nowait(0.0, key="a")
            assert reply.state is JobState.CANCELLED


async def test_getting_ready_has_no_deadline_of_a_job(autojump_clock):
    class Handler:
        def __init__(self):
            self.seen = []

        async def ready(self):
            self.seen.append(trio.current_effective_deadline())

        async def __call__(self, job):
            await trio.sleep(job)

    handler = Handler()
    async with open_pool(1, handler, timeout=5) as pool:
        for _ in range(3):
            await pool.process(1.0)
    assert handler.seen == [math.inf] * len(handler.seen)
    assert len(handler.seen) >= 3


async def test_an_opening_circuit_refuses_very_many_while_others_take_turns():
    turns = 0

    async def handler(job):
        raise ValueError(job)

    async def count_turns():
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    breaker = CircuitBreaker(failures=1, open_for=math.inf)
    async with open_pool(
        1, handler, breaker=breaker, max_backlog=math.inf, unobserved="ignore"
    ) as pool:
        pool.pause()
        for number in range(2_000):
            pool.submit_nowait(number)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(count_turns)
            pool.resume()
            await pool.join()
            nursery.cancel_scope.cancel()
        assert pool.statistics().failed == 2_000
    assert turns >= 5


class Kept:
    """Something of a caller whose end can be seen."""


@pytest.mark.parametrize("waits", ["in line", "for room", "nested"])
async def test_an_idle_pool_keeps_nothing_of_who_has_given_up(waits, autojump_clock):
    seen = []
    variable = ContextVar("variable")

    async def handler(job):
        if isinstance(job, Kept):
            if waits == "nested":
                await pool.process(0.0)
        else:
            await trio.sleep(job)

    async def call(task_status):
        kept = Kept()
        seen.append(weakref.ref(kept))
        variable.set(kept)
        with trio.CancelScope() as scope:
            task_status.started(scope)
            await pool.process(kept)

    async with open_pool(2 if waits == "nested" else 1, handler, max_backlog=1) as pool:
        async with trio.open_nursery() as nursery:
            if waits != "nested":
                nursery.start_soon(pool.process, 1.0)
                await wait_all_tasks_blocked()
            if waits == "for room":
                nursery.start_soon(pool.process, 1.0)
                await wait_all_tasks_blocked()
                nursery.start_soon(pool.process, 1.0)
                await wait_all_tasks_blocked()
            scope = await nursery.start(call)
            await wait_all_tasks_blocked()
            if waits != "nested":
                scope.cancel()
        del scope, nursery
        for _ in range(3):
            await pool.process(0.0)
        await wait_all_tasks_blocked()
        gc.collect()
        assert [ref() for ref in seen] == [None]


async def test_who_waits_in_the_block_of_a_breaking_pool_hears_that_it_broke(
    autojump_clock,
):
    """However many they are: the block is called off when all have heard."""
    heard = Counter()

    async def handler(job):
        await trio.sleep(1)
        raise SystemExit

    async def call(method):
        try:
            await method(0)
        except Exception as error:
            heard[type(error)] += 1

    with pytest.raises(PoolBroken):
        async with open_pool(
            1, handler, restart=Restart(limit=0), max_backlog=1_500
        ) as pool:
            async with trio.open_nursery() as nursery:
                for _ in range(1_501):
                    nursery.start_soon(call, pool.process)
                await wait_all_tasks_blocked()
                for _ in range(1_200):
                    nursery.start_soon(call, pool.submit)
    assert heard == {WorkerCrashed: 1, PoolBroken: 2_700}
    assert pool.statistics().lost == 1_501


@pytest.mark.parametrize("ends", ["served", "cancelled"])
async def test_join_does_not_outwait_the_last_lease_in_line(ends, autojump_clock):
    """A lease is no job, so no job's end follows it."""

    async def lease(task_status=trio.TASK_STATUS_IGNORED):
        with trio.CancelScope() as scope:
            task_status.started(scope)
            async with pool.lease():
                pass

    async def end():
        await trio.sleep(1)
        if ends == "cancelled":
            waiting.cancel()
        else:
            pool.resume()

    async with trio.open_nursery() as nursery:
        async with open_pool(1, trio.sleep) as pool:
            pool.pause()
            waiting = await nursery.start(lease)
            await wait_all_tasks_blocked()
            nursery.start_soon(end)
            with trio.fail_after(5):
                await pool.join()
            assert trio.current_time() == 1.0
            # The lease is not to be refused by the end of the block.
            await wait_all_tasks_blocked()


async def test_a_worker_that_goes_on_after_a_hook_withdrew_its_job_is_not_idle():
    """It takes the next job of the key at once, while another is asked to look."""
    release, hold, scope = trio.Event(), trio.Event(), trio.CancelScope()
    offered = []

    def choose(idle):
        offered.append({worker.state for worker in idle})
        pick = max if len(offered) == 1 else min
        return pick(idle, key=lambda worker: worker.id)

    def withdraw(_):
        if len(offered) == 2:
            scope.cancel()

    async def handler(job):
        return None if job is None else await job.wait()

    async def call():
        with scope:
            await pool.process(None, key="the key")

    async def call_next():
        await pool.process(hold, key="the key")

    async with open_pool(
        3, handler, max_backlog=1, choose=choose, hooks=[OnQueue(withdraw)]
    ) as pool:
        # There is no room for more, so the calls are heard of as they are taken.
        late = pool.submit_nowait(None, delay=1000)
        pool.submit_nowait(release, key="the key")
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            for start in (call, call_next):
                nursery.start_soon(start)
                await wait_all_tasks_blocked()
            release.set()
            await wait_all_tasks_blocked()
            assert scope.cancelled_caught
            assert pool.statistics().running == 1
            assert len(offered) == 3
            await pool.process(None)
            assert offered[3:] == [{WorkerState.IDLE}]
            hold.set()
        late.cancel()
