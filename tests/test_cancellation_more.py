"""The cancellation table, continued: retries, delays, keys, guards, leases and more.

Each row cancels one call at one of its waits and then asks the same facts.
"""

from __future__ import annotations

from collections import Counter
from contextlib import asynccontextmanager
from contextvars import ContextVar

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from trio_pool import (
    Backoff,
    Drain,
    Hooks,
    JobCancelled,
    JobExpired,
    JobState,
    PoolClosed,
    Rate,
    Retry,
    Task,
    WorkerState,
    open_pool,
)

LATER = Retry(3, Backoff(50.0, factor=1, maximum=50.0, jitter=0))
SOON = Retry(3, Backoff(0.25, factor=1, jitter=0))


class Failure(Exception):
    """What the jobs here fail with."""


class Ledger(Hooks):
    """Counts how often each job was accepted, and how often it ended."""

    def __init__(self):
        self.accepted = Counter()
        self.ended = Counter()

    def on_job_queue(self, event):
        self.accepted[event.job_id] += 1

    def on_job_complete(self, event):
        self.ended[event.job_id] += 1

    on_job_error = on_job_cancel = on_job_drop = on_job_complete


async def run(job):
    """Be the handler of every pool here: the input of a job is what it does."""
    return await job()


async def next_job():
    return "the next job"


class Gate:
    """A job that waits to be let through."""

    def __init__(self):
        self.started = self.cancelled = 0
        self.begun = trio.Event()
        self.open = trio.Event()

    async def __call__(self):
        self.started += 1
        self.begun.set()
        try:
            await self.open.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        return "through"


class ShieldedGate(Gate):
    """A gate that hears of a cancellation only when it is let through."""

    async def __call__(self):
        self.started += 1
        with trio.CancelScope(shield=True):
            await self.open.wait()
        await trio.lowlevel.checkpoint()


class Failing:
    """A job that fails in its first ``times`` attempts."""

    def __init__(self, times=9):
        self.times = times
        self.starts = 0

    async def __call__(self):
        self.starts += 1
        if self.starts <= self.times:
            raise Failure
        return "tried"


class Call:
    """A call in a task and a cancel scope of its own."""

    def __init__(self, nursery, async_fn, *args, **options):
        self.scope = trio.CancelScope()
        self.ended = False
        self.over = trio.Event()
        self.value = self.error = self.task = None
        nursery.start_soon(self.run, async_fn, args, options)

    async def run(self, async_fn, args, options):
        self.task = trio.lowlevel.current_task()
        try:
            with self.scope:
                self.value = await async_fn(*args, **options)
        except Exception as error:
            self.error = error
        self.ended = True
        self.over.set()

    @property
    def cancelled(self):
        return self.ended and self.scope.cancelled_caught

    async def cancel(self):
        self.scope.cancel()
        await wait_all_tasks_blocked()


class CancelAfterFirstStep(trio.abc.Instrument):
    """Cancels a call between its first step and the next step of anyone."""

    def __init__(self, call):
        self.call = call
        self.struck = False

    def after_task_step(self, task):
        if task is self.call.task and not self.struck:
            self.struck = True
            self.call.scope.cancel()


async def call_and_cancel_in_the_same_tick(nursery, async_fn, *args, **options):
    call = Call(nursery, async_fn, *args, **options)
    instrument = CancelAfterFirstStep(call)
    trio.lowlevel.add_instrument(instrument)
    await wait_all_tasks_blocked()
    trio.lowlevel.remove_instrument(instrument)
    assert instrument.struck
    return call


class Setting:
    """A pool with some of the options under which a cancelled job must let go."""

    def __init__(self, name):
        self.name = name
        self.ledger = Ledger()
        self.limiter = trio.CapacityLimiter(2) if "limiter" in name else None

    def open(self, size=2, **options):
        options["hooks"] = [self.ledger] if "watched" in self.name else []
        if self.limiter is not None:
            options["limiter"] = self.limiter
        if "rate" in self.name:
            # So quick that nobody ever waits for it here.
            options["rate"] = Rate(1_000, burst=1_000)
        return open_pool(size, run, **options)

    def ask_the_books(self, pool):
        """Every accepted job is somewhere, and none has ended twice."""
        books = pool.statistics()
        assert books.accepted == sum(getattr(books, s.value) for s in JobState)
        assert books.busy == books.running
        assert set(self.ledger.accepted.values()) <= {1}
        assert set(self.ledger.ended.values()) <= {1}
        assert self.ledger.ended.keys() <= self.ledger.accepted.keys()
        return books

    async def ask_the_facts(self, pool, limiter=None):
        """Books balanced, nothing left, no slot or token lost, the next job runs."""
        limiter = limiter or self.limiter
        await wait_all_tasks_blocked()
        books = self.ask_the_books(pool)
        assert (books.delayed, books.queued, books.running) == (0, 0, 0)
        assert books.workers == books.size == pool.size
        assert {worker.state for worker in pool.workers()} == {WorkerState.IDLE}
        assert limiter is None or limiter.borrowed_tokens == 0
        width = pool.size
        if limiter is not None:
            width = min(width, int(limiter.total_tokens))
        with trio.fail_after(50):
            gates = [Gate() for _ in range(width)]
            async with trio.open_nursery() as nursery:
                for gate in gates:
                    nursery.start_soon(pool.process, gate)
                for gate in gates:
                    await gate.begun.wait()
                for gate in gates:
                    gate.open.set()
            assert await pool.process(next_job) == "the next job"
        await wait_all_tasks_blocked()
        after = self.ask_the_books(pool)
        assert after.done - books.done == width + 1
        assert after.restarts == books.restarts
        assert limiter is None or limiter.borrowed_tokens == 0

    def ask_the_end(self, pool):
        """After the block: every job has ended once and nothing is left."""
        books = self.ask_the_books(pool)
        assert (books.delayed, books.queued, books.running) == (0, 0, 0)
        assert books.workers == 0
        assert self.limiter is None or self.limiter.borrowed_tokens == 0
        assert self.ledger.ended.keys() == self.ledger.accepted.keys()


