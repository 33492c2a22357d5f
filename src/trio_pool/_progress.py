"""What is asked for by ``progress=``; how it is drawn, `trio_pool.progress` knows."""

from collections.abc import Callable, Sized
from contextlib import AbstractAsyncContextManager, nullcontext
from importlib import import_module
from typing import Any, Protocol, TypeAlias

from ._checks import refuse


class Progress(Protocol):
    """What can show how far many jobs are; the bars are in `trio_pool.progress`.

    Its methods are called on the pool's thread, ten times a second, and should
    be short. One that raises is logged, and the jobs go on without it.
    """

    def start(self, total: int | None) -> None:
        """Begin; ``total`` jobs are to come, None if nobody knows."""

    def draw(self, done: int, failed: int) -> None:
        """Show how many have ended: by a result, and otherwise."""

    def close(self) -> None:
        """End; what was drawn last is how it ended."""


AnyProgress: TypeAlias = bool | str | Progress
"""False for none, True or a label for what suits the terminal, or an own one."""

Counts: TypeAlias = Callable[[], tuple[int, int]]
"""Tells how many jobs are done, and how many have ended otherwise."""


def check_progress(progress: object) -> None:
    """Refuse what cannot show anything."""
    if isinstance(progress, (bool, str)):
        return
    methods = (getattr(progress, name, None) for name in ("start", "draw", "close"))
    if isinstance(progress, type) or not all(map(callable, methods)):
        expected = "True, False, a label, or a Progress with start, draw and close"
        raise TypeError(refuse("progress", progress, expected))


def show(
    progress: AnyProgress, items: object, counts: Counts
) -> AbstractAsyncContextManager[Any]:
    """Draw, while the block runs, how many of the items have ended."""
    if progress is False:
        return nullcontext()
    total = len(items) if isinstance(items, Sized) else None
    # It is no part of the core, and most programs never need it.
    drawing = import_module(".progress", __package__)
    return drawing.show_progress(progress, counts, total)  # type: ignore[no-any-return]
