"""What the item encoder learns from: pairs that belong together (paper 4.2, versions V2 to V4).

    swing   two items that the same users took
    query   what was typed, and the item that was taken there
    peers   two items of one category that were taken after the same query; where nothing is typed, that have like texts

Only training events say so: a held-out event that shaped the semantic IDs would be a leak.

Legend: P pairs, N events, W query texts, I items, F dimensions, G items of a category, K nearest, S sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from oxyray.config import Config
from oxyray.data.prepared import Prepared
from oxyray.errors import ConfigError
from oxyray.sid.swing import Pairs, swing, taken_by

Array = np.ndarray

_MOST_PEERS = 10_000_000  # pairs counted; a query with more items gives its most taken ones
_EXACT = 50_000  # nearest texts among more items than these are looked for near the item alone


def training_events(prepared: Prepared) -> Iterator[tuple[Array, Array]]:
    """`(user_N, item_N)` of the training events, part by part, each sorted by user and time."""
    for part in range(prepared.parts):
        rows = prepared.events(part, ["user", "item", "split"])
        train = rows["split"] == 0
        yield rows["user"][train], rows["item"][train]


def sources(config: Config, prepared: Prepared, text_W: pa.Array, vector_IF: Callable[[], Array]) -> dict[str, Pairs]:
    """The pairs of every source whose rate is above 0, by name. `text_W` are the shop's distinct query texts, which pairs of the source
    `query` point at; `vector_IF` gives the vectors of the items' texts. Raises ConfigError where a source that is asked for has no pair."""
    rate, found = config.fuse.rates, {}
    if rate.get("swing"):
        taken_UI = taken_by(training_events(prepared), prepared.meta.items)
        found["swing"] = swing(taken_UI, config.fuse.neighbours, config.sid.workers, config.cluster)
    if rate.get("query") or rate.get("peers"):
        asked_WI = _asked(prepared, text_W)
        if rate.get("query"):
            pairs = asked_WI.tocoo()
            found["query"] = Pairs(pairs.row.astype(np.int64), pairs.col.astype(np.int64), pairs.data)
        if rate.get("peers"):
            category_I = _finest_category(prepared)
            found["peers"] = peers(asked_WI, category_I) if asked_WI.nnz else alike(vector_IF(), category_I, config.fuse.neighbours)
    for name, pairs_of in found.items():
        if not len(pairs_of):
            raise ConfigError(f"fuse.rates.{name}={rate[name]:g}, but the training events have no such pair: set it to 0")
    return found


