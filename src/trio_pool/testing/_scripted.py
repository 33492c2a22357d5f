"""A worker that plays prepared answers, and must be used up."""

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Final, NoReturn, Self, final

import attrs
import trio

from .._checks import check_kind, check_seconds, note, refuse, valid
from ._faults import InjectedCrash


@final
class _Anything:
    """Stands for an input that is not looked at."""

    def __repr__(self) -> str:
        return "anything"


ANYTHING: Final[Any] = _Anything()


@final
@attrs.frozen
class Step:
    """One answer of a `ScriptedWorker`."""

    result: Any = None
    """What is returned."""
    error: BaseException | None = attrs.field(
        default=None,
        kw_only=True,
        validator=check_kind(BaseException, "an exception"),
    )
    """What is raised instead; what is no `Exception` kills the worker."""
    to: Any = attrs.field(default=ANYTHING, kw_only=True)
    """The input that must come, compared by ``==``; a tuple if the handler is
    called with several arguments. Without it any will do."""
    after: float = attrs.field(
        default=0.0, kw_only=True, validator=valid(check_seconds, infinite=False)
    )
    """Seconds until the answer."""
    hang: bool = attrs.field(default=False, kw_only=True)
    """Whether there is none: it waits until it is cancelled."""
    crash: bool = attrs.field(default=False, kw_only=True)
    """Whether it kills the worker, by an `InjectedCrash`."""

    def __attrs_post_init__(self) -> None:
        """Refuse a step of several ends."""
        ends = [self.result is not None, self.error is not None, self.hang, self.crash]
        if sum(ends) > 1:
            raise ValueError(
                refuse("a step", self, "one of result, error, hang, crash")
            )


@final
class ScriptedWorker:
    """A handler that plays prepared answers, one for each job, in order.

    It is given the steps, and must be used up::

        script = ScriptedWorker([1, ValueError("no"), Step(2, to="b", after=0.5)])
        with script:
            async with open_pool(1, script) as pool:
                ...

    A step is a `Step`, an exception or a class of them to raise, or a value to
    return. It is a handler and no worker's context manager, as so it fits
    everywhere: for any number of workers, which take the steps in the order in
    which their jobs start, as a function of a `TaskPool`, in an inline pool,
    under `Faults`, or called directly. A crash is followed by the next step.

    A job that comes with another input than its step expects, or when no step
    is left, fails at once by an `AssertionError`. Code under test may swallow
    that, so it is raised again at the end: leaving ``with script:`` normally
    checks it, and that every step was played. When an error leaves the block,
    that stands, with a note of what was wrong.
    """

    def __init__(self, steps: Iterable[Any] = ()) -> None:
        _check_steps(steps)
        self._steps = [_as_step(step) for step in steps]
        self._wrong: list[str] = []
        self.received: list[Any] = []
        """The inputs of all jobs so far: the argument, or a tuple of several."""

    def __repr__(self) -> str:
        played = len(self._steps) - len(self.pending)
        return (
            f"<trio_pool.testing.ScriptedWorker: {played} of {len(self._steps)} "
            f"steps played>"
        )

    @property
    def pending(self) -> tuple[Step, ...]:
        """The steps that were not played yet."""
        return tuple(self._steps[len(self.received) :])

    async def __call__(self, *args: Any) -> Any:
        """Play the next step; a checkpoint.

        Raises:
          AssertionError: no step is left, or it expects another input.
        """
        job_input = args[0] if len(args) == 1 else args
        number = len(self.received)
        self.received.append(job_input)
        if number >= len(self._steps):
            self._fail(f"job {number + 1} came with {job_input!r}, and no step is left")
        step = self._steps[number]
        if step.to is not ANYTHING and step.to != job_input:
            self._fail(
                f"job {number + 1} came with {job_input!r}, "
                f"but its step expects {step.to!r}"
            )
        await trio.sleep(step.after)
        if step.hang:
            await trio.sleep_forever()
        if step.crash:
            raise InjectedCrash(f"step {number + 1} of the script")
        if step.error is not None:
            raise step.error.with_traceback(None)
        return step.result

    def _fail(self, text: str) -> NoReturn:
        self._wrong.append(text)
        raise AssertionError(f"the script was not followed: {text}")

    def assert_used_up(self) -> None:
        """Check that every step was played, and every job had its step.

        Raises:
          AssertionError: it says which step was not, and which job had none.
        """
        wrong = self._all_wrong()
        if wrong:
            raise AssertionError(wrong)

    def _all_wrong(self) -> str:
        played = len(self.received)
        wrong = [
            *self._wrong,
            *(f"step {n} was not played: {step}" for n, step in self._rest(played)),
        ]
        if not wrong:
            return ""
        listed = "".join(f"\n  {text}" for text in wrong)
        return f"the script was not followed:{listed}\nreceived: {self.received!r}"

    def _rest(self, played: int) -> list[tuple[int, Step]]:
        return list(enumerate(self._steps, 1))[played:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.assert_used_up()
        elif self._all_wrong():
            note(error, self._all_wrong())


def _as_step(step: Any) -> Step:
    if isinstance(step, Step):
        return step
    if isinstance(step, type) and issubclass(step, BaseException):
        step = step()
    return Step(error=step) if isinstance(step, BaseException) else Step(step)


def _check_steps(steps: object) -> None:
    if isinstance(steps, (str, bytes)) or not isinstance(steps, Iterable):
        raise TypeError(refuse("steps", steps, "an iterable of steps"))
