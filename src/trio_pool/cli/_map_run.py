"""A run of ``trio-pool map``: lines, pool, writer and journal, put together."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import (
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from importlib import import_module
from typing import Any, final

import attrs
import trio

from .. import PoolBroken, PoolConfig, Rate, Retry
from ._answers import Answers
from ._ends import DONE, FAILURES, Broken, Refused
from ._files import Target, open_target
from ._formats import parse_json, parse_text
from ._items import Items
from ._journal import Journal, Settings, State, open_journal
from ._lines import Lines
from ._signals import heed_signals
from ._work import ItemPool, answer_all, answer_by_key, open_item_pool
from ._writer import Writer, writing


@final
@attrs.frozen
class Plan:
    """What is to be run, once nothing is left to be refused without reading."""

    options: argparse.Namespace
    function: Callable[[Any], Any]
    key_of: Callable[[Any], Any] | None
    input_fd: int
    settings: Settings


async def map_lines(plan: Plan) -> int:
    """Answer all lines; return the exit code.

    Raises:
      CommandEnd: it ended before that.
    """
    work = trio.CancelScope()
    with heed_signals(work) as heard, _journal(plan) as journal:
        code = DONE
        with work:
            code = await _resume(plan, journal, work)
        if work.cancelled_caught and heard.code is not None:
            return heard.code
        return code


def _journal(plan: Plan) -> Journal | nullcontext[None]:
    path = plan.options.journal
    return nullcontext() if path is None else open_journal(path, plan.settings)


async def _resume(plan: Plan, journal: Journal | None, work: trio.CancelScope) -> int:
    options = plan.options
    state = State() if journal is None else journal.state
    name = "standard input" if options.input == "-" else f"--input {options.input!r}"
    lines = Lines(name, plan.input_fd, digest=journal is not None)
    answers = Answers(
        state.tally, ordered=not options.unordered, workers=options.workers
    )
    # Without a change to anything, as it may be another input.
    await lines.skip(state.input, state.tally.taken, set(state.tally.pending))
    answered = f"{answers.done:,} lines done, {answers.failed:,} failed"
    if state.finished:
        await lines.require_end()
        _say(f"--journal {options.journal!r} is of a run that has ended: {answered}")
    else:
        if state != State():
            _say(f"goes on after {answered}")
        await _run(plan, lines, answers, journal, work)
    return FAILURES if answers.failed else DONE


async def _run(
    plan: Plan,
    lines: Lines,
    answers: Answers,
    journal: Journal | None,
    work: trio.CancelScope,
) -> None:
    items = Items(
        lines,
        answers,
        parse_json if plan.options.json else parse_text,
        plan.key_of,
    )
    answer = answer_all if plan.key_of is None else answer_by_key
    try:
        async with _open_pool(plan, answers) as pool:
            with ExitStack() as files:
                output, failures = _open_files(plan.options, journal, files)
                writer = Writer(
                    answers, output, failures, journal, lambda: lines.position
                )
                async with writing(writer, answers, work):
                    await answer(pool, items, answers)
    except PoolBroken as error:
        raise Broken(str(error)) from error
    if not answers.is_complete():
        raise Broken("the pool has stopped, and some lines have no answer")


@asynccontextmanager
async def _open_pool(plan: Plan, answers: Answers) -> AsyncGenerator[ItemPool, None]:
    """Open the pool, and what shows how it is doing."""
    options = plan.options
    async with AsyncExitStack() as stack:
        # What it needs may not be installed.
        serve = _find_dashboard() if options.dashboard is not None else None
        config = _configure(options, answers)
        pool = await stack.enter_async_context(open_item_pool(plan.function, config))
        if serve is not None:
            try:
                dashboard = await stack.enter_async_context(
                    serve(pool, bind=options.dashboard)
                )
            except (OSError, ValueError) as error:
                raise Refused(f"--dashboard {options.dashboard!r}: {error}") from error
            _say(f"dashboard at {' '.join(dashboard.urls)}")
        if options.progress:
            stack.enter_context(_showing_log())
            show = import_module("...progress", __name__).show_progress
            await stack.enter_async_context(show(True, answers.counts, None))
        yield pool


@contextmanager
def _showing_log() -> Generator[None, None, None]:
    """Show the log in which progress is told where there is no terminal."""
    log, handler = logging.getLogger("trio_pool.progress"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("trio-pool map: %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


def _find_dashboard() -> Any:
    try:
        return import_module("...web", __name__).serve_dashboard
    except ImportError as error:
        raise Refused(f"--dashboard: {error}") from error


def _configure(options: argparse.Namespace, answers: Answers) -> PoolConfig:
    attempts = options.retries + 1
    return PoolConfig(
        name="map",
        size=options.workers,
        max_backlog=answers.window,
        timeout=options.timeout or float("inf"),
        rate=None if options.rate is None else Rate(options.rate),
        retry=None if attempts == 1 else Retry(attempts=attempts),
        # All of them are told, line by line.
        unobserved="ignore",
    )


def _open_files(
    options: argparse.Namespace, journal: Journal | None, files: ExitStack
) -> tuple[Target, Target]:
    state = None if journal is None else journal.state
    output = Target("standard output", 1)
    failures = Target("standard error", 2)
    if options.output != "-":
        output = open_target("--output", options.output, state and state.output)
        files.callback(output.close)
    if options.failures is not None:
        mark = state and state.failures
        failures = open_target("--failures", options.failures, mark)
        files.callback(failures.close)
    # All of them are there, so that nothing is left to be refused.
    if options.output != "-":
        output.cut()
    if options.failures is not None:
        failures.cut()
    return output, failures


def _say(text: str) -> None:
    sys.stderr.write(f"trio-pool map: {text}\n")
