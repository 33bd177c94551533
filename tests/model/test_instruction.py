"""The composite instruction in every position and composition, what a typed text may touch, and the query-to-item loss."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from oxyray.config import InstructionConfig, RetrievalConfig
from oxyray.data.batch import Batch
from oxyray.data.requests import request_segments
from oxyray.model.retrieval import q2i
from tests.model.toys import Toy
from tests.train.train_workers import run

POSITIONS = ("right", "left", "replace", "add", "none")
CONTENTS = ("fused", "concatenated", "scenario", "trigger")
LENGTH = {"right": 1, "left": 1, "replace": 0, "add": 0}  # tokens besides those of the instruction


def prompt(toy: Toy, batch: Batch, item_UD: torch.Tensor) -> torch.Tensor:
    """All that the instruction gives to the decoder."""
    told = toy.policy._told(batch, item_UD)
    carried = toy.policy.instruction.carried(told)
    return toy.policy.instruction.prompt(told) + (carried if isinstance(carried, float) else carried[:, None])


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("content", CONTENTS)
def test_decoding_step_by_step_equals_the_training_pass_wherever_the_instruction_stands(position: str, content: str) -> None:
    toy = Toy(item_loss=0.0, instruction=InstructionConfig(position=position, content=content))  # type: ignore[arg-type]
    batch = toy.request_batch(np.arange(3, 30, 4))
    batch.weight_Q = torch.ones_like(batch.weight_Q)
    rows = toy.lookup(batch.lookups())
    paths = toy.policy.tree.path_IL[batch.items.ids_U[batch.target_Q]][:, None]
    assert -toy.policy.logprob(batch, rows, paths).sum().item() == pytest.approx(toy.policy.loss(batch, rows).total.item(), rel=1e-12)
    tokens = 2 if content == "concatenated" else 1
    prompt_QTD = prompt(toy, batch, toy.policy.items(batch.items, rows["item"]))
    assert prompt_QTD.shape[1] == {"none": 1, "add": 1}.get(position, LENGTH.get(position, 0) + tokens)


@pytest.mark.parametrize(
    ("position", "content", "told"),
    [("right", "fused", {"scenario", "trigger", "text"}), ("add", "concatenated", {"scenario", "trigger", "text"}),
     ("left", "scenario", {"scenario"}), ("replace", "trigger", {"trigger", "text"}), ("none", "fused", set())],
)  # fmt: skip
def test_only_what_the_composition_holds_is_told(position: str, content: str, told: set[str]) -> None:
    toy = Toy(instruction=InstructionConfig(position=position, content=content))  # type: ignore[arg-type]
    batch = toy.request_batch(np.arange(4))
    item_UD = toy.policy.items(batch.items, toy.lookup(batch.lookups())["item"])
    before = prompt(toy, batch, item_UD)
    for name, column, values in (("scenario", "scenario_Q", 3), ("trigger", "trigger_Q", 40), ("text", "text_Q", 1)):
        other = dataclasses.replace(batch, **{column: (getattr(batch, column) + 1) % values if name != "text" else torch.full((4,), -1)})
        assert bool((prompt(toy, other, item_UD) != before).any()) == (name in told), name


def test_a_new_model_hears_the_scenario_as_loud_as_the_trigger() -> None:
    toy = Toy(instruction=InstructionConfig(content="concatenated"))
    batch = toy.request_batch(np.arange(0, 40))
    told = toy.policy._told(batch, toy.policy.items(batch.items, toy.lookup(batch.lookups())["item"]))
    scenario, trigger = (part[batch.trigger_Q >= 0].square().mean().sqrt().item() for part in told)
    assert 0.5 < scenario / trigger < 2


def test_a_text_reaches_its_own_request_alone_as_the_vector_that_the_shop_knows_it_by() -> None:
    toy = Toy()
    events = np.arange(20)
    batch = toy.request_batch(events)
    known = toy.timeline.query_E[events]
    assert batch.vector_WF is not None
    assert len(batch.vector_WF) == len({row for row in known if row >= 0})
    assert {-1} < set(known), "some requests have a text and some have none"
    for text, row in zip(batch.text_Q.tolist(), known, strict=True):
        assert (text < 0) == (row < 0)
        assert row < 0 or np.allclose(batch.vector_WF[text].numpy(), toy.collate.query_WF[row])
    item_UD = toy.policy.items(batch.items, toy.lookup(batch.lookups())["item"])
    vector_WF = batch.vector_WF.double().requires_grad_()
    batch.vector_WF = vector_WF
    prompt_QTD = prompt(toy, batch, item_UD)
    for query, text in enumerate(batch.text_Q.tolist()):
        (gradient,) = torch.autograd.grad(prompt_QTD[query].square().sum(), vector_WF, retain_graph=True)
        assert gradient.abs().sum(1).nonzero().flatten().tolist() == ([text] if text >= 0 else [])


def test_requests_of_which_none_has_a_text_are_asked_as_if_each_text_was_missing() -> None:
    toy = Toy()
    events = np.flatnonzero(toy.timeline.query_E < 0)[:3]
    batch = toy.request_batch(events)
    assert batch.vector_WF is not None
    assert batch.vector_WF.shape == (0, 7)
    more = toy.request_batch(np.append(events, np.flatnonzero(toy.timeline.query_E >= 0)[:1]))
    rows, more_rows = toy.lookup(batch.lookups()), toy.lookup(more.lookups())
    alone, among = toy.policy.start(batch, rows).hidden_BKD, toy.policy.start(more, more_rows).hidden_BKD
    assert torch.allclose(alone, among[:3], atol=1e-12)


def test_texts_are_hidden_in_training_alone() -> None:
    toy = Toy(instruction=InstructionConfig(dropout=0.99))
    batch = toy.collate(toy.timeline, request_segments(toy.timeline, np.flatnonzero(toy.timeline.query_E >= 0)[:30], 4))
    item_UD = toy.policy.items(batch.items, toy.lookup(batch.lookups())["item"])
    served = prompt(toy, batch, item_UD)
    silent = prompt(toy, dataclasses.replace(batch, text_Q=torch.full_like(batch.text_Q, -1)), item_UD)
    toy.policy.train()
    torch.manual_seed(0)
    trained = prompt(toy, batch, item_UD)
    hidden_Q = (trained == silent).all(-1).all(-1)
    assert hidden_Q.float().mean() > 0.8
    assert (trained[~hidden_Q] == served[~hidden_Q]).all()


def sides(count: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    query, item = (F.normalize(torch.randn(count, width, dtype=torch.double), dim=-1) for _ in range(2))
    return query, item, torch.randint(0, count // 2, (count,))


def slow_q2i(query: torch.Tensor, item: torch.Tensor, ids: torch.Tensor, config: RetrievalConfig) -> torch.Tensor:
    """The paper's Eq. 1, one request and one dimension at a time: the mean over requests."""
    count, width = query.shape
    total = torch.zeros((), dtype=torch.double)
    for q in range(count):
        against = [a for a in range(count) if a == q or ids[a] != ids[q]]
        scores = torch.stack([query[q] @ item[a] / config.temperature for a in against])
        total = total - torch.log(torch.exp(scores[against.index(q)]) / torch.exp(scores).sum())
    total = total / count
    for side in (query, item):
        centred = side - side.mean(0)
        for d in range(width):
            total = total + config.variance * torch.clamp(1 / width**0.5 - centred[:, d].square().mean().sqrt(), min=0)
            for e in range(width):
                if d != e:
                    total = total + config.decorrelation * (centred[:, d] * centred[:, e]).mean() ** 2 / width
    return total


