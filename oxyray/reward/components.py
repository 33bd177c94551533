"""The built-in rewards (paper 2.4.2): format, relative, ranking (click, its logarithm, conversion, GMV), real feedback (taken), diversity;
and what any reward may know.

Scores are made so that weights mean the same in every shop: shares, cosines and probabilities, and turnover in units of the catalogue's
mean price. Legend: as in `mapping.py`, L SID levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from oxyray.errors import ConfigError, RewardError
from oxyray.model.inputs import Inputs

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Shop:
    """What is known beside the requests. `price_I` is NaN where unknown; `category_I` numbers the finest category there is."""

    scenarios: list[str]
    pool_SI: Tensor
    codes_IL: Tensor
    category_I: Tensor
    price_I: Tensor
    text_IF: Tensor | None = None

    @classmethod
    def of(cls, inputs: Inputs) -> Shop:
        prepared = inputs.prepared
        names = [feature["name"] for feature in prepared.meta.side]
        finest = max((name for name in names if name.startswith("category")), default=None)
        category_I = prepared.side_IC[:, names.index(finest)] if finest else np.zeros(prepared.meta.items)
        price_I = np.full(prepared.meta.items, np.nan)
        prices = prepared.item_columns("price")
        if prices.num_columns:
            price_I = prices["price"].to_numpy().astype(np.float64)
        return cls(
            scenarios=prepared.meta.scenarios,
            pool_SI=torch.from_numpy(np.stack([prepared.pools[name] for name in prepared.meta.scenarios])),
            codes_IL=inputs.features.codes_IL,
            category_I=torch.from_numpy(category_I.astype(np.int64)),
            price_I=torch.from_numpy(price_I).float(),
            text_IF=inputs.features.text_IF,
        )


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What is judged. `request_B` names requests in messages. `item_BJ` are catalogue indices, -1 where a SID names no item; where
    `real_BJ` is False there is no candidate. `target_place_B` is the column of the target, -1 for none (see `join_target`). `trigger_B` and
    `last_B` are the item that the request starts from and the last clicked one, -1 for none; `query_BF` is the query in the shared text
    space, a row of NaN for none. `chance_BJH` is the ranker's answer."""

    request_B: Tensor
    scenario_B: Tensor
    item_BJ: Tensor
    real_BJ: Tensor
    target_place_B: Tensor
    trigger_B: Tensor
    last_B: Tensor
    query_BF: Tensor | None = None
    chance_BJH: Tensor | None = None

    @property
    def named_BJ(self) -> Tensor:
        """Where there is a candidate and it is an item."""
        return self.real_BJ & (self.item_BJ >= 0)

    def only(self, b: int, j: int | None = None) -> Candidates:
        """One request, or one candidate of it, where the item really taken is at place 0 or, as in a synthetic request, nowhere (-1)."""
        cut = {}
        for name, value in vars(self).items():
            if value is not None:
                cut[name] = value[b : b + 1, j : j + 1] if j is not None and name.split("_")[-1].startswith("BJ") else value[b : b + 1]
        if j is not None:
            cut["target_place_B"] = torch.where(cut["target_place_B"] == j, 0, -1)
        return dataclasses.replace(self, **cut)


class Reward(Protocol):
    def __call__(self, candidates: Candidates) -> Tensor:
        """Scores (B, J); entries where there is no item are not looked at."""


class Format:
    """1 where the SID is an item that the scenario may show, else 0."""

    def __init__(self, shop: Shop) -> None:
        self.pool_SI = shop.pool_SI

    def __call__(self, candidates: Candidates) -> Tensor:
        return self.pool_SI[candidates.scenario_B[:, None], candidates.item_BJ.clamp(min=0)].float()


