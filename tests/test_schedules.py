"""Bodies under every task order, and with something at each of their steps."""

from __future__ import annotations

import functools
import gc
import random
import re
import sys
import threading
from importlib import import_module

import pytest
import trio
from trio.testing import MockClock

import trio_pool.testing
from trio_pool import open_pool
from trio_pool.testing import (
    call_at,
    call_everywhere,
    cancel_at,
    cancel_everywhere,
    explore_orders,
    run_in_order,
)

# Only to see that it is left as it was.
SCHEDULER = import_module("trio._core._run")


class Failure(Exception):
    """What the bodies here fail with."""


async def race(tasks=3):
    """Return the order in which tasks ran that could all run at once."""
    order = []

    async def run(name):
        order.append(name)

    async with trio.open_nursery() as nursery:
        for name in range(tasks):
            nursery.start_soon(run, name)
    return tuple(order)


async def cancelled_race():
    """Return the order in which one cancellation reached several tasks."""
    order = []

    def abort(name, _):
        order.append(name)
        return trio.lowlevel.Abort.SUCCEEDED

    async def park(name):
        await trio.lowlevel.wait_task_rescheduled(functools.partial(abort, name))

    async with trio.open_nursery() as nursery:
        for name in range(3):
            nursery.start_soon(park, name)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return tuple(order)


async def cancelled_scopes():
    """Return the order in which one cancellation reached the scopes inside of it."""
    order = []

    def abort(name, _):
        order.append(name)
        return trio.lowlevel.Abort.SUCCEEDED

    async def park(name):
        with trio.CancelScope():
            await trio.lowlevel.wait_task_rescheduled(functools.partial(abort, name))

    async with trio.open_nursery() as nursery:
        for name in range(3):
            nursery.start_soon(park, name)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return tuple(order)


async def deadlines():
    """Return the order in which deadlines passed that were the same."""
    order = []

    def abort(name, _):
        order.append(name)
        return trio.lowlevel.Abort.SUCCEEDED

    async def park(name):
        with trio.move_on_at(trio.current_time() + 1.5):
            await trio.lowlevel.wait_task_rescheduled(functools.partial(abort, name))

    async with trio.open_nursery() as nursery:
        for name in range(3):
            nursery.start_soon(park, name)
    return tuple(order)


RACES = [race, cancelled_race, cancelled_scopes, deadlines]
each_race = pytest.mark.parametrize("body", RACES, ids=lambda body: body.__name__)


# ----------------------------------------------------------------------------
# Task orders.


@each_race
def test_the_same_order_gives_the_same_run(body):
    runs = [run_in_order(body, order=7) for _ in range(5)]
    assert len(set(runs)) == 1


@each_race
def test_many_orders_give_every_run_there_is(body):
    assert len({run_in_order(body, order=order) for order in range(60)}) == 6


def test_a_whole_pool_runs_the_same_in_the_same_order():
    class Steps(trio.abc.Instrument):
        def __init__(self):
            self.names = []

        def before_task_step(self, task):
            self.names.append((task.name, trio.current_time()))

    async def body(steps):
        trio.lowlevel.add_instrument(steps)
        async with open_pool(3, trio.sleep, name="p") as pool:
            await pool.map([random.uniform(0.25, 1.5) for _ in range(9)])

    def run(order):
        steps = Steps()
        run_in_order(body, steps, order=order)
        return steps.names

    assert run(1) == run(1) != run(2)


def test_what_the_body_draws_follows_from_the_order():
    async def draw():
        return random.random()

    first = run_in_order(draw, order=1)
    random.random()
    assert run_in_order(draw, order=1) == first != run_in_order(draw, order=2)


def test_the_result_and_the_error_are_those_of_the_function():
    async def answer(a, b):
        return a + b

    async def fail():
        raise Failure

    assert run_in_order(answer, 1, 2, order=0) == 3
    with pytest.raises(Failure):
        run_in_order(fail, order=0)


