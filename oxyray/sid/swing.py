"""Swing: items that the same users took, where a pair of users counts the more the less else they have in common (paper 4.2, V2 to V4).

    swing(i, j) = sum over pairs of users u, v that both took i and j of  w_u w_v / (alpha + |I_u ∩ I_v|),   w_u = 1 / sqrt(|I_u|)

Exact: no user is cut and no pair is sampled. Item by item, the users of i make a small dense matrix of pair weights W, and with B, what
these users took, the similarities of i to all items j are the column sums of B * (W B), halved. With several workers Ray Data spreads the
items.

Legend: U users, I items, n users of one item, h some of these, m items that at least two of them took, P pairs of items.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from oxyray.cluster.start import ray_for
from oxyray.config import ClusterConfig
from oxyray.progress import bar

Array = np.ndarray

ALPHA = 1.0
_AT_ONCE = 2**23  # products held at a time
_BLOCK_SECONDS = 2e9  # work of a block of items, in multiply-adds: some seconds


@dataclass(frozen=True, eq=False)
class Pairs:
    """Items `left_P` and `right_P` that belong together, and how much."""

    left_P: Array
    right_P: Array
    weight_P: Array

    def __len__(self) -> int:
        return len(self.left_P)


def taken_by(parts: Iterable[tuple[Array, Array]], items: int) -> sparse.csr_matrix:
    """Who took what, (U, I), ones. `parts` yields `(user_N, item_N)`; a user lies wholly in one part. Users of a single item are left out:
    they join no two items."""
    rows = []
    for user_N, item_N in parts:
        _, user_N = np.unique(user_N, return_inverse=True)
        block = sparse.csr_matrix(
            (np.ones(len(item_N), dtype=np.float32), (user_N.reshape(-1), item_N)), shape=(user_N.max(initial=-1) + 1, items)
        )
        block.sum_duplicates()
        block.data[:] = 1
        rows.append(block[np.diff(block.indptr) > 1])
    return sparse.csr_matrix(sparse.vstack(rows, format="csr")) if rows else sparse.csr_matrix((0, items), dtype=np.float32)


def swing(taken_UI: sparse.csr_matrix, top: int, workers: int = 1, cluster: ClusterConfig | None = None) -> Pairs:
    """Each item's `top` most similar others (fewer where fewer have a similarity), likeliest first, ties by index. Raises RunError when
    the cluster is smaller than `workers`."""
    work = Swing(taken_UI, top)
    blocks = work.blocks()
    found: list[dict[str, Array]] = []
    progress = bar(len(blocks), "Swing", "block")
    for block in _on_ray(work, blocks, workers, cluster) if workers > 1 else map(work, ({"items": items_N[None]} for items_N in blocks)):
        found.append(block)
        progress.update(1)
    progress.close()
    left, right, weight = (
        np.concatenate([block[name] for block in found]) if found else np.zeros(0) for name in ("left", "right", "weight")
    )
    order = np.argsort(left, kind="stable")
    return Pairs(left[order].astype(np.int64), right[order].astype(np.int64), weight[order])


class Swing:
    """The similarities of some items at a time. Also the actor of the Ray Data path."""

    def __init__(self, taken_UI: sparse.csr_matrix, top: int, alpha: float = ALPHA) -> None:
        self.taken_UI, self.top, self.alpha = taken_UI, top, alpha
        self.taken_IU = sparse.csr_matrix(taken_UI.T)
        self.weight_U = 1 / np.sqrt(np.maximum(np.diff(taken_UI.indptr), 1))

    def blocks(self) -> list[Array]:
        """Items that somebody took, in blocks of like work."""
        users_I = np.diff(self.taken_IU.indptr).astype(np.float64)
        cost_I = users_I * (self.taken_IU @ np.diff(self.taken_UI.indptr))
        items = np.flatnonzero(users_I > 1)
        return [part for part in np.split(items, np.flatnonzero(np.diff(np.cumsum(cost_I[items]) // _BLOCK_SECONDS)) + 1) if len(part)]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Array]:
        found = [(item, *self.nearest(int(item))) for items_N in batch["items"] for item in items_N]
        return {
            "left": np.concatenate([np.full(len(right), item) for item, right, _ in found]),
            "right": np.concatenate([right for _, right, _ in found]),
            "weight": np.concatenate([weight for _, _, weight in found]),
        }

    def nearest(self, item: int) -> tuple[Array, Array]:
        """The most similar others, and how similar."""
        other, weight = self.similar(item)
        best = np.lexsort((other, -weight))[: self.top]
        return other[best], weight[best]

    def similar(self, item: int) -> tuple[Array, Array]:
        """All others with a similarity above zero, by index, and it (float64)."""
        users_n = self.taken_IU.indices[self.taken_IU.indptr[item] : self.taken_IU.indptr[item + 1]]
        took = self.taken_UI[users_n]
        shared, count = np.unique(took.indices, return_counts=True)
        shared = shared[count > 1]  # what one of them took alone joins no pair
        took_nm = took[:, shared]
        took_mn = sparse.csr_matrix(took_nm.T)
        similar_m, weight_n = np.zeros(len(shared)), self.weight_U[users_n]
        step = max(1, _AT_ONCE // max(len(shared), len(users_n), 1))
        for first in range(0, len(users_n), step):
            some_hm = took_nm[first : first + step]
            pair_nh = weight_n[:, None] * weight_n[first : first + step] / (self.alpha + (took_nm @ some_hm.T).toarray())
            here = np.arange(pair_nh.shape[1])
            pair_nh[first + here, here] = 0
            product_mh = took_mn @ pair_nh
            user = np.repeat(here, np.diff(some_hm.indptr))
            similar_m += np.bincount(some_hm.indices, weights=product_mh[some_hm.indices, user], minlength=len(shared))
        others = shared != item
        return shared[others].astype(np.int64), similar_m[others] / 2


def _on_ray(work: Swing, blocks: list[Array], workers: int, cluster: ClusterConfig | None) -> Iterator[dict[str, Array]]:
    import ray

    with ray_for(cluster or ClusterConfig(), workers, otherwise="sid.workers=1"):
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = ray.data.from_items([{"items": items_N} for items_N in blocks], override_num_blocks=len(blocks)).map_batches(
            _Remote,
            fn_constructor_args=(ray.put(work),),
            batch_size=1,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
        )
        yield from dataset.iter_batches(batch_size=None, batch_format="numpy")


class _Remote:
    """Swing held once in the object store, whatever the number of actors."""

    def __init__(self, work: Any) -> None:
        import ray

        self.work: Swing = ray.get(work, timeout=600)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Array]:
        return self.work(batch)
