"""The ranker: nothing leaks through time, scores stand for themselves, the product's two forms are one, the funnel is a likelihood."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from oxyray.config import RankerConfig
from oxyray.errors import ConfigError
from oxyray.reward.packing import RankBatch
from oxyray.reward.pages import Stretches, stretches
from oxyray.reward.ranker import Fusion
from tests.reward.toys import ROUNDING, Toy

Tensor = torch.Tensor
SEEDS = range(4)


def known_pages(toy: Toy, taken: Stretches) -> list[list[int]]:
    """For each page of the batch, the pages of the batch that it may know, by the rule written out."""
    row_R = np.concatenate([np.arange(a, b) for a, b in zip(taken.start_B, taken.stop_B, strict=True)])
    sample_R = np.repeat(np.arange(len(taken)), taken.stop_B - taken.start_B)
    time_R = toy.log.time_R[row_R]
    return [[k for k in range(len(row_R)) if sample_R[k] == sample_R[r] and time_R[k] < time_R[r]] for r in range(len(row_R))]


def captured(toy: Toy, batch: RankBatch) -> tuple[Tensor, ...]:
    """Scores of the batch, and what they were made from: item rows (U), labels (C), pages' contexts (R) and queries (R)."""
    kept: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: object, inputs: object, output: Tensor) -> Tensor:
            kept[name] = output.detach().requires_grad_()
            return kept[name]

        return hook

    rows = toy.rows(batch)
    rows["item"].requires_grad_()
    hooks = [getattr(toy.ranker, name).register_forward_hook(keep(name)) for name in ("action", "scenario")]
    assert batch.query_RF is not None
    batch.query_RF.requires_grad_()
    logit_QH = toy.ranker(batch, rows)
    for hook in hooks:
        hook.remove()
    return logit_QH, rows["item"], kept["action"], kept["scenario"], batch.query_RF


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("most", [100, 5])
def test_no_score_depends_on_its_own_labels_or_on_anything_later(seed: int, most: int):
    toy = Toy(seed)
    taken = stretches(toy.log, most)
    batch = toy.packer.pack(toy.log, taken)
    known, page_C = known_pages(toy, taken), batch.page_C()
    logit_QH, item_U, label_C, *pages_R = captured(toy, batch)
    asked = torch.nonzero(batch.asked_R[page_C])[:, 0].tolist()
    assert len(asked) == len(logit_QH)
    for q, c in enumerate(asked):
        r = int(page_C[c])
        past_C = torch.isin(page_C, torch.tensor(known[r], dtype=torch.long))
        slopes = torch.autograd.grad(logit_QH[q].sum(), (item_U, label_C, *pages_R), retain_graph=True)
        depends_U, depends_C, *depends_on_pages = ((slope.abs().sum(1) > 0).tolist() for slope in slopes)
        assert depends_C == (past_C & (batch.done_C > 0)).tolist()
        for depends_R in depends_on_pages:
            assert [k for k, depends in enumerate(depends_R) if depends] == sorted([*known[r], r])
        told_C = past_C & (batch.seen_C | (batch.done_C > 0))
        items = {int(batch.item_C[c]), *batch.item_C[told_C].tolist(), *([int(batch.trigger_R[r])] if batch.trigger_R[r] >= 0 else [])}
        assert {u for u, depends in enumerate(depends_U) if depends} == items


@pytest.mark.parametrize("seed", SEEDS)
def test_changing_own_labels_and_all_that_is_later_changes_no_score(seed: int):
    toy = Toy(seed)
    taken = stretches(toy.log, 100)
    batch = toy.packer.pack(toy.log, taken)
    assert batch.query_RF is not None
    want, page_C = toy.ranker.chances(batch, toy.rows(batch)), batch.page_C()
    for r, known in enumerate(known_pages(toy, taken)):
        hidden_C = ~torch.isin(page_C, torch.tensor(known, dtype=torch.long))
        hidden_R = torch.ones(len(batch.asked_R), dtype=torch.bool)
        hidden_R[[*known, r]] = False
        changed = dataclasses.replace(
            batch,
            done_C=torch.where(hidden_C, (batch.done_C + 1) % 4, batch.done_C),
            seen_C=batch.seen_C ^ hidden_C,
            item_C=torch.where(hidden_C & (page_C != r), 0, batch.item_C),
            scenario_R=torch.where(hidden_R, (batch.scenario_R + 1) % 3, batch.scenario_R),
            time_R=torch.where(hidden_R, batch.time_R + 10**6, batch.time_R),
            query_RF=torch.where(hidden_R[:, None], 1.0, batch.query_RF),
        )
        found = toy.ranker.chances(changed, toy.rows(changed))
        torch.testing.assert_close(found[page_C == r], want[page_C == r], atol=ROUNDING, rtol=0)
    assert (found - want).abs().max() > 1e6 * ROUNDING


