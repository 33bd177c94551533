"""The prefix index: every legal SID prefix as flat arrays.

The distinct SIDs, sorted, form a tree whose level-l nodes are the distinct prefixes of length l+1. Children of a node are contiguous, so
one offset array a level describes any ragged fan-out exactly. Decoding walks it; the tied head averages item vectors over it; nothing else
is needed to guarantee that only real items are generated (paper 3.2, prefix-constrained decoding).

Legend: I items, L levels, n_l nodes at level l.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oxyray.errors import CatalogueError

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class PrefixIndex:
    """`code[l][n]` is node n's own code; its children at level l+1 are the range `first_child[l][n] : first_child[l][n + 1]`; the items of
    leaf n are `leaf_items[leaf_offset[n] : leaf_offset[n + 1]]` (item indices, ascending)."""

    width: int
    code: tuple[Array, ...]
    parent: tuple[Array, ...]
    first_child: tuple[Array, ...]
    leaf_offset: Array
    leaf_items: Array

    @classmethod
    def from_codes(cls, codes_IL: Array, width: int, items_I: Array | None = None) -> PrefixIndex:
        """Index the SIDs `codes_IL` of items `items_I` (default 0..I-1). Raises CatalogueError on no items or codes outside 0..width-1."""
        codes_IL = np.asarray(codes_IL)
        if codes_IL.ndim != 2 or codes_IL.size == 0:
            raise CatalogueError(f"a prefix index needs at least one item; codes have shape {codes_IL.shape}")
        if codes_IL.min() < 0 or codes_IL.max() >= width:
            raise CatalogueError(f"codes must lie in 0..{width - 1}, found {codes_IL.min()}..{codes_IL.max()}")
        items_I = np.arange(len(codes_IL)) if items_I is None else np.asarray(items_I)
        if items_I.shape != (len(codes_IL),):
            raise CatalogueError(f"each SID belongs to one item; got {len(codes_IL)} SIDs and items of shape {items_I.shape}")
        levels = codes_IL.shape[1]
        order = np.lexsort((items_I, *(codes_IL[:, level] for level in reversed(range(levels)))))
        sorted_IL = codes_IL[order]
        code, parent, first_child = [], [], []
        starts_new = np.zeros(len(order), dtype=bool)
        starts_new[0] = True
        above = np.zeros(len(order), dtype=np.int64)
        for level in range(levels):
            starts_new = starts_new.copy()
            starts_new[1:] |= sorted_IL[1:, level] != sorted_IL[:-1, level]
            first = np.flatnonzero(starts_new)
            code.append(sorted_IL[first, level].astype(np.int32))
            parent.append(above[first].astype(np.int64))
            if level:
                first_child.append(np.searchsorted(parent[level], np.arange(len(code[level - 1]) + 1)).astype(np.int64))
            above = np.cumsum(starts_new) - 1
        leaf_offset = np.append(np.flatnonzero(starts_new), len(order)).astype(np.int64)
        return cls(width, tuple(code), tuple(parent), tuple(first_child), leaf_offset, items_I[order].astype(np.int64))

    @property
    def levels(self) -> int:
        return len(self.code)

    @property
    def leaves(self) -> int:
        """Number of distinct SIDs."""
        return len(self.code[-1])

    def node_path(self, leaf_N: Array) -> Array:
        """Nodes on the way to each leaf: (N, L), level by level."""
        path = [np.asarray(leaf_N)]
        for level in reversed(range(1, self.levels)):
            path.append(self.parent[level][path[-1]])
        return np.stack(path[::-1], axis=1)

    def codes_of(self, leaf_N: Array) -> Array:
        """The SID of each leaf: (N, L)."""
        path_NL = self.node_path(leaf_N)
        return np.stack([self.code[level][path_NL[:, level]] for level in range(self.levels)], axis=1)

    def leaf_of(self, codes_NL: Array) -> Array:
        """The leaf of each SID, -1 where no item has it: (N,)."""
        codes_NL = np.asarray(codes_NL, dtype=np.int64)
        if codes_NL.ndim != 2 or codes_NL.shape[1] != self.levels:
            raise CatalogueError(f"SIDs here have {self.levels} levels; got shape {codes_NL.shape}")
        node_N = np.zeros(len(codes_NL), dtype=np.int64)
        found_N = np.ones(len(codes_NL), dtype=bool)
        for level in range(self.levels):
            key = self.parent[level] * self.width + self.code[level]
            want_N = node_N * self.width + codes_NL[:, level]
            at_N = np.minimum(np.searchsorted(key, want_N), len(key) - 1)
            found_N &= (key[at_N] == want_N) & (codes_NL[:, level] >= 0) & (codes_NL[:, level] < self.width)
            node_N = np.where(found_N, at_N, 0)
        return np.where(found_N, node_N, -1)

    def items_of(self, leaf: int) -> Array:
        """Item indices that share this SID, ascending."""
        return self.leaf_items[self.leaf_offset[leaf] : self.leaf_offset[leaf + 1]]

    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.code, *self.parent, *self.first_child, self.leaf_offset, self.leaf_items))
