"""What scores the next code: a vector for every node of the prefix index.
 `codes`: a node's vector is its code's own output vector, one per level and code (the level-aware head of the field). `tied`: the mean of
the input vectors of the items below the node is added to it, so that what is learned of an item at the input is used at the output at once;
this needs every item's vector in each step. Probabilities are over a prefix's children (what training and decoding of `tied` use) or over
the level's whole vocabulary.

Legend: M hidden states, P (state, child) pairs, I items, n_l nodes of level l, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from oxyray.model.layers import Tensor
from oxyray.sid.prefix import PrefixIndex


class Tree(nn.Module):
    """A PrefixIndex as tensors that move with the model but are not saved with it: the catalogue is their home."""

    def __init__(self, index: PrefixIndex) -> None:
        super().__init__()
        self.levels, self.items = index.levels, len(index.leaf_items)
        for level in range(index.levels):
            self._put(f"code{level}", index.code[level].astype(np.int64))
            self._put(f"parent{level}", index.parent[level])
            if level + 1 < index.levels:
                self._put(f"first_child{level}", index.first_child[level])
        leaf_N = np.repeat(np.arange(index.leaves), np.diff(index.leaf_offset))
        self._put("leaf_items", index.leaf_items)
        first_item = index.leaf_offset
        for level in reversed(range(index.levels)):
            self._put(f"first_item{level}", first_item)
            if level:  # the first item of a node is that of its first child
                first_item = first_item[index.first_child[level - 1]]
        path_IL = np.zeros((int(index.leaf_items.max()) + 1, index.levels), dtype=np.int64)
        path_IL[index.leaf_items] = index.node_path(leaf_N)
        self.path_IL: Tensor
        self._put("path_IL", path_IL)

    def _put(self, name: str, values: np.ndarray) -> None:
        self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(values)), persistent=False)

    def code(self, level: int) -> Tensor:
        return self.get_buffer(f"code{level}")

    def parent(self, level: int) -> Tensor:
        return self.get_buffer(f"parent{level}")

    def children_of(self, level: int, node_M: Tensor) -> tuple[Tensor, Tensor]:
        """First child (a node of level + 1) and number of children of each node."""
        first = self.get_buffer(f"first_child{level}")
        return first[node_M], first[node_M + 1] - first[node_M]

    def items_below(self, level: int, node_M: Tensor) -> tuple[Tensor, Tensor]:
        """Items below each node as pairs: state_T and item_T, in leaf order."""
        first = self.get_buffer(f"first_item{level}")
        state_T, place_T = spread(first[node_M], first[node_M + 1] - first[node_M])
        return state_T, self.get_buffer("leaf_items")[place_T]


class Head(nn.Module):
    def __init__(self, width: int, levels: int, codes: int, tied: bool) -> None:
        super().__init__()
        self.tied = tied
        self.own = nn.ParameterList(torch.randn(codes, width) * 0.02 for _ in range(levels))

    def node_vectors(self, tree: Tree, item_ID: Tensor | None) -> list[Tensor]:
        """Output vectors of all nodes, level by level: (n_l, D) each. `item_ID` are all items' vectors (tied only)."""
        own = [vectors_VD[tree.code(level)] for level, vectors_VD in enumerate(self.own)]
        if not self.tied or item_ID is None:
            return own
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
