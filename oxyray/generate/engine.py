"""Requests to items: batches of requests through beam search, SIDs resolved to items.
 A SID that several items share gives all of them, next to each other: more training events first, then the smaller item index. That is the
stated tie-break; item-level metrics stand on it.

Legend: B requests, K beams, R items a request, I items of the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from oxyray.data.batch import Batch
from oxyray.generate.beam import Beams, Pool, beam_search
from oxyray.model.layers import Tensor
from oxyray.model.policy import Policy, Rows
from oxyray.sid.prefix import PrefixIndex

Lookup = Callable[[dict[str, Tensor]], Rows]


@dataclass(frozen=True)
class Generated:
    """Items best first, `item_BR` (-1: none left) with `score_BR` (log-probability of their SID), and the SIDs themselves, `leaf_BK`."""

    item_BR: np.ndarray
    score_BR: np.ndarray
    leaf_BK: np.ndarray
    logprob_BK: np.ndarray


class Generator:
    """A policy, the rows of its tables and a catalogue's index, ready to answer requests. `order_I` is the tie-break: larger comes
    first."""

    def __init__(
        self, policy: Policy, lookup: Lookup, index: PrefixIndex, order_I: np.ndarray, beams: int, normalise: str = "children"
    ) -> None:
        self.policy, self.lookup, self.beams, self.normalise = policy, lookup, beams, normalise
        ranked = np.lexsort((index.leaf_items, -order_I[index.leaf_items], index.item_leaf()))
        self._items_of_leaf = index.leaf_items[ranked].astype(np.int64)
        self._leaf_offset = np.append(0, np.cumsum(index.leaf_count, dtype=np.int64))
        self._pools: dict[str, Pool] = {}

    def pool(self, name: str, allowed_I: np.ndarray) -> Pool | None:
        """The named pool, kept for the next call; None where it is the whole catalogue."""
        if allowed_I.all():
            return None
        if name not in self._pools:
            self._pools[name] = Pool.of_items(
                self.policy.tree, torch.from_numpy(allowed_I).to(self.policy.tree.path_IL.device), f"the pool of {name}"
            )
        return self._pools[name]

    def generate(self, batch: Batch, items: int, pool: Pool | None = None, exclude: list[np.ndarray] | None = None) -> Generated:
        """The best `items` items of each request. `exclude` lists item indices that a request must not get (what its user has already)."""
        training = self.policy.training
        self.policy.eval()
        try:
            beams = beam_search(self.policy, batch, self.lookup(batch.lookups()), self.beams, pool, self.normalise)
        finally:
            self.policy.train(training)
        return self._resolve(beams, items, None if pool is None else pool.item_I.cpu().numpy(), exclude)

    def _resolve(self, beams: Beams, items: int, allowed_I: np.ndarray | None, exclude: list[np.ndarray] | None) -> Generated:
        leaf_BK, logprob_BK = beams.leaf_BK.cpu().numpy(), beams.logprob_BK.float().cpu().numpy()
        item_BR = np.full((len(leaf_BK), items), -1, dtype=np.int64)
        score_BR = np.full((len(leaf_BK), items), -np.inf, dtype=np.float32)
        for b, leaves in enumerate(leaf_BK):
            real = leaves >= 0
            first, last = self._leaf_offset[leaves[real]], self._leaf_offset[leaves[real] + 1]
            found = (
                np.concatenate([self._items_of_leaf[x:y] for x, y in zip(first, last, strict=True)])
                if real.any()
                else np.empty(0, np.int64)
            )
            score = np.repeat(logprob_BK[b][real], last - first)
            keep = np.ones(len(found), dtype=bool) if allowed_I is None else allowed_I[found]
            if exclude is not None and len(exclude[b]):
                keep &= ~np.isin(found, exclude[b])
            found, score = found[keep], score[keep]
            size = min(items, len(found))
            item_BR[b, :size], score_BR[b, :size] = found[:size], score[:size]
        return Generated(item_BR, score_BR, leaf_BK, logprob_BK)
