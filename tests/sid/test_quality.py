"""The quality table against a slow reading of its definitions."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from oxyray.sid.quality import gini, quality, table


def percentile(values: list[float], q: float) -> float:
    """Linear interpolation between the two nearest ranks."""
    values = sorted(values)
    place = (len(values) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def purity(prefixes: list[tuple[int, ...]], categories: list[str | None]) -> float | None:
    groups: dict[tuple[int, ...], list[str]] = {}
    for prefix, category in zip(prefixes, categories, strict=True):
        if category is not None:
            groups.setdefault(prefix, []).append(category)
    shares = [max(Counter(group).values()) / len(group) for group in groups.values()]
    return sum(shares) / len(shares) if shares else None


@st.composite
def coded(draw: st.DrawFn) -> tuple[np.ndarray, int, list[str | None]]:
    width, items, levels = draw(st.integers(2, 6)), draw(st.integers(1, 40)), draw(st.integers(1, 3))
    codes = draw(arrays(np.int32, (items, levels), elements=st.integers(0, width - 1)))
    return codes, width, draw(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=items, max_size=items))


@settings(max_examples=150, deadline=None)
@given(coded())
def test_every_figure_against_its_definition(case: tuple[np.ndarray, int, list[str | None]]) -> None:
    codes, width, categories = case
    items, levels = codes.shape
    figures = quality(codes, width, {"category_1": categories})
    rows = [tuple(row) for row in codes.tolist()]
    assert figures["coverage"] == pytest.approx([len({row[:d] for row in rows}) / width**d for d in range(1, levels + 1)])
    for name, prefixes in (("sid", rows), ("code_1", [row[:1] for row in rows])):
        want = purity(prefixes, categories)
        assert figures["purity"]["category_1"][name] == (None if want is None else pytest.approx(want))
    sizes = Counter(rows)
    for name, q in (("p90", 90), ("p99", 99), ("p999", 99.9)):
        assert figures["collision"][name] == pytest.approx(percentile([float(s) for s in sizes.values()], q))
    assert figures["collision"]["sharing"] == pytest.approx(sum(sizes[row] > 1 for row in rows) / items)
    assert (figures["distinct"], figures["collision"]["largest"]) == (len(sizes), max(sizes.values()))
    load = [float(sum(row[0] == code for row in rows)) for code in range(width)]
    for q in (25, 75, 90):
        assert figures["load"][f"p{q}"] == pytest.approx(percentile(load, q) / (items / width))
    pairs = sum(abs(a - b) for a in load for b in load)
    assert figures["load"]["gini"] == pytest.approx(pairs / (2 * width * sum(load)))
    json.dumps(figures)
    assert all(len(line) < 120 for line in table(figures).splitlines())


def test_values_worked_by_hand() -> None:
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 0]])
    figures = quality(codes, 2, {"category_1": ["x", "y", "x", "x"], "category_2": [None] * 4})
    assert figures["coverage"] == [1.0, 0.75]
    assert figures["purity"] == {
        "category_1": {"sid": pytest.approx(2.5 / 3), "code_1": pytest.approx(5 / 6)},
        "category_2": {"sid": None, "code_1": None},
    }
    assert figures["collision"]["sharing"] == 0.5
    assert figures["load"]["gini"] == 0.25
    text = table(figures)
    assert "3 of 4 items" in text
    assert "83.33% by SID" in text
    assert "unknown" in text


def test_gini_runs_from_even_to_all_in_one() -> None:
    assert gini(np.full(10, 7)) == pytest.approx(0)
    assert gini(np.eye(10)[0]) == pytest.approx(0.9)
