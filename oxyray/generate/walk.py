"""From the root of the prefix index to its leaves, level by level: what beam search and sampling share (paper 3.2).

A beam is a node of the index, so an illegal prefix cannot be written down. Each level lists the legal children of the live beams, runs the
decoder, scores those children, and lets a rule choose which of them live on. Under children normalisation an only child is certain, so the
last forward leaves out the beams that have one.

Legend: B requests, W live beams a request, K beams chosen, L levels, M = B*W states, P (state, child) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from oxyray.generate.pools import Legal
from oxyray.generate.score import Normalise, Pairs, logprobs
from oxyray.generate.steps import Steps
from oxyray.model.head import Tree, spread
from oxyray.model.layers import Tensor

_section = torch.profiler.record_function


@dataclass(frozen=True)
class Candidates:
    """The children that a rule chooses from. Pairs stand in the order of requests; `total_P` is the log-probability of the whole prefix,
    child included; `root_P` the first node of its path."""

    level: int
    requests: int
    request_P: Tensor
    pairs: Pairs
    logprob_P: Tensor
    total_P: Tensor
    root_P: Tensor


# Chosen pairs of each request, best first: (B, K), -1 where there are none left. A rule may also change the log-probabilities.
Rule = Callable[[Candidates], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Walked:
    """Leaves of the index, (B, K), -1 where a request has fewer; each token's log-probability (0 there); and, of the walk in fixed shapes,
    by what they were chosen (-inf there)."""

    leaf_BK: Tensor
    logprob_BKL: Tensor
    score_BK: Tensor | None = None


@torch.no_grad()
def walk(steps: Steps, legal: Legal, rule: Rule, normalise: Normalise = "children", temperature: float = 1.0) -> Walked:
    tree, hidden_BKD = steps.tree, steps.hidden_BKD
    requests, device = len(hidden_BKD), hidden_BKD.device
    node_BW = root_BW = torch.zeros(requests, 1, dtype=torch.long, device=device)
    logprob_BWL = hidden_BKD.new_zeros(requests, 1, 0)
    origin_BW: Tensor | None = None
    for level in range(tree.levels):
        width = node_BW.shape[1]
        with _section("generate/trie"):
            pairs = _children(tree, legal, level, node_BW)
        logprob_P = _scored(steps, level, node_BW, origin_BW, pairs, normalise, temperature)
        with _section("generate/choose"):
            total_P = logprob_BWL.sum(-1).flatten()[pairs.state_P] + logprob_P
            root_P = root_BW.flatten()[pairs.state_P] if level else pairs.child_P
            picked_BK, logprob_P = rule(Candidates(level, requests, pairs.state_P // width, pairs, logprob_P, total_P, root_P))
            real_BK, place_BK = picked_BK >= 0, picked_BK.clamp(min=0)
            if not len(logprob_P):  # every item of every request is excluded
                return Walked(torch.full_like(picked_BK, -1), logprob_P.new_zeros(*picked_BK.shape, tree.levels))
            origin_BW = pairs.state_P[place_BK] % width
            before_BKL = logprob_BWL.gather(1, origin_BW[..., None].expand(-1, -1, level))
            logprob_BWL = torch.cat([before_BKL, torch.where(real_BK, logprob_P[place_BK], 0.0)[..., None]], dim=2)
            node_BW, root_BW = torch.where(real_BK, pairs.child_P[place_BK], -1), root_P[place_BK]
    return Walked(node_BW, torch.where(node_BW[..., None] >= 0, logprob_BWL, 0.0))


def _children(tree: Tree, legal: Legal, level: int, node_BW: Tensor) -> Pairs:
    """The legal children of each live node; at the first level, of the root."""
    node_M = node_BW.flatten()
    if level == 0:
        first_M, count_M = node_M, torch.full_like(node_M, tree.nodes(0))
    else:
        first_M, count_M = tree.children_of(level - 1, node_M.clamp(min=0))
        count_M = torch.where(node_M >= 0, count_M, 0)
    pairs = Pairs(*spread(first_M, count_M), len(node_M))
    keep_P = legal.keep(level, pairs.state_P // node_BW.shape[1], pairs.child_P)
    return pairs if keep_P is None else pairs.where(keep_P)


def _scored(
    steps: Steps, level: int, node_BW: Tensor, origin_BW: Tensor | None, pairs: Pairs, normalise: Normalise, temperature: float
) -> Tensor:
    """Feed the live nodes to the decoder, but for those that need no forward, and score their children: log-probabilities (P,)."""
    tree, (requests, width) = steps.tree, node_BW.shape
    forward = width
    if level and level == tree.levels - 1 and normalise == "children":
        several_M = pairs.count_M() > 1
        several_BW = several_M.view(requests, width)
        forward = int(several_BW.sum(1).max())
    if forward == 0:
        return steps.hidden_BKD.new_zeros(len(pairs.child_P))
    asked, several_P = pairs, None
    with _section("generate/decoder"):
        if forward < width:
            place_BN = several_BW.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :forward]
            first_B1 = torch.arange(requests, device=node_BW.device)[:, None]
            slot_M = torch.zeros_like(node_BW).scatter(1, place_BN, first_B1 * forward + torch.arange(forward, device=node_BW.device))
            several_P = several_M[pairs.state_P]
            asked = pairs.where(several_P)
            asked = Pairs(slot_M.flatten()[asked.state_P], asked.child_P, requests * forward)
            node_BW = node_BW.gather(1, place_BN)
            origin_BW = None if origin_BW is None else origin_BW.gather(1, place_BN)
        if level:
            steps.advance(level - 1, node_BW.clamp(min=0), origin_BW if level > 1 else None)
    with _section("generate/head"):
        hidden_MD = steps.hidden_BKD.flatten(0, 1)
        logprob_P = logprobs(hidden_MD, steps.outputs(level), tree, level, asked, normalise, temperature)
    if several_P is None:
        return logprob_P
    return logprob_P.new_zeros(len(several_P)).masked_scatter(several_P, logprob_P)


def best(score_P: Tensor, request_P: Tensor, requests: int, beams: int) -> tuple[Tensor, Tensor]:
    """Top pairs of each request: scores (B, K) and pair numbers (B, K), -inf and -1 where a request has fewer. Pairs stand in the order of
    requests."""
    count_B = torch.bincount(request_P, minlength=requests)
    first_B = torch.cumsum(count_B, 0) - count_B
    width = int(count_B.max())
    if width * requests == len(score_P):
        padded_BC = score_P.view(requests, width)
    else:
        padded_BC = score_P.new_full((requests, max(width, 1)), -torch.inf)
        padded_BC[request_P, torch.arange(len(score_P), device=score_P.device) - first_B[request_P]] = score_P
    score_BK, place_BK = padded_BC.topk(min(beams, padded_BC.shape[1]), dim=1)
    return score_BK, torch.where(score_BK > -torch.inf, place_BK + first_B[:, None], -1)
