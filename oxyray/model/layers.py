"""Small parts shared by encoder and decoder: RMSNorm, SwiGLU, rotary positions, attention over heads.

Legend: B batch, T queries, S keys, H heads, E width of a head, D width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor


def precise(x: Tensor) -> Tensor:
    """At least float32: in bfloat16 a few hundred likenesses, or probabilities, take a hundred values."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, self.eps)


class Dropout(nn.Module):
    """Dropout whose CPU mask costs one random byte an element (drawing a Bernoulli there takes ten times as long). The CPU rate is a
    multiple of 1/256."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.rate)
        threshold = round(self.rate * 256)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= threshold
        return x * (keep * (256 / (256 - threshold)))


class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer 2020), D -> hidden -> D."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


def rotate(x_BHTE: Tensor, position_BT: Tensor) -> Tensor:
    """Rotary positions: the product of a query at p and a key at q depends on p - q."""
    half = x_BHTE.shape[-1] // 2
    frequency = torch.exp(torch.arange(half, device=x_BHTE.device, dtype=torch.float32) * (-torch.log(torch.tensor(10000.0)) / half))
    angle_BTE = position_BT[..., None].float() * frequency
    cos, sin = angle_BTE.cos().to(x_BHTE.dtype)[:, None], angle_BTE.sin().to(x_BHTE.dtype)[:, None]
    a, b = x_BHTE[..., :half], x_BHTE[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head attention in pieces: `query`, `key_value` and `mix` can be called apart, so that decoding computes each piece once."""

    def __init__(self, width: int, heads: int, dropout: float, own_keys: bool = True) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False) if own_keys else None
        self.to_out = nn.Linear(width, width, bias=False)

    def query(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, E)."""
        return self._split(self.to_q(x_BTD))

    def key_value(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> keys and values, each (B, H, S, E)."""
        assert self.to_kv is not None
        key, value = self.to_kv(x_BSD).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def mix(self, q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attend and project: (B, T, D). `mask` is True where a query may look. Keys and values may have fewer heads (B, G, S, E): then
        H / G neighbouring heads of the query look at the same."""
        dropout = self.dropout if self.training else 0.0
        grouped = k_BHSE.shape[1] != self.heads
        return self.merge(F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, mask, dropout, causal, enable_gqa=grouped))

    def merge(self, mixed_BHTE: Tensor) -> Tensor:
        return self.to_out(mixed_BHTE.transpose(1, 2).flatten(2))

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)
