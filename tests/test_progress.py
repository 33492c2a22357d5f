"""How far many jobs are, drawn by one task: bars, log lines, stuck terminals."""

from __future__ import annotations

import io
import logging
import os
import threading
from contextlib import contextmanager
from typing import Any, TextIO

import pytest
import trio

import trio_pool.progress
from trio_pool import PoolClosed, open_pool
from trio_pool.progress import (
    LogLines,
    PlainBar,
    RichBar,
    TqdmBar,
    show_progress,
)
from trio_pool.testing import InlinePool, InlineTaskPool, cancel_everywhere


class Drawn:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, total: int | None) -> None:
        self.calls.append(("start", total))

    def draw(self, done: int, failed: int) -> None:
        self.calls.append((done, failed))

    def close(self) -> None:
        self.calls.append("close")


async def rest(item: float) -> float:
    await trio.sleep(item)
    return item


async def fail_odd(item: int) -> int:
    await trio.sleep(0.25)
    if item % 2:
        raise ValueError(item)
    return item


async def numbers(count: int) -> Any:
    for number in range(count):
        yield number


# What is drawn, and when


async def test_it_is_drawn_ten_times_a_second_and_once_at_the_end(autojump_clock):
    drawn = Drawn()
    async with open_pool(1, rest) as pool:
        assert await pool.map([0.25, 0.2], progress=drawn) == [0.25, 0.2]
    assert drawn.calls == [
        *(("start", 2), (0, 0), (0, 0), (0, 0)),
        *((1, 0), (1, 0), (2, 0), "close"),
    ]


async def test_failures_are_counted_apart(autojump_clock):
    drawn = Drawn()
    async with open_pool(2, fail_odd) as pool:
        await pool.settle(range(5), progress=drawn)
    assert drawn.calls[0] == ("start", 5)
    assert drawn.calls[-2:] == [(3, 2), "close"]


async def test_the_end_is_drawn_of_a_map_that_fails(autojump_clock):
    drawn = Drawn()
    async with open_pool(1, fail_odd) as pool:
        with pytest.raises(ExceptionGroup):
            await pool.map(range(5), progress=drawn)
    assert drawn.calls[-2:] == [(1, 1), "close"]


async def test_the_end_is_drawn_of_a_map_that_is_cancelled(autojump_clock):
    drawn = Drawn()
    async with open_pool(1, rest) as pool:
        with trio.move_on_after(1.5):
            await pool.map([1.0] * 9, progress=drawn)
    assert drawn.calls[-2][0] == 1
    assert drawn.calls[-1] == "close"


@pytest.mark.parametrize(
    ("items", "total"),
    [([1, 2], 2), (iter([1, 2]), None), (range(7), 7), ({}, 0)],
)
async def test_the_total_is_the_length_if_there_is_one(items, total, autojump_clock):
    drawn = Drawn()
    async with open_pool(1, fail_odd) as pool:
        await pool.settle(items, progress=drawn)
    assert drawn.calls[0] == ("start", total)
    assert drawn.calls[-1] == "close"


async def test_async_items_have_no_total(autojump_clock):
    drawn = Drawn()
    async with open_pool(2, fail_odd) as pool:
        await pool.settle(numbers(4), progress=drawn)
    assert drawn.calls[0] == ("start", None)
    assert drawn.calls[-2:] == [(2, 2), "close"]


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_stream_is_drawn_until_it_is_left(autojump_clock, ordered):
    drawn = Drawn()
    async with open_pool(2, fail_odd) as pool:
        async with pool.stream(
            range(10), ordered=ordered, outcomes=True, ahead=2, progress=drawn
        ) as settled:
            for _ in range(4):
                await anext(settled)
    done, failed = drawn.calls[-2]
    assert (done >= 2, failed >= 2) == (True, True)
    assert drawn.calls[-1] == "close"


async def test_failures_that_were_read_from_a_stream_stay_counted(autojump_clock):
    drawn = Drawn()
    async with open_pool(2, fail_odd) as pool:
        async with pool.stream(range(6), outcomes=True, progress=drawn) as settled:
            assert len([one async for one in settled]) == 6
    assert drawn.calls[-2:] == [(3, 3), "close"]


async def test_a_pool_of_calls_draws_too(autojump_clock):
    for progress in (Drawn(), Drawn(), Drawn()):
        async with open_pool(2) as pool:
            if not progress.calls:
                await pool.map(rest, [1, 2], progress=progress)
        assert progress.calls[-2:] == [(2, 0), "close"]


