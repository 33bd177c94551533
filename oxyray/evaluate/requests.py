"""Test requests: which events are asked about, and what each may see.

Every event of the asked split is one row: its request's context, the user's history that `oxyray.data.requests.timeline` lets the
request see, and the event's item as the target. All recommenders, the policy and the baselines alike, are asked through `Requests`,
so they see the same.

Legend: R rows (requests with one target each), E events of a part's timeline, N history events of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from oxyray.data.requests import Timeline, timeline

Array = np.ndarray

TRAIN, VALID, TEST = 0, 1, 2


class Parts(Protocol):
    """What is needed of `oxyray.data.prepared.Prepared`: parts of whole users, each fitting in memory."""

    @property
    def parts(self) -> int: ...

    def events(self, part: int) -> dict[str, Array]: ...


@dataclass(frozen=True)
class Requests:
    """Rows `row_R` of one part's timeline; row r may see its user's rows `start_R[r] : stop_R[r]`."""

    part: int
    time: Timeline
    row_R: Array

    def __len__(self) -> int:
        return len(self.row_R)

    @property
    def start_R(self) -> Array:
        return self.time.user_start_E[self.row_R]

    @property
    def stop_R(self) -> Array:
        return self.start_R + self.time.visible_E[self.row_R]

    @property
    def user_R(self) -> Array:
        return self.time.user_E[self.row_R]

    @property
    def scenario_R(self) -> Array:
        return self.time.scenario_E[self.row_R]

    @property
    def target_R(self) -> Array:
        return self.time.item_E[self.row_R]

    @property
    def request_R(self) -> Array:
        return self.time.request_E[self.row_R]

    def take(self, rows: slice | Array) -> Requests:
        return Requests(self.part, self.time, self.row_R[rows])

    def batches(self, size: int) -> Iterator[Requests]:
        for first in range(0, len(self), size):
            yield self.take(slice(first, first + size))

    def history(self, last: int | None = None) -> tuple[Array, Array]:
        """History items in time order, at most the `last` newest of each row: (row_N, item_N), where row_N says whose they are."""
        start_R = self.start_R if last is None else np.maximum(self.start_R, self.stop_R - last)
        row_N, event_N = ranges(start_R, self.stop_R)
        return row_N, self.time.item_E[event_N]


def ranges(start_R: Array, stop_R: Array) -> tuple[Array, Array]:
    """All integers of many ranges: (row_N, value_N), value_N running over start_R[row] .. stop_R[row] - 1."""
    length_R = np.maximum(stop_R - start_R, 0)
    row_N = np.repeat(np.arange(len(length_R)), length_R)
    before_R = np.cumsum(length_R) - length_R
    return row_N, np.arange(len(row_N)) - before_R[row_N] + np.asarray(start_R, dtype=np.int64)[row_N]


def asked(data: Parts, split: int, limit: int | None = None, seed: int = 0) -> Iterator[Requests]:
    """The rows of `split`, part by part. Where there are more than `limit`, a seeded uniform sample of that many: the same for the
    same data. Only events of users who are asked are kept."""
    times = [timeline(data.events(0))] if data.parts == 1 else []
    counts = [int((data.events(part)["split"] == split).sum()) for part in range(data.parts)]
    total = sum(counts)
    keep = np.ones(total, dtype=bool)
    if limit is not None and total > limit:
        keep = np.zeros(total, dtype=bool)
        keep[np.random.default_rng(seed).choice(total, size=limit, replace=False)] = True
    first = 0
    for part, count in enumerate(counts):
        chosen = keep[first : first + count]
        first += count
        if chosen.any():
            time = times[0] if times else timeline(data.events(part))
            yield Requests(part, *time.of_rows(np.flatnonzero(time.split_E == split)[chosen]))
