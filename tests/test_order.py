"""In which order jobs start, and where: priorities, aging, keys, choose."""

from __future__ import annotations

import gc
import itertools
import math
import random
import weakref
from collections import Counter, defaultdict

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_pool import (
    BacklogFull,
    JobDropped,
    JobExpired,
    JobState,
    JobTimeout,
    Priority,
    Rate,
    Retry,
    WorkerCrashed,
    WorkerState,
    WouldDeadlock,
    open_pool,
)


def recorder(seconds=1.0):
    """Make a handler that takes this long, and the list of what it was called with."""
    starts = []

    async def handler(job_input):
        starts.append(job_input)
        await trio.sleep(seconds)
        return job_input

    return handler, starts


def at_once(number):
    """Be a backoff that waits for nothing."""
    return 0.0


# Priorities ---------------------------------------------------------------


async def test_the_named_priorities_start_from_critical_to_low(autojump_clock):
    handler, starts = recorder()
    async with open_pool(1, handler) as pool:
        pool.submit_nowait("busy")
        for priority in Priority:
            pool.submit_nowait(priority.name, priority=priority)
    assert starts == ["busy", "CRITICAL", "HIGH", "NORMAL", "LOW"]


async def test_a_named_priority_is_the_int_it_stands_for(autojump_clock):
    handler, starts = recorder()
    async with open_pool(1, handler) as pool:
        pool.submit_nowait("busy")
        pool.submit_nowait("a", priority=Priority.HIGH)
        pool.submit_nowait("b", priority=1)
        pool.submit_nowait("c", priority=Priority.NORMAL)
        pool.submit_nowait("d")
        pool.submit_nowait("e", priority=Priority.HIGH)
        pool.submit_nowait("f", priority=3)
        pool.submit_nowait("g", priority=-2)
        pool.submit_nowait("h", priority=Priority.LOW)
    assert starts == ["busy", *"fabecdhg"]


async def test_jobs_without_priority_are_normal(autojump_clock):
    handler, starts = recorder()
    async with open_pool(1, handler) as pool:
        pool.submit_nowait("busy")
        pool.submit_nowait("low", priority=Priority.LOW)
        pool.submit_nowait("plain")
        pool.submit_nowait("normal", priority=Priority.NORMAL)
    assert starts == ["busy", "plain", "normal", "low"]


# Aging --------------------------------------------------------------------


async def feed(pool, name, priority, times, every=1.0):
    """Give in a job each so many seconds, whether the last has ended or not."""
    for number in range(times):
        pool.submit_nowait(f"{name} {number}", priority=priority)
        await trio.sleep(every)


async def test_without_aging_a_low_job_waits_for_as_long_as_higher_ones_come(
    autojump_clock,
):
    handler, starts = recorder()
    async with open_pool(1, handler) as pool:
        pool.submit_nowait("busy")
        pool.submit_nowait("low", priority=Priority.LOW)
        await feed(pool, "high", Priority.HIGH, 20)
    assert starts[-1] == "low"


async def test_with_aging_a_low_job_starts_when_it_has_become_as_urgent(
    autojump_clock,
):
    handler, starts = recorder()
    async with open_pool(1, handler, aging=2.0) as pool:
        pool.submit_nowait("busy")
        pool.submit_nowait("low", priority=Priority.LOW)
        await trio.sleep(0.25)
        # Each comes a little before the worker is free, which is at each full
        # second; so that the one that came at 4.25 is the first to be 2 * 2
        # seconds younger than the low one.
        await feed(pool, "high", Priority.HIGH, 20)
    expected = [f"high {number}" for number in range(20)]
    assert starts == ["busy", *expected[:4], "low", *expected[4:]]


async def test_a_steady_overload_starves_nobody_who_ages(autojump_clock):
    handler, starts = recorder()
    async with open_pool(1, handler, aging=5.0, unobserved="ignore", grace=0) as pool:
        pool.submit_nowait("busy")
        pool.submit_nowait("low", priority=Priority.LOW)
        # Twice as much as one worker can do, all of it more urgent.
        await feed(pool, "critical", Priority.CRITICAL, 100, every=0.5)
        assert "low" in starts


