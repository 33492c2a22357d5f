"""Measures how long the loop is held up, and beats once a second for all else."""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import final

import trio

_BEAT = 0.05


@final
class Heartbeat:
    """Asks the loop 20 times a second to answer, and sees how long that takes.

    A thread asks. A task that sleeps would be a deadline in trio, and while there
    is one, every job of every pool looks for that of its caller.
    """

    def __init__(self) -> None:
        self.last = time.monotonic()
        """When the loop answered last, on `time.monotonic`; any thread may read."""
        self._start = self.last
        self._seconds = 0
        self._lag = 0.0

    def hear(self, asked: float, now: float) -> float | None:
        """Note that the loop answers ``now`` what it was asked before.

        Returns, once a second, the longest that this took since the last time.
        """
        self.last = now
        self._lag = max(self._lag, now - asked)
        seconds = int(now - self._start)
        if seconds == self._seconds:
            return None
        lag, self._lag, self._seconds = self._lag, 0.0, seconds
        return lag

    async def run(self, on_second: Callable[[float, float, float], None]) -> None:
        """Beat for ever; call ``on_second(now, wall, lag)`` once a second.

        ``now`` is `trio.current_time`, ``wall`` `time.time`, and ``lag`` the
        longest that the loop was held up since the last time, in seconds.
        """
        lags: list[float] = []
        due = trio.lowlevel.ParkingLot()

        def answer(asked: float) -> None:
            lag = self.hear(asked, time.monotonic())
            if lag is not None:
                lags.append(lag)
                due.unpark_all()

        with _asking(answer):
            while True:
                if lags:
                    lag = max(lags)
                    lags.clear()
                    on_second(trio.current_time(), time.time(), lag)
                await due.park()


@contextmanager
def _asking(answer: Callable[[float], None]) -> Generator[None, None, None]:
    """Have ``answer`` called in the loop, with the time when that was asked for."""
    token = trio.lowlevel.current_trio_token()
    enough, is_open = threading.Event(), threading.Event()

    def answer_this(asked: float) -> None:
        is_open.clear()
        if not enough.is_set():
            answer(asked)

    def ask() -> None:
        while not enough.wait(_BEAT):
            # One at a time: while the loop is held up, the first question counts.
            if not is_open.is_set():
                is_open.set()
                try:
                    token.run_sync_soon(answer_this, time.monotonic())
                except trio.RunFinishedError:
                    return

    thread = threading.Thread(target=ask, name="trio_pool heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()
