"""Says where in the program something happened, as ``file:line function``."""

import sysconfig
from collections.abc import Iterable
from os.path import dirname, join, normcase
from types import FrameType, TracebackType

import trio

_HOUSES = tuple(
    normcase(join(house, ""))
    for house in (
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")),
        dirname(dirname(__file__)),
    )
)
_INSTALLED = tuple(
    normcase(join("", name, "")) for name in ("site-packages", "dist-packages")
)
# Code that was made as the program ran, such as the methods of attrs' classes.
_MADE = ("<frozen ", "<attrs ")
_TRIO = normcase(join(trio.__path__[0], "_core", ""))


def place_of_error(error: BaseException) -> str:
    """Return where an error was raised; empty if unknown.

    That is the innermost line of the program's own code, not of a library's,
    if there is any.
    """
    traceback = error.__traceback__
    if traceback is None and error.__cause__ is not None:
        traceback = error.__cause__.__traceback__
    steps = list(_walk_traceback(traceback))
    return _choose(reversed(steps))


def place_of_frame(frame: FrameType | None) -> str:
    """Return where a running task is, given its thread's innermost frame.

    As in `place_of_error`, but not beyond the frames of trio's loop: what
    called that has no part in it.
    """
    return _choose(_walk_frames(frame))


def _walk_traceback(
    traceback: TracebackType | None,
) -> Iterable[tuple[FrameType, int | None]]:
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def _walk_frames(frame: FrameType | None) -> Iterable[tuple[FrameType, int | None]]:
    while frame is not None and not _is_loop(frame):
        yield frame, frame.f_lineno
        frame = frame.f_back


def _is_loop(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_name == "unrolled_run" and normcase(code.co_filename).startswith(
        _TRIO
    )


def _choose(steps: Iterable[tuple[FrameType, int | None]]) -> str:
    """Choose among steps, the innermost first."""
    innermost = ""
    for frame, line in steps:
        code = frame.f_code
        place = f"{code.co_filename}:{line or code.co_firstlineno} {code.co_qualname}"
        if not _is_library(code.co_filename):
            return place
        innermost = innermost or place
    return innermost


def _is_library(filename: str) -> bool:
    """Say whether code came with Python, with an installer, or with this package."""
    path = normcase(filename)
    return path.startswith((*_HOUSES, *_MADE)) or any(
        house in path for house in _INSTALLED
    )
