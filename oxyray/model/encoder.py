"""Encoder over a user's profile and history: one token an event, one pass a segment (paper 2.3.3; causal, so that every event can be a
training target).

Legend: B segments, S memory slots (slot 0 is the profile, slot s the s-th event), D width.
"""

from __future__ import annotations

import torch
from torch import nn

from oxyray.config import ModelConfig
from oxyray.model.layers import Attention, Dropout, RMSNorm, Tensor, rotate
from oxyray.model.moe import MixtureOfExperts, feed_forward


class EncoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = RMSNorm(config.width), RMSNorm(config.width)
        self.attention = Attention(config.width, config.heads, 0.0)
        self.mlp = feed_forward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BSD: Tensor, position_BS: Tensor, real_BS: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        normed = self.norm_attention(x_BSD)
        key, value = self.attention.key_value(normed)
        query = rotate(self.attention.query(normed), position_BS)
        x_BSD = x_BSD + self.dropout(self.attention.mix(query, rotate(key, position_BS), value, mask, causal))
        return x_BSD + self.dropout(self._fed(self.norm_mlp(x_BSD), real_BS))

    def _fed(self, x_BSD: Tensor, real_BS: Tensor) -> Tensor:
        """Experts see no padding: it would count as load."""
        if not isinstance(self.mlp, MixtureOfExperts):
            return self.mlp(x_BSD)
        fed_BSD = torch.zeros_like(x_BSD)
        fed_BSD[real_BS] = self.mlp(x_BSD[real_BS]).to(x_BSD.dtype)
        return fed_BSD


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
            x_BSD = layer(x_BSD, position_BS, real_BS, mask, self.causal)
        return self.norm(x_BSD)
