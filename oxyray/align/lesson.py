"""What a learner learns from: generated candidates with their rewards, joined with logged targets (paper 2.4.3, 3.1.3).

`AlignedPolicy` is the policy with another loss: the objective on the candidates plus, at a set rate, the supervised loss on logged targets.
It has the form that the training engine steps on, so alignment and pre-training share the engine.

Legend: B requests, G candidates of a request, L SID levels, D width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from oxyray.align.objectives import QUANTILES, Group, PolicyLoss, Target, policy_loss
from oxyray.config import ObjectiveConfig
from oxyray.data.batch import Batch
from oxyray.generate.pools import Legal
from oxyray.model.losses import LossOut
from oxyray.model.policy import Policy, Rows

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """B requests (one query a segment), their candidates as nodes of the prefix index (-1: none) with the log-probabilities under which
    they were generated, and what they were worth. `target_path_BL` and `target_behaviour_BL` are those of the items really taken;
    `target_reward_B`, their reward, is NaN for synthetic requests. `reference_BJL` are log-probabilities of candidates and target by a
    reference policy. `supervised` is any training batch, None to learn from rewards alone; `seed` draws what it drops."""

    requests: Batch
    legal: Legal
    path_BGL: Tensor
    behaviour_BGL: Tensor
    reward_BG: Tensor
    target_path_BL: Tensor
    target_behaviour_BL: Tensor
    target_reward_B: Tensor
    reference_BJL: Tensor | None = None
    supervised: Batch | None = None
    seed: int = 0

    def lookups(self) -> dict[str, Tensor]:
        """The rows of both batches behind each other; once, where both hold the whole catalogue."""
        found = self.requests.lookups()
        if self.supervised is None:
            return found
        more = self.supervised.lookups()
        return {name: ids if self._shared(name) else torch.cat([ids, more[name]]) for name, ids in found.items()}

    def rows(self, rows: Rows) -> tuple[Rows, Rows]:
        """What was looked up, for the requests and for the supervised batch."""
        if self.supervised is None:
            return rows, {}
        count = {name: len(ids) for name, ids in self.requests.lookups().items()}
        first = {name: part if self._shared(name) else part[: count[name]] for name, part in rows.items()}
        return first, {name: part if self._shared(name) else part[count[name] :] for name, part in rows.items()}

    def weight(self) -> float:
        """Requests that count: what a mean over all micro-batches and learners divides by."""
        return float((self.requests.weight_Q > 0).sum())

    def to(self, device: torch.device | str) -> Lesson:
        moved = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Lesson(**{name: value.to(device) if hasattr(value, "to") else value for name, value in moved.items()})

    def _shared(self, name: str) -> bool:
        return name == "item" and self.shelf_shared

    @property
    def shelf_shared(self) -> bool:
        """Whether both batches hold the whole catalogue."""
        return self.supervised is not None and self.supervised.items.whole and self.requests.items.whole


class AlignedPolicy(nn.Module):
    """`loss(lesson, rows)`: sums over requests, for the engine to divide by `lesson.weight()` over all learners.

    Nothing is dropped where candidates are concerned, as the rollout drops nothing either. The supervised loss drops what pre-training
    does: without that it learns by heart what it has seen before.
    """

    def __init__(self, policy: Policy, objective: ObjectiveConfig, supervised_rate: float, temperature: float) -> None:
        super().__init__()
        self.policy, self.objective = policy, objective
        self.supervised_rate, self.temperature = supervised_rate, temperature

    def loss(self, lesson: Lesson, rows: Rows) -> LossOut:
        asked, more = lesson.rows(rows)
        training = self.policy.training
        self.policy.eval()
        counts = lesson.weight()
        path_BJL = torch.cat([lesson.path_BGL, lesson.target_path_BL[:, None]], dim=1)
        with torch.autocast(path_BJL.device.type, enabled=False):  # as precisely as they were generated: rounding would move the ratio
            shelf = self.policy.shelf(lesson.requests, asked)
            logprob_BJL = self.policy.logprob(lesson.requests, asked, path_BJL, lesson.legal, self.temperature, shelf)
        self.policy.train(training)
        found = self._from_rewards(lesson, logprob_BJL)
        total = found.total * (counts / found.weight.clamp(min=1))
        parts = {"policy": total.detach(), **{name: value * counts for name, value in _told(found).items()}}
        with torch.no_grad():
            real_BG = lesson.path_BGL[..., -1] >= 0
            gap_BGL = (logprob_BJL[:, :-1] - lesson.behaviour_BGL).abs()
            parts["drift"] = gap_BGL[real_BG].mean() * counts if bool(real_BG.any()) else total.new_zeros(())
        if lesson.supervised is not None and self.supervised_rate:
            # A piece has its own draws and is compared with itself: what is learned does not depend on how many learners share the pieces.
            torch.manual_seed(lesson.seed)
            supervised = self.policy.loss(lesson.supervised, more, together=False, shelf=shelf if lesson.shelf_shared else None)
            scale = counts / max(lesson.supervised.weight(), 1e-12)
            total = total + self.supervised_rate * scale * supervised.total
            parts |= {f"supervised/{name}": value * scale for name, value in supervised.parts.items()}
        return LossOut(total, parts)

    forward = loss

    def _from_rewards(self, lesson: Lesson, logprob_BJL: Tensor) -> PolicyLoss:
        live_B = lesson.requests.weight_Q > 0
        group = Group(
            logprob_BGL=logprob_BJL[:, :-1],
            behaviour_BGL=lesson.behaviour_BGL,
            reward_BG=lesson.reward_BG,
            real_BG=(lesson.path_BGL[..., -1] >= 0) & live_B[:, None],
            target_reward_B=lesson.target_reward_B,
            reference_BGL=None if lesson.reference_BJL is None else lesson.reference_BJL[:, :-1],
        )
        generated_B = (lesson.path_BGL == lesson.target_path_BL[:, None]).all(-1).any(1)
        known_B = live_B & ~lesson.target_reward_B.isnan()
        target = Target(
            logprob_BL=logprob_BJL[:, -1],
            behaviour_BL=lesson.target_behaviour_BL,
            joins_B=known_B & ~generated_B,
            known_B=known_B,
            reference_BL=None if lesson.reference_BJL is None else lesson.reference_BJL[:, -1],
        )
        return policy_loss(group, self.objective, target)


def _told(found: PolicyLoss) -> dict[str, Tensor]:
    """The objective's statistics for the log."""
    names = ("advantage_mean", "advantage_std", "gate_under_half", "positive_share", "skipped_groups", "kl")
    quantiles = {f"ratio_q{round(100 * q):02d}": value for q, value in zip(QUANTILES, found.ratio_quantiles, strict=True)}
    return {name: getattr(found, name).float() for name in names} | quantiles
