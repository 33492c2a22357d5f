"""The engine under schedules: runs a body, and lets things happen at its steps."""

from __future__ import annotations

import functools
import inspect
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeAlias, final

import attrs
import trio
from trio.lowlevel import Task
from trio.testing import MockClock

from .._checks import check_count, check_seconds, is_async, note, refuse, valid
from ._hosted import Abandoned, abandon, below, root_of
from ._scheduler import seeded_scheduler

Plan: TypeAlias = tuple[tuple[int, int], ...]
"""What is to happen, in this order: the number of the happening, and the step."""

# Turns of the loop in which nothing runs, after which a body waits for ever: its
# time is virtual, so it waits for no deadline. It may wait for a thread, which gets
# some real time in all turns but the first: by turns and not by the clock, as a
# machine that stands still for a while stops the thread as well.
_IDLE_TURNS = 500
_BRISK_TURNS = 10
_IDLE_SECONDS = 0.002

# How often a body is ended by force that does not end when it is cancelled, and
# the turns of the loop that it has to unwind each time.
_PUSHES = 20
_PATIENCE = 100


_TRIO = f"{Path(trio.__file__).parent}{os.sep}"
_TRIO_POOL = f"{Path(__file__).parents[1]}{os.sep}"

# Whose frames say little of where a program stands: the fewer, the better.
_HOUSES = ((_TRIO, _TRIO_POOL), (_TRIO,))

_ASYNC = "an async function"


class Happening(Protocol):
    """Something that can happen at a step of the scheduler, once in a run."""

    @property
    def argument(self) -> object:
        """What the body gets of it."""
        ...

    def may_come(self, step: int) -> bool:
        """Say whether the body lets it happen now."""
        ...

    def is_open(self) -> bool:
        """Say whether the body is now where it is meant to happen."""
        ...

    def come(self) -> None:
        """Let it happen."""
        ...


class _Hung(BaseException):
    """Ends a run that nothing else ends, with all that is left in it."""


_OURS = (Abandoned, _Hung)


@final
class _Watch(trio.abc.Instrument):
    """Counts the steps of one run, and lets happen at them what is planned.

    A step of any task counts, those of trio's own tasks too, from the moment
    that the body is about to start.
    """

    def __init__(self, trial: Trial, plan: Plan, clock: MockClock) -> None:
        self.trial = trial
        self.plan = plan
        self.clock = clock
        self.happenings = [trial.make() for _ in range(trial.count)]
        self.body = trio.CancelScope()
        self.is_on = False
        self.step = 0
        self.steps_of: list[list[int]] = [[] for _ in self.happenings]
        """The steps at which each happening could come, after those planned."""
        self.opened: set[int] = set()
        """What the body came to at some step."""
        self.places: list[str] = []
        """Where the program stood when what was planned came."""
        self.trouble: BaseException | None = None
        self.hung = ""
        self._until = 0.0
        self._idle = 0
        self._allowance = trial.steps
        self.result: Any = None
        """What the body returned."""
        self._pushed = -1
        """Turns of the loop since the body is ended by force."""

    async def run(self) -> None:
        """Be the main task: run the body, and count meanwhile."""
        task = trio.lowlevel.current_task()
        task.name = self.trial.name
        self._root = root_of(task)
        self._usual = {*below(self._root)} - {task}
        self._until = trio.current_time() + self.trial.seconds
        with self.body:
            self.is_on = True
            # A step of its own, so that the first one is before the body's.
            await trio.lowlevel.cancel_shielded_checkpoint()
            try:
                ran = self.trial.body(*(each.argument for each in self.happenings))
                if not inspect.isawaitable(ran):
                    raise TypeError(refuse("body", self.trial.body, _ASYNC))
                self.result = await ran
            finally:
                self.is_on = False

    @property
    def is_complete(self) -> bool:
        """Whether all that was planned has come."""
        return len(self.places) == len(self.plan)

    def before_task_step(self, task: Task) -> None:
        """Let happen what is planned for this step."""
        self._idle = 0
        if not self.is_on:
            return
        step, self.step = self.step, self.step + 1
        for number, happening in enumerate(self.happenings):
            if happening.is_open():
                self.opened.add(number)
        # An error here would only be logged by trio.
        try:
            while not self.is_complete:
                number, when = self.plan[len(self.places)]
                if when != step or not self.happenings[number].may_come(step):
                    break
                self.places.append(_describe(task))
                self.happenings[number].come()
        except BaseException as error:
            self.trouble = self.trouble or error
            self.body.cancel()
        if self.is_complete:
            for happening, steps in zip(self.happenings, self.steps_of, strict=True):
                if happening.may_come(step):
                    steps.append(step)
        if self.step > self._allowance:
            self._allowance += self.trial.steps
            self._hang(f"had not ended after {self.step - 1} steps")

    def before_io_wait(self, timeout: float) -> None:
        """Look whether the program goes on."""
        if self._pushed >= 0:
            self._push()
        if not self.is_on:
            return
        now = self.clock.current_time()
        if now > self._until:
            self._until = now + self.trial.seconds
            self._hang(f"had not ended after {self.trial.seconds} virtual seconds")
        self._idle += 1
        if self._idle > _BRISK_TURNS:
            time.sleep(_IDLE_SECONDS)
        if self._idle > _IDLE_TURNS:
            self._idle = 0
            self._hang("waits for ever: no task runs, and no deadline is set")

    def _hang(self, how: str) -> None:
        if self.hung:
            self.hung += ", and does not end when it is cancelled"
            self.is_on = False
            self._pushed = 0
        else:
            self.hung = how
            self.body.cancel()

    def _push(self) -> None:
        """End tasks by force, so that nothing is left for the garbage collector."""
        pushes, wait = divmod(self._pushed, _PATIENCE)
        self._pushed += 1
        if pushes == _PUSHES:
            # Trio asks its clock in each turn, and nothing else can get a program
            # out of its loop that does not even end now.
            vars(self.clock)["current_time"] = _give_up
        elif not wait:
            abandon([task for task in below(self._root) if task not in self._usual])


