"""Renders the rows of the page's tables: workers, slow jobs, failures, marks."""

from collections.abc import Iterable, Sequence

from . import _figures as figures
from ._charts import sign
from ._html import Html, element, join
from ._picture import Failure, FailureCount, Mark, PoolPicture, RestartCause, WorkerRow

ROWS = 100
"""How many workers are shown at most."""

WORKERS = (
    "Worker",
    "State",
    "Job",
    "Running for",
    "Doing",
    "Jobs",
    "Restarts",
    "Died of",
)
SLOWEST = ("Running for", "Against p95", "Job", "Worker", "Doing")
FAILURES = ("Type", "Jobs", "Last")
ERRORS = ("Time", "Type", "Raised in", "Message", "Job", "Worker", "Attempts")
CRASHES = ("Time", "Worker", "Type", "Raised in", "Message")
MARKS = ("Time", "Kind", "What")

RIGHT = frozenset({"Running for", "Against p95", "Jobs", "Restarts", "Attempts"})
"""Columns of figures."""

ASIDE = frozenset({"Restarts", "Attempts", "Last", "Against p95"})
"""Columns that a narrow page leaves out."""

WORDS = frozenset({"Raised in", "Message", "Doing", "What"})
"""Columns whose text is broken into lines."""


def class_of(column: str) -> str | None:
    """Return the class of a column's cells."""
    right = "right" if column in RIGHT else ""
    aside = "aside" if column in ASIDE else ""
    words = "words" if column in WORDS else ""
    return " ".join(filter(None, (right, aside, words))) or None


def _row(columns: Sequence[str], *cells: object, class_: str | None = None) -> Html:
    first, *others = (
        figures.NONE if cell is None or cell == "" else cell for cell in cells
    )
    return element(
        "tr",
        element("th", first, scope="row", class_=class_of(columns[0])),
        *(
            element("td", cell, class_=class_of(column))
            for column, cell in zip(columns[1:], others, strict=True)
        ),
        class_=class_,
    )


def _rows(columns: Sequence[str], rows: Iterable[Html], empty: str) -> Html:
    body = join(*rows)
    if body:
        return body
    cell = element("td", empty, colspan=len(columns), class_="none")
    return element("tr", cell)


def _time(time: float) -> Html:
    return element("time", figures.clock(time), datetime=figures.stamp(time))


def _code(value: str | None) -> object:
    return element("code", value) if value else None


def _urgency(worker: WorkerRow) -> tuple[bool, float, int]:
    """Order workers: those in trouble, the oldest jobs, those that do the most."""
    settled = worker.state in ("busy", "idle")
    return settled, -1.0 if worker.age is None else worker.age, worker.jobs


def choose_workers(workers: Sequence[WorkerRow]) -> list[WorkerRow]:
    """Choose whom to show: all in the order of ids, or the `ROWS` that matter.

    Those that are neither busy nor idle come first.
    """
    if len(workers) <= ROWS:
        return sorted(workers, key=lambda worker: (_urgency(worker)[0], worker.id))

    def rank(worker: WorkerRow) -> tuple[bool, float, int, int]:
        settled, age, jobs = _urgency(worker)
        return settled, -age, -jobs, worker.id

    return sorted(workers, key=rank)[:ROWS]


def worker_rows(pool: PoolPicture) -> Html:
    """Render a row for each worker that is shown."""
    rows = (
        _row(
            WORKERS,
            worker.id,
            element("span", worker.state, class_=f"chip {worker.state}"),
            worker.job,
            None if worker.age is None else figures.seconds(worker.age),
            worker.doing,
            figures.count(worker.jobs),
            figures.count(worker.restarts),
            _code(worker.last_error),
            class_=None if worker.state in ("busy", "idle") else "trouble",
        )
        for worker in choose_workers(pool.workers)
    )
    return _rows(WORKERS, rows, "No worker is there.")


def worker_summary(workers: Sequence[WorkerRow]) -> str:
    """Say how many workers are in each state, and how many are not shown."""
    states: dict[str, int] = {}
    for worker in workers:
        states[worker.state] = states.get(worker.state, 0) + 1
    told = ", ".join(f"{figures.count(n)} {state}" for state, n in states.items())
    hidden = len(workers) - ROWS
    if hidden > 0:
        told += (
            f". The {ROWS} in trouble or with the oldest jobs are shown, "
            f"{figures.count(hidden)} are not"
        )
    return told


def slowest_rows(pool: PoolPicture) -> Html:
    """Render a row for each of the jobs that run the longest."""
    usual = pool.run.p95 if pool.run.count else 0.0

    def against(age: float | None) -> str | None:
        # A job younger than what is usual says nothing.
        if age is None or not usual or age < usual:
            return None
        return (
            f"{figures.count(age / usual)}\u00d7"
            if age >= 10 * usual
            else (f"{age / usual:.1f}\u00d7")
        )

    rows = (
        _row(
            SLOWEST,
            figures.seconds(worker.age),
            against(worker.age),
            worker.job,
            worker.id,
            worker.doing,
        )
        for worker in pool.slowest
    )
    return _rows(SLOWEST, rows, "No job is running.")


def failure_rows(failures: Iterable[FailureCount], lost: int = 0) -> Html:
    """Render a row for each type of error; say how many events were lost."""
    rows = (
        _row(
            FAILURES,
            _code(failure.type),
            figures.count(failure.count),
            _time(failure.last),
        )
        for failure in failures
    )
    if not lost:
        return _rows(FAILURES, rows, "No job has failed.")
    told = f"{figures.plural(lost, 'event')} lost: failures may be missing here."
    cell = element("td", told, colspan=len(FAILURES), class_="none")
    return join(*rows, element("tr", cell))


def error_rows(errors: Iterable[Failure]) -> Html:
    """Render a row for each of the last errors."""
    rows = (
        _row(
            ERRORS,
            _time(error.time),
            _code(error.type),
            _code(error.place),
            error.text,
            error.job,
            error.worker,
            error.attempts,
        )
        for error in errors
    )
    return _rows(ERRORS, rows, "No job has failed.")


def crash_rows(crashes: Iterable[RestartCause]) -> Html:
    """Render a row for each of the last crashes of workers."""
    rows = (
        _row(
            CRASHES,
            _time(crash.time),
            crash.worker,
            _code(crash.type),
            _code(crash.place),
            crash.text,
        )
        for crash in crashes
    )
    return _rows(CRASHES, rows, "No worker has crashed.")


_KINDS = {"mark": "set by the program", "state": "state of the pool"}


def mark_rows(marks: Iterable[Mark]) -> Html:
    """Render a row for each moment that is marked in the charts."""
    rows = (
        _row(
            MARKS,
            _time(mark.time),
            join(
                element(
                    "svg",
                    sign(mark.kind),
                    class_=f"mark on-{mark.kind}",
                    viewBox="-8 -7 16 16",
                    width=14,
                    height=14,
                    aria_hidden="true",
                ),
                _KINDS.get(mark.kind, mark.kind),
            ),
            mark.text,
        )
        for mark in marks
    )
    return _rows(MARKS, rows, "Nothing in the last 15 minutes.")
