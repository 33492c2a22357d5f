"""`trio-pool map --journal`: a run that ended at any moment goes on where it was."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import lines
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_pool.cli import main
from trio_pool.cli._answers import Answers, Tally

TESTS = Path(__file__).parent
PATIENCE = 60
FILES = ("--input", "in", "--output", "out", "--failures", "bad", "--journal", "j")
STRESS = bool(os.environ.get("TRIO_POOL_STRESS"))

posix = pytest.mark.skipif(sys.platform == "win32", reason="it has no such limit")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lines.forget()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def write_input(count: int) -> None:
    Path("in").write_text("".join(f"{number}\n" for number in range(count)))


def run(function: str, *options: str) -> int:
    return main(["map", f"lines:{function}", *FILES, *options])


def begin(function: str, *options: str, **how: Any) -> subprocess.Popen[bytes]:
    paths = [str(TESTS), str(TESTS.parent / "src")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    words = [sys.executable, "-m", "trio_pool", "map", f"lines:{function}"]
    return subprocess.Popen([*words, *FILES, *options], env=environment, **how)


def read(name: str) -> list[Any]:
    return [json.loads(line) for line in Path(name).read_bytes().splitlines()]


def contents() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path().iterdir()}


def size(name: str) -> int:
    return Path(name).stat().st_size if Path(name).exists() else 0


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def committed() -> int:
    """Look at a journal that nobody has open: how many lines are answered."""
    with closing(sqlite3.connect("j")) as journal:
        tally = json.loads(journal.execute("SELECT state FROM run").fetchone()[0])
        return int(tally["tally"]["done"] + tally["tally"]["failed"])


def kill_until_done(
    seed: int, kills: int, count: int, function: str, *options: str
) -> int:
    """Kill a run again and again, at random moments; return its exit code."""
    chance = random.Random(seed)
    write_input(count)
    # One that is told to wait for more than is to come runs to its end.
    bytes_each = count * 40 // kills
    killed = dict.fromkeys(("at work", "before"), 0)
    while kills:
        process = begin(function, *options, stderr=subprocess.DEVNULL)
        if chance.random() < 0.3:
            # While it starts, or finds out where it was.
            pause, more = chance.uniform(0.0, 1.5), 0
        else:
            pause, more = 0.0, chance.randrange(bytes_each)
        until, enough = time.monotonic() + pause, size("out") + more
        while process.poll() is None and (
            time.monotonic() < until or (more and size("out") < enough)
        ):
            time.sleep(chance.uniform(0.0, 0.005))
        process.kill()
        kills -= 1
        if process.wait() >= 0:
            break
        killed["at work" if more else "before"] += 1
    print(killed)
    process = begin(function, *options, stderr=subprocess.DEVNULL)
    return process.wait(PATIENCE)


@pytest.mark.parametrize(
    ("seed", "function", "options"),
    [
        (1, "refuse_odd", ()),
        (2, "refuse_odd", ("--unordered", "--workers", "20")),
        (3, "refuse_odd", ("--key", "item[-1]")),
        (4, "length", ("--unordered",)),
    ],
)
def test_killed_at_any_moment_each_line_has_one_answer(
    seed: int, function: str, options: tuple[str, ...]
) -> None:
    kills, count = (50, 100_000) if STRESS else (2, 5_000)
    code = kill_until_done(seed, kills, count, function, *options)
    answers, failures = read("out"), read("bad")
    indices = [record["index"] for record in answers]
    failed = [record["index"] for record in failures]
    assert sorted(indices + failed) == list(range(count))
    assert all(str(record["index"]) == record["input"] for record in answers + failures)
    if "--unordered" not in options:
        assert indices == sorted(indices)
        assert failed == sorted(failed)
    if function == "refuse_odd":
        assert code == 1
        assert all(record["result"] == record["index"] for record in answers)
        assert all(index % 2 for index in failed)


@given(ordered=st.booleans(), chance=st.randoms(), count=st.integers(0, 40))
def test_what_is_written_and_what_is_left_are_all_lines(
    ordered: bool, chance: random.Random, count: int
) -> None:
    answers = Answers(Tally(), ordered=ordered, workers=1)
    running: list[int] = []
    written: list[int] = []
    taken = 0
    while taken < count or running:
        what = chance.random()
        if what < 0.4 and taken < count:
            answers.expect(taken)
            running.append(taken)
            taken += 1
        elif what < 0.8 and running:
            index = running.pop(chance.randrange(len(running)))
            # Some lines are blank, and have no record.
            record = b"%d " % index if index % 5 else b""
            answers.give(index, record, failed=index % 3 == 0)
        else:
            results, failures, tally = answers.take()
            written += [int(word) for word in (results + failures).split()]
            left = {*tally.pending, *range(tally.taken, count)}
            wanted = {index for index in range(count) if index % 5} - left
            assert sorted(written) == sorted(wanted)
            assert tally.done + tally.failed == len(written)
            assert len(tally.pending) <= len(running)
        assert answers.is_complete() == (not running)
    assert answers.counts() == (
        len([i for i in range(count) if i % 5 and i % 3]),
        len([i for i in range(count) if i % 5 and not i % 3]),
    )


# What goes on, and what is cut off.


@pytest.mark.parametrize("mode", [[], ["--unordered"]])
def test_a_run_that_was_stopped_goes_on(
    mode: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("in").write_text("".join(f"{n}\n" for n in range(50)) + "interrupt\n" + "z\n")
    assert run("stop_at_word", "--workers", "1", *mode) == 130
    assert [record["index"] for record in read("out")] == list(range(50))
    assert committed() == 50
    lines.calls.append("stopped once")
    assert run("stop_at_word", "--workers", "3", *mode) == 0
    assert "goes on after 50 lines done, 0 failed" in capfd.readouterr().err
    assert sorted(record["index"] for record in read("out")) == list(range(52))
    assert lines.calls.count("0") == 1


def test_unordered_only_what_had_no_answer_runs_again() -> None:
    Path("in").write_text("interrupt\n" + "".join(f"{n}\n" for n in range(3_000)))
    assert run("stop_at_the_end", "--unordered") == 130
    assert sorted(record["index"] for record in read("out")) == list(range(1, 3_001))
    lines.calls[:] = ["stopped once"]
    assert run("stop_at_the_end", "--unordered") == 0
    assert lines.calls == ["stopped once", "interrupt"]
    assert [record["index"] for record in read("out")][-1] == 0


def test_what_was_written_but_not_committed_is_cut_off() -> None:
    write_input(10)
    assert run("refuse_odd") == 1
    before = contents()
    state = json.loads(sqlite_value("SELECT state FROM run"))
    state["finished"] = False
    sqlite_value("UPDATE run SET state = ? RETURNING 1", json.dumps(state))
    for name in ("out", "bad"):
        with Path(name).open("ab") as file:
            file.write(b'{"index": 10, "inp')
    assert run("refuse_odd") == 1
    assert contents()["out"] == before["out"]
    assert contents()["bad"] == before["bad"]


def sqlite_value(statement: str, *values: str) -> Any:
    with closing(sqlite3.connect("j", isolation_level=None)) as journal:
        return journal.execute(statement, values).fetchone()[0]


@pytest.mark.parametrize("mode", [[], ["--unordered"]])
def test_a_last_line_without_an_end_is_answered_once(mode: list[str]) -> None:
    Path("in").write_text("a\nb\ninterrupt")
    assert run("stop_at_the_end", "--workers", "1", *mode) == 130
    lines.calls[:] = ["stopped once"]
    assert run("stop_at_the_end", *mode) == 0
    assert [record["input"] for record in read("out")] == ["a", "b", "interrupt"]


def test_a_journal_that_has_just_been_made_is_a_new_one() -> None:
    write_input(3)
    Path("j").touch()
    assert run("upper") == 0
    assert len(read("out")) == 3


def test_the_journal_of_a_run_that_never_began_is_for_any_other() -> None:
    write_input(3)
    assert run("upper", "--output", "missing/out") == 2
    assert run("same", "--unordered") == 0
    assert len(read("out")) == 3


def test_a_new_run_overwrites_what_is_there() -> None:
    write_input(3)
    Path("out").write_text("old\n" * 100)
    assert run("upper") == 0
    assert len(read("out")) == 3


@pytest.mark.parametrize(("function", "code"), [("upper", 0), ("refuse_odd", 1)])
def test_a_finished_run_is_not_run_again(
    function: str, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    write_input(10)
    assert run(function) == code
    before = contents()
    lines.forget()
    assert run(function, "--workers", "3", "--rate", "5") == code
    assert "is of a run that has ended: " in capfd.readouterr().err
    assert contents() == before


def test_without_a_file_failures_are_told_once_more_at_most(
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_input(4)
    words = ["map", "lines:refuse_odd", "--input", "in", "--output", "out"]
    assert main([*words, "--journal", "j"]) == 1
    assert len(capfd.readouterr().err.splitlines()) == 2
    assert main([*words, "--journal", "j"]) == 1


def test_blank_lines_and_lines_that_are_no_items_count_as_answered() -> None:
    Path("in").write_text("1\n\nnope\n \n2\n\n")
    assert run("same", "--json") == 1
    before = contents()
    assert run("same", "--json") == 1
    assert contents() == before
    assert [record["index"] for record in read("out")] == [0, 4]
    assert [record["index"] for record in read("bad")] == [2]


# What is refused, with nothing changed.


@pytest.mark.parametrize(
    ("function", "options", "word"),
    [
        ("same", [], "function was 'lines:upper', is 'lines:same'"),
        ("upper", ["--json"], "--json was False, is True"),
        ("upper", ["--unordered"], "--unordered was False, is True"),
        ("upper", ["--retries", "2"], "--retries was 0, is 2"),
        ("upper", ["--timeout", "2"], "--timeout was None, is 2.0"),
        ("upper", ["--key", "item"], "--key was None, is 'item'"),
    ],
)
def test_the_journal_of_another_run_is_refused(
    function: str, options: list[str], word: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_input(10)
    assert run("upper") == 0
    before = contents()
    assert run(function, *options) == 2
    error = capfd.readouterr().err
    assert error.startswith("trio-pool map: --journal 'j' is of another run: ")
    assert word in error
    assert contents() == before


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("in", lambda data: data[:-2], "in' is not what the journal is of: it has "),
        ("in", lambda data: data + b"a\n", "it goes on after the 20 bytes"),
        ("in", lambda data: b"9" + data[1:], "its first 20 bytes have changed"),
    ],
)
def test_another_input_is_refused(
    name: str,
    change: Callable[[bytes], bytes],
    word: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_input(10)
    assert run("upper") == 0
    Path(name).write_bytes(change(Path(name).read_bytes()))
    before = contents()
    assert run("upper") == 2
    assert word in capfd.readouterr().err
    assert contents() == before


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("out", lambda data: data[:-2], "--output is not what the journal is of"),
        ("out", lambda data: data[:-2] + b"x\n", "before byte 20 has changed"),
        ("bad", lambda data: b"", "--failures is not what the journal is of"),
        ("in", lambda data: data + b"a\n", "it goes on after the "),
        ("in", lambda data: b"", "it has 0 bytes, and had "),
    ],
)
def test_files_of_another_run_are_refused(
    name: str,
    change: Callable[[bytes], bytes],
    word: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("in").write_text("1\n2\ninterrupt")
    assert run("stop_at_word", "--workers", "1", "--json") == 1
    state = json.loads(sqlite_value("SELECT state FROM run"))
    state["finished"] = False
    sqlite_value("UPDATE run SET state = ? RETURNING 1", json.dumps(state))
    size_before = size("out")
    Path(name).write_bytes(change(Path(name).read_bytes()))
    before = contents()
    assert run("stop_at_word", "--json") == 2
    assert word.replace("20", str(size_before)) in capfd.readouterr().err
    assert contents() == before


def make_database(application: int) -> None:
    with closing(sqlite3.connect("j")) as database:
        database.execute("CREATE TABLE run (it INTEGER)")
        database.execute(f"PRAGMA application_id = {application}")
        database.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Path("j").write_text("no database, but text\n" * 99), "is no journal"),
        (lambda: make_database(0), "is a database, but no journal"),
        (lambda: make_database(0x7472696F), "must be of version 1, not of 99"),
        (lambda: Path("j").mkdir(), "cannot open --journal 'j'"),
    ],
)
def test_what_is_no_journal_is_refused_and_left_alone(
    make: Callable[[], object], word: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_input(3)
    make()
    kept = Path("j").read_bytes() if Path("j").is_file() else b""
    assert run("upper") == 2
    assert word in capfd.readouterr().err
    assert not Path("out").exists()
    assert (Path("j").read_bytes() if Path("j").is_file() else b"") == kept


@pytest.mark.parametrize("option", ["--output", "--failures"])
@pytest.mark.parametrize("path", ["-", os.devnull])
def test_with_a_journal_answers_go_to_regular_files(
    option: str, path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_input(3)
    assert run("upper", option, path) == 2
    assert f"{option} must be a regular file, got {path!r}" in capfd.readouterr().err
    assert not Path("j").exists()


def test_two_runs_at_one_journal_are_refused(
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("in").write_text("a\nhang\n")
    process = begin("hang")
    try:
        # What is beside it is that of the first commit.
        wait_until(lambda: size("out") and size("j-wal") > 4_096)
        assert run("hang") == 2
        assert "--journal 'j' is in use by another run" in capfd.readouterr().err
    finally:
        process.kill()
        process.wait()
    # The lock went with the process; what it had committed, did not.
    Path("in").write_text("b\nhang\n")
    assert run("hang") == 2
    assert "have changed" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["out", "bad"])
def test_the_end_of_a_run_is_not_told_without_its_files(name: str) -> None:
    write_input(4)
    assert run("refuse_odd") == 1
    Path(name).unlink()
    assert run("refuse_odd") == 2
    assert not Path(name).exists()


def test_a_run_without_lines_has_ended_too() -> None:
    write_input(0)
    assert run("upper") == 0
    assert run("upper") == 0


@posix
def test_two_runs_to_one_output_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    Path("in").write_text("a\nhang\n")
    process = begin("hang")
    try:
        wait_until(lambda: size("out"))
        assert run("hang", "--journal", "other", "--failures", "more") == 2
        assert "--output 'out' is in use" in capfd.readouterr().err
        assert not Path("other").exists()
        assert len(read("out")) == 1
    finally:
        process.kill()
        process.wait()


def test_a_journal_is_a_file() -> None:
    write_input(1)
    assert run("upper", "--journal", "") == 2
    assert run("upper", "--journal", ":memory:") == 0
    assert Path(":memory:").exists()


@posix
def test_a_disk_that_is_full_loses_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    resource = pytest.importorskip("resource")
    write_input(20_000)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    process = begin("upper", preexec_fn=limit, stderr=subprocess.PIPE)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3
    assert error.startswith(b"trio-pool map: cannot write --output 'out': ")
    assert run("upper") == 0
    assert [record["index"] for record in read("out")] == list(range(20_000))


@posix
def test_stopped_by_a_signal_all_that_was_answered_is_committed() -> None:
    Path("in").write_text("a\nhang\nb\n")
    process = begin("hang", "--unordered")
    wait_until(lambda: Path("out").exists() and len(read("out")) == 2)
    process.terminate()
    assert process.wait(PATIENCE) == 143
    assert committed() == 2