async def test_aging_keeps_the_order_within_a_priority(autojump_clock):
    handler, starts = recorder()
    async with open_pool(1, handler, aging=0.25) as pool:
        pool.submit_nowait("busy")
        for number in range(10):
            pool.submit_nowait(number, priority=1)
            await trio.sleep(0.125)
    assert starts == ["busy", *range(10)]


async def test_jobs_of_one_moment_start_by_priority_however_they_age(autojump_clock):
    handler, starts = recorder()
    async with open_pool(1, handler, aging=0.25) as pool:
        pool.submit_nowait("busy")
        for priority in (0, -1, 2, 1, -3):
            pool.submit_nowait(priority, priority=priority)
    assert starts == ["busy", 2, 1, 0, -1, -3]


async def test_aging_counts_for_callers_that_wait_for_room(autojump_clock):
    """The promise that no job waits for ever holds with a full backlog too."""
    handler, starts = recorder()
    async with open_pool(1, handler, aging=2.0, max_backlog=1) as pool:
        with trio.move_on_after(60.0):
            async with trio.open_nursery() as nursery:

                async def low():
                    await pool.process("low", priority=Priority.LOW)
                    nursery.cancel_scope.cancel()

                async def urgent():
                    while True:
                        await pool.process("high", priority=Priority.HIGH)

                for _ in range(3):
                    nursery.start_soon(urgent)
                await wait_all_tasks_blocked()
                nursery.start_soon(low)
    assert "low" in starts


async def test_a_key_that_is_freed_finds_its_next_job_as_old_as_it_is(autojump_clock):
    """A job does not begin to age only when its key is free."""
    starts = []

    async def handler(job):
        name, seconds = job
        starts.append(name)
        await trio.sleep(seconds)

    async with open_pool(2, handler, aging=1.0) as pool:
        pool.submit_nowait(("first of k", 4.5), key="k")
        pool.submit_nowait(("other", 5.0))
        pool.submit_nowait(("low of k", 1.0), key="k", priority=Priority.LOW)
        await trio.sleep(2.5)
        # It has been waiting for 2.5 seconds: as urgent as this one plus a half.
        pool.submit_nowait(("high", 1.0), priority=Priority.HIGH)
    assert starts[2:] == ["low of k", "high"]


arrivals = st.lists(
    st.tuples(st.integers(0, 8), st.integers(-2, 2)), min_size=1, max_size=14
)


@given(arrivals, st.sampled_from([0.25, 0.5, 1.5, 4.0, math.inf]), st.booleans())
def test_the_order_of_starts_is_that_of_arrival_less_priority_times_aging(
    program, aging, limited
):
    """Whatever comes when: a priority is worth so many seconds, exactly."""
    jobs = []
    wrong = []
    waiting = {}

    def rank(number):
        since, priority = waiting[number]
        return -priority if aging == math.inf else since - priority * aging

    async def handler(number):
        best = min(map(rank, waiting))
        same = [n for n in waiting if waiting[n][1] == waiting[number][1]]
        if rank(number) > best or number != min(same):
            wrong.append((number, dict(waiting)))
        del waiting[number]
        # Never ends at a quarter of a second, which is when others come.
        await trio.sleep(1 + 1 / 64)

    async def main():
        limiter = trio.CapacityLimiter(1) if limited else None
        async with open_pool(1, handler, aging=aging, limiter=limiter) as pool:
            for number, (gap, priority) in enumerate(program):
                await trio.sleep(gap / 4)
                waiting[number] = (trio.current_time(), priority)
                jobs.append(pool.submit_nowait(number, priority=priority))
                # One that finds an idle worker starts before the next comes.
                await wait_all_tasks_blocked()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert not wrong
    assert not waiting


# Keys ---------------------------------------------------------------------


async def test_jobs_of_a_key_run_one_at_a_time_in_their_order(autojump_clock):
    running = most = 0
    starts = []

    async def handler(number):
        nonlocal running, most
        starts.append(number)
        running += 1
        most = max(most, running)
        await trio.sleep(0.25)
        running -= 1

    async with open_pool(4, handler) as pool:
        for number in range(8):
            pool.submit_nowait(number, key="k")
        await pool.join()
        assert trio.current_time() == 2.0
    assert most == 1
    assert starts == list(range(8))


