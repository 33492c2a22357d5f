"""Draws pictures over each other on a whole terminal, by rich."""

from __future__ import annotations

import sys
from typing import Self, final

from rich import console, live, text

from ..progress._pace import takes_more
from ..web._picture import Picture
from ._glance import Line, fit

_STYLES = {
    "green": "bold green",
    "amber": "bold yellow",
    "red": "bold red",
    "off": "dim",
    "head": "bold",
    "faint": "dim",
}


@final
class Screen:
    """The terminal, for as long as the block runs; then it is as it was before."""

    def __init__(self) -> None:
        self._console = console.Console(file=sys.stdout, highlight=False)
        # Without the thread that rich would start.
        self._live = live.Live(
            console=self._console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, title: str, picture: Picture, trouble: str | None) -> None:
        """Draw a picture, unless the terminal takes nothing now, as after Ctrl-S."""
        if not takes_more(sys.stdout):
            return
        head: Line = ((title, "head"), (f"  {trouble}" if trouble else "", "red"))
        lines = [head, *fit(picture, self._console.height - 1)]
        drawn = text.Text(no_wrap=True, overflow="ellipsis", end="")
        drawn.append_text(text.Text("\n").join(map(self._style, lines)))
        self._live.update(drawn, refresh=True)

    def _style(self, line: Line) -> text.Text:
        encoding = self._console.encoding
        pieces = (
            # A terminal may know fewer letters than there are.
            (piece.encode(encoding, "replace").decode(encoding), _STYLES.get(look, ""))
            for piece, look in line
        )
        return text.Text.assemble(*pieces)
