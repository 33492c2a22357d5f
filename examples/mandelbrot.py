"""Draw the Mandelbrot set on threads, processes, a Dask cluster or Ray.

python examples/mandelbrot.py --on processes --out picture.png
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import trio

from trio_pool import offload, open_pool

CENTRE, SPAN, DEPTH = complex(-0.7436, 0.1318), 0.006, 400


def draw_row(width: int, height: int, row: int) -> bytes:
    """Return the colours of a row: how soon each point is known to get away."""
    colours = bytearray()
    step = SPAN / width
    for column in range(width):
        point = CENTRE + complex(column - width / 2, row - height / 2) * step
        z, left = 0j, DEPTH
        while left and abs(z) < 2:
            z, left = z * z + point, left - 1
        shade = 4 * (DEPTH - left) if left else 0
        colours += bytes(min(255, shade * weight // 4) for weight in (1, 2, 5))
    return bytes(colours)


def workers(engine: str, fn: Any) -> Any:
    """Choose where the rows are drawn."""
    if engine == "threads":
        return offload.in_thread(fn)
    if engine == "processes":
        return offload.in_process(fn)
    return offload.on_dask(fn) if engine == "dask" else offload.on_ray(fn)


def write_png(path: Path, width: int, rows: list[bytes]) -> None:
    """Write rows of red, green and blue bytes as a PNG file."""
    header = struct.pack(">IIBBBBB", width, len(rows), 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data)
            file.write(struct.pack(">I", zlib.crc32(kind + data)))


async def main(options: argparse.Namespace) -> None:
    """Draw all rows, and tell how far that is."""
    width, height = options.width, options.width * 5 // 8
    worker = workers(options.on, partial(draw_row, width, height))
    rows: list[bytes] = []
    async with open_pool(options.workers, worker=worker) as pool:
        async with pool.stream(range(height)) as drawn:
            async for row in drawn:
                rows.append(row)
                end = "" if len(rows) < height else "\n"
                print(f"\r{len(rows) / height:4.0%}", end=end, file=sys.stderr)
    write_png(options.out, width, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    engines = ["threads", "processes", "dask", "ray"]
    parser.add_argument("--on", choices=engines, default="processes")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--width", type=int, default=480)
    parser.add_argument("--out", type=Path, default=Path("mandelbrot.png"))
    trio.run(main, parser.parse_args())
