"""How probable given SIDs are: the log-probability of each token over the legal children of its prefix, with gradient (paper 2.4.3).

The candidates of a request are paths in one tree, and what they share is computed once: the history, the prompt, and each prefix, however
many candidates go on from it. A prefix with one legal child is certain of it and is not computed, unless a longer one needs its keys.

Legend: B requests, G candidates, W distinct prefixes of a request (padded), M = B*W states, P (state, child) pairs, C candidates that are
asked for at a level, L levels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional as F

from oxyray.errors import GenerationError
from oxyray.model.head import Tree, ragged_logsumexp, spread
from oxyray.model.layers import Tensor, precise

if TYPE_CHECKING:
    from oxyray.model.policy import Decoding, Policy


class Legality(Protocol):
    """Which nodes a request may walk through: its pool, less what it must not get."""

    def keep(self, level: int, request_P: Tensor, node_P: Tensor) -> Tensor | None:
        """A bool for each pair of request and node; None: all may."""


def path_logprob(policy: Policy, decoding: Decoding, path_BGL: Tensor, legal: Legality | None, temperature: float) -> Tensor:
    """Log-probabilities (B, G, L) of the tokens of given paths, from a decoding that has just started; see `Policy.logprob`."""
    levels, real_BG, node_BGL = path_BGL.shape[2], path_BGL[..., -1] >= 0, path_BGL.clamp(min=0)
    found = [_first(policy, decoding, node_BGL[..., 0], real_BG, legal, temperature)]
    asked = _asked(policy.tree, node_BGL, real_BG, legal)
    before_BW: Tensor | None = None
    for level in range(1, levels):
        above = _Prefixes(policy.tree, level, node_BGL[..., level - 1], asked[level], legal)
        policy.advance(decoding, level - 1, above.node_BW, None if before_BW is None else above.continues(before_BW))
        before_BW = above.node_BW
        place_C = asked[level].flatten().nonzero()[:, 0]
        token_C = _token(policy, decoding, level, above, above.pair_of(node_BGL[..., level]).flatten()[place_C], temperature)
        found.append(token_C.new_zeros(real_BG.numel()).index_put((place_C,), token_C).view(real_BG.shape))
    return torch.stack(found, dim=-1)


class _Prefixes:
    """The distinct prefixes of the asked-for candidates, as nodes in order (`node_BW`; the last stands again where a request has fewer),
    which of them each candidate continues (`place_BG`; any where it is not asked for), and their legal children, in order."""

    def __init__(self, tree: Tree, level: int, node_BG: Tensor, asked_BG: Tensor, legal: Legality | None) -> None:
        last_B1 = node_BG.masked_fill(~asked_BG, 0).amax(1, keepdim=True)
        sorted_BG = torch.where(asked_BG, node_BG, last_B1).sort(dim=1).values
        rank_BG = F.pad((sorted_BG[:, 1:] != sorted_BG[:, :-1]).cumsum(1), (1, 0))
        self.node_BW = last_B1.repeat(1, int(rank_BG.max()) + 1).scatter(1, rank_BG, sorted_BG)
        requests, width = self.node_BW.shape
        self.place_BG = torch.searchsorted(self.node_BW, node_BG.contiguous()).clamp(max=width - 1)
        self.tree, self.level, self.states = tree, level, requests * width
        first_M, count_M = tree.children_of(level - 1, self.node_BW.flatten())
        again_BW = F.pad(self.node_BW[:, 1:] == self.node_BW[:, :-1], (1, 0))
        self.state_P, self.child_P = spread(first_M, count_M.masked_fill(again_BW.flatten(), 0))
        keep_P = None if legal is None else legal.keep(level, self.request_P, self.child_P)
        if keep_P is not None:
            self.state_P, self.child_P = self.state_P[keep_P], self.child_P[keep_P]

    @property
    def request_P(self) -> Tensor:
        return self.state_P // self.node_BW.shape[1]

    def continues(self, before_BW: Tensor) -> Tensor:
        """Which of the shorter prefixes each one continues: (B, W)."""
        parent_BW = self.tree.parent_of(self.level - 1, self.node_BW)
        return torch.searchsorted(before_BW, parent_BW).clamp(max=before_BW.shape[1] - 1)

    def children_BG(self) -> Tensor:
        """How many legal children the prefix of each candidate has."""
        return torch.bincount(self.state_P, minlength=self.states).view_as(self.node_BW).gather(1, self.place_BG)

    def pair_of(self, child_BG: Tensor) -> Tensor:
        """The pair of each candidate's next node, -1 where that is not a legal child of its prefix: (B, G)."""
        if not len(self.state_P):
            return torch.full_like(child_BG, -1)
        state_BG = self.place_BG + self.node_BW.shape[1] * torch.arange(len(child_BG), device=child_BG.device)[:, None]
        nodes = self.tree.nodes(self.level)
        key_P, wanted_BG = self.state_P * nodes + self.child_P, state_BG * nodes + child_BG
        pair_BG = torch.searchsorted(key_P, wanted_BG).clamp(max=len(key_P) - 1)
        return torch.where(key_P[pair_BG] == wanted_BG, pair_BG, -1)


