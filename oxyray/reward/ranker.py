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

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from oxyray.config import ModelConfig
from oxyray.data.batch import pad_index
from oxyray.errors import ConfigError
from oxyray.model.items import Clock, ItemEncoder, Vocab
from oxyray.model.layers import Attention, Dropout, RMSNorm, SwiGLU, Tensor, rotate
from oxyray.model.losses import LossOut
from oxyray.reward.packing import RankBatch

HEADS = ("click", "cart", "purchase")
Rows = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """The unified ranker.

    width: size of a token's vector
    heads: attention heads; must divide width
    layers: transformer layers
    hidden: inner size of the feed-forward part and of the fusion
    dropout: share of activations dropped in training
    history: latest pages of a user in one sample; at least 2
    row_dim: size of a row in the item and user tables; a multiple of 4
    user_table: give every user a learned row
    text_input: give the ranker the items' text vectors
    """

    width: int = 64
    heads: int = 4
    layers: int = 2
    hidden: int = 128
    dropout: float = 0.1
    history: int = 50
    row_dim: int = 32
    user_table: bool = True
    text_input: bool = True

    def __post_init__(self) -> None:
        for name, least in {"width": 1, "heads": 1, "layers": 1, "hidden": 1, "history": 2, "row_dim": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"reward.ranker.{name}: must be at least {least}, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ConfigError(f"reward.ranker.heads: twice the heads must divide reward.ranker.width={self.width}, got {self.heads} heads")
        if self.row_dim % 4:
            raise ConfigError(f"reward.ranker.row_dim: must be a multiple of 4 (an embedding kernel's rule), got {self.row_dim}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"reward.ranker.dropout: must lie in [0, 1), got {self.dropout}")


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


class Ranker(nn.Module):
    """As the policy, it looks no row up: `ranker(batch, rows)` gets the rows of `batch.lookups()`."""

    def __init__(self, config: RankerConfig, vocab: Vocab) -> None:
        super().__init__()
        D = config.width
        self.config, self.vocab = config, vocab
        self.items = ItemEncoder(ModelConfig(width=D, heads=config.heads, row_dim=config.row_dim, text_input=config.text_input), vocab)
        self.user = nn.Linear(config.row_dim, D, bias=False) if config.user_table else None
        self.profile = nn.ModuleList(nn.Embedding(size, D) for size in vocab.profile)
        self.profile_base = nn.Parameter(torch.randn(D) * 0.05)
        self.scenario, self.action = nn.Embedding(vocab.scenarios, D), nn.Embedding(1 + vocab.actions, D)
        self.clock = Clock(D) if vocab.clock else None
        self.query = nn.Linear(vocab.text, D, bias=False) if self.items.text is not None else None
        self.match = nn.Parameter(torch.zeros(D)) if self.items.text is not None else None
        self.taken, self.passed = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.no_trigger = nn.Parameter(torch.randn(D) * 0.02)
        self.input_norm, self.norm = RMSNorm(D), RMSNorm(D)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.fusion = Fusion(3 * D, D, config.hidden)
        self.heads = nn.Linear(D, len(HEADS))
        for table in (self.scenario, self.action, *self.profile):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, batch: RankBatch, rows: Rows) -> Tensor:
        """Logits of click, cart given click, purchase given cart for the items of asked pages, in their order: (Q, H)."""
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
        x_QD = x_QD + self._match(batch, page_Q, batch.item_C[asked_C])
        count_B = torch.bincount(batch.sample_R()[page_Q], minlength=len(batch.user_B))
        index_BT, real_BT = pad_index(F.pad(torch.cumsum(count_B, 0), (1, 0)))
        visible_BT = torch.where(real_BT, batch.visible_R[page_Q][index_BT], 0)
        mask_BTS = position_BS[:, None] <= visible_BT[..., None]
        x_BTD = x_QD[index_BT]
        for layer, (key, value) in zip(layers, kept, strict=True):
            x_BTD = layer.judge(x_BTD, visible_BT + 1, key, value, mask_BTS)
        return self.heads(self.norm(x_BTD[real_BT]))

    def loss(self, batch: RankBatch, rows: Rows) -> LossOut:
        """Sums over asked items of the negative log-likelihood of what was done with them, in total and by head."""
        logit_QH = self(batch, rows)
        done_Q = batch.done_C[batch.asked_R[batch.page_C()]]
        stage_H = torch.arange(len(HEADS), device=done_Q.device)
        came_QH, went_QH = done_Q[:, None] >= stage_H, done_Q[:, None] > stage_H
        nll_QH = F.binary_cross_entropy_with_logits(logit_QH, went_QH.to(logit_QH.dtype), reduction="none")
        nll_H = torch.where(came_QH, nll_QH, 0).sum(0)
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

    def _context(self, batch: RankBatch) -> Tensor:
        """Where, when and with which words a page was asked for: (R, D)."""
        context_RD = self.scenario(batch.scenario_R)
        if self.clock is not None:
            context_RD = context_RD + self.clock(batch.time_R, batch.time_R - self._last_time(batch))
        if self.query is not None:
            context_RD = context_RD + self.query(batch.query_RF)
        return context_RD

    def _match(self, batch: RankBatch, page_Q: Tensor, item_Q: Tensor) -> Tensor:
        """How near an item is to its page's query in the shared text space, as a vector (Q, D); 0 without either."""
        if self.match is None or batch.query_RF is None or batch.items.text_UF is None:
            return self.heads.weight.new_zeros(())
        query_RF, text_UF = F.normalize(batch.query_RF, dim=-1), F.normalize(batch.items.text_UF, dim=-1)
        return (query_RF[page_Q] * text_UF[item_Q]).sum(-1, keepdim=True) * self.match

    def _last_time(self, batch: RankBatch) -> Tensor:
        """Time of the last page that each page knows; its own where it knows none."""
        last_R = batch.page_offset[batch.sample_R()] + batch.visible_R - 1
        return torch.where(batch.visible_R > 0, batch.time_R[last_R.clamp(min=0)], batch.time_R)

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
        profile_BD = self.profile_base.expand(len(batch.user_B), -1)
        for column, table in enumerate(self.profile):
            profile_BD = profile_BD + table(batch.profile_BP[:, column])
        if self.user is not None:
            profile_BD = profile_BD + self.user(rows["user"])
        index_BS, _ = pad_index(batch.page_offset)
        x_BSD = torch.cat([profile_BD[:, None], page_RD[index_BS]], dim=1)
        position_BS = torch.arange(x_BSD.shape[1], device=x_BSD.device).expand(len(x_BSD), -1)
        return self.dropout(self.input_norm(x_BSD)), position_BS

    def _user(self, batch: RankBatch, memory_BSD: Tensor, item_UD: Tensor, context_RD: Tensor) -> Tensor:
        """What all items of an asked page share: where the user's past stands, context, trigger item: (A, 3D)."""
        trigger_R, asked_R = batch.trigger_R, batch.asked_R
        trigger_AD = torch.where((trigger_R >= 0)[asked_R, None], item_UD[trigger_R.clamp(min=0)[asked_R]], self.no_trigger)
        state_AD = memory_BSD[batch.sample_R()[asked_R], batch.visible_R[asked_R]]
        return torch.cat([state_AD, context_RD[asked_R], trigger_AD], dim=-1)
