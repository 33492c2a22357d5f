"""The cancellation table: every wait of every method, and after each the same facts."""

from __future__ import annotations

import functools
import math
import signal
from collections import Counter
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from trio_pool import (
    Hooks,
    JobCancelled,
    JobState,
    PoolClosed,
    WorkerState,
    open_pool,
)


class Ledger(Hooks):
    """Counts how often each job was accepted, started and ended."""

    def __init__(self):
        self.accepted = Counter()
        self.started = Counter()
        self.ended = Counter()

    def on_job_queue(self, event):
        self.accepted[event.job_id] += 1

    def on_job_start(self, event):
        self.started[event.job_id] += 1

    def on_job_complete(self, event):
        self.ended[event.job_id] += 1

    on_job_error = on_job_cancel = on_job_drop = on_job_complete


async def run(job):
    """Be the handler of every pool here: the input of a job is what it does."""
    return await job()


class Kind:
    """A kind of pool, and how its batches are called."""

    def __init__(self, name):
        self.name = name
        self.ledger = Ledger() if name == "watched pool" else None

    def open(self, size=2, **options):
        if self.ledger is not None:
            options["hooks"] = [self.ledger]
        if self.name == "task pool":
            return open_pool(size, **options)
        return open_pool(size, run, **options)

    def batch(self, method, jobs, **options):
        if self.name == "task pool":
            return method(run, jobs, **options)
        return method(jobs, **options)

    def ask_the_books(self, pool):
        """Every accepted job is somewhere, and none has ended twice."""
        count = pool.statistics()
        assert count.accepted == sum(getattr(count, s.value) for s in JobState)
        assert count.busy == count.running
        if self.ledger is not None:
            assert sum(self.ledger.accepted.values()) == count.accepted
            assert all(n == 1 for n in self.ledger.accepted.values())
            assert all(n == 1 for n in self.ledger.started.values())
            assert all(n == 1 for n in self.ledger.ended.values())
            assert self.ledger.started.keys() <= self.ledger.accepted.keys()
            assert self.ledger.ended.keys() <= self.ledger.accepted.keys()
        return count

    async def ask_the_facts(self, pool):
        """Books balanced, nothing left, no slot lost, the next job runs."""
        await wait_all_tasks_blocked()
        count = self.ask_the_books(pool)
        assert (count.queued, count.running) == (0, 0)
        assert count.workers == count.size == pool.size
        assert {w.state for w in pool.workers()} == {WorkerState.IDLE}
        meeting = Meeting(pool.size)
        with trio.fail_after(1.5):
            async with trio.open_nursery() as nursery:
                for _ in range(pool.size):
                    nursery.start_soon(pool.process, meeting)
            assert await pool.process(next_job) == "the next job"
        after = self.ask_the_books(pool)
        assert after.done - count.done == pool.size + 1
        assert after.restarts == count.restarts

    def ask_the_end(self, pool):
        """After the block: every job has ended once and no worker is left."""
        count = self.ask_the_books(pool)
        assert (count.queued, count.running, count.workers) == (0, 0, 0)
        assert pool.closed
        assert all(w.state is WorkerState.STOPPED for w in pool.workers())
        if self.ledger is not None:
            assert self.ledger.ended.keys() == self.ledger.accepted.keys()


class Meeting:
    """A job that ends when as many of it as there are workers run at once."""

    def __init__(self, size):
        self.missing = size
        self.complete = trio.Event()

    async def __call__(self):
        self.missing -= 1
        if not self.missing:
            self.complete.set()
        await self.complete.wait()


async def next_job():
    return "the next job"


class Gate:
    """A job that waits to be let through, and counts what became of it."""

    def __init__(self):
        self.started = self.cancelled = self.ended = 0
        self.open = trio.Event()

    async def __call__(self):
        self.started += 1
        try:
            return await self.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.ended += 1

    async def wait(self):
        await self.open.wait()
        return "through"


class ShieldedGate(Gate):
    """A gate that does not hear of cancellation before it is let through."""

    async def wait(self):
        with trio.CancelScope(shield=True):
            await self.open.wait()
        await trio.lowlevel.checkpoint()
        return "through"


class StubbornGate(Gate):
    """A shielded gate that has a value all the same."""

    async def wait(self):
        with trio.CancelScope(shield=True):
            await self.open.wait()
        return "through"


class SwallowingGate(Gate):
    """A gate that takes a cancellation for an answer."""

    async def wait(self):
        try:
            await self.open.wait()
        except trio.Cancelled:
            return "swallowed"
        return "through"


class FailingGate(Gate):
    """A gate whose cleanup fails."""

    error = ValueError("cleanup failed")

    async def wait(self):
        try:
            await self.open.wait()
        except trio.Cancelled:
            raise self.error from None


class Call:
    """A call in a task and a cancel scope of its own."""

    def __init__(self, nursery, async_fn, *args, **options):
        self.scope = trio.CancelScope()
        self.ended = False
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


async def call_and_cancel_in_the_same_tick(nursery, async_fn, *args):
    call = Call(nursery, async_fn, *args)
    instrument = CancelAfterFirstStep(call)
    trio.lowlevel.add_instrument(instrument)
    await wait_all_tasks_blocked()
    trio.lowlevel.remove_instrument(instrument)
    assert instrument.struck
    return call


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


@pytest.fixture(params=["pool", "watched pool", "task pool"])
def kind(request):
    return Kind(request.param)


# process ----------------------------------------------------------------


@pytest.mark.parametrize("busy", [0, 2])
async def test_process_in_a_cancelled_scope_does_not_start_the_job(
    kind, busy, autojump_clock
):
    gate = Gate()
    async with kind.open() as pool:
        async with all_busy(pool, busy):
            with trio.CancelScope() as scope:
                scope.cancel()
                await pool.process(gate)
            assert scope.cancelled_caught
        await kind.ask_the_facts(pool)
    assert gate.started == 0
    kind.ask_the_end(pool)


@pytest.mark.parametrize("overflow", ["wait", "reject", "drop_oldest"])
async def test_process_in_a_cancelled_scope_disturbs_no_full_backlog(
    kind, overflow, autojump_clock
):
    gate = Gate()
    async with kind.open(max_backlog=1, overflow=overflow) as pool:
        async with all_busy(pool):
            waiting = await pool.submit(next_job)
            with trio.CancelScope() as scope:
                scope.cancel()
                await pool.process(gate)
            assert scope.cancelled_caught
            assert waiting.state is JobState.QUEUED
        assert await waiting.wait() == "the next job"
        await kind.ask_the_facts(pool)
    assert gate.started == 0