async def test_jobs_of_a_key_keep_their_order_whatever_their_priorities(
    autojump_clock,
):
    handler, starts = recorder(0.25)
    async with open_pool(2, handler) as pool:
        for number, priority in enumerate((0, -1, 2, 1, 0, 2)):
            pool.submit_nowait(number, key="k", priority=priority)
    assert starts == list(range(6))


async def test_other_keys_and_jobs_without_one_are_not_held_up(autojump_clock):
    handler, starts = recorder()
    async with open_pool(3, handler) as pool:
        for number in range(4):
            pool.submit_nowait(("a", number), key="a")
        pool.submit_nowait(("b", 0), key="b")
        pool.submit_nowait("plain")
        await wait_all_tasks_blocked()
        assert set(starts) == {("a", 0), ("b", 0), "plain"}
        await pool.join()
        assert trio.current_time() == 4.0


def name_key(key):
    # The same in each process that collects the test.
    return "object()" if type(key) is object else repr(key)


@pytest.mark.parametrize(
    "key", [0, False, "", (), ("a", 1), frozenset({1}), 1.5, object()], ids=name_key
)
async def test_any_hashable_is_a_key_but_none(key, autojump_clock):
    async with open_pool(2, recorder()[0]) as pool:
        pool.submit_nowait(1, key=key)
        pool.submit_nowait(2, key=key)
        await pool.join()
        assert trio.current_time() == 2.0


async def test_none_is_no_key(autojump_clock):
    async with open_pool(2, recorder()[0]) as pool:
        pool.submit_nowait(1, key=None)
        pool.submit_nowait(2, key=None)
        await pool.join()
        assert trio.current_time() == 1.0


async def test_an_unhashable_key_is_refused_and_nothing_has_happened(autojump_clock):
    async with open_pool(1, recorder()[0]) as pool:
        with pytest.raises(TypeError, match="key must be a hashable"):
            await pool.process(1, key=[])
        with pytest.raises(TypeError, match="key must be a hashable"):
            pool.submit_nowait(1, key={})
        assert pool.statistics().accepted == 0


async def test_keys_are_those_of_one_pool(autojump_clock):
    async with (
        open_pool(1, recorder()[0]) as one,
        open_pool(1, recorder()[0]) as other,
    ):
        one.submit_nowait(1, key="k")
        other.submit_nowait(2, key="k")
        await one.join()
        await other.join()
        assert trio.current_time() == 1.0


async def test_process_with_a_key_waits_for_its_turn(autojump_clock):
    handler, starts = recorder()
    async with open_pool(2, handler) as pool:
        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(
                    lambda name=name: pool.process(name, key="k"), name=name
                )
                await wait_all_tasks_blocked()
        assert trio.current_time() == 3.0
    assert starts == ["a", "b", "c"]


async def test_the_waiting_jobs_of_a_key_are_queued_and_not_delayed(autojump_clock):
    async with open_pool(2, recorder()[0]) as pool:
        replies = [pool.submit_nowait(number, key="k") for number in range(3)]
        await wait_all_tasks_blocked()
        count = pool.statistics()
        assert (count.running, count.queued, count.delayed) == (1, 2, 0)
        assert [reply.state for reply in replies[1:]] == [JobState.QUEUED] * 2


async def test_a_job_that_waits_for_its_retry_keeps_the_place_of_its_key(
    autojump_clock,
):
    starts = []

    async def handler(name):
        starts.append((name, trio.current_time()))
        if starts.count((name, 0.0)) and len(starts) == 1:
            raise OSError(name)
        await trio.sleep(1.0)

    retry = Retry(3, backoff=lambda number: 1.5)
    async with open_pool(2, handler, retry=retry) as pool:
        first = pool.submit_nowait("first", key="k")
        pool.submit_nowait("second", key="k", priority=5)
        await wait_all_tasks_blocked()
        assert first.state is JobState.DELAYED
        pool.submit_nowait("other", key="o")
    assert starts == [("first", 0.0), ("other", 0.0), ("first", 1.5), ("second", 2.5)]


async def test_a_key_goes_on_when_its_first_job_has_given_up(autojump_clock):
    starts = []

    async def handler(name):
        starts.append(name)
        if name == "bad":
            raise OSError(name)

    async with open_pool(2, handler, unobserved="ignore") as pool:
        pool.submit_nowait("bad", key="k", retry=Retry(3, backoff=at_once))
        pool.submit_nowait("good", key="k")
    assert starts == ["bad", "bad", "bad", "good"]


