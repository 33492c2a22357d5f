"""Serves an ASGI app with Hypercorn until told to stop, whatever its readers do."""

import logging
import socket
from typing import final

import hypercorn.trio
import trio
from hypercorn.config import Config, Sockets

from ._app import DashboardApp
from ._crew import Started
from ._cutoff import cut_off_around, cut_off_below
from ._feed import Feed

_GRACE = 3.0
"""Seconds that other requests than streams get to end."""
_PROMPT = 0.25
"""Seconds in which what was told to end has ended, if it ever will."""

log = logging.getLogger("trio_pool.web")


@final
class _Config(Config):
    """Has Hypercorn listen at a socket that is open already."""

    errorlog = log
    include_server_header = False
    graceful_timeout = _GRACE

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener

    def create_sockets(self) -> Sockets:
        return Sockets([], [self._listener], [])


@final
class _Started:
    """Hears from Hypercorn that it serves, which it says of an app that failed too."""

    def __init__(self, app: DashboardApp, status: Started) -> None:
        self._app = app
        self._status = status

    def started(self, value: object = None) -> None:
        if not self._app.failed:
            self._status.started()


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
            await hypercorn.trio.serve(
                app,  # type: ignore[arg-type]  # that of starlette is as good
                _Config(listener),
                shutdown_trigger=feed.stopping.wait,
                task_status=_Started(app, status),
            )
        finally:
            over.set()
            watching.cancel()


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
