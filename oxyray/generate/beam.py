"""Beam search over the prefix index: exact for any ragged fan-out, legal by construction (paper 3.2).
 Each step scores only the children of the live beams. A beam is a node of the index, so an illegal prefix cannot be written down. A pool is
a mask over nodes: a node is legal when an item below it is in the pool.

Legend: B requests, K beams, L levels, M = B*K states, P (state, child) pairs, n_l nodes of level l, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oxyray.data.batch import Batch
from oxyray.errors import GenerationError
from oxyray.model.head import Tree, ragged_logsumexp, spread
from oxyray.model.layers import Tensor
from oxyray.model.policy import Decoding, Policy, Rows


@dataclass(frozen=True)
class Beams:
    """`leaf_BK`: leaves of the index (distinct SIDs), best first, -1 where a pool has fewer than K; `logprob_BK`: their log-probability
    (-inf there)."""

    leaf_BK: Tensor
    logprob_BK: Tensor


@dataclass(frozen=True)
class Pool:
    """Legal nodes by level, `node[l]` a bool over the n_l nodes, and the items themselves: a legal SID may also have items outside the
    pool."""

    node: tuple[Tensor, ...]
    item_I: Tensor

    @classmethod
    def of_items(cls, tree: Tree, allowed_I: Tensor, name: str = "pool") -> Pool:
        """The pool of the items that `allowed_I` marks. Raises GenerationError when it marks none."""
        if not bool(allowed_I.any()):
            raise GenerationError(f"{name} holds no item of the catalogue: nothing can be generated for it")
        path_AL = tree.path_IL[allowed_I.nonzero().squeeze(1)]
        masks = []
        for level in range(tree.levels):
            mask = torch.zeros(len(tree.code(level)), dtype=torch.bool, device=path_AL.device)
            mask[path_AL[:, level]] = True
            masks.append(mask)
        return cls(tuple(masks), allowed_I)


@torch.no_grad()
def beam_search(policy: Policy, batch: Batch, rows: Rows, beams: int, pool: Pool | None = None, normalise: str = "children") -> Beams:
    """The `beams` most probable SIDs of each request of `batch` (one query a segment).

    `normalise`: `children` (a code's probability is over the prefix's legal children) or `vocabulary` (over the level's whole vocabulary).
    Policies with the tied head have no whole-vocabulary probabilities.
    """
    decoding = policy.start(batch, rows)
    tree, requests = policy.tree, len(decoding.hidden_BKD)
    root_M = torch.zeros(requests, dtype=torch.long, device=decoding.hidden_BKD.device)
    logprob_BK, node_BK = decoding.hidden_BKD.new_zeros(requests, 1), root_M[:, None]
    for level in range(tree.levels):
        first_M, count_M = (
            (root_M, root_M + len(tree.code(0))) if level == 0 else tree.children_of(level - 1, node_BK.clamp(min=0).flatten())
        )
        count_M = torch.where(node_BK.flatten() >= 0, count_M, 0)
        state_P, child_P = spread(first_M, count_M)
        if pool is not None:
            legal = pool.node[level][child_P]
            state_P, child_P = state_P[legal], child_P[legal]
        score_P = _score(policy, decoding, level, state_P, child_P, normalise) + logprob_BK.flatten()[state_P]
        width = node_BK.shape[1]
        logprob_BK, picked_BK = _best(score_P, state_P // width, requests, beams)
        node_BK = torch.where(picked_BK >= 0, child_P[picked_BK.clamp(min=0)], -1)
        if level + 1 < tree.levels:
            origin_BK = None if level == 0 else (state_P[picked_BK.clamp(min=0)] % width)
            policy.advance(decoding, level, node_BK.clamp(min=0), origin_BK)
    return Beams(node_BK, logprob_BK)


def _score(policy: Policy, decoding: Decoding, level: int, state_P: Tensor, child_P: Tensor, normalise: str) -> Tensor:
    """Log-probability of each child given its beam: (P,)."""
    hidden_MD = decoding.hidden_BKD.flatten(0, 1)
    if level == 0:  # every request scores the same nodes: one matrix product
        logit_P = (hidden_MD @ decoding.vectors[0].T)[state_P, child_P]
    else:
        logit_P = (hidden_MD[state_P] * decoding.vectors[level][child_P]).sum(-1)
    if normalise == "children":
        return logit_P - ragged_logsumexp(logit_P, state_P, len(hidden_MD))[state_P]
    if policy.head.tied:
        raise GenerationError("generate.normalise=vocabulary needs model.head=codes: the tied head scores children only")
    return logit_P - torch.logsumexp(hidden_MD @ policy.head.own[level].T, dim=-1)[state_P]


def _best(score_P: Tensor, request_P: Tensor, requests: int, beams: int) -> tuple[Tensor, Tensor]:
    """Top pairs of each request: scores (B, K) and pair numbers (B, K), -inf and -1 where a request has fewer. Pairs are in request
    order."""
    count_B = torch.bincount(request_P, minlength=requests)
    width = int(count_B.max()) if len(score_P) else 0
    offset_B = torch.cumsum(count_B, 0) - count_B
    slot_P = torch.arange(len(score_P), device=score_P.device) - offset_B[request_P]
    padded = score_P.new_full((requests, max(width, 1)), -torch.inf)
    padded[request_P, slot_P] = score_P
    score_BK, slot_BK = padded.topk(min(beams, padded.shape[1]), dim=1)
    return score_BK, torch.where(slot_BK < count_B[:, None], slot_BK + offset_B[:, None], -1)