async def test_calls_settle_and_stream_with_progress(autojump_clock):
    settled, streamed = Drawn(), Drawn()
    async with open_pool(2) as pool:
        await pool.settle(fail_odd, range(3), progress=settled)
        async with pool.stream(rest, [1, 1], progress=streamed) as results:
            assert [result async for result in results] == [1, 1]
    assert settled.calls[-2:] == [(2, 1), "close"]
    assert streamed.calls[-2:] == [(2, 0), "close"]


async def test_an_inline_pool_draws_too(autojump_clock):
    drawn = [Drawn() for _ in range(4)]
    async with InlinePool(fail_odd) as pool:
        await pool.settle(range(3), progress=drawn[0])
        assert await pool.map([2, 4], progress=drawn[1]) == [2, 4]
        async with pool.stream([2, 4], progress=drawn[2]) as results:
            assert [result async for result in results] == [2, 4]
    async with InlineTaskPool() as calls:
        await calls.map(rest, [1, 1], progress=drawn[3])
    assert [one.calls[-2] for one in drawn] == [(2, 1), (2, 0), (2, 0), (2, 0)]


async def test_what_ended_before_it_began_is_not_drawn():
    drawn = Drawn()
    async with open_pool(1, rest) as pool:
        await pool.shutdown()
        with pytest.raises(PoolClosed):
            await pool.map([1], progress=drawn)
    assert drawn.calls == []


async def test_the_error_of_the_block_leaves_bare(autojump_clock):
    drawn = Drawn()
    with pytest.raises(KeyError):
        async with show_progress(drawn, lambda: (1, 0), None):
            await trio.sleep(1)
            raise KeyError
    assert drawn.calls[-1] == "close"


@pytest.mark.parametrize("method", ["start", "draw", "close"])
async def test_a_progress_that_raises_harms_nobody(method, autojump_clock, caplog):
    drawn = Drawn()
    setattr(drawn, method, lambda *_: 1 / 0)
    async with open_pool(1, rest) as pool:
        assert await pool.map([1, 1], progress=drawn) == [1, 1]
    assert [record.message for record in caplog.records] == [
        f"{method} of a progress raised; it is not called again"
    ]


@pytest.mark.parametrize("progress", [None, 3, Drawn, object(), b"label"])
async def test_what_shows_nothing_is_refused(progress):
    async with open_pool(1, rest) as pool:
        for method in (pool.map, pool.settle):
            with pytest.raises(TypeError, match="progress must be True, False, a la"):
                await method([1], progress=progress)
        with pytest.raises(TypeError, match="progress must be True, False, a label"):
            pool.stream([1], progress=progress)
        assert pool.statistics().accepted == 0


def test_a_map_with_progress_can_be_cancelled_at_every_step():
    async def body() -> None:
        drawn = Drawn()
        try:
            async with open_pool(2, rest) as pool:
                await pool.map([0.05, 0.25, 0.5], progress=drawn)
        finally:
            # What was begun is closed, and drawn before.
            assert drawn.calls.count("close") == (len(drawn.calls) > 0)
            assert not drawn.calls or drawn.calls[-1] == "close"

    assert cancel_everywhere(body) > 10


# Bars


class Terminal(io.StringIO):
    """Somebody who looks."""

    def isatty(self) -> bool:
        return True


async def shown_on(bar: Any, items: list[int]) -> None:
    async with open_pool(1, fail_odd) as pool:
        await pool.settle(items, progress=bar)


async def test_a_plain_bar_writes_one_line_over_and_over(autojump_clock):
    file = Terminal()
    await shown_on(PlainBar("pages", file=file), [0, 1, 2, 4])
    lines = file.getvalue().split("\r")
    assert lines[1].startswith("pages: 0 of 4 [ ")
    told = "pages: 4 of 4, 1 failed, 4.0 a second [####"
    assert lines[-1].startswith(told)
    assert file.getvalue().count("\n") == 1
    assert len(lines) > 10
    assert {len(line) for line in lines[1:]} == {79, 80}


async def test_a_plain_bar_says_what_is_left(autojump_clock):
    file = Terminal()
    async with open_pool(1, rest) as pool:
        await pool.map([2.0] * 100, progress=PlainBar(file=file))
    assert "10 of 100, 0.5 a second, 3:00 left [" in file.getvalue()


async def test_a_plain_bar_without_a_total_has_no_bar(autojump_clock):
    file = Terminal()
    async with open_pool(1, fail_odd) as pool:
        await pool.settle(numbers(2), progress=PlainBar(file=file))
    assert file.getvalue().endswith("2, 1 failed, 4.0 a second\n")