def peers(asked_WI: sparse.csr_matrix, category_I: Array) -> Pairs:
    """Pairs of items (the smaller index left) of one category, by how many queries led to both, each query counting 1 over the number of
    such pairs it makes. Items of an unknown category (-1) have no peers."""
    key, weight = [], []
    items, most = asked_WI.shape[1], max(2, int(np.sqrt(2 * _MOST_PEERS / max(asked_WI.shape[0], 1))))
    for query in range(asked_WI.shape[0]):
        here = slice(asked_WI.indptr[query], asked_WI.indptr[query + 1])
        item_n, count_n = asked_WI.indices[here], asked_WI.data[here]
        item_n = np.sort(item_n[np.lexsort((item_n, -count_n))[:most]]).astype(np.int64)
        left, right = np.triu_indices(len(item_n), 1)
        same = (category_I[item_n[left]] == category_I[item_n[right]]) & (category_I[item_n[left]] >= 0)
        key.append(item_n[left[same]] * items + item_n[right[same]])
        weight.append(np.full(int(same.sum()), 1 / max(int(same.sum()), 1)))
    pair_P, place = np.unique(np.concatenate(key) if key else np.zeros(0, dtype=np.int64), return_inverse=True)
    total_P = np.bincount(place.reshape(-1), weights=np.concatenate(weight) if weight else None, minlength=len(pair_P))
    return Pairs(pair_P // items, pair_P % items, total_P)


def alike(vector_IF: Array, category_I: Array, top: int) -> Pairs:
    """Each item with its `top` nearest of the same category by the vectors of their texts (length 1), weighed by cosine; pairs of a cosine
    of 0 or less are left out. Items of an unknown category (-1) are one category."""
    left, right, weight = [], [], []
    for category in np.unique(category_I):
        item_G = np.flatnonzero(category_I == category)
        vector_GF = np.ascontiguousarray(vector_IF[item_G], dtype=np.float32)
        near_GK, cosine_GK = _nearest(vector_GF, min(top + 1, len(item_G)))
        keep_GK = (near_GK != np.arange(len(item_G))[:, None]) & (near_GK >= 0) & (cosine_GK > 0)
        keep_GK &= np.cumsum(keep_GK, axis=1) <= top  # an item may not be its own nearest, where texts are equal
        row, _ = np.nonzero(keep_GK)
        left.append(item_G[row])
        right.append(item_G[near_GK[keep_GK]])
        weight.append(cosine_GK[keep_GK].astype(np.float64))
    return Pairs(*(np.concatenate(each) for each in (left, right, weight)))


def _nearest(vector_GF: Array, count: int) -> tuple[Array, Array]:
    """(G, K) places and cosines of the nearest, itself among them."""
    index: faiss.Index = faiss.IndexFlatIP(vector_GF.shape[1])
    if len(vector_GF) > _EXACT:
        index = faiss.IndexIVFFlat(index, vector_GF.shape[1], int(np.sqrt(len(vector_GF))), faiss.METRIC_INNER_PRODUCT)
        index.train(vector_GF)
        index.nprobe = 16
    index.add(vector_GF)
    cosine_GK, near_GK = index.search(vector_GF, count)
    return near_GK, cosine_GK


def _asked(prepared: Prepared, text_W: pa.Array) -> sparse.csr_matrix:
    """(W, I): how often an item was taken after a query."""
    counts = sparse.csr_matrix((len(text_W), prepared.meta.items), dtype=np.float64)
    for part in range(prepared.parts):
        rows = prepared.events(part, ["item", "split"])
        query_N = pc.index_in(prepared.query_column(part), value_set=text_W, skip_nulls=True).fill_null(-1).to_numpy()
        asked = (rows["split"] == 0) & (query_N >= 0)
        counts = counts + sparse.csr_matrix((np.ones(int(asked.sum())), (query_N[asked], rows["item"][asked])), shape=counts.shape)
    return sparse.csr_matrix(counts)


def _finest_category(prepared: Prepared) -> Array:
    """The number of each item's category at the finest level that the shop has; -1 unknown."""
    held = prepared.item_columns("category_3", "category_2", "category_1")
    if not held.column_names:
        return np.full(prepared.meta.items, -1)
    column = held[held.column_names[0]]
    return cast(Array, pc.index_in(column, value_set=column.unique().drop_null(), skip_nulls=True).fill_null(-1).to_numpy())


@dataclass(frozen=True, eq=False)
class Mixture:
    """Pairs of all sources, drawn by the sources' rates and within a source by weight."""

    pairs: Mapping[str, Pairs]
    rates: Mapping[str, float]

    def draw(self, count: int, random: np.random.Generator) -> dict[str, Array]:
        """Rows of the pairs of each source, `count` in all."""
        names = sorted(self.pairs)
        rate_S = np.array([self.rates[name] for name in names])
        many_S = random.multinomial(count, rate_S / rate_S.sum())
        return {name: self._drawn(name, random.random(many)) for name, many in zip(names, many_S, strict=True)}

    def _drawn(self, name: str, at_N: Array) -> Array:
        return np.minimum(np.searchsorted(self._ends[name], at_N, side="right"), len(self.pairs[name]) - 1)

    @cached_property
    def _ends(self) -> dict[str, Array]:
        return {name: np.cumsum(pairs.weight_P) / pairs.weight_P.sum() for name, pairs in self.pairs.items()}
