"""HR@K, Recall@K and NDCG@K of ranked lists, and how sure the numbers are. Arrays in, arrays out; nothing of models, files or Ray.

Each row is one request with one target, and every figure is a mean over rows (paper 4.1, with what it leaves open chosen here):

- HR@K: the target is among the first K of the list.
- NDCG@K: 1 / log2(1 + place of the target) where it is among the first K, else 0 (one relevant item, so the ideal is 1).
- Recall@K: of the positives of the row's user on the row's day, the share found among the first K. With one positive a day
  (leave-one-out) it equals HR@K.

The same functions serve item level (lists of item indices) and SID level (lists of SID numbers): only the identity that is compared
changes.

Rows of one user are not independent, so intervals resample whole users, and a comparison is paired: both models' rows of the same requests.

Legend: R rows, K places of a list, P positives of all rows, M metrics, U users, B bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

KINDS = ("HR", "Recall", "NDCG")


def names(ks: Sequence[int]) -> list[str]:
    """The metrics' names in the order of `row_metrics`' columns."""
    return [f"{kind}@{k}" for kind in KINDS for k in ks]


def places(list_RK: Array, target_R: Array) -> Array:
    """0-based place of each row's target in its list, K where it is absent. Entries below 0 of a list are empty places."""
    hit_RK = (list_RK == target_R[:, None]) & (list_RK >= 0)
    if not list_RK.shape[1]:  # all lists are empty
        return np.zeros(len(list_RK), dtype=np.int64)
    return np.where(hit_RK.any(axis=1), hit_RK.argmax(axis=1), list_RK.shape[1])


def found_share(list_RK: Array, positive_row_P: Array, positive_P: Array, k: int) -> Array:
    """Share of each row's distinct positives that are among the first k of its list: (R,), 0 for a row without positives.

    `positive_P` belongs to row `positive_row_P`; the pairs must be distinct. A list must not repeat an entry.
    """
    span = 1 + max(int(list_RK.max(initial=0)), int(positive_P.max(initial=0)))
    top_RK = list_RK[:, :k].astype(np.int64)
    key_RK = np.where(top_RK >= 0, np.arange(len(list_RK))[:, None] * span + top_RK, -1)
    found_R = np.isin(key_RK, positive_row_P * span + positive_P).sum(axis=1)
    return found_R / np.maximum(np.bincount(positive_row_P, minlength=len(list_RK)), 1)


def row_metrics(list_RK: Array, target_R: Array, positive_row_P: Array, positive_P: Array, ks: Sequence[int]) -> Array:
    """All metrics of each row: float64 (R, M), columns as `names(ks)`."""
    place_R = places(list_RK, target_R)
    within = [(place_R < min(k, list_RK.shape[1])).astype(np.float64) for k in ks]  # an absent target's place is the list's length
    shares = [found_share(list_RK, positive_row_P, positive_P, k) for k in ks]
    gain_R = 1.0 / np.log2(place_R + 2.0)
    return np.stack([*within, *shares, *(hit_R * gain_R for hit_R in within)], axis=1)


@dataclass(frozen=True)
class Resampled:
    """Users drawn with replacement, the same draw for every model and metric: weight_BU counts how often user u is in resample b."""

    user_R: Array
    weight_BU: Array

    @classmethod
    def draw(cls, user_R: Array, resamples: int, seed: int) -> Resampled:
        """`user_R` may be any integers; they are numbered here."""
        user_R = np.unique(user_R, return_inverse=True)[1]
        users = int(user_R.max(initial=-1)) + 1
        rng = np.random.default_rng(seed)
        draws = [np.bincount(rng.integers(users, size=users), minlength=users) for _ in range(resamples if users else 0)]
        return cls(user_R, np.array(draws, dtype=np.float32).reshape(len(draws), users))

    def interval(self, value_RM: Array, level: float = 0.95) -> Array:
        """Percentile interval of the mean of each column: (M, 2), NaN without resamples."""
        if not len(self.weight_BU):
            return np.full((value_RM.shape[1], 2), np.nan)
        total_BM = self.weight_BU @ self._by_user(value_RM)
        count_B1 = self.weight_BU @ np.bincount(self.user_R)[:, None]
        return np.quantile(total_BM / count_B1, [(1 - level) / 2, (1 + level) / 2], axis=0).T

    def p_value(self, difference_RM: Array) -> Array:
        """Two-sided p of "the mean difference is zero" by a z-test on users' sums (clusters): (M,). 1 where all differences are zero."""
        rows, users = len(difference_RM), self.weight_BU.shape[1]
        if users < 2:
            return np.ones(difference_RM.shape[1])
        mean_M = difference_RM.mean(axis=0)
        spread_UM = self._by_user(difference_RM) - np.bincount(self.user_R)[:, None] * mean_M
        error_M = np.sqrt((spread_UM**2).sum(axis=0) * users / (users - 1)) / rows
        return np.array(
            [1.0 if m == 0 else math.erfc(abs(m) / max(e, 1e-300) / math.sqrt(2)) for m, e in zip(mean_M, error_M, strict=True)]
        )

    def _by_user(self, value_RM: Array) -> Array:
        total_UM = np.zeros((self.weight_BU.shape[1], value_RM.shape[1]))
        np.add.at(total_UM, self.user_R, value_RM)
        return total_UM
