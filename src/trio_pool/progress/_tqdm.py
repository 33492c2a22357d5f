"""The bar of tqdm."""

import sys
from typing import Any, TextIO, final

from tqdm import tqdm

from ._pace import takes_more


@final
class TqdmBar:
    """A bar of tqdm, without the thread that tqdm would start."""

    def __init__(self, label: str = "", *, file: TextIO | None = None) -> None:
        # The interval is that of the thread; a subclass leaves tqdm's own bars be.
        self._make: Any = type("Bar", (tqdm,), {"monitor_interval": 0})
        self._label = label
        self._file = file or sys.stderr
        self._bar: Any = None

    def start(self, total: int | None) -> None:
        """Begin a bar below those that are there."""
        # What is drawn is decided here and not by the time since the last.
        options = {"mininterval": 0, "miniters": 0, "dynamic_ncols": True}
        where = {"file": self._file, "delay": 1e-9}
        self._bar = self._make(total=total, desc=self._label, **options, **where)

    def draw(self, done: int, failed: int) -> None:
        """Draw the bar, if that holds up nobody."""
        self._bar.n = done + failed
        if failed:
            self._bar.set_postfix_str(f"{failed:,} failed", refresh=False)
        if takes_more(self._file):
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is."""
        if not takes_more(self._file):
            self._bar.disable = True
        self._bar.close()
