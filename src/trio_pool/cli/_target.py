"""What the command line names: a function to call, an expression for the key."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from types import CodeType
from typing import Any

from ._ends import Refused
from ._formats import describe


def find_function(name: str) -> Callable[[Any], Any]:
    """Import ``module:function``, also from the current directory.

    Raises:
      Refused: it does not import, or cannot be called with one argument.
    """
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise Refused(f"expected module:function, got {name!r}")
    found: Any = _import(module_name)
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise Refused(f"{module_name!r} has no {path!r}") from None
        except (Exception, SystemExit) as error:
            text = f"cannot get {path!r} of {module_name!r}: {describe(error)}"
            raise Refused(text) from error
    if not callable(found):
        kind = type(found).__name__
        raise Refused(f"{name} must be a function, but is of type {kind}")
    function: Callable[[Any], Any] = found
    _check_takes_one(name, function)
    return function


def _import(name: str) -> Any:
    # As `python -m` does; from a directory that is gone nothing can be imported.
    if not sys.flags.safe_path and "" not in sys.path:
        with suppress(OSError):
            here = os.getcwd()
            if here not in sys.path:
                sys.path.insert(0, here)
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:
        raise Refused(f"cannot import {name!r}: {describe(error)}") from error


def _check_takes_one(name: str, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except Exception:
        # Of some that are written in C nothing is known, or by whoever knows better.
        return
    try:
        signature.bind(None)
    except TypeError as error:
        text = f"{name} must take one argument, the item: {error}"
        raise Refused(text) from None


def compile_key(source: str) -> Callable[[Any], Any]:
    """Make a function of an expression over ``item``.

    Raises:
      Refused: it is no expression.
    """
    try:
        code: CodeType = compile(source.strip(), "<--key>", "eval")
    except (SyntaxError, ValueError) as error:
        expected = "a Python expression over `item`"
        raise Refused(f"--key must be {expected}, got {source!r}: {error}") from None

    def key_of(item: Any) -> Any:
        return eval(code, {"item": item})

    return key_of
