"""Reward mapping (paper 2.4.2): `R = Σ_k w[scenario, k] · R_k`, one mapping for all scenarios, its weights from configuration.

The user's real choice (the target item) is scored as one more member of the group, so that R* is a reward like any other: `join_target`
puts it into the last column unless it was generated anyway. Components are returned apart, unweighted, for the log. A candidate whose SID
names no item has 0 in every component: format alone tells it from a worthless item. Any other score must be a finite number. One that
is not stops everything with a RewardError that names component, request and candidate, since a failure counted as a zero reward would
teach the policy to avoid what could not be judged.

A new reward is a class: `__init__(self, shop: Shop)`, `__call__(self, candidates: Candidates) -> Tensor` of shape (B, J). Built-in ones
stand in `components.py`; one's own is named by its path in the configuration: `components: {margin: my_shop.rewards:Margin}`.

Legend: B requests, G generated candidates, J = G + 1 candidates with the target's column, S scenarios, I items of the catalogue, F width of
a text vector, H heads of the ranker (click, cart, purchase).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from oxyray.config import RewardConfig
from oxyray.config.reward import DEFAULT
from oxyray.errors import ConfigError, RewardError
from oxyray.reward.components import BUILT_IN, Candidates, Diversity, Format, Relative, Reward, Shop, Taken

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """`total_BJ` is weighted, `parts` (BJ each) are not. `target_B` is R*, NaN where a request has no target."""

    total_BJ: Tensor
    parts: dict[str, Tensor]
    target_B: Tensor


class Mapping:
    """Raises ConfigError when the configuration names scenarios or classes that do not exist. A component whose weight is 0 in every
    scenario is not computed."""

    def __init__(self, config: RewardConfig, shop: Shop) -> None:
        if unknown := [name for name in config.weights if name not in (DEFAULT, *shop.scenarios)]:
            raise ConfigError(f"reward.weights: no such scenario: {', '.join(unknown)}; known are {', '.join(shop.scenarios)}")
        self.shop = shop
        self._weight_S = {
            name: torch.tensor([config.weight(scenario, name) for scenario in shop.scenarios], dtype=torch.float64)
            for name in config.components
        }
        self._rewards = {name: _make(name, path)(shop) for name, path in config.components.items() if self._weight_S[name].any()}

    @property
    def needs_chances(self) -> bool:
        """Whether any built-in reward in use reads the ranker's answer; a class of one's own may, too."""
        return any(not isinstance(reward, Format | Relative | Taken | Diversity) for reward in self._rewards.values())

    def __call__(self, candidates: Candidates) -> Rewards:
        """Raises RewardError when a component fails or gives a score that is not a finite number."""
        parts = {name: _checked(name, reward, candidates) for name, reward in self._rewards.items()}
        total_BJ = torch.zeros(candidates.item_BJ.shape, device=candidates.item_BJ.device)
        for name, score_BJ in parts.items():
            total_BJ = total_BJ + self._weight_S[name].to(score_BJ)[candidates.scenario_B][:, None] * score_BJ
        place_B = candidates.target_place_B
        target_B = total_BJ.gather(1, place_B.clamp(min=0)[:, None])[:, 0]
        return Rewards(total_BJ=total_BJ, parts=parts, target_B=torch.where(place_B >= 0, target_B, torch.nan))

    def means(self, rewards: Rewards, candidates: Candidates) -> dict[str, tuple[float, int]]:
        """For the log: the mean of the total and of each component over generated candidates, `SCENARIO/NAME` and `all/NAME`, and how many
        candidates that are."""
        real_BG = candidates.real_BJ[:, :-1]
        found = {}
        for name, score_BJ in {"reward": rewards.total_BJ, **rewards.parts}.items():
            score_BG = score_BJ[:, :-1]
            for number, scenario in [(-1, "all"), *enumerate(self.shop.scenarios)]:
                here_BG = real_BG if number < 0 else real_BG & (candidates.scenario_B == number)[:, None]
                if here_BG.any():
                    found[f"{scenario}/{name}"] = (float(score_BG[here_BG].mean()), int(here_BG.sum()))
        return found


def join_target(item_BG: Tensor, real_BG: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates with the target item (-1: none) in a last column: item_BJ, real_BJ, and the target's column, -1 for none. Where the
    target was generated, the last column is empty and its first candidate is the target's column."""
    known_B = target_B >= 0
    same_BG = real_BG & (item_BG == target_B[:, None]) & known_B[:, None]
    generated_B = same_BG.any(1)
    last_B = torch.full_like(target_B, item_BG.shape[1])
    first_B = torch.where(generated_B, same_BG.int().argmax(1), last_B) if item_BG.shape[1] else last_B
    item_BJ = torch.cat([item_BG, target_B[:, None]], dim=1)
    real_BJ = torch.cat([real_BG, (known_B & ~generated_B)[:, None]], dim=1)
    return item_BJ, real_BJ, torch.where(known_B, first_B, -1)


def _checked(name: str, reward: Reward, candidates: Candidates) -> Tensor:
    """The component's scores, float32 (B, J), 0 where there is no item."""
    try:
        score_BJ = reward(candidates)
    except Exception as error:
        raise RewardError(f"reward {name}: {_culprit(reward, candidates)}: {type(error).__name__}: {error}") from error
    if not isinstance(score_BJ, Tensor) or score_BJ.shape != candidates.item_BJ.shape:
        got = tuple(score_BJ.shape) if isinstance(score_BJ, Tensor) else type(score_BJ).__name__
        raise RewardError(f"reward {name}: expected a tensor of shape {tuple(candidates.item_BJ.shape)}, got {got}")
    bad_BJ = candidates.named_BJ & ~score_BJ.isfinite()
    if bad_BJ.any():
        b, j = (int(place) for place in bad_BJ.nonzero()[0])
        request, item = int(candidates.request_B[b]), int(candidates.item_BJ[b, j])
        raise RewardError(
            f"reward {name}: request {request}, candidate {j} (item {item}) scored {float(score_BJ[b, j])}, not a finite number "
            f"({int(bad_BJ.sum())} such scores in the batch); mend what this reward reads of the item, or set its weights to 0"
        )
    return torch.where(candidates.named_BJ, score_BJ, 0).float()


def _culprit(reward: Reward, candidates: Candidates) -> str:
    """Which request, and where it can be told which candidate, the component fails on: found by asking again one at a time."""
    for b in range(len(candidates.request_B)):
        alone = candidates.only(b)
        if not _fails(reward, alone):
            continue
        for j in range(alone.item_BJ.shape[1]):
            if _fails(reward, alone.only(0, j)):
                return f"request {int(candidates.request_B[b])}, candidate {j} (item {int(candidates.item_BJ[b, j])})"
        return f"request {int(candidates.request_B[b])}, its candidates together"
    return f"the {len(candidates.request_B)} requests of the batch together, first request {candidates.request_B[:1].tolist()}"


def _fails(reward: Reward, candidates: Candidates) -> bool:
    try:
        reward(candidates)
    except Exception:
        return True
    return False


def _make(name: str, path: str) -> Callable[[Shop], Reward]:
    if path in BUILT_IN:
        return BUILT_IN[path]
    module, attribute = path.split(":")
    try:
        found: Callable[[Shop], Reward] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward.components.{name}: {path} cannot be imported ({error}); is it on the PYTHONPATH?") from error
    return found


__all__ = ["Mapping", "RewardConfig", "Rewards", "join_target"]
