"""Records that are filled first and frozen then."""

from __future__ import annotations

import pickle
from typing import Any

import attrs
import pytest

from trio_pool import CurrentJob, JobChanged, JobState
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


@pytest.mark.parametrize("frozen", [JobChanged, CurrentJob])
def test_a_draft_has_all_fields_of_its_record(frozen: Any) -> None:
    names = [field.name for field in attrs.fields(frozen)]
    assert [field.name for field in attrs.fields(draft_of(frozen))] == names
