"""Encoder over a user's profile and history: one token an event, one pass a segment (paper 2.3.3; causal, so that every event can be a
training target). Segments lie end to end, so padding costs nothing.

Legend: B segments, S memory slots (slot 0 is the profile, slot s the s-th event), N slots of all segments, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from oxyray.config import ModelConfig
from oxyray.model.attention import Documents, attend
from oxyray.model.layers import Attention, Dropout, RMSNorm, Tensor, rotate
from oxyray.model.moe import feed_forward


class EncoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = RMSNorm(config.width), RMSNorm(config.width)
        self.attention = Attention(config.width, config.heads, 0.0)
        self.mlp = feed_forward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_ND: Tensor, position_N: Tensor, documents: Documents) -> Tensor:
        x_ND = x_ND + self.dropout(self._attended(self.norm_attention(x_ND)[None], position_N[None], documents))
        return x_ND + self.dropout(self.mlp(self.norm_mlp(x_ND)))

    def _attended(self, x_1ND: Tensor, position_1N: Tensor, documents: Documents) -> Tensor:
        key, value = self.attention.key_value(x_1ND)
        query = rotate(self.attention.query(x_1ND), position_1N)
        q_NHE, k_NHE, v_NHE = (each[0].transpose(0, 1) for each in (query, rotate(key, position_1N), value))
        return self.attention.to_out(attend(q_NHE, k_NHE, v_NHE, documents).flatten(1))


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.causal = config.causal_encoder
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = RMSNorm(config.width)

    def forward(self, x_BSD: Tensor, position_BS: Tensor, real_BS: Tensor) -> Tensor:
        """Memory (B, S, D), zeros where a slot is not real. A segment's real slots come first."""
        offset_B = torch.cat([real_BS.new_zeros(1, dtype=torch.int64), real_BS.sum(1).cumsum(0)])
        documents = Documents.causal(offset_B) if self.causal else Documents.bidirectional(offset_B)
        slot_N = real_BS.flatten().nonzero()[:, 0]
        x_ND, position_N = x_BSD.flatten(0, 1).index_select(0, slot_N), position_BS.flatten()[slot_N]
        for layer in self.layers:
            x_ND = layer(x_ND, position_N, documents)
        memory_xD = torch.zeros_like(x_BSD.flatten(0, 1), dtype=x_ND.dtype).index_copy(0, slot_N, self.norm(x_ND))
        return memory_xD.view_as(x_BSD)
