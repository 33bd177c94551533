"""A second opinion on what was generated: what other users took after the same items (`oxyray.model.followers`).

Beams that hold the right item often have it too far down. An item's log-probability plus `weight` times the logarithm of how strongly it
follows the request's latest items decides its place; which items there are, the beams alone have decided.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oxyray.data.batch import Batch
from oxyray.model.followers import Followers

Array = np.ndarray

_FLOOR = 1e-3  # of an item that nobody took after these: there is no certainty that nobody will


@dataclass(frozen=True)
class Rerank:
    """`weight` 0 would change nothing."""

    followers: Followers
    weight: float

    def of(self, batch: Batch) -> Opinion:
        """For requests: one query a segment."""
        near_QT, weight_QT = self.followers.of(batch)
        return Opinion(near_QT.cpu().numpy(), weight_QT.cpu().numpy(), self.weight)


@dataclass(frozen=True)
class Opinion:
    near_QT: Array
    strength_QT: Array
    weight: float

    def bonus(self, request: int, item_N: Array) -> Array:
        """What is added to the log-probabilities of these items of a request: (N,)."""
        known_T, place_T = np.unique(self.near_QT[request], return_inverse=True)
        strength_T = np.bincount(place_T.reshape(-1), weights=self.strength_QT[request], minlength=len(known_T))
        at_N = np.searchsorted(known_T, item_N).clip(max=len(known_T) - 1)
        found_N: Array = np.where(known_T[at_N] == item_N, strength_T[at_N], 0.0)
        return self.weight * np.log(found_N + _FLOOR)
