"""RQ-KMeans: nearest centroids against brute force, the same seed the same codes, no dead codes, bad vectors refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oxyray.errors import CatalogueError
from oxyray.sid.collisions import numbered, told_apart
from oxyray.sid.lloyd import different
from oxyray.sid.rqkmeans import RQKMeans, fit


def brute_force(centroids_LVF: np.ndarray, vectors_NF: np.ndarray) -> np.ndarray:
    codes = []
    for vector in vectors_NF.astype(np.float64):
        row = []
        for centroids_VF in centroids_LVF.astype(np.float64):
            row.append(int(((centroids_VF - vector) ** 2).sum(axis=1).argmin()))
            vector = vector - centroids_VF[row[-1]]
        codes.append(row)
    return np.array(codes)


def clusters(count: int, size: int, dim: int = 8, spread: float = 0.01, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (np.repeat(rng.standard_normal((count, dim)), size, axis=0) + spread * rng.standard_normal((count * size, dim))).astype(
        np.float32
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(2, 20), st.integers(2, 6))
def test_codes_are_the_nearest_centroids(seed: int, levels: int, width: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((60, dim)).astype(np.float32)
    made = fit(vectors, levels=levels, width=width, iterations=5, seed=seed)
    assert made.codes_NL.shape == (60, levels)
    assert made.codes_NL.dtype == np.int32
    assert (made.codes_NL == brute_force(made.codebook.centroids_LVF, vectors)).all()
    assert (made.codebook.assign(vectors) == made.codes_NL).all()
    new = rng.standard_normal((40, dim)).astype(np.float32)
    assert (made.codebook.assign(new) == brute_force(made.codebook.centroids_LVF, new)).all()


def test_each_level_leaves_less_over_and_the_reconstruction_says_how_much() -> None:
    vectors = clusters(30, 20, spread=0.4)
    made = fit(vectors, levels=3, width=16)
    assert 1 > made.left_L[0] > made.left_L[1] > made.left_L[2] > 0
    off = ((vectors - made.codebook.reconstruct(made.codes_NL)) ** 2).sum(axis=1).mean()
    assert off / ((vectors - vectors.mean(axis=0)) ** 2).sum(axis=1).mean() == pytest.approx(made.left_L[2], rel=1e-4)


def test_lloyd_has_settled_every_centroid_is_the_mean_of_its_vectors() -> None:
    vectors = clusters(12, 30)
    made = fit(vectors, levels=1, width=10, iterations=50)
    for code in range(10):
        members = vectors[made.codes_NL[:, 0] == code]
        np.testing.assert_allclose(made.codebook.centroids_LVF[0, code], members.mean(axis=0), atol=1e-5)


def test_same_seed_same_codes_other_seed_others() -> None:
    vectors = clusters(40, 10, spread=0.5)
    one, two, three = (fit(vectors, levels=3, width=32, seed=seed) for seed in (5, 5, 6))
    assert (one.codes_NL == two.codes_NL).all()
    assert (one.codebook.centroids_LVF == two.codebook.centroids_LVF).all()
    assert (one.codes_NL != three.codes_NL).any()


def test_dead_codes_are_seeded_again() -> None:
    """Nine in ten vectors are one point, so k-means started on random vectors gets the same point many times."""
    vectors = np.concatenate([np.ones((900, 8), np.float32), clusters(100, 1, seed=3)])
    made = fit(vectors, levels=1, width=64, iterations=10)
    assert made.unused_L == (0,)
    assert made.duplicates == 899


def test_one_vector_ten_thousand_times() -> None:
    vectors = np.concatenate([clusters(40, 2, spread=0.3, seed=3), np.ones((10_000, 8), np.float32)])
    plain = fit(vectors, levels=3, width=16)
    assert (plain.unused_L[0], plain.duplicates) == (0, 9_999)
    assert len(np.unique(plain.codes_NL[80:], axis=0)) == 1, "equal vectors are given equal codes"
    apart = told_apart(plain.codes_NL, vectors, plain.codebook, 4.0)
    moved = len(np.unique(apart[80:], axis=0))
    assert 1 < moved <= 16, "as many as the last level has near codes for are told apart, the rest share"
    assert (apart[:, :2] == plain.codes_NL[:, :2]).all()
    extra = numbered(plain.codes_NL, 16)
    assert len(np.unique(extra[80:], axis=0)) == 16
    assert (extra[:, :3] == plain.codes_NL).all()


def test_as_many_codes_as_different_vectors() -> None:
    vectors = np.concatenate([clusters(32, 1)] * 2)
    made = fit(vectors, levels=2, width=32)
    assert len(np.unique(made.codes_NL[:, 0])) == 32
    assert made.unused_L[0] == 0
    assert made.unused_L[1] > 0  # nothing is left over for level 2 to tell apart, and that is said
    assert made.left_L[0] == pytest.approx(0, abs=1e-6)
    assert (made.codes_NL[:32] == made.codes_NL[32:]).all()
    assert made.duplicates == 32


def bad(row: int, value: float) -> np.ndarray:
    vectors = clusters(20, 2)
    vectors[row] = value
    return vectors


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (bad(3, np.nan), "NaN or infinite values, the first in row 3"),
        (bad(5, np.inf), "NaN or infinite values, the first in row 5"),
        (bad(7, 0), "all zeros, the first in row 7"),
        (clusters(5, 1), "5 items have 5 different vectors, fewer than the 8 codes .* sid.width=4"),
        (np.ones((50, 4), np.float32), "50 items have 1 different vectors"),
        (np.ones(5, np.float32), "shape"),
    ],
)
def test_vectors_that_cannot_be_quantised(vectors: np.ndarray, says: str) -> None:
    with pytest.raises(CatalogueError, match=says) as caught:
        fit(vectors, levels=2, width=8)
    assert "\n" not in str(caught.value)


def test_codebook_file_keeps_the_codes(tmp_path: Path) -> None:
    made = fit(clusters(20, 5), levels=2, width=8)
    made.codebook.save(tmp_path / "codebook.npz")
    again = RQKMeans.load(tmp_path / "codebook.npz")
    assert (again.levels, again.width) == (2, 8)
    assert (again.assign(clusters(20, 5)) == made.codes_NL).all()
    with pytest.raises(CatalogueError, match="7 dimensions, the codebook 8"):
        again.assign(np.ones((2, 7), np.float32))


def test_damaged_codebook_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "codebook.npz"
    with pytest.raises(CatalogueError, match="oxyray sid"):
        RQKMeans.load(path)
    fit(clusters(20, 5), levels=2, width=8).codebook.save(path)
    whole = path.read_bytes()
    for content in (b"", b"nonsense", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CatalogueError, match="oxyray sid"):
            RQKMeans.load(path)
    for array in (
        np.full((2, 4, 3), np.nan, np.float32),
        np.ones((4, 3), np.float32),
        np.ones((2, 4, 3)),
        np.array([{"code": 1}], dtype=object),
    ):
        np.savez(path, centroids_LVF=array)
        with pytest.raises(CatalogueError):
            RQKMeans.load(path)


def test_a_level_is_lloyds_algorithm_in_plain_loops() -> None:
    random = np.random.default_rng(3)
    vectors = random.normal(size=(200, 4)).astype(np.float32)
    made = fit(vectors, levels=1, width=6, iterations=7, seed=9)
    centroids = vectors[np.random.default_rng(9).choice(200, 6, replace=False)].astype(np.float64)
    for _ in range(7):
        nearest = np.square(vectors[:, None] - centroids[None]).sum(-1).argmin(1)
        centroids = np.stack([vectors[nearest == code].astype(np.float64).mean(0) for code in range(6)])
    np.testing.assert_allclose(made.codebook.centroids_LVF[0], centroids, atol=1e-6)


@pytest.mark.parametrize("keyed", [True, False])
def test_equal_rows_are_found_also_where_keys_tell_nothing(keyed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not keyed:
        monkeypatch.setattr("oxyray.sid.lloyd._keys", lambda vectors_NF: np.zeros(len(vectors_NF), dtype=np.uint64))
    random = np.random.default_rng(4)
    vectors = random.choice(np.array([-1.5, -0.0, 0.0, 2.0], dtype=np.float32), size=(300, 3))
    seen: dict[tuple[float, ...], int] = {}
    for row, vector in enumerate(vectors.tolist()):
        seen.setdefault(tuple(vector), row)
    assert different(vectors).tolist() == list(seen.values())
    assert different(vectors[:0]).tolist() == []


@pytest.mark.parametrize("balance", [1.05, 1.2])
def test_a_bound_on_the_load_holds_at_every_level(balance: float) -> None:
    random = np.random.default_rng(2)
    vectors = np.concatenate([random.normal(size=(1500, 6)), random.normal(size=(500, 6)) * 0.1 + 4]).astype(np.float32)
    free, bound = (fit(vectors, levels=2, width=20, balance=each) for each in (None, balance))
    assert np.bincount(free.codes_NL[:, 0]).max() > balance * 100
    for level in range(2):
        assert np.bincount(bound.codes_NL[:, level], minlength=20).max() <= balance * 100
    assert bound.left_L[1] < 1.3 * free.left_L[1]
    assert (bound.codebook.assign(vectors) == bound.codes_NL)[:, 0].mean() > 0.9, "codes stand where they are needed: few vectors are moved"


@pytest.mark.parametrize("balance", [None, 1.2])
def test_a_vector_given_many_times_does_not_draw_codes_that_cannot_share_it(balance: float | None) -> None:
    random = np.random.default_rng(5)
    vectors = np.concatenate([np.ones((4000, 6)), random.normal(size=(600, 6))]).astype(np.float32)
    made = fit(vectors, levels=1, width=20, balance=balance)
    codes = made.codebook.assign(vectors)[:, 0]  # before any vector is moved for the bound
    assert len(np.unique(codes)) == 20
    assert len(np.unique(codes[:4000])) == 1
    if balance is not None:
        assert np.bincount(made.codes_NL[:, 0]).max() <= balance * 230


def test_what_is_held_out_leaves_no_trace_in_the_codebook_and_is_described_worse() -> None:
    vectors = np.random.default_rng(6).normal(size=(900, 8)).astype(np.float32)
    made = fit(vectors, levels=2, width=32, held_out=0.2)
    assert len(made.row_O) == 180 == len(np.unique(made.row_O))
    other = vectors.copy()
    other[made.row_O] *= 0.5  # on the same grid, and elsewhere
    again = fit(other, levels=2, width=32, held_out=0.2)
    assert (again.row_O == made.row_O).all()
    assert (again.codebook.centroids_LVF == made.codebook.centroids_LVF).all()
    held = vectors[made.row_O].astype(np.float64)
    spread = ((held - vectors.astype(np.float64).mean(axis=0)) ** 2).sum(axis=1).mean()
    for level in range(2):
        left = held - made.codebook.reconstruct(made.codes_NL[made.row_O, : level + 1])
        assert made.left_out_L[level] == pytest.approx((left**2).sum(axis=1).mean() / spread, rel=1e-4)
        assert made.left_out_L[level] > made.left_L[level]
    few = fit(vectors[:100], levels=2, width=32, held_out=0.2)
    assert len(few.row_O) == 0 == len(few.left_out_L)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "balance"), [(2, None), (3, 1.2)])
def test_any_number_of_workers_gives_the_same_codes(
    shared_ray: None, monkeypatch: pytest.MonkeyPatch, workers: int, balance: float | None
) -> None:
    from oxyray.sid import lloyd

    monkeypatch.setattr(lloyd, "BLOCK", 100)
    vectors = np.random.default_rng(8).normal(size=(950, 6)).astype(np.float32)
    vectors[500:540] = vectors[500]
    one, several = (fit(vectors, levels=3, width=16, iterations=5, balance=balance, held_out=0.1, workers=count) for count in (1, workers))
    assert (several.codes_NL == one.codes_NL).all()
    assert (several.codebook.centroids_LVF == one.codebook.centroids_LVF).all()
    assert several.left_L == one.left_L
    assert several.left_out_L == one.left_out_L
