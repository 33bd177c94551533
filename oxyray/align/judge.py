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
    """A SID that several items share is judged by the item really taken, where it is one of them, else by the one that would be shown: of
    those that the scenario may show, the one with the most training events."""

    def __init__(self, config: Config, settings: AlignConfig, device: str = "cpu") -> None:
        run = Run(config.run_dir)
        inputs = Inputs.load(run)
        self.requests = Requests(inputs, config, settings)
        self.service = RewardService(config, run, inputs, device)
        index, pools = inputs.catalog.index, inputs.prepared.pools
        ranked, leaf_N = index.ranked_items(inputs.prepared.train_counts_I()).astype(np.int64), index.item_leaf()
        self._leaf_I = np.full(len(inputs.catalog), -1)
        self._leaf_I[ranked] = leaf_N
        self._shown_SN = np.stack([_first(ranked, leaf_N, pools[name], index.leaves) for name in inputs.prepared.meta.scenarios])

    def judge(self, rolled: Rolled) -> tuple[Judged, dict[str, tuple[float, int]]]:
        """Rewards of a piece's candidates and of the items really taken, and the means of their components for the log."""
        batch = self.requests.at(rolled.step)[rolled.piece]
        asked = _asked(batch, self.requests.taken(rolled.step, rolled.piece).numpy())
        item_BG = np.where(rolled.leaf_BG >= 0, self._shown_SN[asked.scenario_B[:, None], np.maximum(rolled.leaf_BG, 0)], -1)
        target_B1 = asked.target_B[:, None]
        same_BG = (target_B1 >= 0) & (rolled.leaf_BG >= 0) & (rolled.leaf_BG == self._leaf_I[np.maximum(target_B1, 0)])
        verdict = self.service.judge(asked, np.where(same_BG, target_B1, item_BG))
        return Judged(reward_BG=verdict.reward_BG, target_reward_B=verdict.target_reward_B), verdict.told


def _first(ranked_N: Array, leaf_N: Array, pool_I: Array, leaves: int) -> Array:
    """The item that each leaf shows where `pool_I` may be shown: the first of its ranked items that is in the pool, else the first."""
    first_L = np.empty(leaves, dtype=np.int64)
    for kept_N in (np.ones(len(ranked_N), dtype=bool), pool_I[ranked_N]):
        first_L[leaf_N[kept_N][::-1]] = ranked_N[kept_N][::-1]  # written backwards, so that the first one stays
    return first_L


def _asked(batch: Batch, taken_B: Array) -> Asked:
    ids_U = batch.items.ids_U
    last_B = batch.history_offset[:-1] + batch.visible_Q - 1
    item_B = torch.where(batch.visible_Q > 0, batch.item_N[last_B.clamp(min=0)] if len(batch.item_N) else -1, -1)

    def of_catalogue(local_B: torch.Tensor) -> Array:
        return torch.where(local_B >= 0, ids_U[local_B.clamp(min=0)], -1).numpy()

    return Asked(
        user_B=batch.user_B.numpy(), time_B=batch.time_Q.numpy(), scenario_B=batch.scenario_Q.numpy(),
        trigger_B=of_catalogue(batch.trigger_Q), last_B=of_catalogue(item_B),
        target_B=taken_B,
    )  # fmt: skip
