"""The prefix index against dictionaries of prefixes, the obvious way to say the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from oxyray.errors import CatalogueError
from oxyray.sid.prefix import PrefixIndex


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[np.ndarray, int, np.ndarray]:
    """Codes, width, item numbers; narrow widths, so that prefixes and whole SIDs are shared often."""
    width, items, levels = draw(st.integers(2, 5)), draw(st.integers(1, 30)), draw(st.integers(1, 4))
    codes_IL = draw(arrays(np.int32, (items, levels), elements=st.integers(0, width - 1)))
    numbers = draw(st.lists(st.integers(0, 99), min_size=items, max_size=items, unique=True))
    return codes_IL, width, np.array(numbers)


def children_by_prefix(codes_IL: np.ndarray) -> dict[tuple[int, ...], list[int]]:
    found: dict[tuple[int, ...], set[int]] = {}
    for row in codes_IL.tolist():
        for depth in range(len(row)):
            found.setdefault(tuple(row[:depth]), set()).add(row[depth])
    return {prefix: sorted(codes) for prefix, codes in found.items()}


def walk(index: PrefixIndex) -> dict[tuple[int, ...], list[int]]:
    """The same dictionary, read off the arrays from the root down, as decoding does."""
    found = {(): index.code[0].tolist()}
    frontier = [((int(code),), node) for node, code in enumerate(index.code[0])]
    for level in range(1, index.levels):
        below = []
        for prefix, node in frontier:
            span = range(index.first_child[level - 1][node], index.first_child[level - 1][node + 1])
            assert (index.parent[level][span.start : span.stop] == node).all()
            found[prefix] = index.code[level][span.start : span.stop].tolist()
            below += [((*prefix, int(index.code[level][child])), child) for child in span]
        frontier = below
    assert [node for _, node in frontier] == list(range(index.leaves))  # leaves come in the order of their SIDs
    return found


@settings(max_examples=150, deadline=None)
@given(catalogues())
def test_arrays_say_what_the_prefixes_say(case: tuple[np.ndarray, int, np.ndarray]) -> None:
    codes_IL, width, items_I = case
    index = PrefixIndex.from_codes(codes_IL, width, items_I)
    assert walk(index) == children_by_prefix(codes_IL)
    by_sid: dict[tuple[int, ...], list[int]] = {}
    for item, row in zip(items_I.tolist(), codes_IL.tolist(), strict=True):
        by_sid.setdefault(tuple(row), []).append(item)
    sids = [tuple(row) for row in index.codes_of(np.arange(index.leaves)).tolist()]
    assert {sid: index.items_of(leaf).tolist() for leaf, sid in enumerate(sids)} == {sid: sorted(items) for sid, items in by_sid.items()}
    assert sids == sorted(by_sid)


@settings(max_examples=100, deadline=None)
@given(catalogues(), st.data())
def test_leaf_of_finds_exactly_the_legal_sids(case: tuple[np.ndarray, int, np.ndarray], data: st.DataObject) -> None:
    codes_IL, width, _ = case
    index = PrefixIndex.from_codes(codes_IL, width)
    asked = data.draw(arrays(np.int64, (12, codes_IL.shape[1]), elements=st.integers(-1, width + 1)))
    asked = np.concatenate([asked, codes_IL])
    legal = {tuple(row) for row in codes_IL.tolist()}
    leaf_N = index.leaf_of(asked)
    assert [leaf >= 0 for leaf in leaf_N] == [tuple(row) in legal for row in asked.tolist()]
    assert (index.codes_of(leaf_N[leaf_N >= 0]) == asked[leaf_N >= 0]).all()


def test_order_of_items_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    codes_IL, items_I = rng.integers(0, 4, (50, 3)), np.arange(50)
    order = rng.permutation(50)
    one, two = PrefixIndex.from_codes(codes_IL, 4, items_I), PrefixIndex.from_codes(codes_IL[order], 4, items_I[order])
    for a, b in zip((*one.code, *one.first_child, one.leaf_items), (*two.code, *two.first_child, two.leaf_items), strict=True):
        assert (a == b).all()


@pytest.mark.parametrize(
    ("codes", "width", "items", "says"),
    [
        (np.zeros((0, 3), int), 4, None, "at least one item"),
        (np.zeros((2, 0), int), 4, None, "at least one item"),
        (np.zeros(3, int), 4, None, "at least one item"),
        (np.array([[0, 4]]), 4, None, "0..3"),
        (np.array([[-1, 0]]), 4, None, "0..3"),
        (np.array([[1, 0]]), 4, np.array([1, 2]), "one item"),
    ],
)
def test_codes_that_cannot_be_indexed(codes: np.ndarray, width: int, items: np.ndarray | None, says: str) -> None:
    with pytest.raises(CatalogueError, match=says):
        PrefixIndex.from_codes(codes, width, items)


def test_sids_of_another_length_are_refused() -> None:
    with pytest.raises(CatalogueError, match="2 levels"):
        PrefixIndex.from_codes(np.array([[1, 0]]), 4).leaf_of(np.array([[1, 0, 0]]))


@pytest.mark.parametrize("items", [1, 63, 64, 65, 128, 700])
def test_items_of_a_leaf_start_where_the_counts_before_it_end(items: int) -> None:
    index = PrefixIndex.from_codes(np.random.default_rng(items).integers(0, 9, (items, 3)), 9)
    want = np.append(0, np.cumsum(index.leaf_count, dtype=int))
    assert index.first_item(np.arange(index.leaves + 1)).tolist() == want.tolist()
    assert (np.bincount(index.item_leaf()) == index.leaf_count).all()


def test_codes_too_wide_to_pack_sort_the_same() -> None:
    """Four levels of 20 bits and the items do not fit 64 bits: the index is sorted by columns instead."""
    codes_IL = np.random.default_rng(0).integers(0, 3, (40, 4))
    one, two = PrefixIndex.from_codes(codes_IL, 3), PrefixIndex.from_codes(codes_IL, 1 << 20)
    for a, b in zip((*one.code, *one.first_child, one.leaf_items), (*two.code, *two.first_child, two.leaf_items), strict=True):
        assert (a == b).all()


def test_half_a_million_items_take_four_megabytes() -> None:
    """Eight bytes an item: what keeps ten million below 100 MB."""
    rng = np.random.default_rng(0)
    parents = rng.integers(0, 8192, (500_000 // 18, 2))
    codes_IL = np.concatenate([parents[rng.integers(0, len(parents), 500_000)], rng.integers(0, 8192, (500_000, 1))], axis=1)
    index = PrefixIndex.from_codes(codes_IL, 8192)
    assert index.nbytes() < 8 * 500_000
    assert (index.codes_of(index.leaf_of(codes_IL[::1000])) == codes_IL[::1000]).all()