@pytest.fixture(params=["plain", "watched", "limiter", "rate and limiter, watched"])
def setting(request):
    return Setting(request.param)


@asynccontextmanager
async def all_busy(pool, count=2):
    """Keep ``count`` workers busy; they are free when this is left."""
    gates = [Gate() for _ in range(count)]
    async with trio.open_nursery() as nursery:
        for gate in gates:
            nursery.start_soon(pool.process, gate)
        await wait_all_tasks_blocked()
        assert all(gate.started for gate in gates)
        yield
        for gate in gates:
            gate.open.set()


# Waiting for the next attempt ------------------------------


@pytest.mark.parametrize("whose", ["pool", "job"])
async def test_process_cancelled_before_its_next_attempt_leaves_at_once(
    setting, whose, autojump_clock
):
    job, options = Failing(), {"retry": LATER}
    of_pool, of_job = (options, {}) if whose == "pool" else ({}, options)
    async with setting.open(**of_pool) as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, pool.process, job, **of_job)
            await wait_all_tasks_blocked()
            assert pool.statistics().delayed == 1
            call.scope.cancel()
            # In the very step that cancels it.
            books = setting.ask_the_books(pool)
            assert (books.delayed, books.cancelled) == (0, 1)
            await wait_all_tasks_blocked()
            assert call.cancelled
        assert trio.current_time() == 0
        await setting.ask_the_facts(pool)
    assert job.starts == 1
    setting.ask_the_end(pool)


async def test_process_cancelled_in_its_second_attempt_cancels_that(
    setting, autojump_clock
):
    gate = Gate()

    async def fail_once():
        if not job.starts:
            await job()
        return await gate()

    job = Failing()
    async with setting.open(retry=SOON) as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, pool.process, fail_once)
            await trio.sleep(0.5)
            await call.cancel()
            assert call.cancelled
        assert (gate.started, gate.cancelled) == (1, 1)
        assert pool.statistics().retries == 1
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


async def test_process_cancelled_as_its_next_attempt_waits_for_a_worker(
    setting, autojump_clock
):
    job = Failing()
    async with setting.open(retry=SOON) as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, pool.process, job)
            await wait_all_tasks_blocked()
            async with all_busy(pool):
                await trio.sleep(1)
                assert pool.statistics().queued == 1
                await call.cancel()
                assert call.cancelled
                assert pool.statistics().queued == 0
        await setting.ask_the_facts(pool)
    assert job.starts == 1
    setting.ask_the_end(pool)


async def test_process_cancelled_in_the_tick_of_its_hand_over_is_not_tried(
    setting, autojump_clock
):
    job = Failing()
    async with setting.open(retry=SOON) as pool:
        async with trio.open_nursery() as nursery:
            call = await call_and_cancel_in_the_same_tick(nursery, pool.process, job)
            assert call.cancelled
        await setting.ask_the_facts(pool)
    assert job.starts == 0
    setting.ask_the_end(pool)


async def test_process_cancelled_at_the_time_of_its_next_attempt_ends_once(
    setting, autojump_clock
):
    job = Failing()
    async with setting.open(retry=SOON) as pool:
        with trio.move_on_after(0.25) as scope:
            await pool.process(job)
        assert scope.cancelled_caught
        assert job.starts in (1, 2)
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


async def test_a_delayed_job_that_is_cancelled_leaves_its_room_to_the_next(
    setting, autojump_clock
):
    async with setting.open(1, max_backlog=0) as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, pool.process, Failing(), retry=LATER)
            await wait_all_tasks_blocked()
            waits = Call(nursery, pool.process, next_job, retry=LATER)
            gives_up = Call(nursery, pool.process, Gate(), retry=LATER)
            await wait_all_tasks_blocked()
            assert not waits.ended
            await gives_up.cancel()
            assert gives_up.cancelled
            await call.cancel()
            assert call.cancelled
            assert waits.value == "the next job"
        assert trio.current_time() == 0
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


@pytest.mark.parametrize("end", ["wait", "reply"])
async def test_a_cancelled_wait_for_a_delayed_job_only_stops_waiting(
    setting, end, autojump_clock
):
    job = Failing(1)
    async with setting.open() as pool:
        reply = await pool.submit(job, retry=SOON)
        async with trio.open_nursery() as nursery:
            call, other = Call(nursery, reply.wait), Call(nursery, reply.wait)
            await wait_all_tasks_blocked()
            await call.cancel()
            assert call.cancelled
            assert reply.state is JobState.DELAYED
            if end == "reply":
                assert reply.cancel()
        if end == "reply":
            assert isinstance(other.error, JobCancelled)
        else:
            assert other.value == "tried"
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("method", ["map", "settle"])
async def test_batches_cancelled_while_items_wait_for_another_try(
    setting, method, asynchronous, autojump_clock
):
    async def source():
        for job in jobs:
            yield job

    jobs = [Failing(), next_job, Failing(), Gate()]
    async with setting.open() as pool:
        async with trio.open_nursery() as nursery:
            items = source() if asynchronous else jobs
            call = Call(nursery, getattr(pool, method), items, retry=LATER)
            await wait_all_tasks_blocked()
            books = pool.statistics()
            assert (books.delayed, books.running, books.done) == (2, 1, 1)
            await call.cancel()
            assert call.cancelled
        assert trio.current_time() == 0
        assert jobs[3].cancelled == 1
        assert pool.statistics().cancelled == 3
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


@pytest.mark.parametrize("method", ["map", "settle"])
async def test_batches_cancelled_while_an_item_is_shielded_end_with_it(
    setting, method, autojump_clock
):
    gate = ShieldedGate()
    async with setting.open() as pool:
        async with trio.open_nursery() as nursery:
            items = [Failing(), gate]
            call = Call(nursery, getattr(pool, method), items, retry=LATER)
            await wait_all_tasks_blocked()
            await call.cancel()
            assert not call.ended
            assert pool.statistics().delayed == 0
            gate.open.set()
            await wait_all_tasks_blocked()
            assert call.cancelled
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


