"""The prefix index: every legal SID prefix as flat arrays.

The distinct SIDs, sorted, form a tree whose level-l nodes are the distinct prefixes of length l+1. Children of a node are contiguous, so
one offset array a level describes any ragged fan-out exactly. Decoding walks it; the tied head averages item vectors over it; nothing else
is needed to guarantee that only real items are generated (paper 3.2, prefix-constrained decoding).

Every array has the smallest unsigned type that holds it, and what follows from another array is not stored: a node's parent is found in
the offsets, the items of a leaf in running sums of their counts. Ten million items take about 75 MB. The price: these arrays are for
looking up (`index.code[l][nodes]`), and what is looked up is widened before any arithmetic.

Legend: I items, L levels, n_l nodes at level l, N nodes or leaves asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oxyray.errors import CatalogueError

Array = np.ndarray

# Item counts of leaves are summed from the start of their block.
_BLOCK = 64


@dataclass(frozen=True, eq=False)
class PrefixIndex:
    """`code[l][n]` is node n's own code; its children at level l+1 are the range `first_child[l][n] : first_child[l][n + 1]`. The items of
    leaf n are `leaf_count[n]` entries of `leaf_items` (item indices, ascending within a leaf) from `first_item(n)` on."""

    width: int
    code: tuple[Array, ...]
    first_child: tuple[Array, ...]
    leaf_count: Array
    block_start: Array
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
        if items_I.shape != (len(codes_IL),) or items_I.min() < 0:
            raise CatalogueError(f"each SID belongs to one item; got {len(codes_IL)} SIDs and items of shape {items_I.shape}")
        sorted_LI, items_I = _sorted(codes_IL, items_I, width)
        code, first_child = [], []
        above: Array | None = None  # where the nodes of the level above start
        starts_new = np.zeros(len(items_I), dtype=bool)
        starts_new[0] = True
        for codes_I in sorted_LI:
            starts_new[1:] |= codes_I[1:] != codes_I[:-1]
            first = np.flatnonzero(starts_new)
            code.append(codes_I[first])
            if above is not None:
                first_child.append(_small(np.append(np.searchsorted(first, above), len(first))))
            above = first
        leaf_count = np.diff(first, append=len(items_I))
        return cls(width, tuple(code), tuple(first_child), _small(leaf_count), _small(first[::_BLOCK]), _small(items_I))

    @property
    def levels(self) -> int:
        return len(self.code)

    @property
    def leaves(self) -> int:
        """Number of distinct SIDs."""
        return len(self.code[-1])

    @property
    def parent(self) -> tuple[Array, ...]:
        """The parent of every node, level by level (zeros at the first), made anew: int64 arrays of n_l."""
        fan_out: list[Array] = [np.diff(first.astype(np.int64)) for first in self.first_child]
        return (np.zeros(len(self.code[0]), np.int64), *(np.repeat(np.arange(len(fan)), fan) for fan in fan_out))

    def children(self, level: int, node_N: Array) -> tuple[Array, Array]:
        """First child (a node of level + 1) of each node, and the node behind its last: (N,) each, int64."""
        first = self.first_child[level]
        return first[node_N].astype(np.int64), first[np.asarray(node_N) + 1].astype(np.int64)

    def first_item(self, leaf_N: Array) -> Array:
        """Where the items of each leaf start in `leaf_items`; `leaves` itself gives the end: (N,), int64."""
        leaf_N = np.asarray(leaf_N, dtype=np.int64)
        block_N = np.minimum(leaf_N // _BLOCK, len(self.block_start) - 1)
        place_NB = block_N[:, None] * _BLOCK + np.arange(_BLOCK + 1)  # one more: `leaves` may stand behind a full block
        before_NB = (place_NB < leaf_N[:, None]) * self.leaf_count[np.minimum(place_NB, self.leaves - 1)].astype(np.int64)
        return self.block_start[block_N].astype(np.int64) + before_NB.sum(1)

    def item_leaf(self) -> Array:
        """The leaf of each entry of `leaf_items`: (I,), int64."""
        return np.repeat(np.arange(self.leaves), self.leaf_count)

    def node_path(self, leaf_N: Array) -> Array:
        """Nodes on the way to each leaf: (N, L), level by level."""
        path = [np.asarray(leaf_N, dtype=np.int64)]
        for first in reversed(self.first_child):
            path.append(np.searchsorted(first, path[-1].astype(first.dtype), side="right") - 1)
        return np.stack(path[::-1], axis=1)

    def codes_of(self, leaf_N: Array) -> Array:
        """The SID of each leaf: (N, L), int32."""
        path_NL = self.node_path(leaf_N)
        return np.stack([code[path_NL[:, level]] for level, code in enumerate(self.code)], axis=1).astype(np.int32)

    def leaf_of(self, codes_NL: Array) -> Array:
        """The leaf of each SID, -1 where no item has it: (N,)."""
        codes_NL = np.asarray(codes_NL, dtype=np.int64)
        if codes_NL.ndim != 2 or codes_NL.shape[1] != self.levels:
            raise CatalogueError(f"SIDs here have {self.levels} levels; got shape {codes_NL.shape}")
        low_N, high_N = np.zeros(len(codes_NL), dtype=np.int64), np.full(len(codes_NL), len(self.code[0]))
        found_N = np.ones(len(codes_NL), dtype=bool)
        for level, code in enumerate(self.code):
            want_N = codes_NL[:, level]
            node_N = np.minimum(_first_at_least(code, low_N, high_N, want_N), len(code) - 1)
            found_N &= (node_N < high_N) & (code[node_N] == want_N)
            if level + 1 < self.levels:
                low_N, high_N = self.children(level, node_N)
        return np.where(found_N, node_N, -1)

    def ranked_items(self, order_I: Array) -> Array:
        """`leaf_items` with the items of each leaf in the order of the tie-break: larger `order_I` first, then the smaller item index."""
        return self.leaf_items[np.lexsort((self.leaf_items, -order_I[self.leaf_items], self.item_leaf()))]

    def items_of(self, leaf: int) -> Array:
        """Item indices that share this SID, ascending: int64."""
        first = int(self.first_item(np.array([leaf]))[0])
        return self.leaf_items[first : first + int(self.leaf_count[leaf])].astype(np.int64)

    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.code, *self.first_child, self.leaf_count, self.block_start, self.leaf_items))


def _small(values: Array) -> Array:
    """The same whole numbers in the smallest unsigned type that holds them."""
    return values.astype(np.min_scalar_type(int(values.max())))


def _sorted(codes_IL: Array, items_I: Array, width: int) -> tuple[list[Array], Array]:
    """Codes, level by level, and items in the order of SIDs, then of items. Packed into one 64-bit number an item where that fits: sorting
    those is several times faster than sorting by columns."""
    levels, small = codes_IL.shape[1], np.min_scalar_type(width - 1)
    code_bits, item_bits = (width - 1).bit_length(), int(items_I.max()).bit_length()
    if levels * code_bits + item_bits > 64:
        order = np.lexsort((items_I, *(codes_IL[:, level] for level in reversed(range(levels)))))
        return [codes_IL[order, level].astype(small) for level in range(levels)], items_I[order]
    key_I = np.zeros(len(items_I), dtype=np.uint64)
    for level in range(levels):
        key_I = (key_I << np.uint64(code_bits)) | codes_IL[:, level].astype(np.uint64)
    key_I = (key_I << np.uint64(item_bits)) | items_I.astype(np.uint64)
    key_I.sort()
    shifts = [item_bits + code_bits * (levels - 1 - level) for level in range(levels)]
    mask = np.uint64((1 << code_bits) - 1)
    return [((key_I >> np.uint64(shift)) & mask).astype(small) for shift in shifts], key_I & np.uint64((1 << item_bits) - 1)


def _first_at_least(code: Array, low_N: Array, high_N: Array, want_N: Array) -> Array:
    """By bisection, the first place of `low : high` whose code is at least `want` (`high` where none is). Codes ascend in each range."""
    low_N, high_N = low_N.copy(), high_N.copy()
    while (open_N := low_N < high_N).any():
        middle_N = (low_N + high_N) // 2
        below_N = open_N & (code[np.minimum(middle_N, len(code) - 1)] < want_N)
        low_N = np.where(below_N, middle_N + 1, low_N)
        high_N = np.where(open_N & ~below_N, middle_N, high_N)
    return low_N