@pytest.mark.parametrize("max_backlog", [0, 1])
async def test_process_cancelled_while_it_waits_for_room_was_never_accepted(
    kind, max_backlog, autojump_clock
):
    gate = Gate()
    async with kind.open(max_backlog=max_backlog) as pool:
        async with trio.open_nursery() as nursery, all_busy(pool):
            for _ in range(max_backlog):
                nursery.start_soon(pool.process, next_job)
            await wait_all_tasks_blocked()
            accepted = pool.statistics().accepted
            call = Call(nursery, pool.process, gate)
            behind = Call(nursery, pool.process, next_job)
            await wait_all_tasks_blocked()
            await call.cancel()
            assert call.cancelled
            assert pool.statistics().accepted == accepted
            assert pool.statistics().queued == max_backlog
            assert not behind.ended
        assert behind.value == "the next job"
        await kind.ask_the_facts(pool)
    assert gate.started == 0


async def test_process_cancelled_while_queued_leaves_the_backlog_at_once(
    kind, autojump_clock
):
    gate = Gate()
    async with kind.open(max_backlog=1) as pool:
        async with trio.open_nursery() as nursery, all_busy(pool):
            call = Call(nursery, pool.process, gate)
            await wait_all_tasks_blocked()
            waits_for_room = Call(nursery, pool.process, next_job)
            await wait_all_tasks_blocked()
            assert pool.statistics().queued == 1
            call.scope.cancel()
            # The step that cancels gives the room to the next in line.
            assert pool.statistics().cancelled == 1
            assert pool.statistics().accepted == 4
            await wait_all_tasks_blocked()
            assert call.cancelled
        assert waits_for_room.value == "the next job"
        await kind.ask_the_facts(pool)
    assert gate.started == 0


async def test_process_cancelled_in_the_tick_of_the_hand_over_never_starts(
    kind, autojump_clock
):
    gate = Gate()
    async with kind.open() as pool:
        async with trio.open_nursery() as nursery:
            call = await call_and_cancel_in_the_same_tick(nursery, pool.process, gate)
            assert call.cancelled
        await kind.ask_the_facts(pool)
    assert gate.started == 0


async def test_a_worker_whose_job_was_withdrawn_in_its_tick_takes_the_queued_one(
    kind, autojump_clock
):
    async with kind.open(1) as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, pool.process, Gate())

            class QueueAnotherAndCancel(trio.abc.Instrument):
                reply = None

                def after_task_step(self, task):
                    if task is call.task and self.reply is None:
                        self.reply = pool.submit_nowait(next_job)
                        call.scope.cancel()

            instrument = QueueAnotherAndCancel()
            trio.lowlevel.add_instrument(instrument)
            await wait_all_tasks_blocked()
            trio.lowlevel.remove_instrument(instrument)
            assert call.cancelled
            assert await instrument.reply.wait() == "the next job"
        await kind.ask_the_facts(pool)


async def test_a_new_job_does_not_pass_those_that_a_worker_is_on_its_way_to(
    kind, autojump_clock
):
    async with kind.open(1) as pool:
        order = []

        async def job(number):
            order.append(number)

        await wait_all_tasks_blocked()
        first = pool.submit_nowait(functools.partial(job, 1))
        pool.submit_nowait(functools.partial(job, 2))
        first.cancel()
        pool.submit_nowait(functools.partial(job, 3))
        await pool.join()
        assert order == [2, 3]
        await kind.ask_the_facts(pool)


async def test_process_cancelled_while_it_runs_cancels_the_handler(
    kind, autojump_clock
):
    gate = Gate()
    async with kind.open() as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, pool.process, gate)
            await wait_all_tasks_blocked()
            await call.cancel()
            assert call.cancelled
        assert (gate.started, gate.cancelled, gate.ended) == (1, 1, 1)
        assert pool.statistics().cancelled == 1
        await kind.ask_the_facts(pool)


async def test_cancelling_one_running_job_leaves_the_others_alone(kind, autojump_clock):
    async with kind.open() as pool:
        async with trio.open_nursery() as nursery, all_busy(pool, 1):
            call = Call(nursery, pool.process, Gate())
            queued = Call(nursery, pool.process, Gate())
            await wait_all_tasks_blocked()
            await call.cancel()
            assert call.cancelled
            assert not queued.ended
            await queued.cancel()
            assert queued.cancelled
            assert pool.statistics().running == 1
        await kind.ask_the_facts(pool)


async def test_process_cancelled_returns_only_when_a_shielded_handler_has_ended(
    kind, autojump_clock
):
    gate = ShieldedGate()
    async with kind.open() as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, pool.process, gate)
            await wait_all_tasks_blocked()
            await call.cancel()
            assert not call.ended
            assert pool.statistics().running == 1
            kind.ask_the_books(pool)
            gate.open.set()
            await wait_all_tasks_blocked()
            assert call.cancelled
        assert gate.cancelled == 1
        await kind.ask_the_facts(pool)


@pytest.mark.parametrize(
    ("gate_type", "value"),
    [(StubbornGate, "through"), (SwallowingGate, "swallowed")],
)
async def test_a_value_of_a_cancelled_handler_wins(
    kind, gate_type, value, autojump_clock
):
    gate = gate_type()
    async with kind.open() as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, pool.process, gate)
            await wait_all_tasks_blocked()
            await call.cancel()
            gate.open.set()
            await wait_all_tasks_blocked()
            assert call.ended
            assert not call.cancelled
            assert call.value == value
        assert pool.statistics().done == 1
        await kind.ask_the_facts(pool)


async def test_an_error_of_a_cancelled_handler_wins(kind, autojump_clock):
    gate = FailingGate()
    async with kind.open() as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, pool.process, gate)
            await wait_all_tasks_blocked()
            await call.cancel()
            assert call.error is gate.error
        assert pool.statistics().failed == 1
        await kind.ask_the_facts(pool)


async def test_cancelling_twice_counts_once(kind, autojump_clock):
    gate = ShieldedGate()
    async with kind.open() as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, pool.process, gate)
            await wait_all_tasks_blocked()
            await call.cancel()
            await call.cancel()
            nursery.cancel_scope.cancel()
            await trio.lowlevel.cancel_shielded_checkpoint()
            gate.open.set()
        assert (gate.cancelled, gate.ended) == (1, 1)
        assert pool.statistics().cancelled == 1
        await kind.ask_the_facts(pool)


