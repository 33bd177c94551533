"""What a lazy decoder looks at in place of an encoder's memory (OneRec-V2): the user's tokens go once through one projection, and its sets
of keys and values serve all layers, which have no projections of their own for them.

Legend: B segments, S slots, G groups of heads, E head width, D width.
"""

from __future__ import annotations

from torch import nn

from oxyray.config import ModelConfig
from oxyray.model.layers import RMSNorm, Tensor, rotate

KeyValue = tuple[Tensor, Tensor]


class Context(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sets, self.groups, self.apart = config.context.sets, config.context.groups, config.context.apart
        one = config.width // config.heads * self.groups
        self.to_sets = nn.Linear(config.width, self.sets * (2 if self.apart else 1) * one, bias=False)
        self.norms = nn.ModuleList(RMSNorm(one) for _ in range(self.sets * (2 if self.apart else 1)))

    def forward(self, x_BSD: Tensor, position_BS: Tensor) -> list[KeyValue]:
        """Keys (turned to their position) and values of every set: (B, G, S, E) each."""
        made = [
            norm(part).unflatten(-1, (self.groups, -1)).transpose(1, 2)
            for norm, part in zip(self.norms, self.to_sets(x_BSD).chunk(len(self.norms), dim=-1), strict=True)
        ]
        keys, values = (made[::2], made[1::2]) if self.apart else (made, made)
        return [(rotate(key, position_BS), value) for key, value in zip(keys, values, strict=True)]
