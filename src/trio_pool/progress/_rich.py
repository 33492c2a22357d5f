"""The bar of rich."""

import sys
from typing import TextIO, final

from rich import console, progress

from ._pace import takes_more


@final
class RichBar:
    """A bar of rich, drawn without the thread that rich would start."""

    def __init__(self, label: str = "", *, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[failed]}"),
            progress.TimeRemainingColumn(),
            console=console.Console(file=self._file),
            auto_refresh=False,
        )
        self._task = self._bar.add_task(label, start=False, failed="")

    def start(self, total: int | None) -> None:
        """Begin a bar; rich takes over the terminal until it is closed."""
        self._bar.start()
        self._bar.update(self._task, total=total)
        self._bar.start_task(self._task)

    def draw(self, done: int, failed: int) -> None:
        """Draw the bar, if that holds up nobody."""
        told = f"{failed:,} failed" if failed else ""
        self._bar.update(self._task, completed=done + failed, failed=told)
        if takes_more(self._file):
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is, and the terminal to others."""
        self._bar.stop()
