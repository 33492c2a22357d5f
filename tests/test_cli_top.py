"""The command `trio-pool top`: what it says, and what a server can do to it."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from trio_pool import open_pool
from trio_pool.cli import main
from trio_pool.cli._dashboard import Dashboard, NoPicture
from trio_pool.cli._glance import fit, picture_lines, plain
from trio_pool.cli._pictures import read_picture
from trio_pool.cli._top import _open_display
from trio_pool.web import serve_dashboard
from trio_pool.web._app import to_json
from trio_pool.web._figures import rate
from trio_pool.web._picture import (
    FailureCount,
    Picture,
    PoolPicture,
    Spread,
    WorkerRow,
)

SOURCE = str(Path(__file__).parents[1] / "src")

on_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


def worker(number: int, **facts: Any) -> WorkerRow:
    usual = {
        "state": "idle",
        "job": None,
        "age": None,
        "doing": None,
        "jobs": 7,
        "restarts": 0,
        "last_error": None,
    }
    return WorkerRow(id=number, **(usual | facts))


def pool(name: str = "crawler", **facts: Any) -> PoolPicture:
    numbers = (
        *("running", "accepted", "done", "failed", "timed_out", "cancelled"),
        *("expired", "dropped", "lost", "retries", "restarts", "queued", "delayed"),
    )
    none = Spread(count=0, p50=0.0, p95=0.0, p99=0.0, max=0.0)
    usual = {
        "state": "open",
        "ready": True,
        "light": "green",
        "sentence": "idle: 2 workers free",
        "size": 2,
        "workers_up": 2,
        "busy": 0,
        "busy_share_second": 0.0,
        "busy_share_minute": 0.0,
        "max_backlog": float("inf"),
        "oldest_wait": 0.0,
        "wait": none,
        "run": none,
        "accepted_rate": 0.0,
        "ended_rate": 0.0,
        "breaker": None,
        "workers": (worker(0), worker(1)),
    }
    return PoolPicture(name=name, **(dict.fromkeys(numbers, 0) | usual | facts))


def picture(*pools: PoolPicture) -> Picture:
    lag = {"lag": 0.002, "lag_minute": 0.0151}
    return Picture(time=3_661.0, controls=False, pools=pools, **lag)


BUSY = pool(
    light="red",
    sentence="saturated: 2 of 2 busy, the backlog is full, oldest wait 2.3 s",
    busy=2,
    workers_up=1,
    busy_share_second=1.0,
    busy_share_minute=0.83,
    queued=1_024,
    delayed=3,
    max_backlog=1_024,
    oldest_wait=2.3,
    accepted_rate=12.3,
    ended_rate=10.14,
    wait=Spread(count=1_234, p50=0.0012, p95=0.25, p99=1.5, max=61.0),
    done=5_000,
    failed=31,
    lost=1,
    retries=12,
    breaker="half_open",
    failures=(FailureCount(type="ConnectionError", count=31, last=0.0),),
    workers=(
        worker(0, state="busy", job="nightly", age=61.0, doing="GET /a"),
        worker(1, state="restarting", restarts=2, last_error="BrokenPipeError"),
    ),
)


# What it says of a picture


def test_all_that_matters_of_a_pool_is_said() -> None:
    assert plain(picture_lines(picture(BUSY))).splitlines() == [
        "01:01:01 UTC  loop lag 2.0 ms, in the last minute 15 ms",
        "",
        (
            "red       crawler: saturated: 2 of 2 busy, the backlog is full, "
            "oldest wait 2.3 s"
        ),
        "busy      2 of 2, 1 up: 100 %, in the last minute 83 %",
        "queue     1,024, 3 for later, at most 1,024, the oldest for 2.3 s",
        f"rate      {rate(12.3)} in, {rate(10.14)} out",
        (
            "wait      p50 1.2 ms   p95 250 ms   p99 1.5 s    max 1 min 01 s "
            "of 1,234 in the last minute"
        ),
        "run       – in the last minute",  # noqa: RUF001
        "jobs      5,000 done, 31 failed, 1 lost, 12 retries, breaker half open",
        "failures  ConnectionError 31",
        (
            "worker  state       job             for  jobs  restarts  died of          "
            "doing"
        ),
        (
            "     0  busy        nightly  1 min 01 s     7                             "
            "GET /a"
        ),
        "     1  restarting                          7         2  BrokenPipeError",
    ]


def test_an_idle_pool_needs_few_words() -> None:
    lines = plain(picture_lines(picture(pool(workers=())))).splitlines()
    assert lines[2:] == [
        "green     crawler: idle: 2 workers free",
        "busy      0 of 2: 0 %, in the last minute 0 %",
        "queue     0",
        f"rate      {rate(0)} in, {rate(0)} out",
        "wait      – in the last minute",  # noqa: RUF001
        "run       – in the last minute",  # noqa: RUF001
        "jobs      0 done, 0 failed",
    ]


def test_of_many_workers_those_in_trouble_and_with_old_jobs_are_shown() -> None:
    crowd = [worker(number, state="busy", age=1.0) for number in range(300)]
    crowd[100] = worker(100, state="busy", age=500.0)
    crowd[200] = worker(200, state="starting")
    lines = plain(picture_lines(picture(pool(workers=tuple(crowd))), rows=3))
    shown = re.findall(r"^ +(\d+)  (?:busy|starting)", lines, re.MULTILINE)
    assert shown == ["0", "100", "200"]
    assert lines.endswith("297 workers not shown\n")


@pytest.mark.parametrize("height", [1, 5, 20, 30, 50, 1_000])
@pytest.mark.parametrize("pools", [0, 1, 2, 5])
def test_what_is_drawn_is_never_higher_than_the_terminal(
    height: int, pools: int
) -> None:
    crowd = tuple(worker(number) for number in range(40))
    whole = picture(*(pool(f"pool {n}", workers=crowd) for n in range(pools)))
    lines = fit(whole, height)
    assert len(lines) <= height
    if height == 1_000:
        assert lines == picture_lines(whole)


def test_each_pool_is_seen_on_a_terminal_that_is_not_too_small() -> None:
    crowd = tuple(worker(number) for number in range(40))
    whole = picture(*(pool(f"pool {n}", workers=crowd) for n in range(3)))
    text = plain(fit(whole, 40))
    assert [f"pool {n}: idle" in text for n in range(3)] == [True] * 3
    assert text.count("workers not shown") == 3


# What it reads


def parsed(whole: Picture) -> Any:
    return json.loads(to_json(whole))


def test_a_picture_comes_back_as_it_was() -> None:
    whole = picture(BUSY, pool("other"))
    assert read_picture(to_json(whole).encode()) == whole


def test_what_a_later_version_has_more_is_passed_over() -> None:
    found = parsed(picture(pool()))
    found["news"] = found["pools"][0]["news"] = [1]
    found["pools"][0]["light"] = "purple"
    (one,) = read_picture(json.dumps(found).encode()).pools
    assert one.light == "purple"
    assert "purple    crawler: idle" in plain(picture_lines(picture(one)))


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("pools", 3, "it.pools is not a list"),
        ("pools", [3], r"it.pools\[0\] is not an object"),
        ("time", "now", "it.time is not a number"),
        ("lag", True, "it.lag is not a number"),
        ("time", 10**30, "it.time is not a number"),
        ("controls", 1, "it.controls is not true or false"),
    ],
)
def test_what_is_no_picture_is_refused(field: str, value: Any, complaint: str) -> None:
    found = parsed(picture(pool())) | {field: value}
    with pytest.raises(ValueError, match=complaint):
        read_picture(json.dumps(found).encode())


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"\xff\xfe", b'{"time": NaN}', b"[" * 200_000),
        b'{"time": ' + b"9" * 5_000 + b"}",
    ],
)
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="it is not JSON"):
        read_picture(text)


def test_what_is_missing_is_named() -> None:
    found = parsed(picture(pool()))
    del found["pools"][0]["sentence"]
    with pytest.raises(ValueError, match=r"it.pools\[0\] has no 'sentence'"):
        read_picture(json.dumps(found).encode())


@given(st.text(st.characters(), max_size=30), st.floats(-1e18, 1e18))
def test_nothing_that_a_server_says_does_anything_to_a_terminal(
    text: str, number: float
) -> None:
    nasty = pool(
        name=text,
        sentence=text,
        breaker=text,
        busy_share_second=number,
        oldest_wait=number,
        accepted_rate=number,
        failures=(FailureCount(type=text, count=1, last=number),),
        workers=(
            worker(0, state=text, job=text, age=number, doing=text, last_error=text),
        ),
    )
    whole = attrs.evolve(picture(nasty), time=number)
    read = read_picture(json.dumps(parsed(whole)).encode())
    lines = plain(picture_lines(read)).split("\n")
    assert all(line.isprintable() for line in lines)


def test_control_characters_are_seen_as_what_they_are() -> None:
    whole = picture(pool(name="\x1b[2J\r\n\x9b\u202e\ud800"))
    read = read_picture(json.dumps(parsed(whole)).encode())
    assert read.pools[0].name == r"\x1b[2J\r\n\x9b\u202e\ud800"


# The command


class Server:
    """A server that gives one answer to everybody, until it gets another."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[str] = []
        self.released = threading.Event()
        self.show(picture(pool()))

    def show(self, whole: Picture) -> None:
        self.answer(200, to_json(whole).encode())

    def answer(self, status: int, body: bytes, *, hangs: bool = False) -> None:
        self.given = (status, body, hangs)


