"""Co-visitation KNN: items that the same users took, near in time to each other.

A pair of a user's training events that lie g <= `reach` steps apart adds 1/g to the similarity from the earlier item to the later
and `backward`/g the other way. The sum is divided by n_i^`from_power` n_j^`to_power` (training events of the items), and each item
keeps its `neighbours` most similar ones. A row's score of an item sums the similarities from the history's items, each weighted by
`decay` to the power of its age (0: the latest). Places that no neighbour fills go to the scenario's popular items, with scores
below zero.

The defaults were chosen on validation events of amazon-beauty and amazon-sports. Plain cosine over whole histories, the textbook
form, is about a quarter weaker there.

Legend: R rows, I items, N events.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from oxyray.data.requests import timeline
from oxyray.evaluate.baselines import Lists, best
from oxyray.evaluate.baselines.popularity import Popularity
from oxyray.evaluate.requests import TRAIN, Parts, Requests

Array = np.ndarray


def similarity(
    data: Parts,
    items: int,
    *,
    reach: int = 20,
    backward: float = 0.5,
    from_power: float = 0.4,
    to_power: float = 0.15,
    neighbours: int = 200,
) -> sparse.csr_matrix:
    """Row i holds the similarities from item i: float32 (I, I), zero on the diagonal."""
    sum_II = sparse.csr_matrix((items, items), dtype=np.float64)
    count_I = np.zeros(items, dtype=np.int64)
    for part in range(data.parts):
        time = timeline(data.events(part), splits=(TRAIN,))
        np.add.at(count_I, time.item_E, 1)
        for gap in range(1, reach + 1):
            same = np.flatnonzero(time.user_E[:-gap] == time.user_E[gap:])
            if not len(same):
                break
            earlier, later = time.item_E[same], time.item_E[same + gap]
            value = np.full(len(same), 1.0 / gap)
            pairs = (np.concatenate([value, backward * value]), (np.concatenate([earlier, later]), np.concatenate([later, earlier])))
            sum_II = sum_II + sparse.csr_matrix(pairs, shape=(items, items))
    count_I = np.maximum(count_I, 1)
    row_N = np.repeat(np.arange(items), np.diff(sum_II.indptr))
    value_N = sum_II.data / (count_I[row_N] ** from_power * count_I[sum_II.indices] ** to_power)
    keep = row_N != sum_II.indices
    return _largest(row_N[keep], sum_II.indices[keep], value_N[keep], neighbours, items)


def _largest(row_N: Array, column_N: Array, value_N: Array, count: int, items: int) -> sparse.csr_matrix:
    """The `count` largest of each row, ties by column."""
    order = np.lexsort((column_N, -value_N, row_N))
    row_N, column_N, value_N = row_N[order], column_N[order], value_N[order]
    rank_N = np.arange(len(row_N)) - np.searchsorted(row_N, row_N, side="left")
    keep = rank_N < count
    return sparse.csr_matrix((value_N[keep].astype(np.float32), (row_N[keep], column_N[keep])), shape=(items, items))


class Knn:
    """The pools are those of `popularity`."""

    name = "knn"

    def __init__(self, data: Parts, popularity: Popularity, *, decay: float = 0.7, history: int = 50) -> None:
        self.decay, self.history = decay, history
        self.unfilled_SI = popularity.place_SI()
        self.similar_II = similarity(data, self.unfilled_SI.shape[1])

    def recommend(self, requests: Requests, depth: int) -> Lists:
        row_N, item_N = requests.history(self.history)
        age_N = np.searchsorted(row_N, row_N, side="right") - 1 - np.arange(len(row_N))
        weight_RI = sparse.csr_matrix(
            (self.decay**age_N, (row_N, item_N)), shape=(len(requests), self.unfilled_SI.shape[1]), dtype=np.float32
        )
        score_RI = (weight_RI @ self.similar_II).toarray()
        unfilled_RI = self.unfilled_SI[requests.scenario_R]
        return best(np.where((score_RI > 0) & ~np.isneginf(unfilled_RI), score_RI, unfilled_RI), depth)
