"""What OpenTelemetry is told: a span for each attempt, and the figures of pools.

It needs ``pip install trio-pool[opentelemetry]``, which brings the API; what
becomes of spans and metrics is the affair of the SDK that the program sets up.
Nothing is told unless it is asked for.
"""

from typing import TYPE_CHECKING

from .._extras import from_extras, publish

if TYPE_CHECKING:
    from ._observer import PoolObserver as PoolObserver
    from ._observer import observe_pools as observe_pools
    from ._spans import trace_jobs as trace_jobs

_BY_EXTRAS = {
    "PoolObserver": ("_observer", "opentelemetry"),
    "observe_pools": ("_observer", "opentelemetry"),
    "trace_jobs": ("_spans", "opentelemetry"),
}

publish(globals())
if not TYPE_CHECKING:
    # Checkers of types are to find out names that are misspelt.
    __getattr__, __dir__ = from_extras(globals(), _BY_EXTRAS)