async def test_batches_cancelled_in_the_second_attempt_of_an_item(
    setting, autojump_clock
):
    class FailThenWait(Gate):
        async def __call__(self):
            if not self.started:
                self.started += 1
                raise Failure
            return await super().__call__()

    jobs = [FailThenWait() for _ in range(2)]
    async with setting.open() as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, pool.map, jobs, retry=SOON)
            await trio.sleep(0.5)
            assert [job.started for job in jobs] == [2, 2]
            await call.cancel()
            assert call.cancelled
        assert [job.cancelled for job in jobs] == [1, 1]
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_cancelled_read_of_a_stream_loses_no_retried_result(
    setting, ordered, autojump_clock
):
    async with setting.open() as pool:
        jobs = [Failing(1), Failing(1)]
        async with pool.stream(jobs, retry=SOON, ordered=ordered) as results:
            with trio.move_on_after(0.125) as scope:
                await anext(results)
            assert scope.cancelled_caught
            assert [result async for result in results] == ["tried"] * 2
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_stream_cancelled_while_its_items_wait_for_another_try(
    setting, ordered, autojump_clock
):
    async with setting.open() as pool:
        with trio.move_on_after(1) as scope:
            jobs = [Failing(), Gate(), Failing()]
            async with pool.stream(jobs, retry=LATER, ordered=ordered) as results:
                await anext(results)
        assert scope.cancelled_caught
        assert trio.current_time() == 1
        assert pool.statistics().cancelled == 3
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


# delay, ttl, keys ------------------------------


@pytest.mark.parametrize("busy", [0, 2])
async def test_submit_with_terms_in_a_cancelled_scope_does_nothing(
    setting, busy, autojump_clock
):
    async with setting.open(max_backlog=1) as pool:
        async with all_busy(pool, busy):
            accepted = pool.statistics().accepted
            with trio.CancelScope() as scope:
                scope.cancel()
                await pool.submit(Gate(), delay=1, ttl=5, id="x", key="k")
            assert scope.cancelled_caught
            assert pool.statistics().accepted == accepted
        # Neither the id nor the key has been taken.
        assert await pool.process(next_job, key="k") == "the next job"
        assert await (await pool.submit(next_job, id="x")).wait() == "the next job"
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


@pytest.mark.parametrize(
    "options",
    [{"delay": 1}, {"ttl": 50}, {"key": "k"}, {"delay": 1, "ttl": 50, "key": "k"}],
    ids=str,
)
async def test_submit_with_terms_cancelled_while_it_waits_for_room_has_done_nothing(
    setting, options, autojump_clock
):
    gate = Gate()
    async with setting.open(max_backlog=1) as pool:
        async with trio.open_nursery() as nursery, all_busy(pool):
            filler = await pool.submit(next_job)
            accepted = pool.statistics().accepted
            call = Call(nursery, pool.submit, gate, id="x", **options)
            behind = Call(nursery, pool.submit, next_job, key="k")
            await wait_all_tasks_blocked()
            await call.cancel()
            assert call.cancelled
            assert pool.statistics().accepted == accepted
        with trio.fail_after(50):
            assert await behind.value.wait() == "the next job"
            assert await filler.wait() == "the next job"
            again = await pool.submit(next_job, id="x")
            assert await again.wait() == "the next job"
        await setting.ask_the_facts(pool)
    assert gate.started == 0
    setting.ask_the_end(pool)


async def test_a_job_with_a_delay_outlives_its_cancelled_caller(
    setting, autojump_clock
):
    gate = Gate()
    gate.open.set()
    async with setting.open() as pool:
        with trio.CancelScope() as scope:
            reply = await pool.submit(gate, delay=0.25)
            scope.cancel()
            await trio.lowlevel.checkpoint()
        assert reply.state is JobState.DELAYED
        assert await reply.wait() == "through"
        assert trio.current_time() == 0.25
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


async def test_a_wait_for_a_job_that_expires_cancelled_in_time_loses_nothing(
    setting, autojump_clock
):
    async with setting.open() as pool:
        async with all_busy(pool):
            reply = await pool.submit(Gate(), ttl=1)
            with trio.move_on_after(0.5) as scope:
                await reply.wait()
            assert scope.cancelled_caught
            with pytest.raises(JobExpired):
                await reply.wait()
            assert trio.current_time() == 1
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


@pytest.mark.parametrize("first", ["running", "delayed", "retried"])
async def test_process_cancelled_while_held_by_its_key_lets_the_next_one_by(
    setting, first, autojump_clock
):
    gate, held = Gate(), Gate()
    async with setting.open() as pool:
        async with trio.open_nursery() as nursery:
            if first == "running":
                before = await pool.submit(gate, key="k")
            elif first == "delayed":
                before = await pool.submit(gate, key="k", delay=50)
            else:
                before = await pool.submit(Failing(), key="k", retry=LATER)
            await wait_all_tasks_blocked()
            call = Call(nursery, pool.process, held, key="k")
            after = Call(nursery, pool.process, next_job, key="k")
            await wait_all_tasks_blocked()
            assert pool.statistics().queued == 2
            await call.cancel()
            assert call.cancelled
            assert not after.ended
            assert before.cancel()
            await wait_all_tasks_blocked()
            assert after.value == "the next job"
        with pytest.raises(JobCancelled):
            await before.wait()
        assert trio.current_time() == 0
        await setting.ask_the_facts(pool)
    assert held.started == 0
    setting.ask_the_end(pool)


async def test_the_first_of_a_key_cancelled_lets_the_second_run(
    setting, autojump_clock
):
    gate = Gate()
    async with setting.open() as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, pool.process, gate, key="k")
            await wait_all_tasks_blocked()
            after = Call(nursery, pool.process, next_job, key="k")
            await wait_all_tasks_blocked()
            await call.cancel()
            assert call.cancelled
            assert after.value == "the next job"
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