def test_time_is_virtual_unless_a_clock_is_given():
    async def body():
        await trio.sleep(3600)
        return trio.current_time()

    assert run_in_order(body, order=0) == 3600
    assert run_in_order(body, order=0, clock=MockClock(1e6)) >= 3600


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_drawn_elsewhere_goes_on_as_if_nothing_had_run(fails):
    async def body():
        random.random()
        await race()
        if fails:
            raise Failure

    before = random.getstate(), vars(SCHEDULER)["_r"].getstate()
    flag = vars(SCHEDULER)["_ALLOW_DETERMINISTIC_SCHEDULING"]
    kept = vars(SCHEDULER.CancelStatus).copy(), vars(SCHEDULER.Deadlines).copy()
    try:
        run_in_order(body, order=3)
    except Failure:
        assert fails
    assert (random.getstate(), vars(SCHEDULER)["_r"].getstate()) == before
    assert vars(SCHEDULER)["_ALLOW_DETERMINISTIC_SCHEDULING"] is flag
    assert (vars(SCHEDULER.CancelStatus), vars(SCHEDULER.Deadlines)) == kept


@pytest.mark.parametrize(
    "name",
    ["_r", "_ALLOW_DETERMINISTIC_SCHEDULING", "CancelStatus", "Deadlines", "Task"],
)
def test_a_trio_that_has_changed_is_refused_by_name(monkeypatch, name):
    monkeypatch.setattr(SCHEDULER, name, object())
    with pytest.raises(RuntimeError, match=f"{trio.__version__}.*{name} of its"):
        run_in_order(race, order=0)


@pytest.mark.parametrize(
    "run",
    [
        functools.partial(run_in_order, order=0),
        explore_orders,
        cancel_everywhere,
        cancel_at,
        call_everywhere,
        call_at,
    ],
)
async def test_a_run_inside_of_a_run_is_refused_and_leaves_nothing_changed(run):
    before = vars(SCHEDULER)["_r"].getstate()
    with pytest.raises(RuntimeError, match="call it from a plain function") as info:
        run(race)
    assert not hasattr(info.value, "__notes__")
    assert vars(SCHEDULER)["_r"].getstate() == before


def test_an_error_under_some_order_says_which_and_how_to_run_it_again():
    async def body(last):
        assert (await race())[0] != last

    with pytest.raises(AssertionError) as info:
        explore_orders(body, 2)
    (text,) = info.value.__notes__
    found = re.fullmatch(
        r"in task order (\d+); again: run_in_order\(body, 2, order=(\d+)\)", text
    )
    assert found[1] == found[2]
    with pytest.raises(AssertionError):
        run_in_order(body, 2, order=int(found[1]))


def test_as_many_orders_run_as_were_asked_for_from_the_first_on():
    seen = []

    async def body():
        seen.append(await race())

    assert explore_orders(body, orders=9, first=4) == 9
    assert seen == [run_in_order(race, order=order) for order in range(4, 13)]


# ----------------------------------------------------------------------------
# Cancellation at every step.


def test_a_body_is_cancelled_at_each_of_its_steps():
    reached = []

    async def body():
        reached.append(0)
        for _ in range(3):
            await trio.lowlevel.checkpoint()
            reached[-1] += 1

    # Undisturbed, before it starts, and before each step in which it goes on.
    assert cancel_everywhere(body) == len(reached) == 5
    assert sorted(reached) == [0, 0, 1, 2, 3]


def test_every_wait_of_a_body_is_hit():
    hit = set()

    async def step(name):
        try:
            await trio.sleep(1)
        except trio.Cancelled:
            hit.add(name)
            raise

    async def body():
        await step("first")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(step, "left")
            nursery.start_soon(step, "right")
        with trio.CancelScope(shield=True):
            await step("shielded")
        await step("last")

    assert cancel_everywhere(body) > 5
    assert hit == {"first", "left", "right", "last"}


