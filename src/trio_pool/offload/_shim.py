"""What runs at the other end: the function, its items, and what came of each.

It speaks in built-in types alone, and needs nothing of this package, as it is
sent by value to where that is not installed.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
import uuid
from functools import partial
from importlib import import_module
from time import perf_counter
from typing import Any

Fate = tuple[str, Any]
"""What became of an item: how it ended, and what of that could be sent."""
Report = tuple[float, list[Fate]]
"""The seconds that running took, and the fates of the items that have started."""

VALUE, ERROR, EXIT, UNSENT = "value", "error", "exit", "unsent"
KEPT, HERE = "kept", "here"
"""A value, and an error, that are sent as they are, if at all."""

# Nothing that a user could have changed the pickling of.
_SIMPLE = frozenset((type(None), bool, int, float, str, bytes))

HOME = (os.getpid(), uuid.uuid4().hex)
"""Who imports this: another process, or interpreter, has another."""


def _is_small(thing: Any) -> bool:
    """Say whether there is nothing to think about in sending a thing."""
    kind = type(thing)
    if kind is int:
        return -(2**63) <= thing < 2**63  # type: ignore[no-any-return]
    if kind is str or kind is bytes:
        return len(thing) < 1000
    return kind is float or kind is bool or thing is None


def pack(thing: Any) -> bytes:
    """Pickle by value what the other end may not be able to import."""
    if type(thing) in _SIMPLE:
        return pickle.dumps(thing, 5)
    dumps: Any = pickle.dumps
    try:
        dumps = import_module("cloudpickle").dumps
    except ImportError:
        pass
    return dumps(thing, 5)  # type: ignore[no-any-return]


def pack_error(error: BaseException) -> Fate:
    """Pickle an error with its frames; tell of it where that cannot be done.

    Whatever an error of a user's does, nothing is raised from here.
    """
    kind = ERROR if isinstance(error, Exception) else EXIT
    try:
        import_module("tblib.pickling_support").install(error)
        return kind, _packed_well(error)
    except BaseException as found:
        reason = found
    text = _described(error)
    try:
        # Its frames, and what led to it, may be too deep to be pickled, or have
        # nothing to pickle them.
        error.__cause__ = error.__context__ = None
        error.with_traceback(None).add_note(f"trio_pool: at the other end:\n{text}")
        return kind, _packed_well(error)
    except BaseException:
        return unsent("error", error, reason, kind, text)


def _packed_well(error: BaseException) -> bytes:
    packed = pack(error)
    # Many an error can be pickled, and then not be made again.
    if type(pickle.loads(packed)) is not type(error):
        raise TypeError("it is made again as something else")
    return packed


def _described(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error, limit=-20))
    except BaseException:
        return ""


def unsent(
    what: str, thing: Any, reason: BaseException, kind: str = "", text: str = ""
) -> Fate:
    """Tell of something that cannot be sent."""
    try:
        why = f"{type(reason).__name__}: {reason}"
    except Exception:
        why = type(reason).__name__
    # Its name alone, as its repr may be what raises.
    name = f"{type(thing).__module__}.{type(thing).__qualname__}"
    return UNSENT, (what, name, why, text, kind)


def _loaded(packed: bytes) -> tuple[Any, Fate | None]:
    try:
        return pickle.loads(packed), None
    except BaseException as reason:
        return None, unsent("argument", None, reason)


class Host:
    """The function and its state, in the process that runs the jobs."""

    def __init__(self, work: bytes, incarnation: str = "") -> None:
        self._work = work
        self._incarnation = incarnation
        self._last = 0
        self._fn: Any = None

    def set_up(self) -> tuple[int, str, Fate | None]:
        """Load the function, run its setup; return who this is, and what went wrong."""
        version = ".".join(map(str, sys.version_info[:3]))
        try:
            fn, setup, takes_state = pickle.loads(self._work)
            state = None if setup is None else setup()
        except BaseException as error:
            return os.getpid(), version, pack_error(_trimmed(error))
        self._fn = partial(fn, state) if takes_state else fn
        return os.getpid(), version, None

    def run(self, incarnation: str, call: int, items: list[bytes]) -> Report | None:
        """Run the function for each item; None refuses a call not meant for it.

        No call is run twice, nor one that was meant for another host.
        """
        if self._fn is None or incarnation != self._incarnation or call <= self._last:
            return None
        self._last = call
        fates: list[Fate] = []
        begun = perf_counter()
        for packed in items:
            item, trouble = _loaded(packed)
            fate = trouble or _run_one(self._fn, item)
            fates.append(fate)
            if is_exit(fate):
                break
        return perf_counter() - begun, fates


def _run_one(fn: Any, item: Any, is_here: bool = False) -> Fate:
    try:
        value = fn(item)
    except BaseException as error:
        _trimmed(error)
        return (HERE, error) if is_here else pack_error(error)
    if is_here or _is_small(value):
        return KEPT, value
    try:
        return VALUE, pack(value)
    except BaseException as reason:
        return unsent("result", value, reason)


def _trimmed(error: BaseException) -> BaseException:
    """Cut the frame off that called the user's code, unless it is the only one."""
    trace = error.__traceback__
    below = None if trace is None else trace.tb_next
    while below is not None and below.tb_frame.f_code.co_filename == _FILE:
        below = below.tb_next
    return error if below is None else error.with_traceback(below)


_FILE = Host.run.__code__.co_filename


def is_exit(fate: Fate) -> bool:
    """Say whether an item has ended more than itself, such as by ``sys.exit()``."""
    how, what = fate
    if how == HERE:
        return not isinstance(what, Exception)
    return how == EXIT or (how == UNSENT and what[4] == EXIT)


def run_anywhere(home: object, fn: Any, items: list[Any]) -> Report:
    """Run a function for each item, wherever an executor does that."""
    is_here = home == HOME
    fates: list[Fate] = []
    begun = perf_counter()
    for item in items:
        fate = _run_one(fn, item, is_here)
        fates.append(fate)
        if is_exit(fate):
            break
    return perf_counter() - begun, fates
