"""The supervisor actor: the wanted workers, restarts, recycling and the timers."""

from __future__ import annotations

import math
from collections import deque
from contextlib import suppress
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, final

import attrs
import trio
from trio.lowlevel import ParkingLot, enable_ki_protection

from ._books import Closing, count, picture
from ._current import CurrentJob, crew, describe
from ._dispatch import Dispatch
from ._errors import PoolBroken, WorkerCrashed
from ._events import (
    PoolChanged,
    PoolResized,
    PoolState,
    PoolStatistics,
    ShutdownReport,
    WorkerChanged,
    WorkerSnapshot,
    WorkerState,
    log,
)
from ._policy import Scaler
from ._worker import Factory, Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._config import PoolConfig

# No worker is set up again faster than this, whatever its backoff says.
_LEAST_BACKOFF = 0.01

# Seconds that cancelled jobs get to unwind before shutdown() reports them.
_UNWINDING = 1.0

# A worker that never sleeps yields after _SLICE seconds; all of them together
# hold the loop for about _TURN seconds.
_SLICE = 0.0005
_TURN = 0.0015
_LEAST_SLICE = 0.00002


@final
@attrs.frozen
class _Gone:
    """A worker's task has ended, by a crash if there is an error."""

    worker: Worker
    error: BaseException | None


