"""The metrics against their definitions written out, and the intervals against what statistics says of them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from oxyray.evaluate.metrics import Resampled, found_share, names, places, row_metrics

KS = (1, 3, 5)


def by_definition(ranked: list[int], target: int, positives: set[int]) -> list[float]:
    ranked = [item for item in ranked if item >= 0]
    hit = [float(target in ranked[:k]) for k in KS]
    recall = [len(positives & set(ranked[:k])) / len(positives) for k in KS]
    gain = [1 / math.log2(1 + 1 + ranked.index(target)) if target in ranked[:k] else 0.0 for k in KS]
    return [*hit, *recall, *gain]


@st.composite
def judged(draw):
    rows = draw(st.integers(1, 6))
    lists = []
    for _ in range(rows):
        ranked = draw(st.lists(st.integers(0, 9), unique=True, max_size=6))
        lists.append(ranked + [-1] * (6 - len(ranked)))
    targets = draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows))
    positives = [draw(st.sets(st.integers(0, 9), max_size=4)) | {target} for target in targets]
    return lists, targets, positives


@settings(max_examples=200, deadline=None)
@given(judged())
def test_metrics_equal_their_definitions(case):
    lists, targets, positives = case
    row_P = np.repeat(np.arange(len(lists)), [len(p) for p in positives])
    item_P = np.concatenate([sorted(p) for p in positives])
    found = row_metrics(np.array(lists), np.array(targets), row_P, item_P, KS)
    want = [by_definition(*row) for row in zip(lists, targets, positives, strict=True)]
    np.testing.assert_allclose(found, want, rtol=1e-12)
    assert found.shape[1] == len(names(KS)) == 9
    assert names(KS)[:4] == ["HR@1", "HR@3", "HR@5", "Recall@1"]


def test_with_one_positive_a_day_recall_is_the_hit_rate():
    random = np.random.default_rng(0)
    list_RK = np.argsort(random.random((50, 20)), axis=1)
    target_R = random.integers(0, 20, 50)
    found = row_metrics(list_RK, target_R, np.arange(50), target_R, KS)
    np.testing.assert_array_equal(found[:, :3], found[:, 3:6])


def test_an_empty_place_is_never_a_hit():
    assert places(np.array([[-1, -1]]), np.array([-1])).tolist() == [2]
    assert found_share(np.array([[-1, 4]]), np.array([0]), np.array([4]), 1).tolist() == [0.0]


def test_a_list_shorter_than_k_hits_nothing_that_it_lacks():
    found = row_metrics(np.array([[3, 4], [3, 4]]), np.array([9, 4]), np.arange(2), np.array([9, 4]), KS)
    np.testing.assert_array_equal(found[0], np.zeros(9))
    np.testing.assert_array_equal(found[1][:6], [0, 1, 1, 0, 1, 1])


def test_intervals_agree_with_theory_when_every_user_has_one_row():
    value_RM = np.random.default_rng(1).random((400, 2))
    drawn = Resampled.draw(np.arange(400), 2000, seed=3)
    half_M = 1.96 * value_RM.std(axis=0) / 20
    want = np.stack([value_RM.mean(axis=0) - half_M, value_RM.mean(axis=0) + half_M], axis=1)
    np.testing.assert_allclose(drawn.interval(value_RM), want, atol=0.004)


def test_rows_of_one_user_are_not_counted_as_independent():
    """The same values said ten times by each user must not narrow the interval."""
    value_U1 = np.random.default_rng(2).random((60, 1))
    once = Resampled.draw(np.arange(60), 500, seed=1)
    tenfold = Resampled.draw(np.repeat(np.arange(60), 10), 500, seed=1)
    np.testing.assert_allclose(tenfold.interval(np.repeat(value_U1, 10, axis=0)), once.interval(value_U1))
    np.testing.assert_allclose(tenfold.p_value(np.repeat(value_U1 - 0.45, 10, axis=0)), once.p_value(value_U1 - 0.45))


def test_p_values_agree_with_the_paired_test():
    difference_RM = np.random.default_rng(4).normal([0.0, 0.1, 0.5], 1.0, (300, 3))
    found = Resampled.draw(np.arange(300), 0, seed=0).p_value(difference_RM)
    want = 2 * stats.norm.sf(np.abs(stats.ttest_1samp(difference_RM, 0).statistic))
    np.testing.assert_allclose(found, want, rtol=1e-9)


def test_equal_models_do_not_differ():
    drawn = Resampled.draw(np.array([5, 5, 9]), 10, seed=0)
    assert drawn.p_value(np.zeros((3, 1))).tolist() == [1.0]
    assert drawn.interval(np.zeros((3, 1))).tolist() == [[0.0, 0.0]]


def test_without_resamples_there_is_no_interval():
    assert np.isnan(Resampled.draw(np.arange(5), 0, seed=0).interval(np.ones((5, 2)))).all()


@pytest.mark.parametrize("users", [0, 1])
def test_too_few_users_prove_nothing(users):
    rows = np.zeros(users, dtype=int)
    assert Resampled.draw(rows, 0, seed=0).p_value(np.ones((users, 1))).tolist() == [1.0]
