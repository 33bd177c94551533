"""What every deep model of the funnel has: what it reads beside a user's past, its loss and its chances. They differ in how they read the
past, and in what they make of an item.

Legend: B samples, R pages, A asked pages, C items of all pages, Q items of asked pages, U items of the batch, D width, H heads of the
funnel.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from oxyray.config import ModelConfig, RankerConfig
from oxyray.model.items import Clock, ItemEncoder, Vocab
from oxyray.model.layers import Tensor
from oxyray.model.losses import LossOut
from oxyray.reward.crosses import crosses, size
from oxyray.reward.packing import RankBatch

HEADS = ("click", "cart", "purchase")
Rows = dict[str, Tensor]


class FunnelModel(nn.Module):
    """As the policy, it looks no row up: `model(batch, rows)` gets the rows of `batch.lookups()` and gives logits of click, cart given
    click, purchase given cart for the items of asked pages, in their order: (Q, H)."""

    def __init__(self, config: RankerConfig, vocab: Vocab) -> None:
        super().__init__()
        D = config.width
        self.config, self.vocab = config, vocab
        self.items = ItemEncoder(ModelConfig(width=D, heads=config.heads, row_dim=config.row_dim, text_input=config.text_input), vocab)
        self.user = nn.Linear(config.row_dim, D, bias=False) if config.user_table else None
        self.profile = nn.ModuleList(nn.Embedding(size, D) for size in vocab.profile)
        self.profile_base = nn.Parameter(torch.randn(D) * 0.05)
        self.scenario = nn.Embedding(vocab.scenarios, D)
        self.clock = Clock(D) if vocab.clock else None
        self.query = nn.Linear(vocab.text, D, bias=False) if self.items.text is not None else None
        self.no_trigger = nn.Parameter(torch.randn(D) * 0.02)
        self.crosses = nn.Sequential(nn.Linear(size(vocab, self.query is not None), config.hidden), nn.SiLU(), nn.Linear(config.hidden, D))
        for table in (self.scenario, *self.profile):
            nn.init.normal_(table.weight, std=0.02)

    def loss(self, batch: RankBatch, rows: Rows) -> LossOut:
        """Sums over asked items of the negative log-likelihood of what was done with them, in total and by head."""
        logit_QH = self(batch, rows)
        done_Q = batch.done_C[batch.asked_R[batch.page_C()]]
        stage_H = torch.arange(len(HEADS), device=done_Q.device)
        came_QH, went_QH = done_Q[:, None] >= stage_H, done_Q[:, None] > stage_H
        nll_QH = F.binary_cross_entropy_with_logits(logit_QH, went_QH.to(logit_QH.dtype), reduction="none")
        nll_H = torch.where(came_QH, nll_QH, 0).sum(0) * float(batch.counts)
        return LossOut(nll_H.sum(), dict(zip(HEADS, nll_H.detach(), strict=True)))

    @torch.no_grad()
    def chances(self, batch: RankBatch, rows: Rows) -> Tensor:
        """P(click), P(cart), P(purchase) of the items of asked pages, in their order: (Q, H)."""
        training = self.training
        self.eval()
        try:
            return torch.cumprod(torch.sigmoid(self(batch, rows)), dim=-1)
        finally:
            self.train(training)

    def _person(self, batch: RankBatch, rows: Rows) -> Tensor:
        """Who the user is, whatever was done: profile and row (B, D)."""
        person_BD = self.profile_base.expand(len(batch.user_B), -1)
        for column, table in enumerate(self.profile):
            person_BD = person_BD + table(batch.profile_BP[:, column])
        return person_BD if self.user is None else person_BD + self.user(rows["user"])

    def _context(self, batch: RankBatch) -> Tensor:
        """Where, when and with which words a page was asked for: (R, D)."""
        context_RD = self.scenario(batch.scenario_R)
        if self.clock is not None:
            context_RD = context_RD + self.clock(batch.time_R, batch.time_R - self._last_time(batch))
        if self.query is not None:
            context_RD = context_RD + self.query(batch.query_RF)
        return context_RD

    def _trigger(self, batch: RankBatch, item_UD: Tensor) -> Tensor:
        """The item that an asked page starts from: (A, D)."""
        trigger_A = batch.trigger_R[batch.asked_R]
        return torch.where((trigger_A >= 0)[:, None], item_UD[trigger_A.clamp(min=0)], self.no_trigger)

    def _crossed(self, batch: RankBatch, page_Q: Tensor, item_Q: Tensor) -> Tensor:
        """What an item has in common with what its page knows, as a vector: (Q, D)."""
        found_QX = crosses(batch, page_Q, item_Q, self.query is not None)
        crossed: Tensor = self.crosses(found_QX.to(self.no_trigger.dtype))
        return crossed

    @staticmethod
    def _last_time(batch: RankBatch) -> Tensor:
        """Time of the last page that each page knows; its own where it knows none."""
        last_R = batch.page_offset[batch.sample_R()] + batch.visible_R - 1
        return torch.where(batch.visible_R > 0, batch.time_R[last_R.clamp(min=0)], batch.time_R)