@final
class Supervisor:
    """Keeps the wanted workers, and acts where `Dispatch` only decides.

    Its task hears over its memory channel of ended workers and new sizes, and
    sleeps for the timer; it never carries a job.
    """

    def __init__(
        self,
        config: PoolConfig,
        factory: Factory,
        calls_functions: bool,
    ) -> None:
        self.config = config
        self.dispatch = Dispatch(config)
        self.factory = factory
        self.calls_functions = calls_functions
        """Whether the jobs bring what is to be called."""
        self.middleware = config.middleware
        self.crew: dict[trio.lowlevel.Task, Any] = {}
        """The workers of all pools of this trio run, by their tasks."""
        self.plugins: dict[str, Any] = {}
        self.restarts = 0
        self.opened = trio.Event()
        self.finished = trio.Event()
        self.open_error: BaseException | None = None
        self._is_open = False
        self._started = 0
        self._slots = 0
        self._free: list[int] = []
        self._leavers: dict[Worker, None] = {}
        """Workers that are there and not wanted any more."""
        self._due: list[Worker] = []
        """Crashed workers whose backoff is over."""
        self._life = trio.CancelScope(shield=True)
        self._body: trio.CancelScope | None = None
        self._tell, self._hear = trio.open_memory_channel["_Gone | None"](math.inf)
        self._staffed = ParkingLot()
        self._closing: Closing | None = None
        self._scaler = None
        self._spares_busy = False
        """Whether only idle workers are to be let go."""
        if config.scale is not None:
            self._scaler = Scaler(config.scale)
            self.dispatch.wanted = config.scale.min

    # ------------------------------------------------------------------
    # Workers: what they report in their own last or first step.

    def worker_ready(self, worker: Worker) -> None:
        """A worker is set up."""
        worker.state = WorkerState.BUSY
        worker.jobs_before = worker.jobs
        self._started += 1
        self._plan_recycling(worker)
        self._tell_worker("on_worker_start", worker, None)
        if not self._is_open and self._started == len(self.dispatch.workers):
            self._enter()
        self._staff()

    def _plan_recycling(self, worker: Worker) -> None:
        config, clock = self.config, self.dispatch.clock
        if config.max_age < math.inf:
            self._plan(worker, clock() + config.max_age, self._recycle)
        if config.max_idle < math.inf:
            self._plan(worker, clock() + config.max_idle, self._look_at_idle)

    def _plan(
        self, worker: Worker, when: float, call: Callable[[Worker], None]
    ) -> None:
        alarm = self.dispatch.timer.at(when, lambda: call(worker))
        planned = [alarm for alarm in worker.alarms if alarm[2] is not None]
        worker.alarms = (*planned, alarm)

    def _look_at_idle(self, worker: Worker) -> None:
        """Recycle a worker that has been idle for too long, or look again later."""
        now = self.dispatch.clock()
        idle = worker in self.dispatch.idle or worker in self.dispatch.resting
        end = (worker.idle_since if idle else now) + self.config.max_idle
        if idle and end <= now:
            self._recycle(worker)
        else:
            self._plan(worker, end, self._look_at_idle)

    def _recycle(self, worker: Worker) -> None:
        self.dispatch.change += 1
        worker.recycle()
        self._nudge_idle(worker)

    def _nudge_idle(self, worker: Worker) -> None:
        dispatch = self.dispatch
        if worker in dispatch.idle or worker in dispatch.resting:
            dispatch.wake_up(worker)
            worker.nudge()

    def worker_leaves(self, worker: Worker, error: BaseException | None) -> None:
        """A worker takes no more jobs and begins its cleanup, however long."""
        dispatch = self.dispatch
        dispatch.wake_up(worker)
        if worker.lease is not None:
            worker.lease.lose(error)
        worker.state = WorkerState.STOPPING
        self._forget_alarms(worker)
        job = worker.job
        if job is not None and not job.begun and not dispatch.stopping:
            dispatch.settle_leftover(job, None)
        if dispatch.has_ready():
            # It may have been woken for what waits.
            dispatch.rouse(1)

    def worker_gone(
        self, worker: Worker, crash: BaseException | None, trouble: BaseException | None
    ) -> None:
        """A worker's task ends: settle what it still holds, then report it."""
        dispatch = self.dispatch
        was_ready = worker.state is not WorkerState.STARTING
        self._started -= was_ready
        blamed = _blame(trouble, dispatch.stopping)
        interrupt = _interrupt_in(crash) or _interrupt_in(blamed)
        if crash is None:
            crash = blamed
        elif blamed is not None and interrupt is None and not _is_echo(blamed):
            log.error(
                "worker %d of pool %r failed to clean up after its crash",
                worker.id,
                self.config.name,
                exc_info=blamed,
            )
        worker.state = WorkerState.STOPPED
        job = worker.job
        if job is not None:
            dispatch.settle_leftover(job, crash)
        worker.ticket = None
        if crash is None:
            if was_ready:
                self._tell_worker("on_worker_stop", worker, None)
        else:
            worker.last_error = crash
        if crash is not None and interrupt is None:
            log.error(
                "worker %d of pool %r crashed",
                worker.id,
                self.config.name,
                exc_info=crash,
            )
        if crash is not None:
            self._tell_worker("on_worker_crash", worker, crash)
        if interrupt is not None:
            self.interrupt(interrupt)
        self._tell.send_nowait(_Gone(worker, crash))

    def _tell_worker(
        self, hook: str, worker: Worker, error: BaseException | None
    ) -> None:
        hooks = self.dispatch.hooks
        if hooks.listening(hook):
            kind: Any = hook.removeprefix("on_")
            name, now = self.config.name, self.dispatch.clock()
            hooks.call(hook, WorkerChanged(kind, name, now, worker.id, error))

    def interrupt(self, error: BaseException) -> None:
        """Ctrl-C landed in a worker: stop everything and raise it in the block."""
        if not isinstance(self.dispatch.failure, KeyboardInterrupt):
            self.dispatch.failure = error
        self.cancel()
        if self._body is not None:
            self._body.cancel(reason="trio_pool: a worker was interrupted")

    # ------------------------------------------------------------------
    # The control path.

    @enable_ki_protection
    async def run(self, body: trio.CancelScope) -> None:
        """Keep the wanted workers and the timer until the pool stops."""
        self._body = body
        self.crew = crew()
        self._share_turn()
        dispatch = self.dispatch
        try:
            with self._life:
                async with trio.open_nursery() as nursery:
                    if self.config.limiter is not None:
                        nursery.start_soon(dispatch.starts.fetch_tokens)
                    # A block that was cancelled at its door has ended us already.
                    for _ in range(0 if dispatch.stopping else dispatch.wanted):
                        self._hire(nursery)
                    if not dispatch.workers:
                        self._enter()
                    try:
                        while dispatch.workers or not self._retired():
                            await self._next_message(nursery)
                    finally:
                        await self._end_leftovers()
                    nursery.cancel_scope.cancel(reason="trio_pool: all workers left")
        except BaseException as error:
            # Only a fault of the supervisor, or of a backoff it calls.
            self._give_up("its supervisor failed", _bare(error))
        finally:
            self.cancel()
            await self._end_leftovers()
            dispatch.starts.release_spares()
            self.workers_stopped()
            self.finished.set()

    async def _end_leftovers(self) -> None:
        """Answer those that waited as the pool stopped, others taking turns."""
        dispatch = self.dispatch
        try:
            while dispatch.end_more():
                await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            # Nothing takes turns any more where the whole run goes down.
            while dispatch.end_more():
                pass
            self._call_off_body()

    def workers_stopped(self) -> None:
        """Close the books on workers that went down with the nursery."""
        dispatch = self.dispatch
        dispatch.stopped_at = dispatch.stamp()
        if self._is_open:
            self._tell_pool("on_pool_stop")
        dispatch.idle.clear()
        dispatch.resting.clear()
        for worker in dispatch.workers.values():
            worker.state = WorkerState.STOPPED

    def _tell_pool(self, hook: str) -> None:
        hooks = self.dispatch.hooks
        if hooks.listening(hook):
            kind: Any = hook.removeprefix("on_")
            hooks.call(hook, PoolChanged(kind, self.config.name, self.dispatch.clock()))

    def _enter(self) -> None:
        if self.dispatch.stopping:
            # A setup that was shielded outlasted the opening of the pool.
            return
        self._is_open = True
        self._tell_pool("on_pool_start")
        self.opened.set()
        if self.config.scale is not None:
            self._plan_scaling(self.config.scale.interval)

    def _plan_scaling(self, interval: float) -> None:
        dispatch = self.dispatch
        dispatch.timer.at(dispatch.clock() + interval, self._scale)

    def _scale(self) -> None:
        """Look whether another number of workers would do better."""
        dispatch = self.dispatch
        assert self._scaler is not None
        idle = len(dispatch.idle) + len(dispatch.resting)
        waiting = dispatch.line.ready + dispatch.room.ready
        if dispatch.line.sources and not idle:
            waiting += 1
        if dispatch.paused:
            waiting = 0
        size = self._scaler.decide(dispatch.clock(), dispatch.wanted, waiting, idle)
        if size != dispatch.wanted:
            self._spares_busy = size < dispatch.wanted
            self._want(size)
        assert self.config.scale is not None
        self._plan_scaling(self.config.scale.interval)

    def _retired(self) -> bool:
        return self._closing is not None and self._closing.drained

    async def _next_message(self, nursery: trio.Nursery) -> None:
        messages: list[_Gone | None] = []
        dispatch, timer = self.dispatch, self.dispatch.timer
        more = dispatch.end_more()
        deadline = timer.arm()
        if more:
            deadline = -math.inf
        with trio.CancelScope(deadline=deadline) as timer.sleeper:
            messages.append(await self._hear.receive())
        # All at once, as what follows may look through all workers.
        with suppress(trio.WouldBlock):
            while messages:
                messages.append(self._hear.receive_nowait())
        for message in messages:
            if message is not None:
                self._replace(message, nursery)
        if messages and self._is_open and not dispatch.stopping:
            self._adjust(nursery)
        dispatch.nesting.end_deadlock()
        timer.ring(dispatch.clock())
        for worker in self._due:
            # It may have been let go while it waited.
            if dispatch.workers.get(worker.id) is worker:
                worker.restarts += 1
                self.restarts += 1
                self._tell_worker("on_worker_restart", worker, None)
                self._start(worker, nursery)
        self._due.clear()

    def _hire(self, nursery: trio.Nursery) -> None:
        # The lowest free number, so that ids stay below the largest size.
        worker_id = heappop(self._free) if self._free else self._slots
        self._slots = max(self._slots, worker_id + 1)
        worker = self.dispatch.workers[worker_id] = Worker(self, worker_id)
        self._start(worker, nursery)

    def _start(self, worker: Worker, nursery: trio.Nursery) -> None:
        worker.state = WorkerState.STARTING
        nursery.start_soon(worker.run, name=f"{self.config.name} worker {worker.id}")

    def _replace(self, gone: _Gone, nursery: trio.Nursery) -> None:
        """Decide what follows the end of a worker."""
        worker = gone.worker
        stopping = self.dispatch.stopping
        if not self._is_open:
            # Opening fails by the first setup that fails.
            if self.open_error is None:
                self.open_error = gone.error or RuntimeError(
                    f"worker {worker.id} of pool {self.config.name!r} ended while "
                    "the others were being set up"
                )
                self.cancel()
                self.opened.set()
            return
        recycled = worker.leaving and not worker.retiring
        worker.leaving = worker.retiring
        if gone.error is not None and not stopping:
            self._spend(worker, gone.error)
        elif recycled and not stopping and not self._retired():
            self._start(worker, nursery)
            return
        if worker.retiring or gone.error is None or stopping:
            self._fire(worker)

    def _forget_alarms(self, worker: Worker) -> None:
        for alarm in worker.alarms:
            self.dispatch.timer.take_back(alarm)

    def _fire(self, worker: Worker) -> None:
        self._forget_alarms(worker)
        self.dispatch.quick += worker.quick
        self.dispatch.quick_time += worker.quick_time
        del self.dispatch.workers[worker.id]
        self._leavers.pop(worker, None)
        heappush(self._free, worker.id)

    def _spend(self, worker: Worker, error: BaseException) -> None:
        """Count a crash; set the time of the restart, or break the pool."""
        restart = self.config.restart
        now = self.dispatch.clock()
        crashes = worker.crashes
        if crashes is None:
            crashes = worker.crashes = deque()
        crashes.append(now)
        while crashes[0] <= now - restart.within:
            crashes.popleft()
        if len(crashes) > restart.limit:
            self._give_up(
                f"worker {worker.id} crashed {len(crashes)} times within "
                f"{restart.within} s",
                error,
            )
            return
        worker.state = WorkerState.RESTARTING
        delay = 0.0
        if len(crashes) > 1:
            delay = max(_LEAST_BACKOFF, restart.backoff(len(crashes) - 2))
        self._plan(worker, now + delay, self._due.append)

    def _give_up(self, reason: str, cause: BaseException) -> None:
        if self.dispatch.failure is None:
            failure = PoolBroken(self.config.name, reason)
            failure.__cause__ = cause
            self.dispatch.failure = failure
        self.cancel()
        self._call_off_body()

    def _call_off_body(self) -> None:
        """Cancel the block of a broken pool, after all who wait in it have heard."""
        broken = isinstance(self.dispatch.failure, PoolBroken)
        if broken and self._body is not None and not self.dispatch.has_leftovers():
            self._body.cancel(reason="trio_pool: the pool is broken")

    def _adjust(self, nursery: trio.Nursery) -> None:
        """Hire or retire until as many stay as are wanted."""
        workers, leavers = self.dispatch.workers, self._leavers
        target = 0 if self._retired() else self.dispatch.wanted
        # Those that were to leave after their job can as well stay; and nobody
        # comes before another has gone, as both would run jobs meanwhile.
        if len(workers) - len(leavers) < target:
            for worker in reversed(tuple(leavers)):
                if len(workers) - len(leavers) < target and worker.stay():
                    del leavers[worker]
        for _ in range(target - len(workers)):
            self._hire(nursery)
        surplus = len(workers) - len(leavers) - target
        if surplus > 0:
            staying = [w for w in workers.values() if w not in leavers]
            for worker in self._dispensable(staying)[:surplus]:
                if (
                    self._spares_busy
                    and worker.state is WorkerState.BUSY
                    and not self._retired()
                ):
                    # It was idle when the scaler looked.
                    self._set_wanted(self.dispatch.wanted + 1)
                else:
                    self._retire(worker)
        self._spares_busy = False
        self._share_turn()
        self._staff()

    def _share_turn(self) -> None:
        active = max(1, self.dispatch.wanted)
        self.dispatch.slice = max(_LEAST_SLICE, min(_SLICE, _TURN / active))

    def _dispensable(self, staying: list[Worker]) -> list[Worker]:
        """Sort by who can best be spared."""
        # Those that serve nobody go first, of idle ones who has been so for
        # longest; of equals, the youngest slot.
        order = {
            WorkerState.RESTARTING: 0,
            WorkerState.STARTING: 1,
            WorkerState.IDLE: 2,
        }
        dispatch = self.dispatch
        idle = (*dispatch.idle, *dispatch.resting) if self._scaler else ()
        place = {worker: number for number, worker in enumerate(idle)}

        def rank(worker: Worker) -> tuple[int, int, int]:
            state = order.get(worker.state, 3) if worker.lease is None else 3
            return state, place.get(worker, 0), -worker.id

        return sorted(staying, key=rank)

    def _retire(self, worker: Worker) -> None:
        if worker.state is WorkerState.RESTARTING:
            self._fire(worker)
            return
        self.dispatch.change += 1
        self._leavers[worker] = None
        worker.retire()
        self._nudge_idle(worker)

    # ------------------------------------------------------------------
    # What the handle asks for.

    async def resize(self, size: int) -> None:
        """Want another number of workers, and wait until it is so."""
        dispatch = self.dispatch
        dispatch.check_thread()
        if dispatch.closed:
            raise dispatch.refusal()
        await trio.lowlevel.checkpoint_if_cancelled()
        if size < dispatch.wanted:
            task = trio.lowlevel.current_task()
            dispatch.nesting.check(task, None, "resize() to fewer workers")
        self._want(size)
        # Before the wait, as another may want another size between what is seen
        # after it and the caller's next step.
        await trio.lowlevel.cancel_shielded_checkpoint()
        # A hook that has heard of the size may have closed the pool.
        while not self._is_staffed() and not dispatch.closed:
            await self._staffed.park()
        if dispatch.closed:
            raise dispatch.refusal()

    @enable_ki_protection
    def _want(self, size: int) -> None:
        self._set_wanted(size)
        if self.dispatch.listeners:
            # More may wait than before, and those that could not wait know not.
            self.dispatch.hear_end()
        self._tell.send_nowait(None)

    def _set_wanted(self, size: int) -> None:
        dispatch = self.dispatch
        old, dispatch.wanted = dispatch.wanted, size
        if old != size and dispatch.hooks.listening("on_resize"):
            name, now = self.config.name, dispatch.clock()
            event = PoolResized("resize", name, now, old, size)
            dispatch.hooks.call("on_resize", event)

    def _is_staffed(self) -> bool:
        return len(self.dispatch.workers) == self._started == self.dispatch.wanted

    def _staff(self) -> None:
        if self._staffed and self._is_staffed():
            self._staffed.unpark_all()

    async def join(self) -> None:
        """Wait until every accepted job has ended."""
        dispatch = self.dispatch
        dispatch.check_thread()
        dispatch.nesting.check(trio.lowlevel.current_task(), None, "join()")
        if dispatch.is_drained():
            await trio.lowlevel.checkpoint()
        while not dispatch.is_drained():
            await dispatch.park_until_drained()
        if isinstance(dispatch.failure, PoolBroken):
            raise dispatch.broken(None)

    @enable_ki_protection
    def close(self) -> Closing:
        """Take no more jobs; the first call decides from when fates are counted."""
        dispatch = self.dispatch
        if self._closing is None:
            self._closing = Closing(self.statistics)
            dispatch.closed = True
            for lease in tuple(dispatch.leases):
                lease.stop(dispatch.refusal())
            if not dispatch.stopping:
                dispatch.refuse_waiting()
                dispatch.resume()
                if not dispatch.wanted and self.config.scale is None:
                    dispatch.end_waiting()
                if dispatch.has_leftovers():
                    self._tell.send_nowait(None)
            self._staffed.unpark_all()
            dispatch.starts.waiters.unpark_all()
        return self._closing

    def let_go(self) -> None:
        """Have the workers leave, as every job has ended."""
        assert self._closing is not None
        self._closing.drained = True
        # Those left are waiting for their readers or their source.
        self.dispatch.stop_sources()
        self._tell.send_nowait(None)

    @enable_ki_protection
    def cancel(self) -> None:
        """Stop now: end what waits, cancel what runs, take no more."""
        self.close()
        dispatch = self.dispatch
        if dispatch.stopping:
            return
        dispatch.stopping = True
        dispatch.end_waiting()
        self._life.cancel(reason=f"trio_pool: pool {self.config.name!r} stops")
        dispatch.drained.unpark_all()

    async def shut_down(self, grace: float) -> ShutdownReport:
        """Close, wait for accepted jobs within ``grace``, cancel the rest."""
        dispatch = self.dispatch
        dispatch.nesting.check(trio.lowlevel.current_task(), None, "shutdown()")
        closing = self.close()
        deadline = trio.current_time() + grace
        with trio.move_on_at(deadline):
            # As in a worker, so that Ctrl-C always leaves the block.
            while True:
                if dispatch.stopping or dispatch.is_drained():
                    break
                await dispatch.park_until_drained()
            if not dispatch.stopping:
                self.let_go()
            await self.finished.wait()
        if not self.finished.is_set():
            self.cancel()
            while dispatch.has_leftovers():
                await trio.lowlevel.checkpoint()
            with trio.move_on_after(_UNWINDING):
                await self.finished.wait()
        return closing.report()

    # ------------------------------------------------------------------
    # What can be read at any time, from any thread.

    def statistics(self) -> PoolStatistics:
        """Count everything."""
        return count(self.dispatch, self._started, self.restarts)

    def state(self) -> PoolState:
        """Say where in its life the pool is."""
        dispatch = self.dispatch
        if isinstance(dispatch.failure, PoolBroken):
            return PoolState.BROKEN
        if dispatch.stopped_at is not None:
            return PoolState.CLOSED
        if dispatch.closed:
            return PoolState.CLOSING
        return PoolState.PAUSED if dispatch.paused else PoolState.OPEN

    def jobs_running(self) -> tuple[CurrentJob, ...]:
        """Describe the jobs that workers have."""
        jobs = [worker.job for worker in self.dispatch.workers.values()]
        return tuple(describe(job) for job in jobs if job is not None)

    def snapshots(self) -> tuple[WorkerSnapshot, ...]:
        """Picture every worker."""
        dispatch = self.dispatch
        workers = tuple(dispatch.workers.values())
        return tuple(picture(worker, dispatch.stamp) for worker in workers)


def _blame(trouble: BaseException | None, stopping: bool) -> BaseException | None:
    """Name the error that a worker's end is to be blamed on, if it is one."""
    if trouble is None:
        return None
    if isinstance(trouble, BaseExceptionGroup):
        _, rest = trouble.split(trio.Cancelled)
        return rest if rest is not None or stopping else trouble
    if isinstance(trouble, trio.Cancelled) and stopping:
        return None
    return trouble


def _is_echo(error: BaseException) -> bool:
    """Say whether an error is only the crash as the worker's cleanup saw it."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_echo(leaf) for leaf in error.exceptions)
    return isinstance(error, (WorkerCrashed, trio.Cancelled))


def _interrupt_in(error: BaseException | None) -> BaseException | None:
    if isinstance(error, KeyboardInterrupt):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = error.subgroup(KeyboardInterrupt)
        if found is not None:
            return _bare(found)
    return None


def _bare(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