@pytest.mark.parametrize("kind", [TqdmBar, RichBar])
async def test_other_bars_show_what_ended_and_start_no_thread(kind):
    # They measure time by the real clock, so they are driven by hand.
    before = set(threading.enumerate())
    file = Terminal()
    bar = kind("pages", file=file)
    bar.start(4)
    bar.draw(1, 0)
    bar.draw(3, 1)
    assert set(threading.enumerate()) == before
    bar.close()
    text = file.getvalue()
    assert "pages" in text
    assert "4/4" in text
    assert "1 failed" in text


async def test_lines_of_the_log_come_now_and_then(autojump_clock, caplog):
    caplog.set_level(logging.INFO, "trio_pool.progress")
    async with open_pool(1, rest) as pool:
        await pool.map([1.0] * 12, progress=LogLines("pages"))
    assert [record.message for record in caplog.records] == [
        "pages: 5 of 12, 1.0 a second, 0:07 left",
        "pages: 10 of 12, 1.0 a second, 0:02 left",
        "pages: 12 of 12, 1.0 a second",
    ]
    (*_, last) = caplog.records
    assert (last.done, last.failed, last.total) == (12, 0, 12)  # type: ignore[attr-defined]


# What suits the terminal


@pytest.mark.parametrize("error", [None, io.StringIO()])
async def test_where_nobody_looks_it_is_logged(
    error, autojump_clock, monkeypatch, caplog
):
    monkeypatch.setattr("sys.stderr", error)
    caplog.set_level(logging.INFO, "trio_pool.progress")
    async with open_pool(1, rest) as pool:
        await pool.map([1.0], progress="pages")
        await pool.map([1.0], progress=True)
    assert [record.message for record in caplog.records] == [
        "pages: 1 of 1, 1.0 a second",
        "progress: 1 of 1, 1.0 a second",
    ]


async def test_a_terminal_gets_the_bar_of_tqdm(autojump_clock, monkeypatch):
    file = Terminal()
    monkeypatch.setattr("sys.stderr", file)
    async with open_pool(1, rest) as pool:
        await pool.map([1.0, 1.0], progress="pages")
    assert "pages: 100%|" in file.getvalue()
    assert "2/2" in file.getvalue()


async def test_without_tqdm_a_terminal_gets_the_plain_bar(autojump_clock, monkeypatch):
    file = Terminal()
    monkeypatch.setattr("sys.stderr", file)
    monkeypatch.setattr("trio_pool.progress._show.find_spec", lambda name: None)
    async with open_pool(1, rest) as pool:
        await pool.map([1.0, 1.0], progress="pages")
    assert "pages: 2 of 2, 1.0 a second [###" in file.getvalue()


async def test_false_shows_nothing(monkeypatch):
    file = Terminal()
    monkeypatch.setattr("sys.stderr", file)
    async with open_pool(1, rest) as pool:
        await pool.map([0, 0], progress=False)
    assert file.getvalue() == ""


def test_a_bar_whose_library_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rich", None)
    monkeypatch.delitem(
        __import__("sys").modules, "trio_pool.progress._rich", raising=False
    )
    monkeypatch.delitem(vars(trio_pool.progress), "RichBar", raising=False)
    with pytest.raises(ImportError, match=r"needs rich.*trio-pool\[rich\]"):
        _ = trio_pool.progress.RichBar


@contextmanager
def stuck_terminal() -> Any:
    """Make a terminal whose other side reads nothing, and fill it up."""
    other, own = os.openpty()
    os.set_blocking(own, False)
    try:
        while True:
            os.write(own, b"x" * 256)
    except BlockingIOError:
        os.set_blocking(own, True)
    with open(own, "w", encoding="utf-8", closefd=False) as file:
        try:
            yield file
        finally:
            # What is left in its buffer would wait for ever.
            drain = threading.Thread(target=_read_all, args=(other,), daemon=True)
            drain.start()
            file.close()
            os.close(own)
            drain.join(5)
            os.close(other)


def _read_all(other: int) -> None:
    try:
        while os.read(other, 65536):
            pass
    except OSError:
        pass


@pytest.mark.parametrize("kind", [PlainBar, TqdmBar])
async def test_a_terminal_that_is_stuck_holds_up_nobody(kind):
    """With writes that wait, this would never end."""
    with stuck_terminal() as file:
        assert file.isatty()

        def draw(file: TextIO) -> None:
            bar = kind("pages", file=file)
            bar.start(3)
            bar.draw(1, 0)
            bar.draw(2, 1)
            bar.close()

        async def draw_here() -> None:
            draw(file)

        with trio.fail_after(30):
            await draw_here()