async def test_a_key_withdrawn_in_the_tick_of_its_hand_over_is_free(
    setting, autojump_clock
):
    gate = Gate()
    async with setting.open() as pool:
        async with trio.open_nursery() as nursery:
            call = await call_and_cancel_in_the_same_tick(
                nursery, pool.process, gate, key="k"
            )
            assert call.cancelled
        assert await pool.process(next_job, key="k") == "the next job"
        await setting.ask_the_facts(pool)
    assert gate.started == 0
    setting.ask_the_end(pool)


# rate and limiter ------------------------------


class TestRate:
    async def test_process_cancelled_while_it_waits_for_a_token_never_starts(
        self, autojump_clock
    ):
        setting, gate = Setting("plain"), Gate()
        async with setting.open(rate=Rate(1)) as pool:
            await pool.process(next_job)
            async with trio.open_nursery() as nursery:
                call = Call(nursery, pool.process, gate)
                await wait_all_tasks_blocked()
                assert pool.statistics().queued == 1
                await call.cancel()
                assert call.cancelled
            # The token that it waited for is there for the next one.
            await pool.process(next_job)
            assert trio.current_time() == 1
            await setting.ask_the_facts(pool)
        assert gate.started == 0
        setting.ask_the_end(pool)

    async def test_a_cancelled_one_does_not_keep_the_next_from_its_token(
        self, autojump_clock
    ):
        setting = Setting("plain")
        async with setting.open(1, rate=Rate(1)) as pool:
            await pool.process(next_job)
            async with trio.open_nursery() as nursery:
                call = Call(nursery, pool.process, Gate(), priority=1)
                await wait_all_tasks_blocked()
                after = Call(nursery, pool.process, next_job)
                await trio.sleep(0.5)
                await call.cancel()
                assert call.cancelled
            assert after.value == "the next job"
            assert trio.current_time() == 1
            await setting.ask_the_facts(pool)

    async def test_process_cancelled_as_its_token_comes_costs_nobody_a_slot(
        self, autojump_clock
    ):
        setting = Setting("plain")
        async with setting.open(1, rate=Rate(1)) as pool:
            await pool.process(next_job)
            with trio.move_on_after(1) as scope:
                await pool.process(Gate())
            assert scope.cancelled_caught
            await setting.ask_the_facts(pool)

    async def test_a_retry_cancelled_while_it_waits_for_a_token(self, autojump_clock):
        setting, job = Setting("plain"), Failing()
        async with setting.open(1, rate=Rate(1), retry=SOON) as pool:
            with trio.move_on_after(0.5) as scope:
                await pool.process(job)
            assert scope.cancelled_caught
            assert job.starts == 1
            await setting.ask_the_facts(pool)

    @pytest.mark.parametrize("method", ["map", "settle"])
    async def test_a_batch_cancelled_while_it_waits_for_tokens(
        self, method, autojump_clock
    ):
        setting = Setting("plain")
        async with setting.open(rate=Rate(1)) as pool:
            with trio.move_on_after(1.5) as scope:
                await getattr(pool, method)([next_job] * 9)
            assert scope.cancelled_caught
            assert pool.statistics().accepted == 2
            await setting.ask_the_facts(pool)


class TestLimiter:
    async def test_process_cancelled_while_it_waits_for_a_token_never_starts(
        self, autojump_clock
    ):
        setting, gate = Setting("plain"), Gate()
        limiter = trio.CapacityLimiter(1)
        async with setting.open(limiter=limiter) as pool:
            async with limiter:
                async with trio.open_nursery() as nursery:
                    call = Call(nursery, pool.process, gate)
                    await wait_all_tasks_blocked()
                    assert pool.statistics().queued == 1
                    await call.cancel()
                    assert call.cancelled
            await setting.ask_the_facts(pool, limiter)
        assert (gate.started, limiter.borrowed_tokens) == (0, 0)
        setting.ask_the_end(pool)

    async def test_process_cancelled_in_the_tick_in_which_its_token_comes(
        self, autojump_clock
    ):
        setting, limiter = Setting("plain"), trio.CapacityLimiter(1)
        async with setting.open(limiter=limiter) as pool:
            async with trio.open_nursery() as nursery:
                await limiter.acquire()
                call = Call(nursery, pool.process, Gate())
                await wait_all_tasks_blocked()
                limiter.release()
                call.scope.cancel()
                await wait_all_tasks_blocked()
                assert call.cancelled
                assert limiter.borrowed_tokens == 0
            await setting.ask_the_facts(pool, limiter)
        assert limiter.borrowed_tokens == 0

    async def test_a_cancelled_one_does_not_keep_the_next_from_its_token(
        self, autojump_clock
    ):
        setting, limiter = Setting("plain"), trio.CapacityLimiter(1)
        async with setting.open(limiter=limiter) as pool:
            async with trio.open_nursery() as nursery:
                async with limiter:
                    call = Call(nursery, pool.process, Gate(), priority=1)
                    await wait_all_tasks_blocked()
                    after = Call(nursery, pool.process, next_job)
                    await wait_all_tasks_blocked()
                    await call.cancel()
                    assert call.cancelled
                await wait_all_tasks_blocked()
                assert after.value == "the next job"
            await setting.ask_the_facts(pool, limiter)

    @pytest.mark.parametrize("how", ["cancelled", "failed", "timed out"])
    async def test_a_job_that_ends_gives_its_token_to_another_pool(
        self, how, autojump_clock
    ):
        setting, limiter = Setting("plain"), trio.CapacityLimiter(1)
        async with (
            setting.open(limiter=limiter) as pool,
            open_pool(1, run, limiter=limiter) as other,
            trio.open_nursery() as nursery,
        ):
            job = Failing() if how == "failed" else Gate()
            call = Call(nursery, pool.process, job, timeout=1, retry=LATER)
            await wait_all_tasks_blocked()
            waits = Call(nursery, other.process, next_job)
            await wait_all_tasks_blocked()
            # The one that failed holds no token while it waits for its next try.
            assert waits.ended is (how == "failed")
            if how == "timed out":
                await trio.sleep(1.5)
                assert waits.ended
            await call.cancel()
            assert call.cancelled
            assert waits.value == "the next job"
            await setting.ask_the_facts(pool, limiter)
        assert limiter.borrowed_tokens == 0

    @pytest.mark.parametrize("method", ["map", "settle"])
    async def test_a_batch_cancelled_while_it_waits_for_tokens(
        self, method, autojump_clock
    ):
        setting, limiter = Setting("plain"), trio.CapacityLimiter(1)
        async with setting.open(limiter=limiter) as pool:
            async with limiter:
                with trio.move_on_after(1) as scope:
                    await getattr(pool, method)([next_job] * 9)
            assert scope.cancelled_caught
            await setting.ask_the_facts(pool, limiter)

    async def test_a_pool_that_is_left_while_it_waits_for_tokens_keeps_none(
        self, autojump_clock
    ):
        limiter, gate = trio.CapacityLimiter(1), Gate()
        await limiter.acquire()
        with trio.move_on_after(1) as scope:
            async with open_pool(2, run, limiter=limiter) as pool:
                reply = await pool.submit(gate)
                await reply.wait()
        assert scope.cancelled_caught
        assert reply.state is JobState.CANCELLED
        assert limiter.statistics().tasks_waiting == 0
        limiter.release()
        assert limiter.borrowed_tokens == 0


