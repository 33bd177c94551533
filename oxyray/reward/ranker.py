"""The unified list-wise ranker (paper 2.4.2, Figure 5): one model for all scenarios that says how likely an item is clicked, put into the
cart and bought. It is the reward service of the RL loop.

- *Unified tokens*: whatever the features are, a page of the log is one token (where, when, what was taken and how, what was passed over),
  a user's profile is one, and an item to be judged is one.
- *One shared transformer*: tokens of the past attend causally among themselves; an item to be judged goes through the same layers and
  attends to the past that its page knows. So its score rests on everything before its page and on its page's context, and neither on
  its own page's labels nor on anything later.
- Items of a page do not see each other. A score then means the same on a page of 12, among 512 generated candidates, or alone; rewards of a
  group and R* can be compared, and the order and number of candidates change nothing. What the list has in common (user, past, context)
  is computed once for it.
- *Adaptive*: user state and context gate the item's features (a gated fusion), so one feature weighs differently by scenario.
- *MaRI*: the fusion's product `W [u; x]` is computed as `W_u u + W_x x`, the first once a page, the second once an item.
- *Funnel*: heads give click, cart given click, purchase given cart. Their likelihood is that of the strongest action, so each head learns
  from those who came that far, and the probabilities that are returned never grow along the funnel.

Legend: B samples, R pages, A asked pages, C items of all pages, Q items of asked pages, S slots of the past (0 the profile, then pages), T
items of a sample's asked pages (padded), U items of the batch, D width, E of the fusion, H heads of the funnel.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from oxyray.config import RankerConfig
from oxyray.data.batch import pad_index
from oxyray.model.items import Vocab
from oxyray.model.layers import Attention, Dropout, RMSNorm, SwiGLU, Tensor, rotate
from oxyray.reward.funnel import HEADS, FunnelModel, Rows
from oxyray.reward.packing import RankBatch


class Layer(nn.Module):
    """A transformer layer in two steps, so that the past is computed once for whatever is judged before it."""

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = RMSNorm(config.width), RMSNorm(config.width)
        self.attention = Attention(config.width, config.heads, 0.0)
        self.mlp = SwiGLU(config.width, config.hidden)
        self.dropout = Dropout(config.dropout)

    def past(self, x_BSD: Tensor, position_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The past attends to itself, causally: its next state, its keys and its values."""
        normed = self.norm_attention(x_BSD)
        key, value = self.attention.key_value(normed)
        key = rotate(key, position_BS)
        return self._step(x_BSD, self.attention.mix(rotate(self.attention.query(normed), position_BS), key, value, causal=True)), key, value

    def judge(self, x_BTD: Tensor, position_BT: Tensor, key: Tensor, value: Tensor, mask_BTS: Tensor) -> Tensor:
        """Items attend to the past that their page knows."""
        query = rotate(self.attention.query(self.norm_attention(x_BTD)), position_BT)
        return self._step(x_BTD, self.attention.mix(query, key, value, mask_BTS[:, None]))

    def _step(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class Fusion(nn.Module):
    """Item features gated by user and context: the product `W [u; x]` re-parameterised without loss as `W_u u + W_x x` (MaRI)."""

    def __init__(self, user: int, width: int, hidden: int) -> None:
        super().__init__()
        self.of_user = nn.Linear(user, 2 * hidden)
        self.of_item = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, user_AV: Tensor, item_UD: Tensor, page_Q: Tensor, item_Q: Tensor) -> Tensor:
        """Item `item_Q` on asked page `page_Q`: (Q, D)."""
        # Once a distinct item, or once a candidate where those are fewer (a long past behind a short list).
        few = len(item_Q) < len(item_UD)
        of_item_QE = self.of_item(item_UD[item_Q]) if few else self.of_item(item_UD)[item_Q]
        gate, value = (self.of_user(user_AV)[page_Q] + of_item_QE).chunk(2, dim=-1)
        return item_UD[item_Q] + self.down(F.silu(gate) * value)