def test_a_body_says_by_its_argument_what_is_cancelled():
    cut = []

    async def body(scope):
        await trio.sleep(1)
        with scope:
            await trio.sleep(1)
        await trio.sleep(1)
        cut.append((scope.cancelled_caught, trio.current_time()))

    # Undisturbed, before it is entered, as it wakes; nothing runs meanwhile.
    assert cancel_everywhere(body) == 3
    assert cut == [(False, 3.0), (True, 2.0), (True, 3.0)]


def test_two_scopes_are_cancelled_at_every_pair_of_their_steps():
    ends = []

    async def wait(scope, name, order):
        with scope:
            await trio.sleep(1)
        if scope.cancelled_caught:
            order.append(name)

    async def body(a, b):
        order = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, a, "a", order)
            nursery.start_soon(wait, b, "b", order)
        ends.append("".join(order))

    assert cancel_everywhere(body) == len(ends)
    assert set(ends) == {"", "a", "b", "ab", "ba"}


async def leaky(scope):
    taken = []
    with scope:
        await trio.lowlevel.checkpoint()
        taken.append(1)
        await trio.lowlevel.checkpoint()  # the leak
        taken.pop()
        await trio.lowlevel.checkpoint()
    assert not taken


def test_an_error_says_what_was_cancelled_when_and_where_and_how_to_do_it_again():
    with pytest.raises(AssertionError) as info:
        cancel_everywhere(leaky, order=5)
    text = info.value.__notes__[-1]
    found = re.search(r"again: (cancel_at\(leaky, (\d+), order=5\))$", text)
    assert f"at step {found[2]}, before task " in text
    again = {"cancel_at": cancel_at, "leaky": leaky}
    with pytest.raises(AssertionError) as second:
        eval(found[1], again)
    assert second.value.__notes__[-1] == text


def test_the_place_is_that_of_the_task_that_was_about_to_run():
    async def body(scope):
        with scope:
            await trio.lowlevel.checkpoint()
        assert not scope.cancelled_caught

    with pytest.raises(AssertionError) as info:
        cancel_at(body, 1)
    assert re.search(
        r"before task 'body' went on in File \"[^\"]*test_schedules\.py\", line \d+, "
        r"in test_the_place_is_that_.*body",
        info.value.__notes__[-1],
    )


def test_the_place_is_in_trio_only_where_nothing_else_is():
    async def body(moment):
        with moment.calls(fail):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep, 1)

    def fail():
        raise Failure

    with pytest.raises(Failure) as info:
        call_at(body, 2)
    assert re.search(r"task 'trio\.sleep' .*[^\w]trio[^\w]", info.value.__notes__[-1])


def test_a_pair_is_told_and_run_again_in_its_order():
    async def wait(scope, name, order):
        with scope:
            await trio.sleep(1)
        if scope.cancelled_caught:
            order.append(name)

    async def body(a, b):
        order = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, a, "a", order)
            nursery.start_soon(wait, b, "b", order)
        assert order != ["b", "a"]

    with pytest.raises(AssertionError) as info:
        cancel_everywhere(body)
    text = info.value.__notes__[-1]
    found = re.search(
        r"again: (cancel_at\(body, \(1, \d+\), \(0, \d+\), order=0\))$", text
    )
    assert len(re.findall("at step", text)) == 2
    with pytest.raises(AssertionError):
        eval(found[1], {"cancel_at": cancel_at, "body": body})


def test_an_undisturbed_body_that_fails_says_that_nothing_was_to_blame():
    async def body():
        raise Failure

    with pytest.raises(Failure) as info:
        cancel_everywhere(body)
    assert info.value.__notes__ == [
        "nothing had happened to it yet\nagain: cancel_at(body, order=0)"
    ]


def test_an_error_beside_the_cancellation_is_not_lost():
    async def body():
        try:
            await trio.sleep(1)
        except trio.Cancelled:
            raise Failure from None

    with pytest.raises(Failure):
        cancel_everywhere(body)


