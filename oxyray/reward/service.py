"""Judging generated items (paper 2.4.2): the ranker's chances behind the user's own past, and the reward mapping over them. Framework-free;
in the RL loop an actor holds one (`oxyray.align.processes`).

Legend: B requests, G generated candidates, J = G + 1 with the target's column, F width of a text vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from oxyray.config import Config
from oxyray.data.batch import Batch
from oxyray.errors import RewardError
from oxyray.model.inputs import Inputs
from oxyray.reward.components import Candidates, Shop
from oxyray.reward.log import Log
from oxyray.reward.mapping import Mapping, join_target
from oxyray.reward.pages import Pages
from oxyray.reward.ranker import HEADS
from oxyray.reward.saved import packer_of, read_ranker
from oxyray.run import Run

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Requests by what a judge must know of them. `trigger_B` and `last_B` (the last item that the user took) are -1 for none; so is
    `target_B`, the item really taken, where a request is synthetic. `query_BF` are the vectors of what users typed, a row of NaN for
    nothing; None: what the log knows of each user and time."""

    user_B: Array
    time_B: Array
    scenario_B: Array
    trigger_B: Array
    last_B: Array
    target_B: Array
    query_BF: Array | None = None

    @classmethod
    def of(cls, batch: Batch, target_B: Array) -> Asked:
        """The requests of a batch, one query a segment, by what the policy is told of them."""
        ids_U = batch.items.ids_U
        last_B = batch.history_offset[:-1] + batch.visible_Q - 1
        item_B = torch.where(batch.visible_Q > 0, batch.item_N[last_B.clamp(min=0)] if len(batch.item_N) else -1, -1)

        def of_catalogue(local_B: torch.Tensor) -> Array:
            return torch.where(local_B >= 0, ids_U[local_B.clamp(min=0)], -1).cpu().numpy()

        query_BF = None
        if batch.vector_WF is not None:
            silent_1F = batch.vector_WF.new_full((1, batch.vector_WF.shape[1]), torch.nan)
            query_BF = torch.cat([batch.vector_WF, silent_1F])[batch.text_Q].cpu().numpy()  # -1: the last row
        return cls(
            user_B=batch.user_B.cpu().numpy(), time_B=batch.time_Q.cpu().numpy(), scenario_B=batch.scenario_Q.cpu().numpy(),
            trigger_B=of_catalogue(batch.trigger_Q), last_B=of_catalogue(item_B), target_B=target_B, query_BF=query_BF,
        )  # fmt: skip

    def only(self, keep_B: Array) -> Asked:
        """Those of the requests."""
        kept = {name: value[keep_B] for name, value in vars(self).items() if value is not None}
        return Asked(**kept)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Rewards of the candidates (B, G), of the targets (B,; R*, NaN where there is none), and what the log is told."""

    reward_BG: Array
    target_reward_B: Array
    told: dict[str, tuple[float, int]]


class RewardService:
    """Reads the ranker only where the mapping asks for its chances."""

    def __init__(self, config: Config, run: Run, inputs: Inputs, device: str = "cpu") -> None:
        self.mapping = Mapping(config.reward, Shop.of(inputs))
        self.log, self.prepared, self.device = Log.of(config, run, inputs.prepared), inputs.prepared, device
        self.packer, self.history = packer_of(inputs), 0
        self.ranker, self.tables = None, None
        if self.mapping.needs_chances:
            self.ranker, self.tables = read_ranker(run.need("rank", "model", stage="rank"), inputs, device)
            self.history = self.ranker.config.history

    def judge(self, asked: Asked, item_BG: Array) -> Verdict:
        """`item_BG` are catalogue indices, -1 for no candidate. Raises RewardError on whatever cannot be judged."""
        item_BJ, real_BJ, place_B = join_target(
            torch.from_numpy(item_BG.astype(np.int64)), torch.from_numpy(item_BG >= 0), torch.from_numpy(asked.target_B.astype(np.int64))
        )
        pages = self._pages(asked.user_B)
        query_BF = self._queries(pages, asked)
        heard_BF = None if pages.query_WF is None else query_BF  # a ranker that never saw a query would not know what to make of one
        candidates = Candidates(
            request_B=torch.arange(len(asked.user_B)), scenario_B=_long(asked.scenario_B), item_BJ=item_BJ, real_BJ=real_BJ,
            target_place_B=place_B, trigger_B=_long(asked.trigger_B), last_B=_long(asked.last_B),
            query_BF=None if query_BF is None else torch.from_numpy(query_BF),
            chance_BJH=None if self.ranker is None else self._chances(pages, asked, torch.where(real_BJ, item_BJ, -1).numpy(), heard_BF),
        )  # fmt: skip
        rewards = self.mapping(candidates)
        found = rewards.total_BJ[:, :-1].numpy()
        if not np.isfinite(found).all():
            raise RewardError("a total reward is not finite; every component was: are its weights sane?")
        return Verdict(reward_BG=found, target_reward_B=rewards.target_B.numpy(), told=self.mapping.means(rewards, candidates))

    def _chances(self, pages: Pages, asked: Asked, item_BJ: Array, query_BF: Array | None) -> torch.Tensor:
        assert self.ranker is not None
        assert self.tables is not None
        facts = {name: getattr(asked, name) for name in ("user_B", "time_B", "scenario_B", "trigger_B")}
        batch = self.packer.requests(pages, self.history, item_BJ=item_BJ, query_BF=query_BF, **facts).to(self.device)
        chance_QH = self.ranker.chances(batch, self.tables.lookup(batch.lookups())).cpu()
        chance_BJH = torch.zeros(*item_BJ.shape, len(HEADS))
        chance_BJH[torch.from_numpy(item_BJ >= 0)] = chance_QH.float()
        return chance_BJH

    def _pages(self, user_B: Array) -> Pages:
        """The piece of the log that holds these users."""
        if self.log.parts == 1:
            return self.log.pages(0)
        part_B = np.searchsorted(np.asarray(self.prepared.meta.part_users), user_B, side="right") - 1
        if len(np.unique(part_B)) > 1:
            raise RewardError("requests of several parts of the data came in one piece; a step's requests are of one part")
        return self.log.pages(int(part_B[0]))

    def _queries(self, pages: Pages, asked: Asked) -> Array | None:
        """The query vector of each request, a row of NaN for none, by the user's latest page in its scenario that was open then; None where
        nothing is known of any."""
        if asked.query_BF is not None or pages.query_WF is None:
            return asked.query_BF
        query_BF = np.full((len(asked.user_B), pages.query_WF.shape[1]), np.nan, dtype=np.float32)
        first_B, end_B = np.searchsorted(pages.user_R, asked.user_B), np.searchsorted(pages.user_R, asked.user_B, side="right")
        for b, (first, end) in enumerate(zip(first_B, end_B, strict=True)):
            open_R = (pages.time_R[first:end] <= asked.time_B[b]) & (asked.time_B[b] <= pages.over_R[first:end])
            here = np.flatnonzero(open_R & (pages.scenario_R[first:end] == asked.scenario_B[b]))
            if len(here) and pages.query_R[first + here[-1]] >= 0:
                query_BF[b] = pages.query_WF[pages.query_R[first + here[-1]]]
        return query_BF


def _long(values: Array) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))