class Ranker(FunnelModel):
    def __init__(self, config: RankerConfig, vocab: Vocab) -> None:
        super().__init__(config, vocab)
        D = config.width
        self.action = nn.Embedding(1 + vocab.actions, D)
        self.taken, self.passed = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.input_norm, self.norm = RMSNorm(D), RMSNorm(D)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.fusion = Fusion(3 * D, D, config.hidden)
        self.heads = nn.Linear(D, len(HEADS))
        nn.init.normal_(self.action.weight, std=0.02)

    def forward(self, batch: RankBatch, rows: Rows) -> Tensor:
        item_UD = self.items(batch.items, rows["item"])
        context_RD = self._context(batch)
        x_BSD, position_BS = self._past(batch, rows, item_UD, context_RD)
        kept = []
        layers = cast(list[Layer], list(self.layers))
        for layer in layers:
            x_BSD, key, value = layer.past(x_BSD, position_BS)
            kept.append((key, value))
        user_AV = self._user(batch, self.norm(x_BSD), item_UD, context_RD)
        asked_C = batch.asked_R[batch.page_C()]
        page_Q = batch.page_C()[asked_C]
        place_R = torch.cumsum(batch.asked_R, 0) - 1
        x_QD = self.dropout(self.fusion(user_AV, item_UD, place_R[page_Q], batch.item_C[asked_C]))
        x_QD = x_QD + self._crossed(batch, page_Q, batch.item_C[asked_C])
        count_B = torch.bincount(batch.sample_R()[page_Q], minlength=len(batch.user_B))
        index_BT, real_BT = pad_index(F.pad(torch.cumsum(count_B, 0), (1, 0)))
        visible_BT = torch.where(real_BT, batch.visible_R[page_Q][index_BT], 0)
        mask_BTS = position_BS[:, None] <= visible_BT[..., None]
        x_BTD = x_QD[index_BT]
        for layer, (key, value) in zip(layers, kept, strict=True):
            x_BTD = layer.judge(x_BTD, visible_BT + 1, key, value, mask_BTS)
        return self.heads(self.norm(x_BTD[real_BT]))

    def _past(self, batch: RankBatch, rows: Rows, item_UD: Tensor, context_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Profile and pages as tokens (B, S, D), and their positions. A page's token tells what was done there, so only pages that know it
        may attend to it."""
        page_C, vector_CD = batch.page_C(), item_UD[batch.item_C]
        taken_C, passed_C = batch.done_C > 0, (batch.done_C == 0) & batch.seen_C
        empty_RD = torch.zeros_like(context_RD)
        taken_CD = torch.where(taken_C[:, None], vector_CD + self.action(batch.done_C), 0)
        taken_RD = empty_RD.index_add(0, page_C, taken_CD)
        passed_RD = empty_RD.index_add(0, page_C, torch.where(passed_C[:, None], vector_CD, 0))
        passed_R = torch.zeros_like(batch.time_R).index_add(0, page_C, passed_C.long())
        page_RD = context_RD + self.taken(taken_RD) + self.passed(passed_RD / passed_R.clamp(min=1)[:, None])
        index_BS, _ = pad_index(batch.page_offset)
        x_BSD = torch.cat([self._person(batch, rows)[:, None], page_RD[index_BS]], dim=1)
        position_BS = torch.arange(x_BSD.shape[1], device=x_BSD.device).expand(len(x_BSD), -1)
        return self.dropout(self.input_norm(x_BSD)), position_BS

    def _user(self, batch: RankBatch, memory_BSD: Tensor, item_UD: Tensor, context_RD: Tensor) -> Tensor:
        """What all items of an asked page share: where the user's past stands, context, trigger item: (A, 3D)."""
        asked_R = batch.asked_R
        state_AD = memory_BSD[batch.sample_R()[asked_R], batch.visible_R[asked_R]]
        return torch.cat([state_AD, context_RD[asked_R], self._trigger(batch, item_UD)], dim=-1)


__all__ = ["HEADS", "Fusion", "Layer", "Ranker", "Rows"]
