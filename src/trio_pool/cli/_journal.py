"""The journal: what a run has answered, so that one that was killed can go on.

The protocol: write to the files, have the disk keep that, and only then commit how
long they are together with which lines are answered. Whatever is killed when, the
journal never knows of an answer that is not in the files; and what is in the files
beyond it is cut off by the run that goes on, which answers those lines anew.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from typing import Any, Self, TypeAlias, final

import attrs

from ._answers import Tally
from ._ends import Broken, Refused
from ._files import Mark, Named
from ._lines import Position

_APPLICATION = 0x7472696F  # "trio"
_VERSION = 1

Settings: TypeAlias = Mapping[str, Any]
"""The options that decide what is answered, and how."""


@final
@attrs.frozen
class State:
    """What is kept of a run: all of it at once, or nothing."""

    tally: Tally = attrs.field(factory=Tally)
    input: Position = attrs.field(factory=Position)
    output: Mark = attrs.field(factory=Mark)
    failures: Mark = attrs.field(factory=Mark)
    finished: bool = False


@final
class Journal:
    """A journal that is open, and by that locked, until it is closed.

    The lock goes with the process, however that ends. Its calls block for
    milliseconds, and come from one thread at a time.
    """

    def __init__(
        self, file: Named, connection: sqlite3.Connection, *, is_new: bool
    ) -> None:
        self._file = file
        self._is_new = is_new
        self._connection = connection
        self.state = _load(_ask(connection, "SELECT state FROM run"))

    def commit(self, state: State) -> None:
        """Keep how far the run is; the files must be that far already.

        Raises:
          Broken: it cannot be written.
        """
        try:
            self._connection.execute("UPDATE run SET state = ?", (_dump(state),))
        except sqlite3.Error as error:
            text = f"cannot write {self._file}: {error}"
            raise Broken(text) from error
        self.state = state

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._connection.close()
        if self._is_new and kind is Refused and self.state == State():
            # That the run was refused is to have changed nothing.
            with suppress(OSError):
                os.unlink(self._file.path)


def open_journal(file: Named, settings: Settings) -> Journal:
    """Open a journal that is new, or of a run with the same settings.

    Raises:
      Refused: it is another run's, or in use, or no journal.
    """
    path = file.path
    is_new = not os.path.lexists(path)
    with ExitStack() as stack:
        try:
            # Trio's threads are many, but only one has it at a time.
            connection = sqlite3.connect(
                path, timeout=0, isolation_level=None, check_same_thread=False
            )
            stack.enter_context(closing(connection))
            _begin(file, connection, settings)
            journal = Journal(file, connection, is_new=is_new)
        except sqlite3.Error as error:
            raise Refused(_wording(file, error)) from error
        stack.pop_all()
    return journal


def _begin(file: Named, connection: sqlite3.Connection, settings: Settings) -> None:
    # The lock is kept beyond the transaction, for as long as it is open.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("BEGIN EXCLUSIVE")
    if not _ask(connection, "SELECT count(*) FROM sqlite_master"):
        _create(connection, settings)
    _check(file, connection, settings)
    connection.execute("COMMIT")
    # A commit appends to a file beside it. Should the machine lose the last ones,
    # no harm is done: it is as if the run had been killed earlier.
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")


def _create(connection: sqlite3.Connection, settings: Settings) -> None:
    connection.execute(f"PRAGMA application_id = {_APPLICATION}")
    connection.execute(f"PRAGMA user_version = {_VERSION}")
    connection.execute("CREATE TABLE run (settings TEXT, state TEXT)")
    values = (json.dumps(settings), _dump(State()))
    connection.execute("INSERT INTO run VALUES (?, ?)", values)


def _check(file: Named, connection: sqlite3.Connection, settings: Settings) -> None:
    if _ask(connection, "PRAGMA application_id") != _APPLICATION:
        raise Refused(f"{file} is a database, but no journal")
    version = _ask(connection, "PRAGMA user_version")
    if version != _VERSION:
        expected = f"of version {_VERSION}, not of {version}"
        raise Refused(f"{file} must be {expected}: finish it as begun")
    before = json.loads(_ask(connection, "SELECT settings FROM run"))
    differing = [
        f"{option} was {before.get(option)!r}, is {value!r}"
        for option, value in settings.items()
        if before.get(option) != value
    ]
    if differing and _load(_ask(connection, "SELECT state FROM run")) == State():
        # Nothing came of that run, so there is nothing to go on with.
        connection.execute("UPDATE run SET settings = ?", (json.dumps(settings),))
    elif differing:
        text = "; ".join(differing)
        raise Refused(f"{file} is of another run: {text}")


def _ask(connection: sqlite3.Connection, question: str) -> Any:
    return connection.execute(question).fetchone()[0]


def _wording(file: Named, error: sqlite3.Error) -> str:
    if "locked" in str(error):
        return f"{file} is in use by another run"
    if "not a database" in str(error):
        return f"{file} is no journal"
    return f"cannot open {file}: {error}"


def _dump(state: State) -> str:
    def plain(_: object, __: object, value: Any) -> Any:
        return value.decode("latin-1") if isinstance(value, bytes) else value

    return json.dumps(attrs.asdict(state, value_serializer=plain))


def _load(text: str) -> State:
    found = json.loads(text)
    tally = found["tally"] | {"pending": tuple(found["tally"]["pending"])}
    return State(
        tally=Tally(**tally),
        input=Position(**found["input"]),
        output=_mark(**found["output"]),
        failures=_mark(**found["failures"]),
        finished=found["finished"],
    )


def _mark(size: int, tail: str) -> Mark:
    return Mark(size, tail.encode("latin-1"))
