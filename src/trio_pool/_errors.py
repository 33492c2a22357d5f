"""The errors that the pool itself raises, each carrying its facts."""

from __future__ import annotations

from typing import final

import trio


class PoolError(Exception):
    """Anything that the pool itself has to say to its caller."""


@final
class WrongThread(PoolError, RuntimeError):
    """A pool was called from another thread, or outside its trio run."""

    def __init__(self, pool: str) -> None:
        super().__init__(pool)
        self.pool = pool

    def __str__(self) -> str:
        return (
            f"pool {self.pool!r} was called from another thread or outside its trio "
            "run; from a thread, call it by trio.from_thread.run() or "
            "trio.from_thread.run_sync()"
        )


@final
class PoolClosed(PoolError):
    """The pool takes no more jobs; this one never started."""

    started = False

    def __init__(self, pool: str) -> None:
        super().__init__(pool)
        self.pool = pool

    def __str__(self) -> str:
        return f"pool {self.pool!r} is closed: it takes no more jobs"


@final
class BacklogFull(PoolError, trio.WouldBlock):
    """There was no room for the job; it never started.

    It is a `trio.WouldBlock` too: "no room now" is what both say.
    """

    started = False

    def __init__(self, pool: str, max_backlog: float) -> None:
        super().__init__(pool, max_backlog)
        self.pool = pool
        self.max_backlog = max_backlog

    def __str__(self) -> str:
        return f"pool {self.pool!r} has no room: max_backlog is {self.max_backlog}"


@final
class CircuitOpen(PoolError):
    """The pool's circuit breaker is open; the job was not accepted, or not run."""

    started = False

    def __init__(self, pool: str, reopens_in: float) -> None:
        super().__init__(pool, reopens_in)
        self.pool = pool
        self.reopens_in = reopens_in
        """Seconds until a call has a chance again."""

    def __str__(self) -> str:
        return (
            f"the circuit breaker of pool {self.pool!r} is open; "
            f"a call has a chance again in {self.reopens_in:.3g} s"
        )


@final
class WouldDeadlock(PoolError):
    """A job would wait for its own pool, with no worker left to end the wait.

    What it was going to wait for never started.
    """

    started = False

    def __init__(self, pool: str, wait: str) -> None:
        super().__init__(pool, wait)
        self.pool = pool
        self.wait = wait

    def __str__(self) -> str:
        return (
            f"{self.wait} inside a job of pool {self.pool!r} would wait for ever, as "
            "the job holds the worker it waits for; use another pool, or a larger one"
        )


@final
class PoolBroken(PoolError):
    """The pool gave up: its restart budget was spent, or its supervisor failed.

    Raised out of the block, and to everyone who waits for the pool. To the
    waiter of one job it says that job's fate in `job_id`, `started`,
    `attempts` and `worker`. Its ``__cause__`` is what broke the pool.
    """

    def __init__(
        self,
        pool: str,
        reason: str,
        job_id: int | str | None = None,
        started: bool = False,
        attempts: int = 0,
        worker: int | None = None,
    ) -> None:
        super().__init__(pool, reason, job_id, started, attempts, worker)
        self.pool = pool
        self.reason = reason
        self.job_id = job_id
        self.started = started
        self.attempts = attempts
        self.worker = worker

    def __str__(self) -> str:
        text = f"pool {self.pool!r} is broken: {self.reason}"
        if self.job_id is None:
            return text
        return f"{text}; job {self.job_id} {_fate(self.started)}"


class JobError(PoolError):
    """What the pool has to say about one job.

    ``started`` answers "may it have run?": if it is false, submitting the job
    again is safe. ``attempts`` counts its starts, ``worker`` is the id of the
    worker that ran it last.
    """

    def __init__(
        self, job_id: int | str, started: bool, attempts: int, worker: int | None
    ) -> None:
        super().__init__(job_id, started, attempts, worker)
        self.job_id = job_id
        self.started = started
        self.attempts = attempts
        self.worker = worker

    def __str__(self) -> str:
        return f"job {self.job_id} {self._what}; it {_fate(self.started)}"

    _what = "failed"


@final
class JobTimeout(JobError, trio.TooSlowError):
    """The job ran longer than its ``timeout`` (seconds) and was cancelled."""

    def __init__(
        self,
        job_id: int | str,
        started: bool,
        attempts: int,
        worker: int | None,
        timeout: float,
    ) -> None:
        super().__init__(job_id, started, attempts, worker)
        # Once more with all the fields, by which the error is unpickled.
        Exception.__init__(self, job_id, started, attempts, worker, timeout)
        self.timeout = timeout

    def __str__(self) -> str:
        return f"job {self.job_id} ran longer than its timeout of {self.timeout} s"


@final
class JobDropped(JobError):
    """The job made room for a newer one before it could start."""

    _what = "was dropped from a full backlog"


@final
class JobExpired(JobError):
    """The job waited longer than its ``ttl`` (seconds) and never started."""

    _what = "waited longer than its ttl"


@final
class JobCancelled(JobError):
    """The job was cancelled: by its reply, by shutdown, or with the pool."""

    _what = "was cancelled"


@final
class WorkerCrashed(JobError):
    """The worker died under the job; the ``__cause__`` is what killed it."""

    _what = "lost its worker"


@final
class WorkerGone(BaseException):
    """What a handler raises to say that its worker is lost, by its ``__cause__``.

    No error of the job's, so whoever handles those lets it pass. A job that had
    ``started`` is lost with the worker; another waits for the next one. It is a
    crash of the worker, unless it is ``planned`` to be replaced: where several
    are lost by one cause, that is one crash.
    """

    def __init__(self, started: bool, planned: bool = False) -> None:
        super().__init__(started, planned)
        self.started = started
        self.planned = planned


def _fate(started: bool) -> str:
    return "had started" if started else "had not started"


def type_name(error: BaseException) -> str:
    """Name the type of an error, with its module unless that is builtins."""
    kind = type(error)
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"
