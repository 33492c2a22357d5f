"""Sends what changes on the page as server-sent events."""

import json
from collections.abc import Mapping
from typing import Any, final

import trio
from starlette.types import Message, Receive, Scope, Send

from ._feed import Feed, Reader

_RETRY = b"retry: 1000\n\n"
_PING = b": ping\n\n"
_PING_AFTER = 15.0
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    # Proxies that buffer would show nothing for minutes.
    (b"x-accel-buffering", b"no"),
]


@final
class Stream:
    """Answers one request with events until somebody ends it."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send as ASGI has it."""
        with self._feed.reading() as reader:
            await send(
                {"type": "http.response.start", "status": 200, "headers": _HEADERS}
            )
            if scope["method"] != "HEAD":
                async with trio.open_nursery() as nursery:
                    scope_of_all = nursery.cancel_scope
                    nursery.start_soon(_end_when_gone, receive, scope_of_all)
                    nursery.start_soon(_end_when, self._feed.stopping, scope_of_all)
                    await _send_changes(reader, send)
            await send(_body(b"", more=False))


async def _send_changes(reader: Reader, send: Send) -> None:
    await send(_body(_RETRY))
    sent = trio.current_time()
    while True:
        changes = reader.changes()
        silent = trio.current_time() - sent >= _PING_AFTER
        if changes or silent:
            await send(_body(event_of(changes) if changes else _PING))
            sent = trio.current_time()
        await reader.wait()


async def _end_when_gone(receive: Receive, streams: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    streams.cancel()


async def _end_when(event: trio.Event, streams: trio.CancelScope) -> None:
    await event.wait()
    streams.cancel()


def event_of(changes: Mapping[str, str]) -> bytes:
    """Write an event; in JSON there are no line ends, which would end it."""
    return b"data: " + json.dumps(changes).encode() + b"\n\n"


def _body(data: bytes, *, more: bool = True) -> Message:
    message: dict[str, Any] = {"type": "http.response.body", "body": data}
    return {**message, "more_body": more}