async def test_a_delayed_job_keeps_the_place_of_its_key(autojump_clock):
    handler, starts = recorder()
    async with open_pool(2, handler) as pool:
        pool.submit_nowait("first", key="k", delay=2.5)
        pool.submit_nowait("second", key="k")
        await trio.sleep(1.5)
        assert starts == []
        await pool.join()
        assert trio.current_time() == 4.5
    assert starts == ["first", "second"]


@pytest.mark.parametrize("end", ["timeout", "crash", "error", "cancel"])
async def test_a_key_goes_on_however_its_running_job_ends(end, autojump_clock):
    starts = []

    async def handler(name):
        starts.append(name)
        if name == "first":
            if end == "error":
                raise OSError
            if end == "crash":
                raise SystemExit
            await trio.sleep_forever()

    async with open_pool(1, handler) as pool:
        first = pool.submit_nowait("first", key="k", timeout=1.5)
        second = pool.submit_nowait("second", key="k")
        await wait_all_tasks_blocked()
        if end == "cancel":
            first.cancel()
        kind = {"timeout": JobTimeout, "crash": WorkerCrashed, "error": OSError}
        with pytest.raises(kind.get(end, Exception)):
            await first.wait()
        await second.wait()
    assert starts == ["first", "second"]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("first_is", ["running", "queued", "delayed", "retried"])
async def test_a_key_goes_on_when_one_of_its_jobs_is_cancelled(
    first_is, which, autojump_clock
):
    starts = []
    failing = first_is == "retried"

    async def handler(name):
        nonlocal failing
        starts.append(name)
        if failing and name == 0:
            failing = False
            raise OSError
        await trio.sleep(0.25)

    retry = Retry(2, backoff=lambda number: 1.0)
    async with open_pool(2, handler) as pool:
        if first_is == "queued":
            pool.pause()
        delay = 1.0 if first_is == "delayed" else 0.0
        replies = [pool.submit_nowait(0, key="k", delay=delay, retry=retry)]
        replies += [pool.submit_nowait(number, key="k") for number in (1, 2)]
        await wait_all_tasks_blocked()
        state = {"running": "running", "queued": "queued"}.get(first_is, "delayed")
        assert replies[0].state.value == state
        assert replies[which].cancel()
        await wait_all_tasks_blocked()
        if first_is == "queued":
            pool.resume()
        with trio.fail_after(5.0):
            await pool.join()
        states = [reply.state for reply in replies]
        expected = [JobState.DONE] * 3
        expected[which] = JobState.CANCELLED
        assert states == expected
    seen = [number for number in range(3) if number in starts]
    assert sorted(starts) == starts
    ran_first = {0} if first_is in ("running", "retried") else set()
    assert set(seen) == {0, 1, 2} - {which} | ran_first


async def test_a_caller_of_a_key_that_is_cancelled_gives_its_turn_to_the_next(
    autojump_clock,
):
    handler, starts = recorder()
    scopes = []

    async def call(name):
        with trio.CancelScope() as scope:
            scopes.append(scope)
            await pool.process(name, key="k")

    async with open_pool(2, handler) as pool:
        async with trio.open_nursery() as nursery:
            for name in "abcd":
                nursery.start_soon(call, name)
                await wait_all_tasks_blocked()
            scopes[2].cancel()
            await trio.sleep(0.5)
            scopes[0].cancel()
        # The second starts when the first has really ended.
        assert trio.current_time() == 2.5
    assert starts == ["a", "b", "d"]


async def test_the_next_of_a_key_does_not_start_before_a_cancelled_one_has_unwound(
    autojump_clock,
):
    starts = []

    async def handler(name):
        starts.append((name, trio.current_time()))
        try:
            await trio.sleep(10.0)
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1.5)

    async with open_pool(2, handler, grace=0) as pool:
        first = pool.submit_nowait("first", key="k")
        pool.submit_nowait("second", key="k")
        await trio.sleep(1.0)
        first.cancel()
        await trio.sleep(2.0)
    assert starts == [("first", 0.0), ("second", 2.5)]


