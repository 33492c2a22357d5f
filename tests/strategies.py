"""What hypothesis draws: handlers as small programs, their callers, whole pools."""

from __future__ import annotations

import itertools
import math
from typing import Any, TypeAlias

import attrs
from hypothesis import strategies as st

# An operation is a tuple: its name, then its durations (seconds) and bodies.
Op: TypeAlias = tuple[Any, ...]
Body: TypeAlias = tuple[Op, ...]


# ----------------------------------------------------------------------
# Handlers that are called directly and by a pool, and are to do the same.


@attrs.frozen
class Wait:
    """A duration that is still to be made unlike every other one."""

    quarters: int


MAX_WAITS = 36
"""So many different durations can be told apart exactly in a float."""


def spread(drawn: Any, numbers: Any = None) -> Any:
    """Replace every `Wait` by seconds, no sum of which equals another sum.

    Two timers that end at the same moment are run by trio in any order, which
    would make two runs of one program differ.
    """
    if numbers is None:
        numbers = itertools.count(9)
    if isinstance(drawn, Wait):
        return drawn.quarters / 4 + 2.0 ** -next(numbers)
    if isinstance(drawn, (tuple, list)):
        return type(drawn)(spread(part, numbers) for part in drawn)
    if attrs.has(type(drawn)):
        parts = {
            field.name: spread(getattr(drawn, field.name), numbers)
            for field in attrs.fields(type(drawn))
        }
        return type(drawn)(**parts)
    return drawn


def count_waits(drawn: Any) -> int:
    """Count the durations in what was drawn."""
    if isinstance(drawn, Wait):
        return 1
    if attrs.has(type(drawn)):
        return sum(
            count_waits(getattr(drawn, field.name))
            for field in attrs.fields(type(drawn))
        )
    if isinstance(drawn, (tuple, list)):
        return sum(map(count_waits, drawn))
    return 0


waits = st.builds(Wait, st.integers(1, 8))
numbers = st.integers(0, 3)

simple_ops = st.one_of(
    st.tuples(st.just("sleep"), waits),
    st.tuples(st.just("shielded sleep"), waits),
    st.tuples(st.just("swallow"), waits),
    st.tuples(st.just("fail when cancelled"), waits, numbers),
    st.tuples(st.just("checkpoint")),
    st.tuples(st.just("raise"), numbers),
    st.tuples(st.just("raise group"), numbers, numbers),
    st.tuples(st.just("set variable"), numbers),
    st.tuples(st.just("read variable")),
    st.tuples(st.just("read deadline")),
    st.tuples(st.just("return"), numbers),
)


def _nest(bodies: st.SearchStrategy[Body]) -> st.SearchStrategy[Body]:
    op = st.one_of(
        simple_ops,
        st.tuples(st.just("finally"), bodies, waits),
        st.tuples(st.just("cleanup fails"), bodies, numbers),
        st.tuples(st.just("catch"), bodies),
        st.tuples(st.just("move on"), waits, bodies),
        st.tuples(st.just("fail after"), waits, bodies),
        st.tuples(st.just("shield"), bodies),
        # The wait of each child comes before its body: two children that
        # begin in the same tick begin in any order.
        st.tuples(
            st.just("nursery"),
            bodies,
            st.lists(st.tuples(waits, bodies), min_size=1, max_size=3).map(tuple),
        ),
    )
    return st.lists(op, max_size=3).map(tuple)


bodies = st.recursive(st.lists(simple_ops, max_size=4).map(tuple), _nest, max_leaves=6)


@attrs.frozen
class Scope:
    """A cancel scope of the caller's."""

    after: Any
    """Seconds until its deadline, or None."""
    shield: bool
    cancelled_at: Any
    """Seconds until a sibling cancels it, or None."""


@attrs.frozen
class Call:
    """One call of the handler in scopes of its own, outermost first."""

    body: Body
    scopes: tuple[Scope, ...]
    variable: int


@attrs.frozen
class Caller:
    """A task that calls several times in a row, all in one scope."""

    calls: tuple[Call, ...]
    scope: Scope


scopes = st.builds(Scope, st.none() | waits, st.booleans(), st.none() | waits)
calls = st.builds(
    Call, bodies, st.lists(scopes, max_size=2).map(tuple), st.integers(10, 13)
)
callers = (
    st.builds(
        Caller,
        st.lists(calls, min_size=1, max_size=3).map(tuple),
        st.builds(Scope, st.none() | waits, st.just(False), st.none() | waits),
    )
    .filter(lambda caller: count_waits(caller) <= MAX_WAITS)
    .map(spread)
)


