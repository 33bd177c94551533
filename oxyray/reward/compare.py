"""The ranker beside its baselines on the test split: AUC, GAUC and calibration for every scenario and head.

Each model gives probabilities for the same shown items; a sample of users where there are more than `rank.eval_items` of them. Where the
log does not say what was shown, the items that were not taken are drawn, and the figures say how well a model tells them apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from oxyray.config import Config
from oxyray.errors import RunError
from oxyray.model.inputs import Inputs
from oxyray.progress import bar
from oxyray.reward.baselines.boosted import Boosted
from oxyray.reward.baselines.columns import Facts
from oxyray.reward.baselines.fit import fit_pointwise
from oxyray.reward.baselines.pointwise import PointWise
from oxyray.reward.log import Log
from oxyray.reward.packing import Packer
from oxyray.reward.pages import Pages, Stretches, ranges, stretches
from oxyray.reward.quality import auc, calibration_error, gauc
from oxyray.reward.ranker import HEADS, Ranker
from oxyray.reward.saved import packer_of, ranker_tables, read_ranker
from oxyray.run import Run

Array = np.ndarray
TEST = (2,)
TITLES = {"ranker": "unified ranker", "pointwise": "point-wise model", "boosted": "boosted trees (LightGBM)"}
Asked = tuple[Pages, Stretches]


def compare(config: Config, run: Run, inputs: Inputs, log: Log) -> dict[str, Any]:
    """The results as `{"table": [one line a model, scenario and head], ...}`. Raises RunError where the test split has no page."""
    settings, packer = config.rank, packer_of(inputs)
    asked = list(_asked(log, settings.model.history, settings.eval_items, settings.seed))
    if not asked:
        raise RunError(f"{inputs.prepared.folder} has no page of the test split: give more data, or another data.split")
    ranker, tables = read_ranker(run.need("rank", "model", stage="rank"), inputs)
    lookups: dict[str, Any] = {"ranker": (ranker, tables.lookup)}
    chances, seconds = dict[str, Array](), dict[str, float]()
    for name in ("ranker", *settings.baselines):
        began = time.monotonic()
        if name == "boosted":
            fitted = Boosted.fit(log, Facts.of(inputs), seed=settings.seed)
            chances[name] = np.concatenate([fitted.chances(pages, _rows(taken)) for pages, taken in asked])
        else:
            if name == "pointwise":
                lookups[name] = fit_pointwise(log, packer, settings, inputs.vocab, ranker_tables(settings.model, inputs))
            model, lookup = lookups[name]
            chances[name] = _by_model(model, lookup, packer, asked, settings.items_per_step, TITLES[name])
        seconds[name] = round(time.monotonic() - began, 1)
    facts = _Facts.of(asked)
    table = [line for name, chance_QH in chances.items() for line in facts.lines(name, chance_QH, inputs.prepared.meta.scenarios)]
    about = {"items": len(facts.done_Q), "pages": len(np.unique(facts.page_Q)), "exposures": log.prepared.exposures is not None}
    return about | {"models": list(chances), "titles": TITLES, "table": table, "seconds": seconds}


def text(found: dict[str, Any]) -> str:
    """The table to read: all scenarios together for every model, then the ranker by scenario."""
    rows = [("model", "scenario", "head", "positives", "AUC", "GAUC", "calibration error")]
    for line in found["table"]:
        if line["scenario"] is None or line["model"] == "ranker":
            scenario = "all" if line["scenario"] is None else line["scenario"]
            figures = ("-" if line[key] is None else f"{line[key]:.4f}" for key in ("auc", "gauc", "calibration_error"))
            rows.append((TITLES[line["model"]], scenario, line["head"], f"{line['positives']:,}", *figures))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    kind = "shown items" if found["exposures"] else "taken and drawn items (the log does not say what was shown)"
    return "\n".join([f"{found['items']:,} {kind} on {found['pages']:,} pages of the test split", *shown])


def _asked(log: Log, history: int, most: int | None, seed: int) -> Iterator[Asked]:
    """Stretches that ask pages of the test split, users drawn by the seed until there are `most` items."""
    left = (most or 2**62) // log.parts
    for part in range(log.parts):
        pages = log.pages(part)
        taken = stretches(pages, history, TEST)
        taken = taken.take(np.random.default_rng([seed, part]).permutation(len(taken)))
        items_B = np.cumsum(pages.offset_R1[taken.stop_B] - pages.offset_R1[taken.asked_B])
        taken = taken.take(np.arange(min(len(taken), 1 + int(np.searchsorted(items_B, left)))))
        if len(taken):
            yield pages, taken


def _by_model(model: Ranker | PointWise, lookup: Callable[..., Any], packer: Packer, asked: list[Asked], items: int, title: str) -> Array:
    """P(click), P(cart), P(purchase) of all asked items, in order: (Q, H)."""
    found = []
    with bar(sum(len(taken) for _, taken in asked), f"{title} judges", "user") as progress:
        for pages, taken in asked:
            for batch in packer.batches(pages, taken, items):
                found.append(model.chances(batch, lookup(batch.lookups())).float().numpy())
                progress.update(len(batch.user_B))
    return np.concatenate(found)


def _rows(taken: Stretches) -> Array:
    """The asked pages, in order."""
    return ranges(taken.asked_B, taken.stop_B - taken.asked_B)


class _Facts:
    """What was done with the asked items, on which page and in which scenario."""

    def __init__(self, done_Q: Array, page_Q: Array, scenario_Q: Array) -> None:
        self.done_Q, self.page_Q, self.scenario_Q = done_Q, page_Q, scenario_Q

    @classmethod
    def of(cls, asked: list[Asked]) -> _Facts:
        done, page, scenario, base = [], [], [], 0
        for pages, taken in asked:
            row_A = _rows(taken)
            size_A = np.diff(pages.offset_R1)[row_A]
            done.append(pages.done_C[ranges(pages.offset_R1[row_A], size_A)])
            page.append(base + np.repeat(np.arange(len(row_A)), size_A))
            scenario.append(np.repeat(pages.scenario_R[row_A], size_A))
            base += len(row_A)
        return cls(*(np.concatenate(each) for each in (done, page, scenario)))

    def lines(self, model: str, chance_QH: Array, scenarios: list[str]) -> Iterator[dict[str, Any]]:
        for number, scenario in [(-1, None), *enumerate(scenarios)]:
            here_Q = np.ones(len(self.done_Q), bool) if number < 0 else self.scenario_Q == number
            if not here_Q.any():
                continue
            for head, name in enumerate(HEADS):
                label_N, chance_N = self.done_Q[here_Q] > head, chance_QH[here_Q, head].astype(np.float64)
                figures = {
                    "auc": auc(chance_N, label_N),
                    "gauc": gauc(chance_N, label_N, self.page_Q[here_Q]),
                    "calibration_error": calibration_error(chance_N, label_N),
                }
                told = {key: None if np.isnan(value) else round(value, 6) for key, value in figures.items()}
                yield {"model": model, "scenario": scenario, "head": name, "items": len(label_N), "positives": int(label_N.sum())} | told
