"""The plugins of a pool: entered before its workers, left after them."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
from trio.lowlevel import disable_ki_protection

from ._config import PoolConfig, plugin_name
from ._events import log

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from types import TracebackType


class _Plugin:
    """One plugin, whose failure to stop hides no other error."""

    def __init__(self, plugin: Any, name: str) -> None:
        self._plugin = plugin
        self._name = name

    @disable_ki_protection
    async def __aenter__(self) -> Any:
        given = await self._plugin.__aenter__()
        return self._plugin if given is None else given

    @disable_ki_protection
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            return await self._plugin.__aexit__(kind, error, traceback)  # type: ignore[no-any-return]
        except Exception as failure:
            if error is None or _is_around(failure, error):
                raise
            log.error("plugin %s failed to stop", self._name, exc_info=failure)
            return None


def _is_around(failure: BaseException, error: BaseException) -> bool:
    """Say whether a plugin raises the error of the block, be it in a group."""
    if isinstance(failure, BaseExceptionGroup):
        return any(_is_around(part, error) for part in failure.exceptions)
    return failure is error


@asynccontextmanager
async def open_plugins(
    config: PoolConfig,
) -> AsyncGenerator[tuple[PoolConfig, dict[str, Any]], None]:
    """Enter every plugin; give the config with what they bring, and them by name."""
    found: dict[str, Any] = {}
    hooks, middleware = list(config.hooks), list(config.middleware)
    async with AsyncExitStack() as stack:
        for plugin in config.plugins:
            name = plugin_name(plugin)
            given = await stack.enter_async_context(_Plugin(plugin, name))
            found[name] = given
            hooks.extend(getattr(plugin, "hooks", ()))
            middleware.extend(getattr(plugin, "middleware", ()))
        yield attrs.evolve(config, hooks=hooks, middleware=middleware), found
