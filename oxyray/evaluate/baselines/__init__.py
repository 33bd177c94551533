"""What the policy must stand beside: popularity, co-visitation KNN and SASRec, all from the same split and the same visible histories.

A recommender answers rows of `Requests` with its best items of each row's scenario pool, best first. It may recommend items of the
user's own history: leaving them out is the protocol's business and is done in one place for all (`oxyray.evaluate.lists`).

Legend: R rows, K places of a list, I items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from oxyray.evaluate.requests import Requests

Array = np.ndarray


@dataclass(frozen=True)
class Lists:
    """item_RK: item indices, best first, -1 where a list is shorter; score_RK: float32, -inf there."""

    item_RK: Array
    score_RK: Array


class Recommends(Protocol):
    """A named recommender. `depth` items are wanted; fewer may come only where the pool or the beam holds no more."""

    name: str

    def recommend(self, requests: Requests, depth: int) -> Lists: ...


def best(score_RI: Array, depth: int) -> Lists:
    """Top `depth` of dense scores; equal scores by item index; -inf is never returned."""
    items = score_RI.shape[1]
    depth = min(depth, items)
    if depth < items:
        part_RK = np.argpartition(-score_RI, depth - 1, axis=1)[:, :depth]
        # argpartition picks any of those that tie at the edge; take the lowest indices instead
        edge_R1 = np.take_along_axis(score_RI, part_RK, 1).min(axis=1, keepdims=True)
        above_RI = score_RI > edge_R1
        ties_RI = score_RI == edge_R1
        room_R1 = depth - above_RI.sum(axis=1, keepdims=True)
        chosen_RI = above_RI | (ties_RI & (np.cumsum(ties_RI, axis=1) <= room_R1))
        part_RK = np.nonzero(chosen_RI)[1].reshape(len(score_RI), depth)
    else:
        part_RK = np.broadcast_to(np.arange(items), (len(score_RI), items))
    part_score_RK = np.take_along_axis(score_RI, part_RK, 1)
    order_RK = np.argsort(-part_score_RK, axis=1, kind="stable")
    score_RK = np.take_along_axis(part_score_RK, order_RK, 1).astype(np.float32)
    item_RK = np.where(np.isneginf(score_RK), -1, np.take_along_axis(part_RK, order_RK, 1))
    return Lists(item_RK.astype(np.int64), score_RK)


def cold_start(lists: Lists, requests: Requests, fallback: Recommends) -> Lists:
    """`lists` (R, K <= depth) with the rows of users without any history answered by `fallback`."""
    cold_R = np.flatnonzero(requests.stop_R == requests.start_R)
    if not len(cold_R):
        return lists
    theirs = fallback.recommend(requests.take(cold_R), lists.item_RK.shape[1])
    item_RK, score_RK = lists.item_RK.copy(), lists.score_RK.copy()
    item_RK[cold_R], score_RK[cold_R] = theirs.item_RK, theirs.score_RK
    return Lists(item_RK, score_RK)
