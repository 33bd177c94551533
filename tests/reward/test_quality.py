"""AUC, GAUC and calibration against scikit-learn and loops written out."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from oxyray.reward.quality import auc, calibration_error, gauc


@pytest.mark.parametrize("seed", range(5))
def test_auc_and_gauc(seed: int):
    random = np.random.default_rng(seed)
    label, group = random.random(400) < 0.2, random.integers(-3, 40, 400)
    score = np.round(random.normal(size=400) + label, 1)  # many ties
    assert auc(score, label) == pytest.approx(roc_auc_score(label, score))
    rows = [np.flatnonzero(group == g) for g in np.unique(group)]
    both = [r for r in rows if 0 < label[r].sum() < len(r)]
    want = sum(len(r) * roc_auc_score(label[r], score[r]) for r in both) / sum(len(r) for r in both)
    assert gauc(score, label, group) == pytest.approx(want)


def test_gauc_is_blind_to_what_a_page_shares():
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(50), 8)
    label, score, level = random.random(400) < 0.3, random.normal(size=400), 10 * random.normal(size=50)
    assert gauc(score + level[group], label, group) == pytest.approx(gauc(score, label, group))


def test_calibration():
    random = np.random.default_rng(1)
    chance = random.beta(1, 15, 20_000)
    label = random.random(20_000) < chance
    order = np.argsort(chance)
    want = sum(abs(chance[rows].mean() - label[rows].mean()) * len(rows) for rows in np.array_split(order, 20)) / 20_000
    assert calibration_error(chance, label) == pytest.approx(want)
    assert calibration_error(chance, label) < 0.01
    assert calibration_error(chance + 0.05, label) == pytest.approx(0.05, abs=0.005)
    assert calibration_error(np.full(10, 0.3), np.arange(10) < 3) == pytest.approx(0)  # one score is one bin, whatever the order
    assert calibration_error(np.full(10, 0.3), np.arange(10) >= 7) == pytest.approx(0)


def test_nothing_to_tell():
    assert np.isnan(auc(np.zeros(3), np.ones(3)))
    assert np.isnan(gauc(np.zeros(3), np.zeros(3), np.arange(3)))
    assert np.isnan(auc(np.zeros(0), np.zeros(0)))
    assert np.isnan(calibration_error(np.zeros(0), np.zeros(0)))
