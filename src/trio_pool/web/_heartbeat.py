"""Measures how long the loop is held up, and beats once a second for all else."""

import time
from collections.abc import Callable
from typing import final

import trio

_BEAT = 0.05
_SECOND = 1.0


@final
class Heartbeat:
    """A task that wants to run 20 times a second, and sees how late it is."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        """When it beat last, in seconds of `time.monotonic`; any thread may read."""

    async def run(self, on_second: Callable[[float, float, float], None]) -> None:
        """Beat for ever; call ``on_second(now, wall, lag)`` once a second.

        ``now`` is `trio.current_time`, ``wall`` `time.time`, and ``lag`` the
        longest that the loop was held up since the last time, in seconds.
        """
        start = trio.current_time()
        due, seconds, lag = start, 0, 0.0
        while True:
            due += _BEAT
            await trio.sleep_until(due)
            self.last = time.monotonic()
            now = trio.current_time()
            lag = max(lag, now - due)
            # Sums of beats may be a little less than the second they make up.
            passed = int((now - start + _BEAT / 2) / _SECOND)
            if passed > seconds:
                on_second(now, time.time(), lag)
                seconds, lag = passed, 0.0
                now = trio.current_time()
            # What was missed is over, and what took our own time is no lag.
            due = max(due, now)
