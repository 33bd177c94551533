"""Columns for trees: what can be counted about a shown item, its user and its page before the page began.

- What the whole shop did with an item is counted over training pages: for a training page over those that had ended when it began, for
  others over all. To leave out just the page's own part would give its labels away: of two pages that show an item, the one that took it
  would then see the lower rate.
- What the user did is counted over the pages that the page knows (`Pages.visible_R`); there may be more of them than the ranker remembers.
- Rates are of the funnel (click per shown, cart per click, purchase per cart), drawn towards the rate of all items.

NaN says that there is nothing to count or to compare.

Legend: R pages, C items of all pages, A asked pages, Q their items, I catalogue, X rows of vectors, N counted rows, G groups, V counted
values, H heads of the funnel, F width of a text vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from oxyray.data.order import TRAIN
from oxyray.data.stream import ItemFeatures
from oxyray.model.inputs import Inputs
from oxyray.reward.components import Shop
from oxyray.reward.funnel import HEADS
from oxyray.reward.pages import Pages, ranges

Array = np.ndarray

_DRAW = 20.0  # as many shows of an item's own weigh as much as the rate of all
_SLAB = 65536


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What never changes. `category_I` numbers the finest category there is, `price_I` is NaN where unknown; both may be None."""

    features: ItemFeatures
    profile_UP: Array
    category_I: Array | None
    price_I: Array | None
    time_unit_seconds: bool

    @classmethod
    def of(cls, inputs: Inputs) -> Facts:
        shop = Shop.of(inputs)
        category_I, price_I = shop.category_I.numpy(), shop.price_I.numpy()
        return cls(
            features=inputs.features,
            profile_UP=inputs.prepared.profile_UP,
            category_I=category_I if category_I.any() else None,
            price_I=None if np.isnan(price_I).all() else price_I,
            time_unit_seconds=inputs.vocab.clock,
        )


class Pieces(Protocol):
    """A log in pieces, each user wholly in one."""

    @property
    def parts(self) -> int: ...

    def pages(self, part: int) -> Pages: ...


class Tally:
    """Sums of values by group and place in an order. Places lie in 0..span."""

    def __init__(self, group_N: Array, place_N: Array, value_NV: Array, span: int) -> None:
        self.span = span + 1
        self.group_G, number_N = np.unique(group_N, return_inverse=True)
        key_N = number_N * self.span + place_N
        order_N = np.argsort(key_N, kind="stable")
        self.key_N = key_N[order_N]
        self.sum_NV = np.concatenate([np.zeros((1, value_NV.shape[1]), np.int64), np.cumsum(value_NV[order_N], axis=0, dtype=np.int64)])

    def before(self, group_Q: Array, place_Q: Array) -> Array:
        """Sums over the rows of a group whose place is below the given one: (Q, V)."""
        number_Q = np.searchsorted(self.group_G, group_Q)
        found_Q = np.append(self.group_G, -1)[number_Q] == group_Q
        first_Q = np.searchsorted(self.key_N, number_Q * self.span)
        last_Q = np.searchsorted(self.key_N, number_Q * self.span + np.where(found_Q, place_Q, 0))
        return self.sum_NV[last_Q] - self.sum_NV[first_Q]


