"""Encoder over a user's profile and history: one token an event, one pass a segment (paper 2.3.3; causal, so that every event can be a
training target).

Legend: B segments, S memory slots (slot 0 is the profile, slot s the s-th event), D width.
"""

from __future__ import annotations

from torch import nn

from oxyray.config import ModelConfig
from oxyray.model.layers import Attention, Dropout, RMSNorm, SwiGLU, Tensor, rotate


class EncoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = RMSNorm(config.width), RMSNorm(config.width)
        self.attention = Attention(config.width, config.heads, 0.0)
        self.mlp = SwiGLU(config.width, config.hidden)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BSD: Tensor, position_BS: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        normed = self.norm_attention(x_BSD)
        key, value = self.attention.key_value(normed)
        query = rotate(self.attention.query(normed), position_BS)
        x_BSD = x_BSD + self.dropout(self.attention.mix(query, rotate(key, position_BS), value, mask, causal))
        return x_BSD + self.dropout(self.mlp(self.norm_mlp(x_BSD)))


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.causal = config.causal_encoder
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = RMSNorm(config.width)

    def forward(self, x_BSD: Tensor, position_BS: Tensor, real_BS: Tensor) -> Tensor:
        """Memory (B, S, D). Padding stands behind the real tokens, so a causal mask hides it by itself; else `real_BS` masks it as a
        key."""
        mask = None if self.causal else real_BS[:, None, None, :]
        for layer in self.layers:
            x_BSD = layer(x_BSD, position_BS, mask, self.causal)
        return self.norm(x_BSD)
