"""The space that requests and items share (paper 2.3.3): the adapter, the loss that aligns requests with the items that were taken (Q2I),
and the retrieval of what is like a request from its user's older events (IGR).

Legend: Q requests of this process, A requests of all processes, B segments, P requests a segment, O older events a segment, k places, D
width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from oxyray.config import RetrievalConfig
from oxyray.model.layers import RMSNorm, Tensor, precise

_DEAD = -1  # stands for the item of a request of weight 0


class Adapter(nn.Module):
    """Residual (down, non-linearity, up), then brought to length 1. One adapter serves requests and items."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        x = self.norm(x)
        return F.normalize(x + self.up(F.silu(self.down(x))), dim=-1)


def most_like(query_BPD: Tensor, older_BOD: Tensor, seen_BPO: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """IGR: the `top` events of each request's segment that are most like it, among those that it may see: indices (B, P, k) in time order,
    and which of them there are. k is smaller where no segment has `top` older events. Of equals (an item that was taken again) the later
    comes first: whoever asks, and in whatever batch, gets the same."""
    with torch.autocast(query_BPD.device.type, enabled=False):
        score_BPO = (precise(query_BPD) @ precise(older_BOD).transpose(1, 2)).masked_fill(~seen_BPO, -torch.inf)
    late_first_BPO = score_BPO.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    best_BPk = (older_BOD.shape[1] - 1 - late_first_BPO[..., :top]).sort(dim=-1).values
    return best_BPk, seen_BPO.gather(2, best_BPk)


def q2i(query_QD: Tensor, item_QD: Tensor, id_Q: Tensor, live_Q: Tensor, config: RetrievalConfig, together: bool = False) -> Tensor:
    """The query-to-item loss of each request: (Q,). `item_QD` are the items taken, `id_Q` their ids, both sides of length 1. Requests that
    are not `live_Q` (of weight 0) are nobody's negatives and in no statistic.

    InfoNCE against the batch's other items (the same item taken again is no negative), plus, for both sides, what keeps every dimension in
    use: a hinge on its standard deviation, below 1/√D, and the squared covariances between dimensions over D. With `together` the batch is
    that of all processes, with gradient; all must call.
    """
    with torch.autocast(query_QD.device.type, enabled=False):
        query_QD, item_QD = precise(query_QD), precise(item_QD)
        query_AD, item_AD, id_A, first = query_QD, item_QD, torch.where(live_Q, id_Q, _DEAD), 0
        if together and dist.is_initialized() and dist.get_world_size() > 1:
            both_AD, count_W = gathered(torch.cat([query_QD, item_QD], dim=-1))
            query_AD, item_AD = both_AD.chunk(2, dim=-1)
            id_A, first = _rows(id_A, count_W), sum(count_W[: dist.get_rank()])
        logit_QA = query_QD @ item_AD.T / config.temperature
        own_Q = first + torch.arange(len(id_Q), device=id_Q.device)
        left_out_QA = (id_Q[:, None] == id_A[None]) | (id_A == _DEAD)
        left_out_QA[torch.arange(len(id_Q), device=id_Q.device), own_Q] = False
        nll_Q = F.cross_entropy(logit_QA.masked_fill(left_out_QA, -torch.inf), own_Q, reduction="none")
        live_A = id_A != _DEAD
        held = [config.variance * _narrow(x_AD[live_A]) + config.decorrelation * _alike(x_AD[live_A]) for x_AD in (query_AD, item_AD)]
        return nll_Q + held[0] + held[1]


def _narrow(x_AD: Tensor) -> Tensor:
    """By how much dimensions vary less than those of evenly spread vectors of length 1, summed over dimensions."""
    spread_D = (x_AD.square().sum(0) / max(len(x_AD), 1) - (x_AD.sum(0) / max(len(x_AD), 1)).square()).clamp(min=0)
    return F.relu(x_AD.shape[1] ** -0.5 - (spread_D + 1e-12).sqrt()).sum()


def _alike(x_AD: Tensor) -> Tensor:
    x_AD = x_AD - x_AD.sum(0) / max(len(x_AD), 1)
    covariance_DD = x_AD.T @ x_AD / max(len(x_AD), 1)
    return (covariance_DD.square().sum() - covariance_DD.diagonal().square().sum()) / x_AD.shape[1]


def gathered(x_Q: Tensor) -> tuple[Tensor, list[int]]:
    """The rows of all processes, in the order of their ranks, with gradient; and how many each has. Collective."""
    world = dist.get_world_size()
    count_W = [torch.zeros(1, dtype=torch.int64, device=x_Q.device) for _ in range(world)]
    dist.all_gather(count_W, torch.tensor([len(x_Q)], device=x_Q.device))
    counts = [int(count) for count in count_W]
    return _Gather.apply(x_Q, counts), counts


def _rows(x_Q: Tensor, counts: list[int]) -> Tensor:
    most = max(counts)
    padded = torch.cat([x_Q, x_Q.new_zeros(most - len(x_Q), *x_Q.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Q: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _rows(x_Q, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Every process's loss reads every row: a row's gradient is the sum of theirs."""
        grad_A, rank = grads[0].contiguous().clone(), dist.get_rank()
        dist.all_reduce(grad_A)
        first = sum(ctx.counts[:rank])
        return grad_A[first : first + ctx.counts[rank]], None
