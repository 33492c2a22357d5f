"""The command ``trio-pool top``: how the pools of a dashboard are doing, live."""

from __future__ import annotations

import argparse
import math
import os
import sys
from contextlib import AbstractContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, Self, final

import trio

from ._dashboard import Dashboard, NoPicture
from ._ends import DONE, FAILURES, CommandEnd, Refused
from ._files import Target
from ._glance import picture_lines, plain
from ._signals import heed_signals

if TYPE_CHECKING:
    from argparse import _SubParsersAction  # pyright: ignore[reportPrivateUsage]

    from ..web._picture import Picture

_DESCRIPTION = """\
Show in the terminal how the pools of a dashboard are doing, as its page does. It
is drawn anew until Ctrl-C, by rich, which `pip install trio-pool[rich]` brings;
without that, or if the output is no terminal, each picture is written as lines. While
the server is gone the last picture stays, and it is tried again."""

_EPILOG = """\
exit codes:
  0    with --once: no pool is red
  1    with --once: one is
  2    there is no such dashboard, or it is none, or an option is not right
  130, 143   ended by Ctrl-C, by SIGTERM
  141  nobody reads the output any more, as after `| head`"""

_DEFAULT = "http://127.0.0.1:8765"


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add_parser(
        "top",
        help="watch the pools of a dashboard in the terminal",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "url",
        metavar="URL",
        nargs="?",
        default=_DEFAULT,
        help=f"of the dashboard; default: {_DEFAULT}",
    )
    parser.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="SECONDS",
        help="from one picture to the next; default: 1",
    )
    parser.add_argument("--once", action="store_true", help="one picture, as lines")


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds <= 86_400:
        expected = "a number of seconds, from 0.1 to 86400"
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
    return seconds


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    try:
        return trio.run(_watch, options)
    except CommandEnd as end:
        if str(end):
            sys.stderr.write(f"trio-pool top: {end}\n")
        return end.code


async def _watch(options: argparse.Namespace) -> int:
    dashboard = Dashboard(options.url)
    code = DONE
    work = trio.CancelScope()
    with heed_signals(work) as heard:
        with work:
            picture = await _first_picture(dashboard)
            if options.once:
                code = _write_once(picture)
            else:
                await _keep_showing(dashboard, picture, options.interval)
        return code if heard.code is None else heard.code


async def _first_picture(dashboard: Dashboard) -> Picture:
    try:
        return await dashboard.look()
    except NoPicture as error:
        raise Refused(f"{dashboard.url}: {error}") from None


def _write_once(picture: Picture) -> int:
    _write(plain(picture_lines(picture)))
    return FAILURES if any(pool.light == "red" for pool in picture.pools) else DONE


async def _keep_showing(
    dashboard: Dashboard, picture: Picture, interval: float
) -> None:
    trouble: str | None = None
    with _open_display() as display:
        while True:
            display.show(f"trio-pool top {dashboard.url}", picture, trouble)
            await trio.sleep(interval)
            try:
                picture = await dashboard.look()
                trouble = None
            except NoPicture as error:
                trouble = f"connection lost, it is tried again: {error}"


class _Display(AbstractContextManager["_Display"], Protocol):
    def show(self, title: str, picture: Picture, trouble: str | None) -> None:
        """Show a picture, which is the last one there was if there is trouble."""


@final
class _Lines:
    """Writes each picture, and once that there is none."""

    def __init__(self) -> None:
        self._trouble: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, title: str, picture: Picture, trouble: str | None) -> None:
        """Write a picture, or a line if there is new trouble."""
        if trouble is None:
            _write(plain([*picture_lines(picture), ()]))
        elif trouble != self._trouble:
            _write(f"{trouble}\n\n")
        self._trouble = trouble


def _open_display() -> _Display:
    terminal = sys.stdout is not None and sys.stdout.isatty()  # pyright: ignore[reportUnnecessaryComparison]
    if not terminal or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return _Lines()
    try:
        screen: _Display = import_module("._screen", __package__).Screen()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("trio_pool"):
            raise
        return _Lines()
    return screen


def _write(text: str) -> None:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    Target("standard output", 1).write(text.encode(encoding, "replace"))
