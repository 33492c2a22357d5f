"""The cluster of Dask that a pool has to itself, and its processes."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, final
from uuid import uuid4

import attrs
import distributed
import trio

from . import _lifeline
from ._dask_actor import (
    DYING,
    KNOCKING,
    LEAVING,
    LOOK,
    STARTING,
    close_client,
    connect_client,
    deadline,
    packed_with,
    workers_of,
)
from ._errors import EngineError
from ._lifeline import die_with

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from concurrent.futures import Future

    from ._dask_actor import Loop


@asynccontextmanager
async def open_own(loop: Loop) -> AsyncGenerator[Own, None]:
    scheduler = await _Child.start(_be_scheduler, stdout=subprocess.PIPE)
    cluster = Own(loop, scheduler)
    try:
        yield cluster
    finally:
        if cluster.client is not None:
            with trio.move_on_after(LEAVING, shield=True):
                await loop.run(close_client(cluster.client))
        await scheduler.kill()


@final
@attrs.define(eq=False)
class Own:
    """A cluster of processes that we start, and stop."""

    loop: Loop
    _scheduler: _Child
    client: Any = None
    timeout: float = STARTING
    _lock: trio.Lock = attrs.field(factory=trio.Lock, init=False)

    @asynccontextmanager
    async def place(self) -> AsyncGenerator[_Child, None]:
        """Start a process for a worker."""
        name = uuid4().hex
        child = await _Child.start(partial(_be_worker, name))
        try:
            with deadline(STARTING, "a process of Dask has not started"):
                # It is importing meanwhile, which takes most of a second.
                child.client = await self._connected()
                await child.say(f"{self._scheduler.address}\n".encode())
                await self._wait_until_known(child, name)
            yield child
        finally:
            await child.leave()

    async def _connected(self) -> Any:
        """Return the client, connected when it is first asked for."""
        async with self._lock:
            if self.client is None:
                address = await self._scheduler.hear_address()
                self.client = await self.loop.run(connect_client(address, STARTING))
        return self.client

    async def _wait_until_known(self, child: _Child, name: str) -> None:
        while not child.address:
            for address, facts in (
                await self.loop.run(workers_of(child.client))
            ).items():
                if facts["name"] == name:
                    child.address = address
            if child.process.poll() is not None:
                raise EngineError(await child.obituary("was starting"))
            await trio.sleep(LOOK)


@final
class _Child:
    """A process of our own, with a group of its own, as a place for an actor."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.client: Any = None
        self.address = ""

    @classmethod
    async def start(cls, fn: Callable[[], None], **options: Any) -> _Child:
        """Start a process that calls a function."""
        if os.name == "posix":
            # Ctrl-C is this process's alone.
            options["process_group"] = 0
        code = (
            "import pickle, sys; sys.path = pickle.load(sys.stdin.buffer); "
            "pickle.load(sys.stdin.buffer)()"
        )
        command = [sys.executable, "-P", "-c", code]
        child = cls(
            await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, **options)
        )
        try:
            await child.say(pickle.dumps(sys.path))
            await child.say(packed_with(fn, sys.modules[__name__], _lifeline))
        except BaseException:
            await child.kill()
            raise
        return child

    async def say(self, what: bytes) -> None:
        """Send what the process waits for."""
        assert self.process.stdin is not None
        try:
            await self.process.stdin.send_all(what)
        except trio.BrokenResourceError as error:
            raise EngineError(await self.obituary("was starting")) from error

    async def hear_address(self) -> str:
        """Wait until a scheduler has told its address."""
        assert self.process.stdout is not None
        heard = b""
        while not heard.endswith(b"\n"):
            part = await self.process.stdout.receive_some()
            if not part:
                raise EngineError(await self.obituary("was starting"))
            heard += part
        self.address = heard.decode().strip()
        return self.address

    def is_alive(self) -> bool:
        """Say whether it is there, before anybody has been told of its end."""
        return self.process.poll() is None

    async def end(self, call: Future[Any]) -> bool:
        """Kill the process, and with it the call."""
        await self.kill()
        return True

    async def kill(self) -> None:
        """Kill the process and what it has started, and wait for its end."""
        if os.name == "posix":
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        with trio.move_on_after(DYING, shield=True):
            await self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    await pipe.aclose()

    async def leave(self) -> None:
        """Have the process end by itself, or else kill it."""
        with trio.move_on_after(LEAVING, shield=True):
            if self.process.poll() is None:
                self.process.terminate()
                await self.process.wait()
        await self.kill()

    async def obituary(self, when: str, error: Exception | None = None) -> str:
        """Say how the process has ended."""
        with trio.move_on_after(KNOCKING, shield=True):
            await self.process.wait()
        code = self.process.returncode
        return f"the process of Dask ended with exit code {code} while it {when}"


# In the processes of that cluster.


def _be_worker(name: str) -> None:
    """Be a worker of the scheduler that is told of."""
    scheduler = sys.stdin.readline().strip()
    _be_child()
    # At a limit of memory it would pause, and the job go on.
    server = partial(
        distributed.Worker,
        scheduler,
        name=name,
        nthreads=1,
        host="127.0.0.1",
        memory_limit=0,
        dashboard=False,
    )
    asyncio.run(_serve(server))


def _be_scheduler() -> None:
    """Be a scheduler, and tell where it is."""
    _be_child()
    server = partial(distributed.Scheduler, host="127.0.0.1", dashboard_address=":0")
    asyncio.run(_serve(server))


async def _serve(make: Callable[[], Any]) -> None:
    loop = asyncio.get_running_loop()
    leaving: list[asyncio.Task[Any]] = []
    async with make() as server:
        if os.name == "posix":
            loop.add_signal_handler(
                signal.SIGTERM, lambda: leaving.append(loop.create_task(server.close()))
            )
        if isinstance(server, distributed.Scheduler):
            os.write(1, f"{server.address}\n".encode())
        await server.finished()


def _be_child() -> None:
    """Keep quiet, and end with the parent, who sends nothing more by the input."""
    # What is worth knowing is told to the pool.
    logging.getLogger("distributed").handlers[:] = [logging.NullHandler()]
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    die_with(lifeline)
