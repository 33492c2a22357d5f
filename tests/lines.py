"""Functions that `trio-pool map` is given by its tests, and what they remember."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from typing import Any

import trio

import trio_pool

calls: list[Any] = []
running: Counter[Any] = Counter()
most: Counter[Any] = Counter()
NUMBER = 7


def forget() -> None:
    for memory in (calls, running, most):
        memory.clear()


async def upper(text: str) -> str:
    return text.upper()


def length(text: str) -> int:
    return len(text)


async def same(item: Any) -> Any:
    return item


async def change(item: dict[str, Any]) -> Any:
    item["changed"] = True
    return item


async def nap(text: str) -> str:
    await trio.sleep(0.001)
    return text


async def refuse_odd(text: str) -> int:
    number = int(text)
    if number % 2:
        raise ValueError(f"{text} is odd")
    return number


async def count_down(text: str) -> str:
    """Each once the one after it has ended; the last is 4."""
    while text != "4" and str(int(text) + 1) not in calls:  # noqa: ASYNC110
        await trio.sleep(0.01)
    calls.append(text)
    return text


async def improve(text: str) -> int:
    calls.append(text)
    if calls.count(text) < 3:
        raise OSError("not yet")
    return calls.count(text)


async def wait_for_rest(text: str) -> str:
    """The first line ends when nothing else has begun for a while."""
    calls.append(text)
    if text == "0":
        begun = -1
        while begun < len(calls):
            begun = len(calls)
            await trio.sleep(0.1)
        most["ahead"] = begun
    return text


async def mind_key(item: str) -> str:
    key = item[0]
    running[key] += 1
    running["all"] += 1
    for name in (key, "all"):
        most[name] = max(most[name], running[name])
    calls.append(item)
    await trio.sleep(0.001)
    running[key] -= 1
    running["all"] -= 1
    return item


async def hang(text: str) -> str:
    if text == "hang":
        await trio.sleep_forever()
    return text


async def resist(text: str) -> None:
    print("resisting")
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()


def hang_in_thread(text: str) -> str:
    if text == "hang":
        time.sleep(1000)
    return text


def nap_in_thread(text: str) -> None:
    time.sleep(0.5)


def never_json(text: str) -> Any:
    circle: list[Any] = []
    circle.append(circle)
    return {"set": {1}, "nan": float("nan"), "circle": circle, "half": "\ud800"}[text]


async def exit_at_2(text: str) -> str:
    if text == "2":
        raise SystemExit(5)
    return text


async def always_exit(text: str) -> None:
    raise SystemExit(5)


async def interrupt(text: str) -> None:
    raise KeyboardInterrupt


async def hear_closed(text: str) -> None:
    raise trio_pool.PoolClosed("another")


def talk(text: str) -> str:
    print("talking")
    return text


def take_two(one: str, two: str) -> None:
    pass


async def stop_at_word(text: str) -> str:
    calls.append(text)
    if text == "interrupt" and "stopped once" not in calls:
        raise KeyboardInterrupt
    return text


async def stop_at_the_end(text: str) -> str:
    """The line that stops the run does so when all others are done."""
    calls.append(text)
    if text == "interrupt" and "stopped once" not in calls:
        begun = -1
        while begun < len(calls):
            begun = len(calls)
            await trio.sleep(0.1)
        raise KeyboardInterrupt
    return text


def use_streams(text: str) -> str:
    """What a process that is started here finds, and writes."""
    code = "import sys; print('a child'); sys.exit(len(sys.stdin.read()))"
    return str(subprocess.run([sys.executable, "-c", code], check=False).returncode)


async def count_changes(item: dict[str, Any]) -> Any:
    item["changes"] = item.get("changes", 0) + 1
    if not calls:
        calls.append(item)
        raise OSError("not yet")
    return item


class Leaving(Exception):
    def __str__(self) -> str:
        raise SystemExit(4)


async def leave(text: str) -> None:
    raise Leaving


async def stop_at_first(text: str) -> str:
    """The first line stops the run when the others are done."""
    calls.append(text)
    if text == "0":
        await trio.sleep(0.3)
        raise KeyboardInterrupt
    return text
