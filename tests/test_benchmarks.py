"""The benchmarks do what they say they measure; how fast they do it is not asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import attrs
import pytest
import trio

# They are programs beside the package, not part of it.
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import acts
import chart
import compare
import contenders
import features
import guard
import memory
import offload
import pauses
import ratios
import scale
from driving import Contender, one_checkpoint_of_asyncio
from goals import at_most, below, faster
from measuring import Comparison, Row, measure
from table import cells, markdown

ROOT = Path(__file__).parents[1]

FEATURES = {
    f"{of} {name}": Contender(opener)
    for of, options in (("pool", features.POOL_OPTIONS), ("job", features.JOB_OPTIONS))
    for name, opener in options.items()
}
IN_THREADS = ("ThreadPoolExecutor", "ThreadPoolExecutor.map")


async def double(x):
    return 2 * x


async def double_later(x):
    await trio.lowlevel.checkpoint()
    return 2 * x


async def double_later_under_asyncio(x):
    return 2 * await one_checkpoint_of_asyncio(x)


def handlers(name, contender):
    yield double
    if name not in IN_THREADS:
        trio_loop = contender.loop == "trio"
        yield double_later if trio_loop else double_later_under_asyncio


def each(contenders):
    return pytest.mark.parametrize(
        ("name", "contender"), contenders.items(), ids=contenders
    )


@each(contenders.PROCESS | FEATURES)
def test_process_of_every_contender_gives_what_the_handler_gives(name, contender):
    if contender.needs:
        pytest.importorskip(contender.needs)

    async def main(handler):
        async with contender.opener(2, handler) as process:
            return [await process(x) for x in range(5)]

    for handler in handlers(name, contender):
        assert contender.run(main, handler) == [0, 2, 4, 6, 8]


@each(contenders.MAP | contenders.MANY)
def test_map_of_every_contender_gives_all_results(name, contender):
    if contender.needs:
        pytest.importorskip(contender.needs)

    async def main(handler):
        async with contender.opener(2, handler) as map_items:
            return await map_items(range(30))

    for handler in handlers(name, contender):
        found = contender.run(main, handler)
        if name == "settle":
            found = [settled.outcome.unwrap() for settled in found]
        if name in {"aiometer.amap", "stream, as ready"}:
            found = sorted(found)
        assert found == [2 * x for x in range(30)]


def test_every_timed_act_runs_with_few_jobs():
    """Takes a second: a hundred loops, each after a run of the collector."""
    for comparison in acts.comparisons(64):
        if comparison.section in {"process", "map", "features"}:
            rows = measure(comparison, rounds=1)
            assert [row.case for row in rows] == list(comparison.cases)
            assert all(row.minimum > 0 for row in rows)


def test_every_goal_is_that_of_a_case():
    libraries = (
        {"aiometer.run_on_each", "aiometer.amap"} if contenders.missing() else set()
    )
    named, cases = set(acts.FEATURE_GOALS), set()
    for comparison in acts.comparisons(64):
        cases |= set(comparison.cases)
        if comparison.section != "features":
            named |= set(comparison.goals)
            assert set(comparison.goals) - libraries <= set(comparison.cases)
    assert named - libraries <= cases


@pytest.mark.parametrize(
    "options",
    [scale.no_options, scale.spread_over_keys(20), scale.spread_over_priorities(7)],
)
async def test_jobs_at_a_depth_keep_it(options):
    assert await scale.job_at_depth(50, 200, options) > 0


async def test_scale_and_memory_run_with_few():
    assert await scale.job_among_workers(features.POOL_OPTIONS["off"], 20, 64) > 0
    assert await scale.open_and_close(10) > 0
    assert await scale.start_and_cancel_tasks(10) > 0
    assert await memory.queued_job(200, False) > 0
    assert await memory.queued_job(200, True) > await memory.queued_job(200, False)
    assert await memory.idle_worker(20) > 0
    assert await memory.sleeping_task(20) > 0


@pytest.mark.parametrize("way", ["pool.cancel()", "grace over", "error in the block"])
async def test_every_way_to_end_queued_jobs_is_watched(way):
    await pauses.time_to_end(way, 50)
    assert await pauses.pause_of_end(way, 50) > 0


async def test_pauses_of_map_and_of_nothing_are_watched():
    assert await pauses.pause_of_map(contenders.MAP[contenders.OURS].opener, 50) > 0
    assert await pauses.pause_of_nothing(0.002) > 0


async def test_watch_sees_how_long_it_was_kept_waiting():
    async with pauses.watching() as watch:
        await trio.lowlevel.checkpoint()
        start = pauses.perf_counter()
        while pauses.perf_counter() < start + 0.01:
            pass
        await trio.lowlevel.checkpoint()
    assert watch.longest >= 0.01


def test_goals_compare_as_the_table_shows():
    assert at_most(1.25).met(9.0, 1.254)
    assert not at_most(1.25).met(9.0, 1.26)
    assert faster(2).met(9.0, 0.5)
    assert not faster(2).met(9.0, 0.6)
    assert below(400, "bytes").met(400.0, None)
    assert not below(400, "bytes").met(401.0, 0.1)
    texts = [str(goal) for goal in (at_most(1), faster(6), below(10, "ms"))]
    assert texts == ["<= 1.00x", "6x faster", "<= 10 ms"]


def test_cases_take_turns_and_are_compared_by_their_minima():
    turns = []

    def case(name, values):
        def run():
            turns.append(name)
            return values.pop(0)

        return run

    cases = {"ours": case("ours", [3.0, 2.0]), "theirs": case("theirs", [8.0, 9.0])}
    comparison = Comparison("s", "act", cases, {"theirs": faster(5)}, rounds=2)
    ours, theirs = measure(comparison, rounds=7)
    assert turns == ["ours", "theirs"] * 2
    assert (ours.minimum, ours.median, ours.ratio, ours.met) == (2.0, 2.5, None, None)
    assert (theirs.ratio, theirs.met) == (0.25, False)


def test_ratio_of_a_feature_is_on_to_off():
    cases = {"off": lambda: 2.0, "on": lambda: 3.0}
    _, on = measure(Comparison("s", "act", cases, {}, "it to first"), rounds=1)
    assert on.ratio == 1.5


ROWS = [
    Row("process", "process, 64 callers, no-op", name, "us", (value,), ratio, goal)
    for name, value, ratio, goal in (
        (contenders.OURS, 5.0, None, None),
        (contenders.FLOOR, 4.0, 1.25, at_most(1.3)),
        ("peer", 20.0, 0.25, faster(5)),
    )
] + [Row("map", "map, no-op", contenders.OURS, "us", (0.5,), None, None)]


def test_tables_are_aligned_markdown():
    assert cells(ROWS[2])[2:] == (
        *("us", "20.00", "20.00", "4.0x faster", "5x faster", "NO"),
    )
    blocks = markdown(ROWS).split("\n\n")
    assert blocks[::2] == ["### process", "### map"]
    for block in blocks[1::2]:
        assert len({len(line) for line in block.splitlines()}) == 1


def test_verdict_counts_goals_and_names_those_not_met():
    assert compare.verdict(ROWS).splitlines() == [
        "1 of 2 goals are met.",
        "- not met: process, 64 callers, no-op, peer: 4.0x faster, goal 5x faster",
    ]


def test_compare_prints_tables_and_writes_figures(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    arguments = ["--rounds=1", "--jobs=64", "--only=map, one", f"--json={figures}"]
    compare.main(arguments)
    assert "### map" in capsys.readouterr().out
    rows = json.loads(figures.read_text())["rows"]
    assert {row["act"] for row in rows} == {"map, one checkpoint"}


def test_compare_says_that_no_act_is_called_so(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--only=no such act"])
    assert "no section or act has 'no such act'" in capsys.readouterr().err


def test_chart_is_the_same_for_the_same_figures(tmp_path):
    """Takes a second, for matplotlib."""
    pytest.importorskip("matplotlib")
    rows = compare.figures(ROWS)["rows"]
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    chart.draw(rows, first)
    chart.draw(rows, second)
    assert first.read_bytes() == second.read_bytes()
    # The names are text, not outlines of letters.
    assert "trio_pool</text>" in first.read_text(encoding="utf-8")


def test_chart_says_which_act_is_missing():
    with pytest.raises(ValueError, match="'map, no-op', which was not measured"):
        chart.bars([], "map, no-op")


def test_guard_names_what_moved_and_the_worst_first():
    old = {"a": 1.0, "b": 2.0, "c": 1.0, "d": 1.0, "gone": 1.0}
    new = {"a": 1.05, "b": 2.4, "c": 0.8, "d": 1.5, "new": 9.0}
    moves = guard.moved(old, new, tolerance=0.1)
    assert [move.act for move in moves] == ["d", "b", "c"]
    assert guard.worse(moves) == ["d", "b"]
    assert guard.moved(old, old, tolerance=0.0) == []


def test_guard_reports_every_act_and_what_was_skipped(tmp_path):
    old = guard.Side("v1", tmp_path, {"a": [1.0, 3.0, 1.1]}, {"b": "TypeError: no"})
    new = guard.Side("here", tmp_path, {"a": [2.0], "b": [1.0]})
    text = guard.report(old, new, tolerance=0.1)
    assert "+82%" in text
    assert "WORSE" in text
    assert "skipped, v1 cannot run it: b (TypeError: no)" in text


def test_guard_takes_a_directory_and_refuses_nonsense(capsys):
    with guard.source_of(str(ROOT)) as source:
        assert source == ROOT / "src"
    assert guard.main(["--base", "no such revision"]) == 2
    assert "no such revision: neither a directory" in capsys.readouterr().err


def test_reason_of_a_group_is_its_first_error():
    inner = ExceptionGroup("inner", [TypeError("no such option"), ValueError()])
    assert (
        ratios.reason(ExceptionGroup("outer", [inner])) == "TypeError: no such option"
    )


def test_every_act_of_the_guard_runs_and_a_missing_feature_is_named(monkeypatch):
    """Takes a second: thirty loops, each after a run of the collector."""
    found = ratios.measure_ratios(64, 1, ())
    assert found["failed"] == {}
    assert list(found["ratios"]) == list(ratios.acts(64))
    missing = "process, 64 callers, retry"
    monkeypatch.delattr("trio_pool.Retry")
    found = ratios.measure_ratios(64, 1, {missing})
    assert found["ratios"] == {}
    assert found["failed"][missing].startswith("AttributeError")


@pytest.mark.parametrize("name", ["thread", "executor", "process"])
async def test_engines_are_compared_with_pools_of_them(name, monkeypatch, capsys):
    if not offload.is_here(name):
        pytest.skip("the engine is not here")
    small = attrs.evolve(offload.ENGINES[name], jobs=80)
    monkeypatch.setitem(offload.ENGINES, name, small)
    await offload.compare(name, rounds=1)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| {name}", in_flight] for in_flight in ("1", "8")
    ]


async def test_the_engines_alone_do_what_a_pool_does():
    for name in ("thread", "executor"):
        async with offload.ENGINES[name].raw() as call:
            assert [await call(number) for number in range(3)] == [0, 1, 2]
    assert offload.spin(0.001) >= 0.001
