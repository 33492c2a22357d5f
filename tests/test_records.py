"""Records that are filled first and frozen then."""

from __future__ import annotations

import pickle
from typing import Any

import attrs
import outcome
import pytest

from trio_pool import JobChanged, JobState
from trio_pool._job import new_value
from trio_pool._records import draft_of


def filled(frozen: Any, values: dict[str, Any]) -> Any:
    draft = draft_of(frozen)()
    for name, value in values.items():
        setattr(draft, name, value)
    draft.__class__ = frozen
    return draft


FIELDS = {
    "kind": "job_start",
    "pool": "press",
    "time": 1.5,
    "job_id": 7,
    "state": JobState.RUNNING,
    "worker": 0,
    "attempts": 1,
    "error": None,
    "key": "a",
    "delay": None,
}


def test_a_filled_draft_is_a_record_like_any_other() -> None:
    record = filled(JobChanged, FIELDS)
    assert type(record) is JobChanged
    assert record == JobChanged(**FIELDS)
    assert hash(record) == hash(JobChanged(**FIELDS))
    assert repr(record) == repr(JobChanged(**FIELDS))
    assert pickle.loads(pickle.dumps(record)) == record
    assert attrs.evolve(record, time=2.5).time == 2.5


@pytest.mark.parametrize("name", FIELDS)
def test_a_filled_draft_is_frozen(name: str) -> None:
    record = filled(JobChanged, FIELDS)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(record, name, None)


def test_the_record_of_a_draft_is_not_known_as_one() -> None:
    draft = draft_of(JobChanged)
    record = filled(JobChanged, FIELDS)
    assert not isinstance(record, draft)
    assert type(record).__mro__ == JobChanged.__mro__


def test_the_outcome_of_a_value_is_unwrapped_once() -> None:
    made = new_value("result")
    assert made == outcome.Value("result")
    assert type(made) is outcome.Value
    assert made.unwrap() == "result"
    with pytest.raises(outcome.AlreadyUsedError):
        made.unwrap()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        made.value = "other"  # type: ignore[misc]
