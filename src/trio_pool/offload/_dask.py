"""Workers that are actors of Dask: on a cluster of the pool's own, or on another."""

from __future__ import annotations

import platform
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, final, overload

import trio

from .._checks import check_seconds, refuse
from .._events import In, Out
from . import _shim
from ._bridge import wait_future
from ._dask_actor import LEAVING, Actor, Loop, Lost, deadline, packed_with
from ._dask_others import open_others
from ._dask_own import open_own
from ._errors import EngineError
from ._remote import (
    PAYLOAD,
    AnyHandler,
    Handler,
    OpenWorker,
    Payloads,
    Remote,
    Workers,
    check_flag,
    check_work,
    lose,
    open_setup,
    pack_work,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine
    from concurrent.futures import Future
    from contextlib import AbstractAsyncContextManager

    from ._dask_actor import Place
    from ._dask_others import Others
    from ._dask_own import Own
    from ._shim import Report

State = TypeVar("State")


@overload
def on_dask(
    fn: Callable[[In], Out],
    *,
    address: str | None = None,
    setup: Callable[[], object] | None = None,
    connect_timeout: float = 10.0,
    kill_on_cancel: bool = False,
    warn_above: int = PAYLOAD,
) -> OpenWorker[In, Out]: ...


@overload
def on_dask(
    fn: Callable[[State, In], Out],
    *,
    address: str | None = None,
    setup: Callable[[], State],
    connect_timeout: float = 10.0,
    kill_on_cancel: bool = False,
    warn_above: int = PAYLOAD,
) -> OpenWorker[In, Out]: ...


def on_dask(
    fn: Callable[..., Any],
    *,
    address: str | None = None,
    setup: Callable[[], Any] | None = None,
    connect_timeout: float = 10.0,
    kill_on_cancel: bool = False,
    warn_above: int = PAYLOAD,
) -> Any:
    """Run ``fn(item)`` in an actor of Dask for each worker.

    Without ``address`` the pool has a cluster of its own on this machine: a
    scheduler, and a process for each worker. Jobs are killed with their process
    as those of `in_process` are, and all of it ends with this process.

    With the address of a scheduler each worker has one of that cluster's
    processes to itself, so there must be as many, and of this minor version of
    Python. Where nobody answers, or too few are there, the pool gives up after
    ``connect_timeout`` seconds. A job that is cancelled, or out of time, goes on
    there, and its worker takes no other before it has ended; ``kill_on_cancel``
    kills its process, with all else that runs in it.

    ``setup`` and ``warn_above`` are those of `in_process`. No job is run twice.
    """
    takes_state = check_work(fn, setup)
    if address is not None and not isinstance(address, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(refuse("address", address, "a str or None"))
    check_seconds("connect_timeout", connect_timeout, zero=False, infinite=False)
    check_flag("kill_on_cancel", kill_on_cancel)
    work = pack_work(fn, setup, takes_state)
    opening: Any = open_own
    if address is not None:
        opening = partial(open_others, address, connect_timeout, kill_on_cancel)
    return Workers(partial(_open_shared, opening, work, Payloads(warn_above)))


@asynccontextmanager
async def _open_shared(
    opening: Callable[[Loop], AbstractAsyncContextManager[Own | Others]],
    work: bytes,
    payloads: Payloads,
    _: int,
) -> AsyncGenerator[OpenWorker[Any, Any], None]:
    loop = Loop()
    try:
        async with opening(loop) as cluster:
            yield partial(_open_worker, cluster, work, payloads)
    finally:
        with trio.move_on_after(LEAVING, shield=True):
            await loop.stop()


@asynccontextmanager
async def _open_worker(
    cluster: Own | Others, work: bytes, payloads: Payloads
) -> AsyncGenerator[AnyHandler, None]:
    async with cluster.place() as place:
        engine = _OnDask(cluster.loop, place)
        try:
            await engine.start(work, cluster.timeout)
            yield Handler(Remote(engine, payloads))
        finally:
            engine.close()


@final
class _OnDask:
    """One worker's actor."""

    def __init__(self, loop: Loop, place: Place) -> None:
        self.spent = False
        self._loop = loop
        self._place = place
        self._actor = Actor(place.client, place.address)
        self._calls = 0
        self._left: Future[Any] | None = None

    async def start(self, work: bytes, timeout: float) -> None:
        """Make the actor, and have it set up."""
        host = _shim.Host(work, self._actor.key)
        # Dask looks the type of an actor up, and there is no other everywhere.
        packed = packed_with(SimpleNamespace(run=host.run, set_up=host.set_up), _shim)
        at = f"the Dask worker at {self._place.address}"
        try:
            with deadline(timeout, f"{at} has not made an actor"):
                version = await self._loop.run(self._actor.connect())
                check_version(version, at)
                await self._loop.run(self._actor.create(packed))
            _, _, trouble = await self._wait(self._actor.execute("set_up"))
        except (Lost, OSError) as error:
            text = await self._place.obituary("was set up", error)
            raise EngineError(text) from error
        open_setup(trouble)

    async def call(self, items: list[bytes]) -> Report:
        """Have the actor run items; cancelled, be over with that first."""
        self._calls += 1
        try:
            if not self._place.is_alive():
                raise Lost("its process is gone", started=False)
            return await self._wait(self._actor.run(self._calls, items))  # type: ignore[no-any-return]
        except Lost as error:
            when = "ran a job" if error.started else "was idle"
            text = await self._place.obituary(when, error)
            lose(text, started=error.started, cause=error)

    async def _wait(self, call: Coroutine[Any, Any, Any]) -> Any:
        future = self._loop.submit(call)
        try:
            return await wait_future(future, abandon_on_cancel=True, may_cancel=False)
        except BaseException:
            if not future.done():
                self.spent = True
                if not await self._place.end(future):
                    self._left = future
            raise

    def close(self) -> None:
        """Let go of the actor; of one that was left running, when it is through."""
        if self._left is None:
            self._loop.call_soon(self._actor.close)
        else:
            # Called in the loop's thread.
            self._left.add_done_callback(lambda _: self._actor.close())


def check_version(version: str, at: str) -> None:
    ours = platform.python_version()
    if version.split(".")[:2] != ours.split(".")[:2]:
        raise EngineError(
            f"{at} runs Python {version}, and this is {ours}: "
            "functions can only be sent to the same minor version"
        )