async def test_the_job_after_a_cancelled_one_in_the_same_worker_is_not_cancelled(
    kind, autojump_clock
):
    async with kind.open(1) as pool:
        async with trio.open_nursery() as nursery:
            call = Call(nursery, pool.process, SwallowingGate())
            await wait_all_tasks_blocked()
            after = Call(nursery, pool.process, next_sleep)
            await wait_all_tasks_blocked()
            call.scope.cancel()
        assert call.value == "swallowed"
        assert after.value == "slept"
        await kind.ask_the_facts(pool)


async def next_sleep():
    await trio.sleep(0.25)
    return "slept"


async def test_answered_first_the_value_wins_over_a_cancel_in_the_same_tick(
    kind, autojump_clock
):
    """The caller is cancelled after its answer and before it can read it."""
    scope = trio.CancelScope()

    async def answer():
        await trio.lowlevel.checkpoint()
        return "answered"

    async with kind.open(1) as pool:
        workers = []

        class CancelAtTheAnswer(trio.abc.Instrument):
            def after_task_step(self, task):
                if pool.statistics().done == 1 and not workers:
                    workers.append(task)
                    scope.cancel()

        instrument = CancelAtTheAnswer()
        trio.lowlevel.add_instrument(instrument)
        with scope:
            assert await pool.process(answer) == "answered"
        trio.lowlevel.remove_instrument(instrument)
        assert workers
        assert not scope.cancelled_caught
        await kind.ask_the_facts(pool)


async def test_a_deadline_of_the_caller_is_a_cancellation(kind, autojump_clock):
    gate = Gate()
    async with kind.open() as pool:
        start = trio.current_time()
        with trio.move_on_after(0.25) as scope:
            await pool.process(gate)
        assert scope.cancelled_caught
        assert trio.current_time() - start == 0.25
        assert gate.cancelled == 1
        await kind.ask_the_facts(pool)


class SlowWorker:
    """A worker that crashes at will, and whose setups can be held up."""

    def __init__(self):
        self.setups = self.cleanups = self.cancelled = 0
        self.setup = trio.Event()
        self.setup.set()

    @asynccontextmanager
    async def __call__(self):
        self.setups += 1
        try:
            await self.setup.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        try:
            yield run
        finally:
            self.cleanups += 1


class Crash(Exception):
    """An error that breaks the worker."""


async def crash():
    raise Crash


async def test_process_cancelled_while_its_worker_is_set_up_again(
    autojump_clock, caplog
):
    kind, gate, worker = Kind("pool"), Gate(), SlowWorker()
    async with open_pool(1, worker=worker, crash_on=Crash) as pool:
        worker.setup = trio.Event()
        with pytest.raises(Crash):
            await pool.process(crash)
        await wait_all_tasks_blocked()
        assert [w.state for w in pool.workers()] == [WorkerState.STARTING]
        async with trio.open_nursery() as nursery:
            call = Call(nursery, pool.process, gate)
            await wait_all_tasks_blocked()
            await call.cancel()
            assert call.cancelled
        worker.setup.set()
        await kind.ask_the_facts(pool)
    assert gate.started == 0
    assert worker.setups == worker.cleanups == 2


async def fail_when_cancelled():
    try:
        await trio.sleep_forever()
    finally:
        raise OSError("cut off")


