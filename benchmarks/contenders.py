"""Who takes part in each act, by the name that the tables show."""

from __future__ import annotations

from importlib.util import find_spec

import asyncio_peers
import ours
import peers
import twins
from driving import Contender, call_from_threads

OURS = "trio_pool"
FLOOR = "bare trio (floor)"

PROCESS: dict[str, Contender] = {
    OURS: Contender(ours.our_process),
    FLOOR: Contender(twins.floor_process),
    "channel + reply channels": Contender(peers.channel_process),
    "nursery.start_soon, no caller": Contender(
        peers.bare_handler, drive=peers.spawn_each
    ),
    "nursery.start_soon + Event": Contender(peers.spawn_process),
    "CapacityLimiter, no pool": Contender(peers.limiter_process),
    "asyncio queue + futures": Contender(asyncio_peers.queue_process, "asyncio"),
    "asyncio Semaphore, no pool": Contender(asyncio_peers.semaphore_process, "asyncio"),
    "aiojobs": Contender(asyncio_peers.aiojobs_process, "asyncio", needs="aiojobs"),
    "ThreadPoolExecutor": Contender(peers.thread_process, drive=call_from_threads),
}

MAP: dict[str, Contender] = {
    OURS: Contender(ours.our_map),
    FLOOR: Contender(twins.floor_map),
    "channel workers": Contender(peers.channel_map),
    "nursery + CapacityLimiter": Contender(peers.limiter_map),
    "aiometer.run_on_each": Contender(peers.aiometer_map, needs="aiometer"),
    "aiometer.amap": Contender(peers.aiometer_amap, needs="aiometer"),
    "anyio group + limiter": Contender(peers.anyio_map, needs="anyio"),
    "asyncio group + semaphore": Contender(asyncio_peers.group_map, "asyncio"),
    "ThreadPoolExecutor.map": Contender(peers.thread_map),
}

MANY: dict[str, Contender] = {
    "map": Contender(ours.our_map),
    "settle": Contender(ours.our_settle),
    "stream, in order": Contender(ours.our_stream),
    "stream, ahead=1000": Contender(ours.our_stream_far_ahead),
    "stream, as ready": Contender(ours.our_stream_as_ready),
    "submit_nowait, join, look": Contender(ours.our_outcomes),
    "submit_nowait, then read": Contender(ours.our_replies),
    "submit, then read": Contender(ours.our_awaited_replies),
}

# The rest is there for a handler that does nothing: what it adds is the same.
WITH_CHECKPOINT = {
    OURS,
    FLOOR,
    "channel + reply channels",
    "asyncio queue + futures",
    "channel workers",
    "asyncio group + semaphore",
}


def missing() -> list[str]:
    """List the libraries of peers that are not installed."""
    needed = {one.needs for one in (*PROCESS.values(), *MAP.values()) if one.needs}
    return sorted(name for name in needed if find_spec(name) is None)
