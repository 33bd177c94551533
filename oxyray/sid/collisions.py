"""Items that share a SID are told apart, in one of two ways.

At the last level (`told_apart`): all but the one that its code describes best move to the nearest code that is free below the same prefix.
The prefix, which carries the meaning, stays; what a move costs in error is bounded. Or by a level more (`numbered`), which means nothing
and counts the items that share the others.

Legend: N items, F dimensions, L levels, V codes a level, H items that look for a code.
"""

from __future__ import annotations

import numpy as np

from oxyray.sid.lloyd import different
from oxyray.sid.rqkmeans import RQKMeans

Array = np.ndarray

_AT_ONCE = 2**24  # distances held at a time


def told_apart(codes_NL: Array, vectors_NF: Array, codebook: RQKMeans, limit: float, taken_ML: Array | None = None) -> Array:
    """Codes (N, L) with collisions resolved where they can be; what `taken_ML` (published SIDs) holds is free for nobody.

    `limit`: a move may leave at most this many times the mean squared error that there was before the last level, equal vectors counted
    once. Items that find no code within it, or a prefix whose codes are all taken, keep the SID that they share. Equal input gives equal
    output.
    """
    codes_NL = codes_NL.copy()
    width, centroids_VF = codebook.width, codebook.centroids_LVF[-1].astype(np.float32)
    residual_NF = np.asarray(vectors_NF, dtype=np.float32) - codebook.reconstruct(codes_NL[:, :-1])
    distinct = different(vectors_NF)  # one vector ten thousand times says nothing about the others
    most = limit * float(np.square(residual_NF[distinct]).sum(axis=1).mean()) if len(residual_NF) else 0.0
    published_ML = codes_NL[:0] if taken_ML is None else taken_ML
    _, prefix_A = np.unique(np.concatenate([published_ML, codes_NL])[:, :-1], axis=0, return_inverse=True)
    prefix_N = prefix_A.reshape(-1)[len(published_ML) :].astype(np.int64)
    taken = np.unique(prefix_A.reshape(-1)[: len(published_ML)] * width + published_ML[:, -1])
    error_N = np.square(residual_NF - centroids_VF[codes_NL[:, -1]]).sum(axis=1)
    homeless_H, taken = _settle(np.arange(len(codes_NL)), prefix_N * width + codes_NL[:, -1], error_N, taken)
    while len(homeless_H):
        code_H, error_H = _nearest_free(residual_NF[homeless_H], prefix_N[homeless_H], centroids_VF, taken)
        found_H = error_H <= most
        homeless_H, code_H, error_H = homeless_H[found_H], code_H[found_H], error_H[found_H]
        left_H, taken = _settle(homeless_H, prefix_N[homeless_H] * width + code_H, error_H, taken)
        settled_H = ~np.isin(homeless_H, left_H)
        codes_NL[homeless_H[settled_H], -1] = code_H[settled_H]
        homeless_H = left_H
    return codes_NL


def numbered(codes_NL: Array, width: int, taken_ML: Array | None = None) -> Array:
    """Codes (N, L + 1): behind the others each item's number among those that share them, in the order of the rows; published SIDs
    (`taken_ML`, of L + 1 levels) keep theirs, and new items count on. What exceeds `width` keeps the last number, and so a shared SID.
    """
    published_ML = np.zeros((0, codes_NL.shape[1] + 1), dtype=codes_NL.dtype) if taken_ML is None else taken_ML
    _, prefix_A = np.unique(np.concatenate([published_ML[:, :-1], codes_NL]), axis=0, return_inverse=True)
    prefix_M, prefix_N = np.split(prefix_A.reshape(-1), [len(published_ML)])
    next_G = np.zeros(prefix_A.max(initial=-1) + 1, dtype=np.int64)
    np.maximum.at(next_G, prefix_M, published_ML[:, -1].astype(np.int64) + 1)
    order_N = np.argsort(prefix_N, kind="stable")
    first_N = np.searchsorted(prefix_N[order_N], prefix_N[order_N])
    number_N = np.empty(len(codes_NL), dtype=np.int64)
    number_N[order_N] = np.arange(len(codes_NL)) - first_N + next_G[prefix_N[order_N]]
    return np.concatenate([codes_NL, np.minimum(number_N, width - 1)[:, None].astype(codes_NL.dtype)], axis=1)


def _settle(item_H: Array, key_H: Array, error_H: Array, taken: Array) -> tuple[Array, Array]:
    """Each free SID goes to whoever it describes best (then to the first): those who are left without one, and all SIDs now taken."""
    order = np.lexsort((item_H, error_H, key_H))
    first = np.ones(len(order), dtype=bool)
    first[1:] = key_H[order][1:] != key_H[order][:-1]
    wins = first & ~np.isin(key_H[order], taken)
    return np.sort(item_H[order[~wins]]), np.union1d(taken, key_H[order[wins]])


def _nearest_free(residual_HF: Array, prefix_H: Array, centroids_VF: Array, taken: Array) -> tuple[Array, Array]:
    """The nearest code that is free below each one's prefix, and the squared error of taking it (infinite where none is free)."""
    width = len(centroids_VF)
    code_H, error_H = np.zeros(len(residual_HF), dtype=np.int32), np.zeros(len(residual_HF), dtype=np.float32)
    square_V = np.einsum("vf,vf->v", centroids_VF, centroids_VF)
    step = max(1, _AT_ONCE // width)
    for first in range(0, len(residual_HF), step):
        here = slice(first, first + step)
        part_hF = residual_HF[here]
        error_hV = np.einsum("hf,hf->h", part_hF, part_hF)[:, None] + square_V - 2 * part_hF @ centroids_VF.T
        error_hV[np.isin(prefix_H[here, None] * width + np.arange(width), taken)] = np.inf
        code_H[here] = error_hV.argmin(axis=1)
        error_H[here] = error_hV.min(axis=1)
    return code_H, error_H