@contextmanager
def serve() -> Generator[Server, None, None]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append(self.path)
            status, body, hangs = server.given
            if hangs:
                server.released.wait(30)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Whoever asked may have gone."""

    with Quiet(("127.0.0.1", 0), Handler) as listening:
        server = Server(f"http://127.0.0.1:{listening.server_port}")
        # It looks that often whether it is to stop.
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            listening.shutdown()
            thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


def test_once_gives_one_picture_and_says_by_its_code_if_all_is_well(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", server.url, "--once"]) == 0
    assert "green     crawler: idle: 2 workers free\n" in capfd.readouterr().out
    server.show(picture(pool(), BUSY))
    assert main(["top", f"{server.url}/", "--once"]) == 1
    assert capfd.readouterr().out == plain(picture_lines(picture(pool(), BUSY)))
    # Below a path, as where it is mounted; without a scheme.
    bare = server.url.removeprefix("http://")
    assert main(["top", f"{bare}/ops/statistics.json", "--once"]) == 1
    assert server.asked == [
        *["/statistics.json?history=0"] * 2,
        "/ops/statistics.json?history=0",
    ]


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://127.0.0.1", "http://", "", "http://a:b@127.0.0.1:1", "http://[1"),
        *("127.0.0.1:http", "http://127.0.0.1:99999", "file:///etc/passwd"),
        *("http://127.0.0.1/?a=b", "http://127.0.0.1/a b", "http://127.0.0.1/\x1b"),
    ],
)
def test_what_is_no_url_is_refused(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["top", url, "--once"]) == 2
    told = "trio-pool top: expected the URL of a dashboard, such as http://127.0.0.1:"
    assert capfd.readouterr().err == f"{told}8765, got {url!r}\n"


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize(
    ("status", "body", "complaint"),
    [
        (404, b"", "the answer is 404, so this is no dashboard"),
        (500, b"\x1b[2J", "the answer is 500"),
        (403, b'{"error": "no \\u001b host"}', r"the answer is 403: no \x1b host"),
        (200, b"<html>", "this is no dashboard: it is not JSON"),
        (200, b"[]", "this is no dashboard: it is not an object"),
        (200, b"{}", "this is no dashboard: it has no 'time'"),
    ],
)
def test_a_server_that_is_no_dashboard_is_refused(
    server: Server,
    status: int,
    body: bytes,
    complaint: str,
    once: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.answer(status, body)
    assert main(["top", server.url, *(["--once"] * once)]) == 2
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", f"trio-pool top: {server.url}: {complaint}\n")


def test_where_nobody_answers_it_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert main(["top", url]) == 2
    assert capfd.readouterr().err == f"trio-pool top: {url}: Connection refused\n"


def test_an_answer_that_is_no_http_is_said_to_be_none(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1_000)
                connection.sendall(b"\x1b[2J SSH-2.0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert main(["top", url, "--once"]) == 2
        thread.join()
    told = capfd.readouterr().err
    assert told.startswith(f"trio-pool top: {url}: \\x1b[2J")


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "soon", "0.01"])
def test_an_interval_that_cannot_be_is_refused(
    interval: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["top", f"--interval={interval}"])
    assert end.value.code == 2
    complaint = (
        "argument --interval: must be a number of seconds, from 0.1 to 86400, "
        f"got {interval!r}\n"
    )
    assert capfd.readouterr().err.endswith(complaint)


def test_proxies_are_not_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert main(["top", server.url, "--once"]) == 0


async def test_a_server_that_hangs_does_not_hold_up_the_loop(server: Server) -> None:
    server.answer(200, b"", hangs=True)
    dashboard = Dashboard(server.url)
    began = time.monotonic()
    with trio.move_on_after(0.05) as scope:
        await dashboard.look()
    assert scope.cancelled_caught
    assert time.monotonic() - began < 2
    # The thread that was left behind is waited for, so that there is one at most.
    with trio.move_on_after(0.05) as scope:
        await dashboard.look()
    assert scope.cancelled_caught
    assert len(server.asked) <= 1
    server.released.set()
    with pytest.raises(NoPicture):
        await dashboard.look()


async def test_the_true_dashboard_is_understood() -> None:
    async with open_pool(3, trio.sleep, name="true", max_backlog=5) as sleepers:
        await sleepers.submit(0)
        async with serve_dashboard(sleepers, bind="127.0.0.1:0") as dashboard:
            with trio.fail_after(60):
                found = await Dashboard(dashboard.urls[0]).look()
    (one,) = found.pools
    assert (one.name, one.size, one.max_backlog) == ("true", 3, 5)
    assert len(one.workers) == 3
    assert "true: " in plain(picture_lines(found))


# The command as a program


def program(code: str, *arguments: str) -> list[str]:
    code = f"import sys; from trio_pool.cli import main; {code}"
    return [
        sys.executable,
        "-W",
        "error",
        "-c",
        f"{code}; sys.exit(main())",
        *arguments,
    ]


@contextmanager
def started(
    *arguments: str, code: str = "", **how: Any
) -> Generator[subprocess.Popen[bytes], None, None]:
    environment = os.environ | {"PYTHONPATH": SOURCE, "TERM": "xterm-256color"}
    command = program(code or "pass", "top", *arguments)
    with subprocess.Popen(command, env=environment, **how) as child:
        try:
            yield child
        finally:
            child.kill()


def read_until(wanted: str, fd: int, seen: str = "") -> str:
    """Read until something comes; 20 seconds are for a hang."""
    end = time.monotonic() + 20
    while wanted not in seen:
        assert select.select([fd], [], [], max(0, end - time.monotonic()))[0], seen
        seen += os.read(fd, 65_536).decode(errors="replace")
    return seen


@on_posix
def test_a_server_that_is_gone_is_told_of_once_and_found_again(server: Server) -> None:
    pipe = subprocess.PIPE
    arguments = (server.url, "--interval", "0.1")
    with started(*arguments, stdout=pipe, stderr=pipe) as child:
        assert child.stdout is not None
        out = child.stdout.fileno()
        read_until("workers free", out)
        server.answer(503, b"")
        read_until("connection lost, it is tried again: the answer is 503\n", out)
        asked = len(server.asked)
        while len(server.asked) < asked + 3:
            time.sleep(0.01)
        server.show(picture(BUSY))
        rest = read_until("saturated", out)
        assert "503" not in rest
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=60)
    assert error == b""
    assert child.returncode == 130


@on_posix
def test_pictures_are_written_until_ctrl_c(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        end = time.monotonic() + 20
        while len(server.asked) < 5 and time.monotonic() < end:
            if len(server.asked) == 3:
                server.answer(500, b"")
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(["top", server.url, "--interval", "0.1"]) == 130
    thread.join()
    told = capfd.readouterr()
    assert told.err == ""
    assert told.out.count("crawler: idle: 2 workers free") >= 2
    assert told.out.count("connection lost") == 1


@on_posix
def test_a_screen_is_drawn_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    main_end, end = os.openpty()
    # A terminal that knows few letters gets others in the place of the rest.
    with os.fdopen(main_end, "rb"), os.fdopen(end, "w", encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with _open_display() as display:
            display.show("here", picture(pool("\u00e4\u4e2d")), "gone")
        seen = read_until("\x1b[?1049l", main_end)
    assert "??: " in seen
    assert "here" in seen
    assert "gone" in seen


@on_posix
def test_a_terminal_that_takes_nothing_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    main_end, end = os.openpty()
    with os.fdopen(main_end, "rb"), os.fdopen(end, "w") as terminal:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setattr(sys, "stdout", terminal)
        with _open_display() as display:
            seen = read_until("\x1b[?1049h", main_end)
            # Nobody reads until it is full.
            os.set_blocking(end, False)
            with pytest.raises(BlockingIOError):
                while True:
                    os.write(end, b"x" * 1_000)
            os.set_blocking(end, True)
            display.show("here", picture(pool()), None)
            drained = 0
            while select.select([main_end], [], [], 0)[0]:
                drained += os.read(main_end, 65_536).count(b"here")
        assert drained == 0
        assert "here" not in read_until("\x1b[?1049l", main_end, seen)


@on_posix
def test_a_reader_that_leaves_ends_it_quietly(server: Server) -> None:
    pipe = subprocess.PIPE
    arguments = (server.url, "--interval", "0.1")
    with started(*arguments, stdout=pipe, stderr=pipe) as child:
        assert child.stdout is not None
        read_until("workers free", child.stdout.fileno())
        child.stdout.close()
        assert child.wait(20) == 141
        assert child.stderr is not None
        assert child.stderr.read() == b""


@on_posix
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_the_terminal_is_as_it_was_when_a_signal_ends_it(
    server: Server, number: str, code: int
) -> None:
    server.show(picture(attrs.evolve(BUSY, name="evil\x1b]0;title\x07")))
    main_end, end = os.openpty()
    try:
        how = {"stdin": end, "stdout": end, "stderr": end}
        with started(server.url, "--interval", "0.1", **how) as child:
            seen = read_until("saturated", main_end)
            server.show(picture(pool("other")))
            seen = read_until("workers free", main_end, seen)
            server.answer(500, b"")
            seen = read_until("connection lost", main_end, seen)
            child.send_signal(getattr(signal, number))
            seen = read_until("\x1b[?1049l", main_end, seen)
            assert child.wait(20) == code
    finally:
        os.close(end)
        os.close(main_end)
    # Another screen, which is left again; the cursor is hidden, and shown again.
    assert seen.count("\x1b[?1049h") == seen.count("\x1b[?1049l") == 1
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
    assert r"evil\x1b]0;title\x07" in seen
    assert "\x1b]0;" not in seen
    assert "Traceback" not in seen


@on_posix
def test_without_rich_a_terminal_gets_lines(server: Server) -> None:
    main_end, end = os.openpty()
    try:
        missing = "sys.modules['rich'] = None"
        with started(server.url, code=missing, stdin=end, stdout=end) as child:
            seen = read_until("workers free", main_end)
            child.send_signal(signal.SIGINT)
            assert child.wait(20) == 130
    finally:
        os.close(end)
        os.close(main_end)
    assert "\x1b" not in seen


def test_nothing_heavy_is_imported_for_help() -> None:
    code = "sys.argv[1:] = ['top', '--help']"
    code += "; import atexit; atexit.register(lambda: print('rich' in sys.modules, "
    code += "'starlette' in sys.modules, file=sys.stderr))"
    environment = os.environ | {"PYTHONPATH": SOURCE}
    done = subprocess.run(
        program(code), env=environment, capture_output=True, check=True, text=True
    )
    assert done.stderr == "False False\n"
    assert "exit codes:" in done.stdout
