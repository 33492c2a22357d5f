"""Reads the picture that a dashboard gives as JSON, and trusts nothing in it."""

from __future__ import annotations

import json
import math
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import attrs

from ..web._picture import Picture

_LARGEST = 1 << 63


def read_picture(text: bytes) -> Picture:
    """Read a picture; what is not known is passed over.

    Raises:
      ValueError: it is none; the message says what is not as expected.
    """
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    picture: Picture = _read(Picture, found, "it")
    return picture


def escape(text: str) -> str:
    r"""Write what would do something to a terminal as ``\x1b``, on one line."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _read(kind: Any, value: Any, where: str) -> Any:
    if attrs.has(kind):
        return _read_record(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        _check(isinstance(value, list), where, "a list")
        return tuple(
            _read(args[0], each, f"{where}[{n}]") for n, each in enumerate(value)
        )
    if NoneType in args and value is None:
        return None
    if origin is None or origin is Literal:
        return _read_plain(kind, value, where)
    # One of several kinds; of those only text and numbers meet, and they differ.
    wanted = [each for each in args if each is not NoneType]
    if str in wanted and isinstance(value, str):
        return escape(value)
    return _read(wanted[0], value, where)


def _read_record(kind: Any, value: Any, where: str) -> Any:
    _check(isinstance(value, dict), where, "an object")
    found = {
        field.name: _read(field.type, value[field.name], f"{where}.{field.name}")
        for field in attrs.fields(kind)
        if field.name in value
    }
    missing = [
        field.name
        for field in attrs.fields(kind)
        if field.default is attrs.NOTHING and field.name not in found
    ]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}")
    return kind(**found)


def _read_plain(kind: Any, value: Any, where: str) -> Any:
    if kind is bool:
        _check(isinstance(value, bool), where, "true or false")
        return value
    if kind in (int, float):
        if kind is float and value is None:
            # For what is infinite there is no JSON.
            return math.inf
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _check(number and abs(value) < _LARGEST, where, "a number")
        return kind(value)
    # A later version may have other words than those that are known here.
    _check(isinstance(value, str), where, "a text")
    return escape(value)


def _check(right: bool, where: str, expected: str) -> None:
    if not right:
        raise ValueError(f"{where} is not {expected}")