# ----------------------------------------------------------------------
# Options that are on and must make no difference to a direct call.

unseen = st.fixed_dictionaries(
    {},
    optional={
        "retry": st.sampled_from(["other error", "no error", "once"]),
        "middleware": st.integers(1, 2),
        "key": st.just(True),
        "rate": st.just(True),
        "limiter": st.just(True),
        "breaker": st.sampled_from(["many", "no error"]),
        "scale": st.just(True),
        "aging": st.just(True),
        "max_jobs": st.just(True),
        "choose": st.just(True),
    },
)


# ----------------------------------------------------------------------
# Pools under everything at once, whose books are to balance.


@attrs.frozen
class Work:
    """What one job does after it has slept, or when it is cancelled."""

    kind: str
    seconds: float
    inner: tuple[Work, ...] = ()
    """What it has the same pool do meanwhile."""


@attrs.frozen
class Tries:
    """A retry policy."""

    attempts: int
    initial: float
    factor: float
    on: str


@attrs.frozen
class Terms:
    """The options of one job that few jobs have."""

    key: str | None = None
    retry: Tries | None = None
    delay: float = 0.0
    ttl: float = math.inf
    drain: str | None = None
    uid: str | int | None = None


@attrs.frozen
class Plan:
    """A pool and what happens to it."""

    size: int
    options: dict[str, Any]
    restart_limit: float
    watched: bool
    ending: str
    steps: tuple[Op, ...]
    late_steps: tuple[Op, ...] = ()
    """Those from the one that closes the pool."""
    lasts: float = 0.0
    """Seconds from the last step to the end of the block."""
    extras: dict[str, Any] = attrs.field(factory=dict)
    """The features that most pools are without."""


moments = st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0])
limits = st.none() | moments
sizes = st.integers(0, 5)
orders = st.integers(0, 20)
priorities = st.sampled_from([0, 0, 0, 1, -1])

tries = st.builds(
    Tries,
    st.integers(1, 3),
    st.sampled_from([0.0, 0.25, 1.5]),
    st.sampled_from([1.0, 2.0]),
    st.sampled_from(["any", "any", "failure", "crash", "predicate", "raises", "none"]),
)

plain_works = st.builds(
    Work,
    st.sampled_from(
        [
            "value",
            "value",
            "value",
            "fail",
            "flaky",
            "break",
            "crash",
            "flaky crash",
            "exit",
            "swallow",
            "stubborn",
            "fail when cancelled",
            "crash when cancelled",
            "cancel itself",
        ]
    ),
    st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0, 1.5, 4.0]),
)
nested_works = st.builds(
    Work,
    st.sampled_from(
        ["nested process", "nested key", "nested submit", "nested map", "nested lease"]
    ),
    st.sampled_from([0.0, 0.25]),
    st.lists(plain_works, min_size=1, max_size=2).map(tuple),
)
works = st.sampled_from([plain_works] * 5 + [nested_works]).flatmap(lambda kind: kind)
work_lists = st.lists(works, max_size=6).map(tuple)
sources = st.sampled_from(["list", "list", "generator", "async", "bad"])

no_terms = st.just(Terms())
keys = st.sampled_from(["a", "a", "b"])
few_terms = st.builds(Terms, st.none() | keys, st.none() | tries)
all_terms = st.builds(
    Terms,
    st.none() | keys,
    st.none() | tries,
    st.sampled_from([0.0, 0.0, 0.25, 1.0]),
    st.sampled_from([math.inf, math.inf, 0.25, 1.0]),
    st.sampled_from([None, None, "open", "closed"]),
    st.sampled_from([None, None, "x", "y", -7]),
)

