"""Break the pool's core on purpose, one small change at a time; see which tests notice.

  python3 noxfile.py mutants --module _timer          all mutants of a module
  python3 noxfile.py mutants --sample 60 --seed 1     at most 60 of each module
  python3 noxfile.py mutants --list --module _timer   name them, run nothing

A mutant is the source of one module with one change by an operator of cosmic-ray,
or with one statement taken out. It is *killed* if a test fails, *timed out* if one
hangs, and *survives* if all tests pass that run its line. A survivor is either
explained in `explained.toml`, or it is news: something that no test promises. The
command fails if there is news.

What makes it quick enough to use: each mutant is a fork of one process that has
collected all tests. There the changed function is given its new code, and only tests
run that were seen to run the line: those of files whose subject the module is and
what has killed before come first, then quick ones, until the budget is spent. What is
run at import, such as a default or a decorator, is tried in forks that import anew.

What is not mutated, as no test should care: annotations, `TYPE_CHECKING` blocks,
assertions (they tell the type checker), `__repr__`, what is logged, the text that
`cancel` is given as its reason, `final` and `overload`. Of the many replacements of
one operator by another, the one or two are kept that are hardest to notice.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from campaign import Campaign
from sessions import observe, say
from sources import KEY, PACKAGE, ROOT, Module, Mutant, core_modules, path_of

EXPLAINED = Path(__file__).with_name("explained.toml")


def explained() -> dict[tuple[str, ...], Any]:
    """Read why some survive. Entries are known by their lines' texts, not numbers."""
    if not EXPLAINED.exists():
        return {}
    found = tomllib.loads(EXPLAINED.read_text(encoding="utf-8"))
    return {
        (entry["module"], entry["function"], operator, entry["was"], becomes): entry
        for entry in found["survivor"]
        for operator in _listed(entry["operator"])
        for becomes in _listed(entry["becomes"])
    }


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def print_report(totals: dict[str, int], results: list[dict[str, Any]]) -> bool:
    """Print a line per module, and every survivor that is news; say if there is any."""
    reasons = explained()
    heads = ("mutants", "run", "killed", "timed out", "survived", "explained")
    print(f"{'module':12}" + "".join(f"{head:>10}" for head in heads) + "     score")
    news: list[dict[str, Any]] = []
    sums: Counter[str] = Counter()
    for module, total in totals.items():
        own = [facts for facts in results if facts["module"] == module]
        counts = Counter(facts["fate"] for facts in own)
        counts["mutants"], counts["run"] = total, len(own)
        for facts in own:
            if facts["fate"] == "survived":
                key = tuple(facts[f] for f in KEY)
                if key in reasons:
                    counts["explained"] += 1
                else:
                    news.append(facts)
        sums.update(counts)
        _print_line(module, heads, counts)
    _print_line("all", heads, sums)
    for facts in news:
        print("\n[[survivor]]  # line", facts["line"])
        for field in KEY:
            print(f"{field} = {json.dumps(facts[field], ensure_ascii=False)}")
        print('why = ""')
    return bool(news)


def _print_line(name: str, heads: tuple[str, ...], counts: Counter[str]) -> None:
    judged = counts["run"] - counts["explained"]
    dead = counts["killed"] + counts["timed out"]
    score = f"{100 * dead / judged:8.1f} %" if judged else "       -"
    print(f"{name:12}" + "".join(f"{counts[head]:10}" for head in heads) + score)


def parse_options(arguments: list[str]) -> Any:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--module", action="append", help="only this module; may be repeated")
    add("--function", help="only what is in functions whose name has this in it")
    add("--sample", type=int, default=sys.maxsize, help="at most so many of a module")
    add("--seed", type=int, default=0, help="which sample")
    add("--jobs", type=int, default=2, help="processes at a time")
    add("--operator", help="only those of operators whose name has this in it")
    add(
        "--budget",
        type=float,
        default=12.0,
        help="seconds of tests for a mutant; thrice as many of files about its module",
    )
    add("--results", help="append every result to this file, a JSON object a line")
    add("--again", help="only those that survived in the results of an earlier run")
    add("--skip", help="not those that are in the results of an earlier run")
    add("--report", help="run nothing, report the results of earlier runs")
    add("--cache", default=os.path.join(tempfile.gettempdir(), "mutants-cache"))
    add("--list", action="store_true", help="name the mutants and run nothing")
    return parser.parse_args(arguments)


def read_results(file: str) -> list[dict[str, Any]]:
    """Read the results of earlier runs; of one mutant the last counts."""
    with Path(file).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def make_plan(
    options: Any, root: Path
) -> tuple[dict[str, int], list[tuple[Mutant, Module]]]:
    """Make the mutants that the options ask for; count those of each module."""
    totals: dict[str, int] = {}
    plan: list[tuple[Mutant, Module]] = []
    for name in options.module or core_modules():
        module = Module(name, path_of(name, root))
        draw = random.Random(f"{options.seed} {name}")
        totals[name], mutants = module.mutants(draw, options.sample)
        plan += [(mutant, module) for mutant in mutants]
    if options.function:
        plan = [pair for pair in plan if options.function in pair[0].function]
    if options.operator:
        plan = [pair for pair in plan if options.operator in pair[0].operator]
    if options.again:
        last = {_place(facts): facts["fate"] for facts in read_results(options.again)}
        plan = [pair for pair in plan if last.get(pair[0].place) == "survived"]
    if options.skip and Path(options.skip).exists():
        known = {_place(facts) for facts in read_results(options.skip)}
        plan = [pair for pair in plan if pair[0].place not in known]
    return totals, plan


def _place(facts: dict[str, Any]) -> tuple[Any, ...]:
    return (facts["line"], *(facts[field] for field in KEY))


def main(arguments: list[str]) -> int:
    """Run what the options ask for; return 1 if a survivor is news."""
    options = parse_options(arguments)
    if options.report:
        totals, plan = make_plan(options, ROOT)
        latest = {_place(facts): facts for facts in read_results(options.report)}
        found = [latest[m.place] for m, _ in plan if m.place in latest]
        return int(print_report(totals, found))
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        # The checkout may be worked on meanwhile.
        root = Path(folder) / "tree"
        forget = shutil.ignore_patterns(".*", "__pycache__")
        shutil.copytree(ROOT, root, ignore=forget)
        totals, plan = make_plan(options, root)
        if options.list:
            for mutant, _ in plan:
                print(mutant.module, mutant.line, mutant.operator, end=": ")
                print(mutant.was, " ->  ", mutant.becomes)
            return 0
        # Before the package of the checkout, should that be installed.
        sys.path.insert(0, str(root / "src"))
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        warm_up()
        os.chdir(root)
        campaign = Campaign(root, observe(root, Path(options.cache)), options)
        say(f"{len(plan)} mutants")
        campaign.run(plan)
        os.chdir(ROOT)
    return int(print_report(totals, campaign.results))


def warm_up() -> None:
    """Import what tests need and what has nothing of the package."""
    for name in (
        *("hypothesis.stateful", "hypothesis.strategies", "trio.testing", "tenacity"),
        *("pytest_trio.plugin", "_hypothesis_pytestplugin", "asyncio", "tracemalloc"),
    ):
        importlib.import_module(name)
    assert PACKAGE not in sys.modules
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of sets is that of the last run.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.exit(main(sys.argv[1:]))
