"""The shape inside: floors, read from the source, that imports never climb."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trio_pool

FLOORS = [
    {
        *("_errors", "_checks", "_latency", "_policy", "_guards", "_config"),
        *("_events", "_telling", "_timer", "_trio", "_nursery", "_current", "_records"),
        *("_extras", "_progress"),
        # Public by name, and needed by the pool.
        *("streams", "drain", "tasks"),
    },
    {
        "_job",
        "_batch",
        "_chunks",
        "_backlog",
        "_books",
        "_dispatch",
        "_nesting",
        "_starts",
    },
    {"_worker", "_lease"},
    {"_supervisor", "_many", "_plugins"},
    {"_pool"},
    {"__init__"},
    # What is public by name and needed by nothing below, so it can be deleted.
    {
        *("prometheus", "logs", "opentelemetry._figures", "progress._pace"),
        *("testing._scheduler", "testing._trials", "testing._schedules"),
        *("testing._checks", "testing._faults", "testing._groups"),
        *("testing._hosted", "testing._scripted"),
        *("testing._clock", "testing._loads", "testing._report", "testing._ledger"),
    },
    {"testing._witness", "testing._simulation"},
    {"testing._inline", "testing._inline_runs"},
    {"testing._draws", "testing._calls"},
    {"testing._machine"},
    {"testing._stress"},
    {"testing"},
    {
        *("progress._plain", "progress._tqdm", "progress._rich"),
        *("opentelemetry._spans", "opentelemetry._observer"),
    },
    {"opentelemetry"},
    {"progress._show"},
    {"progress"},
    {
        *("offload._bridge", "offload._errors", "offload._shim"),
        *("offload._lifeline", "offload._ray_guard"),
    },
    {
        *("offload._remote", "offload._child"),
        *("offload._dask_actor", "offload._ray_place"),
    },
    {"offload._dask_own", "offload._dask_others"},
    {
        *("offload._thread", "offload._process", "offload._executor"),
        *("offload._dask", "offload._ray"),
    },
    {"offload"},
    {
        *("web._address", "web._crew", "web._cutoff", "web._feed", "web._figures"),
        *("web._guard", "web._heartbeat", "web._html", "web._picture", "web._place"),
        *("web._connections", "web._lifespan"),
    },
    {
        *("web._charts", "web._history", "web._liveness", "web._panels"),
        *("web._signals", "web._stream", "web._verdict", "web._words"),
    },
    {"web._incidents", "web._tables"},
    {"web._frame", "web._watch"},
    {"web._controls", "web._monitor", "web._render"},
    {"web._app"},
    {"web._serving"},
    {"web._server"},
    {"web"},
    {
        *("cli._answers", "cli._ends", "cli._floors", "cli._formats", "cli._glance"),
        *("cli._measured", "cli._pictures"),
    },
    {
        *("cli._dashboard", "cli._files", "cli._lines", "cli._screen"),
        *("cli._signals", "cli._target", "cli._streams", "cli._threads"),
    },
    {"cli._bench", "cli._items", "cli._journal", "cli._roles", "cli._top"},
    {"cli._work", "cli._writer"},
    {"cli._map_run"},
    {"cli._map"},
    {"cli"},
    {"__main__"},
]
# Modules that need more than the core does, and what; imported by nobody at once.
OPTIONAL = {
    f"testing.{module}": {"hypothesis"} for module in ("_draws", "_machine", "_stress")
} | {
    "offload._process": {"trio_parallel"},
    "offload._dask_actor": {"cloudpickle", "distributed"},
    "offload._dask_own": {"distributed"},
    "offload._dask_others": {"distributed"},
    "offload._ray": {"ray"},
    "progress._tqdm": {"tqdm"},
    "progress._rich": {"rich"},
    "web._app": {"prometheus_client", "starlette"},
    "web._connections": {"hypercorn"},
    "web._cutoff": {"hypercorn"},
    "web._lifespan": {"starlette"},
    "web._server": {"prometheus_client", "starlette"},
    "web._serving": {"hypercorn"},
    "web._stream": {"starlette"},
    "cli._screen": {"rich"},
    "prometheus": {"prometheus_client"},
    "opentelemetry._spans": {"opentelemetry"},
    "opentelemetry._observer": {"opentelemetry"},
    "offload._ray_place": {"ray"},
}
FLOOR_OF = {module: number for number, floor in enumerate(FLOORS) for module in floor}

ROOT = Path(trio_pool.__path__[0])


def name_of(path: Path) -> str:
    """Name a module from the package on: ``_pool``, ``testing._checks``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in ROOT.rglob("*.py")
}
PACKAGES = {name_of(path.parent / "__init__.py") for path in ROOT.glob("*/__init__.py")}

