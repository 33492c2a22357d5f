"""The campaign: at most so many mutants at a time, each in a fork; and the score."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import attrs
from placing import (
    Changes,
    Mutated,
    changed_functions,
    fits,
    functions_of,
    put_in_place,
)
from sessions import (
    BROKEN,
    LEFT_OUT,
    PATIENCE,
    Observed,
    Session,
    in_fork,
    own_files,
    say,
    tests_for,
)
from sources import PACKAGE, ROOT, Module, Mutant, path_of

# Seconds of all tests of a mutant.
LIMIT = 180.0

# A test that has killed more than so many is tried on each.
_MANY = 3

TEST_MODULES = {path.stem for path in (ROOT / "tests").rglob("*.py")}
TEST_MODULES -= {path.stem for path in Path(__file__).parent.glob("*.py")}


@attrs.define
class Run:
    """A fork that tries one mutant."""

    mutant: Mutant
    began: float
    said: int


class Campaign:
    """Runs mutants in forks, and keeps the score."""

    def __init__(self, root: Path, seen: Observed, options: Any) -> None:
        self._root, self._seen, self._options = root, seen, options
        self._kills: dict[str, Counter[str]] = defaultdict(Counter)
        self._runs: dict[int, Run] = {}
        self.results: list[dict[str, Any]] = []

    def run(self, mutants: list[tuple[Mutant, Module]]) -> None:
        """Try mutants of functions where they are, the others as they are imported."""
        slow: list[tuple[Mutant, Module]] = []
        left_out = [f"--ignore=tests/{name}" for name in sorted(LEFT_OUT)]

        def try_quick(session: Session) -> int:
            # What is frozen is not found.
            gc.unfreeze()
            gc.collect()
            functions = functions_of(self._root)
            gc.freeze()
            for mutant, module in mutants:
                path = str(path_of(module.name, self._root))
                try:
                    new = compile(mutant.source, path, "exec", dont_inherit=True)
                except SyntaxError:
                    continue
                changes = changed_functions(module.compiled(path), new)
                if changes is None or not fits(changes, functions[path]):
                    slow.append((mutant, module))
                elif changes:
                    call = partial(self._in_place, session, changes, functions[path])
                    self._start(mutant, module, call)
                # Else the compiler makes the same of both.
            self._wait_for_all()
            return 0

        if Session(try_quick).run(*left_out, "tests"):
            raise SystemExit("pytest could not collect the tests")
        say(f"{len(slow)} mutants of what is run at import")
        for mutant, module in slow:
            self._start(mutant, module, self._anew)
        self._wait_for_all()

    def _in_place(
        self,
        session: Session,
        changes: Changes,
        functions: list[FunctionType],
        run: Run,
        tests: list[str],
    ) -> int:
        if not put_in_place(changes, functions):
            print("none of", changes, "is among", functions)
            return BROKEN
        return session.all_pass(tests, self._seen.seconds, run.said)

    def _anew(self, run: Run, tests: list[str]) -> int:
        for name in tuple(sys.modules):
            house = name.partition(".")[0]
            if house == PACKAGE or house in TEST_MODULES:
                del sys.modules[name]
        sys.meta_path.insert(0, Mutated(run.mutant, self._root))
        # File by file, as what is dear here is to import them.
        files = dict.fromkeys(test.partition("::")[0] for test in tests)
        for file in files:
            os.pwrite(run.said, f"{file}::".ljust(400).encode(), 0)
            # The import may hang as well.
            signal.setitimer(signal.ITIMER_REAL, 10 * PATIENCE)
            own = [test for test in tests if test.partition("::")[0] == file]

            def try_file(session: Session, own: list[str] = own) -> int:
                return session.all_pass(own, self._seen.seconds, run.said)

            if Session(try_file).run(file):
                return 1
        return 0

    def _order(self, mutant: Mutant, module: Module) -> list[str]:
        """Put the tests into the order that finds a failure soonest."""
        seconds, kills = self._seen.seconds, self._kills[mutant.module]
        own = own_files(mutant.module)
        names = tests_for(mutant, module, self._seen)
        # A killer is likely to kill again; many are one function with other
        # arguments, and so the first of each comes before the second of any.
        order = sorted(names, key=lambda test: (-kills[test], seconds[test], test))
        rounds: Counter[str] = Counter()
        turns: dict[str, tuple[bool, bool, int]] = {}
        for test in order:
            function = test.partition("[")[0]
            rounds[function] += 1
            is_own = test.startswith(own)
            turns[test] = (not kills[test], not is_own, rounds[function])
        order.sort(key=turns.__getitem__)
        left = {True: 3 * self._options.budget, False: self._options.budget}
        kept: list[str] = []
        for test in order:
            is_own, cost = test.startswith(own), seconds[test]
            if cost <= left[is_own] or kills[test] > _MANY:
                kept.append(test)
                left[is_own] -= cost
        return kept

    def _start(
        self, mutant: Mutant, module: Module, call: Callable[[Run, list[str]], int]
    ) -> None:
        while len(self._runs) >= self._options.jobs:
            self._wait()
        tests = self._order(mutant, module)
        run = Run(mutant, time.monotonic(), os.memfd_create("said"))
        pid = os.fork()
        if not pid:
            in_fork(lambda: call(run, tests))
        self._runs[pid] = run

    def _wait_for_all(self) -> None:
        while self._runs:
            self._wait()

    def _wait(self) -> None:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            now = time.monotonic()
            for other, run in self._runs.items():
                if now - run.began > LIMIT:
                    os.killpg(other, signal.SIGKILL)
            time.sleep(0.005)
            return
        run = self._runs.pop(pid)
        test = os.pread(run.said, 400, 0).decode(errors="replace").strip()
        os.close(run.said)
        fate = "killed"
        if os.WIFSIGNALED(status):
            stopped = os.WTERMSIG(status) in {signal.SIGALRM, signal.SIGKILL}
            fate = "timed out" if stopped else "killed"
        elif not os.WEXITSTATUS(status):
            fate, test = "survived", ""
        elif os.WEXITSTATUS(status) == BROKEN:
            fate = "error"
        if test:
            self._kills[run.mutant.module][test] += 1
        self._note(run, fate, test)

    def _note(self, run: Run, fate: str, test: str) -> None:
        facts = attrs.asdict(run.mutant)
        del facts["source"]
        facts |= {"fate": fate, "test": test}
        facts["seconds"] = round(time.monotonic() - run.began, 2)
        self.results.append(facts)
        if self._options.results:
            with Path(self._options.results).open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")
        at = len(self.results)
        if fate in {"survived", "error"} or not at % 50:
            say(f"{at:5} {fate:9} {facts['module']}:{facts['line']} {facts['becomes']}")
