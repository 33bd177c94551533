"""Objectives of policy optimisation (paper 2.4.3, Eq. 4-9, and its peers): pure functions from log-probabilities and rewards to a loss.

Each objective is a *surrogate* of every token, to be raised; they differ in nothing else but how tokens are averaged. What all share is
here once: advantages within a group, the threshold that the user's real feedback sets, averages, statistics.

Choices that the paper leaves open:
- Std of a group is the population's (divided by G). A group whose rewards are all alike has no advantage and is counted as skipped.
- A request without real feedback (synthetic data, paper 4.4) has no R*: there a candidate is positive from the group's mean upwards.
- The target item joins the group as one more candidate (a setting, on by default); its reward is R*, so it is positive.

Legend: B requests, G candidates of a request, L SID levels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from oxyray.config import ObjectiveConfig
from oxyray.errors import ConfigError

Tensor = torch.Tensor
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
_MOST_LOG_RATIO = 20.0  # e^20 is beyond any trust region; its exponential would overflow float32 a little later


@dataclass(frozen=True, kw_only=True)
class Target:
    """The items that the users really took, as candidates; `known_B` is False where there is none. `joins_B` is False where it was
    generated anyway, too."""

    logprob_BL: Tensor
    behaviour_BL: Tensor
    joins_B: Tensor
    known_B: Tensor
    reference_BL: Tensor | None = None

    def alone(self, reward_B: Tensor) -> Group:
        """A group of this candidate only."""
        return Group(
            logprob_BGL=self.logprob_BL[:, None],
            behaviour_BGL=self.behaviour_BL[:, None],
            reward_BG=torch.where(self.known_B, reward_B, 0)[:, None],
            real_BG=self.known_B[:, None],
            target_reward_B=reward_B,
            reference_BGL=None if self.reference_BL is None else self.reference_BL[:, None],
        )


@dataclass(frozen=True, kw_only=True)
class Group:
    """Candidates of B requests. `logprob_BGL` carries the gradient. `behaviour_BGL` was recorded when they were generated, under the same
    mask and temperature. Where `real_BG` is False there is no candidate (a small pool). `target_reward_B` is R*, NaN without real
    feedback. `reference_BGL` is needed for a divergence from a reference policy only."""

    logprob_BGL: Tensor
    behaviour_BGL: Tensor
    reward_BG: Tensor
    real_BG: Tensor
    target_reward_B: Tensor
    reference_BGL: Tensor | None = None

    def joined(self, target: Target) -> Group:
        """With the target items as one more candidate."""
        reference_BGL = None
        if self.reference_BGL is not None and target.reference_BL is not None:
            reference_BGL = _append(self.reference_BGL, target.reference_BL)
        return dataclasses.replace(
            self,
            logprob_BGL=_append(self.logprob_BGL, target.logprob_BL),
            behaviour_BGL=_append(self.behaviour_BGL, target.behaviour_BL),
            reward_BG=_append(self.reward_BG, torch.where(target.joins_B, self.target_reward_B, 0)),
            real_BG=_append(self.real_BG, target.joins_B),
            reference_BGL=reference_BGL,
        )


class Terms(NamedTuple):
    """What a surrogate is made of; entries of absent candidates are harmless. `log_ratio_BGL` is log π_θ − log π_old (Eq. 5)."""

    logprob_BGL: Tensor
    behaviour_BGL: Tensor
    log_ratio_BGL: Tensor
    advantage_BG1: Tensor
    positive_BG1: Tensor


class Surrogate(NamedTuple):
    """`value_BGL` is raised. `gate_BGL` is its gradient in log π_θ as a share of that of the plain `ratio · advantage`: 0 for a clipped
    token."""

    value_BGL: Tensor
    gate_BGL: Tensor


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """`total` is a sum, `weight` what its mean divides by (requests; for DAPO tokens). The rest is for the log, without gradient: over real
    candidates, `advantage_*` without skipped groups."""

    total: Tensor
    weight: Tensor
    advantage_mean: Tensor
    advantage_std: Tensor
    ratio_quantiles: Tensor
    gate_under_half: Tensor
    positive_share: Tensor
    skipped_groups: Tensor
    kl: Tensor

    @property
    def loss(self) -> Tensor:
        """The mean: what one worker with one micro-batch steps on."""
        return self.total / self.weight.clamp(min=1)


def policy_loss(group: Group, config: ObjectiveConfig, target: Target | None = None) -> PolicyLoss:
    """The loss of `config.name`. `target` joins where the setting says so. Raises ConfigError when the settings ask for a divergence from a
    reference, or for targets, and there are none."""
    objective = OBJECTIVES[config.name]
    if config.target_joins or objective.target_only:
        if target is None:
            raise ConfigError("align.objective.target_joins needs the target items' log-probabilities; set it to false to go without")
        group = target.alone(group.target_reward_B) if objective.target_only else group.joined(target)
    real_BG1 = group.real_BG[..., None]
    # Padding may hold -inf: it must meet no arithmetic, since 0 · inf is NaN in the gradient too.
    logprob_BGL = torch.where(real_BG1, group.logprob_BGL, 0)
    behaviour_BGL = torch.where(real_BG1, group.behaviour_BGL, 0)
    advantage_BG, varied_B = advantages(group.reward_BG, group.real_BG, config.epsilon)
    positive_BG = positives(group.reward_BG, group.real_BG, group.target_reward_B)
    log_ratio_BGL = logprob_BGL - behaviour_BGL
    terms = Terms(logprob_BGL, behaviour_BGL, log_ratio_BGL, advantage_BG[..., None], positive_BG[..., None])
    value_BGL, gate_BGL = objective.surrogate(terms, config)
    kl_BGL = _divergence(group, logprob_BGL, config)
    token_BGL = torch.where(real_BG1, config.kl * kl_BGL - value_BGL, 0)
    total, weight = _token_mean(token_BGL, group.real_BG, varied_B) if objective.token_mean else _request_mean(token_BGL, group.real_BG)
    with torch.no_grad():
        real_BGL = real_BG1.expand_as(gate_BGL)
        counted_BG = group.real_BG & varied_B[:, None]
        return PolicyLoss(
            total=total,
            weight=weight,
            advantage_mean=_mean(advantage_BG, counted_BG),
            advantage_std=_mean(advantage_BG**2, counted_BG).sub(_mean(advantage_BG, counted_BG) ** 2).clamp(min=0).sqrt(),
            ratio_quantiles=_quantiles(_ratio(log_ratio_BGL), real_BGL),
            gate_under_half=_mean((gate_BGL < 0.5).to(gate_BGL.dtype), real_BGL),
            positive_share=_mean(positive_BG.to(gate_BGL.dtype), group.real_BG),
            skipped_groups=_mean((~varied_B).to(gate_BGL.dtype), group.real_BG.any(1)),
            kl=_mean(kl_BGL, real_BGL),
        )


def advantages(reward_BG: Tensor, real_BG: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Rewards within their group (Eq. 9): advantage_BG, 0 for absent candidates, and whether the group's rewards vary at all: bool_B."""
    count_B1 = real_BG.sum(1, keepdim=True).clamp(min=1)
    exact_BG = reward_BG.double()  # else equal rewards in the tens differ from their own mean
    mean_B1 = torch.where(real_BG, exact_BG, 0).sum(1, keepdim=True) / count_B1
    centred_BG = torch.where(real_BG, exact_BG - mean_B1, 0)
    std_B1 = (centred_BG.square().sum(1, keepdim=True) / count_B1).sqrt()
    varied_B1 = ~(std_B1 <= epsilon)  # a NaN reward must reach the loss, not be taken for a group to skip
    return torch.where(varied_B1, centred_BG / (std_B1 + epsilon), 0).to(reward_BG.dtype), varied_B1[:, 0]


