"""What other users took after the same items: a second teacher beside the one item really taken, and a second opinion in serving.

A shop with few events a user has one right answer a request and thousands that would have been as good; what users with like pasts went on
to says which. The policy learns a share of its targets from that, at no cost in serving. There a request's own step is left out: the pairs
of its latest items with the item taken count only as far as others made them too, else the teacher would repeat the answer.

Legend: Q queries, I items, A latest events, K followers of an item, T = A K, S pairs of query and latest event.
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

    def of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Followers of each request's latest items, newest item first, and how strongly each follows: (Q, T) both, T = LATEST K."""
        item_QA, weight_QA = self._latest(batch)
        return self.near_IK[item_QA].flatten(1), (self.similar_IK[item_QA] * weight_QA[..., None]).flatten(1)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """How likely each item comes next for others, (Q, I), each row a distribution: none of the request's latest items; the item taken
        alone where nobody knows more. Needs a batch that holds the whole catalogue."""
        near_QT, weight_QT = self.of(batch)
        found_QI = self.similar_IK.new_zeros(len(near_QT), len(self.near_IK)).scatter_add_(1, near_QT, weight_QT)
        item_QA, weight_QA = self._latest(batch)
        step_A = torch.arange(1, LATEST + 1, device=item_QA.device)
        own_Q = (weight_QA / step_A / (self.from_I[item_QA] * self.to_I[batch.target_Q][:, None])).sum(1)
        taken = (torch.arange(len(found_QI), device=found_QI.device), batch.target_Q)
        found_QI[taken] = (found_QI[taken] - own_Q).clamp(min=0)
        row_S, age_S = (weight_QA > 0).nonzero(as_tuple=True)
        found_QI[row_S, item_QA[row_S, age_S]] = 0
        total_Q = found_QI.sum(1)
        found_QI /= total_Q.clamp(min=1e-12)[:, None]
        found_QI[taken] += (total_Q <= 1e-12).to(found_QI.dtype)
        return found_QI

    def _latest(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The latest items of each request, newest first, and their weights, 0 where there is none that was in the log: (Q, A) both."""
        age_A = torch.arange(LATEST, device=batch.visible_Q.device)
        place_QA = batch.visible_Q[:, None] - 1 - age_A
        event_QA = (batch.history_offset[segments_of(batch)][:, None] + place_QA).clamp(0, max(len(batch.item_N) - 1, 0))
        item_N = batch.items.ids_U[batch.item_N] if len(batch.item_N) else batch.visible_Q.new_zeros(1)
        item_QA = item_N[event_QA]
        known_QA = (place_QA >= 0) & (item_QA < len(self.near_IK))
        return item_QA.clamp(max=len(self.near_IK) - 1), (DECAY**age_A * known_QA).to(self.similar_IK.dtype)