# lease ------------------------------


async def lease_and_wait(pool, gate):
    async with pool.lease() as worker:
        return await worker.process(gate)


async def test_lease_in_a_cancelled_scope_takes_no_worker(setting, autojump_clock):
    async with setting.open() as pool:
        for busy in (0, 2):
            async with all_busy(pool, busy):
                entered = False
                with trio.CancelScope() as scope:
                    scope.cancel()
                    async with pool.lease():
                        entered = True
                assert scope.cancelled_caught
                assert not entered
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


async def test_lease_cancelled_while_it_waits_for_a_worker(setting, autojump_clock):
    gate = Gate()
    async with setting.open() as pool:
        async with trio.open_nursery() as nursery, all_busy(pool):
            call = Call(nursery, lease_and_wait, pool, gate)
            await wait_all_tasks_blocked()
            after = Call(nursery, lease_and_wait, pool, next_job)
            await wait_all_tasks_blocked()
            await call.cancel()
            assert call.cancelled
            assert not after.ended
        assert after.value == "the next job"
        await setting.ask_the_facts(pool)
    assert gate.started == 0
    setting.ask_the_end(pool)


async def test_lease_cancelled_in_the_tick_in_which_it_is_asked_for(
    setting, autojump_clock
):
    gate = Gate()
    async with setting.open() as pool:
        async with trio.open_nursery() as nursery:
            call = await call_and_cancel_in_the_same_tick(
                nursery, lease_and_wait, pool, gate
            )
            assert call.cancelled
        await setting.ask_the_facts(pool)
    assert gate.started == 0
    setting.ask_the_end(pool)


async def test_lease_cancelled_in_the_tick_in_which_its_worker_is_free(
    setting, autojump_clock
):
    async with setting.open(1) as pool:
        async with trio.open_nursery() as nursery:
            gate = Gate()
            before = Call(nursery, pool.process, gate)
            await wait_all_tasks_blocked()
            call = Call(nursery, lease_and_wait, pool, Gate())
            after = Call(nursery, pool.process, next_job)
            await wait_all_tasks_blocked()
            gate.open.set()
            call.scope.cancel()
            await wait_all_tasks_blocked()
            assert (before.value, after.value) == ("through", "the next job")
            assert call.cancelled
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


async def test_a_job_of_a_lease_cancelled_while_it_runs(setting, autojump_clock):
    gate = Gate()
    async with setting.open() as pool:
        async with pool.lease() as worker:
            with trio.move_on_after(0.25) as scope:
                await worker.process(gate)
            assert scope.cancelled_caught
            assert gate.cancelled == 1
            # The lease goes on with the same worker.
            assert await worker.process(next_job) == "the next job"
            setting.ask_the_books(pool)
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


async def test_a_job_of_a_lease_cancelled_returns_when_the_handler_has_ended(
    setting, autojump_clock
):
    gate = ShieldedGate()
    async with setting.open() as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, lease_and_wait, pool, gate)
            await wait_all_tasks_blocked()
            await call.cancel()
            assert not call.ended
            gate.open.set()
            await wait_all_tasks_blocked()
            assert call.cancelled
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


async def test_a_job_of_a_lease_cancelled_before_it_starts(setting, autojump_clock):
    gate = Gate()
    async with setting.open() as pool:
        async with pool.lease() as worker:
            async with trio.open_nursery() as nursery:
                call = await call_and_cancel_in_the_same_tick(
                    nursery, worker.process, gate
                )
                assert call.cancelled
            assert await worker.process(next_job) == "the next job"
        await setting.ask_the_facts(pool)
    assert gate.started <= 1
    setting.ask_the_end(pool)


async def test_a_job_of_a_lease_in_a_cancelled_scope_never_starts(
    setting, autojump_clock
):
    gate = Gate()
    async with setting.open() as pool:
        async with pool.lease() as worker:
            with trio.CancelScope() as scope:
                scope.cancel()
                await worker.process(gate)
            assert scope.cancelled_caught
            assert await worker.process(next_job) == "the next job"
        await setting.ask_the_facts(pool)
    assert gate.started == 0
    setting.ask_the_end(pool)


