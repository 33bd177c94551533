"""A second opinion on what was generated: what other users took after the same items (`oxyray.data.covisits`).

Beams that hold the right item often have it too far down. An item's log-probability plus `weight` times the logarithm of how strongly it
follows the request's latest items decides its place; which items there are, the beams alone have decided.

Legend: Q requests, I items of the log, A latest events, K followers of an item, T = A K, N items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oxyray.data.batch import Batch
from oxyray.data.covisits import CoVisits

Array = np.ndarray

LATEST = 20  # events of a history that are asked for followers
DECAY = 0.7  # of an event's weight with each newer one
FLOOR = 1e-3  # of an item that nobody took after these: there is no certainty that nobody will


class Rerank:
    """`weight` 0 would change nothing."""

    def __init__(self, visits: CoVisits, weight: float) -> None:
        self.weight, rows = weight, visits.similar_II
        kept_I = np.diff(rows.indptr)
        row_N = np.repeat(np.arange(len(kept_I)), kept_I)
        place_N = np.arange(len(row_N)) - rows.indptr[row_N]
        self.near_IK = np.zeros((len(kept_I), max(int(kept_I.max(initial=0)), 1)), dtype=np.int32)
        self.similar_IK = np.zeros(self.near_IK.shape, dtype=np.float32)
        self.near_IK[row_N, place_N], self.similar_IK[row_N, place_N] = rows.indices, rows.data

    def of(self, batch: Batch) -> Opinion:
        """For requests: one query a segment. Items that the log does not know have no followers."""
        item_N = batch.items.ids_U[batch.item_N].cpu().numpy()
        place_QA = batch.visible_Q.cpu().numpy()[:, None] - 1 - np.arange(LATEST)
        event_QA = batch.history_offset.cpu().numpy()[:-1, None] + place_QA
        item_QA = np.append(item_N, len(self.near_IK))[np.where(place_QA >= 0, event_QA, -1)]
        weight_QA = DECAY ** np.arange(LATEST) * (item_QA < len(self.near_IK))
        item_QA = np.minimum(item_QA, len(self.near_IK) - 1)
        strength_QAK = self.similar_IK[item_QA] * weight_QA[..., None]
        return Opinion(self.near_IK[item_QA].reshape(len(item_QA), -1), strength_QAK.reshape(len(item_QA), -1), self.weight)


@dataclass(frozen=True)
class Opinion:
    """Followers of each request's latest items, with repetitions, and how strongly each follows."""

    near_QT: Array
    strength_QT: Array
    weight: float

    def bonus(self, request: int, item_N: Array) -> Array:
        """What is added to the log-probabilities of these items of a request: (N,)."""
        asked_N, place_N = np.unique(item_N, return_inverse=True)
        at_T = np.searchsorted(asked_N, self.near_QT[request]).clip(max=max(len(asked_N) - 1, 0))
        here_T = asked_N[at_T] == self.near_QT[request] if len(asked_N) else np.zeros(len(at_T), dtype=bool)
        strength_N = np.bincount(at_T[here_T], weights=self.strength_QT[request][here_T], minlength=len(asked_N))
        bonus_N: Array = self.weight * np.log(strength_N[place_N.reshape(-1)] + FLOOR)
        return bonus_N
