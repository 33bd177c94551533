"""Behaviour vectors: counts and mutual information against plain loops, the decomposition against numpy's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from oxyray.errors import CatalogueError
from oxyray.sid.behaviour import Joiner, behaviour_vectors, cooccurrence, positive_pmi, singular_vectors

ITEMS = 8


@st.composite
def sequences(draw: st.DrawFn) -> list[list[int]]:
    return draw(st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=12), min_size=1, max_size=8))


def part(users: list[list[int]], first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    user = np.repeat(np.arange(first, first + len(users)), [len(items) for items in users])
    return user.astype(np.int32), np.array([item for items in users for item in items], np.int32)


@settings(max_examples=100, deadline=None)
@given(sequences(), sequences(), st.integers(1, 4))
def test_counts_and_mutual_information_against_loops(one: list[list[int]], two: list[list[int]], window: int) -> None:
    want = np.zeros((ITEMS, ITEMS))
    for items in one + two:
        for a in range(len(items)):
            for b in range(a + 1, min(a + window, len(items) - 1) + 1):
                if items[a] != items[b]:
                    want[items[a], items[b]] += 1
                    want[items[b], items[a]] += 1
    counts = cooccurrence([part(one), part(two, len(one))], ITEMS, window)
    assert (counts.toarray() == want).all()
    ppmi = positive_pmi(counts).toarray()
    total, share = want.sum(), want.sum(axis=1)
    for i in range(ITEMS):
        for j in range(ITEMS):
            value = max(0.0, np.log(want[i, j] * total / (share[i] * share[j]))) if want[i, j] else 0.0
            assert ppmi[i, j] == pytest.approx(value, abs=1e-9)


def test_singular_vectors_are_those_of_the_full_decomposition() -> None:
    rng = np.random.default_rng(1)
    low = rng.standard_normal((60, 6)) * np.array([9, 7, 5, 3, 2, 1])
    noise = rng.standard_normal((60, 60))
    matrix = low @ low.T + 0.05 * (noise + noise.T)
    left, values, _ = np.linalg.svd(matrix)
    got = singular_vectors(sparse.csr_matrix(matrix), 6, seed=3)
    want = left[:, :6] * np.sqrt(values[:6])
    np.testing.assert_allclose(got, want * np.sign((got * want).sum(axis=0)), rtol=1e-3, atol=1e-3 * np.abs(want).max())
    assert (got == singular_vectors(sparse.csr_matrix(matrix), 6, seed=3)).all()
    np.testing.assert_allclose(
        got, singular_vectors(sparse.csr_matrix(matrix), 6, seed=4), atol=1e-2
    )  # the seed decides nothing but rounding


def test_more_dimensions_than_items_leave_zero_columns() -> None:
    assert singular_vectors(sparse.csr_matrix(np.eye(4)), 6, seed=0).shape == (4, 6)
    assert not singular_vectors(sparse.csr_matrix(np.eye(4)), 6, seed=0)[:, 4:].any()


def test_items_taken_together_stand_close_and_unseen_ones_at_zero() -> None:
    rng = np.random.default_rng(0)
    users = [rng.integers(0, 10, 8).tolist() if user % 2 else rng.integers(10, 20, 8).tolist() for user in range(200)]
    vectors = behaviour_vectors([part(users)], 21, dim=4, seed=0)
    near = vectors @ vectors.T
    assert near[:10, :10].mean() > 0.6
    assert near[10:20, 10:20].mean() > 0.6
    assert abs(near[:10, 10:20]).mean() < 0.2
    assert not vectors[20].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[:20], axis=1), 1, rtol=1e-5)


def test_nothing_taken_together_is_said() -> None:
    with pytest.raises(CatalogueError, match="sid.vectors=text"):
        behaviour_vectors([part([[1], [2], [3, 3]])], ITEMS, dim=4, seed=0)


def joined(items: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    behaviour = rng.standard_normal((items, 5)).astype(np.float32)
    return (rng.standard_normal((items, 12)) + 3).astype(np.float32), behaviour / np.linalg.norm(behaviour, axis=1, keepdims=True)


def test_text_alone_passes_through() -> None:
    text, _ = joined()
    assert (Joiner.fit(text, None, 1.0, 0).apply(text) == text).all()


def test_joined_vectors_hold_centred_text_and_weighted_behaviour() -> None:
    text, behaviour = joined()
    both = Joiner.fit(text, behaviour, 0.5, 0).apply(text, behaviour)
    centred = text - text.mean(axis=0)
    np.testing.assert_allclose(both[:, :12], centred / np.linalg.norm(centred, axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(both[:, 12:], 0.5 * behaviour, atol=1e-6)


def test_principal_directions_keep_the_most_variance() -> None:
    text, behaviour = joined()
    full = Joiner.fit(text, behaviour, 1.0, 0).apply(text, behaviour).astype(np.float64)
    few = Joiner.fit(text, behaviour, 1.0, 6).apply(text, behaviour)
    values = np.linalg.svd(full - full.mean(axis=0), compute_uv=False)
    assert few.shape == (40, 6)
    np.testing.assert_allclose((few.astype(np.float64) ** 2).sum(axis=0), values[:6] ** 2, rtol=1e-4)


def test_joiner_file_serves_new_items(tmp_path: Path) -> None:
    text, behaviour = joined()
    made = Joiner.fit(text, behaviour, 1.0, 6)
    made.save(tmp_path / "joiner.npz")
    again = Joiner.load(tmp_path / "joiner.npz")
    assert (again.apply(text, behaviour) == made.apply(text, behaviour)).all()
    assert (again.apply(text[:3]) == made.apply(text[:3], np.zeros((3, 5), np.float32))).all()
    (tmp_path / "joiner.npz").write_bytes(b"half")
    with pytest.raises(CatalogueError, match="oxyray sid"):
        Joiner.load(tmp_path / "joiner.npz")


def test_too_many_principal_directions_are_refused() -> None:
    text, behaviour = joined(items=4)
    with pytest.raises(CatalogueError, match="sid.pca_dim=6"):
        Joiner.fit(text, behaviour, 1.0, 6)
