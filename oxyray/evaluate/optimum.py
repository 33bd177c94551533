"""Beside results on the embedded shop: the best hit rate that anyone could reach on the same requests, computed from the shop's truth.

`public` knows the log and the shop's rules and infers the rest exactly: no model can be better in the mean. `hidden` also knows
each shopper's persona and taste. The whole pool may be recommended, so it stands beside the protocol `all`, at item level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from oxyray.data.prepared import Prepared
from oxyray.evaluate.requests import Requests
from oxyray.run import Run

MOST_REQUESTS = 5000


def best_possible(run: Run, prepared: Prepared, requests: Sequence[Requests], ks: Sequence[int], seed: int = 0) -> dict[str, Any] | None:
    """`{"requests": rows, "public" | "hidden": [{"scenario": name or None, "metrics": {"HR@K": ...}}]}` over a seeded sample of at most
    MOST_REQUESTS rows of `requests` (expectations vary little); None where the run is not of the embedded shop."""
    folder = run.path("source")
    if not (folder / "truth" / "shop.json").exists():
        return None
    from oxyray.data.mall.optimum import Optimum

    optimum = Optimum(folder)
    users = prepared.user_ids.to_pylist()
    user_ids = [users[user] for part in requests for user in part.user_R.tolist()]
    rows = optimum.rows_at(user_ids, np.concatenate([part.time.asked_E[part.row_R] for part in requests]))
    if len(rows) > MOST_REQUESTS:
        rows = np.random.default_rng(seed).choice(rows, MOST_REQUESTS, replace=False)
    found: dict[str, Any] = {"requests": len(rows)}
    for name, hidden in (("public", False), ("hidden", True)):
        rates = optimum.best_hit_rate(rows, ks, hidden)
        found[name] = [
            {"scenario": None if scenario == "all" else scenario, "metrics": {f"HR@{k}": rate[k] for k in ks}}
            for scenario, rate in rates.items()
        ]
    return found