jobs = st.one_of(
    # Work, timeout, deadline of the caller, priority, terms.
    st.tuples(
        st.just("process"), works, limits, limits, priorities, no_terms | few_terms
    ),
    st.tuples(
        st.just("submit"), works, limits, limits, priorities, no_terms | all_terms
    ),
    st.tuples(
        st.just("submit_nowait"),
        works,
        limits,
        st.none(),
        priorities,
        no_terms | all_terms,
    ),
)
batch_tries = st.none() | tries
batches = st.one_of(
    st.tuples(
        st.just("map"), work_lists, sources, limits, limits, priorities, batch_tries
    ),
    st.tuples(
        st.just("settle"), work_lists, sources, limits, limits, priorities, batch_tries
    ),
    st.tuples(
        st.just("stream"),
        work_lists,
        sources,
        limits,
        limits,
        priorities,
        batch_tries,
        st.integers(0, 7),
        st.booleans(),
        st.booleans(),
        st.sampled_from([None, 1, 2]),
    ),
)
leases = st.tuples(st.just("lease"), work_lists, limits, limits, priorities)
passing = st.one_of(
    st.tuples(st.just("sleep"), moments),
    st.tuples(st.just("checkpoint")),
    st.tuples(st.just("calm")),
)
control = st.one_of(
    st.tuples(st.just("cancel reply"), orders),
    st.tuples(st.just("read reply"), orders, limits),
    st.tuples(st.just("cancel caller"), orders),
    st.tuples(st.just("resize"), sizes, moments),
    st.tuples(st.just("pause")),
    st.tuples(st.just("resume")),
    st.tuples(st.just("join"), moments),
    # How many are kept for a slow reader, and how slow it is.
    st.tuples(st.just("events"), st.sampled_from([1, 3, 1000]), limits),
    # What other code does with what the pool shares with it.
    st.tuples(st.just("borrow"), moments),
    st.tuples(st.just("reset")),
)
closing = st.one_of(
    st.tuples(st.just("shutdown"), st.sampled_from([0, 0.5, 2.0, math.inf]), moments),
    st.tuples(st.just("cancel")),
)
steps = st.sampled_from(
    [jobs] * 8 + [batches] * 3 + [leases] + [passing] * 5 + [control] * 5
).flatmap(lambda kind: kind)
# Not much can happen after it.
late_steps = st.builds(
    lambda first, others: (first, *others), closing, st.lists(steps, max_size=3)
)

extras = st.fixed_dictionaries(
    {},
    optional={
        "retry": tries,
        # Jobs in a second, burst.
        "rate": st.tuples(st.sampled_from([0.5, 2.0, 100.0]), st.sampled_from([1, 3])),
        # Failures, window, seconds open, probes.
        "breaker": st.tuples(
            st.integers(1, 3),
            st.sampled_from([0.5, math.inf]),
            st.sampled_from([0.25, 1.5, math.inf]),
            st.integers(1, 2),
        ),
        "limiter": st.sampled_from([1, 2, 8]),
        # Least, how many more at most, interval, step, up after, down after.
        "scale": st.tuples(
            st.integers(0, 2),
            st.integers(0, 3),
            st.sampled_from([0.25, 1.0]),
            st.integers(1, 2),
            st.sampled_from([0.0, 0.5]),
            st.sampled_from([0.5, 3.0, math.inf]),
        ),
        "max_jobs": st.integers(1, 3),
        "max_age": st.sampled_from([0.25, 1.0, 4.0]),
        "max_idle": st.sampled_from([0.25, 1.0]),
        "aging": st.sampled_from([0.25, 2.0]),
        "choose": st.sampled_from(["first", "last", "bad", "raises"]),
        "middleware": st.lists(
            st.sampled_from(["passes", "changes", "answers", "twice"]),
            min_size=1,
            max_size=2,
        ).map(tuple),
        # Seconds of the setup and of the cleanup of a worker.
        "setup": st.sampled_from([0.0, 0.25]),
        "ready": st.sampled_from([0.0, 0.25]),
    },
)

plans = st.builds(
    Plan,
    st.sampled_from([1, 2, 3, 5, 0]),
    st.fixed_dictionaries(
        {
            "max_backlog": st.sampled_from([math.inf, 3, 1, 0]),
            "overflow": st.sampled_from(["wait", "reject", "drop_oldest"]),
            "unobserved": st.sampled_from(["raise", "raise", "log", "ignore"]),
            "grace": st.sampled_from([math.inf, math.inf, 0, 0.5]),
            "timeout": st.sampled_from([math.inf, math.inf, 2.0]),
        }
    ),
    st.sampled_from([math.inf, 5, 1, 0]),
    st.booleans(),
    st.sampled_from(["leave", "leave", "leave", "raise", "cancel scope"]),
    # The longer ones are what finds most, the shorter ones what is found.
    (
        st.lists(steps, min_size=1, max_size=25)
        | st.lists(steps, min_size=12, max_size=30)
    ).map(tuple),
    st.just(()) | late_steps,
    # Where it is left at once, what was given in last is turned away.
    st.sampled_from([0.25, 3.0, 0.0]),
    st.just({}) | extras,
)
