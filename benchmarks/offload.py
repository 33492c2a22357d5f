"""What a worker off the thread costs beside its engine alone, and what chunks bring.

  python benchmarks/offload.py [ENGINE ...] [--rounds N]

The engines are thread, executor, process, processes, dask and ray; by default
those that are here. What "processes" compares with is one `WorkerContext` for all
callers, which keeps nothing in a process for anyone. Ray is measured only where
there is no network but lo: `unshare -n`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import socket
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from statistics import median
from typing import Any

import attrs
import trio
from echoing import echo

from trio_pool import offload, open_pool

WORKERS = 2
Call = Callable[[Any], Awaitable[Any]]
Raw = Callable[[], Any]


def spin(seconds: float) -> float:
    """Keep a core busy, as its own clock has it; return the seconds."""
    begun = time.thread_time()
    while time.thread_time() - begun < seconds:
        pass
    return time.thread_time() - begun


# ----------------------------------------------------------------------
# The engines, without a pool.


@asynccontextmanager
async def raw_thread() -> AsyncGenerator[Call]:
    limiter = trio.CapacityLimiter(WORKERS)
    yield partial(_to_thread, limiter)


async def _to_thread(limiter: trio.CapacityLimiter, item: Any) -> Any:
    return await trio.to_thread.run_sync(echo, item, limiter=limiter)


@asynccontextmanager
async def raw_executor() -> AsyncGenerator[Call]:
    with _processes() as executor:
        # Calls that wait can be cancelled here, as in the other engines.
        limiter = trio.CapacityLimiter(WORKERS)

        async def call(item: Any) -> Any:
            async with limiter:
                return await offload.wait_future(executor.submit(echo, item))

        yield call


@asynccontextmanager
async def raw_process() -> AsyncGenerator[Call]:
    """Use processes that have one caller at a time each, as those of workers do."""
    trio_parallel = import_module("trio_parallel")
    async with AsyncExitStack() as stack:
        calls: list[Call] = []
        for _ in range(WORKERS):
            opened = trio_parallel.open_worker_context()
            context = await stack.enter_async_context(opened)
            calls.append(partial(context.run_sync, echo, kill_on_cancel=True))
        async with in_turns(calls) as call:
            yield call


@asynccontextmanager
async def raw_processes() -> AsyncGenerator[Call]:
    """Use processes of which none belongs to anybody."""
    trio_parallel = import_module("trio_parallel")
    limiter = trio.CapacityLimiter(WORKERS)
    async with trio_parallel.open_worker_context() as context:

        async def call(item: Any) -> Any:
            return await context.run_sync(
                echo, item, kill_on_cancel=True, limiter=limiter
            )

        yield call


class Echo:
    """An actor of an engine's own."""

    def call(self, item: Any) -> Any:
        """Do next to nothing."""
        return item


@asynccontextmanager
async def in_turns(calls: list[Call]) -> AsyncGenerator[Call]:
    """Let each of several actors have one call at a time."""
    free, give_back = trio.open_memory_channel[Call](len(calls))
    for one in calls:
        free.send_nowait(one)

    async def call(item: Any) -> Any:
        one = await give_back.receive()
        try:
            return await one(item)
        finally:
            free.send_nowait(one)

    yield call


@asynccontextmanager
async def raw_dask() -> AsyncGenerator[Call]:
    distributed = import_module("distributed")
    loop = asyncio.new_event_loop()
    with ThreadPoolExecutor(1) as executor, ExitStack() as stack:
        executor.submit(loop.run_forever)
        stack.callback(loop.call_soon_threadsafe, loop.stop)

        async def ask(coroutine: Any) -> Any:
            future = asyncio.run_coroutine_threadsafe(coroutine, loop)
            return await offload.wait_future(future, may_cancel=False)

        async def start() -> Any:
            cluster = await distributed.LocalCluster(
                n_workers=WORKERS,
                threads_per_worker=1,
                dashboard_address=None,
                asynchronous=True,
            )
            client = await distributed.Client(
                cluster, asynchronous=True, direct_to_workers=True
            )
            workers = list((await client.scheduler.identity(n_workers=-1))["workers"])
            actors = [
                await client.submit(Echo, actor=True, workers=[worker], pure=False)
                for worker in workers
            ]
            return cluster, client, actors

        async def stop(cluster: Any, client: Any) -> None:
            await client.close()
            await cluster.close()

        async def ask_actor(client: Any, actor: Any, item: Any) -> Any:
            with client.as_current():
                return await actor.call(item)

        cluster, client, actors = await ask(start())

        async def call_actor(actor: Any, item: Any) -> Any:
            return await ask(ask_actor(client, actor, item))

        calls: list[Call] = [partial(call_actor, actor) for actor in actors]
        async with in_turns(calls) as call:
            yield call
        await ask(stop(cluster, client))


