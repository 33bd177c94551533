"""Beam search over the prefix index: exact for any ragged fan-out, legal by construction (paper 3.2, xBeam).

Two normalisations. `children`: a code's probability is over the legal children of its prefix, so all legal SIDs sum to one. `vocabulary`:
over all codes of the level, as Hugging Face and STATIC do; what is not legal keeps its share.

Legend: B requests, K beams, P (state, child) pairs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from oxyray.generate.pools import Legal
from oxyray.generate.score import Normalise
from oxyray.generate.steps import Steps
from oxyray.generate.walk import Candidates, Walked, best, walk
from oxyray.model.layers import Tensor


@dataclass(frozen=True)
class Beams:
    """`leaf_BK`: leaves of the index (distinct SIDs), best first, -1 where a pool has fewer than K; `logprob_BK`: their log-probability
    (-inf there)."""

    leaf_BK: Tensor
    logprob_BK: Tensor

    @classmethod
    def of(cls, walked: Walked) -> Beams:
        total_BK = walked.logprob_BKL.sum(-1)
        return cls(walked.leaf_BK, torch.where(walked.leaf_BK >= 0, total_BK, -torch.inf))


def beam_search(steps: Steps, legal: Legal, beams: int, normalise: Normalise = "children", per_root: int | None = None) -> Beams:
    """The `beams` most probable SIDs of each request, as far as the beam sees.

    `per_root` keeps at most so many beams under one first code, at every level: a beam's worth of different departments. Warns where a
    request's pool has fewer SIDs than `beams`: all of them come back.
    """
    warn_if_short(legal, beams)

    def rule(found: Candidates) -> tuple[Tensor, Tensor]:
        score_P = found.total_P
        if per_root is not None:
            score_P = score_P.masked_fill(rank_in_group(score_P, found.request_P, found.root_P) >= per_root, -torch.inf)
        return best(score_P, found.request_P, found.requests, beams)[1], found.logprob_P

    return Beams.of(walk(steps, legal, rule, normalise))


def rank_in_group(score_P: Tensor, request_P: Tensor, group_P: Tensor) -> Tensor:
    """The place of each pair among those of its request and group, best first: (P,)."""
    order_P = torch.argsort(score_P, descending=True, stable=True)
    key_P = (request_P * (int(group_P.max()) + 1 if len(group_P) else 1) + group_P)[order_P]
    by_group_P = torch.argsort(key_P, stable=True)
    order_P, key_P = order_P[by_group_P], key_P[by_group_P]
    place_P = torch.arange(len(key_P), device=key_P.device)
    rank_P = place_P - torch.searchsorted(key_P, key_P)
    return torch.empty_like(rank_P).scatter(0, order_P, rank_P)


def warn_if_short(legal: Legal, beams: int) -> None:
    least = min(legal.leaves_B)
    if least < beams:
        warnings.warn(f"{beams} beams, but a request's pool holds {least} SIDs: it gets those", stacklevel=3)
