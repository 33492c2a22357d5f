"""The ASGI app: which path is answered by what."""

import json
import math
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any, TypeAlias, final

import attrs
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.convertors import Convertor, register_url_convertor
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ._controls import ACTIONS, Action, control
from ._feed import Feed
from ._guard import Guard, Refusal
from ._lifespan import Life, live
from ._monitor import Monitor
from ._picture import Picture
from ._render import render_page
from ._stream import Stream

_LONGEST_BODY = 1024
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}

Check: TypeAlias = Callable[[Mapping[str, str]], Refusal | None]
Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]


@final
class _PoolName(Convertor[str]):
    """Takes any name, of several lines too, as a part of a path."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("pool_name", _PoolName())


@final
class DashboardApp:
    """Answers the paths of the dashboard; hands the others to another app."""

    def __init__(
        self,
        monitor: Monitor,
        feed: Feed,
        guard: Guard,
        registry: CollectorRegistry,
        clock: Callable[[], float],
        other: ASGIApp | None,
    ) -> None:
        self._guard = guard
        self._other = other
        self._life = None if other is None else Life(other)
        pages = _Pages(monitor, feed, guard, registry, clock)
        self._router = Router(pages.routes(), redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as ASGI has it."""
        if scope["type"] == "lifespan":
            if self._life is None:
                await live(receive, send)
            else:
                await self._life(scope, receive, send)
            return
        refusal = self._guard.check_host(Headers(scope=scope))
        if scope["type"] == "websocket" and (refusal or self._other is None):
            await send({"type": "websocket.close", "code": 1000})
        elif refusal is not None:
            await _refuse(refusal)(scope, receive, _add_headers(send))
        elif self._other is not None and not self._has(scope):
            await self._other(scope, receive, send)
        else:
            await self._router(scope, receive, _add_headers(send))

    @property
    def has_other(self) -> bool:
        """Whether another app gets what is none of the dashboard's."""
        return self._other is not None

    @property
    def failed(self) -> bool:
        """Whether the other app has said that it could not start."""
        return self._life is not None and self._life.failed

    def _has(self, scope: Scope) -> bool:
        return any(
            route.matches(scope)[0] is not Match.NONE for route in self._router.routes
        )


@final
@attrs.frozen
class _Pages:
    """What is answered."""

    monitor: Monitor
    feed: Feed
    guard: Guard
    registry: CollectorRegistry
    clock: Callable[[], float]

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
            Route("/statistics.json", self.statistics),
            Route("/", self.page),
            Route("/page.css", _asset("page.css", "text/css")),
            Route("/page.js", _asset("page.js", "text/javascript")),
            Route("/events", _Streams(self.feed, self.guard), methods=["GET"]),
            *(
                Route(
                    f"/pools/{{name:pool_name}}/{action}",
                    self.control(action),
                    methods=["POST"],
                )
                for action in ACTIONS
            ),
        ]

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(self, _: Request) -> Response:
        reasons = self.monitor.reasons_not_ready()
        if reasons:
            return JSONResponse({"status": "not ready", "reasons": reasons}, 503)
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self.registry), headers={"content-type": content_type})

    async def statistics(self, request: Request) -> Response:
        whole = request.query_params.get("history") != "0"
        picture = self.monitor.picture(self.clock(), step=1 if whole else None)
        return Response(to_json(picture), media_type="application/json")

    async def page(self, _: Request) -> Response:
        picture = self.monitor.picture(self.clock())
        return HTMLResponse(render_page(picture, picture.controls))

    def control(self, action: Action) -> Endpoint:
        async def act(request: Request) -> Response:
            return await self._control(action, request)

        return act

    async def _control(self, action: Action, request: Request) -> Response:
        headers = request.headers
        refusal = self.guard.check_origin(headers) or self.guard.check_token(headers)
        if refusal is not None:
            return _refuse(refusal)
        name = request.path_params["name"]
        watch = self.monitor.watches.get(name)
        if watch is None:
            return _refuse(Refusal(404, f"there is no pool {name!r}"))
        body = await _read(request.receive)
        if body is None:
            return _refuse(Refusal(413, f"more than {_LONGEST_BODY} bytes"))
        answer = await control(watch.pool, action, body)
        return JSONResponse(answer.facts, answer.status)


@final
@attrs.frozen
class _Streams:
    """Begins a stream of events, if there is room for one."""

    feed: Feed
    guard: Guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self.guard.check_origin(Headers(scope=scope))
        if refusal is not None:
            await _refuse(refusal)(scope, receive, send)
        elif self.feed.full or self.feed.stopping.is_set():
            response = _refuse(Refusal(503, "there are as many streams as may be"))
            response.headers["Retry-After"] = "5"
            await response(scope, receive, send)
        else:
            await Stream(self.feed)(scope, receive, send)


def _asset(name: str, kind: str) -> Endpoint:
    text = files("trio_pool.web").joinpath(name).read_text(encoding="utf-8")

    async def asset(_: Request) -> Response:
        return Response(text, media_type=kind)

    return asset


def _refuse(refusal: Refusal) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
    return JSONResponse({"error": refusal.reason}, refusal.status, headers)


async def _read(receive: Receive) -> bytes | None:
    """Read a body; None if it is too long, or broken off."""
    body = b""
    while len(body) <= _LONGEST_BODY:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body if len(body) <= _LONGEST_BODY else None
    return None


def _add_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
        await send(message)

    return send_with_headers


def to_json(picture: Picture) -> str:
    """Write a picture as JSON; what is infinite is null."""
    return json.dumps(picture, default=_as_dict, allow_nan=False)


def _as_dict(value: Any) -> dict[str, Any]:
    return {
        field.name: None if found in (math.inf, -math.inf) else found
        for field in attrs.fields(type(value))
        for found in (getattr(value, field.name),)
    }
