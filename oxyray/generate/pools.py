"""What a request may get: a pool of items as bitmaps over the one prefix index, less single items that it must not get.

A pool (a scenario's, a category's, what is in stock, a list) marks the nodes with a legal item below, one bit each. Excluded items (bought
already, blocked) differ from request to request: only the nodes that they leave without any legal item are listed. A batch may mix pools.

Legend: I items of the catalogue, B requests, J distinct pools, P pairs asked for, E excluded (request, item) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from oxyray.errors import GenerationError
from oxyray.model.head import Tree, spread
from oxyray.model.layers import Tensor


@dataclass(frozen=True, eq=False)
class Pool:
    """Bit n of `node[l]` is set when node n of level l has an item of the pool below; `item` marks the items themselves, since a legal SID
    may also have items outside the pool; `leaves` counts the legal SIDs. All of it is of one version of the catalogue, `tree`."""

    tree: Tree
    node: tuple[Tensor, ...]
    item: Tensor
    leaves: int

    @classmethod
    def of_items(cls, tree: Tree, items: Tensor, name: str = "pool") -> Pool:
        """The pool of the items that `items` marks (bool, an entry for each item) or lists (item indices). Raises GenerationError when
        none of them is in the catalogue."""
        leaf_I = tree.leaf_of_item()
        item_N = (items.nonzero().squeeze(1) if items.dtype == torch.bool else items.long()).to(leaf_I.device)
        item_N = item_N[(item_N >= 0) & (item_N < len(leaf_I))]
        item_N = item_N[leaf_I[item_N] >= 0]
        if len(item_N) == 0:
            raise GenerationError(f"{name} holds no item of the catalogue: nothing can be generated for it")
        node_N = torch.unique(leaf_I[item_N].long())
        leaves, node = len(node_N), []
        for level in reversed(range(tree.levels)):
            node.append(_packed(node_N, tree.nodes(level)))
            if level:
                node_N = torch.unique_consecutive(tree.parent_of(level, node_N))
        return cls(tree, tuple(node[::-1]), _packed(item_N, len(leaf_I)), leaves)

    def has(self, item_N: np.ndarray) -> np.ndarray:
        """Which of these items are in the pool."""
        return _bit(self.item, torch.from_numpy(item_N).to(self.item.device)).cpu().numpy()


class Legal:
    """The rules of one batch: each request's pool (None: the whole catalogue) and excluded items."""

    def __init__(self, tree: Tree, pools: Sequence[Pool | None], exclude: Sequence[np.ndarray] | None = None) -> None:
        self.tree = tree
        if any(pool is not None and pool.tree is not tree for pool in pools):
            raise GenerationError("a pool was made for another version of the catalogue: make it again from the items that it allows")
        distinct = list({id(pool): pool for pool in pools if pool is not None}.values())
        place = {id(pool): j for j, pool in enumerate(distinct)}
        self._pool_B = torch.tensor([-1 if pool is None else place[id(pool)] for pool in pools], device=tree.device)
        self._open = any(pool is None for pool in pools)  # a request without a pool
        levels = range(tree.levels if distinct else 0)
        # .to(): a pool may be older than the move of its tree to a device
        self._node_JX = [torch.stack([pool.node[level] for pool in distinct]).to(tree.device) for level in levels]
        self._item_JX = torch.stack([pool.item for pool in distinct]).to(tree.device) if distinct else None
        self.leaves_B = [tree.nodes(tree.levels - 1) if pool is None else pool.leaves for pool in pools]
        self._dead: list[Tensor] = []  # of each level, keys of nodes that a request has lost; sorted
        if exclude is not None and any(len(items) for items in exclude):
            self._bury(exclude)

    @classmethod
    def empty(cls, tree: Tree, requests: int, pooled: bool, lost: int) -> Legal:
        """Rules of a fixed size, for `take`: with or without pools, and room for so many lost nodes of each level."""
        rules = cls(tree, [None] * requests)
        rules._pool_B = torch.arange(requests, device=tree.device)
        if pooled:
            rules._open = False
            sizes = [-(-tree.nodes(level) // 8) for level in range(tree.levels)]
            rules._node_JX = [torch.zeros(requests, size, dtype=torch.uint8, device=tree.device) for size in sizes]
        if lost:
            rules._dead = [torch.zeros(lost, dtype=torch.int64, device=tree.device) for _ in range(tree.levels)]
        return rules

    def take(self, other: Legal) -> None:
        """Become the rules of another batch, of at most as many requests, of which those behind its own may get nothing or anything. Of
        use for `keep` alone."""
        requests = len(other._pool_B)
        for mine_BX, bits_JX in zip(self._node_JX, other._node_JX, strict=True):
            bits_BX = bits_JX[other._pool_B.clamp(min=0)]
            mine_BX[:requests] = torch.where((other._pool_B >= 0)[:, None], bits_BX, 255)
        for mine_E, key_E in zip(self._dead, other._dead, strict=True):
            mine_E.fill_(torch.iinfo(torch.int64).max)
            mine_E[: len(key_E)] = key_E

    @property
    def pooled(self) -> bool:
        """Whether a request has a pool."""
        return bool(self._node_JX)

    @property
    def lost(self) -> list[Tensor]:
        """Of each level, the sorted keys of nodes that requests have lost; empty where nothing is excluded."""
        return self._dead

    def keep(self, level: int, request_P: Tensor, node_P: Tensor) -> Tensor | None:
        """Whether each request may walk through each node; None: all may."""
        keep_P = self._pooled(self._node_JX[level], request_P, node_P) if self._node_JX else None
        if self._dead and len(self._dead[level]):
            alive_P = ~_among(self._dead[level], request_P * self.tree.nodes(level) + node_P)
            keep_P = alive_P if keep_P is None else keep_P & alive_P
        return keep_P

    def _pooled(self, bits_JX: Tensor, request_P: Tensor, place_P: Tensor) -> Tensor:
        pool_P = self._pool_B[request_P]
        legal_P = (bits_JX[pool_P, place_P >> 3] >> (place_P & 7).to(torch.uint8) & 1).bool()
        return legal_P | (pool_P < 0) if self._open else legal_P

    def _bury(self, exclude: Sequence[np.ndarray]) -> None:
        """Find the nodes below which nothing legal remains: first leaves all of whose legal items are excluded, then, upwards, nodes all of
        whose legal children are gone."""
        tree, device = self.tree, self.tree.device
        leaf_I = tree.leaf_of_item()
        request_E = torch.from_numpy(np.repeat(np.arange(len(exclude)), [len(items) for items in exclude])).to(device)
        item_E = torch.from_numpy(np.concatenate([np.asarray(items, np.int64) for items in exclude])).to(device)
        real_E = (item_E >= 0) & (item_E < len(leaf_I))
        key_E = torch.unique((request_E * len(leaf_I) + item_E)[real_E])  # an item may be named twice
        request_E, item_E = key_E // len(leaf_I), key_E % len(leaf_I)
        legal_E = leaf_I[item_E] >= 0
        if self._item_JX is not None:
            legal_E &= self._pooled(self._item_JX, request_E, item_E)
        lost = request_E[legal_E], leaf_I[item_E[legal_E]].long()
        for level in reversed(range(tree.levels)):
            nodes = tree.nodes(level)
            key_N, lost_N = torch.unique(lost[0] * nodes + lost[1], return_counts=True)
            request_N, node_N = key_N // nodes, key_N % nodes
            dead_N = lost_N == self._legal_below(level, request_N, node_N)
            self._dead.insert(0, key_N[dead_N])
            if level:
                lost = request_N[dead_N], tree.parent_of(level, node_N[dead_N])
            if level == tree.levels - 1:
                for request in request_N[dead_N].tolist():
                    self.leaves_B[request] -= 1

    def _legal_below(self, level: int, request_N: Tensor, node_N: Tensor) -> Tensor:
        """How many legal children a node has, legal items a leaf: (N,)."""
        if level + 1 < self.tree.levels:
            first_N, count_N = self.tree.children_of(level, node_N)
            if not self._node_JX:
                return count_N
            state_P, child_P = spread(first_N, count_N)
            legal_P = self._pooled(self._node_JX[level + 1], request_N[state_P], child_P)
        else:
            state_P, item_P = self.tree.items_below(level, node_N)
            if self._item_JX is None:
                return torch.bincount(state_P, minlength=len(node_N))
            legal_P = self._pooled(self._item_JX, request_N[state_P], item_P)
        return torch.bincount(state_P[legal_P], minlength=len(node_N))


def _packed(place_N: Tensor, size: int) -> Tensor:
    """A bitmap of `size` bits with these set, as bytes."""
    mask = torch.zeros(-(-size // 8) * 8, dtype=torch.uint8, device=place_N.device)
    mask[place_N] = 1
    return (mask.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def _bit(bits: Tensor, place_N: Tensor) -> Tensor:
    return (bits[place_N >> 3] >> (place_N & 7).to(torch.uint8) & 1).bool()


def _among(sorted_X: Tensor, key_P: Tensor) -> Tensor:
    place_P = torch.searchsorted(sorted_X, key_P).clamp(max=len(sorted_X) - 1)
    return sorted_X[place_P] == key_P
