"""Sessions of pytest that run single tests, in forks, and watch who runs what."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import attrs
import pytest
from sources import PACKAGE, Module, Mutant

# They run another process, which has no mutant, or read the source; or they take
# very long for what they add.
LEFT_OUT = {"test_examples.py", "test_benchmarks.py", "test_layout.py"}
LEFT_OUT |= {"test_everything.py", "test_readme.py"}

# Where else than in its own file the promises of a module are tested.
TESTED_IN = {
    "_batch": ("streams", "reentrance"),
    "_books": ("statistics", "pool"),
    "_checks": ("config", "policy", "tasks", "guards"),
    "_current": ("around", "reentrance"),
    "_dispatch": ("pool", "timeouts", "retries", "order", "guarded", "reentrance"),
    "_events": ("public", "records", "hooks"),
    "_job": ("cancellation", "cancellation_more", "pool"),
    "_lease": ("elastic", "cancellation", "cancellation_more", "reentrance", "around"),
    "_many": ("streams", "errors", "cancellation"),
    "_nesting": ("reentrance",),
    "_plugins": ("around",),
    "_starts": ("guarded", "cancellation_more"),
    "_supervisor": ("elastic", "pool"),
    "_worker": ("around", "elastic", "errors", "timeouts", "cancellation"),
}

# Seconds: what a test may take beyond four times what it has taken.
PATIENCE = 4.0


class Session:
    """A plugin of pytest: does ``main`` with the tests that it collects."""

    def __init__(self, main: Callable[[Session], int]) -> None:
        self._main = main
        self.items: dict[str, pytest.Item] = {}
        self.result = 0
        self._failed = False

    def pytest_sessionstart(self) -> None:
        # Not imported before the warm-up.
        from hypothesis import settings

        modest = settings.get_profile("modest")
        settings.register_profile(
            "mutants", parent=modest, derandomize=True, database=None
        )
        settings.load_profile("mutants")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.items = {item.nodeid: item for item in items}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> bool:
        self.result = self._main(self)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed = self._failed or report.failed

    def passes(self, test: str) -> bool:
        """Run one test."""
        item = self.items[test]
        self._failed = False
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        return not self._failed

    def all_pass(
        self, tests: Iterable[str], limits: dict[str, float], said: int
    ) -> int:
        """Run tests until one fails; what is run is said in a file."""
        for test in tests:
            if test in self.items:
                os.pwrite(said, test.ljust(400).encode()[:400], 0)
                # Its default action ends the process, whatever hangs in it.
                limit = PATIENCE + 4 * limits[test]
                signal.setitimer(signal.ITIMER_REAL, limit)
                passed = self.passes(test)
                signal.setitimer(signal.ITIMER_REAL, 0)
                if not passed:
                    return 1
        return 0

    def run(self, *arguments: str) -> int:
        fixed = ["-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=0"]
        fixed += ["-p", "pytest_trio.plugin", "-p", "_hypothesis_pytestplugin"]
        # What is written is not to be captured by file number, as forks have theirs;
        # and the plugins are here already, and need no rewriting.
        fixed += ["--capture=sys", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        status = int(pytest.main([*fixed, *arguments], plugins=[self]))
        nothing_ran = {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}
        return self.result if status in nothing_ran else status


BROKEN = 70


def in_fork(call: Callable[[], int]) -> NoReturn:
    """Make the call in this process, a fork, and end it; its output goes to a file."""
    status = BROKEN
    try:
        os.setsid()
        memory = 3 << 30
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        output = os.open("output.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, file in ((0, nothing), (1, output), (2, output)):
            os.dup2(file, number)
        status = call()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


@attrs.frozen
class Observed:
    """What one run of all tests has shown: who runs a line, how long each takes."""

    seconds: dict[str, float]
    lines: dict[str, dict[int, set[str]]]


def observe(root: Path, cache: Path) -> Observed:
    """Run each file of tests once under coverage, or read what that showed earlier."""
    cache.mkdir(parents=True, exist_ok=True)
    sources = sorted((root / "src").rglob("*.py"))
    sources += [root / "tests/conftest.py", root / "tests/strategies.py"]
    common = b"".join(path.read_bytes() for path in sources)
    seen = Observed({}, defaultdict(lambda: defaultdict(set)))
    for path in sorted(root.glob("tests/**/test_*.py")):
        if path.name in LEFT_OUT:
            continue
        digest = hashlib.sha256(common + path.read_bytes()).hexdigest()[:16]
        file = cache / f"{path.stem}-{digest}.json"
        if not file.exists():
            say(f"observing {path.name}")
            # Twice, as a test of time slices may fail once on a busy machine.
            if all(_observe_in_fork(root, path, file) for _ in range(2)):
                text = Path("output.txt").read_text(errors="replace")
                raise SystemExit(f"it fails without a mutant:\n{text[-3000:]}")
        found = json.loads(file.read_text())
        tests = list(found["seconds"])
        seen.seconds.update(found["seconds"])
        for module, per_line in found["lines"].items():
            for line, numbers in per_line.items():
                seen.lines[module][int(line)].update(tests[at] for at in numbers)
    return seen


def _observe_in_fork(root: Path, path: Path, file: Path) -> int:
    pid = os.fork()
    if not pid:
        in_fork(lambda: _observe(root, path, file))
    return os.waitpid(pid, 0)[1]


def _observe(root: Path, path: Path, file: Path) -> int:
    import coverage

    watch = coverage.Coverage(
        data_file=None,
        config_file=False,
        source=[str(root / "src" / PACKAGE)],
        messages=False,
    )
    seconds: dict[str, float] = {}

    def watch_all(session: Session) -> int:
        for test in session.items:
            # `dynamic_context` cannot know whom a step of a worker's task belongs to.
            watch.switch_context(test)
            began = time.perf_counter()
            passed = session.passes(test)
            seconds[test] = round(time.perf_counter() - began, 4)
            watch.switch_context("")
            if not passed:
                return 1
        return 0

    watch.start()
    failed = Session(watch_all).run(str(path.relative_to(root)))
    watch.stop()
    if not failed:
        data = watch.get_data()
        number = {test: at for at, test in enumerate(seconds)}
        lines = {
            Path(measured).stem: {
                line: sorted(number[test] for test in tests if test)
                for line, tests in data.contexts_by_lineno(measured).items()
            }
            for measured in data.measured_files()
        }
        # Written beside it first, as two runs may share the cache.
        draft = file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"seconds": seconds, "lines": lines}))
        draft.rename(file)
    return failed


OUTPUT = os.dup(2)


def say(text: str) -> None:
    os.write(OUTPUT, f"{text}\n".encode())


def own_files(module: str) -> tuple[str, ...]:
    """Name the files of tests whose subject a module is."""
    names = (module.removeprefix("_"), *TESTED_IN.get(module, ()))
    return tuple(f"tests/test_{name}.py" for name in names)


def tests_for(mutant: Mutant, module: Module, seen: Observed) -> set[str]:
    """Name the tests that were seen to run the line, or what it belongs to."""
    lines = seen.lines.get(mutant.module, {})

    def between(first: int, last: int) -> set[str]:
        return {test for at in range(first, last + 1) for test in lines.get(at, ())}

    return (
        between(*module.statement_at(mutant.line))
        or between(*module.scope_at(mutant.line))
        or between(1, len(module.lines))
        or set(seen.seconds)
    )
