"""The example of a service: deadlines, a full pool, probes, an orderly end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("hypercorn")
pytest.importorskip("trio_parallel")

SERVICE = Path(__file__).parents[1] / "examples" / "service.py"
# It has two large prime factors: to find them takes hours.
ENDLESS = (10**15 + 37) * (10**15 + 91)
LIMIT = 60  # seconds, only there to end a hang

pytestmark = pytest.mark.skipif(os.name != "posix", reason="it ends by a signal")


class Service(NamedTuple):
    process: subprocess.Popen[str]
    url: str
    liveness: str

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        """Ask for a path; return the status and the body, parsed if it is JSON."""
        base = self.liveness if path == "/alive" else self.url
        path = path.replace("/alive", "/health")
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(base + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=LIMIT) as answer:
                return answer.status, parse(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, parse(error)

    def wait_for(self, path: str, status: int) -> None:
        end = time.monotonic() + LIMIT
        while self.get(path)[0] != status:
            assert time.monotonic() < end
            time.sleep(0.01)

    def wait_until_full(self) -> None:
        end = time.monotonic() + LIMIT
        full = {"busy": 1, "queued": 1}
        while True:
            (pool,) = self.get("/statistics.json?history=0")[1]["pools"]
            if {name: pool[name] for name in full} == full:
                return
            assert time.monotonic() < end
            time.sleep(0.05)


def parse(answer: Any) -> Any:
    body = answer.read().decode()
    return json.loads(body) if "json" in answer.headers["content-type"] else body


@pytest.fixture
def service() -> Iterator[Service]:
    command = [sys.executable, str(SERVICE), "--bind", "127.0.0.1:0"]
    environment = os.environ | {"POOL_SIZE": "1", "POOL_MAX_BACKLOG": "1"}
    with subprocess.Popen(
        [*command, "--liveness", "127.0.0.1:0"],
        env=environment | {"POOL_GRACE": "30"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        watchdog = threading.Timer(LIMIT, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            word, url, liveness = process.stdout.readline().split()
            assert word == "at"
            yield Service(process, url, liveness)
        finally:
            watchdog.cancel()
            process.kill()


def test_a_service_answers_under_deadlines_and_ends_in_order(service):
    assert service.get("/factors/600851475143") == (200, [71, 839, 1471, 6857])
    assert service.get("/health")[0] == 200
    assert service.get("/ready")[0] == 200
    assert service.get("/alive")[0] == 200
    assert service.get("/factors/12", X_Timeout="soon")[0] == 400
    assert service.get("/factors/twelve")[0] == 400
    assert service.get("/factors/" + "9" * 5000)[0] == 400
    assert service.get("/nothing")[0] == 404

    # Who waits no longer has the process killed, and the next one is served.
    status, answer = service.get(f"/factors/{ENDLESS}", X_Timeout="0.5")
    assert (status, answer) == (504, {"error": "it took too long"})
    assert service.get("/factors/12") == (200, [2, 2, 3])

    # While the only worker is busy and one waits, others are sent away at once.
    found: list[Any] = []

    def ask() -> None:
        found.append(service.get(f"/factors/{ENDLESS}", X_Timeout="5"))

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    service.wait_until_full()
    status, answer = service.get("/factors/12")
    assert status == 503
    assert (
        'trio_pool_jobs_ended_total{pool="factors",state="done"} 2.0'
        in (service.get("/metrics")[1])
    )

    # What was accepted is finished, and meanwhile nothing more is.
    service.process.send_signal(signal.SIGTERM)
    service.wait_for("/ready", 503)
    assert service.get("/health")[0] == 200
    assert service.get("/factors/12")[0] == 503
    for thread in asking:
        thread.join(LIMIT)
    assert found == [(504, {"error": "it took too long"})] * 2
    output, errors = service.process.communicate(timeout=LIMIT)
    assert output == "at the end: 0 done, 2 cancelled\n"
    assert "INFO pool 'factors' stopped" in errors
    assert service.process.returncode == 0
