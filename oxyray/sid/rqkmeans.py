"""RQ-KMeans: k-means on the vectors gives level-1 codes, k-means on what is left over gives the next level's, and so on (paper 2.2.2).

faiss runs Lloyd's algorithm (it reaches most of the speed of a matrix product, nothing is won by hand). What is added here: codes that no
vector uses are re-seeded at the vectors that are worst described, and the level is refined again, until all codes are used or no error is
left to seed from. A level with fewer different residuals than codes therefore ends with an exact description and some unused codes; that is
stated in `Fit`. Given the same vectors, settings and number of threads, the codes are the same.

Legend: N vectors, F dimensions, L levels, V codes a level.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oxyray.errors import CatalogueError
from oxyray.files import whole
from oxyray.progress import bar

Array = np.ndarray

_POINTS_PER_CODE = 1024  # k-means trains on at most this many vectors a code; beyond that, more of them move no centroid visibly
_RESEED_ROUNDS = 8
_RESEED_ITERATIONS = 4


@dataclass(frozen=True, eq=False)
class RQKMeans:
    """The codebook: `centroids_LVF` float32. A vector's reconstruction is the sum of its codes' centroids."""

    centroids_LVF: Array

    @property
    def levels(self) -> int:
        return int(self.centroids_LVF.shape[0])

    @property
    def width(self) -> int:
        return int(self.centroids_LVF.shape[1])

    def assign(self, vectors_NF: Array) -> Array:
        """Codes (N, L) int32 of vectors, each level the nearest centroid to the residual. Raises CatalogueError on another dimension or
        NaN."""
        residual_NF = _checked(vectors_NF).copy()
        if residual_NF.shape[1] != self.centroids_LVF.shape[2]:
            raise CatalogueError(
                f"vectors have {residual_NF.shape[1]} dimensions, the codebook {self.centroids_LVF.shape[2]}: "
                "use the encoder that the codebook was made with"
            )
        codes_NL = np.empty((len(residual_NF), self.levels), dtype=np.int32)
        for level in range(self.levels):
            codes_NL[:, level], _ = _nearest(self.centroids_LVF[level], residual_NF)
            residual_NF -= self.centroids_LVF[level][codes_NL[:, level]]
        return codes_NL

    def reconstruct(self, codes_NL: Array) -> Array:
        """(N, F): the vectors that these codes, or their first levels, stand for."""
        vectors_NF = np.zeros((len(codes_NL), self.centroids_LVF.shape[2]), dtype=np.float32)
        for level in range(codes_NL.shape[1]):
            vectors_NF += self.centroids_LVF[level][codes_NL[:, level]]
        return vectors_NF

    def errors(self, vectors_NF: Array, codes_NL: Array) -> Array:
        """Squared distance of each vector to what its codes stand for: (N,) float64."""
        left_NF = np.asarray(vectors_NF, dtype=np.float32) - self.reconstruct(codes_NL)
        return np.einsum("nf,nf->n", left_NF, left_NF, dtype=np.float64)

    def save(self, path: Path) -> None:
        with whole(Path(path)) as part, open(part, "wb") as file:
            np.savez(file, centroids_LVF=self.centroids_LVF)

    @classmethod
    def load(cls, path: Path) -> RQKMeans:
        """Raises CatalogueError when the file is absent, damaged, or holds something else than finite centroids (L, V, F)."""
        centroids_LVF = read_arrays(path, ["centroids_LVF"])["centroids_LVF"]
        if (
            centroids_LVF.ndim != 3
            or centroids_LVF.dtype != np.float32
            or min(centroids_LVF.shape) == 0
            or not np.isfinite(centroids_LVF).all()
        ):
            raise CatalogueError(f"{path}: not finite float32 centroids (levels, codes, dimensions): run `oxyray sid` again")
        return cls(centroids_LVF)


@dataclass(frozen=True, eq=False)
class Fit:
    """What a fit gave: the codebook, the codes (N, L) of the vectors it was fitted on, and per level what a person should know.

    `unused_L`: codes that no vector has; `left_L`: what is left over after the level, as a share of the vectors' variance; `duplicates`:
    vectors that equal an earlier one (equal vectors share a SID, whatever the settings)."""

    codebook: RQKMeans
    codes_NL: Array
    unused_L: tuple[int, ...]
    left_L: tuple[float, ...]
    duplicates: int


def fit(vectors_NF: Array, *, levels: int, width: int, iterations: int = 25, seed: int = 7) -> Fit:
    """Fit `levels` codebooks of `width` codes. Raises CatalogueError on NaN or infinite values, all-zero vectors, and fewer different
    vectors than codes (level 1 could never use them all)."""
    vectors_NF = _checked(vectors_NF)
    distinct = len(np.unique(_row_bytes(vectors_NF)))
    if distinct < width:
        raise CatalogueError(
            f"{len(vectors_NF)} items have {distinct} different vectors, fewer than the {width} codes of a level: "
            f"set sid.width={power_below(distinct)} or lower"
        )
    zero = np.flatnonzero(~vectors_NF.any(axis=1))
    if len(zero):
        raise CatalogueError(
            f"{len(zero)} vectors are all zeros, the first in row {zero[0]}: such an item has nothing to be told apart by; give it a text"
        )
    residual_NF = vectors_NF.copy()
    codes_NL = np.empty((len(vectors_NF), levels), dtype=np.int32)
    centroids, unused, left = [], [], []
    variance = _mean_square(vectors_NF - vectors_NF.mean(axis=0))
    progress = bar(levels, "RQ-KMeans", "level")
    for level in range(levels):
        centroids_VF, codes_NL[:, level] = _level(residual_NF, width, iterations, seed + level)
        residual_NF -= centroids_VF[codes_NL[:, level]]
        centroids.append(centroids_VF)
        unused.append(width - len(np.unique(codes_NL[:, level])))
        left.append(_mean_square(residual_NF) / variance)
        progress.update(1)
    progress.close()
    return Fit(RQKMeans(np.stack(centroids)), codes_NL, tuple(unused), tuple(left), len(vectors_NF) - distinct)


def read_arrays(path: Path, names: list[str]) -> dict[str, Array]:
    """The named arrays of an npz file. Raises CatalogueError when it is absent, damaged, or lacks one; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as held:
            return {name: held[name] for name in names}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise CatalogueError(f"{path}: not readable ({type(error).__name__}: {str(error).strip()}): run `oxyray sid` again") from error


