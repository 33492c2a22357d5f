"""A run of ``trio-pool map``: lines, pool, writer and journal, put together."""

from __future__ import annotations

import argparse
import logging
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import (
    AsyncExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
    nullcontext,
)
from importlib import import_module
from typing import Any, final

import attrs
import trio

from .. import PoolBroken, PoolConfig, Rate, Retry
from ._answers import Answers
from ._ends import DONE, FAILURES, Broken, Refused, Work
from ._files import Target, check_written
from ._formats import parse_json, parse_text
from ._items import Items
from ._journal import Journal, Settings, State, open_journal
from ._lines import Lines
from ._roles import Files, open_targets
from ._signals import heed_signals
from ._streams import say
from ._threads import Threads, watching
from ._work import ItemPool, answer_all, answer_by_key, open_item_pool
from ._writer import Writer, writing


@final
@attrs.frozen
class Plan:
    """What is to be run, once nothing is left to be refused without reading."""

    options: argparse.Namespace
    files: Files
    function: Callable[[Any], Any]
    key_of: Callable[[Any], Any] | None
    input_fd: int
    output_fd: int
    """Of standard output, if that is taken."""
    settings: Settings


async def map_lines(plan: Plan) -> int:
    """Answer all lines; return the exit code.

    Raises:
      CommandEnd: it ended before that.
    """
    work = Work()
    with heed_signals(work.scope) as heard, _journal(plan) as journal:
        code = DONE
        with work.scope:
            code = await _resume(plan, journal, work)
        if work.error is not None:
            raise work.error
        if work.scope.cancelled_caught and heard.code is not None:
            return heard.code
        return code


def _journal(plan: Plan) -> Journal | nullcontext[None]:
    file = plan.files.journal
    return nullcontext() if file is None else open_journal(file, plan.settings)


async def _resume(plan: Plan, journal: Journal | None, work: Work) -> int:
    options = plan.options
    state = State() if journal is None else journal.state
    its = plan.files.input
    name = "standard input" if its.path == "-" else str(its)
    lines = Lines(name, plan.input_fd, digest=journal is not None)
    answers = Answers(
        state.tally, ordered=not options.unordered, workers=options.workers
    )
    # Without a change to anything, as it may be another input.
    await lines.skip(state.input, state.tally.taken, set(state.tally.pending))
    answered = f"{answers.done:,} lines done, {answers.failed:,} failed"
    if state.finished:
        await lines.require_end()
        check_written(plan.files.output, state.output)
        if plan.files.failures is not None:
            check_written(plan.files.failures, state.failures)
        say(f"{plan.files.journal} is of a run that has ended: {answered}")
    else:
        if state != State():
            say(f"goes on after {answered}")
        await _run(plan, lines, answers, journal, work)
    return FAILURES if answers.failed else DONE


async def _run(
    plan: Plan,
    lines: Lines,
    answers: Answers,
    journal: Journal | None,
    work: Work,
) -> None:
    items = Items(
        lines,
        answers,
        parse_json if plan.options.json else parse_text,
        plan.key_of,
    )
    answer = answer_all if plan.key_of is None else answer_by_key
    try:
        async with _open_pool(plan, answers, work) as pool:
            output, failures = await _open_targets(plan, journal)
            with closing(output), closing(failures):
                writer = Writer(
                    answers, output, failures, journal, lambda: lines.position
                )
                async with writing(writer, answers, work):
                    await answer(pool, items, answers)
    except PoolBroken as error:
        raise Broken(str(error)) from error
    if not answers.is_complete() and work.error is None:
        raise Broken("the pool has stopped, and some lines have no answer")


async def _open_targets(plan: Plan, journal: Journal | None) -> tuple[Target, Target]:
    marks = None
    if journal is not None:
        marks = journal.state.output, journal.state.failures
    # Until somebody reads a named pipe, to open it waits.
    return await trio.to_thread.run_sync(
        open_targets,
        plan.files,
        plan.input_fd,
        plan.output_fd,
        marks,
        abandon_on_cancel=True,
    )


@asynccontextmanager
async def _open_pool(
    plan: Plan, answers: Answers, work: Work
) -> AsyncGenerator[ItemPool, None]:
    """Open the pool, and what shows how it is doing."""
    options = plan.options
    async with AsyncExitStack() as stack:
        # What it needs may not be installed.
        serve = _find_dashboard() if options.dashboard is not None else None
        config = _configure(options, answers)
        threads = Threads(config.size, config.timeout)
        opening = open_item_pool(plan.function, config, threads)
        pool = await stack.enter_async_context(opening)
        await stack.enter_async_context(watching(threads, work))
        if serve is not None:
            try:
                dashboard = await stack.enter_async_context(
                    serve(pool, bind=options.dashboard)
                )
            except (OSError, ValueError) as error:
                raise Refused(f"--dashboard {options.dashboard!r}: {error}") from error
            say(f"dashboard at {' '.join(dashboard.urls)}")
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
