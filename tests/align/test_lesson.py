"""Lessons: that trainer and generation agree, that the two losses add up, and that rewards teach."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from oxyray.align.lesson import AlignedPolicy, Lesson
from oxyray.config import ObjectiveConfig
from oxyray.generate.pools import Legal, Pool
from oxyray.generate.sample import Sampling, sample
from oxyray.generate.steps import PolicySteps
from oxyray.model.policy import Rows
from tests.model.toys import Toy

TEMPERATURE = 0.8


def wished(toy: Toy, path_BGL: torch.Tensor) -> torch.Tensor:
    """A reward that can be reached: 1 for candidates whose first code is 2."""
    return (toy.policy.tree.code(0)[path_BGL[..., 0].clamp(min=0)] == 2).double()


def lesson(toy: Toy, events: np.ndarray, group: int = 6, supervised: bool = True, synthetic: tuple[int, ...] = ()) -> tuple[Lesson, Rows]:
    """Candidates sampled from the toy's policy, each second request in a pool of half of the items."""
    batch = toy.request_batch(events)
    half = torch.zeros(len(toy.codes_IL), dtype=torch.bool)
    half[::2] = True
    half[batch.items.ids_U[batch.target_Q]] = True
    pool = Pool.of_items(toy.policy.tree, half)
    legal = Legal(toy.policy.tree, [pool if b % 2 else None for b in range(len(events))])
    rows = toy.lookup(batch.lookups())
    found = sample(PolicySteps.begin(toy.policy, batch, rows), legal, group, Sampling(temperature=TEMPERATURE, replacement=True))
    leaf_path = torch.from_numpy(toy.index.node_path(np.arange(toy.index.leaves)).astype(np.int64))
    path_BGL = torch.where((found.leaf_BG >= 0)[..., None], leaf_path[found.leaf_BG.clamp(min=0)], -1)
    target_BL = toy.policy.tree.path_IL[batch.items.ids_U[batch.target_Q]]
    with torch.no_grad():
        target_lp = toy.policy.logprob(batch, rows, target_BL[:, None], legal, TEMPERATURE)[:, 0]
    target_reward_B = wished(toy, target_BL[:, None])[:, 0]
    target_reward_B[list(synthetic)] = torch.nan
    made = Lesson(
        requests=batch,
        legal=legal,
        path_BGL=path_BGL,
        behaviour_BGL=found.logprob_BGL,
        reward_BG=wished(toy, path_BGL),
        target_path_BL=target_BL,
        target_behaviour_BL=target_lp,
        target_reward_B=target_reward_B,
        supervised=toy.training_batch() if supervised else None,
    )
    return made, toy.lookup(made.lookups())


@pytest.mark.parametrize("head", ["tied", "codes"])
def test_trainer_and_generation_agree_on_every_token(head: str) -> None:
    toy = Toy(head=head)
    made, rows = lesson(toy, np.arange(4, 60, 5), synthetic=(1, 3))
    out = AlignedPolicy(toy.policy, ObjectiveConfig(), 0.5, TEMPERATURE).loss(made, rows)
    assert made.weight() == 12
    assert out.parts["drift"].item() / 12 < 1e-9
    assert out.parts["ratio_q01"].item() / 12 == pytest.approx(1)
    assert out.parts["ratio_q99"].item() / 12 == pytest.approx(1)


@pytest.mark.parametrize("head", ["tied", "codes"])
def test_the_two_losses_add_up_and_each_gets_its_own_rows(head: str) -> None:
    toy = Toy(head=head)
    made, rows = lesson(toy, np.arange(4, 60, 5))
    alone = dataclasses.replace(made, supervised=None)
    both = AlignedPolicy(toy.policy, ObjectiveConfig(), 0.3, TEMPERATURE).loss(made, rows)
    torch.manual_seed(0)
    rewards = AlignedPolicy(toy.policy, ObjectiveConfig(), 0.3, TEMPERATURE).loss(alone, toy.lookup(alone.lookups()))
    batch = toy.training_batch()
    supervised = toy.policy.loss(batch, toy.lookup(batch.lookups()))
    expected = rewards.total + 0.3 * supervised.total * made.weight() / batch.weight()
    assert both.total.item() == pytest.approx(expected.item(), rel=1e-9)


def test_only_the_supervised_loss_drops_and_its_seed_decides_what() -> None:
    toy = Toy(dropout=0.4)
    made, rows = lesson(toy, np.arange(4, 60, 5))
    toy.policy.train()

    def told(seed: int) -> dict[str, float]:
        out = AlignedPolicy(toy.policy, ObjectiveConfig(), 0.5, TEMPERATURE).loss(dataclasses.replace(made, seed=seed), rows)
        return {name: value.item() for name, value in out.parts.items()}

    first, again, other = told(1), told(1), told(2)
    assert toy.policy.training
    assert first == again
    assert first["drift"] < 1e-9 * made.weight()
    assert {name for name in first if first[name] != other[name]} == {"supervised/ntp", "supervised/item"}


def test_requests_without_weight_teach_nothing() -> None:
    toy = Toy()
    made, rows = lesson(toy, np.arange(4, 60, 5), supervised=False)
    weight_Q = made.requests.weight_Q.clone()
    weight_Q[6:] = 0
    half = dataclasses.replace(made, requests=dataclasses.replace(made.requests, weight_Q=weight_Q))
    changed = half.reward_BG.clone()
    changed[6:] = torch.rand_like(changed[6:])
    policy = AlignedPolicy(toy.policy, ObjectiveConfig(), 0.0, TEMPERATURE)
    assert half.weight() == 6
    assert policy.loss(half, rows).total.item() == pytest.approx(
        policy.loss(dataclasses.replace(half, reward_BG=changed), rows).total.item(), rel=1e-9
    )


@pytest.mark.parametrize("name", ["sa_gcpo", "grpo"])
def test_what_is_rewarded_becomes_likely(name: str) -> None:
    toy = Toy(item_loss=0.0)
    toy.tables = {key: value.requires_grad_() for key, value in toy.tables.items()}
    learner = AlignedPolicy(toy.policy, ObjectiveConfig(name=name), 0.0, TEMPERATURE)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.02)
    torch.manual_seed(1)
    means = []
    for _ in range(25):
        made, rows = lesson(toy, np.arange(2, 72, 4), supervised=False)
        means.append(made.reward_BG.mean().item())
        optimizer.zero_grad()
        (learner.loss(made, rows).total / made.weight()).backward()
        optimizer.step()
    assert np.mean(means[-3:]) > np.mean(means[:3]) + 0.3
