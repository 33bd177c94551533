"""Training data as a stream of optimizer steps.

The plan of an epoch (which segments form which step) depends on the seed and the epoch alone. Workers and micro-batches take slices of a
step, so the sample order is the same for any number of them, and a run resumes from two numbers, `{"epoch", "step"}`, without repeating or
losing a step. One part file is in memory at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from oxyray.data.batch import Batch, ItemBlock, Tensor, offsets
from oxyray.data.held_back import HeldBack
from oxyray.data.order import TRAIN
from oxyray.data.prepared import Prepared
from oxyray.data.requests import Segments, Timeline, request_segments, timeline, training_segments
from oxyray.errors import DataError

Array = np.ndarray

_HELD = 3  # a split of its own for training events that are held back


@dataclass(frozen=True)
class ItemFeatures:
    """Constant features of every item: SID codes (I, L), categorical side features (I, C), text vectors (I, F) or None."""

    codes_IL: Tensor
    side_IC: Tensor
    text_IF: Tensor | None

    def block(self, ids_U: Tensor) -> ItemBlock:
        return ItemBlock(ids_U, self.codes_IL[ids_U], self.side_IC[ids_U], None if self.text_IF is None else self.text_IF[ids_U])

    @cached_property
    def whole(self) -> ItemBlock:
        """All items: one block, whoever asks."""
        return ItemBlock(torch.arange(len(self.codes_IL)), self.codes_IL, self.side_IC, self.text_IF, whole=True)


@dataclass
class Collator:
    """Segments of a timeline to a Batch. With `whole_catalogue` the item block holds every item and item indices stay catalogue indices.
    `weight_AS` is the weight of a target by its action and scenario, `negatives` how many items `draw` draws for the item-level loss,
    `query_WF` the vectors of the known query texts (None: the model reads none), `older` how many events before a segment's history come
    along."""

    features: ItemFeatures
    profile_UP: Array
    weight_AS: Array
    whole_catalogue: bool
    negatives: int = 0
    query_WF: Array | None = None
    older: int = 0

    def draw(self, *seed: int) -> Array | None:
        """Items drawn uniformly from the catalogue, the same wherever the same is seeded; None where none are wanted."""
        return np.random.default_rng(seed).integers(0, len(self.features.codes_IL), self.negatives) if self.negatives else None

    def __call__(self, time: Timeline, segments: Segments, targets: bool = True, negative_N: Array | None = None) -> Batch:
        event_N, query_Q = _ranges(segments.start_B, segments.length_B), _ranges(segments.query_start_B, segments.query_length_B)
        start_Q = np.repeat(segments.start_B, segments.query_length_B)
        user_B = time.user_E[segments.query_start_B]
        user_start_B = time.user_start_E[segments.query_start_B]
        older_start_B = np.maximum(user_start_B, segments.start_B - self.older)
        older_O = _ranges(older_start_B, segments.start_B - older_start_B)
        older_start_Q = np.repeat(older_start_B, segments.query_length_B)
        item_N, trigger_Q = time.item_E[event_N], time.trigger_E[query_Q]
        target_Q = time.item_E[query_Q] if targets else np.full(len(query_Q), -1)
        drawn_N = np.empty(0, np.int64) if negative_N is None else negative_N
        items, (item_N, trigger_Q, target_Q, drawn_N, item_O) = self._localise(item_N, trigger_Q, target_Q, drawn_N, time.item_E[older_O])
        end_Q = time.user_start_E[query_Q] + time.visible_E[query_Q]
        text_Q, vector_WF = self._texts(time.query_E[query_Q])
        return Batch(
            items=items,
            user_B=_long(user_B),
            profile_BP=_long(self.profile_UP[user_B]),
            item_N=_long(item_N),
            action_N=_long(time.action_E[event_N]),
            scenario_N=_long(time.scenario_E[event_N]),
            time_N=_long(time.asked_E[event_N]),
            history_offset=offsets(segments.length_B),
            query_offset=offsets(segments.query_length_B),
            visible_Q=_long(np.maximum(end_Q - start_Q, 0)),
            scenario_Q=_long(time.scenario_E[query_Q]),
            trigger_Q=_long(trigger_Q),
            text_Q=_long(text_Q),
            time_Q=_long(time.asked_E[query_Q]),
            target_Q=_long(target_Q),
            action_Q=_long(time.action_E[query_Q]),
            weight_Q=torch.from_numpy(self.weight_AS[time.action_E[query_Q], time.scenario_E[query_Q]].astype(np.float32)),
            older_item_O=_long(item_O),
            older_action_O=_long(time.action_E[older_O]),
            older_scenario_O=_long(time.scenario_E[older_O]),
            older_offset=offsets(segments.start_B - older_start_B),
            older_visible_Q=_long(np.clip(end_Q, older_start_Q, start_Q) - older_start_Q),
            negative_N=None if negative_N is None else _long(drawn_N),
            vector_WF=vector_WF,
        )

    def _texts(self, row_Q: Array) -> tuple[Array, Tensor | None]:
        """Which of the batch's distinct texts each query has, and their vectors."""
        if self.query_WF is None:
            return np.full(len(row_Q), -1), None
        used, place_Q = np.unique(row_Q, return_inverse=True)
        none = int((used < 0).sum())
        return place_Q - none, torch.from_numpy(np.array(self.query_WF[used[none:]], dtype=np.float32))

    def _localise(self, *indices: Array) -> tuple[ItemBlock, tuple[Array, ...]]:
        if self.whole_catalogue:
            return self.features.whole, indices
        used = np.unique(np.concatenate([*indices, [0]]))
        used = used[used >= 0]
        return self.features.block(_long(used)), tuple(np.where(i < 0, -1, np.searchsorted(used, i)) for i in indices)


