"""Batches of the ranker: stretches of the log, or new requests with candidates behind their users' past, as jagged tensors.

Legend: R pages (requests), C items on all pages, B samples (stretches), J candidates of a request, U items of a batch, P profile columns, F
width of a text vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from oxyray.data.batch import ItemBlock, Tensor, offsets
from oxyray.data.stream import ItemFeatures
from oxyray.reward.pages import Pages, Stretches, ranges

Array = np.ndarray


@dataclass
class RankBatch:
    """Packed samples. `items` holds the batch's distinct items, and `item_C` and `trigger_R` (-1: none) point into it. `visible_R` counts
    the pages of its own sample that a page knows. Pages of a sample lie at `page_offset`, items of a page at `item_offset`; both are
    cumulative with a leading 0. Only `asked_R` pages are scored. `query_RF` is zero where there is no query, None without text vectors. A
    batch that does not `count` only keeps its worker in step with the others."""

    items: ItemBlock
    user_B: Tensor
    profile_BP: Tensor
    page_offset: Tensor
    scenario_R: Tensor
    trigger_R: Tensor
    time_R: Tensor
    visible_R: Tensor
    asked_R: Tensor
    item_offset: Tensor
    item_C: Tensor
    done_C: Tensor
    seen_C: Tensor
    query_RF: Tensor | None
    counts: bool = True

    def weight(self) -> float:
        """Judged items: what the mean of the loss divides by."""
        return float(torch.diff(self.item_offset)[self.asked_R].sum()) if self.counts else 0.0

    def lookups(self) -> dict[str, Tensor]:
        """Rows that `ranker(batch, rows)` needs, by table, in the order it expects them."""
        return {"item": self.items.ids_U, "user": self.user_B}

    def to(self, device: torch.device | str) -> RankBatch:
        moved: dict[str, Any] = {name: value.to(device) if hasattr(value, "to") else value for name, value in vars(self).items()}
        return RankBatch(**moved)

    def page_C(self) -> Tensor:
        """The page of each item."""
        return torch.repeat_interleave(torch.diff(self.item_offset))

    def sample_R(self) -> Tensor:
        """The sample of each page."""
        return torch.repeat_interleave(torch.diff(self.page_offset))


@dataclass(frozen=True)
class Packer:
    """Pages to batches, with the constant features of items and users."""

    features: ItemFeatures
    profile_UP: Array

    def pack(self, pages: Pages, taken: Stretches, counts: bool = True) -> RankBatch:
        """Stretches of the log, for training and evaluation."""
        length_B = taken.stop_B - taken.start_B
        row_R = ranges(taken.start_B, length_B)
        start_R = np.repeat(taken.start_B, length_B)
        visible_R = self._visible(pages, row_R, start_R)
        batch = self._batch(pages, row_R, length_B, visible_R, row_R >= np.repeat(taken.asked_B, length_B))
        return dataclasses.replace(batch, counts=counts)

    def batches(self, pages: Pages, taken: Stretches, items: int) -> Iterator[RankBatch]:
        """The stretches in order, in batches of about `items` shown items."""
        items_B = np.cumsum(pages.offset_R1[taken.stop_B] - pages.offset_R1[taken.start_B])
        cuts = np.searchsorted(items_B, np.arange(items, items_B[-1] if len(items_B) else 0, items))
        for rows in np.split(np.arange(len(taken)), cuts):
            if len(rows):
                yield self.pack(pages, taken.take(rows))

    def requests(
        self,
        log: Pages,
        most: int,
        *,
        user_B: Array,
        time_B: Array,
        scenario_B: Array,
        trigger_B: Array,
        item_BJ: Array,
        query_BF: Array | None = None,
    ) -> RankBatch:
        """New requests with candidates `item_BJ` (-1: none), each behind its user's latest `most - 1` pages that were over by then. Scores
        come in the order of `item_BJ[item_BJ >= 0]`. A row of `query_BF` is NaN where there is no query."""
        first_B, end_B = np.searchsorted(log.user_R, user_B), np.searchsorted(log.user_R, user_B, side="right")
        # Over before, not at that time: a request that is asked again at its own logged time must not know its own page.
        known_B = np.array([a + np.searchsorted(log.over_R[a:b], t) for a, b, t in zip(first_B, end_B, time_B, strict=True)], np.int64)
        count_B = np.minimum(known_B - first_B, most - 1)
        row_R = ranges(known_B - count_B, count_B)
        place_C = ranges(log.offset_R1[row_R], np.diff(log.offset_R1)[row_R])
        size_B = (item_BJ >= 0).sum(1)
        zero_C = np.zeros(size_B.sum(), np.int64)
        query_WF, words_RF = None, self._queries(log, row_R)
        if words_RF is not None:
            words_BF = np.zeros((len(user_B), words_RF.shape[1])) if query_BF is None else np.nan_to_num(query_BF)
            query_WF = np.concatenate([words_RF.numpy(), words_BF])
        both = Pages(
            user_R=np.append(log.user_R[row_R], user_B),
            time_R=np.append(log.time_R[row_R], time_B),
            over_R=np.append(log.over_R[row_R], time_B),
            scenario_R=np.append(log.scenario_R[row_R], scenario_B),
            trigger_R=np.append(log.trigger_R[row_R], trigger_B),
            split_R=np.zeros(len(row_R) + len(user_B), np.int8),
            first_R=np.zeros(len(row_R) + len(user_B), np.int64),
            visible_R=np.zeros(len(row_R) + len(user_B), np.int64),
            offset_R1=np.append(0, np.cumsum(np.append(np.diff(log.offset_R1)[row_R], size_B))),
            item_C=np.append(log.item_C[place_C], item_BJ[item_BJ >= 0]),
            done_C=np.append(log.done_C[place_C], zero_C),
            seen_C=np.append(log.seen_C[place_C], zero_C.astype(bool)),
            query_R=np.arange(len(row_R) + len(user_B)),
            query_WF=query_WF,
        )
        asked_R = np.zeros(len(row_R) + len(user_B), bool)
        asked_R[np.cumsum(count_B + 1) - 1] = True
        row_of_both = np.empty(len(asked_R), np.int64)
        row_of_both[~asked_R], row_of_both[asked_R] = np.arange(len(row_R)), len(row_R) + np.arange(len(user_B))
        visible_R = count_B.repeat(count_B + 1)
        visible_R[~asked_R] = self._visible(log, row_R, np.repeat(known_B - count_B, count_B))
        return self._batch(both, row_of_both, count_B + 1, visible_R, asked_R)

    def _queries(self, pages: Pages, row_R: Array) -> Tensor | None:
        """Vectors of the pages' queries, zero where there is none."""
        if self.features.text_IF is None:
            return None
        query_RF = self.features.text_IF.new_zeros(len(row_R), self.features.text_IF.shape[1])
        if pages.query_WF is not None:
            query_R = pages.query_R[row_R]
            query_RF[torch.from_numpy(query_R >= 0)] = torch.from_numpy(pages.query_WF[query_R[query_R >= 0]]).to(query_RF)
        return query_RF

    @staticmethod
    def _visible(pages: Pages, row_R: Array, start_R: Array) -> Array:
        """How many pages from `start_R` on each page knows."""
        return np.maximum(pages.first_R[row_R] + pages.visible_R[row_R] - start_R, 0)

    def _batch(self, pages: Pages, row_R: Array, length_B: Array, visible_R: Array, asked_R: Array) -> RankBatch:
        size_R = np.diff(pages.offset_R1)[row_R]
        place_C = ranges(pages.offset_R1[row_R], size_R)
        item_C, trigger_R = pages.item_C[place_C], pages.trigger_R[row_R]
        used_U = np.unique(np.concatenate([item_C, trigger_R, [0]]))
        used_U = used_U[used_U >= 0]
        user_B = pages.user_R[row_R[np.cumsum(length_B) - 1]]
        return RankBatch(
            items=self.features.block(_long(used_U)),
            user_B=_long(user_B),
            profile_BP=_long(self.profile_UP[user_B]),
            page_offset=offsets(length_B),
            scenario_R=_long(pages.scenario_R[row_R]),
            trigger_R=_long(np.where(trigger_R < 0, -1, np.searchsorted(used_U, trigger_R))),
            time_R=_long(pages.time_R[row_R]),
            visible_R=_long(visible_R),
            asked_R=torch.from_numpy(asked_R),
            item_offset=offsets(size_R),
            item_C=_long(np.searchsorted(used_U, item_C)),
            done_C=_long(pages.done_C[place_C]),
            seen_C=torch.from_numpy(pages.seen_C[place_C]),
            query_RF=self._queries(pages, row_R),
        )


def _long(values: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
