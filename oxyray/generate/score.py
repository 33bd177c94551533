"""Scoring the children of the live beams, and nothing else.

The children of M prefixes are a ragged set of pairs. Few of them: dot products at exactly those places of the (M, V) matrix, a sampled
product in CSR form. Many: the dense product, in slices. Probabilities over the whole vocabulary also need the log of its sum of
exponentials: of the dense product in blocks that stay in the cache, which is never written out.

Legend: M states (prefixes), P (state, child) pairs in the order of states, V rows of the output matrix, D width.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from oxyray.errors import GenerationError
from oxyray.generate.steps import Outputs
from oxyray.model.head import Tree, ragged_logsumexp
from oxyray.model.layers import Tensor, precise

Normalise = Literal["children", "vocabulary"]

# One pair of the sampled product costs as much as so many entries of the dense one (measured on a CPU, width 256).
_PAIR_COST = 8
# Numbers in a slice of the dense product: 4 MB of float32.
_SLICE = 1 << 20
# States and codes of a block of it, 1 MB of float32 (measured on a CPU; on a GPU a block is a slice).
_BLOCK = (512, 512)

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


@dataclass(frozen=True)
class Pairs:
    """Children of M states: pair p is child (a node) `child_P[p]` of state `state_P[p]`."""

    state_P: Tensor
    child_P: Tensor
    states: int

    def where(self, keep_P: Tensor) -> Pairs:
        return Pairs(self.state_P[keep_P], self.child_P[keep_P], self.states)

    def count_M(self) -> Tensor:
        return torch.bincount(self.state_P, minlength=self.states)

    def normalised(self, logit_P: Tensor) -> Tensor:
        """Log-probabilities over each state's pairs."""
        return logit_P - ragged_logsumexp(logit_P, self.state_P, self.states)[self.state_P]


def logprobs(hidden_MD: Tensor, outputs: Outputs, tree: Tree, level: int, pairs: Pairs, normalise: Normalise, temperature: float) -> Tensor:
    """Log-probability of each pair's child given its state, at `temperature`: over the state's pairs, or over the whole vocabulary."""
    check_normalise(outputs, normalise)
    row_P = tree.code_of(level, pairs.child_P) if outputs.by_code else pairs.child_P
    product = _dense if len(row_P) * _PAIR_COST > len(hidden_MD) * len(outputs.vector_nD) else _sampled
    logit_P = product(hidden_MD, outputs.vector_nD, pairs, row_P)
    if normalise == "vocabulary":
        return logit_P / temperature - log_total(hidden_MD / temperature, outputs.vector_nD)[pairs.state_P]
    if outputs.had is not None:
        request_P = pairs.state_P // (pairs.states // outputs.had.queries)
        logit_P = outputs.had.add(level, request_P, pairs.child_P, logit_P)
    return pairs.normalised(logit_P if temperature == 1 else logit_P / temperature)


def check_normalise(outputs: Outputs, normalise: Normalise) -> None:
    """Raise GenerationError where the outputs give no probabilities over the whole vocabulary."""
    if normalise == "vocabulary" and outputs.had is not None:
        raise GenerationError("generate.normalise=vocabulary does not know what was had already: it needs model.repeats=false")
    if normalise == "vocabulary" and not outputs.by_code:
        raise GenerationError("generate.normalise=vocabulary needs model.head=codes: the tied head scores children only")


def _sampled(hidden_MD: Tensor, vector_VD: Tensor, pairs: Pairs, row_P: Tensor) -> Tensor:
    """Logits of the pairs alone: (P,)."""
    offset_M1 = torch.nn.functional.pad(torch.cumsum(pairs.count_M(), 0), (1, 0))
    places = torch.sparse_csr_tensor(
        offset_M1, row_P, hidden_MD.new_zeros(len(row_P)), (len(hidden_MD), len(vector_VD)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(places, hidden_MD, vector_VD.T, beta=0.0).values()


def _dense(hidden_MD: Tensor, vector_VD: Tensor, pairs: Pairs, row_P: Tensor) -> Tensor:
    """The same by the whole product."""
    states, width = len(hidden_MD), len(vector_VD)
    logit_P = hidden_MD.new_empty(len(row_P))
    rows = min(max(1, _SLICE // width), states)
    buffer = hidden_MD.new_empty(rows, width)
    bounds = torch.searchsorted(pairs.state_P, torch.arange(0, states + rows, rows, device=row_P.device)).tolist()
    for first, start, stop in zip(range(0, states, rows), bounds, bounds[1:], strict=False):
        logit_RV = torch.mm(hidden_MD[first : first + rows], vector_VD.T, out=buffer[: min(rows, states - first)])
        logit_P[start:stop] = logit_RV[pairs.state_P[start:stop] - first, row_P[start:stop]]
    return logit_P


def dense_product(hidden_RD: Tensor, vector_CD: Tensor) -> Tensor:
    """All logits, (R, C), in float32 at least: of rounded ones many would be equal."""
    if hidden_RD.is_cuda and hidden_RD.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden_RD, vector_CD.T, out_dtype=torch.float32)
    return precise(hidden_RD) @ precise(vector_CD).T


def log_total(hidden_MD: Tensor, vector_VD: Tensor) -> Tensor:
    """Log of the sum of the exponentials of all logits of each state: (M,)."""
    rows, codes = _BLOCK if hidden_MD.is_cpu else (max(1, _SLICE // len(vector_VD)), len(vector_VD))
    total_M = precise(hidden_MD.new_empty(len(hidden_MD)))
    narrow = hidden_MD.dtype != total_M.dtype
    for first in range(0, len(hidden_MD), rows):
        hidden_RD = hidden_MD[first : first + rows]
        buffer = hidden_MD.new_empty(len(hidden_RD), min(codes, len(vector_VD)))
        top_R, sum_R = total_M.new_full((len(hidden_RD),), -torch.inf), total_M.new_zeros(len(hidden_RD))
        for vector_CD in vector_VD.split(codes):
            into = None if narrow else buffer[:, : len(vector_CD)]
            logit_RC = dense_product(hidden_RD, vector_CD) if into is None else torch.mm(hidden_RD, vector_CD.T, out=into)
            higher_R = torch.maximum(top_R, logit_RC.amax(-1))
            sum_R = sum_R * (top_R - higher_R).exp_() + logit_RC.sub_(higher_R[:, None]).exp_().sum(-1)
            top_R = higher_R
        total_M[first : first + rows] = sum_R.log_().add_(top_R)
    return total_M
