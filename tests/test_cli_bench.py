"""The command `trio-pool bench`: its figures are all there, and Ctrl-C ends it."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import trio

from trio_pool.cli import main
from trio_pool.cli._bench import measure
from trio_pool.cli._floors import floor_map, floor_process
from trio_pool.cli._measured import Measured, to_json, to_table

SOURCE = str(Path(__file__).parents[1] / "src")
ACTS = ["process, 1 caller", "process, 64 callers", "map, an item"]

on_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


async def double(number: int) -> int:
    if number % 3 == 0:
        await trio.lowlevel.checkpoint()
    return 2 * number


async def test_the_floors_do_the_work(autojump_clock) -> None:
    async with floor_process(3, double) as process:
        assert [await process(number) for number in range(5)] == [0, 2, 4, 6, 8]
        found: list[int] = []

        async def call(number: int) -> None:
            found.append(await process(number))

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(call, number)
        assert sorted(found) == [2 * number for number in range(20)]
    async with floor_map(3, double) as map_items:
        assert await map_items(range(100)) == [2 * number for number in range(100)]


async def test_every_round_of_every_act_is_measured_on_both_sides() -> None:
    found = await measure(rounds=3, jobs=70)
    assert [each.act for each in found] == ACTS
    for each in found:
        assert len(each.floor) == len(each.pool) == 3
        assert all(0 < value < 1e6 for value in (*each.floor, *each.pool))


def test_the_ratio_is_that_of_the_minima() -> None:
    measured = Measured("act", (2.0, 8.0, 5.0), (6.0, 3.0, 30.0))
    assert measured.ratio == 1.5
    *_, row = to_table([measured], 3, 1_000).splitlines()
    assert row.split() == ["act", "2", "(5)", "3", "(6)", "1.50"]
    (act,) = json.loads(to_json([measured], 3, 1_000))["acts"]
    assert act == {"act": "act", "floor": [2, 8, 5], "pool": [6, 3, 30], "ratio": 1.5}


def test_a_table_says_what_was_measured_where(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "--rounds", "2", "--jobs", "100"]) == 0
    told = capfd.readouterr()
    assert told.err == ""
    machine, how, empty, heads, *rows = told.out.splitlines()
    versions = rf"trio {re.escape(trio.__version__)}, trio_pool \S+"
    python = rf"CPython {platform.python_version()}"
    assert re.fullmatch(rf"{python}, {versions}, cores: [1-9]\d*", machine)
    assert how.endswith("8 workers, minimum (median) of 2 rounds of 100")
    assert (empty, heads.split()) == ("", ["bare", "trio", "trio_pool", "ratio"])
    figures = r" +\S+ \(\S+\)"
    for act, row in zip(ACTS, rows, strict=True):
        assert re.fullmatch(rf"{act}{figures}{figures} +\d+\.\d\d", row)


def test_json_has_the_figures_of_each_round(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--rounds", "3", "--jobs", "1", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["rounds"], found["jobs"], found["workers"]) == (3, 1, 8)
    assert found["trio"] == trio.__version__
    assert [act["act"] for act in found["acts"]] == ACTS
    for act in found["acts"]:
        assert len(act["floor"]) == len(act["pool"]) == 3
        assert act["ratio"] == min(act["pool"]) / min(act["floor"])
        assert median(act["pool"]) > 0


@pytest.mark.parametrize("option", ["--rounds", "--jobs"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "1000001"])
def test_numbers_that_cannot_be_are_refused(
    option: str, value: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", f"{option}={value}"])
    assert end.value.code == 2
    expected = "a whole number, from 1 to 1,000,000"
    complaint = f"argument {option}: must be {expected}, got {value!r}\n"
    assert capfd.readouterr().err.endswith(complaint)


@on_posix
def test_ctrl_c_ends_it_between_two_rounds() -> None:
    """Bare trio is no safer than it must be, and would hang if it were cancelled."""
    code = "import sys; from trio_pool.cli import _bench as bench, main\n"
    code += "begin = bench._time\n"
    code += "async def _time(*args):\n"
    code += "    sys.stderr.write('.'); sys.stderr.flush()\n"
    code += "    return await begin(*args)\n"
    code += "bench._time = _time\n"
    code += "sys.exit(main(['bench', '--rounds', '1000000', '--jobs', '200']))"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": SOURCE},
        stdout=pipe,
        stderr=pipe,
    ) as child:
        try:
            assert child.stderr is not None
            assert child.stderr.read(3) == b"..."
            child.send_signal(signal.SIGINT)
            output, error = child.communicate(timeout=60)
        finally:
            child.kill()
    assert (output, error.strip(b".")) == (b"", b"")
    assert child.returncode == 130
