"""Beside results on the embedded shop, from the shop's truth, on the same requests: the best hit rate that anyone could reach, and what
each model's slates are worth.

`public` knows the log and the shop's rules and infers the rest exactly: no model can be better in the mean. `hidden` also knows
each shopper's persona and taste. The whole pool may be recommended, so both stand beside the protocol `all`, at item level.

A hit rate asks whether the item that was taken is in the list; the value of a slate is what the shop may expect from showing it. A policy
that hacks its reward has a higher reward and no higher value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oxyray.data.prepared import Prepared
from oxyray.evaluate.predictions import models, read
from oxyray.evaluate.requests import Requests
from oxyray.run import Run

if TYPE_CHECKING:
    from oxyray.data.mall.optimum import Optimum

MOST_REQUESTS = 5000


def best_possible(run: Run, prepared: Prepared, requests: Sequence[Requests], ks: Sequence[int], seed: int = 0) -> dict[str, Any] | None:
    """`{"requests": rows, "public" | "hidden": [{"scenario": name or None, "metrics": {"HR@K": ...}}]}` over a seeded sample of at most
    MOST_REQUESTS rows of `requests` (expectations vary little); None where the run is not of the embedded shop."""
    optimum = _optimum(run)
    if optimum is None:
        return None
    rows = _rows(optimum, prepared, requests)[_sample(requests, seed)]
    found: dict[str, Any] = {"requests": len(rows)}
    for name, hidden in (("public", False), ("hidden", True)):
        rates = optimum.best_hit_rate(rows, ks, hidden)
        found[name] = [
            {"scenario": None if scenario == "all" else scenario, "metrics": {f"HR@{k}": rate[k] for k in ks}}
            for scenario, rate in rates.items()
        ]
    return found


def slate_values(
    run: Run, prepared: Prepared, requests: Sequence[Requests], predictions: Path, k: int, seed: int = 0
) -> dict[str, Any] | None:
    """What showing each model's best `k` items once is expected to bring, by the shop's true utility, over the same sample as
    `best_possible`: `{"k", "requests", "table": [{"model", "scenario": name or None, "requests", "metrics": {"clicks", "carts",
    "purchases", "turnover"}, "errors": the same}]}`, errors being standard errors. None where the run is not of the embedded shop."""
    optimum = _optimum(run)
    if optimum is None:
        return None
    here = _sample(requests, seed)
    rows = _rows(optimum, prepared, requests)[here]
    scenario_R = np.concatenate([part.scenario_R for part in requests])[here]
    found: dict[str, Any] = {"k": k, "requests": len(rows), "table": []}
    named = models(predictions)
    slates = [read(predictions, prepared, model, "all").item_RK[here, :k] for model in named]
    for model, value in zip(named, optimum.slate_values(rows, slates), strict=True):
        for number, name in [(None, None), *enumerate(prepared.meta.scenarios)]:
            of_R = np.ones(len(rows), dtype=bool) if number is None else scenario_R == number
            if of_R.any():
                each = {kind: value_R[of_R] for kind, value_R in vars(value).items()}
                found["table"].append(
                    {
                        "model": model, "scenario": name, "requests": int(of_R.sum()),
                        "metrics": {kind: float(value_R.mean()) for kind, value_R in each.items()},
                        "errors": {kind: float(value_R.std() / np.sqrt(len(value_R))) for kind, value_R in each.items()},
                    }
                )  # fmt: skip
    return found


def _optimum(run: Run) -> Optimum | None:
    folder = run.path("source")
    if not (folder / "truth" / "shop.json").exists():
        return None
    from oxyray.data.mall.optimum import Optimum

    return Optimum(folder)


def _rows(optimum: Optimum, prepared: Prepared, requests: Sequence[Requests]) -> np.ndarray:
    users = prepared.user_ids.to_pylist()
    user_ids = [users[user] for part in requests for user in part.user_R.tolist()]
    return optimum.rows_at(user_ids, np.concatenate([part.time.asked_E[part.row_R] for part in requests]))


def _sample(requests: Sequence[Requests], seed: int) -> np.ndarray:
    total = sum(map(len, requests))
    if total <= MOST_REQUESTS:
        return np.arange(total)
    return np.random.default_rng(seed).choice(total, MOST_REQUESTS, replace=False)
