"""Judging, without Ray: candidates in, rewards out. It draws the same requests as everybody, so only candidates travel."""

from __future__ import annotations

import numpy as np
import torch

from oxyray.align.learner import Judged
from oxyray.align.requests import Requests
from oxyray.align.rollout import Rolled
from oxyray.config import AlignConfig, Config
from oxyray.data.batch import Batch
from oxyray.model.inputs import Inputs
from oxyray.reward.service import Asked, RewardService
from oxyray.run import Run

Array = np.ndarray


class Judge:
    """A SID that several items share is judged by the one with the most training events, which is the one that it would show first."""

    def __init__(self, config: Config, settings: AlignConfig, device: str = "cpu") -> None:
        run = Run(config.run_dir)
        inputs = Inputs.load(run)
        self.requests = Requests(inputs, config, settings)
        self.service = RewardService(config, run, inputs, device)
        index = inputs.catalog.index
        ranked = index.ranked_items(inputs.prepared.train_counts_I())
        self._item_of_leaf = ranked[index.first_item(np.arange(index.leaves))].astype(np.int64)

    def judge(self, rolled: Rolled) -> tuple[Judged, dict[str, float]]:
        """Rewards of a piece's candidates and of the items really taken, and the means of their components for the log."""
        batch = self.requests.at(rolled.step)[rolled.piece]
        synthetic_B = self.requests.synthetic(rolled.step, rolled.piece).numpy()
        item_BG = np.where(rolled.leaf_BG >= 0, self._item_of_leaf[np.maximum(rolled.leaf_BG, 0)], -1)
        verdict = self.service.judge(_asked(batch, synthetic_B), item_BG)
        return Judged(reward_BG=verdict.reward_BG, target_reward_B=verdict.target_reward_B), verdict.told


def _asked(batch: Batch, synthetic_B: Array) -> Asked:
    ids_U = batch.items.ids_U
    last_B = batch.history_offset[:-1] + batch.visible_Q - 1
    item_B = torch.where(batch.visible_Q > 0, batch.item_N[last_B.clamp(min=0)] if len(batch.item_N) else -1, -1)

    def of_catalogue(local_B: torch.Tensor) -> Array:
        return torch.where(local_B >= 0, ids_U[local_B.clamp(min=0)], -1).numpy()

    return Asked(
        user_B=batch.user_B.numpy(), time_B=batch.time_Q.numpy(), scenario_B=batch.scenario_Q.numpy(),
        trigger_B=of_catalogue(batch.trigger_Q), last_B=of_catalogue(item_B),
        target_B=np.where(synthetic_B, -1, of_catalogue(batch.target_Q)),
    )  # fmt: skip
