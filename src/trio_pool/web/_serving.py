"""Serves an ASGI app with Hypercorn until told to stop, whatever its readers do."""

import logging
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.typing import AppWrapper
from hypercorn.utils import LifespanTimeoutError, wrap_app

from ._app import DashboardApp
from ._connections import Connections
from ._crew import Started
from ._cutoff import cut_off_around, cut_off_below
from ._feed import Feed

_GRACE = 3.0
"""Seconds that other requests than streams get to end, and another app to stop."""
_PROMPT = 0.25
"""Seconds in which what was told to end has ended, if it ever will."""
_BESIDE_STREAMS = 100
"""Connections that there may be besides the streams, unless an app has its own."""

log = logging.getLogger("trio_pool.web")


def _configure() -> Config:
    config = Config()
    config.errorlog = log
    config.include_server_header = False
    config.shutdown_timeout = _GRACE
    return config


async def serve(
    app: DashboardApp, listener: socket.socket, feed: Feed, status: Started
) -> None:
    """Serve until the feed is stopped; streams then end at once.

    Cancellation ends all of it.
    """
    over = trio.Event()
    task = trio.lowlevel.current_task()
    async with trio.open_nursery() as nursery:
        watching = trio.CancelScope(shield=True)
        nursery.start_soon(_cut_off_at_last, task, feed, over, watching)
        try:
            await _serve(app, listener, feed, status)
        finally:
            over.set()
            watching.cancel()


async def _serve(
    app: DashboardApp, listener: socket.socket, feed: Feed, status: Started
) -> None:
    config, state = _configure(), dict[str, Any]()
    wrapped = wrap_app(app, config.wsgi_max_body_size, "asgi")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    limit = None if app.has_other else _BESIDE_STREAMS + feed.limit
    async with _living(wrapped, config, state):
        connections = Connections(wrapped, config, state, limit)
        if app.failed:
            # Its error is about to cancel this.
            await trio.sleep_forever()
        await _accept(connections, listener, feed, status)


async def _accept(
    connections: Connections, listener: socket.socket, feed: Feed, status: Started
) -> None:
    listening = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    async with trio.open_nursery() as answering:
        async with trio.open_nursery() as accepting:
            accepting.start_soon(_listen, connections, listening, answering)
            status.started()
            await feed.stopping.wait()
            accepting.cancel_scope.cancel()
        await connections.stop()
        answering.cancel_scope.deadline = trio.current_time() + _GRACE


async def _listen(
    connections: Connections, listening: trio.SocketListener, answering: trio.Nursery
) -> None:
    handler = connections.answer
    await trio.serve_listeners(handler, [listening], handler_nursery=answering)


@asynccontextmanager
async def _living(
    app: AppWrapper, config: Config, state: dict[str, Any]
) -> AsyncGenerator[None, None]:
    """Start the app and stop it around a block; one that stops too late is logged."""
    lifespan = Lifespan(app, config, state)
    async with trio.open_nursery() as nursery:
        await nursery.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        yield
        try:
            await lifespan.wait_for_shutdown()
        except LifespanTimeoutError:
            log.warning("app= has not stopped within %s seconds", _GRACE)
        nursery.cancel_scope.cancel()


async def _cut_off_at_last(
    server: trio.lowlevel.Task,
    feed: Feed,
    over: trio.Event,
    watching: trio.CancelScope,
) -> None:
    with watching:
        await feed.stopping.wait()
        await _wait(over, _PROMPT)
        for reader in list(feed.readers):
            await cut_off_around(reader.task)
        await _wait(over, _GRACE)
        await cut_off_below(server)


async def _wait(event: trio.Event, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await event.wait()
