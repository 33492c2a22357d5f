"""The options of a pool: their defaults, what is refused, what is read."""

from __future__ import annotations

import functools
import math
import random
import typing
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import attrs
import pytest
import trio

from trio_pool import (
    Autoscale,
    CircuitBreaker,
    Hooks,
    PoolConfig,
    PoolOptions,
    Rate,
    Restart,
    Retry,
    WorkerSnapshot,
    open_pool,
)
from trio_pool._checks import is_async
from trio_pool._config import plugin_name

FIELDS = [field.name for field in attrs.fields(PoolConfig)]


async def double(number: int) -> int:
    return 2 * number


async def pass_on(job: Any, call_next: Any) -> Any:
    return await call_next(job)


def pass_on_sync(job: Any, call_next: Any) -> Any:
    return call_next(job)


class PassOn:
    """Middleware that is an object."""

    async def __call__(self, job: Any, call_next: Any) -> Any:
        return await call_next(job)

    async def method(self, job: Any, call_next: Any) -> Any:
        return await call_next(job)

    def sync_method(self, job: Any, call_next: Any) -> Any:
        return call_next(job)


class Metrics:
    """A plugin that has no name of its own."""

    async def __aenter__(self) -> Metrics:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pass


class Named(Metrics):
    """A plugin that has a name, or what stands in its place."""

    def __init__(self, name: Any) -> None:
        self.name = name


@asynccontextmanager
async def tracing() -> AsyncIterator[str]:
    yield "a tracer"


def named_tracing(name: Any) -> Any:
    """Make a plugin by a function, and give it a name as well."""
    plugin: Any = tracing()
    plugin.name = name
    return plugin


@contextmanager
def sync_tracing() -> typing.Iterator[None]:
    yield


async def choose_async(idle: Sequence[WorkerSnapshot]) -> WorkerSnapshot:
    return idle[0]


# PoolConfig.


def test_the_defaults_are_those_of_the_design_in_its_order() -> None:
    config = PoolConfig(size=3)
    assert list(attrs.asdict(config, recurse=False).items()) == [
        ("size", 3),
        ("max_backlog", 1024),
        ("overflow", "wait"),
        ("timeout", math.inf),
        ("retry", None),
        ("restart", Restart()),
        ("crash_on", ()),
        ("grace", math.inf),
        ("middleware", ()),
        ("hooks", ()),
        ("plugins", ()),
        ("rate", None),
        ("breaker", None),
        ("scale", None),
        ("max_jobs", math.inf),
        ("max_age", math.inf),
        ("max_idle", math.inf),
        ("limiter", None),
        ("choose", None),
        ("aging", math.inf),
        ("unobserved", "raise"),
        ("name", config.name),
    ]
    assert config.name
    assert PoolConfig().size == 8


def test_a_generated_name_is_a_new_one() -> None:
    assert PoolConfig().name != PoolConfig().name


def test_the_keyword_options_are_the_fields_of_the_config_but_for_the_size() -> None:
    options = typing.get_type_hints(PoolOptions)
    assert list(options) == [name for name in FIELDS if name != "size"]
    assert not PoolOptions.__required_keys__


def test_a_config_is_frozen_and_evolves() -> None:
    config = PoolConfig(size=3, timeout=1.5)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        config.size = 4  # type: ignore[misc]
    assert attrs.evolve(config, size=4) == PoolConfig(
        size=4, timeout=1.5, name=config.name
    )
    with pytest.raises(ValueError, match="size"):
        attrs.evolve(config, size=-1)


def test_configs_are_equal_and_hashable_by_value() -> None:
    one, other = PoolConfig(name="press"), PoolConfig(name="press")
    assert one == other
    assert hash(one) == hash(other)
    assert one != PoolConfig(name="other")


def test_policies_in_a_config_are_compared_by_value() -> None:
    def make() -> PoolConfig:
        scale = Autoscale(max=3)
        return PoolConfig(name="press", retry=Retry(on=OSError), scale=scale)

    assert make() == make()
    assert hash(make()) == hash(make())


