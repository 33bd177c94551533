"""Judging, without Ray: candidates in, rewards out. It draws the same requests as everybody, so only candidates travel."""

from __future__ import annotations

import numpy as np

from oxyray.align.learner import Judged
from oxyray.align.requests import Requests
from oxyray.align.rollout import Rolled
from oxyray.config import AlignConfig, Config
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
        asked = Asked.of(batch, self.requests.taken(rolled.step, rolled.piece).numpy())
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
