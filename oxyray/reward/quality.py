"""How well a ranker ranks and whether its probabilities are right: AUC, GAUC, calibration. Arrays in, numbers out.

- AUC: the chance that a positive scores higher than a negative, a tie counting half. NaN where one of the two is missing.
- GAUC: AUC within each group (a page), averaged with the group's size as weight, over groups that have both. It is blind to what all items
  of a page share, and so to a level that only tells pages apart.
- Calibration error (ECE): scores in bins of equal size; the mean distance between a bin's mean score and its share of positives. Bins of
  equal width would put nearly all of a shop's small probabilities into the first.

Legend: N scored items, G groups, K bins.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def auc(score_N: Array, label_N: Array) -> float:
    return float(_group_auc(score_N, label_N, np.zeros(len(score_N), np.int64))[0][0]) if len(score_N) else float("nan")


def gauc(score_N: Array, label_N: Array, group_N: Array) -> float:
    """`group_N` may be any integers. NaN where no group has positives and negatives."""
    auc_G, size_G = _group_auc(score_N, label_N, np.unique(group_N, return_inverse=True)[1])
    both = ~np.isnan(auc_G)
    return float(np.average(auc_G[both], weights=size_G[both])) if both.any() else float("nan")


def calibration_error(chance_N: Array, label_N: Array, bins: int = 20) -> float:
    if not len(chance_N):
        return float("nan")
    order = np.argsort(chance_N, kind="stable")
    bin_N = np.arange(len(order)) * bins // len(order)
    # Ties of one score stay together: they go where the first of them is.
    tied_N = np.maximum.accumulate(np.where(np.diff(chance_N[order], prepend=-np.inf) != 0, np.arange(len(order)), 0))
    gap_K = np.bincount(bin_N[tied_N], weights=(chance_N - label_N)[order], minlength=bins)
    return float(np.abs(gap_K).sum() / len(order))


def _group_auc(score_N: Array, label_N: Array, group_N: Array) -> tuple[Array, Array]:
    """AUC and size of each group (numbered from 0), by the ranks of its positives (Mann-Whitney)."""
    order = np.lexsort((score_N, group_N))
    group, score, positive = group_N[order], score_N[order], label_N[order].astype(bool)
    size_G = np.bincount(group)
    start_N = np.repeat(np.cumsum(size_G) - size_G, size_G)
    new_N = (np.diff(group, prepend=-1) != 0) | (np.diff(score, prepend=np.nan) != 0)
    first = np.flatnonzero(new_N)
    last = np.append(first[1:], len(order)) - 1
    rank_N = ((first + last) / 2)[np.cumsum(new_N) - 1] - start_N + 1  # ties share the mean of their ranks
    positive_G = np.bincount(group, weights=positive)
    total_G = np.bincount(group, weights=np.where(positive, rank_N, 0))
    pairs_G = positive_G * (size_G - positive_G)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs_G > 0, (total_G - positive_G * (positive_G + 1) / 2) / pairs_G, np.nan), size_G
