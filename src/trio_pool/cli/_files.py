"""A file that answers are written to, and what a journal has to know of it."""

from __future__ import annotations

import errno
import os
import select
import stat
from contextlib import suppress
from typing import final

import attrs

from ._ends import Broken, OutputClosed, Refused

_TAIL = 200


@final
@attrs.frozen
class Mark:
    """How much was written to a file, and how that ended."""

    size: int = 0
    tail: bytes = b""


@final
class Target:
    """Where answers go; ``name`` is what complaints call it."""

    def __init__(self, name: str, fd: int, mark: Mark | None = None) -> None:
        self.mark = mark or Mark()
        self._has_mark = mark is not None
        self._name = name
        self._fd = fd

    def cut(self) -> None:
        """Take off what is after the mark; with none, all there is."""
        # Pipes and devices have no end that could be moved.
        if stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.ftruncate(self._fd, self.mark.size)
            os.lseek(self._fd, 0, os.SEEK_END)

    def write(self, data: bytes) -> None:
        """Write all of it, however long that takes.

        Raises:
          OutputClosed: it is a pipe that nobody reads any more.
          Broken: it cannot be written.
        """
        if not data:
            return
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._write_some(rest) :]
        except BrokenPipeError as error:
            raise OutputClosed from error
        except OSError as error:
            raise Broken(f"cannot write {self._name}: {error.strerror}") from error
        tail = (self.mark.tail + data[-_TAIL:])[-_TAIL:]
        self.mark = Mark(self.mark.size + len(data), tail)

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            # Whoever else has this pipe has set it so.
            select.select([], [self._fd], [])
            return 0

    def sync(self) -> None:
        """Have the disk keep what was written, if a journal is to say how much.

        Raises:
          Broken: it does not.
        """
        if not self._has_mark:
            return
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise Broken(f"cannot write {self._name}: {error.strerror}") from error

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)


def check_regular(name: str, path: str) -> None:
    """Check that a journal could say how much of a file counts.

    Raises:
      Refused: it is a pipe, a terminal, a device.
    """
    if path == "-" or (os.path.exists(path) and not os.path.isfile(path)):
        raise Refused(f"with --journal, {name} must be a regular file, got {path!r}")


def open_target(name: str, path: str, mark: Mark | None) -> Target:
    """Open a file for writing: one that a journal has a mark of, or any.

    Nothing in it is changed before it is cut.

    Raises:
      Refused: it is not the file that was marked, or cannot be opened.
    """
    fd = _open(name, path)
    try:
        if mark is not None:
            _check_mark(name, fd, mark)
            _sync_folder(path)
    except BaseException:
        os.close(fd)
        raise
    return Target(f"{name} {path!r}", fd, mark)


def _open(name: str, path: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    try:
        try:
            return os.open(path, flags, 0o666)
        except OSError as error:
            # Not everything that can be written can be read.
            if error.errno not in (errno.EACCES, errno.EPERM, errno.ENXIO):
                raise
            return os.open(path, flags & ~os.O_RDWR | os.O_WRONLY, 0o666)
    except OSError as error:
        raise Refused(f"cannot open {name} {path!r}: {error.strerror}") from error


def _check_mark(name: str, fd: int, mark: Mark) -> None:
    size = os.fstat(fd).st_size
    if size < mark.size:
        raise Refused(
            f"{name} is not what the journal is of: "
            f"it has {size:,} bytes, and had {mark.size:,}"
        )
    os.lseek(fd, mark.size - len(mark.tail), os.SEEK_SET)
    if os.read(fd, len(mark.tail)) != mark.tail:
        raise Refused(
            f"{name} is not what the journal is of: "
            f"what is before byte {mark.size:,} has changed"
        )


def _sync_folder(path: str) -> None:
    """Have the disk keep the name of a file that may be new."""
    # Some systems know no such thing.
    with suppress(OSError):
        fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def is_same(one: str, other: str) -> bool:
    """Say whether two paths are one file, which may not be there yet."""
    if "-" in (one, other):
        return False
    if os.path.exists(one) and os.path.exists(other):
        # Two that write to one terminal or device do no harm.
        return os.path.samefile(one, other) and stat.S_ISREG(os.stat(one).st_mode)
    return os.path.realpath(one) == os.path.realpath(other)
