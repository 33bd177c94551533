"""Decoder over `BOS, instruction, s1..sL`, cross-attending to the encoder's memory, or to the context that a lazy decoder has in its place.

Two ways through the same weights, held equal by a test. `forward` runs all queries of a batch with teacher forcing. `start` and `advance`
decode K beams a request: cross-attention keys and values are made once a request and never expanded; the prompt's keys and values are
shared by all beams; each beam owns only those of its generated tokens, gathered by ancestry.

Legend: B segments or requests, Q queries, P queries a segment (padded), T decoder tokens, K beams, S memory slots, H heads, E head width,
D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from oxyray.config import ModelConfig
from oxyray.model.context import KeyValue
from oxyray.model.layers import Attention, Dropout, RMSNorm, Tensor, rotate
from oxyray.model.moe import feed_forward


@dataclass
class Fetched:
    """k slots that each query has for itself; `visible_BPk` marks those that exist. `sets` as of Memory, for all P · k slots."""

    memory_BPkD: Tensor
    position_BPk: Tensor
    visible_BPk: Tensor
    sets: list[KeyValue] | None = None


@dataclass
class Memory:
    """What queries look at: encoder output, which slots a query may see, and where the query stands in time. `query_BP` are the queries of
    each segment as rows of the flat query axis; `real_BP` marks those that exist."""

    memory_BSD: Tensor
    position_BS: Tensor
    query_BP: Tensor
    real_BP: Tensor
    visible_BPS: Tensor
    position_BP: Tensor
    own: Fetched | None = None
    sets: list[KeyValue] | None = None  # of a lazy decoder: keys and values that its layers share

    def fetch(self, fetched_BPkD: Tensor, found_BPk: Tensor) -> None:
        """Give each query slots that it alone sees, where `found_BPk`. They stand before all others in time, the last at -1. The slots of a
        segment's only query are like all others: then decoding knows of one kind."""
        before_BPk = -found_BPk.flip(-1).cumsum(-1).flip(-1)
        if found_BPk.shape[1] != 1:
            self.own = Fetched(fetched_BPkD, before_BPk, found_BPk)
            return
        self.memory_BSD = torch.cat([self.memory_BSD, fetched_BPkD[:, 0]], dim=1)
        self.position_BS = torch.cat([self.position_BS, before_BPk[:, 0]], dim=1)
        self.visible_BPS = torch.cat([self.visible_BPS, found_BPk], dim=2)


