"""Break the pool's core on purpose, one small change at a time; see which tests notice.

  python3 noxfile.py mutants --module _timer          all mutants of a module
  python3 noxfile.py mutants --sample 60 --seed 1     at most 60 of each module
  python3 noxfile.py mutants --list --module _timer   name them, run nothing

A mutant is the source of one module with one change by an operator of cosmic-ray,
or with one statement taken out. It is *killed* if a test fails, *timed out* if one
hangs, and *survives* if all tests pass that run its line. A survivor is either
explained in `mutants.toml`, or it is news: something that no test promises. The
command fails if there is news.

What makes it quick enough to use: everything runs in forks of one warm process that
has pytest, trio and hypothesis, but not the package; the mutant's source is given to
the import system and never written; and only the tests run that were seen to run
the line, those of the module's own file first, quick ones before slow ones.

What is not mutated, as no test should care: annotations, `TYPE_CHECKING` blocks,
assertions (they tell the type checker), `__repr__`, what is logged, the text that
`cancel` is given as its reason, `final` and `overload`. Of the many replacements of
one operator by another, the one or two are kept that are hardest to notice.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib.abc
import importlib.util
import inspect
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NoReturn

import attrs
import cosmic_ray.plugins
import parso
import pytest
from cosmic_ray.ast import ast_nodes
from cosmic_ray.operators.operator import Operator
from parso.python.tree import Keyword

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
EXPLAINED = HERE.with_suffix(".toml")
PACKAGE = "trio_pool"

# They run another process, which has no mutant, or read the source; or they take
# very long for what they add.
LEFT_OUT = {"test_examples.py", "test_benchmarks.py", "test_layout.py"}
LEFT_OUT |= {"test_everything.py", "test_readme.py"}

# Where else than in its own file the promises of a module are tested.
TESTED_IN = {
    "_batch": ("streams", "reentrance"),
    "_books": ("statistics",),
    "_current": ("around", "reentrance"),
    "_dispatch": ("pool", "timeouts", "retries", "order", "guarded", "reentrance"),
    "_events": ("public", "records", "hooks"),
    "_lease": ("cancellation", "cancellation_more", "reentrance", "around"),
    "_many": ("streams", "errors", "cancellation"),
    "_nesting": ("reentrance",),
    "_plugins": ("around",),
    "_starts": ("guarded", "cancellation_more"),
    "_supervisor": ("elastic", "pool"),
    "_worker": ("around", "elastic", "errors", "timeouts", "cancellation"),
}

COMPARISONS = {
    *("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is", "Lt_LtE", "Lt_GtE", "LtE_Lt"),
    *("LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt"),
}
BINARIES = {
    *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv"),
    *("Pow_Mul", "BitOr_BitAnd", "BitAnd_BitOr", "LShift_RShift", "RShift_LShift"),
}
OPERATORS = {
    *(f"ReplaceComparisonOperator_{name}" for name in COMPARISONS),
    *(f"ReplaceBinaryOperator_{name}" for name in BINARIES),
    *("ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_USub"),
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr"),
    *("ReplaceOrWithAnd", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak"),
    *("ExceptionReplacer", "NumberReplacer", "RemoveDecorator"),
    "ZeroIterationForLoop",
}

# Seconds: of one test beyond ten times what it takes, of all tests of a mutant.
PATIENCE = 4.0
LIMIT = 180.0

# A test that has killed more than so many is tried on each.
_MANY = 3

# Modules of the tests that tests import.
TEST_MODULES = {"strategies", "conftest"}


class DeleteStatement(Operator):  # type: ignore[misc]
    """Takes out a call, an assignment to an attribute or item, or a deletion."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type == "simple_stmt" and self._is_deletable(node.children[0]):
            yield node.children[0].start_pos, node.children[0].end_pos

    def _is_deletable(self, node: Any) -> bool:
        if node.type == "del_stmt":
            return True
        if node.type in {"atom_expr", "power"}:
            return bool(node.get_last_leaf() == ")")
        if node.type != "expr_stmt":
            return False
        target, sign = node.children[0], node.children[1]
        if sign.type == "annassign":
            return False
        return sign.value != "=" or target.type in {"atom_expr", "power"}

    def mutate(self, node: Any, index: int) -> Any:
        first = node.children[0].get_first_leaf()
        node.children[0] = Keyword("pass", first.start_pos, prefix=first.prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


# What a mutant is known by, as lines move.
_KEY = ("module", "function", "operator", "was", "becomes")


@attrs.frozen
class Mutant:
    """One change of one module."""

    module: str
    function: str
    operator: str
    line: int
    was: str
    becomes: str
    source: str = attrs.field(repr=False, eq=False)

    @property
    def place(self) -> tuple[Any, ...]:
        return (self.line, *(getattr(self, field) for field in _KEY))


# What there is to mutate.


class Module:
    """The source of one module, and what is where in it."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.source = path.read_text(encoding="utf-8")
        self.lines = self.source.splitlines()
        self._scopes: list[tuple[int, int, str]] = []
        self._statements: dict[int, tuple[int, int]] = {}
        self._skipped: set[tuple[int, int]] = set()
        self._skipped_lines: set[int] = set()
        self._compiled: CodeType | None = None
        self._visit(ast.parse(self.source), ())

    def _visit(self, node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inner = names
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = (*names, child.name)
                scope = (child.lineno, child.end_lineno or 0, ".".join(inner))
                self._scopes.append(scope)
            if isinstance(child, ast.stmt):
                self._note_statement(child)
            if self._is_skipped(child):
                end = child.end_lineno or child.lineno  # type: ignore[attr-defined]
                self._skipped_lines.update(range(child.lineno, end + 1))  # type: ignore[attr-defined]
            for field in ("annotation", "returns"):
                part = getattr(child, field, None)
                if isinstance(part, ast.expr):
                    self._skip(part)
            if isinstance(child, ast.Call) and _name_of(child) == "cancel":
                for keyword in child.keywords:
                    self._skip(keyword.value)
            self._visit(child, inner)

    def _note_statement(self, node: ast.stmt) -> None:
        body = getattr(node, "body", None) or getattr(node, "cases", None)
        first, last = node.lineno, node.end_lineno or node.lineno
        if body:
            inner = body[0]
            inner = getattr(inner, "pattern", inner)
            last = max(first, inner.lineno - 1)
        for line in range(first, last + 1):
            self._statements[line] = (first, last)

    def _is_skipped(self, node: ast.AST) -> bool:
        if isinstance(node, ast.If):
            return ast.unparse(node.test) == "TYPE_CHECKING"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            decorators = {ast.unparse(name) for name in node.decorator_list}
            return node.name == "__repr__" or "overload" in decorators
        if isinstance(node, ast.ClassDef):
            return any(ast.unparse(base).startswith("Protocol") for base in node.bases)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            return ast.unparse(node.value.func).startswith("log.")
        return isinstance(node, (ast.Assert, ast.Import, ast.ImportFrom))

    def _skip(self, node: ast.expr) -> None:
        for line in range(node.lineno, (node.end_lineno or 0) + 1):
            text = self.lines[line - 1]
            start, end = 0, len(text)
            if line == node.lineno:
                start = len(text.encode()[: node.col_offset].decode())
            if line == node.end_lineno:
                end = len(text.encode()[: node.end_col_offset].decode())
            self._skipped.update((line, column) for column in range(start, end))

    def compiled(self, path: str) -> CodeType:
        """Compile it as it is."""
        if self._compiled is None:
            self._compiled = compile(self.source, path, "exec", dont_inherit=True)
        return self._compiled

    def function_at(self, line: int) -> str:
        """Name the innermost function or class that a line is in."""
        inside = [scope for scope in self._scopes if scope[0] <= line <= scope[1]]
        return max(inside)[2] if inside else ""

    def statement_at(self, line: int) -> tuple[int, int]:
        """Return the lines of the statement, or of the head of one with a body."""
        return self._statements.get(line, (line, line))

    def scope_at(self, line: int) -> tuple[int, int]:
        """Return the lines of what a decorator, default or field belongs to."""
        inside = [scope for scope in self._scopes if scope[0] <= line <= scope[1]]
        below = [scope for scope in self._scopes if scope[0] > line]
        if self.lines[line - 1].lstrip().startswith("@") and below:
            inside.append(min(below))
        return max(inside)[:2] if inside else (1, len(self.lines))

    def mutants(
        self, draw: random.Random | None, most: int
    ) -> tuple[int, list[Mutant]]:
        """Make the mutants, or a sample; say how many there are in all."""
        tree = parso.parse(self.source)
        positions = [
            (node, operator, index, start[0])
            for node in ast_nodes(tree)
            for name, operator in _operators().items()
            for index, (start, _) in enumerate(operator.mutation_positions(node))
            if self._matters(name, node, start)
        ]
        total = len(positions)
        if draw is not None and most < total:
            positions = [
                positions[at] for at in sorted(draw.sample(range(total), most))
            ]
        made: dict[str, Mutant] = {}
        for node, operator, index, line in positions:
            source = _mutated(tree, node, operator, index)
            lines = source.splitlines()
            becomes = lines[line - 1].strip() if line <= len(lines) else ""
            name = type(operator).__name__
            was = self.lines[line - 1].strip()
            if name == "RemoveDecorator":
                becomes = ""
            if source == self.source:
                total -= 1
                continue
            mutant = Mutant(
                self.name, self.function_at(line), name, line, was, becomes, source
            )
            if made.setdefault(source, mutant) is not mutant:
                total -= 1
        return total, list(made.values())

    def _matters(self, operator: str, node: Any, start: tuple[int, int]) -> bool:
        if start[0] in self._skipped_lines or start in self._skipped:
            return False
        if operator == "AddNot":
            # Else the same as another operator's.
            test = node.children[2] if node.type == "test" else node.children[1]
            return test.type not in {"comparison", "not_test"}
        if operator == "RemoveDecorator":
            name = node.get_code().strip()
            return name not in {"@final", "@overload", "@coroutine"}
        if operator == "DeleteStatement":
            return not self.function_at(start[0]).endswith("__init__")
        return True


def _name_of(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _operators() -> dict[str, Any]:
    found = {
        name.rpartition("/")[2]: cosmic_ray.plugins.get_operator(name)
        for name in cosmic_ray.plugins.operator_names()
    }
    assert found.keys() >= OPERATORS, OPERATORS - found.keys()
    kept = {name: kind() for name, kind in found.items() if name in OPERATORS}
    return kept | {"DeleteStatement": DeleteStatement()}


def _mutated(tree: Any, node: Any, operator: Any, index: int) -> str:
    """Return the source with one change; the tree is left as it was.

    cosmic-ray's own `mutate_code` parses and walks the whole module for each.
    """
    before = [
        (part, part.children[:] if hasattr(part, "children") else part.value)
        for part in (*ast_nodes(node), *([node.parent] if node.parent else ()))
    ]
    try:
        other = operator.mutate(node, index)
        if other is not node:
            at = node.parent.children.index(node)
            node.parent.children[at : at + 1] = [] if other is None else [other]
        return str(tree.get_code())
    finally:
        for part, inside in before:
            setattr(part, "children" if hasattr(part, "children") else "value", inside)


def core_modules() -> list[str]:
    """Name the modules of the floors below the front, as `test_layout` has them."""
    tree = ast.parse((HERE.parent / "test_layout.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            floors = node.value
            assert isinstance(floors, ast.List)
            found: list[str] = []
            for floor in floors.elts:
                names = {
                    n.value for n in ast.walk(floor) if isinstance(n, ast.Constant)
                }
                if "__init__" in names:
                    return found
                found += sorted(names)
    raise LookupError("tests/test_layout.py has no FLOORS")


# Putting a mutant where the original is.


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Gives the import system the source of the mutant for one module."""

    def __init__(self, mutant: Mutant, root: Path) -> None:
        self._name = f"{PACKAGE}.{mutant.module}"
        self._source = mutant.source
        self._path = str(path_of(mutant.module, root))

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._name:
            return None
        return importlib.util.spec_from_file_location(name, self._path, loader=self)

    def get_filename(self, name: str) -> str:
        return self._path

    def get_source(self, name: str) -> str:
        return self._source

    def get_code(self, name: str) -> Any:
        return compile(self._source, self._path, "exec", dont_inherit=True)

    def is_package(self, name: str) -> bool:
        return False


def path_of(module: str, root: Path) -> Path:
    return root / "src" / PACKAGE / f"{module}.py"


Changes = dict[tuple[str, int], CodeType]


def changed_functions(old: CodeType, new: CodeType) -> Changes | None:
    """Return the new code of functions that differ; None if more than that does."""
    if not _is_alike(old, new):
        return None
    changes: Changes = {}
    for was, becomes in zip(_inner(old), _inner(new), strict=True):
        if was.co_flags & inspect.CO_NEWLOCALS and was.co_flags & inspect.CO_OPTIMIZED:
            if not _is_same(was, becomes):
                if was.co_freevars != becomes.co_freevars:
                    return None
                changes |= _all_functions(was, becomes)
        else:
            found = changed_functions(was, becomes)
            if found is None:
                return None
            changes |= found
    return changes


def _all_functions(old: CodeType, new: CodeType) -> Changes:
    changes = {(old.co_qualname, old.co_firstlineno): new}
    inner, others = _inner(old), _inner(new)
    if len(inner) == len(others):
        for was, becomes in zip(inner, others, strict=True):
            changes |= _all_functions(was, becomes)
    return changes


def _inner(code: CodeType) -> list[CodeType]:
    return [value for value in code.co_consts if isinstance(value, CodeType)]


def _is_alike(old: CodeType, new: CodeType) -> bool:
    """Say whether the two do the same, but for what is defined inside."""
    if len(_inner(old)) != len(_inner(new)):
        return False
    fields = ("co_code", "co_names", "co_varnames", "co_freevars", "co_flags")
    return all(getattr(old, field) == getattr(new, field) for field in fields) and (
        [repr(value) for value in old.co_consts if not isinstance(value, CodeType)]
        == [repr(value) for value in new.co_consts if not isinstance(value, CodeType)]
    )


def _is_same(old: CodeType, new: CodeType) -> bool:
    return _is_alike(old, new) and all(map(_is_same, _inner(old), _inner(new)))


def functions_of(root: Path) -> dict[str, list[FunctionType]]:
    """Find all functions of the package that there are, by their file."""
    found: dict[str, list[FunctionType]] = defaultdict(list)
    for function in gc.get_objects():
        if isinstance(function, FunctionType):
            path = function.__code__.co_filename
            if path.startswith(str(root / "src")):
                found[path].append(function)
    return found


def put_in_place(changes: Changes, functions: list[FunctionType]) -> int:
    """Give functions their new code; say how many have changed."""
    guarded = vars(sys.modules["trio._core._ki"])["_CODE_KI_PROTECTION_STATUS_WMAP"]
    replaced: dict[CodeType, CodeType] = {}
    for function in functions:
        old = function.__code__
        new = changes.get((old.co_qualname, old.co_firstlineno))
        if new is not None:
            # A copy for each, as what is known of them is known by identity.
            new = new.replace()
            with suppress(KeyError):
                guarded[new] = guarded[old]
            function.__code__ = new
            replaced[old] = new
    for name, module in tuple(sys.modules.items()):
        if name.partition(".")[0] == PACKAGE:
            for field, value in tuple(vars(module).items()):
                if isinstance(value, tuple) and any(
                    isinstance(code, CodeType) for code in value
                ):
                    vars(module)[field] = tuple(replaced.get(c, c) for c in value)
    return len(replaced)


# Running tests.


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
    sources = [*sorted((root / "src").rglob("*.py")), *root.glob("tests/[cs]*s*.py")]
    common = b"".join(path.read_bytes() for path in sources)
    seen = Observed({}, defaultdict(lambda: defaultdict(set)))
    for path in sorted(root.glob("tests/**/test_*.py")):
        if path.name in LEFT_OUT:
            continue
        digest = hashlib.sha256(common + path.read_bytes()).hexdigest()[:16]
        file = cache / f"{path.stem}-{digest}.json"
        if not file.exists():
            say(f"observing {path.name}")
            pid = os.fork()
            if not pid:
                in_fork(lambda path=path, file=file: _observe(root, path, file))
            _, status = os.waitpid(pid, 0)
            if status:
                text = Path("output.txt").read_text(errors="replace")
                raise SystemExit(f"it fails without a mutant:\n{text[-3000:]}")
        found = json.loads(file.read_text())
        tests = list(found["seconds"])
        seen.seconds.update(found["seconds"])
        for module, per_line in found["lines"].items():
            for line, numbers in per_line.items():
                seen.lines[module][int(line)].update(tests[at] for at in numbers)
    return seen


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


# The campaign: at most so many mutants at a time, each in a fork.


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
            gc.collect()
            # What is frozen is not found any more.
            functions = functions_of(self._root)
            gc.freeze()
            for mutant, module in mutants:
                path = str(path_of(module.name, self._root))
                try:
                    new = compile(mutant.source, path, "exec", dont_inherit=True)
                except SyntaxError:
                    continue
                changes = changed_functions(module.compiled(path), new)
                if changes is None:
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
            if house == PACKAGE or house.startswith("test_") or house in TEST_MODULES:
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
        # As much again for other files as for its own.
        left = {True: self._options.budget, False: self._options.budget}
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


# What has been explained, and the report.


def explained() -> dict[tuple[str, ...], str]:
    """Read why some survive. Entries are known by their lines' texts, not numbers."""
    if not EXPLAINED.exists():
        return {}
    found = tomllib.loads(EXPLAINED.read_text(encoding="utf-8"))
    return {
        (entry["module"], entry["function"], operator, entry["was"], becomes): reason
        for reason, entries in _reasons(found)
        for entry in entries
        for operator in [entry["operator"]]
        for becomes in _listed(entry["becomes"])
    }


def _reasons(found: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for entry in found.get("survivor", ()):
        yield entry["why"], [entry]


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
                key = tuple(facts[f] for f in _KEY)
                if key in reasons:
                    counts["explained"] += 1
                else:
                    news.append(facts)
        sums.update(counts)
        _print_line(module, heads, counts)
    _print_line("all", heads, sums)
    for facts in news:
        print("\n[[survivor]]  # line", facts["line"])
        for field in _KEY:
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
        help="seconds of tests for one mutant, beyond those of the module's own file",
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
    return (facts["line"], *(facts[field] for field in _KEY))


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