@pytest.mark.parametrize("which", [0, 1])
async def test_a_key_goes_on_when_a_waiting_job_of_it_expires(which, autojump_clock):
    handler, starts = recorder()
    async with open_pool(2, handler) as pool:
        pool.pause()
        replies = [
            pool.submit_nowait(
                number, key="k", ttl=0.5 if number == which else math.inf
            )
            for number in range(3)
        ]
        await trio.sleep(1.0)
        pool.resume()
        await pool.join()
        with pytest.raises(JobExpired):
            await replies[which].wait()
    assert starts == [number for number in range(3) if number != which]


async def test_jobs_of_several_keys_that_were_held_start_in_the_order_they_came(
    autojump_clock,
):
    """Being passed by others while held changes no order among equals."""
    handler, starts = recorder()
    async with open_pool(1, handler) as pool:
        first_of_a = pool.submit_nowait("a0", key="a", delay=9.0)
        first_of_b = pool.submit_nowait("b0", key="b", delay=9.0)
        pool.submit_nowait("busy")
        pool.submit_nowait("a1", key="a")
        pool.submit_nowait("b1", key="b")
        # Starts after a second, and passes both.
        pool.submit_nowait("plain")
        await trio.sleep(1.5)
        pool.submit_nowait("later")
        first_of_a.cancel()
        first_of_b.cancel()
    assert starts == ["busy", "plain", "a1", "b1", "later"]


@pytest.mark.parametrize("key", [None, "other"])
async def test_a_backlog_full_of_one_key_holds_up_no_other_job(key, autojump_clock):
    handler, starts = recorder()
    async with open_pool(2, handler, max_backlog=2) as pool:
        for number in range(3):
            pool.submit_nowait(number, key="k")
        with pytest.raises(BacklogFull):
            pool.submit_nowait(3, key="k")
        with trio.fail_after(1.25):
            await pool.process("other", key=key)
        assert starts[:2] == [0, "other"] or starts[:2] == ["other", 0]


@pytest.mark.parametrize("bound", [0, 1, 2])
async def test_callers_that_wait_for_room_behind_their_key_hold_up_no_other_job(
    bound, autojump_clock
):
    """A worker is idle and the job may run: its caller must not wait."""
    handler, _ = recorder(10.0)
    async with (
        open_pool(2, handler, max_backlog=bound) as pool,
        trio.open_nursery() as nursery,
    ):
        for number in range(bound + 2):
            nursery.start_soon(
                lambda number=number: pool.process(number, key="k"), name=number
            )
            await wait_all_tasks_blocked()
        assert pool.statistics().running == 1
        for key in ("other", "another"):
            nursery.start_soon(lambda key=key: pool.process(key, key=key), name=key)
            await wait_all_tasks_blocked()
        assert pool.statistics().running == 2
        nursery.cancel_scope.cancel()


async def test_a_dropped_job_gives_its_place_in_the_key_to_the_next(autojump_clock):
    handler, starts = recorder()
    async with open_pool(1, handler, max_backlog=2, overflow="drop_oldest") as pool:
        replies = [pool.submit_nowait(number, key="k") for number in range(5)]
        await pool.join()
        for dropped in (1, 2):
            with pytest.raises(JobDropped):
                await replies[dropped].wait()
    assert starts == [0, 3, 4]


async def test_dropping_the_delayed_first_of_a_key_lets_the_next_start(autojump_clock):
    handler, starts = recorder()
    async with open_pool(2, handler, max_backlog=2, overflow="drop_oldest") as pool:
        pool.submit_nowait("delayed", key="k", delay=60.0)
        pool.submit_nowait("next", key="k")
        newest = pool.submit_nowait("newest", key="k")
        with trio.fail_after(5.0):
            await newest.wait()
    assert starts == ["next", "newest"]


@pytest.mark.parametrize("method", ["process", "submit", "submit_nowait"])
async def test_a_job_that_is_rejected_takes_no_place_in_its_key(method, autojump_clock):
    handler, starts = recorder()
    async with open_pool(2, handler, max_backlog=1, overflow="reject") as pool:
        pool.submit_nowait(0, key="k")
        pool.submit_nowait(1, key="k")
        for number in range(5):
            with pytest.raises(BacklogFull):
                outcome = getattr(pool, method)(number, key="k")
                if method != "submit_nowait":
                    await outcome
        await trio.sleep(1.5)
        pool.submit_nowait(2, key="k")
        with trio.fail_after(5.0):
            await pool.join()
    assert starts == [0, 1, 2]


