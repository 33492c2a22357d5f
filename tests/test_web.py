"""A dashboard as a browser, a probe and Prometheus meet it: a real server."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from typing import Any, cast
from urllib.parse import quote

import httpx
import pytest
import trio
import trio.testing

from trio_pool import PoolBroken, PoolClosed, Restart, open_pool

pytest.importorskip("starlette")
pytest.importorskip("hypercorn")
pytest.importorskip("prometheus_client")

from hypercorn.config import Config
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from trio_pool.web import (
    Dashboard,
    drain_on_signal,
    open_dashboard,
    serve_dashboard,
)
from trio_pool.web._connections import Connections
from trio_pool.web._feed import Feed
from trio_pool.web._stream import Stream

TOKEN = "a-token-for-tests"
KNOWN = {"Authorization": f"Bearer {TOKEN}"}
ANYWHERE = "127.0.0.1:0"


async def echo(job: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return job


async def sleep(_: Any) -> None:
    await trio.sleep_forever()


def client(dashboard: Dashboard, **headers: str) -> httpx.AsyncClient:
    where = dashboard.urls[0]
    # Certificates are no part of this, and take long to load.
    return httpx.AsyncClient(base_url=where, headers=headers, timeout=60, verify=False)


async def get(dashboard: Dashboard, path: str, **headers: str) -> httpx.Response:
    async with client(dashboard, **headers) as http:
        return await http.get(path)


async def until(true: Callable[[], object]) -> None:
    """Wait until something is true, within reason."""
    with trio.fail_after(60):
        while not true():  # noqa: ASYNC110
            await trio.sleep(0.01)


class Events:
    """Reads a stream of events, as little of HTTP as is needed."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._unread = b""

    async def line(self) -> str:
        with trio.fail_after(60):
            while b"\n" not in self._unread:
                data = await self._stream.receive_some()
                if not data:
                    raise EOFError
                self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode().rstrip("\r")

    async def head(self) -> list[str]:
        lines = [await self.line()]
        while lines[-1]:
            lines.append(await self.line())
        return lines[:-1]

    async def next(self) -> dict[str, str]:
        while not (line := await self.line()).startswith("data: "):
            pass
        found: dict[str, str] = json.loads(line.removeprefix("data: "))
        return found


@asynccontextmanager
async def streaming(dashboard: Dashboard) -> AsyncGenerator[Events, None]:
    """Open a stream of events."""
    host, port = dashboard.urls[0].removeprefix("http://").split(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(b"GET /events HTTP/1.0\r\nHost: localhost\r\n\r\n")
        yield Events(stream)


def tasks() -> int:
    """Count the tasks of this run."""
    root = trio.lowlevel.current_root_task()
    assert root is not None
    count, left = 0, [root]
    while left:
        count += 1
        for nursery in left.pop().child_nurseries:
            left.extend(nursery.child_tasks)
    return count


# What it answers.


async def test_every_page_is_there_and_safe() -> None:
    async with open_pool(2, echo, name="pages") as pool:
        async with serve_dashboard(pool, bind=ANYWHERE) as dashboard:
            await pool.process(1)
            for path, kind in [
                ("/", "text/html; charset=utf-8"),
                ("/page.css", "text/css; charset=utf-8"),
                ("/page.js", "text/javascript; charset=utf-8"),
                ("/health", "application/json"),
                ("/ready", "application/json"),
                ("/statistics.json", "application/json"),
                ("/metrics", "text/plain; version=0.0.4; charset=utf-8"),
            ]:
                answer = await get(dashboard, path)
                assert answer.status_code == 200, path
                assert answer.headers["content-type"] == kind
                assert answer.text
                check_headers(answer)
            for path in ("/nothing", "/events/", "/page.css/..%2f_app.py"):
                answer = await get(dashboard, path)
                assert answer.status_code == 404
                check_headers(answer)


def check_headers(answer: httpx.Response) -> None:
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers


async def test_statistics_are_those_of_this_moment() -> None:
    async with open_pool(2, echo, name="one") as one, open_pool(1, name="two") as two:
        async with serve_dashboard([one, two], bind=ANYWHERE) as dashboard:
            await one.map(range(5))
            answer = await get(dashboard, "/statistics.json")
            pools = answer.json()["pools"]
            assert [pool["name"] for pool in pools] == ["one", "two"]
            assert pools[0]["done"] == 5
            assert len(pools[0]["history"]["busy"]) >= 1
            answer = await get(dashboard, "/statistics.json?history=0")
            assert answer.json()["pools"][0]["history"] is None


async def test_metrics_are_negotiated_and_not_redirected() -> None:
    async with open_pool(2, echo, name="measured") as pool:
        async with serve_dashboard(pool, bind=ANYWHERE) as dashboard:
            await pool.map(range(5))
            asked = "application/openmetrics-text; version=1.0.0"
            answer = await get(dashboard, "/metrics", Accept=asked)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(asked)
            families = {family.name for family in parse_openmetrics(answer.text)}
            assert "trio_pool_jobs_accepted" in families
            assert 'pool="measured"' in (await get(dashboard, "/metrics")).text


async def test_ready_says_why_not() -> None:
    async with open_pool(1, echo, name="p") as pool:
        async with serve_dashboard(pool, bind=ANYWHERE) as dashboard:

            async def status() -> tuple[int, Any]:
                answer = await get(dashboard, "/ready")
                assert (await get(dashboard, "/health")).status_code == 200
                return answer.status_code, answer.json().get("reasons")

            assert await status() == (200, None)
            pool.pause()
            assert await status() == (503, ["p: paused: nothing waits"])
            pool.resume()
            assert await status() == (200, None)
            await pool.shutdown()
            assert await status() == (503, ["p: closed: 0 jobs done, 0 failed"])


async def test_a_pool_without_a_worker_is_not_ready() -> None:
    ready = trio.Event()
    ready.set()
    crash = trio.Event()

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Any, None]:
        await ready.wait()
        yield fall

    async def fall(_: object) -> None:
        await crash.wait()
        raise OSError("fallen")

    restart = Restart(limit=5)
    async with open_pool(
        1, worker=worker, restart=restart, crash_on=OSError, unobserved="ignore"
    ) as pool:
        async with serve_dashboard(pool, bind=ANYWHERE) as dashboard:
            ready = trio.Event()
            await pool.submit(1)
            crash.set()
            await until(lambda: pool.statistics().workers == 0)
            answer = await get(dashboard, "/ready")
            assert answer.status_code == 503
            assert "worker 0 is restarting" in answer.json()["reasons"][0]
            ready.set()
            await until(lambda: pool.statistics().workers == 1)
            assert (await get(dashboard, "/ready")).status_code == 200


