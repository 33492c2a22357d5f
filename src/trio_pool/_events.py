"""What the pool tells about itself: events, hooks, statistics, other records."""

import enum
import logging
from collections.abc import Hashable
from typing import Generic, Literal, TypeAlias, TypeVar, final

import attrs
import outcome

from ._latency import Latency

In = TypeVar("In")
Out = TypeVar("Out")

JobId: TypeAlias = int | str
"""What names a job in its pool: a number, or the text given as ``id``."""

log = logging.getLogger("trio_pool")


@final
class JobState(enum.Enum):
    """Where a job is between its acceptance and its one terminal state."""

    DELAYED = "delayed"
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    DROPPED = "dropped"
    LOST = "lost"

    @property
    def terminal(self) -> bool:
        """Whether a job in this state has ended."""
        return self not in _LIVE


_LIVE = (JobState.DELAYED, JobState.QUEUED, JobState.RUNNING)

UNHEARD = (JobState.FAILED, JobState.TIMED_OUT, JobState.LOST)
"""How a job ends with an error that somebody has to hear."""


@final
class WorkerState(enum.Enum):
    """What a worker is doing."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    STOPPING = "stopping"
    RESTARTING = "restarting"
    STOPPED = "stopped"


@final
class PoolState(enum.Enum):
    """Where a pool is between its opening and the end of its block."""

    OPEN = "open"
    PAUSED = "paused"
    CLOSING = "closing"
    CLOSED = "closed"
    BROKEN = "broken"


PoolKind: TypeAlias = Literal["pool_start", "pool_stop"]
"""What `PoolChanged` tells of: the name of the hook, without ``on_``."""

WorkerKind: TypeAlias = Literal[
    "worker_start", "worker_stop", "worker_crash", "worker_restart"
]
"""What `WorkerChanged` tells of: the name of the hook, without ``on_``."""

JobKind: TypeAlias = Literal[
    "job_queue",
    "job_start",
    "job_complete",
    "job_error",
    "job_cancel",
    "job_retry",
    "job_drop",
]
"""What `JobChanged` tells of: the name of the hook, without ``on_``."""

EventKind: TypeAlias = PoolKind | Literal["resize"] | WorkerKind | JobKind
"""What an event stream can be asked for: the name of a hook, without ``on_``."""


@final
@attrs.frozen
class PoolChanged:
    """The pool started or stopped."""

    kind: PoolKind
    """What happened."""
    pool: str
    """The pool's name."""
    time: float
    """When, on `trio.current_time()`."""


@final
@attrs.frozen
class PoolResized:
    """Another number of workers is wanted."""

    kind: Literal["resize"]
    """What happened."""
    pool: str
    """The pool's name."""
    time: float
    """When, on `trio.current_time()`."""
    old: int
    """Workers wanted before."""
    new: int
    """Workers wanted now."""


@final
@attrs.frozen
class WorkerChanged:
    """A worker started, stopped, crashed or was restarted."""

    kind: WorkerKind
    """What happened."""
    pool: str
    """The pool's name."""
    time: float
    """When, on `trio.current_time()`."""
    worker: int
    """The worker's id."""
    error: BaseException | None
    """What went wrong, when it crashed."""


@final
@attrs.frozen
class JobChanged:
    """A job reached another state."""

    kind: JobKind
    """What happened."""
    pool: str
    """The pool's name."""
    time: float
    """When, on `trio.current_time()`."""
    job_id: JobId
    """The job's id."""
    state: JobState
    """The state it reached."""
    worker: int | None
    """The id of the worker that has or had it."""
    attempts: int
    """How often it was started."""
    error: BaseException | None
    """What its caller hears, when that is an error; what the last attempt
    raised, when another will follow."""
    key: Hashable = None
    """The job's key; None if it has none."""
    delay: float | None = None
    """Seconds until the next attempt, for ``job_retry`` only."""


@final
@attrs.frozen
class EventsLost:
    """The reader of an event stream was too slow: events are missing here."""

    kind: Literal["lost"] = attrs.field(default="lost", init=False)
    """What happened."""
    pool: str
    """The pool's name."""
    time: float
    """When the first of them was lost, on `trio.current_time()`."""
    count: int
    """How many were lost between the event before this one and the next."""


Event: TypeAlias = PoolChanged | PoolResized | WorkerChanged | JobChanged | EventsLost
"""Whatever an event stream gives; told apart by ``kind`` or by class."""