async def test_a_job_of_a_lease_cancelled_while_it_waits_for_its_turn(
    setting, autojump_clock
):
    gate, waits = Gate(), Gate()
    async with setting.open() as pool:
        async with pool.lease() as worker, trio.open_nursery() as nursery:
            first = Call(nursery, worker.process, gate)
            await wait_all_tasks_blocked()
            accepted = pool.statistics().accepted
            call = Call(nursery, worker.process, waits)
            after = Call(nursery, worker.process, next_job)
            await wait_all_tasks_blocked()
            await call.cancel()
            assert call.cancelled
            assert pool.statistics().accepted == accepted
            gate.open.set()
            await wait_all_tasks_blocked()
            assert (first.value, after.value) == ("through", "the next job")
        await setting.ask_the_facts(pool)
    assert waits.started == 0
    setting.ask_the_end(pool)


@pytest.mark.parametrize("guard", ["rate", "limiter"])
async def test_a_job_of_a_lease_cancelled_while_it_waits_for_a_token(
    guard, autojump_clock
):
    setting, gate, limiter = Setting("plain"), Gate(), trio.CapacityLimiter(1)
    options = {"limiter": limiter} if guard == "limiter" else {"rate": Rate(1)}
    async with setting.open(**options) as pool:
        async with pool.lease() as worker:
            assert await worker.process(next_job) == "the next job"
            if guard == "limiter":
                await limiter.acquire()
            accepted = pool.statistics().accepted
            with trio.move_on_after(0.5) as scope:
                await worker.process(gate)
            assert scope.cancelled_caught
            assert pool.statistics().accepted == accepted
            if guard == "limiter":
                limiter.release()
            with trio.fail_after(5):
                assert await worker.process(next_job) == "the next job"
        await setting.ask_the_facts(pool, limiter)
    assert gate.started == 0
    assert limiter.borrowed_tokens == 0
    setting.ask_the_end(pool)


async def test_a_lease_needs_no_token_of_the_limiter_until_it_runs_a_job(
    autojump_clock,
):
    """Only an attempt that runs holds one; else a holder could wait for itself."""
    setting, limiter = Setting("plain"), trio.CapacityLimiter(1)
    async with setting.open(limiter=limiter) as pool:
        async with limiter:
            with trio.fail_after(5):
                async with pool.lease():
                    pass
        await setting.ask_the_facts(pool, limiter)


async def test_a_block_of_a_lease_that_is_cancelled_gives_the_worker_back(
    setting, autojump_clock
):
    async with setting.open(1) as pool:
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(1) as scope:
                async with pool.lease():
                    waits = Call(nursery, pool.process, next_job)
                    await trio.sleep_forever()
            assert scope.cancelled_caught
            await wait_all_tasks_blocked()
            assert waits.value == "the next job"
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


@pytest.mark.parametrize("stage", ["waiting", "idle", "running", "turn"])
async def test_a_lease_is_ended_by_the_cancel_of_the_pool(
    setting, stage, autojump_clock
):
    async def use():
        async with pool.lease() as worker:
            if stage == "idle":
                await trio.sleep(1)
                await worker.process(next_job)
            elif stage == "turn":
                async with trio.open_nursery() as inner:
                    inner.start_soon(worker.process, Gate())
                    inner.start_soon(worker.process, Gate())
            else:
                await worker.process(Gate())

    async with setting.open(1) as pool:
        async with trio.open_nursery() as nursery:
            if stage == "waiting":
                blocks = Call(nursery, pool.process, Gate())
                await wait_all_tasks_blocked()
            call = Call(nursery, use)
            await wait_all_tasks_blocked()
            pool.cancel()
            with trio.fail_after(50):
                await call.over.wait()
            error = call.error
            if isinstance(error, ExceptionGroup):
                kinds = {type(inner) for inner in error.exceptions}
                assert kinds <= {JobCancelled, PoolClosed}
            else:
                assert isinstance(error, (JobCancelled, PoolClosed))
            if stage == "waiting":
                await blocks.over.wait()
                assert isinstance(blocks.error, JobCancelled)
    setting.ask_the_end(pool)


# events, drains ------------------------------


async def test_a_cancelled_read_of_events_takes_none(setting, autojump_clock):
    async with setting.open() as pool:
        async with pool.events() as events:
            with trio.move_on_after(0.25) as scope:
                await anext(events)
            assert scope.cancelled_caught
            async with trio.open_nursery() as nursery:
                call = Call(nursery, anext, events)
                await wait_all_tasks_blocked()
                await call.cancel()
                assert call.cancelled
            await pool.process(next_job)
            with trio.CancelScope() as scope:
                scope.cancel()
                await anext(events)
            assert scope.cancelled_caught
            kinds = [(await anext(events)).kind for _ in range(3)]
            assert kinds == ["job_queue", "job_start", "job_complete"]
            assert events.lost == 0
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


async def test_a_read_of_events_cancelled_in_the_tick_of_an_event_keeps_it(
    setting, autojump_clock
):
    async with setting.open() as pool:
        async with pool.events() as events, trio.open_nursery() as nursery:
            call = Call(nursery, anext, events)
            await wait_all_tasks_blocked()
            reply = pool.submit_nowait(next_job)
            call.scope.cancel()
            await reply.wait()
            await wait_all_tasks_blocked()
            got = [] if call.value is None else [call.value.kind]
            got += [(await anext(events)).kind for _ in range(3 - len(got))]
            assert got == ["job_queue", "job_start", "job_complete"]
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


async def test_events_opened_in_a_cancelled_scope_leave_nothing_open(
    setting, autojump_clock
):
    async with setting.open() as pool:
        entered = False
        with trio.CancelScope() as scope:
            scope.cancel()
            async with pool.events():
                entered = True
        assert scope.cancelled_caught
        assert not entered
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


async def test_a_cancelled_reader_of_a_drain_loses_no_result(setting, autojump_clock):
    drain = Drain()
    async with setting.open() as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, anext, drain)
            await wait_all_tasks_blocked()
            await call.cancel()
            assert call.cancelled
            await (await pool.submit(next_job, drain=drain)).wait()
            assert drain.count == 1
            late = Call(nursery, anext, drain)
            await wait_all_tasks_blocked()
            assert late.value == "the next job"
        await setting.ask_the_facts(pool)
    assert (drain.count, drain.total) == (0, 1)
    setting.ask_the_end(pool)


