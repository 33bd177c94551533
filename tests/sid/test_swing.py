"""Swing against its definition, pair of users by pair of users."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oxyray.sid import swing as module
from oxyray.sid.pairs import Mixture, alike, peers
from oxyray.sid.swing import ALPHA, Pairs, Swing, swing, taken_by

TAKEN = st.lists(st.sets(st.integers(0, 6), max_size=5), min_size=1, max_size=8)


def parts_of(taken: list[set[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Events of the users, each item twice, in two parts."""
    half = len(taken) // 2

    def part(first: int, users: list[set[int]]) -> tuple[np.ndarray, np.ndarray]:
        rows = [(first + number, item) for number, items in enumerate(users) for item in sorted(items) * 2]
        return np.array([user for user, _ in rows], dtype=np.int32), np.array([item for _, item in rows], dtype=np.int32)

    return [part(0, taken[:half]), part(half, taken[half:])]


def slow(taken: list[set[int]], i: int, j: int) -> float:
    both = [items for items in taken if i in items and j in items]
    return sum(1 / np.sqrt(len(u) * len(v)) / (ALPHA + len(u & v)) for u, v in combinations(both, 2))


@settings(deadline=None, max_examples=60)
@given(TAKEN)
def test_every_pair_of_items_is_as_the_definition_says(taken: list[set[int]]) -> None:
    work = Swing(taken_by(parts_of(taken), 7), top=7)
    for i in range(7):
        found = dict(zip(*work.similar(i), strict=True))
        for j in range(7):
            if j != i:
                assert found.get(j, 0.0) == pytest.approx(slow(taken, i, j), abs=1e-9)


def test_large_items_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    taken = [set(random.choice(7, 4, replace=False).tolist()) for _ in range(30)]
    whole = Swing(taken_by(parts_of(taken), 7), top=7).similar(2)
    monkeypatch.setattr(module, "_AT_ONCE", 20)
    for one, other in zip(whole, Swing(taken_by(parts_of(taken), 7), top=7).similar(2), strict=True):
        np.testing.assert_allclose(one, other)


def test_the_nearest_come_first_and_ties_by_index() -> None:
    taken = [{0, 1, 2}, {0, 1, 2}, {0, 3}, {0, 3, 4}]
    found = swing(taken_by(parts_of(taken), 5), top=2)
    of_0 = found.left_P == 0
    assert found.right_P[of_0].tolist() == [3, 1]  # users of 3 have less in common
    assert (np.diff(found.weight_P[of_0]) <= 0).all()
    assert 4 not in found.left_P  # one user took it


def test_no_event_is_no_pair() -> None:
    assert len(swing(taken_by([], 5), top=3)) == 0
    assert len(swing(taken_by(parts_of([{1}, {2}]), 5), top=3)) == 0


@pytest.mark.slow
def test_ray_workers_find_the_same(shared_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    taken = [set(random.choice(60, 8, replace=False).tolist()) for _ in range(200)]
    taken_UI = taken_by(parts_of(taken), 60)
    alone = swing(taken_UI, top=5)
    monkeypatch.setattr(module, "_BLOCK_SECONDS", 20_000)
    together = swing(taken_UI, top=5, workers=2)
    for side in ("left_P", "right_P", "weight_P"):
        np.testing.assert_allclose(getattr(together, side), getattr(alone, side))


@pytest.mark.parametrize("exact", [50_000, 50])  # above it a search near the item alone; its 16 lists are all of them here
def test_items_with_like_texts_are_peers_within_their_category(exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oxyray.sid.pairs._EXACT", exact)
    random = np.random.default_rng(3)
    vector_IF = random.normal(size=(300, 8)).astype(np.float32)
    vector_IF /= np.linalg.norm(vector_IF, axis=1, keepdims=True)
    vector_IF[:9] = vector_IF[0]  # equal texts, more than are asked for: none is its own peer, each keeps its number
    category_I = random.integers(-1, 2, size=300)
    category_I[:9] = 1
    found = alike(vector_IF, category_I, 4)
    assert (found.left_P != found.right_P).all()
    assert (category_I[found.left_P] == category_I[found.right_P]).all()
    cosine_II = vector_IF.astype(np.float64) @ vector_IF.T.astype(np.float64)
    for item in range(300):
        others = np.flatnonzero((category_I == category_I[item]) & (np.arange(300) != item))
        best = np.sort(cosine_II[item, others])[::-1][:4]
        np.testing.assert_allclose(np.sort(found.weight_P[found.left_P == item])[::-1], best[best > 0], rtol=1e-5)


def test_peers_share_a_query_and_a_category() -> None:
    from scipy import sparse

    asked_WI = sparse.csr_matrix(np.array([[3, 1, 1, 1, 0], [1, 0, 1, 0, 2]], dtype=np.float64))
    found = peers(asked_WI, np.array([0, 0, 1, -1, 1]))
    # query 0: items 0 1 | 2 | 3 unknown; query 1: item 0 | 2 4
    assert list(zip(found.left_P, found.right_P, found.weight_P, strict=True)) == [(0, 1, 1.0), (2, 4, 1.0)]


def test_pairs_are_drawn_by_rate_and_weight() -> None:
    pairs = {"swing": Pairs(np.arange(3), np.arange(3), np.array([1.0, 0.0, 3.0])), "query": Pairs(np.arange(2), np.arange(2), np.ones(2))}
    drawn = Mixture(pairs, {"swing": 3.0, "query": 1.0, "peers": 5.0}).draw(40_000, np.random.default_rng(1))
    assert len(drawn["swing"]) + len(drawn["query"]) == 40_000
    assert len(drawn["swing"]) / 40_000 == pytest.approx(0.75, abs=0.02)
    np.testing.assert_allclose(np.bincount(drawn["swing"], minlength=3) / len(drawn["swing"]), [0.25, 0, 0.75], atol=0.02)
