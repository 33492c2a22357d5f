"""Workers that are actors of Ray, on this machine or on a cluster."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, final, overload
from uuid import uuid4

import ray
import trio
from ray import cloudpickle
from ray.exceptions import RayError
from trio.lowlevel import enable_ki_protection

from .._checks import check_seconds, refuse
from .._errors import WorkerGone
from .._events import In, Out, log
from . import _shim
from ._bridge import wait_future
from ._errors import EngineError
from ._ray_place import Place, call_ray, lock
from ._remote import (
    PAYLOAD,
    AnyHandler,
    Handler,
    OpenWorker,
    Payloads,
    Remote,
    Workers,
    by_value,
    check_work,
    lose,
    open_setup,
    pack_work,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from ._shim import Report

State = TypeVar("State")

# Bytes up to which Ray sends a call along with what it is for. With more it asks
# its store for room, and waits for the answer.
_INLINE = 50_000
# Seconds without a job after which an actor is asked whether it is still there.
_IDLE = 0.01
# Seconds that Ray gets to end an actor, and then its process is killed from here.
_KILLING = 1.0
_DYING = 5.0


@overload
def on_ray(
    fn: Callable[[In], Out],
    *,
    address: str | None = None,
    setup: Callable[[], object] | None = None,
    connect_timeout: float = 30.0,
    warn_above: int = PAYLOAD,
) -> OpenWorker[In, Out]: ...


@overload
def on_ray(
    fn: Callable[[State, In], Out],
    *,
    setup: Callable[[], State],
    address: str | None = None,
    connect_timeout: float = 30.0,
    warn_above: int = PAYLOAD,
) -> OpenWorker[In, Out]: ...


def on_ray(
    fn: Callable[..., Any],
    *,
    address: str | None = None,
    setup: Callable[[], Any] | None = None,
    connect_timeout: float = 30.0,
    warn_above: int = PAYLOAD,
) -> Any:
    """Run ``fn(item)`` in an actor of Ray for each worker.

    ``address`` is that of a cluster, ``"host:port"`` or ``"auto"``, where each
    worker takes one CPU; without one, Ray is started here, and stopped with the
    last pool that uses it. Ray that the program has initialised itself is used
    as it is. ``connect_timeout`` is in seconds, for the cluster to answer, and
    for each actor to begin. The rest is as in `in_process`.

    A job that is cancelled, or out of time, is killed with its actor, and the
    worker gets a fresh one. An actor that dies under a job is `WorkerCrashed`.
    No job is run twice.
    """
    takes_state = check_work(fn, setup)
    _check_address(address)
    check_seconds("connect_timeout", connect_timeout, zero=False)
    work = pack_work(fn, setup, takes_state)
    payloads = Payloads(warn_above)
    return Workers(partial(_open_shared, address, connect_timeout, work, payloads))


def _check_address(address: object) -> None:
    expected = 'None, "auto", or "host:port"'
    if address is None or address == "auto":
        return
    if not isinstance(address, str):
        raise TypeError(refuse("address", address, expected))
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(refuse("address", address, expected))


@asynccontextmanager
async def _open_shared(
    address: str | None, timeout: float, work: bytes, payloads: Payloads, size: int
) -> AsyncGenerator[OpenWorker[Any, Any], None]:
    place = Place(address, timeout)
    try:
        await place.enter(size)
        yield partial(_open_worker, place, work, payloads)
    finally:
        await place.leave()


@asynccontextmanager
async def _open_worker(
    place: Place, work: bytes, payloads: Payloads
) -> AsyncGenerator[AnyHandler, None]:
    engine = _Actor(place)
    place.slots += 1
    try:
        await engine.start(work)
        yield Handler(Remote(engine, payloads))
    finally:
        place.slots -= 1
        await engine.end()


def _machine() -> str:
    """Name what gives process ids their meaning, where that can be known."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class _Hosting(_shim.Host):
    """The host of a worker's jobs, in the process of an actor."""

    def begin(self, path: list[str]) -> tuple[int, str]:
        """Find modules there too; return which process this is, and where."""
        sys.path += [folder for folder in path if folder not in sys.path]
        return os.getpid(), _machine()

    def run_packed(self, call: bytes) -> bytes:
        """Run a call in one piece: Ray takes its time over each argument."""
        return pickle.dumps(self.run(*pickle.loads(call)))


def _create(cpus: int, work: bytes, incarnation: str) -> Any:
    """Have Ray begin an actor, somewhere that need not have this package."""
    if not ray.is_initialized():
        # It would start another one.
        raise EngineError("the program has shut Ray down under its pool")
    kind: Any = ray.remote(_Hosting)
    # One thread at a time, as each takes back what it has asked for.
    with lock, by_value(cloudpickle, _shim, sys.modules[__name__]):
        options = {"num_cpus": cpus, "max_restarts": 0, "max_task_retries": 0}
        return kind.options(**options).remote(work, incarnation)


