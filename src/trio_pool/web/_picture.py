"""What the page shows at one moment, as plain frozen data."""

from typing import Literal, final

import attrs

Light = Literal["green", "amber", "red", "off"]
"""How a pool is doing: well, under pressure, badly, or not at all any more."""

MarkKind = Literal["resize", "mark", "breaker", "state", "restart"]
"""What a mark is about; "mark" is one that the program set, such as a deploy."""


@final
@attrs.frozen(kw_only=True)
class Spread:
    """Times of jobs that ended a wait or a run in the last minute, in seconds."""

    count: int
    p50: float
    p95: float
    p99: float
    max: float


@final
@attrs.frozen(kw_only=True)
class FailureCount:
    """How often jobs failed by one type of error, or were dropped, or expired."""

    type: str
    """The type of the error; else "dropped" or "expired"."""
    count: int
    last: float
    """When it was last seen, in seconds of `time.time`."""


@final
@attrs.frozen(kw_only=True)
class Failure:
    """One of the last failures of a job."""

    time: float
    """When, in seconds of `time.time`."""
    job: int | str
    worker: int | None
    attempts: int
    type: str
    place: str
    """Where it was raised: ``file:line function``; empty if unknown."""
    text: str | None
    """Its message; None unless payloads may be shown."""


@final
@attrs.frozen(kw_only=True)
class RestartCause:
    """A worker that crashed, and why."""

    time: float
    """When, in seconds of `time.time`."""
    worker: int
    type: str
    place: str
    text: str | None


@final
@attrs.frozen(kw_only=True)
class WorkerRow:
    """One worker."""

    id: int
    state: str
    job: int | str | None
    age: float | None
    """Seconds since its job started."""
    doing: str | None
    """Its job's input in words; None unless payloads may be shown."""
    jobs: int
    restarts: int
    last_error: str | None
    """The type of what killed it last."""


@final
@attrs.frozen(kw_only=True)
class Mark:
    """A moment worth remembering when looking at the charts."""

    time: float
    """When, in seconds of `time.time`."""
    kind: MarkKind
    text: str


@final
@attrs.frozen(kw_only=True)
class Series:
    """Up to 15 minutes of one pool, a value for each ``step`` seconds.

    All lists are as long as ``times`` says; the newest value is the last. NaN
    never occurs; where nothing was measured the value is 0.0.
    """

    step: float
    """Seconds between two values."""
    until: float
    """When the newest value was taken, in seconds of `time.time`."""
    busy: tuple[float, ...] = ()
    size: tuple[float, ...] = ()
    queued: tuple[float, ...] = ()
    accepted: tuple[float, ...] = ()
    """Jobs accepted per second."""
    ended: tuple[float, ...] = ()
    """Jobs ended per second."""
    failed: tuple[float, ...] = ()
    """Jobs failed, timed out or lost per second."""
    wait_p95: tuple[float, ...] = ()
    """Seconds."""
    run_p95: tuple[float, ...] = ()
    """Seconds."""
    lag: tuple[float, ...] = ()
    """The longest that the loop was held up in each step, in seconds."""


@final
@attrs.frozen(kw_only=True)
class PoolPicture:
    """One pool at one moment."""

    name: str
    state: str
    """The value of its `trio_pool.PoolState`."""
    ready: bool
    """Whether it can do its work, as ``/ready`` says; true while it refuses jobs."""
    refuses: bool = False
    """Whether a job given in now would be refused: its circuit breaker is open, or
    its backlog is full and rejects."""
    light: Light
    sentence: str
    size: int
    """Workers wanted."""
    workers_up: int
    """Workers that are set up."""
    busy: int
    busy_share_second: float
    """The share of the workers wanted that were busy, over the last second: 0 to 1."""
    busy_share_minute: float
    """The same over the last minute."""
    queued: int
    delayed: int
    running: int
    max_backlog: float
    oldest_wait: float
    """Seconds."""
    wait: Spread
    run: Spread
    accepted_rate: float
    """Jobs accepted per second, over the last ten seconds."""
    ended_rate: float
    """Jobs ended per second, over the last ten seconds."""
    accepted: int
    done: int
    failed: int
    timed_out: int
    cancelled: int
    expired: int
    dropped: int
    lost: int
    retries: int
    restarts: int
    breaker: str | None
    """The state of its circuit breaker; None if it has none."""
    failures: tuple[FailureCount, ...] = ()
    """By type, the most frequent first; at most 20 types, then "others"."""
    events_lost: int = 0
    """Events that came faster than they could be looked at: failures, crashes and
    others may be missing here."""
    errors: tuple[Failure, ...] = ()
    """The last 20, the newest first."""
    crashes: tuple[RestartCause, ...] = ()
    """The last 20, the newest first."""
    workers: tuple[WorkerRow, ...] = ()
    """All of them, by id."""
    slowest: tuple[WorkerRow, ...] = ()
    """Those with the oldest running jobs, at most 10, the oldest first."""
    marks: tuple[Mark, ...] = ()
    """Those of the last 15 minutes, at most 50, the newest first."""
    history: Series | None = None


@final
@attrs.frozen(kw_only=True)
class Picture:
    """All that is shown, at one moment."""

    time: float
    """When, in seconds of `time.time`."""
    lag: float
    """The longest that the loop was held up in the last second, in seconds."""
    lag_minute: float
    """The same in the last minute."""
    controls: bool
    """Whether the page can do more than look."""
    pools: tuple[PoolPicture, ...]
