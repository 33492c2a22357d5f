"""Measure what a page costs: jobs a second with a dashboard against without.

Run ``python benchmarks/page.py``. A pool of 8 workers does jobs that do nothing, for
some seconds alone and for some seconds with a dashboard, in turns. Meanwhile another
process looks at the page and scrapes ``/metrics`` once a second.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import Any

import trio
from driving import no_op

from trio_pool import open_pool
from trio_pool.web import serve_dashboard

CALLERS = 64
ITEMS = 20_000
SETTLE = 1.0
"""Seconds for which nothing is counted: the page is opened meanwhile."""

# It looks as a browser does, and counts what it gets, so that it may be believed.
LOOKING = """
import sys, threading, time, urllib.request
url = sys.argv[1]
found = {"pictures": 0, "scrapes": 0}
def look():
    with urllib.request.urlopen(url + "/events") as stream:
        for line in stream:
            found["pictures"] += line.startswith(b"data:")
threading.Thread(target=look, daemon=True).start()
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    time.sleep(1)
    urllib.request.urlopen(url + "/metrics").read()
    found["scrapes"] += 1
print(found["pictures"], found["scrapes"])
"""


async def call(pool: Any) -> None:
    """Give in one job after the other."""
    while True:
        await pool.process(None)


async def map_all(pool: Any) -> None:
    """Run one `map` after the other."""
    while True:
        await pool.map(range(ITEMS))


LOADS: dict[str, tuple[Callable[[Any], Awaitable[None]], int]] = {
    f"process, {CALLERS} callers": (call, CALLERS),
    "map, an item": (map_all, 1),
}


async def count(pool: Any, seconds: float) -> float:
    """Return the jobs that end in a second."""
    await trio.sleep(SETTLE)
    start, before = perf_counter(), pool.statistics().done
    await trio.sleep(seconds)
    done: int = pool.statistics().done - before
    return done / (perf_counter() - start)


@asynccontextmanager
async def looked_at(pool: Any, seconds: float) -> AsyncGenerator[None, None]:
    """Serve a page of the pool, to a process that looks at it."""
    async with serve_dashboard(pool, bind="127.0.0.1:0") as dashboard:
        command = [sys.executable, "-c", LOOKING, *dashboard.urls]
        begin = partial(subprocess.Popen, stdout=subprocess.PIPE, text=True)
        client: subprocess.Popen[str] = await trio.to_thread.run_sync(
            begin, [*command, str(SETTLE + seconds)]
        )
        try:
            yield
            output, _ = await trio.to_thread.run_sync(client.communicate)
            pictures, scrapes = map(int, output.split())
            assert pictures, "nobody has looked"
            assert scrapes, "nobody has scraped"
        finally:
            client.kill()
            client.wait()


async def compare(
    load: Callable[[Any], Awaitable[None]], tasks: int, rounds: int, seconds: float
) -> list[tuple[float, float]]:
    """Return jobs a second, alone and looked at, of each round."""
    found: list[tuple[float, float]] = []
    async with open_pool(8, no_op) as pool, trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(load, pool)
        for _ in range(rounds):
            alone = await count(pool, seconds)
            async with looked_at(pool, seconds):
                seen = await count(pool, seconds)
            found.append((alone, seen))
        nursery.cancel_scope.cancel()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each half")
    options = parser.parse_args(arguments)
    print("| jobs a second | alone | looked at | median ratio | of all rounds |")
    print("|---|---|---|---|---|")
    for name, (load, tasks) in LOADS.items():
        found = trio.run(compare, load, tasks, options.rounds, options.seconds)
        ratios = sorted(seen / alone for alone, seen in found)
        alone, seen = (statistics.median(column) for column in zip(*found, strict=True))
        print(
            f"| {name} | {alone:,.0f} | {seen:,.0f} | {statistics.median(ratios):.3f} "
            f"| {ratios[0]:.3f} to {ratios[-1]:.3f} |"
        )


if __name__ == "__main__":
    main()
