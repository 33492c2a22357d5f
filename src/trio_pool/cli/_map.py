"""The command ``trio-pool map``: its options, and what is refused before it runs."""

from __future__ import annotations

import argparse
import math
import os
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import trio

from .. import PoolBroken
from ._ends import BROKEN, SIGNALLED, CommandEnd, Refused
from ._files import Named
from ._map_run import Plan, map_lines
from ._roles import name_files
from ._streams import Streams, hold_streams, say
from ._target import compile_key, find_function

if TYPE_CHECKING:
    from argparse import _SubParsersAction  # pyright: ignore[reportPrivateUsage]

    from ._journal import Settings

_DESCRIPTION = """\
Call a function for each line of the input, several at a time, and write a line
of JSON for each: {"index": 0, "input": ..., "result": ...}. The index is the
number of the line, from 0.

An async function is run on the event loop, any other in threads; a thread that
runs when its line is out of time, or when the command is stopped, is left behind.
If for a long time such threads hold all workers, the command ends with exit code 3.
The current directory can be imported from. While the input is standard input, the
function and what it starts find that empty; while the output is standard output,
what they print goes to standard error."""

_EPILOG = """\
lines:
  Text: each line is an item, an empty one too, without its line end. The last line
  needs none. With --json a line is any JSON, and one of nothing but blanks is passed
  over; each attempt has the item as it came. A line that is not JSON or not UTF-8,
  and a result for which there is no JSON, is a failure of that line. All are kept in
  UTF-8.

failures:
  {"index", "input", "error", "started", "attempts"}, to --failures or to standard
  error. "started" says whether the function was called for the line at all.

files:
  What was in --output and --failures is overwritten, unless the journal says that it
  is of this run. Function, input and options are looked at before that. No file may
  have two of the roles, also as standard input or output, or be written by two runs.

journal:
  A run that was ended in any way, by kill -9 too, is started again by the same
  command, and goes on: in the end each line has one answer in the output or in the
  failures. Lines that were running, or answered in the last half second, or, without
  --unordered, answered while one before them was not, are run again. An output that
  is gone or has changed is refused, after the end of the run too. --workers and
  --rate may change; the options that decide on answers may not, nor may the part of
  the input that was read. Failures on standard error are told again if the run was
  killed before it could note them.

signals:
  Ctrl-C or SIGTERM stops reading, cancels what runs, writes what is answered and
  commits the journal; the second one ends the command at once. With a journal, and
  without --unordered, answers that wait for a line before them are not written.

exit codes:
  0    all lines are done
  1    some failed
  2    refused: an option, the function, the input or the journal; nothing was changed
  3    the run could not go on: a file cannot be read or written, too many workers
       broke or are held by threads, or what nobody foresaw; with a journal it can be
       started again
  130, 143   ended by Ctrl-C, by SIGTERM
  141  nobody reads the output any more, as after `| head`"""


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add_parser(
        "map",
        help="run a function of yours for each line of a file",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("function", metavar="module:function", help="what is called with each item")
    add("--input", default="-", metavar="FILE", help="default: -, standard input")
    add("--output", default="-", metavar="FILE", help="default: -, standard output")
    add("--failures", metavar="FILE", help="default: standard error")
    add("--json", action="store_true", help="lines are JSON; default: text")
    add("--unordered", action="store_true", help="write answers as they come")
    add(
        "--workers",
        type=_whole(1),
        default=8,
        metavar="N",
        help="how many run at a time; default: 8",
    )
    add("--rate", type=_positive, metavar="R", help="starts per second")
    add(
        "--retries",
        type=_whole(0),
        default=0,
        metavar="N",
        help="more attempts for a line that fails; default: 0",
    )
    add(
        "--timeout",
        type=_positive,
        metavar="S",
        help="seconds that an attempt may take",
    )
    add(
        "--key",
        metavar="EXPR",
        help="a Python expression over `item`, which is evaluated: items of the same "
        "key run one at a time and in order; None is no key",
    )
    add("--journal", metavar="FILE", help="with it a run that was killed can go on")
    add("--progress", action="store_true", help="show it on standard error")
    add(
        "--dashboard",
        metavar="ADDR",
        help="serve a live page at host:port; needs trio-pool[web]",
    )


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            expected = f"a whole number, {least} or more"
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
        return number

    return parse


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    # A rate of next to nothing would have a time between two starts that is none.
    if not 1e-9 <= number <= 1e9:
        expected = "a number above 0, from 1e-9 to 1e9"
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
    return number


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    try:
        return _run(options)
    except BaseException as error:
        return _conclude(error)


def _conclude(error: BaseException) -> int:
    """Tell why the command ends, and return the exit code for it."""
    causes = list(_single_out(error))
    if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
        return SIGNALLED + 2
    known = [cause for cause in causes if isinstance(cause, (CommandEnd, PoolBroken))]
    if len(known) < len(causes):
        trace = "".join(traceback.format_exception(error)).rstrip()
        say(f"an error that was not foreseen\n{trace}")
        return BROKEN
    if str(known[0]):
        say(str(known[0]))
    return known[0].code if isinstance(known[0], CommandEnd) else BROKEN


def _single_out(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _single_out(one)
    else:
        yield error


def _run(options: argparse.Namespace) -> int:
    # What is imported may go to another directory, read the input, or print.
    files = name_files(options.input, options.output, options.failures, options.journal)
    takes_output = files.output.path == "-"
    with (
        hold_streams(
            takes_input=files.input.path == "-", takes_output=takes_output
        ) as streams,
        redirect_stdout(sys.stderr if takes_output else sys.stdout),
    ):
        function = find_function(options.function)
        key_of = None if options.key is None else compile_key(options.key)
        with _open_input(files.input, streams) as fd:
            settings = _settings(options)
            plan = Plan(options, files, function, key_of, fd, streams.output, settings)
            return trio.run(map_lines, plan)


def _settings(options: argparse.Namespace) -> Settings:
    names = ("function", "json", "unordered", "key", "retries", "timeout")
    settings: dict[str, Any] = {
        name if name == "function" else f"--{name}": getattr(options, name)
        for name in names
    }
    told = "standard error" if options.failures is None else "a file"
    return settings | {"--failures": told}


@contextmanager
def _open_input(file: Named, streams: Streams) -> Generator[int, None, None]:
    if file.path == "-":
        yield streams.input
        return
    try:
        if os.path.isdir(file.path):
            raise IsADirectoryError(21, os.strerror(21))
        fd = os.open(file.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise Refused(f"cannot open {file}: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)
