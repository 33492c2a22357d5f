"""What a bar says, in words, and whether the terminal takes it now."""

import select
from typing import TextIO, final

import trio


def is_terminal(file: TextIO | None) -> bool:
    """Say whether somebody may be looking."""
    return file is not None and not file.closed and file.isatty()


def takes_more(file: TextIO) -> bool:
    """Say whether a line can be written without waiting.

    A terminal that is stopped, by Ctrl-S or by a slow connection, would hold up
    the whole loop.
    """
    try:
        return bool(select.select([], [file], [], 0)[1])
    except (OSError, ValueError):
        # Nothing that can be asked: a file on Windows, or one in memory.
        return True


@final
class Pace:
    """How fast jobs end: what is left, in seconds."""

    def __init__(self) -> None:
        self._since = trio.current_time()

    def sentence(self, done: int, failed: int, total: int | None) -> str:
        """Tell the figures in words."""
        ended = done + failed
        spent = trio.current_time() - self._since
        rate = ended / spent if spent > 0 else 0.0
        parts = [f"{ended:,}" if total is None else f"{ended:,} of {total:,}"]
        if failed:
            parts.append(f"{failed:,} failed")
        if rate:
            parts.append(f"{rate:,.1f} a second")
            if total is not None and total > ended:
                parts.append(f"{_clock((total - ended) / rate)} left")
        return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
