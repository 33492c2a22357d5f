"""Ray in this process, which its pools share, and what is to be known of it."""

from __future__ import annotations

import logging
import sys
from concurrent.futures import Future
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, final

import ray
import trio
from ray.exceptions import RayError

from .._checks import refuse
from .._events import log
from ._bridge import wait_future
from ._errors import EngineError
from ._ray_guard import dismiss, marked

if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds that Ray gets to say what it has, and to leave this process.
_ASKING = 5.0
_LEAVING = 15.0


@final
class _Ray:
    """Ray as it was initialised here, once for all pools of this process."""

    def __init__(self, address: str | None, size: int, before: _Ray | None) -> None:
        self.address = address
        self.users = 0
        self.ready: Future[None] = Future()
        self.gone: Future[None] = Future()
        self.may_leave = Event()
        self._before = before
        # The kernel kills what Ray has started as soon as the thread has ended
        # that did: no thread that somebody else looks after will do.
        Thread(target=self._live, args=(size,), daemon=True, name="trio_pool").start()

    def _live(self, size: int) -> None:
        if self._before is not None:
            self._before.gone.result()
            self._before = None
        # Whatever it says reaches the caller as an error.
        how: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is None:
            how |= {"num_cpus": max(size, 1), "include_dashboard": False}
        guard = None
        try:
            if self.address is None:
                with marked() as guard:
                    ray.init(address="local", **how)
            else:
                ray.init(address=self.address, **how)
        except BaseException as error:
            self.ready.set_exception(error)
        else:
            self.ready.set_result(None)
            self.may_leave.wait()
            with suppress(Exception):
                ray.shutdown()
        dismiss(guard)
        self.gone.set_result(None)


# There is one Ray in a process, whose pools may belong to several runs of trio.
lock = Lock()
"""Held where something of Ray is changed that all threads share."""
_here: list[_Ray] = []


def _share(address: str | None, size: int) -> _Ray | None:
    """Take part in the Ray of this process; None if that is the program's own."""
    with lock:
        last = _here[-1] if _here else None
        is_gone = last is None or last.gone.done()
        if is_gone and ray.is_initialized():
            return None
        if last is None or is_gone or not last.users:
            last = _Ray(address, size, last)
            _here[:] = [last]
        elif last.address != address:
            expected = f"{last.address!r}, as another pool uses that"
            raise ValueError(refuse("address", address, expected))
        last.users += 1
        return last


def _give_up(shared: _Ray) -> bool:
    """Take part no longer; say whether nobody does."""
    with lock:
        shared.users -= 1
        if not shared.users:
            shared.may_leave.set()
        return not shared.users


@final
class Place:
    """Where the actors of a pool are."""

    def __init__(self, address: str | None, timeout: float) -> None:
        self.timeout = timeout
        self.slots = 0
        """Workers that are open, or about to be."""
        self.cpus = 1
        """What Ray counts for each."""
        self.path: list[str] = []
        """Where else an actor finds modules."""
        self._address = address
        self._shared: _Ray | None = None

    async def enter(self, size: int) -> None:
        """Have Ray in this process."""
        address = self._address
        where = "Ray" if address is None else f"the Ray of address={address!r}"
        try:
            with trio.fail_after(self.timeout):
                if address not in (None, "auto") and not ray.is_initialized():
                    # Of an address that nobody has, Ray says so after minutes.
                    await _knock(address)
                self._shared = shared = _share(address, size)
                if shared is None:
                    return
                await wait_future(
                    shared.ready, may_cancel=False, abandon_on_cancel=True
                )
        except trio.TooSlowError:
            text = f"{where} did not answer within connect_timeout={self.timeout!r}"
            raise EngineError(f"{text} seconds") from None
        except (OSError, RuntimeError, RayError) as error:
            reason = error.__cause__ or error
            raise EngineError(f"{where} cannot be used: {reason}") from error
        if address is None:
            # All of it is ours: several pools may share its CPUs, or one grow.
            self.cpus = 0
            self.path = list(sys.path)

    async def leave(self) -> None:
        """Let go of Ray; stop it if nobody else uses it."""
        shared = self._shared
        if shared is None:
            return
        is_last = _give_up(shared)
        if not is_last or not (shared.address is None or shared.ready.done()):
            return
        with trio.move_on_after(_LEAVING, shield=True) as scope:
            await wait_future(shared.gone, may_cancel=False, abandon_on_cancel=True)
        if scope.cancelled_caught:
            log.warning("Ray did not stop within %s seconds", _LEAVING)

    async def no_room(self) -> Exception:
        """Say why an actor did not begin in time."""
        found: dict[str, float] = {}
        with trio.move_on_after(_ASKING):
            found = await call_ray(ray.cluster_resources)
        has = int(found.get("CPU", 0))
        if found and has < self.slots * self.cpus:
            expected = f"at most {has}, the number of the cluster's CPUs"
            return ValueError(refuse("size", self.slots, expected))
        return EngineError(
            f"no actor began within connect_timeout={self.timeout!r} seconds; "
            f"of the cluster's {has} CPUs none may be free"
        )


async def _knock(address: str) -> None:
    host, _, port = address.rpartition(":")
    stream = await trio.open_tcp_stream(host.strip("[]"), int(port))
    await stream.aclose()


async def call_ray(fn: Callable[..., Any], *args: Any) -> Any:
    """Call what may have to wait for Ray; cancelled, leave it behind."""
    # No other threads of the program's can keep it waiting.
    limiter = trio.CapacityLimiter(1)
    return await trio.to_thread.run_sync(
        fn, *args, abandon_on_cancel=True, limiter=limiter
    )
