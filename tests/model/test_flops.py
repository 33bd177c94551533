"""Counted operations against those that torch saw, and against a count by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from oxyray.config import ContextConfig, InstructionConfig, MoEConfig, RetrievalConfig
from oxyray.model.flops import forward_flops, training_flops
from tests.model.toys import Toy

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "codes": {"head": "codes", "item_loss": 0.0},
    "two tokens": {"instruction": InstructionConfig(content="concatenated", position="left")},
    "q2i": {"retrieval": RetrievalConfig(q2i=0.4)},
    "lazy": {"backbone": "lazy", "decoder_layers": 2, "context": ContextConfig(sets=2, groups=1, apart=True)},
    "no instruction": {"instruction": InstructionConfig(position="none"), "user_table": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_torch_multiplies_is_what_is_counted(kind: str) -> None:
    """Of matrix products. One request with a full history has no padding; attention, of which torch counts masked pairs too, and the scores
    of children, which are no matrix product, are counted apart."""
    toy = Toy(**KINDS[kind])
    event = int(np.argmax(toy.timeline.visible_E))
    batch = toy.request_batch(np.array([event]))
    if toy.config.item_negatives:
        batch = dataclasses.replace(batch, negative_N=torch.arange(3))
    assert batch.visible_Q.item() == toy.config.history
    rows = toy.lookup(batch.lookups())
    with FlopCounterMode(display=False) as counter:
        toy.policy.loss(batch, rows)
    seen = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for op, flops in seen.items() if "attention" not in op)
    D, config, steps = 16, toy.config, toy.policy.instruction.prompt(toy.policy._told(batch, rows_of(toy, batch))).shape[1] + 2
    slots = batch.visible_Q.item() + 1
    encoded = config.encoder_layers * slots * (slots + 1) / 2 if toy.policy.encoder is not None else 0
    pairs = encoded + config.decoder_layers * (steps * (steps + 1) / 2 + steps * slots)
    children = 0
    if config.head == "tied":
        path = toy.policy.tree.path_IL[batch.items.ids_U[batch.target_Q]][0]
        children = sum(int(toy.policy.tree.children_of(level - 1, path[None, level - 1])[1]) for level in (1, 2))
    assert sum(forward_flops(toy.policy, batch).values()) == products + 2 * (2 * D * pairs + children * D)
    assert training_flops(toy.policy, batch) == 3 * sum(forward_flops(toy.policy, batch).values())


def rows_of(toy: Toy, batch: Any) -> torch.Tensor:
    return toy.policy.items(batch.items, toy.lookup(batch.lookups())["item"])


def test_a_mixture_counts_its_active_experts_and_padding_counts_nothing() -> None:
    dense, mixture = (Toy(moe=moe) for moe in (MoEConfig(), MoEConfig(experts=6, active=2)))
    batch = dense.training_batch()
    tokens = len(batch.item_N) + batch.segments
    steps = batch.queries * 4
    feeds = 2 * tokens + 2 * steps  # two layers of each
    wider = sum(forward_flops(mixture.policy, batch).values()) - sum(forward_flops(dense.policy, batch).values())
    assert wider == 2 * feeds * (2 * 2 * 16 * 24 + 6 * 16 - 3 * 16 * 24)
    halves = [dense.request_batch(np.array([event])) for event in (20, 31)]
    both = dense.request_batch(np.array([20, 31]))
    for part in ("encoder", "decoder", "head"):
        assert forward_flops(dense.policy, both)[part] == sum(forward_flops(dense.policy, half)[part] for half in halves)
