"""Generated programs for a pool of the user's own workers, by hypothesis."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from inspect import getattr_static, iscoroutinefunction, signature
from types import FunctionType
from typing import Any, ClassVar, TypeVar, TypeVarTuple, Unpack

import outcome
import trio
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)
from trio.testing import MockClock

from .. import (
    JobError,
    JobState,
    Pool,
    PoolBroken,
    PoolClosed,
    PoolError,
    Restart,
    WorkerState,
    open_pool,
)
from ._calls import Block, BlockFailed, Call, Ending, Fates
from ._checks import assert_books_balance
from ._draws import (
    Options,
    endings,
    keys,
    moments,
    of_attempts,
    of_machine,
    of_submits,
    pauses,
    seldom,
    some,
    some_faults,
    some_options,
)
from ._faults import Fault, InjectedCrash, InjectedFault
from ._groups import leaves, unlogged
from ._hosted import Abandoned, HostedRun
from ._scheduler import reseed, seeded_scheduler
from ._witness import Ticket, Witness

T = TypeVar("T")
Args = TypeVarTuple("Args")

# Seconds that jobs get at the end, after which those that still run are cancelled.
_PATIENCE = [10.0, 1_000.0]

# Nothing else is of interest before there are jobs.
_has_calls = precondition(lambda machine: bool(machine._calls))  # noqa: SLF001

# That a closed pool takes no jobs needs no more than a few of them.
_while_open = precondition(lambda machine: machine._late_calls < 3)  # noqa: SLF001


class PoolMachine(RuleBasedStateMachine):
    """A state machine of hypothesis that stresses a pool of your workers.

    Subclass it, say what the workers are and what they are given, and have it
    run: ``TestStore = StoreMachine.TestCase``. Give one of `handler` and
    `worker`; rules of your own call the pool by `run` and `begin`. Time is
    virtual, and passes only in the rule ``sleep``, in yours, and at the end.

    After each step the books must balance, and each job that has ended must
    have ended as promised; after the last one the pool is left, and nothing
    may remain. Each program has a machine of its own: what must be fresh for
    each is made in ``__init__``.
    """

    handler: ClassVar[Any] = None
    """An async function of one argument, as in `open_pool`: a method will do."""
    worker: ClassVar[Any] = None
    """A function that returns an async context manager, as in `open_pool`."""
    inputs: ClassVar[Any] = st.integers(0, 3)
    """What jobs are given: a strategy; by default small numbers."""
    sizes: ClassVar[Any] = st.integers(1, 4)
    """Workers of the pool at the start and after each ``resize``: a strategy."""
    options: ClassVar[Any] = some_options
    """Options of the pool: a dict, or a strategy of such."""
    faults: ClassVar[Any] = some_faults
    """What goes wrong with a job: a strategy of `Fault` or None, or just None."""
    raises: ClassVar[tuple[type[BaseException], ...]] = ()
    """Errors that the handler may raise; any other one fails the test."""

    calls: ClassVar[Bundle[Any]] = Bundle("calls")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            mark = getattr(value, "hypothesis_stateful_rule", None)
            if iscoroutinefunction(getattr(mark, "function", None)):
                raise TypeError(
                    f"rule {cls.__name__}.{name} must be a plain function that calls "
                    "self.run(async_fn, *args) or self.begin(async_fn, *args), got an "
                    "async one"
                )

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._witness = Witness(self.counts, tuple(self.raises))
        self._stack = ExitStack()
        self._hosted: HostedRun | None = None
        self._block: Block | None = None
        self._fates: Fates | None = None
        self._calls: dict[Call, None] = {}
        self._chosen: dict[str, Any] = {}
        self._most = 0
        self._paused = False
        self._closed = False
        self._late_calls = 0
        self._tells_all = False
        self._held = 0
        self._order = 0

    def _given(self, name: str, arguments: int) -> Any:
        """Return a handler or worker; one that is no method is not made one."""
        plain = getattr_static(self, name)
        if isinstance(plain, FunctionType):
            parameters = signature(plain).parameters.values()
            needed = [one for one in parameters if one.default is one.empty]
            if len(needed) <= arguments:
                return plain
        return getattr(self, name)

    # For subclasses.

    def check_result(self, job_input: Any, result: Any) -> None:
        """Check the result of a job: override this, and raise what is wrong."""

    def check_end(self) -> None:
        """Check what the pool has left behind: override this likewise."""

    @property
    def pool(self) -> Pool[Any, Any]:
        """The pool; call its methods by `run` and `begin`."""
        if self._block is None or self._block.pool is None:
            raise RuntimeError(
                "the pool is not open yet: rules marked @initialize come in any order"
            )
        return self._block.pool

    def run(self, async_fn: Callable[[Unpack[Args]], Awaitable[T]], *args: *Args) -> T:
        """Await ``async_fn(*args)`` in the run of the pool; return what it returns.

        Other tasks go on meanwhile, and time passes as it needs.

        Raises:
          AssertionError: it hangs.
        """
        self._draw_anew()
        result = self._host().run(async_fn, *args)
        self._check()
        return result

    def begin(
        self, async_fn: Callable[[Unpack[Args]], Awaitable[object]], *args: *Args
    ) -> None:
        """Start ``async_fn(*args)`` in a task of its own, and go on at once.

        An error out of it fails the test.
        """

        async def guarded() -> None:
            try:
                await async_fn(*args)
            except Exception as error:
                self._witness.report(error)

        self._draw_anew()
        self._host().start(guarded)
        self._go_on()

    def _draw_anew(self) -> None:
        """Let no step decide on the order of tasks in later ones.

        A program goes on failing so while others of its steps are left out.
        """
        reseed(self._order)

    def _host(self) -> HostedRun:
        if self._hosted is None:
            raise RuntimeError(
                "the pool is not open yet: rules marked @initialize come in any order"
            )
        return self._hosted

    # The rules: each has tasks start, which get their turn after it.

    @initialize(
        size=of_machine("sizes"),
        options=of_machine("options"),
        watched=st.booleans(),
        ending=endings,
        order=st.integers(0, 999),
    )
    def open(
        self, size: int, options: Options, watched: bool, ending: Ending, order: int
    ) -> None:
        """Open the pool; say how its block ends, and in which order tasks run."""
        handler, worker = self._given("handler", 1), self._given("worker", 0)
        if (handler is None) == (worker is None):
            raise TypeError(
                f"{type(self).__name__} must have either a handler or a worker, got "
                f"{handler!r} and {worker!r}"
            )
        chosen = self._chosen = {
            "restart": Restart(math.inf),
            "unobserved": "ignore",
            **options,
        }
        if watched:
            self._fates = Fates()
            chosen["hooks"] = [*chosen.get("hooks", ()), self._fates]
        witness = self._witness
        witness.max_jobs = chosen.get("max_jobs", math.inf)
        witness.has_middleware = any(map(chosen.get, ("middleware", "plugins")))
        if worker is not None:
            factory = partial(witness.live, worker)
            opening = partial(open_pool, size, worker=factory, **chosen)
        else:
            watch = witness.watch(handler)
            opening = partial(open_pool, size, watch, **chosen)
        # Where something else holds jobs back, or an idle worker may not be free.
        self._tells_all = not any(
            map(chosen.get, ("rate", "limiter", "breaker", "scale", "choose"))
        )
        self._most = size
        quiet = unlogged(InjectedCrash, InjectedFault, Abandoned)
        self._stack.enter_context(quiet)
        self._order = order
        clock = MockClock(autojump_threshold=0)
        self._stack.enter_context(seeded_scheduler(order, clock))
        self._hosted = HostedRun(clock)
        self._hosted.suspects = witness.tasks
        self._stack.callback(self._hosted.close)
        self._block = Block(ending)
        self._hosted.start(self._block.run, opening)
        self._hosted.run(self._block.opened.wait)
        if self._block.pool is None:
            assert self._block.error is not None
            raise self._block.error
        witness.may_run = self._may_run

    @_while_open
    @rule(
        target=calls,
        job_input=of_machine("inputs"),
        key=keys,
        options=some(of_attempts),
        fault=of_machine("faults"),
        deadline=seldom(moments, None),
        sleep=pauses,
    )
    def process(
        self,
        job_input: Any,
        key: str | None,
        options: Options,
        fault: Fault | None,
        deadline: float | None,
        sleep: float,
    ) -> Call:
        """Have a task wait for a job, perhaps not longer than some seconds."""
        options = {**options, "key": key}
        ticket = self._ticket(job_input, fault, options)
        call = Call("process", [ticket])

        async def act() -> None:
            if deadline is not None:
                call.scope.deadline = trio.current_time() + deadline
            self._witness.give_in(ticket)
            end = await outcome.acapture(self.pool.process, ticket, **options)
            self._judge(ticket, end)

        return self._follow(call, act, sleep)

    @_while_open
    @rule(
        target=calls,
        job_input=of_machine("inputs"),
        key=keys,
        options=some(of_submits),
        fault=of_machine("faults"),
        wait=st.booleans(),
        sleep=pauses,
    )
    def submit(
        self,
        job_input: Any,
        key: str | None,
        options: Options,
        fault: Fault | None,
        wait: bool,
        sleep: float,
    ) -> Call:
        """Have a task give in a job, and wait for room or not."""
        options = {**options, "key": key}
        ticket = self._ticket(job_input, fault, options)
        call = Call("submit" if wait else "submit_nowait", [ticket])

        async def act() -> None:
            self._witness.give_in(ticket)
            try:
                if wait:
                    call.reply = await self.pool.submit(ticket, **options)
                else:
                    call.reply = self.pool.submit_nowait(ticket, **options)
            except Exception as error:
                if not _is_bad_delay(error):
                    self._witness.judge_error(ticket, error)
            else:
                self._judge(ticket, await outcome.acapture(call.reply.wait))

        return self._follow(call, act, sleep)

    @_while_open
    @rule(
        target=calls,
        method=st.sampled_from(["map", "settle", "stream"]),
        job_inputs=st.lists(
            st.tuples(of_machine("inputs"), of_machine("faults")), max_size=5
        ),
        options=some(of_attempts),
        sleep=pauses,
    )
    def batch(
        self,
        method: str,
        job_inputs: list[tuple[Any, Fault | None]],
        options: Options,
        sleep: float,
    ) -> Call:
        """Have a task give in several jobs at once, and wait for all results."""
        tickets = [self._ticket(*each, options) for each in job_inputs]

        async def act() -> None:
            try:
                await getattr(self, f"_{method}")(tickets, options)
            except Exception as error:
                self._judge_batch(tickets, error)

        return self._follow(Call(method, tickets), act, sleep)

    @_while_open
    @rule(
        target=calls,
        job_inputs=st.lists(
            st.tuples(of_machine("inputs"), of_machine("faults")), max_size=3
        ),
        sleep=pauses,
    )
    def lease(self, job_inputs: list[tuple[Any, Fault | None]], sleep: float) -> Call:
        """Have a task take a worker for several jobs in a row."""
        tickets = [self._ticket(*each, {"leased": True}) for each in job_inputs]

        async def act() -> None:
            try:
                async with self.pool.lease() as worker:
                    for ticket in tickets:
                        end = await outcome.acapture(worker.process, ticket)
                        self._judge(ticket, end)
            except (PoolClosed, PoolBroken) as error:
                self.counts[type(error).__name__] += 1

        return self._follow(Call("lease", tickets), act, sleep)

    @rule(call=calls)
    def cancel(self, call: Call) -> None:
        """Cancel a call, or the job that it left behind."""
        self.counts["cancellations"] += not call.over

        self.begin(_as_async(call.cancel))

    @_has_calls
    @rule(size=of_machine("sizes"))
    def resize(self, size: int) -> None:
        """Want another number of workers."""
        self.counts["resizes"] += 1
        self._most = max(self._most, size)

        async def act() -> None:
            await self.pool.resize(size)
            if self.pool.size == size:
                self._claim_size_is_reached()

        self._control(act)

    @precondition(lambda self: self._calls and not self._paused)
    @rule()
    def pause(self) -> None:
        """Let workers take no more jobs."""
        self._control(self._set_paused, True)

    @precondition(lambda self: self._paused)
    @rule()
    def resume(self) -> None:
        """Let workers take jobs again."""
        self._control(self._set_paused, False)

    @_has_calls
    @rule()
    def join(self) -> None:
        """Have a task wait until all jobs have ended."""
        self._control(self.pool.join)

    @precondition(lambda self: self._calls and self.worker is not None)
    @rule(times=st.integers(1, 2))
    def fail_setups(self, times: int) -> None:
        """Have the next workers that start fail to do so."""
        self._witness.failing_setups = times

    @precondition(lambda self: len(self._calls) > 10 and not self._closed)
    @rule(grace=st.sampled_from([math.inf, 0.0, 1.0, None]))
    def close(self, grace: float | None) -> None:
        """Shut the pool down within some seconds, or cancel it."""
        self._closed = True
        self.counts["closings"] += 1
        if grace is None:
            self._control(_as_async(self.pool.cancel))
        else:
            self._control(self.pool.shutdown, grace)

    @_has_calls
    @rule(seconds=moments)
    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.run(trio.sleep, seconds)

    @_has_calls
    @rule()
    def rest(self) -> None:
        """Let a minute pass, in which most of what can end does."""
        self.run(trio.sleep, 60.0)

    @_has_calls
    @rule()
    def together(self) -> None:
        """Have what the next two steps do happen in the same turn."""
        self._held = 1

    # What tasks do.

    def _ticket(self, job_input: Any, fault: Fault | None, options: Options) -> Ticket:
        return Ticket(
            job_input,
            fault,
            key=options.get("key"),
            timeout=options.get("timeout", self._chosen.get("timeout", math.inf)),
            delay=options.get("delay", 0.0),
            ttl=options.get("ttl", math.inf),
            leased=options.get("leased", False),
        )

    async def _set_paused(self, paused: bool) -> None:
        self._paused = paused
        if paused:
            self.pool.pause()
        else:
            self.pool.resume()

    def _control(
        self, async_fn: Callable[[Unpack[Args]], Awaitable[object]], *args: *Args
    ) -> None:
        """Call what the pool may refuse, as it is closed by then."""

        async def act() -> None:
            try:
                await async_fn(*args)
            except (PoolClosed, PoolBroken):
                pass

        self.begin(act)

    def _follow(
        self, call: Call, act: Callable[[], Awaitable[None]], sleep: float
    ) -> Call:
        """Have a task do this for a call; return the call."""
        self.counts["jobs"] += len(call.tickets)
        self._calls[call] = None
        self._late_calls += self._closed

        async def follow() -> None:
            try:
                with call.scope:
                    await act()
            except ExceptionGroup as error:
                # Items failed as the call was cancelled, which it hears of together.
                self._judge_batch(call.tickets, error)
            call.over = True
            if call.reply is None:
                self._claim_none_runs(call)

        is_held = self._held
        self.begin(follow)
        if sleep and not is_held:
            self.sleep(sleep)
        return call

    def _claim_none_runs(self, call: Call) -> None:
        for ticket in call.tickets:
            self._witness.claim(
                not ticket.runs, f"{call!r} is over, but job {ticket!r} still runs"
            )

    def _judge(self, ticket: Ticket, end: outcome.Outcome[Any]) -> None:
        if isinstance(end, outcome.Value):
            self._witness.judge_result(ticket, end.value)
            try:
                self.check_result(ticket.input, end.value)
            except Exception as error:
                self._witness.report(error)
            return
        assert isinstance(end, outcome.Error)
        if isinstance(end.error, trio.Cancelled):
            raise end.error
        self._witness.judge_error(ticket, end.error)

    async def _map(self, tickets: list[Ticket], options: Options) -> None:
        results = await self.pool.map(tickets, **options)
        for ticket, result in zip(tickets, results, strict=True):
            self._judge(ticket, outcome.Value(result))

    async def _settle(self, tickets: list[Ticket], options: Options) -> None:
        settled = await self.pool.settle(tickets, **options)
        for ticket, each in zip(tickets, settled, strict=True):
            self._witness.claim(each.item is ticket, "settle() mixed up its items")
            self._judge(ticket, each.outcome)

    async def _stream(self, tickets: list[Ticket], options: Options) -> None:
        seen = 0
        opening = self.pool.stream(tickets, outcomes=True, **options)
        async with opening as stream:
            async for each in stream:
                ticket = tickets[seen]
                seen += 1
                self._witness.claim(each.item is ticket, "stream() mixed up its items")
                self._judge(ticket, each.outcome)
        self._witness.claim(
            seen == len(tickets), f"stream() gave {seen} of {len(tickets)} results"
        )

    def _judge_batch(self, tickets: list[Ticket], error: Exception) -> None:
        """Hold the errors of a batch against what the handlers of its jobs did."""
        for leaf in leaves(error):
            self.counts[type(leaf).__name__] += 1
            if isinstance(leaf, PoolError):
                continue
            raised = any(
                attempt.error is leaf
                for ticket in tickets
                for attempt in ticket.attempts
            )
            self._witness.claim(raised, f"a batch raised {leaf!r}, which no job did")

    # What must hold after each step.

    def _may_run(self) -> float:
        """How many jobs may run: those that do not stay as it shrinks run on."""
        if "scale" in self._chosen:
            return math.inf
        return max(self.pool.size, self._most)

    def _claim_no_worker_is_too_many(self) -> None:
        there, most = len(self.pool.workers()), self._may_run()
        self._witness.claim(there <= most, f"there are {there} workers, not {most}")
        self._most = max(self.pool.size, there)

    def _claim_size_is_reached(self) -> None:
        there, size = len(self.pool.workers()), self.pool.size
        self._witness.claim(
            there == size, f"resize({size}) has returned, but there are {there} workers"
        )

    def _go_on(self) -> None:
        """Give tasks their turns, unless the next step is to come in the same one."""
        if self._held:
            self._held -= 1
        else:
            self._host().calm()
            self._claim_no_worker_is_idle_in_vain()
            self._claim_no_worker_is_too_many()
            self._claim_none_is_delayed_for_too_long()
        self._check()

    def _check(self) -> None:
        self._raise_trouble()
        assert_books_balance(self.pool)

    def _claim_no_worker_is_idle_in_vain(self) -> None:
        count = self.pool.statistics()
        is_told = self._tells_all and not self._witness.asks_ready
        if not count.queued or self._paused or not is_told:
            return
        for call in self._calls:
            keyed = any(ticket.key is not None for ticket in call.tickets)
            if not call.over and (keyed or call.method == "lease"):
                return
        idle = [
            worker.id
            for worker in self.pool.workers()
            if worker.state is WorkerState.IDLE
        ]
        self._witness.claim(
            not idle, f"{count.queued} jobs wait while workers {idle} are idle"
        )

    def _claim_none_is_delayed_for_too_long(self) -> None:
        now = self._host().now()
        for call in self._calls:
            reply = call.reply
            if reply is None or reply.state is not JobState.DELAYED or call.runs:
                continue
            (ticket,) = call.tickets
            over = now - ticket.given - ticket.delay
            self._witness.claim(
                ticket.attempts or over < 0.001,
                f"job {ticket!r} still waits {over} seconds after its delay",
            )

    def _raise_trouble(self) -> None:
        trouble = self._witness.trouble
        if trouble is not None:
            raise trouble

    # The end.

    def teardown(self) -> None:
        """Leave the block round the pool, and see that nothing remains."""
        with self._stack:
            if sys.exc_info()[1] is not None:
                # The program has failed already, and that is the news.
                return
            block, hosted = self._block, self._hosted
            if hosted is not None and block is not None and block.pool is not None:
                self._end(hosted, block)

    def _end(self, hosted: HostedRun, block: Block) -> None:
        hosted.calm()
        self._raise_trouble()
        if block.ending == "leave":
            self._finish(hosted)
        block.closing.set()
        hosted.run(block.left.wait)
        hosted.calm()
        self._raise_trouble()
        self._check_block_error(block)
        for call in self._calls:
            assert call.over, f"{call!r} has not ended, but the pool has"
        count = self.pool.statistics()
        assert_books_balance(self.pool)
        left = count.delayed, count.queued, count.running
        assert not any(left), f"the pool is gone, but not all of its jobs: {count}"
        contexts = self._witness.open_contexts
        assert not contexts, f"the pool is gone, but {contexts} workers are open"
        tasks = [task.name for task in hosted.tasks()]
        assert not tasks, f"the pool is gone, but tasks are left: {tasks}"
        self._check_fates()
        self.check_end()

    def _finish(self, hosted: HostedRun) -> None:
        """Have all jobs end, of which those that hang are cancelled; shut down."""

        async def free() -> None:
            if not self.pool.closed:
                self.pool.resume()
            if not self.pool.size and not self.pool.closed:
                await self.pool.resize(1)

        self._witness.failing_setups = 0
        hosted.run(free)
        self._most = max(self._most, self.pool.size)
        cancelled: set[Ticket] = set()
        while True:
            for seconds in _PATIENCE:
                if self._has_unfinished():
                    hosted.run(trio.sleep, seconds)
            self._raise_trouble()
            hanging = [call for call in self._calls if call.runs]
            if not hanging:
                break
            for call in hanging:
                for ticket in filter(lambda ticket: ticket.runs, call.tickets):
                    assert ticket not in cancelled, (
                        f"job {ticket!r} has been cancelled, but had not ended after "
                        f"{sum(_PATIENCE):,} seconds"
                    )
                    cancelled.add(ticket)
                    limited = ticket.hangs and not self._held
                    assert not limited or ticket.timeout == math.inf, (
                        f"job {ticket!r} still runs, despite its timeout of "
                        f"{ticket.timeout} seconds"
                    )
                call.cancel()
        lost = [call for call in self._calls if not call.over]
        assert not lost, f"nothing runs any more, but {lost[0]!r} has not ended"
        was_open = not self.pool.closed
        report = hosted.run(self.pool.shutdown, math.inf)
        # Later calls hear of what the first has met with.
        fates = report.done, report.failed, report.cancelled, report.unfinished
        assert not (was_open and any(fates)), (
            f"all jobs had ended before the shutdown, but {report}"
        )

    def _has_unfinished(self) -> bool:
        count = self.pool.statistics()
        waiting = count.delayed + count.queued + count.running
        return bool(waiting) or not all(call.over for call in self._calls)

    def _check_block_error(self, block: Block) -> None:
        error = block.error
        expected: tuple[type[Exception], ...] = ()
        if self._chosen["restart"].limit < math.inf:
            expected = (PoolBroken,)
        if block.ending == "raise":
            expected = (*expected, BlockFailed)
        if error is not None and not isinstance(error, expected):
            for leaf in leaves(error):
                if not isinstance(leaf, (JobError, InjectedFault, *self.raises)):
                    raise error

    def _check_fates(self) -> None:
        """Hold the hooks, if there were any, against the books."""
        if self._fates is None:
            return
        ends = self._fates.ends
        twice = {job: states for job, states in ends.items() if len(states) != 1}
        assert not twice, f"jobs ended more than once: {twice}"
        count = self.pool.statistics()
        told = Counter(state for states in ends.values() for state in states)
        for state in JobState:
            if state.value not in {"delayed", "queued", "running"}:
                booked = getattr(count, state.value)
                assert told[state] == booked, (
                    f"hooks heard of {told[state]} jobs that are {state.value}, "
                    f"the books say {booked}"
                )


def _as_async(function: Callable[[], object]) -> Callable[[], Awaitable[None]]:
    async def act() -> None:
        function()

    return act


def _is_bad_delay(error: Exception) -> bool:
    """Say whether a pool without a backlog has refused to keep a delayed job."""
    return isinstance(error, ValueError) and str(error).startswith("delay ")
