"""A cluster of Dask that is there already, and goes on when a pool has ended."""

from __future__ import annotations

import os
import pickle
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, final

import attrs
import distributed
import trio

from .._checks import refuse
from .._events import log
from ._bridge import wait_future
from ._dask_actor import (
    DYING,
    KNOCKING,
    LEAVING,
    LOOK,
    Lost,
    close_client,
    connect_client,
    workers_of,
)
from ._errors import EngineError
from ._remote import await_one

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from concurrent.futures import Future

    from ._dask_actor import Loop


@asynccontextmanager
async def open_others(
    address: str, timeout: float, kills: bool, loop: Loop
) -> AsyncGenerator[Others, None]:
    wanted = "the address of a Dask scheduler, such as 'tcp://127.0.0.1:8786'"
    wrong = refuse("address", address, wanted)
    try:
        client = await loop.run(connect_client(address, timeout))
    except ValueError as error:
        raise ValueError(f"{wrong}: {error}") from error
    except (OSError, ImportError) as error:
        when = f"within connect_timeout={timeout:g} seconds"
        raise EngineError(f"{wrong}; none has answered {when}") from error
    try:
        yield Others(loop, client, address, timeout, kills)
    finally:
        with trio.move_on_after(LEAVING, shield=True):
            await loop.run(close_client(client))


@final
@attrs.define(eq=False)
class Others:
    """A cluster that was there before, and stays."""

    loop: Loop
    client: Any
    address: str
    timeout: float
    kills: bool
    _taken: set[str] = attrs.field(factory=set[str], init=False)
    _guests: int = attrs.field(default=0, init=False)
    _left: list[_Guest] = attrs.field(factory=list["_Guest"], init=False)

    @asynccontextmanager
    async def place(self) -> AsyncGenerator[_Guest, None]:
        """Have a process that no other worker of this pool has."""
        left = await await_one(self._left, _Guest.end_of_left)
        if left is not None:
            self._taken.discard(left.address)
        self._guests += 1
        try:
            guest = await self._find()
            try:
                yield guest
            finally:
                if guest.left is None:
                    self._taken.discard(guest.address)
                else:
                    self._left.append(guest)
        finally:
            self._guests -= 1

    async def _find(self) -> _Guest:
        workers: dict[str, Any] | None = None
        with trio.move_on_after(self.timeout):
            while True:
                workers = await self.loop.run(workers_of(self.client))
                for address, facts in workers.items():
                    if address not in self._taken:
                        self._taken.add(address)
                        return _Guest(self, self.client, address, facts["nanny"])
                await trio.sleep(LOOK)
        if workers is None:
            at = f"the Dask scheduler at {self.address} has not answered"
            raise EngineError(f"{at} within connect_timeout={self.timeout:g} seconds")
        most = f"at most the number of workers at {self.address}, which is"
        raise ValueError(refuse("size", self._guests, f"{most} {len(workers)}"))


async def _end_of(call: Future[Any]) -> None:
    with suppress(Lost):
        await wait_future(call, abandon_on_cancel=True, may_cancel=False)


@final
@attrs.define(eq=False)
class _Guest:
    """A place in a process of a cluster of others."""

    _cluster: Others
    client: Any
    address: str
    _nanny: str | None
    left: Future[Any] | None = attrs.field(default=None, init=False)

    def is_alive(self) -> bool:
        """Say that nothing is known of its end."""
        return True

    async def end(self, call: Future[Any]) -> bool:
        """Kill the process, if that may be; else leave the call running."""
        if self._cluster.kills:
            with trio.move_on_after(DYING, shield=True):
                with suppress(OSError):
                    await self._cluster.loop.run(self._kill())
                await _end_of(call)
            if not call.done():
                log.warning("the Dask worker at %s could not be killed", self.address)
        if not call.done():
            self.left = call
        return call.done()

    async def end_of_left(self) -> None:
        """Wait for the end of a call that was left running."""
        assert self.left is not None
        await _end_of(self.left)

    async def _kill(self) -> None:
        args = self.client.connection_args
        at = self._nanny or self.address
        async with distributed.rpc(at, timeout=KNOCKING, connection_args=args) as rpc:
            if self._nanny:
                # It works where a job holds the interpreter's lock, too.
                await rpc.kill(timeout=0.2)
            else:
                await rpc.run(function=pickle.dumps(os._exit), args=pickle.dumps((1,)))

    async def obituary(self, when: str, error: Exception) -> str:
        """Say how the process was lost."""
        return f"the Dask worker at {self.address} was lost while it {when}: {error}"
