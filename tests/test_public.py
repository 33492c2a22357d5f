"""The public face: its names, their docstrings, types and modules."""

from __future__ import annotations

import enum
import inspect
import math
import pkgutil
import typing
from collections.abc import AsyncIterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, ModuleType, UnionType
from typing import Any

import attrs
import pytest

import trio_pool
import trio_pool.offload
import trio_pool.testing
from trio_pool import (
    CircuitStatistics,
    Drain,
    Event,
    EventsLost,
    EventStream,
    Hooks,
    JobChanged,
    JobError,
    JobId,
    LeasedTaskWorker,
    LeasedWorker,
    Pool,
    PoolChanged,
    PoolError,
    PoolOptions,
    PoolResized,
    PoolStatistics,
    Reply,
    ShutdownReport,
    Stream,
    Task,
    TaskPool,
    WorkerChanged,
    WorkerSnapshot,
)

NEEDS = {"in_process": "trio_parallel", "on_dask": "distributed", "on_ray": "ray"}


def exported(module: ModuleType) -> dict[str, Any]:
    """Return what a module exports, with what is imported when it is asked for."""
    names = [name for name in dir(module) if not name.startswith("_")]
    found = {name: getattr(module, name) for name in names}
    foreign = (import_module, typing.TYPE_CHECKING)
    return {
        name: value
        for name, value in found.items()
        if not (isinstance(value, ModuleType) or value in foreign)
    }


FRONT = exported(trio_pool)
KIT = exported(trio_pool.testing)
# Some need what may not be here; those of Ray are looked at where it runs.
OFFLOAD = {
    name: value
    for name in dir(trio_pool.offload)
    if not name.startswith("_") and find_spec(NEEDS.get(name, "trio"))
    for value in [getattr(trio_pool.offload, name)]
    if not isinstance(value, ModuleType)
}
EXPORTED: dict[str, Any] = {**FRONT, **KIT, **OFFLOAD}
CLASSES = {name: value for name, value in EXPORTED.items() if inspect.isclass(value)}

# Made to be subclassed, or a mere description of keyword arguments.
NOT_FINAL = {
    *(Hooks, PoolError, JobError, PoolOptions, trio_pool.Progress),
    *(trio_pool.testing.PoolMachine, trio_pool.testing.RecordingHooks),
    *(trio_pool.testing.AnyPool, trio_pool.testing.Arrivals),
    trio_pool.testing.JobOptions,
}

# Unions have no name, module or docstring of their own.
ALIASES = {
    name: value
    for name, value in EXPORTED.items()
    if isinstance(value, UnionType) or typing.get_origin(value) is not None
}
# Public by name, each in a module that is public by name too.
AT_HOME = {Stream: "streams", Drain: "drain", Task: "tasks"}

each_name = pytest.mark.parametrize(
    "name", [name for name in EXPORTED if name not in ALIASES]
)
each_class = pytest.mark.parametrize("name", CLASSES)


