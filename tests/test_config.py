"""The values that users set: the pool's options, restarts and backoff."""

from __future__ import annotations

import math
import typing
from typing import Any

import attrs
import pytest

from trio_pool import Backoff, Hooks, PoolConfig, PoolOptions, Restart, open_pool

FIELDS = [field.name for field in attrs.fields(PoolConfig)]


async def double(number: int) -> int:
    return 2 * number


# PoolConfig.


def test_the_defaults_are_those_of_the_design() -> None:
    config = PoolConfig(size=3)
    assert attrs.asdict(config, recurse=False) == {
        "size": 3,
        "max_backlog": 1024,
        "overflow": "wait",
        "timeout": math.inf,
        "restart": Restart(),
        "crash_on": (),
        "grace": math.inf,
        "hooks": (),
        "unobserved": "raise",
        "name": config.name,
    }
    assert config.name


def test_a_generated_name_is_a_new_one() -> None:
    assert PoolConfig().name != PoolConfig().name


def test_the_keyword_options_are_the_fields_of_the_config_but_for_the_size() -> None:
    options = typing.get_type_hints(PoolOptions)
    assert sorted(options) == sorted(set(FIELDS) - {"size"})
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


def test_all_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        PoolConfig(3)  # type: ignore[misc]


def test_sequences_and_single_types_become_tuples() -> None:
    hook = Hooks()
    assert PoolConfig(hooks=[hook]).hooks == (hook,)  # type: ignore[arg-type]
    assert PoolConfig(crash_on=[OSError]).crash_on == (OSError,)
    assert PoolConfig(crash_on=OSError).crash_on == (OSError,)


@pytest.mark.parametrize("max_backlog", [0, 1, math.inf])
def test_a_backlog_may_be_empty_or_endless(max_backlog: float) -> None:
    assert PoolConfig(max_backlog=max_backlog).max_backlog == max_backlog


def test_a_grace_of_0_is_legal() -> None:
    assert PoolConfig(grace=0).grace == 0


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
        "POOL_UNOBSERVED": "log",
        "POOL_NAME": "press",
    }
    assert PoolConfig.from_env(environ=environ) == PoolConfig(
        size=3,
        max_backlog=7,
        overflow="reject",
        timeout=1.5,
        grace=0.25,
        unobserved="log",
        name="press",
    )


def test_from_env_keeps_defaults_and_ignores_what_it_does_not_know() -> None:
    environ = {"POOL_TIDE": "high", "SIZE": "5", "POOL_RESTART": "5", "POOL_NAME": "a"}
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
    environ = {"POOL_MAX_BACKLOG": "inf", "POOL_TIMEOUT": "inf", "POOL_GRACE": "inf"}
    config = PoolConfig.from_env(environ=environ)
    assert (config.max_backlog, config.timeout, config.grace) == (math.inf,) * 3


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


# Backoff.


def test_the_defaults_of_backoff() -> None:
    assert Backoff() == Backoff(initial=0.1, factor=2.0, maximum=30.0, jitter=0.5)


def test_a_backoff_grows_to_its_maximum() -> None:
    backoff = Backoff(initial=0.25, factor=2, maximum=1.5, jitter=0)
    assert [backoff(attempt) for attempt in range(5)] == [0.25, 0.5, 1.0, 1.5, 1.5]


def test_a_factor_of_1_waits_the_same_each_time() -> None:
    backoff = Backoff(initial=0.25, factor=1, jitter=0)
    assert [backoff(attempt) for attempt in (0, 1, 9)] == [0.25] * 3


@pytest.mark.parametrize(("draw", "wait"), [(0.0, 2.0), (0.5, 1.5), (1.0, 1.0)])
def test_jitter_takes_off_a_share_by_chance(draw: float, wait: float) -> None:
    backoff = Backoff(initial=2.0, jitter=0.5)
    assert backoff(0, lambda: draw) == wait


def test_jitter_draws_anew_each_time_and_stays_within_its_bounds() -> None:
    waits = {Backoff(initial=1.0, jitter=0.5)(0) for _ in range(50)}
    assert len(waits) > 1
    assert all(0.5 <= wait <= 1.0 for wait in waits)


@pytest.mark.parametrize("attempt", [5000, 10**9])
def test_a_late_attempt_waits_the_maximum(attempt: int) -> None:
    assert Backoff(jitter=0)(attempt) == 30.0
    assert Backoff(initial=0, jitter=0)(attempt) == 0.0
    assert Backoff(factor=1, initial=0.25, jitter=0)(attempt) == 0.25
    # An int that is too long for a float, which a float times it would raise.
    assert Backoff(initial=1, factor=2, jitter=0)(5000) == 30.0


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("initial", -1, ValueError),
        ("initial", math.nan, ValueError),
        ("initial", math.inf, ValueError),
        ("initial", "1", TypeError),
        ("factor", 0.5, ValueError),
        ("factor", math.nan, ValueError),
        ("factor", "2", TypeError),
        ("maximum", -1, ValueError),
        ("maximum", math.nan, ValueError),
        ("jitter", -0.1, ValueError),
        ("jitter", 1.5, ValueError),
        ("jitter", math.nan, ValueError),
        ("jitter", "0", TypeError),
    ],
)
def test_a_bad_value_of_backoff_is_named(
    option: str, value: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=f"^{option} ") as caught:
        Backoff(**{option: value})
    assert repr(value) in str(caught.value)


# Restart.


def test_the_defaults_of_restart() -> None:
    assert Restart() == Restart(limit=5, within=60.0, backoff=Backoff())


def test_a_restart_takes_any_callable_and_an_endless_limit() -> None:
    def backoff(attempt: int) -> float:
        return 0.25 * attempt

    restart = Restart(limit=math.inf, backoff=backoff)
    assert restart.backoff(2) == 0.5


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("limit", -1, ValueError),
        ("limit", 1.5, TypeError),
        ("limit", math.nan, TypeError),
        ("within", 0, ValueError),
        ("within", -1, ValueError),
        ("within", math.nan, ValueError),
        ("within", "1", TypeError),
        ("backoff", 0.25, TypeError),
        ("backoff", None, TypeError),
    ],
)
def test_a_bad_value_of_restart_is_named(
    option: str, value: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=f"^{option} ") as caught:
        Restart(**{option: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [Backoff(), Restart()])
def test_policies_are_frozen(value: Backoff | Restart) -> None:
    field = attrs.fields(type(value))[0].name
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(value, field, 1)