def _asked(tree: Tree, node_BGL: Tensor, real_BG: Tensor, legal: Legality | None) -> list[Tensor]:
    """For each level, whose prefix must be computed: it has several legal children, or a longer one must be. Raises GenerationError for a
    candidate that is not legal."""
    open_BG = [torch.zeros_like(real_BG)]
    for level in range(1, node_BGL.shape[2]):
        above = _Prefixes(tree, level, node_BGL[..., level - 1], real_BG, legal)
        _refuse(real_BG & (above.pair_of(node_BGL[..., level]) < 0), level)
        open_BG.append(real_BG & (above.children_BG() > 1))
    return [torch.stack(open_BG[level:]).any(0) for level in range(len(open_BG))]


def _first(policy: Policy, decoding: Decoding, node_BG: Tensor, real_BG: Tensor, legal: Legality | None, temperature: float) -> Tensor:
    """Of the first codes: (B, G). All requests score the same nodes."""
    requests, nodes = len(node_BG), policy.tree.nodes(0)
    child_N = torch.arange(nodes, device=node_BG.device)
    with torch.autocast(node_BG.device.type, enabled=False):
        vector_ND = precise(decoding.shelf.vectors[0][policy.head.rows(policy.tree, 0, child_N)])
        logit_BN = precise(decoding.hidden_BKD[:, 0]) @ vector_ND.T
    if decoding.had is not None:
        logit_BN = decoding.had.add_all(0, logit_BN)
    logit_BN = logit_BN / temperature
    if legal is not None:
        request_P = torch.arange(requests, device=node_BG.device).repeat_interleave(nodes)
        keep_P = legal.keep(0, request_P, child_N.repeat(requests))
        if keep_P is not None:
            keep_BN = keep_P.view(requests, nodes)
            _refuse(real_BG & ~keep_BN.gather(1, node_BG), 0)
            logit_BN = logit_BN.masked_fill(~keep_BN, -torch.inf)
    token_BG = logit_BN.log_softmax(-1).gather(1, node_BG)
    return torch.where(real_BG, token_BG, 0)


def _token(policy: Policy, decoding: Decoding, level: int, above: _Prefixes, pair_C: Tensor, temperature: float) -> Tensor:
    """Of the candidates' tokens of a later level: (C,)."""
    hidden_MD = decoding.hidden_BKD.flatten(0, 1)
    row_P = policy.head.rows(policy.tree, level, above.child_P)
    vector_PD = precise(decoding.shelf.vectors[level].index_select(0, row_P))
    logit_P = (precise(hidden_MD).index_select(0, above.state_P) * vector_PD).sum(-1)
    if decoding.had is not None:
        logit_P = decoding.had.add(level, above.request_P, above.child_P, logit_P)
    logit_P = logit_P / temperature
    total_M = ragged_logsumexp(logit_P, above.state_P, above.states)
    return logit_P.index_select(0, pair_C) - total_M.index_select(0, above.state_P[pair_C])


def _refuse(illegal_BG: Tensor, level: int) -> None:
    """Raise GenerationError where a candidate is not legal at its level."""
    if bool(illegal_BG.any()):
        raise GenerationError(
            f"candidate of request {int(illegal_BG.any(1).nonzero()[0])} is not legal at level {level + 1}: its item is not in the "
            "request's pool"
        )
