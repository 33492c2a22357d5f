"""The plugin that logs: what is told, at which level, and what it costs."""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
import trio
from trio.testing import MockClock

from trio_pool import (
    Backoff,
    JobDropped,
    JobExpired,
    PoolBroken,
    PoolConfig,
    Restart,
    Retry,
    open_pool,
)
from trio_pool.logs import LEVELS, PoolLog

SECRET = "the secret in the input"
ONCE = Restart(limit=0, backoff=Backoff(initial=0.5, jitter=0.0))


class Broken(Exception):
    """What breaks a worker."""


async def obey(job: Any) -> Any:
    """Raise an error, sleep for a number of seconds, or return what is given."""
    if isinstance(job, BaseException):
        raise job
    if isinstance(job, float):
        await trio.sleep(job)
    return job


class Kept(logging.Handler):
    """Keeps the records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def kinds(self) -> list[str]:
        return [record.kind for record in self.records if hasattr(record, "kind")]

    def named(self, kind: str) -> list[Any]:
        return [r for r in self.records if getattr(r, "kind", None) == kind]

    def texts(self) -> str:
        formatter = logging.Formatter()
        return "\n".join(map(formatter.format, self.records))


@pytest.fixture
def kept() -> Iterator[Kept]:
    """Keep what is logged below ``trio_pool``, which has the level DEBUG."""
    logger, handler = logging.getLogger("trio_pool"), Kept()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


async def test_a_quiet_life_is_told_in_order_each_at_its_level(kept: Kept) -> None:
    async with open_pool(1, obey, name="press", plugins=[PoolLog()]) as pool:
        await pool.process(1)
        await pool.resize(2)
    found = [(r.name, r.levelname, r.getMessage()) for r in kept.records]
    assert found[:4] == [
        ("trio_pool.workers", "DEBUG", "worker 0 of pool 'press' started"),
        ("trio_pool.pools", "INFO", "pool 'press' started"),
        ("trio_pool.pools", "INFO", "pool 'press' is resized from 1 to 2 workers"),
        ("trio_pool.workers", "DEBUG", "worker 1 of pool 'press' started"),
    ]
    assert kept.kinds[4:] == ["worker_stop", "worker_stop", "pool_stop"]
    assert all(record.pool == "press" for record in kept.records)
    assert (kept.named("resize")[0].old_size, kept.named("resize")[0].new_size) == (
        1,
        2,
    )


async def test_what_befalls_jobs_is_told_with_its_facts(
    kept: Kept, autojump_clock: MockClock
) -> None:
    retry = Retry(2, Backoff(initial=0.25, jitter=0.0), on=ValueError)
    options: Any = {"max_backlog": 1, "overflow": "drop_oldest", "unobserved": "ignore"}
    async with open_pool(1, obey, plugins=[PoolLog()], **options) as pool:
        await pool.settle([ValueError()], retry=retry)
        running = await pool.submit(1.0, id="long")
        await trio.testing.wait_all_tasks_blocked()
        dropped, expired = pool.submit_nowait(0), pool.submit_nowait(0, ttl=0.5)
        with pytest.raises(JobDropped):
            await dropped.wait()
        with pytest.raises(JobExpired):
            await expired.wait()
        running.cancel()
    jobs = [kind for kind in kept.kinds if kind.startswith("job")]
    assert jobs == ["job_retry", "job_error", "job_drop", "job_drop", "job_cancel"]
    again, failed = kept.named("job_retry")[0], kept.named("job_error")[0]
    assert (again.delay, again.attempts, again.error_type) == (0.25, 1, "ValueError")
    assert (failed.state, failed.attempts, failed.worker) == ("failed", 2, 0)
    assert [r.state for r in kept.named("job_drop")] == ["dropped", "expired"]
    assert kept.named("job_cancel")[0].job_id == "long"
    assert {r.levelname for r in kept.records if r.name == "trio_pool.jobs"} == {
        "DEBUG"
    }


async def test_a_crash_and_the_restart_are_warnings(
    kept: Kept, autojump_clock: MockClock
) -> None:
    plugins = [PoolLog()]
    async with open_pool(1, obey, crash_on=Broken, plugins=plugins) as pool:
        await pool.settle([Broken()])
        await trio.sleep(60)
    crash, again = kept.named("worker_crash")[0], kept.named("worker_restart")[0]
    assert (crash.levelname, again.levelname) == ("WARNING", "WARNING")
    assert (crash.worker, crash.error_type) == (0, f"{__name__}.Broken")


@pytest.mark.parametrize("body", ["waits", "sleeps", "fails", "is cancelled"])
async def test_a_pool_that_breaks_is_an_error_however_its_block_ends(
    kept: Kept, body: str, autojump_clock: MockClock
) -> None:
    both = pytest.RaisesGroup(KeyError, PoolBroken)
    expected = both if body == "fails" else pytest.raises(PoolBroken)
    with expected, trio.CancelScope() as scope:
        async with open_pool(
            1, obey, crash_on=Broken, restart=ONCE, plugins=[PoolLog()], name="press"
        ) as pool:
            try:
                if body == "waits":
                    await pool.settle([Broken()])
                    await pool.process(1)
                pool.submit_nowait(Broken())
                await trio.sleep_forever()
            finally:
                if body == "fails":
                    raise KeyError("the block's own")
                if body == "is cancelled":
                    scope.cancel()
    (broken,) = kept.named("pool_broken")
    assert (broken.levelname, broken.name) == ("ERROR", "trio_pool.pools")
    assert broken.getMessage() == (
        "pool 'press' is broken: worker 0 crashed 1 times within 60.0 s"
    )
    assert broken.reason in broken.getMessage()
    assert kept.kinds.index("pool_stop") < kept.kinds.index("pool_broken")


async def test_the_break_of_an_inner_pool_is_told_once_and_by_the_inner_one(
    kept: Kept,
) -> None:
    config = PoolConfig(size=1, crash_on=Broken, restart=ONCE, plugins=[PoolLog()])
    with pytest.raises(PoolBroken):
        async with open_pool(config, obey, name="outer"):
            async with open_pool(config, obey, name="inner") as inner:
                await inner.settle([Broken()])
                await trio.sleep_forever()
    ends = [(r.pool, r.kind) for r in kept.records if "pools" in r.name][2:]
    assert ends == [
        ("inner", "pool_stop"),
        ("inner", "pool_broken"),
        ("outer", "pool_stop"),
    ]


async def test_one_object_logs_pools_that_overlap_in_several_tasks(
    kept: Kept, autojump_clock: MockClock
) -> None:
    config = PoolConfig(size=1, crash_on=Broken, restart=ONCE, plugins=[PoolLog()])

    async def live(name: str, seconds: float, breaks: bool) -> None:
        with pytest.raises(PoolBroken) if breaks else trio.CancelScope():
            async with open_pool(config, obey, name=name) as pool:
                await trio.sleep(seconds)
                if breaks:
                    await pool.settle([Broken()])
                    await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(live, "a", 2.0, True)
        nursery.start_soon(live, "b", 1.0, False)
        nursery.start_soon(live, "c", 3.0, True)
    assert [record.pool for record in kept.named("pool_broken")] == ["a", "c"]
    assert sorted(record.pool for record in kept.named("pool_start")) == ["a", "b", "c"]
    assert config.plugins[0].hooks == ()


async def test_an_opening_that_fails_leaves_nothing_behind(kept: Kept) -> None:
    plugin = PoolLog()

    class Unwilling:
        async def __aenter__(self) -> None:
            raise Broken

        async def __aexit__(self, *_: object) -> None:
            raise AssertionError

    with pytest.raises(Broken):
        async with open_pool(1, obey, plugins=[plugin, Unwilling()]):
            raise AssertionError
    assert kept.kinds == []
    async with open_pool(1, obey, plugins=[plugin]):
        pass
    assert kept.kinds == ["worker_start", "pool_start", "worker_stop", "pool_stop"]


async def test_neither_inputs_nor_keys_are_logged_and_texts_of_errors_at_debug_only(
    kept: Kept,
) -> None:
    async def fail(_: str) -> None:
        raise ValueError("the text of the error")

    async def live() -> str:
        kept.records.clear()
        everything = dict.fromkeys(LEVELS, logging.ERROR) | {"job_queue": 40}
        plugins = [PoolLog(everything)]  # type: ignore[arg-type]
        async with open_pool(1, fail, plugins=plugins, unobserved="ignore") as pool:
            await (await pool.submit(SECRET, key=SECRET + " key", id=7)).wait()
        return ""

    with pytest.raises(ValueError, match="the text"):
        await live()
    told = kept.texts() + repr([vars(r) for r in kept.records if not r.exc_info])
    assert SECRET not in told
    assert "ValueError: the text of the error" in told
    logging.getLogger("trio_pool").setLevel(logging.INFO)
    with pytest.raises(ValueError, match="the text"):
        await live()
    assert kept.named("job_error")
    told = kept.texts() + repr([vars(r) for r in kept.records])
    assert SECRET not in told
    assert "the text of the error" not in told


@pytest.mark.parametrize(
    ("level", "brought"),
    [
        (logging.DEBUG, {kind for kind in LEVELS if kind != "pool_broken"}),
        (
            logging.INFO,
            {"pool_start", "pool_stop", "resize", "worker_crash", "worker_restart"},
        ),
        (logging.WARNING, {"pool_start", "worker_crash", "worker_restart"}),
        (logging.ERROR, {"pool_start"}),
    ],
)
async def test_only_the_hooks_of_enabled_levels_are_brought(
    kept: Kept, level: int, brought: set[str]
) -> None:
    logging.getLogger("trio_pool").setLevel(level)
    plugin = PoolLog()
    async with open_pool(1, obey, plugins=[plugin]) as pool:
        (hooks,) = plugin.hooks
        await pool.settle([1, ValueError()])
    found = {name.removeprefix("on_") for name in vars(hooks) if name.startswith("on_")}
    assert found | {"pool_start"} == brought
    assert all(record.levelno >= level for record in kept.records)


async def test_a_level_that_is_lowered_counts_for_pools_opened_from_then_on(
    kept: Kept,
) -> None:
    logger = logging.getLogger("trio_pool")
    logger.setLevel(logging.WARNING)
    async with open_pool(1, obey, plugins=[PoolLog()]) as pool:
        logger.setLevel(logging.DEBUG)
        await pool.settle([ValueError()])
        assert kept.named("job_error") == []
        async with open_pool(1, obey, plugins=[PoolLog()]) as another:
            await another.settle([ValueError()])
    assert len(kept.named("job_error")) == 1


async def test_levels_can_be_changed_by_kind(kept: Kept) -> None:
    levels: Any = {"job_complete": logging.INFO, "worker_start": None}
    async with open_pool(1, obey, plugins=[PoolLog(levels)]) as pool:
        assert await pool.process(1) == 1
    assert kept.kinds == ["pool_start", "job_complete", "worker_stop", "pool_stop"]
    assert kept.named("job_complete")[0].levelno == logging.INFO
    assert kept.named("job_complete")[0].worker == 0
    kept.records.clear()
    silent = PoolLog(dict.fromkeys(LEVELS))
    with pytest.raises(PoolBroken):
        async with open_pool(
            1, obey, plugins=[silent], crash_on=Broken, restart=ONCE
        ) as pool:
            await pool.settle([Broken()])
            await trio.sleep_forever()
    assert kept.kinds == []


async def test_every_kind_has_a_text_that_can_be_formatted(
    kept: Kept, autojump_clock: MockClock
) -> None:
    every: Any = dict.fromkeys(LEVELS, 10)
    every |= {"job_queue": 10, "job_start": 10, "job_complete": 10}
    with pytest.raises(PoolBroken):
        async with open_pool(
            1, obey, plugins=[PoolLog(every)], restart=Restart(1), crash_on=Broken
        ) as pool:
            await pool.settle([1, ValueError()], retry=Retry(2))
            await pool.resize(2)
            await pool.resize(1)
            with trio.move_on_after(1):
                await pool.process(5.0)
            await pool.settle([Broken(), Broken(), Broken()])
            await trio.sleep_forever()
    assert {*every} - {*kept.kinds} == {"job_drop"}
    assert "None" not in "".join(record.getMessage() for record in kept.records)
    assert "%(" not in kept.texts()


@pytest.mark.parametrize(
    ("levels", "error", "text"),
    [
        ({"job_fail": 10}, ValueError, r"levels must be .*job_error.* got 'job_fail'"),
        ({"job_error": "DEBUG"}, TypeError, r"levels\['job_error'\] .* got 'DEBUG'"),
        ({"job_error": True}, TypeError, "got True"),
        (logging.DEBUG, TypeError, "levels must be a mapping .* got 10"),
        ({"job_error": 10.0}, TypeError, "got 10.0"),
    ],
)
def test_bad_levels_are_refused_by_name(
    levels: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        PoolLog(levels)


async def test_a_filter_that_raises_harms_no_job(kept: Kept) -> None:
    def refuse(_: logging.LogRecord) -> bool:
        raise Broken

    logger = logging.getLogger("trio_pool.jobs")
    logger.addFilter(refuse)
    try:
        async with open_pool(1, obey, plugins=[PoolLog()]) as pool:
            outcomes = [s.outcome for s in await pool.settle([ValueError(), 1])]
            assert outcomes[1].unwrap() == 1
    finally:
        logger.removeFilter(refuse)
    assert [r.name for r in kept.records if r.levelname == "ERROR"] == ["trio_pool"]


async def test_structlog_renders_the_facts(kept: Kept) -> None:
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ],
    )
    async with open_pool(1, obey, name="press", plugins=[PoolLog()]) as pool:
        await pool.settle([ValueError()])
    record = kept.named("job_error")[0]
    record.exc_info = None
    # What another formatter put there.
    vars(record).pop("message", None)
    assert json.loads(formatter.format(record)) == {
        "event": "job 1 of pool 'press' ended as failed: ValueError",
        "level": "debug",
        "logger": "trio_pool.jobs",
        "kind": "job_error",
        "pool": "press",
        "job_id": 1,
        "state": "failed",
        "attempts": 1,
        "worker": 0,
        "error_type": "ValueError",
    }


async def test_every_fact_can_be_written_as_json_and_put_into_a_queue(
    kept: Kept,
) -> None:
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(waiting)
    logging.getLogger("trio_pool").addHandler(handler)
    try:
        async with open_pool(1, obey, plugins=[PoolLog()]) as pool:
            await pool.settle([ValueError(), Broken()])
    finally:
        logging.getLogger("trio_pool").removeHandler(handler)
    # What formatters of others put there is not of ours.
    plain = {*vars(logging.makeLogRecord({})), "message", "asctime"}
    for record in kept.records:
        facts = {key: fact for key, fact in vars(record).items() if key not in plain}
        assert json.loads(json.dumps(facts)) == facts
    assert waiting.qsize() == len(kept.records)


def test_importing_logs_nothing_and_installs_no_handler() -> None:
    program = (
        "import logging, trio_pool\n"
        "assert 'trio_pool.logs' not in __import__('sys').modules\n"
        "import trio_pool.logs\n"
        "names = '', 'trio_pool', 'trio_pool.jobs'\n"
        "loggers = [logging.getLogger(name) for name in names]\n"
        "assert not any(logger.handlers for logger in loggers)\n"
        "assert all(logger.level in (0, 30) for logger in loggers)\n"
    )
    run = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(run, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
