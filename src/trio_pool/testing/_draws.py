"""What a generated program is made of: its strategies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

from hypothesis import strategies as st

from .. import Backoff, Retry
from ._faults import Fault, InjectedFault

T = TypeVar("T")
U = TypeVar("U")
Options: TypeAlias = Mapping[str, Any]

# What comes first is the simplest, to which a program shrinks.

moments = st.sampled_from([0.25, 0.5, 1.0, 0.01, 2.0, 5.0])
keys = st.sampled_from([None, None, "a", "a", "b"])
endings = st.sampled_from(["leave", "leave", "leave", "raise", "cancel"])
pauses = st.sampled_from([0.0, 0.0, 0.0, 0.25, 1.0, 60.0])
_once_more = Retry(2, Backoff(0.25, jitter=0.0), on=(InjectedFault,))
of_attempts = {
    "timeout": moments,
    "priority": st.integers(-1, 1),
    "retry": st.just(_once_more),
}
of_submits = {**of_attempts, "delay": moments, "ttl": moments}


def seldom(strategy: st.SearchStrategy[T], usual: U) -> st.SearchStrategy[T | U]:
    """Draw from a strategy one time in three: most things are usual at most times."""
    return st.sampled_from([False, False, True]).flatmap(
        lambda drawn: strategy if drawn else st.just(usual)
    )


def some(choices: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Options]:
    """Draw some of these options, one time in two."""
    given = st.fixed_dictionaries({}, optional=choices)
    return st.booleans().flatmap(lambda drawn: given if drawn else st.just({}))


some_options = some(
    {
        "max_backlog": st.sampled_from([0, 1, 3]),
        "overflow": st.sampled_from(["reject", "drop_oldest"]),
        "timeout": moments,
        "max_jobs": st.integers(1, 3),
        "grace": st.sampled_from([0.0, 1.0]),
    }
)
some_faults = seldom(
    st.one_of(
        st.builds(
            Fault,
            st.sampled_from(["fail", "crash", "hang", "cancel"]),
            st.sampled_from(["before", "after"]),
        ),
        st.builds(
            Fault,
            st.sampled_from(["fail", "crash", "hang", "cancel"]),
            st.just("during"),
            moments,
        ),
        st.builds(Fault, st.just("slow"), seconds=moments),
    ),
    None,
)


def of_machine(name: str) -> st.SearchStrategy[Any]:
    """Draw from what the machine in question has under this name."""

    def strategy(machine: Any) -> st.SearchStrategy[Any]:
        found = getattr(machine, name)
        return found if isinstance(found, st.SearchStrategy) else st.just(found)

    return st.runner().flatmap(strategy)