class SegmentStream:
    """Steps of about `targets_per_step` queries each. `position` is the next step to be taken. Of the training events, targets are all, the
    earlier ones, or those that are `held_back` (a share, see `HeldBack`; one query a segment)."""

    def __init__(
        self,
        prepared: Prepared,
        collate: Collator,
        *,
        history: int,
        targets_per_step: int,
        seed: int,
        one_query: bool = False,
        overfit_steps: int = 0,
        held_back: float = 0.0,
        which: Literal["all", "earlier", "held_back"] = "all",
    ) -> None:
        self.prepared, self.collate, self.seed = prepared, collate, seed
        self._held_back, self._which = HeldBack(prepared, held_back), which if held_back else "all"
        self.history, self.targets_per_step, self.one_query, self.overfit_steps = history, targets_per_step, one_query, overfit_steps
        self.position = {"epoch": 0, "step": 0}
        self._cached: tuple[int, Timeline, Segments] | None = None
        self._steps: int | None = None

    def steps_per_epoch(self) -> int:
        """Steps of an epoch: the same for every epoch. Reads every part once."""
        if self._steps is None:
            self._steps = sum(self._part_steps(part) for part in range(self.prepared.parts))
            if self._steps == 0:
                raise DataError(
                    f"{self.prepared.meta.name}: no training events after the split; "
                    "give more data, or smaller data.valid_share and data.test_share"
                )
        return min(self._steps, self.overfit_steps) if self.overfit_steps else self._steps

    def state_dict(self) -> dict[str, int]:
        return dict(self.position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = {"epoch": int(state["epoch"]), "step": int(state["step"])}

    def batches(self, rank: int = 0, world: int = 1, micro_batches: int = 1) -> Iterator[list[Batch]]:
        """Endless: from `position` on, this rank's micro-batches of each step. Where a step has too few segments for all, a slice is one
        target of the step with weight 0 behind its latest event, so that its worker takes part all the same."""
        while True:
            for step, (time, segments) in enumerate(self._epoch(self.position["epoch"])):
                if step < self.position["step"]:
                    continue
                self.position = {"epoch": self.position["epoch"], "step": step + 1}
                pieces = [segments.take(np.arange(rank + world * m, len(segments), world * micro_batches)) for m in range(micro_batches)]
                drawn_N = self.collate.draw(self.seed, self.position["epoch"], step)
                yield [
                    self.collate(time, piece, negative_N=drawn_N) if len(piece) else self._weightless(time, segments, drawn_N)
                    for piece in pieces
                ]
            self.position = {"epoch": self.position["epoch"] + 1, "step": 0}

    def _weightless(self, time: Timeline, segments: Segments, drawn_N: Array | None) -> Batch:
        batch = self.collate(time, request_segments(time, segments.query_start_B[:1], 1), negative_N=drawn_N)
        return dataclasses.replace(batch, weight_Q=torch.zeros_like(batch.weight_Q))

    def _epoch(self, epoch: int) -> Iterator[tuple[Timeline, Segments]]:
        # Overfitting sees the first steps of the first epoch for ever.
        epoch = 0 if self.overfit_steps else epoch
        random = np.random.default_rng([self.seed, epoch])
        limit, given = self.steps_per_epoch(), 0
        for part in random.permutation(self.prepared.parts):
            time, segments = self._part(int(part))
            steps = list(self._plan(segments, random))
            for rows in steps:
                if given == limit:
                    return
                given += 1
                yield time, segments.take(rows)

    def _plan(self, segments: Segments, random: np.random.Generator) -> Iterator[Array]:
        """Rows of each step: segments of like length together (little padding), with noise so that no two epochs pair alike, steps
        shuffled. A segment is not cut any more, so a step may hold up to twice the targets asked for, and always holds some."""
        size = segments.query_length_B
        order = np.argsort(np.maximum(segments.length_B, size) * random.uniform(0.75, 1.3, len(size)), kind="stable")
        steps = self._steps_of(segments)
        if steps == 0:
            return
        pieces = cut_evenly(order, size[order], steps)
        for k in random.permutation(len(pieces)):
            yield random.permutation(pieces[k])

    def _steps_of(self, segments: Segments) -> int:
        wanted = max(1, round(int(segments.query_length_B.sum()) / self.targets_per_step))
        return min(wanted, len(segments))

    def _part(self, part: int) -> tuple[Timeline, Segments]:
        if self._cached is None or self._cached[0] != part:
            self._cached = (part, *self._segments(self.prepared.events(part)))
        return self._cached[1], self._cached[2]

    def _segments(self, events: dict[str, Array]) -> tuple[Timeline, Segments]:
        """Targets are all training events, those before the ones that are held back, or the latter alone; these see all that was before
        them."""
        if self._which != "all":
            held_N = self._held_back.among(events)
            split_N = np.where(held_N, _HELD, events["split"])
            events = events | {"split": split_N}
        if self._which != "held_back":
            time = timeline(events, splits=(TRAIN,))
            return time, training_segments(time, self.history, self.one_query, most=self.targets_per_step)
        time = timeline(events, splits=(TRAIN, _HELD))
        return time, request_segments(time, np.flatnonzero(time.split_E == _HELD), self.history)

    def _part_steps(self, part: int) -> int:
        return self._steps_of(self._part(part)[1])


def cut_evenly(order_B: Array, size_B: Array, pieces: int) -> list[Array]:
    """`order_B` cut into `pieces` of about the same sum of `size_B`; none is empty."""
    ends, nth = np.linspace(0, size_B.sum(), pieces + 1)[1:-1], np.arange(pieces - 1)
    bounds = np.maximum.accumulate(np.searchsorted(np.cumsum(size_B), ends) - nth)
    return np.split(order_B, bounds.clip(1, max(len(order_B) - pieces + 1, 1)) + nth)


def _ranges(start_B: Array, length_B: Array) -> Array:
    """Concatenated ranges start : start + length."""
    ends = np.cumsum(length_B)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(start_B - (ends - length_B), length_B)


def _long(values: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
