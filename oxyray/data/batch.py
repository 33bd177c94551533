"""A batch: stretches of users' histories and the requests asked along them, as jagged tensors.

One *segment* is a stretch of one user's events in time order. One *query* is a request at a point of that stretch: it sees the user's
profile and the first `visible` events of its segment, never its own event or a later one. Training asks a query at every event of a segment
in one pass; serving asks one query behind the last event. So training, evaluation, rollouts and serving share one form.

Item features travel in an `ItemBlock`: the batch's item indices point into it, not into the catalogue. With the tied head the block is the
whole catalogue; else the batch's distinct items.

What a user typed is a *text*; the batch's distinct ones come as vectors.

Legend: B segments, N history events of all segments, O older events of all segments, Q queries, U items of the block, W texts, L SID
levels, C side features, F text width, P profile columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Tensor = torch.Tensor


@dataclass
class ItemBlock:
    """The items that a batch can point at. `ids_U` are catalogue indices: the rows to look up in the item table. `whole` says that the
    block is the whole catalogue: all such blocks are the same, and are moved to a device once."""

    ids_U: Tensor
    codes_UL: Tensor
    side_UC: Tensor
    text_UF: Tensor | None = None
    whole: bool = False
    _moved: dict[str, ItemBlock] = field(default_factory=dict, init=False, repr=False, compare=False)

    def to(self, device: torch.device | str) -> ItemBlock:
        if self.ids_U.device == torch.device(device):
            return self
        if (known := self._moved.get(str(device))) is not None:
            return known
        text_UF = None if self.text_UF is None else self.text_UF.to(device)
        moved = ItemBlock(self.ids_U.to(device), self.codes_UL.to(device), self.side_UC.to(device), text_UF, self.whole)
        if self.whole:
            self._moved[str(device)] = moved
        return moved


@dataclass
class Batch:
    """`older_*` are events before a segment's history, from which a query may fetch; it may see the first `older_visible` of its segment's.
    Offsets are cumulative with a leading 0. Every `item` and `trigger` is an index into `items`, every `text` one into `vector_WF` (-1:
    none). `target_Q` is -1 when serving. `negative_N` are items drawn from the catalogue for the item-level loss, None where the block is
    the whole catalogue; `vector_WF` is None where the model reads no texts."""

    items: ItemBlock
    user_B: Tensor
    profile_BP: Tensor
    item_N: Tensor
    action_N: Tensor
    scenario_N: Tensor
    time_N: Tensor
    history_offset: Tensor
    query_offset: Tensor
    visible_Q: Tensor
    scenario_Q: Tensor
    trigger_Q: Tensor
    text_Q: Tensor
    time_Q: Tensor
    target_Q: Tensor
    action_Q: Tensor
    weight_Q: Tensor
    older_item_O: Tensor
    older_action_O: Tensor
    older_scenario_O: Tensor
    older_offset: Tensor
    older_visible_Q: Tensor
    negative_N: Tensor | None = None
    vector_WF: Tensor | None = None

    def lookups(self) -> dict[str, Tensor]:
        """Rows that `policy(batch, rows)` needs, by table, in the order it expects them."""
        return {"item": self.items.ids_U, "user": self.user_B}

    def to(self, device: torch.device | str) -> Batch:
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in held.items()}
        return Batch(**moved)

    def without(self, parts: Sequence[str]) -> Batch:
        """The same requests with none of these parts: of trigger, text."""
        hidden: dict[str, Any] = {f"{part}_Q": torch.full_like(getattr(self, f"{part}_Q"), -1) for part in parts}
        return dataclasses.replace(self, **hidden)

    @property
    def segments(self) -> int:
        return len(self.user_B)

    @property
    def queries(self) -> int:
        return len(self.visible_Q)

    def weight(self) -> float:
        """Sum of the loss weights: what a global mean divides by."""
        return float(self.weight_Q.sum())


def pad_index(offset_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Jagged to padded: index_BS into the flat axis (0 where padded) and mask_BS (True where real)."""
    length_B = offset_B1[1:] - offset_B1[:-1]
    width = int(length_B.max()) if len(length_B) else 0
    step_S = torch.arange(width, device=offset_B1.device)
    mask_BS = step_S[None] < length_B[:, None]
    return torch.where(mask_BS, offset_B1[:-1, None] + step_S[None], 0), mask_BS


def offsets(lengths: np.ndarray) -> Tensor:
    """Cumulative offsets with a leading 0, int64."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
