"""What waits: the bound, the order, what overflows, and what leaving costs."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_pool import (
    BacklogFull,
    JobCancelled,
    JobDropped,
    JobState,
    PoolError,
    open_pool,
)


class Doors:
    """A handler whose jobs wait at doors, and that notes the order of starts."""

    def __init__(self):
        self.order = []
        self.most = self.running = 0
        self.opened = set()
        self.knock = trio.Event()

    async def __call__(self, name):
        self.order.append(name)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            while name not in self.opened and "all" not in self.opened:
                await self.knock.wait()
        finally:
            self.running -= 1
        return name

    def open(self, name="all"):
        self.opened.add(name)
        knock, self.knock = self.knock, trio.Event()
        knock.set()


async def keep_order(nursery, method, *jobs, **options):
    """Start a caller for each job, surely one after the other."""
    for job in jobs:
        nursery.start_soon(call, method, job, options)
        await wait_all_tasks_blocked()


async def call(method, job, options):
    await method(job, **options)


# The bound ----------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("overflow", ["wait", "reject"])
async def test_exactly_as_many_jobs_wait_as_the_bound_says(size, bound, overflow):
    doors = Doors()
    async with open_pool(size, doors, max_backlog=bound, overflow=overflow) as pool:
        replies = [pool.submit_nowait(n) for n in range(size + bound)]
        for _ in range(2):
            with pytest.raises(BacklogFull) as caught:
                pool.submit_nowait("one too many")
            assert caught.value.max_backlog == bound
            assert caught.value.pool == pool.name
            assert caught.value.started is False
        count = pool.statistics()
        assert (count.running, count.queued) == (size, bound)
        assert count.accepted == size + bound
        states = [reply.state for reply in replies]
        assert states == [JobState.RUNNING] * size + [JobState.QUEUED] * bound
        await wait_all_tasks_blocked()
        assert pool.statistics().queued == bound
        # As soon as one leaves the backlog there is room for one, not for two.
        if bound:
            assert replies[-1].cancel()
            pool.submit_nowait("fits")
            with pytest.raises(BacklogFull):
                pool.submit_nowait("one too many")
        doors.open()
    assert "one too many" not in doors.order


async def test_an_unbounded_backlog_takes_everything():
    doors = Doors()
    async with open_pool(1, doors, max_backlog=math.inf) as pool:
        replies = [pool.submit_nowait(n) for n in range(2_000)]
        assert pool.statistics().queued == 1_999
        doors.open()
        assert await replies[-1].wait() == 1_999
    assert doors.order == list(range(2_000))


async def test_no_room_is_a_would_block_and_a_pool_error():
    async with open_pool(0, Doors(), max_backlog=0) as pool:
        with pytest.raises(trio.WouldBlock):
            pool.submit_nowait("job")
        with pytest.raises(PoolError):
            pool.submit_nowait("job")


async def test_a_paused_pool_keeps_the_bound():
    """Idle workers of a paused pool take nothing, so that everything waits."""
    doors = Doors()
    async with open_pool(3, doors, max_backlog=2) as pool:
        pool.pause()
        for name in range(2):
            pool.submit_nowait(name)
        with pytest.raises(BacklogFull):
            pool.submit_nowait("one too many")
        await wait_all_tasks_blocked()
        assert doors.order == []
        doors.open()
        pool.resume()
    assert sorted(doors.order) == [0, 1]


@pytest.mark.parametrize("bound", [0, 1, 3])
async def test_many_callers_never_get_past_the_bound(bound):
    async def handler(item):
        seen.append(pool.statistics())
        await trio.lowlevel.checkpoint()
        seen.append(pool.statistics())

    seen = []
    async with open_pool(2, handler, max_backlog=bound) as pool:
        async with trio.open_nursery() as nursery:
            for n in range(30):
                nursery.start_soon([pool.process, pool.submit][n % 2], n)
        await pool.join()
    assert len(seen) == 60
    assert max(count.queued for count in seen) <= bound
    assert max(count.running for count in seen) == 2
    assert pool.statistics().done == 30


async def test_without_a_backlog_jobs_run_one_after_the_other_all_the_same():
    doors = Doors()
    doors.open()
    async with open_pool(1, doors, max_backlog=0) as pool:
        async with trio.open_nursery() as nursery:
            for n in range(10):
                nursery.start_soon(pool.process, n)
    assert sorted(doors.order) == list(range(10))
    assert doors.most == 1


# reject ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["process", "submit"])
async def test_reject_refuses_at_once_what_wait_would_let_wait(method):
    doors = Doors()
    async with open_pool(1, doors, max_backlog=1, overflow="reject") as pool:
        replies = [await pool.submit(n) for n in range(2)]
        with pytest.raises(BacklogFull) as caught:
            await getattr(pool, method)("refused")
        assert caught.value.started is False
        assert pool.statistics().accepted == 2
        doors.open()
        assert [await reply.wait() for reply in replies] == [0, 1]
        # There is room again, so that the same job is welcome.
        assert await pool.process("refused") == "refused"


# drop_oldest -------------------------------------------------------------


async def test_drop_oldest_ends_the_job_that_was_accepted_first():
    doors = Doors()
    async with open_pool(1, doors, max_backlog=2, overflow="drop_oldest") as pool:
        replies = [await pool.submit(n) for n in range(5)]
        states = [reply.state for reply in replies]
        assert states == [
            JobState.RUNNING,
            JobState.DROPPED,
            JobState.DROPPED,
            JobState.QUEUED,
            JobState.QUEUED,
        ]
        assert pool.statistics().dropped == 2
        for reply in replies[1:3]:
            with pytest.raises(JobDropped) as caught:
                await reply.wait()
            error = caught.value
            assert (error.job_id, error.started) == (reply.id, False)
            assert (error.attempts, error.worker) == (0, None)
        doors.open()
    assert doors.order == [0, 3, 4]
    # A dropped job never ran: leaving the block raises nothing for it.
    assert pool.statistics().done == 3


async def test_drop_oldest_looks_at_age_and_not_at_priority():
    doors = Doors()
    async with open_pool(1, doors, max_backlog=2, overflow="drop_oldest") as pool:
        await pool.submit("running")
        oldest = await pool.submit("oldest", priority=5)
        younger = await pool.submit("younger", priority=-5)
        newest = await pool.submit("newest", priority=0)
        states = [reply.state for reply in (oldest, younger, newest)]
        assert states == [JobState.DROPPED, JobState.QUEUED, JobState.QUEUED]
        doors.open()
    assert doors.order == ["running", "newest", "younger"]


async def test_drop_oldest_passes_over_jobs_that_have_left():
    doors = Doors()
    async with open_pool(1, doors, max_backlog=3, overflow="drop_oldest") as pool:
        replies = [await pool.submit(n) for n in range(4)]
        assert replies[1].cancel()
        replies.append(await pool.submit(4))
        assert pool.statistics().dropped == 0
        replies.append(await pool.submit(5))
        assert replies[1].state is JobState.CANCELLED
        assert replies[2].state is JobState.DROPPED
        doors.open()
    assert doors.order == [0, 3, 4, 5]


async def test_drop_oldest_without_any_room_drops_the_new_job_itself():
    doors = Doors()
    async with open_pool(1, doors, max_backlog=0, overflow="drop_oldest") as pool:
        running = await pool.submit("running")
        for reply in (await pool.submit("new"), pool.submit_nowait("new")):
            assert reply.state is JobState.DROPPED
            with pytest.raises(JobDropped) as caught:
                await reply.wait()
            assert caught.value.started is False
        with pytest.raises(JobDropped) as caught:
            await pool.process("new")
        assert caught.value.started is False
        assert pool.statistics().dropped == 3
        assert pool.statistics().accepted == 4
        doors.open()
        assert await running.wait() == "running"
    assert doors.order == ["running"]


async def test_the_caller_of_a_dropped_job_hears_of_it_at_once():
    doors, heard = Doors(), []

    async def caller():
        with pytest.raises(JobDropped) as caught:
            await pool.process("old")
        heard.append(caught.value)

    async with open_pool(1, doors, max_backlog=1, overflow="drop_oldest") as pool:
        await pool.submit("running")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(caller)
            await wait_all_tasks_blocked()
            pool.submit_nowait("new")
            await wait_all_tasks_blocked()
            assert len(heard) == 1
        doors.open()
    assert doors.order == ["running", "new"]


async def test_drop_oldest_never_touches_a_running_job():
    doors = Doors()
    async with open_pool(2, doors, max_backlog=1, overflow="drop_oldest") as pool:
        running = [await pool.submit(n) for n in range(2)]
        for n in range(10):
            await pool.submit(f"waiting {n}")
        await wait_all_tasks_blocked()
        assert [reply.state for reply in running] == [JobState.RUNNING] * 2
        assert pool.statistics().dropped == 9
        doors.open()
        assert [await reply.wait() for reply in running] == [0, 1]
    assert doors.order[2:] == ["waiting 9"]


# The order ---------------------------------------------------------------


async def test_of_equal_priority_first_come_is_first_served():
    doors = Doors()
    doors.open()
    async with open_pool(1, doors) as pool:
        pool.pause()
        for n in range(20):
            await pool.submit(n)
        pool.resume()
    assert doors.order == list(range(20))


async def test_the_highest_priority_leaves_first_and_equals_keep_their_order():
    doors = Doors()
    doors.open()
    jobs = [(n, (n * 7) % 5 - 2) for n in range(40)]
    async with open_pool(1, doors) as pool:
        pool.pause()
        for n, priority in jobs:
            await pool.submit(n, priority=priority)
        pool.resume()
    assert doors.order == [n for n, _ in sorted(jobs, key=lambda job: -job[1])]


async def test_priorities_are_any_ints():
    doors = Doors()
    doors.open()
    async with open_pool(1, doors) as pool:
        pool.pause()
        for priority in (0, 10**30, -(10**30), 1, -1):
            await pool.submit(priority, priority=priority)
        pool.resume()
    assert doors.order == [10**30, 1, 0, -1, -(10**30)]


@pytest.mark.parametrize("priority", [1.5, "1", None, True, False, 0.0])
@pytest.mark.parametrize("method", ["process", "submit", "submit_nowait", "map"])
async def test_a_priority_that_is_no_int_is_refused(method, priority):
    doors = Doors()
    doors.open()
    async with open_pool(1, doors) as pool:
        with pytest.raises(TypeError, match="priority"):
            result = getattr(pool, method)("x", priority=priority)
            await result
        assert pool.statistics().accepted == 0


async def test_a_late_job_of_high_priority_overtakes_and_interrupts_nothing():
    doors = Doors()
    async with open_pool(1, doors) as pool:
        running = await pool.submit("running")
        await pool.submit("early", priority=0)
        await pool.submit("late", priority=9)
        await wait_all_tasks_blocked()
        assert running.state is JobState.RUNNING
        doors.open()
    assert doors.order == ["running", "late", "early"]


# Callers that wait for room -------------------------------------------------


@pytest.mark.parametrize("method", ["process", "submit"])
async def test_callers_that_wait_for_room_get_in_in_their_order(method):
    doors = Doors()
    async with open_pool(1, doors, max_backlog=1) as pool:
        async with trio.open_nursery() as nursery:
            await keep_order(nursery, getattr(pool, method), *range(8))
            count = pool.statistics()
            assert (count.running, count.queued, count.accepted) == (1, 1, 2)
            doors.open()
    assert doors.order == list(range(8))


@pytest.mark.parametrize("bound", [0, 1, 2])
@pytest.mark.parametrize("method", ["process", "submit"])
async def test_callers_that_wait_for_room_get_in_by_priority_then_order(method, bound):
    doors = Doors()
    async with open_pool(1, doors, max_backlog=bound) as pool:
        call = getattr(pool, method)
        async with trio.open_nursery() as nursery:
            first = [f"first {n}" for n in range(1 + bound)]
            await keep_order(nursery, call, *first, priority=9)
            await keep_order(nursery, call, "low 1", priority=-1)
            await keep_order(nursery, call, "middle 1", "middle 2")
            await keep_order(nursery, call, "high 1", "high 2", priority=5)
            await keep_order(nursery, call, "middle 3")
            assert pool.statistics().accepted == 1 + bound
            doors.open()
    assert doors.order == [
        *first,
        "high 1",
        "high 2",
        "middle 1",
        "middle 2",
        "middle 3",
        "low 1",
    ]


async def test_a_waiting_caller_gets_the_room_before_anyone_who_comes_later():
    doors = Doors()
    async with open_pool(1, doors, max_backlog=1) as pool:
        async with trio.open_nursery() as nursery:
            await pool.submit("running")
            queued = await pool.submit("queued")
            await keep_order(nursery, pool.process, "waiting")
            assert queued.cancel()
            # The same step has let the waiting caller in.
            with pytest.raises(BacklogFull):
                pool.submit_nowait("late", priority=9)
            doors.open()
    assert doors.order == ["running", "waiting"]


async def test_submit_returns_as_soon_as_there_is_room():
    doors, replies = Doors(), []

    async def submit():
        replies.append(await pool.submit("waiting"))

    async with open_pool(1, doors, max_backlog=1) as pool:
        async with trio.open_nursery() as nursery:
            await pool.submit("running")
            await pool.submit("queued")
            nursery.start_soon(submit)
            await wait_all_tasks_blocked()
            assert not replies
            doors.open("running")
            await wait_all_tasks_blocked()
            assert [reply.state for reply in replies] == [JobState.QUEUED]
            doors.open()
    assert doors.order == ["running", "queued", "waiting"]


async def test_one_that_leaves_lets_exactly_one_in():
    doors = Doors()
    async with open_pool(1, doors, max_backlog=2) as pool:
        async with trio.open_nursery() as nursery:
            await pool.submit("running")
            queued = [await pool.submit(n) for n in range(2)]
            await keep_order(nursery, pool.process, "a", "b", "c")
            for number, reply in enumerate(queued, 4):
                assert reply.cancel()
                count = pool.statistics()
                assert (count.queued, count.accepted) == (2, number)
            doors.open()
    assert doors.order == ["running", "a", "b", "c"]


async def test_growing_the_pool_lets_waiting_callers_in():
    doors = Doors()
    async with open_pool(1, doors, max_backlog=1) as pool:
        async with trio.open_nursery() as nursery:
            await keep_order(nursery, pool.process, *range(5))
            assert pool.statistics().accepted == 2
            await pool.resize(3)
            await wait_all_tasks_blocked()
            count = pool.statistics()
            assert (count.running, count.queued, count.accepted) == (3, 1, 4)
            doors.open()
    assert sorted(doors.order) == list(range(5))


@pytest.mark.parametrize("bound", [0, 1])
async def test_a_paused_pool_lets_callers_in_when_it_resumes(bound):
    doors = Doors()
    doors.open()
    async with open_pool(2, doors, max_backlog=bound) as pool:
        pool.pause()
        async with trio.open_nursery() as nursery:
            await keep_order(nursery, pool.process, *range(5))
            assert pool.statistics().accepted == bound
            assert doors.order == []
            pool.resume()
    assert sorted(doors.order) == list(range(5))


async def test_items_of_a_batch_never_count_as_waiting():
    doors = Doors()
    async with open_pool(2, doors, max_backlog=0) as pool:
        results = []

        async def map_them():
            results.extend(await pool.map(range(10)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(map_them)
            await wait_all_tasks_blocked()
            count = pool.statistics()
            assert (count.running, count.queued, count.accepted) == (2, 0, 2)
            doors.open()
    assert results == list(range(10))


async def test_waiting_jobs_and_batches_are_taken_by_priority():
    doors = Doors()
    async with open_pool(1, doors) as pool:
        async with trio.open_nursery() as nursery:
            await pool.submit("running")
            await keep_order(nursery, pool.map, ["low"], priority=-1)
            await keep_order(nursery, pool.map, ["high 1", "high 2"], priority=5)
            await keep_order(nursery, pool.submit, "middle")
            doors.open()
    assert doors.order == ["running", "high 1", "high 2", "middle", "low"]


# Leaving from the middle ------------------------------------------------------


@contextmanager
def counted_steps():
    """Count the lines of Python that run: steps do not depend on the machine."""
    steps = [0]

    def trace(frame, event, arg):
        steps[0] += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield steps
    finally:
        sys.settrace(before)


async def steps_to_leave(backlog, leaving):
    """Cancel jobs in the middle of a paused backlog; say how many steps it takes."""
    doors = Doors()
    doors.open()
    async with open_pool(1, doors, max_backlog=math.inf) as pool:
        pool.pause()
        replies = [pool.submit_nowait(n) for n in range(backlog)]
        middle = backlog // 2
        with counted_steps() as steps:
            for reply in replies[middle : middle + leaving]:
                reply.cancel()
        assert pool.statistics().queued == backlog - leaving
        pool.cancel()
    assert pool.statistics().cancelled == backlog
    return steps[0]


async def test_leaving_from_the_middle_of_100_000_takes_no_more_steps_than_of_100():
    """Slower than most, as 100,000 jobs have to be made first."""
    assert await steps_to_leave(100_000, 20) <= await steps_to_leave(100, 20)


async def test_leaving_costs_the_same_per_job_however_many_leave():
    """What has left is swept away now and then, in proportion to what left."""
    few, many = 250, 2_000
    per_job = await steps_to_leave(2 * few, few) / few
    assert await steps_to_leave(2 * many, many) / many <= 1.5 * per_job


async def test_dropping_the_oldest_costs_the_same_in_a_long_backlog():
    """The oldest is found without a look at all the others."""
    doors = Doors()
    doors.open()

    async def steps_of_drops(bound):
        options = {"max_backlog": bound, "overflow": "drop_oldest"}
        async with open_pool(1, doors, **options) as pool:
            pool.pause()
            for n in range(bound):
                pool.submit_nowait(n)
            with counted_steps() as steps:
                for n in range(20):
                    pool.submit_nowait(n)
            assert pool.statistics().dropped == 20
            pool.cancel()
        return steps[0]

    assert await steps_of_drops(5_000) <= await steps_of_drops(100)


async def test_dropping_the_oldest_does_not_pass_by_those_that_left_again_and_again():
    """Half of the backlog has left; each is passed at most once."""
    doors = Doors()
    doors.open()
    options = {"max_backlog": 2_000, "overflow": "drop_oldest"}
    async with open_pool(1, doors, **options) as pool:
        pool.pause()
        replies = [pool.submit_nowait(n) for n in range(2_000)]
        for reply in replies[1:1_000]:
            reply.cancel()
        for n in range(999):
            pool.submit_nowait(n)
        with counted_steps() as steps:
            for n in range(100):
                pool.submit_nowait(n)
        assert pool.statistics().dropped == 100
        # 100 drops of a few dozen steps, and 999 that are passed by once.
        assert steps[0] < 20_000
        pool.cancel()


async def test_the_jobs_around_one_that_left_keep_their_order():
    doors = Doors()
    doors.open()
    async with open_pool(1, doors, max_backlog=math.inf) as pool:
        pool.pause()
        replies = [pool.submit_nowait(n, priority=n % 3) for n in range(600)]
        gone = {n for n in range(600) if n % 7 in (0, 3, 4)}
        for n in gone:
            assert replies[n].cancel()
        pool.resume()
        await pool.join()
        for n in gone:
            with pytest.raises(JobCancelled):
                await replies[n].wait()
    left = [n for n in range(600) if n not in gone]
    assert doors.order == sorted(left, key=lambda n: -(n % 3))
