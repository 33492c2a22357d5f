"""An actor of Dask, and the thread of the client that calls it."""

from __future__ import annotations

import asyncio
import pickle
import platform
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, final
from uuid import uuid4

import cloudpickle
import distributed
import trio

from ._bridge import wait_future
from ._errors import EngineError
from ._remote import by_value

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from types import ModuleType

    from ._shim import Report

T = TypeVar("T")

# Seconds that a process of our own gets to start, to leave, and to be dead.
STARTING = 60.0
LEAVING = 5.0
DYING = 10.0
# Seconds that a worker gets to accept a connection; of one that is dead the
# scheduler may not have heard yet.
KNOCKING = 2.0
# Seconds between two looks at the workers of a cluster.
LOOK = 0.05


class Place(Protocol):
    """A process that an actor can be in."""

    @property
    def client(self) -> Any: ...

    @property
    def address(self) -> str: ...

    def is_alive(self) -> bool:
        """Say whether the process is there, as far as can be seen from here."""
        ...

    async def end(self, call: Future[Any]) -> bool:
        """Be over with a call that runs there; return whether that could be done."""
        ...

    async def obituary(self, when: str, error: Exception) -> str:
        """Say how the process was lost."""
        ...


@contextmanager
def deadline(seconds: float, what: str) -> Generator[None, None, None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as error:
        raise EngineError(f"{what} within {seconds:g} seconds") from error


def packed_with(thing: Any, *modules: ModuleType) -> bytes:
    """Pickle a thing with the modules that it is of."""
    with by_value(cloudpickle, *modules):
        packed: bytes = cloudpickle.dumps(thing)
    return packed


@final
class Loop:
    """A thread with an asyncio loop, as a client of Dask has to have."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._ended: Future[None] = Future()
        threading.Thread(target=self._live, name="trio_pool.dask", daemon=True).start()

    def _live(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._wait())
        finally:
            self._ended.set_result(None)

    async def _wait(self) -> None:
        await self._stopped.wait()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin to run a coroutine; cancelling the future ends it later."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine."""
        return await wait_future(self.submit(coroutine))

    def call_soon(self, fn: Callable[[], object]) -> None:
        """Have a function called in the thread."""
        self._loop.call_soon_threadsafe(fn)

    async def stop(self) -> None:
        """Cancel what runs in the thread, and wait for its end."""
        self.call_soon(self._stopped.set)
        await wait_future(self._ended, abandon_on_cancel=True, may_cancel=False)


async def connect_client(address: str, timeout: float) -> Any:
    client: Any = distributed.Client(
        address, asynchronous=True, set_as_default=False, timeout=timeout
    )
    try:
        async with asyncio.timeout(timeout):
            return await client
    except BaseException:
        await client.close()
        raise


async def close_client(client: Any) -> None:
    await client.close()


async def workers_of(client: Any) -> dict[str, Any]:
    """Return what the scheduler knows of the workers that take jobs."""
    try:
        known = await client.scheduler.identity(n_workers=-1)
    except (OSError, AttributeError) as error:
        # A client that has given up has no scheduler any more.
        text = "the connection to the Dask scheduler is lost"
        raise EngineError(text) from error
    workers: dict[str, Any] = known["workers"]
    return {at: facts for at, facts in workers.items() if facts["status"] == "running"}


@final
class Lost(Exception):
    """The connection to a process is lost, or the actor in it."""

    def __init__(self, text: str, started: bool) -> None:
        super().__init__(text)
        self.started = started


@final
class Actor:
    """A host in a process of Dask, and a connection to that process.

    Dask's own handle of an actor looks for a connection at each call: to a process
    that has just died it tries for half a minute, and it may send a call again.
    Here one is made, once, and read all the time: of its loss is heard at once,
    and what was not sent by then has not been run.
    """

    def __init__(self, client: Any, address: str) -> None:
        self.key = f"trio_pool-{uuid4().hex}"
        self._client = client
        self._address = address
        self._comm: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[Any] | None = None
        self._created: Any = None

    async def connect(self) -> str:
        """Connect to the process; return its version of Python."""
        connect: Any = distributed.connect
        self._comm = await connect(
            self._address, timeout=KNOCKING, **self._client.connection_args
        )
        self._reader = asyncio.create_task(self._read())
        asked = pickle.dumps(platform.python_version)
        version: str = await self._ask("run", function=asked)
        return version

    async def create(self, host: bytes) -> None:
        """Have the scheduler put the host there."""
        assert self._reader is not None
        self._created = self._client.submit(
            pickle.loads,
            host,
            key=self.key,
            workers=[self._address],
            allow_other_workers=False,
            actor=True,
            pure=False,
        )
        created = asyncio.ensure_future(self._created.exception())
        try:
            await asyncio.wait(
                {created, self._reader}, return_when=asyncio.FIRST_COMPLETED
            )
            if self._created.status == "error":
                raise await created
            if self._created.status != "finished":
                raise Lost("the connection was closed", started=False)
        finally:
            created.cancel()

    async def run(self, number: int, items: list[bytes]) -> Report:
        """Have the host run items."""
        report: Report | None = await self.execute("run", self.key, number, items)
        if report is None:
            raise Lost("the actor has refused the call", started=True)
        return report

    async def execute(self, method: str, *args: Any) -> Any:
        """Call a method of the host."""
        return await self._ask(
            "actor_execute", actor=self.key, function=method, args=args, kwargs={}
        )

    async def _ask(self, op: str, **message: Any) -> Any:
        if self._reader is None or self._reader.done():
            raise Lost("the connection was closed", started=False)
        answer = self._answer = asyncio.get_running_loop().create_future()
        try:
            await self._comm.write({"op": op, "reply": True, **message})
        except OSError as error:
            raise Lost(f"{error}", started=True) from error
        reply = await answer
        if reply["status"] != "OK":
            # What the host itself raises is no job's error; anything else comes of
            # there being no such actor any more.
            is_there = reply["status"] == "error"
            raise Lost(f"the actor is gone: {reply['exception']!r}", started=is_there)
        return reply["result"]

    async def _read(self) -> None:
        reason = "the connection was closed"
        try:
            while True:
                reply = await self._comm.read()
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(reply)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        finally:
            self._comm.abort()
            if self._answer is not None and not self._answer.done():
                self._answer.set_exception(Lost(reason, started=True))

    def close(self) -> None:
        """Have the cluster forget the actor, and hang up."""
        if self._created is not None:
            self._created.release()
        if self._reader is not None:
            self._reader.cancel()