class ItemRates:
    """How the shop's users took each item in training."""

    def __init__(self, log: Pieces) -> None:
        item_C, over_C, done_C, seen_C = (np.concatenate(pieces) for pieces in zip(*_trained(log), strict=True))
        self.over_T = np.unique(over_C)
        place_C = np.searchsorted(self.over_T, over_C)
        # What was shown, then who came to each stage and who went on: the next stage's comers.
        value_CV = np.stack([seen_C, *(done_C >= stage for stage in range(len(HEADS) + 1))], axis=1)
        self.of_item = Tally(item_C, place_C, value_CV, len(self.over_T))
        self.of_all = Tally(np.zeros_like(item_C), place_C, value_CV, len(self.over_T))

    def columns(self, pages: Pages, page_Q: Array, item_Q: Array) -> dict[str, Array]:
        before_R = np.searchsorted(self.over_T, pages.time_R)
        place_R = np.where(pages.split_R == TRAIN, before_R, len(self.over_T))
        count_QV = self.of_item.before(item_Q, place_R[page_Q])
        all_RV = self.of_all.before(np.zeros(len(pages), np.int64), place_R)
        found = {"item_shown": count_QV[:, 0]}
        for stage, head in enumerate(HEADS, start=1):
            rate_R = (all_RV[:, stage + 1] + 1) / (all_RV[:, stage] + 2)
            found[f"item_{head}_rate"] = (count_QV[:, stage + 1] + _DRAW * rate_R[page_Q]) / (count_QV[:, stage] + _DRAW)
        return found


