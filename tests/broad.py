"""A program that uses a bit of everything, to be run by whatever can host trio.

`test_hosts` runs it. As a program of its own it says how many jobs it ran.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from trio_pool import (
    Backoff,
    CircuitBreaker,
    Drain,
    EventsLost,
    JobCancelled,
    JobTimeout,
    Pool,
    Rate,
    Restart,
    Retry,
    WorkerCrashed,
    open_pool,
)

SECONDS = 0.002


class Failure(Exception):
    """What some jobs raise."""


class Program:
    """One run of it, with its own count of what was set up and cleaned up."""

    def __init__(self) -> None:
        self.jobs = 0
        self.set_up = 0
        self.cleaned_up = 0
        self.attempts: Counter[str] = Counter()

    @asynccontextmanager
    async def member(self) -> AsyncGenerator[Callable[[str], Awaitable[str]], None]:
        await trio.lowlevel.checkpoint()
        self.set_up += 1
        try:
            yield self.handle
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            self.cleaned_up += 1

    async def handle(self, what: str) -> str:
        self.attempts[what] += 1
        match what.partition(" ")[0]:
            case "sleep":
                await trio.sleep(SECONDS)
            case "hang":
                await trio.sleep_forever()
            case "fail":
                raise Failure(what)
            case "flaky" if self.attempts[what] == 1:
                raise Failure(what)
            case "crash":
                raise SystemExit
            case "thread":
                return await trio.to_thread.run_sync(str.upper, what)
            case _:
                await trio.lowlevel.checkpoint()
        return what.upper()

    async def run(self) -> int:
        """Use a pool in every way; return the number of jobs that it accepted."""
        async with open_pool(
            3,
            worker=self.member,
            retry=Retry(2, Backoff(SECONDS), on=Failure),
            restart=Restart(100, backoff=Backoff(SECONDS)),
            rate=Rate(1_000_000, burst=1000),
            breaker=CircuitBreaker(1000),
            max_jobs=20,
        ) as pool:
            async with pool.events(buffer=1) as events:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.call, pool)
                    nursery.start_soon(self.fail, pool)
                    nursery.start_soon(self.have_many, pool)
                    nursery.start_soon(self.submit, pool)
                async for event in events:
                    assert isinstance(event, EventsLost)
                    break
            await pool.resize(1)
            pool.pause()
            reply = await pool.submit("sleep on")
            await pool.shutdown(grace=10)
            assert await reply.wait() == "SLEEP ON"
        await self.leave()
        count = pool.statistics()
        assert self.set_up == self.cleaned_up >= 5
        assert count.accepted == sum(
            (count.done, count.failed, count.timed_out, count.cancelled, count.lost)
        )
        return count.accepted

    async def call(self, pool: Pool[str, str]) -> None:
        async def some(number: int) -> None:
            for what in ("", "sleep", "flaky", "thread"):
                text = f"{what} {number}"
                assert await pool.process(text) == text.upper()

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(some, number)
        async with pool.lease() as worker:
            assert await worker.process("leased") == "LEASED"

    async def fail(self, pool: Pool[str, str]) -> None:
        for number in range(3):
            try:
                await pool.process(f"fail {number}")
            except Failure:
                pass
            try:
                await pool.process("hang", timeout=SECONDS)
            except JobTimeout:
                pass
            try:
                await pool.process("crash")
            except WorkerCrashed:
                pass
            with trio.move_on_after(SECONDS) as scope:
                await pool.process("hang")
            assert scope.cancelled_caught

    async def have_many(self, pool: Pool[str, str]) -> None:
        texts = [f"{number}" for number in range(30)]
        assert await pool.map(texts) == texts

        async def feed() -> AsyncGenerator[str, None]:
            for text in texts:
                await trio.lowlevel.checkpoint()
                yield text

        assert await pool.map(feed()) == texts
        async with pool.stream(feed(), ordered=False) as stream:
            async for _ in stream:
                break
        try:
            await pool.map(["a", "fail b", "hang c"])
        except* Failure:
            pass
        settled = await pool.settle(["a", "fail d", "sleep e"])
        assert [hasattr(s.outcome, "value") for s in settled] == [True, False, True]

    async def submit(self, pool: Pool[str, str]) -> None:
        drain: Drain[str] = Drain()
        await pool.submit_batch(["sleep 1", "sleep 2"], drain=drain)
        reply = await pool.submit("hang")
        await trio.sleep(SECONDS)
        reply.cancel()
        try:
            await reply.wait()
        except JobCancelled:
            pass
        late = await pool.submit("late", delay=SECONDS, ttl=10.0)
        assert await late.wait() == "LATE"
        await pool.join()
        assert len(drain.collect()) == 2

    async def leave(self) -> None:
        """Leave pools by an error and by a cancellation, with jobs in them."""
        try:
            async with open_pool(2, worker=self.member) as pool:
                for _ in range(5):
                    pool.submit_nowait("hang")
                raise Failure
        except Failure:
            pass
        with trio.move_on_after(SECONDS * 5):
            async with open_pool(2, worker=self.member) as pool:
                await pool.map(["hang"] * 5)


async def main() -> int:
    return await Program().run()


if __name__ == "__main__":
    # That workers crash is meant; whatever else is said is not.
    logging.getLogger("trio_pool").disabled = True
    print(trio.run(main))
    gc.collect()
