"""Simulated load: the pool itself, in virtual time, under jobs drawn by chance."""

import math
import random
from collections.abc import (
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sized,
)
from itertools import accumulate, cycle, repeat
from typing import Any, TypeAlias, TypedDict, Unpack, cast, final

import attrs
import trio

from .. import (
    BacklogFull,
    Backoff,
    CircuitOpen,
    JobExpired,
    JobState,
    Pool,
    PoolConfig,
    PoolOptions,
    Retry,
    open_pool,
)
from .._checks import check_count, check_seconds, check_share, is_async, refuse
from .._config import make_config
from ._clock import VirtualClock
from ._groups import leaves, unlogged
from ._hosted import refuse_inside_trio
from ._ledger import Call, FullLedger, Ledger
from ._loads import ArrivalModel, Arrivals, Draw, HandlerModel, Recorded, Trace
from ._report import SimulationReport
from ._scheduler import seeded_order

_Handler: TypeAlias = Callable[[random.Random], Awaitable[object]]


class JobOptions(TypedDict, total=False):
    """The options of one job of a simulation, as `Pool.submit` takes them."""

    timeout: float | None
    priority: int
    key: Any
    delay: float
    ttl: float
    retry: Retry | None


@final
class SimulatedFailure(Exception):
    """How a job fails that was drawn to fail, by ``failures`` of `simulate`."""


