"""The dashboard around a block: opened, served, and gone when the block is left."""

import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from socket import socket
from typing import Any, final

import attrs
import trio
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from .._checks import check_count, is_async, refuse
from .._nursery import whole_block
from ..prometheus import PoolCollector
from ._address import Address, listen_at, parse_address, url_of
from ._app import DashboardApp
from ._crew import Crew, Started, open_crew
from ._feed import Feed
from ._guard import Guard, check_hosts, make_guard
from ._heartbeat import Heartbeat
from ._incidents import KINDS
from ._liveness import LivenessServer, Pulse
from ._monitor import Monitor
from ._render import render_fragments
from ._serving import serve
from ._watch import AnyPool

_EVENTS = 4096
"""Events of a pool that may wait for us while the loop is held up."""


@final
@attrs.frozen(eq=False)
class Dashboard:
    """An open dashboard; see `serve_dashboard`."""

    urls: tuple[str, ...]
    """Where it is served, without a slash at the end; empty if it is not."""
    liveness: str | None
    """Where the thread answers that was asked for by ``liveness=``."""
    app: ASGIApp = attrs.field(repr=False)
    """The ASGI app, to be mounted into another."""
    _monitor: Monitor = attrs.field(repr=False, alias="monitor")

    def mark(self, text: str) -> None:
        """Remember this moment, such as "deploy 1.2", in charts and list.

        The text is cut to 200 characters. Legal from any thread.
        """
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(refuse("text", text, "a str"))
        if not text.strip():
            raise ValueError(refuse("text", text, "a str that is not empty"))
        self._monitor.mark(text, time.time())


@attrs.frozen(kw_only=True)
class _Plan:
    """What a dashboard was asked to be; checked."""

    pools: tuple[AnyPool, ...]
    bind: Address | None
    liveness: Address | None
    guard: Guard
    liveness_guard: Guard
    describe: Callable[[Any], str] | None
    max_streams: int
    other: ASGIApp | None


def serve_dashboard(
    pools: AnyPool | Iterable[AnyPool],
    *,
    bind: str = "127.0.0.1:8765",
    token: str | None = None,
    describe: Callable[[Any], str] | None = None,
    hosts: Iterable[str] = (),
    max_streams: int = 16,
    liveness: str | None = None,
    app: ASGIApp | None = None,
) -> AbstractAsyncContextManager[Dashboard]:
    """Serve a page about pools, and their health and metrics, around a block.

    To be nested inside the pools' blocks. ``/`` is the page; ``/health`` says that
    the loop turns, ``/ready`` that all pools are open and have workers, also while
    they refuse jobs; ``/metrics`` is for Prometheus, ``/statistics.json`` for
    programs. Another ASGI ``app`` gets the paths that are none of these, asked for
    by the same names of hosts.

    Who reaches ``bind`` may look. Only who knows the ``token`` may pause, resume
    and resize; without one nobody. Inputs of jobs and messages of errors are not
    shown, unless ``describe(job_input)`` puts inputs into words. Only requests for
    loopback names, the host in ``bind`` and ``hosts`` are answered: name there
    what the page is called elsewhere. ``max_streams`` browsers look at a time.
    ``liveness``, another address, is answered by a thread, also while the loop is
    blocked: 503 then, with the line that blocks it.

    Leaving the block ends the page's streams at once, gives other requests 3
    seconds, and leaves nothing behind. An error of the dashboard itself cancels
    the block and leaves it bare, as an error of the block does.

    Raises:
      TypeError, ValueError: a bad argument, before anything has run.
      OSError: nobody can listen at ``bind`` or ``liveness``; the block has not
        begun.
    """
    address = parse_address("bind", bind)
    return _open(
        _make_plan(pools, address, token, describe, hosts, max_streams, liveness, app)
    )


def open_dashboard(
    pools: AnyPool | Iterable[AnyPool],
    *,
    token: str | None = None,
    describe: Callable[[Any], str] | None = None,
    hosts: Iterable[str] = (),
    max_streams: int = 16,
    liveness: str | None = None,
) -> AbstractAsyncContextManager[Dashboard]:
    """Open a dashboard around a block without serving it; mount its ``app``.

    As `serve_dashboard` but for that. Its page works below any path that ends
    with a slash. Name in ``hosts`` what your server is called.

    Raises:
      TypeError, ValueError: a bad argument, before anything has run.
      OSError: nobody can listen at ``liveness``.
    """
    return _open(
        _make_plan(pools, None, token, describe, hosts, max_streams, liveness, None)
    )


