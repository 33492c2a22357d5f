"""Dask by address: a cluster that was there before the pool, and outlives it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from offloaded import (
    BACKENDS,
    Item,
    State,
    Traces,
    act,
    act_with_state,
    is_gone,
    kill,
    until,
)
from test_conformance import check_left_behind

from trio_pool import Restart, WorkerCrashed, offload, open_pool
from trio_pool.offload import EngineError
from trio_pool.testing import assert_books_balance, settle

(DASK,) = [backend for backend in BACKENDS if backend.name == "dask"]
pytestmark = pytest.mark.skipif(bool(DASK.missing), reason=DASK.missing)

PATIENT = Restart(limit=1000)


@attrs.frozen
class Cluster:
    """A scheduler and two workers, each with its nanny."""

    address: str
    programs: list[subprocess.Popen[bytes]]

    def freeze(self) -> None:
        """Let the scheduler answer nothing, and close nothing."""
        os.killpg(self.programs[0].pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.killpg(self.programs[0].pid, signal.SIGCONT)

    def worker(self, fn: Any = act, **options: Any) -> Any:
        """Make workers of a pool that are actors there."""
        how: dict[str, Any] = {"connect_timeout": 30.0, **options}
        return offload.on_dask(fn, address=self.address, **how)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    port, folder = free_port(), tmp_path_factory.mktemp("dask")
    address = f"tcp://127.0.0.1:{port}"
    dask, local = [sys.executable, "-m", "dask"], ["--host", "127.0.0.1"]
    scheduler = [*dask, "scheduler", *local, "--port", str(port), "--no-dashboard"]
    worker = [*dask, "worker", address, *local, "--nthreads", "1", "--no-dashboard"]
    how: dict[str, Any] = {
        "cwd": folder,
        # Those of a cluster have the modules of who uses it.
        "env": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        "start_new_session": True,
    }
    with (folder / "log").open("wb") as log:
        programs = [
            subprocess.Popen(command, stdout=log, stderr=log, **how)
            for command in (scheduler, worker, worker)
        ]
    yield Cluster(address, programs)
    for program in programs:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGCONT)
            os.killpg(program.pid, signal.SIGKILL)
        program.wait()


@pytest.fixture
def traces(tmp_path: Path) -> Traces:
    return Traces(tmp_path / "traces")


async def check_usable(pool: Any) -> None:
    assert await pool.map([Item("echo", n) for n in range(4)]) == [0, 1, 2, 3]
    await settle(pool)
    assert_books_balance(pool)


async def test_each_worker_has_a_process_of_the_cluster_to_itself(
    cluster: Cluster,
) -> None:
    worker = cluster.worker(act_with_state, setup=State)
    with trio.fail_after(60):
        for _ in range(2):
            async with open_pool(2, worker=worker) as pool:
                states = await pool.map([Item("state")] * 40, chunk=1)
                assert len({pid for pid, _ in states}) == 2
                assert max(jobs for _, jobs in states) > 1
                await check_usable(pool)
            # What the pool has put there is gone, the processes are not.
            assert not any(is_gone(pid) for pid, _ in states)


async def test_a_pool_larger_than_the_cluster_is_refused(cluster: Cluster) -> None:
    worker = cluster.worker(connect_timeout=3.0)
    with trio.fail_after(60):
        with pytest.raises(ValueError, match=r"size must be at most .* 2, got 3"):
            async with open_pool(3, worker=worker):
                pytest.fail("it is open")


async def test_a_job_that_is_cancelled_goes_on_and_keeps_its_worker(
    cluster: Cluster, traces: Traces
) -> None:
    with trio.fail_after(60):
        async with open_pool(1, worker=cluster.worker()) as pool:
            await check_left_behind(pool, traces, seconds=1.0, timeout=0.3)
            await check_usable(pool)


@pytest.mark.parametrize(("name", "arg"), [("burn", 60.0), ("hold", 10**11)])
async def test_a_job_that_is_cancelled_is_killed_if_that_is_asked_for(
    cluster: Cluster, name: str, arg: Any, traces: Traces
) -> None:
    item = Item(name, arg, 1, str(traces.path))
    with trio.fail_after(90):
        worker = cluster.worker(kill_on_cancel=True)
        async with open_pool(1, worker=worker, restart=PATIENT) as pool:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pool.process, item)
                    await until(traces.starts)
                    scope.cancel()
            pid = traces.pid_of(1)
            assert pid is not None
            await until(lambda: is_gone(pid), 2)
            assert traces.starts() == {1: 1}
            await check_usable(pool)
            assert pool.statistics().restarts == 0


async def test_a_killed_worker_of_the_cluster_is_followed_by_its_next_one(
    cluster: Cluster, traces: Traces
) -> None:
    item = Item("burn", 60.0, 1, str(traces.path))
    with trio.fail_after(90):
        async with open_pool(2, worker=cluster.worker(), restart=PATIENT) as pool:
            reply = await pool.submit(item)
            await until(traces.starts)
            kill(traces.pid_of(1))
            with pytest.raises(WorkerCrashed) as caught:
                await reply.wait()
            assert caught.value.started
            await check_usable(pool)
            assert traces.starts() == {1: 1}


async def test_nobody_waits_for_a_scheduler_that_is_frozen(
    cluster: Cluster, traces: Traces
) -> None:
    worker = cluster.worker(kill_on_cancel=True)
    item = Item("burn", 60.0, 1, str(traces.path))
    gaps: list[float] = []

    async def tick() -> None:
        last = time.perf_counter()
        while True:
            await trio.sleep(0.01)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    with trio.fail_after(90):
        async with open_pool(2, worker=worker, restart=PATIENT) as pool:
            await check_usable(pool)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tick)
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as jobs:
                        jobs.start_soon(pool.process, item)
                        await until(traces.starts)
                        cluster.freeze()
                        try:
                            # Calls go on without it, and so do cancels.
                            assert await pool.process(Item("echo", 1)) == 1
                            await trio.sleep(1.0)
                            scope.cancel()
                            with trio.CancelScope(shield=True):
                                assert await pool.process(Item("echo", 2)) == 2
                                await trio.sleep(1.0)
                        finally:
                            cluster.thaw()
                nursery.cancel_scope.cancel()
            await check_usable(pool)
    # A call that waited for it would have held the loop for two seconds; how
    # long it is held is what the benchmarks are for.
    assert max(gaps) < 0.5


@pytest.mark.parametrize("frozen", [True, False])
async def test_an_address_where_nobody_answers_fails_the_opening(
    cluster: Cluster, frozen: bool
) -> None:
    address = cluster.address if frozen else f"tcp://127.0.0.1:{free_port()}"
    worker = offload.on_dask(act, address=address, connect_timeout=1.0)
    if frozen:
        cluster.freeze()
    try:
        with trio.fail_after(20):
            with pytest.raises(EngineError, match=r"address must be.*127\.0\.0\.1"):
                async with open_pool(1, worker=worker):
                    pytest.fail("it is open")
    finally:
        cluster.thaw()


def test_what_is_no_address_is_refused() -> None:
    for name, value in (
        *(("address", 8786), ("connect_timeout", 0), ("connect_timeout", "long")),
        *(("connect_timeout", float("inf")), ("kill_on_cancel", "yes")),
    ):
        with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
            offload.on_dask(act, **{name: value})


async def test_an_address_of_another_kind_is_refused() -> None:
    with trio.fail_after(20):
        with pytest.raises((ValueError, EngineError), match="address must be"):
            worker = offload.on_dask(act, address="mars://x:1", connect_timeout=1.0)
            async with open_pool(1, worker=worker):
                pytest.fail("it is open")
