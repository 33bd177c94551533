"""What scores the next code: a vector for every node of the prefix index.
 `codes`: a node's vector is its code's own output vector, one per level and code (the level-aware head of the field). `tied`: the mean of
the input vectors of the items below the node is added to it, so that what is learned of an item at the input is used at the output at once;
this needs every item's vector in each step. Probabilities are over a prefix's children (what training and decoding of `tied` use) or over
the level's whole vocabulary.

Legend: M hidden states, P (state, child) pairs, I items, n_l nodes of level l, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from oxyray.model.layers import Tensor
from oxyray.sid.prefix import PrefixIndex


class Tree(nn.Module):
    """A PrefixIndex as tensors that move with the model but are not saved with it: the catalogue is their home.

    It is nearly as compact as the index, and decoding widens only what it looks up (`children_of`, `code_of`). What the tied head
    and its losses need of whole levels, in int64, is made when it is first asked for, and kept.
    """

    def __init__(self, index: PrefixIndex) -> None:
        super().__init__()
        self.levels, self.items = index.levels, len(index.leaf_items)
        self._fan_out = [len(index.code[0]), *(int(np.diff(first.astype(np.int64)).max()) for first in index.first_child)]
        for level in range(index.levels):
            self._put(f"compact_code{level}", _signed(index.code[level]))
            if level + 1 < index.levels:
                self._put(f"first_child{level}", _signed(index.first_child[level]))
        self._put("leaf_count", _signed(index.leaf_count))
        self._put("compact_items", _signed(index.leaf_items))

    def _put(self, name: str, values: Tensor) -> Tensor:
        self.register_buffer(name, values, persistent=False)
        return values

    def _kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._buffers:
            with torch.inference_mode(False):  # else training could not use it later
                return self._put(name, make())
        return self.get_buffer(name)

    @property
    def device(self) -> torch.device:
        return self.get_buffer("leaf_count").device

    def nodes(self, level: int) -> int:
        """n_l; of the last level, the number of distinct SIDs."""
        return len(self.get_buffer(f"compact_code{level}"))

    def fan_out(self, level: int) -> int:
        """The most nodes of a level that have one parent; of the first level, all."""
        return self._fan_out[level]

    def code(self, level: int) -> Tensor:
        """The code of every node of a level: (n_l,)."""
        return self._kept(f"code{level}", self.get_buffer(f"compact_code{level}").long)

    def code_of(self, level: int, node_M: Tensor) -> Tensor:
        """The same for a few nodes."""
        return self.get_buffer(f"compact_code{level}")[node_M].long()

    def parent(self, level: int) -> Tensor:
        """The parent of every node of a level (zeros at the first): (n_l,)."""
        if level == 0:
            return torch.zeros_like(self.code(0))
        return self._kept(f"parent{level}", lambda: _counted(torch.diff(self.get_buffer(f"first_child{level - 1}").long())))

    def parent_of(self, level: int, node_M: Tensor) -> Tensor:
        """The same for a few nodes, of a level below the first."""
        first = self.get_buffer(f"first_child{level - 1}")
        return torch.searchsorted(first, node_M.to(first.dtype), right=True) - 1

    def children_of(self, level: int, node_M: Tensor) -> tuple[Tensor, Tensor]:
        """First child (a node of level + 1) and number of children of each node."""
        first = self.get_buffer(f"first_child{level}")
        first_M = first[node_M].long()
        return first_M, first[node_M + 1].long() - first_M

    def items_below(self, level: int, node_M: Tensor) -> tuple[Tensor, Tensor]:
        """Items below each node as pairs: state_T and item_T, in leaf order."""
        first = self._first_item(level)
        first_M = first[node_M].long()
        state_T, place_T = spread(first_M, first[node_M + 1] - first_M)
        return state_T, self.get_buffer("compact_items")[place_T].long()

    def leaf_of_item(self) -> Tensor:
        """The leaf of every item of the catalogue, int32; -1 for an item index that has none: (I,)."""

        def make() -> Tensor:
            item_I = self.get_buffer("compact_items").long()
            leaf_I = torch.full((int(item_I.max()) + 1,), -1, dtype=torch.int32, device=item_I.device)
            leaf_I[item_I] = _counted(self.get_buffer("leaf_count").long()).int()
            return leaf_I

        return self._kept("leaf_of_item_I", make)

    def place_of_item(self) -> Tensor:
        """Where every item stands in the order of the leaves, int32; -1 for an item index that has no leaf: (I,)."""

        def make() -> Tensor:
            item_I = self.get_buffer("compact_items").long()
            place_I = torch.full((int(item_I.max()) + 1,), -1, dtype=torch.int32, device=item_I.device)
            place_I[item_I] = torch.arange(len(item_I), dtype=torch.int32, device=item_I.device)
            return place_I

        return self._kept("place_of_item_I", make)

    def item_at(self, place_M: Tensor) -> Tensor:
        """The items at these places: (M,)."""
        return self.get_buffer("compact_items")[place_M].long()

    def items_in(self, level: int, node_M: Tensor) -> Tensor:
        """How many items there are below each node: (M,)."""
        first = self._first_item(level)
        return first[node_M + 1] - first[node_M]

    @property
    def path_IL(self) -> Tensor:
        """The nodes above every item, level by level; zeros for an item index that has none: (I, L)."""

        def make() -> Tensor:
            path = [self.leaf_of_item().long().clamp(min=0)]
            for level in reversed(range(1, self.levels)):
                path.append(self.parent(level)[path[-1]])
            return torch.stack(path[::-1], dim=1) * (self.leaf_of_item() >= 0)[:, None]

        return self._kept("item_path_IL", make)

    def _first_item(self, level: int) -> Tensor:
        """Where the items below each node start among all items, with the end behind the last: (n_l + 1,), int32."""

        def make() -> Tensor:
            if level + 1 < self.levels:  # the first item of a node is that of its first child
                return self._first_item(level + 1)[self.get_buffer(f"first_child{level}").long()]
            return F.pad(torch.cumsum(self.get_buffer("leaf_count"), 0, dtype=torch.int32), (1, 0))

        return self._kept(f"first_item{level}", make)


def _signed(values: np.ndarray) -> Tensor:
    """As a tensor of the smallest type that torch supports everywhere (gloo, which broadcasts buffers, knows no 16-bit integers)."""
    kinds = (np.uint8, np.int32, np.int64)
    return torch.from_numpy(values.astype(next(kind for kind in kinds if int(values.max()) <= np.iinfo(kind).max)))


def _counted(count_N: Tensor) -> Tensor:
    """0 `count[0]` times, then 1 `count[1]` times, and so on."""
    return torch.repeat_interleave(torch.arange(len(count_N), device=count_N.device), count_N)


class Head(nn.Module):
    def __init__(self, width: int, levels: int, codes: int, tied: bool) -> None:
        super().__init__()
        self.tied = tied
        self.own = nn.ParameterList(torch.randn(codes, width) * 0.02 for _ in range(levels))

    def vectors(self, tree: Tree, item_ID: Tensor) -> list[Tensor]:
        """Output vectors, level by level: of all nodes, (n_l, D), where tied (`item_ID` are then all items' vectors); else of the codes,
        (V, D). `rows` says which is a node's."""
        if not self.tied:
            return list(self.own)
        own = [vectors_VD[tree.code(level)] for level, vectors_VD in enumerate(self.own)]
        total_nD = item_ID
        count_n = torch.ones(len(item_ID), device=item_ID.device, dtype=item_ID.dtype)
        vectors = []
        for level in reversed(range(tree.levels)):
            upward = tree.path_IL[:, level] if level == tree.levels - 1 else tree.parent(level + 1)
            nodes = len(tree.code(level))
            total_nD = total_nD.new_zeros(nodes, total_nD.shape[1]).index_add(0, upward, total_nD)
            count_n = count_n.new_zeros(nodes).index_add(0, upward, count_n)
            vectors.append(total_nD / count_n[:, None] + own[level])
        return vectors[::-1]

    def rows(self, tree: Tree, level: int, node_P: Tensor) -> Tensor:
        """Where the vectors of nodes stand in `vectors(...)[level]`: (P,)."""
        return node_P if self.tied else tree.code_of(level, node_P)


def spread(first_M: Tensor, count_M: Tensor) -> tuple[Tensor, Tensor]:
    """Ragged ranges as pairs: state_P and child_P, in order."""
    state_P = torch.repeat_interleave(torch.arange(len(count_M), device=count_M.device), count_M)
    offset_M = torch.cumsum(count_M, 0) - count_M
    return state_P, torch.arange(len(state_P), device=count_M.device) - offset_M[state_P] + first_M[state_P]


def ragged_logsumexp(logit_P: Tensor, state_P: Tensor, states: int) -> Tensor:
    """Log of the sum of exponentials of each state's pairs: (M,). Every state must have a pair."""
    top_M = logit_P.new_full((states,), -torch.inf).scatter_reduce(0, state_P, logit_P.detach(), "amax")
    total_M = logit_P.new_zeros(states).index_add(0, state_P, torch.exp(logit_P - top_M[state_P]))
    return top_M + torch.log(total_M)
