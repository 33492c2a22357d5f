"""Serves connections, none of which ends another, or what serves them all."""

import logging
from typing import Any, final

import trio
from hypercorn.config import Config
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState

log = logging.getLogger("trio_pool.web")


@final
class Connections:
    """Answers each connection that is accepted."""

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        state: dict[str, Any],
        limit: int | None,
    ) -> None:
        self._app = app
        self._config = config
        self._context = WorkerContext(None)
        self._state = state
        self._limit = limit
        self._open = 0

    async def stop(self) -> None:
        """Have each connection end after the request that it is about."""
        await self._context.terminated.set()

    async def answer(self, stream: trio.SocketStream) -> None:
        """Answer a connection; with a limit by HTTP/1 alone, or not at all if full.

        Cancellation ends it. What else ends it, such as bytes that Hypercorn
        stumbles over, is the affair of who sent them.
        """
        if self._limit is not None and self._open >= self._limit:
            await trio.aclose_forcefully(stream)
            return
        self._open += 1
        try:
            await self._serve(stream)
        except* Exception as errors:
            log.debug("a connection has failed", exc_info=errors)
        finally:
            self._open -= 1
            await trio.aclose_forcefully(stream)

    async def _serve(self, stream: trio.SocketStream) -> None:
        kind = TCPServer if self._limit is None else _PlainServer
        state = ConnectionState(self._state.copy())
        # It calls a socket a stream of TLS, and takes both.
        await kind(self._app, self._config, self._context, state, stream).run()  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class _PlainServer(TCPServer):
    """Speaks HTTP/1 alone, whatever else it is offered.

    A connection of HTTP/2 that asks for nothing is never closed by Hypercorn.
    """

    @property  # type: ignore[override]
    def protocol(self) -> "_PlainProtocol":
        return self._protocol

    @protocol.setter
    def protocol(self, wrapper: ProtocolWrapper) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        # Not the wrapper, which would change to HTTP/2.
        self._protocol = _PlainProtocol(
            wrapper.app,
            wrapper.config,
            wrapper.context,
            wrapper.task_group,
            wrapper.state,
            wrapper.ssl,
            wrapper.client,
            wrapper.server,
            wrapper.send,
        )


class _PlainProtocol(H11Protocol):
    async def _check_protocol(self, event: object) -> None:
        """Look for no other protocol."""
