"""Hash every file below a directory, printed as sha256sum prints it.

    python checksums.py /usr/share > sums; sha256sum --quiet -c sums

Each worker keeps one buffer for its whole life. Results come in the order of the
files, while later files are still being read.
"""

import argparse
import hashlib
import os
import sys
import sysconfig
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from trio_pool import open_pool

ALGORITHMS = sorted(a for a in hashlib.algorithms_guaranteed if "shake" not in a)
BUFFER = 1 << 20  # bytes that a worker reads at once
ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r"})
PROGRESS = sys.stderr.isatty()
CLEAR = "\r\x1b[K" if PROGRESS else ""  # wipes the progress line

Digest = tuple[str, int]  # the hexadecimal digest of a file, and its size in bytes


class Report:
    files = bytes = failures = 0
    start = time.perf_counter()

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.start
        size, rate = self.bytes / 1e6, self.bytes / 1e6 / seconds
        done = f"{self.files:,} files, {size:,.1f} MB in {seconds:.1f} s"
        return f"{done} ({rate:,.1f} MB/s), {self.failures} failed"

    async def keep_drawing(self) -> None:
        while True:
            print(f"{CLEAR}{self}", end="", file=sys.stderr, flush=True)
            await trio.sleep(0.1)

    def hashed(self, path: str, digest: str, size: int) -> None:
        self.files += 1
        self.bytes += size
        escaped = path.translate(ESCAPES)
        mark = "" if escaped == path else "\\"
        print(end=CLEAR, file=sys.stderr, flush=True)
        sys.stdout.buffer.write(os.fsencode(f"{mark}{digest}  {escaped}\n"))
        sys.stdout.buffer.flush()

    def failed(self, error: OSError, path: str = "") -> None:
        self.failures += 1
        where = path or error.filename
        print(f"{CLEAR}checksums: {where!r}: {error.strerror}", file=sys.stderr)


def files_below(top: str, report: Report) -> Iterator[str]:
    """Walk lazily: only as far as the pool has room for jobs."""
    for folder, folders, names in os.walk(top, onerror=report.failed):
        folders.sort()
        for path in (os.path.join(folder, name) for name in sorted(names)):
            regular = os.path.isfile(path) and not os.path.islink(path)
            # What cannot even be looked at fails when it is opened, and is reported.
            if regular or not os.path.lexists(path):
                yield path


def hash_file(path: str, algorithm: str, buffer: memoryview) -> Digest:
    """Run in a thread; between two bufferfuls it can be cancelled."""
    digest, size = hashlib.new(algorithm, usedforsecurity=False), 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            trio.from_thread.check_cancelled()
    return digest.hexdigest(), size


@asynccontextmanager
async def hasher(algorithm: str) -> AsyncGenerator[Callable[[str], Awaitable[Digest]]]:
    """A worker: set up once, then its `digest` is called for file after file."""
    buffer = memoryview(bytearray(BUFFER))
    thread = trio.CapacityLimiter(1)

    async def digest(path: str) -> Digest:
        run_sync = trio.to_thread.run_sync
        return await run_sync(hash_file, path, algorithm, buffer, limiter=thread)

    yield digest


async def checksums(top: str, algorithm: str, workers: int) -> int:
    report = Report()
    async with trio.open_nursery() as nursery:
        if PROGRESS:
            nursery.start_soon(report.keep_drawing)
        async with (
            open_pool(workers, worker=partial(hasher, algorithm)) as pool,
            pool.stream(files_below(top, report), outcomes=True) as results,
        ):
            async for settled in results:
                try:
                    digest, size = settled.outcome.unwrap()
                except OSError as error:
                    report.failed(error, settled.item)
                else:
                    report.hashed(settled.item, digest, size)
        nursery.cancel_scope.cancel()
    print(f"{CLEAR}{report}", file=sys.stderr)
    return 1 if report.failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Hash every file below a directory.")
    library = sysconfig.get_path("stdlib")
    parser.add_argument("directory", nargs="?", default=library)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="sha256")
    args = parser.parse_args()
    if not os.path.isdir(args.directory):
        parser.error(f"not a directory: {args.directory!r}")
    if args.workers < 1:
        parser.error(f"--workers: expected at least 1, got {args.workers}")
    code = 130
    try:
        code = trio.run(checksums, args.directory, args.algorithm, args.workers)
    except* KeyboardInterrupt:
        print(f"{CLEAR}checksums: interrupted", file=sys.stderr)
    except* BrokenPipeError:
        # The reader has gone, as `head` does: keep Python's own last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    return code


if __name__ == "__main__":
    sys.exit(main())