async def fail_in_parts_when_cancelled():
    """Leave by a group of an error and a `Cancelled`."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail_when_cancelled)
        nursery.start_soon(trio.sleep_forever)
        await trio.sleep_forever()


@pytest.mark.parametrize("handler", [trio.sleep_forever, fail_in_parts_when_cancelled])
@pytest.mark.parametrize("state", ["running", "queued"])
def test_ctrl_c_leaves_process_when_the_handler_has_ended(kind, handler, state):
    ended = []

    async def main():
        async with kind.open(1) as pool, trio.open_nursery() as nursery:
            if state == "queued":
                await pool.submit(functools.partial(trio.sleep, 1))

            @trio.lowlevel.enable_ki_protection
            async def interrupt():
                await wait_all_tasks_blocked()
                signal.raise_signal(signal.SIGINT)

            async def job():
                try:
                    await handler()
                finally:
                    ended.append(trio.current_time())

            nursery.start_soon(interrupt)
            try:
                await pool.process(job)
            except KeyboardInterrupt:
                assert len(ended) == (state == "running")
                count = pool.statistics()
                assert count.running == (state == "queued")
                raise

    # Whoever runs the tests in the background may have it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(BaseExceptionGroup) as caught:
            trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        signal.signal(signal.SIGINT, before)
    (interrupt,) = caught.value.exceptions
    assert isinstance(interrupt, KeyboardInterrupt)


def test_an_error_of_the_handler_is_heard_and_ctrl_c_after_it(kind):
    """The caller hears what a direct call raises; trio keeps Ctrl-C for later."""
    heard = []

    @trio.lowlevel.enable_ki_protection
    async def interrupt():
        await wait_all_tasks_blocked()
        signal.raise_signal(signal.SIGINT)

    async def main():
        async with kind.open(1) as pool, trio.open_nursery() as nursery:
            nursery.start_soon(interrupt)
            try:
                await pool.process(fail_when_cancelled)
            except OSError as error:
                heard.append(error)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(heard) == 1


@pytest.mark.parametrize("state", ["queued", "running"])
async def test_process_cancelled_while_the_pool_closes(kind, state, autojump_clock):
    gate, first = Gate(), Gate()
    async with kind.open(1) as pool, trio.open_nursery() as nursery:
        before = Call(nursery, pool.process, first)
        await wait_all_tasks_blocked()
        call = Call(nursery, pool.process, gate)
        await wait_all_tasks_blocked()
        closing = Call(nursery, pool.shutdown)
        await wait_all_tasks_blocked()
        if state == "running":
            first.open.set()
            await wait_all_tasks_blocked()
        await call.cancel()
        assert call.cancelled
        assert gate.started == (state == "running")
        assert closing.ended == (state == "running")
        first.open.set()
        await wait_all_tasks_blocked()
        assert before.value == "through"
        report = closing.value
        assert (report.done, report.cancelled, report.unfinished) == (1, 1, 0)
    kind.ask_the_end(pool)


# submit -----------------------------------------------------------------


@pytest.mark.parametrize("overflow", ["wait", "reject", "drop_oldest"])
@pytest.mark.parametrize("max_backlog", [0, 1])
async def test_submit_in_a_cancelled_scope_does_nothing(
    kind, overflow, max_backlog, autojump_clock
):
    async with kind.open(max_backlog=max_backlog, overflow=overflow) as pool:
        for busy in (0, 2):
            async with all_busy(pool, busy):
                accepted = pool.statistics().accepted
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await pool.submit(next_job)
                assert scope.cancelled_caught
                assert pool.statistics().accepted == accepted
        await kind.ask_the_facts(pool)


@pytest.mark.parametrize("max_backlog", [0, 1])
async def test_submit_cancelled_while_it_waits_for_room_was_never_accepted(
    kind, max_backlog, autojump_clock
):
    gate = Gate()
    async with kind.open(max_backlog=max_backlog) as pool:
        async with trio.open_nursery() as nursery, all_busy(pool):
            for _ in range(max_backlog):
                await pool.submit(next_job)
            accepted = pool.statistics().accepted
            call = Call(nursery, pool.submit, gate)
            behind = Call(nursery, pool.submit, next_job)
            await wait_all_tasks_blocked()
            await call.cancel()
            assert call.cancelled
            assert pool.statistics().accepted == accepted
        assert await behind.value.wait() == "the next job"
        await kind.ask_the_facts(pool)
    assert gate.started == 0


async def test_submit_let_in_before_its_cancellation_returns_the_reply(
    kind, autojump_clock
):
    """Let in and cancelled in one tick: a job nobody knows of would be lost."""
    async with kind.open(1, max_backlog=1) as pool:
        async with trio.open_nursery() as nursery, all_busy(pool, 1):
            queued = await pool.submit(next_job)
            call = Call(nursery, pool.submit, next_job)
            await wait_all_tasks_blocked()
            assert queued.cancel()
            call.scope.cancel()
            await wait_all_tasks_blocked()
            assert call.ended
            assert not call.cancelled
        assert await call.value.wait() == "the next job"
        await kind.ask_the_facts(pool)


async def test_submit_accepted_in_its_first_step_returns_the_reply(
    kind, autojump_clock
):
    async with kind.open() as pool:
        async with trio.open_nursery() as nursery:
            call = await call_and_cancel_in_the_same_tick(
                nursery, pool.submit, next_job
            )
            assert call.ended
            assert not call.cancelled
        assert await call.value.wait() == "the next job"
        await kind.ask_the_facts(pool)


async def test_the_job_of_a_submit_outlives_its_caller(kind, autojump_clock):
    gate = Gate()
    async with kind.open() as pool:
        with trio.CancelScope() as scope:
            reply = await pool.submit(gate)
            scope.cancel()
            await trio.lowlevel.checkpoint()
        await wait_all_tasks_blocked()
        assert (reply.state, gate.cancelled) == (JobState.RUNNING, 0)
        gate.open.set()
        assert await reply.wait() == "through"
        await kind.ask_the_facts(pool)


@pytest.mark.parametrize("method", ["process", "submit"])
async def test_callers_that_wait_for_room_hear_that_the_pool_closes(
    kind, method, autojump_clock
):
    """Refused and cancelled in one tick, a caller hears one of the two, once."""
    gate = Gate()
    async with kind.open(1, max_backlog=0) as pool, trio.open_nursery() as nursery:
        held = Call(nursery, pool.process, Gate())
        await wait_all_tasks_blocked()
        calls = [Call(nursery, getattr(pool, method), gate) for _ in range(3)]
        await wait_all_tasks_blocked()
        await calls[0].cancel()
        Call(nursery, pool.shutdown, math.inf)
        await wait_all_tasks_blocked()
        assert [c.ended for c in calls] == [True] * 3
        assert calls[0].cancelled
        assert [type(c.error) for c in calls[1:]] == [PoolClosed] * 2
        assert not held.ended
        await held.cancel()
        assert held.cancelled
    assert gate.started == 0
    kind.ask_the_end(pool)


# Reply.wait -------------------------------------------------------------


@pytest.mark.parametrize("state", ["queued", "running"])
async def test_a_cancelled_wait_only_stops_waiting(kind, state, autojump_clock):
    gate = Gate()
    async with kind.open() as pool:
        async with trio.open_nursery() as nursery:
            async with all_busy(pool, 2 if state == "queued" else 1):
                reply = await pool.submit(gate)
                calls = [Call(nursery, reply.wait) for _ in range(3)]
                await wait_all_tasks_blocked()
                assert reply.state.value == state
                await calls[1].cancel()
                assert [c.cancelled for c in calls] == [False, True, False]
                assert reply.state.value == state
            await wait_all_tasks_blocked()
            gate.open.set()
        assert [c.value for c in calls] == ["through", None, "through"]
        assert gate.cancelled == 0
        await kind.ask_the_facts(pool)


@pytest.mark.parametrize("done", [False, True])
async def test_a_wait_in_a_cancelled_scope_raises_cancelled(kind, done, autojump_clock):
    gate = Gate()
    async with kind.open() as pool:
        reply = await pool.submit(gate)
        if done:
            gate.open.set()
            await wait_all_tasks_blocked()
            assert reply.done
        with trio.CancelScope() as scope:
            scope.cancel()
            await reply.wait()
        assert scope.cancelled_caught
        gate.open.set()
        assert await reply.wait() == "through"
        await kind.ask_the_facts(pool)


async def test_a_failure_whose_reader_was_cancelled_counts_as_not_heard(
    kind, autojump_clock
):
    gate = Gate()

    async def fail():
        await gate()
        raise ValueError("not heard")

    with pytest.raises(ExceptionGroup) as caught:
        async with kind.open() as pool:
            reply = await pool.submit(fail)
            with trio.move_on_after(0.25):
                await reply.wait()
            gate.open.set()
    assert [str(e) for e in caught.value.exceptions] == ["not heard"]
    kind.ask_the_end(pool)


# map and settle ---------------------------------------------------------


async def slowly(jobs, closed):
    """Give the jobs, then hold the reader up for ever."""
    try:
        for job in jobs:
            yield job
        await trio.sleep_forever()
    finally:
        closed.append(True)


@pytest.mark.parametrize("method", ["map", "settle"])
class TestBatch:
    async def test_in_a_cancelled_scope_nothing_starts(
        self, kind, method, autojump_clock
    ):
        gate = Gate()
        async with kind.open() as pool:
            with trio.CancelScope() as scope:
                scope.cancel()
                await kind.batch(getattr(pool, method), [gate] * 5)
            assert scope.cancelled_caught
            await kind.ask_the_facts(pool)
        assert gate.started == 0

    async def test_cancelled_while_its_items_run_they_are_cancelled(
        self, kind, method, autojump_clock
    ):
        gate = Gate()
        async with kind.open() as pool:
            async with trio.open_nursery() as nursery:
                call = Call(nursery, kind.batch, getattr(pool, method), [gate] * 5)
                await wait_all_tasks_blocked()
                await call.cancel()
                assert call.cancelled
            assert (gate.started, gate.cancelled, gate.ended) == (2, 2, 2)
            await kind.ask_the_facts(pool)

    async def test_cancelled_while_all_workers_are_busy_nothing_starts(
        self, kind, method, autojump_clock
    ):
        gate = Gate()
        async with kind.open() as pool:
            async with trio.open_nursery() as nursery, all_busy(pool):
                call = Call(nursery, kind.batch, getattr(pool, method), [gate] * 5)
                await wait_all_tasks_blocked()
                await call.cancel()
                assert call.cancelled
            await kind.ask_the_facts(pool)
        assert gate.started == 0

    async def test_cancelled_while_the_pool_is_paused_nothing_starts(
        self, kind, method, autojump_clock
    ):
        gate = Gate()
        async with kind.open() as pool:
            pool.pause()
            async with trio.open_nursery() as nursery:
                call = Call(nursery, kind.batch, getattr(pool, method), [gate] * 5)
                await wait_all_tasks_blocked()
                await call.cancel()
                assert call.cancelled
            pool.resume()
            await kind.ask_the_facts(pool)
        assert gate.started == 0

    async def test_cancelled_in_the_tick_of_the_call_nothing_is_lost(
        self, kind, method, autojump_clock
    ):
        gate = Gate()
        async with kind.open() as pool:
            async with trio.open_nursery() as nursery:
                call = await call_and_cancel_in_the_same_tick(
                    nursery, kind.batch, getattr(pool, method), [gate] * 5
                )
                assert call.cancelled
            await kind.ask_the_facts(pool)
        assert gate.started == 0

    async def test_cancelled_while_the_source_is_slow(
        self, kind, method, autojump_clock
    ):
        gate, closed = Gate(), []
        async with kind.open() as pool:
            async with trio.open_nursery() as nursery:
                source = slowly([gate], closed)
                call = Call(nursery, kind.batch, getattr(pool, method), source)
                await wait_all_tasks_blocked()
                assert gate.started == 1
                await call.cancel()
                assert call.cancelled
            assert closed
            assert gate.cancelled == 1
            await kind.ask_the_facts(pool)

    async def test_cancelled_it_returns_only_when_shielded_handlers_have_ended(
        self, kind, method, autojump_clock
    ):
        gate = ShieldedGate()
        async with kind.open() as pool:
            async with trio.open_nursery() as nursery:
                call = Call(nursery, kind.batch, getattr(pool, method), [gate] * 5)
                await wait_all_tasks_blocked()
                await call.cancel()
                assert not call.ended
                gate.open.set()
                await wait_all_tasks_blocked()
                assert call.cancelled
            assert (gate.started, gate.ended) == (2, 2)
            await kind.ask_the_facts(pool)

    @pytest.mark.parametrize("gate_type", [StubbornGate, SwallowingGate])
    async def test_handlers_that_go_on_to_a_value_do_not_get_more_items(
        self, kind, method, gate_type, autojump_clock
    ):
        gate = gate_type()
        async with kind.open() as pool:
            async with trio.open_nursery() as nursery:
                call = Call(nursery, kind.batch, getattr(pool, method), [gate] * 5)
                await wait_all_tasks_blocked()
                await call.cancel()
                gate.open.set()
                await wait_all_tasks_blocked()
                assert call.cancelled
            assert (gate.started, gate.ended) == (2, 2)
            await kind.ask_the_facts(pool)

    async def test_cancelled_while_the_pool_closes(self, kind, method, autojump_clock):
        gate = Gate()
        async with kind.open() as pool:
            async with trio.open_nursery() as nursery:
                call = Call(nursery, kind.batch, getattr(pool, method), [gate] * 5)
                await wait_all_tasks_blocked()
                closing = Call(nursery, pool.shutdown)
                await wait_all_tasks_blocked()
                await call.cancel()
                assert call.cancelled
                await wait_all_tasks_blocked()
                assert closing.ended
        kind.ask_the_end(pool)

    async def test_cancelled_beside_other_callers_it_disturbs_none(
        self, kind, method, autojump_clock
    ):
        gate = Gate()
        async with kind.open() as pool:
            async with trio.open_nursery() as nursery, all_busy(pool, 1):
                call = Call(nursery, kind.batch, getattr(pool, method), [gate] * 5)
                await wait_all_tasks_blocked()
                queued = Call(nursery, pool.process, next_job)
                await wait_all_tasks_blocked()
                assert not queued.ended
                await call.cancel()
                assert call.cancelled
                assert queued.value == "the next job"
            await kind.ask_the_facts(pool)


# stream -----------------------------------------------------------------


class TestStream:
    async def test_entered_in_a_cancelled_scope_nothing_starts(
        self, kind, autojump_clock
    ):
        gate = Gate()
        async with kind.open() as pool:
            with trio.CancelScope() as scope:
                scope.cancel()
                async with kind.batch(pool.stream, [gate] * 5) as results:
                    async for _ in results:
                        pass
            assert scope.cancelled_caught
            await kind.ask_the_facts(pool)
        assert gate.started == 0

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_a_cancelled_read_loses_no_result(
        self, kind, ordered, autojump_clock
    ):
        first, second = Gate(), Gate()
        async with kind.open() as pool:
            async with kind.batch(
                pool.stream, [first, second, next_job], ordered=ordered
            ) as results:
                with trio.move_on_after(0.25) as scope:
                    await anext(results)
                assert scope.cancelled_caught
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await anext(results)
                assert scope.cancelled_caught
                first.open.set()
                await wait_all_tasks_blocked()
                # A result is ready now, and stays ready.
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await anext(results)
                assert scope.cancelled_caught
                second.open.set()
                values = [value async for value in results]
            assert sorted(values) == ["the next job", "through", "through"]
            assert (first.cancelled, second.cancelled) == (0, 0)
            await kind.ask_the_facts(pool)

    async def test_its_body_cancelled_the_running_items_are_cancelled(
        self, kind, autojump_clock
    ):
        gate = Gate()

        async def read():
            async with kind.batch(pool.stream, [gate] * 5) as results:
                await anext(results)

        async with kind.open() as pool:
            async with trio.open_nursery() as nursery:
                call = Call(nursery, read)
                await wait_all_tasks_blocked()
                await call.cancel()
                assert call.cancelled
            assert (gate.started, gate.cancelled, gate.ended) == (2, 2, 2)
            await kind.ask_the_facts(pool)

    @pytest.mark.parametrize("source", ["list", "async"])
    @pytest.mark.parametrize("gate_type", [ShieldedGate, StubbornGate])
    async def test_leaving_cancelled_ends_only_when_the_handlers_have_ended(
        self, kind, source, gate_type, autojump_clock
    ):
        gate, closed, left = gate_type(), [], []
        jobs = [gate] * 5 if source == "list" else slowly([gate] * 5, closed)

        async def leave_early():
            async with kind.batch(pool.stream, jobs):
                await wait_all_tasks_blocked()
            left.append(gate.ended)
            await trio.lowlevel.checkpoint()

        async with kind.open() as pool:
            async with trio.open_nursery() as nursery:
                call = Call(nursery, leave_early)
                await wait_all_tasks_blocked()
                await wait_all_tasks_blocked()
                assert gate.started == 2
                # It waits for the handlers as it leaves; cancelled, it still does.
                await call.cancel()
                assert not call.ended
                assert not left
                gate.open.set()
                await wait_all_tasks_blocked()
                assert call.cancelled
            assert gate.ended == gate.started == 2
            assert left in ([], [2])
            await kind.ask_the_facts(pool)

    async def test_cancelled_while_the_source_is_slow(self, kind, autojump_clock):
        closed = []

        async def read():
            async with kind.batch(pool.stream, slowly([next_job], closed)) as results:
                assert await anext(results) == "the next job"
                await anext(results)

        async with kind.open() as pool:
            async with trio.open_nursery() as nursery:
                call = Call(nursery, read)
                await wait_all_tasks_blocked()
                await call.cancel()
                assert call.cancelled
            assert closed
            await kind.ask_the_facts(pool)

    async def test_cancelled_while_all_workers_are_busy(self, kind, autojump_clock):
        gate = Gate()

        async def read():
            async with kind.batch(pool.stream, [gate] * 5) as results:
                await anext(results)

        async with kind.open() as pool:
            async with trio.open_nursery() as nursery, all_busy(pool):
                call = Call(nursery, read)
                await wait_all_tasks_blocked()
                await call.cancel()
                assert call.cancelled
            await kind.ask_the_facts(pool)
        assert gate.started == 0

    async def test_cancelled_while_the_pool_closes(self, kind, autojump_clock):
        gate = Gate()

        async def read():
            async with kind.batch(pool.stream, [gate] * 5) as results:
                await anext(results)

        async with kind.open() as pool:
            async with trio.open_nursery() as nursery:
                call = Call(nursery, read)
                await wait_all_tasks_blocked()
                closing = Call(nursery, pool.shutdown)
                await wait_all_tasks_blocked()
                await call.cancel()
                assert call.cancelled
                assert closing.ended
        kind.ask_the_end(pool)


# resize -----------------------------------------------------------------


class TestResize:
    async def test_in_a_cancelled_scope_it_raises_cancelled(self, kind, autojump_clock):
        async with kind.open() as pool:
            for size in (2, 3, 1):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await pool.resize(size)
                assert scope.cancelled_caught
                await kind.ask_the_facts(pool)

    async def test_cancelled_while_workers_are_set_up_it_keeps_the_target(
        self, autojump_clock
    ):
        kind, worker = Kind("pool"), SlowWorker()
        async with open_pool(1, worker=worker) as pool:
            worker.setup = trio.Event()
            async with trio.open_nursery() as nursery:
                call = Call(nursery, pool.resize, 3)
                await wait_all_tasks_blocked()
                assert not call.ended
                await call.cancel()
                assert call.cancelled
                assert pool.size == 3
                assert await pool.process(next_job) == "the next job"
                worker.setup.set()
            await kind.ask_the_facts(pool)
        assert (worker.setups, worker.cleanups, worker.cancelled) == (3, 3, 0)

    async def test_cancelled_while_it_waits_for_a_job_it_interrupts_nothing(
        self, kind, autojump_clock
    ):
        async with kind.open(2) as pool:
            async with trio.open_nursery() as nursery:
                async with all_busy(pool):
                    call = Call(nursery, pool.resize, 1)
                    await wait_all_tasks_blocked()
                    assert not call.ended
                    await call.cancel()
                    assert call.cancelled
                    assert pool.size == 1
                    assert pool.statistics().running == 2
            await kind.ask_the_facts(pool)

    async def test_a_cancelled_one_leaves_the_others_waiting(
        self, kind, autojump_clock
    ):
        async with kind.open(2) as pool:
            async with trio.open_nursery() as nursery:
                async with all_busy(pool):
                    call = Call(nursery, pool.resize, 1)
                    other = Call(nursery, pool.resize, 1)
                    await wait_all_tasks_blocked()
                    await call.cancel()
                    assert not other.ended
            assert other.ended
            assert other.error is None
            await kind.ask_the_facts(pool)

    async def test_a_setup_under_way_that_is_not_wanted_any_more_is_cancelled(
        self, autojump_clock
    ):
        kind, worker = Kind("pool"), SlowWorker()
        async with open_pool(1, worker=worker) as pool:
            worker.setup = trio.Event()
            async with trio.open_nursery() as nursery:
                call = Call(nursery, pool.resize, 3)
                await wait_all_tasks_blocked()
                await call.cancel()
                await pool.resize(1)
            assert worker.cancelled == 2
            await kind.ask_the_facts(pool)

    async def test_cancelled_while_the_pool_closes(self, kind, autojump_clock):
        gate = Gate()
        async with kind.open(2) as pool, trio.open_nursery() as nursery:
            held = [Call(nursery, pool.process, gate) for _ in range(2)]
            await wait_all_tasks_blocked()
            call = Call(nursery, pool.resize, 1)
            await wait_all_tasks_blocked()
            await call.cancel()
            assert call.cancelled
            closing = Call(nursery, pool.shutdown)
            await wait_all_tasks_blocked()
            assert not closing.ended
            gate.open.set()
            await wait_all_tasks_blocked()
            assert [c.value for c in held] == ["through"] * 2
            assert closing.value.done == 2
        kind.ask_the_end(pool)


# join -------------------------------------------------------------------


async def test_join_in_a_cancelled_scope_raises_cancelled(kind, autojump_clock):
    async with kind.open() as pool:
        for busy in (0, 1):
            async with all_busy(pool, busy):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await pool.join()
                assert scope.cancelled_caught
        await kind.ask_the_facts(pool)


async def test_a_cancelled_join_loses_nothing(kind, autojump_clock):
    gate = Gate()
    async with kind.open() as pool:
        async with trio.open_nursery() as nursery:
            replies = [await pool.submit(gate) for _ in range(4)]
            call, other = Call(nursery, pool.join), Call(nursery, pool.join)
            await wait_all_tasks_blocked()
            await call.cancel()
            assert call.cancelled
            assert not other.ended
            gate.open.set()
            await wait_all_tasks_blocked()
            assert other.ended
        assert [await reply.wait() for reply in replies] == ["through"] * 4
        await kind.ask_the_facts(pool)


# shutdown ---------------------------------------------------------------


class TestShutdown:
    async def test_a_cancelled_wait_leaves_the_jobs_going_on(
        self, kind, autojump_clock
    ):
        gate = Gate()
        async with kind.open() as pool:
            replies = [await pool.submit(gate) for _ in range(4)]
            async with trio.open_nursery() as nursery:
                call = Call(nursery, pool.shutdown)
                await wait_all_tasks_blocked()
                await call.cancel()
                assert call.cancelled
            assert pool.closed
            with pytest.raises(PoolClosed):
                await pool.process(next_job)
            assert (pool.statistics().running, pool.statistics().queued) == (2, 2)
            gate.open.set()
            assert [await reply.wait() for reply in replies] == ["through"] * 4
            report = await pool.shutdown()
            assert (report.done, report.cancelled) == (4, 0)
        kind.ask_the_end(pool)

    async def test_in_a_cancelled_scope_no_job_is_cancelled(self, kind, autojump_clock):
        """Only the grace cancels jobs, never the cancelled wait for it."""
        gate = Gate()
        async with kind.open() as pool:
            reply = await pool.submit(gate)
            with trio.CancelScope() as scope:
                scope.cancel()
                await pool.shutdown()
            assert scope.cancelled_caught
            await wait_all_tasks_blocked()
            assert gate.cancelled == 0
            gate.open.set()
            assert await reply.wait() == "through"
        kind.ask_the_end(pool)

    async def test_cancelled_after_its_grace_the_jobs_stay_cancelled(
        self, kind, autojump_clock
    ):
        gate = ShieldedGate()
        async with kind.open() as pool:
            reply = await pool.submit(gate)
            async with trio.open_nursery() as nursery:
                call = Call(nursery, pool.shutdown, 0.25)
                # The grace is over, the second to unwind is not.
                await trio.sleep(0.5)
                assert not call.ended
                await call.cancel()
                assert call.cancelled
            gate.open.set()
            with pytest.raises(JobCancelled) as caught:
                await reply.wait()
            assert caught.value.started
            assert gate.cancelled == 1
        kind.ask_the_end(pool)

    async def test_a_cancelled_one_leaves_the_others_waiting(
        self, kind, autojump_clock
    ):
        gate = Gate()
        async with kind.open() as pool:
            reply = await pool.submit(gate)
            async with trio.open_nursery() as nursery:
                call, other = Call(nursery, pool.shutdown), Call(nursery, pool.shutdown)
                await wait_all_tasks_blocked()
                await call.cancel()
                assert not other.ended
                gate.open.set()
            assert other.value.done == 1
            assert await reply.wait() == "through"
        kind.ask_the_end(pool)


# entering and leaving open_pool -------------------------------------------


class TestBlock:
    async def test_entered_in_a_cancelled_scope_its_body_never_runs(
        self, kind, autojump_clock
    ):
        entered = False
        with trio.CancelScope() as scope:
            scope.cancel()
            async with kind.open():
                entered = True
        assert scope.cancelled_caught
        assert not entered

    async def test_cancelled_while_workers_are_set_up_all_are_cleaned_up(
        self, autojump_clock
    ):
        worker, entered = SlowWorker(), False
        worker.setup = trio.Event()
        with trio.move_on_after(0.25) as scope:
            async with open_pool(3, worker=worker):
                entered = True
        assert scope.cancelled_caught
        assert not entered
        assert worker.setups == worker.cancelled == 3

    async def test_cancelled_while_some_workers_are_ready_they_are_closed(
        self, autojump_clock
    ):
        entered, closed, cancelled = False, [], []
        ready = trio.Event()
        ready.set()
        turns = iter([ready, trio.Event()])

        @asynccontextmanager
        async def worker():
            turn = next(turns)
            try:
                await turn.wait()
            except trio.Cancelled:
                cancelled.append(True)
                raise
            yield run
            closed.append(True)

        with trio.move_on_after(0.25) as scope:
            async with open_pool(2, worker=worker):
                entered = True
        assert scope.cancelled_caught
        assert not entered
        assert len(cancelled) == 1
        # The generator went on after its yield, so the close was a normal one,
        # or it was cancelled there: in both cases no worker is left.
        assert len(closed) <= 1

    async def test_its_body_cancelled_every_job_ends_and_the_cancel_leaves_bare(
        self, kind, autojump_clock
    ):
        gate, replies = Gate(), []
        with trio.move_on_after(0.25) as scope:
            async with kind.open() as pool:
                replies += [await pool.submit(gate) for _ in range(4)]
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert (gate.started, gate.cancelled, gate.ended) == (2, 2, 2)
        assert [r.state for r in replies] == [JobState.CANCELLED] * 4
        for reply, started in zip(replies, (True, True, False, False), strict=True):
            with pytest.raises(JobCancelled) as caught:
                await reply.wait()
            assert caught.value.started is started
        kind.ask_the_end(pool)

    async def test_leaving_cancelled_while_it_waits_for_jobs_cancels_them(
        self, kind, autojump_clock
    ):
        gate, replies = Gate(), []
        with trio.move_on_after(0.25) as scope:
            async with kind.open() as pool:
                replies += [await pool.submit(gate) for _ in range(4)]
        assert scope.cancelled_caught
        assert gate.cancelled == gate.ended == 2
        assert [r.state for r in replies] == [JobState.CANCELLED] * 4
        kind.ask_the_end(pool)

    async def test_leaving_cancelled_waits_for_shielded_handlers(
        self, kind, autojump_clock
    ):
        gate, left = ShieldedGate(), trio.Event()

        async def block():
            async with kind.open() as pool:
                pools.append(pool)
                await pool.submit(gate)
                await wait_all_tasks_blocked()
            left.set()

        pools = []
        async with trio.open_nursery() as nursery:
            call = Call(nursery, block)
            await trio.sleep(0.25)
            await call.cancel()
            await trio.sleep(5)
            # However long it takes, nothing outlives the block.
            assert not call.ended
            gate.open.set()
            await wait_all_tasks_blocked()
            assert call.cancelled
        assert not left.is_set()
        assert gate.ended == 1
        kind.ask_the_end(pools[0])

    async def test_leaving_cancelled_a_value_of_a_handler_is_kept(
        self, kind, autojump_clock
    ):
        replies = []
        with trio.move_on_after(0.25) as scope:
            async with kind.open() as pool:
                replies.append(await pool.submit(SwallowingGate()))
        assert scope.cancelled_caught
        assert await replies[0].wait() == "swallowed"
        kind.ask_the_end(pool)

    async def test_left_by_an_error_in_a_cancelled_scope_the_error_wins(
        self, kind, autojump_clock
    ):
        gate, error = Gate(), ValueError("of the body")
        with pytest.raises(ValueError) as caught:
            with trio.CancelScope() as scope:
                async with kind.open() as pool:
                    await pool.submit(gate)
                    await wait_all_tasks_blocked()
                    scope.cancel()
                    raise error
        assert caught.value is error
        assert gate.cancelled == 1
        kind.ask_the_end(pool)

    async def test_cancelled_with_its_callers_inside_everyone_ends(
        self, kind, autojump_clock
    ):
        """A nursery inside the block and the block are cancelled together."""
        gate = Gate()
        with trio.move_on_after(0.25) as scope:
            async with kind.open(max_backlog=1) as pool:
                async with trio.open_nursery() as nursery:
                    for _ in range(2):
                        nursery.start_soon(pool.process, gate)
                    await wait_all_tasks_blocked()
                    for method in (pool.process, pool.submit, pool.process):
                        nursery.start_soon(method, gate)
                    nursery.start_soon(kind.batch, pool.map, [gate] * 3)
                    nursery.start_soon(pool.join)
                    nursery.start_soon(pool.resize, 1)
        assert scope.cancelled_caught
        # The job of the submit may have been let in by the same cancellation.
        assert gate.started == gate.ended
        assert gate.ended in (2, 3)
        kind.ask_the_end(pool)


# Every public async method is a checkpoint, whether it has to wait or not.


class TestCheckpoints:
    async def test_of_process(self, kind):
        async with kind.open() as pool:
            with assert_checkpoints():
                await pool.process(next_job)

    async def test_of_process_that_is_dropped_at_once(self, kind, autojump_clock):
        async with kind.open(0, max_backlog=0, overflow="drop_oldest") as pool:
            with assert_checkpoints(), pytest.raises(Exception, match="dropped"):
                await pool.process(next_job)

    async def test_of_submit_and_wait(self, kind):
        async with kind.open(1) as pool:
            for _ in range(3):
                with assert_checkpoints():
                    reply = await pool.submit(next_job)
                with assert_checkpoints():
                    await reply.wait()
                with assert_checkpoints():
                    await reply.wait()

    async def test_of_submit_to_the_backlog(self, kind):
        async with kind.open(1) as pool, all_busy(pool, 1):
            with assert_checkpoints():
                await pool.submit(next_job)

    async def test_of_wait_that_raises(self, kind):
        async def fail():
            raise ValueError("failed")

        async with kind.open(1) as pool:
            reply = await pool.submit(fail)
            for _ in range(2):
                with assert_checkpoints(), pytest.raises(ValueError):
                    await reply.wait()

    @pytest.mark.parametrize("count", [0, 1, 9])
    @pytest.mark.parametrize("method", ["map", "settle"])
    async def test_of_batches(self, kind, method, count):
        async with kind.open() as pool:
            with assert_checkpoints():
                await kind.batch(getattr(pool, method), [next_job] * count)

    @pytest.mark.parametrize("count", [0, 1, 9])
    @pytest.mark.parametrize("method", ["map", "settle"])
    async def test_of_batches_with_an_async_source(self, kind, method, count):
        async def source():
            for _ in range(count):
                yield next_job

        async with kind.open() as pool:
            with assert_checkpoints():
                await kind.batch(getattr(pool, method), source())

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_of_the_first_read_of_a_stream(self, kind, ordered):
        async with kind.open() as pool:
            jobs = [next_job] * 3
            async with kind.batch(pool.stream, jobs, ordered=ordered) as results:
                await wait_all_tasks_blocked()
                with assert_checkpoints():
                    await anext(results)

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_of_the_cancellation_of_every_read_of_a_stream(self, kind, ordered):
        async with kind.open() as pool:
            jobs = [next_job] * 3
            async with kind.batch(pool.stream, jobs, ordered=ordered) as results:
                for _ in jobs:
                    await wait_all_tasks_blocked()
                    with trio.CancelScope() as scope:
                        scope.cancel()
                        await anext(results)
                    assert scope.cancelled_caught
                    await anext(results)
                with pytest.raises(StopAsyncIteration):
                    await anext(results)

    @pytest.mark.parametrize("count", [0, 3])
    async def test_of_a_stream_that_is_left_unread(self, kind, count):
        async with kind.open() as pool:
            with assert_checkpoints():
                async with kind.batch(pool.stream, [next_job] * count):
                    pass

    @pytest.mark.parametrize("size", [0, 1, 2, 3])
    async def test_of_resize(self, kind, size):
        async with kind.open() as pool:
            with assert_checkpoints():
                await pool.resize(size)

    async def test_of_join(self, kind):
        async with kind.open() as pool:
            with assert_checkpoints():
                await pool.join()
            await pool.submit(next_job)
            with assert_checkpoints():
                await pool.join()

    @pytest.mark.parametrize("size", [0, 2])
    async def test_of_shutdown(self, kind, size):
        async with kind.open(size) as pool:
            for _ in range(2):
                with assert_checkpoints():
                    await pool.shutdown()

    @pytest.mark.parametrize("size", [0, 2])
    async def test_of_entering_and_leaving_the_block(self, kind, size):
        block = kind.open(size)
        with assert_checkpoints():
            await block.__aenter__()
        with assert_checkpoints():
            await block.__aexit__(None, None, None)
