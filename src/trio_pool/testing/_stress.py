"""`stress_pool`: one line in a test that stresses a pool of the user's workers."""

from __future__ import annotations

import inspect
import typing
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from types import NoneType
from typing import Any, Unpack, final

import attrs
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from .. import PoolOptions
from .._checks import are_errors, as_types, check_count, is_async, refuse
from .._config import make_config
from .._events import In, Out
from ._draws import some_options
from ._machine import PoolMachine


@final
@attrs.frozen(kw_only=True)
class StressReport:
    """How much a stress has tried, without finding anything."""

    programs: int
    """Programs that were run."""
    jobs: int
    """Jobs they had."""
    counts: dict[str, int]
    """What came of them: attempts, results, setups, errors by their types."""


def stress_pool(
    worker: Callable[[In], Awaitable[Out]]
    | Callable[[], AbstractAsyncContextManager[Callable[[In], Awaitable[Out]]]],
    inputs: st.SearchStrategy[In] | None = None,
    *,
    check: Callable[[In, Out], object] | None = None,
    raises: type[Exception] | tuple[type[Exception], ...] = (),
    sizes: st.SearchStrategy[int] | int | None = None,
    faults: bool = True,
    examples: int | None = None,
    steps: int | None = None,
    settings: hypothesis_settings | None = None,
    **options: Unpack[PoolOptions],
) -> StressReport:
    """Stress a pool of these workers by generated programs, in virtual time.

    A program gives in jobs in all ways there are, with drawn ``inputs``,
    timeouts, keys, priorities and retries, cancels them, crashes and hangs
    them (unless ``faults`` is false), resizes, pauses and closes the pool. It
    fails if a promise of the pool is broken; if ``check(job_input, result)``
    raises or returns False; or if the worker raises what is not in
    ``raises``. What fails is shrunk to a short program, which is shown.

    ``worker`` is a handler or a worker's context manager, as in `open_pool`.
    By default the ``inputs`` are what its annotations say. Options of the
    pool that are not given are drawn too. ``examples`` programs of at most
    ``steps`` steps are run, or as many as hypothesis' ``settings`` say.

    Raises:
      AssertionError, or what the worker or the check raised.
    """
    is_handler = _is_handler(worker)
    if not isinstance(inputs, (st.SearchStrategy, NoneType)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(refuse("inputs", inputs, "a strategy of hypothesis"))
    errors = as_types(raises)
    if not are_errors(errors):
        raise TypeError(refuse("raises", raises, "an Exception class, or a tuple"))
    checks: Any = check
    if checks is not None and (not callable(checks) or is_async(checks)):
        raise TypeError(refuse("check", check, "a plain function of input and result"))
    if not isinstance(sizes, (st.SearchStrategy, NoneType)):
        check_count("sizes", sizes)
    # What is wrong with an option is said before any program has run.
    make_config(1, options)
    chosen = _choose(settings, examples, steps)
    totals: Counter[str] = Counter()

    class Machine(PoolMachine):
        def check_result(self, job_input: Any, result: Any) -> None:
            if check is not None and check(job_input, result) is False:
                raise AssertionError(f"check({job_input!r}, {result!r}) returned False")

        def teardown(self) -> None:
            totals.update(self.counts)
            totals["programs"] += 1
            super().teardown()

    Machine.__name__ = Machine.__qualname__ = f"StressOf_{_name(worker)}"
    Machine.inputs = _inputs_of(worker, is_handler) if inputs is None else inputs
    Machine.raises = errors
    Machine.options = some_options.map(lambda some: {**some, **options})
    target: Any = worker
    setattr(Machine, "handler" if is_handler else "worker", staticmethod(target))
    if sizes is not None:
        Machine.sizes = sizes
    if not faults:
        Machine.faults = None
    run_state_machine_as_test(Machine, settings=chosen)
    programs, jobs = totals.pop("programs"), totals.pop("jobs")
    return StressReport(programs=programs, jobs=jobs, counts=dict(totals))


def _choose(
    settings: hypothesis_settings | None, examples: int | None, steps: int | None
) -> hypothesis_settings:
    """Return how much is to be tried."""
    if not isinstance(settings, (hypothesis_settings, NoneType)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(refuse("settings", settings, "settings of hypothesis"))
    if settings is None:
        # One error at a time, and nothing on which lines of ours were run.
        settings = hypothesis_settings(
            deadline=None,
            # Of shorter programs more can be run, and they shrink better.
            stateful_step_count=25,
            report_multiple_bugs=False,
            suppress_health_check=[
                HealthCheck.too_slow,
                HealthCheck.data_too_large,
                HealthCheck.filter_too_much,
            ],
            phases=set(hypothesis_settings().phases) - {Phase.explain},
        )
    if examples is not None:
        check_count("examples", examples, zero=False)
        settings = hypothesis_settings(settings, max_examples=examples)
    if steps is not None:
        check_count("steps", steps, zero=False)
        settings = hypothesis_settings(settings, stateful_step_count=steps)
    return settings


def _name(worker: Any) -> str:
    return str(getattr(worker, "__name__", type(worker).__name__))


def _is_handler(worker: Any) -> bool:
    """Tell a handler from a factory of workers."""
    if not callable(worker):
        expected = "an async function of one argument, or what worker= takes"
        raise TypeError(refuse("worker", worker, expected))
    if is_async(worker):
        return True
    try:
        inspect.signature(worker).bind()
    except TypeError:
        return True
    except ValueError:
        pass
    return False


def _inputs_of(worker: Any, is_handler: bool) -> st.SearchStrategy[Any]:
    """Return what the annotations of a worker say that it is given."""
    kind: Any = None
    try:
        if is_handler:
            function = worker if inspect.isroutine(worker) else type(worker).__call__
            hints = typing.get_type_hints(function)
            first = next(iter(inspect.signature(worker).parameters))
            kind = hints[first]
        else:
            cls: Any = worker
            enter = cls.__aenter__ if inspect.isclass(worker) else worker
            hints = typing.get_type_hints(inspect.unwrap(enter))
            handler = hints["return"]
            if enter is worker:
                (handler, *_) = typing.get_args(handler)
            ((kind, *_), _) = typing.get_args(handler)
    except (NameError, KeyError, AttributeError, StopIteration, TypeError, ValueError):
        kind = None
    if kind is None or kind is Any:
        raise TypeError(
            refuse("inputs", None, "a strategy of hypothesis")
            + f", as the annotations of {_name(worker)} do not say what it is given"
        )
    return st.from_type(kind)