def test_a_schedule_that_the_body_does_not_come_to_is_refused():
    async def body():
        await trio.lowlevel.checkpoint()

    cancel_at(body, 0)
    with pytest.raises(ValueError, match=r"at step 99 nothing .* body in order 0"):
        cancel_at(body, 99)


def test_a_body_may_be_a_partial_function():
    async def body(number, scope):
        with scope:
            await trio.sleep(number)
        assert not scope.cancelled_caught

    with pytest.raises(AssertionError) as info:
        cancel_everywhere(functools.partial(body, 1))
    assert "cancel_at(partial(body, ...), 0, order=0)" in info.value.__notes__[-1]


# ----------------------------------------------------------------------------
# Events at every step.


def test_moments_come_at_every_pair_of_steps_and_each_of_them_first():
    seen = []

    async def body(a, b):
        order = []
        with a.calls(order.append, "a"), b.calls(order.append, "b"):
            await trio.lowlevel.checkpoint()
        assert a.happened is ("a" in order)
        assert b.happened is ("b" in order)
        seen.append("".join(order))

    assert call_everywhere(body) == len(seen)
    # There is one step in the block.
    assert sorted(seen) == ["", "a", "ab", "b", "ba"]


def test_moments_are_apart_by_any_number_of_steps():
    seen = set()

    async def body(a, b):
        now = [0]
        at = {}
        with (
            a.calls(lambda: at.update(a=now[0])),
            b.calls(lambda: at.update(b=now[0])),
        ):
            for _ in range(3):
                await trio.lowlevel.checkpoint()
                now[0] += 1
        seen.add((at.get("a"), at.get("b")))

    call_everywhere(body)
    assert seen == {(a, b) for a in (None, 0, 1, 2) for b in (None, 0, 1, 2)}


def test_a_moment_comes_only_in_its_block():
    at = []

    async def body(moment):
        await trio.sleep(1)
        with moment.calls(lambda: at.append(trio.current_time())):
            await trio.sleep(1)
        await trio.sleep(1)

    # As the sleeper goes on; the system's own tasks rest.
    assert call_everywhere(body) == 1 + len(at)
    assert set(at) == {2.0}
    with pytest.raises(ValueError, match="at step 0 nothing can happen"):
        call_at(body, 0)


def test_an_error_of_an_event_fails_the_schedule():
    def fail():
        raise Failure

    async def body(moment):
        with moment.calls(fail):
            await trio.sleep(1)

    with pytest.raises(Failure) as info:
        call_everywhere(body)
    (number,) = re.findall(
        r"again: call_at\(body, (\d+), order=0\)", str(info.value.__notes__[-1])
    )
    with pytest.raises(Failure):
        call_at(body, int(number))


def test_a_moment_shows_whether_it_is_over():
    shown = set()

    async def body(moment):
        with moment.calls(lambda: None):
            await trio.lowlevel.checkpoint()
        shown.add(repr(moment))

    call_everywhere(body)
    assert shown == {
        "<trio_pool.testing.Moment: over>",
        "<trio_pool.testing.Moment: to come>",
    }


# ----------------------------------------------------------------------------
# Bodies that hang, and bodies with too many schedules.


def test_a_body_that_waits_for_ever_is_ended_and_named():
    """It takes about a second, as a body may also wait for a thread."""

    async def body(scope):
        with scope:
            await trio.sleep(1)
        if scope.cancelled_caught:
            await trio.sleep_forever()

    with pytest.raises(AssertionError, match="body waits for ever") as info:
        cancel_everywhere(body)
    assert "again: cancel_at(body, " in info.value.__notes__[-1]


def test_a_body_that_waits_for_a_thread_does_not_wait_for_ever():
    async def body():
        await trio.to_thread.run_sync(threading.Event().wait, 0.01)

    cancel_at(body)


