"""Sampling SIDs, with the exact log-probability of each token under the mask and temperature that drew it, as policy optimisation needs.

A token's distribution is the softmax over the legal children of its prefix, at a temperature, cut to the `top_k` most probable children and
to the nucleus `top_p` (the fewest most probable ones that reach that share), in this order, and renormalised. With replacement each sample
is drawn by itself. Without, by Gumbel top-k on whole SIDs (stochastic beam search; Kool, van Hoof, Welling 2019): one pass gives K distinct
SIDs that are distributed as if drawn one after another, each from what the earlier ones left.

Legend: B requests, G samples, L levels, M states, P (state, child) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oxyray.errors import GenerationError
from oxyray.generate.beam import warn_if_short
from oxyray.generate.pools import Legal
from oxyray.generate.steps import Steps
from oxyray.generate.walk import Candidates, best, walk
from oxyray.model.layers import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature: 1 is the model's own distribution; above 0
    top_k: children a token may be drawn from; 0: all
    top_p: share of probability that they must reach together; 1: all
    replacement: each sample by itself; else G distinct SIDs
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    replacement: bool = False

    @property
    def plain(self) -> bool:
        """Whether these are distinct draws from the whole distribution."""
        return not (self.replacement or self.top_k or self.top_p < 1)

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise GenerationError(f"sampling needs temperature > 0, top_k >= 0 and 0 < top_p <= 1; got {self}")


@dataclass(frozen=True)
class Samples:
    """`leaf_BG`: leaves of the index, -1 where a request has fewer distinct SIDs; `logprob_BGL`: each token's log-probability (0 there).
    Without replacement samples stand in the order of `key_BG`, their perturbed log-probability: the last key is the threshold that
    importance weights of the others need."""

    leaf_BG: Tensor
    logprob_BGL: Tensor
    key_BG: Tensor | None


def sample(steps: Steps, legal: Legal, samples: int, sampling: Sampling | None = None, generator: torch.Generator | None = None) -> Samples:
    """`samples` SIDs for each request. Warns where a request's pool holds fewer distinct ones than asked for."""
    sampling = sampling or Sampling()
    if sampling.replacement:
        walked = walk(steps, legal, _Draw(samples, sampling, generator), temperature=sampling.temperature)
        return Samples(walked.leaf_BK, walked.logprob_BKL, None)
    warn_if_short(legal, samples)
    rule = _GumbelTopK(samples, sampling, generator)
    walked = walk(steps, legal, rule, temperature=sampling.temperature)
    return Samples(walked.leaf_BK, walked.logprob_BKL, rule.key_BK)


class _Draw:
    """G independent draws at the root, then one child for each sample."""

    def __init__(self, samples: int, sampling: Sampling, generator: torch.Generator | None) -> None:
        self.samples, self.sampling, self.generator = samples, sampling, generator

    def __call__(self, found: Candidates) -> tuple[Tensor, Tensor]:
        logprob_P = _truncated(found, self.sampling)
        state_P, states = found.pairs.state_P, found.pairs.states
        # The pairs' probabilities laid end to end: a state's draw falls on the child that covers it.
        edge_P = torch.cumsum(logprob_P.double().exp(), 0)
        first_M = torch.searchsorted(state_P, torch.arange(states, device=state_P.device))
        last_M = torch.searchsorted(state_P, torch.arange(states, device=state_P.device), right=True)
        low_M, high_M = (torch.nn.functional.pad(edge_P, (1, 0))[place_M] for place_M in (first_M, last_M))
        draws = self.samples if found.level == 0 else 1
        share_MG = torch.rand(states, draws, dtype=torch.double, device=edge_P.device, generator=self.generator)
        point_MG = low_M[:, None] + share_MG * (high_M - low_M)[:, None]
        point_MG = torch.minimum(point_MG, torch.nextafter(high_M, low_M)[:, None])  # rounding must not lead to the next state
        picked_MG = torch.searchsorted(edge_P, point_MG, right=True)
        picked_MG = torch.where((last_M > first_M)[:, None], picked_MG, -1)
        return picked_MG.view(found.requests, -1), logprob_P


class _GumbelTopK:
    """Perturb each child's total by Gumbel noise, conditioned on the best child of a beam having the beam's own perturbed total; keep the
    best. `key_BK` are the perturbed totals of the beams."""

    def __init__(self, samples: int, sampling: Sampling, generator: torch.Generator | None) -> None:
        self.samples, self.sampling, self.generator = samples, sampling, generator
        self.key_BK = torch.empty(0, 0)

    def __call__(self, found: Candidates) -> tuple[Tensor, Tensor]:
        logprob_P = _truncated(found, self.sampling)
        state_P = found.pairs.state_P
        total_P = (found.total_P - found.logprob_P + logprob_P).double()
        perturbed_P = total_P + self._gumbel(total_P)
        above_M = self._gumbel(total_P.new_empty(found.pairs.states)) if found.level == 0 else self.key_BK.flatten()
        top_M = perturbed_P.new_full((found.pairs.states,), -torch.inf).scatter_reduce(0, state_P, perturbed_P, "amax")
        # Maddison's truncated Gumbel, in the stable form of Kool et al., appendix B.3.
        shift_P = above_M[state_P] - perturbed_P + torch.log1p(-torch.exp(perturbed_P - top_M[state_P]))
        key_P = above_M[state_P] - shift_P.clamp(min=0) - torch.log1p(torch.exp(-shift_P.abs()))
        self.key_BK, picked_BK = best(key_P.masked_fill(logprob_P == -torch.inf, -torch.inf), found.request_P, found.requests, self.samples)
        return picked_BK, logprob_P

    def _gumbel(self, like: Tensor) -> Tensor:
        return -torch.empty_like(like).exponential_(generator=self.generator).log()


def _truncated(found: Candidates, sampling: Sampling) -> Tensor:
    """Log-probabilities after top-k and nucleus, -inf for what they cut off: (P,)."""
    logprob_P, state_P = found.logprob_P, found.pairs.state_P
    for keep in (_top_k, _nucleus):
        keep_P = keep(logprob_P, state_P, sampling)
        if keep_P is not None:
            kept = found.pairs.where(keep_P)
            logprob_P = torch.full_like(logprob_P, -torch.inf).masked_scatter(keep_P, kept.normalised(logprob_P[keep_P]))
    return logprob_P


def _ranked(logprob_P: Tensor, state_P: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs by state, then from the most probable on; and where each state's begin: (P,) both."""
    order_P = torch.argsort(logprob_P, descending=True, stable=True)
    order_P = order_P[torch.argsort(state_P[order_P], stable=True)]
    return order_P, torch.searchsorted(state_P, state_P)


def _top_k(logprob_P: Tensor, state_P: Tensor, sampling: Sampling) -> Tensor | None:
    if not sampling.top_k:
        return None
    order_P, first_P = _ranked(logprob_P, state_P)
    keep_P = torch.arange(len(order_P), device=order_P.device) - first_P < sampling.top_k
    return torch.empty_like(keep_P).scatter(0, order_P, keep_P)


def _nucleus(logprob_P: Tensor, state_P: Tensor, sampling: Sampling) -> Tensor | None:
    if sampling.top_p == 1:
        return None
    order_P, first_P = _ranked(logprob_P, state_P)
    prob_P = logprob_P[order_P].double().exp()
    before_P = torch.cumsum(prob_P, 0) - prob_P
    keep_P = (before_P - before_P[first_P] < sampling.top_p) & (prob_P > 0)
    return torch.empty_like(keep_P).scatter(0, order_P, keep_P)