def methods(kind: type) -> dict[str, Any]:
    """Return what a class and its own bases define, properties by their getters."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith("trio_pool"):
            continue
        for name, value in vars(base).items():
            plain = inspect.unwrap(getattr(value, "__func__", value))
            if isinstance(plain, property):
                plain = plain.fget
            if isinstance(plain, FunctionType) and not name.startswith("_"):
                found[name] = plain
    return found


def test_the_exported_names_are_those_of_the_design() -> None:
    assert sorted(FRONT) == sorted(
        [
            *("open_pool", "Pool", "TaskPool", "Reply", "Stream", "Drain", "Task"),
            *("LeasedWorker", "LeasedTaskWorker", "CurrentJob", "current_job"),
            *("PoolConfig", "PoolOptions", "Backoff", "Restart", "Hooks"),
            *("Retry", "Rate", "CircuitBreaker", "Autoscale", "Priority"),
            *("PoolError", "PoolClosed", "PoolBroken", "BacklogFull", "WrongThread"),
            *("CircuitOpen", "WouldDeadlock"),
            *("JobError", "JobTimeout", "JobDropped", "JobCancelled", "WorkerCrashed"),
            *("JobExpired",),
            *("JobId", "JobState", "WorkerState", "PoolStatistics", "WorkerSnapshot"),
            *("PoolState", "Progress"),
            *("Latency", "CircuitStatistics", "Settled", "ShutdownReport"),
            *("PoolChanged", "PoolResized", "WorkerChanged", "JobChanged"),
            *("Event", "EventKind", "EventsLost", "EventStream"),
        ]
    )


def test_the_exported_names_of_the_workers_off_the_thread_are_known() -> None:
    named = {name for name in dir(trio_pool.offload) if not name.startswith("_")}
    assert {*OFFLOAD, *NEEDS} == {
        *("in_thread", "in_process", "on_executor", "on_dask", "on_ray"),
        *("wait_future", "RemoteError", "EngineError", "PayloadWarning"),
    }
    assert named >= {*OFFLOAD, *NEEDS}


def test_the_exported_names_of_the_test_kit_are_known() -> None:
    assert sorted(KIT) == sorted(
        [
            *("stress_pool", "StressReport", "PoolMachine"),
            *("Faults", "Fault", "FaultKind", "FaultMoment", "Injection"),
            *("InjectedFault", "InjectedCrash", "ScriptedWorker", "Step"),
            *("run_in_order", "explore_orders", "Moment"),
            *("cancel_everywhere", "cancel_at", "call_everywhere", "call_at"),
            *("assert_books_balance", "assert_idle", "settle", "RecordingHooks"),
            *("AnyPool", "InlinePool", "InlineTaskPool"),
            *("simulate", "SimulationReport", "SimulatedFailure", "Times"),
            *("JobOptions", "HandlerModel", "ArrivalModel", "Arrivals"),
            *("Exponential", "Constant", "Uniform", "LogNormal", "Recorded"),
            *("Poisson", "Regular", "Bursts", "OnOff", "Trace"),
        ]
    )


def test_modules_are_private_or_public_by_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(trio_pool.__path__)}
    public = {name for name in modules if not name.startswith("_")}
    assert public == {
        *("streams", "drain", "tasks", "offload", "testing", "progress"),
        *("prometheus", "opentelemetry", "logs", "web", "cli"),
    }


def test_the_package_says_that_it_is_typed() -> None:
    (folder,) = trio_pool.__path__
    assert Path(folder, "py.typed").exists()


@each_name
def test_every_exported_name_has_a_docstring_of_its_own(name: str) -> None:
    text = EXPORTED[name].__doc__
    assert text
    first, *_ = inspect.cleandoc(text).splitlines()
    assert first.endswith((".", "?", ":", ","))
    # attrs and enums would make one up.
    assert not text.startswith(f"{name}(")


@each_class
def test_every_public_method_has_a_docstring(name: str) -> None:
    kind = CLASSES[name]
    missing = [
        method
        for method, function in methods(kind).items()
        if not inspect.getdoc(getattr(kind, method, function))
    ]
    assert missing == []


@each_name
def test_every_exported_name_shows_the_public_module(name: str) -> None:
    value = EXPORTED[name]
    home = f"trio_pool.{AT_HOME[value]}" if value in AT_HOME else "trio_pool"
    if name in KIT:
        home = "trio_pool.testing"
    if name in OFFLOAD:
        home = "trio_pool.offload"
    assert value.__module__ == home
    assert value.__qualname__ == name


@each_class
def test_concrete_classes_are_final(name: str) -> None:
    kind = CLASSES[name]
    if kind in NOT_FINAL:
        assert not getattr(kind, "__final__", False)
    elif not issubclass(kind, enum.Enum):
        assert kind.__final__ is True


@each_class
def test_the_type_hints_of_methods_resolve(name: str) -> None:
    for method, function in methods(CLASSES[name]).items():
        hints = typing.get_type_hints(function)
        assert "return" in hints, method


@each_class
def test_the_type_hints_of_constructors_resolve(name: str) -> None:
    kind = CLASSES[name]
    if attrs.has(kind):
        typing.get_type_hints(kind.__init__)


@each_class
def test_the_type_hints_of_fields_resolve(name: str) -> None:
    if CLASSES[name] is not trio_pool.testing.PoolMachine:
        # Whose base is one of hypothesis, and has names of its own.
        typing.get_type_hints(CLASSES[name])


def test_the_type_hints_of_open_pool_resolve() -> None:
    hints = typing.get_type_hints(trio_pool.open_pool)
    assert {"size", "handler", "worker", "options", "return"} <= hints.keys()


@each_class
def test_values_are_frozen(name: str) -> None:
    kind = CLASSES[name]
    if attrs.has(kind):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            kind.__setattr__(object.__new__(kind), "something", 1)


GIVING_IN = ("process", "submit", "submit_nowait", "submit_batch", "lease")
BATCHES = ("map", "settle", "stream")


def options_of(kind: type, method: str) -> set[str]:
    """Name the options of a method, all of which are keyword-only."""
    parameters = inspect.signature(getattr(kind, method)).parameters.values()
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("method", [*GIVING_IN, *BATCHES])
@pytest.mark.parametrize("kind", [Pool, TaskPool])
def test_what_is_worked_on_is_positional_and_options_are_keywords(
    kind: type, method: str
) -> None:
    parameters = inspect.signature(getattr(kind, method)).parameters.values()
    positional = [p.name for p in parameters if p.name not in options_of(kind, method)]
    work: list[str] = []
    if method != "lease":
        many = method in {"submit_batch", *BATCHES}
        work = ["items" if many else "job_input"]
        if kind is TaskPool:
            work = ["async_fn", "items" if many else "args"]
    assert positional == ["self", *work]


@pytest.mark.parametrize("kind", [Pool, TaskPool])
def test_the_options_of_a_job_are_called_the_same_everywhere(kind: type) -> None:
    every = {"timeout", "priority", "retry"}
    # The calls of a `TaskPool` are run where they are.
    many = {*every, "progress"} | ({"chunk"} if kind is Pool else set())
    detached = {*every, "key", "delay", "ttl", "drain", "id"}
    assert {name: options_of(kind, name) for name in (*GIVING_IN, *BATCHES)} == {
        "process": {*every, "key"},
        "submit": detached,
        "submit_nowait": detached,
        "submit_batch": {*every, "drain"},
        "lease": {"priority"},
        "map": many,
        "settle": many,
        "stream": {*many, "ordered", "ahead", "outcomes"},
    }


def test_a_task_has_every_option_that_submit_has() -> None:
    fields = {field.name for field in attrs.fields(Task)}
    assert fields - {"fn", "args"} == options_of(TaskPool, "submit")
    setters = {name.removeprefix("with_") for name in methods(Task)}
    assert fields - {"fn", "args", "drain"} == setters & fields


def test_both_kinds_of_pool_default_the_same() -> None:
    for method in (*GIVING_IN, *BATCHES):
        of_pool, of_task_pool = (
            inspect.signature(getattr(kind, method)).parameters
            for kind in (Pool, TaskPool)
        )
        for option in options_of(TaskPool, method):
            assert of_pool[option].default == of_task_pool[option].default
            assert of_pool[option].annotation == of_task_pool[option].annotation


DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(["timeout", "retry", "key", "drain", "id", "ahead", "grace"]),
    "chunk": None,
    "priority": 0,
    "delay": 0.0,
    "ttl": math.inf,
    "ordered": True,
    "outcomes": False,
    "buffer": 1024,
    "kinds": None,
    "progress": False,
}


@pytest.mark.parametrize("kind", [Pool, TaskPool, LeasedWorker, LeasedTaskWorker])
def test_options_default_to_what_leaves_jobs_alone(kind: type) -> None:
    found: dict[str, set[Any]] = {}
    for method in methods(kind).values():
        for option in inspect.signature(method).parameters.values():
            if option.default is not inspect.Parameter.empty:
                found.setdefault(option.name, set()).add(option.default)
                is_keyword = option.kind is inspect.Parameter.KEYWORD_ONLY
                assert is_keyword or option.name == "grace"
    assert found == {option: {DEFAULTS[option]} for option in found}
    assert "timeout" in found


def test_pool_and_task_pool_have_the_same_methods_but_for_go() -> None:
    assert methods(TaskPool).keys() - methods(Pool).keys() == {"go"}
    assert methods(Pool).keys() - methods(TaskPool).keys() == set()


def test_the_methods_of_a_pool_are_those_of_the_design() -> None:
    assert methods(Pool).keys() == {
        *("process", "submit", "submit_nowait", "submit_batch", "lease"),
        *("map", "settle", "stream"),
        *("resize", "pause", "resume", "join", "shutdown", "cancel"),
        *("size", "name", "closed", "statistics", "workers", "events", "plugin"),
        *("state", "config", "running"),
    }


def test_the_members_of_a_reply_are_those_of_the_design() -> None:
    assert methods(Reply).keys() == {
        *("wait", "cancel", "done", "state", "outcome", "id", "worker", "attempts"),
    }


def test_the_members_of_a_drain_are_those_of_the_design() -> None:
    assert methods(Drain).keys() == {
        *("send", "collect", "count", "total", "close", "closed"),
    }


def test_the_members_of_a_task_are_those_of_the_design() -> None:
    assert methods(Task).keys() == {
        *("with_input", "with_retry", "with_timeout", "with_priority", "with_key"),
        *("with_delay", "with_ttl", "with_id", "drain_to", "options", "run"),
    }


def test_the_members_of_an_event_stream_are_those_of_the_design() -> None:
    assert methods(EventStream).keys() == {"lost", "close"}


@pytest.mark.parametrize("kind", [Drain, Stream, EventStream])
def test_what_is_read_by_async_for_is_its_own_iterator(kind: type) -> None:
    assert issubclass(kind, AsyncIterator)


def test_the_type_aliases_are_unions_of_public_types() -> None:
    assert set(ALIASES) & set(FRONT) == {"Event", "EventKind", "JobId"}
    assert set(typing.get_args(JobId)) == {int, str}
    assert set(typing.get_args(Event)) == {
        *(PoolChanged, PoolResized, WorkerChanged, JobChanged, EventsLost),
    }


@pytest.mark.parametrize("kind", typing.get_args(Event), ids=lambda kind: kind.__name__)
def test_the_records_of_events_say_what_where_and_when_first(kind: Any) -> None:
    fields = [field.name for field in attrs.fields(kind)]
    assert fields[:3] == ["kind", "pool", "time"]


def test_each_hook_gets_the_kind_of_record_that_has_its_name() -> None:
    """So that a type checker tells the records apart by their kinds."""
    of_hooks: dict[str, type] = {
        name.removeprefix("on_"): typing.get_type_hints(hook)["event"]
        for name, hook in methods(Hooks).items()
    }
    of_kinds = {
        kind: record
        for record in typing.get_args(Event)
        if record is not EventsLost
        for kind in typing.get_args(typing.get_type_hints(record)["kind"])
    }
    assert of_hooks == of_kinds


@pytest.mark.parametrize(
    "kind", [PoolStatistics, WorkerSnapshot, ShutdownReport, CircuitStatistics]
)
def test_the_records_of_many_counts_are_made_by_name(kind: Any) -> None:
    assert all(field.kw_only for field in attrs.fields(kind))


def test_job_states_are_live_or_terminal() -> None:
    live = {state.value for state in trio_pool.JobState if not state.terminal}
    ended = {state.value for state in trio_pool.JobState if state.terminal}
    assert live == {"delayed", "queued", "running"}
    assert ended == {
        *("done", "failed", "timed_out", "cancelled", "expired", "dropped", "lost"),
    }


def test_statistics_count_every_state() -> None:
    fields = {field.name for field in attrs.fields(trio_pool.PoolStatistics)}
    assert {state.value for state in trio_pool.JobState} <= fields
