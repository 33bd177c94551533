"""A run that was killed and goes back to its checkpoint chooses the weights that it would have chosen, and ends when it would have."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oxyray.errors import TrainingError
from oxyray.train.course import Course
from oxyray.train.session import Session
from oxyray.train.sparse import check_spread

PATIENCE, CHOSEN = 2, "valid_hit"


def go(course: Course, found: list[float], first: int, last: int, exported: dict[str, Any]) -> None:
    """Validations after steps `first` to `last`, by the session's own rule, until patience is out."""
    for step in range(first, last):
        if course.without_gain >= PATIENCE:
            course.ended = "no gain"
            return
        session = SimpleNamespace(
            course=course,
            engine=SimpleNamespace(step_count=step + 1),
            validation=SimpleNamespace(requests=1, measure=lambda engine, whole, step=step: {CHOSEN: found[step]}),
            task=SimpleNamespace(chosen_by=CHOSEN),
            _whole=lambda: None,
            _log=lambda told: None,
            _export=lambda told, step=step: exported.update({CHOSEN: found[step], "step": step + 1}),
        )
        Session._validate(session)  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(found=st.lists(st.integers(0, 6).map(float), min_size=2, max_size=9), saved=st.integers(0, 8), killed=st.integers(0, 8))
def test_a_killed_run_ends_as_it_would_have(found: list[float], saved: int, killed: int) -> None:
    saved, killed = sorted((min(saved, len(found)), min(killed, len(found))))
    whole, best = Course(), dict[str, Any]()
    go(whole, found, 0, len(found), best)
    course, left = Course(), dict[str, Any]()
    go(course, found, 0, saved, left)
    checkpoint = asdict(course)
    go(course, found, saved, killed, left)
    again = Course(**checkpoint)
    if left:
        again.adopt(left, CHOSEN)
    go(again, found, saved, len(found), left)
    assert (again.best, again.best_step) == (whole.best, whole.best_step)
    assert left == best


def test_workers_must_be_spread_evenly() -> None:
    check_spread([(2, 0), (2, 1), (2, 0), (2, 1)])
    check_spread([(1, 0), (1, 0)])
    for places in ([(1, 0), (2, 0), (2, 1)], [(2, 0), (2, 1), (1, 0)]):
        with pytest.raises(TrainingError, match="workers: sharded tables need as many on each"):
            check_spread(places)
