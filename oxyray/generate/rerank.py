"""Second opinions on what was generated. Beams that hold the right item often have it too far down: an item's log-probability plus what
the opinions add decides its place; which items there are, the beams alone have decided.

Here is what other users took after the same items (`oxyray.data.covisits`); what the unified ranker thinks is in `oxyray.reward.opinion`.

Legend: Q requests, R places of their lists, I items of the log, A latest events, K followers of an item, T = A K, N items of a list.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from oxyray.data.batch import Batch
from oxyray.data.covisits import CoVisits

Array = np.ndarray

LATEST = 20  # events of a history that are asked for followers
DECAY = 0.7  # of an event's weight with each newer one
FLOOR = 1e-3  # of an item that nobody took after these: there is no certainty that nobody will


class Opinion(Protocol):
    def __call__(self, batch: Batch, item_QR: Array) -> Array:
        """What is added to the log-probabilities of these items of requests, one query a segment: (Q, R), of no meaning at -1 (no item)."""


class Followers:
    """`weight` times the logarithm of how strongly an item follows the request's latest ones. Items that the log does not know have no
    followers."""

    def __init__(self, visits: CoVisits, weight: float) -> None:
        self.weight, rows = weight, visits.similar_II
        kept_I = np.diff(rows.indptr)
        row_N = np.repeat(np.arange(len(kept_I)), kept_I)
        place_N = np.arange(len(row_N)) - rows.indptr[row_N]
        self.near_IK = np.zeros((len(kept_I), max(int(kept_I.max(initial=0)), 1)), dtype=np.int32)
        self.similar_IK = np.zeros(self.near_IK.shape, dtype=np.float32)
        self.near_IK[row_N, place_N], self.similar_IK[row_N, place_N] = rows.indices, rows.data

    def __call__(self, batch: Batch, item_QR: Array) -> Array:
        item_N = batch.items.ids_U[batch.item_N].cpu().numpy()
        place_QA = batch.visible_Q.cpu().numpy()[:, None] - 1 - np.arange(LATEST)
        event_QA = batch.history_offset.cpu().numpy()[:-1, None] + place_QA
        item_QA = np.append(item_N, len(self.near_IK))[np.where(place_QA >= 0, event_QA, -1)]
        weight_QA = DECAY ** np.arange(LATEST) * (item_QA < len(self.near_IK))
        item_QA = np.minimum(item_QA, len(self.near_IK) - 1)
        strength_QAK = self.similar_IK[item_QA] * weight_QA[..., None]
        near_QT, strength_QT = self.near_IK[item_QA].reshape(len(item_QA), -1), strength_QAK.reshape(len(item_QA), -1)
        strong_QR = np.stack([_strength(*row) for row in zip(item_QR, near_QT, strength_QT, strict=True)])
        bonus_QR: Array = self.weight * np.log(strong_QR + FLOOR)
        return bonus_QR


def _strength(item_N: Array, near_T: Array, strength_T: Array) -> Array:
    """How strongly each item of one list follows; followers come with repetitions."""
    asked_N, place_N = np.unique(item_N, return_inverse=True)
    at_T = np.searchsorted(asked_N, near_T).clip(max=max(len(asked_N) - 1, 0))
    here_T = asked_N[at_T] == near_T if len(asked_N) else np.zeros(len(at_T), dtype=bool)
    strong_N: Array = np.bincount(at_T[here_T], weights=strength_T[here_T], minlength=len(asked_N))[place_N.reshape(-1)]
    return strong_N