class Columns:
    """Items are counted over the training pages of `log`. `categorical` names the columns that are codes."""

    def __init__(self, facts: Facts, log: Pieces) -> None:
        self.facts, self.rates = facts, ItemRates(log)
        self.side_IC = facts.features.side_IC.numpy()
        self.text_IF = None if facts.features.text_IF is None else _unit(facts.features.text_IF.numpy())
        self.group_I = {"item": np.arange(len(self.side_IC)), "code": facts.features.codes_IL[:, 0].numpy()}
        if facts.category_I is not None:
            self.group_I["category"] = facts.category_I.astype(np.int64)
        sides, profiles = self.side_IC.shape[1], facts.profile_UP.shape[1]
        self.categorical = ["scenario", *(f"side_{c}" for c in range(sides)), *(f"profile_{p}" for p in range(profiles))]

    def of(self, pages: Pages, row_A: Array) -> dict[str, Array]:
        """Every column's values for the items of the pages `row_A`, in order: (Q,) each."""
        size_A = np.diff(pages.offset_R1)[row_A]
        page_Q = np.repeat(row_A, size_A)
        item_Q = pages.item_C[ranges(pages.offset_R1[row_A], size_A)]
        return {
            **self._page(pages, page_Q),
            **self._item(item_Q),
            **self.rates.columns(pages, page_Q, item_Q),
            **self._past(pages, page_Q, item_Q),
            **self._near(pages, page_Q, item_Q),
        }

    def _page(self, pages: Pages, page_Q: Array) -> dict[str, Array]:
        """Where and when, who the user is, and how much the user did before."""
        known_R = pages.first_R + pages.visible_R
        found_R = {"scenario": pages.scenario_R, "known_pages": pages.visible_R}
        if self.facts.time_unit_seconds:
            found_R |= {"hour": pages.time_R // 3600 % 24, "weekday": (pages.time_R // 86400 + 3) % 7}  # 1970 began on a Thursday
            last_R = pages.time_R[np.maximum(known_R - 1, 0)]
            found_R["since_last"] = np.where(pages.visible_R > 0, pages.time_R - last_R, np.nan)
        for name, counts_C in {"user_taken": pages.done_C > 0, "user_shown": pages.seen_C}.items():
            sum_C1 = np.append(0, np.cumsum(counts_C))
            found_R[name] = sum_C1[pages.offset_R1[known_R]] - sum_C1[pages.offset_R1[pages.first_R]]
        for column, profile_U in enumerate(self.facts.profile_UP.T):
            found_R[f"profile_{column}"] = profile_U[pages.user_R]
        return {name: value_R[page_Q] for name, value_R in found_R.items()}

    def _item(self, item_Q: Array) -> dict[str, Array]:
        found = {f"side_{column}": side_I[item_Q] for column, side_I in enumerate(self.side_IC.T)}
        if self.facts.price_I is not None:
            found["price"] = self.facts.price_I[item_Q]
        return found

    def _past(self, pages: Pages, page_Q: Array, item_Q: Array) -> dict[str, Array]:
        """How often the user was shown, and took, this item, and items of its category and first code, on pages that the page knows."""
        page_C = np.repeat(np.arange(len(pages)), np.diff(pages.offset_R1))
        told_C = np.flatnonzero(pages.seen_C | (pages.done_C > 0))
        value_NV = np.stack([np.ones(len(told_C), bool), pages.done_C[told_C] > 0], axis=1)
        known_Q = (pages.first_R + pages.visible_R)[page_Q]
        found = {}
        for name, group_I in self.group_I.items():
            span = 1 + int(group_I.max(initial=0))
            group_N = pages.user_R[page_C[told_C]] * span + group_I[pages.item_C[told_C]]
            tally = Tally(group_N, page_C[told_C], value_NV, len(pages))
            count_QV = tally.before(pages.user_R[page_Q] * span + group_I[item_Q], known_Q)
            found[f"{name}_shown_before"], found[f"{name}_taken_before"] = count_QV.T
        return found

    def _near(self, pages: Pages, page_Q: Array, item_Q: Array) -> dict[str, Array]:
        """How near the item is to the trigger, the query and the item that the user took last."""
        found, trigger_Q, last_Q = {}, pages.trigger_R[page_Q], _last_taken(pages)[page_Q]
        if self.facts.category_I is not None:
            same_Q = self.facts.category_I[item_Q] == self.facts.category_I[trigger_Q]
            found["trigger_same_category"] = np.where(trigger_Q >= 0, same_Q, np.nan)
        if self.text_IF is not None:
            found["near_trigger"] = _cosine(self.text_IF, item_Q, self.text_IF, trigger_Q)
            found["near_last"] = _cosine(self.text_IF, item_Q, self.text_IF, last_Q)
            query_WF = np.zeros((0, self.text_IF.shape[1])) if pages.query_WF is None else pages.query_WF
            query_Q = np.full(len(page_Q), -1) if pages.query_WF is None else pages.query_R[page_Q]
            found["near_query"] = _cosine(self.text_IF, item_Q, _unit(query_WF), query_Q)
        return found


def _trained(log: Pieces) -> Iterator[tuple[Array, Array, Array, Array]]:
    """Each piece's items of training pages, when their page was over, what was done with them and whether they were seen."""
    for part in range(log.parts):
        pages = log.pages(part)
        size_R = np.diff(pages.offset_R1)
        train_C = np.repeat(pages.split_R == TRAIN, size_R)
        yield pages.item_C[train_C], np.repeat(pages.over_R, size_R)[train_C], pages.done_C[train_C], pages.seen_C[train_C]


def _last_taken(pages: Pages) -> Array:
    """The item that each page's user took last on the pages that it knows, -1 for none: (R,)."""
    place_C1 = np.append(-1, np.maximum.accumulate(np.where(pages.done_C > 0, np.arange(len(pages.done_C)), -1)))
    place_R = place_C1[pages.offset_R1[pages.first_R + pages.visible_R]]
    return np.where(place_R >= pages.offset_R1[pages.first_R], pages.item_C[place_R], -1)


def _unit(vector_XF: Array) -> Array:
    vector_XF = vector_XF.astype(np.float32)
    return vector_XF / np.maximum(np.linalg.norm(vector_XF, axis=1, keepdims=True), 1e-12)


def _cosine(left_XF: Array, left_Q: Array, right_XF: Array, right_Q: Array) -> Array:
    """Products of rows, slab by slab; NaN where `right_Q` is -1."""
    found_Q = np.full(len(left_Q), np.nan, np.float32)
    there = np.flatnonzero(right_Q >= 0)
    for first in range(0, len(there), _SLAB):
        slab = there[first : first + _SLAB]
        found_Q[slab] = np.einsum("qf,qf->q", left_XF[left_Q[slab]], right_XF[right_Q[slab]])
    return found_Q
