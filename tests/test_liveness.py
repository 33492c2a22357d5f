"""The endpoint on a thread, which answers while the loop is blocked."""

from __future__ import annotations

import errno
import http.client
import json
import math
import socket
import threading
import time
from typing import Any

import pytest
import trio
import trio.testing

from trio_pool import open_pool

pytest.importorskip("starlette")
pytest.importorskip("hypercorn")
pytest.importorskip("prometheus_client")

from trio_pool.web import open_dashboard, serve_dashboard
from trio_pool.web._address import listen_at, parse_address
from trio_pool.web._guard import make_guard
from trio_pool.web._heartbeat import Heartbeat
from trio_pool.web._liveness import BLOCKED_AFTER, LivenessServer, Pulse

ANYWHERE = "127.0.0.1:0"


def ask(
    url: str, path: str = "/health", method: str = "GET", **headers: str
) -> tuple[int, Any]:
    """Ask in the calling thread; return the status and what was said."""
    where = url.removeprefix("http://")
    connection = http.client.HTTPConnection(where, timeout=60)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        return answer.status, json.loads(body) if body else None
    finally:
        connection.close()


def until_blocked(url: str, release: threading.Event, answers: list[Any]) -> None:
    """Ask until the loop is said to be blocked, then let it go on."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        status, facts = ask(url)
        if status == 503 and facts["line"]:
            answers.append((status, facts))
            break
    release.set()


async def test_a_loop_that_turns_is_alive() -> None:
    async with open_pool(1) as pool:
        async with serve_dashboard(pool, bind=ANYWHERE, liveness=ANYWHERE) as dashboard:
            assert dashboard.liveness is not None
            status, facts = await trio.to_thread.run_sync(ask, dashboard.liveness)
            assert (status, facts["status"]) == (200, "live")
            assert 0 <= facts["loop_lag"] < BLOCKED_AFTER


async def test_a_blocked_loop_is_told_with_the_line_that_blocks_it() -> None:
    release = threading.Event()
    answers: list[Any] = []

    async def block(_: object) -> None:
        release.wait(20)

    async with open_pool(1, block) as pool:
        async with open_dashboard(pool, liveness=ANYWHERE) as dashboard:
            asking = threading.Thread(
                target=until_blocked, args=(dashboard.liveness, release, answers)
            )
            asking.start()
            await pool.process(1)
            asking.join()
            [(status, facts)] = answers
            assert (status, facts["status"]) == (503, "blocked")
            assert facts["loop_lag"] >= BLOCKED_AFTER
            # Not threading.py, where it really waits.
            assert facts["line"].startswith(f"{__file__}:")
            assert facts["line"].endswith(".block")
            assert dashboard.liveness is not None
            # Once the heart beats again all is well.
            await trio.sleep(0.1)
            status, _ = await trio.to_thread.run_sync(ask, dashboard.liveness)
            assert status == 200


async def test_only_health_is_there_and_only_for_known_hosts() -> None:
    async with open_pool(1) as pool:
        async with open_dashboard(
            pool, liveness=ANYWHERE, hosts=["known.example"]
        ) as dashboard:
            assert dashboard.liveness is not None
            url = dashboard.liveness

            def check() -> None:
                assert ask(url, "/")[0] == 404
                assert ask(url, "/health?x=1")[0] == 200
                assert ask(url, method="HEAD") == (200, None)
                assert ask(url, Host="known.example:80")[0] == 200
                status, facts = ask(url, Host="evil.example")
                assert status == 403
                assert "hosts=" in facts["error"]

            await trio.to_thread.run_sync(check)


def open_server(*, beat: float = 0.0) -> tuple[LivenessServer, str]:
    """Answer for a loop that has beaten some seconds ago."""
    listener = listen_at(parse_address("liveness", ANYWHERE))
    where = f"127.0.0.1:{listener.getsockname()[1]}"
    pulse = Pulse(lambda: time.monotonic() - beat)
    guard = make_guard(None, frozenset(), None)
    return LivenessServer(listener, pulse, guard), where


def test_closing_waits_for_nobody_and_leaves_no_thread() -> None:
    before = threading.active_count()
    server, where = open_server()
    host, port = where.split(":")
    # These say nothing, or half of it, and would for long.
    silent = [socket.create_connection((host, int(port))) for _ in range(5)]
    for connection in silent[:3]:
        connection.send(b"GET /hea")
    assert ask(where)[0] == 200
    closing = time.monotonic()
    server.close()
    assert time.monotonic() - closing < 1.5
    assert threading.active_count() == before
    for connection in silent:
        connection.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((host, int(port)))


def test_many_connections_do_not_make_many_threads() -> None:
    before = threading.active_count()
    server, where = open_server()
    host, port = where.split(":")
    crowd = [socket.create_connection((host, int(port))) for _ in range(60)]
    # Who asks now is answered all the same, and the first have been hung up on.
    assert ask(where)[0] == 200
    for connection in crowd[:40]:
        connection.settimeout(20)
        assert connection.recv(1) == b""
    deadline = time.monotonic() + 20
    while threading.active_count() > before + 17:
        assert time.monotonic() < deadline
    for connection in crowd:
        connection.close()
    deadline = time.monotonic() + 20
    while ask_softly(where) != 200:
        assert time.monotonic() < deadline
    server.close()
    assert threading.active_count() == before


def test_a_connection_has_two_seconds_in_all_however_it_trickles() -> None:
    server, where = open_server()
    host, port = where.split(":")
    slow = socket.create_connection((host, int(port)))
    slow.sendall(b"GET /health HTTP/1.1\r\nX: ")
    begun = time.monotonic()
    with pytest.raises(OSError):
        while time.monotonic() - begun < 20:
            slow.sendall(b"a")
            time.sleep(0.05)
    assert time.monotonic() - begun >= 1.5
    slow.close()
    server.close()


class FullListener(socket.socket):
    """Lets nobody in, for want of descriptors, until it is told to."""

    tries = 0
    full = True

    def accept(self) -> Any:
        self.tries += 1
        if self.full:
            raise OSError(errno.EMFILE, "too many open files")
        return super().accept()


def test_a_server_without_descriptors_tries_again_and_does_not_spin() -> None:
    plain = listen_at(parse_address("liveness", ANYWHERE))
    listener = FullListener(fileno=plain.detach())
    where = f"127.0.0.1:{listener.getsockname()[1]}"
    pulse = Pulse(time.monotonic)
    server = LivenessServer(listener, pulse, make_guard(None, frozenset(), None))
    host, port = where.split(":")
    with socket.create_connection((host, int(port))):
        time.sleep(0.5)
        assert 1 <= listener.tries <= 7
        listener.full = False
        assert ask(where)[0] == 200
    server.close()


def ask_softly(where: str) -> int:
    try:
        return ask(where)[0]
    except (OSError, http.client.HTTPException):
        return 0


def test_nonsense_does_not_end_the_server() -> None:
    server, where = open_server()
    host, port = where.split(":")
    for nonsense in (
        b"\x00\xff\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /health HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection((host, int(port))) as connection:
            connection.settimeout(20)
            connection.sendall(nonsense)
            connection.recv(1000)
    assert ask(where)[0] == 200
    server.close()


async def test_both_answer_while_the_pool_is_at_its_limit() -> None:
    async def work(_: object) -> None:
        # As much of the loop as a handler may take without a pause.
        end = time.perf_counter() + 0.001
        while time.perf_counter() < end:
            pass
        await trio.lowlevel.checkpoint()

    async def keep_busy() -> None:
        while True:
            await pool.map(range(100))

    async with open_pool(4, work) as pool, trio.open_nursery() as nursery:
        async with serve_dashboard(pool, bind=ANYWHERE, liveness=ANYWHERE) as dashboard:
            assert dashboard.liveness is not None
            nursery.start_soon(keep_busy)
            for _ in range(20):
                for url in (*dashboard.urls, dashboard.liveness):
                    status, _ = await trio.to_thread.run_sync(ask, url)
                    assert status == 200
            assert pool.statistics().busy == 4
            nursery.cancel_scope.cancel()


def test_a_heart_that_has_stopped_is_told_with_its_lag() -> None:
    server, where = open_server(beat=5.0)
    status, facts = ask(where)
    assert (status, facts["status"]) == (503, "blocked")
    assert 5.0 <= facts["loop_lag"] < 25.0
    server.close()


def test_the_heart_tells_the_longest_lag_once_a_second() -> None:
    heart = Heartbeat()
    start = heart.last
    beats = [(0.1, 0.1), (0.5, 0.7), (0.9, 0.95), (1.0, 1.05), (1.9, 1.9), (2.0, 2.25)]
    told = [heart.hear(start + asked, start + now) for asked, now in beats]
    found = [None if lag is None else round(lag, 6) for lag in told]
    assert found == [None, None, None, 0.2, None, 0.25]
    assert heart.last == start + 2.25


def test_seconds_that_were_missed_are_not_made_up_for() -> None:
    heart = Heartbeat()
    start = heart.last
    lag = heart.hear(start + 0.1, start + 4.5)
    assert lag == pytest.approx(4.4)
    assert heart.hear(start + 4.6, start + 4.6) is None
    assert heart.hear(start + 5.0, start + 5.0) == 0.0


async def test_the_loop_is_asked_by_a_thread_that_goes_with_the_task() -> None:
    """A task that slept would be a deadline for each job of each pool to look at."""
    heard: list[tuple[float, float, float]] = []
    several = trio.Event()
    before = threading.active_count()
    deadlines = trio.lowlevel.current_statistics().seconds_to_next_deadline

    def second(now: float, wall: float, lag: float) -> None:
        heard.append((now, wall, lag))
        if len(heard) == 2:
            several.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Heartbeat().run, second)
        await trio.testing.wait_all_tasks_blocked()
        found = trio.lowlevel.current_statistics().seconds_to_next_deadline
        assert found == deadlines == math.inf
        # It is held up for the half of a second.
        time.sleep(0.5)  # noqa: ASYNC251
        await several.wait()
        nursery.cancel_scope.cancel()
    (first, _, first_lag), (second_time, _, _) = heard
    assert first_lag >= 0.4
    assert second_time - first > 0.5
    assert threading.active_count() == before


async def test_a_task_that_fails_by_its_beat_leaves_no_thread() -> None:
    before = threading.active_count()

    def fail(now: float, wall: float, lag: float) -> None:
        raise ValueError(lag)

    with pytest.raises(ValueError):
        await Heartbeat().run(fail)
    assert threading.active_count() == before