CONFIG = RetrievalConfig(q2i=1.0, temperature=0.5, variance=0.7, decorrelation=0.9)


def test_q2i_is_the_papers_formula_with_the_same_item_again_left_out() -> None:
    query, item, ids = sides(12, 5, seed=1)
    for side in (query, item):
        side *= torch.tensor([1.0, 1.0, 0.1, 1.0, 1.0])  # one dimension hardly used: the hinge is active
        side.requires_grad_()
    live = torch.ones(len(ids), dtype=torch.bool)
    found, want = q2i(query, item, ids, live, CONFIG).mean(), slow_q2i(query, item, ids, CONFIG)
    assert found.item() == pytest.approx(want.item(), rel=1e-9)
    for mine, slow in zip(torch.autograd.grad(found, (query, item)), torch.autograd.grad(want, (query, item)), strict=True):
        assert torch.allclose(mine, slow, atol=1e-9)


def q2i_of_a_share(first: tuple[int, ...], query: torch.Tensor, item: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    rank = torch.distributed.get_rank()
    mine = slice(first[rank], first[rank + 1])
    query, item = query[mine].clone().requires_grad_(), item[mine].clone().requires_grad_()
    loss = q2i(query, item, ids[mine], torch.ones_like(ids[mine], dtype=torch.bool), CONFIG, together=True).sum()
    return loss.detach(), *torch.autograd.grad(loss, (query, item))


def test_two_processes_with_unequal_shares_compute_what_one_computes() -> None:
    query, item, ids = sides(11, 4, seed=2)
    shares = run(2, q2i_of_a_share, (0, 7, 11), query, item, ids)
    query.requires_grad_(), item.requires_grad_()
    whole = q2i(query, item, ids, torch.ones_like(ids, dtype=torch.bool), CONFIG).sum()
    want = torch.autograd.grad(whole, (query, item))
    assert sum(float(loss) for loss, _, _ in shares) == pytest.approx(whole.item(), rel=1e-9)
    for side in (0, 1):
        assert torch.allclose(torch.cat([share[1 + side] for share in shares]), want[side], atol=1e-10)


def test_requests_of_no_weight_change_nothing_for_the_others() -> None:
    query, item, ids = sides(9, 4, seed=5)
    live = torch.tensor([True] * 6 + [False] * 3)
    among = q2i(query, item, ids, live, CONFIG)[:6]
    assert torch.allclose(among, q2i(query[:6], item[:6], ids[:6], live[:6], CONFIG), atol=1e-12)
    assert q2i(query, item, ids, torch.zeros_like(live), CONFIG).isfinite().all(), "a micro-batch that counts for nothing"


def test_q2i_is_a_part_of_the_policys_loss_and_draws_requests_to_their_items() -> None:
    toy = Toy(retrieval=RetrievalConfig(q2i=1.0))
    batch = toy.training_batch()
    rows = toy.lookup(batch.lookups())
    optimizer = torch.optim.Adam(toy.policy.parameters(), lr=3e-3)
    values = []
    for _ in range(30):
        out = toy.policy.loss(batch, rows)
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
        values.append(out.parts["q2i"].item() / batch.weight())
    assert values[-1] < 0.7 * values[0]
