"""Co-visitation KNN: items that the same users took, near in time to each other (`oxyray.data.covisits`).

A row's score of an item sums the similarities from the history's items, each weighted by `decay` to the power of its age (0: the
latest). Places that no neighbour fills go to the scenario's popular items, with scores below zero.

Legend: R rows, I items, N events.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from oxyray.data.covisits import co_visits
from oxyray.evaluate.baselines import Lists, best
from oxyray.evaluate.baselines.popularity import Popularity
from oxyray.evaluate.requests import Parts, Requests

Array = np.ndarray


class Knn:
    """The pools are those of `popularity`."""

    name = "knn"

    def __init__(self, data: Parts, popularity: Popularity, *, decay: float = 0.7, history: int = 50) -> None:
        self.decay, self.history = decay, history
        self.unfilled_SI = popularity.place_SI()
        self.similar_II = co_visits(data, self.unfilled_SI.shape[1]).similar_II

    def recommend(self, requests: Requests, depth: int) -> Lists:
        row_N, item_N = requests.history(self.history)
        age_N = np.searchsorted(row_N, row_N, side="right") - 1 - np.arange(len(row_N))
        weight_RI = sparse.csr_matrix(
            (self.decay**age_N, (row_N, item_N)), shape=(len(requests), self.unfilled_SI.shape[1]), dtype=np.float32
        )
        score_RI = (weight_RI @ self.similar_II).toarray()
        unfilled_RI = self.unfilled_SI[requests.scenario_R]
        return best(np.where((score_RI > 0) & ~np.isneginf(unfilled_RI), score_RI, unfilled_RI), depth)
