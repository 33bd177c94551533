"""Beam search and sampling in fixed shapes: the walk of `walk.py` for a GPU (paper 3.2, xBeam).

Nothing depends on what is found. A beam has room for the largest fan-out of its level, what is no legal child of it is -inf, and no number
is ever read back; so nothing waits for the device, and a whole search can be captured as a CUDA graph (`graphs.py`). The price is
arithmetic for children that do not exist, which a GPU has to spare and a CPU has not. Results are those of `walk`.

Legend: B requests, W live beams a request, F room for children, K beams chosen, L levels, M = B*W states, V rows of the output matrix, D
width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from oxyray.generate import kernels
from oxyray.generate.pools import Legal
from oxyray.generate.score import Normalise, check_normalise, dense_product, log_total
from oxyray.generate.steps import Outputs, Steps
from oxyray.generate.walk import Walked
from oxyray.model.head import Tree
from oxyray.model.layers import Tensor, precise

# One child's dot product by itself costs as much as so many entries of the dense product.
_CHILD_COST = 8
# Numbers in a slice of gathered vectors.
_SLICE = 1 << 26

# Places of the chosen children among a request's W*F, and the scores that chose them (-inf: nothing is left): both (B, K).
Choice = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


class Best:
    """The most probable prefixes."""

    def __init__(self, beams: int) -> None:
        self.beams = beams

    def __call__(self, level: int, total_BWF: Tensor, legal_BWF: Tensor) -> tuple[Tensor, Tensor]:
        score_BK, place_BK = total_BWF.flatten(1).topk(min(self.beams, total_BWF[0].numel()), dim=1)
        return place_BK, score_BK


class GumbelTopK:
    """Distinct draws, as in `sample.py`. `key_BK` are the perturbed totals of the beams."""

    def __init__(self, samples: int, generator: torch.Generator | None) -> None:
        self.samples, self.generator = samples, generator
        self.key_BK = torch.empty(0, 0)

    def __call__(self, level: int, total_BWF: Tensor, legal_BWF: Tensor) -> tuple[Tensor, Tensor]:
        total_BWF = total_BWF.double()
        perturbed_BWF = total_BWF + self._gumbel(total_BWF)
        above_BW = self._gumbel(total_BWF[..., 0]) if level == 0 else self.key_BK
        top_BW = perturbed_BWF.amax(-1)
        shift_BWF = above_BW[..., None] - perturbed_BWF + torch.log1p(-torch.exp(perturbed_BWF - top_BW[..., None]))
        key_BWF = above_BW[..., None] - shift_BWF.clamp(min=0) - torch.log1p(torch.exp(-shift_BWF.abs()))
        key_BWF = key_BWF.masked_fill(~legal_BWF, -torch.inf)
        self.key_BK, place_BK = key_BWF.flatten(1).topk(min(self.samples, key_BWF[0].numel()), dim=1)
        return place_BK, self.key_BK

    def _gumbel(self, like: Tensor) -> Tensor:
        return -torch.empty_like(like).exponential_(generator=self.generator).log()


@torch.no_grad()
def walk_fixed(steps: Steps, legal: Legal, choose: Choice, normalise: Normalise = "children", temperature: float = 1.0) -> Walked:
    tree, hidden_BKD = steps.tree, steps.hidden_BKD
    node_BW = torch.zeros(len(hidden_BKD), 1, dtype=torch.long, device=hidden_BKD.device)
    logprob_BWL, origin_BW = precise(hidden_BKD.new_zeros(len(hidden_BKD), 1, 0)), None
    for level in range(tree.levels):
        if level:
            steps.advance(level - 1, node_BW.clamp(min=0), origin_BW if level > 1 else None)
        child_BWF, legal_BWF = _children(tree, legal, level, node_BW)
        logprob_BWF = _scored(steps, level, child_BWF, legal_BWF, normalise, temperature)
        total_BWF = logprob_BWL.sum(-1)[..., None] + logprob_BWF
        place_BK, score_BK = choose(level, total_BWF, legal_BWF)
        real_BK, origin_BW = score_BK > -torch.inf, place_BK // child_BWF.shape[2]
        before_BKL = logprob_BWL.gather(1, origin_BW[..., None].expand(-1, -1, level))
        token_BK = logprob_BWF.flatten(1).gather(1, place_BK).masked_fill(~real_BK, 0)
        logprob_BWL = torch.cat([before_BKL, token_BK[..., None]], dim=2)
        node_BW = torch.where(real_BK, child_BWF.flatten(1).gather(1, place_BK), -1)
    return Walked(node_BW, logprob_BWL.masked_fill(node_BW[..., None] < 0, 0), score_BK)


def _children(tree: Tree, legal: Legal, level: int, node_BW: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the children of each node, and which of it holds a legal one: (B, W, F) both."""
    place_F = torch.arange(tree.fan_out(level), device=node_BW.device)
    if level == 0:
        child_BWF = place_F.expand(*node_BW.shape, -1)
        legal_BWF = torch.ones_like(child_BWF, dtype=torch.bool)
    else:
        first_BW, count_BW = tree.children_of(level - 1, node_BW.clamp(min=0))
        legal_BWF = (place_F < count_BW[..., None]) & (node_BW >= 0)[..., None]
        child_BWF = torch.where(legal_BWF, first_BW[..., None] + place_F, 0)
    request_B = torch.arange(len(node_BW), device=node_BW.device)
    keep_P = legal.keep(level, request_B[:, None, None].expand_as(child_BWF).reshape(-1), child_BWF.reshape(-1))
    return child_BWF, legal_BWF if keep_P is None else legal_BWF & keep_P.view_as(legal_BWF)