async def test_failures_restarts_and_marks_are_told() -> None:
    async def fail(job: str) -> None:
        raise ValueError(f"bad {job}")

    async with open_pool(2, fail, name="p", unobserved="ignore") as pool:
        async with serve_dashboard(pool, bind=ANYWHERE, describe=str) as dashboard:
            with pytest.raises(ValueError, match="bad job"):
                await pool.process("job")
            await pool.resize(3)
            dashboard.mark("deploy 1.2")
            picture: dict[str, Any] = {}

            async def look() -> None:
                while len(picture.get("marks", ())) < 2:
                    answer = await get(dashboard, "/statistics.json?history=0")
                    picture.update(answer.json()["pools"][0])

            with trio.fail_after(60):
                await look()
            assert {mark["text"] for mark in picture["marks"]} == {
                "deploy 1.2",
                "size 2 \u2192 3",
            }
            assert picture["errors"][0]["text"] == "bad job"
            assert picture["errors"][0]["place"].startswith(f"{__file__}:")


@pytest.mark.parametrize("text", ["", " \n", None, 5])
async def test_a_mark_without_a_text_is_refused(text: Any) -> None:
    async with open_pool(1) as pool:
        async with open_dashboard(pool) as dashboard:
            with pytest.raises((TypeError, ValueError), match="text must be a str"):
                dashboard.mark(text)


# Streams.


async def test_a_stream_sends_all_and_then_what_changes() -> None:
    async with open_pool(2, echo) as pool:
        async with serve_dashboard(pool, bind=ANYWHERE) as dashboard:
            async with streaming(dashboard) as events:
                whole = await events.next()
                changes = await events.next()
            assert set(changes) < set(whole)
            assert all(whole[name] != html for name, html in changes.items())


async def test_the_head_of_a_stream_is_for_proxies_too() -> None:
    async with open_pool(1) as pool:
        async with serve_dashboard(pool, bind=ANYWHERE) as dashboard:
            async with streaming(dashboard) as events:
                head = await events.head()
                assert head[0].split()[1] == "200"
                assert "content-type: text/event-stream; charset=utf-8" in head
                assert "x-accel-buffering: no" in head
                assert "cache-control: no-store" in head
                assert await events.line() == "retry: 1000"
            async with client(dashboard) as http:
                answer = await http.head("/events")
            assert answer.status_code == 200
            assert answer.text == ""
            check_headers(answer)


async def test_there_are_no_more_streams_than_may_be() -> None:
    async with open_pool(1) as pool:
        async with serve_dashboard(pool, bind=ANYWHERE, max_streams=2) as dashboard:
            async with streaming(dashboard) as one, streaming(dashboard) as two:
                await one.head()
                await two.head()
                answer = await get(dashboard, "/events")
                assert answer.status_code == 503
                assert answer.headers["retry-after"] == "5"
            # Who has gone makes room.
            with trio.fail_after(60):
                status = ""
                while status != "200":
                    async with streaming(dashboard) as events:
                        status = (await events.head())[0].split()[1]


async def test_streams_come_and_go_without_a_trace() -> None:
    async with open_pool(1) as pool:
        async with serve_dashboard(pool, bind=ANYWHERE) as dashboard:
            # The server may still be starting tasks.
            await trio.testing.wait_all_tasks_blocked(0.005)
            before = tasks()
            for _ in range(3):
                async with streaming(dashboard) as one, streaming(dashboard) as two:
                    await one.next()
                    await two.next()
                    assert tasks() > before
            await until(lambda: tasks() <= before)