@final
@attrs.define(kw_only=True, eq=False)
class _Simulation:
    """One run: what was asked for, and what of it there is now."""

    model: HandlerModel
    is_handler: bool
    arrivals: ArrivalModel
    jobs: float
    seconds: float
    warmup: float
    failures: float
    each: Mapping[str, Any] | Callable[[random.Random], Mapping[str, Any]]
    seed: object
    config: PoolConfig
    clock: VirtualClock = attrs.field(factory=VirtualClock)
    ledger: Ledger = attrs.field(init=False)
    scope: trio.CancelScope = attrs.field(init=False)
    """Around everything."""
    error: Exception | None = None
    """What the run is to be left with."""
    waits: bool = attrs.field(init=False)
    """Whether callers wait for room."""
    plain: bool = attrs.field(init=False)
    """Whether giving a job in wakes nobody but a worker."""

    def __attrs_post_init__(self) -> None:
        config = self.config
        around = bool(config.middleware or config.plugins)
        self.ledger = (FullLedger if around else Ledger)(self.clock)
        self.waits = config.overflow == "wait"
        guards = config.rate or config.breaker or config.limiter
        self.plain = not (
            guards or config.choose or config.hooks or self.each or around
        )

    def chance(self, purpose: object) -> random.Random:
        """Make a source of chance that nothing else draws from.

        So a pool of another size, or with other options, meets the same jobs
        at the same times: what differs is the pool's doing.
        """
        return random.Random(f"{self.seed!r} {purpose}")

    def seeded(self) -> PoolConfig:
        """Return the config of the pool, with all that is chance in it seeded."""
        draw = self.chance("backoff").random
        config = self.config

        def seed(policy: Any) -> Any:
            backoff = policy and policy.backoff
            if not isinstance(backoff, Backoff):
                return policy

            def wait(number: int) -> float:
                return backoff(number, draw)

            return attrs.evolve(policy, backoff=wait)

        return attrs.evolve(
            config,
            hooks=(self.ledger, *config.hooks),
            retry=seed(config.retry),
            restart=seed(config.restart),
            unobserved="ignore",
        )

    async def run(self) -> SimulationReport:
        """Open the pool, let the jobs come, and sum up."""
        clock, ledger = self.clock, self.ledger
        clock.begin()
        start = 0.0
        with trio.CancelScope() as self.scope:
            clock.get_stuck = self.get_stuck
            async with open_pool(self.seeded(), self.work) as pool:
                start = clock.now
                ledger.begin(start + self.warmup)
                async with trio.open_nursery() as callers:
                    await self.arrive(pool, callers, start)
        if self.error is not None:
            raise self.error
        if clock.now < ledger.began:
            expected = f"less than the run is long, which is {clock.now - start:g} s"
            raise ValueError(refuse("warmup", self.warmup, expected))
        return ledger.report()

    def stop(self, error: Exception) -> None:
        """Call it all off; the error is raised bare when all has unwound."""
        if self.error is None:
            self.error = error
        self.scope.cancel()

    def get_stuck(self) -> bool:
        """Call it all off, unless that was done already."""
        if self.scope.cancel_called:
            return False
        ledger = self.ledger
        error = RuntimeError(
            f"the simulation is stuck at second {self.clock.now:g}: {ledger.queued} "
            f"jobs wait, {ledger.busy} run, and nothing is left that could happen"
        )
        self.stop(error)
        return True

    async def arrive(
        self, pool: Pool[Call, None], callers: trio.Nursery, start: float
    ) -> None:
        """Have every job given in when it arrives, whatever became of others."""
        clock = self.clock
        calls = self.calls()
        following: Call | None = None

        def look_ahead() -> None:
            nonlocal following
            following = next(calls, None)
            if following is None:
                clock.arrival = math.inf
            else:
                following.arrived += start
                clock.arrival = following.arrived

        def give_in() -> bool:
            assert following is not None
            wakes = True
            try:
                wakes = self.give_in(pool, callers, following)
                look_ahead()
            except Exception as error:
                # What the models raise is to leave as it is.
                clock.arrival = math.inf
                self.stop(error)
                return True
            if following is None:  # pyright: ignore[reportUnnecessaryComparison]
                clock.wake()
                return True
            return wakes

        clock.give_in = give_in
        try:
            look_ahead()
            if following is not None:
                await clock.sleep_till_woken()
        except Exception as error:
            self.stop(error)
        finally:
            clock.arrival = math.inf
        if self.seconds < math.inf:
            await clock.sleep_until(max(clock.now, start + self.seconds))

    def give_in(
        self, pool: Pool[Call, None], callers: trio.Nursery, call: Call
    ) -> bool:
        """Give a job in; say whether that may have made a task ready to run."""
        ledger = self.ledger
        ledger.arrive(call)
        try:
            reply = pool.submit_nowait(call, **call.options)
        except BacklogFull:
            if self.waits:
                callers.start_soon(self.wait_for_room, pool, call)
                return True
            ledger.leave(call)
            ledger.rejected += call.counts
        except CircuitOpen:
            ledger.leave(call)
            ledger.refused += call.counts
        else:
            ledger.accepted += call.counts
            state = reply.state
            if state.terminal:
                ledger.end(call, state)
            else:
                call.name = cast("int", reply.id)
                ledger.live[call.name] = call
                if state is JobState.QUEUED and ledger.busy >= len(ledger.up):
                    return not self.plain
        return True

    async def wait_for_room(self, pool: Pool[Call, None], call: Call) -> None:
        """Be a caller who waits until the pool takes the job."""
        ledger = self.ledger
        # It may start before this task hears that it was let in.
        name = call.name = -call.number
        ledger.live[name] = call
        try:
            await pool.submit(call, id=name, **call.options)
        except CircuitOpen:
            ledger.leave(ledger.live.pop(name))
            ledger.refused += call.counts
        except JobExpired:
            ledger.end(ledger.live.pop(name), JobState.EXPIRED)
        else:
            ledger.accepted += call.counts

    def times(self) -> Iterator[float]:
        """Draw when each job arrives, in seconds from the start."""
        model: Any = self.arrivals
        chance = self.chance("arrivals")
        if hasattr(model, "arrivals"):
            return iter(cast("Arrivals", model).arrivals(chance))
        gaps = (model(chance) for _ in repeat(None)) if callable(model) else model
        return accumulate(_checked("a gap of arrivals", gap) for gap in gaps)

    def calls(self) -> Iterator[Call]:
        """Draw the jobs, in the order in which they arrive."""
        model, each, share = self.model, self.each, self.failures
        services, failures = self.chance("services"), self.chance("failures")
        extras = self.chance("each")
        draw: Any = model
        if isinstance(model, Recorded) and model.order == "replayed":
            recorded = cycle(model.times)

            def replay(_: random.Random) -> float:
                return next(recorded)

            draw = replay
        before = 0.0
        for number, when in enumerate(self.times(), 1):
            if not before <= when < math.inf:
                expected = f"a finite time, {before!r} or later"
                raise ValueError(refuse(f"arrival {number}", when, expected))
            if when > self.seconds or number > self.jobs:
                return
            before = when
            call = Call()
            call.arrived = when
            call.number = number
            call.counts = when >= self.warmup
            call.waiting = True
            call.started = None
            call.attempt = 0
            if not self.is_handler:
                call.seconds = _checked("what handler_model draws", draw(services))
            call.fails = share > 0.0 and failures.random() < share
            if callable(each):
                call.options = each(extras)
                _check_options("what each draws", call.options)
            else:
                call.options = each
            yield call

    async def work(self, call: Call) -> None:
        """Be the handler: take the time that was drawn, then fail or not."""
        ledger, clock, fails = self.ledger, self.clock, call.fails
        ledger.start(call)
        if call.attempt > 1 or self.is_handler:
            # By its number, and not by when it happens to be its turn.
            chance = self.chance(f"try {call.attempt} of {call.number}")
            if call.attempt > 1:
                fails = chance.random() < self.failures
            if self.is_handler:
                await cast("_Handler", self.model)(chance)
            else:
                draw = cast("Draw", self.model)
                seconds = _checked("what handler_model draws", draw(chance))
                await clock.sleep_until(clock.now + seconds)
        else:
            await clock.sleep_until(clock.now + call.seconds)
        if fails:
            raise SimulatedFailure(f"try {call.attempt} of job {call.number}")
        ledger.finish(call)


def _checked(name: str, seconds: Any) -> float:
    """Refuse what is no number of seconds."""
    if type(seconds) is not float or not 0.0 <= seconds < math.inf:
        check_seconds(name, seconds, infinite=False)
    return seconds  # type: ignore[no-any-return]


