"""Attention over documents packed end to end, without padding (paper 2.3): one description of who sees whom, for all masks of the model.

A query sees a stretch of keys that begins where the keys of its document begin. How far the stretch *reaches* is all that differs:

    bidirectional            every key of the document
    causal                   up to the query's own place
    prefix, then causal      the same, but no less than the prefix (an instruction whose tokens see one another)
    cross-attention          as many of the other side's tokens as had come before the query

`attend` works document by document: nothing is computed between two documents, documents of one shape go through one call, and a mask is
made only where the reach is neither of the first two forms. Short causal documents of like length share a call too: what is put behind
the shorter ones is hidden by the causal mask itself. `mask` is the plain meaning, for tests and for whoever wants to look.

Legend: B documents, Q queries and K keys of all documents, n and m those of one, g documents of one shape, H heads, G heads of keys,
E head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch.nn import functional as F

Tensor = torch.Tensor
_CALL = 4096  # pairs of query and key that cost about as much as one call more
Form = Literal["full", "causal", "other"]


@dataclass(frozen=True)
class Shape:
    """Documents that are computed in one call: those at `rows`, each with `queries` and `keys`, or causal and no longer than that."""

    queries: int
    keys: int
    form: Form
    rows: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Call:
    """How a shape's documents are taken and put back. `query` and `key` are a range of tokens, or the token at each place of (g, n);
    `real_X` are the places with a token of their own, None: all. The mask, and where it shows anything, are for the form `other`."""

    shape: Shape
    query: slice | Tensor
    key: slice | Tensor
    real_X: Tensor | None
    mask_g1nm: Tensor | None
    sees_g1n1: Tensor | None


@dataclass(frozen=True, eq=False)
class Documents:
    """`query_offset_B` and `key_offset_B` are cumulative with a leading 0 (B + 1 long); `reach_Q` is how many of its document's keys each
    query sees."""

    query_offset_B: Tensor
    key_offset_B: Tensor
    reach_Q: Tensor

    @classmethod
    def bidirectional(cls, offset_B: Tensor) -> Documents:
        length_B = torch.diff(offset_B)
        return cls(offset_B, offset_B, length_B.repeat_interleave(length_B))

    @classmethod
    def causal(cls, offset_B: Tensor, prefix_B: Tensor | None = None) -> Documents:
        """With `prefix_B`, the first so many tokens of each document see one another."""
        length_B = torch.diff(offset_B)
        reach_Q = torch.arange(int(offset_B[-1]), device=offset_B.device) - offset_B[:-1].repeat_interleave(length_B) + 1
        if prefix_B is not None:
            reach_Q = torch.maximum(reach_Q, torch.minimum(prefix_B, length_B).repeat_interleave(length_B))
        return cls(offset_B, offset_B, reach_Q)

    @classmethod
    def across(cls, query_offset_B: Tensor, key_offset_B: Tensor, reach_Q: Tensor | None = None) -> Documents:
        """Cross-attention, to all keys of the document where no reach is given."""
        if reach_Q is None:
            reach_Q = torch.diff(key_offset_B).repeat_interleave(torch.diff(query_offset_B))
        return cls(query_offset_B, key_offset_B, reach_Q)

    def mask(self) -> Tensor:
        """(Q, K): True where a query sees a key."""
        begin_Q = self.key_offset_B[:-1].repeat_interleave(torch.diff(self.query_offset_B))
        key_K = torch.arange(int(self.key_offset_B[-1]), device=begin_Q.device)
        return (key_K >= begin_Q[:, None]) & (key_K < (begin_Q + self.reach_Q)[:, None])

    @cached_property
    def shapes(self) -> list[Shape]:
        """Every document in one of them, but those without a query. Costs a look at the offsets, once for all layers."""
        query_B, key_B = torch.diff(self.query_offset_B), torch.diff(self.key_offset_B)
        document_Q = torch.repeat_interleave(query_B)
        place_Q = torch.arange(len(self.reach_Q), device=query_B.device) - self.query_offset_B[document_Q]

        def all_of(true_Q: Tensor) -> Tensor:
            return torch.ones_like(query_B, dtype=torch.bool).index_put((document_Q[~true_Q],), torch.tensor(False, device=query_B.device))

        full_B, causal_B = all_of(self.reach_Q == key_B[document_Q]), all_of(self.reach_Q == place_Q + 1) & (query_B == key_B)
        found: dict[tuple[int, int, Form], list[int]] = {}
        told = zip(query_B.tolist(), key_B.tolist(), full_B.tolist(), causal_B.tolist(), strict=True)
        for row, (queries, keys, full, causal) in enumerate(told):
            if queries:
                found.setdefault((queries, keys, "full" if full else "causal" if causal else "other"), []).append(row)
        return _joined([Shape(*shape, tuple(rows)) for shape, rows in found.items()])

    @cached_property
    def calls(self) -> list[Call]:
        """The shapes, and where their tokens lie: made once for all layers, so that these wait for no GPU."""
        query_offset, key_offset = self.query_offset_B.tolist(), self.key_offset_B.tolist()
        return [_call(self, query_offset, key_offset, shape) for shape in self.shapes]

    @cached_property
    def order_Q(self) -> Tensor | None:
        """Where each query stands when shape follows shape; None where that is its own place."""
        rows = [row for shape in self.shapes for row in shape.rows]
        if rows == sorted(rows):
            return None
        length_B = torch.diff(self.query_offset_B)[rows]
        start_B = torch.zeros_like(self.query_offset_B[:-1])
        start_B[rows] = length_B.cumsum(0) - length_B
        document_Q = torch.repeat_interleave(torch.diff(self.query_offset_B))
        return torch.arange(len(self.reach_Q), device=start_B.device) - self.query_offset_B[document_Q] + start_B[document_Q]


def attend(q_QHE: Tensor, k_KGE: Tensor, v_KGE: Tensor, documents: Documents, dropout: float = 0.0) -> Tensor:
    """Softmax attention, scaled by 1 / sqrt(E): (Q, H, E). Keys may have fewer heads (H a multiple of G): then H / G neighbouring heads of
    the query look at the same. A query that sees nothing gets zeros."""
    heads, width = q_QHE.shape[1:]
    grouped = k_KGE.shape[1] != heads
    mixed = []
    for call in documents.calls:
        shape = call.shape
        if shape.keys == 0:
            mixed.append(q_QHE.new_zeros(len(shape.rows) * shape.queries, heads, width))
            continue
        q_gHnE = _stacked(q_QHE, call.query, shape.queries)
        k_gGmE, v_gGmE = (_stacked(x, call.key, shape.keys) for x in (k_KGE, v_KGE))
        out_gHnE = F.scaled_dot_product_attention(
            q_gHnE, k_gGmE, v_gGmE, call.mask_g1nm, dropout, shape.form == "causal", enable_gqa=grouped
        )
        if call.sees_g1n1 is not None:
            out_gHnE = torch.where(call.sees_g1n1, out_gHnE, 0)
        out_XHE = out_gHnE.transpose(1, 2).flatten(0, 1)
        mixed.append(out_XHE if call.real_X is None else out_XHE.index_select(0, call.real_X))
    if not mixed:
        return q_QHE
    out_QHE = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
    return out_QHE if documents.order_Q is None else out_QHE.index_select(0, documents.order_Q)


def _stacked(x_NHE: Tensor, where: slice | Tensor, length: int) -> Tensor:
    """(g, H, n, E), a view where the documents are neighbours."""
    found = x_NHE[where] if isinstance(where, slice) else x_NHE.index_select(0, where)
    return found.unflatten(0, (-1, length)).transpose(1, 2)


def _joined(shapes: list[Shape]) -> list[Shape]:
    """Causal shapes of like length as one, where what is computed for nothing costs less than the call that is saved."""
    causal = sorted((shape for shape in shapes if shape.form == "causal"), key=lambda shape: -shape.queries)
    joined: list[Shape] = []
    for shape in causal:
        longest = joined[-1].queries if joined else 0
        if joined and len(shape.rows) * (longest**2 - shape.queries**2) < _CALL:
            joined[-1] = Shape(longest, longest, "causal", tuple(sorted(joined[-1].rows + shape.rows)))
        else:
            joined.append(shape)
    found = joined + [shape for shape in shapes if shape.form != "causal"]
    return sorted(found, key=lambda shape: shape.rows[0])  # in the documents' order where it can be: then nothing is to be put back


def _call(documents: Documents, query_offset: list[int], key_offset: list[int], shape: Shape) -> Call:
    device = documents.reach_Q.device
    lengths = torch.tensor([query_offset[row + 1] - query_offset[row] for row in shape.rows])
    real_gn = torch.arange(shape.queries) < lengths[:, None]
    mask = _mask(documents, query_offset, shape) if shape.form == "other" and shape.keys else None
    return Call(
        shape,
        _places(query_offset, shape.rows, shape.queries, device),
        _places(key_offset, shape.rows, shape.keys, device),
        None if bool(real_gn.all()) else real_gn.flatten().nonzero()[:, 0].to(device),
        mask,
        None if mask is None else mask.any(-1, keepdim=True),
    )


def _places(offset: list[int], rows: tuple[int, ...], length: int, device: torch.device) -> slice | Tensor:
    """Where the rows' documents lie; shorter ones repeat their last token."""
    first, end = offset[rows[0]], offset[rows[-1] + 1]
    if end - first == length * len(rows) and len(rows) == rows[-1] - rows[0] + 1:
        return slice(first, end)
    start_g, end_g = (torch.tensor([offset[row + more] for row in rows]) for more in (0, 1))
    place_gn = start_g[:, None] + torch.arange(length)
    return torch.minimum(place_gn, end_g[:, None] - 1).flatten().to(device)


def _mask(documents: Documents, offset: list[int], shape: Shape) -> Tensor:
    """(g, 1, n, m)."""
    reach_gn = torch.stack([documents.reach_Q[offset[row] : offset[row + 1]] for row in shape.rows])
    return (torch.arange(shape.keys, device=reach_gn.device) < reach_gn[..., None])[:, None]
