"""What a generated item is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from oxyray.config.plain import need

REWARDS = ("format", "relative", "click", "log_click", "conversion", "gmv", "taken", "diversity")
"""The built-in rewards (`oxyray.reward.components`)."""
DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The scenario-aware reward mapping (paper 2.4.2): a weighted sum of components, one mapping for all scenarios.

    components: name of a reward: a built-in one, or the path of one's own class
    weights: scenario or default: component: weight; what a scenario leaves out is as in default, what default leaves out is 1
    retries: times that a reward which could not be computed is tried again before the run stops
    """

    components: dict[str, str] = field(default_factory=lambda: {name: name for name in REWARDS})
    weights: dict[str, dict[str, float]] = field(
        default_factory=lambda: {
            DEFAULT: {
                "format": 1.0,
                "relative": 0.1,
                "click": 1.0,
                "log_click": 0.0,
                "conversion": 1.0,
                "gmv": 0.0,
                "taken": 1.0,
                "diversity": 0.1,
            }
        }
    )
    retries: int = 2

    def __post_init__(self) -> None:
        for name, path in self.components.items():
            known = path in REWARDS or path.count(":") == 1
            need(
                known, f".components.{name}", f"{path!r} is neither built in ({', '.join(REWARDS)}) nor a path like my_shop.rewards:Margin"
            )
        for scenario, weights in self.weights.items():
            for name, weight in weights.items():
                where = f".weights.{scenario}.{name}"
                need(name in self.components, where, f"no such component; known are {', '.join(self.components)}")
                need(math.isfinite(weight), where, f"must be a number, got {weight}")
        need(self.retries >= 0, ".retries", f"must be 0 or more, got {self.retries}")

    def weight(self, scenario: str, component: str) -> float:
        default = self.weights.get(DEFAULT, {}).get(component, 1.0)
        return self.weights.get(scenario, {}).get(component, default)
