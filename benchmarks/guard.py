"""Compare this checkout with the last release, by ratio to the floor.

Run ``python benchmarks/guard.py [--base REVISION_OR_DIRECTORY]``. Exit status 1
says that an act got worse by more than the tolerance, 2 that nothing could be
compared. Both sides run the benchmarks of this checkout, in turns, in processes
of their own; an act that seems worse is measured again before it is called so.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import attrs
from table import table

ROOT = Path(__file__).resolve().parents[1]
RATIOS = Path(__file__).with_name("ratios.py")

Samples = dict[str, list[float]]


class CannotCompare(Exception):
    """There is no base, or one of the two sides does not run."""


@attrs.frozen
class Move:
    """An act whose ratio to the floor is another one than it was."""

    act: str
    old: float
    new: float

    @property
    def change(self) -> float:
        """How much worse it is: 0.1 is a tenth more, negative is better."""
        return self.new / self.old - 1


def moved(
    old: Mapping[str, float], new: Mapping[str, float], tolerance: float
) -> list[Move]:
    """Return the acts of both that moved by more than the tolerance, worst first."""
    moves = [Move(act, old[act], new[act]) for act in new if act in old]
    moves = [move for move in moves if abs(move.change) > tolerance]
    return sorted(moves, key=lambda move: -move.change)


def worse(moves: Sequence[Move]) -> list[str]:
    """Return the acts that moved the wrong way."""
    return [move.act for move in moves if move.change > 0]


@attrs.define
class Side:
    """One of the two versions, and what was measured of it so far."""

    name: str
    source: Path
    samples: Samples = attrs.field(factory=dict)
    failed: dict[str, str] = attrs.field(factory=dict)

    def measure(self, only: Collection[str]) -> None:
        """Add one process's ratios of the acts named, or of all."""
        # One order of sets and dicts for both sides, or they differ by luck.
        env = os.environ | {"PYTHONPATH": str(self.source), "PYTHONHASHSEED": "0"}
        command = [sys.executable, str(RATIOS), *only]
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CannotCompare(f"{self.name} does not run:\n{done.stderr}")
        found = json.loads(done.stdout)
        if Path(found["source"]).resolve() != self.source.resolve():
            raise CannotCompare(
                f"{self.name} should come from {self.source}, "
                f"but Python took {found['source']}"
            )
        self.failed |= found["failed"]
        for act, ratio in found["ratios"].items():
            self.samples.setdefault(act, []).append(ratio)

    def ratios(self) -> dict[str, float]:
        """Return the median of the processes for each act.

        A process is lucky or unlucky with its memory, which minima would hide.
        """
        return {act: median(values) for act, values in self.samples.items()}


def measure_in_turns(sides: Sequence[Side], rounds: int, only: Collection[str]) -> None:
    """Let both sides measure, one process after the other."""
    for number in range(rounds):
        # Who is first changes, since the machine may get slower or faster.
        for side in sides if number % 2 else reversed(sides):
            side.measure(only)


def last_release() -> str:
    """Return the last tag that names a version."""
    command = ["git", "describe", "--tags", "--abbrev=0", "--match", "v*"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CannotCompare(
            "there is no tag v* to compare with: "
            "give --base with a git revision, or with a directory that has a src"
        )
    return done.stdout.strip()


@contextmanager
def source_of(base: str) -> Iterator[Path]:
    """Give the src of a directory or of a git revision."""
    if (Path(base) / "src" / "trio_pool").is_dir():
        yield Path(base) / "src"
        return
    command = ["git", "archive", "--format=zip", base, "src"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise CannotCompare(
            f"--base {base}: neither a directory with src/trio_pool nor a git "
            f"revision with src ({said})"
        )
    with TemporaryDirectory(prefix="trio_pool-base-") as folder:
        zipfile.ZipFile(io.BytesIO(done.stdout)).extractall(folder)
        yield Path(folder) / "src"


def report(old: Side, new: Side, tolerance: float) -> str:
    """Say of each act how it moved, and which could not be compared."""
    moves = {move.act for move in moved(old.ratios(), new.ratios(), tolerance)}
    lines = [("act", old.name, new.name, "change", "")]
    for act, ratio in new.ratios().items():
        if act in old.samples:
            move = Move(act, old.ratios()[act], ratio)
            word = ("WORSE" if move.change > 0 else "better") if act in moves else ""
            before, after = f"{move.old:.2f}x", f"{move.new:.2f}x"
            lines.append((act, before, after, f"{move.change:+.0%}", word))
    parts = [table(lines)]
    parts += [
        f"skipped, {old.name} cannot run it: {act} ({why})"
        for act, why in old.failed.items()
    ]
    return "\n".join(parts)


def compare(base: str, rounds: int, tolerance: float) -> int:
    """Compare, print, and return the exit status."""
    with source_of(base) as source:
        old, new = Side(base, source), Side("here", ROOT / "src")
        measure_in_turns((old, new), rounds, ())
        if new.failed:
            told = "\n".join(f"  {act}: {why}" for act, why in new.failed.items())
            raise CannotCompare(f"this checkout cannot run\n{told}")
        suspects = worse(moved(old.ratios(), new.ratios(), tolerance))
        if suspects:
            print(f"measured again: {'; '.join(suspects)}", file=sys.stderr)
            measure_in_turns((old, new), 2 * rounds, suspects)
    print("times as long as the floor, the less the better\n")
    print(report(old, new, tolerance))
    found = worse(moved(old.ratios(), new.ratios(), tolerance))
    if found:
        print(f"\nworse by more than {tolerance:.0%}: {'; '.join(found)}")
        return 1
    print(f"\nnothing is worse by more than {tolerance:.0%}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare with what the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base",
        metavar="REV_OR_DIRECTORY",
        help="a git revision or a directory with a src; the last tag v* if not given",
    )
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side")
    parser.add_argument("--tolerance", type=float, default=0.10)
    options = parser.parse_args(arguments)
    try:
        base = options.base or last_release()
        return compare(base, options.rounds, options.tolerance)
    except CannotCompare as error:
        print(f"guard.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
