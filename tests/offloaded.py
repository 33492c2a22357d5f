"""What runs off the thread in tests: jobs that leave traces, and the engines."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import outcome
import trio

from trio_pool import offload
from trio_pool.offload._remote import Handler


class Item(NamedTuple):
    """The input of a job: what to do, and where to leave traces."""

    act: str
    arg: Any = None
    number: int = 0
    traces: str = ""


def trace(item: Item, what: str) -> None:
    """Write a line down, which is whole whoever writes beside."""
    if item.traces:
        file = os.open(item.traces, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{what} {item.number} {os.getpid()}\n".encode())
        os.close(file)


class StubbornError(Exception):
    """Can be pickled, and never be made again."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


class LoadedError(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("loaded")
        self.lock = threading.Lock()


class Unreadable:
    """Can be sent, and not be read."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise ValueError("cannot be read")


def burn(item: Item) -> None:
    """Keep a core busy for so many seconds, and tell of it."""
    end = time.monotonic() + item.arg
    while time.monotonic() < end:
        trace(item, "beat")
        until = time.monotonic() + 0.01
        while time.monotonic() < until:
            pass


def act(item: Item) -> Any:
    """Do what the item says."""
    trace(item, "start")
    result = ACTS[item.act](item)
    trace(item, "end")
    return result


def _with_child(item: Item) -> None:
    child = subprocess.Popen(["sleep", "60"])
    trace(item._replace(number=child.pid), "child")
    burn(item)


def _raise(error: BaseException) -> None:
    raise error


ACTS: dict[str, Callable[[Item], Any]] = {
    "echo": lambda item: item.arg,
    "pid": lambda _: os.getpid(),
    "burn": burn,
    "sleep": lambda item: time.sleep(item.arg),
    # In one call, which never lets go of the interpreter.
    "hold": lambda item: sum(range(item.arg)),
    "child": _with_child,
    "fail": lambda item: _raise(LookupError(item.arg)),
    "exit": lambda item: sys.exit(item.arg),
    "interrupt": lambda _: _raise(KeyboardInterrupt()),
    "die": lambda item: os._exit(item.arg),
    "odd result": lambda _: threading.Lock(),
    "odd error": lambda _: _raise(LoadedError()),
    "stubborn error": lambda _: _raise(StubbornError("a", "b")),
    "unreadable": lambda _: Unreadable(),
    "size": lambda item: len(item.arg),
}


class State:
    """What a process has set up, and what its jobs have made of it."""

    def __init__(self) -> None:
        self.jobs = 0


def act_with_state(state: State, item: Item) -> Any:
    """Count the job, and do what the item says."""
    state.jobs += 1
    if item.act == "state":
        return os.getpid(), state.jobs
    return act(item)


@attrs.frozen
class Traces:
    """What jobs have left in a file."""

    path: Path

    def lines(self) -> list[tuple[str, int, int]]:
        """Read all of it: what, which job, which process."""
        if not self.path.exists():
            return []
        lines = [line.split() for line in self.path.read_text().splitlines()]
        return [(what, int(number), int(pid)) for what, number, pid in lines]

    def starts(self) -> Counter[int]:
        """Count how often each job has started."""
        return Counter(number for what, number, _ in self.lines() if what == "start")

    def pid_of(self, number: int) -> int | None:
        """Say which process a job has started in."""
        for what, job, pid in self.lines():
            if what == "start" and job == number:
                return pid
        return None

    def children(self) -> list[int]:
        """Name the processes that jobs have started."""
        return [number for what, number, _ in self.lines() if what == "child"]


def is_gone(pid: int) -> bool:
    """Say whether there is no such process, or nothing but its record."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"


def spawning() -> Executor:
    """Make an executor with two processes."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(2, mp_context=context)


def threads() -> Executor:
    """Make an executor with two threads."""
    return ThreadPoolExecutor(2)


def _in_process(fn: Any, **options: Any) -> Any:
    return offload.in_process(fn, **options)


def _in_thread(fn: Any, **options: Any) -> Any:
    return offload.in_thread(fn, **options)


def _on_threads(fn: Any, **options: Any) -> Any:
    return offload.on_executor(threads, fn, **options)


def _on_processes(fn: Any, **options: Any) -> Any:
    return offload.on_executor(spawning, fn, **options)


def _on_dask(fn: Any, **options: Any) -> Any:
    return offload.on_dask(fn, **options)


def _on_ray(fn: Any, **options: Any) -> Any:
    return offload.on_ray(fn, **options)


def _needs(*modules: str) -> str:
    missing = [module for module in modules if find_spec(module) is None]
    return f"{', '.join(missing)} is not installed" if missing else ""


def _needs_dask() -> str:
    if os.environ.get("TRIO_POOL_WITHOUT_DASK"):
        return "Dask takes minutes: it is tried by `python3 noxfile.py dask`"
    return _needs("distributed", "cloudpickle", "tblib")


def _needs_ray() -> str:
    others = {name for _, name in socket.if_nameindex()} - {"lo"}
    if others and not _needs("ray"):
        return "Ray is started only where there is no network but lo: unshare -n"
    return _needs("ray")


@attrs.frozen
class Backend:
    """An engine, and what can be asked of it."""

    name: str
    worker: Callable[..., Any]
    stops: bool
    """A job that runs can be stopped."""
    crashes_alone: bool
    """A process that dies takes no other job than its own."""
    remote: bool = True
    """Jobs run in another process."""
    kills: int = 8
    """How many of its processes are killed in one go."""
    grace: float = 0.0
    """Seconds in which a process is gone after its job has been stopped."""
    missing: str = ""
    """Why it cannot be tried here."""


BACKENDS = [
    Backend("thread", _in_thread, False, False, remote=False),
    Backend("threads", _on_threads, False, False, remote=False),
    Backend("processes", _on_processes, False, False),
    Backend(
        "process",
        _in_process,
        True,
        True,
        missing=_needs("trio_parallel", "cloudpickle", "tblib"),
    ),
    Backend(
        "dask",
        _on_dask,
        True,
        True,
        kills=4,
        missing=_needs_dask(),
    ),
    Backend("ray", _on_ray, True, True, kills=5, grace=1.0, missing=_needs_ray()),
]


async def until(claim: Callable[[], object], seconds: float = 20) -> None:
    """Wait until something is so, of which no task could tell."""
    with trio.fail_after(seconds):
        while not claim():  # noqa: ASYNC110 - it is another process's doing
            await trio.sleep(0.005)


def kill(pid: int | None) -> None:
    """Kill a process as the kernel would that runs out of memory."""
    assert pid is not None
    with suppress(ProcessLookupError):
        os.kill(pid, 9)


def _call(fn: Callable[..., object], *args: Any) -> None:
    fn(*args)


class Distant:
    """A stand-in for an other end: a handler whose values come in a callback.

    That is how they come from a thread. ``then`` is called with each in between:
    after its worker has been told of it, and before that is up.
    """

    spent = False

    def __init__(
        self,
        handler: Callable[[Any], Any],
        then: Callable[[Any], object] | None = None,
        is_last: bool = False,
    ) -> None:
        self._is_last = is_last
        self._handler = handler
        self._then = then

    async def one(self, job: Any, answer: Callable[[Any], object] | None) -> Any:
        value = await self._handler(job)
        task = trio.lowlevel.current_task()

        def wake() -> None:
            try:
                if answer is not None:
                    answer(value)
                if self._then is not None:
                    self._then(value)
            finally:
                # If not now, those that have been woken by this come first for sure.
                wait = token.run_sync_soon if self._is_last else _call
                wait(trio.lowlevel.reschedule, task)

        token = trio.lowlevel.current_trio_token()
        token.run_sync_soon(wake)
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        return value

    async def many(self, jobs: list[Any]) -> tuple[list[Any], float]:
        return [outcome.Value(await self._handler(job)) for job in jobs], 0.0

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[Handler]:
        """Be a worker with an other end of its own."""
        yield Handler(Distant(self._handler, self._then, self._is_last))
