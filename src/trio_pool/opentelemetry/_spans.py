"""A span for each attempt of a job, as a middleware."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias

import trio
from opentelemetry import context, trace
from opentelemetry.trace import Span, Status, StatusCode, TracerProvider

from .._current import CurrentJob
from .._errors import type_name

_CallNext: TypeAlias = Callable[[CurrentJob], Awaitable[Any]]
_OUTCOME = "trio_pool.job.outcome"


def trace_jobs(
    tracer_provider: TracerProvider | None = None,
) -> Callable[[CurrentJob, _CallNext], Awaitable[Any]]:
    """Make a middleware that gives each attempt of a job a span.

    The span is a child of the one in which the job was given in, however that
    was done and however long it waited; those that the handler makes are its
    children. It is called ``process`` and the pool's name. Its attributes are
    ``trio_pool.name``, ``trio_pool.job.id``, ``trio_pool.job.attempt``,
    ``trio_pool.job.waited`` (seconds), ``trio_pool.worker.id``, and
    ``trio_pool.job.outcome``: done, failed, timed_out or cancelled. Inputs and
    keys are not told. An error is recorded, with its text; it and a timeout set
    the status and ``error.type``. A cancellation is no error.

    Its kind is internal: consumer is, by the semantic conventions, for work from
    a producer that does not wait, mostly another process. Here the parent is in
    this one, and may well wait.

    Give it as the first middleware: ``open_pool(8, fetch, middleware=[trace_jobs()])``.
    ``tracer_provider`` is that of the program if none is given.
    """
    tracer = trace.get_tracer("trio_pool", tracer_provider=tracer_provider)

    async def trace_job(job: CurrentJob, call_next: _CallNext) -> Any:
        # A worker runs in the context of whoever gave the job in.
        span = tracer.start_span(f"process {job.pool}", attributes=_facts_of(job))
        token = context.attach(trace.set_span_in_context(span))
        try:
            result = await call_next(job)
        except BaseException as error:
            _tell_error(span, job, error)
            raise
        else:
            span.set_attribute(_OUTCOME, "done")
            return result
        finally:
            context.detach(token)
            span.end()

    return trace_job


def _facts_of(job: CurrentJob) -> dict[str, str | int | float]:
    return {
        "trio_pool.name": job.pool,
        # Some ids are numbers; an attribute has one type everywhere.
        "trio_pool.job.id": str(job.id),
        "trio_pool.job.attempt": job.attempt,
        "trio_pool.job.waited": job.waited,
        "trio_pool.worker.id": job.worker,
    }


def _tell_error(span: Span, job: CurrentJob, error: BaseException) -> None:
    """Say on a span how its attempt ended, if not by a result."""
    if not span.is_recording():
        return
    if _is_cancellation(error):
        late = _is_late(error)
        span.set_attribute(_OUTCOME, "timed_out" if late else "cancelled")
        if late:
            span.set_attribute("error.type", "timeout")
            text = f"ran longer than its timeout of {job.timeout} s"
            span.set_status(Status(StatusCode.ERROR, text))
        return
    name = type_name(error)
    span.set_attribute(_OUTCOME, "failed")
    span.set_attribute("error.type", name)
    span.set_status(Status(StatusCode.ERROR, name))
    # The job's caller is owed this error, and not one of its own ``__str__``.
    with suppress(Exception):
        span.record_exception(error)


def _is_cancellation(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)


def _is_late(error: BaseException) -> bool:
    """Say whether it was the pool that cancelled, because of the timeout."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    reason = getattr(error, "reason", None) or ""
    return reason.startswith("trio_pool: ") and reason.endswith(" ran out of time")