def positives(reward_BG: Tensor, real_BG: Tensor, target_reward_B: Tensor) -> Tensor:
    """Where a candidate is at least as good as the user's real choice (Eq. 8); without one, as the group's mean: bool_BG."""
    mean_B = torch.where(real_BG, reward_BG, 0).sum(1) / real_BG.sum(1).clamp(min=1)
    return reward_BG >= torch.where(target_reward_B.isnan(), mean_B, target_reward_B)[:, None]


def sa_gcpo(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    """f(r; τ) · A with f = 4/τ · sigmoid(τ (r − 1)) (Eq. 4, 6). The gate is 4 p (1 − p) (Eq. 7): 1 at r = 1 for every τ."""
    number = terms.logprob_BGL.new_tensor
    tau_BG1 = torch.where(terms.positive_BG1, number(config.tau_positive), number(config.tau_negative))
    p_BGL = torch.sigmoid(tau_BG1 * (_ratio(terms.log_ratio_BGL) - 1))
    return Surrogate(4 / tau_BG1 * p_BGL * terms.advantage_BG1, 4 * p_BGL * (1 - p_BGL))


def grpo(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    """min(r A, clip(r) A)."""
    return _clipped(_ratio(terms.log_ratio_BGL), terms.advantage_BG1, config.clip, config.clip)


def gspo(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    """As GRPO with one ratio per item, the geometric mean over its tokens."""
    ratio_BGL = _ratio(terms.log_ratio_BGL.mean(-1, keepdim=True)).expand_as(terms.log_ratio_BGL)
    return _clipped(ratio_BGL, terms.advantage_BG1, config.clip, config.clip)


def ecpo(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    """As GRPO, but below zero advantage π_old is at least sg(π_θ) / (1 + ε + δ), so that no ratio grows beyond that (OneRec)."""
    least_BGL = terms.logprob_BGL.detach() - math.log(1 + config.clip + config.early)
    old_BGL = torch.where(terms.advantage_BG1 < 0, torch.maximum(terms.behaviour_BGL, least_BGL), terms.behaviour_BGL)
    value_BGL, gate_BGL = _clipped(_ratio(terms.logprob_BGL - old_BGL), terms.advantage_BG1, config.clip, config.clip)
    return Surrogate(value_BGL, gate_BGL * torch.exp(terms.behaviour_BGL - old_BGL))


def gbpo(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    """Ratio · A without a clip, its denominator bounded: max(π_old, sg(π_θ)), or max(π_old, 1 − sg(π_θ)) for A < 0 (OneRec-V2)."""
    now_BGL = terms.logprob_BGL.detach()
    other_BGL = torch.log1p(-torch.exp(now_BGL).clamp(max=1.0))  # log(1 - π_θ), -inf where π_θ is 1
    old_BGL = torch.maximum(terms.behaviour_BGL, torch.where(terms.advantage_BG1 < 0, other_BGL, now_BGL))
    return Surrogate(_ratio(terms.logprob_BGL - old_BGL) * terms.advantage_BG1, torch.exp(terms.behaviour_BGL - old_BGL))


def dapo(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    """As GRPO with more room upwards; groups without variance are left out and every token weighs the same."""
    return _clipped(_ratio(terms.log_ratio_BGL), terms.advantage_BG1, config.clip, config.clip_high)


def supervised(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    """log π_θ: no reward counts. The control of an experiment: what the same requests teach without candidates."""
    del config
    return Surrogate(terms.logprob_BGL, torch.ones_like(terms.logprob_BGL))


class Objective(NamedTuple):
    """`token_mean`: average over the tokens of all groups that vary, instead of over tokens, then candidates, then requests.
    `target_only`: the item really taken is the only candidate."""

    surrogate: Callable[[Terms, ObjectiveConfig], Surrogate]
    token_mean: bool = False
    target_only: bool = False


OBJECTIVES: dict[str, Objective] = {
    "sa_gcpo": Objective(sa_gcpo),
    "grpo": Objective(grpo),
    "gspo": Objective(gspo),
    "ecpo": Objective(ecpo),
    "gbpo": Objective(gbpo),
    "dapo": Objective(dapo, token_mean=True),
    "supervised": Objective(supervised, target_only=True),
}


def _ratio(log_ratio: Tensor) -> Tensor:
    return torch.exp(log_ratio.clamp(max=_MOST_LOG_RATIO))


def _clipped(ratio_BGL: Tensor, advantage_BG1: Tensor, low: float, high: float) -> Surrogate:
    plain_BGL, held_BGL = ratio_BGL * advantage_BG1, ratio_BGL.clamp(1 - low, 1 + high) * advantage_BG1
    return Surrogate(torch.minimum(plain_BGL, held_BGL), (plain_BGL <= held_BGL).to(ratio_BGL.dtype))


def _divergence(group: Group, logprob_BGL: Tensor, config: ObjectiveConfig) -> Tensor:
    """Of the policy from the reference, token by token (the estimator that is never negative), 0 without one: BGL."""
    if config.kl == 0:
        return torch.zeros_like(logprob_BGL)
    if group.reference_BGL is None:
        raise ConfigError(f"align.objective.kl={config.kl} needs the reference policy's log-probabilities; set it to 0 to go without")
    gap_BGL = torch.where(group.real_BG[..., None], group.reference_BGL, 0) - logprob_BGL
    return _ratio(gap_BGL) - gap_BGL - 1


def _request_mean(token_BGL: Tensor, real_BG: Tensor) -> tuple[Tensor, Tensor]:
    count_B = real_BG.sum(1)
    return (token_BGL.mean(-1).sum(1) / count_B.clamp(min=1)).sum(), (count_B > 0).sum()


def _token_mean(token_BGL: Tensor, real_BG: Tensor, varied_B: Tensor) -> tuple[Tensor, Tensor]:
    kept_BG = real_BG & varied_B[:, None]
    return torch.where(kept_BG[..., None], token_BGL, 0).sum(), kept_BG.sum() * token_BGL.shape[-1]


def _mean(value: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, value, 0).sum() / where.sum().clamp(min=1)


def _quantiles(value_BGL: Tensor, real_BGL: Tensor) -> Tensor:
    """`QUANTILES` of the real entries, by sorting (`torch.quantile` has a limit of 16M entries); 1 without any."""
    sorted_N = torch.where(real_BGL, value_BGL, torch.inf).flatten().sort().values
    place_Q = (torch.tensor(QUANTILES, device=value_BGL.device) * (real_BGL.sum() - 1).clamp(min=0)).round().long()
    return torch.where(real_BGL.any(), sorted_N[place_Q], 1.0)


def _append(value_BG: Tensor, last_B: Tensor) -> Tensor:
    return torch.cat([value_BG, last_B[:, None]], dim=1)


__all__ = ["OBJECTIVES", "QUANTILES", "Group", "PolicyLoss", "Surrogate", "Target", "Terms", "advantages", "policy_loss"]
