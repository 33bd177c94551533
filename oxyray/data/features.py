"""Categorical side features of items and users as small whole numbers, 0 for unknown.

Text columns number their values by falling frequency (ties by value), at most `MOST_VALUES` of them; a rarer value is unknown. Numbers are
cut at quantiles into at most `BUCKETS` buckets. Legend: I rows (items or users), C features.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from oxyray.data.tables import distinct

MOST_VALUES = 65_535
BUCKETS = 20
ITEM_FEATURES = ("category_1", "category_2", "category_3", "brand", "price")


def encode(table: pa.Table, names: list[str]) -> tuple[np.ndarray, list[dict[str, int | str]]]:
    """int32 codes (I, C) of the named columns and, for each, its name and size (codes lie in 0..size-1)."""
    codes = [_buckets(table[name]) if pa.types.is_floating(table.schema.field(name).type) else _values(table[name]) for name in names]
    about: list[dict[str, int | str]] = [
        {"name": name, "size": int(code_I.max(initial=0)) + 1} for name, code_I in zip(names, codes, strict=True)
    ]
    stacked_IC = np.stack(codes, axis=1) if codes else np.zeros((table.num_rows, 0), np.int32)
    return stacked_IC.astype(np.int32), about


def _values(column: pa.ChunkedArray) -> np.ndarray:
    values, code_I = distinct(column)
    count_V = np.bincount(code_I, minlength=len(values) + 1)[: len(values)]
    order = sorted((v for v in range(len(values)) if values[v]), key=lambda v: (-count_V[v], values[v]))[:MOST_VALUES]
    number_V = np.zeros(len(values) + 1, np.int32)
    number_V[order] = np.arange(1, len(order) + 1)
    return number_V[code_I]


def _buckets(column: pa.ChunkedArray) -> np.ndarray:
    value_I = column.to_numpy().astype(np.float64)
    known_I = np.isfinite(value_I)
    if not known_I.any():
        return np.zeros(len(value_I), np.int32)
    edges = np.unique(np.quantile(value_I[known_I], np.arange(1, BUCKETS) / BUCKETS, method="inverted_cdf"))
    return np.where(known_I, 1 + np.searchsorted(edges, np.where(known_I, value_I, 0.0), side="left"), 0).astype(np.int32)
