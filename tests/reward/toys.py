"""A small random log of pages, and a ranker in float64 over it. Every item of the log is shown once or is a trigger once, so that a
gradient in an item's row tells which appearance it came from."""

from __future__ import annotations

import numpy as np
import torch

from oxyray.config import RankerConfig
from oxyray.data.order import run_starts
from oxyray.data.stream import ItemFeatures
from oxyray.model.items import Vocab
from oxyray.reward.packing import Packer, RankBatch
from oxyray.reward.pages import Pages
from oxyray.reward.ranker import Ranker

ROUNDING = 1e-12  # of a chance in float64: on some processors the order of a product's sums changes with what else is in the batch


def random_pages(seed: int = 0, users: int = 4, pages: int = 22, most: int = 4) -> Pages:
    random = np.random.default_rng(seed)
    user_R = np.sort(random.integers(0, users, pages))
    time_R = random.integers(0, 8, pages) * 100_000  # ties within users
    order = np.lexsort((time_R, user_R))
    user_R, time_R = user_R[order], time_R[order]
    size_R = random.integers(1, most + 1, pages)
    count = int(size_R.sum())
    first_R = np.maximum.accumulate(np.where(run_starts(user_R), np.arange(pages), 0))
    known_R = [np.sum(time_R[f:r] < time_R[r]) for r, f in enumerate(first_R)]
    return Pages(
        user_R=user_R,
        time_R=time_R,
        over_R=time_R,
        scenario_R=random.integers(0, 3, pages),
        trigger_R=np.where(random.random(pages) < 0.5, count + np.arange(pages), -1),
        split_R=np.zeros(pages, np.int8),
        first_R=first_R,
        visible_R=np.array(known_R),
        offset_R1=np.append(0, np.cumsum(size_R)),
        item_C=random.permutation(count),
        done_C=random.integers(0, 4, count),
        seen_C=random.random(count) < 0.8,
        query_R=random.integers(-1, 5, pages),
        query_WF=random.normal(size=(5, 3)),
    )


class Toy:
    def __init__(self, seed: int = 0, clock: bool = True, **config: object) -> None:
        torch.manual_seed(seed)
        self.log = random_pages(seed)
        items, users = len(self.log.item_C) + len(self.log), 4
        vocab = Vocab(items=items, users=users, scenarios=3, actions=3, side=(4,), profile=(5,), levels=2, width=6, text=3, clock=clock)
        made = {"width": 16, "heads": 2, "layers": 2, "hidden": 24, "dropout": 0.0, "row_dim": 8, "history": 6}
        self.config = RankerConfig(**(made | config))  # type: ignore[arg-type]
        self.ranker = Ranker(self.config, vocab).double().eval()
        for parameter in self.ranker.parameters():  # defaults near zero would hide mistakes
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
        features = ItemFeatures(torch.randint(0, 6, (items, 2)), torch.randint(0, 4, (items, 1)), torch.randn(items, 3).double())
        self.packer = Packer(features, np.random.default_rng(seed).integers(0, 5, (users, 1)))
        self.tables = {"item": torch.randn(items, 8).double(), "user": torch.randn(users, 8).double()}

    def rows(self, batch: RankBatch) -> dict[str, torch.Tensor]:
        return {name: self.tables[name][index] for name, index in batch.lookups().items()}