@pytest.mark.parametrize("clock", [True, False])
def test_a_score_is_the_same_on_its_page_among_many_and_alone(clock: bool):
    toy = Toy(2, clock)
    taken = stretches(toy.log, 100)
    batch = toy.packer.pack(toy.log, taken)
    want, page_C = toy.ranker.chances(batch, toy.rows(batch)), batch.page_C()
    row = np.arange(len(toy.log))
    words = toy.log.query_WF
    assert words is not None
    query_BF = np.where((toy.log.query_R >= 0)[:, None], words[toy.log.query_R], np.nan)
    facts = {
        "query_BF": query_BF,
        "user_B": toy.log.user_R,
        "time_B": toy.log.time_R,
        "scenario_B": toy.log.scenario_R,
        "trigger_B": toy.log.trigger_R,
    }
    many_BJ = np.random.default_rng(0).integers(0, 40, (len(row), 9))
    many_BJ[:, 4] = toy.log.item_C[toy.log.offset_R1[:-1]]
    many_BJ[:3, 0] = -1
    among = toy.packer.requests(toy.log, 100, **facts, item_BJ=many_BJ)
    found_BJH = torch.zeros(*many_BJ.shape, 3).double()
    found_BJH[torch.from_numpy(many_BJ >= 0)] = toy.ranker.chances(among, toy.rows(among))
    first = torch.searchsorted(page_C, torch.arange(len(row)))
    torch.testing.assert_close(found_BJH[:, 4], want[first])
    alone = toy.packer.requests(toy.log, 100, **facts, item_BJ=many_BJ[:, 4:5])
    torch.testing.assert_close(toy.ranker.chances(alone, toy.rows(alone)), want[first])


def test_short_history_and_no_history():
    toy = Toy(1)
    facts = {"time_B": np.array([10**7, 10**7, -5]), "scenario_B": np.zeros(3, int), "trigger_B": np.full(3, -1)}
    batch = toy.packer.requests(toy.log, 4, user_B=np.array([2, 0, 2]), item_BJ=np.array([[1, 2], [3, -1], [5, 6]]), **facts)
    assert torch.diff(batch.page_offset).tolist() == [4, 4, 1]
    assert batch.visible_R[batch.asked_R].tolist() == [3, 3, 0]
    assert len(toy.ranker.chances(batch, toy.rows(batch))) == 5
    for b, user in enumerate((2, 0)):
        rows = np.flatnonzero(toy.log.user_R == user)[-3:]
        assert batch.time_R[batch.page_offset[b] : batch.page_offset[b + 1] - 1].tolist() == toy.log.time_R[rows].tolist()


@pytest.mark.parametrize("candidates", [20, 200])
def test_the_reparameterised_product_is_the_plain_one(candidates: int):
    torch.manual_seed(0)
    fusion = Fusion(user=48, width=16, hidden=32)
    user_AV, item_UD = torch.randn(5, 48), torch.randn(30, 16)
    page_Q, item_Q = torch.randint(0, 5, (candidates,)), torch.randint(0, 30, (candidates,))
    weight = torch.cat([fusion.of_user.weight, fusion.of_item.weight], dim=1)
    plain = torch.nn.functional.linear(torch.cat([user_AV[page_Q], item_UD[item_Q]], dim=1), weight, fusion.of_user.bias)
    gate, value = plain.chunk(2, dim=1)
    want = item_UD[item_Q] + fusion.down(torch.nn.functional.silu(gate) * value)
    assert (fusion(user_AV, item_UD, page_Q, item_Q) - want).abs().max() < 1e-6


def test_the_funnel_is_the_likelihood_of_the_strongest_action():
    toy = Toy(3)
    batch = toy.packer.pack(toy.log, stretches(toy.log, 5))
    loss = toy.ranker.loss(batch, toy.rows(batch))
    chance = toy.ranker.chances(batch, toy.rows(batch))
    reached = torch.cat([torch.ones(len(chance), 1), chance, torch.zeros(len(chance), 1)], dim=1)
    done = batch.done_C[batch.asked_R[batch.page_C()]][:, None]
    want = -torch.log(reached.gather(1, done) - reached.gather(1, done + 1)).sum()
    assert loss.total.item() == pytest.approx(want.item(), rel=1e-9)
    assert sum(part.item() for part in loss.parts.values()) == pytest.approx(want.item(), rel=1e-9)
    assert (torch.diff(chance, dim=1) <= 0).all()


def test_settings_that_cannot_work():
    for bad in ({"heads": 3}, {"row_dim": 6}, {"dropout": 1.0}, {"history": 1}, {"layers": 0}):
        with pytest.raises(ConfigError, match=rf"^\.{next(iter(bad))}"):
            RankerConfig(**bad)
