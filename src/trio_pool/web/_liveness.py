"""Answers from a thread of its own whether the loop still turns, and what holds it."""

import errno
import json
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, final

from .._events import log
from ._guard import Guard
from ._place import place_of_frame

BLOCKED_AFTER = 0.5
"""Seconds without a heartbeat after which the loop counts as blocked."""
_CONNECTIONS = 16
_PATIENCE = 2.0
"""Seconds that a connection may take in all."""
_PAUSE = 0.1
"""Seconds until another try when nobody could be let in."""
_GONE = (errno.EAGAIN, errno.EWOULDBLOCK, errno.ECONNABORTED)


@final
class Pulse:
    """Says of a loop, from any thread, whether it turns."""

    def __init__(self, last_beat: Callable[[], float]) -> None:
        self._last_beat = last_beat
        self._thread = threading.get_ident()

    def answer(self) -> tuple[int, dict[str, object]]:
        """Return the status and the facts; the line of what blocks, if it does."""
        lag = max(0.0, time.monotonic() - self._last_beat())
        facts: dict[str, object] = {"loop_lag": round(lag, 3)}
        if lag < BLOCKED_AFTER:
            return 200, {"status": "live", **facts}
        frame = sys._current_frames().get(self._thread)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        return 503, {"status": "blocked", **facts, "line": place_of_frame(frame)}


@final
class LivenessServer:
    """Answers ``/health`` at a socket, from when it is made until `close`."""

    def __init__(self, listener: socket.socket, pulse: Pulse, guard: Guard) -> None:
        self._server = _Server(listener, pulse, guard)
        self._waker, self._awaken = socket.socketpair()
        self._thread = threading.Thread(
            target=self._serve, name="trio_pool liveness", daemon=True
        )
        self._thread.start()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            selector.register(self._waker, selectors.EVENT_READ)
            while True:
                ready = selector.select(self._server.hang_up_late())
                if any(key.fileobj is self._waker for key, _ in ready):
                    return
                if ready:
                    self._server.handle_request()

    def close(self) -> None:
        """Stop, and wait for the threads, none of which takes long."""
        self._awaken.send(b"\0")
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()
        self._waker.close()
        self._awaken.close()


class _Server(ThreadingHTTPServer):
    """Has a few connections at most, each with a thread; knows them all."""

    daemon_threads = False
    # Nothing is waited for: it is called when somebody has come.
    timeout = 0

    def __init__(self, listener: socket.socket, pulse: Pulse, guard: Guard) -> None:
        super().__init__(listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.socket.setblocking(False)
        self.pulse = pulse
        self.guard = guard
        # When each of them was let in, on `time.monotonic`; the oldest first.
        self._open: dict[Any, float] = {}
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._open) >= _CONNECTIONS:
                # Who asks in earnest has had an answer long ago.
                self._hang_up(next(iter(self._open)))
            self._open[request] = time.monotonic()
        request.setblocking(True)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def get_request(self) -> Any:
        """Let somebody in; if nobody can be, rest a little before the next try."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno not in _GONE:
                time.sleep(_PAUSE)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say little: who asked has gone."""
        log.debug("a liveness request was not answered", exc_info=True)

    def hang_up(self) -> None:
        """End all connections, so that their threads end."""
        with self._lock:
            for request in list(self._open):
                self._hang_up(request)

    def hang_up_late(self) -> float | None:
        """End connections that take too long; return the seconds to the next."""
        now = time.monotonic()
        with self._lock:
            for request, since in list(self._open.items()):
                left = since + _PATIENCE - now
                if left > 0:
                    return left
                self._hang_up(request)
        return None

    def _hang_up(self, request: Any) -> None:
        del self._open[request]
        # Its other end may have been faster.
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = _PATIENCE
    server_version = "trio_pool"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        refusal = self.server.guard.check_host(headers)
        if refusal is not None:
            self._reply(refusal.status, {"error": refusal.reason})
        elif self.path.partition("?")[0] != "/health":
            self._reply(404, {"error": "there is only /health"})
        else:
            self._reply(*self.server.pulse.answer())

    def do_HEAD(self) -> None:
        """Answer by the headers alone."""
        self.do_GET()

    def _reply(self, status: int, facts: dict[str, object]) -> None:
        body = json.dumps(facts).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: it is asked every few seconds."""