@dataclass
class BeamState:
    """Cached keys and values of one decoder layer: `cross` and `prompt` a request, `own` a beam: a pair (B, H, K, E) for each generated
    token."""

    cross: tuple[Tensor, Tensor]
    prompt: tuple[Tensor, Tensor]
    own: list[tuple[Tensor, Tensor]]

    def follow(self, origin_BK: Tensor) -> None:
        """Each beam takes over the tokens of the beam that it continues."""
        index = origin_BK[:, None, :, None]
        self.own = [(_gather(key, index), _gather(value, index)) for key, value in self.own]


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, place: int) -> None:
        super().__init__()
        lazy = config.backbone == "lazy"
        self.set = place * config.context.sets // config.decoder_layers
        self.norm_self, self.norm_cross, self.norm_mlp = RMSNorm(config.width), RMSNorm(config.width), RMSNorm(config.width)
        self.self_attention = Attention(config.width, config.heads, 0.0)
        self.cross_attention = Attention(config.width, config.heads, 0.0, own_keys=not lazy)
        self.mlp = feed_forward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_QTD: Tensor, memory: Memory) -> Tensor:
        return self.prefill(x_QTD, memory)[0]

    def prefill(self, x_QTD: Tensor, memory: Memory) -> tuple[Tensor, BeamState]:
        """All tokens at once: (Q, T, D), and the keys and values that were made on the way."""
        normed = self.norm_self(x_QTD)
        own, cross = self.self_attention.key_value(normed), self._keys(memory.memory_BSD, memory.position_BS, memory.sets)
        x_QTD = x_QTD + self.dropout(self.self_attention.mix(self.self_attention.query(normed), *own, causal=True))
        x_QTD = x_QTD + self.dropout(self._cross(self.norm_cross(x_QTD), memory, cross))
        return x_QTD + self.dropout(self.mlp(self.norm_mlp(x_QTD))), BeamState(cross, own, [])

    def _cross(self, x_QTD: Tensor, memory: Memory, key_value: tuple[Tensor, Tensor]) -> Tensor:
        (batch, places), steps = memory.query_BP.shape, x_QTD.shape[1]
        query = self.cross_attention.query(x_QTD[memory.query_BP.flatten()].view(batch, places * steps, -1))
        query = rotate(query, memory.position_BP.repeat_interleave(steps, dim=1))
        mask = memory.visible_BPS.repeat_interleave(steps, dim=1)[:, None]
        if memory.own is None:
            mixed = self.cross_attention.mix(query, *key_value, mask)
        else:
            mixed = self.cross_attention.merge(self._with_own(query, *key_value, mask, memory.own))
        return mixed.view(batch, places, steps, -1)[memory.real_BP]

    def _with_own(self, query_BHxE: Tensor, key_BHSE: Tensor, value_BHSE: Tensor, mask_B1xS: Tensor, own: Fetched) -> Tensor:
        """One softmax over the slots that queries share and those that each has for itself (x = P · T): memory for S + k slots a query,
        where keys side by side would take S + P · k."""
        places, slots = own.visible_BPk.shape[1:]
        key_BHSE, value_BHSE = (self._all_heads(each) for each in (key_BHSE, value_BHSE))
        apart = self._keys(own.memory_BPkD.flatten(1, 2), own.position_BPk.flatten(1), own.sets)
        key, value = (self._all_heads(each).unflatten(2, (places, slots)) for each in apart)
        query_BHPTE = query_BHxE.unflatten(2, (places, -1))
        apart_BHPTk = (query_BHPTE @ key.transpose(-1, -2)).masked_fill(~own.visible_BPk[:, None, :, None], -torch.inf)
        shared_BHxS = (query_BHxE @ key_BHSE.transpose(-1, -2)).masked_fill(~mask_B1xS, -torch.inf)
        score = torch.cat([shared_BHxS, apart_BHPTk.flatten(2, 3)], dim=-1) / query_BHxE.shape[-1] ** 0.5
        shared_BHxS, apart_BHxk = score.softmax(-1).split([key_BHSE.shape[2], slots], dim=-1)
        return shared_BHxS @ value_BHSE + (apart_BHxk.unflatten(2, (places, -1)) @ value).flatten(2, 3)

    def _keys(self, memory_BSD: Tensor, position_BS: Tensor, sets: list[KeyValue] | None) -> KeyValue:
        """Keys, turned to their position, and values of slots."""
        if sets is not None:
            return sets[self.set]
        key, value = self.cross_attention.key_value(memory_BSD)
        return rotate(key, position_BS), value

    def _all_heads(self, x_BGSE: Tensor) -> Tensor:
        return x_BGSE.repeat_interleave(self.cross_attention.heads // x_BGSE.shape[1], dim=1)

    def step(self, x_BKD: Tensor, state: BeamState, mask_BS: Tensor, position_B1: Tensor) -> Tensor:
        """One generated token for each of K beams; `state.own` already holds the ancestors' tokens in beam order and receives this
        one's."""
        normed = self.norm_self(x_BKD)
        query_BHKE = self.self_attention.query(normed)
        state.own.append(self.self_attention.key_value(normed))
        shared = query_BHKE @ state.prompt[0].transpose(-1, -2)
        own = torch.stack([(query_BHKE * key).sum(-1) for key, _ in state.own], dim=-1)
        weight = torch.softmax(torch.cat([shared, own], dim=-1) / query_BHKE.shape[-1] ** 0.5, dim=-1)
        shared, own = weight.split([shared.shape[-1], len(state.own)], dim=-1)
        mixed = shared @ state.prompt[1]
        for place, (_, value) in enumerate(state.own):
            mixed = torch.addcmul(mixed, own[..., place, None], value)
        x_BKD = x_BKD + self.self_attention.merge(mixed)
        cross_query = rotate(self.cross_attention.query(self.norm_cross(x_BKD)), position_B1)  # all beams stand at one position
        x_BKD = x_BKD + self.cross_attention.mix(cross_query, *state.cross, mask_BS[:, None, None])
        return x_BKD + self.mlp(self.norm_mlp(x_BKD))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config, place) for place in range(config.decoder_layers))
        self.norm = RMSNorm(config.width)

    def forward(self, x_QTD: Tensor, memory: Memory) -> Tensor:
        """Teacher forcing: hidden states (Q, T, D)."""
        for layer in self.layers:
            x_QTD = layer(x_QTD, memory)
        return self.norm(x_QTD)

    def _layers(self) -> list[DecoderLayer]:
        return cast(list[DecoderLayer], list(self.layers))

    def start(self, prompt_BTD: Tensor, memory: Memory) -> tuple[Tensor, list[BeamState]]:
        """Run the prompt of requests with one query each: the last token's hidden state (B, D) and the caches to `advance` from."""
        x, states = prompt_BTD, []
        for layer in self._layers():
            x, state = layer.prefill(x, memory)
            states.append(state)
        return self.norm(x[:, -1]), states

    def advance(self, x_BKD: Tensor, states: list[BeamState], memory: Memory, origin_BK: Tensor | None) -> Tensor:
        """Feed one token to K beams that continue beams `origin_BK` of the last step: hidden states (B, K, D)."""
        for layer, state in zip(self._layers(), states, strict=True):
            if origin_BK is not None:
                state.follow(origin_BK)
            x_BKD = layer.step(x_BKD, state, memory.visible_BPS[:, 0], memory.position_BP[:, :1])
        return self.norm(x_BKD)


def _gather(own_BHKE: Tensor, index_B1K1: Tensor) -> Tensor:
    return own_BHKE.gather(2, index_B1K1.expand(-1, own_BHKE.shape[1], -1, own_BHKE.shape[3]))
