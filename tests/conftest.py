"""Profiles of hypothesis: a modest budget, and a large one under TRIO_POOL_STRESS."""

from __future__ import annotations

import os

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
