"""From a recommender's raw list to the list that is judged: what the protocol leaves out goes, the rest moves up.

Protocols, always both and never mixed: `all` (the scenario's whole pool, as specified) and `seen_out` (items of the user's visible
history are not recommended). A SID-level list is the item list's SIDs in order of first appearance.

Legend: R rows, D depth of raw lists, K places of judged lists, I items, N history events.
"""

from __future__ import annotations

import numpy as np

from oxyray.evaluate.baselines import Lists
from oxyray.evaluate.requests import Requests

Array = np.ndarray

PROTOCOLS = ("all", "seen_out")


def legal(lists: Lists, requests: Requests, pool_SI: Array) -> Array:
    """True where a place holds an item of the row's pool: bool (R, D)."""
    return (lists.item_RK >= 0) & pool_SI[requests.scenario_R[:, None], np.maximum(lists.item_RK, 0)]


def seen(lists: Lists, requests: Requests, items: int) -> Array:
    """True where a place holds an item of the row's whole visible history: bool (R, D)."""
    row_N, item_N = requests.history()
    return np.isin(np.arange(len(requests))[:, None] * items + lists.item_RK, row_N * items + item_N) & (lists.item_RK >= 0)


def kept(lists: Lists, keep_RD: Array, depth: int) -> Lists:
    """The places marked by `keep_RD`, moved up in order, the first `depth` of them; -1 and -inf behind the last."""
    order_RD = np.argsort(~keep_RD, axis=1, kind="stable")[:, :depth]
    real_RK = np.take_along_axis(keep_RD, order_RD, 1)
    item_RK = np.where(real_RK, np.take_along_axis(lists.item_RK, order_RD, 1), -1)
    score_RK = np.where(real_RK, np.take_along_axis(lists.score_RK, order_RD, 1), -np.inf)
    return Lists(item_RK, score_RK.astype(np.float32))


def sids(item_RD: Array, leaf_I: Array, depth: int) -> Array:
    """The first `depth` distinct SIDs (leaf numbers) of item lists, -1 behind the last: (R, depth) or narrower."""
    leaf_RD = np.where(item_RD >= 0, leaf_I[np.maximum(item_RD, 0)], -1)
    by_leaf_RD = np.argsort(leaf_RD, axis=1, kind="stable")
    sorted_RD = np.take_along_axis(leaf_RD, by_leaf_RD, 1)
    fresh_RD = np.ones_like(sorted_RD, dtype=bool)
    fresh_RD[:, 1:] = sorted_RD[:, 1:] != sorted_RD[:, :-1]
    first_RD = np.empty_like(fresh_RD)
    np.put_along_axis(first_RD, by_leaf_RD, fresh_RD & (sorted_RD >= 0), 1)
    order_RD = np.argsort(~first_RD, axis=1, kind="stable")[:, :depth]
    return np.where(np.take_along_axis(first_RD, order_RD, 1), np.take_along_axis(leaf_RD, order_RD, 1), -1)
