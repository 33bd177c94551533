"""What has a say in the order of generated items, by the configuration: followers, and the unified ranker.

In the paper's deployments the ranker stays behind the generation in most scenarios, and is the reward alone where the model has replaced
all of the cascade (paper 4.5). So it can stay here, too: it has seen what was passed over, which the policy has not.

Legend: Q requests, R places of their lists.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from oxyray.config import Config, RewardConfig
from oxyray.data.batch import Batch
from oxyray.data.covisits import co_visits
from oxyray.generate.rerank import Followers, Opinion
from oxyray.model.inputs import Inputs
from oxyray.reward.service import Asked, RewardService
from oxyray.run import Run

Array = np.ndarray


class RankerSays:
    """`weight` times the logarithm of the ranker's probability of a click. It is told what the policy is told, and not asked about
    newcomers, whom it has never seen; an item that came into the catalogue after it gets the mean of its list. Raises RunError where there
    is no ranker."""

    def __init__(self, config: Config, run: Run, inputs: Inputs, device: str = "cpu") -> None:
        self.weight = config.generate.ranker
        clicks = RewardConfig(components={"log_click": "log_click"}, weights={"default": {"log_click": 1.0}})
        self.service = RewardService(dataclasses.replace(config, reward=clicks), run, inputs, device)
        text_IF, self.items = inputs.features.text_IF, inputs.prepared.meta.items
        self.silent_F = None if text_IF is None else np.full(text_IF.shape[1], np.nan, dtype=np.float32)

    def __call__(self, batch: Batch, item_QR: Array) -> Array:
        asked = Asked.of(batch, np.full(len(item_QR), -1))
        if asked.query_BF is None and self.silent_F is not None:  # a policy that reads no text: the log must not be asked in its place
            asked = dataclasses.replace(asked, query_BF=np.tile(self.silent_F, (len(item_QR), 1)))
        bonus_QR = np.zeros(item_QR.shape)
        known_Q, judged_QR = asked.user_B >= 0, (item_QR >= 0) & (item_QR < self.items)
        if known_Q.any():
            item_BR, judged_BR = np.where(judged_QR, item_QR, -1)[known_Q], judged_QR[known_Q]
            bonus_BR = self.weight * np.where(judged_BR, self.service.judge(asked.only(known_Q), item_BR).reward_BG, 0)
            mean_B1 = bonus_BR.sum(1, keepdims=True) / np.maximum(judged_BR.sum(1, keepdims=True), 1)
            bonus_QR[known_Q] = np.where(judged_BR, bonus_BR, mean_B1)
        return bonus_QR


def opinions(config: Config, run: Run, inputs: Inputs, device: str = "cpu") -> list[Opinion]:
    """Those to which `generate` gives a weight. Raises RunError where the ranker is asked and was never trained."""
    found: list[Opinion] = []
    if config.generate.followers:
        found.append(Followers(co_visits(inputs.prepared, inputs.prepared.meta.items), config.generate.followers))
    if config.generate.ranker:
        found.append(RankerSays(config, run, inputs, device))
    return found
