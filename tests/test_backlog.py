"""What waits: the bound, the order, what overflows, and what leaving costs."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import trio
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from trio.testing import wait_all_tasks_blocked

from trio_pool import (
    BacklogFull,
    JobCancelled,
    JobDropped,
    JobState,
    PoolError,
    Rate,
    open_pool,
)
from trio_pool._backlog import Keys, Line
from trio_pool._job import Job, new_job, new_terms


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


async def test_jobs_that_others_have_passed_start_in_the_order_in_which_they_came():
    """Their keys have held them up; they start in their order all the same."""
    doors = Doors()
    doors.open("free")
    async with open_pool(3, doors) as pool:
        for key in "ab":
            await pool.submit(f"{key}1", key=key)
        pool.pause()
        for key in "ab":
            await pool.submit(f"{key}2", key=key)
        await pool.submit("free")
        pool.resume()
        await wait_all_tasks_blocked()
        assert doors.order[2:] == ["free"]
        pool.pause()
        for name in ("a1", "b1"):
            doors.open(name)
            await wait_all_tasks_blocked()
        await pool.resize(1)
        doors.open()
        pool.resume()
    assert doors.order[3:] == ["a2", "b2"]


async def test_drop_oldest_finds_the_oldest_among_jobs_that_others_have_passed():
    doors = Doors()
    doors.open("free")
    async with open_pool(3, doors, max_backlog=3, overflow="drop_oldest") as pool:
        for key in "ab":
            await pool.submit(f"{key}1", key=key)
        pool.pause()
        oldest = await pool.submit("a2", key="a")
        younger = await pool.submit("b2", key="b", priority=5)
        await pool.submit("free", priority=-1)
        pool.resume()
        await wait_all_tasks_blocked()
        assert doors.order[2:] == ["free"]
        pool.pause()
        for name in ("fits", "one too many"):
            await pool.submit(name)
        assert (oldest.state, younger.state) == (JobState.DROPPED, JobState.QUEUED)
        doors.open()
        pool.resume()


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


async def test_a_job_with_terms_finds_an_idle_worker_though_another_has_been_called():
    """The one that was called comes for the first job, and not for both."""
    doors = Doors()
    async with open_pool(2, doors) as pool:
        pool.pause()
        pool.submit_nowait("first")
        pool.resume()
        pool.submit_nowait("second", id="of its own")
        await wait_all_tasks_blocked()
        assert pool.statistics().running == 2
        doors.open()


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


async def take_a_second(name):
    await trio.sleep(1)
    return name


async def take_no_time(name):
    return name


async def nearly_endless(pool):
    await pool.map(range(100_000))
    raise AssertionError("the batch has ended before the caller's job")


@pytest.mark.parametrize("options", [{}, {"aging": 5.0}, {"rate": Rate(1000, per=1)}])
@pytest.mark.parametrize("handler", [take_a_second, take_no_time])
@pytest.mark.parametrize("size", [1, 2])
async def test_a_caller_that_waits_for_room_is_not_kept_out_by_an_endless_batch(
    size, handler, options, autojump_clock
):
    async with open_pool(size, handler, max_backlog=0, **options) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nearly_endless, pool)
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            with trio.fail_after(3.5):
                assert await pool.process("caller") == "caller"
            nursery.cancel_scope.cancel()


async def test_callers_that_wait_for_room_take_turns_with_a_batch():
    order = []

    async def handler(name):
        order.append(name)
        await trio.lowlevel.checkpoint()

    async with open_pool(1, handler, max_backlog=0) as pool:
        async with trio.open_nursery() as nursery:
            pool.pause()
            await keep_order(nursery, pool.map, range(4))
            await keep_order(nursery, pool.process, "a", "b", "c")
            pool.resume()
    letters = [name for name in order if isinstance(name, str)]
    numbers = [name for name in order if isinstance(name, int)]
    assert (letters, numbers) == (["a", "b", "c"], [0, 1, 2, 3])
    # One of each by turns, whichever is first.
    kinds = [type(name) for name in order]
    assert kinds[:-1] in ([str, int] * 3, [int, str] * 3)


@pytest.mark.parametrize(
    ("aging", "priority", "first"),
    [(math.inf, 0, "item"), (math.inf, 1, "caller"), (5.0, 0, "caller")],
)
async def test_a_caller_that_waits_for_room_passes_no_batch_of_higher_priority(
    aging, priority, first, autojump_clock
):
    """With aging it does so once it has waited for long enough."""
    ends = []

    async def handler(name):
        await trio.sleep(1)
        if name in {"caller", 19}:
            ends.append("caller" if name == "caller" else "item")

    async with open_pool(1, handler, max_backlog=0, aging=aging) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(pool.map, range(20), priority=1))
            await wait_all_tasks_blocked()
            await pool.process("caller", priority=priority)
    assert ends[0] == first


async def test_callers_that_wait_for_room_take_turns_with_leases():
    order = []
    doors = Doors()

    async def lease(number):
        async with pool.lease():
            order.append(number)

    async with open_pool(1, doors, max_backlog=0) as pool:
        pool.submit_nowait("running")
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(lease, number)
            await wait_all_tasks_blocked()
            await keep_order(nursery, pool.process, "caller")
            doors.open("running")
            await wait_all_tasks_blocked()
            assert len(order) < 2
            assert doors.order == ["running", "caller"]
            doors.open()
    assert sorted(order) == [0, 1, 2]


@pytest.mark.parametrize(
    ("job", "source", "may"),
    [
        # Priority and since when it waits, at 20 seconds with 5 for each priority.
        ((0, 15.0), (0, 20.0), True),
        ((0, 15.0), (1, 20.0), True),
        ((0, 16.0), (1, 20.0), False),
        ((1, 20.0), (2, 20.0), False),
        ((2, 20.0), (1, 20.0), True),
        ((1, 20.0), (0, 16.0), True),
        ((1, 20.0), (0, 14.0), False),
    ],
)
def test_who_waits_for_room_may_precede_a_source_once_aged_enough(job, source, may):
    line = Line(aging=5.0)
    waiting, first = (
        SimpleNamespace(priority=priority, queued_at=since)
        for priority, since in (job, source)
    )
    assert line.may_precede(waiting, first) is may


async def test_priorities_far_apart_still_age_one_by_one(autojump_clock):
    order = []

    async def handler(name):
        order.append(name)
        await trio.sleep(1)

    async with open_pool(1, handler, aging=1.0) as pool:
        pool.submit_nowait("running")
        pool.submit_nowait("old", priority=1_000)
        await trio.sleep(0.5)
        pool.submit_nowait("young", priority=1_001)
    assert order == ["running", "young", "old"]


async def test_a_caller_is_not_kept_out_where_what_waits_may_not_run(autojump_clock):
    async with open_pool(1, take_a_second, max_backlog=1) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nearly_endless, pool)
            later = await pool.submit("later", delay=100)
            with trio.fail_after(3.5):
                assert await pool.process("caller") == "caller"
            assert await later.wait() == "later"
            nursery.cancel_scope.cancel()


async def test_a_caller_does_not_pass_those_in_line_as_a_batch_goes_on(autojump_clock):
    async with open_pool(1, take_a_second, max_backlog=1) as pool:
        order = []

        async def process(name):
            order.append(await pool.process(name))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(nearly_endless, pool)
            await trio.sleep(0.5)
            for name in "abcdef":
                nursery.start_soon(process, name)
                await wait_all_tasks_blocked(0.01)
            await trio.sleep(20)
            nursery.cancel_scope.cancel()
        assert order == list("abcdef")


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

    # Nor on when the garbage collector runs, which calls back into Python.
    gc.collect()
    gc.disable()
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield steps
    finally:
        sys.settrace(before)
        gc.enable()


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


# The line itself, without a loop ------------------------------------------------


def make_job(number, priority=0, queued_at=0.0):
    job = new_job(
        SimpleNamespace(plain_terms=new_terms(None)),
        number,
        f"input {number}",
        None,
        math.inf,
    )
    job.priority = priority
    job.queued_at = queued_at
    return job


class Batch:
    """Something to pull jobs from."""

    pulled = 0

    def __init__(self, priority=0, queued_at=0.0):
        self.priority = priority
        self.queued_at = queued_at
        self.waiting = False
        self.hungry = True


def fill(line, *jobs, held=()):
    for job in jobs:
        line.push(job, held=job in held)


def take_all(line):
    return list(iter(line.pop, None))


def test_an_empty_line_has_nothing_for_anyone():
    line = Line()
    assert line.pop() is line.shift() is line.oldest() is line.oldest_since() is None
    assert (line.count, line.ready, line.sources) == (0, 0, 0)
    assert line.jobs() == []
    assert not line.has_work()


def test_a_held_job_is_passed_and_keeps_its_place_until_then():
    line = Line()
    first, held, last = (make_job(n) for n in range(3))
    fill(line, first, held, last, held=[held])
    assert (line.count, line.ready) == (3, 2)
    assert line.jobs() == [first, held, last]
    assert line.pop() is first
    # Nobody has passed it yet, so that it is still before the last.
    line.release(held)
    assert take_all(line) == [held, last]


def test_a_held_job_that_was_passed_is_the_first_when_it_is_released():
    line = Line()
    held, passer, late = (make_job(n) for n in range(3))
    fill(line, held, passer, late, held=[held])
    assert line.pop() is passer
    assert (line.count, line.ready) == (2, 1)
    line.release(held)
    assert (line.count, line.ready) == (2, 2)
    assert take_all(line) == [held, late]


def test_a_held_job_is_never_given_out_though_it_is_all_there_is():
    line = Line()
    held = [make_job(n, priority=n) for n in range(3)]
    fill(line, *held, held=held)
    assert line.pop() is line.pop() is None
    assert (line.count, line.ready) == (3, 0)
    assert line.has_work()
    for job in held:
        line.release(job)
    assert take_all(line) == held[::-1]


def test_releasing_what_is_not_held_changes_nothing():
    line = Line()
    plain, later, stranger = (make_job(n) for n in range(3))
    fill(line, plain)
    line.put_off(later)
    for job in (plain, later, stranger):
        line.release(job)
    assert (line.count, line.ready) == (2, 1)
    assert take_all(line) == [plain]


def test_passed_jobs_come_first_in_their_order_however_they_are_released():
    """However they were released: of equal priority first come is first served."""
    line = Line()
    held = [make_job(n, queued_at=float(n)) for n in range(3)]
    passer = make_job(3, queued_at=3.0)
    fill(line, *held, passer, held=held)
    assert line.pop() is passer
    for job in held:
        line.release(job)
    assert take_all(line) == held


def test_a_job_put_off_is_in_no_queue_and_counts():
    line = Line()
    job = make_job(0)
    line.put_off(job)
    assert (line.count, line.ready) == (1, 0)
    assert line.pop() is None
    assert line.has_work()
    assert line.jobs() == [job]
    assert line.discard(job)
    assert not line.discard(job)
    assert line.count == 0


def test_a_job_that_is_put_back_is_the_first_of_its_priority():
    line = Line()
    low, first, high, last = (
        make_job(n, priority=p) for n, p in enumerate([-1, 0, 5, 0])
    )
    fill(line, low, first, high, last)
    assert [line.pop(), line.pop()] == [high, first]
    line.push_front(first)
    assert take_all(line) == [first, last, low]


def test_what_was_known_of_a_priority_before_jobs_were_put_back_is_forgotten():
    line = Line(aging=1.0)
    first, second, third, fourth = (
        make_job(n, 1, queued_at=float(n)) for n in range(4)
    )
    last = make_job(9, 0, queued_at=9.0)
    fill(line, first, second, third, fourth, last)
    assert [line.pop(), line.pop(), line.pop()] == [first, second, third]
    for job in (third, second, first):
        line.push_front(job)
    assert take_all(line) == [first, second, third, fourth, last]


def test_with_aging_one_that_is_put_back_is_before_younger_ones_of_any_priority():
    line = Line(aging=1.0)
    old, young = make_job(0, 0, queued_at=0.0), make_job(1, 0, queued_at=10.0)
    urgent = [make_job(n, 1, queued_at=float(n)) for n in (5, 6)]
    fill(line, old, young, *urgent)
    assert [line.pop(), line.pop()] == [old, urgent[0]]
    line.push_front(old)
    assert take_all(line) == [old, urgent[1], young]


@pytest.mark.parametrize("held", [False, True])
def test_leaving_is_said_once_wherever_the_job_was(held):
    line = Line()
    job, other = make_job(0), make_job(1)
    fill(line, job, other, held=[job] if held else [])
    assert line.discard(job)
    assert not line.discard(job)
    assert line.jobs() == take_all(line) == [other]
    assert not line.discard(other)


def test_a_passed_job_can_leave_too():
    line = Line()
    held, passer = make_job(0), make_job(1)
    fill(line, held, passer, held=[held])
    assert line.pop() is passer
    assert line.discard(held)
    line.release(held)
    assert line.count == 0
    assert line.pop() is None


def test_a_source_stands_behind_those_of_its_priority_each_time():
    line = Line()
    source, job, late = Batch(), make_job(0), make_job(1)
    fill(line, job)
    line.push_source(source)
    line.push_source(source)
    fill(line, late)
    assert line.sources == 1
    given = [line.pop(now=n) for n in range(5)]
    assert given == [job, source, late, source, source]
    assert source.queued_at == 4
    assert line.count == 0


def test_a_source_that_has_nothing_to_give_leaves_when_it_is_met():
    line = Line()
    source, low = Batch(priority=5), make_job(0)
    fill(line, low)
    line.push_source(source)
    source.hungry = False
    assert line.has_work()
    assert line.pop() is low
    assert (line.sources, source.waiting) == (0, False)
    assert not line.has_work()
    source.hungry = True
    line.push_source(source)
    assert line.has_work()
    assert line.pop() is source


def test_two_sources_of_one_priority_take_turns():
    line = Line()
    one, other = Batch(), Batch()
    line.push_source(one)
    line.push_source(other)
    assert [line.pop() for _ in range(4)] == [one, other, one, other]


def test_the_oldest_is_found_in_every_place_where_jobs_wait():
    line = Line()
    high = make_job(0, priority=5, queued_at=4.0)
    held = make_job(1, queued_at=3.0)
    passer = make_job(2, queued_at=3.5)
    later = make_job(3, queued_at=2.0)
    low = make_job(4, priority=-5, queued_at=1.0)
    fill(line, high, held, passer, low, held=[held])
    line.put_off(later)
    assert [line.pop(), line.pop()] == [high, passer]
    for job in (low, later, held):
        assert line.oldest() is job
        assert line.oldest_since() == job.queued_at
        assert line.discard(job)
    assert line.oldest() is None


def test_the_oldest_is_found_among_those_that_were_passed_whatever_their_priority():
    line = Line()
    low = make_job(0, queued_at=0.0)
    high = make_job(1, priority=5, queued_at=1.0)
    passer = make_job(2, priority=-5, queued_at=2.0)
    fill(line, low, high, passer, held=[low, high])
    # It meets the higher one first, and passes both.
    assert line.pop() is passer
    assert line.oldest() is low
    assert line.oldest_since() == 0.0


def test_a_look_at_the_oldest_changes_nothing():
    line = Line()
    gone, left = make_job(0, queued_at=1.0), make_job(1, queued_at=2.0)
    fill(line, gone, left)
    assert line.discard(gone)
    assert line.oldest_since() == line.oldest_since() == 2.0
    assert take_all(line) == [left]


def test_a_look_at_the_oldest_leaves_sources_where_they_are():
    """Or a batch would get no worker any more as others were dropped."""
    line = Line()
    first, job, last = Batch(), make_job(0), Batch()
    line.push_source(first)
    fill(line, job)
    line.push_source(last)
    assert line.oldest() is line.oldest() is job
    assert line.sources == 2
    assert [line.pop() for _ in range(4)] == [first, job, last, first]


def test_a_look_since_when_the_oldest_waits_costs_the_same_in_a_long_line():
    def steps_with(many):
        line = Line()
        fill(line, *(make_job(n, queued_at=float(n)) for n in range(many)))
        with counted_steps() as steps:
            assert line.oldest_since() == 0.0
        return steps[0]

    assert steps_with(1_000) == steps_with(10)


def test_the_top_is_the_highest_level_that_has_not_run_out():
    line = Line()
    jobs = [make_job(n, priority=p) for n, p in enumerate([7, 1, 0, -1])]
    fill(line, *jobs)
    for job in jobs[:3]:
        assert list(line.lower_top()) == [job]
        assert line.pop() is job
    # Whoever wants one that is lower than most has to ask for it.
    assert line.lower_top() is line.top is line.plain
    assert take_all(line) == jobs[3:]


def test_the_levels_of_a_stopped_line_stay_until_all_have_left():
    line = Line()
    fill(line, high := make_job(0, priority=7), low := make_job(1))
    line.stop()
    assert not line.lower_top()
    assert leave_all(line) == [high, low]


def test_shift_takes_the_first_be_it_held_or_not():
    line = Line()
    low, held, high = (make_job(n, priority=p) for n, p in enumerate([0, 1, 1]))
    fill(line, low, held, high, held=[held])
    assert [line.shift() for _ in range(4)] == [held, high, low, None]
    assert line.count == 0


def test_shift_takes_the_highest_of_those_that_were_passed():
    line = Line()
    low, plain = make_job(0, priority=-1), make_job(1, priority=-2)
    fill(line, low, plain, held=[low])
    assert line.pop() is plain
    high, other = make_job(2, priority=1), make_job(3, priority=-2)
    fill(line, high, other, held=[high])
    assert line.pop() is other
    middle = make_job(4)
    fill(line, middle)
    assert [line.shift() for _ in range(4)] == [high, middle, low, None]


@pytest.mark.parametrize("held", [False, True])
def test_what_shift_has_taken_is_in_line_no_more(held):
    line = Line()
    job, other = make_job(0), make_job(1)
    fill(line, job, other, held=[job] if held else [])
    assert line.shift() is job
    assert not line.discard(job)
    assert (line.count, line.ready) == (1, 1)
    assert line.jobs() == [other]


def test_shift_counts_waiting_as_priority_too():
    line = Line(aging=2.0)
    old = make_job(0, queued_at=0.0)
    young = make_job(1, priority=1, queued_at=1.5)
    late = make_job(2, priority=1, queued_at=2.5)
    fill(line, old, young, late)
    assert [line.shift() for _ in range(4)] == [young, old, late, None]


def test_aging_counts_waiting_as_priority():
    line = Line(aging=2.0)
    old = make_job(0, queued_at=0.0)
    young = make_job(1, priority=1, queued_at=1.5)
    late = make_job(2, priority=1, queued_at=2.5)
    lowest = make_job(3, priority=-1, queued_at=0.25)
    fill(line, old, young, late, lowest)
    assert [line.pop(2.5) for _ in range(5)] == [young, old, late, lowest, None]


def test_of_those_that_count_the_same_by_aging_the_higher_priority_is_first():
    line = Line(aging=2.0)
    low, high = make_job(0, queued_at=0.0), make_job(1, priority=1, queued_at=2.0)
    fill(line, low, high)
    assert take_all(line) == [high, low]


def test_a_source_ages_too_and_is_young_again_when_it_has_given():
    line = Line(aging=2.0)
    source = Batch(queued_at=0.0)
    line.push_source(source)
    jobs = [make_job(n, priority=1, queued_at=3.0) for n in range(2)]
    fill(line, *jobs)
    assert [line.pop(4.0) for _ in range(3)] == [source, *jobs]


def leave_all(line):
    """Let all leave a stopped line, one by one."""
    jobs = []
    for job in iter(line.leftover, None):
        jobs.append(job)
        assert line.discard(job)
    return jobs


def test_a_stopped_line_gives_nothing_out_and_names_all_that_is_left():
    line = Line()
    plain, held, passed, high = (make_job(n, priority=n // 3) for n in range(4))
    fill(line, passed, passer := make_job(7), high, held=[passed])
    assert [line.pop(), line.pop()] == [high, passer]
    fill(line, plain, held, lower := make_job(5, priority=-1), held=[held])
    later, source = make_job(6), Batch(priority=2)
    line.put_off(later)
    line.push_source(source)
    line.stop()
    assert (line.count, line.ready, line.sources) == (5, 0, 0)
    assert line.has_work()
    assert not line.top
    assert not line.plain
    line.release(held)
    assert line.pop() is None
    assert line.leftover() is line.leftover() is plain
    assert line.discard(lower)
    assert leave_all(line) == [plain, held, passed, later]
    assert line.count == 0
    assert not source.waiting
    assert not line.has_work()
    assert line.leftover() is line.pop() is line.oldest_since() is None


def jobs_of_many_priorities(many):
    return [make_job(n, n * 7919 % many - many // 2, float(n)) for n in range(many)]


def drop_the_oldest(line):
    assert line.discard(line.oldest())


@pytest.mark.parametrize("aging", [math.inf, 1.0])
@pytest.mark.parametrize("take", [Line.pop, Line.shift, drop_the_oldest])
def test_taking_one_of_4_000_priorities_takes_few_steps(take, aging):
    """Sixteen times as many are looked through in a few steps more for each."""

    def steps_with(many):
        line = Line(aging)
        fill(line, *jobs_of_many_priorities(many))
        take(line)
        with counted_steps() as steps:
            for _ in range(200):
                take(line)
        return steps[0]

    assert steps_with(4_000) < 1.5 * steps_with(250)


@pytest.mark.parametrize("aging", [math.inf, 1.0])
def test_releasing_one_of_4_000_that_were_passed_takes_few_steps(aging):
    def steps_with(many):
        line = Line(aging)
        held = [make_job(n, queued_at=float(n)) for n in range(many)]
        fill(line, *held, passer := make_job(many, queued_at=9e9), held=held)
        assert line.pop() is passer
        with counted_steps() as steps:
            for job in held:
                line.release(job)
            assert take_all(line) == held
        return steps[0]

    assert steps_with(4_000) < 20 * steps_with(250)


def test_one_that_is_back_comes_after_one_that_was_put_back_and_is_older():
    line = Line()
    older, held, passer = (make_job(n, 1, queued_at=float(n)) for n in range(3))
    fill(line, older, held, passer, held=[held])
    assert [line.pop(), line.pop()] == [older, passer]
    line.push_front(passer)
    line.push_front(older)
    line.release(held)
    assert line.jobs() == [older, held, passer]
    assert not line.top
    assert take_all(line) == [older, held, passer]


def test_one_that_is_back_can_leave_and_the_next_comes_first():
    line = Line()
    held = [make_job(n, 1, queued_at=float(n)) for n in range(3)]
    passer, late = (make_job(n, 1, queued_at=float(n)) for n in (3, 4))
    fill(line, *held, passer, late, held=held)
    assert line.pop() is passer
    for job in held:
        line.release(job)
    assert line.discard(held[0])
    assert line.oldest() is held[1]
    assert line.oldest_since() == 1.0
    assert take_all(line) == [held[1], held[2], late]
    assert line.top is line.plain


def some_that_are_back(line, many):
    """Fill a line with jobs that were passed and may run again."""
    held = [make_job(n, 1, queued_at=float(n)) for n in range(many)]
    passer = make_job(many, 1, queued_at=float(many))
    fill(line, *held, passer, held=held)
    assert line.pop() is passer
    for job in held:
        line.release(job)
    return held


def test_those_that_are_back_are_left_over_in_a_stopped_line_too():
    line = Line()
    back = some_that_are_back(line, 3)
    fill(line, late := make_job(9, 1, queued_at=9.0), low := make_job(10))
    assert line.discard(back[1])
    line.stop()
    assert leave_all(line) == [back[0], back[2], late, low]
    assert line.count == 0


def test_shift_takes_those_that_are_back_in_their_turn():
    line = Line()
    back = some_that_are_back(line, 2)
    fill(line, late := make_job(9, 1, queued_at=9.0))
    assert [line.shift() for _ in range(4)] == [*back, late, None]


@pytest.mark.parametrize("take", [Line.pop, Line.shift])
def test_one_that_was_back_and_taken_is_not_taken_again_when_it_waits_elsewhere(take):
    """As one does that has got in, and fails and is put off."""
    room, line = Line(), Line()
    first, second = some_that_are_back(room, 2)
    assert take(room) is first
    fill(line, first)
    assert (room.count, line.count) == (1, 1)
    assert take(room) is second
    assert take(room) is None
    assert take_all(line) == [first]


def test_those_that_are_back_keep_their_order_however_many_of_them_leave():
    line = Line()
    held = [make_job(n, 1, queued_at=float(n)) for n in range(400)]
    passer = make_job(400, 1, queued_at=400.0)
    fill(line, *held, passer, held=held)
    assert line.pop() is passer
    for n in range(400):
        # As mixed as a heap can be.
        line.release(held[n * 7919 % 400])
    gone = {n for n in range(400) if n * 4421 % 13 > 3}
    for n in gone:
        assert line.discard(held[n])
    assert take_all(line) == [job for n, job in enumerate(held) if n not in gone]


@pytest.mark.parametrize("take", [Line.pop, Line.shift, Line.oldest])
def test_who_is_left_of_many_priorities_is_found_when_most_have_left(take):
    line = Line(aging=1.0)
    jobs = [make_job(n, n % 3, queued_at=float(n)) for n in range(300)]
    fill(line, *jobs)
    # What ranks them is set up before they leave.
    assert line.oldest() is jobs[0]
    fill(line, first := make_job(300, 1000, queued_at=0.0))
    assert line.shift() is first
    for job in jobs[:-3]:
        assert line.discard(job)
    left = []
    for _ in range(3):
        job = take(line)
        assert job is not None
        line.discard(job)
        left.append(job)
    assert sorted(left, key=lambda job: job.id) == jobs[-3:]
    assert line.count == 0


def test_nothing_is_kept_of_those_that_were_back_and_left():
    line = Line()
    back = some_that_are_back(line, 200)
    for job in back[:-1]:
        assert line.discard(job)
    assert line.pop() is back[-1]
    back = some_that_are_back(line, 200)
    for job in back:
        assert line.discard(job)
    assert line.count == 0
    assert line.top is line.plain


def test_nothing_is_kept_of_those_that_left():
    """Or a long-lived line of jobs that all leave would grow for ever."""
    line = Line()
    held = make_job(-1)
    line.push(held, held=True)
    for n in range(2_000):
        job = make_job(n, priority=n % 2)
        line.push(job, held=n % 3 == 0)
        assert line.discard(job)
    assert len(line.plain) + len(line.top) < 200
    assert line.jobs() == [held]


class LineBesideAList(RuleBasedStateMachine):
    """Beside one list of all that is in line, in the order in which it came."""

    aging = math.inf

    @initialize()
    def open(self):
        self.line = Line(self.aging)
        self.entries = []
        self.since = {}
        self.held = set()
        self.delayed = []
        self.sources = []
        self.taken = []
        self.was_put_back = False
        self.numbers = itertools.count()
        self.arrivals = {}
        self.now = 0.0

    # The model.

    def tick(self):
        """Let a moment pass, lest two come at the same time."""
        self.now += 2.0**-10

    def arrive(self, entry):
        self.arrivals[entry] = next(self.numbers)
        self.since[entry] = self.now
        self.entries.append(entry)

    def order(self, entry):
        """Higher priority first, then first come; waiting makes up for priority."""
        priority, arrival = entry.priority, self.arrivals[entry]
        if self.aging == math.inf:
            return (-priority, arrival)
        return (self.since[entry] - priority * self.aging, -priority, arrival)

    def jobs(self):
        return [entry for entry in self.entries if isinstance(entry, Job)]

    def ready(self):
        ready = [job for job in self.jobs() if job not in self.held]
        return sorted(ready, key=lambda job: (-job.priority, self.arrivals[job]))

    def waiting(self):
        return self.jobs() + self.delayed

    def take_first(self):
        """Do what `pop` does, but for dropping sources that have no more to give."""
        able = self.ready() + [
            source for source in self.sources_in_line() if source.hungry
        ]
        entry = min(able, key=self.order, default=None)
        if entry is not None:
            self.entries.remove(entry)
            if isinstance(entry, Job):
                self.taken.append(entry)
            else:
                self.arrive(entry)
        return entry

    def sources_in_line(self):
        return [entry for entry in self.entries if not isinstance(entry, Job)]

    # What happens.

    def make(self, priority):
        self.tick()
        return make_job(next(self.numbers), priority, self.now)

    def pick(self, some, at):
        return some[at % len(some)]

    def push_job(self, job, held):
        self.line.push(job, held=held)
        self.arrive(job)
        if held:
            self.held.add(job)

    @rule(seconds=st.integers(1, 8))
    def pass_time(self, seconds):
        self.now += seconds / 4

    @rule(priority=st.integers(-2, 2), held=st.booleans())
    def push(self, priority, held):
        self.push_job(self.make(priority), held)

    @rule()
    def push_as_the_quick_way_does(self):
        job = self.make(0)
        job.waiting = True
        self.line.count += 1
        self.line.plain.append(job)
        self.arrive(job)

    @rule(priority=st.integers(-2, 2))
    def put_off(self, priority):
        job = self.make(priority)
        self.line.put_off(job)
        self.delayed.append(job)

    @precondition(lambda self: self.delayed)
    @rule(at=st.integers(0, 20), held=st.booleans())
    def its_time_has_come(self, at, held):
        job = self.pick(self.delayed, at)
        assert self.line.discard(job)
        self.delayed.remove(job)
        self.tick()
        job.queued_at = self.now
        self.push_job(job, held)

    @precondition(lambda self: self.taken)
    @rule(at=st.integers(0, 20))
    def try_again_later(self, at):
        job = self.pick(self.taken, at)
        self.taken.remove(job)
        # It begins to wait anew.
        self.tick()
        job.queued_at = self.now
        self.line.put_off(job)
        self.delayed.append(job)

    def may_be_put_back(self):
        """Say whether the last one taken was before all those of its priority."""
        return self.taken and all(
            self.arrivals[entry] > self.arrivals[self.taken[-1]]
            for entry in self.entries
            if entry.priority == self.taken[-1].priority
        )

    @precondition(may_be_put_back)
    @rule()
    def put_back(self):
        job = self.taken.pop()
        self.was_put_back = True
        self.line.push_front(job)
        self.entries.append(job)

    @precondition(lambda self: self.held)
    @rule(at=st.integers(0, 20))
    def release(self, at):
        job = self.pick(sorted(self.held, key=self.arrivals.get), at)
        self.line.release(job)
        self.held.remove(job)

    @precondition(lambda self: self.waiting())
    @rule(at=st.integers(0, 50))
    def discard(self, at):
        job = self.pick(self.waiting(), at)
        assert self.line.discard(job)
        assert not self.line.discard(job)
        self.line.release(job)
        (self.delayed if job in self.delayed else self.entries).remove(job)
        self.held.discard(job)

    @precondition(lambda self: self.taken)
    @rule(at=st.integers(0, 50))
    def discard_what_was_taken(self, at):
        assert not self.line.discard(self.pick(self.taken, at))

    @rule(priority=st.integers(-2, 2))
    def open_a_source(self, priority):
        source = Batch(priority)
        self.sources.append(source)
        self.offer(source)

    def offer(self, source):
        if source not in self.entries:
            self.tick()
            source.queued_at = self.now
            self.arrive(source)
        self.line.push_source(source)

    @precondition(lambda self: self.sources)
    @rule(at=st.integers(0, 20), hungry=st.booleans())
    def feed(self, at, hungry):
        source = self.pick(self.sources, at)
        source.hungry = hungry
        if hungry:
            self.offer(source)

    @rule()
    def pop(self):
        self.tick()
        taken = self.line.pop(self.now)
        assert taken is self.take_first()
        if isinstance(taken, Job):
            assert not taken.waiting
        # Sources that it met and that have nothing more to give have left.
        for source in self.sources_in_line():
            if not source.waiting:
                assert not source.hungry
                self.entries.remove(source)

    @precondition(lambda self: self.aging == math.inf)
    @rule()
    def pop_as_the_quick_way_does(self):
        top = self.line.top
        if top and isinstance(top[0], Job) and top[0].waiting:
            job = top.popleft()
            job.waiting = False
            self.line.count -= 1
            assert job is self.take_first()

    # Callers that wait for room are taken like this: no source is among them,
    # and nobody is put back.
    @precondition(lambda self: not (self.sources_in_line() or self.was_put_back))
    @rule()
    def shift(self):
        first = min(self.jobs(), key=self.order, default=None)
        assert self.line.shift() is first
        if first is not None:
            self.entries.remove(first)
            self.held.discard(first)
            self.taken.append(first)

    @rule()
    def look_for_the_oldest(self):
        oldest = self.line.oldest()
        since = min((job.queued_at for job in self.waiting()), default=None)
        assert (None if oldest is None else oldest.queued_at) == since
        assert oldest is None or oldest in self.waiting()

    @precondition(lambda self: len(self.waiting()) > 8)
    @rule()
    def stop(self):
        waiting = self.waiting()
        listed = self.line.jobs()
        self.line.stop()
        assert self.line.pop(self.now) is None
        assert self.line.count == len(waiting)
        assert leave_all(self.line) == listed
        assert not any(entry.waiting for entry in (*waiting, *self.sources))
        assert self.line.count == self.line.ready == self.line.sources == 0
        self.line = Line(self.aging)
        for place in (self.entries, self.held, self.delayed, self.taken):
            place.clear()

    # What is always so.

    @invariant()
    def all_are_counted(self):
        assert self.line.count == len(self.waiting())
        assert self.line.ready == len(self.ready())
        assert self.line.sources == len(self.sources_in_line())

    @invariant()
    def all_are_listed_and_those_that_may_run_in_order(self):
        listed = self.line.jobs()
        assert len(listed) == len(self.waiting())
        assert set(listed) == set(self.waiting())
        ready = set(self.ready())
        assert [job for job in listed if job in ready] == self.ready()

    @invariant()
    def all_know_that_they_wait(self):
        assert all(job.waiting for job in self.ready())
        waiting = [source for source in self.sources if source.waiting]
        assert set(waiting) == set(self.sources_in_line())

    @invariant()
    def work_is_seen(self):
        hungry = any(source.hungry for source in self.sources_in_line())
        assert self.line.has_work() == (hungry or bool(self.waiting()))

    @invariant()
    def it_is_known_since_when_the_oldest_waits(self):
        since = min((job.queued_at for job in self.waiting()), default=None)
        assert self.line.oldest_since() == since


class AgingLineBesideAList(LineBesideAList):
    aging = 0.5


TestLine = LineBesideAList.TestCase
TestAgingLine = AgingLineBesideAList.TestCase


# Keys -----------------------------------------------------------------------


def test_the_jobs_of_a_key_come_one_after_the_other():
    keys = Keys()
    first, second, third = (make_job(n) for n in range(3))
    assert keys.enter("page", first)
    assert not keys.enter("page", second)
    assert not keys.enter("page", third)
    assert [keys.is_first("page", job) for job in (first, second)] == [True, False]
    assert keys.leave("page", first) is second
    assert keys.is_first("page", second)
    assert keys.leave("page", second) is third
    assert keys.leave("page", third) is None
    # Nothing is left of the key, the next one begins anew.
    assert keys.enter("page", first)


def test_who_leaves_from_the_middle_of_a_key_lets_nobody_run():
    keys = Keys()
    first, second, third = (make_job(n) for n in range(3))
    for job in (first, second, third):
        keys.enter("page", job)
    assert keys.leave("page", second) is None
    assert keys.is_first("page", first)
    assert keys.leave("page", first) is third


def test_other_keys_do_not_matter():
    keys = Keys()
    one, other = make_job(0), make_job(1)
    assert keys.enter(("page", 1), one)
    assert keys.enter(("page", 2), other)
    assert keys.leave(("page", 1), one) is None
    assert keys.is_first(("page", 2), other)


class KeysBesideLists(RuleBasedStateMachine):
    """Beside one list of all jobs, in their order, each with its key."""

    @initialize()
    def open(self):
        self.keys = Keys()
        self.entered = []
        self.numbers = itertools.count()

    def of(self, key):
        return [job for its_key, job in self.entered if its_key == key]

    @rule(key=st.sampled_from(["a", "b", 0, False, (1, 2)]))
    def enter(self, key):
        job = make_job(next(self.numbers))
        assert self.keys.enter(key, job) is (not self.of(key))
        self.entered.append((key, job))

    @precondition(lambda self: self.entered)
    @rule(at=st.integers(0, 30))
    def leave(self, at):
        key, job = self.entered[at % len(self.entered)]
        was_first = self.of(key)[0] is job
        self.entered.remove((key, job))
        follower = self.of(key)[0] if was_first and self.of(key) else None
        assert self.keys.leave(key, job) is follower

    @invariant()
    def one_of_each_key_is_first(self):
        for key, job in self.entered:
            assert self.keys.is_first(key, job) is (self.of(key)[0] is job)


TestKeys = KeysBesideLists.TestCase
