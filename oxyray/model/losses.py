"""Training losses as sums over queries; whoever steps the optimizer divides by the global weight.

Legend: Q queries, U items, n nodes of a level, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from oxyray.model.head import ragged_logsumexp, spread
from oxyray.model.layers import Tensor, precise
from oxyray.model.repeats import Had


@dataclass
class LossOut:
    """`total` is the weighted sum to step on; `parts` are weighted sums for the log, without gradient."""

    total: Tensor
    parts: dict[str, Tensor]


class Children:
    """The children of each query's prefix, `first_Q : first_Q + count_Q` of the nodes of `level`, with their log-probabilities."""

    def __init__(self, level: int, hidden_QD: Tensor, vector_nD: Tensor, first_Q: Tensor, count_Q: Tensor, had: Had | None = None) -> None:
        self.state_P, child_P = spread(first_Q, count_Q)
        self.offset_Q, self.first_Q = torch.cumsum(count_Q, 0) - count_Q, first_Q
        logit_P = precise((hidden_QD[self.state_P] * vector_nD[child_P]).sum(-1))
        if had is not None:
            logit_P = had.add(level, self.state_P, child_P, logit_P)
        self.logprob_P = logit_P - ragged_logsumexp(logit_P, self.state_P, len(hidden_QD))[self.state_P]

    def nll(self, target_Q: Tensor) -> Tensor:
        """Negative log-probability of the child `target_Q` (a node): (Q,)."""
        return -self.logprob_P[self.offset_Q + target_Q - self.first_Q]

    def distilled(self, item_prob_QU: Tensor, state_T: Tensor, item_T: Tensor, child_T: Tensor) -> Tensor:
        """Cross-entropy to what the item softmax says of the children: items `item_T` below query `state_T`'s prefix belong to its child
        `child_T`: (Q,)."""
        slot_T = self.offset_Q[state_T] + child_T - self.first_Q[state_T]
        share_P = item_prob_QU.new_zeros(len(self.logprob_P)).index_add(0, slot_T, item_prob_QU[state_T, item_T])
        total_Q = share_P.new_zeros(len(self.offset_Q)).index_add(0, self.state_P, share_P).clamp(min=1e-30)
        cross_P = -self.logprob_P * share_P / total_Q[self.state_P]
        return cross_P.new_zeros(len(self.offset_Q)).index_add(0, self.state_P, cross_P)


def distilled_roots(logit_Qn: Tensor, item_prob_QU: Tensor, root_U: Tensor) -> Tensor:
    """Cross-entropy of the first level to what the item softmax says of it: (Q,)."""
    share_Qn = item_prob_QU.new_zeros(logit_Qn.shape).index_add(1, root_U, item_prob_QU)
    return F.cross_entropy(precise(logit_Qn), share_Qn, reduction="none")


def item_nll(
    query_QD: Tensor, item_UD: Tensor, id_U: Tensor, target_Q: Tensor, negative_N: Tensor | None, items: int, had: Had | None = None
) -> tuple[Tensor, Tensor | None]:
    """Item-level softmax: over all U items where `negative_N` is None (they are the catalogue), or over the target and those drawn
    uniformly from the catalogue of `items`, with the log of the sampling rate corrected. Targets and negatives are places among the U,
    whose catalogue indices are `id_U`. Gives the loss (Q,) and, from the full softmax, the probabilities (Q, U) without gradient.

    An accidental draw of the target itself is masked out.
    """
    if negative_N is None:
        logit_QU = precise(query_QD @ item_UD.T)
        logprob_QU = torch.log_softmax(logit_QU if had is None else had.add_all(-1, logit_QU), dim=-1)
        return -logprob_QU.gather(1, target_Q[:, None])[:, 0], logprob_QU.detach().exp()
    logit_QN = precise(query_QD @ item_UD[negative_N].T) + math.log((items - 1) / len(negative_N))
    if had is not None:
        logit_QN = had.add_drawn(id_U[negative_N], logit_QN)
    logit_QN = logit_QN.masked_fill(negative_N[None] == target_Q[:, None], -torch.inf)
    positive_Q = precise((query_QD * item_UD[target_Q]).sum(-1))
    if had is not None:
        positive_Q = had.add(-1, torch.arange(len(target_Q), device=target_Q.device), id_U[target_Q], positive_Q)
    return torch.logsumexp(torch.cat([positive_Q[:, None], logit_QN], dim=1), dim=1) - positive_Q, None
