"""Crawl a site that is slow, fails and hangs up, without hurting it.

    python crawler.py --pages 1000 --seed 7

The program serves the site itself, on loopback. What is wrong with a page is drawn
by the seed: its first visitors may be answered too late, by an error or by half a
page, and some pages never get well. Links go round in circles, some lead nowhere.
"""

import argparse
import random
from collections import Counter, deque
from contextlib import suppress
from functools import partial

import trio

from trio_pool import Backoff, JobTimeout, PoolConfig, Rate, Retry, open_pool

RATE = Rate(400, burst=10)  # visits a second, together with all other pools it is given
CONNECTIONS = 8
TIMEOUT = 1.0  # seconds of a visit
AHEAD = 64  # pages that are being visited, or were and are not looked at yet
ILLS = {"late": 1, "error": 4, "half": 4}  # how often one is met
TROUBLE = OSError, trio.BrokenResourceError, JobTimeout
RETRY = Retry(5, Backoff(initial=0.05), on=TROUBLE)


class Site:
    def __init__(self, pages: int, seed: int) -> None:
        draw = random.Random(seed)
        self.served: Counter[str] = Counter()
        self.links: dict[str, list[str]] = {}
        self.ills: dict[str, list[str]] = {}  # what its next visitors meet
        for n in range(pages):
            below = [below for below in (2 * n + 1, 2 * n + 2) if below < pages]
            links = [f"/{page}" for page in (*below, draw.randrange(pages))]
            self.links[f"/{n}"] = [*links, f"/gone/{n}"] if n % 10 == 9 else links
            number = draw.choice((0, 0, 0, 0, 1, 2))
            self.ills[f"/{n}"] = draw.choices([*ILLS], [*ILLS.values()], k=number)
        for n in range(pages - 1, pages // 2, -25):
            self.ills[f"/{n}"] = ["error"] * 1_000

    async def serve(self, stream: trio.SocketStream) -> None:
        # Whoever has waited too long has gone.
        with suppress(trio.BrokenResourceError, IndexError):
            async with stream:
                path = (await stream.receive_some(4096)).split()[1].decode()
                await stream.send_all(await self.answer(path))

    async def answer(self, path: str) -> bytes:
        ill = self.ills[path].pop() if self.ills.get(path) else "well"
        kind = ill if path in self.links else "missing"
        self.served[kind] += 1
        if kind == "late":
            await trio.sleep(60)
        status = {"error": 500, "missing": 404}.get(kind, 200)
        body = " ".join(self.links.get(path, ()))
        head = f"HTTP/1.1 {status} \r\nContent-Length: {len(body)}\r\n\r\n"
        return (head + (body[1:] if kind == "half" else body)).encode()


async def fetch(port: int, path: str) -> list[str]:
    """Return the links of a page."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        request = f"GET {path} HTTP/1.1\r\nHost: site\r\nConnection: close\r\n\r\n"
        await stream.send_all(request.encode())
        answer = "".join([part.decode() async for part in stream])
    head, _, body = answer.partition("\r\n\r\n")
    if not head.endswith(f"Content-Length: {len(body)}"):
        raise ConnectionError("the server hung up")
    status = int(head.split()[1])
    if status >= 500:
        raise ConnectionError(f"the server failed: {status}")
    if status != 200:
        raise LookupError(status)
    return body.split()


class Frontier:
    """The pages to visit, each once; its end comes when the last one is done."""

    def __init__(self, start: str) -> None:
        self.seen, self.waiting, self.unfinished = {start}, deque([start]), 1
        self.news = trio.Event()

    def finish(self, links: list[str]) -> None:
        new = set(links) - self.seen
        self.seen |= new
        self.waiting.extend(sorted(new))
        self.unfinished += len(new) - 1
        self.news.set()

    def __aiter__(self) -> "Frontier":
        return self

    async def __anext__(self) -> str:
        while not self.waiting:
            if not self.unfinished:
                raise StopAsyncIteration
            self.news = trio.Event()
            await self.news.wait()
        return self.waiting.popleft()


async def crawl(port: int) -> Counter[str]:
    found: Counter[str] = Counter()
    frontier = Frontier("/0")
    # Other code that talks to the site would share it.
    limiter = trio.CapacityLimiter(CONNECTIONS)
    limits = PoolConfig(
        size=16, timeout=TIMEOUT, retry=RETRY, rate=RATE, limiter=limiter
    )
    async with (
        open_pool(limits, partial(fetch, port)) as pool,
        pool.stream(frontier, ordered=False, ahead=AHEAD, outcomes=True) as pages,
    ):
        async for page in pages:
            links: list[str] = []
            try:
                links = page.outcome.unwrap()
                found["read"] += 1
            except LookupError:
                found["not there"] += 1
            except TROUBLE as error:
                found["given up"] += 1
                print(f"{page.item}: {error}; {error.__notes__[0]}")
            frontier.finish(links)
        found["tried again"] = pool.statistics().retries
    return found


async def main(pages: int, seed: int) -> None:
    site = Site(pages, seed)
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, site.serve, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        found = await crawl(listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()
    for name, counts in (("pages", found), ("served", site.served)):
        print(f"{name}:", ", ".join(f"{counts[key]} {key}" for key in sorted(counts)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    trio.run(main, args.pages, args.seed)
