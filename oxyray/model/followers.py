"""What other users took after the same items: a second teacher beside the one item really taken.

A shop with few events a user has one right answer a request and thousands that would have been as good; what users with like pasts went on
to says which. The policy learns a share of its targets from that, at no cost in serving. A request's own step is left out: the pairs of its
latest items with the item taken count only as far as others made them too, else the teacher would repeat the answer.

Legend: Q queries, I items, K followers of an item.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from oxyray.data.batch import Batch
from oxyray.data.covisits import CoVisits
from oxyray.model.instruction import segments_of
from oxyray.model.layers import Tensor

LATEST = 10  # events of a history that are asked for followers
DECAY = 0.7  # of an event's weight with each newer one
KEPT = 50  # followers of an item


class Followers(nn.Module):
    """Needs batches that hold the whole catalogue."""

    near_IK: Tensor
    similar_IK: Tensor
    from_I: Tensor
    to_I: Tensor

    def __init__(self, visits: CoVisits) -> None:
        super().__init__()
        similar_II = visits.similar_II
        kept_N, row_N = np.diff(similar_II.indptr), np.repeat(np.arange(similar_II.shape[0]), np.diff(similar_II.indptr))
        shape = (similar_II.shape[0], max(int(kept_N.max(initial=0)), 1))
        near_IK, similar_IK = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        place_N = np.arange(len(row_N)) - similar_II.indptr[row_N]
        near_IK[row_N, place_N], similar_IK[row_N, place_N] = similar_II.indices, similar_II.data
        held = {"near_IK": near_IK, "similar_IK": similar_IK, "from_I": visits.from_I, "to_I": visits.to_I}
        for name, values in held.items():
            tensor = torch.from_numpy(np.ascontiguousarray(values))
            self.register_buffer(name, tensor.float() if tensor.is_floating_point() else tensor, persistent=False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """How likely each item comes next for others, (Q, I), each row a distribution: none of the request's latest items; the item taken
        alone where nobody knows more."""
        first_Q = batch.history_offset[segments_of(batch)]
        found_QI = self.similar_IK.new_zeros(len(first_Q), len(self.near_IK))
        row_Q, own_Q, latest = torch.arange(len(first_Q), device=first_Q.device), self.similar_IK.new_zeros(len(first_Q)), []
        for age in range(LATEST):
            place_Q = batch.visible_Q - 1 - age
            seen_Q, weight = place_Q >= 0, DECAY**age
            item_Q = batch.item_N[(first_Q + place_Q).clamp(0, max(len(batch.item_N) - 1, 0))] if len(batch.item_N) else first_Q * 0
            found_QI.scatter_add_(1, self.near_IK[item_Q], self.similar_IK[item_Q] * (weight * seen_Q)[:, None])
            own_Q += seen_Q * weight / (age + 1) / (self.from_I[item_Q] * self.to_I[batch.target_Q])
            latest.append((row_Q[seen_Q], item_Q[seen_Q]))
        taken = (row_Q, batch.target_Q)
        found_QI[taken] = (found_QI[taken] - own_Q).clamp(min=0)
        for seen in latest:
            found_QI[seen] = 0
        total_Q = found_QI.sum(1)
        found_QI /= total_Q.clamp(min=1e-12)[:, None]
        found_QI[taken] += (total_Q <= 1e-12).to(found_QI.dtype)
        return found_QI
