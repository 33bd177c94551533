"""The newest training events, which pre-training can leave to alignment (paper 2.4: post-training learns from what came in since).

A policy that has learned a request by heart has nothing to gain from rewards for it: what the user took is at the top already. So
pre-training stops at a moment, and alignment asks from there on. Split by time, the moment is the same for all users; with leave-one-out,
where times of users cannot be compared, it is each user's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from oxyray.data import order
from oxyray.data.prepared import Prepared

Array = np.ndarray


class HeldBack:
    """The newest `share` of the training events: by time, or of each user (there rounded up, but never the user's first)."""

    def __init__(self, prepared: Prepared, share: float) -> None:
        self.prepared, self.share = prepared, share
        self._from = self._moment() if share and prepared.meta.valid_start is not None else None

    def among(self, events: dict[str, Array]) -> Array:
        """Which of a part's events (`Prepared.events(part)`: sorted by user and time) are held back: bool_N."""
        train_N = events["split"] == order.TRAIN
        if not self.share:
            return np.zeros(len(train_N), dtype=bool)
        if self._from is not None:
            return train_N & (events["time"] >= self._from)
        first = np.flatnonzero(order.run_starts(events["user"]))
        owner_N = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(train_N))))
        count_U = np.bincount(owner_N[train_N], minlength=len(first))
        held_U = np.minimum(np.ceil(count_U * self.share - 1e-9), np.maximum(count_U - 1, 0))
        nth_N = np.cumsum(train_N) - (np.cumsum(train_N) - train_N)[first][owner_N]  # of the user's training events, from 1
        return train_N & (nth_N > (count_U - held_U)[owner_N])

    def _moment(self) -> int:
        """The time of the first event that is held back. Reads every part's times a few times; holds one part's."""

        def times() -> Iterator[Array]:
            for part in range(self.prepared.parts):
                events = self.prepared.events(part, ["time", "split"])
                yield events["time"][events["split"] == order.TRAIN]

        meta = self.prepared.meta
        rank = min(math.floor(meta.splits["train"] * (1 - self.share)), meta.splits["train"] - 1)
        return order.nth_time(times, rank, meta.time_range[0], meta.time_range[1])