class Hooks:
    """Subclass this and override what you want to hear of.

    Hooks are synchronous and run on the pool's thread, so they should be
    short. Only overridden methods are ever called; the others cost nothing.
    Job hooks run before the caller gets the result. A hook that raises is
    logged once, removed, and changes nothing else.
    """

    def on_pool_start(self, event: PoolChanged) -> None:
        """Every worker is set up; the block is about to be entered."""

    def on_pool_stop(self, event: PoolChanged) -> None:
        """The last worker has gone."""

    def on_worker_start(self, event: WorkerChanged) -> None:
        """A worker is set up and takes jobs."""

    def on_worker_stop(self, event: WorkerChanged) -> None:
        """A worker has gone, as planned."""

    def on_worker_crash(self, event: WorkerChanged) -> None:
        """A worker died, or could not be set up, or failed to clean up."""

    def on_worker_restart(self, event: WorkerChanged) -> None:
        """A crashed worker is being set up again."""

    def on_resize(self, event: PoolResized) -> None:
        """Another number of workers is wanted."""

    def on_job_queue(self, event: JobChanged) -> None:
        """A job was accepted."""

    def on_job_start(self, event: JobChanged) -> None:
        """A job is about to run."""

    def on_job_complete(self, event: JobChanged) -> None:
        """A job has a result."""

    def on_job_error(self, event: JobChanged) -> None:
        """A job failed, timed out, or lost its worker."""

    def on_job_cancel(self, event: JobChanged) -> None:
        """A job was cancelled."""

    def on_job_retry(self, event: JobChanged) -> None:
        """A job failed and will be tried again."""

    def on_job_drop(self, event: JobChanged) -> None:
        """A waiting job made room for a newer one, or waited longer than its ttl."""


@final
@attrs.frozen(kw_only=True)
class PoolStatistics:
    """Counts of one moment, and the times of jobs so far.

    ``accepted == delayed + queued + running + done + failed + timed_out +
    cancelled + expired + dropped + lost``, always.
    """

    size: int
    """Workers wanted."""
    workers: int
    """Workers that are set up."""
    busy: int
    """Workers that have a job."""
    accepted: int
    """Jobs ever accepted."""
    delayed: int
    """Jobs that wait for their time."""
    queued: int
    """Jobs that wait for a worker."""
    running: int
    """Jobs that a worker has."""
    done: int
    """Jobs that ended with a result."""
    failed: int
    """Jobs that ended with their handler's error."""
    timed_out: int
    """Jobs that ran longer than their timeout."""
    cancelled: int
    """Jobs that were cancelled, waiting or running."""
    expired: int
    """Jobs that waited longer than their ttl."""
    dropped: int
    """Jobs that made room for newer ones."""
    lost: int
    """Jobs that lost their worker, or the pool."""
    retries: int
    """Attempts after the first that were scheduled."""
    restarts: int
    """Crashed workers that were set up again."""
    oldest_wait: float
    """Seconds that the job waiting longest has waited; 0.0 if none waits."""
    wait: Latency
    """How long the jobs that were started had waited, in seconds."""
    run: Latency
    """How long the attempts ran, in seconds."""
    throughput: float
    """Jobs that ended per second since the pool opened, until it stopped."""


@final
@attrs.frozen(kw_only=True)
class WorkerSnapshot:
    """One worker at one moment."""

    id: int
    """The worker's id: its slot's number, from 0."""
    state: WorkerState
    """What it is doing."""
    job_id: JobId | None
    """The id of the job it has."""
    job_age: float | None
    """Seconds since that job started."""
    jobs: int
    """Jobs it has started."""
    restarts: int
    """How often it was set up again after a crash."""
    last_error: BaseException | None
    """What killed it last; kept, and what its traceback leads to, until the next."""


@final
@attrs.frozen
class Settled(Generic[In, Out]):
    """One item of `Pool.settle` or `Pool.stream` and what became of it."""

    index: int
    """Its position in the input, from 0."""
    item: In
    """The input itself."""
    outcome: outcome.Value[Out] | outcome.Error
    """Its result or its error; ``outcome.unwrap()`` returns or raises it."""


@final
@attrs.frozen(kw_only=True)
class ShutdownReport:
    """The fate of every job that was accepted and unfinished as shutdown began."""

    done: int
    """Jobs that ended with a result."""
    failed: int
    """Jobs that failed, timed out, or lost their worker."""
    cancelled: int
    """Jobs that were cancelled when the grace was over, or by someone else."""
    unfinished: int
    """Jobs that were cancelled but had not ended a second later."""
