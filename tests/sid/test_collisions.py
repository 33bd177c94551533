"""Collision policy against a slow loop and by its promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oxyray.sid.collisions import numbered, told_apart
from oxyray.sid.rqkmeans import RQKMeans


def shop(seed: int, items: int, width: int, levels: int = 2, dims: int = 3) -> tuple[np.ndarray, np.ndarray, RQKMeans]:
    """Vectors, their codes and the codebook; few vectors are distinct, so many SIDs are shared."""
    random = np.random.default_rng(seed)
    codebook = RQKMeans(random.normal(size=(levels, width, dims)).astype(np.float32))
    vectors = random.normal(size=(max(items // 2, 1), dims)).astype(np.float32)[random.integers(0, max(items // 2, 1), items)]
    return vectors, codebook.assign(vectors), codebook


def one_by_one(codes: np.ndarray, vectors: np.ndarray, codebook: RQKMeans, taken: set[tuple[int, ...]]) -> np.ndarray:
    """The same rounds in plain loops: everyone asks for the nearest free code, the best described gets it, the others ask again."""
    codes, taken = codes.copy(), set(taken)
    residual = vectors - codebook.reconstruct(codes[:, :-1])
    error = lambda item, code: float(((residual[item] - codebook.centroids_LVF[-1][code]) ** 2).sum())  # noqa: E731
    asked = {item: int(codes[item, -1]) for item in range(len(codes))}
    while asked:
        left = []
        for sid in sorted({(*codes[item, :-1].tolist(), code) for item, code in asked.items()}):
            who = [item for item, code in asked.items() if (*codes[item, :-1].tolist(), code) == sid]
            best = min(who, key=lambda item: (round(error(item, sid[-1]), 5), item))
            if sid in taken:
                left += who
                continue
            taken.add(sid)
            codes[best, -1] = sid[-1]
            left += [item for item in who if item != best]
        asked = {}
        for item in left:
            free = [code for code in range(codebook.width) if (*codes[item, :-1].tolist(), code) not in taken]
            if free:
                asked[item] = min(free, key=lambda code: error(item, code))
    return codes


@pytest.mark.parametrize("seed", range(6))
def test_equals_plain_loops(seed: int) -> None:
    vectors, codes, codebook = shop(seed, 40, 6)
    found = told_apart(codes, vectors, codebook, limit=1e9)
    assert np.array_equal(found, one_by_one(codes, vectors, codebook, set()))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), items=st.integers(1, 60), width=st.sampled_from([2, 4, 16]), levels=st.integers(1, 3))
def test_promises(seed: int, items: int, width: int, levels: int) -> None:
    vectors, codes, codebook = shop(seed, items, width, levels)
    found = told_apart(codes, vectors, codebook, limit=1e9)
    assert np.array_equal(found[:, :-1], codes[:, :-1])
    _, group = np.unique(codes[:, :-1], axis=0, return_inverse=True)
    for one in np.unique(group):
        mine = found[group.reshape(-1) == one, -1]
        assert len(np.unique(mine)) == min(len(mine), width), "told apart wherever there are codes enough"
    alone = np.array([(codes == row).all(axis=1).sum() == 1 for row in codes])
    unique_before = {tuple(row) for row in codes[alone].tolist()}
    assert unique_before <= {tuple(row) for row in found.tolist()}, "who shared with nobody is not disturbed"
    assert np.array_equal(found[alone], codes[alone])


def test_published_sids_stay_and_are_free_for_nobody() -> None:
    vectors, codes, codebook = shop(3, 30, 16)
    published = told_apart(codes[:20], vectors[:20], codebook, limit=1e9)
    new = told_apart(codes[20:], vectors[20:], codebook, limit=1e9, taken_ML=published)
    both = np.concatenate([published, new])
    assert len(np.unique(both, axis=0)) == 30


def test_nobody_moves_further_than_the_limit() -> None:
    vectors, codes, codebook = shop(5, 60, 16)
    once = np.unique(vectors, axis=0, return_index=True)[1]
    before = np.square(vectors - codebook.reconstruct(codes[:, :-1]))[once].sum(axis=1).mean()
    moved_by_limit = []
    for limit in (1e-9, 0.5, 1e9):
        found = told_apart(codes, vectors, codebook, limit)
        moved = (found != codes).any(axis=1)
        error = np.square(vectors - codebook.reconstruct(found)).sum(axis=1)
        assert (error[moved] <= limit * before + 1e-4).all()
        moved_by_limit.append(int(moved.sum()))
    assert moved_by_limit[0] == 0
    assert moved_by_limit == sorted(moved_by_limit)
    assert moved_by_limit[2] > moved_by_limit[1]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30), st.integers(0, 29))
def test_a_level_more_counts_the_items_that_share_the_others(sids: list[tuple[int, int]], published: int) -> None:
    codes_NL = np.array(sids, dtype=np.int32)
    whole = numbered(codes_NL, 64)
    assert (whole[:, :2] == codes_NL).all()
    assert len(np.unique(whole, axis=0)) == len(sids)
    seen: dict[tuple[int, int], int] = {}
    for sid, number in zip(sids, whole[:, 2], strict=True):
        assert number == seen.get(sid, 0)
        seen[sid] = int(number) + 1
    old, new = whole[:published], codes_NL[published:]  # new items count on where the published ones stopped
    if len(new):
        assert (np.concatenate([old, numbered(new, 64, old)]) == whole).all()


def test_more_items_than_numbers_share_the_last() -> None:
    assert numbered(np.zeros((5, 2), dtype=np.int32), 3)[:, 2].tolist() == [0, 1, 2, 2, 2]