async def test_a_call_without_room_in_a_cancelled_scope_takes_no_place_in_its_key(
    autojump_clock,
):
    async with open_pool(1, trio.sleep, max_backlog=0) as pool:
        pool.submit_nowait(1.0)
        with trio.CancelScope() as scope:
            scope.cancel()
            await pool.process(1.0, key="key")
        assert scope.cancelled_caught
        with trio.fail_after(5):
            await pool.process(1.0, key="key")
        assert trio.current_time() == 2.0


async def test_a_key_goes_on_after_a_job_that_would_have_deadlocked(autojump_clock):
    errors = []

    async def handler(depth):
        if depth:
            try:
                await pool.process(depth - 1, key="k")
            except WouldDeadlock as error:
                errors.append(error)

    async with open_pool(2, handler) as pool:
        with trio.fail_after(5.0):
            await pool.process(1, key="k")
            await pool.process(0, key="k")
    assert len(errors) == 1


async def test_10_000_jobs_of_1_000_keys_keep_the_order_of_each():
    """Takes some tenths of a second, as it is about a crowd."""
    starts = defaultdict(list)
    running = set()
    clashes = []
    most = 0
    chance = random.Random(4)

    async def handler(job):
        nonlocal most
        key, number = job
        if key in running:
            clashes.append(job)
        starts[key].append(number)
        running.add(key)
        most = max(most, len(running))
        # Each gives way, or a slow machine would have workers rest in between.
        for _ in range(1 + number % 3):
            await trio.lowlevel.checkpoint()
        running.remove(key)

    numbers = [number for number in range(1_000) for _ in range(10)]
    chance.shuffle(numbers)
    given = Counter()
    async with open_pool(50, handler, max_backlog=math.inf) as pool:
        for key in numbers:
            priority = chance.randrange(-1, 3)
            pool.submit_nowait((key, given[key]), key=key, priority=priority)
            given[key] += 1
        await pool.join()
        assert pool.statistics().done == 10_000
    assert not clashes
    assert most == 50
    assert all(starts[key] == list(range(10)) for key in range(1_000))


class Name:
    """A key whose end can be seen."""


async def test_nothing_is_kept_of_a_key_that_is_idle(autojump_clock):
    """However many keys there were: their objects are all gone."""
    async with open_pool(2, recorder(0.0)[0], max_backlog=math.inf) as pool:
        keys = [Name() for _ in range(100)]
        seen = [weakref.ref(key) for key in keys]
        for key in keys:
            for number in range(3):
                pool.submit_nowait(number, key=key)
        with pytest.raises(TypeError):
            pool.submit_nowait(4, key=keys[0], timeout="soon")
        await pool.join()
        del keys, key
        await wait_all_tasks_blocked()
        gc.collect()
        assert sum(ref() is not None for ref in seen) == 0


async def test_not_much_is_kept_of_keys_whose_last_jobs_were_cancelled(autojump_clock):
    """A few entries may stay in line until it is swept, but not all there were."""
    async with open_pool(2, recorder(0.0)[0], max_backlog=math.inf) as pool:
        keys = [Name() for _ in range(300)]
        seen = [weakref.ref(key) for key in keys]
        pool.pause()
        replies = [pool.submit_nowait(0) for _ in range(300)]
        replies += [pool.submit_nowait(1, key=key) for key in keys]
        for reply in replies[300:]:
            reply.cancel()
        pool.resume()
        await pool.join()
        del keys, replies, reply
        await wait_all_tasks_blocked()
        gc.collect()
        assert sum(ref() is not None for ref in seen) <= 64


# Choose -------------------------------------------------------------------


async def test_random_choice_may_choose(autojump_clock):
    random.seed(7)
    async with open_pool(3, recorder()[0], choose=random.choice) as pool:
        for number in range(30):
            await pool.process(number)
        jobs = [worker.jobs for worker in pool.workers()]
    assert sum(jobs) == 30
    assert min(jobs) > 0