async def test_a_reader_cancelled_as_its_result_is_sent_has_it_or_leaves_it(
    setting, autojump_clock
):
    drain, gate = Drain(), Gate()
    async with setting.open() as pool:
        async with trio.open_nursery() as nursery:
            reply = await pool.submit(gate, drain=drain)
            call = Call(nursery, anext, drain)
            await wait_all_tasks_blocked()

            class CancelAtTheAnswer(trio.abc.Instrument):
                def after_task_step(self, task):
                    if drain.total:
                        call.scope.cancel()

            instrument = CancelAtTheAnswer()
            trio.lowlevel.add_instrument(instrument)
            gate.open.set()
            assert await reply.wait() == "through"
            await wait_all_tasks_blocked()
            trio.lowlevel.remove_instrument(instrument)
            assert [call.value, *drain.collect()] == ["through"]
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


# submit_batch and go ------------------------------


@pytest.mark.parametrize("max_backlog", [0, 1])
async def test_submit_batch_cancelled_while_it_waits_for_room_cancels_what_it_gave_in(
    setting, max_backlog, autojump_clock
):
    gates = [Gate() for _ in range(5)]
    async with setting.open(max_backlog=max_backlog) as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, pool.submit_batch, gates)
            await wait_all_tasks_blocked()
            assert pool.statistics().accepted == 2 + max_backlog
            await call.cancel()
            assert call.cancelled
        assert [gate.started for gate in gates] == [1, 1, 0, 0, 0]
        assert [gate.cancelled for gate in gates] == [1, 1, 0, 0, 0]
        assert pool.statistics().cancelled == 2 + max_backlog
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


async def test_submit_batch_cancelled_between_two_items_cancels_what_it_gave_in(
    setting, autojump_clock
):
    gates = [Gate() for _ in range(5)]
    async with setting.open() as pool:
        async with trio.open_nursery() as nursery:
            call = await call_and_cancel_in_the_same_tick(
                nursery, pool.submit_batch, gates
            )
            assert call.cancelled
        assert sum(gate.started for gate in gates) == sum(g.cancelled for g in gates)
        await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


@pytest.mark.parametrize("call_name", ["submit_batch", "go"])
async def test_in_a_cancelled_scope_nothing_is_given_in(call_name, autojump_clock):
    async with open_pool(2) as pool:
        for count in (0, 3):
            with trio.CancelScope() as scope:
                scope.cancel()
                if call_name == "go":
                    await pool.go(*[Task(next_job)] * count)
                else:
                    await pool.submit_batch(run, [next_job] * count)
            assert scope.cancelled_caught
        assert pool.statistics().accepted == 0
        assert await pool.process(next_job) == "the next job"


async def test_go_cancelled_while_it_waits_for_room_cancels_what_it_gave_in(
    autojump_clock,
):
    running, delayed, waiting = Gate(), Gate(), Gate()
    drain = Drain()
    async with open_pool(1, max_backlog=1) as pool:
        async with trio.open_nursery() as nursery:
            call = Call(
                nursery,
                pool.go,
                Task(running.__call__).with_id("running").drain_to(drain),
                Task(delayed.__call__).with_delay(50).with_id("delayed"),
                Task(waiting.__call__).with_id("waiting").with_key("k"),
            )
            await wait_all_tasks_blocked()
            books = pool.statistics()
            assert (books.accepted, books.running, books.delayed) == (2, 1, 1)
            await call.cancel()
            assert call.cancelled
        assert (running.cancelled, delayed.started, waiting.started) == (1, 0, 0)
        books = pool.statistics()
        assert (books.accepted, books.cancelled) == (2, 2)
        # Ids and keys are free again.
        for name in ("running", "delayed", "waiting"):
            (reply,) = await pool.go(Task(next_job).with_id(name).with_key("k"))
            assert await reply.wait() == "the next job"
    assert drain.total == 0
    assert trio.current_time() == 0


# A worker that is not ready ------------------------------


class Readiness:
    """A handler that takes jobs only when it is let."""

    def __init__(self):
        self.calls = self.cancelled = 0
        self.open = trio.Event()
        self.open.set()

    async def ready(self):
        self.calls += 1
        try:
            await self.open.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise

    async def __call__(self, job):
        return await job()


class TestReady:
    async def test_process_cancelled_while_the_worker_gets_ready_never_starts(
        self, autojump_clock
    ):
        setting, handler, gate = Setting("plain"), Readiness(), Gate()
        async with open_pool(1, handler) as pool:
            await wait_all_tasks_blocked()
            handler.open = trio.Event()
            await pool.process(next_job)
            async with trio.open_nursery() as nursery:
                call = Call(nursery, pool.process, gate)
                await wait_all_tasks_blocked()
                assert pool.statistics().queued == 1
                await call.cancel()
                assert call.cancelled
                # That the job has gone does not reach the worker's own wait.
                assert handler.cancelled == 0
            handler.open.set()
            await setting.ask_the_facts(pool)
        assert gate.started == 0

    @pytest.mark.parametrize("how", ["cancel", "shutdown", "leave", "resize"])
    async def test_a_worker_that_gets_ready_is_interrupted_to_leave(
        self, how, autojump_clock
    ):
        handler = Readiness()
        with trio.fail_after(5):
            async with open_pool(1, handler) as pool:
                await wait_all_tasks_blocked()
                handler.open = trio.Event()
                await pool.process(next_job)
                await wait_all_tasks_blocked()
                if how == "cancel":
                    pool.cancel()
                elif how == "shutdown":
                    await pool.shutdown()
                elif how == "resize":
                    await pool.resize(0)
                    assert pool.statistics().workers == 0
        assert handler.cancelled == 1
        assert trio.current_time() == 0
        assert pool.statistics().restarts == 0

    async def test_a_job_that_waits_for_readiness_is_cancelled_with_the_block(
        self, autojump_clock
    ):
        handler, gate = Readiness(), Gate()
        with trio.move_on_after(1) as scope:
            async with open_pool(1, handler) as pool:
                await wait_all_tasks_blocked()
                handler.open = trio.Event()
                await pool.process(next_job)
                reply = await pool.submit(gate)
                await reply.wait()
        assert scope.cancelled_caught
        assert (reply.state, gate.started) == (JobState.CANCELLED, 0)
        assert handler.cancelled == 1

    async def test_a_delayed_job_waits_for_readiness_too_and_may_be_cancelled(
        self, autojump_clock
    ):
        setting, handler, job = Setting("plain"), Readiness(), Failing()
        async with open_pool(1, handler, retry=SOON) as pool:
            await wait_all_tasks_blocked()
            handler.open = trio.Event()
            reply = await pool.submit(job)
            await trio.sleep(1)
            assert reply.state is JobState.QUEUED
            assert reply.cancel()
            handler.open.set()
            with pytest.raises(JobCancelled):
                await reply.wait()
            await setting.ask_the_facts(pool)
        assert job.starts == 1


