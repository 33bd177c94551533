"""Training losses as sums over queries; whoever steps the optimizer divides by the global weight.

Legend: Q queries, U items, n nodes of a level, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from oxyray.model.head import ragged_logsumexp, spread
from oxyray.model.layers import Tensor


@dataclass
class LossOut:
    """`total` is the weighted sum to step on; `parts` are weighted sums for the log, without gradient."""

    total: Tensor
    parts: dict[str, Tensor]


def children_nll(hidden_QD: Tensor, vector_nD: Tensor, first_Q: Tensor, count_Q: Tensor, target_Q: Tensor) -> Tensor:
    """Negative log-probability of child `target_Q` among the children `first_Q : first_Q + count_Q` of each query's prefix: (Q,)."""
    state_P, child_P = spread(first_Q, count_Q)
    logit_P = (hidden_QD[state_P] * vector_nD[child_P]).sum(-1)
    chosen_Q = torch.cumsum(count_Q, 0) - count_Q + target_Q - first_Q
    return ragged_logsumexp(logit_P, state_P, len(hidden_QD)) - logit_P[chosen_Q]


def vocabulary_nll(hidden_QD: Tensor, vector_VD: Tensor, target_Q: Tensor, smoothing: float = 0.0) -> Tensor:
    """Negative log-probability of `target_Q` over a level's whole vocabulary (or all roots): (Q,)."""
    return F.cross_entropy(hidden_QD @ vector_VD.T, target_Q, reduction="none", label_smoothing=smoothing)


def item_nll(query_QD: Tensor, item_UD: Tensor, target_Q: Tensor, negatives: int) -> Tensor:
    """Item-level softmax: over all U items, or over the target and `negatives` uniformly drawn items with the log of the sampling rate
    corrected: (Q,).

    An accidental draw of the target itself is masked out.
    """
    items = len(item_UD)
    if negatives <= 0 or negatives >= items:
        return F.cross_entropy(query_QD @ item_UD.T, target_Q, reduction="none")
    drawn_N = torch.randint(items, (negatives,), device=item_UD.device)
    correction = torch.log(torch.tensor((items - 1) / negatives))
    logit_QN = query_QD @ item_UD[drawn_N].T + correction
    logit_QN = logit_QN.masked_fill(drawn_N[None] == target_Q[:, None], -torch.inf)
    positive_Q = (query_QD * item_UD[target_Q]).sum(-1)
    return torch.logsumexp(torch.cat([positive_Q[:, None], logit_QN], dim=1), dim=1) - positive_Q