class Relative:
    """Cosine, in the shared text space, to what the user is after: the query, else the trigger item, else the last clicked one. 0 for all
    candidates of a request that has none of them."""

    def __init__(self, shop: Shop) -> None:
        if shop.text_IF is None:
            raise ConfigError("reward.components.relative needs the items' text vectors: run `oxyray sid` again, or set its weights to 0")
        self.text_IF = shop.text_IF

    def __call__(self, candidates: Candidates) -> Tensor:
        item_B = torch.where(candidates.trigger_B >= 0, candidates.trigger_B, candidates.last_B)
        context_BF, known_B = self.text_IF[item_B.clamp(min=0)], item_B >= 0
        if candidates.query_BF is not None:
            asked_B = ~candidates.query_BF.isnan().all(1)
            context_BF = torch.where(asked_B[:, None], candidates.query_BF.to(context_BF), context_BF)
            known_B = known_B | asked_B
        item_BJF = self.text_IF[candidates.item_BJ.clamp(min=0)]
        norm_BJ = item_BJF.norm(dim=-1) * context_BF.norm(dim=-1)[:, None]
        # No guard against a zero norm: an empty vector has no direction, and NaN says so.
        return torch.where(known_B[:, None], torch.einsum("bjf,bf->bj", item_BJF, context_BF) / norm_BJ, 0)


class Click:
    """The ranker's probability of a click."""

    def __init__(self, shop: Shop) -> None:
        del shop

    def __call__(self, candidates: Candidates) -> Tensor:
        return _chance(candidates, 0)


class LogClick:
    """The logarithm of the ranker's probability of a click. Beside a divergence from the supervised policy (`align.objective.kl`) its best
    policy is the supervised one times a power of that probability; the plain probability would favour the few most clicked items."""

    def __init__(self, shop: Shop) -> None:
        del shop

    def __call__(self, candidates: Candidates) -> Tensor:
        return _chance(candidates, 0).clamp(min=1e-6).log()


class Conversion:
    """The ranker's probability of a purchase."""

    def __init__(self, shop: Shop) -> None:
        del shop

    def __call__(self, candidates: Candidates) -> Tensor:
        return _chance(candidates, 2)


class Gmv:
    """Expected turnover: probability of a purchase times price, in units of the catalogue's mean price. Without a price it cannot be
    told."""

    def __init__(self, shop: Shop) -> None:
        self.price_I = shop.price_I / shop.price_I.nanmean()

    def __call__(self, candidates: Candidates) -> Tensor:
        return _chance(candidates, 2) * self.price_I[candidates.item_BJ.clamp(min=0)]


class Taken:
    """The user's real feedback: 1 for the item that was really taken, else 0; 0 throughout for a synthetic request, of which nothing is
    known. The ranker judges what is likely in general, this says what was so."""

    def __init__(self, shop: Shop) -> None:
        del shop

    def __call__(self, candidates: Candidates) -> Tensor:
        place_B = candidates.target_place_B
        target_B1 = candidates.item_BJ.gather(1, place_B.clamp(min=0)[:, None])
        return ((candidates.item_BJ == target_B1) & (place_B >= 0)[:, None]).float()


class Diversity:
    """Each category of a group is worth 1/2, shared by its candidates, and so is each first code: their mean over the group is the
    share of distinct ones."""

    def __init__(self, shop: Shop) -> None:
        self.kinds = (shop.category_I, shop.codes_IL[:, 0])

    def __call__(self, candidates: Candidates) -> Tensor:
        item_BJ, named_BJ = candidates.item_BJ.clamp(min=0), candidates.named_BJ
        score_BJ = torch.zeros(item_BJ.shape, device=item_BJ.device)
        for kind_I in self.kinds:
            kind_BJ = kind_I[item_BJ]
            alike_BJJ = (kind_BJ[:, :, None] == kind_BJ[:, None]) & named_BJ[:, None]
            score_BJ = score_BJ + 0.5 / alike_BJJ.sum(-1).clamp(min=1)
        return score_BJ


def _chance(candidates: Candidates, head: int) -> Tensor:
    if candidates.chance_BJH is None:
        raise RewardError("the ranker has not scored these candidates")
    return candidates.chance_BJH[..., head]


BUILT_IN: dict[str, Callable[[Shop], Reward]] = {
    "format": Format,
    "relative": Relative,
    "click": Click,
    "log_click": LogClick,
    "conversion": Conversion,
    "gmv": Gmv,
    "taken": Taken,
    "diversity": Diversity,
}
