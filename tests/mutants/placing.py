"""How a mutant comes where the original is: as it is imported, or long after."""

from __future__ import annotations

import gc
import importlib.abc
import importlib.util
import inspect
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from sources import PACKAGE, Mutant, path_of


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


Changes = dict[tuple[str, int], CodeType]


def changed_functions(old: CodeType, new: CodeType) -> Changes | None:
    """Return the new code of functions that differ; None if more than that does."""
    if not _is_alike(old, new):
        return None
    changes: Changes = {}
    for was, becomes in zip(_inner(old), _inner(new), strict=True):
        if was.co_flags & inspect.CO_NEWLOCALS and was.co_flags & inspect.CO_OPTIMIZED:
            if not _is_same(was, becomes):
                changes |= _all_functions(was, becomes)
        else:
            found = changed_functions(was, becomes)
            if found is None:
                return None
            changes |= found
    return changes


def _all_functions(old: CodeType, new: CodeType) -> Changes:
    changes = {_place(old): new}
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


def fits(changes: Changes, functions: list[FunctionType]) -> bool:
    """Say whether functions can be given new code: each keeps the cells that it has."""
    return all(
        len(changes.get(_place(old), old).co_freevars) == len(old.co_freevars)
        for old in (function.__code__ for function in functions)
    )


def _place(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def put_in_place(changes: Changes, functions: list[FunctionType]) -> int:
    """Give functions their new code; say how many have changed."""
    guarded = vars(sys.modules["trio._core._ki"])["_CODE_KI_PROTECTION_STATUS_WMAP"]
    replaced: dict[CodeType, CodeType] = {}
    for function in functions:
        old = function.__code__
        new = changes.get(_place(old))
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
