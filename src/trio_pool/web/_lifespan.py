"""Answers a server that starts and stops, for another app where that does not."""

import logging
from typing import final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("trio_pool.web")


async def live(receive: Receive, send: Send) -> None:
    """Start and stop with the server, which asks for it."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


@final
class Life:
    """The start and the stop of another app, which need not care for them."""

    def __init__(self, other: ASGIApp) -> None:
        self._other = other
        self._asked: list[str] = []
        self._answered: set[str] = set()
        self._refusal: BaseException | None = None
        self.failed = False
        """Whether the app has said that it could not start, or not stop."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as ASGI has it; go on alone when the app has ended early.

        What the app raises is logged, unless it has said that it failed.
        """

        async def receive_for_it() -> Message:
            message = await receive()
            self._asked.append(message["type"])
            return message

        async def send_for_it(message: Message) -> None:
            kind, _, outcome = message["type"].rpartition(".")
            self._answered.add(kind)
            self.failed = self.failed or outcome == "failed"
            try:
                await send(message)
            except BaseException as error:
                self._refusal = error
                raise

        try:
            await self._other(scope, receive_for_it, send_for_it)
        except Exception as error:
            if self.failed:
                raise
            self._tell(error)
        if not self.failed:
            await self._go_on(receive, send)
        elif self._refusal is not None:
            # The server ends by it, even if the app has kept it to itself.
            raise self._refusal

    def _tell(self, error: Exception) -> None:
        if "lifespan.startup" in self._answered:
            log.error("app= ended before it was told to stop", exc_info=error)
        else:
            # That is how an app says that it neither starts nor stops.
            log.info("app= goes without a lifespan: it raised %r", error)

    async def _go_on(self, receive: Receive, send: Send) -> None:
        for kind in self._asked:
            if kind not in self._answered:
                await send({"type": f"{kind}.complete"})
        if "lifespan.shutdown" not in self._asked:
            await live(receive, send)
