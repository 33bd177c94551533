"""Tiny random shops for the model's tests: a catalogue, features, a timeline, a policy and its rows."""

from __future__ import annotations

import numpy as np
import torch

from oxyray.config import ModelConfig
from oxyray.data.batch import Batch
from oxyray.data.requests import Timeline, request_segments, timeline, training_segments
from oxyray.data.stream import Collator, ItemFeatures
from oxyray.model.items import Vocab
from oxyray.model.policy import Policy
from oxyray.sid.prefix import PrefixIndex


class Toy:
    """`items` items with random SIDs of 3 levels of `width` codes, a few users with random events, a policy in float64 and eval mode."""

    def __init__(
        self, head: str = "tied", items: int = 40, width: int = 5, users: int = 6, seed: int = 0, clock: bool = True, **model: object
    ) -> None:
        random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.codes_IL = random.integers(0, width, (items, 3))
        self.index = PrefixIndex.from_codes(self.codes_IL, width)
        self.vocab = Vocab(
            items=items, users=users, scenarios=3, actions=3, side=(4, 3), profile=(5,), levels=3, width=width, text=7, query=7, clock=clock
        )
        config = {
            "width": 16,
            "heads": 2,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "hidden": 24,
            "dropout": 0.0,
            "row_dim": 8,
            "history": 6,
            "item_negatives": 0 if head == "tied" else 9,
        }
        self.config = ModelConfig(**(config | {"head": head, "repeats": False} | model))  # type: ignore[arg-type]
        self.policy = Policy(self.config, self.vocab, self.index).double().eval()
        for parameter in self.policy.parameters():  # defaults near zero would hide mistakes
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
        side = np.stack([random.integers(0, size, items) for size in self.vocab.side], axis=1)
        self.features = ItemFeatures(torch.from_numpy(self.codes_IL), torch.from_numpy(side), torch.randn(items, 7).double())
        weight_AS = np.outer([1.0, 2.0, 4.0], np.ones(self.vocab.scenarios))
        profile_UP, query_WF = random.integers(0, 5, (users, 1)), random.normal(size=(9, 7))
        self.collate = Collator(self.features, profile_UP, weight_AS, head == "tied", self.config.item_negatives, query_WF)
        self.tables = {"item": torch.randn(items, 8).double(), "user": torch.randn(users, 8).double()}
        events = 12 * users
        self.timeline: Timeline = timeline(
            {
                "user": np.sort(random.integers(0, users, events)),
                "item": random.integers(0, items, events),
                "time": random.integers(0, 10**6, events),
                "action": random.integers(0, 3, events),
                "scenario": random.integers(0, 3, events),
                "request": random.integers(0, events, events),
                "trigger": random.integers(-1, items, events),
                "query_row": random.integers(-1, 9, events),
                "split": np.zeros(events, int),
            }
        )

    def lookup(self, ids: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: self.tables[name][index] for name, index in ids.items()}

    def training_batch(self) -> Batch:
        return self.collate(self.timeline, training_segments(self.timeline, self.config.history), negative_N=self.collate.draw(1))

    def request_batch(self, events: np.ndarray) -> Batch:
        return self.collate(self.timeline, request_segments(self.timeline, events, self.config.history))


def repeat_changes(toy: Toy, batch: Batch, level: int) -> torch.Tensor:
    """What having had items adds, written out: to the logit of every (query, node) of a level; behind the levels, of every (query, item):
    (Q, n)."""
    assert toy.policy.repeats is not None
    weight_SK = toy.policy.repeats.factor[level].weight.view(3, -1)
    first_Q = batch.history_offset[torch.repeat_interleave(torch.arange(batch.segments), torch.diff(batch.query_offset))]
    path_IL, items = toy.policy.tree.path_IL, len(toy.codes_IL)
    below = [[item] for item in range(items)] if level == 3 else [
        (path_IL[:, level] == node).nonzero()[:, 0].tolist() for node in range(toy.policy.tree.nodes(level))
    ]  # fmt: skip
    rows = []
    for first, visible, scenario in zip(first_Q.tolist(), batch.visible_Q.tolist(), batch.scenario_Q.tolist(), strict=True):
        item_N = batch.items.ids_U[batch.item_N[first : first + visible]].tolist()
        action_N, factor_I = batch.action_N[first : first + visible].tolist(), torch.ones(items, dtype=torch.double)
        for item in set(item_N):
            last = max(place for place, each in enumerate(item_N) if each == item)
            kinds = [action_N[last], once_or_more(item_N.count(item)), ago(visible - 1 - last)]
            factor_I[item] = torch.exp(10 * sum(weight_SK[scenario, kind] for kind in kinds))
        rows.append(torch.stack([factor_I[each].mean().log() for each in below]))
    return torch.stack(rows)


def once_or_more(times: int) -> int:
    """The kind for an item that was had so many times: once, two or three times, more often. The toy shop has three actions before it."""
    return 3 + (0 if times == 1 else 1 if times <= 3 else 2)


def ago(events: int) -> int:
    return 6 + next(kind for kind, most in enumerate((0, 2, 6, 14, 30, 62, 10**9)) if events <= most)