async def test_choose_is_shown_the_idle_workers_and_only_them(autojump_clock):
    shown = []

    def first(idle):
        shown.append(idle)
        return idle[0]

    async with open_pool(3, recorder()[0], choose=first) as pool:
        for number in range(2):
            pool.submit_nowait(number)
        assert all(
            worker.state is WorkerState.IDLE and worker.job_id is None
            for idle in shown
            for worker in idle
        )
        assert [len(idle) for idle in shown] == [3, 2]
        taken = shown[0][0].id
        assert taken not in {worker.id for worker in shown[1]}


@pytest.mark.parametrize("options", [{}, {"rate": Rate(9, burst=9)}], ids=["", "rate"])
async def test_the_chosen_worker_gets_the_job(options, autojump_clock):
    wish = 0

    def wished(idle):
        return next(worker for worker in idle if worker.id == wish)

    async with open_pool(3, recorder()[0], choose=wished, **options) as pool:
        for wish in (2, 0, 1, 1, 2):
            reply = await pool.submit(wish)
            await reply.wait()
            assert reply.worker == wish


async def test_round_robin_can_be_chosen(autojump_clock):
    turns = itertools.count()

    def next_in_turn(idle):
        turn = next(turns) % 4
        return min(idle, key=lambda worker: (worker.id - turn) % 4)

    used = []
    async with open_pool(4, recorder()[0], choose=next_in_turn) as pool:
        for number in range(12):
            reply = await pool.submit(number)
            await reply.wait()
            used.append(reply.worker)
    assert used == [0, 1, 2, 3] * 3


async def test_the_worker_with_the_least_jobs_can_be_chosen(autojump_clock):
    def least(idle):
        return min(idle, key=lambda worker: worker.jobs)

    async with open_pool(3, recorder()[0], choose=least) as pool:
        for number in range(31):
            await pool.process(number)
        jobs = sorted(worker.jobs for worker in pool.workers())
    assert jobs == [10, 10, 11]


async def test_choose_is_not_asked_where_there_is_no_choice(autojump_clock):
    asked = []

    def only(idle):
        asked.append(idle)
        return idle[0]

    async with open_pool(1, recorder()[0], choose=only) as pool:
        for number in range(5):
            pool.submit_nowait(number)
    assert asked == []


def raises(idle):
    raise LookupError("no idea")


def nobody(idle):
    return None


def stranger(idle):
    return "worker 7"


@pytest.mark.parametrize("choose", [raises, nobody, stranger])
async def test_a_bad_choice_is_logged_once_and_dropped(choose, caplog, autojump_clock):
    asked = 0

    def counted(idle):
        nonlocal asked
        asked += 1
        return choose(idle)

    async with open_pool(3, recorder()[0], choose=counted) as pool:
        for number in range(6):
            assert await pool.process(number) == number
        assert pool.statistics().done == 6
    assert asked == 1
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "choose" in caplog.text


async def test_to_choose_a_busy_worker_is_a_bad_choice(caplog, autojump_clock):
    seen = []

    def first_ever(idle):
        seen.append(idle)
        return seen[0][0]

    async with open_pool(3, recorder()[0], choose=first_ever) as pool:
        for number in range(3):
            pool.submit_nowait(number)
        await pool.join()
        assert trio.current_time() == 1.0
        assert [worker.jobs for worker in pool.workers()] == [1, 1, 1]
    assert len(seen) == 2
    assert len(caplog.records) == 1


async def test_chosen_workers_and_keys_and_priorities_go_together(autojump_clock):
    random.seed(11)
    handler, starts = recorder(0.25)
    async with open_pool(3, handler, choose=random.choice) as pool:
        for number in range(12):
            pool.submit_nowait(number, key=number % 2, priority=number % 3)
        await pool.join()
        assert trio.current_time() == 1.5
    assert [number for number in starts if number % 2] == list(range(1, 12, 2))
    assert [number for number in starts if not number % 2] == list(range(0, 12, 2))


async def test_a_batch_has_waited_since_it_came_and_no_longer(autojump_clock):
    """With aging, or it would be before jobs of higher priority that came first."""
    order = []

    async def handler(job):
        order.append(job)
        await trio.sleep(1)

    async with open_pool(1, handler, aging=1.0) as pool:
        await trio.sleep(50)
        pool.submit_nowait("runs")
        pool.submit_nowait("waits")
        await trio.sleep(0.5)
        await pool.settle(["item"], priority=-1)
    assert order == ["runs", "waits", "item"]
