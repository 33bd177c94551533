"""What is asked in each step of the loop: the same for everybody who asks, so that no batch has to travel.

A step's requests are drawn from the training split, or from what pre-training held back of it, and cut into pieces; a piece is what one
rollout worker generates for at a time and what a learner takes as one micro-batch. A set share of the requests is synthetic (paper 4.4): a
logged profile and history, but candidates and labels from the models alone, so the item that was really taken teaches nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from oxyray.config import AlignConfig, Config
from oxyray.data.batch import Batch
from oxyray.data.stream import SegmentStream
from oxyray.model.inputs import Inputs

Tensor = torch.Tensor


class Requests:
    def __init__(self, inputs: Inputs, config: Config, align: AlignConfig) -> None:
        self.pieces, self.seed, self.share = align.pieces, align.seed, align.synthetic_share
        self._pool_S = [inputs.prepared.pools[name] for name in inputs.prepared.meta.scenarios]
        self._stream = SegmentStream(
            inputs.prepared,
            inputs.collator(config.model),
            history=config.model.history,
            targets_per_step=align.requests_per_step,
            seed=align.seed,
            one_query=True,
            held_back=config.train.hold_back,
            which="held_back",
        )
        self._next, self._given = -1, list[Batch]()
        self._batches: Iterator[list[Batch]] = iter(())

    def at(self, step: int) -> list[Batch]:
        """The pieces of a step. Steps in order are read on; any other costs the way there."""
        if step == self._next - 1:
            return self._given
        if step != self._next:
            epoch, within = divmod(step, self._stream.steps_per_epoch())
            self._stream.load_state_dict({"epoch": epoch, "step": within})
            self._batches = self._stream.batches(micro_batches=self.pieces)
        self._given, self._next = next(self._batches), step + 1
        return self._given

    def taken(self, step: int, piece: int) -> Tensor:
        """The item that each request of a piece really took, -1 where it can teach nothing: in a synthetic request, and where the scenario
        may no longer show that item: item_B, int64."""
        batch = self.at(step)[piece]
        synthetic_B = np.random.default_rng([self.seed, step, piece]).random(batch.queries) < self.share
        item_B = batch.items.ids_U[batch.target_Q].long()
        shown_B = [bool(self._pool_S[scenario][item]) for scenario, item in zip(batch.scenario_Q.tolist(), item_B.tolist(), strict=True)]
        return torch.where(torch.from_numpy(~synthetic_B & np.array(shown_B, dtype=bool)), item_B, -1)