def _level(vectors_NF: Array, width: int, iterations: int, seed: int) -> tuple[Array, Array]:
    """k-means with dead codes re-seeded: centroids (V, F) and codes (N,)."""
    centroids_VF = _lloyd(vectors_NF, width, iterations, seed, None)
    codes_N, distance_N = _nearest(centroids_VF, vectors_NF)
    for _ in range(_RESEED_ROUNDS):
        dead = np.flatnonzero(np.bincount(codes_N, minlength=width) == 0)
        seeds = _worst_described(vectors_NF, distance_N, len(dead))
        if len(seeds) == 0:
            break
        centroids_VF[dead[: len(seeds)]] = vectors_NF[seeds]
        centroids_VF = _lloyd(vectors_NF, width, _RESEED_ITERATIONS, seed, centroids_VF)
        codes_N, distance_N = _nearest(centroids_VF, vectors_NF)
    return centroids_VF, codes_N


def _worst_described(vectors_NF: Array, distance_N: Array, count: int) -> Array:
    """Rows of up to `count` different vectors farthest from their centroids, none of them already exact (up to float32 rounding)."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    scale_N = np.einsum("nf,nf->n", vectors_NF, vectors_NF)
    off = np.flatnonzero(distance_N > 1e-5 * max(float(scale_N.mean()), 1e-30))
    order = off[np.argsort(-distance_N[off], kind="stable")]
    _, first = np.unique(_row_bytes(vectors_NF[order]), return_index=True)
    return order[np.sort(first)[:count]]


def _lloyd(vectors_NF: Array, width: int, iterations: int, seed: int, start_VF: Array | None) -> Array:
    import faiss

    kmeans = faiss.Kmeans(
        vectors_NF.shape[1],
        width,
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=_POINTS_PER_CODE,
        verbose=False,
    )
    kmeans.train(vectors_NF, init_centroids=start_VF)
    return np.ascontiguousarray(kmeans.centroids, dtype=np.float32)


def _nearest(centroids_VF: Array, vectors_NF: Array) -> tuple[Array, Array]:
    """The nearest centroid of each vector and the squared distance to it."""
    import faiss

    index = faiss.IndexFlatL2(centroids_VF.shape[1])
    index.add(np.ascontiguousarray(centroids_VF))
    distance_N1, code_N1 = index.search(np.ascontiguousarray(vectors_NF), 1)
    return code_N1[:, 0].astype(np.int32), np.maximum(distance_N1[:, 0], 0)


def _checked(vectors_NF: Array) -> Array:
    vectors_NF = np.ascontiguousarray(vectors_NF, dtype=np.float32)
    if vectors_NF.ndim != 2 or vectors_NF.shape[1] == 0:
        raise CatalogueError(f"vectors must be (items, dimensions), got shape {vectors_NF.shape}")
    bad = np.flatnonzero(~np.isfinite(vectors_NF).all(axis=1))
    if len(bad):
        raise CatalogueError(
            f"{len(bad)} vectors hold NaN or infinite values, the first in row {bad[0]}: look at that item's text and at the encoder"
        )
    return vectors_NF


def _mean_square(vectors_NF: Array) -> float:
    return float(np.einsum("nf,nf->n", vectors_NF, vectors_NF, dtype=np.float64).mean())


def _row_bytes(vectors_NF: Array) -> Array:
    """Each row as one opaque value, so that equal rows can be found by sorting. -0.0 counts as 0.0."""
    rows = np.ascontiguousarray(vectors_NF + np.float32(0))
    return rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))[:, 0]


def power_below(count: int) -> int:
    """The largest power of two up to `count`, at least 2: a width that works."""
    return 1 << max(count.bit_length() - 1, 1)
