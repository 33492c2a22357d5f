"""Checks of what users pass, and the wording of what is refused."""

import inspect
import math
import sys
from collections.abc import AsyncIterable, Callable, Iterable
from contextlib import suppress
from typing import Any, get_args

import attrs


def refuse(option: str, value: object, expected: str) -> str:
    """Word the error for a bad value: the option, the value, what was expected."""
    return f"{option} must be {expected}, got {value!r}"


def check_count(option: str, value: object, *, zero: bool = True) -> None:
    """Accept a whole number, 0 or more; 1 or more unless ``zero``."""
    least = 0 if zero else 1
    expected = f"an int, {least} or more"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(refuse(option, value, expected))
    if value < least:
        raise ValueError(refuse(option, value, expected))


def check_bound(option: str, value: object, *, zero: bool = True) -> None:
    """Accept what `check_count` does, and ``math.inf``."""
    if value != math.inf:
        if isinstance(value, float):
            expected = f"an int, {0 if zero else 1} or more, or math.inf"
            raise TypeError(refuse(option, value, expected))
        check_count(option, value, zero=zero)


def check_seconds(
    option: str, value: object, *, zero: bool = True, infinite: bool = True
) -> None:
    """Accept a number of seconds; ``math.inf`` stands for "for ever"."""
    expected = f"a number of seconds {'>= 0' if zero else '> 0'}"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(refuse(option, value, expected))
    # Comparisons alone, as an int may be too long to become a float.
    if not value >= 0 or (value == 0 and not zero):
        raise ValueError(refuse(option, value, expected))
    if value > sys.float_info.max and not (infinite and value == math.inf):
        raise ValueError(refuse(option, value, f"{expected}, and finite"))


def check_share(option: str, value: object) -> None:
    """Accept a share of something, or a probability."""
    expected = "a number from 0 to 1"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(refuse(option, value, expected))
    if not 0 <= value <= 1:
        raise ValueError(refuse(option, value, expected))


def check_key(option: str, value: object) -> None:
    """Accept what can be a key."""
    try:
        hash(value)
    except TypeError:
        raise TypeError(refuse(option, value, "a hashable object")) from None


def check_source(option: str, value: object) -> None:
    """Accept what can be iterated over, by ``for`` or by ``async for``."""
    if not isinstance(value, (Iterable, AsyncIterable)):
        expected = "an iterable or an async iterable"
        raise TypeError(refuse(option, value, expected))


def check_priority(value: object) -> None:
    """Accept any int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(refuse("priority", value, "an int, higher first"))


Check = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def valid(check: Callable[..., None], **how: bool) -> Check:
    """Make an attrs validator of a check."""

    def validate(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
        check(field.name, value, **how)

    return validate


def check_choice(kind: object) -> Check:
    """Make an attrs validator that accepts the members of a Literal."""
    choices = get_args(kind)

    def validate(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
        if value not in choices:
            expected = "one of " + ", ".join(map(repr, choices))
            raise ValueError(refuse(field.name, value, expected))

    return validate


def check_kind(kind: type, expected: str) -> Check:
    """Make an attrs validator that accepts None and the objects of a class."""

    def validate(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
        if value is not None and not isinstance(value, kind):
            raise TypeError(refuse(field.name, value, f"{expected} or None"))

    return validate


def as_tuple(value: Any) -> Any:
    """Convert a list to a tuple; return the rest as it is, to be checked."""
    return tuple(value) if isinstance(value, list) else value


def as_types(value: Any) -> Any:
    """Convert one class, or a list of them, to a tuple."""
    return (value,) if isinstance(value, type) else as_tuple(value)


def are_errors(value: object) -> bool:
    """Return whether this is a tuple of Exception subclasses."""
    return isinstance(value, tuple) and all(
        isinstance(kind, type) and issubclass(kind, Exception) for kind in value
    )


def is_async(function: Any) -> bool:
    """Return whether calling this gives something to await.

    Looks through functools.wraps, functools.partial and callable objects.
    """
    seen = function
    while True:
        if inspect.iscoroutinefunction(seen):
            return True
        inner = getattr(seen, "__wrapped__", None) or getattr(seen, "func", None)
        if inner is None:
            break
        seen = inner
    if inspect.isroutine(seen) or inspect.isclass(seen):
        return False
    return callable(seen) and inspect.iscoroutinefunction(type(seen).__call__)


def note(error: BaseException, text: str) -> None:
    """Add a note to an error, if it takes any.

    One that does not, such as a frozen dataclass, stays as it is: a note is a
    courtesy, and not worth losing the error for.
    """
    with suppress(Exception):
        error.add_note(text)