def _scored(steps: Steps, level: int, child_BWF: Tensor, legal_BWF: Tensor, normalise: Normalise, temperature: float) -> Tensor:
    """Log-probabilities, -inf where there is no legal child: (B, W, F)."""
    outputs, hidden_MD = steps.outputs(level), steps.hidden_BKD.flatten(0, 1)
    check_normalise(outputs, normalise)
    row_MF = (steps.tree.code_of(level, child_BWF) if outputs.by_code else child_BWF).flatten(0, 1)
    logit_BWF = products(hidden_MD, outputs, row_MF).view_as(child_BWF)
    if outputs.had is not None:
        request_B = torch.arange(len(child_BWF), device=child_BWF.device)
        logit_BWF = logit_BWF + outputs.had.change(level, request_B[:, None, None].expand_as(child_BWF), child_BWF).to(logit_BWF.dtype)
    logit_BWF = (logit_BWF / temperature).masked_fill(~legal_BWF, -torch.inf)
    if normalise == "vocabulary":
        total_BW1 = log_total(hidden_MD / temperature, outputs.vector_nD).view(*child_BWF.shape[:2], 1)
    else:
        total_BW1 = logit_BWF.logsumexp(-1, keepdim=True)
    return torch.where(legal_BWF, logit_BWF - total_BW1, -torch.inf)


def products(hidden_MD: Tensor, outputs: Outputs, row_MF: Tensor) -> Tensor:
    """Dot products of each state with the output vectors at its rows, in float32 at least: (M, F)."""
    room = row_MF.shape[1]
    if row_MF.stride(0) == 0 or (outputs.by_code and room * _CHILD_COST > len(outputs.vector_nD)):
        return dense_product(hidden_MD, outputs.vector_nD).gather(1, row_MF)
    if kernels.usable(hidden_MD):
        return kernels.gathered_products(hidden_MD, outputs.vector_nD, row_MF)
    size = max(1, _SLICE // (room * hidden_MD.shape[1]))
    slices = zip(hidden_MD.split(size), row_MF.split(size), strict=True)
    return torch.cat([torch.einsum("sd,sfd->sf", precise(hidden_sD), precise(outputs.vector_nD[row_sF])) for hidden_sD, row_sF in slices])
