"""What a simulation has found, and how it is read."""

import math
from collections.abc import Sequence
from typing import Self, final

import attrs


@final
@attrs.frozen(kw_only=True)
class Times:
    """Times in seconds, exact: every one was kept.

    A percentile is the nearest rank: the shortest time that so many of 100
    did not exceed. Everything is 0.0 when ``count`` is 0.
    """

    count: int
    """How many there were."""
    mean: float
    """Their sum divided by their number."""
    p50: float
    """Seconds that half of them did not exceed: the median."""
    p95: float
    """Seconds that 95 of 100 did not exceed."""
    p99: float
    """Seconds that 99 of 100 did not exceed."""
    max: float
    """The longest."""

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """Sort and sum samples; their order does not matter."""
        if not samples:
            return cls(count=0, mean=0.0, p50=0.0, p95=0.0, p99=0.0, max=0.0)
        ranked = sorted(samples)
        count = len(ranked)

        def percentile(percent: int) -> float:
            return ranked[-(-percent * count // 100) - 1]

        return cls(
            count=count,
            mean=math.fsum(ranked) / count,
            p50=percentile(50),
            p95=percentile(95),
            p99=percentile(99),
            max=ranked[-1],
        )


@final
@attrs.frozen(kw_only=True)
class SimulationReport:
    """What became of the jobs of a `simulate`, and how busy the workers were.

    Counts are of the jobs that arrived after the warmup, each of which has
    one fate: ``offered == done + failed + timed_out + cancelled + expired +
    dropped + lost + rejected + refused``. Means over time are of the time from
    the end of the warmup until the last job had ended.
    """

    seconds: float
    """How long that was, in virtual seconds."""
    offered: int
    """Jobs that arrived."""
    accepted: int
    """Those that the pool took."""
    rejected: int
    """Those that found no room, and did not wait for it."""
    refused: int
    """Those that the circuit breaker refused as they came."""
    done: int
    """Jobs that ended with a result."""
    failed: int
    """Jobs that ended with an error of the handler or of the breaker."""
    timed_out: int
    """Jobs that ran longer than their timeout."""
    cancelled: int
    """Jobs that were cancelled, as the grace was over."""
    expired: int
    """Jobs that waited longer than their ttl."""
    dropped: int
    """Jobs that made room for newer ones."""
    lost: int
    """Jobs that lost their worker."""
    retries: int
    """Tries after the first that were scheduled."""
    restarts: int
    """Crashed workers that were set up again."""
    wait: Times
    """From a job's arrival to its first start, room waited for included."""
    run: Times
    """From the start of each try to its end."""
    total: Times
    """From a job's arrival to its result, of the jobs that are done."""
    waited: float
    """The share of the started jobs that did not start at once, 0 to 1."""
    utilisation: float
    """The share of the workers' time in which they had a job, 0 to 1."""
    workers: float
    """How many workers there were, the mean over time."""
    queue_mean: float
    """Jobs that had arrived and not started, the mean over time."""
    queue_max: int
    """The most of them at any time."""
    throughput: float
    """Jobs done per second."""

    def __str__(self) -> str:
        """Lay the figures out as a table; counts that are 0 are left out."""
        offered = max(1, self.offered)
        lines = [f"{self.seconds:,.1f} virtual seconds"]
        for name in (
            *("offered", "done", "failed", "timed_out", "cancelled", "expired"),
            *("dropped", "lost", "rejected", "refused", "retries", "restarts"),
        ):
            count = getattr(self, name)
            if not count and name not in {"offered", "done"}:
                continue
            line = f"{name.replace('_', ' '):<12}{count:>12,}"
            if name not in {"offered", "retries", "restarts"}:
                line += f"{count / offered:>9.2%}"
            lines.append(line)
        heads = ("mean", "p50", "p95", "p99", "max")
        lines.append(f"{'seconds':<12}" + "".join(f"{head:>12}" for head in heads))
        for name in ("wait", "run", "total"):
            times = getattr(self, name)
            cells = (f"{getattr(times, head):>12,.4g}" for head in heads)
            lines.append(f"{name:<12}" + "".join(cells))
        workers = f"{self.workers:,.4g} workers"
        lines += [
            f"{'waited':<12}{self.waited:>12.2%}",
            f"{'utilisation':<12}{self.utilisation:>12.2%} of {workers}",
            f"{'queue':<12}{self.queue_mean:>12,.4g} at most {self.queue_max:,}",
            f"{'throughput':<12}{self.throughput:>12,.4g} done a second",
        ]
        return "\n".join(lines)
