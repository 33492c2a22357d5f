"""The public face: its names, their docstrings, types and modules."""

from __future__ import annotations

import enum
import inspect
import pkgutil
import typing
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import attrs
import pytest

import trio_pool
from trio_pool import (
    Hooks,
    JobError,
    PoolError,
    PoolOptions,
    Reply,
    Stream,
)

EXPORTED: dict[str, Any] = {
    name: value
    for name, value in vars(trio_pool).items()
    if not (name.startswith("_") or isinstance(value, ModuleType))
}
CLASSES = {name: value for name, value in EXPORTED.items() if inspect.isclass(value)}

# Made to be subclassed, or a mere description of keyword arguments.
NOT_FINAL = {Hooks, PoolError, JobError, PoolOptions}

each_name = pytest.mark.parametrize("name", EXPORTED)
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
    assert sorted(EXPORTED) == sorted(
        [
            *("open_pool", "Pool", "TaskPool", "Reply", "Stream"),
            *("PoolConfig", "PoolOptions", "Backoff", "Restart", "Hooks"),
            *("PoolError", "PoolClosed", "PoolBroken", "BacklogFull", "WrongThread"),
            *("JobError", "JobTimeout", "JobDropped", "JobCancelled", "WorkerCrashed"),
            *("JobState", "WorkerState", "PoolStatistics", "WorkerSnapshot"),
            *("Settled", "ShutdownReport"),
            *("PoolChanged", "PoolResized", "WorkerChanged", "JobChanged"),
        ]
    )


def test_modules_are_private_or_public_by_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(trio_pool.__path__)}
    public = {name for name in modules if not name.startswith("_")}
    assert public == {"streams"}


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
    homes = {"trio_pool", "trio_pool.streams"} if value is Stream else {"trio_pool"}
    assert value.__module__ in homes
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


def test_options_are_keyword_only() -> None:
    for kind in (trio_pool.Pool, trio_pool.TaskPool):
        for method in ("process", "submit", "submit_nowait", "map", "settle", "stream"):
            parameters = inspect.signature(getattr(kind, method)).parameters
            for option in ("timeout", "priority", "ordered", "ahead", "outcomes"):
                if option in parameters:
                    assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_options_of_a_job_are_called_the_same_everywhere() -> None:
    for kind in (trio_pool.Pool, trio_pool.TaskPool):
        for method in ("process", "submit", "submit_nowait", "map", "settle", "stream"):
            parameters = inspect.signature(getattr(kind, method)).parameters
            assert {"timeout", "priority"} <= parameters.keys()


def test_pool_and_task_pool_have_the_same_methods() -> None:
    assert methods(trio_pool.Pool).keys() == methods(trio_pool.TaskPool).keys()


def test_the_methods_of_a_pool_are_those_of_the_design() -> None:
    assert methods(trio_pool.Pool).keys() == {
        *("process", "submit", "submit_nowait", "map", "settle", "stream"),
        *("resize", "pause", "resume", "join", "shutdown", "cancel"),
        *("size", "name", "closed", "statistics", "workers"),
    }


def test_the_members_of_a_reply_are_those_of_the_design() -> None:
    assert methods(Reply).keys() == {
        *("wait", "cancel", "done", "state", "outcome", "id", "worker", "attempts"),
    }


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
