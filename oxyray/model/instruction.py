"""The composite instruction: what the decoder is told of a request before it generates (paper 2.3.2, Tables 5 and 6).

It has two parts. The *scenario* says where and when: the scenario's ID and the clock. The *trigger* says what it starts from: an item, and
what the user typed, each with a learned default where there is none. Settings say which parts there are, whether they are one token or
two, and where they stand beside BOS. All are normalised: beside the trigger's vectors a scenario's small ones would hardly be heard.

Legend: Q queries, U items of the batch, W texts of the batch, T tokens of the prompt, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from oxyray.config import InstructionConfig
from oxyray.data.batch import Batch
from oxyray.model.items import Clock, Vocab
from oxyray.model.layers import RMSNorm, Tensor


class Told(NamedTuple):
    """The instruction's parts."""

    scenario_QD: Tensor
    trigger_QD: Tensor


class Instruction(nn.Module):
    def __init__(self, config: InstructionConfig, vocab: Vocab, width: int) -> None:
        super().__init__()
        self.config = config
        self.scenario = nn.Embedding(vocab.scenarios, width)
        self.clock = Clock(width) if vocab.clock else None
        self.scenario_norm, self.item_norm = RMSNorm(width), RMSNorm(width)
        self.bos, self.no_trigger, self.mark = (nn.Parameter(torch.randn(width) * 0.02) for _ in range(3))
        self.fuse = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width)) if config.content == "fused" else None
        reads, tells = bool(config.text and vocab.query), config.content != "scenario" and config.position != "none"
        self.no_text = nn.Parameter(torch.randn(width) * 0.02) if reads else None
        self.text_norm = RMSNorm(width) if reads else None
        self.carry = nn.Linear(width, width, bias=False) if tells else None
        nn.init.normal_(self.scenario.weight, std=0.02)
        if self.carry is not None:
            nn.init.eye_(self.carry.weight)

    def told(self, batch: Batch, item_UD: Tensor, text_WD: Tensor | None) -> Told:
        """`text_WD` are the batch's texts, None where the model reads none. In training a set share of them is hidden."""
        scenario_QD = self.scenario(batch.scenario_Q)
        if self.clock is not None:
            scenario_QD = scenario_QD + self.clock(batch.time_Q, batch.time_Q - last_time(batch))
        trigger_QD = torch.where((batch.trigger_Q >= 0)[:, None], self.item_norm(item_UD[batch.trigger_Q.clamp(min=0)]), self.no_trigger)
        if text_WD is not None and self.no_text is not None and self.text_norm is not None:
            text_Q = torch.where(batch.text_Q >= 0, batch.text_Q, len(text_WD))
            if self.training and self.config.dropout:
                hidden_Q = torch.rand(len(text_Q), device=text_Q.device) < self.config.dropout
                text_Q = torch.where(hidden_Q, len(text_WD), text_Q)
            trigger_QD = trigger_QD + torch.cat([self.text_norm(text_WD), self.no_text[None]])[text_Q]
        return Told(self.scenario_norm(scenario_QD), trigger_QD)

    def prompt(self, told: Told) -> Tensor:
        """(Q, T, D): BOS and the instruction, in the order of the setting. What follows the last token is the first code."""
        bos_Q1D = self.bos.expand_as(told.scenario_QD)[:, None]
        match self.config.position:
            case "none":
                return bos_Q1D
            case "right":
                return torch.cat([bos_Q1D, self._tokens(told)], dim=1)
            case "left":
                return torch.cat([self._tokens(told), bos_Q1D], dim=1)
            case "replace":
                return self._tokens(told)
            case "add":
                return bos_Q1D + self._tokens(told).sum(1, keepdim=True)

    def carried(self, told: Told) -> Tensor | float:
        """What every token of the decoder starts from besides: the trigger part itself, so that the way from a word to the items that match
        it need not lead through attention: (Q, D)."""
        return 0.0 if self.carry is None else self.carry(told.trigger_QD)

    def _tokens(self, told: Told) -> Tensor:
        match self.config.content:
            case "scenario":
                parts = [told.scenario_QD]
            case "trigger":
                parts = [told.trigger_QD]
            case "concatenated":
                parts = list(told)
            case "fused":
                assert self.fuse is not None
                parts = [told.scenario_QD + self.fuse(torch.cat(told, dim=-1))]
        return torch.stack(parts, dim=1) + self.mark


def segments_of(batch: Batch) -> Tensor:
    """The segment of each query: (Q,)."""
    return torch.repeat_interleave(torch.arange(batch.segments, device=batch.user_B.device), torch.diff(batch.query_offset))


def last_time(batch: Batch) -> Tensor:
    """Time of the last event that each query sees; its own time where it sees none: (Q,)."""
    last_Q = batch.history_offset[segments_of(batch)] + batch.visible_Q - 1
    time_N = torch.cat([batch.time_N, batch.time_Q[:1]])
    return torch.where(batch.visible_Q > 0, time_N[last_Q.clamp(0, len(time_N) - 1)], batch.time_Q)