@asynccontextmanager
async def raw_ray() -> AsyncGenerator[Call]:
    ray = import_module("ray")
    start = partial(ray.init, num_cpus=WORKERS, include_dashboard=False)
    await trio.to_thread.run_sync(partial(start, log_to_driver=False))
    remote = ray.remote(Echo)
    actors = [remote.options(num_cpus=0).remote() for _ in range(WORKERS)]

    async def ask(actor: Any, item: Any) -> Any:
        future = actor.call.remote(item).future()
        return await offload.wait_future(future, may_cancel=False)

    async with in_turns([partial(ask, actor) for actor in actors]) as call:
        yield call
    for actor in actors:
        ray.kill(actor)
    await trio.to_thread.run_sync(ray.shutdown)


# ----------------------------------------------------------------------
# Side by side.


@attrs.frozen
class Engine:
    """An engine by itself, and as workers of a pool."""

    raw: Callable[[], Any]
    worker: Callable[[Callable[[Any], Any]], Any]
    jobs: int
    """How many make a round of some hundredths of a second."""


def _on_executor(fn: Callable[[Any], Any]) -> Any:
    return offload.on_executor(_processes, fn)


def _processes() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn"))


ENGINES = {
    "thread": Engine(raw_thread, lambda fn: offload.in_thread(fn), 200),
    "executor": Engine(raw_executor, _on_executor, 80),
    "process": Engine(raw_process, lambda fn: offload.in_process(fn), 100),
    "processes": Engine(raw_processes, lambda fn: offload.in_process(fn), 100),
    "dask": Engine(raw_dask, lambda fn: offload.on_dask(fn), 32),
    "ray": Engine(raw_ray, lambda fn: offload.on_ray(fn), 40),
}
NEEDS = {
    "process": "trio_parallel",
    "processes": "trio_parallel",
    "dask": "distributed",
    "ray": "ray",
}


def is_here(name: str) -> bool:
    """Say whether an engine is installed, and may be started."""
    networks = {network for _, network in socket.if_nameindex()}
    if name == "ray" and networks != {"lo"}:
        return False
    try:
        import_module(NEEDS.get(name, "trio"))
    except ImportError:
        return False
    return True


async def time_calls(call: Call, jobs: int, in_flight: int) -> float:
    """Return the microseconds that a job takes."""

    async def caller() -> None:
        for number in range(jobs // in_flight):
            assert await call(number) == number

    gc.collect()
    begun = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(in_flight):
            nursery.start_soon(caller)
    return (time.perf_counter() - begun) / (jobs // in_flight * in_flight) * 1e6


async def compare(name: str, rounds: int) -> None:
    """Print what a call costs by the engine alone, and by a pool of it."""
    engine = ENGINES[name]
    async with AsyncExitStack() as stack:
        raw = await stack.enter_async_context(engine.raw())
        pool = await stack.enter_async_context(
            open_pool(WORKERS, worker=engine.worker(echo))
        )
        for in_flight in (1, 8):
            times: dict[str, list[float]] = {"raw": [], "pool": []}
            for call in (raw, pool.process):
                await time_calls(call, engine.jobs, in_flight)
            for _ in range(rounds):
                for side, call in (("raw", raw), ("pool", pool.process)):
                    times[side].append(await time_calls(call, engine.jobs, in_flight))
            alone, pooled = times["raw"], times["pool"]
            # Of rounds side by side, as what else the machine does comes and goes.
            ratio = median(ours / its for ours, its in zip(pooled, alone, strict=True))
            print(
                f"| {name} | {in_flight} | {median(alone):.0f} | {median(pooled):.0f} "
                f"| {ratio:.2f} |",
                flush=True,
            )


async def show_chunks(name: str) -> None:
    """Print what chunks bring for short items, and how busy they keep the cores."""
    async with open_pool(WORKERS, worker=ENGINES[name].worker(spin)) as pool:
        for each, alone, together in ((0.00001, 1000, 40_000), (0.001, 500, 4000)):
            rates: list[float] = []
            for items, chunk in ((alone, 1), (together, None)):
                begun = time.perf_counter()
                busy = sum(await pool.map([each] * items, chunk=chunk))
                took = time.perf_counter() - begun
                rates.append(items / took)
                print(
                    f"| {name} | {each * 1e6:.0f} | {chunk or 'measured'} "
                    f"| {items / took:,.0f} | {busy / took / WORKERS:.0%} "
                    f"| {rates[-1] / rates[0]:.1f} |",
                    flush=True,
                )


async def main(names: list[str], rounds: int) -> None:
    """Print the tables."""
    print("| engine | in flight | us, engine alone | us, pool | ratio |")
    print("|---|---|---|---|---|")
    for name in names:
        await compare(name, rounds)
    print()
    print(f"| engine | us an item | chunk | items/s | {WORKERS} cores busy | times |")
    print("|---|---|---|---|---|---|")
    for name in names:
        if name in {"process", "dask", "ray"}:
            await show_chunks(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engines", nargs="*", metavar="ENGINE")
    parser.add_argument("--rounds", type=int, default=60)
    asked = parser.parse_args()
    wanted = asked.engines or [name for name in ENGINES if is_here(name)]
    for missing in set(ENGINES) - set(wanted):
        print(f"not here, or not asked for: {missing}", file=sys.stderr)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    trio.run(main, wanted, asked.rounds)
