"""Item vectors: one vector an item from its sparse row, SID codes, side features and text (paper 2.2.1, E_id + E_side + TE).

Legend: U items of a block, L SID levels, C side features, F text width, R row width, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from oxyray.config import ModelConfig
from oxyray.data.batch import ItemBlock
from oxyray.model.layers import RMSNorm, Tensor


@dataclass(frozen=True, kw_only=True)
class Vocab:
    """Sizes that the data fixes: what a saved model was built for. `text` and `query` are the widths of an item's and of a query's text
    vector, 0 where there are none. `clock` says that times are seconds, so hour, month and gaps mean something."""

    items: int
    users: int
    scenarios: int
    actions: int
    side: tuple[int, ...]
    profile: tuple[int, ...]
    levels: int
    width: int
    text: int
    clock: bool
    query: int = 0


class ItemEncoder(nn.Module):
    def __init__(self, config: ModelConfig, vocab: Vocab) -> None:
        super().__init__()
        D = config.width
        self.row = nn.Linear(config.row_dim, D, bias=False) if config.row_dim != D else nn.Identity()
        self.code = nn.ModuleList(nn.Embedding(vocab.width, D) for _ in range(vocab.levels))
        self.side = nn.ModuleList(nn.Embedding(size, D) for size in vocab.side)
        self.text = nn.Linear(vocab.text, D, bias=False) if config.text_input and vocab.text else None
        for table in (*self.code, *self.side):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, block: ItemBlock, rows_UR: Tensor) -> Tensor:
        """(U, D)."""
        x_UD = self.row(rows_UR)
        for level, table in enumerate(self.code):
            x_UD = x_UD + table(block.codes_UL[:, level])
        for column, table in enumerate(self.side):
            x_UD = x_UD + table(block.side_UC[:, column])
        if self.text is not None and block.text_UF is not None:
            x_UD = x_UD + self.text(block.text_UF)
        return x_UD


class Clock(nn.Module):
    """What the time of a request says: hour of day, month, and the time since the user's last event (log2 of minutes)."""

    GAPS = 24

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hour, self.month, self.gap = nn.Embedding(24, width), nn.Embedding(12, width), nn.Embedding(self.GAPS, width)
        for table in (self.hour, self.month, self.gap):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, time: Tensor, gap: Tensor) -> Tensor:
        """Seconds since 1970 (UTC) and seconds since the last event, any shape: (..., D)."""
        day = torch.div(time, 86400, rounding_mode="floor")
        month = torch.remainder(torch.div(torch.remainder(day, 365.2425), 30.44, rounding_mode="floor").long(), 12)
        hour = torch.remainder(torch.div(time, 3600, rounding_mode="floor"), 24)
        return self.hour(hour) + self.month(month) + self.gap(self.gap_bucket(gap))

    @classmethod
    def gap_bucket(cls, gap: Tensor) -> Tensor:
        return torch.log2(1 + gap.clamp(min=0).float() / 60).long().clamp(max=cls.GAPS - 1)


__all__ = ["Clock", "ItemEncoder", "RMSNorm", "Vocab"]
