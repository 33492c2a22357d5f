"""A program that is interrupted by Ctrl-C, many times over; see `test_signals`.

    python tests/interrupted.py RUNS SEED SIGNALS SCENE...

Each run is a process of its own, forked before trio has begun, which ends as any
Python program does. For each a line of JSON tells how it ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from typing import Any

import trio
from trio.lowlevel import checkpoint, enable_ki_protection

from trio_pool import Pool, Restart, WorkerCrashed, open_pool

WORKERS = 4
CRASH, LONG = -1, -2

scene = ""
opened = False


def tell(text: str) -> None:
    os.write(1, f"{text}\n".encode())


class Member:
    """What a worker enters; it is careful, so that Ctrl-C cannot part its steps."""

    @enable_ki_protection
    async def __aenter__(self) -> Any:
        if scene == "setup" or (scene == "restart" and opened):
            tell("ready")
            await trio.sleep(60)
        await checkpoint()
        tell("set up")
        return handle

    @enable_ki_protection
    async def __aexit__(self, *exc_info: object) -> None:
        if scene == "cleanup":
            tell("ready")
        with trio.CancelScope(shield=True):
            await trio.sleep(0.1 if scene == "cleanup" else 0)
        tell("cleaned up")


class Listener(logging.Handler):
    """Tells of whatever the pool logs."""

    def emit(self, record: logging.LogRecord) -> None:
        tell("logged")


async def handle(number: int) -> int:
    if number == CRASH:
        raise SystemExit
    if number == LONG:
        await trio.sleep(60)
    if number % 3 == 0:
        await checkpoint()
    elif number % 31 == 0:
        await trio.sleep(0.001)
    return sum(range(number % 50))


async def call(pool: Pool[int, int]) -> None:
    for number in range(1_000_000_000):
        await pool.process(number)


async def load(pool: Pool[int, int]) -> None:
    if scene == "process":
        async with trio.open_nursery() as nursery:
            for _ in range(32):
                nursery.start_soon(call, pool)
    while scene == "map":
        await pool.map(range(1000))
    if scene == "stream":
        async with pool.stream(iter(int, 1)) as stream:
            async for _ in stream:
                pass
    while scene == "submit":
        replies = [await pool.submit(number) for number in range(50)]
        for reply in replies:
            await reply.wait()
    while scene == "lease":
        async with pool.lease() as worker:
            for number in range(20):
                await worker.process(number)
    if scene == "one caller":
        await call(pool)
    if scene == "idle":
        await trio.sleep_forever()
    if scene == "restart":
        with contextlib.suppress(WorkerCrashed):
            await pool.process(CRASH)
        await trio.sleep_forever()
    if scene == "shutdown":
        for _ in range(1000):
            pool.submit_nowait(LONG)
        await pool.shutdown(grace=60)


async def main() -> None:
    global opened
    async with open_pool(WORKERS, worker=Member, restart=Restart(5)) as pool:
        opened = True
        if scene not in {"cleanup", "restart"}:
            tell("ready")
        await load(pool)


def run() -> None:
    """Run the program in the child; as in plain trio, nurseries make groups."""
    logging.getLogger("trio_pool").addHandler(Listener())
    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        if group.split(KeyboardInterrupt)[1] is None:
            raise KeyboardInterrupt from None
        raise
    finally:
        tell(f"left {time.monotonic()}")


def interrupt(child: int, read_end: int, chance: random.Random, signals: int) -> Any:
    """Wait for a child to be ready, and for a while, and interrupt it."""
    told = b""
    while b"ready" not in told and (part := os.read(read_end, 4096)):
        told += part
    delay = chance.random() * 0.1
    time.sleep(delay)
    begin = time.monotonic()
    for number in range(signals):
        if number:
            time.sleep(chance.random() * 0.01)
        os.kill(child, signal.SIGINT)
    while part := os.read(read_end, 4096):
        told += part
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    end = time.monotonic()
    lines = told.decode().splitlines()
    left = [float(line.split()[1]) for line in lines if line.startswith("left")]
    return {
        "scene": scene,
        "delay": delay,
        "status": status,
        "seconds to the end of the run": left[0] - begin if left else None,
        "seconds to the end of the process": end - begin,
        "set up": lines.count("set up"),
        "cleaned up": lines.count("cleaned up"),
        "logged": lines.count("logged"),
    }


if __name__ == "__main__":
    runs, chance = int(sys.argv[1]), random.Random(sys.argv[2])
    signals, scenes = int(sys.argv[3]), sys.argv[4:]
    for number in range(runs):
        scene = scenes[number % len(scenes)]
        read_end, write_end = os.pipe()
        with tempfile.TemporaryFile() as errors:
            child = os.fork()
            if not child:
                # Where the tests run in the background Ctrl-C may be ignored.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.setpgid(0, 0)
                os.dup2(write_end, 1)
                os.dup2(errors.fileno(), 2)
                os.close(read_end)
                os.close(write_end)
                break
            os.close(write_end)
            report = interrupt(child, read_end, chance, signals)
            os.close(read_end)
            errors.seek(0)
            report["errors"] = errors.read().decode()
            print(json.dumps(report), flush=True)
    else:
        sys.exit()
    run()