async def test_leaving_ends_streams_at_once_and_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Other requests would have an hour.
    monkeypatch.setattr("trio_pool.web._serving._GRACE", 3600.0)
    async with open_pool(1) as pool:
        async with AsyncExitStack() as stack:
            async with serve_dashboard(pool, bind=ANYWHERE) as dashboard:
                events = await stack.enter_async_context(streaming(dashboard))
                await events.next()
                leaving = trio.current_time()
            assert trio.current_time() - leaving < 60
            with pytest.raises(EOFError):
                while True:
                    await events.line()


async def test_a_silent_stream_is_kept_alive(
    autojump_clock: trio.testing.MockClock,
) -> None:
    sent: list[bytes] = []
    feed = Feed(lambda: {"a": "b"}, 1)

    async def send(message: Any) -> None:
        await trio.lowlevel.checkpoint()
        sent.append(message.get("body", b""))

    async def receive() -> Any:
        await trio.sleep(40.0)
        return {"type": "http.disconnect"}

    async def beat() -> None:
        while True:
            await trio.sleep(1.0)
            feed.tick()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(beat)
        await Stream(feed)({"method": "GET"}, receive, send)
        nursery.cancel_scope.cancel()
    assert sent == [
        *(b"", b"retry: 1000\n\n", b'data: {"a": "b"}\n\n'),
        *(b": ping\n\n", b": ping\n\n", b""),
    ]
    assert not feed.readers


async def test_a_slow_reader_gets_the_newest_and_not_what_was_between(
    autojump_clock: trio.testing.MockClock,
) -> None:
    sent: list[str] = []
    number = itertools.count()
    feed = Feed(lambda: {"n": str(next(number)), "same": "x"}, 1)

    async def send(message: Any) -> None:
        await trio.sleep(10.5)
        sent.append(message.get("body", b"").decode())

    async def receive() -> Any:
        await trio.sleep(50.0)
        return {"type": "http.disconnect"}

    async def beat() -> None:
        while True:
            await trio.sleep(1.0)
            feed.tick()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(beat)
        await Stream(feed)({"method": "GET"}, receive, send)
        nursery.cancel_scope.cancel()
    events = [json.loads(text[6:]) for text in sent if text.startswith("data")]
    assert [list(event) for event in events] == [["n", "same"], ["n"], ["n"]]
    numbers = [int(event["n"]) for event in events]
    assert all(later - earlier > 5 for earlier, later in itertools.pairwise(numbers))


