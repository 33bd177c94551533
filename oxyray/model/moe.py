"""Mixture of experts: a feed-forward part of which each token uses a few pieces (paper 4.2, Table 3).

A token goes to the experts of its highest scores; what they give is summed by these scores. No token is ever dropped: an expert takes all
that come. Instead of an auxiliary loss a bias keeps the load even (Wang et al. 2024): after each step it rises for experts with too few
tokens and falls for those with too many. It takes part in choosing alone, so it bends no gradient.

Legend: T tokens, D width, E experts, k experts a token, H inner size, n = T · k pairs of token and expert.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from oxyray.config import ModelConfig
from oxyray.model.layers import SwiGLU, Tensor


class MixtureOfExperts(nn.Module):
    """D -> D by `active` of `experts`, each with one hidden layer of `hidden`."""

    def __init__(self, width: int, hidden: int, experts: int, active: int, balance: float) -> None:
        super().__init__()
        self.active, self.balance = active, balance
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, width, hidden).uniform_(-(width**-0.5), width**-0.5))
        self.down = nn.Parameter(torch.empty(experts, hidden, width).uniform_(-(hidden**-0.5), hidden**-0.5))
        self.register_buffer("bias_E", torch.zeros(experts))
        self.register_buffer("load_E", torch.zeros(experts), persistent=False)
        self.peak = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        x_TD = x.flatten(0, -2)
        expert_Tk, share_Tk = self.route(x_TD)
        expert_n = expert_Tk.flatten()
        order_n = expert_n.argsort(stable=True)
        count_E = torch.bincount(expert_n, minlength=len(self.up))
        if torch.is_grad_enabled():  # also where alignment learns from candidates, with nothing dropped
            self.get_buffer("load_E").add_(count_E)
        token_n = order_n.div(self.active, rounding_mode="floor")
        inner_nH = F.silu(grouped(x_TD[token_n], self.up, count_E))
        out_nD = grouped(inner_nH, self.down, count_E) * share_Tk.flatten()[order_n, None].to(inner_nH.dtype)
        return torch.zeros_like(x_TD, dtype=out_nD.dtype).index_add(0, token_n, out_nD).view_as(x)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts, and their shares, which sum to one where they are several (the share of a single one is its score, else its
        router would learn nothing): (T, k) both. Scores are in full precision whatever the rest is in."""
        with torch.autocast(x_TD.device.type, enabled=False):
            score_TE = torch.sigmoid(self.router(x_TD.to(self.router.weight.dtype)))
        expert_Tk = (score_TE.detach() + self.get_buffer("bias_E")).topk(self.active, dim=-1).indices
        share_Tk = score_TE.gather(1, expert_Tk)
        return expert_Tk, share_Tk if self.active == 1 else share_Tk / share_Tk.sum(-1, keepdim=True)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the bias against the load of the step, all processes' together. Collective. `peak` then is the highest load over the
        mean."""
        load_E = self.get_buffer("load_E")
        if dist.is_initialized():
            dist.all_reduce(load_E)
        mean = load_E.mean()
        self.peak = float(load_E.max() / mean.clamp(min=1))
        self.get_buffer("bias_E").add_(self.balance * torch.sign(mean - load_E))
        load_E.zero_()


def grouped(x_nA: Tensor, weight_EAB: Tensor, count_E: Tensor) -> Tensor:
    """Rows in the order of their experts, each times its expert's matrix: (n, B). One kernel where the device has it, else one product an
    expert."""
    if torch.is_autocast_enabled(x_nA.device.type):  # as a product of one matrix would do by itself
        x_nA = x_nA.to(torch.get_autocast_dtype(x_nA.device.type))
    if x_nA.is_cuda and x_nA.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm"):
        return torch._grouped_mm(x_nA, weight_EAB.to(x_nA.dtype), offs=count_E.cumsum(0).int())
    pieces = x_nA.split(count_E.tolist())
    return torch.cat([piece @ weight for piece, weight in zip(pieces, weight_EAB.to(x_nA.dtype), strict=True)])


def feed_forward(config: ModelConfig) -> nn.Module:
    """What stands behind attention: dense, or experts where the configuration has them."""
    moe = config.moe
    if not moe.experts:
        return SwiGLU(config.width, config.hidden)
    return MixtureOfExperts(config.width, config.hidden, moe.experts, moe.active, moe.balance)


def after_step(policy: nn.Module) -> dict[str, float]:
    """Balance all mixtures of a policy, and say how uneven the most uneven one was. Collective."""
    mixtures = [part for part in policy.modules() if isinstance(part, MixtureOfExperts)]
    for mixture in mixtures:
        mixture.after_step()
    return {"expert_peak": max(mixture.peak for mixture in mixtures)} if mixtures else {}


def parameters(policy: nn.Module) -> tuple[int, int]:
    """All parameters, and those that a token uses (of a mixture, its active experts'): paper Table 3's two numbers."""
    total = sum(p.numel() for p in policy.parameters())
    idle = 0
    for part in policy.modules():
        if isinstance(part, MixtureOfExperts):
            experts = len(part.up)
            idle += (part.up.numel() + part.down.numel()) * (experts - part.active) // experts
    return total, total - idle
