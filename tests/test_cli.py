"""`trio-pool map`: what it reads, runs and writes, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import lines
import pytest

from trio_pool.cli import _map, _threads, main
from trio_pool.cli._answers import Answers, Tally
from trio_pool.cli._ends import Broken
from trio_pool.cli._files import Target

TESTS = Path(__file__).parent
PATIENCE = 60


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    lines.forget()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def run(function: str, data: str | bytes, *options: str) -> int:
    """Run the command in this process, in a folder of its own."""
    Path("in").write_bytes(data.encode() if isinstance(data, str) else data)
    files = ("--input", "in", "--output", "out", "--failures", "bad")
    return main(["map", f"lines:{function}", *files, *options])


def read(name: str) -> list[Any]:
    return [json.loads(line) for line in Path(name).read_bytes().splitlines()]


def results() -> list[Any]:
    return [record["result"] for record in read("out")]


def errors() -> list[str]:
    return [record["error"] for record in read("bad")]


class Command:
    """The command in a process of its own."""

    def __init__(self, *options: str, **how: Any) -> None:
        how = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE} | how
        how = {"stdout": subprocess.PIPE} | how
        paths = [str(TESTS), str(TESTS.parent / "src")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        words = [sys.executable, "-m", "trio_pool", "map", *options]
        self.process = subprocess.Popen(words, env=environment, **how)

    def tell(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def hear_line(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def end(self) -> tuple[int, bytes, bytes]:
        output, error = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, output, error

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(here: Path) -> Iterator[Callable[..., Command]]:
    commands: list[Command] = []

    def begin(*options: str, **how: Any) -> Command:
        commands.append(Command(*options, **how))
        return commands[-1]

    yield begin
    for command in commands:
        command.close()


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


# What is written.


@pytest.mark.parametrize("function", ["upper", "same"])
def test_each_line_is_answered_in_order(here: Path, function: str) -> None:
    assert run(function, "a\n\nb \r\n\u00fc") == 0
    wanted = ["a", "", "b ", "\u00fc"]
    if function == "upper":
        wanted = [text.upper() for text in wanted]
    assert results() == wanted
    assert [record["index"] for record in read("out")] == [0, 1, 2, 3]
    assert [record["input"] for record in read("out")] == ["a", "", "b ", "\u00fc"]
    assert read("bad") == []


def test_a_plain_function_runs_in_threads(here: Path) -> None:
    assert run("length", "a\nbb\nccc\n") == 0
    assert results() == [1, 2, 3]


def test_no_line_is_no_answer(here: Path) -> None:
    assert run("upper", "") == 0
    assert read("out") == read("bad") == []


def test_answers_wait_for_those_before_them(here: Path) -> None:
    lines.forget()
    assert run("count_down", "0\n1\n2\n3\n4\n") == 0
    assert results() == ["0", "1", "2", "3", "4"]


def test_unordered_answers_do_not_wait(here: Path) -> None:
    lines.forget()
    assert run("count_down", "0\n1\n2\n3\n4\n", "--unordered") == 0
    assert results()[-1] == "0"
    assert sorted(results()) == ["0", "1", "2", "3", "4"]


def test_failures_have_a_file_and_an_exit_code(here: Path) -> None:
    assert run("refuse_odd", "2\n3\nx\n") == 1
    assert results() == [2]
    failures = read("bad")
    assert failures[0] == {
        "index": 1,
        "input": "3",
        "error": "ValueError: 3 is odd",
        "started": True,
        "attempts": 1,
    }
    assert failures[1]["index"] == 2


def test_failures_go_to_standard_error_by_default(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("in").write_text("1\n2\n")
    code = main(["map", "lines:refuse_odd", "--input", "in"])
    output, error = capfd.readouterr()
    assert code == 1
    assert json.loads(output)["result"] == 2
    assert json.loads(error)["error"] == "ValueError: 1 is odd"


def test_json_is_shown_as_it_came(here: Path) -> None:
    data = '{"a": 1.50}\n\n  \n[1,\r2]\n"\\ud800"\n'
    assert run("same", data, "--json") == 0
    assert results() == [{"a": 1.5}, [1, 2], "\ud800"]
    assert [record["index"] for record in read("out")] == [0, 3, 4]
    assert b'"input": {"a": 1.50}' in Path("out").read_bytes()


def test_what_a_function_does_to_its_item_is_not_shown(here: Path) -> None:
    assert run("change", '{"a": 1}\n', "--json") == 0
    assert read("out")[0]["input"] == {"a": 1}
    assert results() == [{"a": 1, "changed": True}]


@pytest.mark.parametrize("mode", [[], ["--unordered"], ["--key", "item"]])
def test_a_line_that_is_no_item_is_its_own_failure(here: Path, mode: list[str]) -> None:
    bad = [b"nope", b"[NaN]", b'"\xff"', b"[" * 100_000, b"9" * 5_000]
    assert run("same", b"1\n" + b"\n".join(bad) + b"\n2", "--json", *mode) == 1
    assert sorted(results()) == [1, 2]
    failures = sorted(read("bad"), key=lambda failure: failure["index"])
    assert [failure["index"] for failure in failures] == [1, 2, 3, 4, 5]
    for failure in failures:
        assert failure["error"].startswith("BadLine: the line is not ")
        assert (failure["started"], failure["attempts"]) == (False, 0)
    assert failures[0]["input"] == "nope"
    assert failures[2]["input"] == '"\\xff"'


def test_text_that_is_not_utf8_is_a_failure(here: Path) -> None:
    assert run("same", b"a\n\xff\n") == 1
    assert errors()[0].startswith("BadLine: the line is not UTF-8")


def test_many_lines_that_are_no_items_keep_no_others_waiting(here: Path) -> None:
    assert run("same", "x\n" * 3_000 + "1\n", "--json", "--workers", "1") == 1
    assert results() == [1]
    assert [failure["index"] for failure in read("bad")] == list(range(3_000))


def test_a_result_without_json_is_a_failure(here: Path) -> None:
    assert run("never_json", "set\nnan\ncircle\nhalf\n") == 1
    assert results() == ["\ud800"]
    assert [error.split(":")[0] for error in errors()] == ["BadResult"] * 3
    assert all(failure["attempts"] == 1 for failure in read("bad"))


def test_long_lines_are_whole(here: Path) -> None:
    long = "x" * 200_000
    assert run("length", f"{long}\na\n{long}{long}") == 0
    assert results() == [200_000, 1, 400_000]


# How it runs.


def test_retries_are_further_attempts(here: Path) -> None:
    assert run("improve", "a\n", "--retries", "2") == 0
    assert results() == [3]


def test_a_failure_says_how_often_it_was_tried(here: Path) -> None:
    assert run("refuse_odd", "1\n", "--retries", "1") == 1
    assert read("bad")[0]["attempts"] == 2


@pytest.mark.parametrize("function", ["hang", "nap_in_thread"])
def test_a_timeout_ends_a_line(here: Path, function: str) -> None:
    assert run(function, "hang\n", "--timeout", "0.05") == 1
    assert errors()[0].startswith("JobTimeout: ")
    assert read("bad")[0]["started"] is True


def test_a_rate_spaces_the_starts(here: Path) -> None:
    begun = time.monotonic()
    assert run("upper", "a\nb\nc\n", "--rate", "20") == 0
    assert time.monotonic() - begun >= 0.1


@pytest.mark.parametrize("mode", [[], ["--unordered"]])
def test_items_of_a_key_run_one_at_a_time_in_order(here: Path, mode: list[str]) -> None:
    items = [f"{number % 3}-{number:03}" for number in range(60)]
    data = "\n".join(items)
    assert run("mind_key", data, "--key", "item[0]", *mode) == 0
    for key in "012":
        assert lines.most[key] == 1
        wanted = [item for item in items if item[0] == key]
        assert [item for item in lines.calls if item[0] == key] == wanted
    assert lines.most["all"] > 1
    assert (sorted(results()) if mode else results()) == (
        sorted(items) if mode else items
    )


def test_no_key_is_bound_to_no_order(here: Path) -> None:
    assert run("mind_key", "a1\na2\na3\n", "--key", "None") == 0
    assert lines.most["a"] > 1


@pytest.mark.parametrize("key", ["item[0]", "[item]", "len(missing)"])
def test_a_key_that_cannot_be_told_is_a_failure_of_that_line(
    here: Path, key: str
) -> None:
    assert run("same", "\n", "--key", key) == 1
    assert errors()[0].startswith("BadKey: ")
    assert read("bad")[0]["started"] is False


@pytest.mark.parametrize("mode", [[], ["--key", "item"]])
def test_a_slow_line_lets_others_go_ahead_but_not_for_ever(
    here: Path, mode: list[str]
) -> None:
    data = "".join(f"{number}\n" for number in range(5_000))
    assert run("wait_for_rest", data, *mode) == 0
    assert 1_000 <= lines.most["ahead"] <= 1_100
    assert results() == [str(number) for number in range(5_000)]


def test_unordered_a_slow_line_holds_up_nothing(here: Path) -> None:
    data = "".join(f"{number}\n" for number in range(5_000))
    assert run("wait_for_rest", data, "--unordered") == 0
    assert lines.most["ahead"] == 5_000
    assert results()[-1] == "0"


def test_a_worker_that_breaks_fails_its_own_line(here: Path) -> None:
    assert run("exit_at_2", "1\n2\n3\n") == 1
    assert results() == ["1", "3"]
    assert errors()[0].startswith("WorkerCrashed: ")
    assert errors()[0].endswith("SystemExit: 5")


@pytest.mark.parametrize("mode", [[], ["--key", "item[-1]"]])
def test_a_pool_that_breaks_ends_the_run(
    here: Path, mode: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    data = "".join(f"{number}\n" for number in range(100))
    assert run("always_exit", data, "--workers", "1", *mode) == 3
    assert "trio-pool map: pool 'map' is broken" in capfd.readouterr().err
    assert 1 <= len(errors()) < 100


def test_an_error_of_another_pool_is_a_failure_as_any(here: Path) -> None:
    assert run("hear_closed", "a\n") == 1
    assert errors() == ["PoolClosed: pool 'another' is closed: it takes no more jobs"]


def test_ctrl_c_in_a_function_ends_the_run(here: Path) -> None:
    assert run("interrupt", "a\n") == 130


def test_what_a_function_prints_is_no_answer(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("in").write_text("a\n")
    assert main(["map", "lines:talk", "--input", "in"]) == 0
    output, error = capfd.readouterr()
    assert json.loads(output)["result"] == "a"
    assert "talking" in error


def test_progress_is_shown_on_standard_error(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("upper", "a\nb\n", "--progress") == 0
    assert "2" in capfd.readouterr().err


def test_a_dashboard_is_served_meanwhile(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("starlette")
    pytest.importorskip("hypercorn")
    assert run("upper", "a\n", "--dashboard", "127.0.0.1:0") == 0
    assert "dashboard at http://127.0.0.1:" in capfd.readouterr().err
    assert results() == ["A"]


# What is refused, before anything has changed.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "0"], ["--workers", "1 or more", "'0'"]),
        (["--workers", "x"], ["--workers", "'x'"]),
        (["--retries", "-1"], ["--retries", "0 or more", "'-1'"]),
        (["--rate", "0"], ["--rate", "above 0", "'0'"]),
        (["--rate", "inf"], ["--rate", "'inf'"]),
        (["--timeout", "nan"], ["--timeout", "'nan'"]),
        (["--work", "3"], ["--work"]),
    ],
)
def test_a_bad_option_is_named(
    here: Path,
    options: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("upper", "a\n", *options)
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(word in error for word in words)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("function", "word"),
    [
        ("lines", "module:function"),
        (":upper", "module:function"),
        ("missing_one:upper", "cannot import 'missing_one'"),
        ("broken_one:upper", "ZeroDivisionError"),
        ("exiting_one:upper", "SystemExit"),
        ("lines:missing", "'lines' has no 'missing'"),
        ("lines:NUMBER", "must be a function, but is of type int"),
        ("lines:take_two", "must take one argument"),
    ],
)
def test_a_bad_function_is_refused_before_anything_is_read(
    here: Path, function: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken_one.py").write_text("1 / 0")
    Path("exiting_one.py").write_text("raise SystemExit('bye')")
    code = main(["map", function, "--input", "missing", "--output", "out"])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("trio-pool map: ")
    assert len(error.splitlines()) == 1
    assert word in error
    assert not Path("out").exists()


def test_the_current_directory_can_be_imported_from(here: Path) -> None:
    Path("my_functions.py").write_text(
        "class Double:\n    @staticmethod\n    def it(x): return x * 2\n"
    )
    Path("in").write_text("ab\n")
    files = ["--input", "in", "--output", "out"]
    assert main(["map", "my_functions:Double.it", *files]) == 0
    assert results() == ["abab"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--key", "a b"], "--key must be a Python expression"),
        (["--input", "missing"], "cannot open --input 'missing': No such file"),
        (["--input", "."], "cannot open --input '.': Is a directory"),
        (["--output", "in"], "--input and --output must be different"),
        (["--failures", "./out"], "must be different"),
        (["--output", "missing/out"], "cannot open --output 'missing/out'"),
        (["--failures", "missing/bad"], "cannot open --failures 'missing/bad'"),
        (["--dashboard", "a:b:c"], "--dashboard 'a:b:c': "),
    ],
)
def test_what_cannot_be_done_is_refused(
    here: Path, options: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--dashboard" in options:
        pytest.importorskip("starlette")
    Path("out").write_text("old")
    Path("in").write_text("a\n")
    words = ["map", "lines:upper", "--input", "in", "--output", "out", *options]
    assert main(words) == 2
    assert word in capsys.readouterr().err
    assert Path("out").read_text() == "old"
    assert Path("in").read_text() == "a\n"


def test_without_a_command_it_says_what_there_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main([])
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "map" in capsys.readouterr().out


def test_help_tells_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["map", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(code in text for code in ("130, 143", "141", "evaluated"))


# Pipes, full disks, signals: in a process of its own.


def test_answers_come_while_the_input_is_open(start: Callable[..., Command]) -> None:
    command = start("lines:hang")
    command.tell(b"a\n")
    assert command.hear_line()["result"] == "a"
    command.tell(b"b\nc")
    assert command.hear_line()["result"] == "b"
    code, output, _ = command.end()
    assert code == 0
    assert json.loads(output)["result"] == "c"


def test_a_slow_line_holds_back_no_answer_before_it(
    start: Callable[..., Command],
) -> None:
    command = start("lines:hang")
    command.tell(b"a\nhang\n")
    assert command.hear_line()["result"] == "a"


def test_an_output_that_is_closed_ends_the_run_quietly(
    start: Callable[..., Command],
) -> None:
    command = start("lines:upper")
    assert command.process.stdout is not None
    command.tell(b"a\n")
    command.hear_line()
    command.process.stdout.close()
    command.tell(b"b\n")
    assert command.process.wait(PATIENCE) == 141
    assert command.process.stderr is not None
    assert command.process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("option", ["--output", "--failures"])
def test_a_full_disk_is_one_clear_error(
    here: Path, option: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = "".join(f"{number}\n" for number in range(5_000))
    assert run("refuse_odd", data, option, "/dev/full") == 3
    error = capfd.readouterr().err
    assert error.startswith(f"trio-pool map: cannot write {option} '/dev/full': ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
@pytest.mark.parametrize("function", ["hang", "hang_in_thread"])
def test_a_signal_stops_a_run_whose_input_is_stuck(
    start: Callable[..., Command], function: str, number: int, code: int
) -> None:
    command = start(f"lines:{function}", "--unordered")
    command.tell(b"hang\na\n")
    assert command.hear_line()["result"] == "a"
    command.process.send_signal(number)
    assert command.process.wait(PATIENCE) == code
    assert command.end()[1:] == (b"", b"")


def test_the_second_signal_waits_for_nothing(start: Callable[..., Command]) -> None:
    command = start("lines:resist")
    command.tell(b"a\n")
    assert command.process.stderr is not None
    assert command.process.stderr.readline() == b"resisting\n"
    # Of two that come at once the system may make one.
    until = time.monotonic() + PATIENCE
    while command.process.poll() is None and time.monotonic() < until:
        command.process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert command.process.returncode == 130


# What is in the way of others, or comes back.


def test_a_file_that_is_a_standard_stream_too_is_left_alone(
    start: Callable[..., Command],
) -> None:
    Path("same").write_text("a\n")
    with Path("same").open("rb") as file:
        reading = start("lines:same", "--output", "same", stdin=file)
        assert reading.end()[0] == 2
    with Path("same").open("ab") as file:
        adding = start("lines:same", "--input", "same", stdout=file)
        assert adding.end()[0] == 2
    assert Path("same").read_text() == "a\n"


def test_an_import_that_goes_elsewhere_moves_no_file(here: Path) -> None:
    Path("below").mkdir()
    Path("moving.py").write_text("import os\nos.chdir('below')\nsame = str\n")
    Path("in").write_text("a\n")
    assert main(["map", "moving:same", "--input", "in", "--output", "out"]) == 0
    assert (here / "out").exists()


def test_what_a_function_starts_shares_no_stream(start: Callable[..., Command]) -> None:
    command = start("lines:use_streams", "--workers", "1")
    command.tell(b"a\nb\n")
    code, output, error = command.end()
    assert code == 0
    assert [json.loads(line)["result"] for line in output.splitlines()] == ["0", "0"]
    assert b"a child" in error


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_named_pipe_that_nobody_reads_any_more_ends_the_run(
    start: Callable[..., Command],
) -> None:
    os.mkfifo("pipe")
    command = start("lines:upper", "--output", "pipe")
    command.tell(b"a\n")
    with Path("pipe").open("rb") as pipe:
        assert pipe.readline()
    command.tell(b"b\n")
    assert command.process.wait(PATIENCE) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_one_clear_error_beside_progress_too(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("nap", "a\nb\n", "--output", "/dev/full", "--progress") == 3
    error = capfd.readouterr().err
    assert "cannot write --output '/dev/full'" in error
    assert "Traceback" not in error


def test_answers_behind_a_line_that_has_none_are_written_at_the_end(here: Path) -> None:
    assert run("stop_at_first", "0\n1\n2\n") == 130
    assert results() == ["1", "2"]


def test_threads_that_hold_all_workers_end_the_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_threads, "_PATIENCE", 0.1)
    options = ("--workers", "1", "--timeout", "0.05")
    assert run("hang_in_thread", "hang\na\n", *options) == 3
    assert "all workers are held by threads" in capfd.readouterr().err


def test_lines_that_wait_are_bounded_in_bytes() -> None:
    answers = Answers(Tally(), ordered=True, workers=2)
    for index in range(2):
        assert answers.has_room(index)
        answers.expect(index, 1 << 24)
    assert not answers.has_room(2)
    answers.give(0, b"")
    assert answers.has_room(2)


def test_an_exit_in_an_error_or_a_key_is_a_failure_of_that_line(here: Path) -> None:
    assert run("leave", "a\n") == 1
    assert errors() == ["Leaving: <its str failed>"]
    assert run("same", "a\n", "--key", "exit(0)") == 1
    assert errors() == ["BadKey: SystemExit: 0"]


def test_a_module_that_fails_to_give_a_name_is_refused(here: Path) -> None:
    Path("lazy_one.py").write_text("def __getattr__(name): raise ImportError('no')\n")
    assert main(["map", "lazy_one:it", "--input", "missing"]) == 2


def test_a_file_that_cannot_be_cut_is_one_clear_error(here: Path) -> None:
    Path("out").write_text("old")
    fd = os.open("out", os.O_RDONLY)
    target = Target("--output 'out'", fd, path="out")
    with closing(target), pytest.raises(Broken, match="cannot write --output"):
        target.cut()


def test_what_nobody_foresaw_is_told_and_is_no_failure_of_a_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(_map, "map_lines", fail)
    assert run("same", "a\n") == 3
    assert "RuntimeError: unforeseen" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="streams are closed by a shell")
@pytest.mark.parametrize("how", ["2>&-", "2>&1 >out | true"])
def test_a_refusal_that_nobody_can_hear_has_its_exit_code(here: Path, how: str) -> None:
    paths = [str(TESTS), str(TESTS.parent / "src")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    words = f"{sys.executable} -m trio_pool map lines:missing; echo $? > code"
    subprocess.run(["sh", "-c", f"({words}) {how}"], env=environment, timeout=PATIENCE)
    assert Path("code").read_text() == "2\n"


def test_what_is_refused_leaves_no_new_file(here: Path) -> None:
    assert run("same", "a\n", "--failures", "missing/bad", "--journal", "j") == 2
    assert run("same", "a\n", "--failures", "-") == 2
    assert sorted(path.name for path in here.iterdir()) == ["in"]


def test_each_attempt_has_the_item_as_it_came(here: Path) -> None:
    assert run("count_changes", "{}\n", "--json", "--retries", "1") == 0
    assert results() == [{"changes": 1}]


def test_a_mark_before_the_first_line_is_none_of_it(here: Path) -> None:
    assert run("same", b"\xef\xbb\xbf1\n2\n", "--json") == 0
    assert results() == [1, 2]


def peak_memory(command: Command) -> int:
    """Wait for the command; return the most that it had, in KB."""
    _, status, usage = os.wait4(command.process.pid, 0)
    command.process.returncode = os.waitstatus_to_exitcode(status)
    assert command.process.returncode == 0
    return usage.ru_maxrss


@pytest.mark.skipif(sys.platform != "linux", reason="others count in other units")
@pytest.mark.parametrize("mode", ["--json", "--unordered"])
def test_memory_does_not_grow_with_the_input(
    start: Callable[..., Command], mode: str
) -> None:
    many = 1_000_000 if os.environ.get("TRIO_POOL_STRESS") else 20_000
    peaks = []
    for number in (2_000, many):
        Path("in").write_text("".join(f"{n}\n" for n in range(number)))
        files = ("--input", "in", "--output", "out", "--journal", f"journal{number}")
        peaks.append(peak_memory(start("lines:same", mode, *files)))
        assert len(Path("out").read_bytes().splitlines()) == number
    assert peaks[1] < peaks[0] + 8_000