# shutdown and join while jobs are delayed ------------------------------


@pytest.mark.parametrize("method", ["join", "shutdown"])
async def test_a_cancelled_wait_for_delayed_jobs_leaves_them_delayed(
    setting, method, autojump_clock
):
    async with setting.open() as pool:
        retried = await pool.submit(Failing(1), retry=SOON)
        delayed = await pool.submit(next_job, delay=1.5)
        with trio.move_on_after(0.125) as scope:
            await getattr(pool, method)()
        assert scope.cancelled_caught
        assert pool.statistics().delayed == 2
        assert await retried.wait() == "tried"
        assert await delayed.wait() == "the next job"
        if method == "join":
            await setting.ask_the_facts(pool)
    setting.ask_the_end(pool)


async def test_a_block_cancelled_with_everyone_inside_leaves_nothing(
    setting, autojump_clock
):
    with trio.move_on_after(1) as scope:
        async with setting.open(max_backlog=2, retry=LATER) as pool:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.process, Failing())
                nursery.start_soon(lambda: pool.submit(Gate(), delay=50, key="k"))
                nursery.start_soon(lambda: pool.process(Gate(), key="k"))
                nursery.start_soon(lease_and_wait, pool, Gate())
                nursery.start_soon(pool.submit_batch, [Gate() for _ in range(9)])
                nursery.start_soon(pool.map, [Failing(), Gate(), Failing()])
                nursery.start_soon(pool.join)
                async with pool.events() as events:
                    async for _ in events:
                        pass
    assert scope.cancelled_caught
    assert trio.current_time() == 1
    setting.ask_the_end(pool)


# Every new public async method is a checkpoint, whether it has to wait or not.


class TestCheckpoints:
    @pytest.mark.parametrize(
        "options", [{"retry": SOON}, {"key": "k"}, {"timeout": 5}, {"priority": 1}]
    )
    async def test_of_process_with_terms(self, setting, options, autojump_clock):
        async with setting.open() as pool:
            with assert_checkpoints():
                await pool.process(next_job, **options)

    @pytest.mark.parametrize(
        "options", [{"delay": 1}, {"ttl": 1}, {"key": "k"}, {"id": "x"}]
    )
    async def test_of_submit_with_terms(self, setting, options, autojump_clock):
        async with setting.open() as pool:
            with assert_checkpoints():
                await pool.submit(next_job, **options)

    @pytest.mark.parametrize("count", [0, 1, 5])
    async def test_of_submit_batch_and_go(self, count, autojump_clock):
        async with open_pool(2) as pool:
            with assert_checkpoints():
                await pool.submit_batch(run, [next_job] * count)
            with assert_checkpoints():
                await pool.go(*[Task(next_job)] * count)

    async def test_of_a_lease_and_its_jobs(self, setting, autojump_clock):
        async with setting.open() as pool:
            lease = pool.lease()
            with assert_checkpoints():
                worker = await lease.__aenter__()
            with assert_checkpoints():
                await worker.process(next_job)
            await lease.__aexit__(None, None, None)
            with assert_checkpoints(), pytest.raises(trio.ClosedResourceError):
                await worker.process(next_job)

    async def test_of_reading_events(self, setting, autojump_clock):
        async with setting.open() as pool:
            stream = pool.events()
            with assert_checkpoints():
                events = await stream.__aenter__()
            await pool.process(next_job)
            for _ in range(3):
                with assert_checkpoints():
                    await anext(events)
            await stream.__aexit__(None, None, None)


@pytest.mark.parametrize("ticks", range(6))
async def test_a_job_withdrawn_from_a_worker_that_was_roused_makes_way_for_the_next(
    ticks,
):
    marked = ContextVar("marked")
    async with open_pool(1, run) as pool:
        pool.pause()
        # The worker gives way once, to run in the context of the job.
        marked.set(True)
        first = pool.submit_nowait(next_job)
        await wait_all_tasks_blocked()
        pool.resume()
        for _ in range(ticks):
            await trio.lowlevel.checkpoint()
        first.cancel()
        with trio.fail_after(5):
            assert await pool.submit_nowait(next_job).wait() == "the next job"


@pytest.mark.parametrize("options", [{}, {"ttl": 5}, {"key": "k"}])
async def test_the_worker_of_a_job_withdrawn_at_once_is_handed_the_next(options):
    async with open_pool(1, run) as pool:
        for _ in range(2):
            await wait_all_tasks_blocked()
            first = pool.submit_nowait(next_job, **options)
            assert first.cancel()
            second = pool.submit_nowait(next_job, **options)
            assert pool.statistics().running == 1
            with trio.fail_after(5):
                assert await second.wait() == "the next job"