def _make_plan(
    pools: AnyPool | Iterable[AnyPool],
    bind: Address | None,
    token: str | None,
    describe: Callable[[Any], str] | None,
    hosts: Iterable[str],
    max_streams: int,
    liveness: str | None,
    other: ASGIApp | None,
) -> _Plan:
    check_count("max_streams", max_streams, zero=False)
    _check_callables(describe, other)
    named = check_hosts(hosts)
    live = None if liveness is None else parse_address("liveness", liveness)
    return _Plan(
        pools=_check_pools(pools),
        bind=bind,
        liveness=live,
        guard=make_guard(None if bind is None else bind.host, named, token),
        liveness_guard=make_guard(None if live is None else live.host, named, None),
        describe=describe,
        max_streams=max_streams,
        other=other,
    )


def _check_callables(describe: object, other: object) -> None:
    if describe is not None and (not callable(describe) or is_async(describe)):
        expected = "a sync function (job input) -> str, or None"
        raise TypeError(refuse("describe", describe, expected))
    if other is not None and not callable(other):
        raise TypeError(refuse("app", other, "an ASGI app, or None"))


def _check_pools(pools: Any) -> tuple[AnyPool, ...]:
    expected = "a pool, or several of different names"
    if _is_pool(pools):
        return (pools,)
    if not isinstance(pools, Iterable):
        raise TypeError(refuse("pools", pools, expected))
    found = tuple(pools)
    for pool in found:
        if not _is_pool(pool):
            raise TypeError(refuse("pools", pool, expected))
    names = [pool.name for pool in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(refuse("pools", names, expected))
    return found


def _is_pool(pool: object) -> bool:
    return callable(getattr(pool, "statistics", None)) and hasattr(pool, "running")


@whole_block
async def _open(plan: _Plan) -> AsyncGenerator[Dashboard, None]:
    heartbeat = Heartbeat()
    with _listening(plan.bind) as listener, _live(plan, heartbeat) as liveness:
        async with open_crew() as crew:
            monitor = Monitor(
                plan.pools,
                trio.current_time(),
                time.time(),
                controls=plan.guard.token is not None,
                describe=plan.describe,
            )
            feed = Feed(
                lambda: render_fragments(monitor.picture(time.time())),
                plan.max_streams,
            )
            app = DashboardApp(
                monitor, feed, plan.guard, _registry(plan.pools), time.time, plan.other
            )
            served = trio.Event()
            try:
                await _start(crew, plan.pools, monitor, feed, heartbeat)
                urls: tuple[str, ...] = ()
                if listener is not None:
                    await crew.start(_serve, app, listener, feed, served)
                    urls = (url_of(listener),)
                yield Dashboard(urls, liveness, app, monitor)
                feed.stop()
                if listener is not None:
                    await served.wait()
            finally:
                feed.stop()
            crew.cancel()


async def _start(
    crew: Crew,
    pools: Sequence[AnyPool],
    monitor: Monitor,
    feed: Feed,
    heartbeat: Heartbeat,
) -> None:
    def second(now: float, wall: float, lag: float) -> None:
        monitor.sample(now, wall, lag)
        feed.tick()

    for pool in pools:
        await crew.start(_listen, pool, monitor)
    crew.start_soon(heartbeat.run, second)


async def _listen(pool: AnyPool, monitor: Monitor, status: Started) -> None:
    async with pool.events(buffer=_EVENTS, kinds=KINDS) as events:
        status.started()
        async for event in events:
            monitor.hear(event, time.time())


async def _serve(
    app: DashboardApp,
    listener: socket,
    feed: Feed,
    served: trio.Event,
    status: Started,
) -> None:
    try:
        await serve(app, listener, feed, status)
    finally:
        served.set()


def _registry(pools: Iterable[AnyPool]) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(PoolCollector(*pools))
    return registry


@contextmanager
def _listening(address: Address | None) -> Generator[socket | None, None, None]:
    if address is None:
        yield None
        return
    with listen_at(address) as listener:
        yield listener


@contextmanager
def _live(plan: _Plan, heartbeat: Heartbeat) -> Generator[str | None, None, None]:
    with _listening(plan.liveness) as listener:
        if listener is None:
            yield None
            return
        url = url_of(listener)
        pulse = Pulse(lambda: heartbeat.last)
        server = LivenessServer(listener, pulse, plan.liveness_guard)
        try:
            yield url
        finally:
            server.close()
