"""Behaviour vectors: what users took together, as a dense vector an item, joined with the text vectors.

Counts how often two items stand within a few places of each other in users' training sequences, turns the counts into positive pointwise
mutual information, and keeps the leading singular vectors. Text says what an item is, behaviour what it goes with; SIDs made from both put
items that follow one another nearer together, and tell apart items whose texts are alike. Only training events may be given: a held-out
event that shaped the SIDs would be a leak.

Legend: N events or new items, I items, F text, D behaviour, J joined, P principal dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from scipy import sparse

from oxyray.errors import CatalogueError
from oxyray.files import whole
from oxyray.sid.rqkmeans import read_arrays

Array = np.ndarray

WINDOW = 5  # places between two events that still count as together
_OVERSAMPLE, _POWER_ITERATIONS = 16, 6


def cooccurrence(parts: Iterable[tuple[Array, Array]], items: int, window: int = WINDOW) -> sparse.csr_matrix:
    """Symmetric counts (I, I): how often two different items stand at most `window` places apart in one user's sequence.

    `parts` yields `(user_N, item_N)`, each sorted by user and within a user by time; a user lies wholly in one part.
    """
    counts = sparse.csr_matrix((items, items), dtype=np.float64)
    for user_N, item_N in parts:
        for step in range(1, window + 1):
            together = (user_N[step:] == user_N[:-step]) & (item_N[step:] != item_N[:-step])
            left, right = item_N[:-step][together], item_N[step:][together]
            counts = counts + sparse.csr_matrix((np.ones(len(left)), (left, right)), shape=(items, items))
    return sparse.csr_matrix(counts + counts.T)


def positive_pmi(counts_II: sparse.csr_matrix) -> sparse.csr_matrix:
    """max(0, log(p(i, j) / (p(i) p(j)))) at the pairs that occur, zero elsewhere."""
    pairs = counts_II.tocoo()
    share_I = np.asarray(counts_II.sum(axis=1)).ravel()
    value = np.log(pairs.data * share_I.sum() / (share_I[pairs.row] * share_I[pairs.col]))
    ppmi = sparse.csr_matrix((np.maximum(value, 0), (pairs.row, pairs.col)), shape=counts_II.shape)
    ppmi.eliminate_zeros()
    return ppmi


def singular_vectors(matrix_II: sparse.csr_matrix, dim: int, seed: int) -> Array:
    """Left singular vectors times the square roots of their values, (I, dim) float32, largest first, by randomised subspace iteration.

    Signs are fixed (the largest entry of a column is positive), so that equal seeds give equal vectors. Columns beyond the rank are zero.
    """
    items = matrix_II.shape[0]
    dim_kept = min(dim, items)
    size = min(dim_kept + _OVERSAMPLE, items)
    basis = np.random.default_rng(seed).standard_normal((items, size))
    for _ in range(_POWER_ITERATIONS):
        basis, _ = np.linalg.qr(matrix_II @ (matrix_II.T @ basis))
    small = (matrix_II.T @ basis).T
    left, values, _ = np.linalg.svd(small, full_matrices=False)
    vectors = (basis @ left[:, :dim_kept]) * np.sqrt(values[:dim_kept])
    return np.pad(_fix_signs(vectors), ((0, 0), (0, dim - dim_kept))).astype(np.float32)


def behaviour_vectors(parts: Iterable[tuple[Array, Array]], items: int, dim: int, seed: int, window: int = WINDOW) -> Array:
    """(I, dim) float32, rows of length 1; an item that never stands beside another has a zero row. Raises CatalogueError on no pair at
    all."""
    counts_II = cooccurrence(parts, items, window)
    if counts_II.nnz == 0:
        raise CatalogueError("no user has two different items in the training events: behaviour vectors need some; set sid.vectors=text")
    return _unit(singular_vectors(positive_pmi(counts_II), dim, seed))


@dataclass(frozen=True, eq=False)
class Joiner:
    """Makes the vectors that are quantised from text and behaviour vectors; kept beside the codebook, so that new items get theirs the same
    way.

    With `behaviour` on, text vectors are centred by `centre_F` and brought to length 1, and stand beside behaviour vectors of length
    `weight`. `mean_J` and `directions_JP` are the PCA (P = 0: none). Text alone without PCA passes through unchanged."""

    centre_F: Array
    weight: float
    behaviour_dim: int
    mean_J: Array
    directions_JP: Array

    @classmethod
    def fit(cls, text_IF: Array, behaviour_ID: Array | None, weight: float, pca_dim: int) -> Joiner:
        """Raises CatalogueError where `pca_dim` is more than the vectors or the items have."""
        with_behaviour = behaviour_ID is not None
        centre_F = text_IF.mean(axis=0) if with_behaviour else np.zeros(text_IF.shape[1], dtype=np.float32)
        dims = text_IF.shape[1] + (behaviour_ID.shape[1] if behaviour_ID is not None else 0)
        plain = cls(centre_F, weight, dims - text_IF.shape[1], np.zeros(dims, dtype=np.float32), np.zeros((dims, 0), dtype=np.float32))
        if pca_dim == 0:
            return plain
        if pca_dim > min(len(text_IF), dims):
            raise CatalogueError(
                f"sid.pca_dim={pca_dim} is more than {len(text_IF)} items in {dims} dimensions have: lower it, or 0 for none"
            )
        joined_IJ = plain.apply(text_IF, behaviour_ID).astype(np.float64)
        mean_J = joined_IJ.mean(axis=0)
        _, directions = np.linalg.eigh((joined_IJ - mean_J).T @ (joined_IJ - mean_J))
        directions_JP = _fix_signs(directions[:, ::-1][:, :pca_dim])
        return replace(plain, mean_J=mean_J.astype(np.float32), directions_JP=directions_JP.astype(np.float32))

    def apply(self, text_NF: Array, behaviour_ND: Array | None = None) -> Array:
        """(N, J) or, with PCA, (N, P) float32. Items that nobody has taken yet need no behaviour vectors: theirs are zero."""
        joined_NJ = text_NF.astype(np.float32)
        if self.behaviour_dim:
            if behaviour_ND is None:
                behaviour_ND = np.zeros((len(text_NF), self.behaviour_dim), dtype=np.float32)
            joined_NJ = np.concatenate([_unit(joined_NJ - self.centre_F), np.float32(self.weight) * behaviour_ND], axis=1)
        return (joined_NJ - self.mean_J) @ self.directions_JP if self.directions_JP.shape[1] else joined_NJ

    def save(self, path: Path) -> None:
        with whole(Path(path)) as part, open(part, "wb") as file:
            np.savez(
                file,
                centre_F=self.centre_F,
                weight=np.asarray(self.weight),
                behaviour_dim=np.asarray(self.behaviour_dim),
                mean_J=self.mean_J,
                directions_JP=self.directions_JP,
            )

    @classmethod
    def load(cls, path: Path) -> Joiner:
        """Raises CatalogueError when the file is absent or damaged."""
        held = read_arrays(path, [f.name for f in fields(cls)])
        dims = len(held["centre_F"]) + int(held["behaviour_dim"])
        if held["mean_J"].shape != (dims,) or len(held["directions_JP"]) != dims:
            raise CatalogueError(f"{path}: its arrays do not fit each other: run `oxyray sid` again")
        return cls(held["centre_F"], float(held["weight"]), int(held["behaviour_dim"]), held["mean_J"], held["directions_JP"])


def _fix_signs(columns: Array) -> Array:
    """The largest entry of each column made positive, since singular vectors come with either sign."""
    return columns * np.sign(columns[np.abs(columns).argmax(axis=0), np.arange(columns.shape[1])])


def _unit(vectors_IF: Array) -> Array:
    length_I1 = np.linalg.norm(vectors_IF, axis=1, keepdims=True)
    return np.divide(vectors_IF, length_I1, out=np.zeros_like(vectors_IF), where=length_I1 > 0)
