"""A program for `test_conformance`: a pool off the thread, until it is ended.

Its arguments are the engine and a file for traces. It says "ready" when jobs run.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import trio
from offloaded import BACKENDS, Item, Traces, act, until

from trio_pool import open_pool

NAME, FILE, SECONDS = sys.argv[1:4]


async def main() -> None:
    backend = next(backend for backend in BACKENDS if backend.name == NAME)
    traces = Traces(Path(FILE))
    seconds = float(SECONDS)
    async with open_pool(2, worker=backend.worker(act)) as pool:
        if backend.stops:
            await pool.submit(Item("hold", 10**10, 1, FILE))
        else:
            await pool.submit(Item("burn", seconds, 1, FILE))
        what = "child" if backend.stops else "burn"
        await pool.submit(Item(what, seconds, 2, FILE))
        await until(lambda: len(traces.starts()) == 2)
        await until(lambda: what != "child" or traces.children())
        print("ready", flush=True)
        await trio.sleep(60)


if __name__ == "__main__":
    # A shell starts what runs in the background deaf to it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        trio.run(main)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        os._exit(0) if NAME == "threads" else sys.exit(0)