each_module = pytest.mark.parametrize("module", sorted(MODULES))


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    }


def run_time_imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Find the imports that happen when the program runs, however deep."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif is_for_types_only(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield from run_time_imports(other)
        else:
            yield from run_time_imports(child)


def siblings(module: str) -> set[str]:
    """Name the modules of the package that a module imports."""
    found: set[str] = set()
    for node in run_time_imports(MODULES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            assert not [name for name in names if name.startswith("trio_pool")]
        elif node.level:
            house, _, _ = module.rpartition(".")
            if module in PACKAGES:
                house = module
            assert node.level <= (2 if house else 1)
            above = f"{house}." if house and node.level == 1 else ""
            if node.module is not None:
                found.add(above + node.module)
            elif node.level == 2:
                found.add("__init__")
            else:
                found.update(above + alias.name for alias in node.names)
        else:
            assert node.module is not None
            assert not node.module.startswith("trio_pool")
    return found


def test_every_module_is_on_a_floor() -> None:
    assert set(MODULES) == set(FLOOR_OF)


@each_module
def test_imports_go_down_or_stay_on_the_floor(module: str) -> None:
    floor = FLOOR_OF[module]
    assert {name for name in siblings(module) if FLOOR_OF[name] > floor} == set()


def test_no_two_modules_import_each_other() -> None:
    graph = {module: siblings(module) for module in MODULES}
    while graph:
        leaves = {module for module, needs in graph.items() if not needs & set(graph)}
        assert leaves, f"a knot among {sorted(graph)}"
        for module in leaves:
            del graph[module]


@each_module
def test_no_function_imports(module: str) -> None:
    inside = [
        ast.unparse(node)
        for function in ast.walk(MODULES[module])
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert inside == []


@each_module
def test_the_core_needs_only_trio_attrs_and_outcome(module: str) -> None:
    allowed = sys.stdlib_module_names | {"trio", "attrs", "outcome"}
    needed: set[str] = set()
    for node in run_time_imports(MODULES[module]):
        if isinstance(node, ast.Import):
            needed.update(alias.name.partition(".")[0] for alias in node.names)
        elif not node.level:
            assert node.module is not None
            needed.add(node.module.partition(".")[0])
    assert needed - allowed == OPTIONAL.get(module, set())


@each_module
def test_only_one_module_reads_the_insides_of_trio(module: str) -> None:
    private = [
        ast.unparse(node)
        for node in run_time_imports(MODULES[module])
        if isinstance(node, ast.ImportFrom)
        and not node.level
        and any(part.startswith("_") for part in (node.module or "").split("."))
        and node.module != "__future__"
    ]
    assert private == []


@each_module
def test_every_module_states_its_job(module: str) -> None:
    text = ast.get_docstring(MODULES[module])
    assert text
    assert text.splitlines()[0].endswith((".", ":"))


def test_the_front_only_re_exports() -> None:
    for node in ast.walk(MODULES["__init__"]):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names)
        assert not isinstance(node, (ast.FunctionDef, ast.ClassDef))
