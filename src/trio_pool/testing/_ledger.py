"""The books of a simulation: each job from its arrival to its end."""

from array import array
from collections.abc import Mapping
from typing import Any, final

from .. import Hooks, JobState
from ._clock import VirtualClock
from ._report import SimulationReport, Times


@final
class Call:
    """One job of a simulation, from its arrival to its end."""

    __slots__ = (
        *("arrived", "attempt", "counts", "fails", "name", "number"),
        *("options", "seconds", "started", "waiting"),
    )

    arrived: float
    attempt: int
    counts: bool
    """Whether it arrived after the warmup."""
    fails: bool
    name: int
    """The id of its job."""
    number: int
    options: Mapping[str, Any]
    seconds: float
    started: float | None
    """When the present try started; None while there is none."""
    waiting: bool
    """Whether it has not started yet."""


class Ledger(Hooks):
    """Writes down what becomes of each call.

    Of starts and results the handler tells it, which is cheaper than hooks; of
    everything else the pool does.
    """

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.live: dict[int | str, Call] = {}
        self.done = 0
        self.fates = dict.fromkeys((s for s in JobState if s.terminal), 0)
        self.offered = self.accepted = self.rejected = self.refused = 0
        self.retries = self.restarts = 0
        self.waits, self.runs, self.totals = array("d"), array("d"), array("d")
        self.began = 0.0
        """When the warmup is over, and counting begins."""
        self.since = 0.0
        # What there is now, and its integral over time.
        self.queued = self.busy = 0
        self.up: set[int] = set()
        self.queued_seconds = self.busy_seconds = self.worker_seconds = 0.0
        self.queue_max = 0

    def begin(self, when: float) -> None:
        """Count from a time on, which may lie ahead."""
        self.began = self.since = when

    def pass_time(self) -> None:
        """Count the time since this was called last; before every change."""
        span = self._clock.now - self.since
        if span > 0.0:
            self.since = self._clock.now
            self.queued_seconds += self.queued * span
            self.busy_seconds += self.busy * span
            self.worker_seconds += len(self.up) * span
            if self.queued > self.queue_max:
                self.queue_max = self.queued

    def arrive(self, call: Call) -> None:
        """Note a call that is about to be given in."""
        self.offered += call.counts
        self.pass_time()
        self.queued += 1

    def start(self, call: Call) -> None:
        """Note that a try starts."""
        now = call.started = self._clock.now
        call.attempt += 1
        self.pass_time()
        self.busy += 1
        if call.waiting:
            call.waiting = False
            self.queued -= 1
            if call.counts:
                self.waits.append(now - call.arrived)

    def stop(self, call: Call) -> None:
        """Note that a try is over, if there was one."""
        started = call.started
        if started is not None:
            call.started = None
            self.pass_time()
            self.busy -= 1
            if call.counts:
                self.runs.append(self._clock.now - started)

    def finish(self, call: Call) -> None:
        """Note that a call has its result."""
        self.stop(call)
        del self.live[call.name]
        if call.counts:
            self.done += 1
            self.totals.append(self._clock.now - call.arrived)

    def leave(self, call: Call) -> None:
        """Note that a call waits no more."""
        if call.waiting:
            call.waiting = False
            self.pass_time()
            self.queued -= 1

    def end(self, call: Call, state: JobState) -> None:
        """Note how a call has ended, which is not by a result."""
        self.leave(call)
        self.fates[state] += call.counts

    def on_job_error(self, event: Any) -> None:
        """A call has ended without a result, started or not."""
        # Not there is one that is dropped in the step in which it comes.
        call = self.live.pop(event.job_id, None)
        if call is not None:
            self.stop(call)
            self.end(call, event.state)

    on_job_cancel = on_job_drop = on_job_error

    def on_job_retry(self, event: Any) -> None:
        call = self.live[event.job_id]
        self.stop(call)
        self.retries += call.counts

    def on_worker_start(self, event: Any) -> None:
        self.pass_time()
        self.up.add(event.worker)

    def on_worker_stop(self, event: Any) -> None:
        self.pass_time()
        self.up.discard(event.worker)

    on_worker_crash = on_worker_stop

    def on_worker_restart(self, event: Any) -> None:
        self.restarts += event.time >= self.began

    def report(self) -> SimulationReport:
        """Sum up."""
        self.pass_time()
        seconds = self.since - self.began
        started = len(self.waits)
        # Nearly all of them are 0.0 in many pools.
        waited = started - self.waits.count(0.0)
        fates = {state.value: number for state, number in self.fates.items()}
        fates["done"] = self.done
        return SimulationReport(
            seconds=seconds,
            offered=self.offered,
            accepted=self.accepted,
            rejected=self.rejected,
            refused=self.refused,
            retries=self.retries,
            restarts=self.restarts,
            wait=Times.of(self.waits),
            run=Times.of(self.runs),
            total=Times.of(self.totals),
            waited=_ratio(waited, started),
            utilisation=_ratio(self.busy_seconds, self.worker_seconds),
            workers=_ratio(self.worker_seconds, seconds),
            queue_mean=_ratio(self.queued_seconds, seconds),
            queue_max=self.queue_max,
            throughput=_ratio(self.done, seconds),
            **fates,
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@final
class FullLedger(Ledger):
    """Where something is around the handler: the pool tells of everything."""

    def on_job_start(self, event: Any) -> None:
        super().start(self.live[event.job_id])

    def on_job_complete(self, event: Any) -> None:
        super().finish(self.live[event.job_id])

    def start(self, call: Call) -> None:
        """Wait for the pool to say so."""

    finish = start
