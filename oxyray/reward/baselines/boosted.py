"""Boosted trees (LightGBM) over the columns of `columns.py`: one model a head of the funnel, each trained on the items that came so far.
The later heads have few rows and are soon learnt by heart, so the newest tenth of the training rows says how many trees each head gets.

Legend: P pieces of the log, R pages, A asked pages, Q items of asked pages, K columns, H heads of the funnel.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from oxyray.data.order import TRAIN
from oxyray.errors import ConfigError
from oxyray.reward.baselines.columns import Columns, Facts, Pieces
from oxyray.reward.funnel import HEADS
from oxyray.reward.pages import Pages, ranges

Array = np.ndarray

_PATIENCE = 20


class Boosted:
    """What `fit` made: the columns' counts, and for each head its trees or its constant chance."""

    def __init__(self, columns: Columns, heads: list[Any], num_threads: int) -> None:
        self.columns, self.heads, self.num_threads = columns, heads, num_threads

    @classmethod
    def fit(cls, log: Pieces, facts: Facts, *, most_rows: int = 400_000, trees: int = 400, seed: int = 0, num_threads: int = 0) -> Boosted:
        """Learn from the newest training pages that together show at most `most_rows` items (one page at least); what is counted about an
        item is counted over all training pages. A head has at most `trees` trees; one whose rows all say the same becomes their share,
        drawn towards 1/2 by one row of each kind. The same seed gives the same trees; 0 threads are as many as there are cores. Raises
        ConfigError where LightGBM is missing."""
        lightgbm, columns = _lightgbm(), Columns(facts, log)
        value_QK, done_Q, time_Q, codes = _training_rows(log, columns, most_rows)
        late_Q = time_Q >= np.quantile(time_Q, 0.9) if len(time_Q) else time_Q > 0
        settings = {
            "objective": "binary",
            "learning_rate": 0.05,
            "num_leaves": 31,
            "min_data_in_leaf": 50,
            "deterministic": True,
            "force_row_wise": True,
            "seed": seed,
            "num_threads": num_threads,
            "verbose": -1,
        }
        heads: list[Any] = []
        for stage in range(len(HEADS)):
            came_Q = done_Q >= stage
            went_Q = done_Q[came_Q] > stage
            if _both(went_Q):
                heads.append(_grown(lightgbm, settings, value_QK[came_Q], went_Q, late_Q[came_Q], codes, trees))
            else:
                heads.append(float((went_Q.sum() + 1) / (len(went_Q) + 2)))
        return cls(columns, heads, num_threads)

    def chances(self, pages: Pages, row_A: Array) -> Array:
        """P(click), P(cart), P(purchase) of the items of the pages `row_A`, in order: float32 (Q, H)."""
        value_QK = _matrix(self.columns.of(pages, row_A))
        step_QH = np.empty((len(value_QK), len(HEADS)))
        for stage, head in enumerate(self.heads):
            step_QH[:, stage] = head if isinstance(head, float) else head.predict(value_QK, num_threads=self.num_threads)
        return np.cumprod(step_QH, axis=1).astype(np.float32)


def newest(log: Pieces, most_rows: int) -> list[Array]:
    """Each piece's rows of the newest training pages that together show at most `most_rows` items; one page at least."""
    time, size, row, start_P = [], [], [], [0]
    for part in range(log.parts):
        pages = log.pages(part)
        row.append(np.flatnonzero(pages.split_R == TRAIN))
        time.append(pages.time_R[row[-1]])
        size.append(np.diff(pages.offset_R1)[row[-1]])
        start_P.append(start_P[-1] + len(row[-1]))
    order_A = np.argsort(-np.concatenate(time), kind="stable")
    count = int(np.searchsorted(np.cumsum(np.concatenate(size)[order_A]), most_rows, side="right"))
    kept_A = np.sort(order_A[: max(1, count)])
    return [row_A[kept_A[(kept_A >= start) & (kept_A < start + len(row_A))] - start] for row_A, start in zip(row, start_P, strict=False)]


def _grown(
    lightgbm: ModuleType, settings: dict[str, Any], value_QK: Array, went_Q: Array, late_Q: Array, codes: list[int], trees: int
) -> Any:
    """Trees grown on all rows, as many as were best for the late rows when grown on the others; a tenth of `trees` where the late rows, or
    the others, all say the same."""
    label_Q, best = went_Q.astype(np.float32), max(1, trees // 10)
    if _both(went_Q[late_Q]) and _both(went_Q[~late_Q]):
        early = lightgbm.Dataset(value_QK[~late_Q], label_Q[~late_Q], categorical_feature=codes)
        late = early.create_valid(value_QK[late_Q], label_Q[late_Q])
        stop = lightgbm.early_stopping(_PATIENCE, verbose=False)
        best = lightgbm.train(settings, early, num_boost_round=trees, valid_sets=[late], callbacks=[stop]).best_iteration
    return lightgbm.train(settings, lightgbm.Dataset(value_QK, label_Q, categorical_feature=codes), num_boost_round=best)


def _both(went_Q: Array) -> bool:
    """Whether there are rows of both kinds."""
    return bool(went_Q.any() and not went_Q.all())


def _training_rows(log: Pieces, columns: Columns, most_rows: int) -> tuple[Array, Array, Array, list[int]]:
    """Values (Q, K), what was done (Q,), when (Q,), and which columns are codes."""
    values, done, time, codes = [], [], [], []
    for part, row_A in enumerate(newest(log, most_rows)):
        pages = log.pages(part)
        found = columns.of(pages, row_A)
        codes = [list(found).index(name) for name in columns.categorical]
        values.append(_matrix(found))
        size_A = np.diff(pages.offset_R1)[row_A]
        done.append(pages.done_C[ranges(pages.offset_R1[row_A], size_A)])
        time.append(np.repeat(pages.time_R[row_A], size_A))
    return np.concatenate(values), np.concatenate(done), np.concatenate(time), codes


def _matrix(columns: dict[str, Array]) -> Array:
    return np.stack([column_Q.astype(np.float32) for column_Q in columns.values()], axis=1)


def _lightgbm() -> ModuleType:
    try:
        import lightgbm
    except ImportError:
        raise ConfigError("the boosted baseline needs LightGBM, which is missing: pip install lightgbm") from None
    return lightgbm