def _give_up() -> float:
    raise _Hung


@attrs.frozen(kw_only=True)
class Trial:
    """A body that is run again and again, each time with something else happening."""

    body: Callable[..., Awaitable[object]]
    count: int
    """The arguments of the body: what can happen to it."""
    needs: str = ""
    """What a body has to do with each of them, or there is nothing to test."""
    name: str
    make: Callable[[], Happening]
    """Makes what can happen, for one argument of the body."""
    replay: str
    """The name of the function that runs one schedule again."""
    order: int = attrs.field(validator=valid(check_count))
    seconds: float = attrs.field(validator=valid(check_seconds, zero=False))
    steps: int = attrs.field(validator=valid(check_count, zero=False))

    def run(self, plan: Plan) -> _Watch:
        """Run the body with what is planned; add to its error what that was."""
        clock = MockClock(autojump_threshold=0)
        watch = _Watch(self, plan, clock)
        error: BaseException | None = None
        try:
            with seeded_scheduler(self.order, clock):
                trio.run(watch.run, clock=clock, instruments=[watch])
        except BaseException as found:
            error = found
        if watch.hung:
            hung = AssertionError(f"{self.name} {watch.hung}")
            hung.__cause__ = _without_ours(error)
            error = hung
        elif watch.trouble is not None:
            # What the body had to say about it is kept as its context.
            watch.trouble.__context__ = watch.trouble.__context__ or error
            error = watch.trouble
        if error is None:
            return watch
        try:
            if self.count:
                note(error, self._tell(watch))
            raise error
        finally:
            del error

    def _tell(self, watch: _Watch) -> str:
        lines: list[str] = []
        for (number, step), place in zip(watch.plan, watch.places, strict=False):
            which = f" of argument {number}" if self.count > 1 else ""
            lines.append(f"at step {step}{which}, before {place}")
        if not watch.plan:
            lines.append("nothing had happened to it yet")
        elif not lines:
            lines.append("before anything had happened to it")
        steps = [step if self.count < 2 else (n, step) for n, step in watch.plan]
        call = ", ".join(map(str, [self.name, *steps, f"order={self.order}"]))
        return "\n".join([*lines, f"again: {self.replay}({call})"])

    def run_all(self, limit: int, drawn: bool) -> int:
        """Run every schedule; return how many came to pass."""
        check_count("limit", limit, zero=False)
        done = 1
        bare = self.run(())
        opened = bare.opened
        is_sample = False
        plans: list[Plan] = [
            ((number, step),)
            for number, steps in enumerate(bare.steps_of)
            for step in steps
        ]
        for more in reversed(range(self.count)):
            further: list[Plan] = []
            room = limit - done
            if drawn and more:
                # Leave half of a sample to those in which a second one happens.
                room = (room + 1) // 2
            is_sample |= len(plans) > room
            for plan in self._choose(plans, room, drawn):
                watch = self.run(plan)
                opened |= watch.opened
                done += watch.is_complete
                further += [
                    (*plan, (number, step))
                    for number, steps in enumerate(watch.steps_of)
                    for step in steps
                ]
                if len(further) > limit and not drawn:
                    self._choose(further, limit - done, drawn)
            plans = further
        for number in range(self.count):
            # What was left out of a sample may have come to it.
            if self.needs and number not in opened and not is_sample:
                raise ValueError(
                    f"{self.name} has to {self.needs}, for its argument {number}: "
                    f"it was in no such block at any step of {done} schedules"
                )
        return done

    def _choose(self, plans: Sequence[Plan], limit: int, drawn: bool) -> Sequence[Plan]:
        if len(plans) <= limit:
            return plans
        if not drawn:
            raise ValueError(
                f"{self.name} has more schedules than limit allows; make it "
                "shorter, raise the limit, or try a sample of them by drawn=True"
            )
        return random.Random(self.order).sample(plans, max(0, limit))

    def run_again(self, plan: Plan) -> None:
        """Run one schedule, all of which has to come to pass."""
        for number, step in plan:
            check_count("at", step)
            check_count("at", number)
            if number not in range(self.count):
                expected = f"a step, or (n, step) with n below {self.count}"
                raise ValueError(refuse("at", (number, step), expected))
        watch = self.run(plan)
        if not watch.is_complete:
            number, step = plan[len(watch.places)]
            raise ValueError(
                f"at step {step} nothing can happen to argument {number} of "
                f"{self.name} in order {self.order}; it ended after {watch.step} steps"
            )


