"""The ranker's training data as a stream of optimizer steps: stretches of users' pages, the same steps for any number of workers.

As the policy's stream, the plan of an epoch depends on seed and epoch alone, and a position is two numbers. Legend: B stretches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from oxyray.data.stream import cut_evenly
from oxyray.errors import DataError
from oxyray.reward.log import Log
from oxyray.reward.packing import Packer, RankBatch
from oxyray.reward.pages import Pages, Stretches, stretches

Array = np.ndarray
TRAIN = (0,)


class RankStream:
    """Steps of about `items_per_step` judged items. `position` is the next step to be taken."""

    def __init__(self, log: Log, packer: Packer, *, history: int, items_per_step: int, seed: int) -> None:
        self.log, self.packer, self.seed = log, packer, seed
        self.history, self.items_per_step = history, items_per_step
        self.position = {"epoch": 0, "step": 0}
        self._steps: int | None = None

    def steps_per_epoch(self) -> int:
        """The same for every epoch. Raises DataError where the training split has no page."""
        if self._steps is None:
            self._steps = sum(self._count(*self._part(part)) for part in range(self.log.parts))
            if self._steps == 0:
                raise DataError(f"{self.log.prepared.meta.name}: no page of the training split; give more data or smaller test shares")
        return self._steps

    def state_dict(self) -> dict[str, int]:
        return dict(self.position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = {"epoch": int(state["epoch"]), "step": int(state["step"])}

    def batches(self, rank: int = 0, world: int = 1, micro_batches: int = 1) -> Iterator[list[RankBatch]]:
        """Endless: from `position` on, this rank's micro-batches of each step. Where a step has too few stretches for all, a slice is a
        stretch of the step that counts nothing, so that its worker takes part all the same."""
        while True:
            for step, (pages, taken) in enumerate(self._epoch(self.position["epoch"])):
                if step < self.position["step"]:
                    continue
                self.position = {"epoch": self.position["epoch"], "step": step + 1}
                cut = [np.arange(rank + world * m, len(taken), world * micro_batches) for m in range(micro_batches)]
                yield [self.packer.pack(pages, taken.take(rows if len(rows) else np.arange(1)), counts=len(rows) > 0) for rows in cut]
            self.position = {"epoch": self.position["epoch"] + 1, "step": 0}

    def _epoch(self, epoch: int) -> Iterator[tuple[Pages, Stretches]]:
        random = np.random.default_rng([self.seed, epoch])
        for part in random.permutation(self.log.parts):
            pages, all_of_part = self._part(int(part))
            steps = self._count(pages, all_of_part)
            if steps == 0:
                continue
            # Stretches of like length together (little padding), with noise so that no two epochs pair alike.
            noise_B = random.uniform(0.75, 1.3, len(all_of_part))
            order_B = np.argsort((all_of_part.stop_B - all_of_part.start_B) * noise_B, kind="stable")
            pieces = cut_evenly(order_B, _items(pages, all_of_part)[order_B], steps)
            for k in random.permutation(steps):
                yield pages, all_of_part.take(random.permutation(pieces[k]))

    def _part(self, part: int) -> tuple[Pages, Stretches]:
        pages = self.log.pages(part)
        return pages, stretches(pages, self.history, TRAIN)

    def _count(self, pages: Pages, taken: Stretches) -> int:
        return min(max(1, round(int(_items(pages, taken).sum()) / self.items_per_step)), len(taken)) if len(taken) else 0


def _items(pages: Pages, taken: Stretches) -> Array:
    """Judged items of each stretch."""
    return pages.offset_R1[taken.stop_B] - pages.offset_R1[taken.asked_B]
