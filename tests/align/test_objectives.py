"""Every objective against values worked by hand, finite differences, and the laws that any of them must keep."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from oxyray.align.objectives import OBJECTIVES, Group, PolicyLoss, Target, advantages, policy_loss
from oxyray.config import ObjectiveConfig
from oxyray.errors import ConfigError

Tensor = torch.Tensor
NAMES = sorted(name for name, objective in OBJECTIVES.items() if not objective.target_only)


def settings(name: str = "sa_gcpo", **more: object) -> ObjectiveConfig:
    return ObjectiveConfig(**({"name": name, "epsilon": 1e-12, "target_joins": False} | more))  # type: ignore[arg-type]


def random_group(B: int = 5, G: int = 6, L: int = 3, seed: int = 0, spread: float = 0.3) -> Group:
    random = torch.Generator().manual_seed(seed)
    behaviour = -3 * torch.rand(B, G, L, generator=random, dtype=torch.float64) - 0.5
    real = torch.ones(B, G, dtype=torch.bool)
    real[1, 4:] = False
    return Group(
        logprob_BGL=(behaviour + spread * torch.randn(B, G, L, generator=random, dtype=torch.float64)).clamp(max=-0.01).requires_grad_(),
        behaviour_BGL=behaviour,
        reward_BG=torch.randn(B, G, generator=random, dtype=torch.float64),
        real_BG=real,
        target_reward_B=torch.randn(B, generator=random, dtype=torch.float64),
    )


def replaced(group: Group, **fields: object) -> Group:
    return Group(**(vars(group) | fields))  # type: ignore[arg-type]


def gradient(group: Group, config: ObjectiveConfig, target: Target | None = None) -> Tensor:
    (found,) = torch.autograd.grad(policy_loss(group, config, target).loss, group.logprob_BGL)
    return found


def one_token(ratio: float, sign: int, name: str, old: float = 0.2, target: float = 0.0, **more: object) -> tuple[float, float]:
    """Value and gradient (in log π) of the surrogate of a token whose candidate has advantage `sign`. Its group is it and one more with
    the opposite advantage and ratio 1."""
    logprob = torch.log(torch.tensor([[[ratio * old], [old]]], dtype=torch.float64)).requires_grad_()
    behaviour = torch.full((1, 2, 1), math.log(old), dtype=torch.float64)
    reward = torch.tensor([[sign, -sign]], dtype=torch.float64)
    real, star = torch.ones(1, 2, dtype=torch.bool), torch.tensor([target], dtype=torch.float64)
    group = Group(logprob_BGL=logprob, behaviour_BGL=behaviour, reward_BG=reward, real_BG=real, target_reward_B=star)
    lone = replaced(group, logprob_BGL=torch.log(torch.tensor([[[old], [old]]], dtype=torch.float64)))
    config = settings(name, **more)
    value = policy_loss(lone, config).loss - policy_loss(group, config).loss  # surrogate above that of ratio 1
    return 2 * value.item(), -2 * gradient(group, config)[0, 0, 0].item()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def close(found: tuple[float, float], value: float, slope: float) -> None:
    assert found == pytest.approx((value, slope), rel=1e-8, abs=1e-9)


def test_values_worked_by_hand():
    p = sigmoid(0.5 * 2)
    close(one_token(1.5, +1, "sa_gcpo", tau_positive=2.0), 2 * (p - 0.5), 4 * p * (1 - p) * 1.5)
    p = sigmoid(0.5 * 3)  # below R*: the other temperature, whatever the sign of the advantage
    close(one_token(1.5, +1, "sa_gcpo", tau_negative=3.0, target=9.0), 4 / 3 * (p - 0.5), 4 * p * (1 - p) * 1.5)
    close(one_token(1.5, -1, "sa_gcpo", tau_negative=3.0), -4 / 3 * (p - 0.5), -4 * p * (1 - p) * 1.5)
    close(one_token(1.1, +1, "grpo"), 0.1, 1.1)
    close(one_token(1.5, +1, "grpo"), 0.2, 0.0)
    close(one_token(0.5, +1, "grpo"), -0.5, 0.5)
    close(one_token(1.5, -1, "grpo"), -0.5, -1.5)
    close(one_token(0.5, -1, "grpo"), 0.2, 0.0)
    close(one_token(1.5, +1, "dapo"), 0.28, 0.0)
    close(one_token(1.25, +1, "dapo"), 0.25, 1.25)
    close(one_token(1.25, -1, "ecpo"), -0.25, -1.25)
    close(one_token(4.0, -1, "ecpo"), -0.3, -1.3)  # clipped early: no further than 1 + 0.2 + 0.1
    close(one_token(4.0, +1, "ecpo"), 0.2, 0.0)
    close(one_token(1.5, +1, "gbpo"), 0.0, 1.0)
    close(one_token(0.5, +1, "gbpo"), -0.5, 0.5)
    # below zero: π = 0.3 against 1 - π = 0.7; at ratio 1 it is 0.2 / 0.8
    close(one_token(1.5, -1, "gbpo"), -(0.3 / 0.7 - 0.25), -0.3 / 0.7)
    close(one_token(1.5, -1, "gbpo", old=0.6), -(0.9 / 0.6 - 1.0), -1.5)


def test_gspo_has_one_ratio_an_item():
    group = random_group(spread=0.02)
    shift = torch.tensor([0.1, -0.04, -0.06], dtype=torch.float64)  # its mean is zero: no change to the item's ratio
    moved = replaced(group, logprob_BGL=group.logprob_BGL + shift)
    assert policy_loss(moved, settings("gspo")).loss.item() == pytest.approx(policy_loss(group, settings("gspo")).loss.item(), rel=1e-10)
    assert policy_loss(moved, settings("grpo")).loss.item() != pytest.approx(policy_loss(group, settings("grpo")).loss.item(), rel=1e-4)
    slope = gradient(group, settings("gspo"))
    torch.testing.assert_close(slope, slope.mean(-1, keepdim=True).expand_as(slope))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_gradients_are_those_of_finite_differences(name: str, kl: float):
    group = random_group(B=3, G=5)
    group = replaced(group, reference_BGL=group.behaviour_BGL - 0.1)
    config = settings(name, kl=kl, tau_positive=1.3, tau_negative=0.7)
    want = gradient(group, config)
    # ECPO and GBPO hold π_θ still in the denominator, so their difference must too.
    frozen = torch.full_like(want, torch.nan)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in want.shape)).tolist():
        step = torch.zeros_like(want)
        step[tuple(place)] = 1e-6
        up, down = (_held(group, sign * step, config).loss.item() for sign in (1, -1))
        frozen[tuple(place)] = (up - down) / 2e-6
    torch.testing.assert_close(frozen, want, rtol=1e-5, atol=1e-8)


def _held(group: Group, step: Tensor, config: ObjectiveConfig) -> PolicyLoss:
    """The loss at `logprob + step` with everything that the objective detaches kept at `logprob`."""

    class Held(torch.Tensor):
        def detach(self) -> Tensor:  # type: ignore[override]
            return group.logprob_BGL.detach().where(group.real_BG[..., None], torch.zeros(()).double())

    return policy_loss(replaced(group, logprob_BGL=(group.logprob_BGL.detach() + step).as_subclass(Held)), config)


@pytest.mark.parametrize("tau", [0.1, 1.0, 1.7, 10.0])
def test_the_gate_weighs_gradients_by_4p_1_minus_p(tau: float):
    for ratio in (0.2, 0.9, 1.0, 1.3, 3.0):
        p = sigmoid(tau * (ratio - 1))
        for sign in (1, -1):
            found = one_token(ratio, sign, "sa_gcpo", tau_positive=tau, tau_negative=tau)[1]
            assert found == pytest.approx(4 * p * (1 - p) * ratio * sign, rel=1e-9)


@pytest.mark.parametrize("tau", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "gbpo"])
def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient(name: str, tau: float):
    group = random_group(spread=0.0)
    group = replaced(group, behaviour_BGL=group.logprob_BGL.detach())
    advantage, _ = advantages(group.reward_BG, group.real_BG, 1e-12)
    count = group.real_BG.sum(1)[:, None]
    weight = 1 / group.real_BG.sum() if name == "dapo" else 1 / (len(count) * count)
    want = -(advantage * weight)[..., None].expand(group.logprob_BGL.shape) / group.logprob_BGL.shape[-1]
    torch.testing.assert_close(gradient(group, settings(name, tau_positive=tau, tau_negative=1.5 * tau)), want)


@pytest.mark.parametrize("name", NAMES)
def test_groups_without_variance_give_nothing_and_are_counted(name: str):
    group = random_group()
    group.reward_BG[2] = 0.3
    group.real_BG[4, 1:] = False  # one candidate has nobody to be compared with
    slope = gradient(group, settings(name, epsilon=1e-6))
    assert policy_loss(group, settings(name, epsilon=1e-6)).skipped_groups == pytest.approx(2 / 5)
    assert not slope[[2, 4]].any()
    assert slope[[0, 1, 3]].abs().sum() > 0


@pytest.mark.parametrize("reward", [0.3, 20.3, 60.7, 12345.6])
def test_equal_rewards_teach_nothing_however_large(reward: float):
    for size in (9, 17, 33, 128):
        advantage_BG, varied_B = advantages(torch.full((2, size), reward), torch.ones(2, size, dtype=torch.bool), 1e-6)
        assert not advantage_BG.any()
        assert not varied_B.any()


def test_dapo_leaves_skipped_groups_out_of_the_mean_and_grpo_does_not():
    group = random_group()
    group.reward_BG[2] = 0.3
    kept = torch.tensor([0, 1, 3, 4])
    rest = Group(**{name: value[kept] for name, value in vars(group).items() if value is not None})
    with_all, without = (policy_loss(g, settings("dapo", epsilon=1e-6)) for g in (group, rest))
    assert with_all.loss.item() == pytest.approx(without.loss.item())
    assert (with_all.weight.item(), policy_loss(group, settings("grpo")).weight.item()) == (3 * (3 * 6 + 4), 5)


@pytest.mark.parametrize("name", NAMES)
def test_order_within_a_group_and_padding_change_nothing(name: str):
    group = random_group(B=2, G=4)
    config = settings(name)
    want = policy_loss(group, config).loss.item()
    for order in permutations(range(4)):
        fields = {key: value[:, list(order)] for key, value in vars(group).items() if value is not None and value.ndim > 1}
        assert policy_loss(replaced(group, **fields), config).loss.item() == pytest.approx(want, rel=1e-12)
    garbage = {"logprob_BGL": -torch.inf, "behaviour_BGL": -torch.inf, "reward_BG": torch.nan, "real_BG": False}
    padded = {key: torch.cat([(v := getattr(group, key)), torch.full_like(v[:, :2], value)], 1) for key, value in garbage.items()}
    padded["logprob_BGL"] = padded["logprob_BGL"].detach().requires_grad_()
    wide = replaced(group, **padded)
    assert policy_loss(wide, config).loss.item() == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(gradient(wide, config)[:, :4], gradient(group, config))
    assert not gradient(wide, config)[:, 4:].any()


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_batch_add_up(name: str):
    """Micro-batches and workers: sums of totals over sums of weights are the loss of the whole."""
    group, config = random_group(), settings(name)
    parts = [
        policy_loss(Group(**{k: v[rows] for k, v in vars(group).items() if v is not None}), config)
        for rows in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    total, weight = sum(part.total for part in parts), sum(part.weight for part in parts)
    assert (total / weight).item() == pytest.approx(policy_loss(group, config).loss.item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_target_joins_as_one_more_candidate(name: str):
    group = random_group(B=3, G=4)
    last = Target(
        logprob_BL=(random_group(B=3, G=1, seed=1).logprob_BGL[:, 0]).detach().requires_grad_(),
        behaviour_BL=random_group(B=3, G=1, seed=1).behaviour_BGL[:, 0],
        joins_B=torch.tensor([True, False, True]),
        known_B=torch.tensor([True, True, True]),
    )
    by_hand = replaced(
        group,
        logprob_BGL=torch.cat([group.logprob_BGL, last.logprob_BL[:, None]], 1),
        behaviour_BGL=torch.cat([group.behaviour_BGL, last.behaviour_BL[:, None]], 1),
        reward_BG=torch.cat([group.reward_BG, group.target_reward_B[:, None]], 1),
        real_BG=torch.cat([group.real_BG, last.joins_B[:, None]], 1),
    )
    found = policy_loss(group, settings(name, target_joins=True), last)
    assert found.loss.item() == pytest.approx(policy_loss(by_hand, settings(name)).loss.item(), rel=1e-12)
    (slope,) = torch.autograd.grad(found.loss, last.logprob_BL)
    assert slope.abs().sum(1).gt(0).tolist() == [True, False, True]
    assert policy_loss(group, settings(name), last).loss.item() == pytest.approx(policy_loss(group, settings(name)).loss.item(), rel=1e-12)
    with pytest.raises(ConfigError, match="target_joins"):
        policy_loss(group, settings(name, target_joins=True))


def test_the_control_learns_the_items_really_taken_and_nothing_else():
    group, mine = random_group(B=3, G=4), random_group(B=3, G=1, seed=1)
    logprob_BL = mine.logprob_BGL[:, 0].detach().requires_grad_()
    known_B = torch.tensor([True, False, True])
    target = Target(logprob_BL=logprob_BL, behaviour_BL=mine.behaviour_BGL[:, 0], joins_B=torch.zeros(3, dtype=torch.bool), known_B=known_B)
    group = replaced(group, target_reward_B=torch.where(known_B, group.target_reward_B, torch.nan))
    found = policy_loss(group, settings("supervised"), target)
    assert found.loss.item() == pytest.approx(-logprob_BL[known_B].mean().item(), rel=1e-12)
    worth = policy_loss(replaced(group, reward_BG=group.reward_BG * 100), settings("supervised"), target)
    assert worth.loss.item() == found.loss.item()
    with pytest.raises(ConfigError, match="target"):
        policy_loss(group, settings("supervised"))


def test_without_real_feedback_the_mean_of_the_group_is_the_threshold():
    group = random_group()
    unknown = replaced(group, target_reward_B=torch.full((5,), torch.nan).double())
    mean = torch.where(group.real_BG, group.reward_BG, 0).sum(1) / group.real_BG.sum(1)
    config = settings(tau_positive=0.5, tau_negative=2.0)
    known = policy_loss(replaced(group, target_reward_B=mean), config)
    assert policy_loss(unknown, config).loss.item() == pytest.approx(known.loss.item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_wild_ratios_and_bad_rewards(name: str):
    """A ratio beyond float32 leaves the gradient finite; a reward that is not a number is not swallowed."""
    group = random_group()
    far = group.behaviour_BGL.detach().float() + torch.tensor([-300.0, 120.0, 0.0])
    wild = replaced(group, logprob_BGL=far.requires_grad_(), behaviour_BGL=group.behaviour_BGL.float(), reward_BG=group.reward_BG.float())
    assert gradient(wild, settings(name)).isfinite().all()
    group.reward_BG[3, 1] = torch.nan
    assert policy_loss(group, settings(name)).loss.isnan()


def test_statistics():
    group = random_group(B=40, G=8, spread=1.0)
    config = settings(tau_positive=1.5, tau_negative=3.0)
    found = policy_loss(group, config)
    ratio = torch.exp(group.logprob_BGL - group.behaviour_BGL).detach()
    positive = group.reward_BG >= group.target_reward_B[:, None]
    p = torch.sigmoid(torch.where(positive, 1.5, 3.0)[..., None].double() * (ratio - 1))
    real = group.real_BG
    assert found.gate_under_half.item() == pytest.approx(((4 * p * (1 - p)) < 0.5)[real].double().mean().item())
    assert found.positive_share.item() == pytest.approx(positive[real].double().mean().item())
    assert (found.advantage_mean.item(), found.advantage_std.item()) == pytest.approx((0.0, 1.0), abs=1e-6)
    want = ratio[real].flatten().quantile(torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99]).double(), interpolation="nearest")
    torch.testing.assert_close(found.ratio_quantiles, want, rtol=0.05, atol=0.02)
    assert not any(value.requires_grad for name, value in vars(found).items() if name != "total")
    clipped = policy_loss(group, settings("grpo")).gate_under_half
    advantage, _ = advantages(group.reward_BG, real, 1e-12)
    outside = ((ratio > 1.2) & (advantage > 0)[..., None]) | ((ratio < 0.8) & (advantage < 0)[..., None])
    assert clipped.item() == pytest.approx(outside[real].double().mean().item())


def test_a_group_of_nobody_is_harmless():
    group = random_group()
    group.real_BG[:] = False
    for name in NAMES:
        found = policy_loss(group, settings(name))
        assert found.loss.item() == 0
        assert (found.ratio_quantiles == 1).all()


def test_settings_that_cannot_work():
    for bad in ({"tau_negative": 0.0}, {"clip": 1.0}, {"kl": -0.1}, {"early": -1.0}, {"epsilon": 0.0}, {"clip_high": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            ObjectiveConfig(**bad)
    with pytest.raises(ConfigError, match="reference"):
        policy_loss(random_group(), settings(kl=0.1))
