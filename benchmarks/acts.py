"""What is compared with what, and the goal of each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import features
import memory
import ours
import pauses
import peers
import scale
import trio
import twins
from contenders import FLOOR, MANY, MAP, OURS, PROCESS, WITH_CHECKPOINT, missing
from driving import Contender, Opener
from goals import Goal, at_most, below, faster
from measuring import Case, Comparison

PROCESS_GOALS: dict[tuple[int, str], dict[str, Goal]] = {
    (1, "no-op"): {FLOOR: at_most(1.25), "channel + reply channels": faster(2)},
    (1, "one checkpoint"): {FLOOR: at_most(1.2)},
    (64, "no-op"): {
        FLOOR: at_most(1.3),
        "channel + reply channels": faster(4),
        "nursery.start_soon, no caller": at_most(1),
        "asyncio queue + futures": at_most(1.6),
    },
    (64, "one checkpoint"): {FLOOR: at_most(1.2)},
}

MAP_GOALS: dict[str, dict[str, Goal]] = {
    "no-op": {
        FLOOR: at_most(1.5),
        "channel workers": faster(6),
        "nursery + CapacityLimiter": faster(18),
        "aiometer.run_on_each": faster(25),
        "aiometer.amap": faster(25),
        "asyncio group + semaphore": faster(4),
    },
    "one checkpoint": {FLOOR: at_most(1.25)},
}

MANY_GOALS = {
    "settle": at_most(1.2),
    "stream, in order": at_most(1.5),
    "submit_nowait, join, look": at_most(6),
    "submit_nowait, then read": at_most(6),
}

FEATURE_GOALS = {"timeout": at_most(1.1)} | dict.fromkeys(
    (
        "retry",
        "priority",
        "key",
        "two job hooks",
        "middleware, one layer",
        "rate",
        "breaker",
    ),
    at_most(1.25),
)


def comparisons(jobs: int) -> list[Comparison]:
    """List all of them; ``jobs`` a round, where that is not what it is about."""
    found = [*_process(jobs), *_map(jobs), *_features(jobs)]
    return [*found, *_scale(), *_workers(), *_memory(), *_endings(), *_fairness()]


def _there(contenders: Mapping[str, Contender], handler: str) -> dict[str, Contender]:
    absent = missing()
    return {
        name: contender
        for name, contender in contenders.items()
        if contender.needs not in absent
        and (handler == "no-op" or name in WITH_CHECKPOINT)
    }


def _process(jobs: int) -> list[Comparison]:
    found = []
    for (callers, handler), goals in PROCESS_GOALS.items():
        cases: dict[str, Case] = {
            name: partial(contender.time_process, handler, jobs, callers)
            for name, contender in _there(PROCESS, handler).items()
            # Without callers, it makes no difference how many there are.
            if callers > 1 or contender.drive is not peers.spawn_each
        }
        name = f"process, {_callers(callers)}, {handler}"
        found.append(Comparison("process", name, cases, goals))
    return found


def _map(jobs: int) -> list[Comparison]:
    found = []
    for handler, goals in MAP_GOALS.items():
        cases: dict[str, Case] = {
            name: partial(contender.time_map, handler, jobs)
            for name, contender in _there(MAP, handler).items()
        }
        found.append(Comparison("map", f"map, {handler}", cases, goals))
    cases = {name: partial(one.time_map, "no-op", jobs) for name, one in MANY.items()}
    many = Comparison("map", "many, no-op", cases, MANY_GOALS, "it to first")
    return [*found, many]


def _features(jobs: int) -> list[Comparison]:
    return [
        Comparison(
            "features",
            f"process, {_callers(callers)}, {of} option",
            {
                name: partial(Contender(opener).time_process, "no-op", jobs, callers)
                for name, opener in options.items()
            },
            FEATURE_GOALS,
            "it to first",
        )
        for callers in (1, 64)
        for of, options in _options().items()
    ]


def _options() -> dict[str, dict[str, Opener]]:
    return {"pool": features.POOL_OPTIONS, "job": features.JOB_OPTIONS}


def _callers(number: int) -> str:
    return f"{number} caller{'s' * (number > 1)}"


def _scale() -> list[Comparison]:
    def at_depth(*args: Any) -> Case:
        return partial(trio.run, scale.job_at_depth, *args)

    flat = at_most(1.2)
    few, million = "1,000 queued", "1,000,000 queued"
    every, order = "100,000 keys", "1,000 priorities"
    by_key, by_priority = scale.spread_over_keys, scale.spread_over_priorities
    return [
        Comparison(
            "scale",
            "job with others queued",
            {few: at_depth(1_000, 20_000), million: at_depth(1_000_000, 20_000)},
            {million: flat},
            "it to first",
            rounds=2,
        ),
        Comparison(
            "scale",
            "job with 100,000 queued, by key",
            {
                "10 keys": at_depth(100_000, 20_000, by_key(10)),
                every: at_depth(100_000, 20_000, by_key(100_000)),
            },
            {every: flat},
            "it to first",
            rounds=3,
        ),
        Comparison(
            "scale",
            "job with 100,000 queued, by priority",
            {
                "1 priority": at_depth(100_000, 20_000, by_priority(1)),
                order: at_depth(100_000, 20_000, by_priority(1_000)),
            },
            {order: flat},
            "it to first",
            rounds=3,
        ),
    ]


def _workers() -> list[Comparison]:
    number = 10_000

    def among(*args: Any) -> Case:
        return partial(trio.run, scale.job_among_workers, *args)

    # With one caller every job finds an idle worker, however many there are. With
    # 64, few workers go on from job to job, and of many each is woken for each.
    found = [
        Comparison(
            "scale",
            f"process, {_callers(callers)}, {whose}",
            {
                "8 workers": among(opener, 8, 6_400, callers),
                "10,000 workers": among(opener, number, 6_400, callers),
            },
            goals,
            "it to first",
            rounds=4,
        )
        for callers, whose, opener, goals in (
            (1, OURS, ours.our_process, {"10,000 workers": at_most(1.2)}),
            (64, OURS, ours.our_process, {}),
            (64, FLOOR, twins.floor_process, {}),
        )
    ]
    return [
        *found,
        Comparison(
            "scale",
            "opening and closing one of 10,000",
            {
                "worker": partial(trio.run, scale.open_and_close, number),
                "sleeping task": partial(
                    trio.run, scale.start_and_cancel_tasks, number
                ),
            },
            {"sleeping task": at_most(2)},
            rounds=4,
        ),
    ]


def _memory() -> list[Comparison]:
    small = below(400, "bytes")
    return [
        Comparison(
            "memory",
            "queued job of submit_nowait",
            {
                "reply let go": partial(trio.run, memory.queued_job, 20_000, False),
                "reply kept": partial(trio.run, memory.queued_job, 20_000, True),
            },
            {"reply let go": small, "reply kept": small},
            "none",
            "bytes",
            rounds=1,
        ),
        Comparison(
            "memory",
            "one of 2,000",
            {
                "idle worker": partial(trio.run, memory.idle_worker, 2_000),
                "sleeping task": partial(trio.run, memory.sleeping_task, 2_000),
            },
            {"idle worker": below(4096, "bytes")},
            unit="bytes",
            rounds=1,
        ),
    ]


def _endings() -> list[Comparison]:
    ways: tuple[pauses.Way, ...] = ("pool.cancel()", "grace over", "error in the block")
    found = [
        Comparison(
            "pauses",
            f"ending a queued job by {way}",
            {
                "one of 10,000": partial(trio.run, pauses.time_to_end, way, 10_000),
                "one of 100,000": partial(trio.run, pauses.time_to_end, way, 100_000),
            },
            {"one of 100,000": at_most(1.2)},
            "it to first",
            rounds=3,
        )
        for way in ways
    ]
    longest = Comparison(
        "pauses",
        "longest pause, ending 100,000 jobs by",
        {
            "(nothing for 0.1 s)": partial(trio.run, pauses.pause_of_nothing, 0.1),
            **{
                way: partial(trio.run, pauses.pause_of_end, way, 100_000)
                for way in ways
            },
        },
        dict.fromkeys(ways, below(10, "ms")),
        "none",
        "ms",
        rounds=3,
    )
    return [*found, longest]


def _fairness() -> list[Comparison]:
    return [
        Comparison(
            "pauses",
            "longest pause, mapping 100,000 items by",
            {
                "(nothing for 0.1 s)": partial(trio.run, pauses.pause_of_nothing, 0.1),
                OURS: partial(trio.run, pauses.pause_of_map, ours.our_map, 100_000),
                FLOOR: partial(trio.run, pauses.pause_of_map, twins.floor_map, 100_000),
            },
            {OURS: below(2, "ms")},
            "none",
            "ms",
        )
    ]