def test_a_body_that_takes_too_long_is_ended_and_named():
    async def body():
        while True:  # noqa: ASYNC110
            await trio.sleep(1)

    with pytest.raises(AssertionError, match="after 60 virtual seconds"):
        cancel_everywhere(body, seconds=60)


def test_a_body_that_takes_too_many_steps_is_ended_and_named():
    async def body():
        while True:
            await trio.lowlevel.checkpoint()

    with pytest.raises(AssertionError, match="after 500 steps"):
        cancel_everywhere(body, steps=500)


async def shielded_loop():
    with trio.CancelScope(shield=True):
        while True:
            await trio.lowlevel.checkpoint()


async def shielded_sleeps():
    with trio.CancelScope(shield=True):
        while True:  # noqa: ASYNC110
            await trio.sleep(1)


async def shielded_ends():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, 1)
        try:
            await trio.sleep(2)
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep_forever()


@pytest.mark.parametrize("body", [shielded_loop, shielded_sleeps, shielded_ends])
def test_a_body_that_does_not_hear_of_its_cancellation_is_ended_too(body, monkeypatch):
    left = []
    monkeypatch.setattr(sys, "unraisablehook", left.append)
    with pytest.raises(AssertionError, match="does not end when it is cancelled") as i:
        cancel_everywhere(body, steps=500, seconds=60)
    assert i.value.__cause__ is None
    del i
    gc.collect()
    assert not left


async def rude():
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()


async def rude_and_broken():
    try:
        await rude()
    finally:
        raise Failure


def test_the_error_of_a_body_that_is_ended_by_force_is_its_cause():
    with pytest.raises(AssertionError, match="does not end when") as info:
        run_in_order(rude_and_broken, order=0)
    assert isinstance(info.value.__cause__, Failure)


@pytest.mark.parametrize("run", [run_in_order, explore_orders])
def test_an_order_in_which_the_body_waits_for_ever_is_ended_too(run):
    """It takes about a second, as a body may also wait for a thread."""
    which = {"order": 3} if run is run_in_order else {"first": 3}
    with pytest.raises(AssertionError, match="sleep_forever waits for ever") as info:
        run(trio.sleep_forever, **which)
    if run is explore_orders:
        assert info.value.__notes__ == [
            "in task order 3; again: run_in_order(sleep_forever, order=3)"
        ]


@pytest.mark.parametrize(
    "run", [functools.partial(run_in_order, order=0), explore_orders]
)
def test_an_order_in_which_the_body_takes_too_long_is_ended_too(run):
    async def sleep():
        await trio.sleep(61)

    with pytest.raises(AssertionError, match=r"sleep had .* 60 virtual seconds"):
        run(sleep, seconds=60)
    with pytest.raises(AssertionError, match=r"shielded_loop had .* after 500 steps"):
        run(shielded_loop, steps=500)


async def two_long_scopes(a, b):
    with a, b:
        for _ in range(20):
            await trio.lowlevel.checkpoint()


def test_more_schedules_than_the_limit_are_refused():
    with pytest.raises(ValueError, match=r"two_long_scopes .* drawn=True"):
        cancel_everywhere(two_long_scopes, limit=60)


def test_a_drawn_sample_is_as_large_as_the_limit_and_follows_from_the_order():
    seen = []

    async def body(a, b):
        now = [0]
        at = []
        with (
            a.calls(lambda: at.append(("a", now[0]))),
            b.calls(lambda: at.append(("b", now[0]))),
        ):
            for _ in range(8):
                await trio.lowlevel.checkpoint()
                now[0] += 1
        seen.append(tuple(at))

    assert call_everywhere(body, limit=30, drawn=True) == 30
    first, seen = seen, []
    assert call_everywhere(body, limit=30, drawn=True) == 30
    assert seen == first
    assert len(set(seen)) == 30
    assert {len(at) for at in seen} == {0, 1, 2}


