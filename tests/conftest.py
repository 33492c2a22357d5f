"""Profiles of hypothesis: a modest budget, and a large one under TRIO_POOL_STRESS."""

from __future__ import annotations

import gc
import os
import signal

from hypothesis import HealthCheck, settings

# One example is a whole trio run, so what counts is the number of examples and
# not how long a single one takes.
settings.register_profile(
    "modest",
    max_examples=50,
    deadline=None,
    derandomize=False,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "stress", parent=settings.get_profile("modest"), max_examples=2_500
)
settings.load_profile("stress" if os.environ.get("TRIO_POOL_STRESS") else "modest")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So shells start what they run in the background; some tests send themselves one.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Keep what is there by now from the collector, which many tests run on purpose.

    It would go through all modules and tests each time.
    """
    gc.collect()
    gc.freeze()
