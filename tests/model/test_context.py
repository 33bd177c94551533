"""The lazy decoder against loops over heads, and against itself asked in other ways."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from oxyray.config import ContextConfig, ModelConfig, RetrievalConfig
from oxyray.data.requests import Segments, training_segments
from oxyray.errors import ConfigError
from oxyray.model.layers import rotate
from tests.model.test_retrieval import decodes_as_trained, hidden
from tests.model.toys import Toy

CONTEXTS = [ContextConfig(), ContextConfig(sets=2, groups=2, apart=True), ContextConfig(sets=2)]


def lazy(context: ContextConfig, **more: Any) -> Toy:
    return Toy(**({"item_loss": 0.0, "backbone": "lazy", "decoder_layers": 3, "context": context} | more))


@pytest.mark.parametrize("context", CONTEXTS)
def test_layers_look_at_their_set_and_heads_at_their_group(context: ContextConfig) -> None:
    toy = lazy(context)
    batch = toy.request_batch(np.flatnonzero(toy.timeline.visible_E > 4)[:5])
    rows = toy.lookup(batch.lookups())
    item_UD = toy.policy.items(batch.items, rows["item"])
    memory = toy.policy._memory(batch, rows, item_UD, toy.policy._told(batch, item_UD))
    made = toy.policy.context
    assert made is not None
    heads, parts = toy.config.heads, 2 if context.apart else 1
    E = toy.config.width // heads
    x_Q1D = torch.randn(5, 1, toy.config.width, dtype=torch.double)
    for place, layer in enumerate(toy.policy.decoder._layers()):
        assert not any("to_kv" in name for name, _ in layer.cross_attention.named_parameters())
        used = [0, 0, 1][place] if context.sets == 2 else 0
        mixed = torch.zeros(5, toy.config.width, dtype=torch.double)
        for b in range(5):
            slots = int(memory.visible_BPS[b, 0].sum())
            for head in range(heads):
                first = (head // (heads // context.groups)) * E
                both = []
                for at in range(used * parts, (used + 1) * parts):
                    weight = made.to_sets.weight.chunk(context.sets * parts)[at]
                    whole = F.rms_norm(memory.memory_BSD[b] @ weight.T, (len(weight),), made.norms[at].scale, 1e-6)
                    both.append(whole[:, first : first + E])
                key, value = rotate(both[0][None, None], memory.position_BS[b][None])[0, 0], both[-1]
                query = (layer.cross_attention.to_q.weight @ x_Q1D[b, 0])[head * E : (head + 1) * E]
                query = rotate(query[None, None, None], memory.position_BP[b][None])[0, 0, 0]
                weight_S = torch.softmax(key[:slots] @ query / E**0.5, 0)
                mixed[b, head * E : (head + 1) * E] = weight_S @ value[:slots]
        want = mixed @ layer.cross_attention.to_out.weight.T
        got = layer._cross(x_Q1D, memory, layer._keys(memory.memory_BSD, memory.position_BS, memory.sets))
        assert torch.allclose(got[:, 0], want, atol=1e-10)


@pytest.mark.parametrize("retrieval", [RetrievalConfig(), RetrievalConfig(q2i=0.3, history=7, top=3)])
def test_each_query_of_a_stretch_is_answered_as_if_asked_alone(retrieval: RetrievalConfig) -> None:
    toy = lazy(CONTEXTS[1], users=3, history=2, retrieval=retrieval)
    toy.collate = dataclasses.replace(toy.collate, older=retrieval.history if retrieval.top else 0)
    time, segments = toy.timeline, training_segments(toy.timeline, toy.config.history)
    together = hidden(toy, toy.collate(time, segments))
    events = np.concatenate([np.arange(a, a + n) for a, n in zip(segments.query_start_B, segments.query_length_B, strict=True)])
    for place, (event, segment) in enumerate(zip(events, np.repeat(np.arange(len(segments)), segments.query_length_B), strict=True)):
        start = int(segments.start_B[segment])
        length = max(0, int(time.user_start_E[event] + time.visible_E[event] - start))
        alone = toy.collate(time, Segments(np.array([start]), np.array([length]), np.array([event]), np.array([1])))
        assert torch.allclose(together[place], hidden(toy, alone)[0], atol=1e-10)


@pytest.mark.parametrize("context", CONTEXTS)
def test_decoding_step_by_step_equals_the_training_pass(context: ContextConfig) -> None:
    decodes_as_trained(lazy(context))


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (ContextConfig(groups=3), r"model.context.groups: must divide model.heads=4, got 3"),
        (ContextConfig(sets=3), r"model.context.sets: model.decoder_layers=2 share them out, got 3"),
    ],
)
def test_contexts_that_cannot_be(context: ContextConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(backbone="lazy", context=context)
    ModelConfig(context=context)  # not asked for
