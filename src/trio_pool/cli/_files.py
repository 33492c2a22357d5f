"""A file that answers are written to, and what a journal has to know of it."""

from __future__ import annotations

import os
import select
import stat
import sys
from contextlib import suppress
from typing import final

import attrs

from ._ends import Broken, OutputClosed, Refused

if sys.platform != "win32":
    import fcntl

_TAIL = 200


@final
@attrs.frozen
class Named:
    """A file of the command line: its option, its name there, and where it is."""

    option: str
    given: str
    path: str

    def __str__(self) -> str:
        return f"{self.option} {self.given!r}"


def name_file(option: str, given: str) -> Named:
    """Find out where a file is; "-" is none.

    Raises:
      Refused: it has no name, or the current directory is gone.
    """
    if not given:
        raise Refused(f"{option} must be a file, got ''")
    if given == "-" and option != "--journal":
        return Named(option, given, given)
    if os.path.isabs(given):
        return Named(option, given, given)
    try:
        return Named(option, given, os.path.join(os.getcwd(), given))
    except OSError as error:
        text = f"cannot find {option} {given!r}: the current directory is gone"
        raise Refused(text) from error


@final
@attrs.frozen
class Mark:
    """How much was written to a file, and how that ended."""

    size: int = 0
    tail: bytes = b""


@final
class Target:
    """Where answers go; ``name`` is what complaints call it."""

    def __init__(
        self,
        name: str,
        fd: int,
        mark: Mark | None = None,
        *,
        path: str | None = None,
        is_new: bool = False,
    ) -> None:
        self.mark = mark or Mark()
        self.is_named = path is not None
        """Whether it is a file of its own, and no standard stream."""
        self._path = path
        self._is_new = is_new
        self._has_mark = mark is not None
        self._name = name
        self._fd = fd

    def look(self) -> os.stat_result:
        """Return what the system knows of it."""
        return os.fstat(self._fd)

    def cut(self) -> None:
        """Take off what is after the mark; with none, all there is.

        A standard stream is left as it is.

        Raises:
          Broken: nothing can be taken off.
        """
        # Pipes and devices have no end that could be moved.
        if not self.is_named or not stat.S_ISREG(self.look().st_mode):
            return
        try:
            if self.look().st_size != self.mark.size:
                os.ftruncate(self._fd, self.mark.size)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            raise Broken(f"cannot write {self._name}: {error.strerror}") from error

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
        """Close it, if it is not of the process's own."""
        if self.is_named:
            os.close(self._fd)

    def discard(self) -> None:
        """Close it unused; one that was made by this run is removed."""
        if self._is_new and self._path is not None:
            # Before anybody else can have the lock.
            with suppress(OSError):
                os.unlink(self._path)
        self.close()


def check_regular(file: Named) -> None:
    """Check that a journal could say how much of a file counts.

    Raises:
      Refused: it is a pipe, a terminal, a device.
    """
    path = file.path
    if path == "-" or (os.path.exists(path) and not os.path.isfile(path)):
        text = f"{file.option} must be a regular file, got {file.given!r}"
        raise Refused(f"with --journal, {text}")


def open_target(file: Named, mark: Mark | None) -> Target:
    """Open a file for writing: one that a journal has a mark of, or any.

    Nothing in it is changed before it is cut. A pipe is waited for until
    somebody reads it.

    Raises:
      Refused: it is not the file that was marked, or in use, or cannot be opened.
    """
    fd, is_new = _open(file, os.O_WRONLY if mark is None else os.O_RDWR)
    target = Target(str(file), fd, mark, path=file.path, is_new=is_new)
    try:
        _lock(file, fd)
    except BaseException:
        # It is theirs who have the lock, whoever made it.
        target.close()
        raise
    try:
        if mark is not None:
            _check_mark(file.option, fd, mark)
            _sync_folder(file.path)
    except BaseException:
        target.discard()
        raise
    return target


def check_written(file: Named, mark: Mark) -> None:
    """Check that what a run which has ended wrote to a file is still there.

    Raises:
      Refused: it is not.
    """
    try:
        fd = os.open(file.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        text = f"{file.option} is not what the journal is of"
        raise Refused(f"{text}: there is no {file.given!r}") from None
    except OSError as error:
        raise Refused(f"cannot open {file}: {error.strerror}") from error
    try:
        _check_mark(file.option, fd, mark)
    finally:
        os.close(fd)


def _open(file: Named, access: int) -> tuple[int, bool]:
    """Open a file, and say whether it was made for that."""
    # Whoever could read a pipe would be the one that it is not closed for.
    flags = access | getattr(os, "O_BINARY", 0)
    try:
        try:
            return os.open(file.path, flags), False
        except FileNotFoundError:
            return _make(file.path, flags | os.O_CREAT)
    except OSError as error:
        raise Refused(f"cannot open {file}: {error.strerror}") from error


def _make(path: str, flags: int) -> tuple[int, bool]:
    try:
        return os.open(path, flags | os.O_EXCL, 0o666), True
    except FileExistsError:
        # Somebody else's, or a link to what is not there.
        return os.open(path, flags, 0o666), False


def _lock(file: Named, fd: int) -> None:
    """Keep other runs from a file, until it is closed."""
    if sys.platform == "win32" or not stat.S_ISREG(os.fstat(fd).st_mode):
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused(f"{file} is in use by another run") from None
    except OSError:
        # Some file systems know no locks.
        return


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
