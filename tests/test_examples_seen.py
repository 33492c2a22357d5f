"""The crawler and the worker of a queue run as programs and keep their figures."""

from __future__ import annotations

import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

import pytest
import trio

EXAMPLES = Path(__file__).parents[1] / "examples"

on_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


def command(example: str, *arguments: object) -> list[str]:
    program = str(EXAMPLES / example)
    return [sys.executable, "-W", "error", program, *map(str, arguments)]


def run(example: str, *arguments: object) -> str:
    """Run an example; the time limit is only there to end a hang."""
    done = subprocess.run(
        command(example, *arguments),
        capture_output=True,
        check=False,
        text=True,
        timeout=50,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


def figures(line: str) -> dict[str, int]:
    """Read "192 done, 8 aside" as figures by their names."""
    found = (part.split(maxsplit=1) for part in line.split(", "))
    return {name: int(number) for number, name in found}


# ----------------------------------------------------------------------
# crawler.py

GIVEN_UP = "trio_pool: given up after 5 attempts"


def test_every_page_that_can_be_had_is_read_whatever_ails_the_site() -> None:
    """A machine that stalls makes more visits, and no other pages."""
    *given_up, pages, served = run("crawler.py", "--seed", 7).splitlines()
    # These fail whenever they are visited.
    assert sorted(line.partition(": ")[0] for line in given_up) == [
        f"/{page}" for page in (124, 149, 174, 199)
    ]
    assert all(line.endswith("; " + GIVEN_UP) for line in given_up)
    found = figures(pages.removeprefix("pages: "))
    # The links to nowhere are on every tenth page; two of these were given up.
    assert found.pop("tried again") >= 103
    assert found == {"given up": 4, "not there": 18, "read": 196}
    visits = figures(served.removeprefix("served: "))
    assert visits["well"] >= 196
    assert visits["missing"] >= 18
    assert 41 < visits["error"] <= 61
    # What is wrong with a page is met once each, and the page is had all the same.
    assert (visits["half"], visits["late"]) == (36, 10)


def test_another_seed_makes_another_site() -> None:
    given_up, pages, served = run("crawler.py", "--pages", 40, "--seed", 8).splitlines()
    assert given_up.startswith("/39: ")
    assert pages.startswith("pages: 1 given up, 3 not there, 39 read, ")
    seen = figures(served.removeprefix("served: "))
    assert (seen["half"], seen["late"]) == (4, 4)


# ----------------------------------------------------------------------
# queue_worker.py


def messages(queue: Path) -> list[tuple[str, int, str, str | None]]:
    with closing(sqlite3.connect(queue)) as file:
        asked = "SELECT body, attempts, state, note FROM messages ORDER BY id"
        return file.execute(asked).fetchall()


def states(queue: Path) -> Counter[str]:
    return Counter(state for _, _, state, _ in messages(queue))


def all_attempts(queue: Path) -> int:
    return sum(attempts for _, attempts, _, _ in messages(queue))


def start(*arguments: object) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    program = command("queue_worker.py", *arguments)
    return subprocess.Popen(program, stdout=pipe, stderr=pipe, text=True)


async def wait_until_some_are_done(queue: Path, number: int) -> None:
    """Wait until the program has done so many; 20 seconds are for a hang."""
    log = trio.Path(f"{queue}-wal")
    with trio.fail_after(60):
        while True:
            # At first there is no file, and then no table in it.
            if await log.exists():
                with suppress(sqlite3.OperationalError):
                    if states(queue)["done"] >= number:
                        return
            await trio.sleep(0.02)


def assert_all_were_worked_off(queue: Path, number: int) -> None:
    found = messages(queue)
    assert len(found) == number
    for body, _, state, note in found:
        if body == "spoilt":
            assert state == "aside"
        else:
            assert (state, note) == ("done", f"sent {body}")


def test_all_messages_are_done_but_the_spoilt_ones_which_are_put_aside(
    tmp_path: Path,
) -> None:
    queue = tmp_path / "queue.db"
    summary = run("queue_worker.py", "--messages", 50, "--queue", queue)
    # 2 spoilt ones fail three times; every tenth of the others fails once.
    assert summary == "48 done, 2 aside, 0 open, 11 attempts failed\n"
    assert_all_were_worked_off(queue, 50)
    notes = {note for body, _, _, note in messages(queue) if body == "spoilt"}
    assert notes == {"ValueError('nobody can read this')"}
    tries = Counter(attempts for _, attempts, _, _ in messages(queue))
    assert tries == {1: 43, 2: 5, 3: 2}
    # Nothing is worked off again.
    before = messages(queue)
    again = run("queue_worker.py", "--queue", queue)
    assert again == "48 done, 2 aside, 0 open, 0 attempts failed\n"
    assert messages(queue) == before


def test_it_needs_no_option() -> None:
    assert run("queue_worker.py") == "96 done, 4 aside, 0 open, 22 attempts failed\n"


@on_posix
async def test_whenever_it_is_killed_no_message_is_lost(tmp_path: Path) -> None:
    queue = tmp_path / "queue.db"
    draw = random.Random(11)
    options = ("--messages", 80, "--queue", queue, "--timeout", 0.3)
    done = 0
    for _ in range(3):
        with start(*options) as child:
            await wait_until_some_are_done(queue, done + draw.randrange(1, 10))
            await trio.sleep(draw.random() * 0.02)
            child.kill()
        done = states(queue)["done"]
    assert 0 < done < 76
    assert run("queue_worker.py", *options).count(" 0 open") == 1
    assert_all_were_worked_off(queue, 80)


@on_posix
async def test_a_message_that_kills_its_worker_is_put_aside(tmp_path: Path) -> None:
    """As often as it was taken, and never ended, by programs that are gone."""
    queue = tmp_path / "queue.db"
    run("queue_worker.py", "--messages", 5, "--queue", queue)
    with closing(sqlite3.connect(queue)) as file:
        again = (
            "UPDATE messages SET state = 'open', attempts = 10, due = 0 WHERE id = 2"
        )
        file.execute(again)
        file.commit()
    run("queue_worker.py", "--queue", queue)
    assert messages(queue)[1] == ("mail 1", 11, "aside", "killed its worker")


@on_posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_in_order(tmp_path: Path, number: int) -> None:
    """What was taken is done or given back: no message waits for its lease."""
    queue = tmp_path / "queue.db"
    options = ("--messages", 2_000, "--queue", queue, "--timeout", 3_600)
    with start(*options) as child:
        await wait_until_some_are_done(queue, 5)
        child.send_signal(number)
        output, error = child.communicate(timeout=60)
    assert error == ""
    assert child.returncode == 0
    summary = re.fullmatch(
        r"(\d+) done, (\d+) aside, (\d+) open, \d+ attempts failed\n", output
    )
    assert summary is not None
    done, aside, left = map(int, summary.groups())
    assert done + aside + left == 2_000
    assert done >= 5
    assert left > 0
    with closing(sqlite3.connect(queue)) as file:
        leased = "SELECT count(*) FROM messages WHERE state = 'open' AND due > ?"
        soon = "SELECT strftime('%s', 'now') + 60"
        (limit,) = file.execute(soon).fetchone()
        assert file.execute(leased, (limit,)).fetchone() == (0,)


def test_urgent_messages_come_first(tmp_path: Path) -> None:
    queue = tmp_path / "queue.db"
    run("queue_worker.py", "--messages", 1, "--queue", queue)
    with closing(sqlite3.connect(queue)) as file:
        file.execute("CREATE TABLE ends (id INTEGER PRIMARY KEY, message INTEGER)")
        file.execute(
            "CREATE TRIGGER note AFTER UPDATE OF state ON messages "
            "BEGIN INSERT INTO ends (message) VALUES (NEW.id); END"
        )
        file.executemany(
            "INSERT INTO messages (id, body, priority) VALUES (?, 'mail', ?)",
            [(number, number % 3) for number in range(51, 60)],
        )
        file.commit()
    run("queue_worker.py", "--queue", queue, "--workers", 1)
    with closing(sqlite3.connect(queue)) as file:
        ends = [row[0] for row in file.execute("SELECT message FROM ends ORDER BY id")]
    assert ends == [53, 56, 59, 52, 55, 58, 51, 54, 57]