def _is_of(frame: FrameType, house: tuple[str, ...]) -> bool:
    return frame.f_code.co_filename.startswith(house)


def name_of(function: Any) -> str:
    """Name a function as one would write it."""
    if isinstance(function, functools.partial):
        return f"partial({name_of(function.func)}, ...)"  # pyright: ignore[reportUnknownArgumentType]
    return str(getattr(function, "__name__", function))


def _describe(task: Task) -> str:
    """Say where a task stands that is about to run, in the user's code if it can."""
    frames: list[tuple[FrameType, int]] = []
    # Trio cannot look into every kind of awaitable.
    with suppress(TypeError):
        frames.extend(task.iter_await_frames())
    if not frames:
        return f"task {task.name!r} ran"
    frame, line = frames[-1]
    for house in _HOUSES:
        outside = [each for each in frames if not _is_of(each[0], house)]
        if outside:
            frame, line = outside[-1]
            break
    code = frame.f_code
    return (
        f'task {task.name!r} went on in File "{code.co_filename}", line {line}, '
        f"in {code.co_qualname}"
    )


def _without_ours(error: BaseException | None) -> BaseException | None:
    """Leave out what only ended the run."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(Abandoned)[1]
    internal = isinstance(error, trio.TrioInternalError)
    is_ours = isinstance(error.__cause__ if error and internal else error, _OURS)
    return None if is_ours else error


def check_body(option: str, body: Any, expected: str = _ASYNC) -> None:
    """Refuse what is no async function before it is called."""
    # A lambda may well return what an async function gives: it is judged by that.
    is_plain = inspect.isroutine(body) or inspect.isclass(body)
    is_lambda = getattr(body, "__name__", "") == "<lambda>"
    if not callable(body) or (is_plain and not is_lambda and not is_async(body)):
        raise TypeError(refuse(option, body, expected))


def count_arguments(body: Any, least: int) -> int:
    """Return how many arguments a body takes, of ``least`` to two."""
    expected = (
        f"an async function of {'none, ' if not least else ''}one or two arguments"
    )
    check_body("body", body, expected)
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    count = sum(
        parameter.default is parameter.empty and parameter.kind in kinds
        for parameter in inspect.signature(body).parameters.values()
    )
    if not least <= count <= 2:
        raise TypeError(refuse("body", body, expected))
    return count
