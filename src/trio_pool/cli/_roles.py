"""The files of a run: that none of them has two roles, and how they are opened."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from itertools import combinations
from typing import final

import attrs

from ._ends import Refused
from ._files import Mark, Named, Target, check_regular, name_file, open_target

_STANDARD = {"--input": 0, "--output": 1, "--failures": 2}


@final
@attrs.frozen
class Files:
    """The files that the command line names."""

    input: Named
    output: Named
    failures: Named | None
    journal: Named | None


def name_files(
    input_name: str, output: str, failures: str | None, journal: str | None
) -> Files:
    """Find out where the files are, while the current directory is what it was.

    Raises:
      Refused: one of them has two roles, or cannot have its own.
    """
    files = Files(
        name_file("--input", input_name),
        name_file("--output", output),
        None if failures is None else name_file("--failures", failures),
        None if journal is None else name_file("--journal", journal),
    )
    if files.journal is not None:
        check_regular(files.output)
        if files.failures is not None:
            check_regular(files.failures)
    if failures == "-":
        expected = "a file; without it they go to standard error"
        raise Refused(f"--failures must be {expected}, got '-'")
    _check_names(files)
    return files


def _check_names(files: Files) -> None:
    told = files.failures or Named("--failures", "-", "-")
    named = [files.input, files.output, told]
    if files.journal is not None:
        named.append(files.journal)
    for one, other in combinations(named, 2):
        if _is_same(one, other):
            given = one.given if other.given == "-" else other.given
            raise _refuse(one.option, other.option, given)


def _refuse(one: str, other: str, given: str) -> Refused:
    both = "one file" if given == "-" else repr(given)
    return Refused(f"{one} and {other} must be different, both are {both}")


def _is_same(one: Named, other: Named) -> bool:
    # Output and errors may well go to one log.
    if one.option == "--output" and one.path == other.path == "-":
        return False
    its, others = _look(one), _look(other)
    if its is not None and others is not None:
        return _is_one_file(its, others)
    if "-" in (one.path, other.path):
        return False
    return os.path.realpath(one.path) == os.path.realpath(other.path)


def _look(file: Named) -> os.stat_result | None:
    try:
        if file.path == "-" and file.option in _STANDARD:
            return os.fstat(_STANDARD[file.option])
        return os.stat(file.path)
    except OSError:
        return None


def _is_one_file(one: os.stat_result, other: os.stat_result) -> bool:
    # Two that write to one terminal or device do no harm.
    return stat.S_ISREG(one.st_mode) and os.path.samestat(one, other)


def open_targets(
    files: Files, input_fd: int, output_fd: int, marks: tuple[Mark, Mark] | None
) -> tuple[Target, Target]:
    """Open output and failures, and take off what is not of this run.

    Raises:
      Refused: one cannot be opened, or has another role; nothing has changed.
      Broken: one cannot be cut.
    """
    output_mark, failures_mark = marks or (None, None)
    with ExitStack() as opened:
        output = Target("standard output", output_fd)
        failures = Target("standard error", 2)
        if files.output.path != "-":
            output = open_target(files.output, output_mark)
            opened.callback(output.discard)
        if files.failures is not None:
            failures = open_target(files.failures, failures_mark)
            opened.callback(failures.discard)
        _check_open(files, input_fd, output, failures)
        # All of them are there, so that nothing is left to be refused.
        for target in (output, failures):
            target.cut()
        opened.pop_all()
    return output, failures


def _check_open(files: Files, input_fd: int, output: Target, failures: Target) -> None:
    its = os.fstat(input_fd)
    for target, option in ((output, "--output"), (failures, "--failures")):
        if _is_one_file(its, target.look()):
            raise _refuse("--input", option, files.input.given)
    are_named = output.is_named and failures.is_named
    if are_named and _is_one_file(output.look(), failures.look()):
        raise _refuse("--output", "--failures", files.output.given)