@pytest.mark.parametrize(
    ("option", "make"),
    [
        ("rate", lambda: Rate(10)),
        ("breaker", CircuitBreaker),
        ("limiter", lambda: trio.CapacityLimiter(3)),
        ("plugins", lambda: (Metrics(),)),
    ],
)
def test_what_is_shared_is_compared_by_identity(option: str, make: Any) -> None:
    value = make()
    one, other = (PoolConfig(name="press", **{option: value}) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert getattr(one, option) is value
    assert one != PoolConfig(name="press", **{option: make()})


def test_all_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        PoolConfig(3)  # type: ignore[misc]


def test_sequences_and_single_types_become_tuples() -> None:
    hook = Hooks()
    assert PoolConfig(hooks=[hook]).hooks == (hook,)  # type: ignore[arg-type]
    assert PoolConfig(middleware=[pass_on]).middleware == (pass_on,)  # type: ignore[arg-type]
    plugin = Metrics()
    assert PoolConfig(plugins=[plugin]).plugins == (plugin,)  # type: ignore[arg-type]
    assert PoolConfig(crash_on=[OSError]).crash_on == (OSError,)
    assert PoolConfig(crash_on=OSError).crash_on == (OSError,)


@pytest.mark.parametrize("max_backlog", [0, 1, math.inf])
def test_a_backlog_may_be_empty_or_endless(max_backlog: float) -> None:
    assert PoolConfig(max_backlog=max_backlog).max_backlog == max_backlog


def test_a_grace_of_0_is_legal() -> None:
    assert PoolConfig(grace=0).grace == 0


@pytest.mark.parametrize("max_jobs", [1, 10**400, math.inf])
def test_a_worker_may_have_one_job_or_any_number(max_jobs: float) -> None:
    assert PoolConfig(max_jobs=max_jobs).max_jobs == max_jobs


@pytest.mark.parametrize(
    "middleware",
    [
        pass_on,
        PassOn(),
        PassOn().method,
        functools.partial(pass_on, call_next=pass_on),
        functools.partial(PassOn()),
        functools.wraps(pass_on)(lambda *args: pass_on(*args)),
    ],
)
def test_middleware_is_any_async_callable(middleware: Any) -> None:
    assert is_async(middleware)
    assert PoolConfig(middleware=(middleware,)).middleware == (middleware,)


def test_choose_is_any_callable_such_as_random_choice() -> None:
    assert PoolConfig(choose=random.choice).choose is not None
    assert PoolConfig(choose=lambda idle: idle[-1]).choose is not None


@pytest.mark.parametrize(
    ("plugin", "name"),
    [
        (Metrics(), "Metrics"),
        (Named("metrics"), "metrics"),
        (Named(""), "Named"),
        (Named(None), "Named"),
        (Named(7), "Named"),
        (tracing(), "tracing"),
        (named_tracing("mine"), "mine"),
        (named_tracing(7), "tracing"),
        (named_tracing(""), "tracing"),
        (asynccontextmanager(functools.partial(tracing))(), None),
    ],
)
def test_a_plugin_is_called_by_its_name_its_function_or_its_class(
    plugin: Any, name: str | None
) -> None:
    # A partial has no name of its own, so what it makes goes by its class.
    assert plugin_name(plugin) == (name or type(plugin).__name__)


@pytest.mark.parametrize("half", ["__aenter__", "__aexit__"])
def test_half_of_an_async_context_manager_is_no_plugin(half: str) -> None:
    plugin = type("Half", (), {half: getattr(Metrics, half)})()
    with pytest.raises(TypeError, match=r"^plugins must be .*async context managers"):
        PoolConfig(plugins=(plugin,))


def test_plugins_of_different_names_go_together() -> None:
    plugins = (Metrics(), Named("a"), Named("b"), tracing())
    assert PoolConfig(plugins=plugins).plugins == plugins


@pytest.mark.parametrize(
    ("plugins", "name"),
    [
        ([Metrics(), Metrics()], "Metrics"),
        ([Named("a"), tracing(), Named("a")], "a"),
        ([Metrics(), Named("Metrics")], "Metrics"),
        ([tracing(), tracing()], "tracing"),
    ],
)
def test_two_plugins_of_one_name_are_refused(plugins: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"^plugins must be .*several '{name}'"):
        PoolConfig(plugins=plugins)


async def test_the_same_config_opens_several_pools() -> None:
    config = PoolConfig(size=1)
    for _ in range(2):
        async with open_pool(config, double) as pool:
            assert await pool.process(1) == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", -1),
        ("max_backlog", -1),
        ("overflow", "drop"),
        ("timeout", 0),
        ("timeout", math.nan),
        ("grace", -0.25),
        ("max_jobs", 0),
        ("max_age", 0),
        ("max_age", math.nan),
        ("max_idle", 0),
        ("max_idle", -1.5),
        ("aging", 0),
        ("aging", -0.25),
        ("unobserved", "warn"),
        ("name", ""),
    ],
)
def test_a_bad_value_is_refused_as_by_open_pool(option: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        PoolConfig(**{option: value})
    if option == "size":
        with pytest.raises(ValueError) as opened:
            open_pool(value, double)
    else:
        with pytest.raises(ValueError) as opened:
            open_pool(1, double, **{option: value})  # type: ignore[misc]
    assert str(caught.value) == str(opened.value)
    assert str(caught.value).startswith(option)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", 1.5),
        ("size", True),
        ("size", None),
        ("max_backlog", 1.5),
        ("max_backlog", "7"),
        ("timeout", None),
        ("timeout", "1"),
        ("retry", 3),
        ("retry", Retry),
        ("restart", None),
        ("restart", 5),
        ("crash_on", (BaseException,)),
        ("crash_on", ("OSError",)),
        ("crash_on", None),
        ("grace", None),
        ("middleware", pass_on),
        ("middleware", (pass_on, pass_on_sync)),
        ("middleware", (PassOn().sync_method,)),
        ("middleware", (functools.partial(pass_on_sync),)),
        ("middleware", (PassOn,)),
        ("middleware", (1,)),
        ("middleware", None),
        ("hooks", Hooks()),
        ("hooks", (Hooks,)),
        ("plugins", Metrics()),
        ("plugins", (Metrics,)),
        ("plugins", (tracing,)),
        ("plugins", (sync_tracing(),)),
        ("plugins", (None,)),
        ("rate", 10),
        ("rate", Rate),
        ("breaker", 5),
        ("breaker", CircuitBreaker),
        ("scale", 8),
        ("scale", (1, 8)),
        ("max_jobs", 1.5),
        ("max_jobs", None),
        ("max_age", "60"),
        ("max_idle", None),
        ("limiter", 3),
        ("limiter", trio.Semaphore(3)),
        ("choose", "random"),
        ("choose", choose_async),
        ("aging", None),
        ("aging", True),
        ("name", None),
        ("name", b"press"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{option} must be ") as caught:
        PoolConfig(**{option: value})
    assert repr(value) in str(caught.value)


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"'max_job'; it has aging, .*max_jobs"):
        open_pool(1, double, max_job=3)  # type: ignore[call-overload]


def test_the_size_is_no_keyword() -> None:
    with pytest.raises(TypeError, match="'size'"):
        open_pool(1, double, size=3)  # type: ignore[call-overload]


def test_an_option_that_overrides_a_config_is_checked() -> None:
    with pytest.raises(ValueError, match="timeout"):
        open_pool(PoolConfig(), double, timeout=0)


# PoolConfig.from_env.


def test_from_env_reads_every_plain_option() -> None:
    environ = {
        "POOL_SIZE": "3",
        "POOL_MAX_BACKLOG": "7",
        "POOL_OVERFLOW": "reject",
        "POOL_TIMEOUT": "1.5",
        "POOL_GRACE": "0.25",
        "POOL_MAX_JOBS": "100",
        "POOL_MAX_AGE": "3600",
        "POOL_MAX_IDLE": "60.5",
        "POOL_AGING": "2.5",
        "POOL_UNOBSERVED": "log",
        "POOL_NAME": "press",
    }
    assert PoolConfig.from_env(environ=environ) == PoolConfig(
        size=3,
        max_backlog=7,
        overflow="reject",
        timeout=1.5,
        grace=0.25,
        max_jobs=100,
        max_age=3600,
        max_idle=60.5,
        aging=2.5,
        unobserved="log",
        name="press",
    )


def test_from_env_keeps_defaults_and_ignores_what_it_does_not_know() -> None:
    # Those that are no plain values are not read either.
    environ = {"POOL_TIDE": "high", "SIZE": "5", "POOL_RESTART": "5", "POOL_NAME": "a"}
    environ |= {"POOL_RETRY": "3", "POOL_RATE": "10", "POOL_SCALE": "1"}
    assert PoolConfig.from_env(environ=environ) == PoolConfig(name="a")


def test_from_env_takes_a_prefix() -> None:
    environ = {"POOL_SIZE": "1", "PRESS_SIZE": "2"}
    assert PoolConfig.from_env("PRESS_", environ).size == 2


def test_from_env_reads_the_environment_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIO_POOL_TEST_SIZE", "5")
    assert PoolConfig.from_env("TRIO_POOL_TEST_").size == 5


def test_from_env_knows_infinity() -> None:
    options = ["max_backlog", "timeout", "grace", "max_jobs", "max_age", "max_idle"]
    options.append("aging")
    environ = {f"POOL_{option.upper()}": " inf" for option in options}
    config = PoolConfig.from_env(environ=environ)
    assert [getattr(config, option) for option in options] == [math.inf] * 7


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("POOL_SIZE", "-1", "0 or more"),
        ("POOL_SIZE", "many", "int"),
        ("POOL_SIZE", "1.5", "int"),
        ("POOL_SIZE", "", "int"),
        ("POOL_MAX_BACKLOG", "-1", "0 or more"),
        ("POOL_MAX_BACKLOG", "many", "int"),
        ("POOL_MAX_BACKLOG", "-inf", "int"),
        ("POOL_OVERFLOW", "drop", "'drop_oldest'"),
        ("POOL_TIMEOUT", "0", "seconds > 0"),
        ("POOL_TIMEOUT", "nan", "seconds > 0"),
        ("POOL_TIMEOUT", "soon", "float"),
        ("POOL_GRACE", "-1", "seconds >= 0"),
        ("POOL_MAX_JOBS", "0", "1 or more"),
        ("POOL_MAX_JOBS", "1.5", "int"),
        ("POOL_MAX_AGE", "0", "seconds > 0"),
        ("POOL_MAX_AGE", "old", "float"),
        ("POOL_MAX_IDLE", "-1", "seconds > 0"),
        ("POOL_AGING", "0", "seconds > 0"),
        ("POOL_AGING", "nan", "seconds > 0"),
        ("POOL_UNOBSERVED", "warn", "'ignore'"),
        ("POOL_NAME", "", "empty"),
    ],
)
def test_from_env_says_which_variable_is_wrong(
    variable: str, value: str, expected: str
) -> None:
    with pytest.raises(ValueError) as caught:
        PoolConfig.from_env(environ={"POOL_SIZE": "1", variable: value})
    text = str(caught.value)
    assert variable in text
    assert repr(value) in text
    assert expected in text
