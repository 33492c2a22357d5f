"""The checks of arguments: what is refused, by what name, and what is accepted."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest

from trio_pool._checks import check_bound, check_count, check_seconds

LONGEST = sys.float_info.max
INT = int(LONGEST)


def len_of(value: float) -> str:
    return f"{math.log2(value):.0f} bits"


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("infinite", [True, False])
@pytest.mark.parametrize("value", [1, 0.25, 1e-300, LONGEST, INT], ids=len_of)
def test_seconds_may_be_any_number_that_is_a_float(
    value: float, zero: bool, infinite: bool
) -> None:
    check_seconds("timeout", value, zero=zero, infinite=infinite)


@pytest.mark.parametrize("infinite", [True, False])
@pytest.mark.parametrize("value", [INT * 2, INT**2], ids=len_of)
def test_a_number_too_large_for_a_float_is_not_for_ever(
    value: int, infinite: bool
) -> None:
    with pytest.raises(ValueError, match=r"^timeout must be .* and finite, got "):
        check_seconds("timeout", value, infinite=infinite)


def test_only_where_it_is_said_seconds_may_be_infinite_or_zero() -> None:
    check_seconds("ttl", math.inf)
    check_seconds("ttl", 0)
    check_seconds("ttl", 0.0)
    with pytest.raises(ValueError, match=r"^ttl must be .* >= 0, and finite, got inf"):
        check_seconds("ttl", math.inf, infinite=False)
    for value in (0, 0.0):
        with pytest.raises(ValueError, match=r"^ttl must be .* > 0, got 0"):
            check_seconds("ttl", value, zero=False)


@pytest.mark.parametrize("value", [-1, -0.25, -math.inf, math.nan])
def test_seconds_are_not_negative_and_are_a_number(value: float) -> None:
    with pytest.raises(ValueError, match=r"^ttl must be .* >= 0, got "):
        check_seconds("ttl", value)


@pytest.mark.parametrize("value", ["1", None, True, [1.0]])
def test_seconds_are_a_number_and_no_bool(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^ttl must be a number of seconds >= 0, got "):
        check_seconds("ttl", value)


@pytest.mark.parametrize(("zero", "least"), [(True, 0), (False, 1)])
def test_a_refused_count_or_bound_is_told_its_least(zero: bool, least: int) -> None:
    check_count("size", least, zero=zero)
    check_bound("size", least, zero=zero)
    check_bound("size", math.inf, zero=zero)
    expected = rf"^size must be an int, {least} or more, got "
    for check in (check_count, check_bound):
        with pytest.raises(ValueError, match=expected):
            check("size", least - 1, zero=zero)
        with pytest.raises(TypeError, match=expected):
            check("size", True, zero=zero)
    with pytest.raises(TypeError, match=expected):
        check_count("size", 1.0, zero=zero)
    expected = rf"^size must be an int, {least} or more, or math.inf, got 1.0"
    with pytest.raises(TypeError, match=expected):
        check_bound("size", 1.0, zero=zero)