async def stuck_reader(dashboard: Dashboard) -> socket.socket:
    """Ask for a stream, and never read of it."""
    host, port = dashboard.urls[0].removeprefix("http://").split(":")
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await trio.to_thread.run_sync(reader.connect, (host, int(port)))
    reader.send(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return reader


def is_stuck_sending() -> bool:
    """Say whether some task of this run waits for somebody to read."""
    root = trio.lowlevel.current_root_task()
    assert root is not None
    left = [root]
    while left:
        task = left.pop()
        names = {frame.f_code.co_name for frame, _ in task.iter_await_frames()}
        if {"protocol_send", "wait_writable"} <= names:
            return True
        for nursery in task.child_nurseries:
            left.extend(nursery.child_tasks)
    return False


@pytest.mark.parametrize("how", ["leave", "cancel"])
async def test_a_reader_that_reads_nothing_holds_nobody(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other requests would have an hour.
    monkeypatch.setattr("trio_pool.web._serving._GRACE", 3600.0)
    # Names of 2 MB, so that every buffer on the way is soon full.
    async with open_pool(1, name="x" * 2_000_000) as pool:
        before = tasks()
        with ExitStack() as stack, trio.CancelScope() as scope:
            async with serve_dashboard(pool, bind=ANYWHERE) as dashboard:
                # It is still there when the block has been left.
                stack.enter_context(await stuck_reader(dashboard))
                await until(is_stuck_sending)
                assert (await get(dashboard, "/health")).status_code == 200
                leaving = trio.current_time()
                if how == "cancel":
                    scope.cancel()
            assert trio.current_time() - leaving < 60
        assert tasks() <= before


# Who means harm, or knows no better.

ASK = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
UPGRADE = ASK + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
HANDSHAKE_HEAD = (
    ASK + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
HANDSHAKE = HANDSHAKE_HEAD + b"\r\n"


def http2(
    *changes: tuple[bytes, bytes], only: bool = False, more: bytes = b""
) -> bytes:
    """Say by HTTP/2 what changes a plain request."""
    h2 = pytest.importorskip("h2.connection")
    config = pytest.importorskip("h2.config").H2Configuration(
        client_side=True,
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
    )
    connection = h2.H2Connection(config)
    connection.initiate_connection()
    plain = {
        b":method": b"GET",
        b":path": b"/health",
        b":scheme": b"http",
        b":authority": b"localhost",
    }
    headers = dict(changes) if only else plain | dict(changes)
    connection.send_headers(1, list(headers.items()), end_stream=True)
    said: bytes = connection.data_to_send()
    return said + more


CONNECT = [(b":method", b"CONNECT"), (b":authority", b"localhost")]


def hostile() -> dict[str, bytes]:
    return {
        "settings that are not base 64": UPGRADE + b"HTTP2-Settings: a\r\n\r\n",
        "settings that are too short": UPGRADE + b"HTTP2-Settings: AAAA\r\n\r\n",
        "settings of no value": UPGRADE + b"HTTP2-Settings: AAL_____\r\n\r\n",
        "settings": UPGRADE + b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        "a path of HTTP/2 that is no text": http2((b":path", b"/\xff")),
        "a method of HTTP/2 that is no text": http2((b":method", b"G\xff")),
        "CONNECT of HTTP/2": http2(*CONNECT, only=True),
        "frames of nonsense": http2(more=b"\xff" * 200),
        "a protocol that is no text": HANDSHAKE_HEAD
        + b"Sec-WebSocket-Protocol: \xff\r\n\r\n",
        "a frame at once": HANDSHAKE + b"\x81\x85\x00\x00\x00\x00hello",
        "an end at once": HANDSHAKE + b"\x88\x80\x00\x00\x00\x00",
        "a byte after the handshake": HANDSHAKE + b"\x00",
        "bytes after the handshake": HANDSHAKE + b"\xff\xff\xff",
        "a request after the handshake": ASK + b"\r\n" + HANDSHAKE + ASK + b"\r\n",
        "all bytes": bytes(range(256)) * 10,
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00",
    }


async def say(dashboard: Dashboard, said: bytes, patience: float = 60.0) -> bytes:
    """Say something, and return the first of what comes back before the end."""
    host, port = dashboard.urls[0].removeprefix("http://").split(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(said)
        with trio.move_on_after(patience):
            try:
                return bytes(await stream.receive_some())
            except trio.BrokenResourceError:
                pass
        return b""


async def other_app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await PlainTextResponse("other")(scope, receive, send)


@pytest.mark.parametrize("other", [None, other_app])
async def test_nothing_that_is_sent_ends_the_block(other: Any) -> None:
    async with open_pool(1, echo) as pool:
        async with serve_dashboard(pool, bind=ANYWHERE, app=other) as dashboard:
            for said in hostile().values():
                # Some get no answer, and are not hung up on either.
                await say(dashboard, said, patience=0.2)
                assert (await get(dashboard, "/health")).status_code == 200
            await pool.process(1)


async def test_only_http_1_is_spoken_whatever_is_offered() -> None:
    async with open_pool(1) as pool:
        async with serve_dashboard(pool, bind=ANYWHERE) as dashboard:
            offered = UPGRADE + b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
            assert (await say(dashboard, offered)).startswith(b"HTTP/1.1 200 ")
            assert b" 403 " in await say(dashboard, HANDSHAKE)
            # No frame of settings: an error, or nothing at all.
            assert (await say(dashboard, http2()))[:4] in (b"HTTP", b"")


async def test_a_connection_beyond_what_may_be_is_closed_at_once() -> None:
    async def answer(*_: object) -> None:
        pytest.fail("it was served")

    full = Connections(cast(Any, answer), Config(), {}, limit=0)
    own, other = trio.testing.memory_stream_pair()
    await full.answer(cast(Any, own))
    assert await other.receive_some() == b""


async def test_who_has_gone_makes_room_for_another_connection() -> None:
    async with open_pool(1) as pool:
        async with serve_dashboard(pool, bind=ANYWHERE, max_streams=1) as dashboard:
            host, port = dashboard.urls[0].removeprefix("http://").split(":")
            crowd = [await trio.open_tcp_stream(host, int(port)) for _ in range(101)]
            for stream in crowd:
                await stream.aclose()
            with trio.fail_after(60):
                while True:
                    with suppress(httpx.TransportError):
                        assert (await get(dashboard, "/health")).status_code == 200
                        break


async def test_an_id_of_any_length_ends_neither_block_nor_stream() -> None:
    async with open_pool(1, sleep, unobserved="ignore") as pool:
        async with serve_dashboard(pool, bind=ANYWHERE) as dashboard:
            async with streaming(dashboard) as events:
                await events.next()
                await pool.submit(1, id=10**5000)
                while "a number of 16610 bits" not in (await events.next()).get(
                    "p0-workers", ""
                ):
                    pass
        pool.cancel()


# Who may ask.


async def test_only_known_hosts_are_answered() -> None:
    async with open_pool(1) as pool:
        async with serve_dashboard(
            pool, bind=ANYWHERE, hosts=["pool.example.org"]
        ) as dashboard:
            for path in ("/", "/health", "/events", "/statistics.json", "/nothing"):
                answer = await get(dashboard, path, Host="evil.example")
                assert answer.status_code == 403
                assert "hosts=" in answer.json()["error"]
                check_headers(answer)
            answer = await get(dashboard, "/health", Host="pool.example.org")
            assert answer.status_code == 200


async def test_pages_elsewhere_get_no_stream_and_no_control() -> None:
    elsewhere = {"Origin": "http://evil.example"}
    async with open_pool(1, name="p") as pool:
        async with serve_dashboard(pool, bind=ANYWHERE, token=TOKEN) as dashboard:
            async with client(dashboard) as http:
                for headers in (elsewhere, {"Sec-Fetch-Site": "cross-site"}):
                    answer = await http.get("/events", headers=headers)
                    assert answer.status_code == 403
                    answer = await http.post("/pools/p/pause", headers=headers | KNOWN)
                    assert answer.status_code == 403
                assert pool.state.value == "open"


async def test_controls_need_the_token() -> None:
    async with open_pool(1, name="p") as pool:
        async with serve_dashboard(pool, bind=ANYWHERE, token=TOKEN) as dashboard:
            async with client(dashboard) as http:
                for headers in ({}, {"Authorization": "Bearer wrong"}):
                    answer = await http.post("/pools/p/pause", headers=headers)
                    assert answer.status_code == 401
                    assert answer.headers["www-authenticate"] == "Bearer"
                # Not even which pools there are.
                answer = await http.post("/pools/q/pause")
                assert answer.status_code == 401
            assert (await get(dashboard, "/statistics.json")).json()["controls"]
        async with serve_dashboard(pool, bind=ANYWHERE) as dashboard:
            async with client(dashboard) as http:
                answer = await http.post("/pools/p/pause", headers=KNOWN)
                assert answer.status_code == 403
                assert "token" in answer.json()["error"]
        assert pool.state.value == "open"


async def test_an_operator_pauses_resumes_and_resizes() -> None:
    async with open_pool(1, name="a/b pool") as pool:
        async with serve_dashboard(pool, bind=ANYWHERE, token=TOKEN) as dashboard:
            async with client(dashboard, **KNOWN) as http:
                where = "/pools/a%2Fb%20pool"
                answer = await http.post(f"{where}/pause")
                assert (answer.status_code, pool.state.value) == (200, "paused")
                answer = await http.post(f"{where}/resume")
                assert (answer.status_code, pool.state.value) == (200, "open")
                answer = await http.post(f"{where}/resize", json={"size": 3})
                assert (answer.status_code, pool.size) == (200, 3)
                assert answer.json()["workers_up"] == 3
                assert (await http.get(f"{where}/pause")).status_code == 405
                assert (await http.post("/pools/c/pause")).status_code == 404
                assert (await http.post(f"{where}/cancel")).status_code == 404


@pytest.mark.parametrize("name", ["a?b", "a#b", "a/resume", "two\nlines", "7\n"])
async def test_an_operator_reaches_a_pool_of_any_name(name: str) -> None:
    async with open_pool(1, name=name) as pool:
        async with serve_dashboard(pool, bind=ANYWHERE, token=TOKEN) as dashboard:
            async with client(dashboard, **KNOWN) as http:
                where = f"/pools/{quote(name, safe='')}"
                answer = await http.post(f"{where}/pause")
                assert (answer.status_code, pool.state.value) == (200, "paused")
                answer = await http.post(f"{where}/stop")
                assert (answer.status_code, pool.state.value) == (404, "paused")
                answer = await http.post(f"{where}/resume")
                assert (answer.status_code, pool.state.value) == (200, "open")


async def test_a_bad_size_is_named_and_changes_nothing() -> None:
    async with open_pool(2, name="p") as pool:
        async with serve_dashboard(pool, bind=ANYWHERE, token=TOKEN) as dashboard:
            async with client(dashboard, **KNOWN) as http:
                for body, said in [
                    (b'{"size": -1}', "got -1"),
                    (b'{"size": "x"}', "got 'x'"),
                    (b'{"size": 1000000}', "got 1000000"),
                    (b"", '{"size": 4}'),
                ]:
                    answer = await http.post("/pools/p/resize", content=body)
                    assert answer.status_code == 400
                    assert "size" in answer.json()["error"]
                    assert said in answer.json()["error"]
                answer = await http.post("/pools/p/resize", content=b"x" * 5000)
                assert answer.status_code == 413
            assert pool.size == 2


async def test_a_closed_pool_cannot_be_changed() -> None:
    async with open_pool(1, name="p") as pool:
        await pool.shutdown()
        async with serve_dashboard(pool, bind=ANYWHERE, token=TOKEN) as dashboard:
            async with client(dashboard, **KNOWN) as http:
                for action in ("pause", "resume", "resize"):
                    answer = await http.post(f"/pools/p/{action}", json={"size": 1})
                    assert answer.status_code == 409
                    assert "closed" in answer.json()["error"]
            assert (await get(dashboard, "/")).status_code == 200


async def test_an_answer_does_not_wait_for_the_size() -> None:
    stay = trio.Event()

    async def work(_: object) -> None:
        await stay.wait()

    async with open_pool(2, work, name="p") as pool:
        replies = [await pool.submit(number) for number in range(2)]
        async with serve_dashboard(pool, bind=ANYWHERE, token=TOKEN) as dashboard:
            async with client(dashboard, **KNOWN) as http:
                answer = await http.post("/pools/p/resize", json={"size": 1})
                assert answer.status_code == 202
                assert answer.json() == {"pool": "p", "size": 1, "workers_up": 2}
            stay.set()
            for reply in replies:
                await reply.wait()
            await until(lambda: pool.statistics().workers == 1)


# Beside other servers.


async def test_another_app_gets_all_other_paths_and_its_lifespan() -> None:
    said: list[str] = []

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncGenerator[dict[str, str], None]:
        said.append("up")
        yield {"greeting": "hello"}
        said.append("down")

    async def greet(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.state.greeting)

    own = Starlette(
        routes=[Route("/greet", greet), Route("/health", greet)], lifespan=lifespan
    )
    async with open_pool(1) as pool:
        async with serve_dashboard(pool, bind=ANYWHERE, app=own) as dashboard:
            answer = await get(dashboard, "/greet")
            assert answer.text == "hello"
            assert "content-security-policy" not in answer.headers
            assert (await get(dashboard, "/health")).json() == {"status": "live"}
            assert (await get(dashboard, "/nothing")).status_code == 404
            assert said == ["up"]
        assert said == ["up", "down"]


@pytest.mark.parametrize(
    "how", ["returns", "raises", "starts and returns", "starts and raises"]
)
async def test_an_app_need_not_care_for_start_and_stop(how: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if how.startswith("starts"):
                await receive()
                await send({"type": "lifespan.startup.complete"})
            if how.endswith("raises"):
                raise AssertionError(scope["type"])
            return
        await PlainTextResponse("other")(scope, receive, send)

    async with open_pool(1) as pool:
        async with serve_dashboard(pool, bind=ANYWHERE, app=app) as dashboard:
            assert (await get(dashboard, "/other")).text == "other"
            assert (await get(dashboard, "/health")).status_code == 200


async def test_an_app_that_does_not_stop_is_waited_for_as_long_as_requests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await trio.sleep_forever()

    async with open_pool(1) as pool:
        with trio.fail_after(60):
            async with serve_dashboard(pool, bind=ANYWHERE, app=app):
                pass
    assert "app= has not stopped within 3.0 seconds" in caplog.text


async def test_another_app_is_reached_by_known_hosts_alone() -> None:
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        reached.append(scope["type"])
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            await PlainTextResponse("other")(scope, receive, send)

    async with open_pool(1) as pool:
        async with serve_dashboard(
            pool, bind=ANYWHERE, app=app, hosts=["known.example"]
        ) as dashboard:
            answer = await get(dashboard, "/other", Host="evil.example")
            assert answer.status_code == 403
            head = await say(
                dashboard, HANDSHAKE.replace(b"localhost", b"evil.example")
            )
            assert b" 403 " in head
            assert reached == []
            answer = await get(dashboard, "/other", Host="known.example")
            assert answer.text == "other"
            await say(dashboard, HANDSHAKE)
            assert reached == ["http", "websocket"]


async def test_an_app_that_does_not_start_is_an_error_before_the_block() -> None:
    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncGenerator[None, None]:
        raise OSError("no database")
        yield

    own = Starlette(lifespan=lifespan)
    async with open_pool(1, echo) as pool:
        with pytest.raises(Exception, match="no database") as found:
            async with serve_dashboard(pool, bind=ANYWHERE, app=own):
                pytest.fail("entered")
        assert not isinstance(found.value, BaseExceptionGroup)
        assert await pool.process(1) == 1


async def test_a_dashboard_can_be_mounted_below_a_path() -> None:
    async with open_pool(1, name="p") as pool:
        async with open_dashboard(pool, hosts=["mounted"], token=TOKEN) as dashboard:
            assert dashboard.urls == ()
            app = Starlette(routes=[Mount("/pool", dashboard.app)])
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app=app), base_url="http://mounted"
            ) as http:
                assert (await http.get("/pool/")).status_code == 200
                assert (await http.get("/pool/health")).status_code == 200
                assert (await http.get("/pool/nothing")).status_code == 404
                answer = await http.post("/pool/pools/p/pause", headers=KNOWN)
                assert answer.status_code == 200
                page = (await http.get("/pool/")).text
            assert 'href="/' not in page
            assert 'src="/' not in page


# Its block.


async def test_nothing_is_left_after_the_block() -> None:
    threads = threading.active_count()
    async with open_pool(1) as pool:
        before = tasks()
        async with serve_dashboard(pool, bind=ANYWHERE, liveness=ANYWHERE) as dashboard:
            # The heartbeat and the liveness endpoint.
            assert threading.active_count() == threads + 2
            await get(dashboard, "/")
        assert tasks() == before
        assert threading.active_count() == threads
        where = dashboard.urls[0].removeprefix("http://")
        async with serve_dashboard(pool, bind=where):
            pass


async def test_an_address_in_use_is_a_clear_error_and_harms_nobody() -> None:
    async with open_pool(1, echo) as pool:
        async with serve_dashboard(pool, bind=ANYWHERE) as dashboard:
            where = dashboard.urls[0].removeprefix("http://")
            with pytest.raises(OSError, match=f"bind='{where}': cannot listen there"):
                async with serve_dashboard(pool, bind=where):
                    pytest.fail("entered")
            with pytest.raises(OSError, match=f"liveness='{where}'"):
                async with serve_dashboard(pool, bind=ANYWHERE, liveness=where):
                    pytest.fail("entered")
            assert (await get(dashboard, "/health")).status_code == 200
        assert await pool.process(1) == 1


async def test_an_error_of_the_block_leaves_it_bare() -> None:
    error = ValueError("mine")
    async with open_pool(1, echo) as pool:
        with pytest.raises(ValueError, match="mine") as found:
            async with serve_dashboard(pool, bind=ANYWHERE):
                raise error
        assert found.value is error
        assert error.__context__ is None
        group = ExceptionGroup("mine", [error])
        with pytest.raises(ExceptionGroup) as groups:
            async with serve_dashboard(pool, bind=ANYWHERE):
                raise group
        assert groups.value is group
        assert await pool.process(1) == 1


async def test_a_cancelled_block_is_left_at_once() -> None:
    async with open_pool(1, echo) as pool:
        with trio.move_on_after(0.05) as scope:
            async with serve_dashboard(pool, bind=ANYWHERE) as dashboard:
                async with streaming(dashboard):
                    await trio.sleep_forever()
        assert scope.cancelled_caught
        assert await pool.process(1) == 1
        with trio.CancelScope() as scope:
            scope.cancel()
            async with serve_dashboard(pool, bind=ANYWHERE):
                await trio.lowlevel.checkpoint()
        assert await pool.process(1) == 1


async def test_its_own_failure_leaves_bare_and_the_pool_goes_on() -> None:
    class OwnError(BaseException):
        pass

    def describe(_: object) -> str:
        raise OwnError

    stay = trio.Event()

    async def work(_: object) -> None:
        await stay.wait()

    async with open_pool(1, work) as pool:
        with pytest.raises(OwnError):
            async with (
                serve_dashboard(pool, bind=ANYWHERE, describe=describe) as dashboard,
                streaming(dashboard) as events,
            ):
                await events.next()
                reply = await pool.submit(1)
                await trio.sleep_forever()
        stay.set()
        await reply.wait()


async def test_a_page_that_fails_is_logged_and_the_server_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(_: Request) -> PlainTextResponse:
        raise OSError("of a page")

    own = Starlette(routes=[Route("/fail", fail)])
    async with open_pool(1) as pool:
        async with serve_dashboard(pool, bind=ANYWHERE, app=own) as dashboard:
            with caplog.at_level(logging.ERROR):
                assert (await get(dashboard, "/fail")).status_code == 500
                await until(lambda: "of a page" in caplog.text)
            assert (await get(dashboard, "/health")).status_code == 200


async def test_a_pool_that_broke_is_told_of() -> None:
    async def fall(_: object) -> None:
        raise OSError("fallen")

    async def use(task_status: trio.TaskStatus[Any]) -> None:
        with pytest.raises(PoolBroken):
            async with open_pool(
                *(1, fall),
                crash_on=OSError,
                restart=Restart(limit=1),
                unobserved="ignore",
                name="p",
            ) as pool:
                task_status.started(pool)
                for number in range(3):
                    await pool.submit(number)
                await trio.sleep_forever()

    # In a block of its own, as a broken pool cancels what is inside of its block.
    async with trio.open_nursery() as nursery:
        pool = await nursery.start(use)
        async with serve_dashboard(pool, bind=ANYWHERE) as dashboard:
            await until(lambda: pool.state.value == "broken")
            answer = await get(dashboard, "/ready")
            assert answer.json()["reasons"] == [
                "p: broken: a worker crashed too often, the last time by OSError"
            ]
            picture = await get(dashboard, "/statistics.json")
            assert picture.json()["pools"][0]["light"] == "red"


BAD = [
    ({"bind": "8765"}, ValueError, "bind must be host:port"),
    ({"bind": 8765}, TypeError, "bind must be host:port"),
    ({"liveness": ":1"}, ValueError, "liveness must be host:port"),
    ({"token": "short"}, ValueError, "token must be a str of 16"),
    ({"token": 5}, TypeError, "token must be a str of 16"),
    ({"hosts": "localhost"}, TypeError, "hosts must be a collection"),
    ({"hosts": ["a:1"]}, ValueError, "hosts must be host names"),
    ({"hosts": 5}, TypeError, "hosts must be a collection"),
    ({"max_streams": 0}, ValueError, "max_streams must be an int, 1 or more"),
    ({"max_streams": 1.5}, TypeError, "max_streams must be an int"),
    ({"describe": 5}, TypeError, "describe must be a sync function"),
    ({"describe": echo}, TypeError, "describe must be a sync function"),
    ({"app": 5}, TypeError, "app must be an ASGI app"),
    ({"pools": 5}, TypeError, "pools must be a pool"),
    ({"pools": [5]}, TypeError, "pools must be a pool"),
    ({"pools": []}, ValueError, "pools must be a pool, or several"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD)
async def test_bad_options_are_refused_when_it_is_called(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    async with open_pool(1) as pool:
        with pytest.raises(kind, match=message):
            serve_dashboard(**{"pools": pool, **options})


async def test_pools_of_one_name_are_refused() -> None:
    async with open_pool(1, name="same") as one, open_pool(1, name="same") as two:
        with pytest.raises(ValueError, match="different names, got"):
            serve_dashboard([one, two])
        with pytest.raises(ValueError, match="different names, got"):
            open_dashboard([one, one])


async def test_the_same_pool_may_have_several_dashboards() -> None:
    async with open_pool(1, echo, name="p") as pool:
        async with serve_dashboard(pool, bind=ANYWHERE) as one:
            async with serve_dashboard(pool, bind=ANYWHERE) as two:
                for dashboard in (one, two):
                    assert (await get(dashboard, "/metrics")).status_code == 200


# The end.


async def signal_soon(number: signal.Signals, *pools: Any) -> None:
    """Send a signal when it is waited for; another when the pools are closed."""
    await until(lambda: "open_signal_receiver" in repr(signal.getsignal(number)))
    os.kill(os.getpid(), number)
    if pools:
        await until(lambda: all(pool.closed for pool in pools))
        os.kill(os.getpid(), number)


async def test_a_signal_drains_all_pools_while_probes_are_answered() -> None:
    stay = trio.Event()

    async def work(_: object) -> None:
        await stay.wait()

    async with (
        open_pool(1, work, name="one") as one,
        open_pool(1, work, name="two") as two,
        serve_dashboard([one, two], bind=ANYWHERE) as dashboard,
        trio.open_nursery() as nursery,
    ):
        replies = [await one.submit(1), await one.submit(2), await two.submit(3)]

        async def probe() -> None:
            await until(lambda: one.closed and two.closed)
            answer = await get(dashboard, "/ready")
            assert answer.status_code == 503
            assert answer.json()["reasons"] == [
                "one: draining: 1 job runs, 1 job waits",
                "two: draining: 1 job runs, nothing waits",
            ]
            assert (await get(dashboard, "/health")).status_code == 200
            stay.set()

        nursery.start_soon(probe)
        nursery.start_soon(signal_soon, signal.SIGTERM)
        reports = await drain_on_signal(one, two)
        assert [report.done for report in reports] == [2, 1]
        for reply in replies:
            await reply.wait()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


async def test_grace_bounds_the_draining() -> None:
    async with open_pool(1, sleep, unobserved="ignore") as pool:
        await pool.submit(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(signal_soon, signal.SIGINT)
            [report] = await drain_on_signal(pool, grace=0.05)
        assert (report.done, report.cancelled) == (0, 1)


async def test_a_second_signal_cancels_at_once() -> None:
    async with open_pool(1, sleep, unobserved="ignore") as pool:
        await pool.submit(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(signal_soon, signal.SIGTERM, pool)
            with trio.fail_after(60):
                [report] = await drain_on_signal(pool)
        assert (report.done, report.cancelled) == (0, 1)


async def test_waiting_for_a_signal_can_be_cancelled() -> None:
    async with open_pool(1, echo) as pool:
        with trio.move_on_after(0.01) as scope:
            await drain_on_signal(pool)
        assert scope.cancelled_caught
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert await pool.process(1) == 1


async def test_draining_can_be_cancelled_and_the_jobs_go_on() -> None:
    stay = trio.Event()

    async def work(job: int) -> int:
        await stay.wait()
        return job

    async with open_pool(1, work) as pool:
        reply = await pool.submit(7)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(signal_soon, signal.SIGTERM)
            with trio.CancelScope() as scope:

                async def cancel() -> None:
                    await until(lambda: pool.closed)
                    scope.cancel()

                nursery.start_soon(cancel)
                await drain_on_signal(pool)
        assert scope.cancelled_caught
        stay.set()
        assert await reply.wait() == 7
        with pytest.raises(PoolClosed):
            await pool.process(1)


async def test_bad_arguments_of_draining_are_refused() -> None:
    async with open_pool(1) as pool:
        with pytest.raises(ValueError, match="pools must be one pool or more"):
            await drain_on_signal()
        with pytest.raises(TypeError, match="pools must be a pool"):
            await drain_on_signal(5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="grace must be a number of seconds"):
            await drain_on_signal(pool, grace=-1)


PROGRAM = """
import trio
from trio_pool import open_pool
from trio_pool.web import drain_on_signal, serve_dashboard

async def work(pool):
    while not pool.closed:
        await trio.sleep(0.01)

async def main():
    async with open_pool(2, work) as pool:
        async with serve_dashboard(pool, bind="127.0.0.1:0") as dashboard:
            await pool.submit(pool)
            print(dashboard.urls[0], flush=True)
            [report] = await drain_on_signal(pool, grace=10)
            print(report.done, flush=True)

trio.run(main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_program_ends_in_order(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        url = program.stdout.readline().strip()
        with httpx.Client() as http, http.stream("GET", f"{url}/events") as response:
            assert response.status_code == 200
            program.send_signal(number)
            output, errors = program.communicate(timeout=60)
    assert program.returncode == 0
    assert output.strip() == "1"
    assert errors == ""
