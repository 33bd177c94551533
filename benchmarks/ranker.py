"""Scoring the candidates of a request with the unified ranker: the user's side once and the fusion product in two parts (MaRI), against the
plain path, in which every candidate is a sample of its own with the user's whole past and `W [u; x]` is one product.

Between them stands the path that computes the user's side once and keeps the plain product, so that each half of the gain is seen. All
three have the same weights, give the same probabilities (checked), and take turns in one process with one thread. The log is random, at
the sizes of the embedded shop: 50 pages of 12 items before a request.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.harness import Report, arguments, in_turns
from oxyray.config import RankerConfig
from oxyray.data.stream import ItemFeatures
from oxyray.model.items import Vocab
from oxyray.model.layers import Tensor
from oxyray.reward.packing import Packer, RankBatch
from oxyray.reward.pages import Pages
from oxyray.reward.ranker import Fusion, Ranker

SEED, ITEMS, HISTORY, PAGE, TEXT = 7, 12_000, 50, 12, 384


class PlainFusion(Fusion):
    """The same weights as one product over the concatenated features of every candidate."""

    def forward(self, user_AV: Tensor, item_UD: Tensor, page_Q: Tensor, item_Q: Tensor) -> Tensor:
        weight = torch.cat([self.of_user.weight, self.of_item.weight], dim=1)
        both = F.linear(torch.cat([user_AV[page_Q], item_UD[item_Q]], dim=1), weight, self.of_user.bias)
        gate, value = both.chunk(2, dim=-1)
        return item_UD[item_Q] + self.down(F.silu(gate) * value)


def main() -> None:
    parser = arguments(__doc__ or "")
    options = parser.parse_args()
    torch.set_num_threads(1)
    requests, rounds = (1, 1) if options.quick else (4, 7)
    sizes = (12, 64) if options.quick else (12, 128, 512)
    config = RankerConfig(dropout=0.0)
    report = Report("ranker", dataclasses.asdict(config) | {"history": HISTORY, "page": PAGE, "requests": requests}, [SEED])
    bench = Bench(config, requests)
    rows = []
    for candidates in sizes:
        seconds = bench.measure(candidates, rounds)
        ours, once, plain = (statistics.median(values) / requests for values in seconds.values())
        rows.append([candidates, 1e3 * ours, 1e3 * once, 1e3 * plain, once / ours, plain / ours])
    columns = ["candidates", "ours, ms", "user once, ms", "plain, ms", "user once / ours", "plain / ours"]
    report.table("Time to score a request's candidates", columns, rows)
    report.claim(f"plain path / ours at {sizes[-1]} candidates", rows[-1][-1], 3.0, "x")
    report.claim("largest difference of a probability", bench.difference, 1e-5, "", better="lower")
    report.finish(options.quick)


class Bench:
    """A random log, a ranker with its rows, and the three paths over it."""

    def __init__(self, config: RankerConfig, requests: int) -> None:
        torch.manual_seed(SEED)
        self.random, self.requests, self.difference = np.random.default_rng(SEED), requests, 0.0
        self.log = random_log(self.random, requests)
        vocab = Vocab(
            items=ITEMS, users=requests, scenarios=7, actions=3, side=(13, 37, 121, 126, 21), profile=(5, 3, 11, 4, 5), levels=3,
            width=256, text=TEXT, clock=True,
        )  # fmt: skip
        side_IC = torch.stack([torch.randint(0, size, (ITEMS,)) for size in vocab.side], dim=1)
        features = ItemFeatures(torch.randint(0, vocab.width, (ITEMS, vocab.levels)), side_IC, torch.randn(ITEMS, TEXT))
        self.packer = Packer(features, np.zeros((requests, len(vocab.profile)), np.int64))
        self.ranker = Ranker(config, vocab).eval()
        self.once = copy.deepcopy(self.ranker)
        self.once.fusion.__class__ = PlainFusion
        self.tables = {"item": torch.randn(ITEMS, config.row_dim), "user": torch.randn(requests, config.row_dim)}

    def measure(self, candidates: int, rounds: int) -> dict[str, list[float]]:
        """Seconds of each round of each path."""
        item_BJ = np.stack([self.random.choice(ITEMS, candidates, replace=False) for _ in range(self.requests)])
        listed = self.batch(np.arange(self.requests), item_BJ)
        single = [self.batch(np.full(candidates, b), item_BJ[b][:, None]) for b in range(self.requests)]
        paths: dict[str, Callable[[], Tensor]] = {
            "ours": lambda: self.chances(self.ranker, listed),
            "once": lambda: self.chances(self.once, listed),
            "plain": lambda: torch.cat([self.chances(self.once, batch) for batch in single]),
        }
        answers = [path() for path in paths.values()]
        self.difference = max([self.difference, *(float((answer - answers[0]).abs().max()) for answer in answers)])
        return in_turns(paths, rounds)[0]

    def batch(self, user_B: np.ndarray, item_BJ: np.ndarray) -> RankBatch:
        zero_B = np.zeros(len(user_B), np.int64)
        facts = {"user_B": user_B, "time_B": zero_B + 10**9, "scenario_B": zero_B, "trigger_B": zero_B - 1}
        return self.packer.requests(self.log, HISTORY + 1, item_BJ=item_BJ, **facts)

    def chances(self, ranker: Ranker, batch: RankBatch) -> Tensor:
        return ranker.chances(batch, {name: self.tables[name][index] for name, index in batch.lookups().items()})


def random_log(random: np.random.Generator, users: int) -> Pages:
    """`HISTORY` pages of `PAGE` items for each user, one item of each taken."""
    pages = users * HISTORY
    user_R, nth_R = np.divmod(np.arange(pages), HISTORY)
    done_RC = np.zeros((pages, PAGE), np.int64)
    done_RC[np.arange(pages), random.integers(0, PAGE, pages)] = random.integers(1, 4, pages)
    return Pages(
        user_R=user_R, time_R=nth_R * 40_000, over_R=nth_R * 40_000, scenario_R=random.integers(0, 7, pages),
        trigger_R=np.full(pages, -1), split_R=np.zeros(pages, np.int8), first_R=user_R * HISTORY, visible_R=nth_R,
        offset_R1=np.arange(pages + 1) * PAGE, item_C=random.integers(0, ITEMS, pages * PAGE), done_C=done_RC.ravel(),
        seen_C=np.ones(pages * PAGE, bool), query_R=np.full(pages, -1),
    )  # fmt: skip


if __name__ == "__main__":
    main()
