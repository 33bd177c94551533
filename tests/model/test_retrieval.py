"""Instruction-guided retrieval against one request at a time and loops over events."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from oxyray.config import RetrievalConfig
from oxyray.data.batch import Batch
from oxyray.data.requests import Segments, training_segments
from oxyray.errors import ConfigError
from oxyray.model.retrieval import most_like
from tests.model.toys import Toy

IGR = RetrievalConfig(q2i=0.3, history=7, top=3)


def fetching(seed: int = 0, retrieval: RetrievalConfig = IGR, users: int = 3) -> Toy:
    toy = Toy(users=users, seed=seed, item_loss=0.0, history=2, retrieval=retrieval)
    toy.collate = dataclasses.replace(toy.collate, older=retrieval.history if retrieval.top else 0)
    return toy


def hidden(toy: Toy, batch: Batch) -> torch.Tensor:
    """What predicts each query's first code: (Q, D)."""
    rows = toy.lookup(batch.lookups())
    item_UD = toy.policy.items(batch.items, rows["item"])
    told = toy.policy._told(batch, item_UD)
    memory = toy.policy._memory(batch, rows, item_UD, told)
    x_QTD = toy.policy.instruction.prompt(told) + toy.policy._start(batch, memory, told)[:, None]
    return toy.policy.decoder(x_QTD, memory)[:, -1]


def decodes_as_trained(toy: Toy) -> None:
    """Token by token the policy gives what its training pass gave."""
    batch = toy.request_batch(np.arange(1, 24, 3))
    batch.weight_Q = torch.ones_like(batch.weight_Q)
    rows = toy.lookup(batch.lookups())
    paths = toy.policy.tree.path_IL[batch.items.ids_U[batch.target_Q]][:, None]
    assert -toy.policy.logprob(batch, rows, paths).sum().item() == pytest.approx(
        float(toy.policy.loss(batch, rows).parts["ntp"]), rel=1e-12
    )


def test_the_most_like_are_those_of_a_loop_in_time_order_and_never_padding() -> None:
    torch.manual_seed(0)
    query_BPD, older_BOD, seen_BPO = torch.randn(4, 3, 5), torch.randn(4, 9, 5), torch.rand(4, 3, 9) < 0.4
    older_BOD[:, 5:] = older_BOD[:, :4]  # the same again: the later is preferred
    best_BPk, found_BPk = most_like(query_BPD, older_BOD, seen_BPO, 4)
    for b in range(4):
        for p in range(3):
            seen = seen_BPO[b, p].nonzero().flatten().tolist()
            want = sorted(sorted(seen, key=lambda o: (-float(query_BPD[b, p] @ older_BOD[b, o % 5]), -o))[:4])
            assert best_BPk[b, p][found_BPk[b, p]].tolist() == want


def test_each_query_of_a_stretch_fetches_as_if_it_was_asked_alone() -> None:
    toy = fetching()
    time, segments = toy.timeline, training_segments(toy.timeline, toy.config.history)
    together = hidden(toy, toy.collate(time, segments))
    events = np.concatenate([np.arange(a, a + n) for a, n in zip(segments.query_start_B, segments.query_length_B, strict=True)])
    fetched = 0
    for place, (event, segment) in enumerate(zip(events, np.repeat(np.arange(len(segments)), segments.query_length_B), strict=True)):
        start = int(segments.start_B[segment])
        length = max(0, int(time.user_start_E[event] + time.visible_E[event] - start))
        alone = toy.collate(time, Segments(np.array([start]), np.array([length]), np.array([event]), np.array([1])))
        fetched += min(3, int(alone.older_visible_Q[0]))
        assert torch.allclose(together[place], hidden(toy, alone)[0], atol=1e-10)
    assert fetched > 40, "the older events matter in this shop"


def test_what_is_fetched_is_what_is_most_like_the_request_and_nothing_later() -> None:
    toy = fetching(seed=3)
    events = np.flatnonzero(toy.timeline.visible_E > 8)[:6]
    batch = toy.request_batch(events)
    assert (torch.diff(batch.older_offset) > 3).any()
    rows = toy.lookup(batch.lookups())
    item_UD = toy.policy.items(batch.items, rows["item"])
    asked_QD = toy.policy._asked(toy.policy._told(batch, item_UD))
    before = hidden(toy, batch)
    for query in range(len(events)):
        first, last = batch.older_offset[query : query + 2].tolist()
        like = [float(asked_QD[query] @ toy.policy.adapter(item_UD[batch.older_item_O[o]])) for o in range(first, last)]
        fetched = set(sorted(range(last - first), key=lambda o: (-round(like[o], 9), -o))[:3])
        for place in range(last - first):
            action_O = batch.older_action_O.clone()
            action_O[first + place] = (action_O[first + place] + 1) % 3
            moved = (hidden(toy, dataclasses.replace(batch, older_action_O=action_O)) - before).abs().sum(1) > 1e-12
            assert moved.nonzero().flatten().tolist() == ([query] if place in fetched else [])


@pytest.mark.parametrize("users", [2, 30])
def test_decoding_step_by_step_equals_the_training_pass(users: int) -> None:
    """With 30 users few have older events: some batches have none at all."""
    toy = fetching(users=users)
    decodes_as_trained(toy)


def test_what_was_fetched_has_no_gradient() -> None:
    toy = fetching()
    batch = toy.request_batch(np.flatnonzero(toy.timeline.visible_E > 8)[:4])
    rows = {name: row.requires_grad_() for name, row in toy.lookup(batch.lookups()).items()}
    item_UD = toy.policy.items(batch.items, rows["item"])
    told = toy.policy._told(batch, item_UD.detach())
    memory = toy.policy._memory(batch, rows, item_UD.detach(), told)
    assert memory.memory_BSD.shape[1] > batch.visible_Q.max() + 1
    item_UD.retain_grad()
    older_only = toy.policy._memory(batch, rows, item_UD, told).memory_BSD[:, -3:]
    assert not torch.autograd.grad(older_only.sum(), item_UD, allow_unused=True)[0].any()


def test_fetching_needs_the_space_that_q2i_makes() -> None:
    with pytest.raises(ConfigError, match=r"\.top: fetches by the space that the query-to-item loss makes"):
        RetrievalConfig(top=5)
