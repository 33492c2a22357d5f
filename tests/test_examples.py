"""The examples run as their own programs, and their output is what they promise."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from offloaded import BACKENDS

EXAMPLES = Path(__file__).parents[1] / "examples"
CHECKSUMS = EXAMPLES / "checksums.py"
COMMAND = [sys.executable, "-W", "error", str(CHECKSUMS)]
SUMMARY = r"(\d+) files, \d+\.\d MB in \d+\.\d s \(.* MB/s\), (\d+) failed\n\Z"

on_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")

LONG_NAME = "n" * 200

CONTENTS = {
    "empty": b"",
    "small": b"hello\n",
    # Larger than the buffer of a worker, and not a multiple of it.
    "large": bytes(range(256)) * 12_345,
    "below/deeper/last": b"x",
    "below/with space": b"1",
    "below/näme": b"2",
}
ODD_NAMES = {
    "line\nbreak": b"3",
    "back\\slash": b"4",
    "return\rhere": b"5",
    " lead": b"6",
    "-dash": b"7",
}


def run(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Hash a tree; the time limit is only there to end a hang."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, timeout=50)


def fill(top: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(content)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    fill(tmp_path, CONTENTS)
    return tmp_path


@pytest.fixture
def out_of_reach(tree: Path) -> Iterator[Path]:
    """A file and a directory whose whole paths are too long to be opened.

    That stops everyone; permissions do not stop root.
    """
    top = path = tree / "zz"
    top.mkdir()
    folder = os.open(top, os.O_RDONLY)
    try:
        # Down to where one more such name is too much.
        while len(os.fsencode(path / LONG_NAME)) < os.pathconf(tree, "PC_PATH_MAX"):
            path /= LONG_NAME
            os.mkdir(LONG_NAME, dir_fd=folder)
            os.close(folder)
            folder = os.open(path, os.O_RDONLY)
        file = os.open(LONG_NAME, os.O_CREAT | os.O_WRONLY, dir_fd=folder)
        os.close(file)
        os.mkdir(LONG_NAME[1:] + "d", dir_fd=folder)
    finally:
        os.close(folder)
    yield tree
    shutil.rmtree(top)


def test_the_sums_are_right_and_in_the_order_of_the_files(tree: Path) -> None:
    done = run(tree, "--workers", 3)
    lines = done.stdout.decode().splitlines()
    assert lines == [
        f"{hashlib.sha256(CONTENTS[name]).hexdigest()}  {tree / name}"
        for name in [
            "empty",
            "large",
            "small",
            "below/näme",
            "below/with space",
            "below/deeper/last",
        ]
    ]
    summary = re.search(SUMMARY, done.stderr.decode())
    assert summary is not None
    assert summary.groups() == ("6", "0")
    assert done.returncode == 0


@on_posix
@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_accepts_the_output_for_any_name(tree: Path) -> None:
    fill(tree, ODD_NAMES)
    # A name that is no text at all, where the file system allows it.
    undecodable = os.fsencode(tree) + b"/\xff\xfe"
    try:
        Path(os.fsdecode(undecodable)).write_bytes(b"8")
    except OSError:
        undecodable = b""
    done = run(tree)
    check = subprocess.run(
        ["sha256sum", "--strict", "-c"],
        input=done.stdout,
        capture_output=True,
        check=False,
    )
    assert check.returncode == 0, check
    expected = len(CONTENTS) + len(ODD_NAMES) + bool(undecodable)
    assert check.stdout.count(b": OK\n") == expected
    assert done.returncode == 0


def test_the_algorithm_and_the_workers_can_be_chosen(tree: Path) -> None:
    done = run(tree, "--workers", 1, "--algorithm", "md5")
    digest = hashlib.new("md5", b"", usedforsecurity=False).hexdigest()
    assert f"{digest}  {tree / 'empty'}\n" in done.stdout.decode()


def test_an_empty_directory_has_no_sums(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.stdout, done.returncode) == (b"", 0)
    assert re.search(SUMMARY, done.stderr.decode())


@on_posix
def test_only_regular_files_are_hashed(tmp_path: Path) -> None:
    """A link is not followed, and a pipe would be waited for for ever."""
    fill(tmp_path, {"file": b"x"})
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    done = run(tmp_path)
    assert len(done.stdout.splitlines()) == 1
    assert done.returncode == 0


@on_posix
def test_what_cannot_be_opened_is_reported_and_the_rest_hashed(
    out_of_reach: Path,
) -> None:
    done = run(out_of_reach, "--workers", 2)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == len(CONTENTS)
    error = done.stderr.decode()
    for name in (LONG_NAME, LONG_NAME[1:] + "d"):
        assert f"{name}': File name too long\n" in error
    summary = re.search(SUMMARY, error)
    assert summary is not None
    assert summary.groups() == (str(len(CONTENTS)), "2")


@on_posix
@pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything"
)
def test_what_may_not_be_read_is_reported_and_the_rest_hashed(tree: Path) -> None:
    (tree / "small").chmod(0)
    (tree / "below" / "deeper").chmod(0)
    try:
        done = run(tree)
    finally:
        (tree / "below" / "deeper").chmod(0o700)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == len(CONTENTS) - 2
    error = done.stderr.decode()
    assert f"checksums: {str(tree / 'small')!r}: Permission denied\n" in error
    assert f"checksums: {str(tree / 'below' / 'deeper')!r}: " in error
    assert "2 failed" in error


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["no such directory"], "not a directory: 'no such directory'"),
        ([".", "--workers", "0"], "expected at least 1, got 0"),
        ([".", "--algorithm", "rot13"], "invalid choice: 'rot13'"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], complaint: str) -> None:
    done = run(*arguments)
    error = done.stderr.decode()
    assert done.returncode == 2
    assert complaint in error
    assert "Traceback" not in error
    assert done.stdout == b""


@on_posix
def test_ctrl_c_leaves_at_once_with_one_clear_line(tmp_path: Path) -> None:
    """In the middle of a file that would take minutes."""
    fill(tmp_path, {"a": b"x"})
    with open(tmp_path / "b", "wb") as sparse:
        sparse.truncate(1 << 36)
    # Where the tests run in the background Ctrl-C may be ignored, which a child
    # inherits; a handler is reset to the default instead.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen([*COMMAND, str(tmp_path)], stdout=pipe, stderr=pipe)
    finally:
        signal.signal(signal.SIGINT, ours)
    with child:
        try:
            assert child.stdout is not None
            # The first file is done, so the second is being read.
            first = child.stdout.readline()
            child.send_signal(signal.SIGINT)
            rest, error = child.communicate(timeout=20)
        finally:
            child.kill()
    assert os.fsdecode(first).endswith(f"{tmp_path / 'a'}\n")
    assert rest == b""
    assert error.decode() == "checksums: interrupted\n"
    assert child.returncode == 130


@on_posix
def test_a_reader_that_leaves_is_no_error_to_talk_about(tmp_path: Path) -> None:
    """As under `head`: the pipe is closed while there is more to say."""
    fill(tmp_path, {f"{number:03}": b"" for number in range(200)})
    command = [*COMMAND, str(tmp_path), "--workers", "1"]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            command, stdout=writing, stderr=subprocess.PIPE, check=False, timeout=50
        )
    finally:
        os.close(writing)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr


def run_sizing(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "sizing.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, check=False, text=True, timeout=50
    )


def test_the_size_that_keeps_the_promise_is_found() -> None:
    """Takes some seconds: thousands of jobs for each size."""
    done = run_sizing("--jobs", "4000")
    assert done.stderr == ""
    assert done.returncode == 0
    heads, *rows, answer = done.stdout.splitlines()
    assert heads.split()[:3] == ["workers", "backlog", "busy"]
    # Workers are added until the p99 is at most 0.75 seconds.
    grown = [row.split() for row in rows if "inf" in row]
    assert [row[0] for row in grown] == ["9", "10"]
    assert float(grown[0][-2]) > 0.75 >= float(grown[-1][-2])
    # The backlog is doubled until next to nobody is turned away.
    bounded = [row.split() for row in rows if "inf" not in row]
    assert [int(row[1]) for row in bounded] == [1 << n for n in range(len(bounded))]
    shares = [float(row[4].rstrip("%")) for row in bounded]
    assert shares == sorted(shares, reverse=True)
    assert shares[-2] > 0.1 >= shares[-1]
    assert answer == f"open_pool(10, handler, max_backlog={bounded[-1][1]})"


def test_a_promise_that_no_pool_keeps_is_told() -> None:
    done = run_sizing("--jobs", "100", "--promise", "0.01")
    assert done.returncode == 1
    complaint = "no number of workers keeps the promise: the jobs take too long\n"
    assert done.stderr == complaint


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rate", "0"], "rate must be a finite number of jobs a second > 0"),
        (["--p99", "0.01"], "p99 must be a number of seconds >= p50 (0.1)"),
    ],
)
def test_a_load_that_cannot_be_is_refused(arguments: list[str], complaint: str) -> None:
    done = run_sizing(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


# ----------------------------------------------------------------------
# mandelbrot.py

PLACES = {"threads": "thread", "processes": "process", "dask": "dask", "ray": "ray"}
PICTURE = "8c7c9c77211182107877c40af6524b2ebe4485f6e978426c5956000ee9ceb390"


@pytest.mark.parametrize("place", PLACES)
def test_the_same_picture_is_drawn_wherever_it_is(place: str, tmp_path: Path) -> None:
    (backend,) = [each for each in BACKENDS if each.name == PLACES[place]]
    if backend.missing:
        pytest.skip(backend.missing)
    picture = tmp_path / "picture.png"
    found = subprocess.run(
        [
            *(sys.executable, EXAMPLES / "mandelbrot.py", "--on", place),
            *("--workers", "2", "--width", "64", "--out", picture),
        ],
        capture_output=True,
        check=False,
        timeout=90,
    )
    assert found.stdout == b""
    assert re.fullmatch(rb"(\r[ \d]{3}%)+\n", found.stderr)
    assert found.stderr.endswith(b"\r100%\n")
    assert hashlib.sha256(picture.read_bytes()).hexdigest() == PICTURE


def test_the_picture_of_the_readme_is_one_of_the_example() -> None:
    head = (EXAMPLES / "mandelbrot.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:]) == (480, 300)