@final
class _Actor:
    """The one actor of a worker."""

    def __init__(self, place: Place) -> None:
        self.spent = False
        self._place = place
        self._incarnation = uuid4().hex
        self._calls = 0
        self._used_at = 0.0
        self._has_begun = False
        self._actor: Any = None
        self._running: Future[bytes] | None = None
        # Its process, if that is on this machine.
        self._pidfd: int | None = None
        self._poll: Any = None

    async def start(self, work: bytes) -> None:
        """Have an actor begin, and set up."""
        place = self._place
        try:
            with trio.move_on_after(place.timeout) as scope:
                self._actor = await call_ray(
                    _create, place.cpus, work, self._incarnation
                )
                self._find(*await self._ask(self._actor.begin, place.path))
                self._has_begun = True
            if scope.cancelled_caught:
                raise await place.no_room()
            _, _, trouble = await self._ask(self._actor.set_up)
        except RayError as error:
            raise EngineError(f"the actor ended as it was set up: {error}") from error
        open_setup(trouble)
        self._used_at = trio.current_time()

    def _find(self, pid: int, machine: str) -> None:
        if sys.platform == "linux" and machine and machine == _machine():
            with suppress(OSError):
                self._pidfd = os.pidfd_open(pid)
                self._poll = select.poll()
                self._poll.register(self._pidfd, select.POLLIN)

    async def _ask(self, method: Any, *args: Any) -> Any:
        future: Future[Any] = method.remote(*args).future()
        return await wait_future(future, may_cancel=False, abandon_on_cancel=True)

    async def _ping(self) -> None:
        # A host refuses what is not meant for it, which is an answer too.
        await self._ask(self._actor.run, "", 0, [])

    @enable_ki_protection
    async def call(self, items: list[bytes]) -> Report:
        """Run a call in the actor; cancelled, kill it first."""
        self._running = None
        try:
            await self._check()
            report = await self._run(items)
        except WorkerGone:
            raise
        except Exception as error:
            # Of the jobs' own nothing comes this way.
            text = f"the actor was lost while it ran a job: {type(error).__name__}"
            lose(text, started=True, cause=error)
        except BaseException:
            if self._running is None or not self._running.done():
                self.spent = True
                await self._kill()
            raise
        if report is None:
            lose("the actor is not the one that was meant", started=False)
        return report

    async def _run(self, items: list[bytes]) -> Report | None:
        self._calls += 1
        call = pickle.dumps((self._incarnation, self._calls, items))
        send = partial(self._actor.run_packed.remote, call)
        ref = send() if len(call) < _INLINE else await call_ray(send)
        future: Future[bytes] = ref.future()
        self._running = future
        report = await wait_future(future, may_cancel=False, abandon_on_cancel=True)
        self._used_at = trio.current_time()
        return pickle.loads(report)  # type: ignore[no-any-return]

    def _has_ended(self) -> bool:
        return self._poll is not None and bool(self._poll.poll(0))

    async def _check(self) -> None:
        """See to it that a job is not sent to an actor that has died while idle."""
        trouble: Exception | None = None
        try:
            # A call without Ray would start another one, here and now.
            is_gone = not ray.is_initialized() or self._has_ended()
            if not is_gone and trio.current_time() - self._used_at > _IDLE:
                with trio.fail_after(self._place.timeout):
                    await self._ping()
        except Exception as error:
            is_gone, trouble = True, error
        if is_gone:
            text = "the actor had ended while it was idle"
            lose(text, started=False, cause=trouble)

    async def end(self) -> None:
        """Have the actor gone."""
        actor = self._actor
        try:
            if actor is not None and not self.spent:
                await self._kill()
        finally:
            if self._pidfd is not None:
                os.close(self._pidfd)
            self._actor = self._pidfd = self._poll = None

    async def _kill(self) -> None:
        """Kill the actor, and wait until its process is gone."""
        with trio.move_on_after(_DYING, shield=True) as scope:
            with trio.move_on_after(_KILLING):
                if ray.is_initialized():
                    with suppress(Exception):
                        await call_ray(ray.kill, self._actor)
                if self._has_begun:
                    await self._await_death()
                return
            # Ray has not got round to it.
            if sys.platform == "linux" and self._pidfd is not None:
                with suppress(OSError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            await self._await_death()
        if scope.cancelled_caught:
            log.warning("an actor was told to end %s seconds ago, and has not", _DYING)

    async def _await_death(self) -> None:
        if self._pidfd is not None:
            await trio.lowlevel.wait_readable(self._pidfd)
            return
        # Of what is elsewhere Ray hears that it is dead just before it is gone.
        with suppress(Exception):
            while ray.is_initialized():
                await self._ping()