def simulate(
    handler_model: HandlerModel,
    arrivals: ArrivalModel,
    size: int | PoolConfig,
    /,
    *,
    jobs: int | None = None,
    seconds: float | None = None,
    warmup: float = 0.0,
    failures: float = 0.0,
    each: JobOptions | Callable[[random.Random], JobOptions] | None = None,
    seed: int | str = 0,
    **options: Unpack[PoolOptions],
) -> SimulationReport:
    """Run a pool in virtual time under jobs drawn by chance; report how it did.

    The pool is a real one, ``open_pool(size, handler, **options)``. Jobs come as
    ``arrivals`` says until there were ``jobs`` or ``seconds`` are over; then the
    pool finishes them. An iterable, or what a callable returns each time, is the
    gap in seconds since the job before; for times since the start there is
    `Trace`. Each try takes the time
    that ``handler_model`` draws, and fails with probability ``failures``, by
    `SimulatedFailure`. An async model is the handler itself. ``each``, a mapping
    or what draws one, has options of each job (ttl, priority, ...). Jobs of the
    first ``warmup`` seconds are not counted. The same seed gives the same report.

    It keeps 24 bytes for each job and runs a trio of its own: in a trio program
    call it in a thread. Models must not wait for anything real.

    Raises:
      TypeError, ValueError: a bad argument, or a draw that is no time.
      RuntimeError: called inside of trio; or jobs wait and nothing can happen.
      PoolBroken: too many workers have crashed.
    """
    config = make_config(size, options)
    _check_models(handler_model, arrivals)
    _check_length(arrivals, jobs, seconds, warmup)
    check_share("failures", failures)
    _check_each(each)
    _check_seed(seed)
    if not (config.size if config.scale is None else config.scale.max):
        raise ValueError(refuse("size", config.size, "1 or more: nothing would run"))
    refuse_inside_trio(
        "simulate()", "use await trio.to_thread.run_sync(partial(simulate, ...))"
    )
    simulation = _Simulation(
        model=handler_model,
        is_handler=is_async(handler_model),
        arrivals=arrivals,
        jobs=math.inf if jobs is None else jobs,
        seconds=math.inf if seconds is None else seconds,
        warmup=warmup,
        failures=failures,
        each={} if each is None else each,
        seed=seed,
        config=config,
    )
    try:
        # Crashes that were drawn are counted in the report.
        with seeded_order(f"{seed!r} order"), unlogged(SimulatedFailure):
            return trio.run(simulation.run, clock=simulation.clock)
    except BaseExceptionGroup as group:
        found = (e for e in leaves(group) if isinstance(e, KeyboardInterrupt))
        interrupt = next(found, None)
        if interrupt is None:
            raise
    # Outside of the block, or the whole group would be shown as its context.
    raise interrupt


def _check_models(handler_model: object, arrivals: object) -> None:
    if not callable(handler_model) or isinstance(handler_model, type):
        expected = (
            "a distribution such as Exponential(mean), a callable (random.Random) "
            "-> seconds, or an async one"
        )
        raise TypeError(refuse("handler_model", handler_model, expected))
    if (
        isinstance(arrivals, (str, type))
        or is_async(arrivals)
        or not (
            hasattr(arrivals, "arrivals")
            or callable(arrivals)
            or isinstance(arrivals, Iterable)
        )
    ):
        expected = (
            "arrivals such as Poisson(rate), an iterable of gaps in seconds, or a "
            "callable (random.Random) -> seconds"
        )
        raise TypeError(refuse("arrivals", arrivals, expected))


def _check_length(arrivals: object, jobs: object, seconds: Any, warmup: Any) -> None:
    if jobs is not None:
        check_count("jobs", jobs, zero=False)
    if seconds is not None:
        check_seconds("seconds", seconds, zero=False, infinite=False)
    check_seconds("warmup", warmup, infinite=False)
    if jobs is None and seconds is None and not isinstance(arrivals, (Trace, Sized)):
        raise ValueError(
            f"give jobs= or seconds=: nothing says when {arrivals!r} are enough"
        )
    if seconds is not None and warmup >= seconds:
        expected = f"a number of seconds less than seconds ({seconds!r})"
        raise ValueError(refuse("warmup", warmup, expected))


def _check_seed(seed: object) -> None:
    if not isinstance(seed, (int, str)):
        raise TypeError(refuse("seed", seed, "an int or a str"))


def _check_each(each: object) -> None:
    if isinstance(each, Mapping):
        _check_options("each", each)
    elif each is not None and (not callable(each) or is_async(each)):
        expected = "a mapping of options of a job, or a callable that draws one"
        raise TypeError(refuse("each", each, expected))


def _check_options(name: str, options: object) -> None:
    known = JobOptions.__annotations__
    if not isinstance(options, Mapping):
        raise TypeError(refuse(name, options, "a mapping of options of a job"))
    for option in options:
        if option not in known:
            expected = "options of a job: " + ", ".join(sorted(known))
            raise TypeError(refuse(name, options, expected))
