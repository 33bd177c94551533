"""A point-wise deep model: every shown item is a row of its own, and a perceptron with two hidden layers judges it.

It reads what the ranker reads (item, user, where, when, from which item, with which words), but of the user's past only the mean of the
items that were taken on the pages that the asked page knows: no order, no attention, nothing of what was passed over or how far it went.

Legend: B samples, R pages, A asked pages, C items of all pages, Q items of asked pages, S slots of the past (0 before the first page), U
items of the batch, D width, E width and one more for the count, H heads of the funnel.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from oxyray.config import RankerConfig
from oxyray.data.batch import pad_index
from oxyray.model.items import Vocab
from oxyray.model.layers import Dropout, RMSNorm, Tensor
from oxyray.reward.funnel import HEADS, FunnelModel, Rows
from oxyray.reward.packing import RankBatch


class PointWise(FunnelModel):
    """The ranker's settings hold, save those of its layers: the hidden ones have twice `hidden` and `hidden` units."""

    def __init__(self, config: RankerConfig, vocab: Vocab) -> None:
        super().__init__(config, vocab)
        self.norm = RMSNorm(5 * config.width)
        self.judge = nn.Sequential(
            nn.Linear(5 * config.width, 2 * config.hidden),
            nn.SiLU(),
            Dropout(config.dropout),
            nn.Linear(2 * config.hidden, config.hidden),
            nn.SiLU(),
            Dropout(config.dropout),
            nn.Linear(config.hidden, len(HEADS)),
        )

    def forward(self, batch: RankBatch, rows: Rows) -> Tensor:
        item_UD = self.items(batch.items, rows["item"])
        asked_R, sample_R = batch.asked_R, batch.sample_R()
        page_AV = torch.cat(
            [
                self._person(batch, rows)[sample_R[asked_R]],
                self._context(batch)[asked_R],
                self._trigger(batch, item_UD),
                self._taken(batch, item_UD)[sample_R[asked_R], batch.visible_R[asked_R]],
            ],
            dim=-1,
        )
        asked_C = asked_R[batch.page_C()]
        page_Q, item_Q = batch.page_C()[asked_C], batch.item_C[asked_C]
        place_R = torch.cumsum(asked_R, 0) - 1
        crossed_QD = self._crossed(batch, page_Q, item_Q)
        return self.judge(self.norm(torch.cat([item_UD[item_Q] + crossed_QD, page_AV[place_R[page_Q]]], dim=-1)))

    def _taken(self, batch: RankBatch, item_UD: Tensor) -> Tensor:
        """The mean vector of the items taken on the first s pages of a sample, 0 where there are none: (B, S, D)."""
        item_CE = F.pad(item_UD, (0, 1), value=1.0)[batch.item_C]
        sum_RE = item_CE.new_zeros(len(batch.asked_R), item_CE.shape[1])
        sum_RE = sum_RE.index_add(0, batch.page_C(), torch.where((batch.done_C > 0)[:, None], item_CE, 0))
        # Padding lies behind a sample's last page, so no sum that is read has it.
        sum_BSE = torch.cumsum(F.pad(sum_RE[pad_index(batch.page_offset)[0]], (0, 0, 1, 0)), dim=1)
        return sum_BSE[..., :-1] / sum_BSE[..., -1:].clamp(min=1)