@pytest.mark.parametrize(
    "options", [{"order": -1}, {"seconds": 0}, {"steps": 0}, {"limit": 0}]
)
def test_bad_options_are_refused_by_name(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        cancel_everywhere(race, **options)


def test_a_body_that_never_enters_its_scope_is_refused():
    async def body(one, other):
        with one:
            await trio.lowlevel.checkpoint()

    with pytest.raises(ValueError, match=r"body has to enter .* its argument 1: "):
        cancel_everywhere(body)


def test_a_body_that_never_uses_its_moment_is_refused():
    async def body(moment):
        await trio.lowlevel.checkpoint()

    with pytest.raises(ValueError, match=r"body has to .*calls.* its argument 0: "):
        call_everywhere(body)


def test_a_scope_may_be_entered_only_when_the_other_one_is_cancelled():
    async def body(one, other):
        with one:
            await trio.lowlevel.checkpoint()
        if one.cancelled_caught:
            with other:
                await trio.lowlevel.checkpoint()

    assert cancel_everywhere(body) > 3


@pytest.mark.parametrize("fn", [race, 3, functools.partial(race, 2)])
def test_a_moment_calls_synchronous_functions_only(fn):
    async def body(moment):
        with moment.calls(fn):
            await trio.lowlevel.checkpoint()

    with pytest.raises(TypeError, match="fn must be a synchronous function, got"):
        call_everywhere(body)


def test_a_moment_whose_function_gives_a_coroutine_fails():
    async def body(moment):
        with moment.calls(lambda: race()):
            await trio.lowlevel.checkpoint()

    with pytest.raises(TypeError, match=r"fn must be .* gives a coroutine, got .*lam"):
        call_everywhere(body)


EVERY_WAY = [
    functools.partial(run_in_order, order=0),
    functools.partial(run_in_order, order=0, clock=MockClock()),
    explore_orders,
    cancel_everywhere,
    cancel_at,
    call_everywhere,
    call_at,
]


@pytest.mark.parametrize("run", EVERY_WAY)
def test_what_is_no_async_function_is_refused_before_it_is_called(run):
    called = []

    def body(one=None):
        called.append(one)

    for wrong in (body, 3, called.append, Failure):
        with pytest.raises(TypeError, match=r"(body|async_fn) must be an async f") as e:
            run(wrong)
        assert not hasattr(e.value, "__notes__")
    assert not called


def test_a_lambda_may_give_what_an_async_function_does():
    assert len(run_in_order(lambda: race(2), order=0)) == 2
    with pytest.raises(TypeError, match="body must be an async function"):
        run_in_order(lambda: 3, order=0)


def test_what_is_no_clock_is_refused():
    with pytest.raises(TypeError, match=r"clock must be a trio\.abc\.Clock .* got 3"):
        run_in_order(race, order=0, clock=3)


@pytest.mark.parametrize("at", [(0, 1, 2), "x", ("a", 1), (0,), 1.5])
def test_steps_of_another_shape_are_refused(at):
    with pytest.raises(TypeError, match="at must be"):
        cancel_at(race, at)


def test_a_body_of_other_arguments_is_refused():
    async def three(a, b, c):
        raise AssertionError

    with pytest.raises(TypeError, match=r"body must be .* none, one or two arguments"):
        cancel_everywhere(three)
    with pytest.raises(TypeError, match=r"body must be .* of one or two arguments"):
        call_everywhere(cancelled_race)
    with pytest.raises(TypeError, match="body must be"):
        cancel_everywhere(3)


@pytest.mark.parametrize("at", [(-1,), ((2, 1),)])
def test_bad_steps_are_refused(at):
    with pytest.raises(ValueError, match="at must be"):
        cancel_at(race, *at)


def test_the_kit_shows_its_public_module():
    for name in ("run_in_order", "cancel_everywhere", "Moment"):
        assert getattr(trio_pool.testing, name).__module__ == "trio_pool.testing"
